# SPDX-License-Identifier: BSD-3-Clause
"""The compiled parts: what they export and need, what they tell, and what is said when one does not load."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import _C

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fastrnn.__file__).parent
LIBRARY = PACKAGE / ("_ops.dylib" if sys.platform == "darwin" else "_ops.so")
Completed = subprocess.CompletedProcess[str]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file with binutils")


def run_python(*arguments: str, packages: Path = PACKAGE.parent, **environment: str) -> Completed:
    """Runs Python with the fastrnn that lies in `packages`; only `environment` sets FASTRNN_ variables."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTRNN_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=packages,
        env={**inherited, "PYTHONPATH": str(packages), **environment},
        capture_output=True,
        text=True,
    )


def binutils(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@linux_only
def test_library_needs_only_torchs_stable_abi() -> None:
    needed = [line.split(maxsplit=1)[1] for line in binutils("nm", "-DC", "--undefined-only", LIBRARY).splitlines()]
    assert any(name.startswith("aoti_torch_") for name in needed)
    unstable = re.compile(r"\b(at|c10|caffe2|torch)::|^_?Py")
    assert [name for name in needed if unstable.search(name)] == []


@linux_only
def test_library_loads_without_cuda_and_without_python() -> None:
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", binutils("readelf", "-dW", LIBRARY)))
    system = {"libc", "libm", "libstdc++", "libgcc_s", "libdl", "librt", "libpthread"}
    assert {name for name in needed if not name.startswith("ld-linux")} - system == {"libtorch", "libtorch_cpu"}


def test_facts_agree_with_the_package() -> None:
    assert _C.version == fastrnn.__version__
    assert _C.build_type in ("release", "debug")
    assert (_C.cuda_version is None) == (_C.cuda_archs is None)


def test_isa_can_be_lowered_and_not_raised() -> None:
    order = ["portable", "avx2", "avx512", "avx512_bf16"]
    chosen = {
        wanted: run_python("-c", "from fastrnn import _C; print(_C.isa())", FASTRNN_ISA=wanted).stdout.strip()
        for wanted in ["", *order]
    }
    best = chosen.pop("")
    assert chosen == {wanted: min(wanted, best, key=order.index) for wanted in order}


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1), (100, 1, 512, 512, 512), (100, 1, 64, 512, 128), (20, 64, 96, 256, 256), (100, 16, 40, 40, 40)],
)
def test_plan_uses_no_more_threads_than_allowed_and_needed(sizes: tuple[int, ...], threads: int) -> None:
    T, B, I, H, P = sizes
    plan = _C.plan_cpu(T=T, B=B, I=I, H=H, P=P, gates=4, threads=threads)
    assert 1 <= plan.threads <= threads
    assert plan.threads <= (B if plan.split == "rows" else (H + 15) // 16)  # whole vectors of units
    assert plan.reason


@pytest.mark.parametrize("B, H, threads", [(1, 160, 1), (1, 256, 2), (16, 64, 1), (32, 64, 2)])
def test_plan_counts_the_first_reading_of_a_weight(B: int, H: int, threads: int) -> None:
    assert _C.plan_cpu(T=1, B=B, I=H, H=H, P=H, gates=4, threads=2).threads == threads


@pytest.mark.parametrize(
    "T, B, H, widens, packed", [(1, 1, 64, False, ""), (3, 5, 64, False, ""), (16, 1, 64, False, "ih"),
                                (16, 2, 64, False, "ih hh"), (64, 1, 64, False, "ih hh"), (63, 1, 512, False, "ih"),
                                (64, 1, 1024, False, "ih hh"), (100, 1, 1536, False, "ih"), (64, 1, 64, True, "ih hh"),
                                (128, 1, 256, True, "ih"), (16, 2, 256, True, "ih hh"), (3, 5, 256, True, ""),
                                (4, 2, 512, False, ""), (4, 2, 513, False, "ih hh")]
)  # fmt: skip
def test_plan_packs_what_serves_many_rows(T: int, B: int, H: int, widens: bool, packed: str) -> None:
    plan = _C.plan_cpu(T=T, B=B, I=H, H=H, P=H, gates=4, threads=2, widens=widens)
    assert {"ih": plan.pack_input, "hh": plan.pack_recurrent} == {name: name in packed for name in ("ih", "hh")}


@pytest.mark.parametrize(
    "T, B, H, widens, packed", [(1, 1, 64, False, "ih hh"), (2, 1, 64, False, "ih hh"), (1, 2, 64, False, "ih hh"),
                                (1, 1, 191, True, "ih hh"), (1, 1, 192, True, ""), (2, 1, 192, True, "ih"),
                                (1, 2, 192, True, "ih hh"), (1, 1, 1280, False, ""), (2, 1, 1280, False, "ih"),
                                (1, 2, 1280, False, "ih hh"), (100, 1, 1024, False, "ih hh")]
)  # fmt: skip
def test_plan_reads_weights_packed_before_where_that_is_faster(
    T: int, B: int, H: int, widens: bool, packed: str
) -> None:
    plan = _C.plan_cpu(T=T, B=B, I=H, H=H, P=H, gates=4, threads=2, widens=widens, packed=True)
    assert {"ih": plan.pack_input, "hh": plan.pack_recurrent} == {name: name in packed for name in ("ih", "hh")}


@pytest.mark.parametrize(
    "T, B, H, widens, packs", [(1, 1, 64, False, False), (100, 1, 256, False, False), (24, 1, 512, False, True),
                               (23, 1, 512, False, False), (100, 1, 512, True, False), (3, 2, 1024, False, False),
                               (4, 1, 1024, False, True), (4, 1, 1024, True, False), (4, 1, 2048, True, True),
                               (8, 2, 64, False, True)]
)  # fmt: skip
def test_plan_of_backward(T: int, B: int, H: int, widens: bool, packs: bool) -> None:
    plan = _C.plan_cpu(T=T, B=B, I=0, H=H, P=H, gates=4, threads=2, widens=widens, backward=True)
    assert plan.pack_recurrent == packs


def test_plan_splits_units_where_packing_outweighs_barriers() -> None:
    few_rows, many = {"T": 100, "B": 2}, {"T": 100, "B": 32}
    short = {"T": 20, "B": 32}
    sizes = {"I": 256, "H": 256, "P": 256, "gates": 4, "threads": 2}
    assert _C.plan_cpu(**sizes, **few_rows).split == "units"
    assert _C.plan_cpu(**sizes, **short).split == "units"
    assert _C.plan_cpu(**sizes, **short, backward=True).split == "rows"
    assert _C.plan_cpu(**sizes, **many).split == "rows"
    assert _C.plan_cpu(**sizes | {"threads": 3}, **short).split == "rows"  # too few panels for every thread
    assert _C.plan_cpu(**sizes | {"P": 64}, **short).split == "rows"


def test_plan_splits_units_where_threads_would_read_large_weights_from_one_cache() -> None:
    lstm = {"T": 100, "I": 512, "H": 512, "P": 512, "gates": 4, "threads": 16}
    assert _C.plan_cpu(**lstm, B=64).split == "units"
    assert _C.plan_cpu(**lstm, B=64, backward=True).split == "units"
    assert _C.plan_cpu(**lstm, B=256).split == "rows"
    assert _C.plan_cpu(**lstm | {"H": 256, "P": 256}, B=64).split == "rows"  # a thread's own cache holds them
    assert _C.plan_cpu(**lstm | {"H": 600, "P": 600}, B=64).split == "rows"  # some threads would have three vectors
    assert _C.plan_cpu(**lstm | {"P": 64}, B=64).split == "rows"
    few = lstm | {"threads": 2}
    assert _C.plan_cpu(**few, B=16).split == "units"
    assert _C.plan_cpu(**few, B=32).split == "rows"  # one cache serves so many
    assert _C.plan_cpu(**few | {"H": 256, "P": 256}, B=8).split == "rows"
    assert _C.plan_cpu(**few | {"H": 520, "P": 520}, B=16).split == "units"
    assert _C.plan_cpu(**few | {"P": 64}, B=16).split == "rows"


def test_plan_runs_both_directions_at_once_where_threads_wait_or_idle() -> None:
    lstm = {"T": 100, "B": 1, "I": 128, "H": 128, "P": 128, "gates": 4, "threads": 2}
    alone, both = _C.plan_cpu(**lstm), _C.plan_cpu(**lstm, layers=2)
    assert (alone.threads, alone.side_by_side) == (2, False)
    assert (both.threads, both.side_by_side) == (1, True)
    assert not _C.plan_cpu(**lstm | {"threads": 1}, layers=2).side_by_side
    assert not _C.plan_cpu(**lstm | {"threads": 3}, layers=2).side_by_side  # one would be left over
    assert not _C.plan_cpu(**lstm | {"B": 32}, layers=2).side_by_side  # enough rows for all threads
    assert not _C.plan_cpu(**lstm | {"H": 1024, "P": 1024}, layers=2).side_by_side  # too much for a thread's cache
    assert _C.plan_cpu(**lstm | {"P": 64, "threads": 3}, layers=2).side_by_side  # a projection of one row: one thread


def test_import_is_silent() -> None:
    result = run_python("-W", "error", "-c", "import fastrnn")
    assert (result.returncode, result.stderr) == (0, "")


def test_main_prints_the_facts() -> None:
    result = run_python("-m", "fastrnn")
    assert result.returncode == 0, result.stderr
    for fact in (fastrnn.__version__, torch.__version__, _C.isa(), str(LIBRARY)):
        assert fact in result.stdout


@pytest.mark.parametrize(
    "part, content",
    [("_ops.*", None), ("_ops.*", b"\x7fELF of another machine"), ("_C.*.so", b"\x7fELF of another Python")],
)
@pytest.mark.parametrize("arguments", [("-c", "import fastrnn"), ("-m", "fastrnn")], ids=["import", "main"])
def test_a_part_that_does_not_load_says_what_to_do(
    part: str, content: bytes | None, arguments: tuple[str, str], tmp_path: Path
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "fastrnn")
    (file,) = (tmp_path / "fastrnn").glob(part)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    result = run_python(*arguments, packages=tmp_path)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert str(tmp_path) in lines[-1] or part == "_C.*.so"
    assert "`pip install --no-build-isolation .`" in lines[-1]
    if arguments[0] == "-m":
        assert len(lines) == 1
    (tmp_path / "setup.py").touch()
    assert f"{tmp_path} is the source tree: `make build`" in run_python(*arguments, packages=tmp_path).stderr


def test_an_old_torch_says_what_to_do() -> None:
    result = run_python("-c", "import torch; torch.__version__ = type(torch.__version__)('2.9.1'); import fastrnn")
    message = "ImportError: fastrnn: torch 2.10 or later is needed, found 2.9.1; upgrade torch"
    assert result.stderr.splitlines()[-1] == message


def test_another_library_can_be_named(tmp_path: Path) -> None:
    named = tmp_path / "named.so"
    result = run_python("-c", "import fastrnn", FASTRNN_LIBRARY=str(named))
    assert f"the compiled library {named} is missing" in result.stderr
    shutil.copy(LIBRARY, named)
    result = run_python("-m", "fastrnn", FASTRNN_LIBRARY=str(named))
    assert str(named) in result.stdout, result.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_runs_the_device_suite_with_all_kernels(tmp_path: Path) -> None:
    """And asks for no package that a machine with torch and a CUDA toolkit, but without a network, may lack."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$FASTRNN_CUDA $FASTRNN_PERSISTENT $*"\n')
    python.chmod(0o755)
    command = ["make", "--no-print-directory", "-s", "-C", ROOT, "test-gpu", f"VENV={tmp_path}"]
    unset = ("FASTRNN_CUDA", "FASTRNN_PERSISTENT", "MAKEFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *_, build, install, suite = done.stdout.splitlines()
    assert build == "1 1 setup.py -q build_ext --inplace"
    assert install.startswith("1 1 -m pip install") and install.endswith(".[test-gpu]")
    assert suite.strip() == "1 1 tests/cuda/run.py"


def test_the_device_suite_starts_in_a_tree_that_is_not_installed(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, ROOT / "tests/cuda/run.py", "nonsense"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "no group nonsense" in done.stderr
