# SPDX-License-Identifier: BSD-3-Clause
"""Configurations of a module (`Case`) and of an op (`LayerCase`), the tensors drawn for them, and their runs.

Letters: T time, B batch, I input, H hidden, P projection, L layers, D directions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from tolerances import assert_close_to_truth
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

# The cells by the names of csrc/kernels.h: module class and the arguments that choose the cell.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}
OPS: dict[str, tuple[str, dict[str, Any]]] = {
    cell: (f"{name.lower()}_layer", options) for cell, (name, options) in CELLS.items()
}
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
LAYOUTS = ("dense", "batch_first", "unbatched", "packed", "packed_unsorted")
Tensors = dict[str, Tensor]
Results = tuple[Tensors, Tensors]  # outputs and gradients


@dataclass(frozen=True)
class Case:
    """A module, its input and its initial states. ``layout`` is one of LAYOUTS; packed ones hold lengths 1 to T."""

    cell: str
    T: int = 5
    B: int = 3
    I: int = 7  # noqa: E741
    H: int = 13
    dtype: torch.dtype = torch.float32
    layout: str = "dense"
    hx: bool = True
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj_size: int = 0
    dropout: float = 0.0

    def __str__(self) -> str:
        """The test id: the cell, the sizes, and what is not default."""
        words = [self.cell, f"T{self.T}-B{self.B}-I{self.I}-H{self.H}", str(self.dtype).removeprefix("torch.")]
        words += [self.layout] * (self.layout != "dense")
        words += [f"{n}={getattr(self, n)}" for n in DEFAULTS if getattr(self, n) != DEFAULTS[n]]
        return "-".join(words)

    @property
    def terms(self) -> int:
        """The length of the longest sum, for the bound on rounding."""
        return (self.I + self.H) * self.T

    def module(self, namespace: ModuleType, **overrides: Any) -> nn.Module:
        """Builds the module of torch.nn or fastrnn."""
        name, options = CELLS[self.cell]
        options = options | {n: getattr(self, n) for n in ("num_layers", "bidirectional", "bias", "dropout")}
        if self.proj_size:
            options["proj_size"] = self.proj_size
        options["batch_first"] = self.layout == "batch_first"
        return getattr(namespace, name)(self.I, self.H, **options, **({"dtype": self.dtype} | overrides))


DEFAULTS = {
    name: Case.__dataclass_fields__[name].default
    for name in ("hx", "num_layers", "bidirectional", "bias", "proj_size", "dropout")
}


def draw(case: Case, seed: int = 0, value: Callable[..., Tensor] = torch.randn) -> tuple[Tensors, Tensor | None]:
    """Draws the input, the initial states and the gradients of the outputs, with lengths for the packed layouts."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return value(shape, generator=generator, dtype=torch.float64).mul(scale).to(case.dtype)

    T, B, D = case.T, case.B, 1 + case.bidirectional
    width = case.proj_size or case.H
    rows: tuple[int, ...] = {"unbatched": (T,), "batch_first": (B, T)}.get(case.layout, (T, B))
    batch = () if case.layout == "unbatched" else (B,)
    lengths = None
    if case.layout.startswith("packed"):
        # The extremes, ties, and everything between.
        lengths = torch.randint(1, T + 1, (B,), generator=generator)
        lengths[: min(B, 4)] = torch.tensor([T, 1, T, 1])[: min(B, 4)]
        if case.layout == "packed":
            lengths = lengths.sort(descending=True).values
        rows = (int(lengths.sum()),)
    states = {"h": width} | ({"c": case.H} if case.cell == "lstm" else {})
    layers = case.num_layers * D
    # torch's weights are uniform within 1 / sqrt(H). Input that saturates the gates would have gradients of rounding.
    scale = min(1.0, (case.H / case.I) ** 0.5)
    tensors = {"input": tensor(*((T, B) if lengths is not None else rows), case.I, scale=scale)}
    if case.hx:
        tensors |= {f"{state}0": tensor(layers, *batch, size) for state, size in states.items()}
    tensors["grad_output"] = tensor(*rows, D * width)
    tensors |= {f"grad_{state}_n": tensor(layers, *batch, size) for state, size in states.items()}
    return tensors, lengths


def call(case: Case, module: nn.Module, tensors: Tensors, lengths: Tensor | None) -> Tensors:
    """Calls the module. Returns output (the data of it, if packed), h_n and c_n by name."""
    input: Tensor | PackedSequence = tensors["input"]
    if lengths is not None:
        input = pack_padded_sequence(tensors["input"], lengths, enforce_sorted=case.layout == "packed")
    hx = [tensors[name] for name in ("h0", "c0") if name in tensors]
    output, states = module(input, *([tuple(hx) if case.cell == "lstm" else hx[0]] if hx else []))
    names = ("h_n", "c_n") if case.cell == "lstm" else ("h_n",)
    states = states if case.cell == "lstm" else (states,)
    return {"output": output.data if lengths is not None else output} | dict(zip(names, states, strict=True))


def run(
    case: Case,
    module: nn.Module,
    tensors: Tensors,
    lengths: Tensor | None,
) -> Results:
    """Runs a module forward and backward. Returns outputs by name, and the gradients of inputs and parameters."""
    parameter = next(module.parameters())
    tensors = {name: tensor.to(parameter) for name, tensor in tensors.items()}
    leaves = {name: tensors[name].requires_grad_() for name in ("input", "h0", "c0") if name in tensors}
    outputs = call(case, module, tensors, lengths)
    leaves |= {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [tensors[f"grad_{n}"] for n in outputs])
    return outputs, dict(zip(leaves, grads, strict=True))


@dataclass(frozen=True)
class LayerCase:
    """One layer in one direction, as the ops run it. With ``x_gates`` the input is W_ih x + b_ih and w_ih is None."""

    cell: str
    T: int = 5
    B: int = 3
    I: int = 7  # noqa: E741
    H: int = 13
    dtype: torch.dtype = torch.float32
    packed: bool = False
    reverse: bool = False
    bias: bool = True
    proj_size: int = 0
    x_gates: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("packed", "reverse", "x_gates", "proj_size") if getattr(self, name)]
        flags += ["no_bias"] * (not self.bias)
        return "-".join([self.cell, f"T{self.T}-B{self.B}-I{self.I}-H{self.H}", str(self.dtype)[6:], *flags])

    @property
    def terms(self) -> int:
        return (self.I + self.H) * self.T

    @property
    def batch_sizes(self) -> Tensor | None:
        """The rows alive at each step: B at first, then 1 less every other step, 1 at the end."""
        steps = torch.arange(self.T)
        return (self.B - (steps + 1) // 2).clamp(min=1) if self.packed else None

    def draw(self, seed: int = 0, value: Callable[..., Tensor] = torch.randn) -> dict[str, Tensor | None]:
        """The tensor arguments of the op in its order; weights at torch's scale, uniform within 1 / sqrt(H)."""
        generator = torch.Generator().manual_seed(seed)

        def tensor(*shape: int, scale: float = 1.0) -> Tensor:
            return value(shape, generator=generator, dtype=torch.float64).mul(scale).to(self.dtype)

        gates, width, scale = GATES[self.cell] * self.H, self.proj_size or self.H, (3 * self.H) ** -0.5
        rows = (self.T, self.B) if self.batch_sizes is None else (int(self.batch_sizes.sum()),)
        arguments: dict[str, Tensor | None] = {
            "input": tensor(*rows, gates if self.x_gates else self.I),
            "w_ih": None if self.x_gates else tensor(gates, self.I, scale=scale),
            "w_hh": tensor(gates, width, scale=scale),
            "b_ih": None if self.x_gates or not self.bias else tensor(gates, scale=scale),
            "b_hh": tensor(gates, scale=scale) if self.bias else None,
            "h0": tensor(self.B, width),
        }
        if self.cell == "lstm":
            arguments |= {"c0": tensor(self.B, self.H)}
            arguments |= {"w_hr": tensor(self.proj_size, self.H, scale=scale) if self.proj_size else None}
        return arguments

    def call(self, namespace: ModuleType, arguments: dict[str, Tensor | None]) -> Tensors:
        """Calls namespace's function of this layer. Returns output, h_n and c_n by name."""
        op, options = OPS[self.cell]
        positional = [arguments[name] for name in arguments if name != "w_hr"]
        options = options | ({"w_hr": arguments["w_hr"]} if "w_hr" in arguments else {})
        outputs = getattr(namespace, op)(*positional, **options, batch_sizes=self.batch_sizes, reverse=self.reverse)
        return dict(zip(("output", "h_n", "c_n"), outputs, strict=False))

    def run(
        self, namespace: ModuleType, arguments: dict[str, Tensor | None], grad: Callable[..., Tensor] = torch.randn
    ) -> Results:
        """Forward and backward, from gradients drawn for every output. Returns outputs and gradients by name."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in arguments.items() if t is not None}
        outputs = self.call(namespace, {name: leaves.get(name) for name in arguments})
        generator = torch.Generator().manual_seed(1)
        grads = [grad(t.shape, generator=generator, dtype=torch.float64).to(self.dtype).to(t) for t in outputs.values()]
        return outputs, dict(
            zip(leaves, torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads), strict=True)
        )


def assert_parity(
    case: Case | LayerCase,
    ours: Results,
    torch_same_dtype: Results,
    truth_fp64: Results,
    precision: torch.dtype | None = None,
) -> None:
    """Compares the outputs and gradients of two runs with those of the run in float64, name by name."""
    short = (precision or case.dtype).itemsize == 2
    for is_grad, our, theirs, truth in zip((False, True), ours, torch_same_dtype, truth_fp64, strict=True):
        assert list(our) == list(theirs) == list(truth)
        if is_grad and short and case.cell == "rnn_relu":
            # Rounding to 16 bits moves values across the kink of relu, where the gradient jumps: nothing to measure.
            # test_exact.py has these gradients, where no rounding happens.
            break
        for name in our:
            label = f"grad of {name}" if is_grad else name
            options = {"terms": case.terms, "is_grad": is_grad, "precision": precision}
            assert_close_to_truth(label, our[name], theirs[name], truth[name], **options)


def check_parity(
    case: Case, namespace: ModuleType, device: torch.device, seed: int = 0, precision: torch.dtype | None = None
) -> None:
    """Draws weights and tensors; runs namespace's module, torch.nn's in the same dtype, and torch.nn's in float64."""
    torch.manual_seed(seed)
    theirs = case.module(nn, device=device)
    ours = case.module(namespace, device=device)
    ours.load_state_dict(theirs.state_dict())
    truth = replace(case, dtype=torch.float64).module(nn)
    truth.load_state_dict(theirs.state_dict())
    tensors, lengths = draw(case, seed)
    results = []
    for module in (ours, theirs, truth):
        torch.manual_seed(seed)  # for dropout: torch draws the same mask in every dtype
        results.append(run(case, module, tensors, lengths))
    assert_parity(case, *results, precision)


def check_layer_parity(case: LayerCase, ours: ModuleType, reference: ModuleType, device: torch.device) -> None:
    """Runs ours, the reference in the same dtype, and the reference in float64."""
    arguments = case.draw()
    moves = [(ours, device, case.dtype), (reference, device, case.dtype), (reference, "cpu", torch.float64)]
    results = [
        case.run(namespace, {name: t if t is None else t.to(where, dtype) for name, t in arguments.items()})
        for namespace, where, dtype in moves
    ]
    assert_parity(case, *results)


def check_second_order(case: LayerCase, ours: ModuleType, reference: ModuleType, device: torch.device) -> None:
    """As check_layer_parity, of derivatives of the gradients: those that the kernels computed are differentiated."""
    results = []
    for namespace, dtype in ((ours, case.dtype), (reference, case.dtype), (reference, torch.float64)):
        drawn = {name: tensor.to(device, dtype) for name, tensor in case.draw().items() if tensor is not None}
        leaves = {name: tensor.requires_grad_() for name, tensor in drawn.items()}
        loss = case.call(namespace, leaves)["output"].sin().sum()
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), list(leaves.values()))
        results.append(dict(zip(leaves, second, strict=True)))
    for name in results[0]:
        values = (result[name] for result in results)
        assert_close_to_truth(f"second derivative of {name}", *values, terms=case.terms, is_grad=True)
