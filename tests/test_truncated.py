# SPDX-License-Identifier: BSD-3-Clause
"""Truncated backpropagation: the forward of a full run, the gradient of one that is cut at the chunks."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn.truncated import chunks, detach

NAMES = ("RNN", "GRU", "LSTM")
T, B, I, H = 11, 3, 4, 5  # noqa: E741


def make(name, library=fastrnn, **options):
    return getattr(library, name)(I, H, num_layers=2, **options).double()


def states_of(state):
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("library", [fastrnn, nn])
@pytest.mark.parametrize("layout", ["dense", "batch_first", "unbatched", "unbatched_batch_first"])
@pytest.mark.parametrize("length", [1, 4, T, T + 5])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forward_is_that_of_the_whole_sequence(name, given, length, layout, library):
    module = make(name, library, batch_first="batch_first" in layout)
    shape = {"dense": (T, B, I), "batch_first": (B, T, I)}.get(layout, (T, I))
    dim = 1 if layout == "batch_first" else 0
    input = torch.randn(shape, dtype=torch.float64)
    state = None
    if given:
        state = tuple(torch.randn_like(s) for s in states_of(module(input)[1]))
        state = state if name == "LSTM" else state[0]
    expected, expected_state = module(input, state)
    parts = list(chunks(module, input, length, state))
    assert [output.size(dim) for output, _ in parts] == [len(c) for c in torch.arange(T).split(length)]
    torch.testing.assert_close(torch.cat([output for output, _ in parts], dim), expected)
    torch.testing.assert_close(parts[-1][1], expected_state)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_stops_at_the_chunks(name):
    """Against a sum of losses of separate calls, each with constants for the state that it begins with."""
    module = make(name)
    input = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(T, B, H, dtype=torch.float64)
    leaves = [input, *module.parameters()]
    loss = sum((o * w).sum() for (o, _), w in zip(chunks(module, input, 4), weight.split(4), strict=True))
    gradient = torch.autograd.grad(loss, leaves)

    with torch.no_grad():
        begins = [None, *(module(input[:t])[1] for t in (4, 8))]
    expected = sum(
        (module(input[t : t + 4], begin)[0] * weight[t : t + 4]).sum()
        for t, begin in zip((0, 4, 8), begins, strict=True)
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaves))
    whole = torch.autograd.grad((module(input)[0] * weight).sum(), leaves)
    assert all((g - w).norm() > 1e-3 * w.norm() for g, w in zip(gradient[1:], whole[1:], strict=True))


def test_a_chunk_runs_with_the_weights_of_its_moment():
    module, input = make("GRU"), torch.randn(T, B, I, dtype=torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    losses = []
    for output, state in chunks(module, input, 4):
        loss = (output**2).sum() + state.sum()  # the state that is handed out has its history
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    torch.manual_seed(0)
    module, state, expected = make("GRU"), None, []
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for chunk in (input[:4], input[4:8], input[8:]):
        output, state = module(chunk, state if state is None else state.detach())
        loss = (output**2).sum() + state.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == expected


def test_any_model_with_a_state():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LSTM(I, H, batch_first=True), fastrnn.GRU(H, H, batch_first=True)

        def forward(self, x, state):
            state = state or {"first": None, "second": [None]}
            x, first = self.first(x, state["first"])
            x, second = self.second(x, state["second"][0])
            return {"output": x}, {"first": first, "second": [second]}

    model, input = Model(), torch.randn(B, T, I)
    parts = [output["output"] for output, _ in chunks(model, input, 3, dim=-2)]
    torch.testing.assert_close(torch.cat(parts, 1), model(input, None)[0]["output"])


def test_detach_keeps_the_form():
    pair = namedtuple("pair", "h c")
    leaf = torch.ones(2, requires_grad=True)
    detached = detach({"a": pair(leaf * 2, [leaf * 3, None]), "b": (leaf,)})
    assert isinstance(detached["a"], pair) and isinstance(detached["a"].c, list) and isinstance(detached["b"], tuple)
    tensors = [detached["a"].h, detached["a"].c[0], detached["b"][0]]
    assert [t.requires_grad for t in tensors] == [False] * 3
    assert [t[0].item() for t in tensors] == [2, 3, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": pack_sequence([torch.zeros(3, I)])}, TypeError, "expected input to be a Tensor, got PackedSequence"),
        ({"length": 0}, ValueError, "expected length to be at least 1, got 0"),
        ({"model": fastrnn.LSTM(I, H, bidirectional=True)}, ValueError, "expected model to have one direction"),
        ({"dim": 3}, ValueError, "expected dim to be one of the 3 of input, got 3"),
        ({"model": nn.Sequential(fastrnn.LSTM(I, H, batch_first=True))}, ValueError, "expected dim, the dimension of"),
    ],
)
def test_bad_arguments_are_named_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        chunks(**{"model": fastrnn.LSTM(I, H), "input": torch.zeros(T, B, I), "length": 4} | arguments)


def test_bad_state():
    with pytest.raises(TypeError, match="expected state to be made of tensors, tuples, lists and dicts, got str"):
        detach((torch.ones(1), "h"))
