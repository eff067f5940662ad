# SPDX-License-Identifier: BSD-3-Clause
"""Adoption of fastrnn by models that were written for torch.nn, and the way back.

fastrnn's modules and torch.nn's derive from the same bases and keep the same attributes, so a module is converted by
giving it another class. It stays the same object: its Parameters, hooks, parametrizations, mode, and all references
to it (optimizers, DDP, tied weights) stay as they are.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastrnn import cells, modules
from fastrnn.packing import PacksWeights

_PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.GRU: modules.GRU,
    nn.LSTM: modules.LSTM,
    nn.RNNCell: cells.RNNCell,
    nn.GRUCell: cells.GRUCell,
    nn.LSTMCell: cells.LSTMCell,
}
_INVERSE = {ours: theirs for theirs, ours in _PAIRS.items()}
_NAMES = {theirs.__name__ for theirs in _PAIRS}
_FORWARDS = {theirs: theirs.forward for theirs in _PAIRS}
# Where torch derives a class of its own from that of a module, which holds properties or methods and is the last base.
_DERIVING = ("torch.nn.utils.parametrize", "torch.distributed.fsdp")
_MARK = "_fastrnn_converted"  # an attribute of what was converted; it goes along with copies and pickles


@dataclass(frozen=True)
class Conversion:
    """What `convert` did, by the qualified names of the modules.

    Attributes:
        converted: Name to class, such as "encoder.rnn": "LSTM".
        left_alone: Name to the reason why a recurrent module still is what it was.
        already: Name to class of the modules that were fastrnn's before.
    """

    converted: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    already: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line per module."""
        lines = [f"converted {name or '(the model)'}: {kind}" for name, kind in self.converted.items()]
        lines += [f"left alone {name or '(the model)'}: {reason}" for name, reason in self.left_alone.items()]
        lines += [f"fastrnn's already {name or '(the model)'}: {kind}" for name, kind in self.already.items()]
        return "\n".join(lines) or "no recurrent module found"


def convert(model: nn.Module) -> Conversion:
    """Makes every torch.nn RNN, GRU, LSTM and cell in a model, in place, fastrnn's.

    Args:
        model: Any module, which may itself be recurrent. Modules that are fastrnn's already stay so.

    Returns:
        What was converted, and what was left alone and why: subclasses of torch.nn's classes and of their bases,
        modules with a `forward` of their own, scripted and quantized modules, those with complex weights. Print it.

    Raises:
        TypeError: If `model` is not a module.
    """
    result = Conversion()
    for name, module in _named_modules(model):
        base = _base(type(module))
        if reason := reason_against(module):
            result.left_alone[name] = reason
        elif base in _PAIRS:
            _swap(module, _PAIRS[base])
            setattr(module, _MARK, True)
            result.converted[name] = base.__name__
        elif isinstance(module, PacksWeights):
            result.already[name] = base.__name__
    return result


def revert(model: nn.Module) -> None:
    """Undoes `convert`, in place: every module that it or `patch` converted is torch.nn's again.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If nothing in it was converted. A module that was built as fastrnn's is not converted. Or if the
            forward of one was replaced since, as some hooks of Accelerate do: remove them first. Nothing is changed.
    """
    converted = {name: module for name, module in _named_modules(model) if _MARK in vars(module)}
    if not converted:
        raise ValueError(f"nothing to revert: no module of this {type(model).__name__} was converted by fastrnn")
    if replaced := [name for name, module in converted.items() if "forward" in vars(module)]:
        which = ", ".join(name or "the model" for name in replaced)
        raise ValueError(f"cannot revert {which}: its forward was replaced after convert, by one that calls fastrnn's")
    for module in converted.values():
        delattr(module, _MARK)
        vars(module).pop("_packings", None)
        _swap(module, _INVERSE[_base(type(module))])


class Replacement:
    """A method of some classes, replaced while a `with` block of this is open: those of several threads may overlap."""

    def __init__(self, classes: Iterable[type], method: str, replace: Callable[[Any, type], Any]) -> None:
        """Takes the method's name and how to replace it: replace(what it is, the class)."""
        self._classes, self._method, self._replace = tuple(classes), method, replace
        self._lock, self._blocks = threading.Lock(), 0
        self._originals: list[Any] = []

    def __enter__(self) -> None:
        """Replaces the method, unless another block has."""
        with self._lock:
            if self._blocks == 0:
                self._originals = [getattr(kind, self._method) for kind in self._classes]
                for kind, original in zip(self._classes, self._originals, strict=True):
                    setattr(kind, self._method, self._replace(original, kind))
            self._blocks += 1

    def __exit__(self, *_: Any) -> None:
        """Puts back what the first block found, unless another block is open."""
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                for kind, original in zip(self._classes, self._originals, strict=True):
                    setattr(kind, self._method, original)


@contextmanager
def patch() -> Iterator[None]:
    """While it is active, torch.nn's RNN, GRU, LSTM and cells become fastrnn's as soon as they are built.

    However a model names them: `torch.nn.LSTM` and a name imported before both do. Subclasses stay as they are. It acts
    on all threads, from the beginning of a `with` block, or of a call of a function that it decorates, to its end::

        with fastrnn.patch():
            model = Model()

    Code that asks ``isinstance(module, nn.LSTM)``, to draw the weights of a new model, say, does not find them:
    build such a model without `patch`, and `convert` it.
    """
    with _converted_when_built:
        yield


def _converting(init: Callable[..., None], theirs: type[nn.Module]) -> Callable[..., None]:
    @functools.wraps(init)
    def init_and_convert(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self) is theirs:
            convert(self)

    return init_and_convert


_converted_when_built = Replacement(_PAIRS, "__init__", _converting)


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    yield from model.named_modules()


def _base(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module, without what torch's parametrizations and FSDP derived from it."""
    return _base(kind.__bases__[-1]) if kind.__module__.startswith(_DERIVING) else kind


def _rebase(kind: type[nn.Module], to: type[nn.Module]) -> type[nn.Module]:
    """What torch derived from the class of a module, derived from another one; other modules may share the former."""
    if not kind.__module__.startswith(_DERIVING):
        return to
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    name = kind.__name__.removesuffix(_base(kind).__name__) + to.__name__
    return type(name, (*kind.__bases__[:-1], _rebase(kind.__bases__[-1], to)), body)


def _swap(module: nn.Module, to: type[nn.Module]) -> None:
    module.__class__ = _rebase(type(module), to)
    if isinstance(module, nn.RNNBase):
        # torch.nn's keep a list of the weights, fastrnn's derive it.
        module.__dict__.pop("_flat_weights", None)
        module._init_flat_weights()
        if to is modules.RNN:  # torch.nn's go by the mode: as early versions pickled them they have nothing else
            module.nonlinearity = module.mode.removeprefix("RNN_").lower()


def reason_against(module: nn.Module) -> str | None:
    """Why `convert` leaves a module alone that looks recurrent."""
    base = _base(type(module))
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted or traced" if getattr(module, "original_name", None) in _NAMES else None
    if base in _PAIRS:
        if "forward" in module.__dict__:
            return "its forward was replaced"
        if base.forward is not _FORWARDS[base]:
            return f"torch.nn.{base.__name__}.forward was replaced"
        if any(p.is_complex() for p in module.parameters()):
            return "complex weights"
        return None
    if isinstance(module, tuple(_PAIRS)):
        parent = next(theirs for theirs in _PAIRS if isinstance(module, theirs))
        return f"{base.__name__} is a subclass of torch.nn.{parent.__name__}"
    if base.__module__.startswith("torch.ao.nn.quantiz") and base.__name__ in _NAMES:
        return "quantized"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and not isinstance(module, PacksWeights):
        return f"fastrnn has no {base.__name__}"
    return None
