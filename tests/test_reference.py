# SPDX-License-Identifier: BSD-3-Clause
"""The reference against torch.nn, and the tests themselves against wrong references: each of them must fail."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parity import CELLS, GATES, OPS, LayerCase, check_layer_parity
from tolerances import assert_close_to_truth
from torch import nn

from fastrnn import reference

SEAM = (Path(__file__).resolve().parents[1] / "csrc/kernels.h").read_text()


def test_every_cell_is_tested():
    """Torch's cells in csrc/kernels.h: each has its row in the tests, hence a reference, an op and a module.

    The other cells are those of test_controls.py.
    """
    torch_cells = SEAM.partition("#define FASTRNN_FOR_EACH_TORCH_CELL")[2].partition("#define")[0]
    listed = re.findall(r"^\s+X\((\w+), \w+\)", torch_cells, re.MULTILINE)
    assert listed == list(CELLS) == list(OPS) == list(GATES)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"packed": True}, {"proj_size": 5}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_reference_is_torch_nn(cell, options, reverse):
    """In float64, outputs and gradients. torch.nn runs both directions of which one is compared."""
    if cell != "lstm" and "proj_size" in options:
        return
    case = LayerCase(cell, dtype=torch.float64, reverse=reverse, **options)
    name, cell_options = CELLS[cell]
    if case.proj_size:
        cell_options = {"proj_size": case.proj_size}

    def torch_layer(input, w_ih, w_hh, b_ih, b_hh, h0, c0=None, w_hr=None, batch_sizes=None, reverse=False, **_):
        module = getattr(nn, name)(case.I, case.H, bias=case.bias, bidirectional=True, **cell_options).double()
        suffix = "_reverse" if reverse else ""
        weights = {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh, "weight_hr": w_hr}
        weights = {f"{key}_l0{suffix}": weight for key, weight in weights.items() if weight is not None}
        states = [state.expand(2, *state.shape) for state in (h0, c0) if state is not None]
        if batch_sizes is not None:
            input = nn.utils.rnn.PackedSequence(input, batch_sizes)
        output, states = torch.func.functional_call(
            module, weights, (input, tuple(states) if cell == "lstm" else states[0])
        )
        output = (output if batch_sizes is None else output.data).chunk(2, -1)[int(reverse)]
        return output, *(state[int(reverse)] for state in (states if cell == "lstm" else (states,)))

    check_layer_parity(case, SimpleNamespace(**{OPS[cell][0]: torch_layer}), reference, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# The tester is tested. A mutant is the reference with one mistake.


def flip_gate_sign(gate, gates, cell, gx, gh, states, **options):
    """sigmoid(-a) instead of sigmoid(a) for one gate."""
    sign = torch.ones(gates, dtype=gx.dtype)
    sign[gate] = -1
    sign = sign.repeat_interleave(gx.shape[-1] // gates)
    return cell(gx * sign, gh * sign, states, **options)


def swap_gates(one, other, gates, cell, gx, gh, states, **options):
    order = list(range(gates))
    order[one], order[other] = other, one
    gx, gh = (torch.cat([g.chunk(gates, -1)[k] for k in order], -1) for g in (gx, gh))
    return cell(gx, gh, states, **options)


def mutants(cell):
    """Yields (name, replacement of the cell function)."""
    gates = GATES[cell]
    for gate in range(gates):
        yield f"gate {gate} flipped", partial(flip_gate_sign, gate, gates)
    for one in range(gates):
        for other in range(one + 1, gates):
            yield f"gates {one} and {other} swapped", partial(swap_gates, one, other, gates)


CELL_MUTANTS = [(cell, *mutant) for cell in CELLS for mutant in mutants(cell)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = {"T": 9, "B": 5, "I": 24, "H": 40}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cell", "name", "mutate"), CELL_MUTANTS, ids=[f"{c}-{n}" for c, n, _ in CELL_MUTANTS])
def test_wrong_cells_are_caught(cell, name, mutate, dtype, monkeypatch):
    function = f"{OPS[cell][0].removesuffix('_layer')}_cell"
    right = getattr(reference, function)

    def layer(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(reference, function, partial(mutate, right))
            return getattr(reference, OPS[cell][0])(*args, **kwargs)

    case = LayerCase(cell, **SIZES, dtype=dtype)
    check_layer_parity(case, reference, reference, torch.device("cpu"))
    with pytest.raises(AssertionError, match="bound"):
        check_layer_parity(case, SimpleNamespace(**{OPS[cell][0]: layer}), reference, torch.device("cpu"))


def drop_bias(layer, input, w_ih, w_hh, b_ih, b_hh, *states, **options):
    return layer(input, w_ih, w_hh, b_ih, 0 * b_hh, *states, **options)


def reverse_off_by_one(layer, *arguments, **options):
    output, *states = layer(*arguments, **options)
    return output.roll(1, 0), *states


def forget_initial_state(layer, input, w_ih, w_hh, b_ih, b_hh, *states, **options):
    return layer(input, w_ih, w_hh, b_ih, b_hh, *(0 * state for state in states), **options)


def detach_first_step(layer, input, *arguments, **options):
    """Right outputs, wrong gradients: the recurrence is cut once."""
    return layer(torch.cat([input[:1].detach(), input[1:]]), *arguments, **options)


def half_precision_state(layer, input, w_ih, w_hh, b_ih, b_hh, *states, **options):
    """States kept in the next shorter type."""
    short = {torch.float64: torch.float32, torch.float32: torch.bfloat16}[input.dtype]
    return layer(input, w_ih, w_hh, b_ih, b_hh, *(state.to(short).to(state) for state in states), **options)


OUTPUT_MUTANTS = [drop_bias, reverse_off_by_one, forget_initial_state]


def check_mutant(mutate, case):
    layer = partial(mutate, getattr(reference, OPS[case.cell][0]))
    check_layer_parity(case, SimpleNamespace(**{OPS[case.cell][0]: layer}), reference, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mutate", [*OUTPUT_MUTANTS, detach_first_step], ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("cell", CELLS)
def test_wrong_layers_are_caught(cell, mutate, dtype):
    if (cell, mutate) == ("rnn_relu", detach_first_step) and dtype.itemsize == 2:
        return  # gradients that are not compared, see assert_parity
    with pytest.raises(AssertionError, match="bound"):
        check_mutant(mutate, LayerCase(cell, **SIZES, dtype=dtype, reverse=True))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_short_states_are_caught(cell, dtype):
    with pytest.raises(AssertionError, match="bound"):
        check_mutant(half_precision_state, LayerCase(cell, **SIZES, dtype=dtype))


def test_nan_shape_and_dtype_are_caught():
    truth = torch.ones(3, 2, dtype=torch.float64)
    right = truth.float()
    check = partial(assert_close_to_truth, "x", torch_same_dtype=right, truth_fp64=truth, terms=8)
    for is_grad in (False, True):
        check(right, is_grad=is_grad)
        for wrong in (right * torch.nan, right * torch.inf, right * 1.001, -right, right[:2], right.double()):
            with pytest.raises(AssertionError, match="x: "):
                check(wrong, is_grad=is_grad)
        nothing = torch.zeros(0, 2)
        check(nothing, torch_same_dtype=nothing, truth_fp64=nothing.double(), is_grad=is_grad)
    with pytest.raises(AssertionError, match="x: "):  # a gradient that should be zero
        check(right, torch_same_dtype=0 * right, truth_fp64=0 * truth, is_grad=True)
