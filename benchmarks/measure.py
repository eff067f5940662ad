# SPDX-License-Identifier: BSD-3-Clause
"""How it is measured: interleaved samples on one clock, peak memory, and the kernels a call launches."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from cases import Call
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# A sample lasts at least this long, so that the clock and the loop around the call do not show in it.
SAMPLE_S = 3e-3
# Worker threads spin for some milliseconds after their last task. With several threads, this pause before a sample
# lets those of the contender before go to sleep; a call shorter than WARM_S then runs once untimed to wake its own.
SETTLE_S = 5e-3
WARM_S = 50e-3
# How long to look for the best time when a peak of the machine is measured.
PEAK_S = 0.2
# Larger than the L2 of any GPU so far (H200: 50 MB, B200: 126 MB).
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Percentiles of the time of one call in milliseconds."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Summarises samples in milliseconds."""
        p20, p50, p80 = (statistics.quantiles(samples, n=10, method="inclusive")[k] for k in (1, 4, 7))
        return cls(p20, p50, p80, len(samples))


class Clock(Protocol):
    """Makes samplers: functions that time a call once more and return its milliseconds."""

    name: str
    min_samples: int

    def sampler(self, call: Call) -> Callable[[], float]:
        """Prepares to time a call that has run before."""


def _host_clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


class HostClock:
    """Times calls on the CPU by elapsed time ("wall") or by the processor time of this process ("cpu").

    With one thread the two are equal on an idle machine, and processor time leaves out the moments in which the
    machine runs somebody else's work.
    """

    min_samples = 5

    def __init__(self, threads: int) -> None:
        """Takes processor time for one thread, elapsed time for several."""
        self.name = "cpu" if threads == 1 else "wall"
        self._now = _host_clock(threads)
        self._settle_s = SETTLE_S if threads > 1 else 0.0

    def sampler(self, call: Call) -> Callable[[], float]:
        """Each sample is a run of calls, long enough to be timed well."""
        once = self._time(call, 1)
        repeats = max(1, round(SAMPLE_S / max(once, 1e-7)))

        def sample() -> float:
            time.sleep(self._settle_s)
            if once < WARM_S:
                call()
            return self._time(call, repeats) * 1e3

        return sample

    def _time(self, call: Call, repeats: int) -> float:
        start = self._now()
        for _ in range(repeats):
            call()
        return (self._now() - start) / repeats


class CudaClock:
    """Times one call at a time by CUDA events, from an idle device with a cold L2.

    The device waits for the host before the first event: the time of an eager call includes what the host needs to
    launch it, that of a CUDA graph does not.
    """

    min_samples = 10

    def __init__(self, graph: bool) -> None:
        """Takes whether calls are CUDA graphs, which decides the name only."""
        self.name = "cuda-graph" if graph else "cuda"
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sampler(self, call: Call) -> Callable[[], float]:
        """Each sample is one call: a second one would find its weights in L2."""

        def sample() -> float:
            self._flush.zero_()
            torch.cuda.synchronize()
            self._start.record()
            call()
            self._end.record()
            torch.cuda.synchronize()
            return float(self._start.elapsed_time(self._end))

        return sample


def interleave(calls: dict[str, Call], clock: Clock, budget_s: float) -> dict[str, Timing]:
    """Times contenders in turn, so that what disturbs the machine meets all of them.

    Args:
        calls: The contenders; each has run before.
        clock: How to time.
        budget_s: Seconds to spend on each contender; the clock's `min_samples` are taken in any case.
    """
    samplers = {name: clock.sampler(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget_s * len(calls)
        while len(samples[order[0]]) < clock.min_samples or time.perf_counter() < deadline:
            for name in order:
                samples[name].append(samplers[name]())
            order.reverse()
    finally:
        gc.enable()
    return {name: Timing.of(times) for name, times in samples.items()}


def as_cuda_graph(call: Call) -> Call:
    """Captures a call. The replay writes the same result tensors again.

    Raises:
        RuntimeError: The call does something that cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def peak_mib(call: Call, device: str) -> float:
    """Memory that one call has allocated through torch at its highest point, results included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with _silent_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        results = call()
    now = peak = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    del results
    return peak / 2**20


def cuda_kernels(call: Call) -> list[str]:
    """Names of the kernels that a call runs, the one with most device time first, without their parameters."""
    with _silent_stderr(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    names = [event.key.removeprefix("void ").split("<")[0].split("(")[0] for event in events]
    return list(dict.fromkeys(names))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what the profiler's C++ library prints at start and stop, which would break the progress bar."""
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(sink)
        os.close(saved)


def best_s(call: Callable[[], object], threads: int) -> float:
    """The shortest time of one call on the CPU: what the machine can do when nothing disturbs it."""
    now = _host_clock(threads)
    call()
    best = float("inf")
    deadline = time.perf_counter() + PEAK_S
    while time.perf_counter() < deadline:
        start = now()
        call()
        best = min(best, now() - start)
    return best
