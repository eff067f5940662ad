#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Measures fastrnn beside torch.nn and other baselines, in one process, on the device that is there.

Every case is checked before it is timed: fastrnn and the baseline share weights and inputs and must return the same
outputs, last states and gradients. benchmarks/README.md tells how to read the numbers.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    import char_lm
    import torch
    from cases import CELLS, DTYPES, MODES, Case, Problem, Shape
    from contenders import BASELINES, make_call, missing_packages, serves
    from machine import Conditions, busy_processes, floor_ms, load_of_others
    from measure import Clock, CudaClock, HostClock, as_cuda_graph, cuda_kernels, interleave, peak_mib
    from plots import plot_ratios
    from report import FormatError, Row, append_csv, markdown, print_tables, read_csv
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    sys.exit(f"bench.py: the package '{error.name}' is missing: run `make bench`, or pip install 'fastrnn[bench]'")

LOCAL_RESULTS = Path(__file__).parent / "results" / "local"
# Variables that choose how memory is allocated: new memory is a large part of what torch.nn takes.
ALLOCATOR = ("GLIBC_TUNABLES", "LD_PRELOAD")
# Share of the processors' time that other work may have before the numbers are called untrustworthy.
BUSY = 0.05


@dataclass(frozen=True)
class Suite:
    """Defaults of the options that choose cases; every option of the same name replaces one.

    A time limit drops the last shapes of the last dtypes: those of most interest come first.
    """

    shapes: Sequence[str]
    modes: Sequence[str] = ("infer", "train")
    dtypes: Sequence[str] = ("fp32",)
    threads: Sequence[int] = (0,)  # 0: all
    launches: Sequence[str] = ("eager",)
    baselines: Sequence[str] = ("torch.nn",)
    budget: float = 1.0
    time_limit: float = math.inf
    limit: bool = False


SUITES = {
    ("short", "cpu"): Suite(
        shapes=("1,1,256", "100,1,128", "100,32,256", "100,32,256,packed=30", "512,8,256"),
        dtypes=("fp32", "bf16"),
        budget=0.4,
        time_limit=120,
    ),
    ("short", "cuda"): Suite(
        shapes=("1,1,256", "100,1,256", "100,64,512", "100,32,512,packed=30", "1024,16,768"),
        dtypes=("tf32", "fp16", "bf16"),
        budget=0.2,
        time_limit=120,
    ),
    ("cpu", "cpu"): Suite(
        shapes=(
            *("1,1,256", "100,1,128", "100,1,256", "100,1,512", "1000,1,64", "512,8,256", "100,32,128", "100,32,256"),
            *("100,32,512", "50,128,512", "100,64,512", "100,64,1024"),
            *("100,32,256,packed=30", "100,32,256,L=2", "100,32,256,D=2"),
        ),
        threads=(1, 0),
        baselines=("torch.nn", "onnxruntime"),
        limit=True,
    ),
    ("keras", "cpu"): Suite(
        shapes=("10,32,1,64", "50,32,1,64", "100,64,16,64"),
        modes=("fit",),
        baselines=("keras",),
    ),
    ("gpu", "cuda"): Suite(
        shapes=(
            *("1024,16,768", "100,64,512", "100,32,512,packed=30", "100,32,512,D=2", "100,32,512,L=2"),
            "1024,16,256,L=2",
            *("1,1,256", "100,1,256", "100,3,512", "100,16,128", "100,16,200", "100,16,256", "100,16,512"),
            *("100,16,1024", "100,128,1024", "100,16,2048", "1024,1,256", "1,64,1024", "100,16,64", "100,16,1536"),
            *("100,8,512", "100,32,512", "100,128,512", "100,1,512", "100,16,768", "1024,8,1024"),
        ),
        dtypes=("bf16", "fp16", "tf32", "fp32"),
        launches=("eager", "graph"),
        budget=0.05,
        time_limit=540,
        limit=True,
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="suites:\n"
        "  short        a few shapes of each kind on the device that is there; under 2 minutes\n"
        "  cpu          15 shapes, 1 and all threads, with ONNX Runtime and the share of the machine's peaks\n"
        "  keras        3 shapes, Keras's fit() on its torch backend, plain and with fastrnn.keras; under a minute\n"
        "  gpu          26 shapes, eager and as CUDA graphs, with cuDNN's kernels; under 10 minutes\n"
        "modes:\n"
        + "".join(f"  {name:<12} {text}\n" for name, text in MODES.items())
        + "baselines:\n"
        + "".join(f"  {name:<12} {text}\n" for name, text in BASELINES.items())
        + "examples:\n"
        "  bench.py                                     short sweep, then the character language model\n"
        "  bench.py --suite cpu --csv cpu.csv           all CPU shapes, 1 and all threads, share of the limit\n"
        "  bench.py --shapes 100,{1,8},{128,256} 50,4,80,100,L=2,D=2,packed=10 --cells gru --dtypes bf16\n"
        "  bench.py --task char-lm                      the character language model alone\n"
        "  bench.py --report-readme cpu.csv             the README's table from measured rows\n",
    )
    add = parser.add_argument
    add(
        "--suite", choices=("short", "cpu", "keras", "gpu"), default="short", help="named set of cases (default: short)"
    )
    add("--task", choices=("sweep", "char-lm", "all"), help="what to run (default: all for suite short, else sweep)")
    choice = parser.add_argument_group("cases; each option replaces the suite's values")
    add = choice.add_argument
    add("--shapes", nargs="+", metavar="T,B,I,H", help="or T,B,H; with L=layers, D=directions, packed=shortest length")
    add("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL", help="of " + ", ".join(CELLS))
    add("--modes", nargs="+", choices=MODES, metavar="MODE", help="see below")
    add("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help="of " + ", ".join(DTYPES))
    add("--device", choices=("cpu", "cuda"), help="(default: the suite's, or cuda where there is one)")
    add("--threads", nargs="+", type=int, metavar="N", help="CPU threads; 0 is all")
    add("--launches", nargs="+", choices=("eager", "graph"), metavar="HOW", help="on CUDA: eager, graph (CUDA graph)")
    add("--baselines", nargs="+", choices=BASELINES, metavar="BASELINE", help="see below")
    timing = parser.add_argument_group("timing")
    add = timing.add_argument
    add("--budget", type=float, metavar="S", help="seconds per contender and case")
    add("--time-limit", type=float, metavar="S", help="start no case after it (default: suite short 120, gpu 540)")
    add("--busy", type=int, default=0, metavar="N", help="measure beside N processes that each want a core")
    add("--pack-weights", action="store_true", help="inference of fastrnn with fastrnn.pack_weights")
    add("--limit", action=argparse.BooleanOptionalAction, help="measure the machine's peaks, show the share of them")
    add("--steps", type=int, default=char_lm.STEPS, metavar="N", help="of the language model (default: %(default)s)")
    add("--control", action="store_true", help="language model: torch.nn with weights one ulp off in fastrnn's place")
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--csv", type=Path, metavar="FILE", help="rows are added to it (default: in benchmarks/results/local)")
    add("--plot", type=Path, metavar="FILE", help="PNG of the ratios (default: beside the CSV file)")
    add("--report-readme", type=Path, metavar="FILE", help="print the Markdown tables of a CSV file and end")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; a suite's values stand in for options that are not given."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.report_readme:
        return arguments
    if arguments.device is None:
        devices = {"cpu": "cpu", "keras": "cpu", "gpu": "cuda", "short": "cuda" if torch.cuda.is_available() else "cpu"}
        arguments.device = devices[arguments.suite]
    if (arguments.suite, arguments.device) not in SUITES:
        parser.error(f"--suite {arguments.suite} does not run on --device {arguments.device}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    suite = SUITES[arguments.suite, arguments.device]
    for name, value in vars(suite).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.csv = arguments.csv or LOCAL_RESULTS / f"{arguments.suite}-{arguments.device}.csv"
    arguments.plot = arguments.plot or arguments.csv.with_suffix(".png")
    if arguments.task is None:
        arguments.task = "all" if arguments.suite == "short" else "sweep"
    if min(*arguments.threads, arguments.busy) < 0 or arguments.steps < char_lm.WINDOW or arguments.budget < 0:
        parser.error(f"expected --threads, --budget and --busy >= 0 and --steps >= {char_lm.WINDOW}")
    if "unpacked" in arguments.baselines and not arguments.pack_weights:
        parser.error("--baselines unpacked is what --pack-weights is compared with")
    arguments.threads = [n or torch.get_num_threads() for n in arguments.threads]
    try:
        arguments.shapes = [Shape.parse(text) for text in arguments.shapes]
    except ValueError as error:
        parser.error(str(error))
    if arguments.device == "cpu" and "tf32" in arguments.dtypes:
        parser.error("tf32 is a mode of CUDA devices; on the CPU use fp32")
    for baseline in arguments.baselines:
        if missing := missing_packages(baseline):
            text = f"baseline {baseline} needs: pip install {' '.join(missing)}"
            if baseline not in suite.baselines:
                parser.error(text)
            print(f"Left out: {text}")
            arguments.baselines = [name for name in arguments.baselines if name != baseline]
    return arguments


def make_cases(arguments: argparse.Namespace) -> list[Case]:
    """All combinations, one setting of the machine after the other."""
    cuda = arguments.device == "cuda"
    combinations = itertools.product(
        arguments.threads[:1] if cuda else dict.fromkeys(arguments.threads),
        arguments.dtypes,
        arguments.shapes,
        arguments.cells,
        arguments.modes,
        arguments.launches if cuda else ["eager"],
    )
    cases = [
        Case(cell, shape, dtype, mode, arguments.device, n, launch == "graph")
        for n, dtype, shape, cell, mode, launch in combinations
    ]
    cases = [case for case in cases if any(serves(baseline, case) for baseline in arguments.baselines)]
    if not cases:
        sys.exit("bench.py: none of the baselines serves any of these cases (see --help)")
    return cases


def path(case: Case) -> str:
    """What fastrnn runs on: the instruction set of its CPU kernels, or the path that is forced on CUDA."""
    from fastrnn import _C

    if case.device == "cpu":
        return _C.isa()
    forced, chunks = os.environ.get("FASTRNN_PATH", "auto"), os.environ.get("FASTRNN_PERSISTENT_CHUNKS")
    return f"{forced}, {chunks} chunks" if chunks and case.shape.L > 1 else forced


def algorithm(kernels: list[str]) -> str:
    """Class and names of cuDNN's kernels: whether one of them runs many steps, or each step is launched."""
    persistent = any("persist" in kernel.lower() for kernel in kernels)
    return " ".join(["persistent:" if persistent else "step by step:", *kernels[:4]])


class CaseError(Exception):
    """fastrnn failed in a case, or its results differ from a baseline's."""


def measure(case: Case, arguments: argparse.Namespace, conditions: Conditions) -> list[Row]:
    """Checks and times one case: a row per baseline.

    Raises:
        CaseError: Nothing was timed, because fastrnn is at fault.
    """
    torch.set_num_threads(case.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    clock: Clock = CudaClock(case.graph) if case.device == "cuda" else HostClock(case.threads)
    baselines = [name for name in arguments.baselines if serves(name, case)]
    circumstances = [f"beside {arguments.busy} busy processes"] * bool(arguments.busy)
    circumstances += ["with pack_weights"] * (arguments.pack_weights and case.mode == "infer")
    circumstances += [f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ]
    notes, memory = dict.fromkeys(baselines, ", ".join(circumstances)), {}
    try:
        problem = Problem(case, arguments.pack_weights)
        call = make_call(problem, "fastrnn")
        ours = call()
        memory["fastrnn"] = peak_mib(call, case.device)
        calls = {"fastrnn": as_cuda_graph(call) if case.graph else call}
    except RuntimeError as error:
        raise CaseError(f"fastrnn fails: {error}") from error
    for baseline in baselines:
        try:
            call = make_call(problem, baseline)
            difference = problem.disagreement(ours, call())
            if baseline == "torch.nn" and case.device == "cuda":
                notes[baseline] = algorithm(cuda_kernels(call))
            if baseline != "onnxruntime":
                memory[baseline] = peak_mib(call, case.device)
            calls[baseline] = as_cuda_graph(call) if case.graph else call
        except RuntimeError as error:
            notes[baseline] = "fails: " + " ".join(str(error).split())[:200]
            continue
        if difference:
            raise CaseError(f"fastrnn and {baseline} disagree: {difference}")
    del ours
    with busy_processes(arguments.busy):
        timings = interleave(calls, clock, arguments.budget)
    return [
        Row(
            conditions=conditions,
            case=case,
            path=path(case),
            baseline=baseline,
            clock=clock.name,
            ours=timings["fastrnn"],
            theirs=timings.get(baseline),
            peak_mib=memory["fastrnn"],
            baseline_peak_mib=memory.get(baseline),
            floor_ms=floor_ms(case) if arguments.limit else None,
            note=notes[baseline],
        )
        for baseline in baselines
    ]


def sweep(arguments: argparse.Namespace, console: Console) -> bool:
    """Measures all cases. Returns whether none failed."""
    cases, conditions = make_cases(arguments), Conditions.now(arguments.device)
    csv, plot = arguments.csv, arguments.plot
    if csv.exists():
        read_csv(csv)  # raises before anything is measured if rows cannot be added
    console.print(f"fastrnn on {conditions.device}, torch {conditions.torch}, commit {conditions.commit}")
    load = load_of_others()
    busy = load > BUSY
    warning = f"Other work had {load:.0%} of the processors when this began: do not trust these numbers."
    if busy:
        console.print(warning, style="bold yellow")
    rows: list[Row] = []
    failures: list[str] = []
    deadline = time.monotonic() + arguments.time_limit
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for done, case in enumerate(cases):
            if time.monotonic() > deadline:
                console.print(f"Time limit: {len(cases) - done} of {len(cases)} cases were not measured.", style="bold")
                break
            progress.update(task, description=f"{case!s:<44}")
            try:
                measured = measure(case, arguments, conditions)
            except CaseError as error:
                failures.append(f"{case}: {error}")
                console.print(failures[-1], style="bold red")
            else:
                append_csv(csv, [row.to_csv() for row in measured])
                rows += measured
            progress.advance(task)
    if any(row.theirs for row in rows):
        print_tables(console, rows)
        if busy:
            console.print(warning, style="bold yellow")
        plot_ratios(rows, plot)
        console.print(f"Rows: {csv}\nPlot: {plot}")
    elif rows:
        console.print(f"No baseline could run these cases: {rows[-1].note}", style="bold red")
    for failure in failures:
        console.print(f"FAILED {failure}", style="bold red")
    return not failures


def run(arguments: argparse.Namespace) -> int:
    """Runs the tasks; the result is the exit status."""
    try:
        import fastrnn  # noqa: F401
    except ImportError as error:
        sys.exit(f"bench.py: {error}\n`make bench` builds fastrnn first")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    succeeded = True
    if arguments.task in ("sweep", "all"):
        succeeded = sweep(arguments, console)
    if arguments.task in ("char-lm", "all"):
        torch.set_num_threads(max(arguments.threads))
        plot = arguments.plot.with_name("char-lm.png")
        succeeded &= char_lm.run(console, arguments.device, arguments.steps, arguments.control, plot)
    return 0 if succeeded else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and does what it says; the result is the exit status."""
    arguments = parse_arguments(argv)
    try:
        if not arguments.report_readme:
            return run(arguments)
        print(markdown(read_csv(arguments.report_readme)))
        return 0
    except (OSError, FormatError) as error:
        sys.exit(f"bench.py: {error}")


if __name__ == "__main__":
    sys.exit(main())
