# SPDX-License-Identifier: BSD-3-Clause
"""On what it is measured: facts about the machine, its measured peaks, and the time that no kernel can beat on it."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES, GATES, Case
from measure import best_s

# What one step costs beside arithmetic and memory when the hidden units are spread over cores or multiprocessors.
# CPU: a barrier of two threads took 0.18 us (Zen 4). CUDA: an assumption, about one write to and one read from L2.
BARRIER_S = 0.15e-6
EXCHANGE_S = 0.5e-6
CACHE_SIZES = [kib << 10 for kib in (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)]


@dataclass(frozen=True)
class Conditions:
    """When, of what and on what was measured."""

    date: str
    commit: str
    device: str
    python: str
    torch: str
    cuda: str
    cudnn: str

    @classmethod
    def now(cls, device: str) -> Conditions:
        """Of this moment and machine; without CUDA's versions on the CPU."""
        cuda = device == "cuda"
        return cls(
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
            commit=_commit(),
            device=torch.cuda.get_device_name() if cuda else _cpu_name(),
            python=platform.python_version(),
            torch=torch.__version__,
            cuda=str(torch.version.cuda) if cuda else "",
            cudnn=str(torch.backends.cudnn.version()) if cuda else "",
        )


def _cpu_name() -> str:
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor() or platform.machine()} ({capability})"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Other work on the machine: so many processes that each want a core all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def load_of_others() -> float:
    """Share of the processors' time that others use while this process sleeps for a moment; 0 where Linux is not."""

    def ticks() -> tuple[int, int]:
        values = [int(text) for text in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(values), values[3] + values[4]  # idle and waiting for input or output

    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    total, idle = ticks()
    time.sleep(0.5)
    total_after, idle_after = ticks()
    return 1 - (idle_after - idle) / max(1, total_after - total)


@functools.cache
def peak_flops(dtype: str, device: str, threads: int) -> float:
    """Operations per second of the fastest product that torch can do here.

    On the CPU that is oneDNN's 3x3 convolution (98 % of the fused multiply-add peak of a Zen 4 core in fp32), or mm.
    """
    factory: dict[str, Any] = {"dtype": DTYPES[dtype], "device": device}
    if device == "cuda":
        n = 8192 if dtype != "fp64" else 4096
        a, b = torch.randn(n, n, **factory), torch.randn(n, n, **factory)
        return 2 * n**3 / _best_cuda_s(lambda: a @ b)
    n, channels, pixels = 1024, 256, 32
    with torch.inference_mode():
        a, b = torch.randn(n, n, **factory), torch.randn(n, n, **factory)
        rates = [2 * n**3 / best_s(lambda: a @ b, threads)]
        if dtype != "fp64":
            layout = torch.channels_last
            x = torch.randn(1, channels, pixels, pixels, **factory).contiguous(memory_format=layout)
            w = torch.randn(channels, channels, 3, 3, **factory).contiguous(memory_format=layout)
            flops = 2 * 9 * channels**2 * (pixels - 2) ** 2
            rates.append(flops / best_s(lambda: torch.conv2d(x, w), threads))
    if dtype in ("bf16", "fp16"):
        # Where the processor has no instructions for it, the type is converted and computed in fp32.
        rates.append(peak_flops("fp32", device, threads))
    return max(rates)


@functools.cache
def read_bandwidth(size: int, device: str, threads: int) -> float:
    """Bytes per second that all threads together read from a buffer of `size` bytes (each the whole of it).

    The buffer is expanded with stride 0 and summed over its own axis, so that one call of torch reads it many times.
    """
    count = size // 4
    rounds = max(threads, (16 << 20) // size // threads * threads)
    buffer = torch.ones(count, device=device)
    with torch.inference_mode():
        if device == "cuda":
            return size / _best_cuda_s(lambda: buffer.sum())
        repeated = buffer.expand(rounds, count)
        return rounds * size / best_s(lambda: repeated.sum(1), threads)


def _best_cuda_s(call: Callable[[], object]) -> float:
    best = float("inf")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(20):
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) * 1e-3)
    return best


def floor_ms(case: Case) -> float:
    """The time below which a case cannot go by the machine's measured peaks.

    CPU: the products at peak; the recurrent one not below the time to read its weights at every step from the cache
    that holds a thread's share of them. CUDA: the longest of the products, the bytes moved once (weights stay on
    chip), and one exchange of h per step. Training does each product three times, two of them step by step.
    Gate functions, packing and launches are left out.
    """
    s, itemsize = case.shape, DTYPES[case.dtype].itemsize
    gates, rows, train = GATES[case.cell], sum(s.lengths), case.mode == "train"
    weights = s.D * gates * s.H * s.H
    projection = sum(2 * rows * s.D * gates * s.H * (s.I if layer == 0 else s.D * s.H) for layer in range(s.L))
    recurrent = 2 * rows * weights * s.L
    peak = peak_flops(case.dtype, case.device, case.threads)
    passes = 2 if train else 1
    if case.device == "cuda":
        values = rows * (s.I + s.D * s.H * (1 + gates * (case.mode != "infer"))) * s.L
        moved = passes * values * itemsize / read_bandwidth(1 << 30, "cuda", 1)
        products = (3 if train else 1) * (projection + recurrent) / peak
        return 1e3 * max(products, moved, passes * s.T * s.L * EXCHANGE_S)
    share = weights // s.D * itemsize / case.threads
    level = next((size for size in CACHE_SIZES if size >= share), CACHE_SIZES[-1])
    read = s.T * s.L * weights * itemsize / read_bandwidth(level, "cpu", case.threads)
    steps = max(recurrent / peak, read)
    if s.B == 1 and s.D == 1 and case.threads > 1:
        steps += s.T * s.L * BARRIER_S
    products = (3 * projection + recurrent if train else projection) / peak
    return 1e3 * (products + passes * steps)
