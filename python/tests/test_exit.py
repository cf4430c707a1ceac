"""The interpreter's end while daemon threads are inside calls: they stop, and nothing crashes or hangs."""

import time

import pytest

pytest.importorskip("numpy")

#: Daemon threads that call as fast as they can, until the interpreter ends under them.
TEXT = """
import sys, threading, time
kind, n, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
is_torch = kind in ("torch", "floats", "old", "layer")
if not is_torch:
    sys.modules["torch"] = None
import numpy as np
if kind == "old":  # a PyTorch whose versions are advanced through Python, as torch 2.11
    import importlib.util
    import torch
    path = importlib.util.find_spec("gdn").submodule_search_locations[0] + "/_gdn.abi3.so"
    spec = importlib.util.spec_from_file_location("gdn._gdn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register = module.register
    module.register = lambda torch: register(torch, without=["torch_tensor_from_pyobject"])
    sys.modules["gdn._gdn"] = module
import gdn

HEADS = (4, 8, 64, 64)
elements = "f4" if kind in ("floats", "layer") else "i2"  # of floats PyTorch is asked whether they are negated
qkvz, ba = np.ones((n, 1536), elements), np.ones((n, 16), elements)
weight = np.ones((1536, n), "f4")


class Slow:
    '''Python code inside a call, which gives up the GIL again and again.'''

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        for _ in range(50):
            time.sleep(0)
        return self.array.__dlpack_device__()

    def __dlpack__(self, **how):
        for _ in range(50):
            time.sleep(0)
        return self.array.__dlpack__(**how)


if is_torch:
    import torch

    qkvz, ba = torch.from_numpy(qkvz), torch.from_numpy(ba)
out = gdn.split(qkvz, ba, *HEADS)
if kind == "python":
    qkvz, ba, out = Slow(qkvz), Slow(ba), tuple(map(Slow, out))
if kind == "layer":
    ones = torch.ones
    layer = gdn.Layer(HEADS, conv_weight=ones(1024, 4), A_log=ones(8), dt_bias=ones(8), norm_weight=ones(64))
    states = threading.local()


def decode():
    if not hasattr(states, "pair"):
        states.pair = torch.zeros(n, 1024, 3), torch.zeros(n, 8, 64, 64)
        states.out = torch.zeros(n, 8, 64)
    # Outputs given, as in the others: PyTorch aborts where the interpreter ends while `torch.empty` makes one.
    layer.decode((qkvz, ba), *states.pair, out=states.out)


calls = {
    "layer": decode,
    "floats": lambda: gdn.split(qkvz, ba, *HEADS, out=out),
    "old": lambda: gdn.split(qkvz, ba, *HEADS, out=out),
    "numpy": lambda: gdn.split(qkvz, ba, *HEADS),
    "torch": lambda: gdn.split(qkvz, ba, *HEADS, out=out),
    "python": lambda: gdn.split(qkvz, ba, *HEADS, out=out),
    "repack": lambda: gdn.repack_weight(weight, HEADS),
}
started = threading.Semaphore(0)


def work():
    calls[kind]()
    started.release()
    while True:
        calls[kind]()


for _ in range(6):
    threading.Thread(target=work, daemon=True).start()
for _ in range(6):
    started.acquire()
time.sleep(float(sys.argv[4]))
print("well", flush=True)
if how == "error":
    raise SystemExit(0)
if how == "busy":  # what else runs at the end lets the threads in
    import atexit
    atexit.register(time.sleep, 0.01)
"""


@pytest.mark.parametrize(
    ("kind", "n", "how"),
    [
        ("numpy", 3, "end"),
        ("numpy", 700, "end"),
        ("numpy", 700, "error"),
        ("numpy", 700, "busy"),
        ("repack", 300, "end"),
        ("python", 700, "end"),
        ("python", 700, "busy"),
        ("torch", 700, "end"),
        ("old", 700, "busy"),
        ("floats", 3, "end"),
        ("layer", 1, "end"),
    ],
)
def test_daemon_threads_inside_calls(kind, n, how, python):
    for turn in range(3):
        start = time.monotonic()
        assert python(TEXT, kind, str(n), how, str(turn * 0.003)) == "well\n"
    # Not the patience of one that waits in vain.
    assert time.monotonic() - start < 29
