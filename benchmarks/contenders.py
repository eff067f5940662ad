# SPDX-License-Identifier: BSD-3-Clause
"""Who is measured: for each contender one callable that does the work of a case.

All callables of a case take the same tensors and return the same results in the same order: output, last states and,
in mode train, the gradients of input, initial states and weights in the order of `parameters()`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
from typing import Any

import torch
from cases import CELLS, GATES, Call, Case, Problem
from torch import Tensor

BASELINES = {
    "torch.nn": "torch.nn's module (oneDNN or native on the CPU, cuDNN on CUDA)",
    "no-cudnn": "torch.nn's module on CUDA with cuDNN switched off",
    "reference": "fastrnn.reference, a loop over time in plain torch",
    "compiled": "that loop under torch.compile, which unrolls it: minutes of compilation at T=100",
    "unpacked": "fastrnn's module without pack_weights, infer and --pack-weights only",
    "onnxruntime": "ONNX Runtime on the CPU, infer and fp32 only; needs the packages onnxruntime and onnx",
    "keras": "keras.layers on Keras's torch backend, fit only; needs the package keras",
}
KERAS_BATCHES = 10


def serves(baseline: str, case: Case) -> bool:
    """Whether a baseline is meant for a case."""
    if "keras" == baseline or case.mode == "fit":
        return ("keras", "fit", "fp32", 1, 1) == (baseline, case.mode, case.dtype, case.shape.L, case.shape.D)
    if baseline == "unpacked":
        return (case.mode, case.device) == ("infer", "cpu")
    if baseline == "onnxruntime":
        return (case.mode, case.dtype, case.device) == ("infer", "fp32", "cpu")
    return baseline != "no-cudnn" or case.device == "cuda"


def missing_packages(baseline: str) -> list[str]:
    """Packages that a baseline needs and that are not installed."""
    needed = {"onnxruntime": ["onnx", "onnxruntime"], "keras": ["keras"]}.get(baseline, [])
    return [package for package in needed if importlib.util.find_spec(package) is None]


def make_call(problem: Problem, contender: str) -> Call:
    """Builds what a contender, "fastrnn" or one of BASELINES, does in a case."""
    if problem.case.mode == "fit":
        return _keras(problem, "fastrnn.keras" if contender == "fastrnn" else "keras.layers")
    return {
        "fastrnn": lambda: _module(problem, problem.fast_module),
        "torch.nn": lambda: _module(problem, problem.torch_module),
        "unpacked": lambda: _module(problem, _unpacked(problem.fast_module)),
        "no-cudnn": lambda: _without_cudnn(problem),
        "reference": lambda: _reference(problem, compiled=False),
        "compiled": lambda: _reference(problem, compiled=True),
        "onnxruntime": lambda: _onnxruntime(problem),
    }[contender]()


def _module(problem: Problem, module: torch.nn.RNNBase) -> Call:
    input = problem.input
    hx = tuple(problem.states) if len(problem.states) == 2 else problem.states[0]

    def forward() -> list[Tensor]:
        output, last = module(input, hx)
        return [output if isinstance(output, Tensor) else output.data, *([last] if isinstance(last, Tensor) else last)]

    return problem.in_mode(forward, list(module.parameters()))


def _unpacked(module: torch.nn.RNNBase) -> torch.nn.RNNBase:
    import fastrnn

    module = copy.deepcopy(module)
    fastrnn.pack_weights(module, False)
    return module


def _without_cudnn(problem: Problem) -> Call:
    call = _module(problem, problem.torch_module)

    def without_cudnn() -> list[Tensor]:
        with torch.backends.cudnn.flags(enabled=False):
            return call()

    return without_cudnn


def _reference(problem: Problem, compiled: bool) -> Call:
    from fastrnn import reference

    s, weights = problem.case.shape, problem.torch_module.all_weights
    layer = getattr(reference, f"{problem.case.cell}_layer")

    def stack(x: Tensor, *states: Tensor) -> list[Tensor]:
        last = []
        for k in range(s.L):
            outputs = []
            for n in range(k * s.D, (k + 1) * s.D):
                initial = [state[n] for state in states]
                output, *ends = layer(x, *weights[n], *initial, batch_sizes=problem.batch_sizes, reverse=n % s.D == 1)
                outputs.append(output)
                last.append(ends)
            x = torch.cat(outputs, -1)
        return [x, *(torch.stack(ends) for ends in zip(*last, strict=True))]

    run = torch.compile(stack) if compiled else stack
    return problem.in_mode(lambda: run(problem.data, *problem.states), list(problem.torch_module.parameters()))


def _keras(problem: Problem, library: str) -> Call:
    """An epoch of a model as textbooks have it; its loss is the result."""
    os.environ["KERAS_BACKEND"] = "torch"
    keras: Any = importlib.import_module("keras")
    s = problem.case.shape
    keras.utils.set_random_seed(0)
    layer = getattr(
        importlib.import_module(library), "SimpleRNN" if problem.case.cell == "rnn" else problem.case.cell.upper()
    )
    model = keras.Sequential([keras.Input((s.T, s.I)), layer(s.H), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    x = torch.randn(KERAS_BATCHES * s.B, s.T, s.I).numpy()

    def fit() -> list[Tensor]:
        history = model.fit(x, x[:, -1, :1], batch_size=s.B, shuffle=False, verbose=0).history
        return [torch.tensor(history["loss"])]

    return fit


# Where the ONNX operators' gate rows stand in torch's: LSTM i,o,f,g; GRU z,r,n.
_ONNX_ROWS = {"lstm": [0, 3, 1, 2], "gru": [1, 0, 2], "rnn": [0]}


def _onnxruntime(problem: Problem) -> Call:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.case.threads
    options.inter_op_num_threads = 1
    # By default its threads go on spinning after a call, for longer than the pause before the next contender's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(_onnx_model(problem), options, providers=["CPUExecutionProvider"])
    feed = {"x": problem.padded.numpy()}

    def infer() -> list[Tensor]:
        return [torch.from_numpy(result) for result in session.run(None, feed)]

    return infer


def _onnx_model(problem: Problem) -> bytes:
    """The problem as an ONNX graph: one RNN operator per layer, weights and initial states as constants."""
    onnx: Any = importlib.import_module("onnx")
    helper, case, s = onnx.helper, problem.case, problem.case.shape
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, value: Tensor) -> str:
        constants.append(onnx.numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def reordered(weight: Tensor) -> Tensor:
        gates = weight.chunk(GATES[case.cell])
        return torch.cat([gates[k] for k in _ONNX_ROWS[case.cell]])

    attributes: dict[str, Any] = {"hidden_size": s.H, "direction": "bidirectional" if s.D == 2 else "forward"}
    if case.cell == "gru":
        attributes["linear_before_reset"] = 1
    lengths = constant("lengths", torch.tensor(s.lengths, dtype=torch.int32)) if s.shortest else ""
    # From (T, D, B, H) to (T, B, D*H).
    merge = constant("merge", torch.tensor([1] if s.D == 1 else [0, 0, -1]))
    x, last = "x", []
    for k in range(s.L):
        rows = slice(k * s.D, (k + 1) * s.D)
        w_ih, w_hh, b_ih, b_hh = (
            torch.stack([reordered(weight) for weight in weights])
            for weights in zip(*problem.torch_module.all_weights[rows], strict=True)
        )
        weights = [constant(f"w{k}", w_ih), constant(f"r{k}", w_hh), constant(f"b{k}", torch.cat([b_ih, b_hh], 1))]
        initial = [constant(f"s{n}_{k}", state[rows]) for n, state in enumerate(problem.states)]
        last.append([f"last{n}_{k}" for n in range(len(initial))])
        inputs = [x, *weights, lengths, *initial]
        nodes.append(helper.make_node(CELLS[case.cell], inputs, [f"y{k}", *last[-1]], **attributes))
        x = f"x{k}"
        if s.D == 1:
            nodes.append(helper.make_node("Squeeze", [f"y{k}", merge], [x]))
        else:
            nodes.append(helper.make_node("Transpose", [f"y{k}"], [f"z{k}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"z{k}", merge], [x]))
    results = [f"last{n}" for n in range(len(problem.states))]
    for result, parts in zip(results, zip(*last, strict=True), strict=True):
        nodes.append(helper.make_node("Concat", parts, [result], axis=0))

    def declared(name: str, *sizes: int) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)

    outputs = [declared(x, s.T, s.B, s.D * s.H), *(declared(name, s.L * s.D, s.B, s.H) for name in results)]
    graph = helper.make_graph(nodes, case.cell, [declared("x", s.T, s.B, s.I)], outputs, constants)
    # Operator set 14 and format 8 are read by every ONNX Runtime since 1.10.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized
