# SPDX-License-Identifier: BSD-3-Clause
"""The cells: one step of a recurrent network, for those who write the loop over time themselves.

Letters in shapes: B batch, I input_size, H hidden_size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn import ops
from fastrnn.modes import is_tracing, is_transformed
from fastrnn.packing import PacksWeights
from fastrnn.stack import (
    NO_SCRIPT,
    Device,
    States,
    as_hx,
    autocast_dtype,
    call_autocast,
    check_alike,
    read_weights,
)

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(PacksWeights, nn.RNNCellBase):
    """What the cells share: the forms of the input and the checks. A cell is its layer at T = 1.

    Under autocast it is torch.nn's operator. For torch's own, autocast keeps the weights that it has cast from one step
    to the next; to cast them anew costs more than a fused step saves.
    """

    _kind: str  # of the cell, as of a `LayerStack`
    _promotes: tuple[bool, ...]  # for each state, what `call_autocast` asks
    _autocast_by_torch = True  # False while `fastrnn.diagnostics` looks at the steps, which are ours then

    def _op(self, input: Tensor, *args: Any, library: Any = ops, **options: Any) -> Sequence[Tensor]:
        """Runs one step, of input (B, I): the states after it. The rest is as of a `LayerStack`."""
        raise NotImplementedError

    def _torch_operator(self, input: Tensor, hx: Any, *weights: Any) -> Any:
        """The same step by torch.nn's own operator, in its form."""
        raise NotImplementedError

    def _torch_step(self, input: Tensor, weights: Sequence[Any], states: States | None) -> Sequence[Tensor]:
        results = self._torch_operator(input, as_hx(states or self._zeros(input)), *weights)
        return (results,) if isinstance(results, Tensor) else results

    def _zeros(self, input: Tensor) -> States:
        return [input.new_zeros(input.size(0), self.hidden_size)] * len(self._promotes)

    def __prepare_scriptable__(self) -> None:
        """As of a `LayerStack`."""
        raise NotImplementedError(NO_SCRIPT.format(type(self).__name__))

    def _checked(self, input: Tensor) -> tuple[Tensor, None]:
        """As of a `LayerStack`."""
        input = input.unsqueeze(0) if self._dim(input) == 1 else input
        weights = read_weights(self, _WEIGHTS)
        self._check_sizes(input, weights, None)
        if autocast_dtype(input) is None:
            self._check_weights(input, weights)
        else:
            self._torch_step(input, weights, None)
        return input.unsqueeze(0), None

    def _check_weights(self, input: Tensor, weights: Sequence[Any]) -> None:
        check_alike(input, "parameter", [*weights[:2], *(bias for bias in weights[2:] if bias is not None)])

    def _dim(self, input: Tensor) -> int:
        dim = input.dim()
        if dim not in (1, 2):
            raise ValueError(f"{self._kind}Cell: Expected input to be 1D or 2D, got {dim}D instead")
        return dim

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Runs one step. What goes in and what comes out is said at the class."""
        dim = self._dim(input)
        states = None if hx is None else self._states(hx)
        if dim == 1:
            input = input.unsqueeze(0)
            states = states if states is None else [state.unsqueeze(0) for state in states]
        weights = read_weights(self, _WEIGHTS)
        if not is_tracing():
            self._check_sizes(input, weights, states)
        if autocast_dtype(input) is None:
            states = self._step(input, weights, states)
        elif self._autocast_by_torch and not is_transformed():  # lstm_cell has no batching rule
            states = self._torch_step(input, weights, states)
        else:
            states = call_autocast(self._step, self._promotes, input, weights, states)
        return as_hx(states if dim == 2 else [state.squeeze(0) for state in states])

    def _step(self, input: Tensor, weights: list[Any], states: States | None) -> Sequence[Tensor]:
        if states is None:
            states = self._zeros(input)
        else:
            check_alike(input, "hidden", states)
        self._check_weights(input, weights)
        packings = self._packings_in_use()
        return self._op(input, *weights, *states, packing=packings[0] if packings else None)

    def _check_sizes(self, input: Tensor, weights: list[Any], states: States | None) -> None:
        expected = (input.size(0), self.hidden_size)
        if input.size(1) != self.input_size or any([state.shape != expected for state in states or ()]):
            # torch.nn's words, which change from one version to the next, are those of its operator.
            self._torch_step(input, weights, states)

    def _states(self, hx: Any) -> States:
        self._check_state_dim(hx, "hidden")
        return (hx,)

    def _check_state_dim(self, state: Any, name: str) -> None:
        if state.dim() not in (1, 2):
            raise ValueError(f"{self._kind}Cell: Expected {name} to be 1D or 2D, got {state.dim()}D instead")


class RNNCell(_Cell):
    """Drop-in for torch.nn.RNNCell: same arguments, weights, outputs and errors.

    One step::

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)

    with relu for tanh where `nonlinearity` says so. A call takes `input` (B, I) or (I,) and optionally `h` (B, H) or
    (H,), zero by default, and returns h'.

    Difference: complex weights are refused.

    Raises:
        TypeError: As torch.nn.RNNCell, for an argument of the wrong type.
        ValueError: As torch.nn.RNNCell, for an input or a state with the wrong number of dimensions.
        RuntimeError: As torch.nn.RNNCell, for sizes, dtypes or devices that do not fit.
    """

    _kind = "RNN"
    _promotes = (False,)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Takes what torch.nn.RNNCell takes."""
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def _torch_operator(self, input: Tensor, hx: Any, *weights: Any) -> Any:
        self._check_nonlinearity()
        operator = torch.rnn_relu_cell if self.nonlinearity == "relu" else torch.rnn_tanh_cell
        return operator(input, hx, *weights)

    def _check_nonlinearity(self) -> None:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")

    def _op(self, input: Tensor, *args: Any, library: Any = ops, **options: Any) -> Sequence[Tensor]:
        self._check_nonlinearity()
        h = ops.rnn_step(self.nonlinearity, input, *args) if library is ops else None
        if h is not None:
            return (h,)
        return library.rnn_layer(input.unsqueeze(0), *args, nonlinearity=self.nonlinearity, **options)[1:]  # type: ignore[no-any-return]


class GRUCell(_Cell):
    """Drop-in for torch.nn.GRUCell: same arguments, weights, outputs and errors.

    One step::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r (W_hn h + b_hn))
        h' = (1 - z) n + z h

    A call takes `input` (B, I) or (I,) and optionally `h` (B, H) or (H,), zero by default, and returns h'.

    Differences: complex weights, sparse input, and an input_size or a hidden_size of 0 are refused.

    Raises:
        TypeError: As torch.nn.GRUCell, for an argument of the wrong type.
        ValueError: As torch.nn.GRUCell, for an input or a state with the wrong number of dimensions.
        RuntimeError: As torch.nn.GRUCell, for sizes, dtypes or devices that do not fit.
    """

    _kind = "GRU"
    _promotes = (True,)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Takes what torch.nn.GRUCell takes."""
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def _torch_operator(self, input: Tensor, hx: Any, *weights: Any) -> Any:
        return torch.gru_cell(input, hx, *weights)

    def _op(self, input: Tensor, *args: Any, library: Any = ops, **options: Any) -> Sequence[Tensor]:
        return library.gru_layer(input.unsqueeze(0), *args, **options)[1:]  # type: ignore[no-any-return]


class LSTMCell(_Cell):
    """Drop-in for torch.nn.LSTMCell: same arguments, weights, outputs and errors.

    One step::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c' = f c + i g
        h' = o tanh(c')

    A call takes `input` (B, I) or (I,) and optionally `(h, c)`, each (B, H) or (H,), zero by default, and returns
    `(h', c')`.

    Differences: complex weights, sparse input, and an input_size or a hidden_size of 0 are refused.

    Raises:
        TypeError: As torch.nn.LSTMCell, for an argument of the wrong type.
        ValueError: As torch.nn.LSTMCell, for an input or a state with the wrong number of dimensions.
        RuntimeError: As torch.nn.LSTMCell, for sizes, dtypes or devices that do not fit.
    """

    _kind = "LSTM"
    _promotes = (True, True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Takes what torch.nn.LSTMCell takes."""
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def _torch_operator(self, input: Tensor, hx: Any, *weights: Any) -> Any:
        return torch.lstm_cell(input, hx, *weights)

    def _op(self, input: Tensor, *args: Any, library: Any = ops, **options: Any) -> Sequence[Tensor]:
        return library.lstm_layer(input.unsqueeze(0), *args, **options)[1:]  # type: ignore[no-any-return]

    def _states(self, hx: Any) -> States:
        for index, state in enumerate(hx):
            self._check_state_dim(state, f"hx[{index}]")
        if isinstance(hx, Tensor):
            raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
        if len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        return hx  # type: ignore[no-any-return]
