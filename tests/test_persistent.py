# SPDX-License-Identifier: BSD-3-Clause
"""The persistent CUDA kernels: their plan, and they themselves on the emulation (tests/emulation/persistent.py)."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrnn
from fastrnn import _C

TESTS = Path(__file__).parent
FOLDER = TESTS / "emulation"
sys.path += [str(FOLDER), str(TESTS / "cuda")]

import libraries  # noqa: E402
import persistent_checks  # noqa: E402
import run as device_suite  # noqa: E402
from machine_code import DEVICES  # noqa: E402

extended = pytest.mark.extended
CELLS = {"rnn": (1, 1), "gru": (3, 1), "lstm": (4, 2)}  # gates, states


def plan(device: str = "h100", cell: str = "lstm", of=_C.plan_cuda, **problem) -> "_C.CudaPlan":
    facts = DEVICES[device]
    gates, states = CELLS[cell]
    problem = {"T": 100, "B": 16, "H": 256, "arithmetic": "fp16", "path": "persistent"} | problem
    return of(
        gates=gates,
        states=states,
        capability=facts.capability,
        multiprocessors=facts.multiprocessors,
        shared_per_block=facts.shared_per_block,
        l2_bytes=facts.l2,
        **{"clusters": facts.clusters} | problem,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The plan


def test_nothing_unmeasured_is_the_default():
    assert plan(path="").path == "gates"
    assert "measured" in plan(path="").reason


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ({"arithmetic": "fp64"}, "float64"),
        ({"projection": True}, "projection"),
        ({"T": 0}, "nothing"),
        ({"B": 0}, "nothing"),
        ({"H": 20000}, "does not fit"),
        ({"grade": 1}, "does not fit"),
        ({"grade": 2, "device": "a100"}, "does not fit"),
        ({"path": "gates"}, "forced"),
    ],
)
def test_what_the_gates_path_serves(problem, reason):
    planned = plan(**problem)
    assert (planned.path, planned.grade) == ("gates", 0)
    assert reason in planned.reason


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("H", "arithmetic"), [(2048, "fp16"), (2048, "bf16"), (1024, "tf32"), (1024, "fp32")])
def test_layers_beyond_the_chip_are_served(H, arithmetic, cell, backward):
    for B in (1, 7, 16, 64, 128, 256):
        planned = plan(cell=cell, B=B, H=H, arithmetic=arithmetic, backward=backward)
        assert planned.path == "persistent", planned.reason
        assert planned.streamed_bytes <= 0.75 * DEVICES["h100"].l2
        assert (planned.streamed_bytes > 0) == ("read from L2" in planned.reason)
        assert planned.streamed_bytes > 0 or (cell, backward) != ("lstm", True)


PATHS = [  # of an LSTM in fp16 on an H100, once that has been measured
    ({"H": 256, "T": 1, "B": 256, "backward": True}, "gates", "too short"),
    ({"H": 256, "T": 2, "B": 256, "backward": True}, "persistent", "estimated to be the faster path"),
    ({"H": 1024, "T": 1}, "gates", "too short"),
    ({"H": 1024, "T": 100}, "persistent", "estimated to be the faster path"),
    ({"H": 2048, "T": 100}, "persistent", "read from L2"),
    ({"H": 2048, "T": 100, "B": 64}, "gates", "steps are estimated to be faster"),
    ({"H": 1024, "T": 100, "B": 256}, "gates", "steps are estimated to be faster"),
]


@pytest.mark.parametrize(("problem", "path", "reason"), PATHS)
def test_the_faster_path_is_the_default_once_measured(problem, path, reason):
    planned = plan(**problem, path="", measured=True)
    assert planned.path == path and reason in planned.reason, planned.reason
    forced = plan(**problem)
    assert forced.path == "persistent" and forced.reason.startswith("forced")
    assert ("path gates" in forced.reason) == (path == "gates"), forced.reason
    assert plan(**problem, path="").path == "gates"


def test_longer_sequences_never_go_back_to_gates():
    """What a launch costs once is paid back by steps: from some length on, and from there for all."""
    for H, B, backward in itertools.product((64, 256, 1024, 2048), (1, 16, 64, 256), (False, True)):
        paths = [plan(H=H, B=B, T=T, backward=backward, path="", measured=True).path for T in (1, 2, 4, 8, 100, 10**6)]
        assert paths == sorted(paths), (H, B, backward, paths)


def test_two_layers_share_the_device_where_that_is_faster():
    """Side by side where one of them would leave most of the device idle, in turn where each takes all of it."""
    assert plan(H=256, layers=2).path == "persistent"
    assert plan(H=512, layers=2, backward=True).path == "persistent"
    in_turn = plan(H=1536, layers=2)
    assert (in_turn.path, in_turn.reason) == ("gates", "one after the other is faster")


wavefront = partial(plan, of=_C.plan_wavefront)


@pytest.mark.parametrize(
    ("problem", "steps", "reason"),
    [
        ({}, 0, "no wavefront has been measured"),
        ({"measured": True, "path": ""}, 0, "no wavefront has been measured"),
        ({"chunks": 1, "wavefronts_measured": True}, 0, "forced"),
        ({"chunks": 4}, 250, "forced"),
        ({"chunks": 3, "T": 100}, 34, "forced; one layer after the other is estimated to be faster"),
        ({"chunks": 9, "T": 4}, 1, "forced; one layer after the other is estimated to be faster"),
        ({"chunks": 4, "path": ""}, 0, "no persistent kernel has been measured"),
        ({"chunks": 4, "path": "gates"}, 0, "forced"),
        ({"chunks": 4, "arithmetic": "fp64"}, 0, "float64"),
        ({"chunks": 4, "H": 1536}, 250, "forced; one layer after the other is estimated to be faster"),
        ({"chunks": 4, "H": 2496, "backward": True}, 0, "does not fit"),
        ({"wavefronts_measured": True, "measured": True, "path": ""}, 125, "estimated to be faster"),
        ({"wavefronts_measured": True, "path": ""}, 0, "no persistent kernel has been measured"),
        ({"wavefronts_measured": True, "T": 100}, 0, "one layer after the other is estimated to be faster"),
        ({"wavefronts_measured": True, "H": 1536}, 0, "one layer after the other is estimated to be faster"),
    ],
)
def test_wavefronts(problem, steps, reason):
    """Where they are measured, a device has room beside a layer, and the sequence makes up for the launches."""
    planned = wavefront(**{"T": 1000} | problem)
    assert (planned.steps, reason in planned.reason) == (steps, True), (planned.steps, planned.reason)


def test_chunks_of_a_wavefront_have_launches():
    """Whatever is planned, each pass of both layers at a chunk takes one."""
    planned = 0
    for H, B, T, backward in itertools.product((64, 256, 512, 1024), (1, 16, 64), (50, 500, 5000), (False, True)):
        problem = {"H": H, "B": B, "path": "", "measured": True}
        steps = wavefront(**problem, T=T, backward=backward, wavefronts_measured=True).steps
        assert steps < T
        planned += steps > 0
        for one_pass in (False, backward) if steps else ():
            assert plan(**problem, T=steps, layers=2, backward=one_pass).path == "persistent"
    assert planned > 20


STACK = partial(fastrnn.LSTM, 3, 4, num_layers=2)


@pytest.mark.parametrize(
    ("environment", "module", "text"),
    [
        ({}, STACK, "no wavefront of layers: no wavefront has been measured on a device of this class yet"),
        ({"CHUNKS": "2"}, STACK, "two layers at a time are a wavefront, in chunks of 3 steps (not compiled): forced"),
        ({"CHUNKS": "1"}, STACK, "no wavefront of layers: forced"),
        (
            {"CHUNKS": "2", "PATH": ""},
            STACK,
            "a call raises: FASTRNN_PERSISTENT_CHUNKS=2 cannot serve this stack: no",
        ),
        ({"CHUNKS": "2"}, partial(STACK, bidirectional=True), "no wavefront of layers: the next layer needs both"),
        ({"CHUNKS": "2"}, partial(STACK, proj_size=2), None),
        ({"CHUNKS": "2"}, partial(STACK, weight_dropout=0.5), "an option of the recurrence has none"),
        ({"CHUNKS": "2"}, partial(STACK, grad_clip=1.0), None),
        ({"CHUNKS": "2"}, partial(fastrnn.LSTM, 3, 4), None),
    ],
)
def test_explain_a_wavefront(environment, module, text, h100, monkeypatch):
    monkeypatch.setattr(torch.ops.fastrnn, "wavefront_steps", lambda *_: 0, raising=False)
    for name, value in ({"PATH": "persistent", "CHUNKS": ""} | environment).items():
        monkeypatch.setenv("FASTRNN_PATH" if name == "PATH" else f"FASTRNN_PERSISTENT_{name}", value)
    with FakeTensorMode():
        explanation = fastrnn.explain(module(device="cuda"), torch.empty(5, 2, 3, device="cuda"))
    notes = [note for note in explanation.notes if "wavefront" in note or "CHUNKS" in note]
    assert len(notes) == (text is not None) and all(text in note for note in notes), explanation


def test_the_chip_goes_before_the_cache():
    """What fits on the chip stays there: more blocks and smaller windows of the operand come first."""
    for arithmetic, B in itertools.product(("fp16", "tf32", "fp32"), (1, 16)):
        for H in (64, 128, 256, 512, *([1024, 1536] if arithmetic == "fp16" else [])):
            assert plan(H=H, B=B, arithmetic=arithmetic).streamed_bytes == 0, (H, B, arithmetic)


def test_larger_layers_take_larger_teams():
    grades = [plan(H=H).grade for H in (16, 32, 65, 512, 768, 1536)]
    assert grades == [1, 1, 2, 2, 3, 3]
    assert [plan("a100", H=H).grade for H in (32, 65, 1024)] == [1, 3, 3]


def test_teams_are_as_many_as_clusters_that_run_at_once():
    """A cluster lies in one part of the device: 132 multiprocessors in parts of 16 or 18 hold 32 of 4, not 33."""
    assert plan(H=128, B=2000, grade=2, blocks=4).teams == 32
    assert plan(H=128, B=2000, grade=2, blocks=4, clusters=(60, 28, 12, 4)).teams <= 28
    assert plan(H=512, grade=2).blocks == 16
    assert plan(H=512, grade=2, clusters=(60, 28, 12, 0)).blocks == 8
    assert plan(H=512, grade=2, clusters=(0, 0, 0, 0)).path == "gates"
    assert plan(H=512, grade=2, layers=2, clusters=(66, 32, 16, 1)).blocks == 8


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("arithmetic", ["fp16", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("device", DEVICES)
def test_plans_are_sound(device, cell, arithmetic, backward, layers):
    """Every row and unit has its block, all fit, and blocks that wait for each other run at once."""
    served = 0
    for B, H in itertools.product((1, 3, 8, 9, 17, 64, 128, 1000), (1, 7, 8, 64, 100, 200, 256, 512, 768, 1024, 2048)):
        planned = plan(device, cell, B=B, H=H, arithmetic=arithmetic, backward=backward, layers=layers)
        if planned.path == "gates":
            continue
        served += 1
        multiprocessors = DEVICES[device].multiprocessors
        assert planned.shared_bytes <= DEVICES[device].shared_per_block
        assert planned.blocks * planned.units_per_block >= H
        assert (planned.teams - 1) * planned.rows_per_team < B <= planned.teams * planned.rows_per_team
        if planned.grade == 1:
            assert planned.blocks == 1
        if planned.grade == 2:
            at_once = dict(zip((2, 4, 8, 16), DEVICES[device].clusters, strict=True))
            assert layers * planned.teams <= at_once[planned.blocks]
        if planned.grade == 3:
            assert layers * planned.teams * planned.blocks <= multiprocessors
            assert (planned.blocks - 1) * planned.units_per_block < H
    assert served > 20


# ----------------------------------------------------------------------------------------------------------------------
# The device suite, as far as it can be checked without a device


def test_the_device_suite_runs_what_an_emulation_cannot():
    plans = [size.plan(backward) for size in persistent_checks.SIZES for backward in (False, True)]
    assert {plan.path for plan in plans} == {"persistent"}
    assert {plan.grade for plan in plans} == {1, 2, 3}
    for backward in (False, True):
        of_pass = plans[backward::2]
        assert any(plan.grade == 2 and plan.blocks == 16 and plan.shared_bytes > 200 << 10 for plan in of_pass)
        assert any(plan.grade == 3 and plan.teams * plan.blocks == 132 for plan in of_pass)
        assert {plan.grade for plan in of_pass if plan.streamed_bytes > 0} == {2, 3}
    assert len({size.plan(backward=False).shared_bytes for size in persistent_checks.SHARED}) == 3
    for case in persistent_checks.STACKS:
        arithmetic = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[case.dtype]
        sizes = {"T": case.T, "B": case.B, "H": case.H, "arithmetic": arithmetic, "chunks": persistent_checks.CHUNKS}
        planned = wavefront(cell=case.cell.removesuffix("_tanh"), **sizes, backward=True)
        assert planned.steps > 0 and case.T % planned.steps > 0, planned.reason


def test_the_device_suite_forces_the_persistent_kernels():
    """In a command of 10 minutes; and says how to build them where they are missing."""
    forced = [name for name in device_suite.GROUPS if name.startswith("persistent-")]
    assert len(forced) > 8 and sum(device_suite.GROUPS[name].seconds for name in forced) <= 600
    if not hasattr(torch.ops.fastrnn, "refused_launches"):
        status, why = device_suite.run_group(forced[0], 1)
        assert status == "FAILED" and "FASTRNN_PERSISTENT=1 make build" in why


# ----------------------------------------------------------------------------------------------------------------------
# The kernels


def run(
    library: Path, tests: str, selection: str, variant: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a file of tests/emulation on a library, in a process of its own."""
    environment = libraries.environment(variant) | {"FASTRNN_LIBRARY": str(library)} | environment
    options = [*"-q -s -x -p no:cacheprovider -p no:xdist".split(), FOLDER / tests]
    options += ["-k", f"not cuda and ({selection or 'test'})"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options], env=os.environ | environment, text=True, capture_output=True
    )


@pytest.mark.parametrize(
    ("tests", "schedule", "seed", "variant", "selection"),
    [
        ("persistent.py", "priority", 1, "", ""),
        ("wavefront.py", "random", 1, "", ""),
        *(
            pytest.param(*order, marks=extended)
            for order in [
                ("persistent.py", "random", 2, "address", "test_shapes and (T5 or T3)"),
                ("persistent.py", "priority", 3, "thread", "test_parity and lstm and bfloat16"),
                *(("persistent.py", "random", seed, "", "") for seed in (4, 5, 6)),
                *(("persistent.py", "priority", seed, "", "") for seed in (7, 8, 9)),
                ("persistent.py", "round_robin", 10, "address", ""),
                ("persistent.py", "random", 11, "thread", "not H300"),
                ("wavefront.py", "priority", 2, "address", "test_wavefront"),
                ("wavefront.py", "random", 3, "thread", "test_wavefront"),
                ("wavefront.py", "round_robin", 4, "", ""),
            ]
        ),
    ],
)
def test_kernels_on_the_emulation(tests, schedule, seed, variant, selection):
    try:
        library = libraries.build("ops", variant)
    except libraries.Unavailable as reason:
        pytest.skip(f"the emulated CUDA kernels are left out: {reason}")
    order = {"FASTRNN_EMULATION_SCHEDULE": schedule, "FASTRNN_EMULATION_SEED": str(seed)}
    done = run(library, tests, selection, variant, **order)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sanitizer" not in done.stderr


def test_a_forced_path_raises_where_the_device_refuses():
    try:
        library = libraries.build("ops")
    except libraries.Unavailable as reason:
        pytest.skip(f"the emulated CUDA kernels are left out: {reason}")
    done = run(library, "hindered.py", "refused_and_forced or without_room", FASTRNN_EMULATION_RESIDENT_BLOCKS="1")
    assert done.returncode == 0, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The kernels with something planted in them


class Planted(NamedTuple):
    file: str  # of csrc
    before: str
    after: str


@pytest.fixture(scope="module")
def build_with(tmp_path_factory) -> Callable[..., Path]:
    """Builds the emulated operators with other words in their sources; only what changes from one to the next."""
    root = tmp_path_factory.mktemp("planted")
    shutil.copytree(TESTS.parent / "csrc", root / "csrc")
    original: dict[Path, str] = {}

    def build(*planted: Planted, variant: str = "") -> Path:
        for file, text in original.items():
            file.write_text(text)
        original.clear()
        for file, before, after in planted:
            path = root / "csrc" / file
            text = path.read_text()
            original.setdefault(path, text)
            assert text.count(before) == 1, f"{file} has {text.count(before)} of {before!r}"
            path.write_text(text.replace(before, after))
        try:
            return libraries.build("ops", variant, root)
        except libraries.Unavailable as reason:
            pytest.skip(f"the emulated CUDA kernels are left out: {reason}")

    return build


EXCHANGE = "cuda/persistent_exchange.cuh"
WRONG, RACE, BEYOND = "AssertionError", "ThreadSanitizer: data race", "AddressSanitizer: heap-buffer-overflow"
STUCK, SHARED = "no progress: every running thread polls memory", "bytes of dynamic shared memory, the launch gave"
FAULTS = {  # by file: what is replaced, by what, what finds it, in which tests
    EXCHANGE: {
        "no barrier of the cluster": ("return tiling.blocks > 1;", "return false;", WRONG, "grade2"),
        "the same, as a race": ("return tiling.blocks > 1;", "return false;", RACE, "grade2"),
        "one buffer in shared memory": ("(round % 2 * tiling.b", "(round % 1 * tiling.b", RACE, "grade2"),
        "one buffer in global memory": ("place.team * 2 + round % 2", "place.team * 2 + round % 1", WRONG, "grade3"),
        "steps that look alike": ("1 + round / 2 % 2", "1 + round / 2 % 1", WRONG, "grade3"),
        "a plain store": (
            "st_relaxed_gpu(buffer(round, tile) + packet_place(tiling, packet, column), values)",
            "buffer(round, tile)[packet_place(tiling, packet, column)] = values",
            *(RACE, "grade3"),
        ),
        "warps that do not wait": (
            "named_barrier_sync(1 + place.warp_k, tiling.warps_m * 32)",
            "__syncwarp()",
            RACE,
            "H128 or H24-",
        ),
        "a window over the last one": ("if (window > 0) meet();", "", RACE, "grade3 and streamed"),
        "lanes that do not wait": ("  __syncwarp();", "  ;", RACE, "grade3"),
        "a row that nobody publishes": ("/ 4 < rows; }", "/ 4 <= rows; }", STUCK, "grade3"),
    },
    "cuda/persistent.cuh": {
        "no barrier before the sum": ("      __syncthreads();\n      pass.finish", "      pass.finish", RACE, "grade1"),
        "sums in one place": ("batch_tiles() + tile) % 2", "batch_tiles() + tile) % 1", RACE, "grade3"),
        "a copy that nobody waits for": ("wait<Tiling::kStages - 1>()", "wait<Tiling::kStages>()", WRONG, "streamed"),
        "a copy of another group": ("group -= my_streamed", "group = on_chip", WRONG, "streamed"),
        "another block's stream": ("(blockIdx.x * tiling.warps_k +", "(0 * tiling.warps_k +", WRONG, "streamed"),
        "a row beyond the batch": ("row < B;", "row <= B;", BEYOND, "grade1"),
        "a unit beyond the layer": ("unit < H &&", "unit <= H &&", BEYOND, "grade2"),
        "rows beyond a packed step": ("row_begin[t + 1] - begin : steps.B", "B : steps.B", BEYOND, "packed"),
        "another layer's arrays": ("p.layers[place.layer]", "p.layers[0]", WRONG, "both"),
        "another block's units": ("return place.rank * tiling", "return 0 * tiling", WRONG, "grade2"),
    },
    "cuda/persistent_products.cuh": {
        "a weight for the step": ("slot < tiling.units", "slot <= tiling.units", WRONG, "grade3"),
        "a swapped fragment": ("mma_bf16(sum.c, a1, b1);", "mma_bf16(sum.c, a1, b0);", WRONG, "bfloat16"),
        "a sign of a sum": ("mine + __shfl_xor_sync(~0u, other, 2)", "mine - other", WRONG, "float32"),
    },
    "cuda/persistent_forward.cuh": {
        "another layer's steps": (
            "{ return own.T; }",
            "{ return p.layers[tiling.layers - 1].T; }",
            *(WRONG, "both_lengths"),
        ),
        "no initial state": ("return row < p.steps.B ? load", "return row < 0 ? load", WRONG, "grade1"),
    },
    "cuda/persistent_backward.cuh": {
        "rows of W": ("+ slot) * p.H + unit]", "+ slot) + unit * p.H]", WRONG, "grade1"),
        "no product for h0": ("{ return own.T + 1; }", "{ return own.T; }", WRONG, "grade1"),
        "a step of a row without one": ("s >= 0 && mine.row < rows.count) step", "s >= 0) step", WRONG, "packed"),
    },
    "cuda_plan.h": {
        "too little shared memory": (" + int64_t{biases()} * 4;", ";", SHARED, "grade1"),
        "too much shared memory": ("int64_t{sums()} * 2 * 4", "int64_t{sums()} * 3 * 4", SHARED, "grade1"),
    },
}
VARIANTS = {RACE: "thread", BEYOND: "address"}
# Changes that other tests need.
MEASURED = Planted("cuda_plan.h", "bool measured = false;", "bool measured = true;")
FEW_POLLS = Planted(EXCHANGE, "kMostPolls = 1u << 23", "kMostPolls = 64")
TOO_MANY_THREADS = Planted("cuda/persistent.cuh", "p.tiling.blocks)), dim3(kThreads)", "p.tiling.blocks)), dim3(2048)")
SILENT = Planted(EXCHANGE, "if (slot == 0) st_relaxed_gpu(", "if (slot == 0 && place.rank != 1) st_relaxed_gpu(")


def test_what_is_planted_has_one_place():
    faults = [Planted(file, *fault[:2]) for file, named in FAULTS.items() for fault in named.values()]
    for file, before, _ in [*faults, MEASURED, FEW_POLLS, SILENT, TOO_MANY_THREADS]:
        assert (TESTS.parent / "csrc" / file).read_text().count(before) == 1, (file, before)


@extended
@pytest.mark.parametrize(("file", "name"), [(file, name) for file, faults in FAULTS.items() for name in faults])
def test_faults_are_found(file, name, build_with):
    before, after, report, selection = FAULTS[file][name]
    variant = VARIANTS.get(report, "")
    environment = {"FASTRNN_EMULATION_SCHEDULE": "random", "FASTRNN_EMULATION_SEED": "1"}
    if report == RACE:
        environment["TSAN_OPTIONS"] = libraries.environment(variant)["TSAN_OPTIONS"] + " halt_on_error=1"
    library = build_with(Planted(file, before, after), variant=variant)
    selection = f"(test_parity or test_shapes or test_both) and ({selection})"
    done = run(library, "persistent.py", selection, variant, **environment)
    assert done.returncode not in (0, 5), done.stdout  # 5: no test was selected
    assert report in done.stdout + done.stderr


@extended
def test_a_planned_launch_that_the_device_refuses(build_with):
    """Until a device class is measured no plan picks these kernels; what happens when it does must hold already."""
    library = build_with(MEASURED)
    done = run(library, "hindered.py", "refused_and_planned", FASTRNN_EMULATION_RESIDENT_BLOCKS="1")
    assert done.returncode == 0, done.stdout + done.stderr


@extended
def test_a_planned_launch_that_is_wrong(build_with):
    library = build_with(MEASURED, TOO_MANY_THREADS)
    done = run(library, "hindered.py", "mistaken")
    assert done.returncode == 0, done.stdout + done.stderr


@extended
def test_blocks_that_wait_in_vain(build_with):
    library = build_with(FEW_POLLS, SILENT)
    done = run(library, "hindered.py", "waiting_in_vain")
    assert done.returncode == 0, done.stdout + done.stderr
