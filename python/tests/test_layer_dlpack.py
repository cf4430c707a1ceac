"""Decode and prefill on arrays of others than PyTorch's and NumPy's: objects that speak DLPack, and JAX's arrays."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import oracle_layer as ol
from test_dlpack import Producer

import gdn

HEADS = (2, 4, 16, 8)
NUMBERS = ol.Numbers(HEADS)
CU = [0, 20, 21, 60]
OPS = ["decode", "prefill"]
ENDS = np.array(CU, "i4")


def arrays(op):
    """Weights, projections and states of a call, as NumPy's arrays."""
    torch.manual_seed(0)
    weights = ol.weights(HEADS)
    rows = CU[-1] if op == "prefill" else 3
    made = ol.projections(rows, NUMBERS, "packed"), ol.states(3, HEADS, "wide")
    array = lambda one: one.numpy()
    return ol.Weights(*map(array, vars(weights).values())), *(tuple(map(array, some)) for some in made)


def call(op, weights, projections, states, ends=ENDS, **options):
    layer = ol.layer(NUMBERS, weights)
    ends = (ends,) if op == "prefill" else ()
    return getattr(layer, op)(projections, *ends, *states, **options)


def wrapped(kind, some):
    return tuple(map(kind, some))


def expected(op):
    """What NumPy's arrays give, which other tests hold to float64: the output, and both states."""
    weights, projections, states = arrays(op)
    return call(op, weights, projections, states), *states


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_a_producer(op, old):
    """Read and written where they are, states with strides of their own."""
    right = expected(op)
    weights, projections, states = arrays(op)
    out = np.full(right[0].shape, 7, "f4")
    producer = lambda one: Producer(one, old=old)
    given = ol.Weights(*wrapped(producer, vars(weights).values()))
    some = wrapped(producer, projections), wrapped(producer, states)
    made = producer(out)
    how = dict(ends=producer(ENDS), out=made)
    reason = gdn.decode_supported if op == "decode" else gdn.prefill_supported
    ends = (how["ends"],) if op == "prefill" else ()
    assert reason(ol.layer(NUMBERS, given), some[0], *ends, *some[1], out=made) is None
    assert (out == 7).all() and np.array_equal(states[1], arrays(op)[2][1])
    assert call(op, given, *some, **how) is made
    assert all(map(np.array_equal, (out, *states), right))


@pytest.mark.parametrize("op", OPS)
def test_what_a_producer_cannot_be(op):
    weights, projections, states = arrays(op)
    before = [one.copy() for one in states]
    given = ol.Weights(*wrapped(Producer, vars(weights).values()))
    read = wrapped(Producer, projections)
    with pytest.raises(
        TypeError, match="no out can be made like a .*Producer on cpu, give tensors to write to"
    ):
        call(op, given, read, wrapped(Producer, states), ends=Producer(ENDS))
    out = Producer(np.zeros((projections[0].shape[0], 4, 8), "f4"))
    for i, name in enumerate(("conv_state", "recurrent_state")):
        some = list(wrapped(Producer, states))
        some[i] = Producer(states[i], read_only=True)
        with pytest.raises(ValueError, match=f"{name} is read-only, it is to be written"):
            call(op, given, read, some, ends=Producer(ENDS), out=out)
    tensors = wrapped(torch.from_numpy, states)
    with pytest.raises(TypeError, match=r"conv_state is a torch\.Tensor, mixed_qkvz is a .*Producer"):
        call(op, given, read, tensors, ends=Producer(ENDS), out=out)
    assert all(map(np.array_equal, states, before))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_jax(name, jax):
    """Arrays that nobody may write to: prefill without states reads them, and its output is one; states are NumPy's."""
    jnp = jax.numpy
    weights, projections, states = arrays("prefill")
    given = ol.Weights(*wrapped(jnp.asarray, vars(weights).values()))
    read = tuple(jnp.asarray(one, dtype=name) for one in projections)
    same = tuple(torch.from_dlpack(np.asarray(one).astype("f4")).to(getattr(torch, name)) for one in read)
    of_torch = ol.Weights(*wrapped(torch.from_numpy, vars(weights).values()))
    right = call("prefill", of_torch, same, (None, None), ends=torch.from_numpy(ENDS))
    out = call("prefill", given, read, (None, None), ends=jnp.asarray(ENDS))
    assert isinstance(out, jax.Array) and out.dtype == jnp.dtype(name)
    assert np.array_equal(np.asarray(out).astype("f4"), right.float().numpy())
    for op, ends in (("prefill", jnp.asarray(ENDS)), ("decode", None)):
        some = tuple(one[:3] for one in read) if op == "decode" else read
        with pytest.raises(ValueError, match="conv_state is read-only, it is to be written"):
            call(op, given, some, wrapped(jnp.asarray, states), ends=ends)
    kept = [one.copy(order="K") for one in states]
    out = call("decode", given, tuple(one[:3] for one in read), states)
    assert isinstance(out, jax.Array) and not np.array_equal(states[1], kept[1])
    torch_states = wrapped(torch.from_numpy, kept)
    right = call("decode", of_torch, tuple(one[:3] for one in same), torch_states)
    assert np.array_equal(np.asarray(out).astype("f4"), right.float().numpy())
    assert np.array_equal(states[1], torch_states[1].numpy())
