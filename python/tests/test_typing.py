"""The stubs are those of the module, and a checker understands the package's use."""

import subprocess
import sys

import pytest

pytest.importorskip("mypy")

USE = """
import numpy as np
import gdn
import numpy.typing as npt
array: npt.NDArray[np.float32] = np.zeros((3, 160), np.float32)
parts: tuple[npt.NDArray[np.float32], ...] = gdn.split(array, array, 2, 4, 8, 16)
heads, packing = gdn.preset("Qwen/Qwen3-Next-80B-A3B-Instruct")
number: int = heads.num_k_heads + gdn.tiling(1, 2, 3).grid
text: str = packing + gdn.__version__
layer = gdn.Layer(heads, packing, conv_weight=array, A_log=array, dt_bias=array, norm_weight=array)
reason: str | None = gdn.decode_supported(layer, (array, array), array, array, pad_slot_id=0)
gdn.split(array, array, 2, 4, 8, "sixteen")
"""


@pytest.fixture
def without_torch(tmp_path):
    """A folder where mypy does not look up what PyTorch's names are: reading it takes half a minute."""
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")
    return tmp_path


def test_use(without_torch):
    (without_torch / "use.py").write_text(USE)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(without_torch),
        "use.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=without_torch)
    assert "Found 1 error" in done.stdout and 'use.py:12: error: Argument 6 to "split"' in done.stdout, (
        done.stdout
    )


def test_stubs(without_torch):
    """Names and parameters."""
    command = [sys.executable, "-m", "mypy.stubtest", "gdn._gdn", "--ignore-missing-stub"]
    command += ["--mypy-config-file", "mypy.ini"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=without_torch)
    assert done.returncode == 0, done.stdout + done.stderr
