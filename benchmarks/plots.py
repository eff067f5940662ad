# SPDX-License-Identifier: BSD-3-Clause
"""Pictures: the ratios of a run, and the loss curves of the character language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.artist import Artist  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator  # noqa: E402
from report import Row, geometric_mean, grouped  # noqa: E402

# Okabe and Ito's palette, told apart by every common form of colour vision; markers say the same once more.
COLOURS = {"lstm": "#0072B2", "gru": "#D55E00", "rnn": "#009E73"}
MARKERS = {"lstm": "o", "gru": "s", "rnn": "^"}


def plot_ratios(rows: list[Row], path: Path) -> None:
    """Draws one panel per mode (across) and per baseline and setting (down), one line per shape."""
    rows = [row for row in rows if row.theirs]
    settings = grouped(rows, lambda row: (row.baseline, row.setting))
    modes = list(grouped(rows, lambda row: row.case.mode))
    heights = [len(grouped(group, lambda row: str(row.case.shape))) for group in settings.values()]
    figure, axes = plt.subplots(
        len(settings),
        len(modes),
        figsize=(2.0 + 4.6 * len(modes), 1.3 + sum(0.8 + 0.36 * height for height in heights)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for across, ((baseline, setting), group) in zip(axes, settings.items(), strict=True):
        shapes = list(grouped(group, lambda row: str(row.case.shape)))
        for ax, mode in zip(across, modes, strict=True):
            of_mode = [row for row in group if row.case.mode == mode]
            ax.set_title(f"{mode} against {baseline} ({setting})", fontsize=10, loc="left")
            if of_mode:
                _draw_ratios(ax, of_mode, shapes)
            else:
                ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.4")
            ax.set_yticks(range(len(shapes)), shapes if ax is across[0] else [""] * len(shapes))
            ax.set_ylim(len(shapes) - 0.4, -0.6)
    low, high = axes[0][0].get_xlim()
    for ax in axes.flat:
        ax.axvspan(low, 1, color="0.94", zorder=0)
        ax.set_xlim(low, high)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelbottom=True)
        ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.xaxis.set_minor_locator(NullLocator())
    by_label: dict[str, Artist] = {}
    for ax in axes.flat:
        handles, labels = ax.get_legend_handles_labels()
        by_label |= dict(zip(labels, handles, strict=True))
    figure.legend(list(by_label.values()), list(by_label), loc="outside lower center", ncols=6, frameon=False)
    for ax in axes[-1]:
        ax.set_xlabel("time of the baseline / time of fastrnn")
    where = rows[0].conditions
    title = f"fastrnn on {where.device}, torch {where.torch}: how many times as fast (in the grey, slower)"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _save(figure, path)


def _draw_ratios(ax: Axes, rows: list[Row], shapes: list[str]) -> None:
    ax.set_xscale("log")
    ax.axvline(1, color="black", linewidth=1)
    cells = grouped(rows, lambda row: row.case.cell)
    for k, (cell, of_cell) in enumerate(cells.items()):
        y = [shapes.index(str(row.case.shape)) + 0.24 * (k - (len(cells) - 1) / 2) for row in of_cell]
        pairs = [(row.ours, row.theirs) for row in of_cell if row.theirs]
        ratio = [theirs.p50 / ours.p50 for ours, theirs in pairs]
        low = [r - theirs.p20 / ours.p80 for r, (ours, theirs) in zip(ratio, pairs, strict=True)]
        high = [theirs.p80 / ours.p20 - r for r, (ours, theirs) in zip(ratio, pairs, strict=True)]
        style: dict[str, Any] = {"color": COLOURS[cell], "marker": MARKERS[cell], "markersize": 5, "linestyle": "none"}
        ax.errorbar(ratio, y, xerr=[low, high], elinewidth=1, label=cell.upper(), **style)
        mean = geometric_mean(of_cell)
        ax.axvline(mean, color=COLOURS[cell], linewidth=1, linestyle=":", label=f"{cell.upper()}, geometric mean")
    ax.grid(axis="x", color="0.88", linewidth=0.6)
    ax.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_training(
    runs: dict[str, tuple[list[float], list[float], float]], window: int, tolerance: float, path: Path
) -> None:
    """Draws two training runs: losses, their relative difference, and speed.

    Args:
        runs: By name, the baseline first: loss per step, means over `window` steps, characters per second.
        window: Steps that a mean covers.
        tolerance: Relative difference of the means that is allowed.
        path: PNG to write.
    """
    (_, (_, theirs, _)), (_, (_, ours, _)) = runs.items()
    figure, axes = plt.subplot_mosaic(
        [["loss", "speed"], ["difference", "speed"]],
        figsize=(10, 5.5),
        width_ratios=[4, 1],
        height_ratios=[3, 1],
        layout="constrained",
    )
    loss, difference, speed = axes["loss"], axes["difference"], axes["speed"]
    steps = range(window, window + len(ours))
    for (name, (losses, means, rate)), colour, style in zip(
        runs.items(), ("#D55E00", "#0072B2"), ("solid", (0, (3, 3))), strict=True
    ):
        loss.plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.25, linewidth=0.7)
        loss.plot(steps, means, color=colour, linestyle=style, linewidth=2, label=f"{name} (mean of {window} steps)")
        bar = speed.bar(name, rate / 1e3, color=colour)
        speed.bar_label(bar, fmt="%.1f")
    loss.set_ylabel("loss, nats per character")
    loss.set_title("The same model, seed and batches", fontsize=11, loc="left")
    loss.legend(frameon=False)
    loss.sharex(difference)
    loss.tick_params(labelbottom=False)
    difference.plot(steps, [100 * (b / a - 1) for a, b in zip(theirs, ours, strict=True)], color="black", linewidth=1)
    difference.axhspan(-100 * tolerance, 100 * tolerance, color="0.92", label="allowed")
    difference.axhline(0, color="0.6", linewidth=0.8)
    difference.set_ylabel("difference, %")
    difference.set_xlabel("training step")
    difference.legend(frameon=False, loc="upper left")
    speed.set_title("thousand characters/s", fontsize=11, loc="left")
    for ax in axes.values():
        ax.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
