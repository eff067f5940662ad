# SPDX-License-Identifier: BSD-3-Clause
"""Runs the probes and the demonstration layer on the emulation, over seeds and schedules, under a sanitizer if asked.

python tests/emulation/kernels.py                               every probe, every way of exchanging h
python tests/emulation/kernels.py kGridFences/kNoCopyWait       one with a planted fault
python tests/emulation/kernels.py clusters --variant thread     a race detector: reports data races, ends with 66
"""

import argparse
import ctypes
import os
import sys
from pathlib import Path

import libraries
import numpy as np
from layer import Problem
from probes import PROBES, check

SCHEDULES = ("round_robin", "random", "priority")


class Kernels:
    """The kernels of this folder, compiled for the emulation or for a device. Addresses are of the device's memory."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        pointers = [ctypes.c_void_p] * 7
        self._probe_run = self._function("fastrnn_probe_run", ctypes.c_uint, *pointers[:3])
        self._layer_run = self._function("fastrnn_layer_run", ctypes.c_uint, ctypes.c_int64, *pointers)
        self.probes = self._names("fastrnn_probe_name")
        self.layers = self._names("fastrnn_layer_name")

    def _function(self, name: str, *arguments: type) -> "ctypes._NamedFuncPointer":
        function = getattr(self.library, name)
        function.restype, function.argtypes = ctypes.c_char_p, arguments
        return function

    def _names(self, function: str) -> list[str]:
        name_of, names = self._function(function, ctypes.c_uint), []
        while name := name_of(len(names)):
            names.append(name.decode())
        return names

    def run_probe(self, name: str, value: int, out: int, stream: int = 0) -> None:
        _raise(self._probe_run(self.probes.index(name), value, out, stream))

    def run_layer(self, name: str, T: int, addresses: list[int], stream: int = 0) -> None:
        _raise(self._layer_run(self.layers.index(name), T, *addresses, stream))


def _raise(error: bytes | None) -> None:
    if error:
        raise RuntimeError(error.decode())


class Emulated(Kernels):
    """The kernels on the emulation, over numpy arrays."""

    def __init__(self, variant: str = "") -> None:
        super().__init__(libraries.build("kernels", variant))
        self.problem = Problem()
        configure = self.library.fastrnn_emulation_configure
        configure.argtypes = [ctypes.c_uint64, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
        self._configure = configure

    def configure(self, seed: int, schedule: str, device: str = "h200", resident_blocks: int = 0) -> None:
        self._configure(seed, schedule.encode(), device.encode(), resident_blocks)

    def probe(self, name: str, seed: int = 0) -> None:
        """Runs a probe and compares its words.

        Raises:
            RuntimeError: when the launch is refused or aborted.
            AssertionError: when the words are not the expected ones.
        """
        probe = PROBES[name]
        value = probe.draw(np.random.default_rng(seed))
        expected = probe.expected(value)
        memory = np.zeros(len(value) + len(expected) + probe.scratch + 8, np.uint32)
        value_at = memory[-memory.ctypes.data // 4 % 4 :]  # vectors of 16 bytes; numpy promises no alignment
        value_at[: len(value)] = value
        out = value_at[(len(value) + 3) // 4 * 4 :]
        self.run_probe(name, value_at.ctypes.data, out.ctypes.data)
        check(out[: len(expected)], expected)

    def layer(self, name: str) -> None:
        """Runs a variant of the layer and compares its output, bit by bit; raises as `probe`."""
        arrays = self.problem.arrays()
        self.run_layer(name, self.problem.T, [array.ctypes.data for array in arrays])
        np.testing.assert_array_equal(arrays[-1], self.problem.expected)

    def run(self, name: str, seed: int = 0) -> None:
        if name in self.layers:
            self.layer(name)
        else:
            self.probe(name, seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="probes, or variants of the layer; default: all that are right")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds for each schedule (default: 3)")
    parser.add_argument("--device", choices=["h200", "a100", "l4"], default="h200", help="whose limits count")
    parser.add_argument("--resident-blocks", type=int, default=0, help="how many blocks fit on the device")
    parser.add_argument("--variant", choices=libraries.VARIANTS, default="", help="a sanitizer, or ucontext")
    arguments = parser.parse_args()

    needed = libraries.environment(arguments.variant)
    if "LD_PRELOAD" in needed and "LD_PRELOAD" not in os.environ:
        libraries.build("kernels", arguments.variant)
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | needed)

    emulated = Emulated(arguments.variant)
    right = [*emulated.probes, *(name for name in emulated.layers if name.endswith("/kNone"))]
    failed = 0
    for name in arguments.names or right:
        errors = []
        for seed in range(arguments.seeds):
            for schedule in SCHEDULES:
                emulated.configure(seed, schedule, arguments.device, arguments.resident_blocks)
                try:
                    emulated.run(name, seed)
                except RuntimeError as error:
                    errors.append(str(error))
                except AssertionError:
                    errors.append(f"wrong results [seed {seed}, schedule {schedule}]")
        print(f"{name}: {len(errors)} of {3 * arguments.seeds} runs failed", *errors[:1], sep="; ", flush=True)
        failed += bool(errors)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
