# SPDX-License-Identifier: BSD-3-Clause
"""The facts of this build and of the processor."""

version: str
"""Version of fastrnn that was compiled."""

compiler: str
"""Name and version of the C++ compiler."""

build_type: str
"""`release` or `debug`."""

torch_target: str
"""The oldest torch that the ops library loads into."""

cuda_version: str | None
"""CUDA toolkit that the kernels were compiled with, None without CUDA."""

cuda_archs: str | None
"""GPU architectures that the kernels were compiled for, in torch's syntax, None without CUDA."""

def isa() -> str:
    """Instruction set that the CPU kernels run with: `portable`, `avx2` or `avx512`."""
