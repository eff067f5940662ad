# SPDX-License-Identifier: BSD-3-Clause
"""Reads handwritten digits row by row: 1797 images from scikit-learn, an LSTM of fastrnn and one of torch.nn.

    python examples/classify_digits.py
    python examples/classify_digits.py --cell RNN --epochs 10 --plot digits.png

An image is a sequence of eight rows of eight pixels. The last hidden state decides which digit it is; the plot shows
what the network believes after each row, for digits that it has not learned from. Both networks start from the same
weights and see the same batches. Needs matplotlib, rich and scikit-learn: pip install 'fastrnn[examples]'
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastrnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


class Reader(nn.Module):
    """A recurrent layer over the rows and a linear one: scores of the ten digits."""

    def __init__(self, library: ModuleType, cell: str, hidden: int) -> None:
        """Takes fastrnn or torch.nn, the name of a class in it, and the hidden size."""
        super().__init__()
        self.rnn = getattr(library, cell)(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores after each row, (B, 8, 10), for images (B, 8, 8)."""
        h, _ = self.rnn(images)
        return self.head(h)


@dataclass
class Result:
    """What one library's network did."""

    accuracies: list[float]  # on the test images, after each epoch
    seconds: float
    beliefs: Tensor  # probabilities of the digits after each row of the test images: (B, 8, 10)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cell", choices=("RNN", "GRU", "LSTM"), default="LSTM")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("digits.png"))
    return parser.parse_args()


def train(library: ModuleType, images: list[Tensor], labels: list[Tensor], args: argparse.Namespace) -> Result:
    """Trains on the first of both images and labels, measures on the second."""
    torch.manual_seed(args.seed)
    model = Reader(library, args.cell, args.hidden)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    accuracies, seconds = [], 0.0
    for _ in track(range(args.epochs), f"training {library.__name__}", transient=True):
        begin = time.perf_counter()
        for batch in torch.randperm(len(images[0])).split(args.batch):
            loss = nn.functional.cross_entropy(model(images[0][batch])[:, -1], labels[0][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += time.perf_counter() - begin
        with torch.inference_mode():
            beliefs = model(images[1]).softmax(-1)
        accuracies.append((beliefs[:, -1].argmax(-1) == labels[1]).double().mean().item())
    return Result(accuracies, seconds, beliefs)


def draw(images: Tensor, labels: Tensor, results: dict[str, Result], path: Path) -> None:
    """Test images beside what the network believes after each of their rows, and the accuracies of both libraries."""
    ours = results["fastrnn"]
    right = ours.beliefs[:, -1].argmax(-1) == labels
    chosen = [
        int((right & (labels == digit)).nonzero()[0]) for digit in (0, 3, 5, 6, 9) if (right & (labels == digit)).any()
    ]
    chosen += (~right).nonzero().flatten().tolist()[: 8 - len(chosen)]
    figure = plt.figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=(2.4, 1))
    axes = above.subplots(2, 8, width_ratios=(1, 1.25) * 4)
    for k, index in enumerate(chosen):
        image, belief = axes.flat[2 * k], axes.flat[2 * k + 1]
        image.imshow(images[index], cmap="gray_r", aspect="auto")
        belief.imshow(ours.beliefs[index], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        belief.set_xticks(range(10))
        belief.tick_params(length=0, labelsize=7)
        guess = int(ours.beliefs[index, -1].argmax())
        image.set_title(f"{int(labels[index])}", fontsize=10)
        belief.set_title(f"read as {guess}", fontsize=10, color="black" if guess == labels[index] else "#D55E00")
        image.set_xticks([])
        image.set_yticks([])
        belief.set_yticks([])
    for axis in axes.flat[2 * len(chosen) :]:
        axis.set_visible(False)
    above.suptitle("Test images, and the belief in each digit after each row, from top to bottom", fontsize=11)
    axis = below.subplots()
    colours = {"fastrnn": "#0072B2", "torch.nn": "#E69F00"}
    for (name, result), width in zip(results.items(), (5, 1.5), strict=True):
        label = f"{name}: {result.accuracies[-1]:.1%}, {result.seconds:.1f} s"
        axis.plot(
            range(1, 1 + len(result.accuracies)), result.accuracies, color=colours[name], linewidth=width, label=label
        )
    axis.set_xlabel("epoch")
    axis.set_ylabel("accuracy on test images")
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains both networks, prints their accuracies and draws what they believe."""
    args = parse_arguments()
    data = load_digits()
    parts = train_test_split(data.images / 16, data.target, test_size=0.25, random_state=args.seed)
    images, labels = [torch.tensor(part).float() for part in parts[:2]], [torch.tensor(part) for part in parts[2:]]
    results = {library.__name__: train(library, images, labels, args) for library in (fastrnn, nn)}

    console = Console()
    console.print(
        f"{args.cell} with {args.hidden} units, {len(images[0])} images to learn from, {len(images[1])} to test"
    )
    table = Table()
    table.add_column("library")
    for heading in ("accuracy", "training"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(name, f"{result.accuracies[-1]:.1%}", f"{result.seconds:.1f} s")
    console.print(table)
    draw(images[1], labels[1], results, args.plot)
    console.print(f"Plot: {args.plot}")


if __name__ == "__main__":
    main()
