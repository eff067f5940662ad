# SPDX-License-Identifier: BSD-3-Clause
"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators.

As everywhere in torch these are the matrix products alone: 2*N*K*M for (N, K) times (K, M). N is the number of steps
that all sequences have: of packed ones the rows, with `lengths` their sum, or all rows where the lengths are fake or on
the meta device, and so unknown.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .autograd import Operator, halves, needed_gradients, options_and_tensors

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def register(operator: Operator, gates_within: int = 0) -> None:
    """Has torch count an operator and its backward.

    Args:
        operator: Of one layer; those of two layers at once come along.
        gates_within: How many gates have a product with h that begins from other gates of the step: not with h itself.
    """
    for op, formula in ((operator.name, _forward), (f"{operator.name}_backward", _backward)):
        of_one = partial(formula, operator, gates_within)
        _formulas[getattr(torch.ops.fastrnn, op)] = of_one
        _formulas[getattr(torch.ops.fastrnn, f"_{op}_both")] = partial(_both, of_one)


def _forward(operator: Operator, gates_within: int, *arguments: Any, out_val: Any) -> int:
    rows, _ = _rows(operator, arguments, arguments[operator.floats + 3 :])
    return 2 * rows * sum(_sizes(operator, arguments))


def _backward(operator: Operator, gates_within: int, *arguments: Any, out_val: Any) -> int:
    (_, _, *controls), *tensors = options_and_tensors(operator, arguments)
    floats = tensors[operator.results :]
    need_input, need_weights, *_, need_states = needed_gradients(operator, arguments)
    rows, rows_after_others = _rows(operator, floats, controls)
    of_input, of_h, of_projection = _sizes(operator, floats)
    # The gradient of h before the first step of a sequence is that of h0.
    of_h_itself = of_h - gates_within * floats[2].shape[1] ** 2
    products: int = rows * (of_h - of_h_itself + of_projection)
    products += (rows if need_states else rows_after_others) * of_h_itself
    if need_input:
        products += rows * of_input
    if need_weights:
        products += rows * (of_input + of_h + of_projection)
    return 2 * products


def _both(of_one: Callable[..., int], *arguments: Any, out_val: Any) -> int:
    return sum(of_one(*arguments_of_one, out_val=None) for arguments_of_one in halves(arguments))


def _sizes(operator: Operator, floats: Sequence[Any]) -> list[int]:
    """Multiplications of one row with W_ih, W_hh and the projection."""
    return [0 if weight is None else weight.numel() for weight in operator.weights(floats)]


def _rows(operator: Operator, floats: Sequence[Any], controls: Sequence[Any]) -> tuple[int, int]:
    """How many steps the sequences have, and how many of them have one before."""
    input, h0 = floats[0], floats[operator.floats - operator.states]
    lengths: Tensor | None = controls[0] if controls else None
    if lengths is not None and not lengths.is_meta and not isinstance(lengths, FakeTensor):
        return int(lengths.sum()), int((lengths - 1).clamp(min=0).sum())
    rows = input.numel() // input.shape[-1]
    return rows, max(rows - h0.shape[0], 0)


def tell_torch() -> None:
    """Hands over what was registered, as soon as torch's counter is imported.

    Not before: most programs never ask for it, and it imports Triton where there is one.
    """
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())


def _hand_over(counter: Any) -> None:
    for op, formula in _formulas.items():
        counter.register_flop_formula(op, get_raw=True)(formula)


class _Finder(MetaPathFinder):
    """Finds torch's counter as Python does, and has it execute `_hand_over` last."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        spec: Any = PathFinder.find_spec(name, path, target) if name == _COUNTER else None
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_hand_over(module: Any) -> None:
                execute(module)
                _hand_over(module)

            spec.loader.exec_module = execute_and_hand_over
        return spec
