# SPDX-License-Identifier: BSD-3-Clause
"""The modules: torch.nn.RNN, GRU and LSTM with their options, and what they offer beyond.

Letters in shapes: T time, B batch, I input_size, H hidden_size, P proj_size, H_out = P with a projection and H without,
L num_layers, D directions. Without a batch B is left out.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Unpack  # a requirement of torch

from fastrnn import ops
from fastrnn.modes import is_tracing
from fastrnn.options import RecurrentOptions
from fastrnn.stack import Device, LayerStack, States


def _check_options(options: RecurrentOptions) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for name in options:
        if name not in RecurrentOptions.__annotations__:
            raise TypeError(f"RNNBase.__init__() got an unexpected keyword argument '{name}'")


class RNN(LayerStack):
    """Drop-in for torch.nn.RNN: same arguments, weights, outputs and errors.

    For each layer, from the first step to the last, in the other direction from the last to the first::

        h = tanh(W_ih x + b_ih + W_hh h + b_hh)

    where x is the input, above the first layer the output of the layer below after dropout, and relu takes the place of
    tanh where `nonlinearity` says so. Beyond torch.nn: nonlinearity="leaky_relu", with the slope 0.01, and
    `fastrnn.options.RecurrentOptions`.

    A call takes `input` and optionally `h_0`, zero by default, and returns `output, h_n`:

    * input: (T, B, I), with `batch_first` (B, T, I), unbatched (T, I), or a PackedSequence
    * h_0, h_n: (L*D, B, H)
    * output: in the form of the input, with D*H features
    * lengths: (B,) integers from 0 to T, in any order: the true lengths of padded sequences. Output past the end is
      zero, h_n is that of the true end, and the cost is that of the true steps
    * reset: bool (T, B), with `batch_first` (B, T): where it is true the sequence begins anew, from zero states

    Differences: `flatten_parameters` has nothing to do; autocast to bfloat16 stays bfloat16 on CUDA; complex weights
    are refused; torch.jit.script does not compile it (torch.jit.trace, torch.compile and torch.export do).

    Raises:
        TypeError: As torch.nn.RNN, for an argument of the wrong type.
        ValueError: As torch.nn.RNN, for an option out of its range, or an input of the wrong dtype or dimension.
        RuntimeError: As torch.nn.RNN, for sizes, dtypes or devices that do not fit.
    """

    _kind = "RNN"
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
        **options: Unpack[RecurrentOptions],
    ) -> None:
        """Takes what torch.nn.RNN takes, nonlinearity "leaky_relu", and `fastrnn.options.RecurrentOptions`."""
        _check_options(options)
        if nonlinearity not in ("tanh", "relu", "leaky_relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            "RNN_RELU" if nonlinearity == "leaky_relu" else f"RNN_{nonlinearity.upper()}",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            device=device,
            dtype=dtype,
        )
        self._set_options(options)

    def extra_repr(self) -> str:
        """As of all modules."""
        return super().extra_repr() + (", nonlinearity=leaky_relu" if self.nonlinearity == "leaky_relu" else "")

    def _op(self, *args: Any, library: Any = ops, **options: Any) -> tuple[Tensor, ...]:
        input, *others = args
        is_plain = options.keys() <= {"batch_sizes", "reverse", "meet", "packing"} and options["batch_sizes"] is None
        if is_plain and torch.is_grad_enabled() and not is_tracing() and input.size(0) == 1:
            h = ops.rnn_step(self.nonlinearity, input.squeeze(0), *others)
            if h is not None:
                return h.unsqueeze(0), h.clone()  # apart: the states may be changed in place
        return library.rnn_layer(*args, nonlinearity=self.nonlinearity, **options)  # type: ignore[no-any-return]

    def _torch_cell(self) -> str | None:
        return self.nonlinearity if self.nonlinearity in ops.STACKS else None

    def _promotes(self, packed: bool) -> tuple[bool, ...]:
        return False, False


class GRU(LayerStack):
    """Drop-in for torch.nn.GRU: same arguments, weights, outputs and errors.

    For each layer, from the first step to the last, in the other direction from the last to the first::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r (W_hn h + b_hn))
        h = (1 - z) n + z h

    where x is the input, above the first layer the output of the layer below after dropout. Beyond torch.nn:
    `fastrnn.options.RecurrentOptions`, and

    * reset_after=False: the GRU as it was published (Cho et al., 2014), which resets before the product:
      n = tanh(W_in x + b_in + W_hn (r h) + b_hn)
    * layer_norm=True: gain LN(W x) + b in the place of W x + b, with gain_ih_l[k] for the input and gain_hh_l[k] for h,
      (3*H,), 1 at first; r and z are normalised together, n alone (Ba, Kiros, Hinton, "Layer normalization", 2016)

    A call takes `input` and optionally `h_0`, zero by default, and returns `output, h_n`:

    * input: (T, B, I), with `batch_first` (B, T, I), unbatched (T, I), or a PackedSequence
    * h_0, h_n: (L*D, B, H)
    * output: in the form of the input, with D*H features
    * lengths: (B,) integers from 0 to T, in any order: the true lengths of padded sequences. Output past the end is
      zero, h_n is that of the true end, and the cost is that of the true steps
    * reset: bool (T, B), with `batch_first` (B, T): where it is true the sequence begins anew, from zero states

    Differences: `flatten_parameters` has nothing to do; autocast to bfloat16 stays bfloat16 on CUDA; complex weights
    are refused; torch.jit.script does not compile it (torch.jit.trace, torch.compile and torch.export do).

    Raises:
        TypeError: As torch.nn.GRU, for an argument of the wrong type.
        ValueError: As torch.nn.GRU, for an option out of its range, or an input of the wrong dtype or dimension.
        RuntimeError: As torch.nn.GRU, for sizes, dtypes or devices that do not fit.
    """

    _kind = "GRU"
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
        *,
        reset_after: bool = True,
        layer_norm: bool = False,
        **options: Unpack[RecurrentOptions],
    ) -> None:
        """Takes what torch.nn.GRU takes, `reset_after`, `layer_norm` and `fastrnn.options.RecurrentOptions`."""
        _check_options(options)
        if layer_norm and not reset_after:
            raise ValueError("expected layer_norm=False with reset_after=False, got True")
        if not reset_after:
            self.reset_after = False
        super().__init__(
            *("GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            device=device,
            dtype=dtype,
        )
        if layer_norm:
            self.layer_norm = True
            self._add_weights({"gain_ih": 3 * hidden_size, "gain_hh": 3 * hidden_size}, device, dtype)
        self._set_options(options)

    reset_after: bool = True  # of a module that was torch.nn's when it was made
    _beyond = ("reset_after", "layer_norm")

    def _op(self, *args: Any, library: Any = ops, **options: Any) -> tuple[Tensor, ...]:
        return library.gru_layer(*args, reset_after=self.reset_after, **options)  # type: ignore[no-any-return]

    def _torch_cell(self) -> str | None:
        return "gru" if self.reset_after and not self.layer_norm else None

    def _promotes(self, packed: bool) -> tuple[bool, ...]:
        return True, True


class LSTM(LayerStack):
    """Drop-in for torch.nn.LSTM: same arguments, weights, outputs and errors.

    For each layer, from the first step to the last, in the other direction from the last to the first::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c = f c + i g
        h = o tanh(c), with a projection W_hr (o tanh(c))

    where x is the input, above the first layer the output of the layer below after dropout. Beyond torch.nn:

    * coupled=True: i = 1 - f, weights for three gates f, g, o (Greff et al., "LSTM: a search space odyssey", 2017)
    * peephole=True: the gates i and f see w_i c and w_f c, o sees w_o c of the new c, through weight_peephole_l[k], the
      blocks i, f, o: (3*H,) (Gers et al., "Learning precise timing with LSTM recurrent networks", 2002)
    * layer_norm=True: gain LN(W x) + b in the place of W x + b, with gain_ih_l[k] for the input and gain_hh_l[k] for h,
      (4*H,), the gates normalised together; and h = o tanh(gain_c LN(c) + bias_c), with gain_c_l[k] and bias_c_l[k],
      (H,). Gains are 1 at first, bias_c is 0 (Ba, Kiros, Hinton, "Layer normalization", 2016)
    * forget_bias: what the two biases of the forget gate add up to at first (Jozefowicz et al., "An empirical
      exploration of recurrent network architectures", 2015: 1)
    * `fastrnn.options.RecurrentOptions`

    A call takes `input` and optionally `(h_0, c_0)`, zero by default, and returns `output, (h_n, c_n)`:

    * input: (T, B, I), with `batch_first` (B, T, I), unbatched (T, I), or a PackedSequence
    * h_0, h_n: (L*D, B, H_out)
    * c_0, c_n: (L*D, B, H)
    * output: in the form of the input, with D*H_out features
    * lengths: (B,) integers from 0 to T, in any order: the true lengths of padded sequences. Output past the end is
      zero, h_n and c_n are those of the true end, and the cost is that of the true steps
    * reset: bool (T, B), with `batch_first` (B, T): where it is true the sequence begins anew, from zero states
    * return_cell_states: with it c of every step, (T, B, D*H) of the last layer, is returned third

    Differences: `flatten_parameters` has nothing to do; autocast to bfloat16 stays bfloat16 on CUDA; complex weights
    are refused; torch.jit.script does not compile it (torch.jit.trace, torch.compile and torch.export do).

    Raises:
        TypeError: As torch.nn.LSTM, for an argument of the wrong type.
        ValueError: As torch.nn.LSTM, for an option out of its range, or an input of the wrong dtype or dimension.
        RuntimeError: As torch.nn.LSTM, for sizes, dtypes or devices that do not fit.
    """

    _kind = "LSTM"
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
        *,
        coupled: bool = False,
        peephole: bool = False,
        layer_norm: bool = False,
        forget_bias: float | None = None,
        **options: Unpack[RecurrentOptions],
    ) -> None:
        """Takes what torch.nn.LSTM takes, `fastrnn.options.RecurrentOptions`, and what the class says."""
        _check_options(options)
        if coupled + peephole + layer_norm > 1:
            raise ValueError("expected at most one of coupled, peephole and layer_norm to be True")
        if forget_bias is not None and not bias:
            raise ValueError("expected bias=True where forget_bias is given, got False")
        if coupled and proj_size > 0:
            raise ValueError("expected coupled=False with proj_size, got True")
        if coupled:
            self.coupled = True
        if forget_bias is not None:
            self.forget_bias = forget_bias
        # RNNBase counts the gates by its mode.
        super().__init__(
            "GRU" if coupled else "LSTM",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size),
            device=device,
            dtype=dtype,
        )
        self.mode = "LSTM"
        if peephole:
            self.peephole = True
            self._add_weights({"weight_peephole": 3 * hidden_size}, device, dtype)
        if layer_norm:
            self.layer_norm = True
            gains = {"gain_ih": 4 * hidden_size, "gain_hh": 4 * hidden_size, "gain_c": hidden_size}
            self._add_weights(gains | ({"bias_c": hidden_size} if bias else {}), device, dtype)
        self._set_options(options)

    # Of a module that was torch.nn's when it was made.
    coupled: bool = False
    peephole: bool = False
    forget_bias: float | None = None
    _beyond = ("coupled", "peephole", "layer_norm", "forget_bias")

    def reset_parameters(self) -> None:
        """Draws the weights as torch.nn does, and sets the biases of the forget gate where `forget_bias` says so."""
        super().reset_parameters()
        if self.forget_bias is None:
            return
        first = 0 if self.coupled else self.hidden_size
        for name, parameter in self.named_parameters():
            if name.startswith(("bias_ih", "bias_hh")):
                with torch.no_grad():
                    parameter[first : first + self.hidden_size] = self.forget_bias if name.startswith("bias_ih") else 0

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> tuple[Any, ...]:
        """Runs all layers. What goes in and what comes out is said at the class."""
        controls = self._sequence_controls(input, lengths, reset)
        if not return_cell_states:
            output, hx, _ = self._forward(input, hx, controls)
            return output, hx
        if isinstance(input, PackedSequence):
            raise ValueError("expected return_cell_states=False with a PackedSequence, got True: see lengths")
        return self._forward(input, hx, controls | {"return_cells": True})

    def _op(self, *args: Any, library: Any = ops, **options: Any) -> tuple[Tensor, ...]:
        return library.lstm_layer(*args, coupled=self.coupled, **options)  # type: ignore[no-any-return]

    def _torch_cell(self) -> str | None:
        return None if self.coupled or self.peephole or self.layer_norm else "lstm"

    def _further_weights(self, weights: list[Tensor]) -> dict[str, Any]:
        named = super()._further_weights(weights)
        if self.layer_norm and not self.bias:
            named["layer_norm"] = [*named["layer_norm"], None]
        return named | {"w_peephole": weights[-1]} if self.peephole else named

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


class SLSTM(LayerStack):
    """The sLSTM of Beck et al., "xLSTM: extended long short-term memory", 2024, as a layer like LSTM.

    For each layer, from the first step to the last, in the other direction from the last to the first::

        z = tanh(W_iz x + b_iz + W_hz h + b_hz)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        m' = max(log f + m, i)  with i = W_ii x + b_ii + W_hi h + b_hi, f = sigmoid(W_if x + b_if + W_hf h + b_hf);
             i where n is 0: nothing has been stored
        c = exp(log f + m - m') c + exp(i - m') z
        n = exp(log f + m - m') n + exp(i - m')
        h = o c / n

    where x is the input, above the first layer the output of the layer below after dropout. The exponential input gate
    lets a step replace what is stored; m, which has no gradient, keeps it in range. One head: W_h* are full matrices.
    The rows of the weights are those of the gates i, f, z, o. The block of the paper around it (normalisation,
    convolution, projections) is the user's.

    A call takes `input` and optionally the states `(h, c, n, m)`, zero by default, which means that nothing is stored,
    and returns `output, (h, c, n, m)`:

    * input: (T, B, I), with `batch_first` (B, T, I), unbatched (T, I), or a PackedSequence
    * h, c, n, m: (L*D, B, H)
    * output: in the form of the input, with D*H features
    * lengths, reset: as of `LSTM`

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For an option out of its range, or an input of the wrong dtype or dimension.
        RuntimeError: For sizes, dtypes or devices that do not fit.
    """

    _kind = "SLSTM"
    _dim_error = "SLSTM: Expected input to be 2D or 3D, got {}D instead"

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
        **options: Unpack[RecurrentOptions],
    ) -> None:
        """Takes the arguments of LSTM but proj_size, and `fastrnn.options.RecurrentOptions` but zoneout."""
        _check_options(options)
        super().__init__(
            *("LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            device=device,
            dtype=dtype,
        )
        self._set_options(options)
        if self.options.zoneouts != (0, 0):
            raise ValueError(f"expected zoneout to be 0 for SLSTM, got {self.options.zoneout}")

    def _op(self, *args: Any, library: Any = ops, **options: Any) -> tuple[Tensor, ...]:
        c0 = torch.stack(args[6:])
        output, h_n, others = library.slstm_layer(*args[:6], c0, **options)
        return output, h_n, *others.unbind()

    def _promotes(self, packed: bool) -> tuple[bool, ...]:
        return (False,) * 5

    def _zeros(self, input: Tensor, batch: int) -> States:
        return (input.new_zeros(batch, self.hidden_size),) * 4

    def _states(self, hx: Any) -> States:
        if isinstance(hx, Tensor) or len(hx) != 4:
            got = "a Tensor" if isinstance(hx, Tensor) else f"{len(hx)} states"
            raise TypeError(f"expected the states of SLSTM to be a tuple (h, c, n, m), got {got}")
        return hx  # type: ignore[no-any-return]

    def _check_hx_dim(self, hx: Any, dim: int) -> None:
        for state in self._states(hx):
            super()._check_hx_dim(state, dim)

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Raises unless input and states fit the module."""
        self.check_input(input, batch_sizes)
        for state in self._states(hidden):
            self.check_hidden_size(state, self.get_expected_hidden_size(input, batch_sizes))

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """The states of the sequences in another order."""
        return hx if permutation is None else tuple(state.index_select(1, permutation) for state in self._states(hx))
