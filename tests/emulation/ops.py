# SPDX-License-Identifier: BSD-3-Clause
"""The ops on the CUDA kernels: run by test_emulation.py on emulated ones, which FASTRNN_LIBRARY then names, and by
tests/cuda/run.py on a device.

Small shapes, each for a reason: what matters here is which thread computes what.
"""

import itertools

import pytest
import torch
from parity import CELLS, LayerCase, check_layer_parity, check_second_order

from fastrnn import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = {  # T, B, I, H
    "one": (1, 1, 4, 1),  # with I = 1 the one gradient of the input cancels to almost nothing
    "odd": (5, 3, 7, 13),  # a unit a thread
    "vectors": (4, 5, 3, 16),  # 16 bytes a thread
    "rows": (2, 130, 2, 3),  # more rows than a block has
    "across": (2, 2, 3, 1030),  # units of a row in several blocks; a unit a thread
    "vectors_across": (2, 3, 2, 1032),
}


def cases():
    for cell, dtype in itertools.product(CELLS, DTYPES):
        for name in ("odd", "vectors"):
            yield LayerCase(cell, *SIZES[name], dtype, packed=True)
            yield LayerCase(cell, *SIZES[name], dtype, reverse=True)
    for cell, name in itertools.product(CELLS, SIZES):
        yield LayerCase(cell, *SIZES[name])
    for cell, name in itertools.product(CELLS, ("odd", "vectors")):
        yield LayerCase(cell, *SIZES[name], packed=True, reverse=True, bias=False)
        yield LayerCase(cell, *SIZES[name], x_gates=True)
    for packed, reverse in itertools.product((False, True), repeat=2):
        yield LayerCase("lstm", *SIZES["vectors"], packed=packed, reverse=reverse, proj_size=6)


def drawn(case, device):
    return {name: tensor if tensor is None else tensor.to(device) for name, tensor in case.draw().items()}


@pytest.mark.parametrize("case", dict.fromkeys(cases()), ids=str)
def test_parity(case, device):
    check_layer_parity(case, ops, reference, device)


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell, device):
    """Nothing to compute is nothing to launch: an empty grid would be refused."""
    check_layer_parity(LayerCase(cell, B=0), ops, reference, device)


def test_rows_are_apart(device):
    """NaN in one row of the batch stays in that row, forward and backward."""
    case = LayerCase("lstm", *SIZES["vectors"])
    arguments = drawn(case, device)
    clean, clean_grads = case.run(ops, arguments)
    arguments["input"][:, 1] = torch.nan
    outputs, grads = case.run(ops, arguments)
    others = [row for row in range(case.B) if row != 1]
    assert outputs["output"][:, 1].isnan().all()
    for our, expected in ((outputs["output"], clean["output"]), (grads["input"], clean_grads["input"])):
        torch.testing.assert_close(our[:, others], expected[:, others], rtol=0, atol=0)


def test_second_backward_agrees(device):
    """Backward writes into nothing that was saved."""
    case = LayerCase("gru", *SIZES["odd"])
    arguments = drawn(case, device)
    leaves = {name: tensor if tensor is None else tensor.requires_grad_() for name, tensor in arguments.items()}
    output = case.call(ops, leaves)["output"].sum()
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    first, second = (torch.autograd.grad(output, wanted, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("cell", "proj_size"), [*((cell, 0) for cell in CELLS), ("lstm", 6)])
def test_initial_states_without_gradient(cell, proj_size, device):
    """The last product of backward is for them alone: the other gradients are the same to the last bit."""
    case = LayerCase(cell, *SIZES["vectors"], packed=True, reverse=True, proj_size=proj_size)
    arguments = drawn(case, device)
    weights = [
        tensor.requires_grad_() for name, tensor in arguments.items() if name not in ("h0", "c0") and tensor is not None
    ]
    without = torch.autograd.grad(case.call(ops, arguments)["output"].sum(), weights)
    states = [arguments[name].requires_grad_() for name in ("h0", "c0") if name in arguments]
    with_states = torch.autograd.grad(case.call(ops, arguments)["output"].sum(), [*weights, *states])
    for one, other in zip(without, with_states, strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_second_order(cell, device):
    case = LayerCase(cell, 3, 2, 2, 5, torch.float64, packed=True, reverse=True)
    check_second_order(case, ops, reference, device)
