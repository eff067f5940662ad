# SPDX-License-Identifier: BSD-3-Clause
"""Compiles and runs the native tests. A C++ compiler is a requirement of the project: without one these tests fail."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
CPU_FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []

OPTIMIZE = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # as in setup.py
FLAGS = ["-std=c++17", *OPTIMIZE, "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
# The compiler may fuse a product and a sum where the instruction set can: the error bounds hold either way.
INSTRUCTION_SETS = {"portable": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx2", "-mfma"]}
NEEDED_CPU_FLAGS = {"portable": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "fma"}}

CLANG = next(filter(shutil.which, ["clang++", *(f"clang++-{version}" for version in range(40, 13, -1))]), None)
needs_clang = pytest.mark.skipif(CLANG is None, reason="no clang++ of version 14 or later")
SOURCES = [ROOT / "csrc/ops.cpp", *sorted(ROOT.glob("csrc/cpu/*_cpu.cpp"))]


@needs_clang
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_clang_takes_the_sources_without_a_word(source):
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    folders = ["-I", ROOT / "csrc", *(word for path in cpp_extension.include_paths() for word in ("-isystem", path))]
    subprocess.run([CLANG, *flags, *folders, "-fsyntax-only", source], check=True)


@needs_clang
def test_sources_that_clang_compiled_share_the_headers(tmp_path):
    sources = [tmp_path / name for name in ("one.cpp", "another.cpp")]
    for source in sources:
        source.write_text('#include "kernels.h"\n')
    flags = ["-std=c++17", "-shared", "-fPIC", "-I", ROOT / "csrc"]
    subprocess.run([CLANG, *flags, *sources, "-o", tmp_path / "both.so"], check=True)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_cells(isa, tmp_path):
    missing = NEEDED_CPU_FLAGS[isa] - set(CPU_FLAGS)
    if missing:
        pytest.skip(f"this CPU lacks {sorted(missing)}")
    compile_and_run("cells_test", tmp_path, *INSTRUCTION_SETS[isa])


@pytest.mark.parametrize("name", ["scratch_test", "shares_test"])
def test_what_is_the_same_everywhere(name, tmp_path):
    compile_and_run(name, tmp_path)


@pytest.mark.parametrize("sanitizer", ["none", "thread"])
def test_team(sanitizer, tmp_path):
    compile_and_run("team_test", tmp_path, "-pthread", *([] if sanitizer == "none" else ["-fsanitize=thread"]))


# A cross compiler shows what aarch64 makes of the sources, an emulator of its processor what they do there (but for the
# order in which threads see each other's writes).
AARCH64 = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
needs_aarch64 = pytest.mark.skipif(not shutil.which(AARCH64), reason=f"needs {AARCH64}")


@needs_aarch64
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cpu").glob("*_cpu.cpp")), ids=lambda source: source.stem)
def test_aarch64_compiles(source):
    subprocess.run([AARCH64, *FLAGS, "-fsyntax-only", "-I", ROOT / "csrc", source], check=True)


@needs_aarch64
@pytest.mark.skipif(not EMULATOR, reason="needs qemu-aarch64")
@pytest.mark.parametrize("name", [pytest.param("cells_test", marks=pytest.mark.extended), "scratch_test", "team_test"])
def test_aarch64_runs(name, tmp_path):
    compile_and_run(name, tmp_path, "-pthread", "-static", compiler=[AARCH64], runner=[EMULATOR])


def compile_and_run(name, tmp_path, *more_flags, compiler=None, runner=()):
    program = tmp_path / name
    compiler = compiler or os.environ.get("CXX", "g++").split()
    source = ROOT / "tests/native" / f"{name}.cpp"
    subprocess.run([*compiler, *FLAGS, *more_flags, "-I", ROOT / "csrc", source, "-o", program], check=True)
    result = subprocess.run([*runner, program], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
