# SPDX-License-Identifier: BSD-3-Clause
"""Trains a language model of bytes on the sources of Python's standard library, with an LSTM of fastrnn.

    python examples/train_char_lm.py                                # one process
    torchrun --nproc-per-node 2 examples/train_char_lm.py           # several, on one global batch
    python examples/train_char_lm.py --steps 2000 --checkpoint lm.pt    # goes on where lm.pt ends

Every batch and every dropout mask follows from the seed and the number of the step. So a run that was interrupted and
resumed ends with the same bits as one that was not, and the number of processes changes nothing but rounding (and the
dropout masks). Needs rich: pip install rich.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastrnn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BYTES = 256


class ByteModel(nn.Module):
    """Embedding, LSTM, linear: scores of the next byte."""

    def __init__(self, hidden: int, layers: int, dropout: float) -> None:
        """Takes the hidden size, the number of layers, and the dropout between them."""
        super().__init__()
        self.embedding = nn.Embedding(BYTES, hidden)
        self.lstm = fastrnn.LSTM(hidden, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.head = nn.Linear(hidden, BYTES)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits (T, B, 256) and the last state, for bytes (T, B)."""
        h, state = self.lstm(self.embedding(x), state)
        return self.head(h), state


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="at the end of the run, those of a checkpoint included")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step, of all processes together")
    parser.add_argument("--length", type=int, default=100, help="bytes of a sequence")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--precision", choices=DTYPES, default="float32", help="of autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, help="resumed from where it exists, written every --save-every steps"
    )
    parser.add_argument("--save-every", type=int, default=100)
    return parser.parse_args()


def read_text() -> Tensor:
    """The top-level modules of the standard library, one after the other, as bytes."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(source.read_bytes() for source in sources)), dtype=torch.uint8).long()


def draw_batch(text: Tensor, args: argparse.Namespace, step: int, rank: int, processes: int) -> Tensor:
    """This process's share of the batch of a step: (length + 1, sequences)."""
    generator = torch.Generator().manual_seed(args.seed + step)
    begin = torch.randint(len(text) - args.length, (args.batch,), generator=generator)[rank::processes]
    return text[begin + torch.arange(args.length + 1)[:, None]]


def save(path: Path, **state: object) -> None:
    """Replaces the checkpoint in one step: an interruption leaves the old one or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


@torch.inference_mode()
def write_text(model: ByteModel, start: bytes, length: int, device: torch.device) -> str:
    """Draws bytes one by one, the state carried along."""
    model.eval()
    written, state = bytearray(start), None
    x = torch.tensor(list(start), device=device)[:, None]
    for _ in range(length):
        logits, state = model(x, state)
        x = torch.multinomial(torch.softmax(logits[-1] / 0.8, -1), 1).T
        written.append(int(x))
    return written.decode(errors="replace")


def main() -> None:
    """Trains, shows progress, saves checkpoints, and writes a sample."""
    args = parse_arguments()
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if args.batch % processes:
        raise SystemExit(f"--batch {args.batch} cannot be shared evenly by {processes} processes")
    if processes > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    console = Console(quiet=rank > 0)

    torch.manual_seed(args.seed)
    model = ByteModel(args.hidden, args.layers, args.dropout).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    dtype = DTYPES[args.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first = 0
    if args.checkpoint and args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        first = state["step"]
        console.print(f"resumed from {args.checkpoint} after {first} steps")
    trained = DistributedDataParallel(model, [device] if cuda else None) if processes > 1 else model

    text = read_text()
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    columns += (TextColumn("loss {task.fields[loss]:.3f} nats per byte"),)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=args.steps, completed=first, loss=float("nan"))
        for step in range(first, args.steps):
            torch.manual_seed(args.seed + step * processes + rank)  # of dropout
            batch = draw_batch(text, args, step, rank, processes).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits, _ = trained(batch[:-1])
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[1:].flatten())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            scaler.step(optimizer)
            scaler.update()
            progress.update(task, advance=1, loss=float(loss.detach()))
            done = step + 1
            if args.checkpoint and rank == 0 and (done % args.save_every == 0 or done == args.steps):
                save(
                    args.checkpoint,
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    scaler=scaler.state_dict(),
                    step=done,
                )

    if rank == 0:
        torch.manual_seed(args.seed)
        console.print(write_text(model, b"def ", 300, device), markup=False, highlight=False)
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
