# SPDX-License-Identifier: BSD-3-Clause
"""`python -m fastrnn` prints what was built and what it runs on."""

import platform

import torch

import fastrnn
from fastrnn import _C, _library


def facts() -> dict[str, str]:
    """The facts to state first in a bug report."""
    gpus = [
        f"cuda:{index} {gpu.name} (sm_{gpu.major}{gpu.minor})"
        for index, gpu in enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
    ]
    no_gpu = "no CUDA device" if torch.version.cuda else "no CUDA device: this torch is a CPU build"
    return {
        "fastrnn": f"{fastrnn.__version__} ({_C.build_type}, {_C.compiler})",
        "torch": f"{torch.__version__} (fastrnn needs {_C.torch_target} or later)",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "instruction set": _C.isa(),
        "CPU threads": str(torch.get_num_threads()),
        "CUDA kernels": f"for {_C.cuda_archs}, by CUDA {_C.cuda_version}" if _C.cuda_version else "not compiled",
        "devices": "; ".join(gpus) or no_gpu,
        "ops library": str(_library.path()),
    }


if __name__ == "__main__":
    for name, fact in facts().items():
        print(f"{name:16}{fact}")
