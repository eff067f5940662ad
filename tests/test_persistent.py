# SPDX-License-Identifier: BSD-3-Clause
"""The persistent CUDA kernels: their plan, and they themselves on the emulation (tests/emulation/persistent.py)."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastrnn import _C, _library

TESTS = Path(__file__).parent
FOLDER = TESTS / "emulation"
sys.path += [str(FOLDER), str(TESTS / "cuda")]

import libraries  # noqa: E402
import machine_code  # noqa: E402

extended = pytest.mark.extended
DEVICES = {  # capability, multiprocessors, bytes of shared memory per block
    "h100": (90, 132, 232448),
    "a100": (80, 108, 166912),
    "l4": (89, 58, 101376),
    "h100_mig_1g": (90, 16, 232448),
}
CELLS = {"rnn": (1, 1), "gru": (3, 1), "lstm": (4, 2)}  # gates, states


def plan(device: str = "h100", cell: str = "lstm", **problem) -> "_C.CudaPlan":
    capability, multiprocessors, shared = DEVICES[device]
    gates, states = CELLS[cell]
    problem = {"T": 100, "B": 16, "H": 256, "arithmetic": "fp16", "path": "persistent"} | problem
    return _C.plan_cuda(
        gates=gates,
        states=states,
        capability=capability,
        multiprocessors=multiprocessors,
        shared_per_block=shared,
        **problem,
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


def test_larger_layers_take_larger_teams():
    grades = [plan(H=H).grade for H in (16, 64, 65, 512, 768, 1536)]
    assert grades == [1, 1, 2, 2, 3, 3]
    assert [plan("a100", H=H).grade for H in (64, 65, 1024)] == [1, 3, 3]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("arithmetic", ["fp16", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("device", DEVICES)
def test_plans_are_sound(device, cell, arithmetic, backward):
    """Every row and unit has its block, all fit, and blocks that wait for each other run at once."""
    served = 0
    for B, H in itertools.product((1, 3, 8, 9, 17, 64, 128, 1000), (1, 7, 8, 64, 100, 200, 256, 512, 768, 1024, 2048)):
        planned = plan(device, cell, B=B, H=H, arithmetic=arithmetic, backward=backward)
        if planned.path == "gates":
            continue
        served += 1
        _, multiprocessors, shared = DEVICES[device]
        assert planned.shared_bytes <= shared
        assert planned.blocks * planned.units_per_block >= H
        assert (planned.teams - 1) * planned.rows_per_team < B <= planned.teams * planned.rows_per_team
        if planned.grade == 1:
            assert planned.blocks == 1
        if planned.grade == 2:
            assert planned.blocks in (2, 4, 8, 16)
            assert planned.teams * planned.blocks <= multiprocessors or planned.teams == 1
        if planned.grade == 3:
            assert planned.teams * planned.blocks <= multiprocessors
            assert (planned.blocks - 1) * planned.units_per_block < H
    assert served > 20


# ----------------------------------------------------------------------------------------------------------------------
# The kernels


@pytest.mark.parametrize("device", machine_code.DEVICES)
def test_planned_blocks_are_resident(device):
    """A multiprocessor holds a block with all shared memory: else a cooperative launch would be refused."""
    if _C.cuda_archs is None:
        pytest.skip("machine code is not checked: fastrnn was built without CUDA")
    facts = machine_code.DEVICES[device]
    try:
        kernels = [
            kernel
            for kernel in machine_code.kernels(_library.path())
            if kernel.arch == facts.arch and "persistent_kernel" in kernel.name
        ]
    except machine_code.Unavailable as reason:
        pytest.skip(f"machine code is not checked: {reason}")
    if not kernels:
        pytest.skip("fastrnn was built without the persistent kernels: FASTRNN_PERSISTENT=1")
    assert len(kernels) == 4 * 4 * 2 * 2  # cells, arithmetics, exchanges, passes
    for kernel in kernels:
        blocks = machine_code.blocks_per_multiprocessor(
            *(libraries.compiler(), libraries.cuda_headers(), facts, kernel),
            threads=256,
            dynamic_shared=facts.shared_per_block - kernel.shared,
        )
        assert blocks == 1, kernel


@pytest.mark.parametrize(
    ("schedule", "seed", "variant", "selection"),
    [
        ("priority", 1, "", ""),
        pytest.param("random", 2, "address", "test_shapes and (T5 or T3)", marks=extended),
        pytest.param("priority", 3, "thread", "test_parity and lstm and bfloat16", marks=extended),
        *(pytest.param("random", seed, "", "", marks=extended) for seed in (4, 5, 6)),
        *(pytest.param("priority", seed, "", "", marks=extended) for seed in (7, 8, 9)),
        pytest.param("round_robin", 10, "address", "", marks=extended),
        pytest.param("random", 11, "thread", "not H300", marks=extended),
    ],
)
def test_kernels_on_the_emulation(schedule, seed, variant, selection):
    try:
        environment = libraries.environment(variant)
        library = libraries.build("ops", variant)
    except libraries.Unavailable as reason:
        pytest.skip(f"the emulated CUDA kernels are left out: {reason}")
    environment |= {
        "FASTRNN_LIBRARY": str(library),
        "FASTRNN_EMULATION_SCHEDULE": schedule,
        "FASTRNN_EMULATION_SEED": str(seed),
    }
    options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", FOLDER / "persistent.py", "-k", selection)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], env=os.environ | environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sanitizer" not in done.stderr
