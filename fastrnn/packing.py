# SPDX-License-Identifier: BSD-3-Clause
"""Weights that stay packed from one call to the next.

The CPU kernels multiply with weights in an order of their own. They bring them into it at every call where that pays,
which takes as long as 2 to 8 steps of one sequence. `pack_weights` has it done once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fastrnn.modes import is_recorded


class Packing:
    """The packed weights of one direction of one layer. Copies and pickles of it are empty."""

    __slots__ = ("_packed",)

    def __init__(self) -> None:
        """Begins empty."""
        # One attribute: threads see all of it or nothing.
        self._packed: tuple[Sequence[_Seen], Tensor] | None = None

    def __reduce__(self) -> Any:
        """Copies begin empty."""
        return Packing, ()

    def clear(self) -> None:
        """Forgets what was packed."""
        self._packed = None

    def of(self, pack: Callable[..., Tensor], weights: Sequence[Tensor | None]) -> Tensor | None:
        """The weights packed: as they were before if they are the same, else anew; None where `reason_against` any.

        Args:
            pack: The operator that packs them.
            weights: W_ih, W_hh and the projection, each a tensor or None, the same ones at every call.
        """
        if self._packed is not None:
            seen, packed = self._packed
            for before, weight in zip(seen, weights, strict=True):
                if weight is not before.weight:
                    break
                # An operation of torch counts as a version; another place, or another form in the same, does not.
                if weight is not None and (
                    weight._version != before.version
                    or weight.data_ptr() != before.address
                    or weight.dtype is not before.dtype
                    or weight.shape != before.shape
                    or weight.stride() != before.stride
                    or weight.is_neg()
                ):
                    break
            else:
                return packed
        if reason_against(weights) is not None:
            self._packed = None
            return None
        seen = [_Seen(weight) for weight in weights]
        with torch._C._AutoDispatchBelowAutograd():
            packed = pack(*weights)
        self._packed = seen, packed
        return packed


class _Seen:
    """A weight before it was packed."""

    __slots__ = ("address", "dtype", "shape", "storage", "stride", "version", "weight")

    def __init__(self, weight: Tensor | None) -> None:
        self.weight = weight
        if weight is not None:
            self.version, self.address, self.dtype = weight._version, weight.data_ptr(), weight.dtype
            self.shape, self.stride = weight.shape, weight.stride()
            self.storage = weight.untyped_storage()  # while it is held nothing else can come to lie at the address


def reason_against(weights: Sequence[Tensor | None]) -> str | None:
    """Why these weights cannot stay packed, or None: changes of others are not seen."""
    for weight in weights:
        if weight is None:
            continue
        if type(weight) is not Parameter:  # of a parametrization, of functional_call, cast by autocast
            return "a weight is no plain Parameter"
        if not weight.is_cpu:
            return "weights are packed for the CPU alone"
        if weight.is_neg():
            return "a weight is a view of the negative of another tensor"
        if weight.is_inference():
            return "a weight was made in inference mode, which counts no changes"
        if weight.is_shared():  # type: ignore[no-untyped-call]
            return "a weight lies in memory that other processes share"
    return None


class PacksWeights(nn.Module):
    """A module of fastrnn: its weights stay packed where `pack_weights` has asked for it."""

    _packings: Sequence[Packing] = ()  # of each direction of each layer, or none

    def _packings_in_use(self) -> Sequence[Packing]:
        # A mode may be recording the call, for weights to come.
        if not self._packings or is_recorded():
            return ()
        if torch.is_grad_enabled():  # an optimizer may be at work: what fused ones change torch does not count
            self._clear_packings()
            return ()
        return self._packings

    def _clear_packings(self) -> None:
        for packing in self._packings:
            packing.clear()

    def train(self, mode: bool = True) -> Any:
        """As of every module; packed weights are packed anew."""
        self._clear_packings()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._clear_packings()  # their memory is of no more use
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]


def pack_weights(model: nn.Module, packed: bool = True) -> None:
    """Keeps the weights of every module of fastrnn in a model packed for the CPU kernels, from one call to the next.

    It serves calls without gradients, under `torch.no_grad` or `torch.inference_mode`, in eager mode; others run as
    before. It costs a copy of the weights, in float32 where the processor does not multiply their 16-bit type, and some
    microseconds a call, to see whether they have changed. Results are those of the same kernels; in short sequences,
    for which weights are otherwise read where they are, sums may come in another order. Each direction of each layer is
    packed at its first such call, and anew after

    * a change of a weight that torch counts: by nearly all of its operations, `load_state_dict` and most optimizers,
      but not by collectives of `torch.distributed` and by optimizers with ``fused=True``
    * another tensor or Parameter in its place, another dtype, another place in memory
    * a call of the module with gradients enabled, `train()` and `eval()`, so that changes of training are seen anyway

    Nothing tells of other changes: through `weight.data` or another tensor or array that shares the memory but not the
    count, or by the two exceptions above. After such a change call `pack_weights` again.

    Copies and pickles of the model pack their weights for themselves. Weights that are no plain Parameters (those of
    parametrizations and pruning, cast by autocast), that lie in shared memory, or were made in inference mode, are not
    kept: `fastrnn.explain` says so. Layers of `fastrnn.keras` have no part in it.

    Args:
        model: A module of fastrnn, or one that holds some; see `fastrnn.convert`.
        packed: False takes it back, and frees the memory.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If there is no module of fastrnn in it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    modules = [module for module in model.modules() if isinstance(module, PacksWeights)]
    if not modules:
        raise ValueError(f"nothing to pack: no module of this {type(model).__name__} is fastrnn's; see fastrnn.convert")
    for module in modules:
        vars(module).pop("_packings", None)
        if packed:
            runs: Any = len(module._all_weights) if isinstance(module, nn.RNNBase) else 1
            module._packings = tuple(Packing() for _ in range(runs))
