# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the probes and the demonstration layer for a device.

On a machine with a GPU but no nvcc, bring build/cuda from one that has it: python tests/cuda/device_library.py 9.0
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/emulation"))

import libraries  # noqa: E402


def build(capability: str) -> Path:
    """Returns the library for a compute capability, such as 9.0; compiles it if a source is newer.

    Raises:
        libraries.Unavailable: if there is neither a library nor an nvcc.
        RuntimeError: if nvcc fails.
    """
    arch = capability.replace(".", "") + "a" * capability.startswith("9")
    sources = sorted((ROOT / "tests/emulation").glob("*.cu"))
    target = ROOT / f"build/cuda/libkernels-sm_{arch}.so"
    headers = sorted((ROOT / "csrc/cuda").glob("*.cuh"))
    if target.exists() and target.stat().st_mtime >= max(file.stat().st_mtime for file in sources + headers):
        return target
    nvcc = libraries.nvcc()
    if nvcc is None:
        raise libraries.Unavailable(f"no nvcc, and no current {target.relative_to(ROOT)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-lineinfo", f"-I{ROOT}/csrc", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command = [nvcc, *flags, "-shared", "-Xcompiler=-fPIC", *sources, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile for sm_{arch}:\n{done.stderr}")
    return target


if __name__ == "__main__":
    print(build(sys.argv[1]))
