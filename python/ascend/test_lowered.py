"""What triton-ascend makes of the kernel: few block copies, buffers that fit, one size, the right bits.

Runs in an environment of its own, with triton-ascend for Triton and no torch: `cargo xtask ascend`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from execution import build
from lowering import blocks_of, facts, lower_case

from gdn import tiling, triton_split
from gdn.triton_check import POISON, Case, conformance, packed_features

TABLE = conformance()
WORDS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
BUDGET = 85 * 1024
MODELS = [
    Case(heads, packing, 4096)
    for heads in (
        (16, 32, 128, 128),
        (8, 16, 128, 128),
        (4, 8, 128, 128),
        (2, 4, 128, 128),
        (16, 48, 128, 128),
    )
    for packing in triton_split.PACKINGS
]
DIRECTIONS = pytest.mark.parametrize("merge", [False, True], ids=["split", "merge"])


@DIRECTIONS
@pytest.mark.parametrize("case", TABLE + MODELS, ids=str)
def test_block_copies_and_buffers(case: Case, merge: bool) -> None:
    seen = facts(lower_case(case, merge))
    assert seen.gathers == []
    # One copy in and one out for each kind: q, k, v, z, b, a, or qkv, z, b, a.
    assert seen.copies == (12 if case.packing == "interleaved" else 8)
    assert seen.loops == 1
    # Twice the buffers, as the back end has two of each for copies to overlap, and a row's share as the
    # planner counts it.
    cut = blocks_of(case)
    assert 2 * seen.buffer_bytes == cut.rows * cut.row_bytes <= case.buffer_bytes


@DIRECTIONS
@pytest.mark.parametrize("packing", triton_split.PACKINGS)
def test_the_size_is_constant_from_1_to_64_heads(packing: str, merge: bool) -> None:
    seen = {
        hk: facts(lower_case(Case((hk, 2 * hk, 128, 128), packing, 1), merge))
        for hk in (1, 2, 4, 8, 16, 32, 64)
    }
    assert len({(f.copies, f.loops) for f in seen.values()}) == 1
    sizes = [f.operations for f in seen.values()]
    # Nothing is written twice for a second head: what differs is arithmetic on constants, such as a product
    # with 1.
    assert max(sizes) - min(sizes) <= 8, sizes


def empty(case: Case, name: str) -> np.ndarray:
    """`[rows, features]` of a tensor of the case, its rows apart and all of it poison."""
    dtype = WORDS[case.sizes[name in ("mixed_ba", "b", "a")]]
    features = int(np.prod(case.tails()[triton_split.NAMES.index(name)]))
    stride, size = features + case.apart, np.dtype(dtype).itemsize
    whole = np.empty(max(case.rows, 1) * stride, dtype)
    if case.apart < 1 << 20:
        whole.view(np.uint8)[:] = POISON
    rows = np.lib.stride_tricks.as_strided(whole, (case.rows, stride), (stride * size, size))
    rows[:, :features].view(np.uint8)[:] = POISON
    return rows[:, :features]


def run(case: Case, merge: bool, tensors: dict[str, np.ndarray], folder: Path) -> None:
    cut = blocks_of(case)
    plan = tiling(case.rows, cut.row_bytes, case.cores, case.buffer_bytes, case.max_rows_per_iter)
    program = build(lower_case(case, merge), folder)
    six = [tensors[name] for name in triton_split.NAMES]
    numbers = [(t.strides[0] // t.itemsize, "i64") for t in six]
    numbers += [(case.rows, "i64"), (plan.rows_per_core, "i64"), (cut.pieces, "i32")]
    program(plan.grid, [t.ctypes.data for t in six], numbers)


def gap(rows: np.ndarray, apart: int) -> np.ndarray:
    """The bytes between the rows."""
    if not 0 < apart < 1 << 20:
        return np.empty(0, np.uint8)
    size, features = rows.itemsize, rows.shape[1]
    between = np.lib.stride_tricks.as_strided(
        rows[:, -1:], (rows.shape[0], apart + 1), (rows.strides[0], size)
    )
    assert rows.strides[0] == (features + apart) * size
    return np.ascontiguousarray(between[:, 1:]).view(np.uint8)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_bit_for_bit(case: Case, tmp_path: Path) -> None:
    tensors = {name: empty(case, name) for name in triton_split.NAMES}
    random = np.random.default_rng(7)
    for name in ("mixed_qkvz", "mixed_ba"):
        rows = tensors[name]
        info = np.iinfo(rows.dtype)
        rows[:] = random.integers(info.min // 2, info.max // 2, rows.shape, rows.dtype)
    run(case, False, tensors, tmp_path)
    for packed, features in zip(("mixed_qkvz", "mixed_ba"), packed_features(case)):
        for name in dict.fromkeys(name for name, _ in features):
            places = [(i, at) for i, (of, at) in enumerate(features) if of == name]
            source, target = (list(index) for index in zip(*places))
            assert sorted(target) == list(range(tensors[name].shape[1]))
            assert np.array_equal(tensors[name][:, target], tensors[packed][:, source]), name
    back = {name: empty(case, name) for name in ("mixed_qkvz", "mixed_ba")}
    run(case, True, tensors | back, tmp_path)
    for name, rows in back.items():
        assert np.array_equal(rows, tensors[name]), name
    for rows in (*tensors.values(), *back.values()):
        assert (gap(rows, case.apart) == POISON).all()


def test_a_wrong_program_is_noticed(tmp_path: Path) -> None:
    """The comparison can fail: a program of other heads gives other bits."""
    case = Case((4, 8, 16, 16), "interleaved", 5)
    other = Case((2, 4, 32, 32), "interleaved", 5)
    tensors = {name: empty(case, name) for name in triton_split.NAMES}
    tensors["mixed_qkvz"][:] = np.arange(tensors["mixed_qkvz"].size).reshape(5, -1)
    tensors["mixed_ba"][:] = np.arange(tensors["mixed_ba"].size).reshape(5, -1)
    run(case, False, tensors, tmp_path)
    right = tensors["mixed_qkv"].copy()
    run(other, False, tensors | {"b": empty(case, "b"), "a": empty(case, "a")}, tmp_path)
    assert not np.array_equal(tensors["mixed_qkv"], right)
