# SPDX-License-Identifier: BSD-3-Clause
"""The cells that torch.nn lacks, and what may happen to the states between two steps, against fastrnn.reference.

In float64 kernel and definition differ by rounding alone: a few eps of the scale of the sums.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastrnn import ops, reference

SEAM = (Path(__file__).resolve().parents[1] / "csrc/kernels.h").read_text()
OPERATORS = {  # of layers; refused_launches counts
    name.removeprefix("fastrnn::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fastrnn::") and "_layer" in name
}

# By the names of csrc/kernels.h: the function, its options, gates, and how many states there are beside h.
CELLS = {
    "rnn_tanh": ("rnn_layer", {"nonlinearity": "tanh"}, 1, 0),
    "rnn_relu": ("rnn_layer", {"nonlinearity": "relu"}, 1, 0),
    "rnn_leaky_relu": ("rnn_layer", {"nonlinearity": "leaky_relu"}, 1, 0),
    "gru": ("gru_layer", {}, 3, 0),
    "gru_before": ("gru_layer", {"reset_after": False}, 3, 0),
    "gru_norm": ("gru_layer", {"layer_norm": True}, 3, 0),
    "lstm": ("lstm_layer", {}, 4, 1),
    "lstm_coupled": ("lstm_layer", {"coupled": True}, 3, 1),
    "lstm_peephole": ("lstm_layer", {"w_peephole": True}, 4, 1),
    "lstm_norm": ("lstm_layer", {"layer_norm": True}, 4, 1),
    "slstm": ("slstm_layer", {}, 4, 3),
}
T, B, I, H, P = 7, 5, 3, 21, 6  # noqa: E741


def test_every_cell_is_tested():
    """Each cell of csrc/kernels.h has its row here and its operators, and there are no others."""
    assert set(re.findall(r"^\s+X\((\w+), \w+\)", SEAM, re.MULTILINE)) == set(CELLS)
    alone = {f"{cell}_layer{suffix}" for cell in CELLS for suffix in ("", "_backward")}
    packed = {f"_{cell}_layer_packed" for cell in CELLS}
    both = {f"_{name}_both" for name in alone} | {f"{name}_both" for name in packed}
    stacks = {f"_{cell}_layer_stack" for cell in ("rnn_tanh", "rnn_relu", "gru", "lstm")}
    assert alone | packed | both | stacks | {f"_{cell}_layer_pack" for cell in CELLS} == OPERATORS


def draw(cell: str, packed: bool = False, projection: bool = False, seed: int = 0) -> dict:
    """The tensor arguments of a layer, and its options that are tensors."""
    op, _, gates, others = CELLS[cell]
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    width = P if projection else H
    arguments = {
        "input": tensor(int(batch_sizes().sum()) if packed else T, *([] if packed else [B]), I),
        "w_ih": tensor(gates * H, I, scale=0.3),
        "w_hh": tensor(gates * H, width, scale=0.3),
        "b_ih": tensor(gates * H, scale=0.3),
        "b_hh": tensor(gates * H, scale=0.3),
        "h0": tensor(B, width),
    }
    if others == 1:
        arguments["c0"] = tensor(B, H)
    if others == 3:  # n is positive, or 0 where nothing has been stored
        arguments["c0"] = torch.stack([tensor(B, H), tensor(B, H).abs() + 1, tensor(B, H)])
        arguments["c0"][:, 0] = 0
    if projection:
        arguments["w_hr"] = tensor(P, H, scale=0.3)
    if cell == "lstm_peephole":
        arguments["w_peephole"] = tensor(3 * H, scale=0.3)
    if cell.endswith("_norm"):
        arguments |= {"gain_ih": 1 + tensor(gates * H, scale=0.3), "gain_hh": 1 + tensor(gates * H, scale=0.3)}
    if cell == "lstm_norm":
        arguments |= {"gain_c": 1 + tensor(H, scale=0.3), "bias_c": tensor(H, scale=0.3)}
    return arguments


def batch_sizes() -> Tensor:
    return torch.tensor([B, B, 4, 3, 3, 1, 1])


def controls(names: tuple[str, ...], width: int, packed: bool = False) -> dict:
    generator = torch.Generator().manual_seed(7)
    leading = (int(batch_sizes().sum()),) if packed else (T, B)

    def chance(*shape: int, p: float) -> Tensor:
        return torch.rand(shape, generator=generator) < p

    drawn = {
        "lengths": torch.tensor([3, 0, T, 1, 5]),
        "reset": chance(*leading, p=0.3),
        "h_mask": chance(B, width, p=0.7).double() / 0.7,
        "zone_h": chance(*leading, H, p=0.4).double(),
        "zone_c": chance(*leading, H, p=0.4).double(),
        "grad_clip": 0.5,
        "return_cells": True,
    }
    if "one_zone" in names:
        drawn |= {"zone_h": torch.tensor([0.3]).double(), "zone_c": torch.tensor([0.15]).double()}  # products round
    return {name: drawn[name] for name in names if name in drawn}


CPU = torch.device("cpu")


def run(namespace, cell: str, arguments: dict, device=CPU, create_graph: bool = False, **options) -> dict:
    """Every result and every gradient of a layer, by name; where these are to be differentiated also its `leaves`."""
    leaves = {name: tensor.detach().clone().to(device).requires_grad_() for name, tensor in arguments.items()}
    for name, value in options.items():
        if isinstance(value, Tensor) and name != "batch_sizes":
            options[name] = value.to(device)
    op, fixed, _, _ = CELLS[cell]
    fixed = {name: value for name, value in fixed.items() if name not in ("w_peephole", "layer_norm")}
    keywords = {name: leaves[name] for name in ("w_hr", "w_peephole") if name in leaves}
    norm = {name: leaves[name] for name in ("gain_ih", "gain_hh", "gain_c", "bias_c") if name in leaves}
    positional = [leaf for name, leaf in leaves.items() if name not in keywords | norm]
    if norm:
        keywords["layer_norm"] = tuple(norm.values())
    results = getattr(namespace, op)(*positional, **keywords, **fixed, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    if cell == "slstm":
        weights[2][2] = 0  # m has no gradient
    grads = torch.autograd.grad(results, list(leaves.values()), weights, create_graph=create_graph, allow_unused=True)
    named = {f"result {k}": result for k, result in enumerate(results)} | ({"leaves": leaves} if create_graph else {})
    return named | {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def check(cell: str, arguments: dict, device: torch.device, **options) -> None:
    ours, truth = run(ops, cell, arguments, device, **options), run(reference, cell, arguments, **options)
    assert list(ours) == list(truth)
    for name, expected in truth.items():
        got = ours[name]
        if expected is None or got is None:
            assert got is None or not got.any(), name
            continue
        assert got.shape == expected.shape
        scale = max(1.0, expected.detach().abs().max().item())
        assert (got.cpu() - expected).abs().max().item() <= 1e-12 * scale, name


SETS = [
    (),
    ("lengths",),
    ("reset",),
    ("h_mask",),
    ("zone_h",),
    ("zone_h", "one_zone"),
    ("grad_clip",),
    ("lengths", "reset", "h_mask", "zone_h", "grad_clip"),
]
CELL_SETS = [
    ("zone_c",),
    ("zone_c", "one_zone"),
    ("return_cells",),
    ("lengths", "return_cells"),
    ("lengths", "reset", "h_mask", "zone_h", "grad_clip", "zone_c", "return_cells"),
]


def cases():
    for cell, (_, _, _, others) in CELLS.items():
        for names in SETS + (CELL_SETS if others == 1 else []):
            if others == 3 and "zone_h" in names:
                names = tuple(name for name in names if name != "zone_h")
                if "one_zone" in names or not names:
                    continue
            yield cell, names


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize(
    "cell, names", list(cases()), ids=lambda v: "+".join(v) or "plain" if isinstance(v, tuple) else v
)
def test_layer_is_its_definition(cell, names, reverse, device):
    check(cell, draw(cell), device, reverse=reverse, **controls(names, H))


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_are_those_of_the_definition(cell, device):
    def gradients_of_gradients(namespace, device=CPU) -> dict[str, Tensor]:
        lengths = controls(("lengths",), H)["lengths"]
        first = run(namespace, cell, draw(cell), device, create_graph=True, lengths=lengths)
        leaves = first.pop("leaves")
        grads = [grad for name, grad in first.items() if name.startswith("grad") and grad is not None]
        loss = sum(grad.sin().sum() for grad in grads)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))

    ours, truth = gradients_of_gradients(ops, device), gradients_of_gradients(reference)
    for name, expected in truth.items():
        scale = max(1.0, expected.abs().max().item())
        assert (ours[name].cpu() - expected).abs().max().item() <= 1e-11 * scale, name


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("cell", CELLS)
def test_what_lies_past_the_end_reaches_nothing(cell, reverse, device):
    """Not even NaN: padding may hold anything, as it may where sequences are packed."""
    lengths, arguments = controls(("lengths",), H)["lengths"], draw(cell)
    clean = run(ops, cell, arguments, device, lengths=lengths, reverse=reverse)
    arguments["input"][torch.arange(T).unsqueeze(1) >= lengths] = float("nan")
    for name, tensor in run(ops, cell, arguments, device, lengths=lengths, reverse=reverse).items():
        assert torch.equal(tensor, clean[name]), name


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("cell", CELLS)
def test_states_of_an_empty_sequence_reach_nothing(cell, reverse, device):
    """Of a row of length 0 the initial states are the last ones, and no weight meets them: they may be NaN."""
    lengths, arguments = controls(("lengths",), H)["lengths"], draw(cell)
    clean = run(ops, cell, arguments, device, lengths=lengths, reverse=reverse)
    for name in ("h0", "c0"):
        if name in arguments:
            arguments[name][..., lengths == 0, :] = float("nan")
    for name, tensor in run(ops, cell, arguments, device, lengths=lengths, reverse=reverse).items():
        if name.startswith("grad of ") and tensor is not None:
            assert torch.equal(tensor, clean[name]), name


@pytest.mark.parametrize(
    "cell, names",
    [(cell, names) for cell, names in cases() if "lengths" not in names],
    ids=lambda v: "+".join(v) or "plain" if isinstance(v, tuple) else v,
)
def test_packed_layer_is_its_definition(cell, names, device):
    for reverse in (False, True):
        options = {"batch_sizes": batch_sizes(), "reverse": reverse} | controls(names, H, packed=True)
        check(cell, draw(cell, packed=True), device, **options)


@pytest.mark.parametrize(
    "names", ((), ("lengths", "reset"), ("h_mask", "zone_c", "grad_clip", "return_cells")), ids="+".join
)
@pytest.mark.parametrize("cell", ("lstm", "lstm_coupled", "lstm_peephole", "lstm_norm"))
def test_projected_layer_is_its_definition(cell, names, device):
    check(cell, draw(cell, projection=True), device, **controls(names, P))
