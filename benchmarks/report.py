# SPDX-License-Identifier: BSD-3-Clause
"""How it is told: a row per measurement, in a CSV file, in tables on the terminal and as Markdown for the README."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from cases import Case, Shape
from machine import Conditions
from measure import Timing
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

K = TypeVar("K")

PERCENTILES = ("p20", "p50", "p80")
WIN, LOSS, OPEN = "▲", "▼", "≈"
LEGEND = (
    f"ratio = time of the baseline / time of fastrnn, medians.  {WIN} faster  {LOSS} slower  "
    f"{OPEN} not resolved: the 20-80 % ranges overlap"
)


@dataclass(frozen=True)
class Row:
    """One measurement of fastrnn beside one baseline."""

    conditions: Conditions
    case: Case
    path: str
    baseline: str
    clock: str
    ours: Timing
    theirs: Timing | None
    peak_mib: float | None
    baseline_peak_mib: float | None
    floor_ms: float | None
    note: str

    @property
    def ratio(self) -> float | None:
        """Time of the baseline over time of fastrnn."""
        return self.theirs.p50 / self.ours.p50 if self.theirs else None

    @property
    def verdict(self) -> str:
        """WIN or LOSS when the ranges from p20 to p80 are apart, else OPEN; nothing without a baseline's time."""
        if not self.theirs:
            return ""
        if self.theirs.p20 > self.ours.p80:
            return WIN
        return LOSS if self.theirs.p80 < self.ours.p20 else OPEN

    @property
    def setting(self) -> str:
        """What the rows of one table have in common beside device and baseline."""
        clock = {"wall": "wall clock", "cpu": "CPU clock", "cuda": "eager", "cuda-graph": "CUDA graph"}[self.clock]
        threads = f"{self.case.threads} thread{'s' * (self.case.threads > 1)}, " if self.case.device == "cpu" else ""
        return f"{self.case.dtype}, {threads}{clock}"

    def to_csv(self) -> dict[str, str]:
        """The row's columns in the CSV file; an empty text stands for what was not measured."""
        s, ours, theirs = self.case.shape, self.ours, self.theirs
        values: dict[str, object] = {
            **asdict(self.conditions),
            **{name: getattr(self.case, name) for name in ("cell", "mode", "dtype")},
            **{name: getattr(s, name) for name in "TBIHLD"},
            "packed": s.shortest,
            "path": self.path,
            "baseline": self.baseline,
            "threads": self.case.threads,
            "clock": self.clock,
            "samples": ours.samples,
            **{f"{name}_ms": getattr(ours, name) for name in PERCENTILES},
            **{f"baseline_{name}_ms": theirs and getattr(theirs, name) for name in PERCENTILES},
            "ratio": self.ratio,
            "us_per_step": 1e3 * ours.p50 / s.T,
            "peak_mib": self.peak_mib,
            "baseline_peak_mib": self.baseline_peak_mib,
            "floor_ms": self.floor_ms,
            "note": self.note,
        }
        texts = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in values.items()}
        return {name: "" if text is None else str(text) for name, text in texts.items()}

    @classmethod
    def from_csv(cls, columns: dict[str, str]) -> Row:
        """Reads what `to_csv` gave."""

        def number(name: str) -> float | None:
            return float(columns[name]) if columns[name] else None

        def timing(prefix: str) -> Timing | None:
            if not columns[f"{prefix}p50_ms"]:
                return None
            p20, p50, p80 = (float(columns[f"{prefix}{name}_ms"]) for name in PERCENTILES)
            return Timing(p20, p50, p80, int(columns["samples"]))

        ours = timing("")
        if ours is None:
            raise ValueError("a row without the time of fastrnn")
        T, B, I, H, L, D = (int(columns[name]) for name in "TBIHLD")  # noqa: E741
        shape = Shape(T, B, I, H, L, D, int(columns["packed"]) if columns["packed"] else None)
        clock = columns["clock"]
        case = Case(
            cell=columns["cell"],
            shape=shape,
            dtype=columns["dtype"],
            mode=columns["mode"],
            device="cuda" if clock.startswith("cuda") else "cpu",
            threads=int(columns["threads"]),
            graph=clock == "cuda-graph",
        )
        return cls(
            conditions=Conditions(*(columns[field.name] for field in fields(Conditions))),
            case=case,
            path=columns["path"],
            baseline=columns["baseline"],
            clock=clock,
            ours=ours,
            theirs=timing("baseline_"),
            peak_mib=number("peak_mib"),
            baseline_peak_mib=number("baseline_peak_mib"),
            floor_ms=number("floor_ms"),
            note=columns["note"],
        )


class FormatError(Exception):
    """A file is not one of this program's."""


def read_csv(path: Path) -> list[Row]:
    """Reads the rows of a file.

    Raises:
        FormatError: The file is not one of this program's.
    """
    with path.open(newline="") as file:
        try:
            return [Row.from_csv(columns) for columns in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} does not hold rows of this program ({error!r}); name another file") from error


def append_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows, at least one, to a file, which is made when it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def grouped(rows: Iterable[Row], key: Callable[[Row], K]) -> dict[K, list[Row]]:
    """Rows by key, both in order of appearance."""
    groups: dict[K, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def geometric_mean(rows: Iterable[Row]) -> float:
    """Geometric mean of the ratios; nan without any."""
    logs = [math.log(row.ratio) for row in rows if row.ratio]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def _milliseconds(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:#.4g}".rstrip(".")


def _ratio(row: Row) -> Text:
    style = {WIN: "green", LOSS: "bold red", OPEN: "yellow"}[row.verdict]
    return Text(f"{row.ratio:.2f} {row.verdict}", style=style)


def _cells(row: Row | None, floor: bool) -> list[RenderableType]:
    if row is None:
        return [""] * (4 if floor else 3)
    if row.theirs is None:
        cells: list[RenderableType] = [_milliseconds(row.ours.p50), "n/a", ""]
    else:
        cells = [_milliseconds(row.ours.p50), _milliseconds(row.theirs.p50), _ratio(row)]
    return cells + ([f"{row.floor_ms / row.ours.p50:.0%}" if row.floor_ms else ""] if floor else [])


def print_tables(console: Console, rows: list[Row]) -> None:
    """Prints every ratio and the geometric means, in one table per baseline and setting, or more if it is wide."""
    at_once = max(1, (console.width - 32) // 36)
    for (baseline, setting), group in grouped(rows, lambda row: (row.baseline, row.setting)).items():
        modes = list(grouped(group, lambda row: row.case.mode))
        for k in range(0, len(modes), at_once):
            console.print(_table(f"fastrnn and {baseline}: {setting}", group, modes[k : k + at_once]))
    console.print(LEGEND, style="dim")
    if any(row.floor_ms for row in rows):
        console.print("limit = least time by the machine's measured peaks / time of fastrnn", style="dim")
    for row in (row for row in rows if not row.theirs):
        console.print(f"n/a: {row.baseline}, {row.case}: {row.note}", style="dim")
    console.print(_tally(row for row in rows if row.theirs), style="bold")


def _table(title: str, rows: list[Row], modes: list[str]) -> Table:
    floor = any(row.floor_ms for row in rows)
    style: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD}
    table = Table(title=title, padding=(0, 1, 0, 0), **style)
    for heading in ("cell", "T,B,H or T,B,I,H"):
        table.add_column(f"\n{heading}", no_wrap=True)
    for mode in modes:
        for heading in (f"{mode} ms\nfastrnn", f"\n{rows[0].baseline}", "\nratio", *(["\nlimit"] * floor)):
            table.add_column(heading, justify="right", no_wrap=True)
    for cell, of_cell in grouped(rows, lambda row: row.case.cell).items():
        for shape, of_shape in grouped(of_cell, lambda row: str(row.case.shape)).items():
            by_mode = {row.case.mode: row for row in of_shape}
            table.add_row(cell, shape, *(text for mode in modes for text in _cells(by_mode.get(mode), floor)))
        means: list[RenderableType] = []
        for mode in modes:
            mean = geometric_mean(row for row in of_cell if row.case.mode == mode)
            means += ["", "", Text("" if math.isnan(mean) else f"{mean:.2f}  ", style="bold"), *([""] * floor)]
        table.add_row("", Text("geometric mean", style="bold"), *means, end_section=True)
    return table


def markdown(rows: list[Row]) -> str:
    """The README's tables, conditions below. Of a case measured more than once, the last measurement counts."""
    parts = []
    for of_device in grouped(rows, lambda row: row.conditions.device).values():
        for (baseline, setting), group in grouped(of_device, lambda row: (row.baseline, row.setting)).items():
            last = {(str(row.case.shape), row.case.cell, row.case.mode): row for row in group if row.ratio is not None}
            if not last:
                continue
            modes = dict.fromkeys(mode for _, _, mode in last)
            columns = [(cell, m) for m in modes for cell in dict.fromkeys(cell for _, cell, mode in last if mode == m)]
            lines = [
                f"**Against {baseline}, {setting}** (time of {baseline} / time of fastrnn; in brackets fastrnn's ms)",
                "",
                "| T,B,H | " + " | ".join(f"{cell.upper()} {mode}" for cell, mode in columns) + " |",
                "|---|" + "---:|" * len(columns),
            ]
            for shape in dict.fromkeys(shape for shape, _, _ in last):
                found = [last.get((shape, *column)) for column in columns]
                values = [
                    f"{row.ratio:.2f} {row.verdict} ({_milliseconds(row.ours.p50)})" if row else "" for row in found
                ]
                lines.append(f"| {shape} | " + " | ".join(values) + " |")
            means = [geometric_mean(row for key, row in last.items() if key[1:] == column) for column in columns]
            lines.append("| geometric mean | " + " | ".join(f"**{mean:.2f}**" for mean in means) + " |")
            lines += ["", _tally(last.values())]
            parts.append("\n".join(lines))
        parts.append(_conditions(of_device))
    return "\n\n".join([*parts, " ".join(LEGEND.split()) + "."])


def _tally(rows: Iterable[Row]) -> str:
    verdicts = Counter(row.verdict for row in rows)
    return f"{verdicts.total()} ratios: {verdicts[WIN]} faster, {verdicts[OPEN]} not resolved, {verdicts[LOSS]} slower."


def _conditions(rows: list[Row]) -> str:
    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(row.conditions, name)) for row in rows))

    cuda = f", CUDA {values('cuda')}, cuDNN {values('cudnn')}" if rows[0].conditions.cuda else ""
    days = ", ".join(dict.fromkeys(row.conditions.date.split(" ")[0] for row in rows))
    return (
        f"Conditions: {values('device')}; torch {values('torch')}{cuda}; Python {values('python')}; "
        f"commit {values('commit')}; {days}; one process, samples interleaved, medians."
    )
