# SPDX-License-Identifier: BSD-3-Clause
"""What the modules share: torch.nn's forms of input and errors, and the loop over layers and directions.

Weights are read from their attributes at every call, so whatever replaces them takes effect: parametrizations,
pruning, `torch.func.functional_call`, plain assignment.

Letters in shapes: T time, B batch, I input_size, H hidden_size, P proj_size, H_out = P with a projection and H without,
L num_layers, D directions. Without a batch B is left out.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import ops, wavefront
from fastrnn.autograd import side_by_side
from fastrnn.modes import has_values, is_recorded, is_tracing, is_transformed
from fastrnn.options import NO_OPTIONS, Options, RecurrentOptions
from fastrnn.packing import Packing, PacksWeights

NO_SCRIPT = (
    "torch.jit.script does not compile fastrnn.{}: torch.export, torch.compile and torch.jit.trace do, "
    "and fastrnn.revert turns a converted model back into one that it compiles"
)

# Inside this module states are a sequence, h or (h, c); `hx` is what the user sees, a tensor or a pair.
States = Sequence[Tensor]
_PLAIN = (Tensor, nn.Parameter)  # no subclasses, which may look into each layer
Device = torch.device | str | int | None


def as_hx(states: States) -> Any:
    """The form in which the user sees states."""
    return states[0] if len(states) == 1 else tuple(states)


def read_weights(module: nn.Module, names: Iterable[str], *default: None) -> list[Any]:
    """The current weights of these names; where there is none the default, or an AttributeError."""
    parameters = module._parameters  # a look here first saves most of the time of Module.__getattr__
    return [parameters[name] if name in parameters else getattr(module, name, *default) for name in names]


def check_alike(input: Tensor, kind: str, tensors: Iterable[Tensor | None]) -> None:
    """Raises unless all are tensors with the device and the dtype of the input."""
    device, dtype = input.device, input.dtype
    for tensor in tensors:
        if tensor is not None and tensor.dtype is dtype and tensor.device == device:
            continue
        if tensor is None:
            raise TypeError(f"expected {kind} to be a Tensor, but got NoneType")
        if tensor.device != device:
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, "
                f"found input tensor at {device} and {kind} tensor at {tensor.device}"
            )
        raise RuntimeError(
            f"Input and {kind} tensors are not the same dtype, "
            f"found input tensor with {dtype} and {kind} tensor with {tensor.dtype}"
        )


def is_autocast_on() -> bool:
    """Whether autocast is on for any device: the public ways to ask take four times as long."""
    return torch._C._is_any_autocast_enabled()  # RNNBase asks it too


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast computes in on the device of the input; None where it is off."""
    if not is_autocast_on():
        return None
    device = input.device.type
    is_on = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else None


def call_autocast(
    run: Callable[..., Sequence[Tensor]],
    promotes: Sequence[bool],
    input: Tensor,
    weights: Sequence[Tensor | None],
    states: States | None,
    *rest: Any,
) -> Sequence[Tensor]:
    """Calls run(input, weights, states, *rest), in the dtype that autocast asks for where it is on.

    CPU autocast of torch.nn returns in the wider dtype what is carried from step to step by elementwise arithmetic, the
    h of a GRU and mostly the c of an LSTM. `promotes` tells for each result whether it is so.
    """
    device, dtype = input.device.type, autocast_dtype(input)
    if dtype is None:
        return run(input, weights, states, *rest)

    def cast(tensor: Any) -> Any:
        is_eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if is_eligible else tensor

    carried = torch.promote_types(dtype, input.dtype if states is None else states[-1].dtype)
    states = states if states is None else [cast(state) for state in states]
    with torch.autocast(device, enabled=False):  # the products inside an op are none of autocast's business
        results = run(cast(input), [cast(weight) for weight in weights], states, *rest)
    if device != "cpu" or results[0].dtype != dtype:
        return results
    return [result.to(carried) if promote else result for result, promote in zip(results, promotes, strict=True)]


class LayerStack(PacksWeights, nn.RNNBase):
    """What RNN, GRU and LSTM share: the forms of the input, the checks, the loop over layers and directions.

    The hidden state is one tensor here. LSTM, which has two, overrides the methods that look inside it.
    """

    _kind: str  # of the cell, whatever a subclass is called
    _dim_error: str  # what torch.nn says of input with neither two nor three dimensions
    options: Options = NO_OPTIONS  # of a module that was torch.nn's when it was made

    def _set_options(self, options: RecurrentOptions) -> None:
        if options:
            self.options = Options(**options)
        if self.proj_size > 0 and self.options.zoneouts[0] > 0:
            raise ValueError("expected zoneout of h to be 0 with proj_size, got " + str(self.options.zoneouts[0]))
        if self.mode != "LSTM" and isinstance(self.options.zoneout, (tuple, list)):
            raise ValueError(f"expected zoneout to be one number, of h, got {self.options.zoneout}")

    layer_norm: bool = False
    _beyond: tuple[str, ...] = ("layer_norm",)  # attributes that torch.nn's modules have not

    def extra_repr(self) -> str:
        """The arguments as torch.nn shows them, and what goes beyond."""
        beyond = {
            name: getattr(self, name) for name in self._beyond if getattr(self, name) != getattr(type(self), name)
        }
        beyond |= {name: value for name, value in vars(self.options).items() if value != getattr(NO_OPTIONS, name)}
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in beyond.items())])

    def _add_weights(self, sizes: dict[str, int], device: Device, dtype: torch.dtype | None) -> None:
        """Registers further weights of each run, named by these beginnings, and draws all anew."""
        for names in self._all_weights:
            run = names[0].removeprefix("weight_ih")
            for name, size in sizes.items():
                self.register_parameter(name + run, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
                names.append(name + run)
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights as torch.nn does. Layer normalisation begins with gains of 1, and 0 for the bias of c."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith(("gain_", "bias_c_")):
                nn.init.constant_(parameter, 1.0 if name.startswith("gain_") else 0.0)

    def _op(self, *args: Any, library: Any = ops, **options: Any) -> tuple[Tensor, ...]:
        """Runs one direction of one layer: the output, and the states after the last step.

        `library` is fastrnn.ops or fastrnn.reference, whose layers have the same signatures.
        """
        raise NotImplementedError

    def _promotes(self, packed: bool) -> tuple[bool, ...]:
        """For the output and each state, what `call_autocast` asks."""
        raise NotImplementedError

    @property
    def _flat_weights(self) -> list[Any]:
        # RNNBase keeps a list, which goes stale when a weight is replaced behind its back. A view cannot.
        return read_weights(self, self._flat_weights_names, None)

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        pass

    def __prepare_scriptable__(self) -> None:
        """Tells torch.jit.script that it is at the wrong address."""
        raise NotImplementedError(NO_SCRIPT.format(type(self).__name__))

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels take the weights where they are."""

    def _checked(self, input: Any) -> tuple[Tensor, Tensor | None]:
        """The input as layers read it, (T, B, I) or packed with batch_sizes. Raises what a call with it alone would."""
        if isinstance(input, PackedSequence):
            input, batch_sizes = input.data, input.batch_sizes
        else:
            batch_sizes = None
            if self._dim(input) == 2:
                input = input.unsqueeze(0 if self.batch_first else 1)
        self._check(input, None, batch_sizes)
        input = input.transpose(0, 1) if self.batch_first and batch_sizes is None else input
        (input,) = call_autocast(self._check_weights, (False,), input, self._flat_weights, None)
        return input, batch_sizes

    def _check_weights(self, input: Tensor, weights: Sequence[Any], states: None = None) -> States:
        check_alike(input, "parameter", weights)
        return (input,)

    def forward(
        self, input: Any, hx: Any = None, *, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Any, Any]:
        """Runs all layers. What goes in and what comes out is said at the class."""
        controls = self._sequence_controls(input, lengths, reset)
        output, hx, _ = self._forward(input, hx, controls)
        return output, hx

    def _forward(self, input: Any, hx: Any, controls: dict[str, Any]) -> tuple[Any, Any, Any]:
        """The output, the states, and c of every step where `controls` ask for it."""
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                hx = self.permute_hidden(hx, sorted_indices)
            output, hx, _ = self._run(data, hx, controls, batch_sizes)
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self.permute_hidden(hx, unsorted_indices), None

        dim = self._dim(input)
        if hx is not None:
            self._check_hx_dim(hx, dim)
        if dim == 3:
            return self._run(input, hx, controls)
        batch_dim = 0 if self.batch_first else 1
        if hx is not None:
            hx = as_hx([state.unsqueeze(1) for state in self._states(hx)])
        output, hx, cells = self._run(input.unsqueeze(batch_dim), hx, controls)
        cells = None if cells is None else cells.squeeze(batch_dim)
        return output.squeeze(batch_dim), as_hx([state.squeeze(1) for state in self._states(hx)]), cells

    def _dim(self, input: Tensor) -> int:
        dim = input.dim()
        if dim not in (2, 3):
            raise ValueError(self._dim_error.format(dim))
        return dim

    def _sequence_controls(self, input: Any, lengths: Tensor | None, reset: Tensor | None) -> dict[str, Any]:
        """Checks what is said of the steps of a sequence, and lays it out as the operators want it."""
        controls: dict[str, Any] = {}
        if lengths is None and reset is None:
            return controls
        for name, given in (("lengths", lengths), ("reset", reset)):
            if given is not None and not isinstance(given, Tensor):
                raise TypeError(f"expected {name} to be a Tensor, got {type(given).__name__}")
        name = "lengths" if lengths is not None else "reset"
        if isinstance(input, PackedSequence) or input.dim() != 3:
            form = "a PackedSequence" if isinstance(input, PackedSequence) else f"{input.dim()}-D input"
            raise ValueError(f"expected a batch of sequences, 3-D, where {name} is given, got {form}")
        T, B = input.shape[1::-1] if self.batch_first else input.shape[:2]
        if lengths is not None:
            is_integer = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
            if lengths.shape != (B,) or not is_integer:
                raise ValueError(
                    f"expected lengths to hold {B} integers, one per sequence, got shape {tuple(lengths.shape)}, "
                    f"{lengths.dtype}"
                )
            if lengths.device != input.device:
                raise ValueError(f"expected lengths on {input.device}, like input, got {lengths.device}")
            lengths = lengths.long()  # T would wrap around in a shorter type
            # Of all members of torch.vmap.
            values = lengths if torch.compiler.is_compiling() else torch.func.debug_unwrap(lengths)
            inside = ((values >= 0) & (values <= T)).all()
            if lengths.device.type == "cpu" and has_values(values):
                if not inside:
                    raise ValueError(f"expected lengths from 0 to {T}, got {values.tolist()}")
            else:
                torch._assert_async(inside, "expected lengths from 0 to the number of steps of input")
            controls["lengths"] = lengths
        if reset is not None:
            if reset.shape != input.shape[:2] or reset.dtype != torch.bool:
                raise ValueError(
                    f"expected reset to be a bool of shape {tuple(input.shape[:2])}, one per step and sequence like "
                    f"input, got shape {tuple(reset.shape)}, {reset.dtype}"
                )
            if reset.device != input.device:
                raise ValueError(f"expected reset on {input.device}, like input, got {reset.device}")
            controls["reset"] = reset.transpose(0, 1) if self.batch_first else reset
        return controls

    def _run(
        self, input: Tensor, hx: Any, controls: dict[str, Any], batch_sizes: Tensor | None = None
    ) -> tuple[Tensor, Any, Tensor | None]:
        weights = self._flat_weights
        if batch_sizes is not None or not self._fits(input, hx, weights[0]):
            self._check(input, hx, batch_sizes)
        batch_first = self.batch_first and batch_sizes is None
        if batch_first:
            input = input.transpose(0, 1)

        states = None if hx is None else self._states(hx)
        run: Callable[..., Sequence[Tensor]] = self._run_layers
        if is_autocast_on():
            run = partial(call_autocast, run, self._promotes(batch_sizes is not None))
        output, *states = run(input, weights, states, controls, batch_sizes)
        cells = states.pop() if controls.get("return_cells") else None
        if batch_first:
            output, cells = output.transpose(0, 1), None if cells is None else cells.transpose(0, 1)
        return output, as_hx(states), cells

    def _fits(self, input: Tensor, hx: Any, weight: Any) -> bool:
        """Whether `_check` finds nothing, in a third to a half of its time; not sure: no. Not for packed sequences."""
        if is_tracing() or input.dtype is not weight.dtype:
            return False
        shape = input.shape
        if len(shape) != 3 or shape[2] != self.input_size or 0 in shape:
            return False
        if hx is None:
            return True
        runs, batch = self.num_layers * (2 if self.bidirectional else 1), shape[0 if self.batch_first else 1]
        h, *others = (hx,) if isinstance(hx, Tensor) else hx
        expected = (runs, batch, self.hidden_size)
        return h.shape == ((*expected[:2], self.proj_size) if self.proj_size > 0 else expected) and all(
            [other.shape == expected for other in others]
        )

    def _check(self, input: Tensor, hx: Any, batch_sizes: Tensor | None) -> None:
        """Raises as torch.nn does where sizes or dtypes do not fit the module."""
        if batch_sizes is not None and batch_sizes.dim() != 1:
            raise RuntimeError(f"Expected batch_sizes to be 1-D, got {batch_sizes.dim()}-D")
        if hx is None or (batch_sizes is not None and not has_values(batch_sizes)):
            self.check_input(input, batch_sizes)
            if hx is not None and batch_sizes is not None:  # known when the graph runs
                rows_fit = batch_sizes[0] == self._states(hx)[0].size(1)
                torch._assert_async(rows_fit, "Expected hidden to have as many rows as there are sequences")
        else:
            self.check_forward_args(input, hx, batch_sizes)
        if batch_sizes is None and not is_tracing() and input.size(1 if self.batch_first else 0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _run_layers(
        self,
        input: Tensor,
        weights: list[Tensor],
        states: States | None,
        controls: dict[str, Any],
        batch_sizes: Tensor | None,
    ) -> list[Tensor]:
        """The output of the last layer, then the final states: (L*D, B, H_out), of an LSTM also (L*D, B, H).

        Where `controls` ask for c of every step, that of the last layer comes last: (T, B, D*H).
        """
        directions = 2 if self.bidirectional else 1
        runs = self.num_layers * directions
        if len(self._all_weights) != runs or ("bias_ih_l0" in self._all_weights[0]) != self.bias:
            raise RuntimeError("expected num_layers, bidirectional and bias to be what the weights were made for")
        zeros: States = ()
        if states is None:
            zeros = self._zeros(input, input.size(1) if batch_sizes is None else int(batch_sizes[0]))
        else:
            check_alike(input, "hidden", states)
        self._check_weights(input, weights)
        packings = self._packings_in_use()
        if runs == 1:
            own = zeros or [state.squeeze(0) for state in states or ()]
            where = {"batch_sizes": batch_sizes, "reverse": False, "packing": packings[0] if packings else None}
            output, *last = self._run_layer(input, weights, own, controls, **where)
            return [output, *[state.unsqueeze(0) for state in last[: len(own)]], *last[len(own) :]]

        steps = wavefront.steps_of_chunk(self, input, [*weights, *(states or ())], controls, batch_sizes)
        if not steps and not controls:
            at_once = self._run_at_once(input, weights, packings, zeros or states or (), batch_sizes)
            if at_once is not None:
                return at_once

        initial = [zeros] * runs if zeros else list(zip(*(state.unbind() for state in states or ()), strict=True))
        per_run = len(weights) // runs

        def run_one(run: int, input: Tensor, states: States, **meet: Any) -> tuple[Tensor, ...]:
            own_weights, reverse = weights[run * per_run : (run + 1) * per_run], run % directions == 1
            where = {"batch_sizes": batch_sizes, "reverse": reverse, "packing": packings[run] if packings else None}
            return self._run_layer(input, own_weights, states, controls, **where, **meet)

        def dropped(layer: int, input: Tensor) -> Tensor:
            drops = layer > 0 and self.dropout > 0 and self.training
            return torch.dropout(input, self.dropout, True) if drops else input

        if steps:
            layers = [
                lambda input, states, layer=layer, **meet: run_one(layer, dropped(layer, input), states, **meet)
                for layer in range(runs)
            ]
            input, final_states = wavefront.run(layers, input, initial, steps)
            return [input, *(torch.stack(state) for state in zip(*final_states, strict=True))]

        final: list[Sequence[Tensor]] = []
        cells: list[Tensor] = []
        for layer in range(self.num_layers):
            outputs, cells = [], []
            input = dropped(layer, input)
            mine = range(layer * directions, (layer + 1) * directions)
            calls = [partial(run_one, run, input, initial[run]) for run in mine]
            results: Sequence[Sequence[Tensor]] = [calls[0]()] if directions == 1 else side_by_side(*calls)
            for output, *last in results:
                outputs.append(output)
                final.append(last[: len(initial[0])])
                cells += last[len(initial[0]) :]
            input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        joined = [torch.cat(cells, -1)] if cells else []
        return [input, *(torch.stack(state) for state in zip(*final, strict=True)), *joined]

    def _run_at_once(
        self,
        input: Tensor,
        weights: Sequence[Tensor],
        packings: Sequence[Packing],
        states: States,
        batch_sizes: Tensor | None,
    ) -> list[Tensor] | None:
        """All layers in one call, which saves the way to each of them; None where one cannot be.

        For plain tensors of the CPU, in eager mode, without gradients and options.
        """
        cell = self._torch_cell()
        directions = 2 if self.bidirectional else 1
        runs = self.num_layers * directions
        tensors = (input, *weights, *states)
        if (
            cell is None
            or "_op" in vars(self)  # fastrnn.diagnostics looks at every step
            or self.options is not NO_OPTIONS
            or (self.training and self.dropout > 0)
            or is_recorded()
            or is_tracing()
            or is_transformed()
            or not input.is_cpu
            or not all([type(tensor) in _PLAIN for tensor in tensors])
            or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))
        ):
            return None
        pack, run = ops.STACKS[cell]
        packed: list[Tensor | None] = []
        for packing, first in zip(packings, range(0, len(weights), len(weights) // runs), strict=False):
            w_hr = weights[first + len(weights) // runs - 1] if self.proj_size > 0 else None
            packed.append(packing.of(pack, (weights[first], weights[first + 1], w_hr)))
        if any([one is None for one in packed]):
            return None
        with torch._C._AutoDispatchBelowAutograd():
            return run(input, weights, packed, states, batch_sizes, self.bias, runs, directions)  # type: ignore[no-any-return]

    def _run_layer(
        self,
        input: Tensor,
        weights: Sequence[Any],
        states: States,
        controls: dict[str, Any],
        **where: Any,
    ) -> tuple[Tensor, ...]:
        """One direction of one layer: the output, the final states, and c of every step if `controls` ask for it."""
        w_ih, w_hh, b_ih, b_hh, *rest = weights if self.bias else (*weights[:2], None, None, *weights[2:])
        named = self._further_weights(rest) if rest else {}
        options = self.options
        if options is NO_OPTIONS and not controls:
            return self._op(input, w_ih, w_hh, b_ih, b_hh, *states, **named, **where)
        if self.training and options.weight_dropout > 0:
            w_hh = torch.dropout(w_hh, options.weight_dropout, True)
        drawn = options.controls(input, states[0], self.hidden_size, len(states), self.training)
        if where["reverse"] and "reset" in controls:
            # A sequence that begins at t ends, seen from behind, at t: the states are reset before t - 1.
            ends = controls["reset"].roll(-1, 0)
            ends[-1] = False
            if "lengths" in controls:  # nothing begins in padding
                steps_before = torch.arange(1, ends.size(0) + 1, device=ends.device).unsqueeze(1)
                ends = ends & (steps_before < controls["lengths"])
            controls = controls | {"reset": ends}
        return options.run(self._op, input, (w_ih, w_hh, b_ih, b_hh), states, **where, **named, **controls, **drawn)  # type: ignore[no-any-return]

    def _further_weights(self, weights: list[Tensor]) -> dict[str, Any]:
        """The weights of a run after those of the gates, by the names of the operator."""
        first = 1 if self.proj_size > 0 else 0
        named: dict[str, Any] = {"w_hr": weights[0]} if first else {}
        return named | {"layer_norm": weights[first:]} if self.layer_norm else named

    def _torch_cell(self) -> str | None:
        """The cell of torch.nn that this module computes, as `ops.STACKS` names it, if it is one."""
        return None

    def _zeros(self, input: Tensor, batch: int) -> States:
        """The initial states of one direction of one layer."""
        return (input.new_zeros(batch, self.hidden_size),)

    def _states(self, hx: Any) -> States:
        return (hx,)

    def _check_hx_dim(self, hx: Any, dim: int) -> None:
        if hx.dim() != dim:
            form = "batched" if dim == 3 else "unbatched"
            raise RuntimeError(f"For {form} {dim}-D input, hx should also be {dim}-D but got {hx.dim()}-D tensor")
