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
        torch.onnx.OnnxExporterError: From the export, for what ONNX has no form for: packed input, projections, resets,
            zoneout, masks, all cell states and the cells that torch.nn does not have.
    """
    from onnxscript import opset18

    def one_state(name: str, **attributes: Any) -> Callable[..., Any]:
        def translate(  # type: ignore[no-untyped-def]
            input, w_ih, w_hh, b_ih, b_hh, w_cell, h0, batch_sizes=None, reverse: bool = False, save: bool = False,
            lengths=None, reset=None, h_mask=None, zone_h=None, grad_clip: float = 0.0,
        ) -> Sequence[Any]:  # fmt: skip
            _refuse(name, {"packed input": batch_sizes, "reset": reset, "a mask": h_mask, "zoneout": zone_h})
            weights = (w_ih, w_hh, b_ih, b_hh)
            output, h_n, empty = _translate(opset18, name, input, weights, (h0,), lengths, reverse, attributes)
            return output, h_n, empty, empty

        return translate

    def lstm(  # type: ignore[no-untyped-def]
        input, w_ih, w_hh, b_ih, b_hh, w_hr, w_cell, h0, c0, batch_sizes=None, reverse: bool = False,
        save: bool = False, lengths=None, reset=None, h_mask=None, zone_h=None, grad_clip: float = 0.0, zone_c=None,
        return_cells: bool = False,
    ) -> Sequence[Any]:  # fmt: skip
        zone = zone_h if zone_c is None else zone_c
        refused = {"packed input": batch_sizes, "a projection": w_hr, "reset": reset, "a mask": h_mask, "zoneout": zone}
        _refuse("LSTM", refused | {"all cell states": return_cells or None})
        weights = (w_ih, w_hh, b_ih, b_hh)
        output, h_n, c_n, empty = _translate(opset18, "LSTM", input, weights, (h0, c0), lengths, reverse, {})
        return output, h_n, c_n, *[empty] * 5

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
    lengths: Any,
    reverse: bool,
    attributes: dict[str, Any],
) -> Sequence[Any]:
    """Writes one operator: output, final states, and an empty tensor."""
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
    if lengths is not None:
        lengths = onnx.Cast(lengths, to=6)  # int32
    arguments = (input, leading(reorder(w_ih)), leading(reorder(w_hh)), bias, lengths, *(leading(s) for s in states))
    output, *final = getattr(onnx, name)(*arguments, **options)
    return (
        onnx.Squeeze(output, onnx.Constant(value_ints=[1])),
        *(onnx.Squeeze(state, onnx.Constant(value_ints=[0])) for state in final),
        onnx.ConstantOfShape(onnx.Constant(value_ints=[0])),
    )


def _refuse(name: str, arguments: dict[str, Any]) -> None:
    for what, argument in arguments.items():
        if argument is not None:
            raise NotImplementedError(f"fastrnn: ONNX's {name} has no form for {what}")
