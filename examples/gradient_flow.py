# SPDX-License-Identifier: BSD-3-Clause
"""Shows how the gradient flows back through 200 steps of an RNN, a GRU and an LSTM that have not been trained.

    python examples/gradient_flow.py
    python examples/gradient_flow.py --steps 500 --plot flow.png

The loss reads the last step alone, so that what reaches the first one has passed all others. As torch.nn draws weights,
it vanishes in all three, in the LSTM too, whose forget gate begins half shut. With forget_bias=5 the gate begins open.
In an RNN of relu, whose recurrent weights are a multiple of the identity, the gradient explodes.
Needs matplotlib: pip install 'fastrnn[examples]'
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import fastrnn
from fastrnn.diagnostics import draw, gradient_flow, saturation

FEATURES, HIDDEN, BATCH = 8, 64, 32


def relu_rnn() -> fastrnn.RNN:
    """An RNN whose state grows by 5 % at each step."""
    rnn = fastrnn.RNN(FEATURES, HIDDEN, nonlinearity="relu")
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(1.05 * torch.eye(HIDDEN))
    return rnn


MODELS = {
    "RNN": lambda: fastrnn.RNN(FEATURES, HIDDEN),
    "GRU": lambda: fastrnn.GRU(FEATURES, HIDDEN),
    "LSTM": lambda: fastrnn.LSTM(FEATURES, HIDDEN),
    "LSTM, forget_bias=5": lambda: fastrnn.LSTM(FEATURES, HIDDEN, forget_bias=5),
    "RNN of relu, weights 1.05 I": relu_rnn,
}


def loss_of_the_last_step(result: tuple[Tensor, object], direction: Tensor) -> Tensor:
    """Of what a module returns, output and state: the same gradient at the last step for every model."""
    return (result[0][-1] * direction).mean()


def main() -> None:
    """Measures each model, prints gradients and saturated gates, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="length of the sequences")
    parser.add_argument("--plot", type=Path, default=Path("gradient_flow.png"))
    args = parser.parse_args()

    torch.manual_seed(0)
    batch = torch.randn(args.steps, BATCH, FEATURES), torch.randn(BATCH, HIDDEN)
    flows = {}
    for name, make in MODELS.items():
        model = make()
        flows[name] = gradient_flow(model, batch, loss_of_the_last_step)
        print(f"{name}\n  {flows[name]}")
        print("  " + str(saturation(model, batch)).replace("\n", "\n  "))
    draw(flows, args.plot)
    print(f"Plot: {args.plot}")


if __name__ == "__main__":
    main()
