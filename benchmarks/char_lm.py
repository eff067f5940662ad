# SPDX-License-Identifier: BSD-3-Clause
"""The real task: a character language model of Python source, trained once on torch.nn.LSTM and once on fastrnn.LSTM.

Both models start from the same weights and see the same batches. They train in alternating blocks of steps, so that
what disturbs the machine slows both.
"""

from __future__ import annotations

import statistics
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from plots import plot_training, running_mean
from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

CHARACTERS = 1_500_000
T, B, EMBEDDING, HIDDEN, LAYERS = 100, 32, 64, 256, 1
LEARNING_RATE, CLIP = 4e-3, 1.0
STEPS, BLOCK = 400, 10
# On a slow or busy machine training ends earlier.
TIME_LIMIT_S = 90.0
# Two correct implementations round differently in the last bit, and training amplifies that. torch.nn beside itself
# with initial weights one unit in the last place off (`--control`) differed by 2e-7 in the first 25 losses, by 0.2 % in
# means of 25 losses after 400 steps. A sign error in one row of 1024 of one gradient differs by 1e-3 in the first 25.
WINDOW = 25
FIRST_LOSSES_TOLERANCE = 1e-5
MEANS_TOLERANCE = 0.01
OTHER = "\N{REPLACEMENT CHARACTER}"


class CharModel(nn.Module):
    """Embedding, LSTM, linear: the next character of a text."""

    def __init__(self, lstm: type[nn.Module], vocabulary: int) -> None:
        """Takes the LSTM class and the number of characters."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.lstm = lstm(EMBEDDING, HIDDEN, LAYERS)
        self.head = nn.Linear(HIDDEN, vocabulary)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits (T, B, vocabulary) and the last state for characters (T, B)."""
        h, state = self.lstm(self.embedding(x), state)
        return self.head(h), state


def read_corpus() -> tuple[Tensor, list[str]]:
    """The standard library's top-level modules by name, as indices, and the alphabet they point into.

    Raises:
        FileNotFoundError: This Python has no source of its library.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for file in sorted(library.glob("*.py")):
        text += file.read_text(encoding="utf-8", errors="replace")
        if len(text) >= CHARACTERS:
            break
    if not text:
        raise FileNotFoundError(f"no source files of the standard library in {library}")
    counts = Counter(text)
    alphabet = [OTHER, *sorted(character for character, count in counts.items() if count >= 20 and character != OTHER)]
    index = {character: k for k, character in enumerate(alphabet)}
    return torch.tensor([index.get(character, 0) for character in text[:CHARACTERS]]), alphabet


class Trainer:
    """One model with its optimiser, its losses and the time it took."""

    def __init__(self, model: CharModel, corpus: Tensor) -> None:
        """Takes the model, on its device, and the corpus, on the same."""
        self.model, self.corpus = model, corpus
        self.optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        self.losses: list[float] = []
        self.block_s: list[float] = []
        self._positions = torch.Generator().manual_seed(1)

    def train_block(self, steps: int) -> None:
        """Trains some steps on batches of random places in the corpus, the same ones for every trainer."""
        offsets = torch.arange(T + 1, device=self.corpus.device)[:, None]
        _synchronise(self.corpus.device)
        start = time.perf_counter()
        losses = []
        for _ in range(steps):
            begin = torch.randint(len(self.corpus) - T, (B,), generator=self._positions).to(self.corpus.device)
            batch = self.corpus[begin + offsets]
            logits, _ = self.model(batch[:-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[1:].flatten())
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimiser.step()
            losses.append(loss.detach())
        _synchronise(self.corpus.device)
        self.block_s.append((time.perf_counter() - start) / steps)
        self.losses += torch.stack(losses).tolist()

    @property
    def smoothed(self) -> list[float]:
        """Mean losses of WINDOW steps, from each step on."""
        return running_mean(self.losses, WINDOW)

    @property
    def characters_per_second(self) -> float:
        """By the median block."""
        return T * B / statistics.median(self.block_s)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def write_text(model: CharModel, alphabet: list[str], start: str, length: int) -> str:
    """Draws characters one by one, the state carried along, a little colder than the model's distribution."""
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(2)
    text, state = start, None
    x = torch.tensor([[alphabet.index(character)] for character in start], device=device)
    for _ in range(length):
        logits, state = model(x, state)
        weights = torch.softmax(logits[-1, 0].cpu() / 0.7, 0)
        choice = int(torch.multinomial(weights, 1, generator=generator))
        text += alphabet[choice]
        x = torch.tensor([[choice]], device=device)
    return text


def train(trainers: Iterable[Trainer], steps: int, console: Console) -> None:
    """Trains in alternating blocks, each round in the opposite order, until the steps or the time are used up."""
    order = list(trainers)
    deadline = time.perf_counter() + TIME_LIMIT_S
    for begin in track(range(0, steps, BLOCK), "training", console=console, transient=True):
        if begin >= WINDOW and time.perf_counter() > deadline:
            console.print(f"Time limit: training ends after {begin} of {steps} steps.", style="bold")
            break
        for trainer in order:
            trainer.train_block(min(BLOCK, steps - begin))
        order.reverse()


def print_comparison(trainers: dict[str, Trainer], console: Console) -> bool:
    """Prints losses and speeds of two trainers, the baseline first. Returns whether the losses agree."""
    theirs, ours = trainers.values()
    means = list(zip(theirs.smoothed, ours.smoothed, strict=True))
    table = Table(title=f"Loss in nats per character, means of {WINDOW} steps", title_justify="left")
    for heading in ("steps", *trainers, "difference"):
        table.add_column(heading, justify="right")
    last = len(means) - 1
    for k in sorted({*range(0, last, max(1, len(ours.losses) // 8)), last}):
        a, b = means[k]
        table.add_row(f"{k + 1}-{k + WINDOW}", f"{a:.4f}", f"{b:.4f}", f"{b / a - 1:+.3%}")
    a, b = theirs.characters_per_second, ours.characters_per_second
    table.add_section()
    table.add_row("characters/s", f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.2f} x")
    console.print(table)

    first_differences = [abs(b / a - 1) for a, b in zip(theirs.losses[:WINDOW], ours.losses[:WINDOW], strict=True)]
    differences = [abs(b / a - 1) for a, b in means]
    # Not by the maximum: max() can step over a NaN, a comparison cannot.
    agree = all(difference <= FIRST_LOSSES_TOLERANCE for difference in first_differences)
    agree &= all(difference <= MEANS_TOLERANCE for difference in differences)
    console.print(
        f"Largest difference: {max(first_differences):.0e} in the first {WINDOW} losses "
        f"(limit {FIRST_LOSSES_TOLERANCE:.0e}), {max(differences):.2%} in the means (limit {MEANS_TOLERANCE:.0%}). "
        + ("They agree." if agree else "THEY DO NOT AGREE."),
        style="bold" if agree else "bold red",
    )
    return agree


def run(console: Console, device: str, steps: int, control: bool, picture: Path) -> bool:
    """Trains both models, shows losses, speed and a sample of text. Returns whether the losses agree."""
    import fastrnn

    corpus, alphabet = read_corpus()
    corpus = corpus.to(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    first = CharModel(nn.LSTM, len(alphabet)).to(device)
    second = CharModel(nn.LSTM if control else fastrnn.LSTM, len(alphabet)).to(device)
    second.load_state_dict(first.state_dict())
    if control:
        with torch.no_grad():
            for weight in second.lstm.parameters():
                weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    names = ("torch.nn", "torch.nn, 1 ulp off" if control else "fastrnn")
    trainers = dict(zip(names, (Trainer(first, corpus), Trainer(second, corpus)), strict=True))
    console.print(
        f"\nCharacter language model of Python's standard library: {len(corpus):,} characters, "
        f"{len(alphabet)} distinct; embedding {EMBEDDING}, LSTM {HIDDEN} x {LAYERS}, linear; "
        f"batches T={T} B={B}; Adam; fp32; {torch.get_num_threads()} threads"
    )
    train(trainers.values(), steps, console)
    agree = print_comparison(trainers, console)
    if agree:
        sample = write_text(second, alphabet, "def ", 400)
        console.print(Panel(Text(sample), title=f"Written by the {names[1]} model", title_align="left"))
    losses = {name: trainer.losses for name, trainer in trainers.items()}
    speeds = {name: trainer.characters_per_second for name, trainer in trainers.items()}
    plot_training(losses, speeds, WINDOW, (FIRST_LOSSES_TOLERANCE, MEANS_TOLERANCE), picture)
    console.print(f"Plot: {picture}")
    return agree
