# SPDX-License-Identifier: BSD-3-Clause
"""The operators: typed functions over `torch.ops.fastrnn`.

One operator runs one layer in one direction, eagerly another one both directions. Backward is an operator of its own;
its derivative, which double backward asks for, is taken through `fastrnn.reference`, and so is forward-mode
differentiation as a whole. Under `torch.vmap` members that share their weights are one batch; others, and backward, run
one by one. Autocast does not reach into the operators: they compute in the dtype of their arguments.

Letters: T time, B batch, I input, H hidden, P projection (P = H without one), N the sum of `batch_sizes`, G gates.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import linear
from typing_extensions import Unpack  # a requirement of torch

from . import _library, fakes, flops, reference
from .autograd import Meet, Operator
from .modes import is_in_transform
from .packing import Packing

_library.load()


class Controls(TypedDict, total=False):
    r"""What may happen to the states between two steps: keyword arguments of every layer, each None or 0 by default.

    Before each step, where it says so, the states are set to zero; after it, some of them keep a share of what they
    were; the recurrent product reads a masked h. Nothing of it is differentiable itself.

    Attributes:
        lengths: (B,) int64, on the device of the input, in any order, from 0 to T: row b takes part in the steps
            t < lengths[b] alone. Its output past them is zero, and its final states are those at its true end, in
            reverse at its beginning. For dense input.
        reset: (T, B) bool, or packed (N,): where it is true the states before the step are zero.
        h_mask: (B, H), or (B, P) with a projection, in the dtype of the input: multiplies h in the recurrent product at
            every step, as variational dropout asks (Gal and Ghahramani, 2016).
        zone_h: (T, B, H), packed (N, H), or (1,) for all, in the dtype of the input: the share k of zoneout,
            ``h = k * h_before + (1 - k) * h`` (Krueger et al., 2017). Not with a projection, nor for the sLSTM.
        grad_clip: The gradient that a step hands on to the states before it is clamped to [-grad_clip, grad_clip],
            elementwise. 0: not at all.
    """

    lengths: Tensor | None
    reset: Tensor | None
    h_mask: Tensor | None
    zone_h: Tensor | None
    grad_clip: float


class CellStateControls(Controls, total=False):
    """As `Controls`, for layers with a cell state.

    Attributes:
        zone_c: As `zone_h`, for c. The h of the step comes from c before that. Not for the sLSTM.
        return_cells: Whether to return c after every step, (T, B, H), as one more result. Not for the sLSTM.
    """

    zone_c: Tensor | None
    return_cells: bool


def rnn_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
    recompute: bool = False,
    meet: Meet | None = None,
    packing: Packing | None = None,
    **controls: Unpack[Controls],
) -> tuple[Tensor, Tensor]:
    r"""Runs one RNN layer in one direction over a sequence.

    For t = 0..T-1::

        h = activation(input[t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh)

    Args:
        input: (T, B, I), or packed (N, I). float16, bfloat16, float32 or float64, CPU or CUDA, any strides. Where
            `w_ih` is None it holds ``x_gates = W_ih x + b_ih``, of width G*H (G = 1).
        w_ih: Input weight (G*H, I), or None. Like every other tensor of the dtype and on the device of `input`.
        w_hh: Recurrent weight (G*H, H).
        b_ih: Input bias (G*H,), or None.
        b_hh: Recurrent bias (G*H,), or None.
        h0: Initial hidden state (B, H).
        batch_sizes: Packed layout: rows alive at each step, (T,) int64 on the CPU, not increasing.
        reverse: Run from t = T-1 down to 0; ``output[t]`` still belongs to ``input[t]``.
        nonlinearity: ``"tanh"``, ``"relu"`` or ``"leaky_relu"`` with the slope 0.01.
        recompute: Whether backward runs the layer again in place of keeping its gates.
        meet: Of `fastrnn.autograd.side_by_side`.
        packing: Of `fastrnn.pack_weights`.
        controls: See `Controls`.

    Returns:
        ``output`` (T, B, H) or packed (N, H), and ``h_n`` (B, H).

    Raises:
        RuntimeError: ``fastrnn::<op>: expected <argument> <fact>, got <fact>`` on a wrong shape, dtype or device.
        ValueError: On another `nonlinearity`.

    Gates and states are computed in float32 (float64 for float64). Differentiable any number of times, in
    reverse and in forward mode, in every floating-point tensor.
    The equation is that of `torch.nn.RNN`.
    """
    if nonlinearity not in _RNN:
        raise ValueError(
            f"fastrnn::rnn_layer: expected nonlinearity 'tanh', 'relu' or 'leaky_relu', got {nonlinearity!r}"
        )
    arguments = (input, w_ih, w_hh, b_ih, b_hh, None, h0, batch_sizes, reverse)
    output, h_n, *_ = _RNN[nonlinearity](
        *arguments,
        controls=_control_arguments("rnn_layer", controls, Controls),
        recompute=recompute,
        meet=meet,
        packing=packing,
    )
    return output, h_n


def rnn_step(
    nonlinearity: str,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h: Tensor,
) -> Tensor | None:
    """One step (B, H) of `rnn_layer` by torch's own operators, or None where the layer is to be preferred.

    On the CPU fusing a single step saves less than a call costs where the step is small, and where gradients are wanted
    less than a call and a node of the graph in Python cost, in larger ones too.
    """
    step = _RNN_STEP.get(nonlinearity)
    if step is None or not input.is_cpu or torch.compiler.is_compiling():
        return None
    if is_in_transform():  # torch.vmap has no rule for them, and loops over its members
        return None
    arguments = (input, h, w_ih, w_hh, b_ih, b_hh)
    wants_gradients = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
    least = STEP_WORTH_A_NODE if wants_gradients else STEP_WORTH_FUSING
    return step(*arguments) if input.size(0) * (w_ih.numel() + w_hh.numel()) < least else None


def gru_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    *,
    reset_after: bool = True,
    layer_norm: Sequence[Tensor | None] | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    recompute: bool = False,
    meet: Meet | None = None,
    packing: Packing | None = None,
    **controls: Unpack[Controls],
) -> tuple[Tensor, Tensor]:
    r"""Runs one GRU layer in one direction over a sequence.

    For t = 0..T-1, with ``xr, xz, xn`` the three H-row blocks of ``input[t] @ w_ih.T + b_ih`` and ``hr, hz, hn`` those
    of ``h @ w_hh.T + b_hh``::

        r = sigmoid(xr + hr)
        z = sigmoid(xz + hz)
        n = tanh(xn + r * hn)
        h = (1 - z) * n + z * h

    The equation is that of `torch.nn.GRU`. With ``reset_after=False`` it is that of Cho et al., "Learning phrase
    representations using RNN encoder-decoder", 2014: ``n = tanh(xn + (r * h) @ w_hn.T + b_hn)``. With `layer_norm`,
    ``gain_ih`` and ``gain_hh`` of (3*H,), ``gain * LN(product) + bias`` takes the place of each of the two products
    with its bias, where LN normalises the blocks r and z together and the block n alone, ``(a - mean(a)) /
    sqrt(var(a) + 1e-5)`` (Ba, Kiros, Hinton, "Layer normalization", 2016). Where `w_ih` is None the input holds the
    product without a bias.

    Arguments, results and errors are those of `rnn_layer`, with G = 3.

    Raises:
        ValueError: Where both `layer_norm` and ``reset_after=False`` are given.
    """
    if layer_norm is not None and not reset_after:
        raise ValueError("fastrnn::gru_layer: expected reset_after=True where layer_norm is given, got False")
    operator = _GRU
    arguments: tuple[Any, ...] = (input, w_ih, w_hh, b_ih, b_hh, None, h0, batch_sizes, reverse)
    if layer_norm is not None:
        w_cell = _layer_norm_parameters("gru_layer", w_hh, b_ih, b_hh, *layer_norm)
        operator, arguments = _GRU_NORM, (input, w_ih, w_hh, None, None, w_cell, h0, batch_sizes, reverse)
    if not reset_after:
        # Its biases are sums with the input gates, wherever they come from.
        bias = b_ih if b_hh is None else b_hh if b_ih is None else b_ih + b_hh
        lengths = controls.get("lengths")
        if lengths is not None and lengths.shape == input.shape[1:2]:  # others the operator refuses
            # Padding may hold NaN, and zero gates times NaN are not zero.
            past_end = torch.arange(input.shape[0], device=input.device).unsqueeze(1) >= lengths
            input = input.masked_fill(past_end.unsqueeze(2), 0)
        x_gates = linear(input, w_ih, bias) if w_ih is not None else input if bias is None else input + bias
        operator, arguments = _GRU_BEFORE, (x_gates, None, w_hh, None, None, None, h0, batch_sizes, reverse)
    output, h_n, *_ = operator(
        *arguments,
        controls=_control_arguments("gru_layer", controls, Controls),
        recompute=recompute,
        meet=meet,
        packing=packing,
    )
    return output, h_n


def lstm_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    *,
    w_hr: Tensor | None = None,
    coupled: bool = False,
    w_peephole: Tensor | None = None,
    layer_norm: Sequence[Tensor | None] | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    recompute: bool = False,
    meet: Meet | None = None,
    packing: Packing | None = None,
    **controls: Unpack[CellStateControls],
) -> tuple[Tensor, ...]:
    r"""Runs one LSTM layer in one direction over a sequence.

    For t = 0..T-1, with ``i, f, g, o`` the four H-row blocks of ``input[t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh``::

        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)          # and h = h @ w_hr.T with a projection

    The equation is that of `torch.nn.LSTM`. Arguments and errors are those of `rnn_layer`, with G = 4, and:

    Args:
        input: (T, B, I), or packed (N, I).
        w_ih: (G*H, I), or None.
        w_hh: (G*H, P).
        b_ih: (G*H,), or None.
        b_hh: (G*H,), or None.
        h0: (B, P).
        c0: Initial cell state (B, H).
        w_hr: Projection (P, H), or None.
        coupled: Whether the input gate is 1 - f: ``f, g, o`` are the blocks, G = 3, and
            ``c = sigmoid(f) * c + (1 - sigmoid(f)) * tanh(g)`` (Greff et al., "LSTM: a search space odyssey", 2017).
        w_peephole: (3*H,), the blocks ``w_i, w_f, w_o``, or None: i and f are added ``w_i * c`` and ``w_f * c``, o is
            added ``w_o * c`` of the new c (Gers et al., "Learning precise timing with LSTM recurrent networks", 2002).
        layer_norm: ``gain_ih`` and ``gain_hh`` of (4*H,), ``gain_c`` and ``bias_c`` (or None) of (H,), or None:
            ``gain * LN(product) + bias`` takes the place of each of the two products with its bias, where LN normalises
            all blocks together, ``(a - mean(a)) / sqrt(var(a) + 1e-5)``, and
            ``h = sigmoid(o) * tanh(gain_c * LN(c) + bias_c)`` (Ba, Kiros, Hinton, "Layer normalization", 2016). Where
            `w_ih` is None the input holds the product without a bias.
        batch_sizes: (T,), or None.
        reverse: Run from the last step to the first.
        recompute: As of `rnn_layer`.
        meet: As of `rnn_layer`.
        packing: As of `rnn_layer`.
        controls: See `CellStateControls`.

    Returns:
        ``output`` (T, B, P) or packed (N, P), ``h_n`` (B, P), ``c_n`` (B, H); with `return_cells` also all c (T, B, H).

    Raises:
        ValueError: Where more than one of `coupled`, `w_peephole` and `layer_norm` is given.
    """
    if coupled and w_peephole is not None:
        raise ValueError("fastrnn::lstm_layer: expected coupled=False where w_peephole is given, got True")
    operator = _LSTM_COUPLED if coupled else _LSTM if w_peephole is None else _LSTM_PEEPHOLE
    arguments = (input, w_ih, w_hh, b_ih, b_hh, w_hr, w_peephole, h0, c0, batch_sizes, reverse)
    if layer_norm is not None:
        if coupled or w_peephole is not None:
            got = "coupled=True" if coupled else "w_peephole"
            raise ValueError(f"fastrnn::lstm_layer: expected neither where layer_norm is given, got {got}")
        w_cell = _layer_norm_parameters("lstm_layer", w_hh, b_ih, b_hh, *layer_norm)
        operator, arguments = _LSTM_NORM, (input, w_ih, w_hh, None, None, w_hr, w_cell, h0, c0, batch_sizes, reverse)
    results = operator(
        *arguments,
        controls=_control_arguments("lstm_layer", controls, CellStateControls),
        recompute=recompute,
        meet=meet,
        packing=packing,
    )
    return results[: 4 if controls and controls.get("return_cells") else 3]


def slstm_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    recompute: bool = False,
    meet: Meet | None = None,
    packing: Packing | None = None,
    **controls: Unpack[Controls],
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Runs one sLSTM layer in one direction over a sequence.

    For t = 0..T-1, with ``i, f, z, o`` the four H-row blocks of ``input[t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh``::

        m_next = max(log(sigmoid(f)) + m, i)          # i where n is 0: nothing has been stored
        i, f = exp(i - m_next), exp(log(sigmoid(f)) + m - m_next)
        c = f * c + i * tanh(z)
        n = f * n + i
        m = m_next
        h = sigmoid(o) * c / n

    m keeps the exponentials in range; c and n are relative to it, and it has no gradient.
    The equation is that of the sLSTM of Beck et al., "xLSTM: extended long short-term memory", 2024, with the sigmoid
    as forget gate and one head. Arguments and errors are those of `rnn_layer`, with G = 4, and `c0`, the initial c, n
    and m, (3, B, H): zeros are a state in which nothing has been stored.

    Returns:
        ``output`` (T, B, H) or packed (N, H), ``h_n`` (B, H) and ``c_n`` (3, B, H).
    """
    arguments = (input, w_ih, w_hh, b_ih, b_hh, None, None, h0, c0, batch_sizes, reverse)
    output, h_n, c_n, *_ = _SLSTM(
        *arguments,
        controls=_control_arguments("slstm_layer", controls, Controls),
        recompute=recompute,
        meet=meet,
        packing=packing,
    )
    return output, h_n, c_n


def _layer_norm_parameters(
    op: str,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gain_ih: Tensor | None,
    gain_hh: Tensor | None,
    *gain_and_bias_of_c: Tensor | None,
) -> Tensor:
    """The parameters of layer normalisation as one tensor, which is how the operators take them."""
    named = {"gain_ih": gain_ih, "b_ih": b_ih, "gain_hh": gain_hh, "b_hh": b_hh}
    named |= zip(("gain_c", "bias_c"), gain_and_bias_of_c, strict=False)
    parts = []
    for name, tensor in named.items():
        shape = (w_hh.shape[0] // (4 if name.endswith("_c") else 1),)
        if tensor is None and name.startswith("b"):
            tensor = w_hh.new_zeros(shape)
        if tensor is None or tensor.shape != shape:
            got = "None" if tensor is None else list(tensor.shape)
            raise RuntimeError(f"fastrnn::{op}: expected {name} of shape {list(shape)}, got {got}")
        parts.append(tensor)
    return torch.cat(parts)


# The annotations of `Controls` and `CellStateControls` stand in the order of the schemas.
_DEFAULTS = {"grad_clip": 0.0, "return_cells": False}


def _control_arguments(op: str, controls: Mapping[str, Any], allowed: Any) -> tuple[Any, ...]:
    if not controls:
        return ()
    for name in controls:
        if name not in allowed.__annotations__:
            raise TypeError(f"{op}() got an unexpected keyword argument '{name}'")
    values = [controls.get(name, _DEFAULTS.get(name)) for name in allowed.__annotations__]
    return tuple(values) if any(isinstance(value, Tensor) or value for value in values) else ()


# The operators, with their fake kernels, derivatives and batching rules.


def _options(allowed: Any, batch_sizes: Tensor | None, reverse: bool, controls: Sequence[Any]) -> dict[str, Any]:
    return {"batch_sizes": batch_sizes, "reverse": reverse} | dict(zip(allowed.__annotations__, controls, strict=False))


def _h_operator(
    name: str, saved: int, gates: int, layer: Callable[..., tuple[Tensor, Tensor]], **cell: Any
) -> Operator:
    def definition(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, w_cell, h0, batch_sizes, reverse = arguments[:9]
        options = cell | _options(Controls, batch_sizes, reverse, arguments[9:])
        return layer(*tensors, h0, **options, **({} if w_cell is None else {"w_cell": w_cell}))

    fakes.register_h_layer(name, saved, gates)
    operator = Operator(name, floats=7, states=1, results=2, definition=definition)
    flops.register(operator, gates_within=1 if name == "gru_before_layer" else 0)
    return operator


def _c_operator(name: str, saved: int, gates: int, definition: Callable[..., tuple[Tensor, ...]]) -> Operator:
    fakes.register_c_layer(name, saved, gates)
    operator = Operator(name, floats=9, states=2, results=4, definition=definition)
    flops.register(operator)
    return operator


def _lstm_definition(*arguments: Any, coupled: bool = False, norm: bool = False) -> tuple[Tensor, ...]:
    input, w_ih, w_hh, b_ih, b_hh, w_hr, w_peephole, h0, c0, batch_sizes, reverse, *controls = arguments
    options = _options(CellStateControls, batch_sizes, reverse, controls)
    if norm:
        gates, hidden = w_hh.shape[0], c0.shape[1]
        gain_ih, b_ih, gain_hh, b_hh, *of_c = w_peephole.split([gates] * 4 + [hidden] * 2)
        options["layer_norm"], w_peephole = (gain_ih, gain_hh, *of_c), None
    floats = (input, w_ih, w_hh, b_ih, b_hh, h0, c0)
    return reference.lstm_layer(*floats, coupled=coupled, w_peephole=w_peephole, w_hr=w_hr, **options)


def _gru_norm_definition(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: None,
    b_hh: None,
    h0: Tensor,
    *,
    w_cell: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    gain_ih, bias_ih, gain_hh, bias_hh = w_cell.chunk(4)
    return reference.gru_layer(input, w_ih, w_hh, bias_ih, bias_hh, h0, layer_norm=(gain_ih, gain_hh), **options)


def _slstm_definition(*arguments: Any) -> tuple[Tensor, ...]:
    input, w_ih, w_hh, b_ih, b_hh, _, _, h0, c0, batch_sizes, reverse, *controls = arguments
    options = _options(Controls, batch_sizes, reverse, controls)
    return reference.slstm_layer(input, w_ih, w_hh, b_ih, b_hh, h0, c0, **options)


STEP_WORTH_FUSING, STEP_WORTH_A_NODE = 1 << 16, 1 << 20  # multiply-adds; with gradients
_RNN_STEP = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}
_RNN = {
    nonlinearity: _h_operator(f"rnn_{nonlinearity}_layer", 0, 1, reference.rnn_layer, nonlinearity=nonlinearity)
    for nonlinearity in ("tanh", "relu", "leaky_relu")
}
_GRU = _h_operator("gru_layer", 4, 3, reference.gru_layer)
_GRU_BEFORE = _h_operator("gru_before_layer", 3, 3, reference.gru_layer, reset_after=False)
_LSTM = _c_operator("lstm_layer", 4, 4, _lstm_definition)
_LSTM_COUPLED = _c_operator("lstm_coupled_layer", 3, 3, partial(_lstm_definition, coupled=True))
_LSTM_PEEPHOLE = _c_operator("lstm_peephole_layer", 4, 4, _lstm_definition)
_LSTM_NORM = _c_operator("lstm_norm_layer", 12, 4, partial(_lstm_definition, norm=True))
_GRU_NORM = _h_operator("gru_norm_layer", 10, 3, _gru_norm_definition)
_SLSTM = _c_operator("slstm_layer", 5, 4, _slstm_definition)
flops.tell_torch()

# Of the cells of torch.nn: what packs the weights of a layer, and what runs all layers of a module.
STACKS = {
    cell: (operator.pack, getattr(torch.ops.fastrnn, f"_{operator.name}_stack").default)
    for cell, operator in {"tanh": _RNN["tanh"], "relu": _RNN["relu"], "gru": _GRU, "lstm": _LSTM}.items()
}
