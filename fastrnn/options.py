# SPDX-License-Identifier: BSD-3-Clause
"""What RNN, GRU and LSTM offer beyond torch.nn: regularisers, gradient control and recomputation.

Letters in shapes as in `fastrnn.modules`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from fastrnn.modes import is_tracing

Layer = Callable[..., tuple[Tensor, ...]]


class RecurrentOptions(TypedDict, total=False):
    """Keyword arguments of RNN, GRU and LSTM that torch.nn has not.

    Attributes:
        recurrent_dropout: Probability, in [0, 1), that a unit of h is left out of the recurrent product, scaled by
            1 / (1 - p): one mask per sequence, the same at every step (Gal and Ghahramani, "A theoretically grounded
            application of dropout in recurrent neural networks", 2016). In training.
        zoneout: Probability, in [0, 1), that a unit keeps its state for a step: of h, or for LSTM of (h, c) (Krueger et
            al., "Zoneout", 2017). In evaluation the states are mixed with that share. Not with a projection for h.
        weight_dropout: Probability, in [0, 1), that an element of the recurrent weights is left out, scaled likewise:
            one mask per call (DropConnect; Merity et al., "Regularizing and optimizing LSTM language models", 2018).
            In training.
        grad_clip: The gradient that a step hands on to the states before it is clamped, elementwise, to
            [-grad_clip, grad_clip]. None: not at all. In second derivatives what comes from the loss and what comes
            from a first derivative are clamped each for itself.
        checkpoint: Backward runs the layer again, that many steps at a time, in place of keeping its gates: it keeps
            the output and one chunk of gates. None: it keeps all. Exported and traced programs keep no gates anyway,
            and hold the layer whole; graphs of torch.compile hold the chunks of one length, and are made anew for
            another. Under torch.compile not with packed sequences.

    Masks are drawn from torch's generator of the device: torch.manual_seed makes them reproducible.
    """

    recurrent_dropout: float
    zoneout: float | tuple[float, float]
    weight_dropout: float
    grad_clip: float | None
    checkpoint: int | None


@dataclass(frozen=True)
class Options:
    """`RecurrentOptions`, checked."""

    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_dropout: float = 0.0
    grad_clip: float | None = None
    checkpoint: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        rates = {"recurrent_dropout": (self.recurrent_dropout,), "weight_dropout": (self.weight_dropout,)}
        for name, values in (rates | {"zoneout": self.zoneouts}).items():
            for value in values:
                if not _is_number(value, (int, float)) or not 0 <= value < 1:
                    raise ValueError(f"expected {name} to be a number in range [0, 1), got {value!r}")
        clip, steps = self.grad_clip, self.checkpoint
        if clip is not None and (not _is_number(clip, (int, float)) or not clip > 0):
            raise ValueError(f"expected grad_clip to be positive or None, got {clip!r}")
        if steps is not None and (not _is_number(steps, int) or steps < 1):
            raise ValueError(f"expected checkpoint to be a positive number of steps or None, got {steps!r}")

    @property
    def zoneouts(self) -> tuple[float, float]:
        """The rates for h and c."""
        if not isinstance(self.zoneout, (tuple, list)):
            return self.zoneout, self.zoneout
        if len(self.zoneout) != 2:
            raise ValueError(f"expected zoneout to be a number or two, for h and c, got {self.zoneout!r}")
        return self.zoneout[0], self.zoneout[1]

    def controls(self, input: Tensor, h0: Tensor, hidden: int, states: int, training: bool) -> dict[str, Any]:
        """What the options ask of one run of one layer: arguments of `fastrnn.ops`.

        Args:
            input: (T, B, I) or packed (N, I).
            h0: (B, H_out).
            hidden: H.
            states: 2 where there is a c.
            training: Whether masks are drawn.
        """
        controls: dict[str, Any] = {}
        if training and self.recurrent_dropout > 0:
            controls["h_mask"] = torch.dropout(torch.ones_like(h0), self.recurrent_dropout, True)
        for name, rate in list(zip(("zone_h", "zone_c"), self.zoneouts, strict=True))[:states]:
            if rate == 0:
                continue
            if training:
                controls[name] = input.new_empty(*input.shape[:-1], hidden).bernoulli_(rate)
            else:
                controls[name] = input.new_full((1,), rate)
        if self.grad_clip is not None:
            controls["grad_clip"] = self.grad_clip
        return controls

    def run(
        self, layer: Layer, input: Tensor, weights: Sequence[Any], states: Sequence[Tensor], **arguments: Any
    ) -> Any:
        """Runs a layer, in chunks of `checkpoint` steps where that is asked for."""
        if self.checkpoint is None or not torch.is_grad_enabled() or torch.compiler.is_exporting() or is_tracing():
            return layer(input, *weights, *states, **arguments)
        return run_in_chunks(layer, self.checkpoint, input, weights, states, **arguments)


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


NO_OPTIONS = Options()


def beyond_torch(module: Any) -> str | None:
    """An option of a module that torch.nn has not, and that the persistent CUDA kernels have not either."""
    if not getattr(module, "reset_after", True):
        return "reset_after=False"
    for name in ("coupled", "peephole", "layer_norm"):
        if getattr(module, name, False):
            return name
    if module._kind == "SLSTM":
        return "SLSTM"
    if getattr(module, "nonlinearity", "") == "leaky_relu":
        return "leaky_relu"
    changing = ("recurrent_dropout", "zoneout", "grad_clip")
    return next((name for name in changing if getattr(module.options, name) != getattr(NO_OPTIONS, name)), None)


def run_in_chunks(
    layer: Layer,
    steps: int,
    input: Tensor,
    weights: Sequence[Any],
    states: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None,
    reverse: bool,
    **arguments: Any,
) -> tuple[Tensor, ...]:
    """Runs a layer some steps at a time, as one call would, each with `recompute`: see `fastrnn.ops`."""
    T = input.size(0) if batch_sizes is None else batch_sizes.size(0)
    ends = [0, *(range(T) if batch_sizes is None else batch_sizes.cumsum(0).tolist())]  # rows before each step
    by_step = {name: arguments.pop(name) for name in ("reset", "zone_h", "zone_c") if arguments.get(name) is not None}
    lengths = arguments.pop("lengths", None)
    with_cells = arguments.get("return_cells", False)
    bounds = [(begin, min(begin + steps, T)) for begin in range(0, T, steps)]
    rows_of = [slice(*bound) if batch_sizes is None else slice(ends[bound[0]], ends[bound[1]]) for bound in bounds]
    # Split, not sliced: the gradient of each slice would be a tensor of the size of the whole input.
    inputs = torch.split(input, [rows.stop - rows.start for rows in rows_of])
    chunks = list(zip(bounds, rows_of, inputs, strict=True))
    results: list[list[Tensor]] = []
    for (begin, end), rows, chunk in reversed(chunks) if reverse else chunks:
        if lengths is not None:
            arguments["lengths"] = (lengths - begin).clamp(0, end - begin)
        output, *rest = layer(
            *(chunk, *weights, *states),
            batch_sizes=None if batch_sizes is None else batch_sizes[begin:end],
            reverse=reverse,
            recompute=True,
            **arguments,
            **{name: value if value.dim() == 1 and name != "reset" else value[rows] for name, value in by_step.items()},
        )
        states, cells = rest[: len(states)], rest[len(states) :]
        results.append([output, *cells])
    if reverse:
        results.reverse()
    output, *cells = (torch.cat(parts) for parts in zip(*results, strict=True))
    return (output, *states, *(cells if with_cells else ()))
