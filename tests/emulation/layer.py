# SPDX-License-Identifier: BSD-3-Clause
"""The persistent layer of demonstration.cu beside its definition in numpy."""

import ctypes
from pathlib import Path

import numpy as np

BLOCKS, UNITS, B = 4, 16, 8
H = BLOCKS * UNITS


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of values that bfloat16 holds exactly."""
    return np.ascontiguousarray((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))


class Layer:
    """The library, and one problem of T steps with its solution."""

    def __init__(self, path: Path, T: int = 6) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fastrnn_layer_name.restype = ctypes.c_char_p
        self.library.fastrnn_layer_run.restype = ctypes.c_char_p
        self.library.fastrnn_layer_run.argtypes = [ctypes.c_uint, ctypes.c_int64, *[ctypes.c_void_p] * 7]
        self.library.fastrnn_emulation_configure.argtypes = [
            ctypes.c_uint64,
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.c_uint,
        ]
        self.names: list[str] = []
        while name := self.library.fastrnn_layer_name(len(self.names)):
            self.names.append(name.decode())

        random = np.random.default_rng(0)
        self.T = T
        self.x = random.integers(-4, 8, (T, B, H)).astype(np.float32)
        w = random.integers(-1, 2, (H, H)).astype(np.float32)
        h0 = random.integers(0, 16, (B, H)).astype(np.float32)
        self.w = bfloat16(w)
        self.h0 = bfloat16(h0.reshape(B, BLOCKS, UNITS).transpose(1, 0, 2))
        self.expected = np.empty((T, B, H), np.float32)
        h = h0
        for t in range(T):
            self.expected[t] = h = np.clip(self.x[t] + h @ w.T, 0, 15)

    def configure(self, seed: int, schedule: str, device: str = "h200", resident_blocks: int = 0) -> None:
        self.library.fastrnn_emulation_configure(seed, schedule.encode(), device.encode(), resident_blocks)

    def run(self, name: str) -> bool:
        """Runs a variant of the kernel and says whether the output is right, every bit of it.

        Raises:
            RuntimeError: when the launch is refused or aborted.
        """
        output = np.full_like(self.expected, np.nan)
        h_exchange = np.full((2, BLOCKS, B, UNITS), 0xFFFF, np.uint16)  # NaN
        arrived = np.zeros(1, np.uint32)
        arrays = [self.x, self.w, self.h0, h_exchange, arrived, output]
        addresses = [array.ctypes.data for array in arrays]
        error = self.library.fastrnn_layer_run(self.names.index(name), self.T, *addresses, None)
        if error:
            raise RuntimeError(error.decode())
        return bool(np.array_equal(output, self.expected))
