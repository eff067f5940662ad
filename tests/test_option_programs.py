# SPDX-License-Identifier: BSD-3-Clause
"""What the modules offer beyond torch.nn, compiled, exported and traced."""

import pytest
import torch
from test_options import LENGTHS, MODULES, B, I, T, assert_same, build, draw, gradients, states_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn


@pytest.mark.parametrize("name", ("gru", "lstm", "slstm", "gru_norm", "lstm_norm"))
def test_compiled_without_a_graph_break(name):
    module = build(name, zoneout=0.0 if name == "slstm" else 0.25, recurrent_dropout=0.25, grad_clip=0.5).eval()
    input = draw(T, B, I).requires_grad_()
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for run in (module, compiled):
        output, _ = run(input, lengths=LENGTHS, reset=reset)
        results.append([output, *gradients([output], module, input)])
    assert_same(*results)


class Call(nn.Module):
    """A module with all that a call may say."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.options = {"return_cell_states": True} if isinstance(module, fastrnn.LSTM) else {}

    def forward(self, input, lengths, reset):
        output, states, *cells = self.module(input, lengths=lengths, reset=reset, **self.options)
        return output, *states_of(states), *cells


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("make", ("trace", "export"))
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_programs_of_calls_with_everything(make, name):
    """Of other lengths than they were made with, with gradients; `checkpoint`, which programs do without, is no bar."""
    call = Call(build(name, num_layers=2, bidirectional=True, grad_clip=0.5, checkpoint=3)).eval()
    T_, B_ = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    first, second = (
        (draw(T, B, I).requires_grad_(), torch.tensor([T, 1, 0, T, 4][:B]), draw(T, B, seed=2) > 0.5)
        for T, B in ((9, 5), (7, 3))
    )
    second[1].clamp_(max=7)
    if make == "trace":
        program = torch.jit.trace(call, first)
    else:
        program = torch.export.export(call, first, dynamic_shapes=({0: T_, 1: B_}, {0: B_}, {0: T_, 1: B_})).module()
    for arguments in (first, second):
        expected, got = call(*arguments), program(*arguments)
        assert_same(got, expected)
        assert_same(
            torch.autograd.grad(sum(o.sin().sum() for o in got), arguments[0]),
            torch.autograd.grad(sum(o.sin().sum() for o in expected), arguments[0]),
        )


@pytest.mark.parametrize("name", MODULES)
def test_fake_lengths(name):
    """What their values would be is asked by nothing that only needs shapes."""
    call = Call(build(name, num_layers=2, bidirectional=True)).eval()
    arguments = draw(T, B, I), LENGTHS, draw(T, B, seed=2) > 0.5
    shapes = [tensor.shape for tensor in call(*arguments)]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        results = call(*map(fake.from_tensor, arguments))
    assert [tensor.shape for tensor in results] == shapes


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_fake_batch_sizes(name):
    """Given states tell how many sequences there are."""
    packed = pack_padded_sequence(draw(T, B, I), LENGTHS.clamp(min=1), enforce_sorted=False)
    state = torch.zeros(1, B, 4).double()
    with FakeTensorMode() as fake:
        module, input = (
            getattr(fastrnn, name)(I, 4, dtype=torch.float64),
            PackedSequence(*map(fake.from_tensor, packed)),
        )
        state = fake.from_tensor(state)
        output, states = module(input, (state, state) if name == "LSTM" else state)
    assert output.data.shape == (len(packed.data), 4)
    assert all(state.shape == (1, B, 4) for state in states_of(states))


def test_recorded_lengths():
    """The check is part of what is recorded."""
    module, input = build("gru"), draw(T, B, I)
    program = make_fx(lambda lengths: module(input, lengths=lengths)[0])(LENGTHS)
    others = LENGTHS.flip(0)
    assert_same([program(others)], [module(input, lengths=others)[0]])
    with pytest.raises(RuntimeError, match="expected lengths from 0 to the number of steps of input"):
        program(others + T)


@pytest.mark.parametrize("transform", (grad, lambda f: grad(lambda x: grad(f)(x).sin().sum()), lambda f: vmap(grad(f))))
@pytest.mark.parametrize("name", MODULES)
def test_torch_func_of_a_layer_that_recomputes(name, transform):
    input = draw(4, T, I)
    modules = (build(name, checkpoint=steps) for steps in (2, None))
    assert_same(*([transform(lambda x, m=m: m(x)[0].sin().sum())(input)] for m in modules))
