"""Any heads, rows, strides, dtypes and doors, as hypothesis thinks of them."""

import pytest

torch = pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")

import oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Guarded
from test_split import DTYPES, MERGES, SPLITS, merge_op_out, merge_out, split_op_out, split_out

HEADS = st.tuples(
    st.integers(1, 5), st.sampled_from([1, 2, 3, 5, 8]), st.integers(1, 70), st.integers(1, 70)
).map(lambda heads: (heads[0], heads[0] * heads[1], *heads[2:]))
ROWS = st.one_of(st.sampled_from([0, 1, 2, 3]), st.integers(4, 130))
LYING = st.tuples(st.integers(0, 70), st.integers(0, 33))
PACKING = st.sampled_from(["interleaved", "contiguous"])
DTYPE = st.sampled_from(DTYPES)
EACH = settings(max_examples=120, deadline=None, derandomize=True)
INPUTS = {"n": ROWS, "heads": HEADS, "packing": PACKING, "dtype": DTYPE, "ba_dtype": DTYPE, "lying": LYING}


@EACH
@given(**INPUTS, door=st.sampled_from([*SPLITS]))
def test_split(n, heads, packing, dtype, ba_dtype, lying, door):
    qkvz, ba = oracle.packed(n, heads, dtype, ba_dtype)
    views = [Guarded.holding(one, *lying).view for one in (qkvz, ba)]
    oracle.same(SPLITS[door](*views, heads, packing), oracle.split_bits(qkvz, ba, heads, packing))


@EACH
@given(**INPUTS, out=LYING, operator=st.booleans())
def test_strided_outputs_and_back(n, heads, packing, dtype, ba_dtype, lying, out, operator):
    qkvz, ba = oracle.packed(n, heads, dtype, ba_dtype)
    views = [Guarded.holding(one, *lying).view for one in (qkvz, ba)]
    split, merge = (split_op_out, merge_op_out) if operator else (split_out, merge_out)
    parts = split(*views, heads, packing, out)
    for one, other in zip(parts, oracle.split_bits(qkvz, ba, heads, packing), strict=True):
        assert torch.equal(oracle.bits(one), other)
    for one, other in zip(merge(parts, heads, packing, lying), (qkvz, ba), strict=True):
        assert torch.equal(oracle.bits(one), oracle.bits(other))


@EACH
@given(n=ROWS, heads=HEADS, packing=PACKING, dtype=DTYPE, door=st.sampled_from([*MERGES]))
def test_merge_undoes_split(n, heads, packing, dtype, door):
    qkvz, ba = oracle.packed(n, heads, dtype)
    parts = [part.view(dtype) for part in oracle.split_bits(qkvz, ba, heads, packing)]
    oracle.same(MERGES[door](parts, heads, packing), [oracle.bits(qkvz), oracle.bits(ba)])
