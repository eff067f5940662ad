# SPDX-License-Identifier: BSD-3-Clause
"""Fake kernels: the shapes and dtypes of what the operators return, for torch.compile, export and the meta device."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .autograd import halves


def register_h_layer(name: str, saved: int, gates: int) -> None:
    """Of a cell with the state h alone, which saves `saved` values for each unit."""
    _register(name, _h_layer(saved, gates), _h_layer_backward)


def register_c_layer(name: str, saved: int, gates: int) -> None:
    """Of a cell with states beside h."""
    _register(name, _c_layer(saved, gates), _c_layer_backward)


def _register(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    for op, fake in ((name, forward), (f"{name}_backward", backward)):
        torch.library.register_fake(f"fastrnn::{op}", fake)
        torch.library.register_fake(f"fastrnn::_{op}_both", partial(_both, fake))


def _both(fake: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
    first, second = halves(arguments)
    return *fake(*first), *fake(*second)


def _output_and_states(
    input: Tensor, w_hh: Tensor, states: Sequence[Tensor], batch_sizes: Tensor | None
) -> list[Tensor]:
    leading = input.shape[:1] if batch_sizes is not None else input.shape[:2]
    return [input.new_empty((*leading, w_hh.shape[1])), *(torch.empty_like(s).contiguous() for s in states)]


def _rows(input: Tensor) -> int:
    return input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty_if(wanted: bool, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor | None:
    return like.new_empty(tuple(shape), dtype=dtype) if wanted else None


def _c_layer(saved: int, gates: int) -> Callable[..., tuple[Tensor | None, ...]]:
    def fake(  # type: ignore[no-untyped-def]
        input, w_ih, w_hh, b_ih, b_hh, w_hr, w_cell, h0, c0, batch_sizes, reverse, save, lengths=None, reset=None,
        h_mask=None, zone_h=None, grad_clip=0.0, zone_c=None, return_cells=False,
    ):  # fmt: skip
        output, h_n, c_n = _output_and_states(input, w_hh, (h0, c0), batch_sizes)
        n, hidden = _rows(input), w_hh.shape[0] // gates
        rows_of_c = n * (c0.shape[0] if c0.dim() == 3 else 1)
        return (
            output,
            h_n,
            c_n,
            _empty_if(return_cells, input, (*output.shape[:-1], hidden)),
            _empty_if(save, input, (n, saved * hidden)),
            _empty_if(save, input, (rows_of_c, hidden), _acc_dtype(input.dtype)),
            _empty_if(save and w_hr is not None, input, (n, hidden)),
            _empty_if(save and h_mask is not None, input, (n, w_hh.shape[1])),
        )

    return fake


def _h_layer(saved: int, gates: int) -> Callable[..., tuple[Tensor | None, ...]]:
    def fake(  # type: ignore[no-untyped-def]
        input, w_ih, w_hh, b_ih, b_hh, w_cell, h0, batch_sizes, reverse, save, lengths=None, reset=None, h_mask=None,
        zone_h=None, grad_clip=0.0,
    ):  # fmt: skip
        output, h_n = _output_and_states(input, w_hh, (h0,), batch_sizes)
        n, hidden = _rows(input), w_hh.shape[0] // gates
        return (
            output,
            h_n,
            _empty_if(save and saved > 0, input, (n, saved * hidden)),
            _empty_if(save and h_mask is not None, input, (n, hidden)),
        )

    return fake


def _gradients(
    inputs: Sequence[Tensor | None], states: Sequence[Tensor], need_input: bool, need_weights: bool, need_states: bool
) -> tuple[Tensor, ...]:
    input, *weights = inputs
    assert input is not None
    return (
        input.new_empty(input.shape if need_input else 0),
        *(input.new_empty(0 if w is None or not need_weights else w.shape) for w in weights),
        *(state.new_empty(state.shape if need_states else 0) for state in states),
    )


def _c_layer_backward(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, grad_cells, input, w_ih, w_hh, b_ih, b_hh, w_hr, w_cell, h0, c0, batch_sizes,
    reverse, output, saved_gates, saved_c, saved_m, h_in, need_input, need_weights, need_states, *controls,
):  # fmt: skip
    needed = (need_input, need_weights, need_states)
    return _gradients((input, w_ih, w_hh, b_ih, b_hh, w_hr, w_cell), (h0, c0), *needed)


def _h_layer_backward(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, input, w_ih, w_hh, b_ih, b_hh, w_cell, h0, batch_sizes, reverse, output, saved_gates, h_in,
    need_input, need_weights, need_states, *controls,
):  # fmt: skip
    needed = (need_input, need_weights, need_states)
    return _gradients((input, w_ih, w_hh, b_ih, b_hh, w_cell), (h0,), *needed)
