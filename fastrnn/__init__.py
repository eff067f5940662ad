# SPDX-License-Identifier: BSD-3-Clause
"""Drop-in replacements of torch.nn's recurrent networks, on fused CPU and CUDA kernels.

`RNN`, `GRU`, `LSTM` and their cells take the place of the classes of the same name in `torch.nn`. `convert` puts them
into a model that exists, `revert` takes them out, and `patch` does so for models while they are built.
"""

from importlib.metadata import PackageNotFoundError, version

from fastrnn import diagnostics, ops, truncated
from fastrnn.cells import GRUCell, LSTMCell, RNNCell
from fastrnn.convert import Conversion, convert, patch, revert
from fastrnn.explain import Explanation, explain
from fastrnn.modules import GRU, LSTM, RNN, SLSTM
from fastrnn.packing import pack_weights

try:
    __version__ = version("fastrnn")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "Conversion",
    "Explanation",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "convert",
    "diagnostics",
    "explain",
    "ops",
    "pack_weights",
    "patch",
    "revert",
    "truncated",
]
