# SPDX-License-Identifier: BSD-3-Clause
"""What a user of torch.nn relies on beside the numbers of test_parity.py: parameters, autograd, layouts, dropout."""

import copy
import io
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from parity import CELLS, Case, assert_parity, call, check_parity, draw, run
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn

# ---------------------------------------------------------------------------------------------------------------------
# Fixtures: one configuration with everything in it, per cell.


@pytest.fixture(params=CELLS)
def case(request):
    return Case(request.param, num_layers=2, bidirectional=True)


@pytest.fixture
def module(case, device):
    return case.module(fastrnn, device=device)


@pytest.fixture
def tensors(case, device):
    return {name: tensor.to(device) for name, tensor in draw(case)[0].items()}


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")


def outputs_equal(case, one, other, tensors):
    assert_equal(call(case, one, tensors, None), call(case, other, tensors, None))


# ---------------------------------------------------------------------------------------------------------------------
# Construction, parameters, serialisation


def test_every_cell_has_its_modules():
    assert {name for name, _ in CELLS.values()} == {"RNN", "LSTM", "GRU"}
    for name, _ in CELLS.values():
        assert isinstance(getattr(fastrnn, name)(2, 3), nn.RNNBase)
        assert isinstance(getattr(fastrnn, f"{name}Cell")(2, 3), nn.RNNCellBase)


@pytest.mark.parametrize("name", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("cell", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_without_one_bias(cell, name):
    results = []
    for namespace in (fastrnn, nn):
        torch.manual_seed(1)
        module = getattr(namespace, cell)(3, 4)
        setattr(module, name, None)
        results.append(module(torch.ones(2, 3)))
    torch.testing.assert_close(*results)


def test_parameters_are_those_of_torch_nn(case):
    """Names, order, shapes, and initial values under one seed."""
    modules = []
    for namespace in (fastrnn, nn):
        torch.manual_seed(1)
        modules.append(case.module(namespace))
    ours, theirs = modules
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert_equal(ours.state_dict(), theirs.state_dict())
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert [[w.shape for w in layer] for layer in ours.all_weights] == [
        [w.shape for w in layer] for layer in theirs.all_weights
    ]
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert repr(ours) == repr(theirs)


def test_repr_shows_what_torch_nn_shows():
    for case in (Case("lstm", proj_size=3, dropout=0.25, num_layers=2), Case("gru", bias=False, layout="batch_first")):
        assert repr(case.module(fastrnn)) == repr(case.module(nn))


def test_state_dict_goes_both_ways(case, module, device):
    theirs = case.module(nn, device=device)
    theirs.load_state_dict(module.state_dict())
    assert_equal(theirs.state_dict(), module.state_dict())
    module = case.module(fastrnn, device=device)
    module.load_state_dict(theirs.state_dict())
    assert_equal(module.state_dict(), theirs.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict(replace(case, H=5).module(nn).state_dict())


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(case, module, tensors, copier):
    module.eval()
    if copier == "deepcopy":
        twin = copy.deepcopy(module)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    outputs_equal(case, module, twin, tensors)
    with torch.no_grad():  # the twin has weights of its own
        next(twin.parameters()).fill_(0.5)
    assert not torch.equal(next(twin.parameters()), next(module.parameters()))
    assert not torch.equal(call(case, module, tensors, None)["output"], call(case, twin, tensors, None)["output"])


def test_meta_device(case):
    ours, theirs = (case.module(namespace, device="meta") for namespace in (fastrnn, nn))
    tensors = {name: tensor.to("meta") for name, tensor in draw(case)[0].items()}
    expected = call(case, theirs, tensors, None)
    for name, tensor in call(case, ours, tensors, None).items():
        assert tensor.is_meta and tensor.shape == expected[name].shape and tensor.dtype == expected[name].dtype
    ours.to_empty(device="cpu").load_state_dict(case.module(nn).state_dict())
    outputs_equal(case, ours, copy.deepcopy(ours), draw(case)[0])


def test_dtype_and_device_move_with_the_module(case, device):
    module = case.module(fastrnn).to(device, torch.float64)
    tensors = {name: tensor.to(device, torch.float64) for name, tensor in draw(case)[0].items()}
    assert {tensor.dtype for tensor in call(case, module, tensors, None).values()} == {torch.float64}
    assert {tensor.device.type for tensor in call(case, module, tensors, None).values()} == {device.type}


def test_flatten_parameters_changes_nothing(case, module, tensors):
    before = call(case, module, tensors, None)
    module.flatten_parameters()
    assert_equal(call(case, module, tensors, None), before)


# ---------------------------------------------------------------------------------------------------------------------
# Weights that change, or are computed


def test_a_new_weight_takes_effect(case, module, device, tensors):
    """However a weight is changed, the next call uses it: nothing packed or cached survives its change."""

    def check():
        theirs = case.module(nn, device=device)
        theirs.load_state_dict(module.state_dict())
        for name, tensor in call(case, theirs, tensors, None).items():
            torch.testing.assert_close(call(case, module, tensors, None)[name], tensor)

    def other(weight):
        return torch.empty_like(weight).uniform_(-0.3, 0.3)

    for no_grad in (False, True):
        with torch.set_grad_enabled(not no_grad):
            check()
            module.weight_hh_l0 = nn.Parameter(other(module.weight_hh_l0))
            check()
            module.weight_hh_l1.data = other(module.weight_hh_l1)
            check()
            with torch.no_grad():
                module.weight_ih_l0.mul_(-2.0)
            check()
            module.weight_hh_l0.data.copy_(other(module.weight_hh_l0))
            check()


def test_weight_norm(case, module, device, tensors):
    theirs = case.module(nn, device=device)
    theirs.load_state_dict(module.state_dict())
    for each in (module, theirs):
        parametrizations.weight_norm(each, "weight_hh_l0")
    for scale in (1.0, 2.0):
        with torch.no_grad():
            for each in (module, theirs):
                each.parametrizations.weight_hh_l0.original0.mul_(scale)
        for ours, expected in zip(run(case, module, tensors, None), run(case, theirs, tensors, None), strict=True):
            for name in expected:
                torch.testing.assert_close(ours[name], expected[name])


def test_functional_call(case, module, tensors):
    other = case.module(fastrnn, device=module.weight_hh_l0.device)
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in other.named_parameters()}
    input, hx = tensors["input"], (tensors["h0"], tensors["c0"]) if case.cell == "lstm" else tensors["h0"]
    output, _ = torch.func.functional_call(module, weights, (input, hx))
    torch.testing.assert_close(output, other(input, hx)[0], rtol=0, atol=0)
    output.sum().backward()
    assert all(weight.grad is not None for weight in weights.values())
    assert all(weight.grad is None for weight in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def test_frozen_weights_get_no_gradient_and_change_no_other(case, module, tensors):
    _, expected = run(case, module, tensors, None)
    parameters = dict(module.named_parameters())
    for frozen in [["weight_hh_l0"], ["weight_ih_l1", "bias_hh_l0_reverse"], list(parameters)]:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name not in frozen)
        _, grads = run(case, module, tensors, None)
        assert_equal(grads, {name: grad for name, grad in expected.items() if name not in frozen})


@pytest.mark.parametrize("asks", ["input", "h0", "c0", "weight_ih_l0", "weight_hh_l1_reverse", "bias_ih_l1"])
def test_one_gradient_alone(case, module, tensors, asks):
    if asks == "c0" and case.cell != "lstm":
        return
    _, expected = run(case, module, tensors, None)
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == asks)
    leaf = tensors[asks].requires_grad_() if asks in tensors else module.get_parameter(asks)
    outputs = call(case, module, tensors, None)
    (grad,) = torch.autograd.grad(list(outputs.values()), leaf, [tensors[f"grad_{name}"] for name in outputs])
    torch.testing.assert_close(grad, expected[asks], rtol=0, atol=0)


@pytest.mark.parametrize("used", ["output", "h_n", "c_n"])
def test_gradient_through_one_output_alone(case, device, used):
    """The other outputs' gradients are zero, and autograd passes none."""
    if used == "c_n" and case.cell != "lstm":
        return
    torch.manual_seed(0)
    theirs = case.module(nn, device=device)
    ours = case.module(fastrnn, device=device)
    ours.load_state_dict(theirs.state_dict())
    truth = copy.deepcopy(theirs).double()
    results = []
    for module in (ours, theirs, truth):
        tensors = {name: tensor.to(module.weight_hh_l0) for name, tensor in draw(case)[0].items()}
        output = call(case, module, tensors, None)[used]
        grads = torch.autograd.grad(output, list(module.parameters()), tensors[f"grad_{used}"], allow_unused=True)
        names = [name for name, _ in module.named_parameters()]
        zero = torch.zeros_like
        results.append(
            ({}, {n: zero(p) if g is None else g for n, p, g in zip(names, module.parameters(), grads, strict=True)})
        )
    assert_parity(case, *results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_modes(case, module, device, tensors, mode):
    theirs = case.module(nn, device=device)
    theirs.load_state_dict(module.state_dict())
    truth = copy.deepcopy(theirs).double()
    with mode():
        ours, expected = (call(case, each, tensors, None) for each in (module, theirs))
        true = call(case, truth, {name: tensor.double() for name, tensor in tensors.items()}, None)
    assert not any(tensor.requires_grad for tensor in ours.values())
    assert_parity(case, (ours, {}), (expected, {}), (true, {}))


def test_backward_in_eval_mode(case, module, tensors):
    expected = run(case, module, tensors, None)
    for ours, training in zip(run(case, module.eval(), tensors, None), expected, strict=True):
        assert_equal(ours, training)


def test_two_backwards_are_equal(case, module, tensors):
    """The second finds what the first found: backward writes into nothing that was saved."""
    leaves = [tensors["input"].requires_grad_(), tensors["h0"].requires_grad_(), *module.parameters()]
    outputs = call(case, module, tensors, None)
    grads = [tensors[f"grad_{name}"] for name in outputs]
    first = torch.autograd.grad(list(outputs.values()), leaves, grads, retain_graph=True)
    second = torch.autograd.grad(list(outputs.values()), leaves, grads)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_in_place_change_of_a_saved_tensor_is_caught(case, module, tensors):
    output = call(case, module, tensors, None)["output"]
    with torch.no_grad():
        module.weight_hh_l0.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_in_place_change_of_the_output_is_caught(cell, device):
    """Backward reads the output, as that of torch.nn does but for RNN and GRU on the CPU."""
    output, _ = Case(cell).module(fastrnn, device=device)(torch.randn(5, 3, Case(cell).I, device=device))
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("cell", CELLS)
def test_final_states_may_be_changed_in_place(cell, T, device):
    """As where episodes end between two calls: backward reads none of them, at one step either."""
    case = Case(cell, T=T)
    module = case.module(fastrnn, device=device)
    output, states = module(torch.randn(T, case.B, case.I, device=device))
    expected = torch.autograd.grad(output.sum(), list(module.parameters()), retain_graph=True)
    for state in states if cell == "lstm" else (states,):
        state[:, 0] = 0
    grads = torch.autograd.grad(output.sum(), list(module.parameters()))
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(grads, expected, strict=True))


def test_runs_are_bitwise_equal(case, module, tensors):
    first, second = (run(case, module, tensors, None) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)


def test_deterministic_algorithms_never_raise(case, module, tensors):
    torch.use_deterministic_algorithms(True)
    try:
        run(case, module, tensors, None)
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def strided(tensor):
    """The same values with every stride unusual: dimensions reversed in memory, and every second element."""
    wide = torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)
    return wide.permute(*reversed(range(wide.dim()))).contiguous().permute(*reversed(range(wide.dim())))[..., 0]


def test_strides_do_not_matter(case, module, tensors):
    odd = {name: strided(tensor) for name, tensor in tensors.items()}
    assert not any(tensor.is_contiguous() for tensor in odd.values())
    for ours, expected in zip(run(case, module, odd, None), run(case, module, tensors, None), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_tensors(case, module, tensors, dim):
    """Stride 0, as from expand, and as in the gradient of a sum; over time, as where a decoder repeats its input."""
    odd = {name: tensor.narrow(dim, 0, 1).expand_as(tensor) for name, tensor in tensors.items()}
    dense = {name: tensor.contiguous() for name, tensor in odd.items()}
    for ours, expected in zip(run(case, module, odd, None), run(case, module, dense, None), strict=True):
        torch.testing.assert_close(ours, expected)


def test_arguments_are_not_written_to(case, module, tensors):
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    run(case, module, tensors, None)
    assert_equal({name: tensor.detach() for name, tensor in tensors.items()}, before)


@pytest.mark.parametrize("layout", ["packed", "packed_unsorted"])
def test_packed_output_carries_the_input_order(case, module, layout):
    case = replace(case, layout=layout, T=6, B=5)
    tensors, lengths = draw(case)
    input = pack_padded_sequence(tensors["input"].to(module.weight_hh_l0), lengths, enforce_sorted=layout == "packed")
    output, _ = module(input)
    assert isinstance(output, PackedSequence)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        ours, expected = getattr(output, field), getattr(input, field)
        assert ours is expected or torch.equal(ours, expected)
    padded, output_lengths = pad_packed_sequence(output)
    assert torch.equal(output_lengths, lengths)
    for row, length in enumerate(lengths):
        alone, _ = module(tensors["input"][:length, row : row + 1].to(module.weight_hh_l0))
        torch.testing.assert_close(padded[:length, row], alone[:, 0])


@pytest.mark.parametrize(
    ("layout", "T", "B"),
    [
        ("dense", 3, 0),
        ("dense", 0, 3),
        ("dense", 0, 0),
        ("batch_first", 3, 0),
        ("batch_first", 0, 3),
        ("unbatched", 0, 1),
    ],
)
def test_empty_input(case, device, layout, T, B):  # noqa: N803
    """No sequences, or no steps: what torch.nn does on the CPU, backward included."""
    case = replace(case, T=T, B=B, layout=layout)
    results = []
    for namespace, where in ((fastrnn, device), (nn, "cpu")):
        module = case.module(namespace, device=where)
        tensors = {name: tensor.to(where) for name, tensor in draw(case)[0].items()}
        try:
            outputs, grads = run(case, module, tensors, None)
        except RuntimeError as error:
            results.append(str(error))
        else:
            results.append([(name, t.shape, t.count_nonzero().item()) for name, t in (outputs | grads).items()])
    assert results[0] == results[1]


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


def test_dropout_is_reproducible_and_off_in_eval(device):
    case = Case("gru", num_layers=3, dropout=0.5)
    module = case.module(fastrnn, device=device)
    input = draw(case)[0]["input"].to(device)

    def output(seed):
        torch.manual_seed(seed)
        return module(input)[0]

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))
    module.eval()
    assert torch.equal(output(1), output(2))


def test_dropout_on_one_layer_warns_as_torch_nn_does():
    texts = []
    for namespace in (fastrnn, nn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            namespace.LSTM(3, 4, dropout=0.5)
        texts.append([(warning.category, str(warning.message)) for warning in caught])
    assert texts[0] == texts[1] != []


# ---------------------------------------------------------------------------------------------------------------------
# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_after_a_cast(case, module, device, tensors, dtype):
    with torch.autocast(device.type, dtype):
        outputs, grads = run(case, module, tensors, None)
    expected, expected_grads = run(case, copy.deepcopy(module).to(dtype), tensors, None)
    assert_equal({name: tensor.to(dtype) for name, tensor in outputs.items()}, expected)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    for name, grad in grads.items():
        torch.testing.assert_close(grad.to(dtype), expected_grads[name])


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_autocast_parity(case, device, layout):
    """The dtypes that torch.nn returns, and values as near to the truth. (In float16 nn.LSTM fails on the CPU.)"""
    with torch.autocast(device.type, torch.bfloat16):
        check_parity(replace(case, layout=layout), fastrnn, device, precision=torch.bfloat16)


@pytest.mark.parametrize("cell", CELLS)
def test_cells_under_autocast_are_torch_nn(cell, device):
    """To the bit, over steps: each weight is cast once, and so is its gradient."""
    name, options = CELLS[cell]
    ours = getattr(fastrnn, f"{name}Cell")(5, 7, **options, device=device)
    theirs = getattr(nn, f"{name}Cell")(5, 7, **options, device=device)
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(4, 3, 5, device=device)
    results = []
    for module in (ours, theirs):
        hx, states = None, []
        with torch.autocast(device.type, torch.bfloat16):
            for x in input:
                hx = module(x, hx)
                states += hx if isinstance(hx, tuple) else [hx]
        sum(state.float().sin().sum() for state in states).backward()
        results.append([*states, *(parameter.grad for parameter in module.parameters())])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)
