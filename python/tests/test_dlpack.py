"""Objects that have `__dlpack__` and nothing else, written here; and JAX's arrays."""

import ctypes
import gc

import numpy as np
import oracle_numpy as oracle
import pytest

import gdn

HEADS = (2, 4, 8, 16)
PARTS = [(5, 96), (5, 4, 16), (5, 4), (5, 4)]


class Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("ordinal", ctypes.c_int32)]


class DType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


capsule_of = ctypes.pythonapi.PyCapsule_New
capsule_of.restype = ctypes.py_object
capsule_of.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Producer:
    """An array of NumPy's under DLPack's protocol alone."""

    def __init__(
        self, array, old=False, read_only=False, dense=False, offset=0, device=(1, 0), version=(1, 0), **dtype
    ):
        self.array, self.old, self.device, self.asked = array, old, device, []
        dims = array.ndim
        self.shape = (ctypes.c_int64 * dims)(*array.shape)
        self.strides = (ctypes.c_int64 * dims)(*[stride // array.itemsize for stride in array.strides])
        code = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}[array.dtype.kind]
        tensor = Tensor(
            array.ctypes.data - offset,
            Device(*device),
            dims,
            DType(**(dict(code=code, bits=8 * array.itemsize, lanes=1) | dtype)),
            self.shape,
            None if dense else self.strides,
            offset,
        )
        self.managed = Managed(tensor) if old else Versioned(*version, None, None, int(read_only), tensor)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **how):
        if self.old and "max_version" in how:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.asked.append(how)
        name = b"dltensor" if self.old else b"dltensor_versioned"
        return capsule_of(ctypes.addressof(self.managed), name, None)


def arrays(dtype="f4"):
    return oracle.packed(5, HEADS, dtype)


def outs(dtype="f4", **how):
    made = [np.full(shape, 7, dtype) for shape in PARTS]
    return made, tuple(Producer(one, **how) for one in made)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("dense, offset", [(False, 0), (True, 0), (False, 16), (True, 24)])
def test_a_producer(old, dense, offset):
    qkvz, ba = arrays()
    expected = oracle.split(qkvz, ba, HEADS, "interleaved")
    how = dict(old=old, dense=dense, offset=offset)
    made, out = outs(**how)
    one = Producer(qkvz, **how)
    got = gdn.split(one, Producer(ba, **how), *HEADS, out=out)
    assert all(part is other for part, other in zip(got, out, strict=True))
    oracle.same(tuple(made), expected)
    assert all("stream" not in how or how["stream"] is None for how in one.asked)
    back = [np.zeros_like(qkvz), np.zeros_like(ba)]
    gdn.merge(*out, *HEADS, out=tuple(Producer(one, **how) for one in back))
    oracle.same(tuple(back), [qkvz, ba])


def test_strided_rows():
    qkvz, ba = arrays()
    wide = np.zeros((5, 200), "f4")
    wide[:, 3:163] = qkvz
    made, out = outs()
    gdn.split(Producer(wide[:, 3:163]), Producer(ba), *HEADS, out=out)
    oracle.same(tuple(made), oracle.split(qkvz, ba, HEADS, "interleaved"))


def test_a_producer_that_is_read_only():
    qkvz, ba = arrays()
    made, out = outs()
    gdn.split(Producer(qkvz, read_only=True), Producer(ba, read_only=True), *HEADS, out=out)
    oracle.same(tuple(made), oracle.split(qkvz, ba, HEADS, "interleaved"))
    made, out = outs(read_only=True)
    with pytest.raises(ValueError, match="mixed_qkv is read-only, it is to be written"):
        gdn.split(Producer(qkvz), Producer(ba), *HEADS, out=out)
    assert all((one == 7).all() for one in made)


def test_producers_that_are_refused():
    qkvz, ba = arrays()
    made, out = outs()
    for wrong, error, message in [
        (Producer(qkvz, bits=4), TypeError, "mixed_qkvz has dtype float4, expected whole bytes"),
        (Producer(qkvz, lanes=2), TypeError, "mixed_qkv has dtype float32, mixed_qkvz has float32 x 2"),
        (Producer(qkvz, code=4), TypeError, "mixed_qkv has dtype float32, mixed_qkvz has bfloat32"),
        (Producer(qkvz, version=(2, 0)), TypeError, "mixed_qkvz speaks DLPack 2.0, known is 1"),
        (Producer(qkvz, device=(10, 0)), ValueError, "is on .*10:0"),
        (Producer(qkvz[:, :-1]), ValueError, "mixed_qkvz has 159 features, .* need 160"),
        (Producer(qkvz[None, None]), ValueError, "mixed_qkvz has shape \\[1, 1, 5, 160\\], expected"),
        (Producer(qkvz[None, None, None, None]), ValueError, "mixed_qkvz has 6 dims, expected at most 5"),
    ]:
        with pytest.raises(error, match=message):
            gdn.split(wrong, Producer(ba), *HEADS, out=out)
        assert all((one == 7).all() for one in made)


def test_no_capsule():
    class Liar:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **how):
            return "a capsule"

    class Failing(Liar):
        def __dlpack__(self, **how):
            raise BufferError("not today")

    _, ba = arrays()
    made, out = outs()
    with pytest.raises(TypeError):
        gdn.split(Liar(), Producer(ba), *HEADS, out=out)
    with pytest.raises(BufferError, match="not today"):
        gdn.split(Failing(), Producer(ba), *HEADS, out=out)
    assert all((one == 7).all() for one in made)


def test_no_framework_to_make_outputs():
    qkvz, ba = arrays()
    with pytest.raises(
        TypeError, match="no mixed_qkv can be made like a .*Producer on cpu, give tensors to write to"
    ):
        gdn.split(Producer(qkvz), Producer(ba), *HEADS)


def test_capsules_are_not_consumed():
    """A producer may be asked again and again, and everything it lent is given back."""
    qkvz, ba = arrays()
    made, out = outs()
    before = len(gc.get_objects())
    for _ in range(100):
        one = Producer(qkvz)
        gdn.split(one, Producer(ba), *HEADS, out=out)
        assert len(one.asked) == 1
        for kept in out:
            kept.asked.clear()
    del one
    gc.collect()
    assert len(gc.get_objects()) < before + 100


@pytest.mark.parametrize("packing", ["interleaved", "contiguous"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "bool", "float16"])
@pytest.mark.parametrize("n", [0, 1, 5, 70])
def test_jax(n, name, packing, jax):
    jnp = jax.numpy
    heads = (3, 9, 7, 5)
    qkvz, ba = (jnp.asarray(array) for array in oracle.packed(n, heads, jnp.dtype(name)))
    parts = gdn.split(qkvz, ba, *heads, packing)
    assert all(isinstance(part, jax.Array) and part.dtype == jnp.dtype(name) for part in parts)
    oracle.same(parts, oracle.split(np.asarray(qkvz), np.asarray(ba), heads, packing))
    oracle.same(gdn.merge(*parts, *heads, packing), [np.asarray(qkvz), np.asarray(ba)])


def test_jax_arrays_outlive_what_made_them(jax):
    qkvz, ba = (jax.numpy.asarray(array) for array in arrays("i4"))
    expected = oracle.split(np.asarray(qkvz), np.asarray(ba), HEADS, "interleaved")
    kept = [gdn.split(qkvz, ba, *HEADS) for _ in range(50)]
    gc.collect()
    for parts in kept:
        oracle.same(parts, expected)
    doubled = jax.jit(lambda part: part + part)(kept[0][0])
    assert np.array_equal(np.asarray(doubled), expected[0] + expected[0])


def test_jax_arrays_are_not_written(jax):
    qkvz, ba = (jax.numpy.asarray(array) for array in arrays())
    out = tuple(jax.numpy.zeros(shape, "float32") for shape in PARTS)
    with pytest.raises(ValueError, match="mixed_qkv is read-only"):
        gdn.split(qkvz, ba, *HEADS, out=out)
    assert all((np.asarray(one) == 0).all() for one in out)


class OnGpu(Producer):
    """What says that it is on a GPU, of a framework whose arrays cannot be written to."""

    def __init__(self, array, **how):
        super().__init__(array, device=(2, 0), **how)

    def __array_namespace__(self):
        raise AssertionError("no output is made")


WHERE_TO = "no mixed_qkv can be made like a .* on cuda:0: .* Give PyTorch tensors, .* torch.from_dlpack"


def test_outputs_on_a_gpu_are_made_for_pytorch_alone():
    qkvz, ba = arrays()
    with pytest.raises(TypeError, match=WHERE_TO):
        gdn.split(OnGpu(qkvz), OnGpu(ba), *HEADS)


@pytest.mark.gpus(1)
def test_jax_on_a_gpu():
    """A clear sentence, and what it says works."""
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU")
    given = arrays()
    qkvz, ba = (jax.device_put(array, jax.devices("gpu")[0]) for array in given)
    with pytest.raises(TypeError, match=WHERE_TO):
        gdn.split(qkvz, ba, *HEADS)
    parts = gdn.split(torch.from_dlpack(qkvz), torch.from_dlpack(ba), *HEADS)
    parts = [np.asarray(jax.dlpack.from_dlpack(part)) for part in parts]
    oracle.same(tuple(parts), oracle.split(*given, HEADS, "interleaved"))


@pytest.mark.parametrize("where", ["input", "output"])
@pytest.mark.parametrize("wrong", ["data", "data with an offset", "shape", "negative"])
@pytest.mark.parametrize("old", [True, False])
def test_producers_without_memory_or_shape(old, wrong, where):
    qkvz, ba = arrays()
    made, out = outs(old=old)
    given = [Producer(qkvz, old=old), Producer(ba, old=old)]
    broken, name = (given[1], "mixed_ba") if where == "input" else (out[2], "b")
    tensor = broken.managed.tensor
    if wrong.startswith("data"):
        tensor.data, tensor.byte_offset = None, 64 if "offset" in wrong else 0
        message = f"{name} has shape \\[5, .\\] and no memory"
    elif wrong == "shape":
        tensor.shape, message = None, f"{name} has 2 dims and no shape"
    else:
        broken.shape[0], message = -5, f"{name} has shape \\[-5, .\\], expected none below 0"
    with pytest.raises(ValueError, match=message):
        gdn.split(*given, *HEADS, out=out)
    assert all((one == 7).all() for one in made)
    weight = Producer(np.zeros((160, 4), "f4"), old=old)
    if wrong == "shape":
        weight.managed.tensor.shape = None
    elif wrong == "negative":
        weight.shape[0] = -160
    else:
        weight.managed.tensor.data = None
    with pytest.raises(ValueError, match="weight has "):
        gdn.repack_weight(weight, HEADS)


def test_arrays_of_two_frameworks(jax):
    """Outputs would be of both. Each is right about which argument is the other's."""
    qkvz, ba = arrays()
    array, other = jax.numpy.asarray(qkvz), jax.numpy.asarray(ba)
    for given, message in [
        ((qkvz, other), "mixed_ba is a jax.*, mixed_qkvz is a numpy.ndarray"),
        ((array, ba), "mixed_ba is a numpy.ndarray, mixed_qkvz is a jax"),
    ]:
        with pytest.raises(TypeError, match=message):
            gdn.split(*given, *HEADS)
        made, out = outs()
        gdn.split(*given, *HEADS, out=out)
        oracle.same(tuple(made), oracle.split(qkvz, ba, HEADS, "interleaved"))
