"""What is wrong with a call of decode or prefill is refused, by name and with both numbers, through every door; nothing is written."""

import pytest

torch = pytest.importorskip("torch")

import oracle_layer as ol
import test_decode
import test_prefill

import gdn

HEADS = (2, 4, 8, 16)
N, T = 6, 2
C = ol.channels(HEADS)
F64 = torch.float64
WRITTEN = ("conv", "state", "out", "more_states", "more_windows")


def good(op):
    """The arguments of a call that is right, by the names of the tests."""
    torch.manual_seed(0)
    numbers, weights = ol.Numbers(HEADS), ol.weights(HEADS)
    conv, state = ol.states(8, HEADS, "dense")
    qkvz, ba = ol.projections(N, numbers, "packed")
    given = dict(qkvz=qkvz, ba=ba, **vars(weights), conv=conv, state=state, out=torch.full((N, 4, 16), 7.0))
    given |= dict(state_indices=torch.tensor([3, 1, 5]), pad_slot_id=-1)
    if op == "decode":
        given |= dict(tokens_per_sequence=T)
    else:
        given |= dict(cu=torch.tensor([0, 2, 2, 6]), has_initial_state=torch.tensor([1, 0, 1]))
    return given


def verify():
    """One that keeps states of each token elsewhere."""
    more = dict(intermediate_states=torch.full((4, T, 4, 16, 8), 7.0))
    more |= dict(intermediate_conv_windows=torch.full((4, T, C, 3), 7.0))
    return good("decode") | more | dict(intermediate_state_indices=torch.tensor([2, 0, 1]))


def checkpoints():
    given = good("prefill")
    qkvz, ba = ol.projections(256, ol.Numbers(HEADS), "packed")
    given |= dict(qkvz=qkvz, ba=ba, out=torch.full((256, 4, 16), 7.0), cu=torch.tensor([0, 128, 192, 256]))
    given |= dict(checkpoint_every_n_tokens=64, checkpoint_starts=torch.tensor([0, 2, 3]))
    given |= dict(state_checkpoints=torch.full((4, 4, 16, 8), 7.0))
    return given | dict(conv_checkpoints=torch.full((4, C, 3), 7.0))


def run(op, door, given):
    given = dict(given)
    weights = ol.Weights(*(given.pop(name) for name in vars(ol.weights(HEADS))))
    numbers = given.pop("numbers", ol.Numbers(HEADS))
    projections = (given.pop("qkvz"), given.pop("ba"))
    if op == "decode":
        states = given.pop("conv"), given.pop("state")
        return test_decode.call(door, numbers, weights, projections, *states, **given)
    arguments = given.pop("cu"), given.pop("conv"), given.pop("state")
    return test_prefill.call(door, numbers, weights, projections, *arguments, **given)


def fails(op, given, message, error=ValueError, doors=("function", "operator", "numpy"), supported=False):
    """Each door refuses with the sentence, with `out` and without, and leaves what it would write to as it was."""
    written = [one for one in given.values() if isinstance(one, torch.Tensor)]
    before = [one.clone() for one in written]
    for door in doors:
        for out in (given["out"], None):
            with pytest.raises(RuntimeError if door == "operator" else error, match=message):
                run(op, door, given | dict(out=out))
    for one, old in zip(written, before, strict=True):
        assert torch.equal(one, old)
    reason = reason_of(op, given)
    assert reason is None if supported else reason and __import__("re").search(message, reason)


def reason_of(op, given):
    given = dict(given)
    weights = ol.Weights(*(given.pop(name) for name in vars(ol.weights(HEADS))))
    layer = ol.layer(given.pop("numbers", ol.Numbers(HEADS)), weights)
    projections = (given.pop("qkvz"), given.pop("ba"))
    if op == "decode":
        return gdn.decode_supported(layer, projections, given.pop("conv"), given.pop("state"), **given)
    states = given.pop("conv"), given.pop("state")
    return gdn.prefill_supported(layer, projections, given.pop("cu"), *states, **given)


@pytest.mark.parametrize("make", [lambda: good("decode"), verify], ids=["plain", "verify"])
def test_what_is_right_is_right(make):
    for door in test_decode.DOORS:
        run("decode", door, make())
    assert reason_of("decode", make()) is None


@pytest.mark.parametrize("make", [lambda: good("prefill"), checkpoints], ids=["plain", "checkpoints"])
def test_what_is_right_is_right_in_prefill(make):
    for door in test_prefill.DOORS:
        run("prefill", door, make())
    assert reason_of("prefill", make()) is None


def strided(tensor, dim):
    """The same elements, with gaps along a dim."""
    return tensor.repeat_interleave(2, dim).movedim(dim, 0)[::2].movedim(0, dim)


#: For both ops: what is changed, and the sentence.
COMMON = [
    (
        lambda g: dict(qkvz=g["qkvz"][:, :-1].contiguous()),
        "mixed_qkvz has 159 features, 2\\+4 heads of 8\\+16 need 160",
    ),
    (lambda g: dict(qkvz=g["qkvz"][0]), "mixed_qkvz has shape \\[160\\], expected \\[N, features\\]"),
    (lambda g: dict(qkvz=strided(g["qkvz"], 1)), "mixed_qkvz has stride 2 in dim 1, expected 1"),
    (lambda g: dict(ba=g["ba"][:-1]), "mixed_ba has 5 rows, mixed_qkvz has 6"),
    (lambda g: dict(ba=g["ba"][:, 1:]), "mixed_ba has 7 features, .* need 8"),
    (lambda g: dict(conv_weight=g["conv_weight"][1:]), f"conv_weight has {C - 1} channels, .* need {C}"),
    (lambda g: dict(conv_weight=g["conv_weight"][0]), "conv_weight has shape \\[4\\], expected \\[C, W\\]"),
    (lambda g: dict(conv_weight=torch.randn(C, 17)), "conv_width is 17, it must be from 1 to 16"),
    (lambda g: dict(conv_bias=g["conv_bias"][1:]), f"conv_bias has {C - 1} channels, .* need {C}"),
    (lambda g: dict(A_log=g["A_log"][1:]), "A_log has 3 heads, .* need 4"),
    (lambda g: dict(dt_bias=g["dt_bias"][None]), "dt_bias has 2 dims, expected 1"),
    (lambda g: dict(norm_weight=g["norm_weight"][:-1]), "norm_weight has 15 features, .* need 16"),
    (lambda g: dict(conv=g["conv"][:, 1:]), f"conv_state has {C - 1} channels, .* need {C}"),
    (
        lambda g: dict(conv=g["conv"][:, :, 1:]),
        "conv_state has 2 columns, the taps before a token's own need 3",
    ),
    (lambda g: dict(conv=g["conv"][0]), "conv_state has 2 dims, expected 3"),
    (lambda g: dict(conv=g["conv"][:2]), "state_indices\\[0\\] is 3, conv_state has 2 slots", True),
    (lambda g: dict(conv=g["conv"][:1].expand(8, C, 3)), "conv_state has stride 0 in dim 0, expected [0-9]+"),
    (lambda g: dict(state=g["state"].transpose(2, 3)), "recurrent_state has 8 rows \\(DV\\), .* need 16"),
    (lambda g: dict(state=g["state"][:, 1:]), "recurrent_state has 3 heads, .* need 4"),
    (lambda g: dict(state=g["state"][None]), "recurrent_state has 5 dims, expected 4"),
    (lambda g: dict(state=strided(g["state"], 3)), "recurrent_state has stride 2 in dim 3, expected 1"),
    (lambda g: dict(state=g["state"][:4]), "state_indices\\[2\\] is 5, recurrent_state has 4 slots", True),
    (lambda g: dict(state_indices=g["state_indices"][1:]), "state_indices has 2 rows, 3 sequences need 3"),
    (
        lambda g: dict(state_indices=g["state_indices"][None, None]),
        "state_indices has 3 dims, expected 1 or 2",
    ),
    (
        lambda g: dict(state_indices=torch.tensor([3, 1, 8])),
        "state_indices\\[2\\] is 8, conv_state has 8 slots",
        True,
    ),
    (lambda g: dict(state_indices=torch.tensor([3, 1, 3])), "state_indices is 3 for sequences 0 and 2", True),
    (lambda g: dict(state_indices=None, conv=g["conv"][:2]), "conv_state has 2 slots, .* need 3"),
]

DECODE = [
    (
        lambda g: dict(tokens_per_sequence=4),
        "the number of rows = 6 is not a multiple of tokens_per_sequence = 4",
    ),
    (lambda g: dict(tokens_per_sequence=0), "tokens_per_sequence is 0, it must be (at least 1|from 1 to 16)"),
    (
        lambda g: dict(tokens_per_sequence=-1),
        "tokens_per_sequence is -1, it must be (at least 1|from 1 to 16)",
    ),
    (lambda g: dict(tokens_per_sequence=17), "tokens_per_sequence is 17, it must be from 1 to 16"),
    (
        lambda g: dict(num_accepted_tokens=torch.tensor([1, 1, 1])),
        "conv_state has 3 columns, the taps and all tokens but one need 4",
    ),
    (
        lambda g: dict(num_accepted_tokens=torch.tensor([1, 3, 1]), conv=torch.randn(8, C, 4)),
        "num_accepted_tokens is 3 for sequence 1, it must be from 1 to 2",
        True,
    ),
    (
        lambda g: dict(num_accepted_tokens=torch.tensor([1, 2]), conv=torch.randn(8, C, 4)),
        "num_accepted_tokens has 2 entries, 3 sequences need 3",
    ),
    (
        lambda g: dict(output_state_indices=torch.tensor([1])),
        "output_state_indices has 1 entries, 3 sequences need 3",
    ),
    (
        lambda g: dict(output_state_indices=torch.tensor([0, 2, 4]), disable_state_update=True),
        "output_state_indices is given, it must be None where disable_state_update is True",
    ),
    (lambda g: dict(state_indices=torch.tensor([[3], [1], [5]])), "state_indices has 1 columns, .* need 2"),
    (
        lambda g: dict(intermediate_state_indices=torch.tensor([0, 1, 2])),
        "intermediate_state_indices is given, it must be None where neither",
    ),
]

VERIFY = [
    (
        lambda g: dict(intermediate_states=g["intermediate_states"][:, :1]),
        "intermediate_states has 1 states a slot, .* need 2",
    ),
    (
        lambda g: dict(intermediate_states=g["intermediate_states"][0]),
        "intermediate_states has 4 dims, expected 5",
    ),
    (
        lambda g: dict(
            intermediate_states=g["intermediate_states"].transpose(3, 4).contiguous().transpose(3, 4)
        ),
        "intermediate_states has stride 16 in dim 4, expected 1",
    ),
    (
        lambda g: dict(intermediate_conv_windows=g["intermediate_conv_windows"][:, :, :, 1:]),
        "intermediate_conv_windows has 2 columns, .* 3",
    ),
    (
        lambda g: dict(intermediate_state_indices=torch.tensor([2, 0, 4])),
        "intermediate_state_indices\\[2\\] is 4, intermediate_(states|conv_windows) has 4 slots",
        True,
    ),
    (
        lambda g: dict(intermediate_state_indices=torch.tensor([2, 0, 2])),
        "intermediate_state_indices is 2 for sequences 0 and 2",
        True,
    ),
    (
        lambda g: dict(output_state_indices=torch.tensor([0, 2, 4])),
        "output_state_indices is given, it must be None where intermediate_states or",
    ),
]

PREFILL = [
    (lambda g: dict(cu=torch.tensor([1, 2, 3, 6])), "cu_seqlens is 1 at \\[0\\], it must be 0 there", True),
    (
        lambda g: dict(cu=torch.tensor([0, 3, 2, 6])),
        "cu_seqlens is 2 at \\[2\\], it must be at least the 3 before it",
        True,
    ),
    (
        lambda g: dict(cu=torch.tensor([0, 2, 3, 7])),
        "cu_seqlens is 7 at \\[3\\], it must be 6, the number of rows",
        True,
    ),
    (lambda g: dict(cu=torch.zeros(0, dtype=torch.int64)), "cu_seqlens has 0 entries, no sequences need 1"),
    (lambda g: dict(cu=torch.tensor([[0, 6]])), "cu_seqlens has 2 dims, expected 1"),
    (
        lambda g: dict(has_initial_state=torch.tensor([1])),
        "has_initial_state has 1 entries, 3 sequences need 3",
    ),
    (lambda g: dict(checkpoint_every_n_tokens=17), "checkpoint_starts is None, expected a tensor"),
    (
        lambda g: dict(checkpoint_every_n_tokens=-16),
        "checkpoint_every_n_tokens is -16, it must be (at least 0|0 or)",
    ),
    (
        lambda g: dict(checkpoint_starts=torch.tensor([0, 1, 2])),
        "checkpoint_starts is given, it must be None where checkpoint_every_n_tokens is 0",
    ),
]

CHECKPOINTS = [
    (
        lambda g: dict(checkpoint_every_n_tokens=17),
        "checkpoint_every_n_tokens is 17, it must be a multiple of 64",
    ),
    (
        lambda g: dict(checkpoint_starts=torch.tensor([0, 2])),
        "checkpoint_starts has 2 entries, 3 sequences need 3",
    ),
    (
        lambda g: dict(checkpoint_starts=torch.tensor([0, 2, 4])),
        "checkpoint_starts\\[2\\] is 4, state_checkpoints has 4 slots",
        True,
    ),
    (
        lambda g: dict(checkpoint_starts=torch.tensor([0, 1, 3])),
        "checkpoint_starts is 1 for sequences 0 and 1",
        True,
    ),
    (
        lambda g: dict(state_checkpoints=g["state_checkpoints"][:, 1:]),
        "state_checkpoints has 3 heads, .* need 4",
    ),
    (
        lambda g: dict(conv_checkpoints=g["conv_checkpoints"][1:]),
        "conv_checkpoints has 3 checkpoints, state_checkpoints has 4",
    ),
]


def cases():
    for op in ("decode", "prefill"):
        for change, message, *values in COMMON:
            if message is not None:
                yield op, lambda op=op: good(op), change, message, bool(values)
    for op, make, table in [
        ("decode", lambda: good("decode"), DECODE),
        ("decode", verify, VERIFY),
        ("prefill", lambda: good("prefill"), PREFILL),
        ("prefill", checkpoints, CHECKPOINTS),
    ]:
        for change, message, *values in table:
            yield op, make, change, message, bool(values)


@pytest.mark.parametrize(
    "op, make, change, message, is_of_values",
    list(cases()),
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_wrong_arguments(op, make, change, message, is_of_values):
    given = make()
    # What the host cannot look at, `*_supported` does not know.
    fails(op, given | change(given), message, supported=is_of_values)


@pytest.mark.gpus(1)
@pytest.mark.parametrize(
    "op, make, change, message",
    [case[:4] for case in cases() if not case[4]],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_wrong_arguments_on_a_gpu(op, make, change, message):
    """The same sentences, but for values of indices, which only kernels see."""

    def there(given):
        return {name: one.cuda() if isinstance(one, torch.Tensor) else one for name, one in given.items()}

    given = there(make())
    fails(op, there(given | change(given)), message, doors=("function", "operator"))


@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize(
    "name", ["qkvz", "ba", "conv_weight", "conv_bias", "A_log", "dt_bias", "norm_weight", "conv", "state"]
)
def test_dtypes_of_elements(op, name):
    given = good(op)
    called = {"qkvz": "mixed_qkvz", "ba": "mixed_ba", "conv": "conv_state", "state": "recurrent_state"}.get(
        name, name
    )
    for dtype in (F64, torch.int32):
        message = f"{called} has dtype {str(dtype)[6:]}, expected float32, float16 or bfloat16"
        fails(op, given | {name: given[name].to(dtype)}, message, TypeError)


def test_dtypes_that_are_to_agree():
    given = good("decode")
    parts = [one.float() for one in ol.unpacked((given["qkvz"], given["ba"]), ol.Numbers(HEADS))]
    layer = ol.layer(ol.Numbers(HEADS), ol.weights(HEADS))
    for i, name, other, dtype in [(1, "z", "mixed_qkv", "bfloat16"), (3, "a", "b", "float16")]:
        wrong = list(parts)
        wrong[i] = wrong[i].to(getattr(torch, dtype))
        with pytest.raises(TypeError, match=f"{name} has dtype {dtype}, {other} has float32"):
            layer.decode(wrong, given["conv"], given["state"], tokens_per_sequence=T)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_dtypes_of_indices(op):
    given, names = good(op), ["state_indices"]
    if op == "decode":
        names += ["num_accepted_tokens", "output_state_indices"]
        given |= dict(num_accepted_tokens=torch.ones(3), conv=torch.randn(8, C, 4))
        given |= dict(output_state_indices=torch.arange(3))
    else:
        names += ["cu", "has_initial_state"]
    given = {name: one.long() if name in names else one for name, one in given.items()}
    for name in names:
        called = "cu_seqlens" if name == "cu" else name
        for dtype in (torch.int16, torch.float32, torch.bool):
            if name == "has_initial_state" and dtype == torch.bool:
                continue
            message = f"{called} has dtype {str(dtype)[6:]}, expected (bool, uint8, )?int32 or int64"
            message = message.replace("int32 or", "int32( or|,)") if name == "has_initial_state" else message
            wrong = given | {name: given[name].to(dtype)}
            with pytest.raises(TypeError, match="has dtype"):
                run(op, "function", wrong)
            with pytest.raises(RuntimeError, match=f"{called} has dtype {str(dtype)[6:]}, expected"):
                run(op, "operator", wrong)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_overlaps(op):
    given = good(op)
    _qkvz, _ba = given["qkvz"], given["ba"]
    memory = torch.zeros(8 * 512 + 8 * C * 3)
    state = memory[: 8 * 512].view(8, 4, 16, 8)
    conv = memory[8 * 512 - 1 : -1].view(8, C, 3)
    over = torch.zeros(N, 160)
    out = over.view(-1)[: N * 64].view(N, 4, 16)
    for change, message in [
        (dict(state=state, conv=conv), "(recurrent|conv)_state overlaps (recurrent|conv)_state"),
        (dict(qkvz=over, out=out), "out overlaps mixed_qkvz"),
        (
            dict(out=state[0, 0, 0].expand(N, 4, 8).repeat(1, 1, 2)[:, :, :1].expand(N, 4, 16)),
            "out has stride 0",
        ),
    ]:
        for door in ("function", "operator", "numpy"):
            if door == "numpy" and "stride 0" in message:
                continue
            with pytest.raises((ValueError, RuntimeError), match=message):
                run(op, door, given | change)
    assert not memory.any() and not over.any()


def test_a_layer_that_is_none():
    weights = vars(ol.weights(HEADS))
    for heads, how, message in [
        ((2, 3, 8, 16), {}, "num_v_heads = 3 is not a multiple of num_k_heads = 2"),
        ((2, 4, 8), {}, "heads is \\(2, 4, 8\\), expected"),
        (HEADS, dict(packing="both"), "packing is 'both', it must be 'interleaved' or 'contiguous'"),
        (HEADS, dict(gate="relu"), "gate is 'relu', it must be 'silu' or 'sigmoid'"),
        (HEADS, dict(norm_eps=-1.0), "norm_eps is -1, it must be at least 0 and finite"),
        (HEADS, dict(l2norm_eps=float("nan")), "l2norm_eps is NaN, it must be at least 0 and finite"),
        (HEADS, dict(scale=float("inf")), "scale is inf, it must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            gdn.Layer(heads, **how, **weights)
    for how, error, message in [
        (dict(gate=3), TypeError, "gate is a int, expected str"),
        (dict(packing=None), TypeError, "packing is a NoneType, expected str"),
        (dict(scale="0.5"), TypeError, "scale is a str, expected float"),
        (dict(l2norm_eps=None), TypeError, "l2norm_eps is a NoneType, expected float"),
        (dict(norm_eps=[1e-6]), TypeError, "norm_eps is a list, expected float"),
        (dict(beta_scale=10**400), ValueError, "beta_scale is too large for a float"),
    ]:
        with pytest.raises(error, match=message):
            gdn.Layer(HEADS, **how, **weights)


def test_a_layer_says_what_it_is():
    layer = gdn.Layer(HEADS, "contiguous", scale=0.5, **vars(ol.weights(HEADS)))
    assert repr(layer) == (
        "Layer((2, 4, 8, 16), 'contiguous', l2norm_eps=1e-06, norm_eps=1e-06, scale=0.5, beta_scale=1.0, gate='silu')"
    )


def test_arguments_that_are_no_tensors():
    given = good("decode")
    layer = ol.layer(ol.Numbers(HEADS), ol.weights(HEADS))
    projections, states = (given["qkvz"], given["ba"]), (given["conv"], given["state"])
    for change, error, message in [
        (
            dict(projections=given["qkvz"]),
            TypeError,
            "projections is a (torch.)?Tensor, expected \\(mixed_qkvz, mixed_ba\\)",
        ),
        (dict(projections=projections[:1]), ValueError, "projections has 1 tensors, expected"),
        (
            dict(projections=(*projections, *projections[:1])),
            ValueError,
            "projections has 3 tensors, expected",
        ),
        (dict(projections=(None, None)), TypeError, "mixed_qkvz is a NoneType|expected"),
        (dict(conv_state=None), ValueError, "conv_state is None, expected a tensor"),
        (dict(conv_state=3), TypeError, "conv_state is a int"),
        (
            dict(recurrent_state=given["state"].numpy()),
            TypeError,
            "recurrent_state is a numpy.ndarray, mixed_qkvz is a",
        ),
        (dict(state_indices=[1, 2, 3]), TypeError, "state_indices is a list"),
        (dict(tokens_per_sequence="2"), TypeError, "tokens_per_sequence is a str, expected int"),
        (dict(pad_slot_id=1.5), TypeError, "pad_slot_id is a float, expected int"),
        (dict(state_indices=given["state_indices"].to("meta")), ValueError, "state_indices is on meta"),
    ]:
        arguments = dict(projections=projections, conv_state=states[0], recurrent_state=states[1]) | change
        with pytest.raises((error, RuntimeError), match=message):
            layer.decode(**dict(tokens_per_sequence=T) | arguments)
        assert gdn.decode_supported(layer, **dict(tokens_per_sequence=T) | arguments) is not None


def test_read_only_arrays_are_not_written():
    given = good("decode")
    layer = ol.layer(
        ol.Numbers(HEADS), ol.Weights(*(one.numpy() for one in vars(ol.weights(HEADS)).values()))
    )
    projections = tuple(given[name].numpy() for name in ("qkvz", "ba"))
    conv, state = given["conv"].numpy(), given["state"].numpy()
    conv.flags.writeable = False
    with pytest.raises(ValueError, match="conv_state is read-only, it is to be written"):
        layer.decode(projections, conv, state, tokens_per_sequence=T)
    backwards = given["conv"].numpy()[::-1]
    with pytest.raises(ValueError, match="conv_state has stride -[0-9]+ in dim 0, expected none below 0"):
        layer.decode(projections, backwards, state, tokens_per_sequence=T)


@pytest.mark.gpus(1)
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_tensors_of_two_devices(op):
    given = good(op)
    for name in ("ba", "conv", "A_log", "state_indices"):
        with pytest.raises((ValueError, RuntimeError), match="is on cuda:0, mixed_qkvz is on cpu"):
            run(op, "function", given | {name: given[name].cuda()})


@pytest.mark.gpus(1)
def test_dims_without_a_kernel():
    given = {
        name: one.cuda() if isinstance(one, torch.Tensor) else one for name, one in good("prefill").items()
    }
    message = "head_k_dim is 8, it must be 64, 96, 128, 192 or 256 on a GPU"
    assert message in reason_of("prefill", given)
    for door in ("function", "operator"):
        with pytest.raises((ValueError, RuntimeError), match=message):
            run("prefill", door, given)
