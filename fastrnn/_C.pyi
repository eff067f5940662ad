# SPDX-License-Identifier: BSD-3-Clause
"""The facts of this build and of the processor, and the plan of a layer."""

from typing import Literal

version: str
"""Version of fastrnn that was compiled."""

compiler: str
"""Name and version of the C++ compiler."""

build_type: Literal["release", "debug"]

torch_target: str
"""The oldest torch that the ops library loads into."""

cuda_version: str | None
"""CUDA toolkit that the kernels were compiled with, None without CUDA."""

cuda_archs: str | None
"""GPU architectures that the kernels were compiled for, in torch's syntax, None without CUDA."""

def isa() -> Literal["portable", "avx2", "avx512", "avx512_bf16"]:
    """Instruction set that the CPU kernels run with."""

class CpuPlan:
    """How the threads of the CPU share a layer, and why."""

    @property
    def split(self) -> Literal["rows", "units"]:
        """A thread owns rows of the batch, or hidden units."""

    @property
    def threads(self) -> int:
        """How many threads run."""

    @property
    def reason(self) -> str:
        """Why, in a few words."""

def plan_cpu(*, T: int, B: int, I: int, H: int, P: int, gates: int, threads: int) -> CpuPlan:
    """The plan for a layer of these sizes, where torch may use `threads` threads. P is H without a projection."""
