# SPDX-License-Identifier: BSD-3-Clause
"""Export to the standard RNN, GRU and LSTM operators of ONNX.

The package onnxscript, which torch.onnx needs too, is imported when `translation_table` is called.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Which of torch's gates stands at each place of ONNX's order: i, o, f, g and z, r, n.
_GATES: dict[str, Sequence[int]] = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx writes fastrnn's operators, one ONNX operator per layer and direction.

    For models with modules of this package::

        torch.onnx.export(model, inputs, "model.onnx", custom_translation_table=fastrnn.onnx.translation_table())

    Raises:
        ImportError: If onnxscript is not installed.
        NotImplementedError: From the export, for packed input and for projections: ONNX has no form for them.
    """
    from onnxscript import opset18

    def one_state(name: str, **attributes: Any) -> Callable[..., Any]:
        def translate(  # type: ignore[no-untyped-def]
            input, w_ih, w_hh, b_ih, b_hh, h0, batch_sizes=None, reverse: bool = False, save: bool = False
        ) -> Sequence[Any]:
            return _translate(
                opset18, name, input, (w_ih, w_hh, b_ih, b_hh), (h0,), None, batch_sizes, reverse, attributes
            )

        return translate

    def lstm(  # type: ignore[no-untyped-def]
        input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, batch_sizes=None, reverse: bool = False, save: bool = False
    ) -> Sequence[Any]:
        return _translate(opset18, "LSTM", input, (w_ih, w_hh, b_ih, b_hh), (h0, c0), w_hr, batch_sizes, reverse, {})

    ops = torch.ops.fastrnn
    return {
        ops.rnn_tanh_layer.default: one_state("RNN", activations=["Tanh"]),
        ops.rnn_relu_layer.default: one_state("RNN", activations=["Relu"]),
        ops.gru_layer.default: one_state("GRU", linear_before_reset=1),
        ops.lstm_layer.default: lstm,
    }


def _translate(
    onnx: Any,
    name: str,
    input: Any,
    weights: Sequence[Any],
    states: Sequence[Any],
    w_hr: Any,
    batch_sizes: Any,
    reverse: bool,
    attributes: dict[str, Any],
) -> Sequence[Any]:
    """Writes one operator: output, final states, and an empty tensor for each that is saved for backward."""
    if batch_sizes is not None:
        raise NotImplementedError(f"fastrnn: ONNX's {name} takes no packed input; export with padded input")
    if w_hr is not None:
        raise NotImplementedError(f"fastrnn: ONNX's {name} has no projection")
    w_ih, w_hh, *biases = weights
    gates = _GATES[name]

    def leading(tensor: Any) -> Any:  # ONNX has a dimension for directions
        return onnx.Unsqueeze(tensor, onnx.Constant(value_ints=[0]))

    hidden = int(w_hh.shape[1])
    rows = [gate * hidden + j for gate in gates for j in range(hidden)]

    def reorder(weight: Any) -> Any:
        return onnx.Gather(weight, onnx.Constant(value_ints=rows), axis=0) if len(gates) > 1 else weight

    bias = None if biases[0] is None else leading(onnx.Concat(*(reorder(b) for b in biases), axis=0))
    options = {"hidden_size": hidden, "direction": "reverse" if reverse else "forward"} | attributes
    arguments = (input, leading(reorder(w_ih)), leading(reorder(w_hh)), bias, None, *(leading(s) for s in states))
    output, *final = getattr(onnx, name)(*arguments, **options)
    saved = {"RNN": 1, "GRU": 1, "LSTM": 3}[name]
    empty = onnx.ConstantOfShape(onnx.Constant(value_ints=[0]))
    return (
        onnx.Squeeze(output, onnx.Constant(value_ints=[1])),
        *(onnx.Squeeze(state, onnx.Constant(value_ints=[0])) for state in final),
        *[empty] * saved,
    )
