# SPDX-License-Identifier: BSD-3-Clause
"""The examples: a few steps of each. Those that train beside torch.nn must come to the same with both libraries."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = {
    "forecast_sunspots.py": ("statsmodels", ["--steps", "5"]),
    "classify_digits.py": ("sklearn", ["--epochs", "2"]),
    "translate_dates.py": ("rich", ["--steps", "8", "--hidden", "16"]),
}


def run(program, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    command = [sys.executable, EXAMPLES / program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.extended
@pytest.mark.parametrize("program", PROGRAMS)
def test_both_libraries_come_to_the_same(program, tmp_path):
    package, arguments = PROGRAMS[program]
    for name in (package, "matplotlib", "rich"):
        pytest.importorskip(name, reason=f"{program} needs it: pip install fastrnn[examples]")
    output = run(program, *arguments, "--plot", tmp_path / "plot.png")
    rows = re.findall(r"^│ (fastrnn|torch\.nn) .*│$", output, re.MULTILINE)
    assert rows == ["fastrnn", "torch.nn"]
    cells = [line.split("│")[2:-2] for line in output.splitlines() if re.match("│ (fastrnn|torch)", line)]
    assert cells[0] == cells[1] and any(cell.strip() for cell in cells[0])  # all but name and time
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


def test_gradient_flow(tmp_path):
    output = run("gradient_flow.py", "--steps", "30", "--plot", tmp_path / "plot.png")
    reach = dict(re.findall(r"^(\S.*)\n  .* begin / end (\S+)$", output, re.MULTILINE))
    assert len(reach) == 5 and float(reach["RNN"]) < 1e-3 < float(reach["LSTM, forget_bias=5"])
    assert float(reach["RNN of relu, weights 1.05 I"]) > 1
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"
