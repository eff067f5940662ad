# SPDX-License-Identifier: BSD-3-Clause
"""What the compiler made of the kernels: registers, memory, instructions, and how many blocks fit on a device."""

import ctypes
import os
import re
import shutil
import site
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent.resolve()


class Unavailable(RuntimeError):
    """A tool is missing here; the message says which."""


@dataclass(frozen=True)
class Kernel:
    arch: str  # "90a"
    name: str  # mangled
    registers: int
    stack: int
    local: int
    shared: int  # static, in bytes


@dataclass(frozen=True)
class Device:
    arch: str
    multiprocessors: int
    threads: int  # of one multiprocessor
    shared: int  # of one multiprocessor, in bytes
    shared_per_block: int
    l2: int  # bytes
    clusters: tuple[int, int, int, int] = (0, 0, 0, 0)  # of 2, 4, 8 and 16 blocks that run at once, as if of full GPCs

    @property
    def capability(self) -> int:
        return int(self.arch.rstrip("a"))


DEVICES = {
    "a100": Device("80", 108, 2048, 164 << 10, 163 << 10, 40 << 20),
    "rtx3090": Device("86", 82, 1536, 100 << 10, 99 << 10, 6 << 20),
    "l4": Device("89", 58, 1536, 100 << 10, 99 << 10, 48 << 20),
    "rtx4090": Device("89", 128, 1536, 100 << 10, 99 << 10, 72 << 20),
    "h100": Device("90a", 132, 2048, 228 << 10, 227 << 10, 50 << 20, (66, 32, 16, 8)),
    "h100_mig_1g": Device("90a", 16, 2048, 228 << 10, 227 << 10, 6 << 20, (8, 4, 2, 1)),  # the smallest partition
    "b200": Device("100", 148, 2048, 228 << 10, 227 << 10, 126 << 20, (74, 34, 16, 8)),
    "rtx5090": Device("120", 170, 1536, 100 << 10, 99 << 10, 96 << 20, (85, 40, 20, 0)),
}


def tool(name: str) -> str:
    """A program of the CUDA toolkit, or of the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    packages = [Path(path) for path in (*site.getsitepackages(), site.getusersitepackages())]
    folders = [*(str(bin) for path in packages for bin in path.glob("nvidia/cu*/bin")), "/usr/local/cuda/bin"]
    if home := os.environ.get("CUDA_HOME"):
        folders.insert(0, f"{home}/bin")
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if not found:
        raise Unavailable(f"no {name}: install a CUDA toolkit, or nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    return found


def cuobjdump(*arguments: str | Path) -> str:
    # It calls nvdisasm by name.
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    command = [tool("cuobjdump"), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path}).stdout


@cache
def kernels(binary: Path) -> list[Kernel]:
    found = []
    arch = name = ""
    for line in cuobjdump("-res-usage", binary).splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.append(Kernel(arch, name, registers, stack, local, shared))
    return found


@cache
def _code(binary: Path) -> dict[tuple[str, str], list[tuple[int, str, str]]]:
    """Address, instruction and operands, by architecture and mangled name of the kernel."""
    found: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    arch, code = "", list[tuple[int, str, str]]()
    for line in cuobjdump("-sass", binary).splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s+Function : (\S+)", line):
            code = found.setdefault((arch, match[1]), [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            code.append((int(match[1], 16), match[2], match[3]))
    return found


@cache
def instructions(binary: Path) -> dict[tuple[str, str], set[str]]:
    """The instructions in use, by architecture and mangled name of the kernel."""
    return {kernel: {instruction for _, instruction, _ in code} for kernel, code in _code(binary).items()}


@cache
def longest_loops(binary: Path) -> dict[tuple[str, str], list[str]]:
    """The instructions between the jump back that goes farthest and its target: of a persistent kernel, a step."""
    found = {}
    for kernel, code in _code(binary).items():
        jumps = [
            (int(to[1], 16), at) for at, name, rest in code if name == "BRA" and (to := re.search(r"0x(\w+)", rest))
        ]
        first, last = max(jumps, key=lambda jump: jump[1] - jump[0], default=(0, 0))
        found[kernel] = [name for at, name, _ in code if first <= at <= last]
    return found


def uses(used: set[str], instruction: str) -> bool:
    """Whether an instruction is among those used; a prefix that ends at a dot counts."""
    return any(name == instruction or name.startswith(instruction + ".") for name in used)


@cache
def _occupancy(compiler: str, headers: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/occupancy.so"
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-isystem", str(headers)]
        subprocess.run([compiler, *flags, str(FOLDER / "occupancy.cpp"), "-o", library], check=True)
        return ctypes.CDLL(library)


def blocks_per_multiprocessor(
    compiler: str, headers: Path, device: Device, kernel: Kernel, threads: int, dynamic_shared: int = 0
) -> int:
    major, minor = divmod(device.capability, 10)
    limits = (major, minor, device.threads, device.shared, device.shared_per_block)
    needs = (kernel.registers, threads, kernel.shared, dynamic_shared)
    blocks = _occupancy(compiler, headers).fastrnn_blocks_per_multiprocessor(*limits, *needs)
    assert blocks >= 0, f"the calculation refuses {kernel}"
    return int(blocks)
