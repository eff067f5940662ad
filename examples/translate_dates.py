# SPDX-License-Identifier: BSD-3-Clause
"""Translates dates as people write them into ISO dates: an encoder and a decoder with attention.

    python examples/translate_dates.py
    python examples/translate_dates.py --steps 1000 --plot dates.png

"Saturday, 21st of November 2026" becomes "2026-11-21", character by character. The encoder is a bidirectional GRU over
packed sequences. The decoder is a GRU whose every state looks at those of the encoder: which, shows the plot. While it
learns, the decoder is given the true characters, so that a whole sequence runs in one call; to translate, it is given
its own. A model of fastrnn and one of torch.nn start from the same weights, see the same batches, and are tested on
days that they have not seen. The dates come from the standard library. Needs matplotlib and rich:
pip install 'fastrnn[examples]'
"""

from __future__ import annotations

import argparse
import calendar
import random
import time
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import fastrnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BEGIN = 1  # beside 0, which pads
CHARACTERS = "0123456789-/., abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
INDEX = {character: k for k, character in enumerate(CHARACTERS, 2)}
SYMBOLS = 2 + len(CHARACTERS)
ISO_LENGTH = len("2026-11-21")


class Translator(nn.Module):
    """Encoder, decoder, and attention between them."""

    def __init__(self, library: ModuleType, hidden: int) -> None:
        """Takes fastrnn or torch.nn and the hidden size."""
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, hidden)
        self.encoder = library.GRU(hidden, hidden, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.key = nn.Linear(2 * hidden, hidden)
        self.decoder = library.GRU(hidden, hidden)
        self.head = nn.Sequential(nn.Linear(3 * hidden, hidden), nn.Tanh(), nn.Linear(hidden, SYMBOLS))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """For texts (S, B): the encoder's states (S, B, 2H), and the decoder's first state (1, B, H)."""
        lengths = (source > 0).sum(0).cpu()
        packed = pack_padded_sequence(self.embedding(source), lengths, enforce_sorted=False)
        states, last = self.encoder(packed)
        return pad_packed_sequence(states)[0], self.bridge(torch.cat([*last], -1)).tanh().unsqueeze(0)

    def decode(self, source: Tensor, states: Tensor, given: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For given characters (T, B): scores of the next ones (T, B, symbols), attention (B, T, S), and the state."""
        output, h = self.decoder(self.embedding(given), h)
        scores = torch.einsum("tbh,sbh->bts", output, self.key(states))
        attention = scores.masked_fill((source == 0).T.unsqueeze(1), -torch.inf).softmax(-1)
        context = torch.einsum("bts,sbh->tbh", attention, states)
        return self.head(torch.cat([output, context], -1)), attention, h

    @torch.inference_mode()
    def translate(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest characters (T, B), one after the other, and where each looked (B, T, S)."""
        states, h = self.encode(source)
        written, looks = [torch.full_like(source[:1], BEGIN)], []
        for _ in range(ISO_LENGTH):
            scores, attention, h = self.decode(source, states, written[-1], h)
            written.append(scores.argmax(-1))
            looks.append(attention)
        return torch.cat(written[1:]), torch.cat(looks, 1)


@dataclass
class Result:
    """What one library's model did."""

    losses: list[float]
    seconds: float
    translations: list[str]  # of the test dates
    attention: Tensor  # (B, T, S)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("dates.png"))
    return parser.parse_args()


def write(day: date, style: random.Random) -> str:
    """A date as somebody might write it. In numbers alone, the day comes first."""
    month, weekday = calendar.month_name[day.month], calendar.day_name[day.weekday()]
    ending = "th" if 11 <= day.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return style.choice(
        (
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{weekday}, {day.day}{ending} of {month} {day.year}",
            f"{weekday[:3]} {month[:3]} {day.day} {day.year}",
            f"{day.day:02}.{day.month:02}.{day.year}",
            f"{day.day}/{day.month}/{day.year % 100:02}",
        )
    )


def draw_pairs(days: list[date], count: int, style: random.Random) -> tuple[list[str], list[str]]:
    """Texts of random days, and the same in ISO form."""
    chosen = style.choices(days, k=count)
    return [write(day, style) for day in chosen], [day.isoformat() for day in chosen]


def to_tensor(texts: list[str]) -> Tensor:
    """Indices of the characters, padded with 0: (length, texts)."""
    return pad_sequence([torch.tensor([INDEX[character] for character in text]) for text in texts])


def train(library: ModuleType, days: list[date], tests: list[str], args: argparse.Namespace) -> Result:
    """Trains on random texts of days, then translates the tests."""
    torch.manual_seed(args.seed)
    style = random.Random(args.seed)
    model = Translator(library, args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    losses, begin = [], time.perf_counter()
    for _ in track(range(args.steps), f"training {library.__name__}", transient=True):
        texts, dates = draw_pairs(days, args.batch, style)
        source, target = to_tensor(texts), to_tensor(dates)
        given = torch.cat([torch.full_like(target[:1], BEGIN), target[:-1]])
        states, h = model.encode(source)
        scores, _, _ = model.decode(source, states, given, h)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin
    written, attention = model.translate(to_tensor(tests))
    translations = ["".join(CHARACTERS[k - 2] if k >= 2 else "?" for k in column) for column in written.T.tolist()]
    return Result(losses, seconds, translations, attention)


def draw(texts: list[str], results: dict[str, Result], path: Path) -> None:
    """Where the decoder looked, for one text of each form, and the losses of both libraries."""
    ours = results["fastrnn"]
    by_length = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    chosen = [by_length[0], by_length[len(texts) // 2], by_length[-1]]
    figure, axes = plt.subplot_mosaic("ab;cc;dd", figsize=(10, 10), layout="constrained", height_ratios=(1, 1, 0.8))
    for axis, k in zip((axes["a"], axes["b"], axes["c"]), chosen, strict=True):
        axis.imshow(ours.attention[k, :, : len(texts[k])], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(texts[k])), texts[k])
        axis.set_yticks(range(ISO_LENGTH), ours.translations[k])
        axis.tick_params(length=0)
        axis.set_title(f"{texts[k]}  →  {ours.translations[k]}", fontsize=10, loc="left")
    axis = axes["d"]
    colours = {"fastrnn": "#0072B2", "torch.nn": "#E69F00"}
    for (name, result), width in zip(results.items(), (4, 1.2), strict=True):
        axis.semilogy(result.losses, color=colours[name], linewidth=width, label=f"{name}, {result.seconds:.1f} s")
    axis.set_xlabel("step of training")
    axis.set_ylabel("loss, nats per character")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.suptitle("Where each character of the translation comes from (across: the text, down: the translation)")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains both models, prints how many dates they translate right, and draws where they look."""
    args = parse_arguments()
    console = Console()
    shuffled = random.Random(args.seed)
    days = [date(1950, 1, 1) + timedelta(k) for k in range(365 * 99)]
    shuffled.shuffle(days)
    days, unseen = days[1000:], days[:1000]
    texts, truth = [write(day, shuffled) for day in unseen], [day.isoformat() for day in unseen]
    results = {library.__name__: train(library, days, texts, args) for library in (fastrnn, nn)}

    table = Table()
    table.add_column("library")
    for heading in ("unseen dates right", "training"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        right = sum(a == b for a, b in zip(result.translations, truth, strict=True)) / len(truth)
        table.add_row(name, f"{right:.1%}", f"{result.seconds:.1f} s")
    console.print(table)
    for text, translation in zip(texts[:6], results["fastrnn"].translations[:6], strict=True):
        console.print(f"{text:>36}  →  {translation}", highlight=False)
    draw(texts, results, args.plot)
    console.print(f"Plot: {args.plot}")


if __name__ == "__main__":
    main()
