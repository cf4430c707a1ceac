"""`python -m gdn`: versions, devices, a self-check."""

import importlib.util
import subprocess
import sys

import pytest

import gdn

if importlib.util.find_spec("gdn.__main__") is None:
    pytest.skip("this package has no __main__ yet", allow_module_level=True)


def test_what_it_prints(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gdn"], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert gdn.__version__ in done.stdout and gdn._gdn.isa() in done.stdout
    assert "self-check: passed" in done.stdout
