# SPDX-License-Identifier: BSD-3-Clause
"""The modules: torch.nn's options, forms of input and errors, around ops that run one direction of one layer.

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

from fastrnn import ops

# Inside this module states are a sequence, h or (h, c); `hx` is what the user sees, a tensor or a pair.
States = Sequence[Tensor]
Device = torch.device | str | int | None


def is_tracing() -> bool:
    """Whether torch.jit.trace runs. Sizes are tensors then, and a check of them is recorded as a constant."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, no-any-return]


def as_hx(states: States) -> Any:
    """The form in which the user sees states."""
    return states[0] if len(states) == 1 else tuple(states)


def read_weights(module: nn.Module, names: Iterable[str]) -> list[Any]:
    """The current weights of these names, None where there is none."""
    parameters = module._parameters  # a look here first saves most of the time of Module.__getattr__
    return [parameters[name] if name in parameters else getattr(module, name, None) for name in names]


def check_alike(input: Tensor, kind: str, tensors: Iterable[Tensor | None]) -> None:
    """Raises unless all are tensors with the device and the dtype of the input."""
    device, dtype = input.device, input.dtype
    for tensor in tensors:
        if tensor is None:
            raise TypeError(f"expected {kind} to be a Tensor, but got NoneType")
        if tensor.device != device:
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, "
                f"found input tensor at {device} and {kind} tensor at {tensor.device}"
            )
        if tensor.dtype != dtype:
            raise RuntimeError(
                f"Input and {kind} tensors are not the same dtype, "
                f"found input tensor with {dtype} and {kind} tensor with {tensor.dtype}"
            )


def call_autocast(
    run: Callable[..., Sequence[Tensor]],
    promotes: Sequence[bool],
    input: Tensor,
    weights: Sequence[Tensor | None],
    states: States | None,
) -> Sequence[Tensor]:
    """Calls run(input, weights, states), in the dtype that autocast asks for where it is on.

    CPU autocast of torch.nn returns in the wider dtype what is carried from step to step by elementwise arithmetic, the
    h of a GRU and mostly the c of an LSTM. `promotes` tells for each result whether it is so.
    """
    if not torch._C._is_any_autocast_enabled():  # RNNBase asks it too; the public way takes four times as long
        return run(input, weights, states)
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return run(input, weights, states)
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Any) -> Any:
        is_eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if is_eligible else tensor

    carried = torch.promote_types(dtype, input.dtype if states is None else states[-1].dtype)
    states = states if states is None else [cast(state) for state in states]
    with torch.autocast(device, enabled=False):  # the products inside an op are none of autocast's business
        results = run(cast(input), [cast(weight) for weight in weights], states)
    if device != "cpu" or results[0].dtype != dtype:
        return results
    return [result.to(carried) if promote else result for result, promote in zip(results, promotes, strict=True)]


class _LayerStack(nn.RNNBase):
    """What RNN, GRU and LSTM share: the forms of the input, the checks, the loop over layers and directions.

    The hidden state is one tensor here. LSTM, which has two, overrides the methods that look inside it.
    """

    _dim_error: str  # what torch.nn says of input with neither two nor three dimensions

    def _op(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        """Runs one direction of one layer: the output, and the states after the last step."""
        raise NotImplementedError

    def _promotes(self, packed: bool) -> tuple[bool, ...]:
        """For the output and each state, what `call_autocast` asks."""
        raise NotImplementedError

    @property
    def _flat_weights(self) -> list[Any]:
        # RNNBase keeps a list, which goes stale when a weight is replaced behind its back. A view cannot.
        return read_weights(self, self._flat_weights_names)

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels take the weights where they are."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Runs all layers. What goes in and what comes out is said at the class."""
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                hx = self.permute_hidden(hx, sorted_indices)
            output, hx = self._run(data, hx, batch_sizes)
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self.permute_hidden(hx, unsorted_indices)

        dim = input.dim()
        if dim not in (2, 3):
            raise ValueError(self._dim_error.format(dim))
        if hx is not None:
            self._check_hx_dim(hx, dim)
        if dim == 3:
            return self._run(input, hx)
        batch_dim = 0 if self.batch_first else 1
        if hx is not None:
            hx = as_hx([state.unsqueeze(1) for state in self._states(hx)])
        output, hx = self._run(input.unsqueeze(batch_dim), hx)
        return output.squeeze(batch_dim), as_hx([state.squeeze(1) for state in self._states(hx)])

    def _run(self, input: Tensor, hx: Any, batch_sizes: Tensor | None = None) -> tuple[Tensor, Any]:
        if hx is None or (batch_sizes is not None and torch.compiler.is_compiling()):
            self.check_input(input, batch_sizes)
            if hx is not None and batch_sizes is not None:  # the graph's data, known when it runs
                rows_fit = batch_sizes[0] == self._states(hx)[0].size(1)
                torch._assert_async(rows_fit, "Expected hidden to have as many rows as there are sequences")
        else:
            self.check_forward_args(input, hx, batch_sizes)
        batch_first = self.batch_first and batch_sizes is None
        if batch_first:
            input = input.transpose(0, 1)
        if batch_sizes is None and not is_tracing() and input.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

        run = partial(self._run_layers, batch_sizes=batch_sizes)
        states = None if hx is None else self._states(hx)
        promotes = self._promotes(batch_sizes is not None)
        output, *states = call_autocast(run, promotes, input, self._flat_weights, states)
        return output.transpose(0, 1) if batch_first else output, as_hx(states)

    def _run_layers(
        self, input: Tensor, weights: list[Tensor], states: States | None, batch_sizes: Tensor | None
    ) -> list[Tensor]:
        """The output of the last layer, then the final states: (L*D, B, H_out), of an LSTM also (L*D, B, H)."""
        directions = 2 if self.bidirectional else 1
        runs = self.num_layers * directions
        if states is None:
            batch = input.size(1) if batch_sizes is None else int(batch_sizes[0])
            initial = [self._zeros(input, batch)] * runs
        else:
            check_alike(input, "hidden", states)
            initial = list(zip(*(state.unbind() for state in states), strict=True))
        check_alike(input, "parameter", weights)

        per_run = len(weights) // runs
        final: list[list[Tensor]] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                run = layer * directions + direction
                w_ih, w_hh, *rest = weights[run * per_run : (run + 1) * per_run]
                b_ih, b_hh = rest[:2] if self.bias else (None, None)
                projection = {"w_hr": rest[-1]} if self.proj_size > 0 else {}
                output, *last = self._op(
                    *(input, w_ih, w_hh, b_ih, b_hh, *initial[run]),
                    batch_sizes=batch_sizes,
                    reverse=direction == 1,
                    **projection,
                )
                outputs.append(output)
                final.append(last)
            input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout > 0 and self.training and layer < self.num_layers - 1:
                input = torch.dropout(input, self.dropout, True)
        if runs == 1:
            return [input, *(state.unsqueeze(0) for state in final[0])]
        return [input, *(torch.stack(state) for state in zip(*final, strict=True))]

    def _zeros(self, input: Tensor, batch: int) -> States:
        """The initial states of one direction of one layer."""
        return (input.new_zeros(batch, self.hidden_size),)

    def _states(self, hx: Any) -> States:
        return (hx,)

    def _check_hx_dim(self, hx: Any, dim: int) -> None:
        if hx.dim() != dim:
            form = "batched" if dim == 3 else "unbatched"
            raise RuntimeError(f"For {form} {dim}-D input, hx should also be {dim}-D but got {hx.dim()}-D tensor")


def _refuse_projection(options: dict[str, Any]) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class RNN(_LayerStack):
    """Drop-in for torch.nn.RNN: same arguments, weights, outputs and errors.

    For each layer, from the first step to the last, in the other direction from the last to the first::

        h = tanh(W_ih x + b_ih + W_hh h + b_hh)

    where x is the input, above the first layer the output of the layer below after dropout, and relu takes the place of
    tanh where `nonlinearity` says so.

    A call takes `input` and optionally `h_0`, zero by default, and returns `output, h_n`:

    * input: (T, B, I), with `batch_first` (B, T, I), unbatched (T, I), or a PackedSequence
    * h_0, h_n: (L*D, B, H)
    * output: in the form of the input, with D*H features

    Differences: `flatten_parameters` has nothing to do; autocast to bfloat16 stays bfloat16 on CUDA; complex weights
    are refused; torch.jit.script does not compile it (torch.jit.trace, torch.compile and torch.export do).

    Raises:
        TypeError: As torch.nn.RNN, for an argument of the wrong type.
        ValueError: As torch.nn.RNN, for an option out of its range, or an input of the wrong dtype or dimension.
        RuntimeError: As torch.nn.RNN, for sizes, dtypes or devices that do not fit.
    """

    _dim_error = "RNN: Expected input to be 2D or 3D, got {}D tensor instead"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **unsupported: Any,
    ) -> None:
        """Takes what torch.nn.RNN takes."""
        _refuse_projection(unsupported)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        options = {"device": device, "dtype": dtype, **unsupported}
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            **options,
        )

    def _op(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        return ops.rnn_layer(*args, nonlinearity=self.nonlinearity, **options)

    def _promotes(self, packed: bool) -> tuple[bool, ...]:
        return False, False


class GRU(_LayerStack):
    """Drop-in for torch.nn.GRU: same arguments, weights, outputs and errors.

    For each layer, from the first step to the last, in the other direction from the last to the first::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r (W_hn h + b_hn))
        h = (1 - z) n + z h

    where x is the input, above the first layer the output of the layer below after dropout.

    A call takes `input` and optionally `h_0`, zero by default, and returns `output, h_n`:

    * input: (T, B, I), with `batch_first` (B, T, I), unbatched (T, I), or a PackedSequence
    * h_0, h_n: (L*D, B, H)
    * output: in the form of the input, with D*H features

    Differences: `flatten_parameters` has nothing to do; autocast to bfloat16 stays bfloat16 on CUDA; complex weights
    are refused; torch.jit.script does not compile it (torch.jit.trace, torch.compile and torch.export do).

    Raises:
        TypeError: As torch.nn.GRU, for an argument of the wrong type.
        ValueError: As torch.nn.GRU, for an option out of its range, or an input of the wrong dtype or dimension.
        RuntimeError: As torch.nn.GRU, for sizes, dtypes or devices that do not fit.
    """

    _dim_error = "GRU: Expected input to be 2D or 3D, got {}D instead"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **unsupported: Any,
    ) -> None:
        """Takes what torch.nn.GRU takes."""
        _refuse_projection(unsupported)
        options = {"device": device, "dtype": dtype, **unsupported}
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, **options
        )

    def _op(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        return ops.gru_layer(*args, **options)

    def _promotes(self, packed: bool) -> tuple[bool, ...]:
        return True, True


class LSTM(_LayerStack):
    """Drop-in for torch.nn.LSTM: same arguments, weights, outputs and errors.

    For each layer, from the first step to the last, in the other direction from the last to the first::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c = f c + i g
        h = o tanh(c), with a projection W_hr (o tanh(c))

    where x is the input, above the first layer the output of the layer below after dropout.

    A call takes `input` and optionally `(h_0, c_0)`, zero by default, and returns `output, (h_n, c_n)`:

    * input: (T, B, I), with `batch_first` (B, T, I), unbatched (T, I), or a PackedSequence
    * h_0, h_n: (L*D, B, H_out)
    * c_0, c_n: (L*D, B, H)
    * output: in the form of the input, with D*H_out features

    Differences: `flatten_parameters` has nothing to do; autocast to bfloat16 stays bfloat16 on CUDA; complex weights
    are refused; torch.jit.script does not compile it (torch.jit.trace, torch.compile and torch.export do).

    Raises:
        TypeError: As torch.nn.LSTM, for an argument of the wrong type.
        ValueError: As torch.nn.LSTM, for an option out of its range, or an input of the wrong dtype or dimension.
        RuntimeError: As torch.nn.LSTM, for sizes, dtypes or devices that do not fit.
    """

    _dim_error = "LSTM: Expected input to be 2D or 3D, got {}D instead"

    # These look inside a pair of states and call no super(): torch's own serve.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Takes what torch.nn.LSTM takes."""
        super().__init__(
            *("LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size),
            device=device,
            dtype=dtype,
        )

    def _op(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        return ops.lstm_layer(*args, **options)

    def _promotes(self, packed: bool) -> tuple[bool, ...]:
        # torch has a kernel of its own for LSTM only where neither is the case, and the projection is a product.
        has_projection = self.proj_size > 0
        promotes_h = packed and not has_projection
        return promotes_h, promotes_h, packed or has_projection

    def _zeros(self, input: Tensor, batch: int) -> States:
        c = input.new_zeros(batch, self.hidden_size)
        return (input.new_zeros(batch, self.proj_size) if self.proj_size > 0 else c, c)

    def _states(self, hx: Any) -> States:
        if isinstance(hx, Tensor):
            raise TypeError("lstm() received an invalid combination of arguments: hx must be a tuple of Tensors")
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        return hx  # type: ignore[no-any-return]

    def _check_hx_dim(self, hx: Any, dim: int) -> None:
        h_dim, c_dim = hx[0].dim(), hx[1].dim()
        if h_dim != dim or c_dim != dim:
            form = "batched" if dim == 3 else "unbatched"
            raise RuntimeError(
                f"For {form} {dim}-D input, hx and cx should also be {dim}-D but got ({h_dim}-D, {c_dim}-D) tensors"
            )
