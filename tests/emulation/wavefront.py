# SPDX-License-Identifier: BSD-3-Clause
"""Layers of a stack as a wavefront: run by tests/test_persistent.py on emulated kernels, which FASTRNN_LIBRARY then
names, and by tests/cuda/run.py on a device. Shapes are as small as in persistent.py.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from parity import CELLS, Case, check_parity, draw, run
from persistent import DTYPES, TILINGS, Tiling, allow_tf32, force_tiling, launches
from torch import Tensor

import fastrnn

THREE_BLOCKS = Tiling(3, 3)
Waves = Callable[..., None]


@pytest.fixture
def waves(monkeypatch) -> Waves:
    """Forces that many chunks; 1: one layer after the other."""

    def set_environment(chunks: int, tiling: Tiling = THREE_BLOCKS) -> None:
        force_tiling(monkeypatch, tiling)
        monkeypatch.setenv("FASTRNN_PERSISTENT_CHUNKS", str(chunks))

    return set_environment


def stacks():
    uneven = {"T": 7, "num_layers": 2}
    for cell, dtype in itertools.product(CELLS, DTYPES):
        yield Case(cell, dtype=dtype, **uneven), 3, Tiling(3, 3)
    for cell, tiling in itertools.product(("gru", "lstm"), TILINGS):
        yield Case(cell, T=5, num_layers=3), 2, tiling
    for cell in ("rnn_tanh", "gru", "lstm"):
        yield Case(cell, T=4, num_layers=4, hx=False, bias=False), 4, Tiling(2, 2)
        yield Case(cell, T=2, num_layers=2), 5, Tiling(3, 3)  # more chunks than steps
        yield Case(cell, T=1, num_layers=2), 3, Tiling(1, 1)
        yield Case(cell, T=5, B=19, num_layers=2), 2, Tiling(3, 2, 2)
        yield Case(cell, H=160, num_layers=2, dtype=torch.float16), 3, Tiling(3, 4, 1, groups_in_shared=0)
    for layout in ("batch_first", "unbatched"):
        yield Case("lstm", layout=layout, **uneven), 4, Tiling(2, 2)


@pytest.mark.parametrize(("case", "chunks", "tiling"), list(stacks()), ids=str)
def test_wavefront(case, chunks, tiling, waves, device):
    waves(chunks, tiling)
    check_parity(case, fastrnn, device)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("arithmetic", ["fp32", "tf32", "fp16"])
def test_wavefront_is_exact(arithmetic, layers, waves, device):
    """No rounding happens, so all agrees to the last bit with torch.nn: a wrong chunk is a wrong integer."""
    waves(3, Tiling(3, 3))
    allow_tf32(arithmetic == "tf32")
    case = Case("rnn_relu", T=7, num_layers=layers, dtype=torch.float16 if arithmetic == "fp16" else torch.float32)

    def integers(shape, *, generator, dtype):
        return torch.randint(-1, 2, shape, generator=generator).to(dtype)

    tensors, _ = draw(case, value=integers)
    modules = case.module(fastrnn, device=device), replace(case, dtype=torch.float64).module(torch.nn)
    generator = torch.Generator().manual_seed(1)
    for parameters in zip(*(module.parameters() for module in modules), strict=True):
        signs = torch.randint(-1, 2, parameters[1].shape, generator=generator)
        sparse = signs * (torch.rand(signs.shape, generator=generator) < 2 / signs.size(-1))
        for parameter in parameters:
            parameter.data.copy_(sparse)
    results, truth = (run(case, module, tensors, None) for module in modules)
    assert truth[0]["h_n"].any() and truth[1]["h0"].any() and truth[1]["weight_ih_l0"].abs().max() < 2048
    for ours, expected in zip(results, truth, strict=True):
        for name in expected:
            assert torch.equal(ours[name].cpu().double(), expected[name]), name


@pytest.mark.parametrize("needs_states", [True, False])
@pytest.mark.parametrize(("layers", "chunks", "expected"), [(2, 1, 2), (2, 3, 4), (3, 3, 5), (4, 2, 6), (2, 9, 8)])
def test_a_wave_is_one_launch(layers, chunks, expected, needs_states, waves, device):
    """Forward and backward, whichever gradients are asked for."""
    waves(chunks)
    case = Case("lstm", T=7, num_layers=layers)
    module, (tensors, _) = case.module(fastrnn, device=device), draw(case)
    leaves = {name: tensor.to(device) for name, tensor in tensors.items()}
    for name in ("h0", "c0"):
        leaves[name].requires_grad_(needs_states)
    outputs: list[Tensor] = []

    def forward() -> None:
        output, states = module(leaves["input"], (leaves["h0"], leaves["c0"]))
        outputs[:] = output, *states

    assert launches(forward) == expected
    grads = [torch.ones_like(output) for output in outputs]
    assert launches(lambda: torch.autograd.grad(outputs, list(module.parameters()), grads)) == expected
    with torch.no_grad():
        assert launches(forward) == expected


def in_turn_and_as_wavefront(
    waves: Waves, call: Callable[[], Sequence[Tensor]], chunks: int = 3
) -> list[Sequence[Tensor]]:
    results = []
    for count in (1, chunks):
        waves(count)
        torch.manual_seed(0)
        results.append(call())
    return results


def test_wavefront_with_dropout(waves, monkeypatch, device):
    """What passes from layer to layer passes through dropout once."""
    module = fastrnn.GRU(5, 13, num_layers=3, dropout=0.4, device=device)
    input = torch.randn(7, 3, 5, device=device)
    dropped = []

    def dropout(input: Tensor, p: float, train: bool) -> Tensor:
        dropped.append((input.numel(), p, train))
        return input * 0.5 + 0.25

    monkeypatch.setattr(torch, "dropout", dropout)
    in_turn, as_wavefront = in_turn_and_as_wavefront(waves, lambda: module(input))
    for one, other in zip(in_turn, as_wavefront, strict=True):
        torch.testing.assert_close(one, other)
    assert len(dropped) == 2 + 3 + 1
    assert sum(numel for numel, _, _ in dropped) == 2 * 2 * 7 * 3 * 13
    assert {(p, train) for _, p, train in dropped} == {(0.4, True)}
    module.eval()
    module(input)
    assert len(dropped) == 6


@pytest.mark.parametrize("needed", ["output[:2]", "h_n[0]", "h_n[1]", "c_n[0]", "output"])
def test_wavefront_of_some_gradients(needed, waves, device):
    """Where only some chunks of some layers have one."""
    module = fastrnn.LSTM(5, 13, num_layers=2, device=device)
    input = torch.randn(7, 3, 5, device=device, requires_grad=True)

    def gradients() -> list[Tensor]:
        output, (h_n, c_n) = module(input)
        result = {"output[:2]": output[:2], "h_n[0]": h_n[0], "h_n[1]": h_n[1], "c_n[0]": c_n[0], "output": output}
        return list(
            torch.autograd.grad(
                result[needed].sin().sum(), [input, *module.parameters()], allow_unused=True, materialize_grads=True
            )
        )

    for one, other in zip(*in_turn_and_as_wavefront(waves, gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_wavefront_transformed(waves, device):
    """Derivatives of derivatives go through it; what records or transforms calls sees one layer after the other."""
    module = fastrnn.GRU(5, 13, num_layers=2, device=device)
    input = torch.randn(7, 3, 5, device=device)

    def second() -> list[Tensor]:
        leaf = input.clone().requires_grad_()
        (first,) = torch.autograd.grad(module(leaf)[0].sin().sum(), leaf, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [leaf, *module.parameters()]))

    def others() -> list[Tensor]:
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        tangent = torch.func.jvp(lambda x: module(x)[0], (input,), (torch.ones_like(input),))[1]
        gradient = torch.func.grad(lambda x: module(x)[0].sum())(input)
        batched = torch.vmap(lambda x: module(x)[0])(torch.stack([input, input]))
        return [compiled(input)[0], torch.jit.trace(module, input)(input)[0], tangent, gradient, batched]

    for call in (second, others):
        for one, other in zip(*in_turn_and_as_wavefront(waves, call), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"layout": "packed"}, {"num_layers": 1}], ids=str)
def test_no_wavefront(options, waves, device):
    case = Case("gru", **({"T": 7, "num_layers": 2} | options))
    module, tensors = case.module(fastrnn, device=device), draw(case)
    (in_turn, _), (again, _) = in_turn_and_as_wavefront(waves, lambda: run(case, module, *tensors))
    for name in in_turn:
        assert torch.equal(in_turn[name], again[name])


def test_a_forced_wavefront_runs_or_raises(waves, monkeypatch, device):
    module, input = fastrnn.GRU(3, 4, num_layers=2, device=device), torch.randn(5, 2, 3, device=device)
    waves(2)
    module(input)
    refused = "fastrnn: FASTRNN_PERSISTENT_CHUNKS=2 cannot serve this stack: "
    with pytest.raises(RuntimeError, match=refused + "float64 has no persistent kernel"):
        module.double()(input.double())
    module.float()
    wide = fastrnn.GRU(3, 500, num_layers=2, device=device)
    waves(2, Tiling(1, 1))
    with pytest.raises(RuntimeError, match=refused + "the recurrent weight does not fit"):
        wide(input)
    monkeypatch.setenv("FASTRNN_PATH", "gates")
    with pytest.raises(RuntimeError, match=refused + "forced"):
        module(input)
    monkeypatch.delenv("FASTRNN_PATH")
    with pytest.raises(RuntimeError, match=refused + "no persistent kernel has been measured"):
        module(input)
    monkeypatch.delenv("FASTRNN_PERSISTENT_CHUNKS")
    module(input)


def test_a_wavefront_is_never_the_default(monkeypatch, device):
    """Not where it would pay either."""
    monkeypatch.setenv("FASTRNN_PATH", "persistent")
    arguments = torch.empty(5000, 16, 3, dtype=torch.float16, device=device), 256, 4, 2
    for chunks, steps in (("", 0), ("4", 1250)):
        monkeypatch.setenv("FASTRNN_PERSISTENT_CHUNKS", chunks)
        for trains in (False, True):
            assert torch.ops.fastrnn.wavefront_steps(*arguments, trains) == steps
