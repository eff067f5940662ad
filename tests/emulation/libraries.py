# SPDX-License-Identifier: BSD-3-Clause
"""Builds the CUDA kernels for the CPU: test-only libraries in which every CUDA thread is emulated.

    ops      the operators of fastrnn, their CUDA kernels emulated under the CPU key: run anything on it with
             FASTRNN_LIBRARY=$(python tests/emulation/libraries.py ops) python ...
    kernels  the probes and demonstration kernels of this folder, for ctypes

Needs a C++17 compiler for Linux and CUDA's headers: a toolkit, or `pip install nvidia-cuda-runtime nvidia-cuda-crt
nvidia-cuda-cccl` (of CUDA 13), which is 26 MB.
"""

import argparse
import fcntl
import os
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, TextIO

from ninja import ninja_syntax

FOLDER = Path(__file__).parent.resolve()
ROOT = FOLDER.parents[1]
CSRC = "../../../csrc"  # seen from the folder of a build: where it lies makes no difference to what is compiled
LIBRARIES = ("ops", "kernels")
RUNTIME = [FOLDER / f"{name}.cpp" for name in ("fiber", "scheduler", "synchronization", "memory")]

# -O1: what runs is mostly the emulation, and reports name the right lines.
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-fno-omit-frame-pointer", f"-I{FOLDER}"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


class Variant(NamedTuple):
    """How a library is compiled: flags of the kernels, of the runtime, and what must be loaded before Python."""

    kernels: list[str]
    runtime: list[str]
    preload: list[str]


ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
VARIANTS = {
    "": Variant([], [], []),
    "address": Variant(ADDRESS, ADDRESS, ["libasan.so", "libubsan.so"]),
    # ThreadSanitizer must not see what the runtime itself reads and writes.
    "thread": Variant(["-fsanitize=thread"], ["-DFASTRNN_EMULATION_TSAN"], ["libtsan.so"]),
    "ucontext": Variant([], ["-DFASTRNN_EMULATION_UCONTEXT"], []),  # as on machines other than x86-64
}
# What setup.py's flags mean for the kernels: torch's own builds switch these operators off.
KERNEL_FLAGS = ["-DFASTRNN_EMULATE", "-DFASTRNN_WITH_CUDA"]
KERNEL_FLAGS += [f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
KERNEL_FLAGS += ["-D__CUDA_NO_BFLOAT16_CONVERSIONS__"]


class Unavailable(RuntimeError):
    """Something that the emulation is built with is missing here; the message says what."""


def compiler() -> str:
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not sys.platform.startswith("linux") or cxx is None:
        raise Unavailable("the emulation of CUDA needs Linux and g++")
    return cxx


def cuda_homes() -> list[Path]:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    return [Path(home) for home in homes if home]


def nvcc() -> Path | None:
    return next((home / "bin/nvcc" for home in cuda_homes() if (home / "bin/nvcc").exists()), None)


def cuda_headers() -> Path:
    folders = [home / "include" for home in cuda_homes()]
    for packages in (*site.getsitepackages(), site.getusersitepackages()):
        folders += sorted(Path(packages).glob("nvidia/cu*/include"), reverse=True)
    for folder in folders:
        if (folder / "cuda_runtime.h").exists() and (folder / "crt" / "host_defines.h").exists():
            return folder
    packages = "nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    raise Unavailable(f"the emulation of CUDA needs CUDA's headers: set CUDA_HOME or pip install {packages}")


def environment(variant: str) -> dict[str, str]:
    """What a Python process needs in its environment to load a library of a variant."""
    if not VARIANTS[variant].preload:
        return {}
    asked = ([compiler(), f"-print-file-name={name}"] for name in VARIANTS[variant].preload)
    found = [subprocess.check_output(question, text=True).strip() for question in asked]
    if missing := [name for name in found if not os.path.isabs(name)]:
        raise Unavailable(f"the compiler has no {missing[0]}")
    return {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66 suppress_equal_addresses=0",  # shared memory gets the same addresses again
        "OMP_NUM_THREADS": "1",  # OpenMP is not compiled for ThreadSanitizer
    }


def sources(library: str, root: Path) -> list[str]:
    if library == "kernels":
        return sorted(map(str, FOLDER.glob("*.cu")))
    return [f"{CSRC}/ops.cpp", *sorted(f"{CSRC}/cuda/{file.name}" for file in (root / "csrc/cuda").glob("*_cuda.cu"))]


def build(library: str, variant: str = "", root: Path = ROOT) -> Path:
    """Compiles what has changed since the last call, with the csrc and into the build of `root`; returns the library.

    The root may be a folder with a changed copy of csrc: only what differs from this one's is compiled.

    Raises:
        Unavailable: without a compiler or CUDA's headers.
        RuntimeError: when the compiler fails.
    """
    folder = root / "build" / "emulation" / "-".join(filter(None, (library, variant)))
    if root != ROOT and not folder.exists():
        shutil.copytree(build(library, variant).parent, folder)
        for file in (root / "csrc").rglob("*.*"):
            if file.read_bytes() != (ROOT / file.relative_to(root)).read_bytes():
                file.touch()  # newer than what was compiled just now
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"lib{library}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "build.ninja", "w") as file:
            _write_ninja_file(file, library, VARIANTS[variant], root, target)
        ninja = [sys.executable, "-m", "ninja", "--quiet", "-C", str(folder)]
        unsanitized = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(ninja, capture_output=True, text=True, env=unsanitized)
    if done.returncode:
        raise RuntimeError(f"the emulated {library} do not compile:\n{done.stdout}{done.stderr}")
    return target


def _write_ninja_file(file: TextIO, library: str, variant: Variant, root: Path, target: Path) -> None:
    kernel_flags = [f"-I{CSRC}", *KERNEL_FLAGS, *variant.kernels]
    libraries = list(variant.kernels)
    kernel_flags += ["-isystem", str(cuda_headers())]
    if library == "ops":
        from torch.utils import cpp_extension

        kernel_flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-fvisibility=hidden"]
        kernel_flags += [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
        libraries += [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]

    def text(*words: str) -> str:
        return ninja_syntax.escape(shlex.join(words))

    ninja = ninja_syntax.Writer(file, width=1000)
    compile = text(compiler(), *FLAGS, *WARNINGS)
    ninja.rule("cxx", f"{compile} $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
    ninja.rule("link", f"{text(compiler())} -shared $in -o $out $libraries")
    objects = []
    for source in RUNTIME:
        objects += ninja.build(f"{source.name}.o", "cxx", str(source), variables={"flags": text(*variant.runtime)})
    for source in sources(library, root):
        language = ["-x", "c++", "-include", "cuda_language.h"] if source.endswith(".cu") else []
        flags = text(*kernel_flags, *language)
        objects += ninja.build(f"{os.path.basename(source)}.o", "cxx", source, variables={"flags": flags})
    ninja.build(target.name, "link", objects, variables={"libraries": text(*libraries)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--variant", choices=VARIANTS, default="", help="a sanitizer, or ucontext; see VARIANTS")
    arguments = parser.parse_args()
    print(build(arguments.library, arguments.variant))
