# SPDX-License-Identifier: BSD-3-Clause
"""The facts of this build and of the processor, and the plan of a layer."""

from collections.abc import Sequence
from typing import Literal, TypedDict

from typing_extensions import Required, Unpack

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

def cpu_takes(dtype: Literal["float16", "bfloat16"]) -> Literal["converted", "widened", "multiplied"]:
    """What the CPU kernels of torch.nn's cells do with a 16-bit dtype.

    Tensors converted to float32 before them, storage widened as they read it, or products made by the processor.
    """

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

    @property
    def pack_input(self) -> bool:
        """Whether W_ih is packed before use, or read where it is."""

    @property
    def pack_recurrent(self) -> bool:
        """Whether W_hh is packed before use, or read where it is."""

    @property
    def side_by_side(self) -> bool:
        """Whether two layers run at once, each with its own threads."""

def plan_cpu(
    *,
    T: int,
    B: int,
    I: int,
    H: int,
    P: int,
    gates: int,
    threads: int,
    two_products: bool = False,
    normalises: bool = False,
    layers: Literal[1, 2] = 1,
    widens: bool = False,
    backward: bool = False,
    packed: bool = False,
) -> CpuPlan:
    """The plan for a layer of these sizes, where torch may use `threads` threads. P is H without a projection.

    `two_products`: of a GRU that resets before the product, with gates=2. `normalises`: with layer normalisation.
    `layers`: 2 for both directions, which do not wait for each other.
    `widens`: the weights are of 16 bits, which products read as float32. `backward`: of the backward pass.
    `packed`: the weights are there packed as well, by `fastrnn.pack_weights`.
    """

class CudaPlan:
    """The path of a layer on a GPU, how it is shared between the GPU's multiprocessors, and why."""

    @property
    def path(self) -> Literal["gates", "persistent"]:
        """A matrix product and a gate kernel per step, or one kernel for the whole sequence. 0 below for the former."""

    @property
    def grade(self) -> Literal[0, 1, 2, 3]:
        """Blocks that exchange states: one, those of a cluster, or any."""

    @property
    def teams(self) -> int:
        """Groups of blocks, of a direction; each takes rows of the batch and exchanges states within itself."""

    @property
    def blocks(self) -> int:
        """Blocks of a team."""

    @property
    def rows_per_team(self) -> int:
        """Rows of the batch that a team takes."""

    @property
    def units_per_block(self) -> int:
        """Hidden units that a block owns."""

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""

    @property
    def streamed_bytes(self) -> int:
        """Of the recurrent weight, in all blocks: what the chip does not hold and each step reads from the L2 cache."""

    @property
    def reason(self) -> str:
        """Why, in a few words."""

class _CudaQuestion(TypedDict, total=False):
    """A pass, the device that it would run on (by default with the limits of an H100), and what is forced."""

    T: Required[int]
    B: Required[int]
    H: Required[int]
    gates: Required[int]
    states: Required[int]
    projection: bool
    arithmetic: Required[Literal["fp16", "bf16", "tf32", "fp32", "fp64"]]
    backward: bool
    layers: int
    capability: int
    multiprocessors: int
    shared_per_block: int
    l2_bytes: int
    clusters: Sequence[int]
    measured: bool
    wavefronts_measured: bool
    path: Literal["", "gates", "persistent"]
    grade: int
    blocks: int
    teams: int
    groups_in_shared: int
    chunks: int

def plan_cuda(**question: Unpack[_CudaQuestion]) -> CudaPlan:
    """The plan for one pass of a layer, or of both directions of it at once.

    What is given of `path`, `grade`, `blocks`, `teams` and `groups_in_shared` is forced; a forced path that cannot
    serve comes back as "gates" with the reason. `clusters`: of 2, 4, 8 and 16 blocks that run at once. `measured`:
    whether devices of this class have been timed, without which nothing but a forced path is "persistent".
    """

class Wavefront:
    """Whether two layers of a stack run as a wavefront over chunks of time, and why."""

    @property
    def steps(self) -> int:
        """Of a chunk; 0: one layer after the other."""

    @property
    def reason(self) -> str:
        """Why, in a few words."""

def plan_wavefront(**question: Unpack[_CudaQuestion]) -> Wavefront:
    """The plan for two layers of these sizes in one direction, where a pass of each is `plan_cuda`'s.

    `chunks` forces that many, 1 none. `backward`: forward and backward. `layers` is not read. `wavefronts_measured`:
    whether they have been timed on devices of this class, without which none runs but a forced one.
    """
