"""Every door, on PyTorch's tensors, held to the oracle bit for bit."""

import pytest

torch = pytest.importorskip("torch")

import oracle
from oracle import Guarded

import gdn

HEADS = [
    (16, 32, 128, 128),
    (16, 48, 128, 128),
    (1, 1, 1, 1),
    (2, 2, 16, 8),
    (2, 4, 8, 16),
    (3, 9, 7, 5),
    (4, 20, 24, 40),
    (2, 16, 3, 33),
    (5, 5, 96, 100),
]
PACKINGS = ["interleaved", "contiguous"]
NAMES = [
    "bool",
    "uint8",
    "int8",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    "int16",
    "uint16",
    "float16",
    "bfloat16",
    "int32",
    "uint32",
    "float32",
    "complex32",
    "int64",
    "uint64",
    "float64",
    "complex64",
]
DTYPES = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]
DROP_INS = {
    "interleaved": gdn.fused_qkvzba_split_reshape_cat,
    "contiguous": gdn.fused_qkvzba_split_reshape_cat_contiguous,
}


def empty_parts(qkvz, ba, heads, how=None):
    wide = oracle.features(heads)
    shapes = dict(mixed_qkv=(wide["mixed_qkv"],), z=(heads[1], heads[3]), b=(wide["b"],), a=(wide["a"],))
    return {
        name: Guarded.make(
            (qkvz.shape[0], *shape),
            qkvz.dtype if name in ("mixed_qkv", "z") else ba.dtype,
            str(qkvz.device),
            *how or (),
        )
        for name, shape in shapes.items()
    }


def empty_packed(qkv, b, heads, how=None):
    wide = oracle.features(heads)
    return {
        name: Guarded.make((qkv.shape[0], wide[name]), like.dtype, str(qkv.device), *how or ())
        for name, like in dict(mixed_qkvz=qkv, mixed_ba=b).items()
    }


def written(out, call):
    views = tuple(guarded.view for guarded in out.values())
    got = call(views)
    assert all(guarded.is_whole() for guarded in out.values())
    return got


def split_out(qkvz, ba, heads, packing, how=None):
    def call(views):
        got = gdn.split(qkvz, ba, *heads, packing, out=views)
        assert type(got) is tuple and all(one is other for one, other in zip(got, views, strict=True))
        return got

    return written(empty_parts(qkvz, ba, heads, how), call)


def split_op_out(qkvz, ba, heads, packing, how=None):
    def call(views):
        named = dict(zip(["mixed_qkv", "z", "b", "a"], views, strict=True))
        assert torch.ops.gdn.split.out(qkvz, ba, *heads, packing, **named) is None
        return views

    return written(empty_parts(qkvz, ba, heads, how), call)


SPLITS = {
    "split": lambda qkvz, ba, heads, packing: gdn.split(qkvz, ba, *heads, packing),
    "split, out": split_out,
    "operator": lambda qkvz, ba, heads, packing: torch.ops.gdn.split(qkvz, ba, *heads, packing),
    "operator.out": split_op_out,
    "drop-in": lambda qkvz, ba, heads, packing: DROP_INS[packing](qkvz, ba, *heads),
}


def merge_out(parts, heads, packing, how=None):
    def call(views):
        got = gdn.merge(*parts, *heads, packing, out=views)
        assert type(got) is tuple and all(one is other for one, other in zip(got, views, strict=True))
        return got

    return written(empty_packed(parts[0], parts[2], heads, how), call)


def merge_op_out(parts, heads, packing, how=None):
    def call(views):
        named = dict(zip(["mixed_qkvz", "mixed_ba"], views, strict=True))
        assert torch.ops.gdn.merge.out(*parts, *heads, packing, **named) is None
        return views

    return written(empty_packed(parts[0], parts[2], heads, how), call)


MERGES = {
    "merge": lambda parts, heads, packing: gdn.merge(*parts, *heads, packing),
    "merge, out": merge_out,
    "operator": lambda parts, heads, packing: torch.ops.gdn.merge(*parts, *heads, packing),
    "operator.out": merge_op_out,
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("door", SPLITS)
def test_split(door, heads, packing, device):
    for n in (0, 1, 3, 65):
        qkvz, ba = oracle.packed(n, heads, torch.bfloat16, device=device)
        expected = oracle.split_bits(qkvz, ba, heads, packing)
        before = oracle.bits(qkvz).clone()
        oracle.same(SPLITS[door](qkvz, ba, heads, packing), expected)
        assert torch.equal(oracle.bits(qkvz), before)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("door", MERGES)
def test_merge(door, heads, packing, device):
    for n in (0, 1, 3, 65):
        qkvz, ba = oracle.packed(n, heads, torch.bfloat16, device=device)
        parts = [part.view(torch.bfloat16) for part in oracle.split_bits(qkvz, ba, heads, packing)]
        expected = [oracle.bits(qkvz), oracle.bits(ba)]
        oracle.same(MERGES[door](parts, heads, packing), expected)
        parts[1] = parts[1].flatten(1)
        oracle.same(MERGES[door](parts, heads, packing), expected)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_through_every_door(dtype, packing, device):
    heads = (3, 9, 7, 5)
    qkvz, ba = oracle.packed(11, heads, dtype, device=device)
    expected = oracle.split_bits(qkvz, ba, heads, packing)
    parts = None
    for door in SPLITS:
        parts = SPLITS[door](qkvz, ba, heads, packing)
        assert all(part.dtype == dtype and part.device == qkvz.device for part in parts)
        oracle.same(parts, expected)
    for door in MERGES:
        merged = MERGES[door](parts, heads, packing)
        assert all(part.dtype == dtype for part in merged)
        oracle.same(merged, [oracle.bits(qkvz), oracle.bits(ba)])


@pytest.mark.parametrize("door", SPLITS)
@pytest.mark.parametrize("ba_dtype", [torch.float32, torch.uint8, torch.int64, torch.float8_e5m2], ids=str)
def test_ba_of_another_dtype(ba_dtype, door, device):
    heads = (2, 6, 16, 24)
    qkvz, ba = oracle.packed(9, heads, torch.bfloat16, ba_dtype, device)
    got = SPLITS[door](qkvz, ba, heads, "interleaved")
    assert [part.dtype for part in got] == [torch.bfloat16] * 2 + [ba_dtype] * 2
    oracle.same(got, oracle.split_bits(qkvz, ba, heads, "interleaved"))
    packed = gdn.merge(*got, *heads)
    assert [part.dtype for part in packed] == [torch.bfloat16, ba_dtype]
    oracle.same(packed, [oracle.bits(qkvz), oracle.bits(ba)])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [(3, 9, 7, 5), (4, 8, 32, 64)], ids=str)
def test_rows_of_wider_buffers(heads, dtype, packing, device):
    """Slices at odd offsets, read and written; what lies between the rows stays."""
    for n in (1, 2, 67):
        for gap, offset in [(0, 1), (1, 0), (5, 3), (64, 32)]:
            qkvz, ba = oracle.packed(n, heads, dtype, device=device)
            expected = oracle.split_bits(qkvz, ba, heads, packing)
            wide_qkvz, wide_ba = Guarded.holding(qkvz, gap, offset), Guarded.holding(ba, gap, offset)
            for door in ("split", "operator", "drop-in"):
                oracle.same(SPLITS[door](wide_qkvz.view, wide_ba.view, heads, packing), expected)
            for door in (split_out, split_op_out):
                got = door(wide_qkvz.view, wide_ba.view, heads, packing, (gap, offset))
                for one, other in zip(got, expected, strict=True):
                    assert torch.equal(oracle.bits(one), other)
                for door in (merge_out, merge_op_out):
                    back = door(got, heads, packing, (gap, offset))
                    assert torch.equal(oracle.bits(back[0]), oracle.bits(qkvz))
                    assert torch.equal(oracle.bits(back[1]), oracle.bits(ba))


def test_columns_of_one_buffer(device):
    """Inputs side by side in one row, as one GEMM makes them; outputs side by side in another."""
    heads, n = (2, 4, 8, 16), 33
    wide = oracle.features(heads)
    both = oracle.anything((n, wide["mixed_qkvz"] + wide["mixed_ba"]), torch.float16, device)
    qkvz, ba = both.split([wide["mixed_qkvz"], wide["mixed_ba"]], 1)
    expected = oracle.split_bits(qkvz, ba, heads, "interleaved")
    out = torch.full_like(both, torch.nan)
    qkv, z, b, a = out.split([wide[name] for name in ("mixed_qkv", "z", "b", "a")], 1)
    gdn.split(qkvz, ba, *heads, out=(qkv, z, b, a))
    flat = torch.cat([part.flatten(1) for part in expected], 1)
    assert torch.equal(oracle.bits(out), flat)


def test_one_row_many_times_is_refused(device):
    """Rows that lie over each other: a row stride of zero, as of an expanded row. One row has no stride."""
    heads = (2, 4, 8, 16)
    qkvz, ba = oracle.packed(1, heads, torch.float32, device=device)
    expected = oracle.split_bits(qkvz, ba, heads, "interleaved")
    for door in (gdn.split, torch.ops.gdn.split):
        oracle.same(door(qkvz.as_strided(qkvz.shape, (0, 1)), ba, *heads), expected)
        with pytest.raises(
            (ValueError, RuntimeError), match="mixed_qkvz: row_stride = 0 is shorter than a row of 160"
        ):
            door(qkvz.expand(7, -1), ba.repeat(7, 1), *heads)


@pytest.mark.parametrize("door", SPLITS)
def test_lazy_conjugates(door, device):
    heads = (2, 4, 3, 5)
    qkvz, ba = oracle.packed(5, heads, torch.complex64, device=device)
    qkvz = torch.nan_to_num(qkvz).conj()
    assert qkvz.is_conj()
    expected = oracle.split_bits(qkvz, ba, heads, "interleaved")
    got = SPLITS[door](qkvz, ba, heads, "interleaved")
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(oracle.bits(one), other)


@pytest.mark.parametrize("door", SPLITS)
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64], ids=str)
def test_lazy_negatives(door, dtype, device):
    """The imaginary part of a conjugate is a view that PyTorch negates when it looks."""
    heads = (2, 4, 3, 5)
    wide = oracle.features(heads)
    real = torch.float16 if dtype == torch.complex32 else torch.float32
    pairs = torch.arange(5 * wide["mixed_qkvz"] * 2, device=device).reshape(5, -1).to(real).view(dtype)
    qkvz = pairs.conj().imag
    ba = torch.ones(5, wide["mixed_ba"], dtype=real, device=device)
    assert qkvz.is_neg() and qkvz.stride(1) == 2
    with pytest.raises((ValueError, RuntimeError), match="mixed_qkvz has stride 2 in dim 1, expected 1"):
        if not qkvz.is_conj():
            gdn.split(torch._neg_view(qkvz), ba, *heads)
    dense = torch._neg_view(oracle.anything((5, wide["mixed_qkvz"]), torch.int16, device).to(real))
    assert dense.is_neg()
    expected = oracle.split_bits(dense, ba, heads, "interleaved")
    got = SPLITS[door](dense, ba, heads, "interleaved")
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(oracle.bits(one), other)


@pytest.mark.parametrize("door", ["split, out", "operator.out"])
def test_written_through_lazy_views(door):
    """An out that PyTorch negates or conjugates when it looks reads as what was split, or is refused whole."""
    heads = (1, 1, 3, 5)
    for dtype, lazy in [(torch.float32, torch._neg_view), (torch.complex64, torch.conj)]:
        qkvz, ba = torch.randn(2, 16, dtype=dtype), torch.randn(2, 2, dtype=dtype)
        parts = oracle.split(qkvz, ba, *heads, "interleaved")
        out = [torch.zeros_like(part) for part in parts]
        views = [lazy(one) for one in out]
        try:
            if door == "split, out":
                gdn.split(qkvz, ba, *heads, out=tuple(views))
            else:
                torch.ops.gdn.split.out(qkvz, ba, *heads, **dict(zip(["mixed_qkv", "z", "b", "a"], views)))
        except (TypeError, ValueError, RuntimeError):
            assert all((one == 0).all() for one in out)
        else:
            assert all(torch.equal(one, other) for one, other in zip(views, parts, strict=True))


def test_numbers_as_keywords(device):
    heads = dict(num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=16)
    qkvz, ba = oracle.packed(3, tuple(heads.values()), torch.float32, device=device)
    expected = oracle.split_bits(qkvz, ba, tuple(heads.values()), "contiguous")
    for split in (gdn.split, torch.ops.gdn.split):
        got = split(mixed_ba=ba, mixed_qkvz=qkvz, packing="contiguous", **heads)
        oracle.same(got, expected)
        names = dict(zip(["mixed_qkv", "z", "b", "a"], got, strict=True))
        merge = gdn.merge if split is gdn.split else torch.ops.gdn.merge
        oracle.same(merge(**names, packing="contiguous", **heads), [oracle.bits(qkvz), oracle.bits(ba)])
    qkvz, ba = oracle.packed(3, (2, 4, 8, 16), torch.float32, device=device)
    old = dict(num_heads_qk=2, num_heads_v=4, head_qk=8, head_v=16)
    for packing, drop_in in DROP_INS.items():
        oracle.same(
            drop_in(mixed_qkvz=qkvz, mixed_ba=ba, **old), oracle.split_bits(qkvz, ba, (2, 4, 8, 16), packing)
        )


def test_heads_as_a_preset_has_them(device):
    heads, packing = gdn.preset("Qwen/Qwen3-Next-80B-A3B-Instruct")
    assert heads == (16, 32, 128, 128) and packing == "interleaved"
    qkvz, ba = oracle.packed(2, heads, torch.bfloat16, device=device)
    oracle.same(gdn.split(qkvz, ba, *heads, packing), oracle.split_bits(qkvz, ba, heads, packing))
    with pytest.raises(ValueError, match="no preset is named 'nobody/nothing'; known: "):
        gdn.preset("nobody/nothing")


def test_a_large_split_on_several_threads(device):
    """Above what one thread does by itself, and past the caches."""
    heads = (16, 32, 128, 128)
    before = torch.get_num_threads()
    qkvz, ba = oracle.packed(700, heads, torch.bfloat16, device=device)
    expected = oracle.split_bits(qkvz, ba, heads, "interleaved")
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for door in SPLITS:
                got = SPLITS[door](qkvz, ba, heads, "interleaved")
                oracle.same(got, expected)
            for door in MERGES:
                oracle.same(MERGES[door](got, heads, "interleaved"), [oracle.bits(qkvz), oracle.bits(ba)])
    finally:
        torch.set_num_threads(before)


class Named(torch.Tensor):
    """A subclass, which may have a mind of its own."""


@pytest.mark.parametrize("subclass", ["parameter", "view", "subclass", "pinned"])
def test_other_kinds_of_tensors(subclass, device):
    heads = (2, 4, 8, 16)
    qkvz, ba = oracle.packed(3, heads, torch.float32, device=device)
    if subclass == "pinned" and not torch.cuda.is_available():
        pytest.skip("memory is pinned for a GPU, and there is none")
    kinds = {
        "parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
        "view": lambda tensor: tensor.view(1, *tensor.shape)[0],
        "subclass": lambda tensor: tensor.as_subclass(Named),
        "pinned": lambda tensor: tensor.cpu().pin_memory(),
    }
    expected = oracle.split_bits(qkvz, ba, heads, "interleaved")
    got = gdn.split(kinds[subclass](qkvz), kinds[subclass](ba), *heads)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(oracle.bits(one.as_subclass(torch.Tensor)).to(device), other)


def test_tiling_is_the_planner_s():
    plan = gdn.tiling(1000, 49280, 40)
    assert plan == gdn.Tiling(grid=40, rows_per_core=25, rows_per_iter=plan.rows_per_iter)
    assert plan.rows_per_iter & (plan.rows_per_iter - 1) == 0
    with pytest.raises(ValueError, match="rows is -1, it must be at least 0"):
        gdn.tiling(-1, 49280, 40)


def test_elements_of_sixteen_bytes(device):
    """Wider elements than are promised go through as they are, or not at all."""
    heads = (2, 4, 8, 16)
    qkvz = torch.randn(3, 160, dtype=torch.complex128, device=device)
    ba = torch.randn(3, 8, dtype=torch.complex128, device=device)
    try:
        got = gdn.split(qkvz, ba, *heads)
    except (ValueError, RuntimeError) as error:
        assert "16" in str(error)
    else:
        assert all(map(torch.equal, got, oracle.split(qkvz, ba, *heads, "interleaved")))
