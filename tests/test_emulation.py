# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels, run on the CPU: their operators, every wrapper of device.cuh, and faults that must be found.

The kernels' own sources are compiled with the emulation of tests/emulation, where a CUDA thread is a fiber, and a seed
and a schedule decide who runs when. See CONTRIBUTING.md, "CUDA kernels without a GPU".
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests/emulation"
sys.path.insert(0, str(FOLDER))

import kernels  # noqa: E402
import libraries  # noqa: E402
from probes import PROBES  # noqa: E402

extended = pytest.mark.extended
SCHEDULES = ("round_robin", "random", "priority")
SEEDS = (0, 1, 2)
WAYS = [f"{way}/kNone" for way in ("kGridFences", "kClusterBarrier")]


@pytest.fixture(scope="session", autouse=True)
def toolchain():
    try:
        libraries.compiler(), libraries.cuda_headers()
    except libraries.Unavailable as reason:
        pytest.skip(f"the emulated CUDA kernels are left out: {reason}")


@pytest.fixture(scope="session")
def emulated(toolchain) -> kernels.Emulated:
    return kernels.Emulated()


def start(*command: str | Path, variant: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on a command, in an environment of its own: sanitizers must be there from the start."""
    environment = os.environ | libraries.environment(variant) | environment
    return subprocess.run([sys.executable, *command], env=environment, text=True, capture_output=True)


def run_operators(
    library: Path, variant: str, schedule: str, seed: int, selection: str
) -> subprocess.CompletedProcess[str]:
    options = "-q -s -x -p no:cacheprovider -p no:xdist".split()  # -s: a sanitizer's last words must come through
    return start(
        *("-m", "pytest", *options, FOLDER / "ops.py", "-k", f"not cuda and ({selection or 'test'})"),
        variant=variant,
        FASTRNN_LIBRARY=str(library),
        FASTRNN_EMULATION_SCHEDULE=schedule,
        FASTRNN_EMULATION_SEED=str(seed),
    )


# ----------------------------------------------------------------------------------------------------------------------
# The operators


@pytest.mark.parametrize(
    ("variant", "selection"),
    [
        ("", ""),
        pytest.param("address", "forward and not packed", marks=extended),
        pytest.param("thread", "forward and (gru or peephole) and lengths", marks=extended),
    ],
)
def test_controls(variant, selection):
    """The tests of lengths, resets, masks and the cells that torch.nn lacks, with the emulated kernels."""
    library = libraries.build("ops", variant)
    tests = (ROOT / "tests/test_controls.py", "-k", selection or "test")
    options = "-q -s -x -p no:cacheprovider -p no:xdist".split()
    done = start("-m", "pytest", *options, *tests, variant=variant, FASTRNN_LIBRARY=str(library))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("schedule", "seed", "variant", "selection"),
    [
        ("priority", 1, "", ""),
        ("random", 2, "address", "T5-B3 or T4-B5"),
        pytest.param("random", 3, "", "", marks=extended),
        pytest.param("round_robin", 4, "", "", marks=extended),
        pytest.param("priority", 5, "address", "", marks=extended),
        pytest.param("priority", 6, "thread", "T5-B3 or T4-B5", marks=extended),
    ],
)
def test_operators(schedule, seed, variant, selection):
    """The operators' parity tests, with the emulated CUDA kernels in place of the CPU's."""
    done = run_operators(libraries.build("ops", variant), variant, schedule, seed, selection)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sanitizer" not in done.stderr


@extended
def test_more_rows_than_a_grid_has(emulated):
    """The grid's second dimension ends at 65535: beyond it a block takes several groups of rows."""
    program = """if True:
        import torch
        from fastrnn import ops
        rows = 65535 * 128 + 5
        x_gates, zero = torch.randn(1, rows, 1), torch.zeros(rows, 1)
        output, _ = ops.rnn_layer(x_gates, None, torch.ones(1, 1), None, None, zero, nonlinearity="relu")
        torch.testing.assert_close(output, x_gates.relu(), rtol=0, atol=0)
    """
    done = start("-c", program, FASTRNN_LIBRARY=str(libraries.build("ops")))
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The wrappers


def wrappers() -> list[str]:
    """What device.cuh declares for kernels."""
    device = (ROOT / "csrc/cuda/device.cuh").read_text().split("#ifdef FASTRNN_EMULATE")[1]
    declared = [line.split("(")[0].split()[-1].lstrip("*") for line in device.splitlines() if "__device__" in line]
    names = {name for name in declared if name not in ("__forceinline__", "shared_address")}
    assert len(names) > 12
    return sorted(names)


def test_every_wrapper_has_a_probe(emulated):
    assert set(emulated.probes) == set(PROBES)
    source = (FOLDER / "probes.cu").read_text() + (FOLDER / "demonstration.cu").read_text()
    assert [name for name in wrappers() if f"{name}(" not in source and f"{name}<" not in source] == []


def test_every_wrapper_serves_a_kernel():
    kernels = {*(ROOT / "csrc/cuda").iterdir()} - {ROOT / "csrc/cuda/device.cuh"}
    source = "".join(file.read_text() for file in kernels)
    assert [name for name in wrappers() if f"{name}(" not in source and f"{name}<" not in source] == []


def test_only_device_cuh_goes_below_cuda():
    """What the emulation has no twin of, it would not check."""
    for source in {*(ROOT / "csrc/cuda").iterdir(), *FOLDER.glob("*.cu")} - {ROOT / "csrc/cuda/device.cuh"}:
        assert not re.search(r"\basm\b|<<<|__shared__|cooperative_groups|#include <cuda/", source.read_text()), source


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", [*PROBES, *WAYS])
def test_kernels_on_the_emulation(emulated, name, schedule):
    for seed in SEEDS:
        emulated.configure(seed, schedule)
        emulated.run(name, seed)


@pytest.mark.parametrize("variant", ["address", "thread", pytest.param("ucontext", marks=extended)])
def test_kernels_of_a_variant(variant):
    """No report on kernels that are right; and no difference where threads are switched as on other processors."""
    done = start(FOLDER / "kernels.py", "--variant", variant, "--seeds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sanitizer" not in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Faults that must be found


WRONG = "wrong results"
FAULTS = {  # what the emulation says in one of nine runs; None: nothing, it takes a sanitizer
    "kGridFences/kNoCopyWait": WRONG,
    "kGridFences/kNoBarrierAfterCopy": WRONG,
    "kGridFences/kNoBarrierBeforeSum": WRONG,
    "kGridFences/kNoBarrierBetweenSteps": WRONG,
    "kGridFences/kNoFence": None,
    "kGridFences/kSingleBuffer": WRONG,
    "kGridFences/kSwappedFragment": WRONG,
    "kGridFences/kOverrun": "writes past the end of the array",
    "kGridFences/kDivergentBarrier": "threads of one block meet in different barriers",
    "kGridFences/kMissingLane": "deadlock",
    "kGridFences/kTooLittleShared": "the launch gave",
    "kClusterBarrier/kNoBarrierBetweenSteps": WRONG,
    "kClusterBarrier/kSingleBuffer": WRONG,
    "kClusterBarrier/kEarlyExit": "block that has exited",
}
RACES = [
    "kGridFences/kNoFence",
    "kClusterBarrier/kNoBarrierBetweenSteps",
    *(
        pytest.param(name, marks=extended)
        for name in (
            "kGridFences/kNoCopyWait",
            "kGridFences/kNoBarrierAfterCopy",
            "kGridFences/kNoBarrierBeforeSum",
            "kGridFences/kNoBarrierBetweenSteps",
            "kGridFences/kSingleBuffer",
            "kClusterBarrier/kSingleBuffer",
        )
    ),
]


def test_every_fault_has_a_detector(emulated):
    assert set(FAULTS) | set(WAYS) == set(emulated.layers) - {"kGridFences/kNotCooperative"}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found_by_running(emulated, name):
    found = []
    for seed in SEEDS:
        for schedule in SCHEDULES:
            emulated.configure(seed, schedule)
            try:
                emulated.run(name)
            except AssertionError:
                found.append(WRONG)
            except RuntimeError as error:
                found.append(str(error))
    if FAULTS[name] is None:
        assert not found, "this fault shows without a sanitizer after all: say so in the table"
    else:
        assert any(FAULTS[name] in what for what in found), found


@pytest.mark.parametrize("name", RACES)
def test_races_are_found_by_thread_sanitizer(name):
    done = start(FOLDER / "kernels.py", name, "--variant", "thread", "--seeds", "1")
    assert done.returncode == 66, done.stdout + done.stderr
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert "demonstration.cu" in done.stderr


def test_overruns_are_found_by_address_sanitizer():
    done = start(FOLDER / "kernels.py", "kGridFences/kOverrun", "--variant", "address", "--seeds", "1")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "demonstration.cu" in done.stderr


MUTANTS = {  # of gates_cuda.cu: what is replaced, by what, and what a variant of the emulation says
    "bound": (
        "if (unit >= p.H) return;",
        "if (unit > p.H) return;",
        "address",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "alignment": ("p.H % N == 0", "true", "address", "misaligned address"),
    "overlap": ("int64_t{blockIdx.y} * blockDim.y", "int64_t{blockIdx.y}", "thread", "ThreadSanitizer: data race"),
    "row": ("row * C::kGates * p.H + unit", "row * C::kSaved * p.H + unit", "", "AssertionError"),
    "carry": ("store(p.d_h + state, values);", "", "", "AssertionError"),
}


@extended
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_gate_kernels_are_found(name, tmp_path):
    before, after, variant, report = MUTANTS[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/cuda/gates_cuda.cu"
    assert before in source.read_text()
    source.write_text(source.read_text().replace(before, after))
    done = run_operators(libraries.build("ops", variant, tmp_path), variant, "random", 1, "T5-B3 or T2-B130")
    assert done.returncode != 0
    assert report in done.stdout + done.stderr


def test_launches_that_a_device_refuses(emulated):
    """What fits on one device does not fit on another; blocks that wait for each other must all be resident."""

    def error(name, **settings):
        emulated.configure(0, "random", **settings)
        with pytest.raises(RuntimeError) as caught:
            emulated.run(name)
        return str(caught.value)

    assert "cooperative launch of 4 blocks, 3 fit" in error("kGridFences/kNone", resident_blocks=3)
    assert "no progress" in error("kGridFences/kNotCooperative", resident_blocks=3)
    assert "cluster of 4 blocks, the device allows 1" in error("kClusterBarrier/kNone", device="a100")
