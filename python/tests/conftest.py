"""Devices: the same tests run on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

HERE = Path(__file__).parent
HAS_CUDA = torch is not None and torch.cuda.is_available()
GPUS = torch.cuda.device_count() if HAS_CUDA else 0
TOO_OLD = "the interpreter of this Triton needs NumPy below 2.4"


def interpreter_runs() -> bool:
    """Whether Triton's interpreter gets on with NumPy: which of its numbers turn to Python's changed under old releases."""
    import numpy
    import triton

    def release(module: Any) -> tuple[int, ...]:
        return tuple(map(int, module.__version__.split(".")[:2]))

    return release(triton) >= (3, 7) or release(numpy) < (2, 4)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpus(number): needs so many GPUs")
    config.addinivalue_line("markers", "interpreter: has Triton's interpreter run a kernel")


def pytest_report_header() -> str:
    return f"torch {getattr(torch, '__version__', 'missing')}, {GPUS} GPUs"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("gpus"):
        if mark.args[0] > GPUS:
            pytest.skip(f"{GPUS} GPUs here, {mark.args[0]} needed")
    if item.get_closest_marker("interpreter") and not interpreter_runs():
        pytest.skip(TOO_OLD)


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
