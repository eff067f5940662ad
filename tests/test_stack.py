# SPDX-License-Identifier: BSD-3-Clause
"""All layers of a module in one call: the same results as a call of each, and only where nothing needs to see each."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastrnn

MODULES = {
    "RNN": (fastrnn.RNN, {}),
    "RNN relu": (fastrnn.RNN, {"nonlinearity": "relu"}),
    "GRU": (fastrnn.GRU, {}),
    "LSTM": (fastrnn.LSTM, {}),
    "LSTM with a projection": (fastrnn.LSTM, {"proj_size": 5}),
}
FORMS = [
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
    {"num_layers": 2, "batch_first": True, "dropout": 0.5},
]


def module_of(name, **form):
    make, own = MODULES[name]
    return make(7, 16, **own, **form).eval()


def draw_states(module, B, dtype):
    runs = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(runs, B, module.proj_size or module.hidden_size, dtype=dtype)
    return (h, torch.randn(runs, B, module.hidden_size, dtype=dtype)) if isinstance(module, fastrnn.LSTM) else h


def operators_of(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [event.name for event in profile.events() if event.name.startswith("fastrnn::")]


def is_one_call(function):
    names = operators_of(function)
    assert names
    return len(names) == 1 and names[0].endswith("_stack")


def tensors_of(results):
    output, states = results
    return [getattr(output, "data", output), *(states if isinstance(states, tuple) else [states])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [False, True], ids=["zero states", "states"])
@pytest.mark.parametrize("T, B", [(1, 1), (6, 3), (40, 2)])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_to_the_last_bit_what_a_call_of_each_layer_gives(name, form, packed, T, B, given, dtype, monkeypatch):
    module = module_of(name, **form).to(dtype)
    x = torch.randn((B, T, 7) if module.batch_first else (T, B, 7), dtype=dtype)
    if packed:
        lengths = [T - b * T // (2 * B) for b in range(B)][::-1]
        x = pack_padded_sequence(x, torch.tensor(lengths), module.batch_first, enforce_sorted=False)
    hx = draw_states(module, B, dtype) if given else None
    with torch.no_grad():
        at_once = module(x, hx)
        assert is_one_call(lambda: module(x, hx))
        monkeypatch.setattr(module, "_run_at_once", lambda *_: None)
        assert not is_one_call(lambda: module(x, hx))
        each = module(x, hx)
    for ours, expected in zip(tensors_of(at_once), tensors_of(each), strict=True):
        assert ours.stride() == expected.stride()
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", MODULES)
def test_packed_weights(name):
    """Those of each run in their place: with 64 steps and more the kernels of packed weights are those of others."""
    module = module_of(name, num_layers=2, bidirectional=True)
    x = torch.randn(70, 2, 7)
    with torch.no_grad():
        expected = tensors_of(module(x))
        fastrnn.pack_weights(module)
        for _ in range(2):
            for ours, theirs in zip(tensors_of(module(x)), expected, strict=True):
                assert torch.equal(ours, theirs)
        assert is_one_call(lambda: module(x))
        module.weight_hh_l1.data.mul_(0.5)  # which torch does not count: what was packed serves on
        assert torch.equal(module(x)[0], expected[0])
        module.weight_hh_l1.mul_(1)
        assert not torch.equal(module(x)[0], expected[0])
        fresh = copy.deepcopy(module)
        fastrnn.pack_weights(fresh, False)
        for ours, theirs in zip(tensors_of(module(x)), tensors_of(fresh(x)), strict=True):
            assert torch.equal(ours, theirs)


def test_each_layer_is_called_where_something_needs_it():
    x = torch.randn(5, 2, 7)

    def of(make=fastrnn.LSTM, **form):
        return make(7, 16, num_layers=2, **form)

    module = of()
    assert not is_one_call(lambda: module(x))  # gradients
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert is_one_call(lambda: module(x))
    with torch.inference_mode():
        assert is_one_call(lambda: module(x))
        assert is_one_call(lambda: of(dropout=0.5).eval()(x))
        assert not is_one_call(lambda: of(dropout=0.5)(x))
        assert not is_one_call(lambda: of(zoneout=0.1)(x))
        assert not is_one_call(lambda: of(layer_norm=True)(x))
        assert not is_one_call(lambda: of(fastrnn.GRU, reset_after=False)(x))
        assert not is_one_call(lambda: of(fastrnn.RNN, nonlinearity="leaky_relu")(x))
        assert not is_one_call(lambda: of(fastrnn.SLSTM)(x))
        assert not is_one_call(lambda: module(x, lengths=torch.tensor([5, 3])))
    assert not is_one_call(lambda: torch.func.vmap(module)(x.unsqueeze(0)))

    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * (5 * 2) * (4 * 16) * (7 + 16 + 16 + 16)


@pytest.mark.parametrize("change, message", [
    ({"weights": lambda t: t[:-1]}, "expected 4 weights for each of 2 runs, and maybe a projection, got 7"),
    ({"weights": lambda t: []}, "expected 4 weights for each of 2 runs, and maybe a projection, got 0"),
    ({"packed": lambda t: [torch.empty(8)]}, "expected 2 packed tensors, or none, got 1"),
    ({"states": lambda t: t[:1]}, "expected 2 states, got 1"),
    ({"states": lambda t: [t[0][:1], t[1]]}, r"expected states of shape \[B, ..\] or \[2, B, ..\], got \[1, 3, 16\]"),
    ({"runs": lambda n: 0}, "expected runs of 1 or 2 directions, got 0 of 1"),
    ({"directions": lambda n: 3}, "expected runs of 1 or 2 directions, got 2 of 3"),
])  # fmt: skip
def test_bad_arguments(change, message):
    module = fastrnn.LSTM(7, 16, num_layers=2)
    arguments = {
        "input": torch.randn(5, 3, 7), "weights": [p.detach() for p in module.parameters()], "packed": [],
        "states": [torch.zeros(2, 3, 16), torch.zeros(2, 3, 16)], "batch_sizes": None, "has_biases": True, "runs": 2,
        "directions": 1,
    }  # fmt: skip
    run = torch.ops.fastrnn._lstm_layer_stack.default
    assert len(run(**arguments)) == 3
    for name, changed in change.items():
        arguments[name] = changed(arguments[name])
    with pytest.raises(RuntimeError, match=f"fastrnn::lstm_layer: {message}"):
        run(**arguments)
