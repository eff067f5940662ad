# SPDX-License-Identifier: BSD-3-Clause
"""Outputs, states and gradients of the modules against torch.nn's, over sizes, dtypes and options."""

import itertools

import pytest
import torch
from parity import CELLS, LAYOUTS, Case, LayerCase, assert_parity, check_parity
from torch import nn

import fastrnn

SIZES = [  # T, B, I, H: one, odd, threads split the batch, H off any tile, threads split the units
    (1, 1, 1, 1),
    (5, 3, 7, 13),
    (17, 33, 64, 128),
    (64, 8, 100, 257),
    (23, 2, 40, 129),
]
LONG_SIZES = [(1000, 1, 8, 32), (2, 130, 5, 37), (3, 7, 200, 768), (5, 2, 1024, 1024), (100, 64, 96, 200)]
# Weights, their gradients and long rows that no second cache holds, on the CPU: blocks of each, the last ones not full.
LARGE = {"T": 14, "B": 60, "I": 520, "H": 1030}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = [
    {"layout": "batch_first"},
    {"layout": "unbatched"},
    {"layout": "packed"},
    {"layout": "packed_unsorted"},
    {"hx": False},
    {"bias": False},
    {"bidirectional": True},
    {"num_layers": 3},
    {"num_layers": 2, "dropout": 0.5},
    {"num_layers": 2, "dropout": 1.0},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "layout": "packed_unsorted"},
    {"num_layers": 2, "bidirectional": True, "bias": False, "hx": False, "layout": "batch_first"},
    {"num_layers": 2, "bidirectional": True, "layout": "unbatched"},
]
PROJECTIONS = [
    {"proj_size": 4},
    {"proj_size": 1, "bias": False, "hx": False},
    {"proj_size": 12, "layout": "packed_unsorted"},
    {"proj_size": 4, "num_layers": 2, "bidirectional": True, "layout": "packed"},
]


def fast_cases():
    for cell in CELLS:
        yield from (Case(cell, *size) for size in SIZES)
        yield from (Case(cell, **options) for options in OPTIONS)
        for dtype, options in itertools.product(DTYPES[1:], ({}, {"bidirectional": True, "layout": "packed_unsorted"})):
            yield Case(cell, 9, 5, 24, 40, dtype=dtype, **options)
    for cell, dtype in itertools.product(("lstm", "gru"), (torch.float32, torch.bfloat16)):
        yield Case(cell, **LARGE, dtype=dtype)
    yield Case("lstm", **LARGE | {"T": 28}, layout="packed_unsorted")
    yield from (Case("lstm", **options) for options in PROJECTIONS)
    for dtype, P in itertools.product(DTYPES, (12, 16, 28, 44, 60)):  # 1 to 4 vectors in the last panel
        yield Case("lstm", 9, 5, 24, 70, dtype=dtype, proj_size=P)


def extended_cases():
    yield from (Case(cell, *size, dtype=dtype) for cell in CELLS for size in SIZES + LONG_SIZES for dtype in DTYPES)
    flags = (False, True)
    for cell, dtype, layout, hx, num_layers, bidirectional, bias, proj_size in itertools.product(
        CELLS, DTYPES, LAYOUTS, flags, (1, 3), flags, flags, (0, 5)
    ):
        if cell == "lstm" or not proj_size:
            yield Case(cell, 7, 6, 11, 19, dtype, layout, hx, num_layers, bidirectional, bias, proj_size)


@pytest.mark.parametrize(
    "case",
    [*fast_cases(), *(pytest.param(case, marks=pytest.mark.extended) for case in extended_cases())],
    ids=str,
)
def test_parity(case, device):
    if case.dropout and device.type == "cuda":
        pytest.skip("cuDNN draws its dropout masks from a generator of its own")
    check_parity(case, fastrnn, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"hx": False}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cell_module_parity(cell, options, batched, dtype, device):
    case = LayerCase(cell, T=1, dtype=dtype)
    batch = (3,) if batched else ()
    name, cell_options = CELLS[cell]
    states = ("h", "c") if cell == "lstm" else ("h",)
    shapes = {"input": (*batch, case.I)} | {f"{state}0": (*batch, case.H) for state in states}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    cotangents = [torch.randn(*batch, case.H).to(dtype) for _ in states]
    bias = {key: value for key, value in options.items() if key == "bias"}

    def build(namespace, device, dtype):
        return getattr(namespace, f"{name}Cell")(case.I, case.H, **cell_options, **bias, device=device, dtype=dtype)

    theirs = build(nn, device, dtype)
    ours, truth = build(fastrnn, device, dtype), build(nn, "cpu", torch.float64)
    results = []
    for module in (ours, theirs, truth):
        module.load_state_dict(theirs.state_dict())
        leaves = {name: tensor.to(module.weight_hh).requires_grad_() for name, tensor in tensors.items()}
        hx = None if "hx" in options else tuple(leaves[f"{state}0"] for state in states)
        output = module(leaves["input"], hx if cell == "lstm" or hx is None else hx[0])
        output = output if cell == "lstm" else (output,)
        leaves |= dict(module.named_parameters())
        used = {name: leaf for name, leaf in leaves.items() if hx is not None or name not in ("h0", "c0")}
        grads = torch.autograd.grad(output, list(used.values()), [c.to(module.weight_hh) for c in cotangents])
        results.append((dict(zip(states, output, strict=True)), dict(zip(used, grads, strict=True))))
    assert repr(ours) == repr(theirs)
    assert_parity(case, *results)
