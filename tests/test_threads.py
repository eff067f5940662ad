# SPDX-License-Identifier: BSD-3-Clause
"""Threads, processes and instruction sets: whatever computes it, the result is the same."""

import mmap
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity import CELLS, Case, check_parity, draw, run
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastrnn
from fastrnn import _C, ops, reference

CPU = torch.device("cpu")
# Few rows and many units, one row, few rows and steps, many rows, packed rows of unequal lengths, a projection. Both
# directions at once where few rows leave threads waiting (many units) or idle (a projection).
CASES = [Case(cell, *size, **form) for cell in CELLS for size, form in [
    ((23, 2, 40, 129), {}),
    ((20, 1, 40, 200), {}),
    ((3, 3, 70, 40), {}),
    ((9, 33, 24, 40), {"bidirectional": True}),
    ((11, 3, 40, 128), {"bidirectional": True, "layout": "packed_unsorted"}),
    ((12, 17, 24, 40), {"layout": "packed_unsorted"}),
]] + [
    Case("lstm", 9, 20, 24, 40, proj_size=9),
    Case("lstm", 20, 1, 24, 128, proj_size=9, bidirectional=True),
]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 3, 4 * (os.cpu_count() or 1)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads(case, threads, torch_threads):
    torch.set_num_threads(threads)
    check_parity(case, fastrnn, CPU)
    assert torch.get_num_threads() == threads


# The input gates of all steps at once, 1 MB of them, and in chunks of time, of 5 MB.
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(150, 2, 24, 200), (400, 4, 24, 200)])
@pytest.mark.parametrize("layout", ["dense", "packed_unsorted"])
def test_long_sequences(size, layout, dtype, threads, torch_threads):
    torch.set_num_threads(threads)
    check_parity(Case("lstm", *size, layout=layout, dtype=dtype), fastrnn, CPU)


# Few steps of many rows: threads share the hidden units. One step needs no barrier, and packs W_hh a panel at a time.
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T, layout", [(1, "dense"), (5, "packed_unsorted")])
@pytest.mark.parametrize("cell", CELLS)
def test_short_sequences(cell, T, layout, dtype, threads, torch_threads):
    torch.set_num_threads(threads)
    check_parity(Case(cell, T, 20, 24, 260, layout=layout, dtype=dtype, bidirectional=T > 1), fastrnn, CPU)


# Gradients of weights from up to four rows are written row by row; of large weights, from up to eight. With one thread,
# several, and more than there are blocks of rows, which then share columns too.
@pytest.mark.parametrize("threads", [1, 2, 67])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "T, B, I, H",
    [(1, 1, 300, 330), (2, 1, 300, 330), (1, 3, 300, 330), (2, 2, 300, 330), (1, 5, 300, 330), (2, 4, 9, 1050)],
)
def test_few_rows(T, B, I, H, dtype, threads, torch_threads):
    torch.set_num_threads(threads)
    check_parity(Case("lstm" if H > 1000 else "gru", T, B, I, H, dtype=dtype), fastrnn, CPU)


@pytest.mark.parametrize("H, is_layer", [(32, False), (600, True)])
def test_a_step_of_an_rnn(H, is_layer):
    """Of a small one the step and its gradients are torch's own operators, of a large one the layer."""
    check_parity(Case("rnn_tanh", 1, 3, 40, H), fastrnn, CPU)
    rnn, input = fastrnn.RNN(40, H), torch.randn(1, 3, 40)
    assert rnn(input)[0].grad_fn.name().startswith("_Fastrnn") is is_layer
    packed = nn.utils.rnn.pack_sequence([input[0, :1]])
    for x, is_left_to_torch in ((input, not is_layer), (packed, False)):
        assert ("torch's own operator for one step" in fastrnn.explain(rnn, x).layers[0]) is is_left_to_torch


@pytest.mark.parametrize("B", [97, 193])
def test_equal_rows_have_equal_gradients(B, torch_threads):
    """Tiles of a step are as even as can be, however many its rows: one of a single row would sum in another order."""
    torch.set_num_threads(1)
    h_0 = torch.randn(1, 1, 40).repeat(1, B, 1).requires_grad_()
    output, _ = fastrnn.RNN(24, 40)(torch.randn(3, 1, 24).repeat(1, B, 1), h_0)
    (gradient,) = torch.autograd.grad(output.square().sum(), h_0)
    assert torch.equal(gradient, gradient[:, :1].expand_as(gradient))


def test_a_projection_as_wide_as_the_layer(torch_threads):
    """The ops take one, unlike torch.nn: all units of a step meet in it, though h has no other width than the cell."""
    torch.set_num_threads(2)
    H = 160
    shapes = [(20, 1, 8), (4 * H, 8), (4 * H, H), (4 * H,), (4 * H,), (1, H), (1, H), (H, H)]
    arguments = [(0.1 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]
    *layer, w_hr = arguments
    for _ in range(5):
        ours, truth = (lstm_layer(*layer, w_hr=w_hr) for lstm_layer in (ops.lstm_layer, reference.lstm_layer))
        torch.testing.assert_close(ours, truth)
        ours, truth = (torch.autograd.grad(list(results), arguments, list(results)) for results in (ours, truth))
        torch.testing.assert_close(ours, truth)


def problem(case):
    torch.manual_seed(0)
    module = case.module(fastrnn)
    tensors, lengths = draw(case)
    return lambda: run(case, module, dict(tensors), lengths)


def assert_equal(results, expected):
    for ours, theirs in zip(results, expected, strict=True):
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name


def test_calls_from_many_python_threads():
    """One module of each kind, used by eight threads at once, forward and backward."""
    problems = [problem(case) for case in CASES]
    expected = [compute() for compute in problems]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: problems[n % len(problems)](), range(6 * len(problems))))
    for n, result in enumerate(results):
        assert_equal(result, expected[n % len(problems)])


def test_on_a_busy_machine(torch_threads):
    """Threads that wait for each other at every step and lose their cores: one goes on alone, with the same result."""
    torch.set_num_threads(2)
    problems = [problem(Case(cell, 50, 1, 24, 300, bidirectional=True)) for cell in CELLS]
    expected = [compute() for compute in problems]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        for _ in range(5):
            for compute, right in zip(problems, expected, strict=True):
                assert_equal(compute(), right)
    finally:
        for process in busy:
            process.kill()
            process.wait()


# Threads share the rows, and the hidden units.
@pytest.mark.parametrize("T, B, H", [(30, 64, 64), (3, 4, 256)])
def test_flush_denormal(T, B, H, torch_threads):
    """torch sets the mode of the calling thread alone: all threads of a layer compute in it."""
    torch.set_num_threads(2)
    rnn = fastrnn.RNN(8, H, nonlinearity="relu", bias=False)
    nn.init.constant_(rnn.weight_ih_l0, 1e-3)
    nn.init.zeros_(rnn.weight_hh_l0)
    x = torch.full((T, B, 8), 1e-37)  # its products with the weights are denormal
    try:
        for flush in (False, True, False):  # threads that the first call starts keep the mode of then
            if not torch.set_flush_denormal(flush):
                pytest.skip("torch cannot set the mode of this processor")
            bits = rnn(x)[0].detach().view(torch.int32)
            assert (bits == 0).sum() == (bits.numel() if flush else 0)
    finally:
        torch.set_flush_denormal(False)


# As a worker of torch's DataLoader does: OpenMP's threads do not survive a fork, and torch's own kernels hang as well.
def run_in_child(connection):
    torch.set_num_threads(1)
    results = [problem(case)() for case in CASES]
    connection.send([[{name: t.detach().numpy() for name, t in part.items()} for part in result] for result in results])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_fork(torch_threads):
    expected = [problem(case)() for case in CASES]
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=run_in_child, args=(there,))
    child.start()
    try:
        assert here.poll(60), "the child does not answer"
        results = here.recv()
    finally:
        child.kill()
        child.join()
    for result, right in zip(results, expected, strict=True):
        for ours, theirs in zip(result, right, strict=True):
            for name in theirs:
                torch.testing.assert_close(torch.from_numpy(ours[name]), theirs[name])


class Outputs(Dataset):
    """A data set that computes its samples with a module."""

    def __len__(self):
        return len(CASES)

    def __getitem__(self, index):
        return problem(CASES[index])()[0]["output"].detach()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_data_loader_workers(context):
    data = Outputs()
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=60)
    for index, output in enumerate(loader):
        torch.testing.assert_close(output, data[index])


ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]  # each has what the one before has


def check_all_cases():
    for case in CASES:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            check_parity(replace(case, dtype=dtype), fastrnn, CPU)


def relu_rnn(x, w_ih):
    """relu(x W^T), one step without a state: (B, I) to (B, H)."""
    H = len(w_ih)
    w_hh, h0 = x.new_zeros(H, H), x.new_zeros(len(x), H)
    return ops.rnn_layer(x[None], w_ih, w_hh, None, None, h0, nonlinearity="relu")[0][0]


def check_16_bit_storage():
    """Every value of a 16-bit dtype is read as what it is, and every sum rounded once, to nearest even."""
    # The processor's own products of bfloat16 take denormals for zero, and make none.
    first = {torch.bfloat16: 0x1000 if _C.cpu_takes("bfloat16") == "multiplied" else 0, torch.float16: 0}
    for dtype in first:
        values = torch.arange(first[dtype], 0x8000, dtype=torch.int32).to(torch.int16).view(dtype)
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}
        for H in (1, 40):
            same = relu_rnn(values[:, None], values.new_ones(H, 1))
            torch.testing.assert_close(same, values[:, None].expand(-1, H), **exact)
        for weight in values.split(500):
            torch.testing.assert_close(relu_rnn(values.new_ones(1, 1), weight[:, None])[0], weight, **exact)
        finite = values[values.isfinite()]
        torch.manual_seed(0)
        for _ in range(20):
            summands = finite[torch.randint(len(finite), (len(finite), 2))]
            summands = summands * torch.randint(-1, 2, summands.shape).to(dtype)
            sums = relu_rnn(summands, summands.new_ones(3, 2))[:, 0]
            assert torch.equal(sums, summands.float().sum(1).relu().to(dtype))
        weight = finite[torch.randint(len(finite), (70, 45))]
        for columns in torch.arange(45).split(9):  # few rows read a weight where it is
            x = torch.eye(45)[columns].to(dtype)
            assert torch.equal(relu_rnn(x, weight), weight[:, columns].T)


def at_the_end_of_memory(tensor):
    """A copy behind which reading stops the process: there the memory is of a file that has become shorter."""
    size = tensor.numel() * tensor.element_size()
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    with tempfile.TemporaryFile() as file:
        file.truncate(end + mmap.PAGESIZE)
        memory = mmap.mmap(file.fileno(), end + mmap.PAGESIZE)
        file.truncate(end)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=end - size)
    return copy.view(tensor.shape).copy_(tensor)


def check_ends_of_memory():
    """Nothing is read behind a tensor. Sanitizers do not see what is read by a mask."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for cell in ("RNN", "GRU", "LSTM"):
            for T, B, I, H in ((3, 2, 5, 7), (1, 1, 9, 21), (4, 9, 17, 33), (20, 3, 3, 1), (2, 40, 31, 65)):
                module = getattr(fastrnn, cell)(I, H, dtype=dtype)
                for parameter in module.parameters():
                    parameter.data = at_the_end_of_memory(parameter.data)
                input = at_the_end_of_memory(torch.randn(T, B, I, dtype=dtype)).requires_grad_()
                h0, c0 = (at_the_end_of_memory(torch.randn(1, B, H, dtype=dtype)).requires_grad_() for _ in "hc")
                output, _ = module(input, (h0, c0) if cell == "LSTM" else h0)
                output.backward(at_the_end_of_memory(torch.randn(T, B, H, dtype=dtype)))


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa):
    """FASTRNN_ISA lowers the instruction set; the kernels of each pass the same tests."""
    if ISAS.index(isa) > ISAS.index(_C.isa()):
        pytest.skip(f"this processor has {_C.isa()} at best")
    checks = "own.check_all_cases(); own.check_16_bit_storage(); own.check_ends_of_memory()"
    script = f"import test_threads as own; assert own._C.isa() == {isa!r}; {checks}"
    environment = os.environ | {"FASTRNN_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
