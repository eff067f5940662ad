# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled parts, or says what to do when one does not load."""

import os
import sys
from functools import cache
from pathlib import Path

import torch


def path() -> Path:
    """The ops library: what the environment variable FASTRNN_LIBRARY names, else the file beside this one."""
    beside = Path(__file__).with_name("_ops.dylib" if sys.platform == "darwin" else "_ops.so")
    return Path(os.environ.get("FASTRNN_LIBRARY") or beside)


@cache
def load() -> None:
    """Registers the ops in `torch.ops.fastrnn`, once.

    Raises:
        ImportError: if a compiled part is missing, or was built for another platform, Python or torch.
    """
    try:
        from fastrnn import _C
    except ImportError as error:
        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        raise _failure(f"the compiled module fastrnn._C is missing or was not built for {python}") from error
    if torch.__version__ < _C.torch_target:  # compares versions, not text
        raise _failure(f"torch {_C.torch_target} or later is needed, found {torch.__version__}", "upgrade torch")
    if not path().exists():
        raise _failure(f"the compiled library {path()} is missing")
    try:
        torch.ops.load_library(path())  # type: ignore[no-untyped-call]
    except OSError as error:
        raise _failure(f"the compiled library {path()} does not load here ({error.__cause__ or error})") from error
    # For the persistent CUDA kernels. Where there are none nobody asks.
    torch.library.impl("fastrnn::allows_tf32", "CompositeExplicitAutograd", allows_tf32)


def allows_tf32() -> bool:
    """Whether torch lets recurrent layers in float32 multiply in TF32 on CUDA, as it tells cuDNN.

    The newer of torch's two switches: it follows the older one, `torch.backends.cudnn.allow_tf32`, which raises where
    both were used.
    """
    return bool(torch.backends.cudnn.rnn.fp32_precision == "tf32")  # type: ignore[attr-defined]


def _failure(fact: str, remedy: str | None = None) -> ImportError:
    if remedy is None:
        tree = Path(__file__).parents[1]
        remedy = "build it with `pip install --no-build-isolation .` in the source tree"
        if (tree / "setup.py").exists():  # an installed package may be elsewhere, and this folder hides it
            remedy = f"{tree} is the source tree: `make build` builds there, or run Python in another folder"
    # The name lets `python -m fastrnn` end with the message alone, without a traceback.
    return ImportError(f"fastrnn: {fact}; {remedy}", name="fastrnn")
