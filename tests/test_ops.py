# SPDX-License-Identifier: BSD-3-Clause
"""The registered operators: opcheck, derivatives of first and second order, torch.compile, torch.export, messages."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from parity import CELLS, Case, LayerCase, call, check_layer_parity, draw

import fastrnn
from fastrnn import ops, reference

FORMS = [
    {},
    {"bias": False},
    {"packed": True},
    {"reverse": True},
    {"packed": True, "reverse": True},
    {"x_gates": True},
    {"x_gates": True, "packed": True, "reverse": True, "bias": False},
]
LSTM_FORMS = [{"proj_size": 3}, {"proj_size": 3, "packed": True, "reverse": True}, {"proj_size": 3, "bias": False}]
TINY = {"T": 4, "B": 3, "I": 3, "H": 5}


def layer_cases(**sizes_and_dtype):
    return [LayerCase(cell, **sizes_and_dtype, **form) for cell in CELLS for form in FORMS] + [
        LayerCase("lstm", **sizes_and_dtype, **form) for form in LSTM_FORMS
    ]


def operator_arguments(case, arguments, save):
    """The arguments of torch.ops.fastrnn.<cell>_layer, in the order of its schema."""
    others = ["w_hr", "w_cell", "h0", "c0"] if case.cell == "lstm" else ["w_cell", "h0"]
    order = ["input", "w_ih", "w_hh", "b_ih", "b_hh", *others]
    return [*(arguments.get(name) for name in order), case.batch_sizes, case.reverse, save]


def require_grad(arguments):
    return {name: t if t is None else t.requires_grad_() for name, t in arguments.items()}


def to(arguments, *where):
    return {name: t if t is None else t.to(*where) for name, t in arguments.items()}


@pytest.mark.parametrize(
    "case",
    [case for size in (TINY, {"T": 11, "B": 9, "I": 24, "H": 40}, {"T": 12, "B": 1, "I": 8, "H": 200})
     for case in layer_cases(**size)]
    + [case for dtype in (torch.float64, torch.bfloat16, torch.float16) for case in layer_cases(**TINY, dtype=dtype)],
    ids=str,
)  # fmt: skip
def test_parity_with_the_reference(case, device):
    check_layer_parity(case, ops, reference, device)


def operators(case, device):
    """The two operators of a layer, and arguments for each."""
    forward = getattr(torch.ops.fastrnn, f"{case.cell}_layer").default
    backward = getattr(torch.ops.fastrnn, f"{case.cell}_layer_backward").default
    arguments = operator_arguments(case, to(case.draw(), device), True)
    output, *rest = forward(*arguments)
    grads, results = [torch.randn_like(t) for t in (output, rest[0])], 1
    if case.cell == "lstm":  # and c_n; no c of every step was asked for
        grads, results = [*grads, torch.randn_like(rest[1]), None], 3
    return forward, backward, arguments, (grads, [*arguments[:-1], output, *rest[results:]])


@pytest.mark.parametrize("case", layer_cases(**TINY), ids=str)
def test_opcheck(case, device):
    """Schema, fake kernel, autograd registration and AOT dispatch, of the operator and of its backward."""
    forward, backward, _, (grads, saved) = operators(case, device)
    arguments = require_grad(to(case.draw(), device))
    torch.library.opcheck(forward, operator_arguments(case, arguments, True))
    torch.library.opcheck(backward, (*grads, *saved, True, True, True))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.10 does not trace linear() of 3 dimensions in vjp")
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_of_second_derivatives(cell, needed, device):
    """Of all results of backward, of which those that were not asked for are empty."""
    _, backward, arguments, (grads, saved) = operators(LayerCase(cell, **TINY), device)
    floats = [t if t is None else t.requires_grad_() for t in saved[: len(arguments) - 3]]
    rest = saved[len(floats) :]
    torch.library.opcheck(backward, (*grads, *floats, *rest, *needed), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_of_what_is_not_asked_for(cell, device):
    """Nothing saved, no gradient of the input, the weights or the states wanted, none of an output given."""
    forward, backward, arguments, (grads, saved) = operators(LayerCase(cell, **TINY), device)
    torch.library.opcheck(forward, (*arguments[:-1], False))
    torch.library.opcheck(backward, (*grads, *saved, True, False, True))
    torch.library.opcheck(backward, (*grads, *saved, False, True, True))
    torch.library.opcheck(backward, (*grads, *saved, True, True, False))
    torch.library.opcheck(backward, (grads[0], *[None] * len(grads[1:]), *saved, True, True, True))


@pytest.fixture
def two_threads(torch_threads):
    torch.set_num_threads(2)


@pytest.mark.parametrize("other", [{}, {"T": 3}, {"I": 7}], ids=["at once", "another T", "another I"])
@pytest.mark.parametrize("form", [{}, {"packed": True}, {"x_gates": True}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_two_layers_in_one_call(cell, form, other, two_threads, device):
    """To the last bit what each gives alone: which thread does it does not matter. Unlike ones run in turn."""
    sizes = {"T": 20, "B": 1, "I": 24, "H": 200 if cell.startswith("rnn") else 128}
    cases = [LayerCase(cell, **sizes, **form), LayerCase(cell, **sizes | other, **form, reverse=True)]
    alone, together = [], []
    for case in cases:
        forward, backward, arguments, (grads, saved) = operators(case, device)
        defaults = [argument.default_value for argument in forward._schema.arguments[len(arguments) :]]
        alone.append([forward(*arguments), backward(*grads, *saved, True, True, True)])
        together.append([[*arguments, *defaults], [*grads, *saved, True, True, True, *defaults]])
    for which, name in enumerate(("_layer_both", "_layer_backward_both")):
        both = getattr(torch.ops.fastrnn, f"_{cell}{name}").default(*together[0][which], *together[1][which])
        for ours, expected in zip(both, [*alone[0][which], *alone[1][which]], strict=True):
            assert (ours is None and expected is None) or torch.equal(ours, expected)


@pytest.mark.parametrize("case", [case for case in layer_cases(**TINY) if case.packed], ids=str)
def test_gradients_do_not_depend_on_what_else_is_asked_for(case, device):
    _, backward, _, (grads, saved) = operators(case, device)
    everything = backward(*grads, *saved, True, True, True)
    for needed in itertools.product((True, False), repeat=3):
        gradients = backward(*grads, *saved, *needed)
        weights = len(gradients) - 1 - (2 if case.cell == "lstm" else 1)
        wanted = [needed[0], *[needed[1]] * weights, *[needed[2]] * (len(gradients) - 1 - weights)]
        for gradient, expected, is_wanted in zip(gradients, everything, wanted, strict=True):
            torch.testing.assert_close(gradient, expected if is_wanted else expected.new_empty(0), rtol=0, atol=0)


def differentiable_function(case):
    """The layer as a function of the tensors that are there, and those tensors."""
    arguments = case.draw()
    names = [name for name, t in arguments.items() if t is not None]

    def function(namespace, *tensors):
        given = dict(zip(names, tensors, strict=True))
        return tuple(case.call(namespace, {name: given.get(name) for name in arguments}).values())

    return function, [arguments[name].requires_grad_() for name in names]


@pytest.mark.parametrize("case", layer_cases(T=3, B=2, I=2, H=3, dtype=torch.float64), ids=str)
def test_gradients(case, device):
    function, tensors = differentiable_function(case)
    tensors = [t.detach().to(device).requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(partial(function, ops), tensors)
    assert torch.autograd.gradgradcheck(partial(function, ops), tensors)


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_is_that_of_the_reference(cell, device):
    """A gradient penalty: the gradient of the norm of a gradient."""
    function, tensors = differentiable_function(LayerCase(cell, dtype=torch.float64))
    results = []
    for namespace in (ops, reference):
        leaves = [t.detach().to(device).requires_grad_() for t in tensors]
        loss = sum((t**2).sum() for t in function(namespace, *leaves))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        penalty = sum((g**2).sum() for g in first)
        results.append(torch.autograd.grad(penalty, leaves))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_inference_saves_nothing(device):
    case = LayerCase("lstm", proj_size=3)
    plain = to(case.draw(), device)
    _, _, _, *cells_and_saved = torch.ops.fastrnn.lstm_layer(*operator_arguments(case, plain, False))
    assert cells_and_saved == [None] * 5
    with torch.no_grad():
        outputs = case.call(ops, require_grad(plain))
    assert not any(t.requires_grad for t in outputs.values())


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile and torch.export


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


COMPILED = [("eager", cell, {}) for cell in CELLS] + [("aot_eager", cell, {}) for cell in CELLS]
COMPILED += [(backend, "lstm", {"layout": "packed_unsorted"}) for backend in ("eager", "aot_eager")]
COMPILED += [("aot_eager", "gru", {"layout": "unbatched"}), ("aot_eager", "lstm", {"proj_size": 4, "hx": False})]
COMPILED += [("inductor", "lstm", {}), ("inductor", "gru", {"layout": "batch_first", "bias": False})]
COMPILED += [pytest.param("inductor", cell, {}, marks=pytest.mark.extended) for cell in ("rnn_tanh", "rnn_relu")]


@pytest.mark.parametrize(("backend", "cell", "options"), COMPILED)
def test_compiled_modules(backend, cell, options, device, fresh_compiler):
    """fullgraph: no graph break; outputs and gradients as without the compiler."""
    case = Case(cell, num_layers=2, bidirectional=True, **options)
    module = case.module(fastrnn, device=device)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    tensors, lengths = draw(case)
    results = []
    for each in (module, compiled):
        given = {name: t.to(device) for name, t in tensors.items()}
        leaf = given["input"].requires_grad_()
        outputs = call(case, each, given, lengths)
        values = list(outputs.values())
        results.append([*values, *torch.autograd.grad(values, [leaf, *module.parameters()], values)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_compiled_inference(device, fresh_compiler):
    module = fastrnn.GRU(3, 4, num_layers=2, device=device).eval()
    input = torch.randn(5, 2, 3, device=device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(input), module(input))


def test_dynamic_lengths_compile_once(device, fresh_compiler):
    graphs = 0

    def count(graph, _):
        nonlocal graphs
        graphs += 1
        return graph.forward

    module = fastrnn.LSTM(3, 4, device=device)
    compiled = torch.compile(module, backend=count, fullgraph=True, dynamic=True)
    for T, B in ((5, 2), (7, 2), (12, 3), (30, 4)):
        input = torch.randn(T, B, 3, device=device)
        torch.testing.assert_close(compiled(input)[0], module(input)[0])
    assert graphs == 1


@pytest.mark.parametrize("cell", CELLS)
def test_export(cell, device):
    case = Case(cell, num_layers=2, bidirectional=True)
    module = case.module(fastrnn, device=device).eval()
    input = torch.randn(5, 3, case.I, device=device)
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    program = torch.export.export(module, (input,), dynamic_shapes=({0: T, 1: B},))
    assert any("fastrnn" in str(node.target) for node in program.graph.nodes)
    for shape in ((5, 3), (9, 4)):
        input = torch.randn(*shape, case.I, device=device)
        torch.testing.assert_close(program.module()(input), module(input))


# ---------------------------------------------------------------------------------------------------------------------
# Messages: `<op>: expected <argument> <fact>, got <fact>`

SMALL = {"T": 4, "B": 3, "I": 6, "H": 5}
WRONG = [  # argument, what is done to the right tensor, what the message must say
    ("input", lambda t: t[..., :-1], r"expected w_ih of shape \[.*, 5\], got \[.*, 6\]"),
    ("input", lambda t: t[0], r"expected input .*, got shape \[3, 6\]"),
    ("input", lambda t: t[..., :0], r"expected input of 1 feature or more, got shape \[4, 3, 0\]"),
    ("input", lambda t: t[None], r"expected input .*, got shape \[1, 4, 3, 6\]"),
    ("input", lambda t: t.long(), r"expected input of dtype .*, got int64"),
    ("input", lambda t: t.to(torch.complex64), r"expected input of dtype .*, got complex64"),
    ("input", lambda t: t > 0, r"expected input of dtype .*, got bool"),
    ("input", lambda t: t.double(), r"expected \w+ of dtype float64 like input, got float32"),
    ("input", lambda t: t[:, :2], r"expected h0 of shape \[2, 5\], got \[3, 5\]"),
]
for _name in ("w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0", "w_hr"):
    WRONG += [
        (_name, lambda t: t[:-1], rf"expected {_name} of shape \[.*\], got \["),
        (_name, lambda t: t[..., :-1], rf"expected {_name} of shape \[.*\], got \["),
        (_name, lambda t: t[None], rf"expected {_name} of shape \[.*\], got \["),
        (_name, lambda t: t[0], rf"expected {_name} of shape \[.*\], got \["),
        (_name, lambda t: t[:0], rf"expected {_name} of shape \[.*\], got \[0"),
        (_name, lambda t: t.double(), rf"expected {_name} of dtype float32 like input, got float64"),
        (_name, lambda t: t.int(), rf"expected {_name} of dtype float32 like input, got int32"),
    ]
WRONG_BATCH_SIZES = [
    ([3, 1, 2, 1], r"expected batch_sizes not to increase, got 2 after 1"),
    ([3, 2, 2, 0], r"expected batch_sizes to be positive, got 0 at step 3"),
    ([3, 3, 2, -1], r"expected batch_sizes to be positive, got -1 at step 3"),
    ([4, 1, 1, 1], r"expected batch_sizes of at most the rows of h0, got 4 for 3"),
    ([3, 2, 1], r"expected input of sum\(batch_sizes\) = 6 rows, got 7"),
    ([3, 2, 2, 1], r"expected input of sum\(batch_sizes\) = 8 rows, got 7"),
    ([2**62, 2**62, 2**62, 2**62], r"expected batch_sizes of at most the rows of h0"),
    ([], r"expected .*, got"),
    ([[3, 2], [1, 1]], r"expected batch_sizes of shape \[T\].*, got shape \[2, 2\]"),
    (torch.tensor([3, 2, 1, 1], dtype=torch.int32), r"expected batch_sizes .*int64.*, got .*int32"),
    (torch.tensor([3.0, 2.0, 1.0, 1.0]), r"expected batch_sizes .*int64.*, got .*float32"),
]


def assert_message(case, arguments, message):
    with pytest.raises(RuntimeError, match=rf"^fastrnn::{case.cell}_layer: {message}"):
        case.call(ops, arguments)


@pytest.mark.parametrize(
    ("cell", "name", "change", "message"),
    [(cell, *wrong) for cell in CELLS for wrong in WRONG if cell == "lstm" or wrong[0] not in ("c0", "w_hr")],
)
def test_messages(cell, name, change, message, device):
    case = LayerCase(cell, **SMALL, proj_size=2 if name == "w_hr" else 0)
    arguments = to(case.draw(), device)
    assert_message(case, arguments | {name: change(arguments[name])}, message)


@pytest.mark.parametrize("name", ["w_hh", "w_ih", "h0"])
def test_messages_with_a_projection(name, device):
    case = LayerCase("lstm", **SMALL, proj_size=2)
    arguments = to(case.draw(), device)
    changes = [(torch.Tensor.double, "dtype float32"), (lambda t: t[:, :1], "shape"), (lambda t: t[:1], "shape")]
    for change, fact in changes:
        assert_message(case, arguments | {name: change(arguments[name])}, rf"expected {name} of {fact}.*, got ")


@pytest.mark.parametrize("cell", CELLS)
def test_messages_without_w_ih(cell, device):
    case = LayerCase(cell, **SMALL, x_gates=True)
    arguments = to(case.draw(), device)
    assert_message(case, arguments | {"input": arguments["input"][..., :-1]}, "expected input .*x_gates.*, got ")
    assert_message(case, arguments | {"b_ih": arguments["b_hh"]}, "expected b_ih to be None where w_ih is None, got ")


@pytest.mark.parametrize(("sizes", "message"), WRONG_BATCH_SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_messages_on_batch_sizes(cell, sizes, message, device):
    class Wrong(LayerCase):
        batch_sizes = torch.as_tensor(sizes) if len(sizes) else torch.zeros(0, dtype=torch.int64)

    right = LayerCase(cell, **SMALL, packed=True)
    assert right.batch_sizes.tolist() == [3, 2, 2, 1]
    arguments = to(right.draw(), device)
    arguments["input"] = arguments["input"][:7]
    assert_message(Wrong(cell, **SMALL, packed=True), arguments, message)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device: no CUDA device")
@pytest.mark.parametrize("name", ["w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0"])
def test_messages_on_devices(name):
    case = LayerCase("lstm", **SMALL)
    arguments = to(case.draw(), "cuda")
    assert_message(case, arguments | {name: arguments[name].cpu()}, rf"expected {name} on cuda:0 like input, got cpu")


def test_nonlinearity_is_checked():
    arguments = LayerCase("rnn_tanh").draw()
    with pytest.raises(ValueError, match="expected nonlinearity 'tanh', 'relu' or 'leaky_relu', got 'gelu'"):
        ops.rnn_layer(*arguments.values(), nonlinearity="gelu")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"saved_gates": torch.zeros(1, 1)}, r"saved_gates of shape \[6, 16\], got \[1, 1\]"),
        ({"saved_gates": None}, "saved_gates to be a tensor, got None"),
        ({"saved_c": torch.zeros(6, 4, dtype=torch.float64)}, "saved_c of dtype float32, got float64"),
        ({"saved_m": torch.zeros(6, 4)}, "saved_m to be None, got a tensor"),
        ({"h_in": torch.zeros(6, 4)}, "h_in to be None, got a tensor"),
        ({"output": torch.zeros(2, 2, 4)}, r"output of shape \[3, 2, 4\], got \[2, 2, 4\]"),
        ({"grad_output": torch.zeros(1)}, r"grad_output of shape \[3, 2, 4\], got \[1\]"),
        ({"grad_h_n": torch.zeros(1)}, r"grad_h_n of shape \[2, 4\], got \[1\]"),
        ({"grad_c_n": torch.zeros(1)}, r"grad_c_n of shape \[2, 4\], got \[1\]"),
    ],
)
def test_backward_looks_at_what_was_saved(saved, message):
    """It ended the process where the sizes were wrong."""
    floats = {"input": torch.randn(3, 2, 5), "w_ih": torch.randn(16, 5), "w_hh": torch.randn(16, 4)}
    floats |= {
        "b_ih": None,
        "b_hh": None,
        "w_hr": None,
        "w_cell": None,
        "h0": torch.zeros(2, 4),
        "c0": torch.zeros(2, 4),
    }
    floats |= {"batch_sizes": None, "reverse": False}
    results = torch.ops.fastrnn.lstm_layer(**floats, save=True)
    names = ("output", "h_n", "c_n", "cells", "saved_gates", "saved_c", "saved_m", "h_in")
    given = {k: v for k, v in zip(names, results, strict=True) if k not in ("h_n", "c_n", "cells")} | {
        "grad_output": torch.ones(3, 2, 4), "grad_h_n": None, "grad_c_n": None, "grad_cells": None
    }  # fmt: skip
    needed = {"need_input": True, "need_weights": True, "need_states": True}
    expected = torch.ops.fastrnn.lstm_layer_backward(**floats, **given, **needed)
    strided = given | {"saved_gates": given["saved_gates"].t().contiguous().t()}
    for got, wanted in zip(torch.ops.fastrnn.lstm_layer_backward(**floats, **strided, **needed), expected, strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(RuntimeError, match=f"fastrnn::lstm_layer_backward: expected {message}"):
        torch.ops.fastrnn.lstm_layer_backward(**floats, **(given | saved), **needed)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without large pages")
def test_large_results_ask_for_large_pages():
    square = torch.zeros(1024, 1024)
    output, _ = ops.rnn_layer(square.expand(4, -1, -1), square, square, None, None, square)
    middle = output.data_ptr() + output.nbytes // 2
    flags = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            begin, end = (int(address, 16) for address in first.split("-"))
        elif first == "VmFlags:" and begin <= middle < end:
            flags = rest.split()
    assert "hg" in flags


def test_gradients_of_gates_take_no_new_memory():
    T, B, H = 50, 8, 64
    lstm, input = fastrnn.LSTM(H, H), torch.randn(T, B, H, requires_grad=True)
    output, _ = lstm(input)
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        output.sum().backward()
    events = profiler.kineto_results.events()
    taken = sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")
    assert 0 < taken < T * B * 4 * H * 4
