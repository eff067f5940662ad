# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the probes and the demonstration layer for a device.

On a machine with a GPU but no nvcc, bring build/cuda from one that has it: python tests/cuda/device_library.py 9.0
"""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/emulation"))

import libraries  # noqa: E402


def included_by(sources: list[Path]) -> list[Path]:
    """The sources and every file of this repository that they include, directly or not."""
    found, new = set[Path](), set(sources)
    while new:
        found |= new
        names = [(file.parent, name) for file in new for name in re.findall(r'#include "(.+)"', file.read_text())]
        folders = (ROOT / "csrc", ROOT / "tests/emulation")
        new = {(folder / name).resolve() for beside, name in names for folder in (beside, *folders)} - found
        new = {file for file in new if file.exists()}
    return sorted(found)


def build(capability: str) -> Path:
    """Returns the library for a compute capability, such as 9.0; compiles it if what it was made of has changed.

    Beside it lies a hash of its sources: their times say nothing on a machine that they were copied to.

    Raises:
        libraries.Unavailable: if there is neither a library nor an nvcc.
        RuntimeError: if nvcc fails.
    """
    arch = capability.replace(".", "") + "a" * capability.startswith("9")
    sources = sorted((ROOT / "tests/emulation").glob("*.cu"))
    target = ROOT / f"build/cuda/libkernels-sm_{arch}.so"
    flags = ["-std=c++17", "-O3", "-lineinfo", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    texts = [" ".join(flags), *(file.read_text() for file in included_by(sources))]
    made_of, current = target.with_suffix(".sha256"), hashlib.sha256("\0".join(texts).encode()).hexdigest()
    if target.exists() and made_of.exists() and made_of.read_text() == current:
        return target
    nvcc = libraries.nvcc()
    if nvcc is None:
        raise libraries.Unavailable(f"no nvcc, and no current {target.relative_to(ROOT)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, *flags, f"-I{ROOT}/csrc", "-shared", "-Xcompiler=-fPIC", *sources, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile for sm_{arch}:\n{done.stderr}")
    made_of.write_text(current)
    return target


if __name__ == "__main__":
    print(build(sys.argv[1]))
