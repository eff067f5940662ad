# SPDX-License-Identifier: BSD-3-Clause
"""Under which of torch's modes a call runs, beside compilation, which torch.compiler tells."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_tracing() -> bool:
    """Whether torch.jit.trace runs. Sizes are tensors then, and a check of them is recorded as a constant."""
    return torch._C._get_tracing_state() is not None  # as torch.jit.is_tracing asks, in half of its time


def is_recorded() -> bool:
    """Whether a call is compiled, or goes through a mode that records it or looks at its operators."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def has_values(tensor: Tensor) -> bool:
    """Whether a call may look at the values of a tensor: not at fake ones, nor where it is recorded for others."""
    return type(tensor) is Tensor and not is_recorded()


def is_in_transform() -> bool:
    """Whether torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is at work, that of torch.func.jvp as well."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return is_in_transform() or is_forward_mode()
