"""Calls of ``Layer.decode`` that need no frame of Python's: what is unusual is left to Python, and whoever looks sees Python's function."""

import functools
import inspect
import sys

import pytest

torch = pytest.importorskip("torch")

import oracle_layer as ol

import gdn

HEADS = (2, 4, 16, 8)
IS_DIRECT = sys.version_info >= (3, 12)


def given():
    numbers, weights = ol.Numbers(HEADS), ol.weights(HEADS)
    return ol.layer(numbers, weights), ol.projections(3, numbers, "packed"), *ol.states(3, HEADS, "dense")


def frames(call):
    """The functions of Python's that a call goes through."""
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def test_a_call_has_no_frame():
    """From the release on in which a function's pointer may be set."""
    layer, *arguments = given()
    out = torch.empty(3, 4, 8)
    code = gdn.Layer.decode.__code__
    assert (code not in frames(lambda: layer.decode(*arguments, out=out))) == IS_DIRECT
    assert code not in frames(lambda: gdn.layer._decode(layer, *arguments, out=out))
    # A gradient is for PyTorch to refuse.
    arguments[0][0].requires_grad_()
    for decode in (layer.decode, lambda *some, **more: gdn.layer._decode(layer, *some, **more)):
        with pytest.raises(RuntimeError, match="has no derivative"):
            decode(*arguments, out=out)


def test_a_function_of_somebody_elses_stays_what_it_is():
    """An import hook may have wrapped the method: gdn is imported all the same, and calls go through what is there."""

    def wrapped(*arguments, **options):
        return gdn.Layer.decode(*arguments, **options)

    for function in (wrapped, functools.partial(wrapped), lambda self, projections: None):
        assert gdn._gdn.shorten(function, function) == (False, function)
        assert gdn.layer._copy(functools.partial(wrapped)).func is wrapped
    assert gdn.layer._IS_DIRECT == IS_DIRECT


def test_python_sees_its_function():
    decode = gdn.Layer.decode
    assert inspect.isfunction(decode) and "tokens_per_sequence" in decode.__doc__
    assert list(inspect.signature(decode).parameters)[:4] == [
        "self",
        "projections",
        "conv_state",
        "recurrent_state",
    ]
    assert inspect.signature(given()[0].decode).parameters["pad_slot_id"].default == -1


@pytest.mark.parametrize("decode", [gdn.Layer.decode, gdn.layer._decode], ids=["function", "direct"])
def test_calls_that_are_none(decode):
    """The words are Python's own."""
    layer, *arguments = given()
    out = torch.empty(3, 4, 8)
    many = [1, None, -1, None, None, False, None, None, None, out]
    for some, options, message in [
        ((), {}, "missing 4 required positional arguments"),
        ((layer, *arguments[:2]), {}, "missing 1 required positional argument: 'recurrent_state'"),
        ((layer, *arguments), {"slots": None}, "unexpected keyword argument 'slots'"),
        ((layer, *arguments), {"conv_state": arguments[1]}, "multiple values for argument 'conv_state'"),
        ((layer, *arguments, *many, 1), {}, "takes from 4 to 14 positional arguments but 15 were given"),
    ]:
        with pytest.raises(TypeError, match=message):
            decode(*some, **options)
    with pytest.raises(AttributeError, match="_settings|_checked"):
        decode(3, *arguments)


@pytest.mark.parametrize("decode", [gdn.Layer.decode, gdn.layer._decode], ids=["function", "direct"])
def test_what_is_unusual_is_the_same(decode):
    layer, projections, conv, state = given()
    kept = conv.clone(), state.clone()

    def run(layer=layer, projections=projections, conv=conv, **options):
        conv.copy_(kept[0])
        state.copy_(kept[1])
        return decode(layer, projections, conv, recurrent_state=state, **options)

    class Slots(int):
        """A whole number of somebody's own."""

    class Other(gdn.Layer):
        pass

    expected, nothing = run(), run(disable_state_update=True)
    other = Other(
        HEADS,
        **{
            name: getattr(layer, name)
            for name in ("conv_weight", "conv_bias", "A_log", "dt_bias", "norm_weight")
        },
    )
    for options in [
        dict(projections=list(projections)),
        dict(layer=other),
        dict(tokens_per_sequence=Slots(1), pad_slot_id=Slots(-1)),
        dict(tokens_per_sequence=True),
        dict(state_indices=torch.arange(3), out=None),
        dict(**{"".join(["pad_", "slot_id"]): -1}),
        dict(projections=tuple(torch.nn.Parameter(one, requires_grad=False) for one in projections)),
    ]:
        assert torch.equal(run(**options), expected), options
    assert torch.equal(run(disable_state_update=True), nothing) and torch.equal(state, kept[1])
    with pytest.raises(TypeError, match="disable_state_update|bool"):
        run(disable_state_update=1)
    with pytest.raises(TypeError, match="tokens_per_sequence is a float, expected int"):
        run(tokens_per_sequence=1.0)
    with pytest.raises(ValueError, match="projections has 1 tensors"):
        run(projections=projections[:1])
    layer._settings = None  # as of one that was made in a graph
    assert torch.equal(run(), expected) and torch.equal(run(), expected)


def test_a_layer_is_copied_and_collected():
    """Its numbers are checked again, and its weights hold nothing back."""
    import copy
    import gc
    import pickle
    import weakref

    layer, *arguments = given()
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        before = [one.clone() for one in arguments[1:]]
        expected = layer.decode(arguments[0], *(one.clone() for one in before))
        assert torch.equal(other.decode(arguments[0], *before), expected)
    layer.norm_weight.layer = layer  # a cycle
    gone = weakref.ref(layer)
    del layer, other
    gc.collect()
    assert gone() is None
