# SPDX-License-Identifier: BSD-3-Clause
"""Bad input: torch.nn's exception and its words, NaN that stays in its row, sizes that nothing can hold."""

import itertools
import multiprocessing
import os
import re
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
from parity import CELLS, GATES, Case, LayerCase, draw, run
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import ops


def outcome(function):
    """What a call does: the type and the words of its exception, or None."""
    try:
        function()
    except Exception as error:
        # Python names the class whose __init__ refused the arguments: torch.nn's base class.
        return type(error), re.sub(r"^\w+\.__init__", "__init__", str(error))
    return None


# Words of torch's kernels, where torch.nn itself checks nothing. There fastrnn checks, and says what it expected.
INCIDENTAL = re.compile(
    "mat2 must have|mat1 and mat2|get_mkldnn|broadcast shape|The size of tensor a|stacked_rnn|was not set"
    "|not on the expected device|Dimension out of range"
)
DELIBERATE = re.compile("[Ee]xpected|should be|must|not the same|not at the same|does not match")


def assert_same_outcome(function):
    """function(namespace) raises in fastrnn what it raises in torch.nn, which is returned, or raises in neither."""
    theirs, ours = outcome(lambda: function(nn)), outcome(lambda: function(fastrnn))
    if theirs and INCIDENTAL.search(theirs[1]):
        assert ours and ours[0] in (RuntimeError, ValueError) and DELIBERATE.search(ours[1]), f"{theirs}, here {ours}"
        assert not INCIDENTAL.search(ours[1]), ours
    else:
        assert ours == theirs
    return theirs


def assert_same_error(function):
    assert assert_same_outcome(function) is not None, "torch.nn takes this: the test is wrong"


# ---------------------------------------------------------------------------------------------------------------------
# Constructors

BAD_CONSTRUCTORS = [
    ((), {}),
    ((3,), {}),
    ((3, 0), {}),
    ((3, -1), {}),
    ((3, 4.0), {}),
    ((3, "4"), {}),
    ((3, None), {}),
    ((-3, 4), {}),
    ((3.5, 4), {}),
    ((3, 4), {"num_layers": 0}),
    ((3, 4), {"num_layers": -1}),
    ((3, 4), {"num_layers": 1.5}),
    ((3, 4), {"dropout": -0.1}),
    ((3, 4), {"dropout": 1.5}),
    ((3, 4), {"dropout": True}),
    ((3, 4), {"dropout": "0.1"}),
    ((3, 4), {"proj_size": -1}),
    ((3, 4), {"proj_size": 4}),
    ((3, 4), {"proj_size": 2}),
    ((3, 4), {"nonlinearity": "gelu"}),
    ((3, 4), {"nonlinearity": None}),
    ((3, 4), {"no_such_argument": 1}),
    ((3, 4), {"dtype": torch.int32}),
    ((3, 4), {"dtype": "float32"}),
    ((3, 4), {"device": "no_such_device"}),
    ((3, 2**40), {}),
    ((2**62, 2**31), {}),
]


@pytest.mark.parametrize(("args", "kwargs"), BAD_CONSTRUCTORS, ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_constructors(name, args, kwargs):
    assert_same_outcome(lambda namespace: getattr(namespace, name)(*args, **kwargs))


BAD_CELL_CONSTRUCTORS = [((), {}), ((3,), {}), ((3, "4"), {}), ((3, -1), {}), ((3, 4), {"dtype": torch.int32})]


@pytest.mark.parametrize(("args", "kwargs"), BAD_CELL_CONSTRUCTORS, ids=str)
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cell_constructors(name, args, kwargs):
    assert_same_error(lambda namespace: getattr(namespace, name)(*args, **kwargs))


# ---------------------------------------------------------------------------------------------------------------------
# Calls

T, B, I, H = 5, 3, 7, 13  # noqa: E741
BAD_INPUTS = {
    "width": lambda x: x[..., :-1],
    "1-D": lambda x: x[0, 0],
    "4-D": lambda x: x[None],
    "0-D": lambda x: x[0, 0, 0],
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "long": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "no steps": lambda x: x[:0],
    "no features": lambda x: x[..., :0],
    "list": lambda x: x.tolist(),
    "numpy": lambda x: numpy.ones((5, 3, 7), dtype=numpy.float32),
    "None": lambda x: None,
    "unbatched width": lambda x: x[0, :, :-1],
    "packed width": lambda x: pack_padded_sequence(x[..., :-1], [5, 3, 2]),
    "packed double": lambda x: pack_padded_sequence(x.double(), [5, 3, 2]),
    "packed long": lambda x: pack_padded_sequence(x.long(), [5, 3, 2]),
    "packed 3-D": lambda x: PackedSequence(x, torch.tensor([3, 2])),
    "packed 1-D": lambda x: PackedSequence(x[0, 0].contiguous(), torch.tensor([3, 2, 2])),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_inputs(cell, bad):
    input = BAD_INPUTS[bad](torch.randn(T, B, I))
    assert_same_error(lambda namespace: Case(cell).module(namespace)(input))


BAD_BATCH_SIZES = {
    "increasing": ([2, 3, 2], RuntimeError, "expected batch_sizes not to increase, got 3 after 2"),
    "zero": ([3, 3, 1, 0], RuntimeError, "expected batch_sizes to be positive, got 0 at step 3"),
    "negative": ([3, 3, 2, -1], RuntimeError, "expected batch_sizes to be positive, got -1 at step 3"),
    "too few rows": ([3, 3], RuntimeError, "expected input of sum(batch_sizes) = 6 rows, got 7"),
    "too many rows": ([3, 3, 2], RuntimeError, "expected input of sum(batch_sizes) = 8 rows, got 7"),
    "two dimensions": ([[3, 2], [1, 1]], RuntimeError, "Expected batch_sizes to be 1-D, got 2-D"),
    "none": ([], IndexError, "index 0 is out of bounds for dimension 0 with size 0"),
}


@pytest.mark.parametrize("states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("bad", BAD_BATCH_SIZES)
@pytest.mark.parametrize("cell", CELLS)
def test_batch_sizes(cell, bad, states):
    """A PackedSequence made by hand. torch.nn reads wrong rows in some of these cases, or says less, but for "none"."""
    sizes, error, words = BAD_BATCH_SIZES[bad]
    packed = PackedSequence(torch.randn(7, I), torch.tensor(sizes, dtype=torch.int64))
    state = zeros(1, sizes[0] if bad not in ("none", "two dimensions") else B, H)
    hx = [(state, state) if cell == "lstm" else state] if states else []
    with pytest.raises(error, match=re.escape(words) + "$"):
        Case(cell).module(fastrnn)(packed, *hx)


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


BAD_STATES = {  # for every cell; LSTM gets (state, state)
    "batch": zeros(1, 2, H),
    "width": zeros(1, B, 12),
    "layers": zeros(2, B, H),
    "2-D": zeros(B, H),
    "4-D": zeros(1, 1, B, H),
    "1-D": zeros(H),
    "double": zeros(1, B, H, dtype=torch.float64),
    "long": zeros(1, B, H, dtype=torch.int64),
    "meta": zeros(1, B, H, device="meta"),
    "list": [0.0],
    "int": 3,
    "string": "h0",
}
BAD_LSTM_STATES = {
    "h alone": zeros(1, B, H),
    "one": (zeros(1, B, H),),
    "three": (zeros(1, B, H),) * 3,
    "none": (),
    "None inside": (None, None),
    "list": [zeros(1, B, H), zeros(1, B, H)],
    "c of another batch": (zeros(1, B, H), zeros(1, 2, H)),
    "c of another width": (zeros(1, B, H), zeros(1, B, 12)),
    "c of other dimensions": (zeros(1, B, H), zeros(B, H)),
    "c of another dtype": (zeros(1, B, H), zeros(1, B, H, dtype=torch.float64)),
}


def states_for(cell, bad):
    if cell == "lstm" and bad in BAD_LSTM_STATES:
        return BAD_LSTM_STATES[bad]
    return (BAD_STATES[bad], BAD_STATES[bad]) if cell == "lstm" else BAD_STATES[bad]


STATES = [(c, b) for c in CELLS for b in BAD_STATES] + [("lstm", b) for b in BAD_LSTM_STATES]


@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
@pytest.mark.parametrize(("cell", "bad"), STATES)
def test_states(cell, bad, unbatched):
    """Whatever torch.nn raises, fastrnn raises; what torch.nn takes (a list for a tuple), fastrnn takes."""
    input = torch.randn(T, I) if unbatched else torch.randn(T, B, I)
    assert_same_outcome(lambda namespace: Case(cell).module(namespace)(input, states_for(cell, bad)))


@pytest.mark.parametrize(("cell", "bad"), STATES)
def test_states_of_packed_input(cell, bad):
    """torch.nn checks little here, and crashes on some: fastrnn is held to the words it has for dense input."""
    module, states = Case(cell).module(fastrnn), states_for(cell, bad)
    dense = outcome(lambda: module(torch.randn(T, B, I), states))
    packed = outcome(lambda: module(pack_padded_sequence(torch.randn(T, B, I), [5, 3, 2]), states))
    if dense and (dense[0] in (AttributeError, IndexError) or "should also be" in dense[1]):
        # Words about the number of dimensions, or about something that has none.
        assert packed[0] is dense[0] or (packed[0] is RuntimeError and "Expected hidden" in packed[1])
    else:
        assert packed == dense


def test_states_of_a_tuple_for_one_tensor():
    for cell in ("gru", "rnn_tanh"):
        assert_same_error(lambda n, cell=cell: Case(cell).module(n)(zeros(T, B, I), (zeros(1, B, H), zeros(1, B, H))))


def test_states_with_a_projection():
    case = Case("lstm", proj_size=4)
    for h, c in ((13, 13), (4, 4), (3, 13), (4, 12)):
        assert_same_error(lambda n, h=h, c=c: case.module(n)(zeros(T, B, I), (zeros(1, B, h), zeros(1, B, c))))


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_states(cell):
    case = Case(cell, layout="batch_first")
    states = zeros(1, T, H)  # the batch is the first dimension of the input
    assert_same_error(lambda n: case.module(n)(zeros(B, T, I), (states, states) if cell == "lstm" else states))


@pytest.mark.parametrize("cell", CELLS)
def test_weights_elsewhere(cell):
    assert_same_error(lambda n: Case(cell).module(n, device="meta")(zeros(T, B, I)))
    assert_same_error(lambda n: Case(cell).module(n).double()(zeros(T, B, I)))

    def mixed(namespace):
        module = Case(cell).module(namespace)
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.double())
        module(zeros(T, B, I))

    assert_same_error(mixed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device: no CUDA device")
@pytest.mark.parametrize("cell", CELLS)
def test_devices(cell):
    assert_same_error(lambda n: Case(cell).module(n, device="cuda")(zeros(T, B, I)))
    assert_same_error(lambda n: Case(cell).module(n)(zeros(T, B, I, device="cuda")))
    states = zeros(1, B, H)
    states = (states, states) if cell == "lstm" else states
    assert_same_error(lambda n: Case(cell).module(n, device="cuda")(zeros(T, B, I, device="cuda"), states))


@pytest.mark.parametrize(
    "bad",
    ["input width", "input 3-D", "input 0-D", "input dtype", "unbatched input"]
    + ["hx batch", "hx width", "hx 1-D", "hx dtype"],
)
@pytest.mark.parametrize("cell", CELLS)
def test_cell_modules(cell, bad):
    x, h = zeros(B, I), zeros(B, H)
    input, state = {
        "input width": (x[:, 1:], h),
        "input 3-D": (x[None], h),
        "input 0-D": (x[0, 0], h),
        "hx batch": (x, h[1:]),
        "hx width": (x, h[:, 1:]),
        "hx 1-D": (x, h[0]),
        "unbatched input": (x[0], h),
        "input dtype": (x.double(), h),
        "hx dtype": (x, h.double()),
    }[bad]
    name, options = CELLS[cell]
    hx = (state, state) if cell == "lstm" else state
    assert_same_error(lambda namespace: getattr(namespace, f"{name}Cell")(I, H, **options)(input, hx))


@pytest.mark.parametrize("change", [{"num_layers": 1}, {"bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_weights_of_another_form(cell, change):
    """torch.nn raises as well, in words that depend on the cell."""
    name, options = CELLS[cell]
    module = getattr(fastrnn, name)(I, H, 2, **options)
    vars(module).update(change)
    with pytest.raises(RuntimeError, match="what the weights were made for"):
        module(zeros(T, B, I))


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_without_one_of_its_weights(cell):
    def call(namespace):
        name, options = CELLS[cell]
        module = getattr(namespace, f"{name}Cell")(I, H, **options)
        del module.weight_hh
        module(zeros(B, I))

    assert_same_error(call)


def test_rnn_cell_nonlinearity():
    assert_same_error(lambda namespace: namespace.RNNCell(I, H, nonlinearity="gelu")(zeros(B, I)))


# ---------------------------------------------------------------------------------------------------------------------
# NaN and infinity in one row stay in that row


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["input", "h0", "grad_output"])
@pytest.mark.parametrize("sizes", [(5, 3, 7, 13), (4, 33, 9, 40), (6, 2, 20, 129)], ids=str)
@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_bad_values_stay_in_their_row(cell, layout, sizes, where, value, device):
    case = Case(cell, *sizes, layout=layout)
    module = case.module(fastrnn, device=device)
    theirs = case.module(nn, device=device)
    theirs.load_state_dict(module.state_dict())
    clean, lengths = draw(case)
    row = int(lengths.argmax()) if lengths is not None else 1
    spoilt = {name: tensor.clone() for name, tensor in clean.items()}
    if where == "grad_output":
        spoilt["grad_output"].view(-1, case.H)[row_of(case, lengths) == row] = value
    else:
        spoilt[where].select(1, row)[-1 if where == "h0" else 1] = value
    batch = torch.arange(case.B)
    row_of_each = {
        "output": row_of(case, lengths),
        "h_n": batch,
        "c_n": batch,
        "input": batch,
        "h0": batch,
        "c0": batch,
    }
    clean, bad, theirs = (
        {
            name: rows_first(name, t, lengths)
            for part in run(case, each, dict(given), lengths)
            for name, t in part.items()
        }
        for each, given in ((module, clean), (module, spoilt), (theirs, spoilt))
    )
    for name in clean.keys() & row_of_each.keys():
        others = row_of_each[name] != row
        assert torch.equal(bad[name][others], clean[name][others]), f"{name}: another row has changed"
    for name in ("output", "h_n"):
        assert torch.equal(bad[name].isnan(), theirs[name].isnan()), f"{name}: NaN elsewhere than in torch.nn"
        assert where == "grad_output" or not bad[name].equal(clean[name])


def rows_first(name, tensor, lengths):
    """(T, B, ...) as (T*B, ...), (L, B, ...) as (B, L, ...)."""
    if name == "output":
        return tensor if lengths is not None else tensor.flatten(0, 1)
    return tensor.transpose(0, 1) if tensor.dim() == 3 else tensor


def row_of(case, lengths):
    """The row of the batch that each row of the output belongs to."""
    rows = torch.arange(case.B).repeat(case.T, 1)
    return rows.flatten() if lengths is None else pack_padded_sequence(rows, lengths).data


# ---------------------------------------------------------------------------------------------------------------------
# Enormous sizes: an error that says so, at once


def expanded(*shape):
    """A tensor of any size in one element of memory."""
    return torch.zeros(()).expand(shape)


ENORMOUS = {  # T, B, I, H
    "H": (2, 2, 3, 2**24),
    "H whose 4*H*H has 64 bits": (1, 1, 1, 2**30),
    "T": (2**42, 1, 1, 1),
    "T*B": (2**31, 2**31, 1, 1),
    "B": (1, 2**45, 1, 1),
    "I": (1, 1, 2**46, 1),
    "output of 2^64 bytes": (2**20, 2**20, 1, 2**22),
}


def enormous_outcomes():
    """Runs in a process of its own, which may take one GiB beside what it has."""
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes = {}
    for cell, (name, (T, B, I, H)) in itertools.product(CELLS, ENORMOUS.items()):  # noqa: E741, N806
        GH = GATES[cell] * H  # noqa: N806
        case = LayerCase(cell, T, B, I, H)
        arguments = dict(input=expanded(T, B, I), w_ih=expanded(GH, I), w_hh=expanded(GH, H), b_ih=None, b_hh=None)
        arguments |= {state: expanded(B, H) for state in (("h0", "c0") if cell == "lstm" else ("h0",))}
        outcomes[cell, name] = outcome(lambda c=case, a=arguments: c.call(ops, a)) or (None, "no error")
    return outcomes


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as only Linux can")
def test_enormous_sizes():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        outcomes = pool.submit(enormous_outcomes).result(timeout=120)
    assert len(outcomes) == len(CELLS) * len(ENORMOUS)
    for (cell, sizes), (error, words) in outcomes.items():
        # Before torch 2.13 the operators are told nothing of its errors.
        expected = "memory|overflow|too large" + ("|torch printed why" if torch.__version__ < "2.13" else "")
        assert error is RuntimeError and re.search(expected, words), f"{cell}, {sizes}: {words}"


def test_meta_shapes_do_not_overflow():
    module = fastrnn.LSTM(3, 2**20, device="meta")
    output, (h_n, c_n) = module(torch.empty(2**20, 2**10, 3, device="meta"))
    assert output.shape == (2**20, 2**10, 2**20) and h_n.shape == c_n.shape == (1, 2**10, 2**20)


def available_memory():
    """With what the system would give back of its cache of files, where it says so."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+)", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) << 10 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.extended
def test_offsets_of_more_than_32_bits(device):
    """More than 2^31 elements in the output: the last steps are those of a short sequence from the same state."""
    case = Case("rnn_tanh", T=2**15 + 3, B=2**10, I=1, H=64)
    needed = case.T * case.B * case.H * 4 * (3 if device.type == "cuda" else 1.5)
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, found {free / 2**30:.0f}")
    module = case.module(fastrnn, device=device)
    input = torch.zeros(case.T, case.B, 1, device=device)
    input[-20:].normal_()
    with torch.no_grad():
        output, h_n = module(input)
        settled = module(torch.zeros(1000, case.B, 1, device=device))[1]
        expected, expected_h_n = module(input[-20:], settled)
    torch.testing.assert_close(output[-20:], expected)
    torch.testing.assert_close(h_n, expected_h_n)
