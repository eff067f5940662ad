# SPDX-License-Identifier: BSD-3-Clause
"""How the operators are differentiated, and which form of them runs.

In eager mode a layer is a `torch.autograd.Function` around the operator, or without gradients the operator alone. Under
torch.compile, torch.export and torch.jit.trace it is the registered operator, one opaque node. Both use the same
formulas:

* first derivatives: the operator's backward, which is an operator too;
* derivatives of that: through the definition, `fastrnn.reference`;
* forward-mode derivatives: the definition takes the place of the operator;
* torch.vmap: `fastrnn.batching`.

An operator that torch.func finds by itself, called as `torch.ops.fastrnn.*` or in a compiled graph, is its definition.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import batching
from fastrnn.modes import is_forward_mode, is_in_transform, is_recorded, is_tracing, is_transformed
from fastrnn.packing import Packing

Tensors = tuple[Tensor, ...]
Results = tuple[Tensor | None, ...]
Gradients = Sequence[Tensor | None]


class Operator:
    """An operator and its backward.

    The arguments of the operator are `floats` floating-point tensors, which it is differentiable in and the last of
    which are its `states`, then batch_sizes, reverse and save, then the controls, which may be left out from the end.
    It is no function of the controls to differentiate. Its results are the output, the final states and whatever else
    it has a gradient for, `results` tensors in all, then the `saved` ones that backward needs. The arguments of its
    backward are the gradients of the results, the arguments without save, the output, what was saved, which gradients
    are needed, and the controls.
    """

    def __init__(self, name: str, floats: int, states: int, results: int, definition: Callable[..., Tensors]) -> None:
        """Registers the derivatives and the batching rules of torch.ops.fastrnn.<name> and <name>_backward.

        Args:
            name: Of the operator.
            floats: How many floating-point arguments come first.
            states: How many of the last of them are states.
            results: How many results come before those that are saved for backward.
            definition: The results in plain torch, as a function of the arguments without save.
        """
        self.name, self.floats, self.states, self.results, self.definition = name, floats, states, results, definition
        self.forward = getattr(torch.ops.fastrnn, name).default
        self.backward = getattr(torch.ops.fastrnn, f"{name}_backward").default
        self.saved = len(self.forward._schema.returns) - results
        self.pack = getattr(torch.ops.fastrnn, f"_{name}_pack").default
        self.forward_packed = getattr(torch.ops.fastrnn, f"_{name}_packed").default
        self.forward_packed_both = getattr(torch.ops.fastrnn, f"_{name}_packed_both").default
        self.forward_both = getattr(torch.ops.fastrnn, f"_{name}_both").default
        self.backward_both = getattr(torch.ops.fastrnn, f"_{name}_backward_both").default
        self.no_controls = tuple(p.default_value for p in self.forward._schema.arguments[floats + 3 :])
        for op, kernel, rule in (
            (self.forward, _differentiable_forward, batching.of_forward),
            (self.backward, _differentiable_backward, batching.of_backward),
        ):
            _register(op, partial(kernel, self), "Autograd")
            for device in ("cpu", "cuda"):
                _register(op, partial(_call_without_autocast, op, device), f"Autocast{device.upper()}")
            torch.library.register_vmap(op, partial(rule, self))

    def __call__(
        self,
        *arguments: Any,
        controls: tuple[Any, ...] = (),
        recompute: bool = False,
        meet: "Meet | None" = None,
        packing: Packing | None = None,
    ) -> tuple[Any, ...]:
        """Runs the layer: its results, maybe more, as a differentiable function of the arguments.

        Args:
            arguments: Of the operator, without save.
            controls: Of the operator.
            recompute: Whether backward runs the operator again in place of keeping what it saves.
            meet: What runs the operator in its place, together with another: see `side_by_side`.
            packing: What keeps the weights packed, for calls without gradients.
        """
        # Exported programs serve with and without grad: backward recomputes what was not saved.
        if torch.compiler.is_exporting():
            return self.forward(*arguments, False, *controls)  # type: ignore[no-any-return]
        if is_tracing():
            return _traced(self, *arguments, False, *controls)
        if torch.compiler.is_compiling():
            tensors = arguments[: self.floats]
            save = not recompute and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
            return self.forward(*arguments, save, *controls)  # type: ignore[no-any-return]
        if is_forward_mode():
            return self.definition(*arguments, *controls)
        if is_in_transform():
            return _FastrnnLayer.apply(self, *arguments, not recompute, *controls)  # type: ignore[no-any-return, no-untyped-call]
        if meet is not None and not recompute:
            return meet(self, arguments, controls + self.no_controls[len(controls) :], packing)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return _FastrnnEagerLayer.apply(self, *arguments, not recompute, *controls)  # type: ignore[no-any-return, no-untyped-call]
        packed = self.packed(packing, arguments)
        with torch._C._AutoDispatchBelowAutograd():
            if packed is not None:
                return self.forward_packed(*arguments, packed, *controls)  # type: ignore[no-any-return]
            return self.forward(*arguments, False, *controls)  # type: ignore[no-any-return]

    def packed(self, packing: Packing | None, arguments: Sequence[Any]) -> Tensor | None:
        """The weights of a call, packed, if they are kept so."""
        if packing is None:
            return None
        return packing.of(self.pack, self.weights(arguments))

    def weights(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """W_ih, W_hh and the projection, those that there are, of the arguments of the operator."""
        return arguments[1], arguments[2], arguments[5] if self.states > 1 else None

    def run_both(self, *arguments: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Two layers in one call, eagerly.

        Args:
            arguments: Of the operator for one layer, all of them with save, then for the other.
        """
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            results = _FastrnnEagerLayers.apply(self, *arguments)  # type: ignore[no-untyped-call]
        else:
            with torch._C._AutoDispatchBelowAutograd():
                results = self.forward_both(*arguments)
        return halves(results)

    def gradients(self, options: Sequence[Any], *tensors: Tensor | None) -> Gradients:
        """What backward computes, through the definition.

        Args:
            options: The arguments of the operator after the floating-point ones, without save.
            tensors: The gradients of the results, then the floating-point arguments.
        """
        grad_results, floats = tensors[: self.results], tensors[self.results :]
        return _vjp(lambda *floats: self.definition(*floats, *options), floats, grad_results)


Meet = Callable[[Operator, Sequence[Any], Sequence[Any], Packing | None], tuple[Any, ...]]


def side_by_side(
    first: Callable[..., tuple[Any, ...]], second: Callable[..., tuple[Any, ...]]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The results of two functions, each of which hands its argument `meet` to one operator.

    Where the first comes to its operator, the second is called up to its own, and both operators run in one call.
    """
    if torch.compiler.is_compiling():
        return first(), second()
    of_second: tuple[Any, ...] | None = None

    def wait(
        operator: Operator, arguments: Sequence[Any], controls: Sequence[Any], packing: Packing | None
    ) -> tuple[Any, ...]:
        nonlocal of_second
        mine: tuple[Any, ...] | None = None

        def join(
            other: Operator, others: Sequence[Any], other_controls: Sequence[Any], other_packing: Packing | None
        ) -> tuple[Any, ...]:
            nonlocal mine
            if other is not operator:
                return other(*others, controls=tuple(other_controls), packing=other_packing)
            packed, other_packed = operator.packed(packing, arguments), other.packed(other_packing, others)
            if packed is not None and other_packed is not None:
                with torch._C._AutoDispatchBelowAutograd():
                    results = operator.forward_packed_both(
                        *arguments, packed, *controls, *others, other_packed, *other_controls
                    )
                mine, theirs = halves(results)
                return theirs
            save = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments, *others)
            mine, theirs = operator.run_both(*arguments, save, *controls, *others, save, *other_controls)
            return theirs

        of_second = second(meet=join)
        return operator(*arguments, controls=tuple(controls), packing=packing) if mine is None else mine

    of_first = first(meet=wait)
    return of_first, second() if of_second is None else of_second


def _traced(operator: Operator, *arguments: Any) -> tuple[Any, ...]:
    parameters = operator.forward._schema.arguments
    arguments += tuple(parameter.default_value for parameter in parameters[len(arguments) :])
    are_cells_asked_for = arguments[-1] is True
    return _scripted(operator, 1 + operator.states + are_cells_asked_for)(*arguments)  # type: ignore[no-any-return]


@cache  # graphs refer to it
def _scripted(operator: Operator, results: int) -> Any:
    """The operator up to its last result that is there: torch.jit.trace records none whose results may be None."""
    parameters = operator.forward._schema.arguments
    declarations = ", ".join(f"{p.name}: {p.type.annotation_str}" for p in parameters)
    call = f"torch.ops.fastrnn.{operator.name}({', '.join(p.name for p in parameters)})"
    kept = [f"r{index}" for index in range(results)]
    lines = [f"{', '.join(kept + ['_'] * (len(operator.forward._schema.returns) - results))} = {call}"]
    lines += [f"assert {result} is not None" for result in kept] + [f"return {', '.join(kept)}"]
    unit = torch.jit.CompilationUnit("\n    ".join([f"def layer({declarations}):", *lines]) + "\n")
    return torch._C._create_function_from_graph(f"__torch__.fastrnn.{operator.name}_{results}", unit.layer.graph)


_library = torch.library.Library("fastrnn", "IMPL")  # type: ignore[no-untyped-call]  # registrations end with it


def _register(op: Any, kernel: Callable[..., Any], dispatch_key: str) -> None:
    _library.impl(op._opname, kernel, dispatch_key)  # type: ignore[no-untyped-call]


def _differentiable_forward(operator: Operator, *arguments: Any) -> Results:
    """What the operator does with autograd: called by torch.ops, and by graphs that hold it."""
    if is_transformed():  # which refuse a Function inside an operator
        save = operator.floats + 2
        results = operator.definition(*arguments[:save], *arguments[save + 1 :])
        return results + (None,) * (operator.results + operator.saved - len(results))
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return _FastrnnLayer.apply(operator, *arguments)  # type: ignore[no-any-return, no-untyped-call]
    return _FastrnnLayer.forward(operator, *arguments)


def _differentiable_backward(operator: Operator, *arguments: Any) -> Gradients:
    if is_forward_mode():
        return operator.gradients(*options_and_tensors(operator, arguments))
    if _is_differentiated(*arguments):
        return _FastrnnGradient.apply(operator, *arguments)  # type: ignore[no-any-return, no-untyped-call]
    return _FastrnnGradient.forward(operator, *arguments)


def _is_differentiated(*arguments: Any) -> bool:
    """Whether backward, of these arguments, is itself to be differentiated or batched."""
    return is_in_transform() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments))


def options_and_tensors(operator: Operator, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What Operator.gradients takes, from the arguments of the operator's backward."""
    tensors = operator.results + operator.floats
    controls = tensors + 3 + operator.saved + 3
    return [*arguments[tensors : tensors + 2], *arguments[controls:]], *arguments[:tensors]


def needed_gradients(operator: Operator, arguments: Sequence[Any]) -> list[bool]:
    """Which of the gradients that the operator's backward returns it is asked for."""
    flags = operator.results + operator.floats + 3 + operator.saved
    need_input, need_weights, need_states = arguments[flags : flags + 3]
    weights = operator.floats - 1 - operator.states
    return [need_input, *[need_weights] * weights, *[need_states] * operator.states]


def _call_without_autocast(op: Any, device: str, *arguments: Any) -> Results:
    # The products inside compute in the dtype of the arguments. This kernel is not reached where autocast is off.
    with torch.autocast(device, enabled=False):
        return op(*arguments)  # type: ignore[no-any-return]


# Users see the names of these classes: grad_fn=<_FastrnnLayerBackward>.


class _FastrnnLayer(torch.autograd.Function):
    """A layer, for torch.func and for graphs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Operator, *arguments: Any) -> Results:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.forward(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        _keep_for_backward(ctx, *inputs, results=output)
        ctx.mark_non_differentiable(*(t for t in output[ctx.operator.results :] if t is not None))

    @staticmethod
    def backward(ctx: Any, *grad_results: Tensor | None) -> Gradients:
        operator, tensors = ctx.operator, ctx.saved_tensors
        needed = _needed(ctx, tensors)
        arguments = _backward_arguments(operator, ctx.kept, tensors, grad_results, needed)
        return None, *_gradients_by_argument(_call_backward(operator, arguments), needed)


_WORTH_ASKING = 1 << 27  # multiply-adds of a gradient of the weights


def _needed(ctx: Any, tensors: Sequence[Any], layers: int = 1) -> tuple[bool, ...]:
    """Which arguments of the operator get a gradient, from a Function of so many layers that keeps these tensors.

    Those that require one. But torch.autograd.grad may be after the gradient of the input alone: costly ones of weights
    are made where its engine has a use for any. It takes some 30 us to hear that it is after that of a leaf.
    """
    needed: tuple[bool, ...] = ctx.needs_input_grad[1:]
    if is_recorded() or is_in_transform() or torch._C._current_graph_task_id() < 0:
        return needed
    weights = ctx.operator.floats - ctx.operator.states - 1
    input, *others = tensors[: weights + 1]
    work = input.numel() // max(1, input.size(-1)) * sum([w.numel() for w in others if w is not None])
    if work < _WORTH_ASKING:
        return needed
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])
    of_arguments, used = [next(nodes) if need else None for need in needed], list(needed)
    for first in range(1, len(needed), len(needed) // layers):
        if not any(map(_is_used, of_arguments[first : first + weights])):
            used[first : first + weights] = [False] * weights
    return tuple(used)


def _is_used(node: Any) -> bool:
    """Whether the backward pass that runs comes to a node of the graph."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)  # as register_multi_grad_hook asks
    except RuntimeError:  # "A leaf node was passed": one whose gradient torch.autograd.grad is to return
        return True


class _Kept(NamedTuple):
    """What backward needs beside tensors."""

    reverse: bool
    save: bool
    controls: Sequence[Any]


def _keep_for_backward(ctx: Any, operator: Operator, *arguments: Any, results: Results) -> None:
    ctx.operator = operator
    ctx.kept, tensors = _kept(operator, arguments, results)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _kept(operator: Operator, arguments: Sequence[Any], results: Results) -> tuple[_Kept, Sequence[Any]]:
    end = operator.floats + 1
    controls, control_tensors = _take_tensors(arguments[end + 2 :])
    tensors = (*arguments[:end], results[0], *results[operator.results :], *control_tensors)
    return _Kept(arguments[end], arguments[end + 1], controls), tensors


def _backward_arguments(
    operator: Operator,
    kept: _Kept,
    tensors: Sequence[Any],  # saved_tensors, looked at once: checkpointing recomputes at every look
    grad_results: Gradients,
    needed: Sequence[bool],
) -> Sequence[Any]:
    first_state, end = operator.floats - operator.states, operator.floats + 1
    arguments, (output, *saved) = tensors[:end], tensors[end : end + 1 + operator.saved]
    controls = _put_tensors(kept.controls, tensors[end + 1 + operator.saved :])
    if not kept.save:
        # Within a transform the operator is its definition, which saves nothing.
        in_transform = is_in_transform()
        forward = partial(_FastrnnLayer.apply, operator) if in_transform else operator.forward
        output, *rest = forward(*arguments, kept.reverse, True, *controls)
        saved = rest[operator.results - 1 :]
    return (
        *grad_results[: operator.results],
        *arguments,
        kept.reverse,
        output,
        *saved,
        needed[0],
        any(needed[1:first_state]),
        any(needed[first_state : operator.floats]),
        *controls,
    )


def _call_backward(operator: Operator, arguments: Sequence[Any]) -> Gradients:
    if torch.compiler.is_compiling():
        return operator.backward(*arguments)  # type: ignore[no-any-return]
    return _differentiable_backward(operator, *arguments)


def _gradients_by_argument(gradients: Gradients, needed: Sequence[bool]) -> Gradients:
    """Those that are needed, and None for all other arguments of the operator."""
    given = [g if need else None for g, need in zip(gradients, needed, strict=False)]
    return given + [None] * (len(needed) - len(given))


# Controls that wait for backward: their tensors are left to autograd, which sees when one is changed in place.


def _take_tensors(controls: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Tensor]]:
    if not controls:
        return (), ()
    tensors = [control for control in controls if isinstance(control, Tensor)]
    return [Tensor if isinstance(control, Tensor) else control for control in controls], tensors


def _put_tensors(controls: Sequence[Any], tensors: Sequence[Tensor]) -> Sequence[Any]:
    given = iter(tensors)
    return [next(given) if control is Tensor else control for control in controls]


class _FastrnnEagerLayer(torch.autograd.Function):
    """As _FastrnnLayer, in the form that costs least per call. torch.func does not take this form."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *arguments: Any) -> Results:
        results = _FastrnnLayer.forward(operator, *arguments)
        _keep_for_backward(ctx, operator, *arguments, results=results)
        return results[: operator.results]

    backward = _FastrnnLayer.backward


class _FastrnnEagerLayers(torch.autograd.Function):
    """Two layers in one call."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *arguments: Any) -> Results:
        with torch._C._AutoDispatchBelowAutograd():
            results = halves(operator.forward_both(*arguments))
        kept, tensors = zip(*map(partial(_kept, operator), halves(arguments), results), strict=True)
        ctx.operator, ctx.kept, ctx.first_tensors = operator, kept, len(tensors[0])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[0], *tensors[1])
        return *results[0][: operator.results], *results[1][: operator.results]

    @staticmethod
    def backward(ctx: Any, *grad_results: Tensor | None) -> Gradients:
        operator, tensors = ctx.operator, ctx.saved_tensors
        needed = halves(_needed(ctx, tensors, layers=2))
        kept = tensors[: ctx.first_tensors], tensors[ctx.first_tensors :]
        first, second = map(partial(_backward_arguments, operator), ctx.kept, kept, halves(grad_results), needed)
        if torch.compiler.is_compiling() or _is_differentiated(*first, *second) or is_forward_mode():
            gradients = _call_backward(operator, first), _call_backward(operator, second)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                gradients = halves(operator.backward_both(*first, *second))
        first, second = map(_gradients_by_argument, gradients, needed)
        return None, *first, *second


def halves(both: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What belongs to the first of two layers, and to the second."""
    return both[: len(both) // 2], both[len(both) // 2 :]


class _FastrnnGradient(torch.autograd.Function):
    """The backward of a layer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Operator, *arguments: Any) -> Results:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.backward(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        ctx.operator, *arguments = inputs
        ctx.inputs = len(inputs)
        (batch_sizes, ctx.reverse, *controls), *tensors = options_and_tensors(ctx.operator, arguments)
        floats, needed = tensors[ctx.operator.results :], needed_gradients(ctx.operator, arguments)
        ctx.given = [need and t is not None for need, t in zip(needed, floats, strict=True)]
        ctx.controls, control_tensors = _take_tensors(controls)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, batch_sizes, *control_tensors)

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> Gradients:
        count = ctx.operator.results + ctx.operator.floats
        tensors, (batch_sizes, *rest) = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        options = [batch_sizes, ctx.reverse, *_put_tensors(ctx.controls, rest)]
        # Gradients that were not asked for, or of arguments that are not there, came back empty.
        given = [grad if is_given else None for grad, is_given in zip(grad_gradients, ctx.given, strict=True)]
        second = _vjp(partial(ctx.operator.gradients, options), tensors, given)
        return None, *second, *[None] * (ctx.inputs - 1 - len(second))


def _vjp(
    function: Callable[..., Gradients], arguments: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> Gradients:
    """The gradients of the arguments that are there, from those of the results that are there."""
    if all(cotangent is None for cotangent in cotangents):
        return [None] * len(arguments)
    there = [argument is not None for argument in arguments]

    def results_with_cotangent(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        given = iter(tensors)
        results = function(*(next(given) if is_there else None for is_there in there))
        return tuple(r for r, cotangent in zip(results, cotangents, strict=False) if cotangent is not None)

    _, pullback, *_ = torch.func.vjp(results_with_cotangent, *(a for a in arguments if a is not None))
    gradients = iter(pullback(tuple(cotangent for cotangent in cotangents if cotangent is not None)))
    return [next(gradients) if is_there else None for is_there in there]
