#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Measures what fastrnn offers beyond torch.nn beside what a user of torch.nn writes for it today, on the CPU.

That is packing for lengths, functional_call for dropped weights, and for the rest a loop over time: torch.nn's LSTMCell
or GRUCell with what happens between two steps, or, for cells that torch.nn has not, a loop of tensor operations after
one product for the inputs of all steps. Both sides return the same numbers, which is checked before they are timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

try:
    import torch
    from cases import Call
    from machine import Conditions
    from measure import HostClock, interleave, peak_mib
    from report import append_csv
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from torch import Tensor, nn
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
except ModuleNotFoundError as error:
    sys.exit(f"options.py: the package '{error.name}' is missing: run `make bench`, or pip install 'fastrnn[bench]'")

RATE, CLIP, SEED = 0.25, 0.1, 0
Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """One option: a fastrnn module's run and its counterpart, with the weights that both are functions of."""

    option: str
    today: str
    ours: Model
    theirs: Model
    weights: list[Tensor]
    is_about_backward: bool = False


def pairs(T: int, B: int, H: int) -> Iterator[Pair]:
    """Every option, at I = H."""
    import fastrnn
    from fastrnn import reference

    generator = torch.Generator().manual_seed(SEED)
    lengths = torch.linspace(0.3 * T, T, B).long()[torch.randperm(B, generator=generator)]
    reset = torch.rand(T, B, generator=generator) < 0.05
    zeros = torch.zeros(B, H)

    def cell_of(module: nn.Module) -> tuple[nn.Module, int]:
        states = 2 if isinstance(module, fastrnn.LSTM) else 1
        cell = (nn.LSTMCell if states == 2 else nn.GRUCell)(H, H)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            delattr(cell, name)
            setattr(cell, name, getattr(module, f"{name}_l0"))
        return cell, states

    def loop(
        module: nn.Module,
        before: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
        c: bool = False,
    ) -> Model:
        """A cell's loop over time; before(t, states) and after(t, states before, states) change the states."""
        cell, count = cell_of(module)

        def run(x: Tensor) -> Tensor:
            torch.manual_seed(SEED)
            states, outputs = [zeros] * count, []
            seen = before() if before else None
            zones = after() if after else None
            for t in range(T):
                given = seen(t, states) if seen else states
                new = cell(x[t], tuple(given) if count == 2 else given[0])
                new = list(new) if count == 2 else [new]
                states = zones(t, states, new) if zones else new
                outputs.append(states[1] if c else states[0])
            return torch.stack(outputs)

        return run

    def resetting() -> Callable[..., Any]:
        return lambda t, states: [torch.where(reset[t].unsqueeze(1), 0, state) for state in states]

    def clipping() -> Callable[..., Any]:
        def clipped(state: Tensor) -> Tensor:
            state = state * 1
            if state.requires_grad:
                state.register_hook(lambda grad: grad.clamp(-CLIP, CLIP))
            return state

        return lambda t, states: [clipped(state) for state in states]

    def zoning() -> Callable[..., Any]:
        keep = [torch.empty(T, B, H).bernoulli_(RATE) for _ in range(2)]
        return lambda t, old, new: [k[t] * o + (1 - k[t]) * n for k, o, n in zip(keep, old, new, strict=False)]

    def seeded(module: nn.Module, **arguments: Any) -> Model:
        def run(x: Tensor) -> Tensor:
            torch.manual_seed(SEED)
            return module(x, **arguments)[2 if "return_cell_states" in arguments else 0]

        return run

    def pair(option: str, today: str, module: nn.Module, theirs: Model, **arguments: Any) -> Pair:
        return Pair(option, today, seeded(module, **arguments), theirs, list(module.parameters()))

    for kind in ("LSTM", "GRU"):
        ours, theirs = getattr(fastrnn, kind)(H, H), getattr(nn, kind)(H, H)
        for name, parameter in ours.named_parameters():
            setattr(theirs, name, parameter)

        def packed(x: Tensor, module: nn.Module = theirs) -> Tensor:
            output, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
            return pad_packed_sequence(output, total_length=T)[0]

        cell = f"{kind}Cell loop"
        yield pair(f"{kind} lengths", "packing", ours, packed, lengths=lengths)
        yield pair(f"{kind} reset", cell, ours, loop(ours, before=resetting), reset=reset)
        clip = getattr(fastrnn, kind)(H, H, grad_clip=CLIP)
        yield replace(pair(f"{kind} grad_clip", cell, clip, loop(clip, before=clipping)), is_about_backward=True)
        zone = getattr(fastrnn, kind)(H, H, zoneout=RATE)
        yield pair(f"{kind} zoneout", cell, zone, loop(zone, after=zoning))
        drop = getattr(fastrnn, kind)(H, H, recurrent_dropout=RATE)
        layer = getattr(reference, f"{kind.lower()}_layer")

        def masked(
            x: Tensor, module: Any = drop, layer: Any = layer, count: int = 2 if kind == "LSTM" else 1
        ) -> Tensor:
            torch.manual_seed(SEED)
            mask = torch.dropout(torch.ones(B, H), RATE, True)
            return layer(x, *module.parameters(), *[zeros] * count, h_mask=mask)[0]  # type: ignore[no-any-return]

        yield pair(f"{kind} recurrent_dropout", "tensor loop", drop, masked)
        weights = getattr(fastrnn, kind)(H, H, weight_dropout=RATE)

        def dropped(x: Tensor, module: nn.Module = weights, plain: nn.Module = theirs) -> Tensor:
            torch.manual_seed(SEED)
            given = dict(module.named_parameters())
            given["weight_hh_l0"] = torch.dropout(given["weight_hh_l0"], RATE, True)
            return torch.func.functional_call(plain, given, x)[0]  # type: ignore[no-any-return]

        yield pair(f"{kind} weight_dropout", "functional_call", weights, dropped)

    lstm = fastrnn.LSTM(H, H)
    yield pair("LSTM return_cell_states", "LSTMCell loop", lstm, loop(lstm, c=True), return_cell_states=True)
    steps = max(1, round(T**0.5))
    kept = fastrnn.LSTM(H, H, checkpoint=steps)
    plain = nn.LSTM(H, H)
    for name, parameter in kept.named_parameters():
        setattr(plain, name, parameter)
    of_nn = pair(f"LSTM checkpoint={steps}", "torch.nn.LSTM", kept, lambda x: plain(x)[0])
    yield replace(of_nn, is_about_backward=True)

    def detached(x: Tensor) -> Tensor:
        outputs, states = [], None
        for part in x.split(T // 4):
            output, states = plain(part, states)
            states = tuple(state.detach() for state in states)
            outputs.append(output)
        return torch.cat(outputs)

    def chunked(x: Tensor) -> Tensor:
        return torch.cat([output for output, _ in fastrnn.truncated.chunks(kept_whole, x, length=T // 4)])

    kept_whole = fastrnn.LSTM(H, H)
    for name, parameter in plain.named_parameters():
        setattr(kept_whole, name, parameter)
    yield Pair("LSTM truncated.chunks", "torch.nn.LSTM", chunked, detached, list(plain.parameters()), True)

    def definition(layer: Callable[..., Any], module: nn.Module, states: list[Tensor], **options: Any) -> Model:
        return lambda x: layer(x, *list(module.parameters())[:4], *states, **options)[0]

    for kind, states in (("LSTM", [zeros, zeros]), ("GRU", [zeros])):
        norm = getattr(fastrnn, kind)(H, H, layer_norm=True)
        nn.init.constant_(norm.gain_hh_l0, 0.3)  # gains of 1 make the recurrence chaotic: rounding grows with T
        gains = list(norm.parameters())[4:]
        loop_of = definition(getattr(reference, f"{kind.lower()}_layer"), norm, states, layer_norm=gains)
        yield pair(f"{kind} layer_norm", "tensor loop", norm, loop_of)
    peephole, coupled = fastrnn.LSTM(H, H, peephole=True), fastrnn.LSTM(H, H, coupled=True)
    w_peephole = peephole.weight_peephole_l0
    two, four = [zeros, zeros], [zeros, torch.zeros(3, B, H)]
    loop_of = definition(reference.lstm_layer, peephole, two, w_peephole=w_peephole)
    yield pair("LSTM peephole", "tensor loop", peephole, loop_of)
    yield pair("LSTM coupled", "tensor loop", coupled, definition(reference.lstm_layer, coupled, two, coupled=True))
    before = fastrnn.GRU(H, H, reset_after=False)
    loop_of = definition(reference.gru_layer, before, [zeros], reset_after=False)
    yield pair("GRU reset_after=False", "tensor loop", before, loop_of)
    slstm, leaky = fastrnn.SLSTM(H, H), fastrnn.RNN(H, H, nonlinearity="leaky_relu")
    yield pair("SLSTM", "tensor loop", slstm, definition(reference.slstm_layer, slstm, four))
    of_rnn = definition(reference.rnn_layer, leaky, [zeros], nonlinearity="leaky_relu")
    yield pair("RNN leaky_relu", "tensor loop", leaky, of_rnn)


def in_mode(run: Model, mode: str, x: Tensor, weights: list[Tensor], grad: Tensor) -> Call:
    """The work that is timed: a forward pass, or with backward for the input and every weight."""
    if mode == "infer":
        return torch.inference_mode()(lambda: [run(x)])

    def train() -> list[Tensor]:
        output = run(x)
        return [output, *torch.autograd.grad(output, [x, *weights], grad)]

    return train


def disagreement(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference relative to the largest value of its tensor."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    """Measures, prints a table and writes the rows; 1 if two sides disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(100, 32, 256), metavar=("T", "B", "H"), help="I = H")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: all)")
    parser.add_argument("--budget", type=float, default=0.5, metavar="S", help="seconds per side (default: 0.5)")
    parser.add_argument("--only", default="", metavar="WORD", help="options whose name contains it")
    results = Path(__file__).parent / "results/local/options.csv"
    parser.add_argument("--csv", type=Path, default=results, metavar="FILE", help="rows are added to it")
    arguments = parser.parse_args()
    T, B, H = arguments.shape
    torch.set_num_threads(arguments.threads)
    console, conditions, clock = Console(), Conditions.now("cpu"), HostClock(arguments.threads)
    torch.manual_seed(SEED)
    x, grad = torch.randn(T, B, H), torch.randn(T, B, H)
    table = Table(title=f"T={T} B={B} I=H={H} fp32, {arguments.threads} threads, {clock.name} clock")
    for column in ("option", "mode", "today", "fastrnn ms", "today ms", "ratio", "MiB", "today MiB"):
        table.add_column(column, justify="left" if column in ("option", "mode", "today") else "right")
    rows, failed = [], False
    cases = [(p, mode) for p in pairs(T, B, H) if arguments.only in p.option for mode in ("infer", "train")]
    for p, mode in track(cases, console=console, transient=True):
        if mode == "infer" and p.is_about_backward:
            continue
        given = x.clone().requires_grad_(mode == "train")
        calls = {
            "ours": in_mode(p.ours, mode, given, p.weights, grad),
            "theirs": in_mode(p.theirs, mode, given, p.weights, grad),
        }
        difference = disagreement(calls["ours"](), calls["theirs"]())
        if not difference < 1e-4:
            console.print(f"FAILED {p.option} {mode}: relative difference {difference:.1e}", style="bold red")
            failed = True
            continue
        memory = [peak_mib(call, "cpu") for call in calls.values()]
        times = interleave(calls, clock, arguments.budget)
        ours, theirs = times["ours"].p50, times["theirs"].p50
        cells = [p.option, mode, p.today, *(f"{v:.4g}" for v in (ours, theirs, theirs / ours, *memory))]
        table.add_row(*cells)
        names = ("option", "mode", "today", "ms", "today_ms", "ratio", "peak_mib", "today_peak_mib")
        rows.append(
            asdict(conditions) | {"T": T, "B": B, "H": H, "threads": arguments.threads, "clock": clock.name}
            | dict(zip(names, cells, strict=True))
        )  # fmt: skip
    console.print(table)
    if rows:
        append_csv(arguments.csv, rows)
        console.print(f"Rows: {arguments.csv}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
