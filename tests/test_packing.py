# SPDX-License-Identifier: BSD-3-Clause
"""Weights that stay packed: the same results, and every change of a weight that can be seen is seen."""

import copy
import io
import itertools
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from parity import CELLS, Case, assert_close_to_truth, call, draw
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, vector_to_parameters

import fastrnn

# One row and step, few rows and steps, rows split among threads, and a whole sequence of one row, whose directions run
# at once.
SIZES = [(1, 1, 40, 33), (3, 2, 24, 260), (5, 20, 24, 40), (70, 1, 24, 128)]
FORMS = [{}, {"bidirectional": True, "num_layers": 2}, {"layout": "packed_unsorted", "bias": False}]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def is_packed(module: nn.Module) -> bool:
    """Whether all weights of a module of fastrnn are packed at the moment."""
    return bool(module._packings) and all(packing._packed is not None for packing in module._packings)


def outputs(case: Case, module: nn.Module) -> dict[str, Tensor]:
    tensors, lengths = draw(case)
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        return call(case, module, {name: tensor.to(dtype) for name, tensor in tensors.items()}, lengths)


def assert_as_unpacked(case: Case, module: nn.Module, ours: dict[str, Tensor]) -> None:
    """A copy that has packed nothing yet gives the same, to the last bit."""
    theirs = copy.deepcopy(module)
    fastrnn.pack_weights(theirs, False)
    for name, expected in outputs(case, theirs).items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell, form", [*itertools.product(CELLS, FORMS), ("lstm", {"proj_size": 9})])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(cell, size, form, dtype, threads, torch_threads):
    torch.set_num_threads(threads)
    case = Case(cell, *size, **form, dtype=dtype)
    module = case.module(fastrnn)
    truth = replace(case, dtype=torch.float64).module(nn)
    truth.load_state_dict(module.state_dict())
    expected, unpacked = outputs(case, truth), outputs(case, module)
    fastrnn.pack_weights(module)
    for _ in range(2):
        for name, ours in outputs(case, module).items():
            assert_close_to_truth(name, ours, unpacked[name], expected[name], terms=case.terms)
        assert is_packed(module)


BEYOND = {
    "peephole": lambda: fastrnn.LSTM(24, 40, peephole=True),
    "coupled": lambda: fastrnn.LSTM(24, 40, coupled=True, bidirectional=True),
    "layer_norm": lambda: fastrnn.LSTM(24, 40, layer_norm=True, bidirectional=True),
    "layer_norm, projection": lambda: fastrnn.LSTM(24, 40, layer_norm=True, proj_size=7),
    "gru layer_norm": lambda: fastrnn.GRU(24, 40, layer_norm=True),
    "reset_after": lambda: fastrnn.GRU(24, 40, reset_after=False),
    "leaky_relu": lambda: fastrnn.RNN(24, 40, nonlinearity="leaky_relu"),
    "slstm": lambda: fastrnn.SLSTM(24, 40, num_layers=2),
    "zoneout": lambda: fastrnn.LSTM(24, 40, zoneout=0.2),
    "LSTMCell": lambda: fastrnn.LSTMCell(24, 300),
    "GRUCell": lambda: fastrnn.GRUCell(24, 300),
    "RNNCell": lambda: fastrnn.RNNCell(24, 300),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BEYOND)
def test_modules_beyond_torch(name, dtype):
    """To the last bit, since as many rows have their weights packed anyway."""
    module = BEYOND[name]().eval().to(dtype)
    input = torch.randn(20, 24, dtype=dtype) if name.endswith("Cell") else torch.randn(9, 20, 24, dtype=dtype)

    def run(**controls):
        with torch.no_grad():
            return torch.utils._pytree.tree_leaves(module(input, **controls))

    plain = [{}]
    if not name.endswith("Cell"):
        plain += [{"lengths": torch.arange(20) % 10}, {"reset": torch.rand(9, 20) < 0.2}]
    for controls in plain:
        fastrnn.pack_weights(module, False)
        expected = run(**controls)
        fastrnn.pack_weights(module)
        for ours, theirs in zip(run(**controls), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert is_packed(module)


# ---------------------------------------------------------------------------------------------------------------------
# Changes


def step(optimizer: Callable[..., torch.optim.Optimizer], **options: object) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(module.parameters(), lr=0.1, **options).step()

    return change


def train_step(module: nn.Module) -> None:
    """A step of training whose optimizer changes weights without telling torch."""
    versions = [parameter._version for parameter in module.parameters()]
    output, _ = module(torch.randn(3, 2, 24))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    output.sum().backward()
    optimizer.step()
    assert versions == [parameter._version for parameter in module.parameters()]  # or the test tests nothing


def in_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        module.weight_hh_l0.mul_(2)


def in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight_ih_l1_reverse[3, 5] += 1


def through_detach(module: nn.Module) -> None:
    module.weight_hh_l0.detach().zero_()


def another_parameter(module: nn.Module) -> None:
    module.weight_hh_l1 = nn.Parameter(module.weight_hh_l1.detach() * 2)


def another_layout(module: nn.Module) -> None:
    """The same memory as the transposed matrix."""
    for weight in (module.weight_ih_l1, module.weight_hh_l0):
        rows = weight.shape[0]
        weight.data = weight.detach().as_strided(weight.shape, (1, rows))


CHANGES = {
    "SGD": step(torch.optim.SGD),
    "Adam": step(torch.optim.Adam, foreach=True),
    "AdamW": step(torch.optim.AdamW, foreach=False),
    "fused, in training": train_step,
    "fused, then eval": lambda module: (step(torch.optim.Adam, fused=True)(module), module.eval()),
    "fused, then train": lambda module: (step(torch.optim.Adam, fused=True)(module), module.train()),
    "in place": in_place,
    "in inference mode": in_inference_mode,
    "through detach": through_detach,
    "another Parameter": another_parameter,
    "another tensor": lambda module: setattr(module.weight_hh_l1, "data", torch.randn_like(module.weight_hh_l1)),
    "another layout": another_layout,
    "load_state_dict": lambda module: module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}),
    "load_state_dict, assigned": lambda module: module.load_state_dict(
        {k: v * 2 for k, v in module.state_dict().items()}, assign=True
    ),
    "half and back": lambda module: module.half().float(),
    "double": lambda module: module.double(),
    "reset_parameters": lambda module: module.reset_parameters(),
    "through data, asked for again": lambda module: (
        vector_to_parameters(torch.rand(sum(p.numel() for p in module.parameters())), module.parameters()),
        fastrnn.pack_weights(module),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_change_is_seen(cell, change):
    case = Case(cell, 20, 2, 24, 40, num_layers=2, bidirectional=True)
    module = case.module(fastrnn)
    fastrnn.pack_weights(module)
    for _ in range(3):
        outputs(case, module)
        assert is_packed(module)
        CHANGES[change](module)
        ours = outputs(case, module)
        assert is_packed(module)
        assert_as_unpacked(case, module, ours)


def test_memory_is_not_taken_for_what_lay_there_before():
    """The address of a tensor that was freed comes back, with the same form and version."""
    case = Case("gru", 20, 2, 24, 40)
    module = case.module(fastrnn)
    fastrnn.pack_weights(module)
    for _ in range(100):
        module.weight_hh_l0.data = torch.randn(120, 40)
        assert_as_unpacked(case, module, outputs(case, module))


def test_another_dtype_at_the_same_place():
    case = Case("gru", 20, 2, 24, 40)
    module = case.module(fastrnn).half()
    fastrnn.pack_weights(module)
    outputs(case, module)
    for parameter in module.parameters():
        parameter.data = parameter.data.view(torch.bfloat16)
    ours = outputs(case, module)
    assert is_packed(module)
    assert_as_unpacked(case, module, ours)


REFUSED = {
    "share_memory": lambda module: module.share_memory(),
    "negative view": lambda module: setattr(module.weight_hh_l0, "data", torch._neg_view(module.weight_hh_l0.data)),
    "weight_norm": lambda module: parametrizations.weight_norm(module, "weight_hh_l0"),
    "buffer": lambda module: (
        module.__delattr__("weight_hh_l0"),
        module.register_buffer("weight_hh_l0", torch.randn(160, 40)),
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_weights_whose_changes_cannot_be_seen_stay_unpacked(change):
    case = Case("lstm", 20, 2, 24, 40)
    module = case.module(fastrnn)
    fastrnn.pack_weights(module)
    outputs(case, module)
    REFUSED[change](module)
    for scale in (1.0, 2.0):
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.data.mul_(scale)
        ours = outputs(case, module)
        assert not is_packed(module)
        assert_as_unpacked(case, module, ours)


def test_weights_made_in_inference_mode_stay_unpacked():
    with torch.inference_mode():
        module = fastrnn.GRU(24, 40)
        fastrnn.pack_weights(module)
        x = torch.randn(20, 2, 24)
        before, _ = module(x)
        module.weight_hh_l0.mul_(2)
        assert not torch.equal(module(x)[0], before)
    assert not is_packed(module)


def test_other_weights_for_one_call():
    module, other = fastrnn.GRU(24, 40), fastrnn.GRU(24, 40)
    fastrnn.pack_weights(module)
    x = torch.randn(20, 2, 24)
    with torch.no_grad():
        before, _ = module(x)
        output, _ = torch.func.functional_call(module, dict(other.named_parameters()), (x,))
        torch.testing.assert_close(output, other(x)[0], rtol=0, atol=0)
        torch.testing.assert_close(module(x)[0], before, rtol=0, atol=0)
        values = {name: weight.detach() for name, weight in other.named_parameters()}
        output, _ = torch.func.functional_call(module, values, (x,))
        torch.testing.assert_close(output, other(x)[0], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Where it serves, and where it does not


def calls_of(function: Callable[[], object]) -> list[str]:
    """The operators of fastrnn that are called."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = [event.name for event in profile.events()]
    return [name.removeprefix("fastrnn::") for name in names if name.startswith("fastrnn::")]


def test_which_operator_runs():
    module = fastrnn.LSTM(24, 128, num_layers=2, bidirectional=True)
    x = torch.randn(20, 1, 24)
    plain = calls_of(lambda: module(x))
    fastrnn.pack_weights(module)
    with torch.no_grad():
        module(x)
        assert is_packed(module)
        assert calls_of(lambda: module(x)) == ["_lstm_layer_stack"]
        with torch.autocast("cpu"):
            assert calls_of(lambda: module(x)) == ["_lstm_layer_both"] * 2  # of weights that were cast
        module(x)
    assert calls_of(lambda: module(x)) == plain == ["_lstm_layer_both"] * 2
    assert not is_packed(module)  # gradients were enabled
    with torch.no_grad():
        module(x)
    fastrnn.pack_weights(module, False)
    with torch.no_grad():
        assert calls_of(lambda: module(x)) == ["_lstm_layer_stack"]
    assert "_packings" not in vars(module)


def test_gradients_are_as_without():
    case = Case("lstm", 20, 2, 24, 40, bidirectional=True)
    module = case.module(fastrnn)
    x = torch.randn(20, 2, 24)
    expected = torch.autograd.grad(module(x)[0].sum(), module.parameters())
    fastrnn.pack_weights(module)
    outputs(case, module)
    ours = torch.autograd.grad(module(x)[0].sum(), module.parameters())
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_programs_and_transforms_take_the_weights_themselves():
    module = fastrnn.GRU(24, 40).eval()
    fastrnn.pack_weights(module)
    x = torch.randn(20, 2, 24)
    with torch.no_grad():
        expected, _ = module(x)
        assert is_packed(module)
        programs = {
            "compile": torch.compile(module, fullgraph=True),
            "export": torch.export.export(module, (x,)).module(),
            "trace": torch.jit.trace(module, (x,)),
            "make_fx": make_fx(lambda x: module(x)[0])(x),
            "vmap": lambda x: torch.vmap(lambda row: module(row)[0], in_dims=1, out_dims=1)(x),
            "jvp": lambda x: torch.func.jvp(lambda x: module(x)[0], (x,), (x,))[0],
        }
        for _ in range(2):
            for name, program in programs.items():
                output = program(x)
                output = output if isinstance(output, Tensor) else output[0]
                torch.testing.assert_close(output, expected, msg=lambda text, n=name: f"{n}: {text}")
            module.weight_hh_l0.mul_(0.5)
            expected, _ = module(x)
            programs.pop("export", None)  # holds a copy of the weights
            programs.pop("trace", None)


@pytest.mark.parametrize("copier", ["deepcopy", "copy", "pickle", "save"])
def test_copies_pack_for_themselves(copier):
    case = Case("gru", 20, 2, 24, 40)
    module = case.module(fastrnn)
    fastrnn.pack_weights(module)
    before = outputs(case, module)
    if copier == "save":
        file = io.BytesIO()
        torch.save(module, file)
        size = file.tell()
        file.seek(0)
        other = torch.load(file, weights_only=False)
        file = io.BytesIO()
        torch.save(case.module(fastrnn), file)
        assert size < file.tell() + 1000  # nothing packed is in it
    else:
        other = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}[
            copier
        ](module)
    if copier != "copy":  # which shares its Parameters and what belongs to them
        with torch.no_grad():
            other.weight_hh_l0.zero_()
        assert not torch.equal(outputs(case, other)["output"], before["output"])
    assert is_packed(other) or copier == "copy"
    for name, expected in before.items():
        torch.testing.assert_close(outputs(case, module)[name], expected, rtol=0, atol=0)


def test_convert_and_revert():
    model = nn.Sequential(nn.LSTM(24, 40))
    fastrnn.convert(model)
    fastrnn.pack_weights(model)
    case = Case("lstm", 20, 2, 24, 40)
    expected = outputs(case, model[0])
    assert is_packed(model[0])
    fastrnn.revert(model)
    assert "_packings" not in vars(model[0])
    for name, theirs in outputs(case, model[0]).items():
        torch.testing.assert_close(expected[name], theirs)


def test_threads_see_old_or_new_weights_and_nothing_between():
    """Of modules that many threads call while another one has their weights packed anew."""
    module = fastrnn.LSTM(24, 64, bidirectional=True)
    fastrnn.pack_weights(module)
    x = torch.randn(20, 2, 24)
    with torch.no_grad():
        expected, _ = module(x)

    def work(_: int) -> bool:
        with torch.no_grad():
            same = True
            for k in range(200):
                same = same and torch.equal(module(x)[0], expected)
                if k % 10 == 0:
                    module._clear_packings()
            return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def in_child(module: nn.Module, x: Tensor, results: "multiprocessing.Queue[list[Tensor]]") -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        first, _ = module(x)
        module.weight_hh_l0.zero_()
        results.put([first.numpy(), module(x)[0].numpy()])


def test_after_fork(torch_threads):
    """The child goes on with what its parent packed, and changes of its own weights stay its own."""
    module = fastrnn.GRU(24, 40)
    fastrnn.pack_weights(module)
    x = torch.randn(20, 2, 24)
    torch.set_num_threads(1)
    with torch.no_grad():
        expected, _ = module(x)
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        child = context.Process(target=in_child, args=(module, x, results))
        child.start()
        first, second = map(torch.from_numpy, results.get(timeout=60))
        child.join()
        assert torch.equal(first, expected)
        assert torch.equal(module(x)[0], expected)
        module.weight_hh_l0.zero_()
        assert torch.equal(module(x)[0], second)


@pytest.mark.parametrize("grad", [False, True])
def test_explain(grad):
    module = fastrnn.LSTM(24, 40)
    x = torch.randn(20, 2, 24)
    assert "pack_weights" not in str(fastrnn.explain(module, x))
    fastrnn.pack_weights(module)
    with nullcontext() if grad else torch.no_grad():
        said = str(fastrnn.explain(module, x))
    assert ("weights are packed ahead of calls" in said) is not grad
    assert ("gradients are enabled" in said) is grad
    with torch.no_grad():
        with torch.autocast("cpu"):
            assert "autocast" in str(fastrnn.explain(module, x))
        dropping = fastrnn.LSTM(24, 40, weight_dropout=0.5)
        fastrnn.pack_weights(dropping)
        assert "weight_dropout draws the recurrent weights" in str(fastrnn.explain(dropping, x))
        assert "weights are packed" in str(fastrnn.explain(dropping.eval(), x))
        parametrizations.weight_norm(module, "weight_hh_l0")
        module(x)
        assert "a weight is no plain Parameter" in str(fastrnn.explain(module, x))


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_errors_of_pack_weights():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got Tensor"):
        fastrnn.pack_weights(torch.ones(2))
    with pytest.raises(ValueError, match=r"nothing to pack: no module of this LSTM is fastrnn's; see fastrnn.convert"):
        fastrnn.pack_weights(nn.LSTM(2, 3))


def test_errors_of_the_operators():
    pack, packed_layer = torch.ops.fastrnn._gru_layer_pack, torch.ops.fastrnn._gru_layer_packed
    w_ih, w_hh = torch.randn(120, 24), torch.randn(120, 40)
    arguments = (torch.randn(5, 2, 24), w_ih, w_hh, None, None, None, torch.zeros(2, 40), None, False)
    block = pack(w_ih, w_hh, None)
    with torch.no_grad():
        packed_layer(*arguments, block)
        for wrong, message in [
            (
                block[1:],
                rf"fastrnn::_gru_layer_packed: expected packed of shape \[{len(block)}\], got \[{len(block) - 1}\]",
            ),
            (block.to(torch.int8), "fastrnn::_gru_layer_packed: expected packed of dtype uint8, got int8"),
            (
                block.repeat(2)[::2],
                "fastrnn::_gru_layer_packed: expected packed to be contiguous, got a strided tensor",
            ),
        ]:
            with pytest.raises(RuntimeError, match=message):
                packed_layer(*arguments, wrong)
    for wrong, message in [
        ((w_ih, w_hh[:119], None), r"fastrnn::_gru_layer_pack: expected w_hh of shape \[3\*H, H\], got \[119, 40\]"),
        ((w_ih, w_hh[:, 1:], None), r"expected w_hh of shape \[120, 40\], got \[120, 39\]"),
        ((w_ih[1:], w_hh, None), r"expected w_ih of shape \[120, 24\], got \[119, 24\]"),
        ((w_ih.half(), w_hh, None), r"expected w_ih of dtype float32 like .*, got float16"),
        ((w_ih.int(), w_hh.int(), None), r"expected w_hh of dtype float16, bfloat16, float32 or float64, got int32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            pack(*wrong)
    with pytest.raises(RuntimeError, match=r"expected w_hr of shape \[8, 40\], got \[8, 39\]"):
        torch.ops.fastrnn._lstm_layer_pack(None, torch.randn(160, 8), torch.randn(8, 39))
