# SPDX-License-Identifier: BSD-3-Clause
"""Forecasts sunspot numbers: 300 years of observations from statsmodels, a GRU of fastrnn and one of torch.nn.

    python examples/forecast_sunspots.py
    python examples/forecast_sunspots.py --cell LSTM --steps 100 --plot forecast.png

At each year the network says what the next one will bring. It learns from the years before 1950 and is measured on
those after. From 1990 on it also runs free: what it forecast is its next input. Both networks start from the same
weights and see the same batches. Training is short, because so short a series is soon known by heart.
Needs matplotlib, rich and statsmodels: pip install 'fastrnn[examples]'
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from statsmodels.datasets import sunspots
from torch import Tensor, nn

import fastrnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TRAINED_UNTIL, FREE_FROM = 1950, 1990
BATCH, WINDOW = 16, 100


class Forecaster(nn.Module):
    """A recurrent layer and a linear one: the next value of a series."""

    def __init__(self, library: ModuleType, cell: str, hidden: int) -> None:
        """Takes fastrnn or torch.nn, the name of a class in it, and the hidden size."""
        super().__init__()
        self.rnn = getattr(library, cell)(1, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, state: object = None) -> tuple[Tensor, object]:
        """Forecasts (T, B, 1) of the values after x (T, B, 1), and the last state."""
        h, state = self.rnn(x, state)
        return x + self.head(h), state


@dataclass
class Result:
    """What one library's network did."""

    losses: list[float]
    seconds: float
    one_step: Tensor  # forecasts of all years but the first
    free: Tensor  # forecasts from FREE_FROM on


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cell", choices=("RNN", "GRU", "LSTM"), default="GRU")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("sunspots.png"))
    return parser.parse_args()


def train(library: ModuleType, series: Tensor, years: Tensor, args: argparse.Namespace) -> Result:
    """Trains on random windows of the years before TRAINED_UNTIL, then forecasts."""
    torch.manual_seed(args.seed)
    model = Forecaster(library, args.cell, args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    known = series[years < TRAINED_UNTIL]
    losses, begin = [], time.perf_counter()
    for _ in track(range(args.steps), f"training {library.__name__}", transient=True):
        windows = torch.randint(len(known) - WINDOW, (BATCH,)) + torch.arange(WINDOW + 1)[:, None]
        x = known[windows].unsqueeze(-1)
        forecast, _ = model(x[:-1])
        loss = nn.functional.mse_loss(forecast, x[1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin

    with torch.inference_mode():
        one_step, _ = model(series[:-1, None, None])
        forecast, state = model(series[years < FREE_FROM][:, None, None])
        free = [forecast[-1:]]
        while len(free) < int((years >= FREE_FROM).sum()):
            forecast, state = model(free[-1], state)
            free.append(forecast)
    return Result(losses, seconds, one_step.flatten(), torch.cat(free).flatten())


def to_series(counts: Tensor) -> Tensor:
    """Roots, whose noise is even, about zero and one in size."""
    return counts.sqrt() / 5 - 1


def to_counts(series: Tensor) -> Tensor:
    """The inverse of `to_series`."""
    return ((series + 1) * 5).clamp(min=0).square()


def draw(counts: Tensor, years: Tensor, results: dict[str, Result], path: Path) -> None:
    """The last century with both forecasts, and the losses of both libraries."""
    figure, (top, bottom) = plt.subplots(2, figsize=(9, 6.5), height_ratios=(2, 1), layout="constrained")
    ours = results["fastrnn"]
    shown = years >= 1900
    top.plot(years[shown], counts[shown], color="0.6", linewidth=5, alpha=0.5, label="observed")
    top.plot(years[1:][shown[1:]], to_counts(ours.one_step)[shown[1:]], color="#0072B2", label="forecast a year ahead")
    free_years = years[years >= FREE_FROM]
    top.plot(free_years, to_counts(ours.free), color="#D55E00", label=f"running free from {FREE_FROM}")
    top.axvspan(1900, TRAINED_UNTIL, color="0.95", zorder=0)
    top.text(1901, counts.max(), "learned from", va="top", color="0.4")
    top.set_xlim(1900, years.max())
    top.set_ylabel("sunspots, mean of the year")
    top.legend(frameon=False, loc="upper right")
    colours = {"fastrnn": "#0072B2", "torch.nn": "#E69F00"}
    for (name, result), width in zip(results.items(), (4, 1.2), strict=True):
        bottom.semilogy(result.losses, color=colours[name], linewidth=width, label=f"{name}, {result.seconds:.1f} s")
    bottom.set_xlabel("step of training")
    bottom.set_ylabel("mean square error")
    bottom.legend(frameon=False)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains both networks, prints their errors and draws the forecasts."""
    args = parse_arguments()
    data = sunspots.load_pandas().data
    years, counts = (torch.tensor(data[column].to_numpy(), dtype=torch.float32) for column in ("YEAR", "SUNACTIVITY"))
    series = to_series(counts)
    results = {library.__name__: train(library, series, years, args) for library in (fastrnn, nn)}

    later, free = years >= TRAINED_UNTIL, years >= FREE_FROM
    table = Table(title=f"Error (root of the mean square) in sunspots, {TRAINED_UNTIL} to {int(years.max())}")
    for heading in ("forecast by", "a year ahead", f"running free from {FREE_FROM}", "training"):
        table.add_column(heading, justify="left" if heading == "forecast by" else "right")

    def error(forecast: Tensor, observed: Tensor) -> str:
        return f"{(forecast - observed).square().mean().sqrt():.1f}"

    last_year = counts[years == FREE_FROM - 1]
    table.add_row("the year before", error(counts[:-1][later[1:]], counts[later]), error(last_year, counts[free]), "")
    for name, result in results.items():
        ahead = error(to_counts(result.one_step)[later[1:]], counts[later])
        table.add_row(name, ahead, error(to_counts(result.free), counts[free]), f"{result.seconds:.1f} s")
    console = Console()
    console.print(table)
    draw(counts, years, results, args.plot)
    console.print(f"Plot: {args.plot}")


if __name__ == "__main__":
    main()
