# SPDX-License-Identifier: BSD-3-Clause
"""Looks into a recurrent model while it runs: how the gradient flows through time, and how many gates are saturated.

Each layer is run one step at a time, through the same operators, so that every hidden state is a tensor of its own.
That is slow, and the results of the model are the same. It works for the modules and cells of fastrnn and for those of
torch.nn, which are converted for the time of the call; the model, its gradients, buffers and mode stay as they are.

Letters in shapes: T time, B batch, I input, H hidden.
"""

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from fastrnn import cells, reference
from fastrnn.autograd import Meet
from fastrnn.convert import _named_modules, convert, revert
from fastrnn.options import run_in_chunks
from fastrnn.packing import Packing
from fastrnn.stack import LayerStack

# Okabe and Ito's palette, told apart by every common form of colour vision.
_COLOURS = ("#009E73", "#D55E00", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")

# The bounds of the gates that fastrnn.reference hands out, by the kind of cell, or the nonlinearity of an RNN.
_SIGMOID, _TANH, _RELU = (0.0, 1.0), (-1.0, 1.0), (0.0, float("inf"))
_BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "LSTM": {"i": _SIGMOID, "f": _SIGMOID, "g": _TANH, "o": _SIGMOID},
    "SLSTM": {"f": _SIGMOID, "z": _TANH, "o": _SIGMOID},
    "GRU": {"r": _SIGMOID, "z": _SIGMOID, "n": _TANH},
    "tanh": {"h": _TANH},
    "relu": {"h": _RELU},
    "leaky_relu": {"h": _RELU},
}


@dataclass(frozen=True)
class GradientFlow:
    """What `gradient_flow` found. Print it, or `draw` it.

    Attributes:
        norms: For each layer and direction, such as "encoder.lstm layer 0 reverse", the norm of the gradient that
            reaches the hidden state of each step: (T,), float64, on the CPU, in the order of time.
        precision: The relative rounding error of the states' dtype.
    """

    norms: dict[str, Tensor]
    precision: float

    def reach(self, name: str) -> float:
        """The norm at the step where the layer begins over that where it ends: far below 1 vanishing, above exploding.

        A layer in reverse begins at the last step.
        """
        norms = self.norms[name]
        begin, end = (-1, 0) if name.endswith(" reverse") else (0, -1)
        return (norms[begin] / norms[end]).item()

    def __str__(self) -> str:
        """One line per layer and direction."""
        lines = []
        for name, norms in self.norms.items():
            steps = f"{len(norms)} step{'s' * (len(norms) > 1)}"
            lines.append(
                f"{name}: {norms[0]:.1e} at the first of {steps}, {norms[-1]:.1e} at the last, "
                f"begin / end {self.reach(name):.2g}"
            )
        return "\n".join(lines)


def gradient_flow(model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor]) -> GradientFlow:
    """Measures the gradient that reaches the hidden state of each step, in every recurrent layer of a model.

    For each layer, direction and step::

        norm[t] = || dL / dh[t] ||      over all sequences and hidden units

    dL / dh[t] is the whole derivative: through the output of the step and through all later steps. A gradient that
    vanishes over time falls towards the steps where the layer begins, one that explodes grows. Where a module is called
    several times, or is a cell in a loop of the model's own, its calls continue one axis of time.

    Args:
        model: Any module with an RNN, GRU, LSTM or cell in it, of fastrnn or torch.nn. It is run once in its present
            mode, forward and backward; the `.grad` of its parameters are not touched.
        batch: `(*inputs, target)`: the loss is `loss_fn(model(*inputs), target)`.
        loss_fn: A function of the model's output and the target that returns a tensor with one element.

    Returns:
        The norms. With `lengths` or a PackedSequence, those over the sequences that reach the step.

    Raises:
        TypeError: If `model` is not a module, or `batch` is not a tuple or list of at least two.
        ValueError: If `loss_fn` returns more than one element, no recurrent module that can be looked into ran, or
            one got no sequence.
    """
    *inputs, target = _inputs_and_target(batch, "gradient_flow")
    with torch.enable_grad(), _step_by_step(model, "gradient_flow") as steps:
        loss = loss_fn(model(*inputs), target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"gradient_flow: expected loss_fn to return one element, got {_form(loss)}")
    every = [step for of_run in steps.values() for step in of_run]
    reached = [step for step in every if step.h.requires_grad]  # not where the model itself forbids gradients
    gradients = torch.autograd.grad(loss, [step.h for step in reached], allow_unused=True)
    found = {id(step): g for step, g in zip(reached, gradients, strict=True) if g is not None}
    norms = iter([_norm(found[id(step)][step.rows]) if id(step) in found else 0.0 for step in every])
    by_run = {name: torch.tensor([next(norms) for _ in of_run], dtype=torch.float64) for name, of_run in steps.items()}
    return GradientFlow(by_run, torch.finfo(every[0].h.dtype).eps)


@dataclass(frozen=True)
class Saturation:
    """What `saturation` found. Print it.

    Attributes:
        shares: For each layer and direction, and each of its gates, the share of its values near the lower and near the
            upper bound. Gates: LSTM i, f, g, o; GRU r, z, n; RNN h; SLSTM f, z, o. With relu there is a lower bound
            only, which a unit is at where it is off.
        margin: How near.
    """

    shares: dict[str, dict[str, tuple[float, float]]]
    margin: float

    def __str__(self) -> str:
        """One line per gate."""
        rows = [(name, gate, *share) for name, gates in self.shares.items() for gate, share in gates.items()]
        width = max(len(row[0]) for row in rows)
        lines = [f"{name:<{width}}  {gate}  low {low:6.1%}  high {high:6.1%}" for name, gate, low, high in rows]
        return "\n".join(lines)


def saturation(model: nn.Module, batch: Any, *, margin: float = 0.1) -> Saturation:
    """Measures the share of saturated gates, in every recurrent layer of a model.

    A gate is saturated where its value is within `margin` of a bound: 0 and 1 for sigmoid, -1 and 1 for tanh. The
    derivative of the gate is small there, and little of the gradient reaches its weights. A forget gate near 1 is as it
    should be in an LSTM that remembers; all gates at their bounds tell of weights or inputs that are too large.

    Args:
        model: As for `gradient_flow`; it is run once, forward.
        batch: `(*inputs, target)`, as for `gradient_flow`, of which the target is not used; or the input alone, a
            tensor or a PackedSequence.
        margin: How near to a bound counts, in (0, 0.5).

    Raises:
        TypeError: If `model` is not a module, or `batch` is none of these.
        ValueError: If `margin` is out of its range, no recurrent module that can be looked into ran, or
            one got no sequence.
    """
    if not 0 < margin < 0.5:
        raise ValueError(f"saturation: expected margin to be in (0, 0.5), got {margin}")
    is_input = isinstance(batch, (Tensor, PackedSequence))
    inputs = [batch] if is_input else _inputs_and_target(batch, "saturation")[:-1]
    shares: dict[str, dict[str, tuple[float, float]]] = {}
    with torch.no_grad(), _step_by_step(model, "saturation") as steps:
        model(*inputs)
        for name, of_run in steps.items():
            bounds, by_step = of_run[0].bounds, [step.gates() for step in of_run]
            shares[name] = {
                gate: _near_bounds(torch.cat([values[gate] for values in by_step]), *bounds[gate], margin)
                for gate in by_step[0]
            }
    return Saturation(shares, margin)


def draw(flows: GradientFlow | Mapping[str, GradientFlow], path: str | Path) -> None:
    """Draws gradient flows over time into one picture.

    The grey zone is where a contribution is lost in rounding beside the largest one of the same model, whichever that
    is: weights learn nothing from there, and curves that go deeper leave the picture.

    Args:
        flows: What `gradient_flow` returned, or several by name, to compare models.
        path: The file to write: a PNG, or what its ending says.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    by_name = {"": flows} if isinstance(flows, GradientFlow) else flows
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    for model, (name, flow) in enumerate(by_name.items()):
        for run, (run_name, norms) in enumerate(flow.norms.items()):
            # Colours tell models apart and dashes their layers; where there is one model, colours tell layers.
            colour, dash = (model, run) if len(by_name) > 1 else (run, 0)
            labels = [name] * (name != "") + [run_name] * (name == "" or len(flow.norms) > 1)
            axes.plot(
                norms.clamp(min=torch.finfo(torch.float64).tiny),
                color=_COLOURS[colour % len(_COLOURS)],
                linestyle=_DASHES[dash % len(_DASHES)],
                label=f"{', '.join(labels)} (begin / end {flow.reach(run_name):.2g})",
            )
    norms_by_model = [torch.cat(list(flow.norms.values())) for flow in by_name.values()]
    lost = min(
        norms.max().item() * flow.precision for norms, flow in zip(norms_by_model, by_name.values(), strict=True)
    )
    norms = torch.cat(norms_by_model)
    if lost > 0 and norms.isfinite().all():
        bottom, top = norms.min().item(), norms.max().item()
        axes.set_ylim(max(bottom, lost / 1e4) / 3, top * 3)
        if bottom < lost:
            axes.axhspan(0, lost, color="0.92", zorder=0)
            text = "lost in rounding"
            axes.text(0.01, lost / 2, text, transform=axes.get_yaxis_transform(), va="top", fontsize=9, color="0.4")
    axes.set_xlabel("time step t")
    axes.set_ylabel("norm of dL / dh[t]")
    axes.set_title("Gradient that reaches the hidden state of each step", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=1 + (len(axes.lines) > 1), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class _Step:
    """One step of one direction of one layer."""

    h: Tensor  # (B, H) after it
    rows: slice | Tensor  # the sequences that take part
    definition: Callable[..., Any]  # the layer of fastrnn.reference, with the arguments of the step
    bounds: Mapping[str, tuple[float, float]]  # of its gates

    def gates(self) -> dict[str, Tensor]:
        """The values of the gates, each (rows, H), while the module still is fastrnn's."""
        gates: list[dict[str, Tensor]] = []
        self.definition(gates=gates)
        return {name: values[self.rows] for name, values in gates[0].items()}


def _near_bounds(values: Tensor, lower: float, upper: float, margin: float) -> tuple[float, float]:
    margin = margin if upper < float("inf") else 0.0
    shares = [(values <= lower + margin), (values >= upper - margin)]
    low, high = (share.double().mean().item() for share in shares)
    return low, high


@contextmanager
def _step_by_step(model: nn.Module, caller: str) -> Iterator[dict[str, list[_Step]]]:
    """Within it, recurrent modules run step by step. At its end the steps are there, by layer and direction, in time.

    Raises:
        ValueError: At the end, if none ran, or one of them on nothing.
    """
    steps: defaultdict[str, list[_Step]] = defaultdict(list)
    with ExitStack() as stack:
        stack.enter_context(_copied_buffers(model))
        conversion = convert(model)
        for name in conversion.converted:
            stack.callback(revert, model.get_submodule(name))
        for name, module in model.named_modules():
            if isinstance(module, (LayerStack, cells._Cell)):
                recorder = _Recorder(module, name or type(module).__name__, steps)
                stack.callback(delattr, module, "_op")
                module._op = recorder.run  # type: ignore[method-assign]
            if isinstance(module, cells._Cell):
                stack.callback(delattr, module, "_autocast_by_torch")
                module._autocast_by_torch = False
            if isinstance(module, LayerStack) and module.options.checkpoint is not None:
                stack.callback(setattr, module, "options", module.options)
                module.options = replace(module.options, checkpoint=None)  # it would call the operator in pieces
        if "torch._dynamo" in sys.modules:  # a compiled model would not see this
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield steps
    if not steps:
        reasons = "".join(f"; {name}: {reason}" for name, reason in conversion.left_alone.items())
        raise ValueError(
            f"{caller}: expected model to run a recurrent module of fastrnn or torch.nn, got none{reasons}"
        )
    for name, of_run in steps.items():
        if not any(len(step.h[step.rows]) for step in of_run):
            raise ValueError(f"{caller}: expected a batch of at least one sequence, {name} got none")


@contextmanager
def _copied_buffers(model: nn.Module) -> Iterator[None]:
    """Within it the model has copies of its buffers, such as the statistics of BatchNorm, which a call changes.

    To write them back in place would not do: backward reads what a call has kept, and refuses what was written since.
    """
    own = [(module._buffers, dict(module._buffers)) for _, module in _named_modules(model)]
    copies = {buffer: buffer.clone() for buffer in model.buffers() if not is_lazy(buffer)}
    for buffers, before in own:
        buffers.update({name: copies.get(buffer, buffer) for name, buffer in before.items()})  # type: ignore[arg-type]
    try:
        yield
    finally:
        for buffers, before in own:
            buffers.update(before)


class _Recorder:
    """What takes the place of a module's `_op`: the same results, from one call of the operator per step."""

    def __init__(self, module: Any, name: str, steps: dict[str, list[_Step]]) -> None:
        """Takes the module, what to call it, and where the steps go."""
        self._op, self._steps, self._recorded = module._op, steps, list[_Step]()
        self._is_stack = isinstance(module, LayerStack)
        self._bounds = _BOUNDS[module.nonlinearity if module._kind == "RNN" else module._kind]
        runs = [name]
        if self._is_stack:
            directions = ["", " reverse"] if module.bidirectional else [""]
            runs = [
                f"{name} layer {layer}{direction}" for layer in range(module.num_layers) for direction in directions
            ]
        self._labels = itertools.cycle(runs)  # the order of the calls

    def run(
        self,
        input: Tensor,
        *weights_and_states: Any,
        batch_sizes: Tensor | None = None,
        reverse: bool = False,
        meet: Meet | None = None,
        packing: Packing | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Takes and returns what the module's `_op` does. Its steps meet with nothing, and keep nothing packed."""
        input = input if self._is_stack else input.unsqueeze(0)
        weights, states = weights_and_states[:4], weights_and_states[4:]
        self._recorded.clear()
        results = run_in_chunks(
            self._run_step, 1, input, weights, states, batch_sizes=batch_sizes, reverse=reverse, **options
        )
        self._steps[next(self._labels)] += reversed(self._recorded) if reverse else self._recorded
        return results if self._is_stack else results[1:]

    def _run_step(
        self,
        input: Tensor,
        *weights_and_states: Any,
        batch_sizes: Tensor | None,
        recompute: bool,
        lengths: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        step = partial(self._op, input if self._is_stack else input.squeeze(0), *weights_and_states)
        step = partial(step, batch_sizes=batch_sizes, lengths=lengths, **options)
        h, *rest = step(recompute=recompute)[1 if self._is_stack else 0 :]
        if torch.is_grad_enabled() and not h.requires_grad:  # neither weights nor input need a gradient
            h.requires_grad_()
        rows: Any = slice(input.size(-2)) if lengths is None else lengths > 0
        self._recorded.append(_Step(h, rows, partial(step, library=reference), self._bounds))
        # From h itself, so that all of the gradient passes through it.
        output = h[rows] if lengths is None else torch.where(rows.unsqueeze(1), h, 0)
        return output if batch_sizes is not None else output.unsqueeze(0), h, *rest


def _inputs_and_target(batch: Any, caller: str) -> Sequence[Any]:
    if not isinstance(batch, (tuple, list)) or isinstance(batch, PackedSequence) or len(batch) < 2:
        raise TypeError(f"{caller}: expected batch to be (*inputs, target), got {_form(batch)}")
    return batch


def _norm(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))  # squares of float32 would underflow


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")
