# SPDX-License-Identifier: BSD-3-Clause
"""The definition: every cell in plain differentiable torch, and the loop over time that all of them share.

The tests measure the kernels against these functions in float64, the benchmark uses them as a baseline, and
derivatives of higher order are taken through them. `rnn_layer`, `gru_layer` and `lstm_layer` have the signatures of
`fastrnn.ops`: one layer, one direction, no write into any argument, differentiable in every floating-point argument.

Letters: T time, B batch, I input, H hidden, P projection, N the sum of `batch_sizes`, G gates per cell.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

# A cell takes the gates' share of the input (*, G*H), their share of the hidden state (*, G*H) and the states, each
# (*, H). It returns the next states, h first.
States = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, States], States]


def rnn_cell(gx: Tensor, gh: Tensor, states: States, nonlinearity: str = "tanh") -> States:
    """Computes h' = tanh(gx + gh), or relu(gx + gh)."""
    return ({"tanh": torch.tanh, "relu": torch.relu}[nonlinearity](gx + gh),)


def gru_gates(gx: Tensor, gh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes r, z = sigmoid(gx + gh); n = tanh(gx + r gh)."""
    gx_r, gx_z, gx_n = gx.chunk(3, -1)
    gh_r, gh_z, gh_n = gh.chunk(3, -1)
    r = torch.sigmoid(gx_r + gh_r)
    z = torch.sigmoid(gx_z + gh_z)
    return r, z, torch.tanh(gx_n + r * gh_n)


def gru_cell(gx: Tensor, gh: Tensor, states: States) -> States:
    """Computes h' = (1 - z) n + z h, with the gates of `gru_gates`."""
    (h,) = states
    _, z, n = gru_gates(gx, gh)
    return ((1 - z) * n + z * h,)


def lstm_gates(gx: Tensor, gh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes i, f, o = sigmoid(gx + gh); g = tanh(gx + gh)."""
    i, f, g, o = (gx + gh).chunk(4, -1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def lstm_cell(gx: Tensor, gh: Tensor, states: States) -> States:
    """Computes c' = f c + i g; h' = o tanh(c'), with the gates of `lstm_gates`."""
    _, c = states
    i, f, g, o = lstm_gates(gx, gh)
    c = f * c + i * g
    return o * torch.tanh(c), c


def _run(
    cell: Cell,
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    states: States,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, States]:
    """Steps a cell through time. Returns the output of every step and the states after the last one."""
    x_gates = input if w_ih is None else linear(input, w_ih, b_ih)
    steps: Sequence[Tensor] = x_gates.unbind() if batch_sizes is None else torch.split(x_gates, batch_sizes.tolist())
    outputs: list[Tensor] = []
    for gx in reversed(steps) if reverse else steps:
        # Rows are sorted by length: the first ones are active. The others have ended or, in reverse, not begun.
        active = tuple(state[: len(gx)] for state in states)
        h, *rest = cell(gx, linear(active[0], w_hh, b_hh), active)
        if w_hr is not None:
            h = linear(h, w_hr)
        outputs.append(h)
        states = (h, *rest) if len(h) == len(states[0]) else _replace_first_rows(states, (h, *rest))
    if not outputs:
        return x_gates.new_empty(*x_gates.shape[:-1], states[0].shape[-1]), states
    if reverse:
        outputs.reverse()
    return (torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)), states


def _replace_first_rows(states: States, rows: States) -> States:
    return tuple(torch.cat([new, state[len(new) :]]) for state, new in zip(states, rows, strict=True))


def rnn_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Runs one direction of one RNN layer; see `lstm_layer` for the arguments.

    Returns:
        output (T, B, H), or packed (N, H), and h_n (B, H).
    """
    cell = partial(rnn_cell, nonlinearity=nonlinearity)
    output, (h_n,) = _run(cell, input, w_ih, w_hh, b_ih, b_hh, (h0,), None, batch_sizes, reverse)
    return output, h_n


def gru_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs one direction of one GRU layer; see `lstm_layer` for the arguments.

    Returns:
        output (T, B, H), or packed (N, H), and h_n (B, H).
    """
    output, (h_n,) = _run(gru_cell, input, w_ih, w_hh, b_ih, b_hh, (h0,), None, batch_sizes, reverse)
    return output, h_n


def lstm_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    *,
    w_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one direction of one LSTM layer.

    Args:
        input: (T, B, I), or packed (N, I). Without `w_ih`: x_gates = W_ih x + b_ih, (..., G*H).
        w_ih: (G*H, I), or None.
        w_hh: (G*H, H), or (G*H, P) with a projection.
        b_ih: (G*H,), or None.
        b_hh: (G*H,), or None.
        h0: (B, H), or (B, P) with a projection.
        c0: (B, H).
        w_hr: the projection (P, H), or None.
        batch_sizes: for packed input, the number of sequences that reach each step: (T,), int64, not increasing.
        reverse: step from the last time to the first.

    Returns:
        output (T, B, H or P), or packed (N, H or P), h_n (B, H or P) and c_n (B, H).
    """
    output, (h_n, c_n) = _run(lstm_cell, input, w_ih, w_hh, b_ih, b_hh, (h0, c0), w_hr, batch_sizes, reverse)
    return output, h_n, c_n
