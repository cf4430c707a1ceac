"""NumPy's arrays through `gdn.split` and `gdn.merge`, held to lists of indices."""

import numpy as np
import oracle_numpy as oracle
import pytest

import gdn

HEADS = [(1, 1, 1, 1), (2, 2, 16, 8), (2, 4, 8, 16), (3, 9, 7, 5), (2, 10, 3, 33), (1, 8, 24, 24)]
PACKINGS = ["interleaved", "contiguous"]
NAMES = "bool int8 uint8 int16 uint16 float16 int32 uint32 float32 int64 uint64 float64 complex64".split()
POISON = 0xAB


def shapes(n, heads):
    hk, hv, dk, dv = heads
    return [(n, 2 * hk * dk + hv * dv), (n, hv, dv), (n, hv), (n, hv)]


def lying(shape, dtype, gap=0, offset=0):
    """Rows `gap` bytes apart that begin `offset` bytes into a buffer of poison, and the buffer."""
    dtype = np.dtype(dtype)
    row = int(np.prod(shape[1:])) * dtype.itemsize
    buffer = np.full(offset + shape[0] * (row + gap) + 64, POISON, np.uint8)
    inner = np.zeros(shape[1:], dtype).strides
    return np.ndarray(shape, dtype, buffer, offset, (row + gap, *inner)), buffer


def outs(n, heads, dtype, ba_dtype=None, gap=0, offset=0):
    kinds = [dtype, dtype, ba_dtype or dtype, ba_dtype or dtype]
    return [lying(shape, kind, gap, offset) for shape, kind in zip(shapes(n, heads), kinds)]


def whole(view, buffer):
    """Whether what is not the view's is poison still."""
    copy = buffer.copy()
    np.ndarray(view.shape, view.dtype, copy, view.ctypes.data - buffer.ctypes.data, view.strides).view()[
        ...
    ] = 0
    touched = np.zeros_like(buffer)
    row = int(np.prod(view.shape[1:])) * view.itemsize
    start = view.ctypes.data - buffer.ctypes.data
    for n in range(view.shape[0]):
        touched[start + n * view.strides[0] :][:row] = 1
    return bool((buffer[touched == 0] == POISON).all())


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 3, 70])
def test_both_ways(n, heads, packing):
    qkvz, ba = oracle.packed(n, heads, "f4", "u2")
    parts = gdn.split(qkvz, ba, *heads, packing)
    oracle.same(parts, oracle.split(qkvz, ba, heads, packing))
    assert all(
        type(part) is np.ndarray and part.flags.c_contiguous and part.flags.writeable for part in parts
    )
    oracle.same(gdn.merge(*parts, *heads, packing), [qkvz, ba])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", NAMES)
def test_every_dtype(name, packing):
    heads = (3, 9, 7, 5)
    qkvz, ba = oracle.packed(11, heads, name)
    parts = gdn.split(qkvz, ba, *heads, packing)
    oracle.same(parts, oracle.split(qkvz, ba, heads, packing))
    oracle.same(gdn.merge(*parts, *heads, packing), [qkvz, ba])


@pytest.mark.parametrize(
    "name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e3m4"]
)
def test_dtypes_of_ml_dtypes(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    heads = (2, 4, 8, 16)
    qkvz, ba = oracle.packed(5, heads, getattr(ml_dtypes, name))
    parts = gdn.split(qkvz, ba, *heads)
    oracle.same(parts, oracle.split(qkvz, ba, heads, "interleaved"))
    oracle.same(gdn.merge(*parts, *heads), [qkvz, ba])


@pytest.mark.parametrize("gap, offset", [(0, 0), (0, 1), (3, 1), (64, 7), (4, 4), (1, 0)])
@pytest.mark.parametrize("dtype", ["i1", "f2", "f4", "f8"])
def test_any_address(dtype, gap, offset):
    """Bytes, not elements, apart. A row stride must be whole elements, an address need not."""
    heads, n = (2, 6, 7, 5), 9
    qkvz, ba = oracle.packed(n, heads, dtype)
    expected = oracle.split(qkvz, ba, heads, "interleaved")
    moved = []
    for array in (qkvz, ba):
        view, _ = lying(array.shape, dtype, gap, offset)
        view.view(f"V{view.itemsize}")[...] = array.view(f"V{array.itemsize}")
        moved.append(view)
    written = outs(n, heads, dtype, None, gap, offset)
    views = tuple(view for view, _ in written)
    if gap % np.dtype(dtype).itemsize:
        with pytest.raises(ValueError, match="stride of \\d+ bytes in dim 0, expected a multiple of its"):
            gdn.split(*moved, *heads)
        with pytest.raises(ValueError, match="stride of \\d+ bytes in dim 0, expected a multiple of its"):
            gdn.split(qkvz, ba, *heads, out=views)
        assert all((buffer == POISON).all() for _, buffer in written)
        return
    oracle.same(gdn.split(*moved, *heads), expected)
    got = gdn.split(*moved, *heads, out=views)
    assert all(one is other for one, other in zip(got, views, strict=True))
    oracle.same(got, expected)
    assert all(whole(*one) for one in written)
    back = [lying(array.shape, dtype, gap, offset) for array in (qkvz, ba)]
    oracle.same(gdn.merge(*views, *heads, out=tuple(view for view, _ in back)), [qkvz, ba])
    assert all(whole(*one) for one in back)


def test_read_only():
    heads = (2, 4, 8, 16)
    qkvz, ba = oracle.packed(4, heads, "f4")
    expected = oracle.split(qkvz, ba, heads, "interleaved")
    for array in (qkvz, ba):
        array.flags.writeable = False
    oracle.same(gdn.split(qkvz, ba, *heads), expected)
    for i, name in enumerate(["mixed_qkv", "z", "b", "a"]):
        written = outs(4, heads, "f4")
        views = [view for view, _ in written]
        views[i].flags.writeable = False
        with pytest.raises(ValueError, match=f"{name} is read-only, it is to be written"):
            gdn.split(qkvz, ba, *heads, out=tuple(views))
        assert all((buffer == POISON).all() for _, buffer in written)


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">i8", ">u2"])
def test_byte_order_is_kept(dtype):
    heads = (2, 4, 8, 16)
    qkvz, ba = oracle.packed(4, heads, dtype)
    oracle.same(gdn.split(qkvz, ba, *heads), oracle.split(qkvz, ba, heads, "interleaved"))
    other = np.dtype(dtype).newbyteorder()
    written = outs(4, heads, dtype)
    views = [view for view, _ in written]
    views[1] = views[1].view(other)
    with pytest.raises(TypeError, match="z has dtype .*, mixed_qkvz has "):
        gdn.split(qkvz, ba, *heads, out=tuple(views))
    assert all((buffer == POISON).all() for _, buffer in written)


@pytest.mark.parametrize(
    "dtype", [np.dtype("i2,u1,f4"), np.dtype("V3"), np.dtype("S5"), np.dtype("U2"), np.dtype("M8[s]")]
)
def test_structures_and_texts_are_bytes(dtype):
    heads = (1, 2, 3, 5)
    qkvz, ba = oracle.packed(4, heads, "u1")
    wide = np.repeat(qkvz, dtype.itemsize, 1).view(dtype)
    narrow = np.repeat(ba, dtype.itemsize, 1).view(dtype)
    got = gdn.split(wide, narrow, *heads)
    oracle.same(got, oracle.split(wide, narrow, heads, "interleaved"))


@pytest.mark.parametrize(
    "dtype", [object, np.dtype([("a", "i4"), ("b", "O")]), np.dtype("V32"), np.dtype("V0")]
)
def test_dtypes_that_are_refused(dtype):
    heads = (1, 2, 3, 5)
    qkvz = np.empty((4, 26), dtype)
    ba = np.empty((4, 4), "f4")
    with pytest.raises(
        TypeError, match="mixed_qkvz has dtype .*, expected plain numbers of at most 31 bytes"
    ):
        gdn.split(qkvz, ba, *heads)


def test_shapes_and_strides_that_are_refused():
    heads = (2, 4, 8, 16)
    qkvz, ba = oracle.packed(4, heads, "f4")
    for wrong, message in [
        (qkvz[:, ::-1], "mixed_qkvz has stride -1 in dim 1, expected 1"),
        (np.asfortranarray(qkvz), "mixed_qkvz has stride 4 in dim 1, expected 1"),
        (qkvz[::-1], "mixed_qkvz has .*row stride -160, expected"),
        (qkvz[0], "mixed_qkvz has shape \\[160\\], expected \\[N, features\\]"),
        (qkvz[None, None], "mixed_qkvz has shape \\[1, 1, 4, 160\\], expected \\[N, features\\]"),
        (qkvz[None, None, None, None], "mixed_qkvz has 6 dims, expected at most 5"),
        (np.float32(3), "mixed_qkvz has shape \\[\\], expected"),
        (qkvz[:3], "mixed_ba has 4 rows, mixed_qkvz has 3"),
        (qkvz[:, :-1], "mixed_qkvz has 159 features, .* need 160"),
        (np.broadcast_to(qkvz[:1], qkvz.shape), "mixed_qkvz: row_stride = 0 is shorter than a row of 160"),
    ]:
        with pytest.raises(ValueError, match=message):
            gdn.split(wrong, ba, *heads)
    for wrong in (None, 3, "rows", [[1.0] * 160] * 4, memoryview(b"1234"), np.ndarray):
        with pytest.raises(TypeError, match="mixed_qkvz"):
            gdn.split(wrong, ba, *heads)


def test_overlaps_are_refused():
    heads = (2, 4, 8, 16)
    qkvz, ba = oracle.packed(4, heads, "f4")
    before = qkvz.copy()
    views = [view for view, _ in outs(4, heads, "f4")]
    views[0] = qkvz[:, :96]
    with pytest.raises(ValueError, match="overlaps"):
        gdn.split(qkvz, ba, *heads, out=tuple(views))
    assert qkvz.tobytes() == before.tobytes()


@pytest.mark.parametrize("kind", ["subclass", "memmap", "matrix"])
def test_kinds_of_arrays(kind, tmp_path):
    heads = (2, 4, 8, 16)
    qkvz, ba = oracle.packed(4, heads, "f4")
    expected = oracle.split(qkvz, ba, heads, "interleaved")
    if kind == "memmap":
        made = np.memmap(tmp_path / "rows", "f4", "w+", shape=qkvz.shape)
        made[...] = qkvz
    else:
        subclass = type("Named", (np.ndarray,), {})
        kinds = dict(subclass=subclass, matrix=np.matrix)
        made = qkvz.view(kinds[kind])
    oracle.same(gdn.split(made, ba, *heads), expected)


def test_large_arrays_on_several_threads():
    heads = (16, 32, 128, 128)
    qkvz, ba = oracle.packed(700, heads, "u2")
    for packing in PACKINGS:
        parts = gdn.split(qkvz, ba, *heads, packing)
        oracle.same(parts, oracle.split(qkvz, ba, heads, packing))
        oracle.same(gdn.merge(*parts, *heads, packing), [qkvz, ba])


def test_drop_ins():
    heads = (2, 4, 8, 16)
    qkvz, ba = oracle.packed(5, heads, "f2")
    interleaved, contiguous = (oracle.split(qkvz, ba, heads, packing) for packing in PACKINGS)
    oracle.same(gdn.fused_qkvzba_split_reshape_cat(qkvz, ba, *heads), interleaved)
    oracle.same(gdn.fused_qkvzba_split_reshape_cat_contiguous(qkvz, ba, *heads), contiguous)


def test_masks_are_not_lost():
    """Masked arrays are refused as inputs and outputs, whatever their masks are."""
    heads = (2, 4, 8, 16)
    qkvz, ba = oracle.packed(4, heads, "f4")
    out = [view for view, _ in outs(4, heads, "f4")]
    for mask in (np.ma.nomask, True):
        masked = np.ma.MaskedArray(qkvz, mask=mask), np.ma.MaskedArray(out[1], mask=mask)
        sentence = "is a numpy.ma.*MaskedArray, whose mask would be lost: give its data"
        with pytest.raises(TypeError, match=f"mixed_qkvz {sentence}"):
            gdn.split(masked[0], ba, *heads)
        with pytest.raises(TypeError, match=f"z {sentence}"):
            gdn.split(qkvz, ba, *heads, out=(out[0], masked[1], *out[2:]))
        with pytest.raises(TypeError, match=f"weight {sentence}"):
            gdn.repack_weight(masked[0].T, heads)
    oracle.same(gdn.split(masked[0].data, ba, *heads), oracle.split(qkvz, ba, heads, "interleaved"))


def test_wrong_heads_are_not_memory_errors():
    """Inputs are checked before outputs are made."""
    qkvz, ba = oracle.packed(4, (2, 4, 8, 16), "f4")
    for heads in [(1, 1, 2**40, 2**40), (1, 1, 1, 2**55), (2**30, 2**30, 1, 1)]:
        with pytest.raises(ValueError, match="mixed_qkvz has 160 features, .* need \\d+"):
            gdn.split(qkvz, ba, *heads)
        with pytest.raises(ValueError, match="(mixed_qkv has 160 features|z has shape)"):
            gdn.merge(qkvz, ba, ba, ba, *heads)


def test_numpy_and_pytorch_are_not_mixed():
    torch = pytest.importorskip("torch")
    heads = (2, 4, 8, 16)
    qkvz, ba = oracle.packed(4, heads, "f4")
    with pytest.raises(TypeError, match="mixed_ba is a torch.Tensor, mixed_qkvz is a numpy.ndarray"):
        gdn.split(qkvz, torch.from_numpy(ba), *heads)
    out = [torch.from_numpy(view) for view, _ in outs(4, heads, "f4")]
    with pytest.raises(TypeError, match="mixed_qkv is a torch.Tensor, mixed_qkvz is a numpy.ndarray"):
        gdn.split(qkvz, ba, *heads, out=tuple(out))
