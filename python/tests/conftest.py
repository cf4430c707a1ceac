"""Devices: the same tests run on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

# Else the first array of JAX's takes three quarters of a GPU, in every worker of pytest-xdist.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=4000, help="calls at random")
    parser.addoption("--fuzz-seed", default="0", help="which calls")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpus(number): needs so many GPUs")
    config.addinivalue_line("markers", "large: takes a large part of a GPU's memory")
    config.addinivalue_line("markers", "interpreter: has Triton's interpreter run a kernel")


def pytest_report_header() -> str:
    return f"torch {getattr(torch, '__version__', 'missing')}, {GPUS} GPUs"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("gpus"):
        if mark.args[0] > GPUS:
            pytest.skip(f"{GPUS} GPUs here, {mark.args[0]} needed")
    if item.get_closest_marker("interpreter") and not interpreter_runs():
        pytest.skip(TOO_OLD)


@pytest.fixture(autouse=True)
def room_on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lets workers of pytest-xdist share a GPU of 80 GB.

    A test marked `large` has 35 GB of tensors, or four processes with a CUDA context each: one of them runs at a time, among all workers. And
    what PyTorch keeps of freed tensors goes back after each test that left much of it, which no other worker could use.
    """
    if not HAS_CUDA:
        yield
        return
    import fcntl

    with open(Path(tempfile.gettempdir()) / f"gdn-tests-gpu-{os.getuid()}", "w") as lock:
        if request.node.get_closest_marker("large"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 1 << 30:
            torch.cuda.empty_cache()


@pytest.fixture
def jax() -> Iterator[Any]:
    """JAX with its arrays on the CPU, whatever else it has."""
    module = pytest.importorskip("jax")
    with module.default_device(module.devices("cpu")[0]):
        yield module


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
