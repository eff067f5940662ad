# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures and tiers. The fast tier runs by default; FASTRNN_EXTENDED=1 adds the tests marked `extended`."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

# Test processes run side by side: threads that wait shall leave the cores to the others. OpenMP reads this once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from torch import nn

from fastrnn import _C, _library

# A graph in inductor's cache does not know that the schema of an operator has changed: each build has its own cache.
BUILD = Path(__file__).resolve().parents[1] / "build"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(BUILD / f"inductor-{_library.path().stat().st_mtime_ns}"))

EXTENDED = os.environ.get("FASTRNN_EXTENDED") == "1"

hypothesis.settings.register_profile("fast", max_examples=40, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("extended", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("extended" if EXTENDED else "fast")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "extended: the long tier, run with FASTRNN_EXTENDED=1")
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections is not supported with oneDNN")  # torch.nn's


def pytest_report_header() -> list[str]:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none seen: the tests run on the CPU alone"
    tier = "extended" if EXTENDED else "fast (FASTRNN_EXTENDED=1 for all)"
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA device: {cuda}; tier: {tier}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if EXTENDED:
        return
    long = [item for item in items if item.get_closest_marker("extended")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """For tests that set how many threads torch may use."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test draws the same numbers, whatever ran before; float32 means float32 (cuDNN uses TF32 by default)."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one, and a build that has all kernels."""
    monkeypatch.setattr(nn.init, "uniform_", lambda *_: None)  # there is no such device to draw on
    facts = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(_C, "cuda_version", "13.0")
    monkeypatch.setattr(torch.ops.fastrnn, "refused_launches", lambda: 0, raising=False)
    monkeypatch.setattr(torch.ops.fastrnn, "clusters_at_once", lambda blocks, device: 128 // blocks, raising=False)
    monkeypatch.delenv("FASTRNN_PATH", raising=False)
