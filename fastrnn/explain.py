# SPDX-License-Identifier: BSD-3-Clause
"""Which path serves a module, and why."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import _C, _library, cells, ops, wavefront
from fastrnn.convert import reason_against as reason_against_converting
from fastrnn.options import beyond_torch
from fastrnn.packing import reason_against as reason_against_keeping
from fastrnn.stack import LayerStack, autocast_dtype, read_weights


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. Print it.

    Attributes:
        layers: One line per layer and direction: what runs and why.
        notes: What else there is to know of this module and input, if anything.
    """

    layers: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """The layers, then the notes, one line each."""
        return "\n".join([*self.layers, *(f"note: {note}" for note in self.notes)])


def explain(module: Any, input: Tensor | PackedSequence) -> Explanation:
    """Tells which path runs each layer of a module, and why, without running it.

    It tells of a call with the input alone. `lengths` and `reset` run the same CPU kernels, and path gates on CUDA.
    Second and higher derivatives, forward mode (jvp, jacfwd, dual tensors) and torch.compile of a torch.func transform
    run fastrnn.reference, plain torch. torch.vmap runs the kernels: once where members share their weights, per member
    in backward and otherwise.

    Args:
        module: An RNN, GRU, LSTM or cell, of fastrnn or (the answer is short then) of torch.nn.
        input: As for a call of the module: its sizes, dtype, device and autocast count.

    Raises:
        TypeError: If the module is not recurrent.
        ValueError, RuntimeError: As a call of the module, for an input that does not fit it.
    """
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        raise TypeError(f"expected an RNN, GRU, LSTM or cell, got {type(module).__name__}")
    name = type(module).__name__
    if not isinstance(module, (LayerStack, cells._Cell)):
        reason = reason_against_converting(module)
        advice = f"leaves it alone: {reason}" if reason else "makes it fastrnn's"
        return Explanation((f"{name}: runs as torch.nn's; fastrnn.convert(module) {advice}",), ())

    is_cell = isinstance(module, nn.RNNCellBase)
    options: Any = module  # Module.__getattr__ has no type for them
    data, batch_sizes = options._checked(input)
    by_torch = is_cell and autocast_dtype(data) is not None
    T, B = data.shape[:2] if batch_sizes is None else (len(batch_sizes), int(batch_sizes[0]))
    hidden = options.hidden_size
    projected = hidden if is_cell else options.proj_size or hidden
    layers, directions = (1, 1) if is_cell else (options.num_layers, 1 + options.bidirectional)
    dtype = data.dtype
    gates = options.weight_hh.size(0) if is_cell else options.weight_hh_l0.size(0)
    problem: dict[str, Any] = {"T": T, "B": B, "H": hidden, "gates": gates // hidden}
    beyond = None if is_cell else beyond_torch(module)
    taken = _cpu_takes(dtype, beyond) if data.device.type == "cpu" and not by_torch else None
    unpacked = _reason_against_packing(module, dtype) if module._packings and not by_torch else None

    lines = []
    for layer in range(layers):
        width = options.input_size if layer == 0 else directions * projected
        for direction in range(directions):
            label = name if is_cell else f"{name} layer {layer}" + (" reverse" if direction else "")
            sizes = f"T={T} B={B} I={width} H={hidden}" + (f" P={projected}" if projected != hidden else "")
            if data.device.type not in ("cpu", "cuda"):
                outcome = "a call works out shapes alone" if data.is_meta else "a call raises"
                path = f"there is no kernel for {data.device.type}: {outcome}"
            elif by_torch:
                path = "torch's own operator, for which autocast keeps the weights that it has cast"
            elif data.device.type == "cuda":
                path = _cuda_path(problem, directions, module._kind, projected != hidden, dtype, data.device, beyond)
            else:
                facts = {"I": width, "P": projected, "layers": directions, "widens": taken == "widened"}
                facts["packed"] = bool(module._packings) and unpacked is None
                path = _cpu_path(problem | facts | _cell_problem(module))
                multiply_adds = B * hidden * (width + hidden)
                is_plain_step = module._kind == "RNN" and T == 1 and batch_sizes is None and not beyond
                if is_plain_step and multiply_adds < ops.STEP_WORTH_A_NODE:
                    is_always = is_cell and multiply_adds < ops.STEP_WORTH_FUSING
                    path = "torch's own operator for one step" + ("" if is_always else f"; without gradients {path}")
            lines.append(f"{label} ({sizes} {str(dtype).removeprefix('torch.')}): {path}")
    notes = [f"weights do not stay packed: {unpacked}"] if unpacked else []
    # Only builds with persistent kernels have this operator.
    has_waves = data.device.type == "cuda" and hasattr(torch.ops.fastrnn, "wavefront_steps")
    if layers > 1 and has_waves and not any("a call raises" in line for line in lines):
        notes.append(_wavefront(module, problem, data, batch_sizes))
    return Explanation(tuple(lines), (*notes, *_notes(module, input, dtype, taken, lines)))


def _reason_against_packing(module: Any, dtype: torch.dtype) -> str | None:
    """Why a call at this point has no use for `pack_weights`."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    names = module._all_weights if isinstance(module, nn.RNNBase) else [["weight_ih", "weight_hh"]]
    weights = [read_weights(module, [name for name in run if name.startswith("weight")]) for run in names]
    if weights[0][0].dtype != dtype:
        return "autocast casts the weights at every call"
    if not isinstance(module, nn.RNNCellBase) and module.training and module.options.weight_dropout > 0:
        return "weight_dropout draws the recurrent weights at every call"
    return next(filter(None, map(reason_against_keeping, weights)), None)


def _cell_problem(module: Any) -> dict[str, Any]:
    """What the plan asks about the cell."""
    if not getattr(module, "reset_after", True):
        return {"gates": 2, "two_products": True}
    return {"normalises": getattr(module, "layer_norm", False)}


def _cpu_takes(dtype: torch.dtype, beyond: str | None) -> str | None:
    """What the CPU kernels do with a 16-bit dtype; None for others."""
    names: dict[torch.dtype, Any] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
    if dtype not in names:
        return None
    taken = _C.cpu_takes(names[dtype])
    has_kernel = beyond != "reset_after=False" if taken == "multiplied" else beyond is None
    return taken if has_kernel else "converted"


def _cpu_path(problem: dict[str, Any]) -> str:
    plan = _C.plan_cpu(**problem, threads=torch.get_num_threads())
    shared = {"rows": "each with rows of the batch", "units": "each with hidden units"}[plan.split]
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads, {shared}"
    in_place = [name for name, packed in (("W_ih", plan.pack_input), ("W_hh", plan.pack_recurrent)) if not packed]
    weights = "; weights are packed ahead of calls" if problem["packed"] else ""
    weights += f"; {' and '.join(in_place)} read in place, where packing does not pay" if in_place else ""
    compiled = " (in a compiled program one after the other)" if plan.side_by_side else ""
    return f"fused CPU kernel ({_C.isa()}) on {threads}: {plan.reason}{compiled}{weights}"


def _cuda_path(
    problem: dict[str, Any],
    directions: int,
    kind: str,
    projection: bool,
    dtype: torch.dtype,
    device: torch.device,
    beyond: str | None,
) -> str:
    forced = os.environ.get("FASTRNN_PATH", "")
    if _C.cuda_version is None:
        return "no kernel, a call raises: fastrnn was built without CUDA"
    if forced not in ("", "gates", "persistent"):
        return f"no path, a call raises: FASTRNN_PATH is {forced}, neither gates nor persistent"
    if forced == "persistent" and not hasattr(torch.ops.fastrnn, "refused_launches"):
        return "no path, a call raises: FASTRNN_PATH=persistent, built without FASTRNN_PERSISTENT=1"
    facts = problem | _cuda_facts(kind, dtype, device)
    arithmetic = facts["arithmetic"]

    def planned(backward: bool, layers: int) -> "_C.CudaPlan":
        return _C.plan_cuda(**facts, layers=layers, projection=projection, backward=backward)

    forward, backward = planned(False, directions), planned(True, directions)
    at_once = directions > 1 and forward.path == "persistent"
    if not at_once:
        forward = planned(False, 1)
    if backward.path == "gates":
        backward = planned(True, 1)
    path, reason = ("gates", f"{beyond} has no persistent kernel") if beyond else (forward.path, forward.reason)
    if path != (forced or path):
        return f"no path, a call raises: FASTRNN_PATH={forced} cannot serve this layer: {reason}"
    both = ", both directions at once (in a compiled program one after the other)" if at_once else ""
    rounding = ", products in TF32" if arithmetic == "tf32" else ""
    teams = f"{forward.teams} teams of {forward.blocks} blocks" + (" for each" if at_once else "")
    what = {
        "gates": "a matrix product and a fused gate kernel per step",
        "persistent": f"one kernel for the whole sequence{both}{rounding}, {teams}",
    }[path]
    if path != "gates" and backward.path != path:
        what += f"; backward {'raises' if forced else 'takes path gates'}: {backward.reason}"
    return f"path {path} ({what}): {reason}"


def _cuda_facts(kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What the plans ask beside the sizes."""
    gpu: Any = torch.cuda.get_device_properties(device)
    # Only builds with persistent kernels have this operator.
    ask = getattr(torch.ops.fastrnn, "clusters_at_once", lambda blocks, device: 0)
    arithmetic = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}.get(dtype, "fp32")
    if arithmetic == "fp32" and _library.allows_tf32():
        arithmetic = "tf32"
    return {
        "states": 2 if kind.endswith("LSTM") else 1,
        "arithmetic": arithmetic,
        "capability": 10 * gpu.major + gpu.minor,
        "multiprocessors": gpu.multi_processor_count,
        "shared_per_block": gpu.shared_memory_per_block_optin,
        "l2_bytes": gpu.L2_cache_size,
        "clusters": [ask(blocks, device.index or 0) for blocks in (2, 4, 8, 16)],
        "path": os.environ.get("FASTRNN_PATH", ""),
    }


def _wavefront(module: Any, problem: dict[str, Any], data: Tensor, batch_sizes: Tensor | None) -> str:
    """Whether the layers of a stack run as a wavefront."""
    if reason := wavefront.reason_against(module, batch_sizes):
        return f"no wavefront of layers: {reason}"
    chunks = os.environ.get("FASTRNN_PERSISTENT_CHUNKS", "")
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (data, *module.parameters()))
    facts = problem | _cuda_facts(module._kind, data.dtype, data.device)
    plan = _C.plan_wavefront(**facts, backward=trains, chunks=int(chunks) if chunks.isdigit() else 0)
    if plan.steps:
        return f"two layers at a time are a wavefront, in chunks of {plan.steps} steps (not compiled): {plan.reason}"
    if chunks not in ("", "0", "1"):
        return f"a call raises: FASTRNN_PERSISTENT_CHUNKS={chunks} cannot serve this stack: {plan.reason}"
    return f"no wavefront of layers: {plan.reason}"


def _notes(module: Any, input: Any, dtype: torch.dtype, taken: str | None, lines: list[str]) -> list[str]:
    notes = []
    takes_lengths = isinstance(module, nn.RNNBase) and isinstance(input, Tensor) and input.dim() == 3
    if takes_lengths and any(": path persistent" in line for line in lines):
        notes.append("calls with lengths= or reset= take path gates")
    # Only builds with persistent kernels have this operator.
    if refused := getattr(torch.ops.fastrnn, "refused_launches", int)():
        notes.append(f"a device refused {refused} persistent kernels in this process: path gates ran instead")
    if taken in ("converted", "widened"):
        how = "tensors are converted before and after" if taken == "converted" else "kernels convert as they read"
        notes.append(f"{str(dtype).removeprefix('torch.')} is computed in float32 on this CPU: {how}")
    return notes
