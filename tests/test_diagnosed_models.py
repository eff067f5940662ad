# SPDX-License-Identifier: BSD-3-Clause
"""What diagnostics makes of models out of the ordinary. That its numbers are right, test_diagnostics.py tests."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parametrizations

import fastrnn
from fastrnn.diagnostics import gradient_flow, saturation

T, B, I, H = 6, 4, 3, 5  # noqa: E741


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_stay_as_they_are(fails):
    """Statistics of BatchNorm, which backward keeps too, and the power iteration of a spectral norm."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = parametrizations.spectral_norm(nn.RNN(I, H), "weight_hh_l0")
            self.norm = nn.BatchNorm1d(H)
            self.tied = self.norm
            self.register_buffer("none", None)

        def forward(self, x):
            result = self.tied(self.norm(self.rnn(x)[0].flatten(0, 1)))
            if fails:
                raise ArithmeticError
            return result

    model = Model()
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    batch = torch.randn(T, B, I), torch.randn(T * B, H)
    for look in (partial(gradient_flow, loss_fn=mse_loss), saturation):
        with pytest.raises(ArithmeticError) if fails else nullcontext():
            look(model, batch)
        assert type(model.rnn).__bases__[-1] is nn.RNN
        after = dict(model.named_buffers())
        assert list(after) == list(before)
        for name, (buffer, value) in before.items():
            assert after[name] is buffer and torch.equal(buffer, value), name


def test_a_subclass_is_named_as_the_reason():
    class Own(nn.LSTM):
        pass

    with pytest.raises(ValueError, match="Own is a subclass of torch.nn.LSTM"):
        saturation(nn.Sequential(Own(I, H)), torch.zeros(T, B, I))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "SLSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_the_name_of_a_class_tells_nothing(name):
    base = getattr(fastrnn, name)
    module = type("LSTMRNNEncoder", (base,), {})(I, H)
    input = torch.randn(B, I) if name.endswith("Cell") else torch.randn(T, B, I)
    expected = saturation(base(I, H), input).shares[name if name.endswith("Cell") else f"{name} layer 0"]
    (shares,) = saturation(module, input).shares.values()
    assert list(shares) == list(expected)


@pytest.mark.parametrize("library", [fastrnn, nn])
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights(parametrize, name, library):
    module = parametrize(getattr(library, name)(I, H), "weight_hh_l0" if name == "LSTM" else "weight_hh").eval()
    (shares,) = saturation(module, torch.randn(B, I) if name == "GRUCell" else torch.randn(T, B, I)).shares.values()
    assert list(shares) == list("ifgo" if name == "LSTM" else "rzn")


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = fastrnn.LSTM(I, H)

    def forward(self, input):
        return self.module(input, lengths=torch.zeros(B).long())


@pytest.mark.parametrize("look", [saturation, partial(gradient_flow, loss_fn=lambda result, _: result[0].sum())])
def test_a_batch_of_nothing(look):
    with pytest.raises(ValueError, match="expected a batch of at least one sequence, LSTM layer 0 got none"):
        look(fastrnn.LSTM(I, H), (torch.zeros(T, 0, I), 0))
    with pytest.raises(ValueError, match="module layer 0 got none"):
        look(Padded(), (torch.zeros(T, B, I), 0))
