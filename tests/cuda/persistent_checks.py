# SPDX-License-Identifier: BSD-3-Clause
"""The persistent kernels at the sizes that they are for, run on a device by run.py.

What tests/emulation/persistent.py cannot show: clusters of 16 blocks, a block's whole shared memory, a launch that
takes the whole device, weights that do not fit on it, a thousand steps, and launches beside each other.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from parity import GATES, Case, LayerCase, assert_parity, draw, run
from torch import Tensor, nn

import fastrnn
from fastrnn import _C, ops, reference


class Size(NamedTuple):
    case: LayerCase
    grade: int
    blocks: int = 0  # of a team; 0: as many as the plan takes

    def __str__(self) -> str:
        return f"{self.case}-grade{self.grade}"

    def plan(self, backward: bool) -> "_C.CudaPlan":
        """On an H100."""
        case = self.case
        return _C.plan_cuda(
            **{"T": case.T, "B": case.B, "H": case.H, "gates": GATES[case.cell], "states": 1 + (case.cell == "lstm")},
            arithmetic={torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[case.dtype],
            **{"backward": backward, "path": "persistent", "grade": self.grade, "blocks": self.blocks},
        )


HALF, BFLOAT = torch.float16, torch.bfloat16
SIZES = [
    Size(LayerCase("lstm", 1000, 64, 32, 64, HALF), 1),
    Size(LayerCase("gru", 1000, 33, 32, 60, torch.float32, packed=True), 1),
    Size(LayerCase("lstm", 1000, 64, 32, 512, HALF), 2),
    Size(LayerCase("gru", 1000, 16, 32, 512, torch.float32), 2),  # streamed backward
    Size(LayerCase("lstm", 300, 64, 32, 768, BFLOAT, reverse=True), 2),  # streamed in both passes
    Size(LayerCase("lstm", 1500, 16, 32, 924, HALF), 3, 132),
    Size(LayerCase("gru", 1000, 3, 32, 396, torch.float32, packed=True, reverse=True), 3, 132),
    Size(LayerCase("rnn_tanh", 1000, 128, 32, 1024, BFLOAT), 3),
    Size(LayerCase("lstm", 100, 64, 32, 2048, HALF), 3),  # streamed
    Size(LayerCase("gru", 100, 17, 32, 1536, torch.float32), 3),  # streamed, in plain multiply-adds
]
CHUNKS = 7
STACKS = [  # of one direction, dense
    Case("lstm", 1000, 16, 64, 256, HALF, num_layers=2),
    Case("gru", 1000, 64, 64, 128, torch.float32, num_layers=3),
    Case("rnn_tanh", 500, 8, 64, 512, BFLOAT, num_layers=4),
]
# Of kernels that differ in nothing but their sizes, so in how much shared memory a launch asks for.
SHARED = [Size(LayerCase("lstm", 200, 16, 32, H, HALF), 2, blocks) for H, blocks in ((64, 2), (512, 16), (768, 16))]


@pytest.fixture(autouse=True)
def nothing_refused():
    before = torch.ops.fastrnn.refused_launches()
    yield
    assert torch.ops.fastrnn.refused_launches() == before


def force(monkeypatch, size: Size) -> None:
    device = torch.cuda.get_device_properties()
    if size.grade == 2 and device.major < 9:
        pytest.skip("clusters came with compute capability 9.0")
    monkeypatch.setenv("FASTRNN_PATH", "persistent")
    monkeypatch.setenv("FASTRNN_PERSISTENT_GRADE", str(size.grade))
    monkeypatch.setenv("FASTRNN_PERSISTENT_BLOCKS", str(min(size.blocks, device.multi_processor_count)))


def drawn(case: LayerCase) -> dict[str, Tensor | None]:
    return {name: tensor if tensor is None else tensor.cuda() for name, tensor in case.draw().items()}


def assert_equal(results, expected) -> None:
    for ours, theirs in zip(results, expected, strict=True):
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, monkeypatch):
    """As far from the truth as the path "gates" is; and a race would have its chance to give other bits."""
    case, arguments = size.case, drawn(size.case)
    monkeypatch.setenv("FASTRNN_PATH", "gates")
    by_gates = case.run(ops, arguments)
    truth = case.run(reference, {name: t if t is None else t.double() for name, t in arguments.items()})
    force(monkeypatch, size)
    first = case.run(ops, arguments)
    assert_parity(case, first, by_gates, truth)
    for _ in range(20):
        assert_equal(case.run(ops, arguments), first)


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_wavefront(case, monkeypatch):
    """Two layers in a launch, the last chunk a shorter one: as close to the truth as torch.nn; the same bits again."""
    monkeypatch.setenv("FASTRNN_PATH", "persistent")
    monkeypatch.setenv("FASTRNN_PERSISTENT_CHUNKS", str(CHUNKS))
    torch.manual_seed(0)
    theirs, ours = (case.module(namespace, device="cuda") for namespace in (nn, fastrnn))
    truth = replace(case, dtype=torch.float64).module(nn, device="cuda")
    for module in (ours, truth):
        module.load_state_dict(theirs.state_dict())
    tensors, _ = draw(case)
    first, *expected = (run(case, module, tensors, None) for module in (ours, theirs, truth))
    assert_parity(case, first, *expected)
    for _ in range(20):
        assert_equal(run(case, ours, tensors, None), first)


@pytest.mark.parametrize("grade", [2, 3])
def test_streams(grade, monkeypatch):
    """Launches that want the whole device, on two streams, with nothing between them."""
    sizes = [Size(LayerCase("lstm", 200, B, 32, 512, HALF), grade) for B in (64, 16)]
    force(monkeypatch, sizes[0])
    arguments = [drawn(size.case) for size in sizes]
    expected = [size.case.run(ops, given) for size, given in zip(sizes, arguments, strict=True)]
    streams = [torch.cuda.Stream() for _ in sizes]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for size, given, stream in zip(sizes, arguments, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(size.case.run(ops, given))
    torch.cuda.synchronize()
    for result, alone in zip(results, itertools.cycle(expected)):
        assert_equal(result, alone)


def test_threads(monkeypatch):
    """Each of its own size, so that what one tells the runtime of a kernel must not undo what another has told it."""
    force(monkeypatch, Size(SHARED[0].case, 2))
    cases = [replace(size.case, T=20) for size in SHARED]
    expected = [case.call(ops, drawn(case)) for case in cases]

    def run(case: LayerCase, alone: dict[str, Tensor]) -> None:
        arguments = drawn(case)
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(500):
                assert_equal([case.call(ops, arguments)], [alone])

    torch.cuda.synchronize()
    with ThreadPoolExecutor(len(cases)) as threads:
        for done in [threads.submit(run, *each) for each in zip(cases, expected, strict=True)]:
            done.result()
