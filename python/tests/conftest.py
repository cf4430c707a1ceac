"""Devices: the same tests run on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

HERE = Path(__file__).parent
HAS_CUDA = torch is not None and torch.cuda.is_available()
GPUS = torch.cuda.device_count() if HAS_CUDA else 0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpus(number): needs so many GPUs")


def pytest_report_header() -> str:
    return f"torch {getattr(torch, '__version__', 'missing')}, {GPUS} GPUs"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("gpus"):
        if mark.args[0] > GPUS:
            pytest.skip(f"{GPUS} GPUs here, {mark.args[0]} needed")


@pytest.fixture(params=["cpu", "cuda"] if HAS_CUDA else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's tensors are."""
    return request.param


@pytest.fixture
def python() -> Callable[..., str]:
    """Runs a text in an interpreter of its own; what it prints."""

    def run(text: str, *args: str, timeout: float = 300) -> str:
        command = [sys.executable, "-c", text, *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=HERE)
        assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
