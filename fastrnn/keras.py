# SPDX-License-Identifier: BSD-3-Clause
"""Keras's SimpleRNN, LSTM and GRU on the kernels, for Keras 3 on its torch backend.

`SimpleRNN`, `LSTM` and `GRU` are subclasses of `keras.layers`' of the same name: arguments, weights, results, masks,
states, wrappers and files are Keras's own, and only the loop over time is replaced. `patch` replaces it in
`keras.layers` itself, for models that exist already. `explain` tells which layers of a model the kernels serve, and why
others run Keras's loop.

On CUDA, Keras's own Bidirectional calls cuDNN for both directions of an LSTM or GRU at once, without asking the layers,
unless they have `use_cudnn=False`, a mask, a state or dropout.

Letters in shapes: T time, B batch, I input, H units, G gates.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fastrnn import ops
from fastrnn.convert import Replacement
from fastrnn.explain import Explanation

try:
    import keras
except ImportError as error:
    raise ImportError(
        f"fastrnn.keras needs Keras 3 on its torch backend: pip install keras, and set KERAS_BACKEND=torch ({error})"
    ) from error
if keras.backend.backend() != "torch":
    raise ImportError(
        f"fastrnn.keras needs Keras's torch backend, and Keras runs on {keras.backend.backend()}: "
        "set KERAS_BACKEND=torch before keras is imported"
    )

_BASES = {
    "SimpleRNN": (keras.layers.SimpleRNN, keras.layers.SimpleRNNCell),
    "LSTM": (keras.layers.LSTM, keras.layers.LSTMCell),
    "GRU": (keras.layers.GRU, keras.layers.GRUCell),
}
_KERAS_LOOPS = {kind: layer.inner_loop for kind, (layer, _) in _BASES.items()}  # as they were before `patch`
_TANH = (keras.activations.tanh, keras.ops.tanh, torch.tanh)
_RELU = (keras.activations.relu, keras.ops.relu, torch.relu)
_SIGMOID = (keras.activations.sigmoid, keras.ops.sigmoid, torch.sigmoid)


def _inner_loop(
    self: Any, sequences: Tensor, initial_state: Any, mask: Any, training: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """In the place of Keras's loop over time: same arguments, same results.

    Args:
        self: The layer.
        sequences: (B, T, I).
        initial_state: One (B, H) per state, in a list or alone.
        mask: None or (B, T), false where a step is skipped, or a list that begins with that.
        training: Whether dropout applies.

    Returns:
        The last output (B, H), all outputs (B, T, H) in the order in which the steps ran (with `return_sequences`,
        otherwise the last one), and the final states.
    """
    if _refusal(self, training) or torch.onnx.is_in_onnx_export():  # by Keras, which has no translation of operators
        return _KERAS_LOOPS[_kind(self)](self, sequences, initial_state, mask, training)  # type: ignore[no-any-return]
    weights = _weights(self.cell)
    dtype = weights[0].dtype
    states = [state.to(dtype) for state in keras.tree.flatten(initial_state)]
    if self.stateful:  # Keras overwrites them with the final states, and backward needs them
        states = [state.clone() for state in states]
    x = sequences.to(dtype)
    if training and self.cell.dropout > 0:
        x = x * self.cell.get_dropout_mask(x[:, 0]).unsqueeze(1)
    x, lengths = x.transpose(0, 1), None
    mask = keras.tree.flatten(mask)[0]
    if mask is not None:
        # A skipped step leaves state and output as they were: the others, moved together, are a shorter sequence.
        mask = mask.bool().T
        lengths = mask.sum(0)
        order = torch.argsort(~mask, dim=0, stable=True)
        x = x.gather(0, order.unsqueeze(-1).expand(x.shape))
    op, options = _operator(self)
    if training and self.cell.recurrent_dropout > 0:
        options["h_mask"] = self.cell.get_recurrent_dropout_mask(states[0]).to(dtype)
    output, *states = op(x, *weights, *states, lengths=lengths, reverse=self.go_backwards, **options)

    last = states[0]
    if mask is None:
        if self.return_sequences and self.go_backwards:
            output = output.flip(0)
    else:
        taken = mask.flip(0) if self.go_backwards else mask  # from here on in the order in which the steps ran
        steps = taken.cumsum(0)
        shown = (taken if self.zero_output_for_mask else steps > 0).unsqueeze(-1)
        last = last.where(shown[-1], 0)
        if self.return_sequences:
            latest = lengths - steps if self.go_backwards else (steps - 1).clamp(min=0)
            output = output.gather(0, latest.unsqueeze(-1).expand(output.shape)).where(shown, 0)
    return last, (output.transpose(0, 1) if self.return_sequences else last.unsqueeze(1)), states


def _kind(layer: Any) -> str:
    """SimpleRNN, LSTM or GRU; RNN for other layers."""
    return next((kind for kind, (base, _) in _BASES.items() if isinstance(layer, base)), "RNN")


def _operator(layer: Any) -> tuple[Callable[..., tuple[Tensor, ...]], dict[str, Any]]:
    """The operator that runs a layer, and the options that choose its cell."""
    if isinstance(layer, keras.layers.SimpleRNN):
        return ops.rnn_layer, {"nonlinearity": "relu" if layer.cell.activation in _RELU else "tanh"}
    if isinstance(layer, keras.layers.LSTM):
        return ops.lstm_layer, {}
    return ops.gru_layer, {"reset_after": layer.cell.reset_after}


def _weights(cell: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The weights of a cell as the operators take them: (G*H, I), (G*H, H), and biases (G*H,) or None."""
    weights = [cell.kernel, cell.recurrent_kernel, *([cell.bias] if cell.use_bias else [])]
    weights = [keras.ops.convert_to_tensor(weight) for weight in weights]
    if isinstance(cell, keras.layers.GRUCell):  # Keras's order is z, r, h; torch's is r, z, n
        weights = [torch.cat([r, z, h], -1) for z, r, h in (weight.chunk(3, -1) for weight in weights)]
    kernel, recurrent_kernel, *biases = weights
    bias = biases[0] if biases else None
    b_ih, b_hh = (bias, None) if bias is None or bias.dim() == 1 else bias.unbind()
    return kernel.T, recurrent_kernel.T, b_ih, b_hh


def _refusal(layer: Any, training: bool) -> str | None:
    """Why the kernels cannot run a layer; None where they can."""
    kind, cell = _kind(layer), layer.cell
    if kind == "RNN":
        return "the kernels serve SimpleRNN, LSTM and GRU"
    if type(cell) is not _BASES[kind][1]:
        return f"there is no kernel for {type(cell).__name__}"
    if not (cell.activation in _TANH or (kind == "SimpleRNN" and cell.activation in _RELU)):
        return f"there is no kernel for activation={_name(cell.activation)}"
    if kind != "SimpleRNN" and cell.recurrent_activation not in _SIGMOID:
        return f"there is no kernel for recurrent_activation={_name(cell.recurrent_activation)}"
    if training and cell.recurrent_dropout > 0 and kind != "SimpleRNN":
        return "there is no kernel for recurrent_dropout with a mask of its own for each gate"
    if training and cell.dropout > 0 and getattr(cell, "implementation", 2) == 1:
        return "there is no kernel for dropout with implementation=1, a mask of its own for each gate"
    return None


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


@keras.saving.register_keras_serializable("fastrnn")
class SimpleRNN(keras.layers.SimpleRNN):  # type: ignore[misc]
    """`keras.layers.SimpleRNN` on the kernels: same arguments, weights, results and errors.

    For each step::

        h = tanh(x kernel + h recurrent_kernel + bias)

    with relu for tanh where `activation` says so. Other activations run Keras's own loop.
    """

    inner_loop = _inner_loop


@keras.saving.register_keras_serializable("fastrnn")
class LSTM(keras.layers.LSTM):  # type: ignore[misc]
    """`keras.layers.LSTM` on the kernels: same arguments, weights, results and errors.

    For each step, with i, f, g, o the four blocks of ``x kernel + h recurrent_kernel + bias``::

        c = sigmoid(f) c + sigmoid(i) tanh(g)
        h = sigmoid(o) tanh(c)

    Other activations, and training with `recurrent_dropout`, run Keras's own loop.
    """

    inner_loop = _inner_loop


@keras.saving.register_keras_serializable("fastrnn")
class GRU(keras.layers.GRU):  # type: ignore[misc]
    """`keras.layers.GRU` on the kernels: same arguments, weights, results and errors.

    For each step, with xz, xr, xn the three blocks of ``x kernel + bias[0]`` and hz, hr, hn those of
    ``h recurrent_kernel + bias[1]``::

        z, r = sigmoid(xz + hz), sigmoid(xr + hr)
        n = tanh(xn + r hn)
        h = (1 - z) n + z h

    With ``reset_after=False`` there is one bias, and n is ``tanh(xn + (r h) recurrent_kernel_n)``. Other activations,
    and training with `recurrent_dropout`, run Keras's own loop.
    """

    inner_loop = _inner_loop


def patch() -> ExitStack:
    """Makes `keras.layers`' SimpleRNN, LSTM and GRU run on the kernels, in models that exist and in those to come.

    Their classes, names and files stay Keras's own. It lasts to the end of the `with` statement that it is used in, or
    to a call of `close`, or else to the end of the program::

        fastrnn.keras.patch()
        with fastrnn.keras.patch():
            model.fit(x, y)
    """
    stack = ExitStack()
    stack.enter_context(_on_the_kernels)
    return stack


_on_the_kernels = Replacement((layer for layer, _ in _BASES.values()), "inner_loop", lambda *_: _inner_loop)


def explain(model: Any) -> Explanation:
    """Tells for each recurrent layer of a Keras model whether the kernels serve it, and if not, why.

    Args:
        model: A Keras model or layer.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"explain: expected model to be a Keras model or layer, got {type(model).__name__}")
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.RNN)]
    return Explanation(tuple(f"{layer.name} ({type(layer).__name__}): {_service(layer)}" for layer in layers), ())


def _service(layer: Any) -> str:
    always, in_training = _refusal(layer, False), _refusal(layer, True)
    if always:
        return f"Keras's own loop: {always}"
    if type(layer).inner_loop is not _inner_loop:
        return "Keras's own loop: fastrnn.keras.patch() puts it on the kernels"
    return f"the kernels; Keras's own loop in training: {in_training}" if in_training else "the kernels"
