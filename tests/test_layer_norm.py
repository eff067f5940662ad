# SPDX-License-Identifier: BSD-3-Clause
"""The option layer_norm, against the paper, written with torch.nn.LayerNorm."""

import copy

import pytest
import torch
from test_options import B, H, I, T, assert_same, build, draw, gradients
from torch import Tensor, nn

import fastrnn
from fastrnn import reference


def normalised(x: Tensor, sizes: tuple[int, ...], gain: Tensor, bias: Tensor | None) -> Tensor:
    """With torch.nn's module, group by group."""
    normed = [
        nn.LayerNorm(n, elementwise_affine=False)(part) for n, part in zip(sizes, x.split(sizes, -1), strict=True)
    ]
    return torch.cat(normed, -1) * gain + (0 if bias is None else bias)


def layer_norm_layer(module: nn.Module, x: Tensor, run: str, reverse: bool) -> Tensor:
    """One direction of one layer, step by step, as the paper has it."""
    p = {name: getattr(module, f"{name}_{run}", None) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    p |= {
        name: getattr(module, f"{name}_{run}", None) for name in ("gain_ih", "gain_hh", "gain_c", "bias_c", "weight_hr")
    }
    is_lstm = isinstance(module, fastrnn.LSTM)
    sizes = (4 * H,) if is_lstm else (2 * H, H)
    h = x.new_zeros(B, module.proj_size or H)
    c = x.new_zeros(B, H)
    outputs = []
    for t in reversed(range(T)) if reverse else range(T):
        gx = normalised(x[t] @ p["weight_ih"].T, sizes, p["gain_ih"], p["bias_ih"])
        gh = normalised(h @ p["weight_hh"].T, sizes, p["gain_hh"], p["bias_hh"])
        if is_lstm:
            i, f, g, o = (gx + gh).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * normalised(c, (H,), p["gain_c"], p["bias_c"]).tanh()
            h = h if p["weight_hr"] is None else h @ p["weight_hr"].T
        else:
            r, z = (gx + gh)[:, : 2 * H].sigmoid().chunk(2, -1)
            n = (gx[:, 2 * H :] + r * gh[:, 2 * H :]).tanh()
            h = (1 - z) * n + z * h
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs)


@pytest.mark.parametrize("options", ({}, {"bias": False}, {"bidirectional": True, "num_layers": 2}), ids=str)
@pytest.mark.parametrize("name, more", (("gru_norm", {}), ("lstm_norm", {}), ("lstm_norm", {"proj_size": 6})), ids=str)
def test_layer_norm_is_that_of_the_paper(name, more, options):
    module = build(name, **more, **options)
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter += 0.2 * draw(*parameter.shape, seed=k)
    input = draw(T, B, I).requires_grad_()
    expected = input
    for layer in range(module.num_layers):
        runs = [(f"l{layer}", False), (f"l{layer}_reverse", True)][: 1 + module.bidirectional]
        expected = torch.cat([layer_norm_layer(module, expected, *run) for run in runs], -1)
    output = module(input)[0]
    assert_same([output], [expected])
    assert_same(gradients([output], module, input), gradients([expected], module, input))


def test_layer_norm_begins_with_gains_of_one():
    for _ in range(2):
        module = build("lstm_norm", num_layers=2, forget_bias=1.0)
        module.reset_parameters()
        for name, parameter in module.named_parameters():
            if name.startswith("gain"):
                assert (parameter == 1).all()
            if name.startswith("bias_c"):
                assert not parameter.any()
        assert (module.bias_ih_l1[H : 2 * H] == 1).all()


def test_layer_norm_does_not_see_the_scale_of_its_weights():
    module, input = build("gru_norm"), draw(T, B, I)
    expected = module(input)[0]
    with torch.no_grad():
        module.weight_ih_l0 *= 1000
        module.weight_hh_l0 *= 1000
    # eps is 1e-5 beside the variance of the products
    torch.testing.assert_close(module(input)[0], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("name", ("gru_norm", "lstm_norm"))
def test_short_types_of_layer_norm(name, dtype):
    """Division by a small spread magnifies rounding: the measure is the definition in the same dtype."""
    module, input = build(name), draw(T, B, I)
    layer = reference.gru_layer if name == "gru_norm" else reference.lstm_layer

    def run(dtype: torch.dtype, layer=None) -> list[Tensor]:
        typed, x = copy.deepcopy(module).to(dtype), input.to(dtype).requires_grad_()
        if layer is None:
            output = typed(x)[0]
        else:
            weights, states = list(typed.parameters()), [x.new_zeros(B, H)] * (1 if name == "gru_norm" else 2)
            output = layer(x, *weights[:4], *states, layer_norm=weights[4:])[0]
        return [t.double() for t in (output, *gradients([output.double()], typed, x))]

    for ours, theirs, expected in zip(run(dtype), run(dtype, layer), run(torch.float64), strict=True):
        error, their_error = ((got - expected).norm() / expected.norm() for got in (ours, theirs))
        assert error < 2 * their_error + 2 * torch.finfo(dtype).eps
