"""Several threads of Python, several of the op, and processes that fork."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

import oracle

import gdn

HEADS = (4, 8, 64, 64)


def test_threads_of_python_at_once(device):
    """Each has its own rows and outputs; small calls and shared ones."""

    def work(seed):
        for n in (1, 3, 70, 700):
            qkvz, ba = oracle.packed(n + seed, HEADS, torch.bfloat16, device=device)
            parts = gdn.split(qkvz, ba, *HEADS)
            oracle.same(parts, oracle.split_bits(qkvz, ba, HEADS, "interleaved"))
            oracle.same(torch.ops.gdn.merge(*parts, *HEADS), [oracle.bits(qkvz), oracle.bits(ba)])
        return seed

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(16))) == list(range(16))


def test_errors_in_threads(device):
    def work(seed):
        qkvz, ba = oracle.packed(3, HEADS, torch.bfloat16, device=device)
        with pytest.raises(ValueError, match="mixed_ba has 2 rows"):
            gdn.split(qkvz, ba[:2], *HEADS)
        with pytest.raises(RuntimeError, match="mixed_ba has 2 rows"):
            torch.ops.gdn.split(qkvz, ba[:2], *HEADS)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(16)))


def test_arrays_of_numpy_in_threads():
    oracle_numpy = pytest.importorskip("oracle_numpy")

    def work(seed):
        qkvz, ba = oracle_numpy.packed(600 + seed, HEADS, "u2")
        oracle_numpy.same(gdn.split(qkvz, ba, *HEADS), oracle_numpy.split(qkvz, ba, HEADS, "interleaved"))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(8)))


FORKS = """
import multiprocessing, os, sys, warnings
warnings.simplefilter("ignore")
{setup}
def work(_=None):
    parts = gdn.split(qkvz, ba, 16, 32, 128, 128)
    return same(parts)
if __name__ == "__main__":
    assert work()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(work, range(4)).get(timeout=100) == [True] * 4
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        ok = work()
        if grandchild:
            ok = ok and os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert work()
    print("well")
"""
TORCH = """
import torch, gdn
torch.set_num_threads({threads})
qkvz = torch.arange({n} * 12288, dtype=torch.int16).view({n}, 12288)
ba = torch.arange({n} * 64, dtype=torch.int16).view({n}, 64)
first = gdn.split(qkvz, ba, 16, 32, 128, 128)
same = lambda parts: all((one.numpy() == other.numpy()).all() for one, other in zip(parts, first))
"""
NUMPY = """
import sys
sys.modules["torch"] = None
import numpy as np, gdn
qkvz = np.arange({n} * 12288, dtype="i2").reshape({n}, 12288)
ba = np.arange({n} * 64, dtype="i2").reshape({n}, 64)
first = gdn.split(qkvz, ba, 16, 32, 128, 128)
same = lambda parts: all(np.array_equal(*pair) for pair in zip(parts, first))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("n", [8, 500, 3000])
def test_fork_after_arrays_of_numpy(n, python):
    pytest.importorskip("numpy")
    assert python(FORKS.format(setup=NUMPY.format(n=n)), timeout=120) == "well\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [8, 3000])
def test_fork_after_tensors_of_pytorch(n, threads, python):
    """PyTorch's own parallel loops may hang in a forked process, whose threads stayed behind. The op does not."""
    pytest.importorskip("numpy")
    assert python(FORKS.format(setup=TORCH.format(n=n, threads=threads)), timeout=120) == "well\n"


def test_split_in_a_data_loader():
    """The loader's workers are forked, and work on one thread."""
    from torch.utils.data import DataLoader

    qkvz, ba = oracle.packed(12, HEADS, torch.bfloat16)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return gdn.split(qkvz[3 * i : 3 * i + 3], ba[3 * i : 3 * i + 3], *HEADS)

    got = [torch.cat(parts) for parts in zip(*DataLoader(Rows(), batch_size=None, num_workers=2, timeout=60))]
    expected = oracle.split_bits(qkvz, ba, HEADS, "interleaved")
    assert all(torch.equal(oracle.bits(one), other) for one, other in zip(got, expected, strict=True))
