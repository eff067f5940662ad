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


@pytest.fixture
def three_blocks(monkeypatch):
    monkeypatch.setenv("FASTRNN_PERSISTENT_GRADE", "3")
    monkeypatch.setenv("FASTRNN_PERSISTENT_BLOCKS", "3")


def test_refused_and_forced(three_blocks, monkeypatch):
    monkeypatch.setenv("FASTRNN_PATH", "persistent")
    case = LayerCase("gru")
    refused = "cannot serve this layer: the device refused the launch: .* 3 blocks, 1 fit"
    with pytest.raises(RuntimeError, match=refused):
        case.call(ops, case.draw())
    assert torch.ops.fastrnn.refused_launches() == 0


@pytest.mark.parametrize("cell", CELLS)
def test_refused_and_planned(cell, three_blocks):
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


def test_mistaken(three_blocks, monkeypatch):
    """What every device refuses is an error, wherever the path comes from: not a lack of room."""
    case = LayerCase("gru")
    with pytest.raises(RuntimeError, match="CUDA error: .* refused: invalid block of 2048 threads"):
        case.call(ops, case.draw())
    assert torch.ops.fastrnn.refused_launches() == 0


def test_clusters_without_room(monkeypatch):
    """The plan knows, and tries none."""
    monkeypatch.setenv("FASTRNN_PATH", "persistent")
    monkeypatch.setenv("FASTRNN_PERSISTENT_GRADE", "2")
    assert [torch.ops.fastrnn.clusters_at_once(blocks, 0) for blocks in (2, 4, 8, 16)] == [0, 0, 0, 0]
    case = LayerCase("gru")
    with pytest.raises(RuntimeError, match="cannot serve this layer: the recurrent weight does not fit"):
        case.call(ops, case.draw())


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


def test_wavefront_without_room(monkeypatch):
    """A layer alone has room for its block; two at a time have none."""
    for name, value in {"PATH": "persistent", "PERSISTENT_GRADE": "3", "PERSISTENT_BLOCKS": "1"}.items():
        monkeypatch.setenv(f"FASTRNN_{name}", value)
    module, input = fastrnn.GRU(3, 4, num_layers=2), torch.randn(5, 2, 3)
    monkeypatch.setenv("FASTRNN_PERSISTENT_CHUNKS", "1")
    module(input)
    monkeypatch.setenv("FASTRNN_PERSISTENT_CHUNKS", "2")
    with pytest.raises(RuntimeError, match="the device refused the launch: .* 2 blocks, 1 fit"):
        module(input)
