# SPDX-License-Identifier: BSD-3-Clause
"""convert, revert and patch: the class of a module changes, and nothing else."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import LSTM as LSTM_IMPORTED_BEFORE
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn

NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")


class Model(nn.Module):
    """Every recurrent class of torch.nn, nested, some with options."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 4)
        self.layers = nn.ModuleDict(
            {
                "rnn": nn.RNN(4, 6, nonlinearity="relu", bias=False),
                "gru": nn.GRU(6, 6, num_layers=2, dropout=0.5),
                "lstm": nn.LSTM(6, 6, bidirectional=True, proj_size=3),
            }
        )
        self.cells = nn.ModuleList([nn.RNNCell(6, 6, bias=False), nn.GRUCell(6, 6), nn.LSTMCell(6, 6)])

    def forward(self, input):
        x = self.embed(input)
        for layer in self.layers.values():
            x, _ = layer(x)
        h = x[-1]
        for cell in self.cells:
            h = cell(h)
        return h[0]


RECURRENT = {
    "layers.rnn": "RNN",
    "layers.gru": "GRU",
    "layers.lstm": "LSTM",
    "cells.0": "RNNCell",
    "cells.1": "GRUCell",
    "cells.2": "LSTMCell",
}


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


@pytest.fixture
def model():
    return Model().eval()


@pytest.fixture
def input():
    return torch.randn(7, 3, 5)


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def state(model):
    """What a module holds, by identity: its attributes, and those of its dictionaries of parameters and hooks."""
    return {
        name: {
            attribute: {key: id(item) for key, item in value.items()} if isinstance(value, dict) else value
            for attribute, value in vars(module).items()
            if attribute not in ("_flat_weights", "_flat_weight_refs")  # equal lists, made anew
        }
        for name, module in model.named_modules()
    }


def test_convert_replaces_every_class_and_says_so(model, input):
    expected = model(input)
    result = fastrnn.convert(model)
    assert result.converted == RECURRENT
    assert result.left_alone == {}
    for name, kind in RECURRENT.items():
        assert type(model.get_submodule(name)) is getattr(fastrnn, kind)
        assert f"converted {name}: {kind}" in str(result)
    torch.testing.assert_close(model(input), expected)


@pytest.mark.parametrize("name", NAMES)
def test_convert_the_model_itself(name):
    module = getattr(nn, name)(4, 6)
    assert fastrnn.convert(module).converted == {"": name}
    assert type(module) is getattr(fastrnn, name)


def test_convert_keeps_objects(model):
    modules, parameters, before = dict(model.named_modules()), dict(model.named_parameters()), str(model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    fastrnn.convert(model)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert not any(module.training for module in model.modules())
    assert str(model) == before


def test_an_optimizer_made_before_trains_what_was_converted(model, input):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastrnn.convert(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(input).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() == 0 or not torch.equal(parameter, before[name]), name


def test_hooks_still_run(input):
    lstm, calls = nn.LSTM(5, 6), []
    lstm.register_forward_pre_hook(lambda module, args: calls.append("forward_pre"))
    lstm.register_forward_hook(lambda module, args, output: calls.append("forward"))
    lstm.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward"))
    lstm.register_state_dict_pre_hook(lambda module, prefix, keep_vars: calls.append("state_dict_pre"))
    lstm.register_load_state_dict_post_hook(lambda module, keys: calls.append("load_state_dict_post"))
    lstm.weight_hh_l0.register_hook(lambda grad: calls.append("parameter"))
    fastrnn.convert(lstm)
    lstm(input)[0].sum().backward()
    assert sorted(calls) == ["backward", "forward", "forward_pre", "parameter"]
    lstm.load_state_dict(lstm.state_dict())
    assert calls[4:] == ["state_dict_pre", "load_state_dict_post"]


def test_tied_weights_stay_tied(input):
    one, two = nn.GRU(5, 6), nn.GRU(5, 6)
    two.weight_hh_l0 = one.weight_hh_l0
    pair = nn.ModuleList([one, two])
    fastrnn.convert(pair)
    sum(module(input)[0].sum() for module in pair).backward()
    both = one.weight_hh_l0.grad.clone()
    one.zero_grad()
    one(input)[0].sum().backward()
    assert one.weight_hh_l0 is two.weight_hh_l0
    assert not torch.equal(both, one.weight_hh_l0.grad)


def test_convert_twice_is_convert_once(model):
    fastrnn.convert(model)
    again = fastrnn.convert(model)
    assert again.converted == again.left_alone == {}
    assert again.already["layers.lstm"] == "LSTM"
    assert "fastrnn's already layers.lstm: LSTM" in str(again)
    fastrnn.revert(model)
    assert type(model.layers["lstm"]) is nn.LSTM


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the successor of its quantization
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(5, 6)), {nn.LSTM})


class AnotherCell(nn.RNNBase):
    def forward(self, input):
        return input + self.weight_hh_l0.sum(), None


def forward_replaced():
    lstm = nn.LSTM(5, 6)
    lstm.forward = lambda input: nn.LSTM.forward(lstm, 2 * input)
    return nn.Sequential(lstm)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Sequential(OwnForward(5, 6)), "OwnForward is a subclass of torch.nn.LSTM"),
        (forward_replaced, "its forward was replaced"),
        (quantized, "quantized"),
        (lambda: torch.jit.script(nn.Sequential(nn.LSTM(5, 6))), "scripted or traced"),
        (lambda: torch.jit.trace(nn.Sequential(nn.LSTM(5, 6)), torch.zeros(7, 3, 5)), "scripted or traced"),
        (lambda: nn.Sequential(nn.LSTM(5, 6, dtype=torch.complex64)), "complex weights"),
        (lambda: nn.Sequential(AnotherCell("LSTM", 5, 6)), "fastrnn has no AnotherCell"),
    ],
    ids=["subclass", "forward_replaced", "quantized", "scripted", "traced", "complex", "base"],
)
def test_what_cannot_be_converted_is_left_alone(build, reason, input):
    model = build()
    input = input.to(next((p.dtype for p in model.parameters()), input.dtype))
    before, expected = classes(model), model(input)[0]
    result = fastrnn.convert(model)
    assert result.converted == {}
    assert result.left_alone == {"0": reason}
    assert str(result) == f"left alone 0: {reason}"
    assert classes(model) == before
    if isinstance(module := dict(model.named_modules())["0"], nn.RNNBase):
        text = f"runs as torch.nn's; fastrnn.convert(module) leaves it alone: {reason}"
        assert text in str(fastrnn.explain(module, input))
    assert torch.equal(model(input)[0], expected)
    with pytest.raises(ValueError, match="nothing to revert"):
        fastrnn.revert(model)


def test_a_class_with_another_forward_is_left_alone(input, monkeypatch):
    original = nn.LSTM.forward
    monkeypatch.setattr(nn.LSTM, "forward", lambda self, input, hx=None: original(self, 2 * input, hx))
    lstm = nn.LSTM(5, 6)
    assert fastrnn.convert(lstm).left_alone == {"": "torch.nn.LSTM.forward was replaced"}
    assert type(lstm) is nn.LSTM


def test_revert_undoes_convert_exactly(model, input):
    before, held, expected = classes(model), state(model), model(input)
    fastrnn.convert(model)
    assert classes(model) != before
    fastrnn.revert(model)
    assert classes(model) == before
    assert state(model) == held
    assert torch.equal(model(input), expected)


@pytest.mark.parametrize(
    "copier",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(save(model), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_can_be_reverted(model, input, copier):
    before, expected = classes(model), model(input)
    fastrnn.convert(model)
    other = copier(model)
    assert classes(other) == classes(model)
    assert torch.equal(other(input), model(input))
    fastrnn.revert(other)
    assert classes(other) == before != classes(model)
    assert torch.equal(other(input), expected)


def save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_revert_sees_weights_replaced_meanwhile(input):
    lstm = nn.LSTM(5, 6)
    fastrnn.convert(lstm)
    lstm.weight_hh_l0 = nn.Parameter(torch.randn(24, 6))
    expected = lstm(input)[0]
    fastrnn.revert(lstm)
    assert lstm._flat_weights[1] is lstm.weight_hh_l0
    torch.testing.assert_close(lstm(input)[0], expected)


def test_an_rnn_without_the_name_of_its_nonlinearity(input):
    """Early versions of torch kept the mode alone, and pickled it."""
    rnn = nn.RNN(5, 6, nonlinearity="relu")
    del rnn.nonlinearity
    expected = rnn(input)[0]
    fastrnn.convert(rnn)
    torch.testing.assert_close(rnn(input)[0], expected)


def test_revert_leaves_what_was_built_as_fastrnn():
    model = nn.Sequential(fastrnn.LSTM(5, 6), nn.LSTM(5, 6))
    fastrnn.convert(model)
    fastrnn.revert(model)
    assert [type(module) for module in model] == [fastrnn.LSTM, nn.LSTM]
    with pytest.raises(ValueError, match="nothing to revert: no module of this Sequential was converted by fastrnn"):
        fastrnn.revert(model)


def test_revert_refuses_a_forward_that_calls_fastrnn(input):
    """As the hooks of Accelerate do it: the bound method is kept, and called by what replaces it."""
    model = nn.Sequential(nn.GRU(5, 5), nn.LSTM(5, 6))
    fastrnn.convert(model)
    expected, kept = model[1](input)[0], model[1].forward
    model[1].forward = lambda *args: kept(*args)
    with pytest.raises(ValueError, match="cannot revert 1: its forward was replaced after convert"):
        fastrnn.revert(model)
    assert [type(module) for module in model] == [fastrnn.GRU, fastrnn.LSTM]
    assert torch.equal(model[1](input)[0], expected)
    del model[1].forward
    fastrnn.revert(model)
    assert [type(module) for module in model] == [nn.GRU, nn.LSTM]


@pytest.mark.parametrize("function", [fastrnn.convert, fastrnn.revert])
def test_only_modules_are_taken(function):
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got dict"):
        function({})


@pytest.mark.parametrize(
    "change",
    [
        lambda lstm: parametrizations.weight_norm(lstm, "weight_hh_l0"),
        lambda lstm: parametrizations.spectral_norm(lstm, "weight_hh_l0"),
        lambda lstm: prune.l1_unstructured(lstm, "weight_hh_l0", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_changed_weights_stay_changed(input, change):
    lstm = nn.LSTM(5, 6)
    change(lstm)
    lstm.eval()
    original, expected, names = type(lstm), lstm(input)[0], [name for name, _ in lstm.named_parameters()]

    assert fastrnn.convert(lstm).converted == {"": "LSTM"}
    assert isinstance(lstm, fastrnn.LSTM)
    assert not isinstance(lstm, nn.LSTM)
    torch.testing.assert_close(lstm(input)[0], expected)
    lstm(input)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in lstm.parameters())

    fastrnn.revert(lstm)
    assert isinstance(lstm, nn.LSTM)
    assert type(lstm).__name__ == original.__name__
    assert [name for name, _ in lstm.named_parameters()] == names
    assert torch.equal(lstm(input)[0], expected)


def test_parametrizations_come_and_go_after_convert(input):
    lstm = nn.LSTM(5, 6)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    expected = lstm(input)[0]
    fastrnn.convert(lstm)
    parametrizations.weight_norm(lstm, "weight_ih_l0")
    torch.testing.assert_close(lstm(input)[0], expected)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        parametrize.remove_parametrizations(lstm, name)
    assert type(lstm) is fastrnn.LSTM
    torch.testing.assert_close(lstm(input)[0], expected)


def test_convert_one_of_two_parametrized_copies(input):
    one = nn.LSTM(5, 6)
    parametrizations.spectral_norm(one, "weight_hh_l0")
    two = copy.deepcopy(one)
    fastrnn.convert(one)
    assert isinstance(two, nn.LSTM)
    torch.testing.assert_close(one.eval()(input)[0], two.eval()(input)[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_converted_model_compiles_into_one_graph(model, input, backend):
    fastrnn.convert(model)
    expected = model(input)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(input), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_jit_script_says_what_else_there_is(name):
    model = nn.Sequential(getattr(nn, name)(5, 6))
    fastrnn.convert(model)
    with pytest.raises(NotImplementedError, match=f"does not compile fastrnn.{name}: torch.export, .* fastrnn.revert"):
        torch.jit.script(model)
    fastrnn.revert(model)
    torch.jit.script(model)


@pytest.mark.parametrize("order", ["trace, convert", "convert, trace"])
def test_torch_fx(order, input):
    """Tracing keeps torch.nn's modules whole, and others whose tracer says so."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or super().is_leaf_module(module, name)

    model = nn.Sequential(nn.Linear(5, 5), nn.LSTM(5, 6))
    expected = model(input)[0]
    if order == "convert, trace":
        fastrnn.convert(model)
        traced = torch.fx.GraphModule(model, Tracer().trace(model))
    else:
        traced = torch.fx.symbolic_trace(model)
        assert fastrnn.convert(traced).converted == {"1": "LSTM"}
    assert type(traced.get_submodule("1")) is fastrnn.LSTM
    torch.testing.assert_close(traced(input)[0], expected)


def test_a_model_compiled_before_sees_the_change(input):
    model = nn.Sequential(nn.LSTM(5, 6))
    compiled = torch.compile(model, backend="eager")
    expected = compiled(input)[0]
    assert fastrnn.convert(compiled).converted == {"_orig_mod.0": "LSTM"}
    output = compiled(input)[0]
    torch.testing.assert_close(output, expected)
    assert "fastrnn" in output.grad_fn.name().lower()


# ---------------------------------------------------------------------------------------------------------------------
# patch


def test_patch_converts_what_is_built_inside(input):
    torch.manual_seed(1)
    expected = Model().eval()
    torch.manual_seed(1)
    with fastrnn.patch():
        model = Model().eval()
    assert {name: type(model.get_submodule(name)) for name in RECURRENT} == {
        name: getattr(fastrnn, kind) for name, kind in RECURRENT.items()
    }
    torch.testing.assert_close(model(input), expected(input))
    fastrnn.revert(model)
    assert classes(model) == classes(expected)


def test_patch_finds_classes_by_any_name():
    with fastrnn.patch():
        assert type(LSTM_IMPORTED_BEFORE(5, 6)) is fastrnn.LSTM
        assert type(nn.modules.rnn.LSTM(5, 6)) is fastrnn.LSTM


def test_patch_leaves_subclasses_and_copies_alone():
    before = nn.LSTM(5, 6)
    with fastrnn.patch():
        assert type(OwnForward(5, 6)) is OwnForward
        assert type(copy.deepcopy(before)) is nn.LSTM
        assert type(pickle.loads(pickle.dumps(before))) is nn.LSTM


def test_patch_passes_arguments_and_errors_on():
    with fastrnn.patch():
        assert repr(nn.LSTM(5, 6, 2, bidirectional=True)) == "LSTM(5, 6, num_layers=2, bidirectional=True)"
        with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
            nn.LSTM(5, 0)


def test_patch_ends_with_its_block():
    inits = [getattr(nn, name).__init__ for name in NAMES]
    with pytest.raises(KeyError), fastrnn.patch():
        with fastrnn.patch():
            assert type(nn.GRU(5, 6)) is fastrnn.GRU
        assert type(nn.GRU(5, 6)) is fastrnn.GRU
        raise KeyError
    assert [getattr(nn, name).__init__ for name in NAMES] == inits
    assert type(nn.GRU(5, 6)) is nn.GRU


def test_patch_in_threads_that_overlap():
    """The block that opened first ends first."""
    opened, overlapping, ended = (threading.Event() for _ in range(3))

    def first():
        with fastrnn.patch():
            opened.set()
            assert overlapping.wait(60)
        ended.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert opened.wait(60)
    with fastrnn.patch():
        overlapping.set()
        assert ended.wait(60)
        assert type(nn.LSTM(5, 6)) is fastrnn.LSTM
    thread.join()
    assert type(nn.LSTM(5, 6)) is nn.LSTM


def test_patch_is_a_decorator():
    @fastrnn.patch()
    def build():
        return nn.RNN(5, 6)

    assert type(build()) is fastrnn.RNN
    assert type(build()) is fastrnn.RNN
    assert type(nn.RNN(5, 6)) is nn.RNN
