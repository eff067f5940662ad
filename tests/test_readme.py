# SPDX-License-Identifier: BSD-3-Clause
"""The README's Python blocks run as they stand, each beside the names that a reader would have."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastrnn

README = Path(__file__).parents[1] / "README.md"


def loss_fn(output, target):
    """Of a tensor, or of what a module of torch.nn returns."""
    return nn.functional.mse_loss(output if isinstance(output, torch.Tensor) else output[0], target)


def test_the_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="needs Keras 3: pip install fastrnn[test]")
    other_model = keras.Sequential([keras.Input((10, 1)), keras.layers.GRU(4), keras.layers.Dense(1)])
    other_model.compile("adam", "mse")
    lstm = fastrnn.LSTM(64, 8)
    names = {"torch": torch, "nn": nn, "fastrnn": fastrnn, "model": nn.GRU(64, 8), "lstm": lstm}
    names |= {"input": torch.randn(250, 2, 64), "target": torch.randn(250, 2, 8)}
    names |= {"lengths": torch.tensor([250, 0]), "begins": torch.rand(250, 2) < 0.1}
    names |= {"loss_fn": loss_fn, "optimizer": torch.optim.Adam(lstm.parameters())}
    names |= {"x": torch.randn(20, 10, 1).numpy(), "y": torch.randn(20, 1).numpy(), "other_model": other_model}
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(block, README.name, "exec"), dict(names))
