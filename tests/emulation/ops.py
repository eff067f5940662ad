# SPDX-License-Identifier: BSD-3-Clause
"""The ops on the CUDA kernels: run by test_emulation.py on emulated ones, which FASTRNN_LIBRARY then names, and by
tests/cuda/run.py on a device.

Small shapes, each for a reason: what matters here is which thread computes what.
"""

import itertools
from collections import Counter

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


def drawn(case, device, **options):
    return {name: tensor if tensor is None else tensor.to(device) for name, tensor in case.draw(**options).items()}


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


@pytest.mark.parametrize("layout", ["dense", "packed", "lengths"])
@pytest.mark.parametrize("reverse", [False, True])
def test_more_steps_than_a_launch_takes(layout, reverse, device):
    """Sequences that begin and end where one launch for h before each row follows another, at 480 steps."""
    T, B, H = 500, 6, 3
    lengths = torch.tensor([T, 482, 481, 480, 479, 1])
    sizes = (torch.arange(T).unsqueeze(1) < lengths).sum(1)
    options = {"packed": {"batch_sizes": sizes}, "lengths": {"lengths": lengths.to(device)}}.get(layout, {})
    generator = torch.Generator().manual_seed(0)
    rows = (int(sizes.sum()),) if layout == "packed" else (T, B)
    x_gates = torch.randn(*rows, H, generator=generator, dtype=torch.float64)
    h0, weight = (torch.randn(size, H, generator=generator, dtype=torch.float64) for size in (B, H))
    found = []
    for namespace, where in ((ops, device), (reference, torch.device("cpu"))):
        leaves = [tensor.to(where, copy=True).requires_grad_() for tensor in (x_gates, weight, h0)]
        moved = {name: t.to(where) if name == "lengths" else t for name, t in options.items()}
        output, _ = namespace.rnn_layer(
            leaves[0], None, leaves[1], None, None, leaves[2], nonlinearity="tanh", reverse=reverse, **moved
        )
        found.append(torch.autograd.grad(output.square().sum(), leaves))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [1, 2, 3, 4, 8, 1030])
def test_rows_of_every_width(H, dtype, device):
    """h before each row moves in pieces of 16, 4 or 2 bytes: d W_hh is the sum of these rows, to the last bit."""
    case = LayerCase("rnn_relu", 3, 2, 1, H, dtype, packed=True, reverse=True, x_gates=True, bias=False)
    arguments = drawn(case, device, value=lambda shape, generator, dtype: torch.ones(shape, dtype=dtype))
    arguments["w_hh"].zero_()
    arguments["h0"].copy_(torch.arange(2 * H).reshape(2, H) % 7)

    def ones(shape, *, generator, dtype):
        return torch.ones(shape, dtype=dtype)

    expected = case.run(reference, {name: t if t is None else t.cpu() for name, t in arguments.items()}, grad=ones)
    got = case.run(ops, arguments, grad=ones)
    assert torch.equal(got[1]["w_hh"].cpu(), expected[1]["w_hh"])


@pytest.mark.parametrize("proj_size", [0, 6])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_step_dispatches_its_products_alone(packed, proj_size, device):
    """No view, copy or allocation: what six more steps dispatch are their products, forward and backward."""

    def dispatched(T: int) -> list[Counter[str]]:
        case = LayerCase("lstm", T, packed=packed, proj_size=proj_size)
        leaves = drawn(case, device)
        leaves = {name: t if t is None else t.requires_grad_() for name, t in leaves.items()}
        counts = []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as forward:
            loss = case.call(ops, leaves)["output"].sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as backward:
            torch.autograd.grad(loss, [leaf for leaf in leaves.values() if leaf is not None])
        for profile in (forward, backward):
            counts.append(Counter(event.name for event in profile.events() if event.name.startswith("aten::")))
        return counts

    for short, long in zip(dispatched(6), dispatched(12), strict=True):
        # The CPU's own product, where the kernels are emulated, looks at its operands.
        more = {name: n for name, n in (long - short).items() if "resolve" not in name}
        assert more == {"aten::mm": 12 if proj_size else 6}, more
