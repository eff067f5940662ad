# SPDX-License-Identifier: BSD-3-Clause
"""The device suite: everything that only a GPU can show, one line per group, in less than 8 minutes.

Ends with 1 if a group failed or had to be left out. The output of each group is kept in build/test-gpu.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "build/test-gpu"
sys.path.append(str(ROOT / "tests/cuda"))

import machine_code  # noqa: E402

PYTEST = ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
CHECKS = ["tests/cuda/checks.py", "-k"]
# A few operators, every kind of kernel, without the time that the sanitizer needs for more.
FEW = ["-p", "no:xdist", "tests/emulation/ops.py", "-k", "cuda and float32 and (T5-B3 or T4-B5)"]
GROUPS = {  # name: tool of compute-sanitizer, arguments of Python, seconds allowed
    "conformance": ("", [*PYTEST, *CHECKS, "conformance"], 120),
    "parity": ("", [*PYTEST, "-n", "8", "tests", "tests/emulation/ops.py", "-k", "cuda and not checks"], 240),
    "streams": ("", [*PYTEST, *CHECKS, "stream or synchronisation"], 60),
    "determinism": ("", [*PYTEST, *CHECKS, "same_bits"], 60),
    "second device": ("", [*PYTEST, *CHECKS, "second_device"], 60),
    "graphs": ("", [*PYTEST, *CHECKS, "graph"], 60),
    "memcheck": ("memcheck", [*PYTEST, *FEW], 120),
    "racecheck": ("racecheck", [*PYTEST, "-p", "no:xdist", *CHECKS, "conformance_of_wrappers"], 120),
}
OPTIONAL = {"second device"}  # may be left out


def run_group(name: str) -> tuple[str, str]:
    """Returns ok, FAILED or left out, and why."""
    tool, arguments, limit = GROUPS[name]
    command = [sys.executable, *arguments]
    if tool:
        try:
            sanitizer = machine_code.tool("compute-sanitizer")
        except machine_code.Unavailable:
            return "left out", "no compute-sanitizer: install a CUDA toolkit"
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *command]
    log = LOGS / f"{name.replace(' ', '-')}.txt"
    with open(log, "w") as output:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return "FAILED", f"took more than {limit} s; see {log.relative_to(ROOT)}"
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
    chosen = parser.parse_args().groups or list(GROUPS)
    if unknown := set(chosen) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}: there are {', '.join(GROUPS)}")

    import torch

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
        status, why = run_group(name)
        print(f"{name:14} {status:9} {time.monotonic() - started:5.0f} s  {why}", flush=True)
        unsuccessful += status == "FAILED" or (status == "left out" and name not in OPTIONAL)
    return int(unsuccessful > 0)


if __name__ == "__main__":
    sys.exit(main())
