# SPDX-License-Identifier: BSD-3-Clause
"""The operators: typed functions over `torch.ops.fastrnn`, with their fake kernels, derivatives and batching rules.

One operator runs one layer in one direction. Backward is an operator of its own; its derivative, which double backward
asks for, is taken through `fastrnn.reference`, and so is forward-mode differentiation as a whole. Under `torch.vmap`
the operators run once per member. Autocast does not reach into them: they compute in the dtype of their arguments.

Letters: T time, B batch, I input, H hidden, P projection (P = H without one), N the sum of `batch_sizes`, G gates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library, reference
from .autograd import Operator

_library.load()


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
        nonlinearity: ``"tanh"`` or ``"relu"``.

    Returns:
        ``output`` (T, B, H) or packed (N, H), and ``h_n`` (B, H).

    Raises:
        RuntimeError: ``fastrnn::<op>: expected <argument> <fact>, got <fact>`` on a wrong shape, dtype or device.
        ValueError: On another `nonlinearity`.

    Gates and states are computed in float32 (float64 for float64). Differentiable any number of times, in
    reverse and in forward mode, in every floating-point tensor.
    The equation is that of `torch.nn.RNN`.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"fastrnn::rnn_layer: expected nonlinearity 'tanh' or 'relu', got {nonlinearity!r}")
    operator = _RNN_TANH if nonlinearity == "tanh" else _RNN_RELU
    output, h_n, *_ = operator(input, w_ih, w_hh, b_ih, b_hh, h0, batch_sizes, reverse)
    return output, h_n


def gru_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Runs one GRU layer in one direction over a sequence.

    For t = 0..T-1, with ``xr, xz, xn`` the three H-row blocks of ``input[t] @ w_ih.T + b_ih`` and ``hr, hz, hn`` those
    of ``h @ w_hh.T + b_hh``::

        r = sigmoid(xr + hr)
        z = sigmoid(xz + hz)
        n = tanh(xn + r * hn)
        h = (1 - z) * n + z * h

    The equation is that of `torch.nn.GRU`. Arguments, results and errors are those of `rnn_layer`, with G = 3.
    """
    output, h_n, *_ = _GRU(input, w_ih, w_hh, b_ih, b_hh, h0, batch_sizes, reverse)
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
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
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
        batch_sizes: (T,), or None.
        reverse: Run from the last step to the first.

    Returns:
        ``output`` (T, B, P) or packed (N, P), ``h_n`` (B, P), ``c_n`` (B, H).
    """
    output, h_n, c_n, *_ = _LSTM(input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, batch_sizes, reverse)
    return output, h_n, c_n


# Fake kernels: shapes alone.


def _states_fake(input: Tensor, w_hh: Tensor, states: Sequence[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
    leading = input.shape[:1] if batch_sizes is not None else input.shape[:2]
    return [input.new_empty((*leading, w_hh.shape[1])), *(torch.empty_like(s).contiguous() for s in states)]


def _rows(input: Tensor) -> int:
    return input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty_or_like(like: Tensor, shape: Sequence[int], wanted: bool) -> Tensor:
    return like.new_empty(tuple(shape) if wanted else (0,))


def _lstm_layer_fake(input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, batch_sizes, reverse, save):  # type: ignore[no-untyped-def]
    output, h_n, c_n = _states_fake(input, w_hh, (h0, c0), batch_sizes)
    n, hidden = _rows(input), w_hh.shape[0] // 4
    saved_c = input.new_empty((n, hidden) if save else (0,), dtype=_acc_dtype(input.dtype))
    return (
        output,
        h_n,
        c_n,
        _empty_or_like(input, (n, 4 * hidden), save),
        saved_c,
        _empty_or_like(input, (n, hidden), save and w_hr is not None),
    )


def _one_state_layer_fake(saved: int, gates: int) -> Callable[..., tuple[Tensor, ...]]:
    def fake(input, w_ih, w_hh, b_ih, b_hh, h0, batch_sizes, reverse, save):  # type: ignore[no-untyped-def]
        output, h_n = _states_fake(input, w_hh, (h0,), batch_sizes)
        columns = saved * (w_hh.shape[0] // gates)
        return output, h_n, _empty_or_like(input, (_rows(input), columns), save and saved > 0)

    return fake


def _gradients_fake(
    inputs: Sequence[Tensor | None], states: Sequence[Tensor], need_input: bool, need_weights: bool
) -> tuple[Tensor, ...]:
    input, *weights = inputs
    assert input is not None
    return (
        _empty_or_like(input, input.shape, need_input),
        *(_empty_or_like(input, () if w is None else w.shape, need_weights and w is not None) for w in weights),
        *(state.new_empty(state.shape) for state in states),
    )


def _lstm_layer_backward_fake(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, batch_sizes, reverse, output,
    saved_gates, saved_c, saved_m, need_input, need_weights,
):  # fmt: skip
    return _gradients_fake((input, w_ih, w_hh, b_ih, b_hh, w_hr), (h0, c0), need_input, need_weights)


def _one_state_layer_backward_fake(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, input, w_ih, w_hh, b_ih, b_hh, h0, batch_sizes, reverse, output, saved_gates, need_input,
    need_weights,
):  # fmt: skip
    return _gradients_fake((input, w_ih, w_hh, b_ih, b_hh), (h0,), need_input, need_weights)


# The operators.


def _lstm_definition(input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, batch_sizes, reverse):  # type: ignore[no-untyped-def]
    return reference.lstm_layer(
        input, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr=w_hr, batch_sizes=batch_sizes, reverse=reverse
    )


def _one_state_operator(
    name: str, saved: int, gates: int, layer: Callable[..., tuple[Tensor, Tensor]], **options: str
) -> Operator:
    def definition(*arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, batch_sizes, reverse = arguments
        return layer(*tensors, batch_sizes=batch_sizes, reverse=reverse, **options)

    torch.library.register_fake(f"fastrnn::{name}", _one_state_layer_fake(saved, gates))
    torch.library.register_fake(f"fastrnn::{name}_backward", _one_state_layer_backward_fake)
    return Operator(name, floats=6, states=1, definition=definition)


_RNN_TANH = _one_state_operator("rnn_tanh_layer", 0, 1, reference.rnn_layer, nonlinearity="tanh")
_RNN_RELU = _one_state_operator("rnn_relu_layer", 0, 1, reference.rnn_layer, nonlinearity="relu")
_GRU = _one_state_operator("gru_layer", 4, 3, reference.gru_layer)

torch.library.register_fake("fastrnn::lstm_layer", _lstm_layer_fake)
torch.library.register_fake("fastrnn::lstm_layer_backward", _lstm_layer_backward_fake)
_LSTM = Operator("lstm_layer", floats=8, states=2, definition=_lstm_definition)
