# SPDX-License-Identifier: BSD-3-Clause
"""How close is close enough: the one table of the test suite, and the one assertion that uses it.

Three figures are compared for every tensor: our error, the error of torch.nn in the same dtype, both measured against
torch.nn in float64 on the same (rounded) inputs and weights, and a bound::

    err(ours) <= 2 * err(torch.nn) + SLACK * (1 + is_grad) * ceil(log2(terms)) * eps(dtype)

``terms`` is the length of the longest sum, (I + H) * T. The error of an output or a state is the largest absolute
difference, that of a gradient the L2 norm of the difference over the norm of the true gradient. A gradient must also
point the right way: ``1 - cosine`` is of the order of half the square of the error, and is bounded so.

Loosening a number here is a commit of its own, with the measurement and the reason.
"""

import math

import torch
from torch import Tensor

SLACK = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 4.0, torch.float16: 4.0}


def error(value: Tensor, truth: Tensor, is_grad: bool) -> float:
    """The error of ``value`` as the table defines it. NaN where ``value`` or ``truth`` holds one."""
    difference = value.to(truth) - truth
    if not truth.numel():
        return 0.0
    if not is_grad:
        return difference.abs().max().item()
    norm = truth.norm().item()
    return difference.norm().item() / (norm or 1.0)


def cosine_distance(value: Tensor, truth: Tensor) -> float:
    """1 - cosine of the angle between two tensors, without cancellation. 0 if both are zero."""
    value = value.to(truth)
    if not truth.any():
        return 1.0 if value.any() else 0.0
    return ((value / value.norm() - truth / truth.norm()).norm() ** 2 / 2).item()


def slack(dtype: torch.dtype, terms: int, is_grad: bool) -> float:
    """What rounding may add to twice the error of torch.nn."""
    return SLACK[dtype] * (1 + is_grad) * math.ceil(math.log2(max(terms, 2))) * torch.finfo(dtype).eps


def assert_close_to_truth(
    name: str, ours: Tensor, torch_same_dtype: Tensor, truth_fp64: Tensor, *, terms: int, is_grad: bool = False
) -> None:
    """Asserts that ``ours`` is as close to the truth as torch.nn in the same dtype is, give or take rounding."""
    assert ours.shape == torch_same_dtype.shape, f"{name}: shape {ours.shape}, torch.nn's {torch_same_dtype.shape}"
    assert ours.dtype == torch_same_dtype.dtype, f"{name}: {ours.dtype}, torch.nn's {torch_same_dtype.dtype}"
    ours, theirs, truth = (tensor.detach().cpu() for tensor in (ours, torch_same_dtype, truth_fp64))
    rounding = slack(ours.dtype, terms, is_grad)
    measures = [("error", error(ours, truth, is_grad), error(theirs, truth, is_grad), 2.0, rounding)]
    if is_grad:
        measures.append(
            ("1 - cosine", cosine_distance(ours, truth), cosine_distance(theirs, truth), 4.0, rounding**2 / 2)
        )
    for measure, our_error, torch_error, factor, allowance in measures:
        bound = factor * torch_error + allowance
        assert our_error <= bound, f"{name}: {measure} {our_error:.3g}, torch.nn's {torch_error:.3g}, bound {bound:.3g}"
