# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show, run group by group by run.py: wrappers, streams, devices, graphs, no waiting."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import CELLS, LayerCase

import fastrnn
from fastrnn import ops, reference

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests/cuda"), str(ROOT / "tests/emulation")]

import device_library  # noqa: E402
import libraries  # noqa: E402
from kernels import Emulated, Kernels  # noqa: E402
from layer import Problem  # noqa: E402
from probes import PROBES, check  # noqa: E402

WAYS = [f"{way}/kNone" for way in ("kGridFences", "kClusterBarrier")]
CASES = [LayerCase(cell, dtype=dtype) for cell in CELLS for dtype in (torch.float32, torch.float16)]


@pytest.fixture(scope="module")
def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


@pytest.fixture(scope="module")
def kernels(capability):
    return Kernels(device_library.build("{}.{}".format(*capability)))


@pytest.fixture(scope="module")
def emulated():
    try:
        return Emulated()
    except libraries.Unavailable:
        return None  # the definitions in numpy remain


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(np.uint8).reshape(-1)).cuda()


def arguments_of(case: LayerCase) -> dict[str, torch.Tensor | None]:
    return {name: tensor if tensor is None else tensor.cuda() for name, tensor in case.draw().items()}


# ----------------------------------------------------------------------------------------------------------------------
# Conformance: device, emulation and definition agree


@pytest.mark.parametrize("name", PROBES)
def test_conformance_of_wrappers(kernels, emulated, capability, name):
    probe = PROBES[name]
    if probe.sm_90 and capability < (9, 0):
        pytest.skip("clusters came with compute capability 9.0")
    for seed in range(4):
        value = probe.draw(np.random.default_rng(seed))
        expected = probe.expected(value)
        out = torch.zeros(4 * (len(expected) + probe.scratch), dtype=torch.uint8, device="cuda")
        given = on_device(value)
        kernels.run_probe(name, given.data_ptr(), out.data_ptr(), torch.cuda.current_stream().cuda_stream)
        check(out.cpu().numpy().view(np.uint32)[: len(expected)], expected)
        if emulated:
            emulated.configure(seed, "random")
            emulated.probe(name, seed)


@pytest.mark.parametrize("name", WAYS)
def test_conformance_of_exchanges(kernels, capability, name):
    """Five hundred launches of a hundred steps: a race would have its chance."""
    if "Grid" not in name and capability < (9, 0):
        pytest.skip("clusters came with compute capability 9.0")
    problem = Problem(T=100)
    expected = on_device(problem.expected)
    *inputs, output = (on_device(array) for array in problem.arrays())
    for _ in range(500):
        inputs[-1].zero_()  # the count of arrivals
        output.fill_(0xFF)
        addresses = [tensor.data_ptr() for tensor in (*inputs, output)]
        kernels.run_layer(name, problem.T, addresses, torch.cuda.current_stream().cuda_stream)
        assert torch.equal(output, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Streams, devices, waiting


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stream(case):
    """The op runs on the current stream, after what is there, and returns before it is done."""
    arguments = arguments_of(case)
    expected = case.call(ops, arguments)["output"]
    late = dict(arguments, input=torch.full_like(arguments["input"], torch.nan))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.call(ops, late)  # cuBLAS gets its workspace for this stream
        torch.cuda.synchronize()
        torch.cuda._sleep(500_000_000)
        late["input"].copy_(arguments["input"])
        output = case.call(ops, late)["output"]
        finished = stream.record_event()
        assert not finished.query(), "the call waited for the device"
    stream.synchronize()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_synchronisation(case):
    arguments = arguments_of(case)
    case.run(ops, arguments)
    leaves = {name: tensor if tensor is None else tensor.requires_grad_() for name, tensor in arguments.items()}
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    ones = torch.ones_like(case.call(ops, leaves)["output"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(case.call(ops, leaves)["output"], wanted, ones)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_every_time(case):
    arguments = arguments_of(case)
    (outputs, grads), *others = (case.run(ops, arguments) for _ in range(5))
    for other_outputs, other_grads in others:
        for name, value in (outputs | grads).items():
            torch.testing.assert_close((other_outputs | other_grads)[name], value, rtol=0, atol=0)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    case = LayerCase("lstm")
    arguments = case.draw()
    expected = case.run(reference, arguments)
    got = case.run(ops, {name: tensor if tensor is None else tensor.to("cuda:1") for name, tensor in arguments.items()})
    assert torch.cuda.current_device() == 0
    for ours, theirs in zip(got, expected, strict=True):
        for name in ours:
            assert ours[name].device == torch.device("cuda:1")
            torch.testing.assert_close(ours[name].cpu(), theirs[name], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# CUDA graphs


class FirstResult(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)[0]


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_graph(name):
    """Forward and backward captured once, replayed on other data."""
    T, B, I, H = 12, 5, 24, 40  # noqa: E741
    module = getattr(fastrnn, name)(I, H, num_layers=2, bidirectional=True).cuda()
    example = torch.randn(T, B, I, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(FirstResult(module), (example,))
    for _ in range(3):
        x = torch.randn(T, B, I, device="cuda", requires_grad=True)
        weight = torch.randn(T, B, 2 * H, device="cuda")
        leaves = [x, *module.parameters()]
        expected_output = module(x)[0]
        expected = torch.autograd.grad(expected_output, leaves, weight)
        output = graphed(x)
        got = torch.autograd.grad(output, leaves, weight)
        for ours, theirs in zip((output, *got), (expected_output, *expected), strict=True):
            torch.testing.assert_close(ours, theirs)


FIRST_CALL_IN_A_GRAPH = """
import torch, fastrnn
layer, x = fastrnn.LSTM(64, 64, device="cuda", dtype=torch.float16), torch.randn(9, 4, 64, device="cuda").half()
torch.mm(x[0], x[0].t())  # cuBLAS makes its handle outside of the graph
graph = torch.cuda.CUDAGraph()
with torch.no_grad(), torch.cuda.graph(graph):
    output, _ = layer(x)
graph.replay()
with torch.no_grad():
    assert torch.equal(output, layer(x)[0])
"""


def test_graph_of_the_first_call():
    """What a process does once it also does while it is captured."""
    subprocess.run([sys.executable, "-c", FIRST_CALL_IN_A_GRAPH], cwd=ROOT, check=True)
