"""The interpreter's end while daemon threads are inside calls: they stop, and nothing crashes or hangs."""

import time

import pytest

pytest.importorskip("numpy")

#: Daemon threads that call as fast as they can, until the interpreter ends under them.
TEXT = """
import sys, threading, time
kind, n, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if kind != "torch":
    sys.modules["torch"] = None
import numpy as np
import gdn

HEADS = (4, 8, 64, 64)
qkvz, ba = np.ones((n, 1536), "i2"), np.ones((n, 16), "i2")
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


if kind == "torch":
    import torch

    qkvz, ba = torch.from_numpy(qkvz), torch.from_numpy(ba)
out = gdn.split(qkvz, ba, *HEADS)
if kind == "python":
    qkvz, ba, out = Slow(qkvz), Slow(ba), tuple(map(Slow, out))
calls = {
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
    ],
)
def test_daemon_threads_inside_calls(kind, n, how, python):
    for turn in range(3):
        start = time.monotonic()
        assert python(TEXT, kind, str(n), how, str(turn * 0.003)) == "well\n"
    # Not the patience of one that waits in vain.
    assert time.monotonic() - start < 29
