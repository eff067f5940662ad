# SPDX-License-Identifier: BSD-3-Clause
"""How the operators are batched: rules for torch.vmap, as torch.library.register_vmap takes them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastrnn.autograd import Operator


def of_forward(operator: "Operator", info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
    """Of a layer: members that share their weights are rows of one batch, others run one by one."""
    _refuse_mapped(operator.forward, in_dims, "batch_sizes", operator.floats)
    first_state, batch_sizes = operator.floats - operator.states, arguments[operator.floats]
    plain = not arguments[operator.floats + 3 :]  # a control has rows of its own
    if batch_sizes is not None or not plain or any(dim is not None for dim in in_dims[1:first_state]):
        return _one_by_one(operator.forward, info, in_dims, arguments)

    # V members of B rows each. Rows are the last dimension but one: of c0 of an sLSTM, (3, B, H), not the first.
    def fold(index: int) -> Tensor:
        tensor, dim = arguments[index], in_dims[index]
        if dim is None:
            tensor, dim = tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape), 0
        member_dim = tensor.dim() - 3
        return tensor.movedim(dim, member_dim).flatten(member_dim, member_dim + 1)  # type: ignore[no-any-return]

    states = [fold(index) for index in range(first_state, operator.floats)]
    results = operator.forward(fold(0), *arguments[1:first_state], *states, *arguments[operator.floats :])
    members_and_rows = (info.batch_size, states[0].size(0) // info.batch_size)
    unfolded = [result.unflatten(-2, members_and_rows) for result in results[: 1 + operator.states]]
    saved = [  # (T*V*B, K) to (V, T*B, K)
        None if t is None else t.unflatten(0, (-1, *members_and_rows)).movedim(1, 0).flatten(1, 2)
        for t in results[1 + operator.states :]
    ]
    dims = [*(result.dim() - 3 for result in unfolded), *(None if t is None else 0 for t in saved)]
    return (*unfolded, *saved), tuple(dims)


def of_backward(operator: "Operator", info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
    """Of the backward of a layer: one by one."""
    _refuse_mapped(operator.backward, in_dims, "batch_sizes", operator.results + operator.floats)
    return _one_by_one(operator.backward, info, in_dims, arguments)


def _refuse_mapped(op: Any, in_dims: Sequence[int | None], name: str, index: int) -> None:
    if in_dims[index] is not None:
        raise RuntimeError(f"{op.name()}: expected {name} to be the same for all members of vmap, got a mapped one")


def _one_by_one(op: Any, info: Any, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> Any:
    members = [
        op(*(a if dim is None else a.select(dim, member) for a, dim in zip(arguments, in_dims, strict=True)))
        for member in range(info.batch_size)
    ]
    stacked = tuple(None if results[0] is None else torch.stack(results) for results in zip(*members, strict=True))
    return stacked, tuple(None if result is None else 0 for result in stacked)
