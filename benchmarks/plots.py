# SPDX-License-Identifier: BSD-3-Clause
"""Pictures: the ratios of a run, and the loss curves of the character language model."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
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
# Two equal float32 losses are drawn as one unit in the last place apart: a logarithmic axis has no zero.
SMALLEST_DIFFERENCE = 1e-7
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
        figsize=(2.0 + 4.6 * max(2, len(modes)), 1.3 + sum(0.8 + 0.36 * height for height in heights)),
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


def running_mean(values: list[float], window: int) -> list[float]:
    """Means of `window` values, from each one on."""
    return [fmean(values[k : k + window]) for k in range(len(values) - window + 1)]


def plot_training(
    losses: dict[str, list[float]], speeds: dict[str, float], window: int, limits: tuple[float, float], path: Path
) -> None:
    """Draws two training runs: losses, how far they are apart, and speed.

    Args:
        losses: Loss per step by name, the baseline first.
        speeds: Characters per second by name.
        window: Steps that a mean covers.
        limits: Largest relative difference allowed, of each of the first `window` losses and of the means.
        path: PNG to write.
    """
    figure, axes = plt.subplot_mosaic(
        [["loss", "speed"], ["difference", "speed"]],
        figsize=(10, 6.5),
        width_ratios=[4, 1],
        height_ratios=[3, 2],
        layout="constrained",
    )
    loss, difference, speed = axes["loss"], axes["difference"], axes["speed"]
    theirs, ours = losses.values()
    steps = range(1, len(ours) + 1)
    centres = [k + (window + 1) / 2 for k in range(len(ours) - window + 1)]
    for name, colour, style in zip(losses, ("#D55E00", "#0072B2"), ("solid", (0, (3, 3))), strict=True):
        loss.plot(steps, losses[name], color=colour, alpha=0.25, linewidth=0.7)
        means = running_mean(losses[name], window)
        loss.plot(centres, means, color=colour, linestyle=style, linewidth=2, label=f"{name}, mean of {window} steps")
        speed.bar_label(speed.bar(name, speeds[name] / 1e3, color=colour), fmt="%.1f")
    loss.set_ylabel("loss, nats per character")
    loss.set_title("The same model, seed and batches", fontsize=11, loc="left")
    loss.legend(frameon=False)
    for x, label, a, b, width in (
        (steps, "single losses", theirs, ours, 0.7),
        (centres, f"means of {window} steps", running_mean(theirs, window), running_mean(ours, window), 1.8),
    ):
        apart = [max(abs(q / p - 1), SMALLEST_DIFFERENCE) for p, q in zip(a, b, strict=True)]
        difference.plot(x, apart, color="0.2", linewidth=width, label=label)
    for limit, last, style, label in (
        (limits[0], window, "-", f"limit of the first {window} losses"),
        (limits[1], len(ours), "--", "limit of the means"),
    ):
        difference.plot([1, last], [limit, limit], color="#CC79A7", linestyle=style, label=label)
    difference.set_yscale("log")
    difference.set_ylabel("relative difference")
    difference.set_xlabel("training step")
    difference.sharex(loss)
    difference.legend(frameon=False, ncols=2, fontsize=8)
    speed.set_title("thousand characters/s", fontsize=11, loc="left")
    for ax in axes.values():
        ax.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
