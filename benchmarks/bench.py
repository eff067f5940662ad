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
    from machine import Conditions, floor_ms
    from measure import Clock, CudaClock, HostClock, as_cuda_graph, cuda_kernels, interleave, peak_mib
    from plots import plot_ratios
    from report import Row, append_csv, markdown, print_tables, read_csv
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    sys.exit(f"bench.py: the package '{error.name}' is missing: run `make bench`, or pip install 'fastrnn[bench]'")

LOCAL_RESULTS = Path(__file__).parent / "results" / "local"


@dataclass(frozen=True)
class Suite:
    """Defaults of the options that choose cases; every option of the same name replaces one."""

    shapes: Sequence[str]
    modes: Sequence[str] = ("infer", "train")
    dtypes: Sequence[str] = ("fp32",)
    threads: Sequence[int] = (0,)  # 0: all
    launches: Sequence[str] = ("eager",)
    baselines: Sequence[str] = ("torch.nn",)
    budget: float = 0.5
    time_limit: float = math.inf
    limit: bool = False


SUITES = {
    ("short", "cpu"): Suite(
        shapes=("1,1,256", "100,1,128", "100,32,256", "100,32,256,packed=30", "512,8,256"),
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
        budget=1.0,
        limit=True,
    ),
    # In order of interest, because a time limit drops the last ones.
    ("gpu", "cuda"): Suite(
        shapes=(
            *("1024,16,768", "100,64,512", "100,32,512,packed=30", "100,32,512,D=2", "100,32,512,L=2"),
            *("1,1,256", "100,1,256", "100,3,512", "100,16,128", "100,16,200", "100,16,256", "100,16,512"),
            *("100,16,1024", "100,128,1024", "100,16,2048", "1024,1,256", "1,64,1024", "100,16,64", "100,16,1536"),
            *("100,8,512", "100,32,512", "100,128,512", "100,1,512", "100,16,768", "1024,8,1024"),
        ),
        dtypes=("bf16", "fp16", "tf32", "fp32"),
        launches=("eager", "graph"),
        budget=0.06,
        limit=True,
    ),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; a suite's values stand in for options that are not given."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="modes:\n"
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
    add("--suite", choices=("short", "cpu", "gpu"), default="short", help="named set of cases (default: short)")
    add("--task", choices=("sweep", "char-lm", "all"), help="what to run (default: all for suite short, else sweep)")
    choice = parser.add_argument_group("cases; each option replaces the suite's values")
    add = choice.add_argument
    add("--shapes", nargs="+", metavar="T,B,I,H", help="or T,B,H; with L=layers, D=directions, packed=shortest length")
    add("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="(default: all)")
    add("--modes", nargs="+", choices=MODES)
    add("--dtypes", nargs="+", choices=DTYPES)
    add("--device", choices=("cpu", "cuda"), help="(default: the suite's, or cuda where there is one)")
    add("--threads", nargs="+", type=int, metavar="N", help="CPU threads; 0 is all")
    add("--launches", nargs="+", choices=("eager", "graph"), help="CUDA: one call at a time, or as a CUDA graph")
    add("--baselines", nargs="+", choices=BASELINES)
    timing = parser.add_argument_group("timing")
    add = timing.add_argument
    add("--budget", type=float, metavar="S", help="seconds per contender and case")
    add("--time-limit", type=float, metavar="S", help="start no case after this many seconds (suite short: 120)")
    add("--limit", action=argparse.BooleanOptionalAction, help="measure the machine's peaks, show the share of them")
    add("--steps", type=int, default=char_lm.STEPS, metavar="N", help="of the language model (default: %(default)s)")
    add("--control", action="store_true", help="language model: torch.nn with weights one ulp off in fastrnn's place")
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--csv", type=Path, metavar="FILE", help="rows are added to it (default: in benchmarks/results/local)")
    add("--plot", type=Path, metavar="FILE", help="PNG of the ratios (default: beside the CSV file)")
    add("--report-readme", type=Path, metavar="FILE", help="print the Markdown tables of a CSV file and end")
    arguments = parser.parse_args(argv)

    if arguments.report_readme:
        return arguments
    if arguments.device is None:
        devices = {"cpu": "cpu", "gpu": "cuda", "short": "cuda" if torch.cuda.is_available() else "cpu"}
        arguments.device = devices[arguments.suite]
    if (arguments.suite, arguments.device) not in SUITES:
        parser.error(f"--suite {arguments.suite} does not run on --device {arguments.device}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"no CUDA device is there (torch {torch.__version__}); use --device cpu")
    suite = SUITES[arguments.suite, arguments.device]
    for name, value in vars(suite).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.task is None:
        arguments.task = "all" if arguments.suite == "short" else "sweep"
    if min(arguments.threads) < 0 or arguments.steps < char_lm.WINDOW or arguments.budget < 0:
        parser.error(f"expected --threads >= 0, --budget >= 0 and --steps >= {char_lm.WINDOW}")
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
    every = torch.get_num_threads()
    threads = list(dict.fromkeys(n or every for n in arguments.threads)) if arguments.device == "cpu" else [every]
    launches = arguments.launches if arguments.device == "cuda" else ["eager"]
    combinations = itertools.product(
        threads, arguments.shapes, arguments.dtypes, arguments.cells, arguments.modes, launches
    )
    cases = [
        Case(cell, shape, dtype, mode, arguments.device, n, launch == "graph")
        for n, shape, dtype, cell, mode, launch in combinations
    ]
    cases = [case for case in cases if any(serves(baseline, case) for baseline in arguments.baselines)]
    if not cases:
        sys.exit("bench.py: none of the baselines serves any of these cases (see --help)")
    return cases


class CaseError(Exception):
    """fastrnn failed in a case, or its results differ from a baseline's."""


def measure(case: Case, arguments: argparse.Namespace, conditions: Conditions) -> list[Row]:
    """Checks and times one case: a row per baseline.

    Raises:
        CaseError: Nothing was timed, because fastrnn is at fault.
    """
    torch.set_num_threads(case.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    notes: dict[str, str] = {}
    try:
        problem = Problem(case)
        calls = {"fastrnn": make_call(problem, "fastrnn")}
        ours = calls["fastrnn"]()
        if case.graph:
            calls["fastrnn"] = as_cuda_graph(calls["fastrnn"])
    except (RuntimeError, NotImplementedError) as error:
        raise CaseError(f"fastrnn fails: {error}") from error
    baselines = [name for name in arguments.baselines if serves(name, case)]
    for baseline in baselines:
        try:
            call = make_call(problem, baseline)
            difference = problem.disagreement(ours, call())
            if baseline == "torch.nn" and case.device == "cuda":
                kernels = cuda_kernels(call)
                persistent = any("persist" in kernel.lower() for kernel in kernels)
                notes[baseline] = ("persistent: " if persistent else "step by step: ") + " ".join(kernels[:4])
            calls[baseline] = as_cuda_graph(call) if case.graph else call
        except (RuntimeError, NotImplementedError) as error:
            notes[baseline] = " ".join(str(error).split())[:200]
            continue
        if difference:
            raise CaseError(f"fastrnn and {baseline} disagree: {difference}")
    del ours
    clock: Clock = CudaClock(case.graph) if case.device == "cuda" else HostClock(case.threads)
    timings = interleave(calls, clock, arguments.budget)
    memory = {name: peak_mib(call, case.device) for name, call in calls.items() if name != "onnxruntime"}
    return [
        Row(
            conditions=conditions,
            case=case,
            path=os.environ.get("FASTRNN_PATH", "auto"),
            baseline=baseline,
            clock=clock.name,
            ours=timings["fastrnn"],
            theirs=timings.get(baseline),
            peak_mib=memory["fastrnn"],
            baseline_peak_mib=memory.get(baseline),
            floor_ms=floor_ms(case) if arguments.limit else None,
            note=notes.get(baseline, ""),
        )
        for baseline in baselines
    ]


def sweep(arguments: argparse.Namespace, console: Console) -> bool:
    """Measures all cases. Returns whether none failed."""
    cases, conditions = make_cases(arguments), Conditions.now(arguments.device)
    csv = arguments.csv or LOCAL_RESULTS / f"{arguments.suite}-{arguments.device}.csv"
    plot = arguments.plot or csv.with_suffix(".png")
    console.print(f"fastrnn on {conditions.device}, torch {conditions.torch}, commit {conditions.commit}")
    load = os.getloadavg()[0]
    if load > 0.2 * (os.cpu_count() or 1):
        console.print(f"The machine is busy (load {load:.1f}): do not trust these numbers.", style="bold yellow")
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
                append_csv(csv, measured)
                rows += measured
            progress.advance(task)
    if rows:
        print_tables(console, rows)
        plot_ratios(rows, plot)
        console.print(f"Rows: {csv}\nPlot: {plot}")
    for failure in failures:
        console.print(f"FAILED {failure}", style="bold red")
    return not failures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the result is its exit status."""
    arguments = parse_arguments(argv)
    if arguments.report_readme:
        print(markdown(read_csv(arguments.report_readme)))
        return 0
    try:
        import fastrnn  # noqa: F401
    except (ImportError, OSError) as error:
        sys.exit(
            f"bench.py: fastrnn cannot be imported: {error}\nBuild it first: `make bench` does, or `pip install .`"
        )
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    succeeded = True
    if arguments.task in ("sweep", "all"):
        succeeded = sweep(arguments, console)
    if arguments.task in ("char-lm", "all"):
        torch.set_num_threads(max(arguments.threads) or torch.get_num_threads())
        picture = (arguments.plot or arguments.csv or LOCAL_RESULTS / "x").with_name("char-lm.png")
        succeeded &= char_lm.run(console, arguments.device, arguments.steps, arguments.control, picture)
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
