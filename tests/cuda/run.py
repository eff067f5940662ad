# SPDX-License-Identifier: BSD-3-Clause
"""The device suite: everything that only a GPU can show, one line per group, in less than 10 minutes.

Ends with 1 if a group failed or had to be left out. The output of each group is kept in build/test-gpu. A word names
every group that begins with it: `python tests/cuda/run.py persistent` runs what forces the persistent kernels, which
takes a build with FASTRNN_PERSISTENT=1.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "build/test-gpu"
sys.path += [str(ROOT), str(ROOT / "tests/cuda")]

import machine_code  # noqa: E402
import torch  # noqa: E402

import fastrnn  # noqa: E402, F401  # registers the operators

PYTEST = ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
ALONE = ["-p", "no:xdist"]
CHECKS = ["tests/cuda/checks.py", "-k"]
SMALL, LARGE = "tests/emulation/persistent.py", "tests/cuda/persistent_checks.py"
WAVES = "tests/emulation/wavefront.py"
# A few operators, every kind of kernel, without the time that the sanitizer needs for more.
FEW = [*ALONE, "tests/emulation/ops.py", "-k", "cuda and float32 and (T5-B3 or T4-B5)"]
FEW_PERSISTENT = [*ALONE, SMALL, "-k", "cuda and (test_parity and lstm or test_shapes and streamed)"]


class Group(NamedTuple):
    arguments: list[str]  # of pytest
    seconds: int  # allowed
    tool: str = ""  # of compute-sanitizer


GROUPS = {
    "conformance": Group([*CHECKS, "conformance"], 120),
    "parity": Group(["-n", "8", "tests", "tests/emulation/ops.py", "-k", "cuda and not checks"], 240),
    "streams": Group([*CHECKS, "stream or synchronisation"], 60),
    "determinism": Group([*CHECKS, "same_bits"], 60),
    "second-device": Group([*CHECKS, "second_device"], 60),
    "graphs": Group([*CHECKS, "graph"], 60),
    "memcheck": Group(FEW, 120, "memcheck"),
    "racecheck": Group([*ALONE, *CHECKS, "conformance_of_wrappers"], 120, "racecheck"),
}
GROUPS |= {
    "persistent-parity": Group(["-n", "8", SMALL, WAVES, "-k", "cuda"], 120),
    "persistent-sizes": Group([LARGE, "-k", "sizes or wavefront"], 120),
    "persistent-side-by-side": Group([LARGE, "-k", "streams or threads"], 60),
    **{f"persistent-{name}": GROUPS[name]._replace(seconds=40) for name in list(GROUPS)[2:6]},
    "persistent-memcheck": Group(FEW_PERSISTENT, 60, "memcheck"),
    "persistent-synccheck": Group(FEW_PERSISTENT, 60, "synccheck"),
}
OPTIONAL = {"second-device", "persistent-second-device"}  # may be left out


def run_group(name: str, limit: float) -> tuple[str, str]:
    """Returns ok, FAILED or left out, and why."""
    arguments, _, tool = GROUPS[name]
    command = [sys.executable, *PYTEST, *arguments]
    environment = dict(os.environ)
    if name.startswith("persistent"):
        if not hasattr(torch.ops.fastrnn, "refused_launches"):  # which only they have
            return "FAILED", "fastrnn was built without the persistent kernels: FASTRNN_PERSISTENT=1 make build"
        environment["FASTRNN_PATH"] = "persistent"  # a launch that the device refuses raises
    if tool:
        try:
            sanitizer = machine_code.tool("compute-sanitizer")
        except machine_code.Unavailable:
            return "left out", "no compute-sanitizer: install a CUDA toolkit"
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *command]
    log = LOGS / f"{name}.txt"
    with open(log, "w") as output:
        streams = {"stdout": output, "stderr": output}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started: a kernel may hang in each
            process.wait()
            return "FAILED", f"took more than {limit:.0f} s; see {log.relative_to(ROOT)}"
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    summary = next((line.strip("= ") for line in reversed(lines) if " in " in line and "s" in line), "no output")
    if code:
        return "FAILED", f"{summary}; see {log.relative_to(ROOT)}"
    if " passed" not in summary:
        reason = next((line.split(": ", 1)[1] for line in lines if line.startswith("SKIPPED")), summary)
        return "left out", reason
    return "ok", summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"{', '.join(GROUPS)}; default: all")
    parser.add_argument("--seconds", type=float, default=580, help="for all groups together (default: %(default)s)")
    asked = parser.parse_args()
    deadline = time.monotonic() + asked.seconds
    found = {word: [name for name in GROUPS if f"{name}-".startswith(f"{word}-")] for word in asked.groups}
    if unknown := [word for word in found if not found[word]]:
        parser.error(f"no group {', '.join(unknown)}: there are {', '.join(GROUPS)}")
    chosen = sum(found.values(), []) or list(GROUPS)

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device: the device suite needs one, nothing was run")
        return 1
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(
            f"cuda:{index}: {device.name}, compute capability {device.major}.{device.minor}, torch {torch.__version__}"
        )
    LOGS.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS gives the same bits on every stream
    unsuccessful = 0
    for name in chosen:
        started = time.monotonic()
        limit = min(GROUPS[name].seconds, deadline - started)
        status, why = run_group(name, limit) if limit > 5 else ("left out", "no time was left: run it alone")
        print(f"{name:24} {status:9} {time.monotonic() - started:5.0f} s  {why}", flush=True)
        unsuccessful += status == "FAILED" or (status == "left out" and name not in OPTIONAL)
    return int(unsuccessful > 0)


if __name__ == "__main__":
    sys.exit(main())
