#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Measures how long torch.compile takes for a model with an LSTM, GRU or RNN: fastrnn's, and torch.nn's.

The model is Linear, a recurrent layer, Linear; what is timed is the first training step of torch.compile(model), less
the second, each contender in a process of its own with an empty cache. torch.compile does not take in torch.nn's layers
unless `torch._dynamo.config.allow_rnn` is set, which unrolls them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

try:
    import torch
    from machine import Conditions
    from report import append_csv
    from rich.console import Console
    from rich.table import Table
    from torch import nn
except ModuleNotFoundError as error:
    sys.exit(
        f"compile_time.py: the package '{error.name}' is missing: run `make bench`, or pip install 'fastrnn[bench]'"
    )

CONTENDERS = {
    "fastrnn": "all, one node per layer",
    "torch.nn": "nothing: the function that calls the layer is left out",
    "torch.nn allow_rnn": "all, step by step",
    "no layer": "the rest",
}


def measure(contender: str, cell: str, T: int, layers: int) -> dict[str, float]:
    """In a fresh process: seconds until a first step is done, of a second step, and how many graphs there are."""
    import time

    import fastrnn

    torch._dynamo.config.allow_rnn = contender.endswith("allow_rnn")
    namespace = fastrnn if contender == "fastrnn" else nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(32, 64), nn.Linear(64, 32)
            self.rnn = None if contender == "no layer" else getattr(namespace, cell)(64, 64, num_layers=layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.before(x)
            return self.after(x if self.rnn is None else self.rnn(x)[0])  # type: ignore[no-any-return]

    model = torch.compile(Model())
    x = torch.randn(T, 8, 32)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        model(x).square().sum().backward()
        seconds.append(time.perf_counter() - start)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"compile_s": float(f"{seconds[0] - seconds[1]:.4g}"), "graphs": graphs}


def in_fresh_process(*arguments: object) -> dict[str, float]:
    """Without what an earlier compilation left in a cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--one", json.dumps(arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """Measures, prints a table and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["LSTM", "GRU", "RNN"])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 100], metavar="T")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return

    table = Table("cell", "T", "contender", "what it compiles", "graphs", "s")
    rows = []
    for cell in options.cells:
        for T in options.steps:
            for contender in options.contenders:
                result = in_fresh_process(contender, cell, T, options.layers)
                what = {"cell": cell, "T": T, "L": options.layers, "contender": contender}
                rows.append(asdict(Conditions.now("cpu")) | what | result)
                table.add_row(
                    *(cell, str(T), contender, CONTENDERS[contender]),
                    *(f"{result['graphs']:.0f}", f"{result['compile_s']:.2f}"),
                )
    Console().print(table)
    if options.csv:
        append_csv(options.csv, rows)


if __name__ == "__main__":
    main()
