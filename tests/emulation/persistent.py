# SPDX-License-Identifier: BSD-3-Clause
"""The persistent kernels: run by tests/test_persistent.py on emulated ones, which FASTRNN_LIBRARY then names, and by
tests/cuda/run.py on a device.

Small shapes, each for a reason. A tiling is forced: what it takes on a device follows from hidden sizes that are too
large for here.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from parity import CELLS, GATES, OPS, Case, LayerCase, check_layer_parity, check_second_order, draw, run
from tolerances import error
from torch import Tensor

import fastrnn
from fastrnn import _C, _library, ops, reference
from fastrnn.autograd import side_by_side

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Tiling(NamedTuple):
    """Which blocks share a layer, and how much of the weight a warp keeps in shared memory, the rest streamed.

    Without a number of teams, every 8 rows of the batch are one; without one of groups, nothing here is streamed.
    """

    grade: int
    blocks: int
    teams: int = 0
    groups_in_shared: int = -1

    @property
    def streams(self) -> bool:
        return self.groups_in_shared >= 0

    def __str__(self) -> str:
        teams, streamed = f"-teams{self.teams}" * (self.teams > 0), f"-streamed{self.groups_in_shared}" * self.streams
        return f"grade{self.grade}-blocks{self.blocks}{teams}{streamed}"


TILINGS = [Tiling(1, 1), Tiling(2, 2), Tiling(2, 4), Tiling(3, 3)]
Force = Callable[[Tiling], None]


def drawn(case: LayerCase, device: torch.device, **options) -> dict[str, Tensor | None]:
    return {name: tensor if tensor is None else tensor.to(device) for name, tensor in case.draw(**options).items()}


def allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if allowed else "ieee"


def force_tiling(monkeypatch: pytest.MonkeyPatch, tiling: Tiling) -> None:
    """Forces the persistent path with a tiling; where it cannot serve, the op raises."""
    if tiling.grade == 2 and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters came with compute capability 9.0")
    monkeypatch.setenv("FASTRNN_PATH", "persistent")
    for name, value in tiling._asdict().items():
        monkeypatch.setenv(f"FASTRNN_PERSISTENT_{name.upper()}", str(value))


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Force:
    return partial(force_tiling, monkeypatch)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_parity(cell, dtype, tiling, force, device):
    force(tiling)
    check_layer_parity(LayerCase(cell, 4, 3, 5, 21, dtype, packed=True, reverse=True), ops, reference, device)


def shapes():
    for cell in ("gru", "lstm"):
        yield LayerCase(cell, 1, 1, 4, 1), Tiling(1, 1)
        yield LayerCase(cell, 2, 1, 3, 16, torch.float16), Tiling(3, 2)
        yield LayerCase(cell, 5, 11, 3, 13, packed=True), Tiling(2, 2)  # two teams, the second with 3 rows
    for tiling in (Tiling(1, 1, 1), Tiling(2, 2, 1), Tiling(3, 2, 1)):  # one team takes two tiles of the batch
        yield LayerCase("gru", 3, 19, 3, 13, torch.bfloat16, packed=True), tiling
        yield LayerCase("lstm", 3, 19, 3, 13, reverse=True), tiling
    yield LayerCase("lstm", 3, 19, 3, 16, torch.float16), Tiling(3, 2, 2)  # 16 rows, then 3
    for packed, reverse, x_gates in itertools.product((False, True), repeat=3):
        yield LayerCase("lstm", 4, 3, 5, 24, torch.bfloat16, packed, reverse, x_gates=x_gates), Tiling(3, 2)
        yield LayerCase("gru", 4, 3, 5, 24, torch.float32, packed, reverse, x_gates=x_gates, bias=False), Tiling(2, 2)
    # Weights that the registers do not hold; the warps share the rows of the weight, not the depth of the product.
    yield LayerCase("lstm", 2, 3, 2, 128), Tiling(2, 2)
    yield LayerCase("gru", 2, 2, 2, 128), Tiling(3, 3)
    yield LayerCase("rnn_tanh", 2, 9, 2, 300, torch.bfloat16), Tiling(3, 7)  # several products of rows and depth
    # Weights that are streamed in part, or all but what registers hold; dividing the depth or not.
    yield LayerCase("lstm", 5, 3, 2, 128), Tiling(2, 2, groups_in_shared=1)
    yield LayerCase("gru", 3, 9, 2, 128), Tiling(2, 2, groups_in_shared=0)
    yield LayerCase("gru", 4, 19, 2, 128, packed=True, reverse=True), Tiling(3, 3, 1, groups_in_shared=1)
    for dtype in (torch.float16, torch.bfloat16):
        yield LayerCase("lstm", 3, 9, 2, 300, dtype, packed=True), Tiling(3, 7, 1, groups_in_shared=0)
        yield LayerCase("lstm", 3, 17, 2, 300, dtype), Tiling(2, 8, 1, groups_in_shared=1)


@pytest.mark.parametrize(("case", "tiling"), list(shapes()), ids=str)
def test_shapes(case, tiling, force, device):
    force(tiling)
    arithmetic = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[case.dtype]
    assert tiling.streams == streams(case, tiling, arithmetic)
    check_layer_parity(case, ops, reference, device)


def plans(case: Case | LayerCase, tiling: Tiling, arithmetic: str, layers: int = 1) -> list["_C.CudaPlan"]:
    """Of the forward and the backward pass."""
    states = 1 + (case.cell == "lstm")
    problem = {"T": case.T, "B": case.B, "H": case.H, "gates": GATES[case.cell], "states": states}
    forced = {"path": "persistent", "layers": layers, **tiling._asdict()}
    return [_C.plan_cuda(**problem, arithmetic=arithmetic, backward=backward, **forced) for backward in (False, True)]


def streams(case: LayerCase, tiling: Tiling, arithmetic: str) -> bool:
    return all(plan.streamed_bytes > 0 for plan in plans(case, tiling, arithmetic))


BOTH = [*TILINGS, Tiling(3, 2, 2), Tiling(3, 4, 1, groups_in_shared=0)]


@pytest.mark.parametrize("tiling", BOTH, ids=str)
@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_both_directions(cell, layout, tiling, force, monkeypatch, device):
    """In one launch, to the last bit what each gives in its own."""
    force(tiling)
    sizes = (4, 9 if tiling.teams else 3, 5, 160 if tiling.streams else 21)
    case = Case(cell, *sizes, layout=layout, bidirectional=True)
    assert [plan.path for plan in plans(case, tiling, "fp32", layers=2)] == ["persistent"] * 2
    module, tensors = case.module(fastrnn, device=device), draw(case)
    together = run(case, module, *tensors)
    monkeypatch.setattr("fastrnn.stack.side_by_side", lambda *directions: [direction() for direction in directions])
    for ours, expected in zip(together, run(case, module, *tensors), strict=True):
        for name in expected:
            assert torch.equal(ours[name], expected[name]), name


def launches(call: Callable[[], object]) -> int:
    """With a tiling of grade 3 each begins with a zero in the memory through which blocks exchange states."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name == "aten::zero_" for event in profile.events())


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_both_lengths(cell, tiling, force, device):
    """Two layers in one launch, each with steps of its own, and one that is asked for all gradients: the same bits."""
    force(tiling)
    op, options = OPS[cell]

    def run(run_all: Callable[..., list[tuple[Tensor, ...]]], *lengths: int) -> list[Tensor]:
        layers, leaves = [], []
        for T in lengths:
            arguments = drawn(LayerCase(cell, T, 3, 5, 21), device)
            arguments.pop("w_hr", None)
            leaves += [
                tensor.requires_grad_() for name, tensor in arguments.items() if T > 2 or name not in ("h0", "c0")
            ]
            layers.append(partial(getattr(ops, op), *arguments.values(), reverse=True, **options))
        outputs = [output for results in run_all(*layers) for output in results]
        return outputs + list(torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs]))

    for lengths in ((4, 2), (2, 4)):
        alone = run(lambda *layers: [layer() for layer in layers], *lengths)
        for ours, expected in zip(run(side_by_side, *lengths), alone, strict=True):
            assert torch.equal(ours, expected)
        assert launches(lambda lengths=lengths: run(side_by_side, *lengths)) == (2 if tiling.grade == 3 else 0)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("arithmetic", ["fp32", "tf32", "bf16", "fp16"])
def test_integers_are_exact(arithmetic, tiling, force, device):
    """No rounding happens, so any order of summation gives the same bits; a wrong row or unit is a wrong integer."""
    force(tiling)
    allow_tf32(arithmetic == "tf32")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arithmetic, torch.float32)

    def integers(shape, *, generator, dtype):
        return torch.randint(-1, 2, shape, generator=generator).to(dtype)

    def ones(shape, *, generator, dtype):
        return torch.ones(shape, dtype=dtype)

    case = LayerCase("rnn_relu", 3, 3, 3, 37, dtype, reverse=True)
    arguments = drawn(case, device, value=integers)
    generator = torch.Generator().manual_seed(1)
    sparse = torch.rand((37, 37), generator=generator) < 0.05
    arguments["w_hh"] = torch.randint(-1, 2, (37, 37), generator=generator).to(dtype).mul(sparse).to(device)
    for name in ("w_ih", "b_ih", "b_hh"):  # drawn at torch's scale, which has no integers
        arguments[name] = arguments[name].sign()
    results = case.run(ops, arguments, grad=ones)
    truth = case.run(reference, {name: t if t is None else t.double() for name, t in arguments.items()}, grad=ones)
    assert truth[0]["h_n"].any() and truth[1]["h0"].any()
    for ours, expected in zip(results, truth, strict=True):
        for name in expected:
            assert torch.equal(ours[name].double(), expected[name].double()), name


@pytest.mark.parametrize(
    ("cell", "H", "tiling"),
    [
        *((cell, 21, tiling) for cell in ("rnn_tanh", "lstm", "gru") for tiling in TILINGS),  # of relu gradients jump
        ("lstm", 128, Tiling(3, 3, groups_in_shared=1)),
        ("gru", 128, Tiling(3, 3, groups_in_shared=0)),
    ],
    ids=str,
)
def test_tf32(cell, H, tiling, force, device):
    """Operands are rounded to 11 bits, sums are not: errors are those of half precision operands, no more."""
    force(tiling)
    allow_tf32(True)
    case = LayerCase(cell, 4, 3, 5, H, packed=True)
    assert tiling.streams == streams(case, tiling, "tf32")
    arguments = drawn(case, device)
    double = {name: t if t is None else t.double() for name, t in arguments.items()}
    results, truth = case.run(ops, arguments), case.run(reference, double)
    for is_grad, ours, expected in zip((False, True), results, truth, strict=True):
        for name in expected:
            assert 1e-6 < error(ours[name], expected[name], is_grad) < 4 * 2**-11, name


@pytest.mark.parametrize("switch", ["cudnn.allow_tf32", "cudnn.fp32_precision", "cudnn.rnn.fp32_precision", "mixed"])
def test_torch_decides_on_tf32(switch, force, monkeypatch, device):
    """By each of its switches, asked in forward and again in backward, from any thread."""
    force(Tiling(3, 2))
    case = LayerCase("lstm", 4, 3, 5, 21)
    leaves = {
        name: tensor if tensor is None else tensor.requires_grad_() for name, tensor in drawn(case, device).items()
    }

    def allow(allowed: bool) -> None:
        precision, cudnn = "tf32" if allowed else "ieee", torch.backends.cudnn
        if switch == "cudnn.allow_tf32":
            cudnn.allow_tf32 = allowed
        if switch == "cudnn.fp32_precision":
            cudnn.rnn.fp32_precision = "none"
            monkeypatch.setattr(cudnn, "fp32_precision", precision)
        if switch == "mixed":  # torch refuses to read the older switch from here on
            cudnn.allow_tf32 = not allowed
        if switch in ("cudnn.rnn.fp32_precision", "mixed"):
            cudnn.rnn.fp32_precision = precision

    def run(forward: bool, backward: bool) -> tuple[Tensor, Tensor]:
        allow(forward)
        output = case.call(ops, leaves)["output"]
        allow(backward)
        return output.detach(), torch.autograd.grad(output.sum(), leaves["h0"])[0]

    with ThreadPoolExecutor(1) as thread:
        neither, backward, both = (
            thread.submit(run, *allowed).result() for allowed in ((False, False), (False, True), (True, True))
        )
    assert torch.equal(neither[0], backward[0])
    for one, other in ((neither[0], both[0]), (neither[1], backward[1])):
        assert not torch.allclose(one, other, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one, other, rtol=0, atol=4 * 2**-11)


@pytest.mark.parametrize("value", ["", "1"])
def test_programs_without_python_decide_on_tf32(value):
    asked = f"import torch; torch.ops.load_library({str(_library.path())!r}); print(torch.ops.fastrnn.allows_tf32())"
    environment = os.environ | {"FASTRNN_TF32": value}
    said = subprocess.run([sys.executable, "-c", asked], env=environment, text=True, capture_output=True, check=True)
    assert said.stdout.strip() == str(value == "1")


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_rows_are_apart(tiling, force, device):
    """NaN in one row of the batch stays in that row, forward and backward."""
    force(tiling)
    case = LayerCase("lstm", 3, 4, 3, 13, torch.bfloat16)
    arguments = drawn(case, device)
    clean = case.run(ops, arguments)
    arguments["input"][:, 1] = torch.nan
    outputs, grads = case.run(ops, arguments)
    assert outputs["output"][:, 1].isnan().all() and grads["input"][:, 1].isnan().all()
    others = [0, 2, 3]
    for ours, expected in ((outputs["output"], clean[0]["output"]), (grads["input"], clean[1]["input"])):
        torch.testing.assert_close(ours[:, others], expected[:, others], rtol=0, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_paths_agree_on_what_is_saved(cell, force, monkeypatch, device):
    """Each output of the operator, so what either path saves, the other one's backward can read."""
    case = LayerCase(cell, 4, 3, 5, 13, packed=True, reverse=True)
    arguments = drawn(case, device)
    names = ["input", "w_ih", "w_hh", "b_ih", "b_hh", *(["w_hr"] if cell == "lstm" else []), "w_cell", "h0"]
    positional = [arguments.get(name) for name in names + ["c0"] * (cell == "lstm")]
    operator = getattr(torch.ops.fastrnn, f"{cell}_layer")
    monkeypatch.setenv("FASTRNN_PATH", "gates")
    expected = operator(*positional, case.batch_sizes, True, True)
    force(Tiling(3, 2))
    for one, other in zip(operator(*positional, case.batch_sizes, True, True), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_second_order(cell, tiling, force, device):
    force(tiling)
    check_second_order(LayerCase(cell, 4, 3, 5, 21, packed=True, reverse=True), ops, reference, device)


def test_exported_programs_obey_a_forced_path(force, device):
    """The path is chosen where the program runs, not where it was exported."""
    module, input = fastrnn.LSTM(5, 13, device=device), torch.randn(4, 3, 5, device=device)
    projected = fastrnn.LSTM(5, 13, proj_size=7, device=device)
    programs = [torch.export.export(each.eval(), (input,)).module() for each in (module, projected)]
    expected = [each(input)[0] for each in (module, projected)]
    torch.testing.assert_close(programs[1](input)[0], expected[1])
    force(Tiling(2, 2))
    torch.testing.assert_close(programs[0](input)[0], expected[0])
    with pytest.raises(RuntimeError, match="cannot serve this layer: a projection has no persistent kernel"):
        programs[1](input)


def test_a_forced_path_serves_or_raises(force, monkeypatch, device):
    force(Tiling(1, 1))
    case = LayerCase("gru")
    with pytest.raises(RuntimeError, match="cannot serve this layer: float64 has no persistent kernel"):
        double = replace(case, dtype=torch.float64)
        double.call(ops, drawn(double, device))
    with pytest.raises(RuntimeError, match="cannot serve this layer: the recurrent weight does not fit"):
        large = replace(case, H=500)
        large.call(ops, drawn(large, device))
    with pytest.raises(RuntimeError, match="cannot serve this layer: this cell has no persistent kernel"):
        fastrnn.RNN(3, 4, nonlinearity="leaky_relu", bidirectional=True, device=device)(
            torch.zeros(2, 3, device=device)
        )
    monkeypatch.setenv("FASTRNN_PATH", "fast")
    with pytest.raises(RuntimeError, match="expected FASTRNN_PATH to be gates or persistent, got fast"):
        case.call(ops, drawn(case, device))
