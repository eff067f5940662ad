# SPDX-License-Identifier: BSD-3-Clause
"""What each kernel of probes.cu must give, stated in numpy from the definitions of CUDA and of the PTX ISA."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint32]]
lanes = np.arange(32)


@dataclass(frozen=True)
class Probe:
    draw: Callable[[np.random.Generator], Words]
    expected: Callable[[Words], Words]
    scratch: int = 0  # words after the expected ones
    sm_90: bool = False


def draw_words(count: int) -> Callable[[np.random.Generator], Words]:
    return lambda random: random.integers(0, 2**32, count, dtype=np.uint32)


def halves(words: Words) -> np.ndarray:
    return words.view(np.uint16)


def floats(words: Words) -> np.ndarray:
    return words.view(np.float32)


def words(values: Any) -> Words:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint32)


# ----------------------------------------------------------------------------------------------------------------------
# Warps and blocks


def shuffled(value: Words) -> Words:
    def source(of: np.ndarray, inside: np.ndarray) -> np.ndarray:
        lane = np.where(inside, of, lanes)
        return np.concatenate([value[:32][lane], value[32:][lane]])

    every = np.ones(32, bool)
    rows = [
        source((lanes * 5 + 3) % 32, every),
        source(lanes // 8 * 8 + (lanes + 1) % 8, every),
        source(lanes ^ 5, every),
        source(lanes ^ 12, (lanes ^ 12) // 8 <= lanes // 8),
        source(lanes - 3, lanes % 16 >= 3),
        source(lanes + 7, lanes + 7 < 32),
        np.where(np.tile(lanes, 2) >= 8, source(np.full(32, 9), every), 0),
    ]
    return np.concatenate(rows).astype(np.uint32)


def voted(value: Words) -> Words:
    rows = []
    warps = value.reshape(2, 32)
    ballots = [int(np.sum((warp % 2).astype(np.uint64) << lanes.astype(np.uint64))) for warp in warps]
    rows.append(np.repeat(ballots, 32))
    rows.append(np.repeat((warps % 64 == 0).any(axis=1), 32))
    rows.append(np.repeat((warps % 64 != 0).all(axis=1), 32))
    rows.append(np.full(64, (value % 2).sum()))
    rows.append(np.full(64, (value % 8 != 0).all()))
    rows.append(np.full(64, (value % 64 == 0).any()))
    return np.concatenate(rows).astype(np.uint32)


def accumulated(value: Words) -> Words:
    return np.array([value.sum(dtype=np.uint32), value.max(), value[7], value[0]], np.uint32)


def reversed_twice(value: Words) -> Words:
    return np.concatenate([value[::-1], value.reshape(16, 4)[::-1].reshape(-1)])


def consumed_by_two(value: Words) -> Words:
    return np.concatenate([value + np.uint32(1), value + np.uint32(2)])


# ----------------------------------------------------------------------------------------------------------------------
# Grids and clusters


def summed_along(value: Words) -> Words:
    return words(value + np.cumsum(np.arange(8, dtype=np.uint32), dtype=np.uint32)[:, None])


def exchanged_in_clusters(value: Words) -> Words:
    blocks = value.reshape(2, 4, 32)
    read = np.roll(blocks, -1, axis=1)[:, :, ::-1]
    ranks = np.arange(4, dtype=np.uint32)[None, :, None]
    return np.concatenate([words(read), words(np.roll(blocks + ranks, -1, axis=1))])


def copied_in_turn(value: Words) -> Words:
    rows = value.reshape(2, 32, 4)
    return np.concatenate([words(rows[0]), words(rows[1, ::-1])])


# ----------------------------------------------------------------------------------------------------------------------
# Tensor cores


def draw_integers(kind: str) -> Callable[[np.random.Generator], Words]:
    """Small integers: every product and every order of the sums is exact, so that the result is defined to the bit."""

    def draw(random: np.random.Generator) -> Words:
        a, b, c = (random.integers(-8, 9, size).astype(np.float32) for size in (256, 128, 128))
        if kind == "tf32":
            a, b = a[:128], b[:64]
        elif kind == "fp16":
            a, b = a.astype(np.float16), b.astype(np.float16)
        else:
            a, b = (np.ascontiguousarray(words(x) >> 16).astype(np.uint16) for x in (a, b))
        return np.concatenate([words(a), words(b), words(c)])

    return draw


def multiplied(kind: str) -> Callable[[Words], Words]:
    def multiply(value: Words) -> Words:
        a, b, c = value[:128].reshape(32, 4), value[128:192].reshape(32, 2), floats(value[192:]).reshape(32, 4)
        # In words the layouts of all types agree: a row of A, or a column of B, is 8 words, of one or two values each.
        A, B = np.empty((16, 8), np.uint32), np.empty((8, 8), np.uint32)
        C, D = np.empty((16, 8), np.float32), np.empty((32, 4), np.float32)
        for lane in lanes:
            g, t = divmod(lane, 4)
            A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4] = a[lane]
            B[g, t], B[g, t + 4] = b[lane]
            C[g, 2 * t : 2 * t + 2], C[g + 8, 2 * t : 2 * t + 2] = c[lane, :2], c[lane, 2:]
        product = C + decoded(kind, A) @ decoded(kind, B).T
        for lane in lanes:
            g, t = divmod(lane, 4)
            D[lane] = [*product[g, 2 * t : 2 * t + 2], *product[g + 8, 2 * t : 2 * t + 2]]
        return words(D)

    return multiply


def decoded(kind: str, matrix: Words) -> np.ndarray:
    if kind == "tf32":
        return floats(matrix & np.uint32(0xFFFFE000)).astype(np.float64)
    if kind == "fp16":
        return matrix.view(np.float16).astype(np.float64)
    return floats(matrix.view(np.uint16).astype(np.uint32) << np.uint32(16)).astype(np.float64)


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic


def draw_floats(random: np.random.Generator) -> Words:
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, 65504, 65520, 2**-24, 2**-25, 1 + 2**-11, 1 + 3 * 2**-11], np.float32
    )
    ties = words(random.integers(1, 255, 46, dtype=np.uint32) << np.uint32(23) | np.uint32(0x1000))
    scaled = random.standard_normal(200) * 10.0 ** random.integers(-8, 6, 200)
    return np.concatenate([words(special), ties, words(scaled.astype(np.float32))])


def rounded(value: Words) -> Words:
    tf32 = (value + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    with np.errstate(over="ignore"):
        half = floats(value).astype(np.float16).astype(np.float32)
    to_even = np.uint32(0x7FFF) + (value >> np.uint32(16) & np.uint32(1))
    bfloat16 = (value + to_even) & np.uint32(0xFFFF0000)
    return np.concatenate([tf32, words(half), bfloat16])


PROBES = {
    "shuffles": Probe(draw_words(64), shuffled),
    "votes": Probe(draw_words(64), voted),
    "integer_atomics": Probe(draw_words(64), accumulated),
    "shared_memory": Probe(draw_words(64), reversed_twice),
    "named_barriers": Probe(draw_words(128), consumed_by_two),
    "fences": Probe(draw_words(32), summed_along, scratch=8),
    "flag_in_data": Probe(draw_words(96), lambda value: value, scratch=160),
    "clusters": Probe(draw_words(256), exchanged_in_clusters, sm_90=True),
    "cp_asyncs": Probe(draw_words(256), copied_in_turn),
    "mma_bf16": Probe(draw_integers("bf16"), multiplied("bf16")),
    "mma_fp16": Probe(draw_integers("fp16"), multiplied("fp16")),
    "mma_tf32": Probe(draw_integers("tf32"), multiplied("tf32")),
    "rounding": Probe(draw_floats, rounded),
}


def check(got: Words, expected: Words) -> None:
    np.testing.assert_array_equal(got, expected)
