# SPDX-License-Identifier: BSD-3-Clause
"""The exact test: an RNN with relu, weights in {-1, 0, 1} and small integers everywhere computes integers.

While no sum of magnitudes passes 2^p, p the width of the significand, no rounding happens: any order of summation gives
the bits of the float64 result, gradients included. One wrong row, step, direction or layer is a wrong integer.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from parity import LAYOUTS, Case, LayerCase, draw, run
from torch import nn

import fastrnn
from fastrnn import ops, reference

SIGNIFICAND = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
SIZES = {  # T, B, I, H: as large as the significand allows
    torch.float64: (5, 9, 20, 37),
    torch.float32: (5, 9, 20, 37),
    torch.float16: (3, 5, 9, 17),
    torch.bfloat16: (2, 3, 5, 19),
}
# I, H: 1 to 4 vectors in the last panel of each product, of 4 to 16 values, full or not
LAST_PANELS = [(12, 16), (20, 48), (32, 44), (48, 20), (60, 33), (64, 60), (97, 28)]


def signs(shape, *, generator, dtype, density=1.0):
    """-1 and 1, or 0 with probability 1 - density."""
    sign = 2 * torch.randint(0, 2, shape, generator=generator) - 1
    return (sign * (torch.rand(shape, generator=generator) < density)).to(dtype)


def sparse(weight, generator):
    """About one and a half weights a row, so that values grow slowly with T."""
    return signs(weight.shape, generator=generator, dtype=weight.dtype, density=1.5 / weight.shape[-1])


def assert_exact(ours, truth, magnitude, significand):
    """Compares outputs and gradients bit by bit, once it is known that they can be exact."""
    for our, true, largest in zip(ours, truth, magnitude, strict=True):
        assert our.keys() == true.keys()
        for name in our:
            assert largest[name].abs().max() <= 2**significand, f"{name}: the test itself leaves the exact range"
            torch.testing.assert_close(
                our[name].cpu().double(), true[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def module_cases():
    for dtype, size in SIZES.items():
        for layout, layers, bidirectional in itertools.product(LAYOUTS, (1, 2, 3), (False, True)):
            if dtype in (torch.float32, torch.float64) or (layers, bidirectional) in ((1, False), (1, True)):
                yield Case("rnn_relu", *size, dtype, layout, num_layers=layers, bidirectional=bidirectional)
        yield Case("rnn_relu", *size, dtype, bias=False, hx=False)


@pytest.mark.parametrize("case", list(module_cases()), ids=str)
def test_modules_are_exact(case, device):
    generator = torch.Generator().manual_seed(0)
    ours = case.module(fastrnn, device=device)
    for parameter in ours.parameters():
        parameter.data.copy_(sparse(parameter, generator))
    truth, magnitude = (replace(case, dtype=torch.float64).module(nn) for _ in range(2))
    truth.load_state_dict(ours.state_dict())
    magnitude.load_state_dict({name: weight.abs() for name, weight in ours.state_dict().items()})
    tensors, lengths = draw(case, value=signs)
    results = [run(case, module, dict(tensors), lengths) for module in (ours, truth)]
    # Without cancellation, every partial sum is below the total.
    largest = run(case, magnitude, {name: tensor.abs() for name, tensor in tensors.items()}, lengths)
    assert_exact(*results, largest, SIGNIFICAND[case.dtype])


def layer_cases():
    for dtype, size in SIZES.items():
        for packed, reverse, x_gates, bias in itertools.product((False, True), repeat=4):
            yield LayerCase("rnn_relu", *size, dtype, packed, reverse, bias, x_gates=x_gates)
    for sizes, dtype in itertools.product(LAST_PANELS, (torch.float64, torch.float32)):
        yield LayerCase("rnn_relu", 3, 7, *sizes, dtype)
    for threads_split_units in ((3, 1, 5, 129), (3, 2, 5, 257), (2, 1, 3, 1000)):
        for packed, reverse in itertools.product((False, True), repeat=2):
            yield LayerCase("rnn_relu", *threads_split_units, packed=packed, reverse=reverse)


@pytest.mark.parametrize("case", list(layer_cases()), ids=str)
def test_layers_are_exact(case, device):
    generator = torch.Generator().manual_seed(0)
    arguments = {
        name: tensor if tensor is None or name in ("input", "h0") else sparse(tensor, generator)
        for name, tensor in case.draw(value=signs).items()
    }

    def tensors(function):
        return {name: None if tensor is None else function(tensor) for name, tensor in arguments.items()}

    ours = case.run(ops, tensors(lambda t: t.to(device)), grad=signs)
    truth = case.run(reference, tensors(lambda t: t.double()), grad=signs)
    magnitude = case.run(reference, tensors(lambda t: t.double().abs()), grad=lambda *a, **k: signs(*a, **k).abs())
    assert_exact(ours, truth, magnitude, SIGNIFICAND[case.dtype])
