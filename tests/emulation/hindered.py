# SPDX-License-Identifier: BSD-3-Clause
"""Persistent kernels that a device refuses, or whose blocks wait in vain: what a user gets and is told.

Run on the emulation by tests/test_persistent.py, a process for each group of tests: FASTRNN_LIBRARY names a library
with a fault or a change planted in it, and FASTRNN_EMULATION_RESIDENT_BLOCKS a device with room for one block.
"""

import warnings

import pytest
import torch
from parity import CELLS, LayerCase, check_layer_parity

import fastrnn
from fastrnn import ops, reference

TILINGS = {2: 2, 3: 3}  # grade: blocks


@pytest.fixture(params=TILINGS, ids=lambda grade: f"grade{grade}")
def tiling(request, monkeypatch):
    monkeypatch.setenv("FASTRNN_PERSISTENT_GRADE", str(request.param))
    monkeypatch.setenv("FASTRNN_PERSISTENT_BLOCKS", str(TILINGS[request.param]))
    return request.param, TILINGS[request.param]


def test_refused_and_forced(tiling, monkeypatch):
    monkeypatch.setenv("FASTRNN_PATH", "persistent")
    case = LayerCase("gru")
    refused = f"cannot serve this layer: the device refused the launch: .* {tiling[1]} blocks, 1 fit"
    with pytest.raises(RuntimeError, match=refused):
        case.call(ops, case.draw())
    assert torch.ops.fastrnn.refused_launches() == 0


@pytest.mark.parametrize("cell", CELLS)
def test_refused_and_planned(cell, tiling):
    """The path "gates" computes it, forward and backward, and that can be asked."""
    before = torch.ops.fastrnn.refused_launches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_layer_parity(LayerCase(cell, 4, 3, 5, 21, packed=True), ops, reference, torch.device("cpu"))
    assert torch.ops.fastrnn.refused_launches() == before + 2
    texts = [str(warning.message) for warning in caught if "no room for a persistent kernel" in str(warning.message)]
    assert len(texts) == (before == 0), caught
    explanation = fastrnn.explain(fastrnn.GRU(3, 4), torch.randn(5, 2, 3))
    assert any(f"refused {before + 2} persistent" in note for note in explanation.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_waiting_in_vain(cell, dtype, monkeypatch):
    """A block that never tells its states: the kernel ends, what needed them is NaN, and the next call raises."""
    for name, value in {"PATH": "persistent", "PERSISTENT_GRADE": "3", "PERSISTENT_BLOCKS": "3"}.items():
        monkeypatch.setenv(f"FASTRNN_{name}", value)
    case = LayerCase(cell, 4, 3, 5, 21, dtype)
    arguments = case.draw()
    output = case.call(ops, arguments)["output"]
    assert output[0].isfinite().all() and output[1:].isnan().all()
    with pytest.raises(RuntimeError, match="an earlier persistent kernel gave up waiting"):
        case.call(ops, arguments)
    monkeypatch.setenv("FASTRNN_PATH", "gates")
    assert case.call(ops, arguments)["output"].isfinite().all()
