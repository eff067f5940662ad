# SPDX-License-Identifier: BSD-3-Clause
"""The layers of a stack as a wavefront, on CUDA: while a layer runs a chunk of time, the layer below runs the next one.

Of two layers and four chunks, what stands below each other is one launch of a persistent kernel::

    lower layer  0 1 2 3
    upper layer    0 1 2 3

Layers go in pairs; a last one without a partner goes alone. For autograd these are layers called chunk by chunk, so
that backward goes the same way from the end. From chunk to chunk the states are handed on in the dtype of the input, as
by `checkpoint`, and the gradient of a weight is the sum of those of the chunks. Over 512 steps in 16 bits the former
shows in no error; the latter makes that of a weight's gradient up to 1.5 times as large with 8 chunks, 2.3 with 32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrnn import _library
from fastrnn.autograd import side_by_side
from fastrnn.modes import has_values, is_tracing, is_transformed
from fastrnn.options import NO_OPTIONS, beyond_torch

States = Sequence[Tensor]
Layer = Callable[..., tuple[Tensor, ...]]  # of input and states: the output and the states after the last step

_library.load()
# Only builds with persistent kernels have this operator.
_plan: Callable[..., int] | None = getattr(torch.ops.fastrnn, "wavefront_steps", None)


def reason_against(module: Any, batch_sizes: Tensor | None) -> str | None:
    """Why the layers of a module run one after the other, whatever the plan says; None where it decides."""
    if module.num_layers == 1:
        return "there is one layer"
    if module.bidirectional:
        return "the next layer needs both directions"
    if batch_sizes is not None:
        return "the sequence is packed"
    beyond = "proj_size" if module.proj_size > 0 else beyond_torch(module)
    if beyond is None and module.options is not NO_OPTIONS:
        beyond = "an option of the recurrence"
    return beyond and f"{beyond} has none"


def steps_of_chunk(
    module: Any, input: Tensor, others: Sequence[Tensor | None], controls: dict[str, Any], batch_sizes: Tensor | None
) -> int:
    """The steps of a chunk, or 0 where one layer runs after the other.

    So it is wherever a call is recorded or transformed, or `controls` ask for something. `others` are the weights of
    the module and the states.

    Raises:
        RuntimeError: Where FASTRNN_PERSISTENT_CHUNKS asks for a wavefront that the plan has no launch for.
    """
    if _plan is None or torch.compiler.is_compiling() or controls or reason_against(module, batch_sizes):
        return 0
    plain = input.detach()  # a Parameter has values too
    if is_tracing() or is_transformed() or not has_values(plain):
        return 0
    trains = torch.is_grad_enabled() and torch._C._any_requires_grad(input, *others)
    gates, states = {"RNN": (1, 1), "GRU": (3, 1), "LSTM": (4, 2)}[module._kind]
    return _plan(plain, module.hidden_size, gates, states, trains)


def run(layers: Sequence[Layer], input: Tensor, states: Sequence[States], steps: int) -> tuple[Tensor, list[States]]:
    """Runs a stack of layers over chunks of that many steps.

    Args:
        layers: From the lowest to the uppermost; each hands its argument `meet` to one operator.
        input: (T, B, I).
        states: Of each layer, before the first step.
        steps: Of a chunk; the last one holds what remains.

    Returns:
        The output of the last layer, and the states of each after the last step.
    """
    final = [*states]
    for i in range(0, len(layers) - 1, 2):
        input, final[i], final[i + 1] = _run_pair(layers[i], layers[i + 1], input, states[i], states[i + 1], steps)
    if len(layers) % 2:
        input, *final[-1] = layers[-1](input, states[-1])
    return input, final


def _run_pair(
    lower: Layer, upper: Layer, input: Tensor, below: States, above: States, steps: int
) -> tuple[Tensor, States, States]:
    first, *chunks = torch.split(input, steps)
    between, *below = lower(first, below)
    outputs = []
    for chunk in chunks:
        ahead, behind = side_by_side(partial(lower, chunk, below), partial(upper, between, above))
        (between, *below), (output, *above) = ahead, behind
        outputs.append(output)
    output, *above = upper(between, above)
    return torch.cat([*outputs, output]), below, above
