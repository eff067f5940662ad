# SPDX-License-Identifier: BSD-3-Clause
# Builds the two binaries of fastrnn: _ops, the library of the ops (torch's stable ABI, no Python ABI), and _C, the
# Python module of build facts. Switches, all environment variables:
#   FASTRNN_CUDA           0: no CUDA kernels; 1: CUDA kernels or an error; unset: CUDA kernels if a toolkit is found
#   CUDA_HOME              the CUDA toolkit; unset: that of nvcc on PATH, else /usr/local/cuda
#   FASTRNN_PERSISTENT     1: compile the persistent CUDA kernels too (minutes); they have not run on a GPU yet
#   TORCH_CUDA_ARCH_LIST   GPU architectures in torch's syntax, such as "8.0;9.0a+PTX"; unset: CUDA_ARCHS below
#   FASTRNN_DEBUG          1: -O0 -g in place of -O3
#   MAX_JOBS               how many compilers run at once; unset: ninja decides
#   CXX, CXXFLAGS, LDFLAGS the C++ compiler, further options of it and of the linker
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_ARCHS = "8.0 8.6 8.9 9.0a 10.0 12.0"  # of these, those that nvcc knows; PTX of the last
TORCH_TARGET = (2, 10)  # the oldest torch that the ops library loads into
MACOS = sys.platform == "darwin"
DEBUG = os.environ.get("FASTRNN_DEBUG") == "1"
PERSISTENT = os.environ.get("FASTRNN_PERSISTENT") == "1"
ROOT = Path(__file__).parent.resolve()

# Without -ffast-math, so that NaN and inf keep their meaning, and without -march=native: the CPU kernels choose their
# instructions at run time. -Wno-psabi: functions of vectors are inlined everywhere, so no call depends on their ABI.
OPTIMIZE = ["-O0", "-g"] if DEBUG else ["-O3"]
CXX_FLAGS = ["-std=c++17", *OPTIMIZE, "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", f"-I{ROOT}/csrc"]
NVCC_FLAGS = ["-std=c++17", *OPTIMIZE, "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", f"-I{ROOT}/csrc"]
NVCC_FLAGS += ["-Xfatbin=-compress-all", "-DFASTRNN_WITH_CUDA"]


class CudaToolkit:
    """nvcc, the static runtime library, and the architectures to compile for."""

    def __init__(self, home: Path, cudart: Path):
        self.nvcc, self.cudart = home / "bin" / "nvcc", cudart
        self.version = re.search(r"release (\d+\.\d+)", self.ask("--version")).group(1)
        known = self.ask("--list-gpu-code").split()
        default = " ".join(arch for arch in CUDA_ARCHS.split() if "sm_" + re.sub(r"\D", "", arch) in known) + "+PTX"
        self.archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or default

    def ask(self, question: str) -> str:
        return subprocess.run([self.nvcc, question], check=True, capture_output=True, text=True).stdout

    def arch_flags(self) -> list[str]:
        from torch.utils import cpp_extension

        os.environ["TORCH_CUDA_ARCH_LIST"] = self.archs  # the only way to hand torch a list
        return cpp_extension._get_cuda_arch_flags()


def find_cuda() -> CudaToolkit | None:
    switch = os.environ.get("FASTRNN_CUDA", "")
    if switch not in ("", "0", "1"):
        sys.exit(f"FASTRNN_CUDA must be 0, 1 or unset, got {switch!r}")
    if switch == "0":
        return None
    given, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    beside_nvcc = [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes = [Path(given)] if given else [*beside_nvcc, Path("/usr/local/cuda")]
    for home in homes:
        cudart = [file for lib in ("lib64", "lib", "targets/*/lib") for file in home.glob(f"{lib}/libcudart_static.a")]
        if cudart and (home / "bin" / "nvcc").exists():
            return CudaToolkit(home, cudart[0])
    if switch == "1":
        looked_in = ", ".join(map(str, homes))
        sys.exit(f"FASTRNN_CUDA=1, but no CUDA toolkit (bin/nvcc, libcudart_static.a) in {looked_in}: set CUDA_HOME")
    return None


class NinjaBuild(build_ext):
    """Compiles with one ninja file, host and CUDA sources side by side, in a folder that is kept between builds."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_ops"):  # no Python module: no Python version in its name
            return fullname.replace(".", "/") + (".dylib" if MACOS else ".so")
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}{'-debug' * DEBUG}"
        folder.mkdir(parents=True, exist_ok=True)
        targets = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
        with open(folder / "build.ninja", "w") as file:
            self.write_ninja_file(file, [target.name for target in targets])
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([sys.executable, "-m", "ninja", "-C", folder, *jobs]).returncode:
            sys.exit("fastrnn: the build failed, the compiler's messages are above")
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / target.name, target)

    def write_ninja_file(self, file, targets: list[str]) -> None:
        import pybind11
        import torch
        from ninja import ninja_syntax
        from torch.utils import cpp_extension

        if torch.__version__ < TORCH_TARGET:
            sys.exit(f"fastrnn builds with torch 2.10 or later, found {torch.__version__}")
        python_include = sysconfig.get_path("include")
        if not Path(python_include, "Python.h").exists():
            sys.exit(f"no Python.h in {python_include}: install Python's headers (python3-dev, python3-devel)")
        cxx = os.environ.get("CXX") or next(filter(shutil.which, ["c++", "g++", "clang++"]), None)
        if cxx is None:
            sys.exit("no C++ compiler: install g++ or clang++, or set CXX")
        cuda = find_cuda()
        print(f"fastrnn: with CUDA {cuda.version} for {cuda.archs}" if cuda else "fastrnn: without CUDA", flush=True)

        major, minor = TORCH_TARGET
        ops_flags = [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"]
        ops_flags += [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
        ops_libs = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]
        # Nothing in libtorch is named, but on CUDA builds of torch it brings the symbols of libtorch_cuda into scope.
        ops_libs += ["-ltorch"] if MACOS else ["-Wl,-z,defs", "-Wl,--no-as-needed", "-ltorch"]
        facts = {"VERSION": self.distribution.get_version(), "TORCH_TARGET": f"{major}.{minor}"}
        facts |= {"BUILD_TYPE": "debug" if DEBUG else "release"}
        if cuda:
            ops_flags += ["-DFASTRNN_WITH_CUDA", *(["-DFASTRNN_WITH_PERSISTENT"] * PERSISTENT)]
            ops_libs += [str(cuda.cudart), "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
            facts |= {"CUDA_VERSION": cuda.version, "CUDA_ARCHS": cuda.archs}
        module_flags = [f'-DFASTRNN_{name}="{value}"' for name, value in facts.items()]
        module_flags += ["-isystem", pybind11.get_include(), "-isystem", python_include]
        module_libs = ["-undefined", "dynamic_lookup"] if MACOS else []

        def text(*words: str) -> str:
            return ninja_syntax.escape(shlex.join(words))

        compiling = {"depfile": "$out.d", "deps": "gcc", "description": "compile $in"}
        ninja = ninja_syntax.Writer(file, width=1000)
        ninja.rule("cxx", f"{cxx} $flags {os.environ.get('CXXFLAGS', '')} -MMD -MF $out.d -c $in -o $out", **compiling)
        ninja.rule("link", f"{cxx} -shared $in -o $out $libs {os.environ.get('LDFLAGS', '')}", "link $out")
        if cuda:
            nvcc = text(str(cuda.nvcc), *NVCC_FLAGS, *cuda.arch_flags())
            ninja.rule("nvcc", f"{nvcc} -MMD -MF $out.d -c $in -o $out", **compiling)
        per_target = zip(self.extensions, targets, [ops_flags, module_flags], [ops_libs, module_libs], strict=True)
        for extension, target, flags, libs in per_target:
            objects = []
            for source in map(Path, extension.sources):
                if source.suffix == ".cpp":
                    flags_of_cxx = {"flags": text(*CXX_FLAGS, *flags)}
                    objects += ninja.build(f"{source.name}.o", "cxx", str(ROOT / source), variables=flags_of_cxx)
                elif cuda:
                    objects += ninja.build(f"{source.name}.o", "nvcc", str(ROOT / source))
            ninja.build(target, "link", objects, variables={"libs": text(*libs)})


CUDA_SOURCES = [file for file in sorted(glob("csrc/cuda/*_cuda.cu")) if PERSISTENT or "persistent" not in file]
OPS_SOURCES = ["csrc/ops.cpp", *sorted(glob("csrc/cpu/*_cpu.cpp")), *CUDA_SOURCES]
setup(
    ext_modules=[Extension("fastrnn._ops", OPS_SOURCES), Extension("fastrnn._C", ["csrc/python.cpp"])],
    cmdclass={"build_ext": NinjaBuild},
)
