# SPDX-License-Identifier: BSD-3-Clause
"""The machine code of the CUDA kernels, checked without a GPU: spills, instructions, blocks that fit on a device."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from parity import CELLS

from fastrnn import _C, _library

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests/cuda"), str(ROOT / "tests/emulation")]

import device_library  # noqa: E402
import libraries  # noqa: E402
import machine_code  # noqa: E402
from machine_code import DEVICES, uses  # noqa: E402

extended = pytest.mark.extended
ARCHS = ["80", "86", "89", "90a", "100", "120"]  # setup.py's default
STORAGE = {"float": "ff", "double": "dd", "half": "6__halff", "bfloat16": "13__nv_bfloat16f"}  # and acc_t, mangled
THREADS = {"gates": 128, "norm": 256}  # of a block, by the first word of a kernel's name


def skip_without(*names: str) -> None:
    try:
        for name in names:
            machine_code.tool(name)
    except machine_code.Unavailable as reason:
        pytest.skip(f"machine code is not checked: {reason}")


@pytest.fixture(scope="module")
def binary() -> Path:
    """The library that users load."""
    if _C.cuda_archs is None:
        pytest.skip("machine code is not checked: fastrnn was built without CUDA")
    skip_without("cuobjdump", "nvdisasm")
    return _library.path()


@pytest.fixture(scope="module")
def archs() -> list[str]:
    return [re.sub(r"\.|\+PTX", "", arch) for arch in re.split(r"[ ;]", _C.cuda_archs or "")]


def is_gates(name: str, direction: str, cell: str, storage: str, units: str, controlled: bool = False) -> bool:
    parts = (f"gates_{direction}_kernel", f"{len(cell)}{cell}", f"E{STORAGE[storage]}Li{units}ELb{controlled:d}E")
    return all(part in name for part in parts)


SEAM = (ROOT / "csrc/kernels.h").read_text()


def cells_of(listed: str) -> dict[str, str]:
    return dict(re.findall(r"^\s+X\((\w+), (\w+)\)", listed, re.MULTILINE))


NORM_CELLS = cells_of(SEAM.partition("FOR_EACH_NORM_CELL(X)")[2].partition("#define")[0])
CELL_NAMES = cells_of(SEAM.partition("FOR_EACH_NORM_CELL(X)")[0])  # those with kernels of one unit or some a thread


def is_norm(name: str, direction: str, cell: str, storage: str) -> bool:
    return all(part in name for part in (f"norm_{direction}_kernel", f"{len(cell)}{cell}", f"E{STORAGE[storage]}E"))


def test_every_kernel_is_there_for_every_architecture(binary, archs):
    assert set(CELLS) < set(CELL_NAMES)
    names = {arch: [k.name for k in machine_code.kernels(binary) if k.arch == arch] for arch in archs}
    for arch, cell in ((arch, cell) for arch in archs for cell in CELL_NAMES.values()):
        for direction in ("forward", "backward"):
            for storage in STORAGE:
                most = (2 if storage == "double" else 4) // (2 if cell == "SlstmCell" else 1)
                for units in {"1", str(most)}:
                    found = [name for name in names[arch] if is_gates(name, direction, cell, storage, units)]
                    assert len(found) == 1, (arch, cell, direction, storage, units, found)
                assert any(is_gates(name, direction, cell, storage, "1", controlled=True) for name in names[arch])
    for arch, cell in ((arch, cell) for arch in archs for cell in NORM_CELLS.values()):
        for direction in ("forward", "backward"):
            for storage in STORAGE:
                found = [name for name in names[arch] if is_norm(name, direction, cell, storage)]
                assert len(found) == 1, (arch, cell, direction, storage, found)
    if "+PTX" in _C.cuda_archs:
        assert f"sm_{archs[-1]}.ptx" in machine_code.cuobjdump("-lptx", binary)


def is_double(name: str) -> bool:
    """The one exception: in double, divisions and libm's functions are calls, around which a few values are kept."""
    return any(part in name for part in ("gates_", "norm_")) and f"E{STORAGE['double']}" in name


def test_no_kernel_touches_local_memory(binary):
    for kernel in machine_code.kernels(binary):
        assert kernel.stack <= (24 if is_double(kernel.name) else 0) and kernel.local == 0, kernel
    for (arch, name), used in machine_code.instructions(binary).items():
        assert is_double(name) or (not uses(used, "LDL") and not uses(used, "STL")), (arch, name)


def test_gate_kernels_move_16_bytes_at_a_time(binary):
    checked = 0
    for (arch, name), used in machine_code.instructions(binary).items():
        for storage in STORAGE:
            if is_gates(name, "backward", "LstmCell", storage, "2" if storage == "double" else "4"):
                assert uses(used, "LDG.E.128") and uses(used, "STG.E.128"), (arch, name)
                narrow = {"float": (), "double": ()}.get(storage, ("LDG.E.64", "STG.E.64"))
                assert all(uses(used, instruction) for instruction in narrow), (arch, name)
                checked += 1
    assert checked and checked % len(STORAGE) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_gate_kernels_fill_a_device(binary, archs, device):
    """A quarter of the threads of a multiprocessor: with 64 bytes or more in flight each, enough for memory.

    A row that is normalised has a block of its own.
    """
    facts = DEVICES[device]
    if facts.arch not in archs:
        pytest.skip(f"fastrnn was built without code for {device}")
    for kernel in machine_code.kernels(binary):
        for name, threads in THREADS.items():
            if kernel.arch == facts.arch and f"{name}_" in kernel.name:
                compiler, headers = libraries.compiler(), libraries.cuda_headers()
                blocks = machine_code.blocks_per_multiprocessor(compiler, headers, facts, kernel, threads)
                assert blocks * threads >= facts.threads / 4, (kernel, blocks)


# ----------------------------------------------------------------------------------------------------------------------
# The wrappers

SM_80 = {  # probe: instructions that its wrappers must become
    "named_barriers": ["BAR.SYNC"],
    "fences": ["MEMBAR.ALL.GPU", "MEMBAR.SC.GPU", "LDG.E.STRONG.GPU", "STG.E.STRONG.GPU"],
    "flag_in_data": ["LDG.E.128.STRONG.GPU", "STG.E.128.STRONG.GPU"],
    "cp_asyncs": ["LDGSTS.E.BYPASS.128", "LDGDEPBAR", "DEPBAR.LE"],
    "mmaILNS0_7ProductE0": ["HMMA.16816.F32.BF16"],
    "mmaILNS0_7ProductE1": ["HMMA.16816.F32"],
    "mmaILNS0_7ProductE2": ["HMMA.1688.F32.TF32"],
}
SM_90 = SM_80 | {"clusters": ["UCGABAR_ARV", "UCGABAR_WAIT"]}


def compile_for(arch: str, source: Path, target: Path, check: str = "-warn-spills,-warn-lmem-usage,-Werror") -> str:
    """Returns what the compiler says."""
    nvcc = libraries.nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: the wrappers are not compiled for a device")
    flags = ["-std=c++17", "-O3", f"-I{ROOT}/csrc", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    flags += ["-DFASTRNN_WITH_CUDA", "-Werror=all-warnings", f"-Xptxas={check}"]
    done = subprocess.run([nvcc, *flags, "-cubin", source, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "arch", [arch if arch in ("80", "90a") else pytest.param(arch, marks=extended) for arch in ARCHS]
)
def test_wrappers_become_their_instructions(arch, tmp_path):
    compile_for(arch, ROOT / "tests/emulation/probes.cu", tmp_path / "probes.cubin")
    if arch not in ("80", "90a"):
        return  # that it compiles, without spills, is all that is asked
    skip_without("cuobjdump", "nvdisasm")
    used_by = machine_code.instructions(tmp_path / "probes.cubin")
    for probe, expected in (SM_80 if arch == "80" else SM_90).items():
        (used,) = [used for (_, name), used in used_by.items() if re.search(rf"\d{probe}[EI]", name) or probe in name]
        for instruction in expected:
            assert uses(used, instruction), (probe, instruction, sorted(used))


@extended
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["gates", "h_before", "persistent"])
def test_kernels_compile_without_spills(arch, name, tmp_path):
    """For each architecture, whichever the library was built for, and without cuobjdump."""
    said = compile_for(arch, ROOT / f"csrc/cuda/{name}_cuda.cu", tmp_path / "kernels.cubin", check="-v")
    frames = re.findall(r"properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", said)
    assert frames
    for kernel, stack, stores, loads in frames:
        if is_double(kernel):
            assert int(stack) <= 24, (kernel, stack)
        else:
            assert stack == stores == loads == "0", (kernel, stack, stores, loads)


def test_a_library_for_a_device_is_made_of_all_that_it_includes(tmp_path, monkeypatch):
    """A copy of it is current by what is in the sources, not by their times; another header makes it stale."""
    sources = sorted((ROOT / "tests/emulation").glob("*.cu"))
    included = {str(file.relative_to(ROOT)) for file in device_library.included_by(sources)}
    assert {"csrc/cuda/launch.cuh", "csrc/cells/math.h", "tests/emulation/probes.cu"} < included
    for name in included:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(device_library, "ROOT", tmp_path)
    monkeypatch.setattr(libraries, "nvcc", lambda: Path("true"))  # any program that succeeds
    library = device_library.build("9.0")
    library.touch()
    monkeypatch.setattr(libraries, "nvcc", lambda: None)
    (tmp_path / "csrc/cells/math.h").touch()
    assert device_library.build("9.0") == library
    (tmp_path / "csrc/cells/math.h").write_text("")
    with pytest.raises(libraries.Unavailable, match="no current"):
        device_library.build("9.0")


def test_launches(tmp_path):
    """What a launch asks of CUDA's runtime and in which order, on one of the test's own that needs no GPU."""
    nvcc = libraries.nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: launches are not checked")
    flags = ["-std=c++17", "-DFASTRNN_WITH_CUDA", "-Werror=all-warnings", "-gencode=arch=compute_90a,code=sm_90a"]
    command = [
        nvcc,
        *flags,
        f"-I{ROOT}/csrc",
        "-cudart",
        "none",
        ROOT / "tests/cuda/launches.cu",
        "-o",
        tmp_path / "it",
    ]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "it"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# The persistent kernels, which the default build leaves out

PRODUCTS = {  # precision of the products: their type, and the instruction that a product becomes
    "fp16": ("Products16I6__halfE", "HMMA.16816.F32"),
    "bf16": ("Products16I13__nv_bfloat16E", "HMMA.16816.F32.BF16"),
    "tf32": ("ProductsTf32", "HMMA.1688.F32.TF32"),
    "fp32": ("ProductsFp32", "FFMA"),
}
PERSISTENT_THREADS = 256


@extended
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("storage", ["fp16", "bf16", "fp32"])
def test_persistent_kernels(arch, storage, tmp_path):
    """No spills; tensor cores; packets in one piece; no division in a step; a block with all shared memory fits."""
    skip_without("cuobjdump", "nvdisasm")
    binary = tmp_path / "kernels.cubin"
    compile_for(arch, ROOT / f"csrc/cuda/persistent_{storage}_cuda.cu", binary)
    used_by = {name: used for (_, name), used in machine_code.instructions(binary).items()}
    kernels = {kernel.name: kernel for kernel in machine_code.kernels(binary)}
    steps = {name: loop for (_, name), loop in machine_code.longest_loops(binary).items()}
    precisions = ["fp32", "tf32"] if storage == "fp32" else [storage]
    cells = [CELL_NAMES[cell] for cell in CELLS]
    parts = itertools.product(("Forward", "Backward"), cells, precisions, ("Shared", "Global"))
    for direction, cell, precision, exchange in parts:
        products, multiply = PRODUCTS[precision]
        wanted = f"{direction}PassI", cell, products, f"{exchange}Exchange"
        (name,) = [name for name in kernels if all(part in name for part in wanted)]
        used = used_by[name]
        assert uses(used, multiply), (name, sorted(used))
        matrix = {instruction for instruction in used if "MMA" in instruction and "HMMA" in instruction}
        assert matrix == ({multiply} if precision != "fp32" else set()), (name, matrix)
        assert not uses(used, "LDL") and not uses(used, "STL"), name
        assert not uses(used, "ATOM") and not uses(used, "RED"), name
        assert len(steps[name]) > 1000 and uses(set(steps[name]), multiply), name
        # A division by a number that the compiler does not know goes through these.
        assert not uses(set(steps[name]), "I2F") and not uses(set(steps[name]), "F2I"), name
        through_memory = [uses(used, f"{way}.E.128.STRONG.GPU") for way in ("LDG", "STG")]
        assert through_memory == [exchange == "Global"] * 2, (name, sorted(used))
        if arch >= "90a" or len(arch) == 3:
            assert uses(used, "UCGABAR_ARV") == (exchange == "Shared"), (name, sorted(used))
        if uses(used, "UCGABAR_ARV"):  # which waits for a thread's stores to global memory
            begin, end = (steps[name].index(half) for half in ("UCGABAR_ARV", "UCGABAR_WAIT"))
            before, between = set(steps[name][:begin]), set(steps[name][begin:end])
            assert not uses(before, "STG") and uses(between, "STG") and uses(between, "LDG"), name
        for facts in DEVICES.values():
            if facts.arch == arch:
                blocks = machine_code.blocks_per_multiprocessor(
                    *(libraries.compiler(), libraries.cuda_headers(), facts, kernels[name]),
                    threads=PERSISTENT_THREADS,
                    dynamic_shared=facts.shared_per_block - kernels[name].shared,
                )
                assert blocks == 1, (name, facts)


def test_ptxas_would_refuse_a_spill(tmp_path):
    """The compiler flags above mean what they say."""
    if libraries.nvcc() is None:
        pytest.skip("no nvcc: what ptxas refuses is not checked")
    source = tmp_path / "spill.cu"
    source.write_text("""__global__ void indexes_its_registers(float* x, int i) {
        float y[64] = {};
        for (int k = 0; k < 64; ++k) y[k * i % 64] += x[k];
        for (int k = 0; k < 64; ++k) x[k] = y[k];
    }""")
    with pytest.raises(AssertionError, match="Local memory used"):
        compile_for("80", source, tmp_path / "spill.cubin")
