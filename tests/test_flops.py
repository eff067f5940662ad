# SPDX-License-Identifier: BSD-3-Clause
"""What torch.utils.flop_counter counts: as much as for the same layers made of products."""

import subprocess
import sys

import pytest
import torch
from parity import CELLS, Case, call, draw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import ops, reference

T, B, I, H, P = 5, 3, 7, 13, 4  # noqa: E741


def count(function):
    """What a function returns, and the work that torch counted."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops()


def count_passes(function, leaves):
    """The work of a function that returns a tensor, and that of its backward to the leaves."""
    output, forward = count(function)
    _, backward = count(lambda: torch.autograd.grad(output.sum(), leaves))
    assert 0 < forward < backward
    return forward, backward


@pytest.mark.parametrize("layout", ["dense", "batch_first", "packed"])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "hx": True}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("cell", CELLS)
def test_modules(cell, options, layout):
    """In float64: in float32 torch.nn's LSTM may be one operator, of which torch counts nothing."""
    case = Case(cell, layout=layout, dtype=torch.float64, **{"hx": False} | options)
    tensors, lengths = draw(case)
    leaves = [tensor.requires_grad_() for name, tensor in tensors.items() if not name.startswith("grad")]
    counts = []
    for module in map(case.module, (nn, fastrnn)):
        run = lambda module=module: call(case, module, tensors, lengths)["output"]  # noqa: E731
        counts.append(count_passes(run, [*leaves, *module.parameters()]))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_cells(name, T):  # noqa: N803
    cells = getattr(nn, f"{name}Cell")(I, H).double(), getattr(fastrnn, f"{name}Cell")(I, H).double()
    input = torch.randn(T, B, I).double().requires_grad_()

    def steps(cell):
        state = None
        for step in input:
            state = cell(step, state)
        return state[0] if name == "LSTM" else state

    counts = [count_passes(lambda c=cell: steps(c), [input, cell.weight_ih, cell.weight_hh]) for cell in cells]
    assert counts[0] == counts[1]


LAYERS = {  # op, gates, options
    "rnn": ("rnn_layer", 1, {}),
    "leaky": ("rnn_layer", 1, {"nonlinearity": "leaky_relu"}),
    "gru": ("gru_layer", 3, {}),
    "gru before": ("gru_layer", 3, {"reset_after": False}),
    "gru norm": ("gru_layer", 3, {"layer_norm": [torch.ones(3 * H).double()] * 2}),
    "lstm": ("lstm_layer", 4, {}),
    "projection": ("lstm_layer", 4, {"w_hr": torch.randn(P, H).double()}),
    "coupled": ("lstm_layer", 3, {"coupled": True}),
    "peephole": ("lstm_layer", 4, {"w_peephole": torch.randn(3 * H).double()}),
    "norm": ("lstm_layer", 4, {"layer_norm": [*[torch.ones(4 * H).double()] * 2, *torch.randn(2, H).double()]}),
    "slstm": ("slstm_layer", 4, {}),
}


def arguments_of(layer, x_gates=False, rows=(T, B)):
    op, gates, options = LAYERS[layer]
    width = P if "w_hr" in options else H
    shapes = {
        "input": (*rows, gates * H if x_gates else I),
        "w_ih": None if x_gates else (gates * H, I),
        "w_hh": (gates * H, width),
        "b_ih": None,
        "b_hh": None,
        "h0": (B, width),
    }
    if gates == 4 or "coupled" in options:
        shapes["c0"] = (3, B, H) if layer == "slstm" else (B, H)
    return {
        name: shape and torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("needed", ["all", "all but states", "input", "h0"])
@pytest.mark.parametrize("x_gates", [False, True], ids=["", "x_gates"])
@pytest.mark.parametrize("layer", LAYERS)
def test_operators(layer, x_gates, needed):
    """As of the definition, in every part of backward."""
    op, _, options = LAYERS[layer]
    arguments = arguments_of(layer, x_gates)
    named = arguments | ({"w_hr": options["w_hr"]} if "w_hr" in options else {})
    for name, tensor in named.items():
        is_needed = {"all": True, "all but states": not name.endswith("0")}.get(needed, name == needed)
        if tensor is not None:
            tensor.requires_grad_(is_needed)
    leaves = [tensor for tensor in named.values() if tensor is not None and tensor.requires_grad]

    def passes(library):
        output, forward = count(lambda: getattr(library, op)(*arguments.values(), **options)[0])
        _, backward = count(lambda: torch.autograd.grad(output.sum(), leaves))
        return forward, backward

    of_ops = passes(ops)
    assert of_ops == passes(reference)
    assert min(of_ops) > 0


@pytest.mark.parametrize("layer", ["lstm", "gru", "gru before"])
def test_lengths(layer):
    """The steps that there are, as of the same sequences packed. Those of no steps have none."""
    module = {"lstm": fastrnn.LSTM(I, H), "gru": fastrnn.GRU(I, H)}.get(layer) or fastrnn.GRU(I, H, reset_after=False)
    input, lengths = torch.randn(T, 4, I, requires_grad=True), torch.tensor([5, 0, 3, 2])
    packed = pack_padded_sequence(input[:, lengths > 0], lengths[lengths > 0], enforce_sorted=False)
    leaves = [input, *module.parameters()]
    of_padded = count_passes(lambda: module(input, lengths=lengths)[0], leaves)
    of_packed = count_passes(lambda: module(packed)[0].data, leaves)
    if layer == "gru before":  # the product of the input is torch's own, of all rows
        rest = (T * 4 - int(lengths.sum())) * I * 3 * H
        of_packed = of_packed[0] + 2 * rest, of_packed[1] + 2 * 2 * rest
    assert of_padded == of_packed


def test_unknown_lengths():
    with FakeTensorMode():
        arguments = arguments_of("lstm")
        _, plain = count(lambda: ops.lstm_layer(*arguments.values()))
        _, of_fake = count(lambda: ops.lstm_layer(*arguments.values(), lengths=torch.ones(B, dtype=torch.int64)))
    arguments = {name: t if t is None else t.to("meta") for name, t in arguments_of("lstm").items()}
    lengths = torch.ones(B, dtype=torch.int64, device="meta")
    _, of_meta = count(lambda: ops.lstm_layer(*arguments.values(), lengths=lengths))
    assert plain == of_fake == of_meta == 2 * T * B * 4 * H * (I + H)


@pytest.mark.parametrize("first", ["fastrnn", "torch.utils.flop_counter"])
def test_order_of_imports(first):
    """torch's counter, which imports Triton, is not imported for its own sake."""
    program = f"""
import sys
import torch, {first}
print("torch.utils.flop_counter" in sys.modules)
import fastrnn
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fastrnn.GRUCell(2, 3)(torch.ones(1, 2))
print(counter.get_total_flops())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(first != "fastrnn"), str(2 * 9 * (2 + 3))]
