# SPDX-License-Identifier: BSD-3-Clause
"""Truncated backpropagation through time: a long sequence in chunks, the state carried over without its history."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

State = TypeVar("State")


def chunks(
    model: Callable[..., tuple[Any, Any]], input: Tensor, length: int, state: Any = None, *, dim: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """Runs a model over a sequence chunk by chunk; gradients stay within a chunk.

    For k = 0, 1, ...::

        output[k], state[k+1] = model(input[k], detach(state[k]))

    so that memory and the reach of the gradient are those of one chunk, while outputs and states are those of one call
    with the whole sequence. A chunk runs when it is asked for, with the weights of that moment::

        for (output, state), target in zip(chunks(lstm, input, 100), target.split(100)):
            loss = loss_fn(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    Args:
        model: An RNN, GRU or LSTM of fastrnn or torch.nn, or any function that takes `input, state` and returns
            `output, state`. Its state may be a tensor or any nesting of tuples, lists and dicts.
        input: The whole sequence, (T, ...) or with time at `dim`.
        length: Steps of a chunk. The last chunk holds what remains.
        state: The state before the first step; None for the model's own initial state.
        dim: The dimension of time. An RNN, GRU or LSTM tells it itself, by its option `batch_first`; for other models
            it must be given.

    Yields:
        Output and state after each chunk. The state is not detached: a loss may depend on it.

    Raises:
        TypeError: If `input` is not a tensor.
        ValueError: If `length` is not positive, `dim` is missing or not a dimension of the input, or the module is
            bidirectional: its other direction begins at the end of the sequence.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"chunks: expected input to be a Tensor, got {type(input).__name__}")
    if length < 1:
        raise ValueError(f"chunks: expected length to be at least 1, got {length}")
    if isinstance(model, nn.RNNBase) and model.bidirectional:
        raise ValueError("chunks: expected model to have one direction, got a bidirectional one")
    if dim is None:
        if not isinstance(model, nn.RNNBase):  # one that takes the batch first would be cut into other sequences
            raise ValueError("chunks: expected dim, the dimension of time, which only an RNN, GRU or LSTM tells itself")
        dim = 1 if model.batch_first and input.dim() == 3 else 0
    if not -input.dim() <= dim < input.dim():
        raise ValueError(f"chunks: expected dim to be one of the {input.dim()} of input, got {dim}")
    return _chunks(model, input, length, state, dim)


def _chunks(
    model: Callable[..., tuple[Any, Any]], input: Tensor, length: int, state: Any, dim: int
) -> Iterator[tuple[Any, Any]]:
    for chunk in torch.split(input, length, dim):
        output, state = model(chunk, detach(state))
        yield output, state


def detach(state: State) -> State:
    """The same state without its history: every tensor in it detached.

    Args:
        state: A tensor, None, or any nesting of tuples, lists and dicts of them.

    Raises:
        TypeError: If something else is in it.
    """
    if state is None:
        return state
    if isinstance(state, Tensor):
        return state.detach()  # type: ignore[return-value]
    if isinstance(state, dict):
        return type(state)((key, detach(value)) for key, value in state.items())
    if isinstance(state, (list, tuple)):
        values = [detach(value) for value in state]
        return type(state)(*values) if hasattr(state, "_fields") else type(state)(values)
    raise TypeError(
        f"detach: expected state to be made of tensors, tuples, lists and dicts, got {type(state).__name__}"
    )
