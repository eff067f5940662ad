# SPDX-License-Identifier: BSD-3-Clause
"""What is measured: shapes, cases, and the tensors that all contenders of a case share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

Call = Callable[[], list[Tensor]]

CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
MODES = {
    "infer": "forward under inference_mode",
    "fwd": "training forward, which keeps what backward needs",
    "train": "forward, then backward with the gradients of the input, the initial states and every weight",
    "fit": "Keras's fit() on the layer and Dense(1): an epoch of 10 batches with Adam and the mean square error",
}
# tf32 is float32 storage whose products may use TensorFloat-32, which is cuDNN's default; fp32 forbids it.
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
# Relative rounding error of one operand of a product.
ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11, "fp64": 2.0**-53}


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem. `shortest` packs B sequences whose lengths go evenly from T down to it."""

    T: int
    B: int
    I: int  # noqa: E741 (the project's letter for the input size)
    H: int
    L: int = 1
    D: int = 1
    shortest: int | None = None

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads "T,B,I,H", or "T,B,H" with I = H, followed by any of L=, D= and packed=.

        Raises:
            ValueError: The message names the part at fault.
        """
        sizes, options = [], {}
        for part in text.split(","):
            name, equals, value = part.rpartition("=")
            if not (value.isascii() and value.isdigit()) or int(value) == 0:
                raise ValueError(f"shape '{text}': expected a positive whole number, got '{value}'")
            if not equals:
                sizes.append(int(value))
            elif name in ("L", "D", "packed"):
                options["shortest" if name == "packed" else name] = int(value)
            else:
                raise ValueError(f"shape '{text}': expected L=, D= or packed=, got '{name}='")
        if len(sizes) not in (3, 4):
            raise ValueError(f"shape '{text}': expected T,B,I,H or T,B,H, got {len(sizes)} sizes")
        if options.get("D", 1) > 2:
            raise ValueError(f"shape '{text}': expected D=1 or D=2 directions")
        if options.get("shortest", 1) > sizes[0]:
            raise ValueError(f"shape '{text}': expected packed= (the shortest length) to be at most T")
        T, B, *rest = sizes
        return cls(T, B, rest[0], rest[-1], **options)

    def __str__(self) -> str:
        """What `parse` reads."""
        sizes = f"{self.T},{self.B},{self.H}" if self.I == self.H else f"{self.T},{self.B},{self.I},{self.H}"
        options = {"L": self.L if self.L > 1 else None, "D": self.D if self.D > 1 else None, "packed": self.shortest}
        return sizes + "".join(f",{name}={value}" for name, value in options.items() if value)

    @property
    def lengths(self) -> list[int]:
        """Length of each sequence, longest first."""
        return [int(n) for n in torch.linspace(self.T, self.shortest or self.T, self.B).round()]


@dataclass(frozen=True)
class Case:
    """What one measurement is of."""

    cell: str
    shape: Shape
    dtype: str
    mode: str
    device: str
    threads: int
    graph: bool = False  # one CUDA graph per call

    def __str__(self) -> str:
        """One line for the progress bar."""
        where = f"{self.threads} thr" if self.device == "cpu" else "graph" if self.graph else "eager"
        return f"{self.cell} {self.mode} {self.dtype} {self.shape} {where}"


class Problem:
    """Weights, inputs, initial states and output gradients of a case, the same for every contender."""

    def __init__(self, case: Case, pack_weights: bool = False) -> None:
        """Draws everything from a fixed seed, the weights at torch.nn's own initial scale."""
        import fastrnn

        s = case.shape
        self.case = case
        torch.manual_seed(0)
        factory: dict[str, Any] = {"dtype": DTYPES[case.dtype], "device": case.device}
        options: dict[str, Any] = {"num_layers": s.L, "bidirectional": s.D == 2, **factory}
        self.torch_module: torch.nn.RNNBase = getattr(torch.nn, CELLS[case.cell])(s.I, s.H, **options)
        self.fast_module: torch.nn.RNNBase = getattr(fastrnn, CELLS[case.cell])(s.I, s.H, **options)
        self.fast_module.load_state_dict(self.torch_module.state_dict())
        if pack_weights:
            fastrnn.pack_weights(self.fast_module)
        for module in (self.torch_module, self.fast_module):
            module.train(case.mode != "infer")

        self.padded = torch.randn(s.T, s.B, s.I, **factory)
        self.data, self.batch_sizes = self.padded, None
        if s.shortest:
            self.data, self.batch_sizes, *_ = pack_padded_sequence(self.padded, torch.tensor(s.lengths))
        count = 2 if case.cell == "lstm" else 1
        self.states = [torch.randn(s.L * s.D, s.B, s.H, **factory) for _ in range(count)]
        self.grads = [torch.randn(*self.data.shape[:-1], s.D * s.H, **factory), *map(torch.randn_like, self.states)]
        if case.mode != "infer":
            for leaf in (self.data, *self.states):
                leaf.requires_grad_()

    @property
    def input(self) -> Tensor | PackedSequence:
        """The sequence as a module takes it."""
        return self.data if self.batch_sizes is None else PackedSequence(self.data, self.batch_sizes)

    def in_mode(self, forward: Call, weights: list[Tensor]) -> Call:
        """Turns a forward pass, which returns the output and the last states, into the work of the case's mode."""
        if self.case.mode == "infer":
            return torch.inference_mode()(forward)
        if self.case.mode == "fwd":
            return forward

        def train() -> list[Tensor]:
            outputs = forward()
            return outputs + list(torch.autograd.grad(outputs, [self.data, *self.states, *weights], self.grads))

        return train

    def disagreement(self, ours: list[Tensor], theirs: list[Tensor]) -> str | None:
        """Says which result of two contenders differs by more than rounding explains, or None.

        Rounding of length `depth` sums is bounded by about depth * u of the largest value. Of torch.nn itself, against
        float64, at T <= 1000 and H <= 512, at most 1.9 depth * u was seen (2.7 u for 16-bit outputs, whose sums are
        float32): both contenders may err, so the limits are 8, 4 and 8.
        """
        s, u = self.case.shape, ROUNDOFF[self.case.dtype]
        depth = math.ceil(math.log2((s.I + s.H) * s.T * s.L)) + 1
        full = self.case.dtype in ("fp32", "fp64")
        count = 1 + len(self.states)
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a.shape != b.shape and self.batch_sizes is not None:
                b = pack_padded_sequence(b, torch.tensor(s.lengths)).data
            limit = u * (8 * depth if full else 4 * depth if k >= count else 8)
            a, b = a.detach().double(), b.detach().double()
            error = ((a - b).abs().max() / b.abs().max()).item()
            if not error <= limit:
                kind = f"gradient {k - count}" if k >= count else f"output {k}"
                return f"{kind}, shape {tuple(a.shape)}: relative difference {error:.1e}, limit {limit:.1e}"
        return None
