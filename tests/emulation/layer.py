# SPDX-License-Identifier: BSD-3-Clause
"""The problem that the persistent layer of demonstration.cu solves, and its solution in numpy."""

import numpy as np

BLOCKS, UNITS, B = 4, 16, 8
H = BLOCKS * UNITS


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of values that bfloat16 holds exactly."""
    return np.ascontiguousarray((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))


class Problem:
    """T steps of the layer, in integers."""

    def __init__(self, T: int = 6) -> None:
        random = np.random.default_rng(0)
        self.T = T
        self.x = random.integers(-4, 8, (T, B, H)).astype(np.float32)
        w = random.integers(-1, 2, (H, H)).astype(np.float32)
        h = random.integers(0, 16, (B, H)).astype(np.float32)
        self.w = bfloat16(w)
        self.h0 = bfloat16(h.reshape(B, BLOCKS, UNITS).transpose(1, 0, 2))
        self.expected = np.empty((T, B, H), np.float32)
        for t in range(T):
            self.expected[t] = h = np.clip(self.x[t] + h @ w.T, 0, 15)

    def arrays(self) -> list[np.ndarray]:
        """The arguments of the kernel after T; the last one is its output."""
        h_exchange = np.full((2, BLOCKS, B, UNITS), 0xFFFF, np.uint16)  # NaN
        return [self.x, self.w, self.h0, h_exchange, np.zeros(1, np.uint32), np.full_like(self.expected, np.nan)]
