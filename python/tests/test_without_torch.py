"""The package where PyTorch is not installed: NumPy, DLPack, and no word of torch."""

import pytest

pytest.importorskip("numpy")

BLOCKED = """
import sys, importlib.abc
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""
USE = """
import numpy as np, gdn
qkvz, ba = np.arange(3 * 160, dtype="f4").reshape(3, 160), np.arange(24, dtype="i2").reshape(3, 8)
parts = gdn.split(qkvz, ba, 2, 4, 8, 16)
assert [part.shape for part in parts] == [(3, 96), (3, 4, 16), (3, 4), (3, 4)]
assert all((one == other).all() for one, other in zip(gdn.merge(*parts, 2, 4, 8, 16), (qkvz, ba)))
assert (parts[2] == ba.reshape(3, 2, 4)[:, :, :2].reshape(3, 4)).all()
weight = np.arange(160 * 2, dtype="f4").reshape(160, 2)
back = gdn.repack_weight(gdn.repack_weight(weight, (2, 4, 8, 16)), (2, 4, 8, 16), to="interleaved")
assert (back == weight).all()
try:
    gdn.split(qkvz, ba, 2, 3, 8, 16)
except ValueError as error:
    assert "num_v_heads = 3" in str(error)
one, state = np.ones((2, 4, 8), "f4"), np.zeros((1, 4, 16, 8), "f4")
layer = gdn.Layer((2, 4, 8, 16), conv_weight=np.ones((96, 4), "f4"), A_log=one[0, :, 0], dt_bias=one[0, :, 0], norm_weight=np.ones(16, "f4"))
conv, rows = np.zeros((1, 96, 3), "f4"), (qkvz[:1] / 99, ba[:1].astype("f4"))
assert gdn.decode_supported(layer, rows, conv, state) is None
assert layer.decode(rows, conv, state).shape == (1, 4, 16) and state.any() and conv.any()
assert layer.prefill(rows, np.array([0, 1])).shape == (1, 4, 16)
assert "float64" in gdn.prefill_supported(layer, (qkvz.astype("f8"), ba), np.array([0, 3]))
assert gdn.preset("Qwen/Qwen3-Next-80B-A3B-Instruct")[0].num_v_heads == 32
assert not [name for name in sys.modules if name.partition(".")[0] == "torch" and sys.modules[name]]
print("well")
"""


def test_torch_is_not_installed(python):
    assert python(BLOCKED.replace("NAMES", "['torch']") + USE) == "well\n"


def test_torch_is_none(python):
    assert python("import sys\nsys.modules['torch'] = None\n" + USE) == "well\n"


def test_neither_torch_nor_numpy(python):
    text = BLOCKED.replace("NAMES", "['torch', 'numpy']") + "import gdn\nprint(gdn.tiling(10, 100, 4).grid)"
    assert python(text) == "4\n"


def test_a_torch_that_fails_says_so(python):
    """What is wrong with a PyTorch that is there is not hidden."""
    text = """
import sys, types, importlib.abc, importlib.machinery
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "torch" else None
    def create_module(self, spec): return None
    def exec_module(self, module): raise ImportError("libcudart.so.99: cannot open", name="libcudart")
sys.meta_path.insert(0, Broken())
try:
    import gdn
except ImportError as error:
    print(error)
"""
    assert "libcudart.so.99" in python(text)


def test_numpy_is_not_imported_by_the_package(python):
    text = BLOCKED.replace("NAMES", "['torch']") + "import gdn\nprint('numpy' in sys.modules)"
    assert python(text) == "False\n"
