"""`torch.ops.gdn.decode` and `prefill` among PyTorch's own operators: schemas, tracing, derivatives, modes, versions; and `gdn.Layer`."""

import importlib

import pytest

torch = pytest.importorskip("torch")

import oracle_layer as ol
import tiny_models
from torch._dynamo.testing import CompileCounterWithBackend

import gdn

HEADS = (2, 4, 16, 8)
NUMBERS = ol.Numbers(HEADS)
C = ol.channels(HEADS)
OVERLOADS = ["default", "out", "unpacked", "unpacked_out"]
OPERATORS = [(op, overload) for op in ("decode", "prefill") for overload in OVERLOADS]
B = 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sample(op, overload="default", more=False):
    """The operator, its arguments and its keywords."""
    weights = ol.weights(HEADS)
    rows = 160 if more and op == "prefill" else B
    projections = ol.projections(rows, NUMBERS, "packed")
    if overload.startswith("unpacked"):
        projections = tuple(one.float() for one in ol.unpacked(projections, NUMBERS))
    states, options = ol.states(8, HEADS, "page" if more else "dense"), {}
    if op == "prefill":
        states = (*states, torch.tensor([0, rows // 2, rows]))
        if more:
            options |= dict(state_indices=torch.tensor([2, 5]), has_initial_state=torch.tensor([True, False]))
            options |= dict(checkpoint_every_n_tokens=64, checkpoint_starts=torch.tensor([0, 1]))
            options |= dict(state_checkpoints=torch.zeros(4, 4, 8, 16), segments=True)
    elif more:
        states_of_each = torch.zeros(3, 1, 4, 16, 8).transpose(-1, -2)
        options |= dict(state_indices=torch.tensor([2, 5, -1]), intermediate_states=states_of_each)
    if overload.endswith("out"):
        options |= dict(out=torch.zeros(rows, 4, 8))
    operator = getattr(getattr(torch.ops.gdn, op), overload)
    return operator, (*projections, *vars(weights).values(), *states, *HEADS), options


def layer_call(op):
    """A layer, and the arguments of its method."""
    layer = ol.layer(NUMBERS, ol.weights(HEADS))
    projections, states = ol.projections(B, NUMBERS, "packed"), ol.states(8, HEADS, "dense")
    arguments = (projections, torch.tensor([0, 1, 3]), *states) if op == "prefill" else (projections, *states)
    return layer, arguments


def through(door, op, layer, projections, *others, out=None):
    """A call of the layer's method, or of the operator beneath it."""
    if door == "function":
        return getattr(layer, op)(projections, *others, out=out)
    *cu, conv, state = others
    weights = (layer.conv_weight, layer.conv_bias, layer.A_log, layer.dt_bias, layer.norm_weight)
    given, operator = (*projections, *weights, conv, state, *cu, *HEADS), getattr(torch.ops.gdn, op)
    if out is None:
        return operator.default(*given)
    operator.out(*given, out=out)
    return out


def written(overload, arguments, options):
    start = 9 if overload.startswith("unpacked") else 7
    names = ("out", "intermediate_states", "state_checkpoints")
    return [*arguments[start : start + 2], *(options[name] for name in names if name in options)]


@pytest.mark.parametrize("more", [False, True], ids=["", "more"])
@pytest.mark.parametrize("op, overload", OPERATORS)
def test_opcheck(op, overload, more):
    operator, arguments, options = sample(op, overload, more)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    if not overload.endswith("out"):
        checks += ("test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(operator, arguments, options, test_utils=checks)


def test_schemas():
    weights = "Tensor conv_weight, Tensor? conv_bias, Tensor A_log, Tensor dt_bias, Tensor norm_weight"
    first = dict(
        default="Tensor mixed_qkvz, Tensor mixed_ba",
        unpacked="Tensor mixed_qkv, Tensor z, Tensor b, Tensor a",
    )
    states = dict(
        decode="Tensor(a!) conv_state, Tensor(b!) recurrent_state, ",
        prefill="Tensor(a!)? conv_state, Tensor(b!)? recurrent_state, Tensor cu_seqlens, ",
    )
    more = dict(
        decode="Tensor(c!)? intermediate_states=None, Tensor(d!)? intermediate_conv_windows=None, ",
        prefill="Tensor(c!)? state_checkpoints=None, Tensor(d!)? conv_checkpoints=None, bool segments=False, ",
    )
    for op, overload in OPERATORS:
        schema = str(getattr(getattr(torch.ops.gdn, op), overload)._schema)
        assert (
            f"({first[overload.replace('_out', '').replace('out', 'default')]}, {weights}, {states[op]}"
            in schema
        )
        assert more[op] in schema
        end = (
            ', str gate="silu", Tensor(e!) out) -> ()'
            if overload.endswith("out")
            else ', str gate="silu") -> Tensor'
        )
        assert schema.endswith(end)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op, overload", OPERATORS)
def test_compiled_whole(op, overload, backend):
    """One graph; states mutated in it as without it, through views made inside too."""
    operator, arguments, options = sample(op, overload, more=True)
    at = 9 if overload.startswith("unpacked") else 7

    def run(arguments, options):
        arguments = list(arguments)
        arguments[at + 1] = arguments[at + 1].transpose(-1, -2).transpose(-1, -2)
        out = operator(*arguments, **options)
        return options["out"] * 2 if out is None else out * 2

    expected_operator, expected_arguments, expected_options = sample_again(op, overload)
    expected = run(expected_arguments, expected_options)
    counter = CompileCounterWithBackend(backend)
    got = torch.compile(run, backend=counter, fullgraph=True)(arguments, options)
    assert counter.frame_count == 1
    assert torch.equal(got, expected)
    for one, other in zip(
        written(overload, arguments, options),
        written(overload, expected_arguments, expected_options),
        strict=True,
    ):
        assert torch.equal(one, other) and one.any()


def sample_again(op, overload):
    torch.manual_seed(0)
    return sample(op, overload, more=True)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_a_layer_compiled_whole(op):
    layer, arguments = layer_call(op)
    torch.manual_seed(0)
    _, others = layer_call(op)
    expected = getattr(layer, op)(*others)
    run = torch.compile(
        lambda *given: getattr(layer, op)(*given).float() + 1, backend="inductor", fullgraph=True
    )
    assert torch.equal(run(*arguments), expected + 1)
    for one, other in zip(arguments[1:], others[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("given", ["no states", "conv_state", "recurrent_state"])
def test_a_prefill_without_states_compiled_whole(given):
    layer, (projections, cu, conv, state) = layer_call("prefill")
    states = {"conv_state": dict(conv_state=conv), "recurrent_state": dict(recurrent_state=state)}
    expected = layer.prefill(projections, cu, **{k: v.clone() for k, v in states.get(given, {}).items()})
    run = torch.compile(
        lambda *arguments, **options: layer.prefill(*arguments, **options) + 1, fullgraph=True
    )
    assert torch.equal(run(projections, cu, **states.get(given, {})), expected + 1)


@pytest.mark.parametrize("which", ["mixed_qkvz", "conv_weight", "A_log", "conv_state", "recurrent_state"])
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_gradients_are_refused(op, which):
    layer, arguments = layer_call(op)
    tensors = dict(mixed_qkvz=arguments[0][0], conv_weight=layer.conv_weight, A_log=layer.A_log)
    tensors |= dict(zip(("conv_state", "recurrent_state"), arguments[-2:], strict=True))
    before = [one.clone() for one in arguments[-2:]]
    one = tensors[which].requires_grad_()
    message = (
        f"gdn::{op} has no derivative, and {which} requires one: call it under torch.no_grad\\(\\).*gdn.split"
    )
    with pytest.raises(RuntimeError, match=message):
        getattr(layer, op)(*arguments)
    assert message.split(":")[2].split(" has")[0] in getattr(gdn, f"{op}_supported")(layer, *arguments)
    operator, given, options = sample(op)
    for i in (0, 2, 7):
        wrong = [*given[:i], given[i].clone().requires_grad_(), *given[i + 1 :]]
        with pytest.raises(RuntimeError, match=f"gdn::{op} has no derivative"):
            operator(*wrong, **options)
    assert all(torch.equal(*pair) for pair in zip(before, arguments[-2:], strict=True))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert getattr(gdn, f"{op}_supported")(layer, *arguments) is None
            assert not getattr(layer, op)(*arguments).requires_grad
    one.requires_grad_(False)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_tangents_are_refused(op):
    fw = torch.autograd.forward_ad
    layer, arguments = layer_call(op)
    (qkvz, ba), rest = arguments[0], arguments[1:]
    with fw.dual_level():
        dual = fw.make_dual(qkvz, torch.ones_like(qkvz))
        with pytest.raises(RuntimeError, match=f"gdn::{op} has no derivative, and mixed_qkvz has a tangent"):
            getattr(layer, op)((dual, ba), *rest)
        assert getattr(layer, op)(*arguments).shape == (B, 4, 8)
    with pytest.raises(RuntimeError, match=f"gdn::{op} has no derivative"):
        torch.func.grad(lambda one: getattr(layer, op)((one, ba), *rest).sum())(qkvz)


TRANSFORMS = {
    "requires_grad": lambda call, one: call(one.requires_grad_()),
    "func.grad": lambda call, one: torch.func.grad(lambda x: call(x).sum())(one),
    "func.vjp": lambda call, one: torch.func.vjp(call, one),
    "func.jvp": lambda call, one: torch.func.jvp(call, (one,), (torch.ones_like(one),)),
    "func.jacfwd": lambda call, one: torch.func.jacfwd(call)(one),
    "vmap of grad": lambda call, one: torch.vmap(torch.func.grad(lambda x: call(x).sum()))(one[None]),
}
#: Every tensor that a call reads or writes.
ALL = ["mixed_qkvz", "mixed_ba", "conv_weight", "conv_bias", "A_log", "dt_bias", "norm_weight"]
ALL += ["conv_state", "recurrent_state", "out"]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("door", ["function", "operator"])
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_derivatives_of_every_argument_are_refused(op, door, transform):
    """Whatever asks for one, and of whatever tensor; nothing is written, and the sentence says what to take instead."""
    for name in ALL:
        layer, ((qkvz, ba), *others) = layer_call(op)
        given = dict(mixed_qkvz=qkvz, mixed_ba=ba, conv_state=others[-2], recurrent_state=others[-1])
        given |= dict(out=torch.zeros(B, 4, 8))
        weights = vars(ol.weights(HEADS))
        before = {one: tensor.clone() for one, tensor in given.items()}

        def call(one, name=name, given=given, weights=weights, others=others):
            some, of_layer = dict(given), dict(weights)
            (of_layer if name in of_layer else some)[name] = one
            projections, states = (
                (some["mixed_qkvz"], some["mixed_ba"]),
                (some["conv_state"], some["recurrent_state"]),
            )
            out = some["out"] if name == "out" else None
            layer = ol.layer(NUMBERS, ol.Weights(**of_layer))
            return through(door, op, layer, projections, *others[:-2], *states, out=out)

        one = (given | weights)[name].clone()
        with pytest.raises(RuntimeError, match=f"gdn::{op} has no derivative.*To train, take gdn.split"):
            TRANSFORMS[transform](call, one)
        assert all(torch.equal(given[one], before[one]) for one in given), name


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_samples_are_refused(op):
    layer, arguments = layer_call(op)
    before = [one.clone() for one in arguments[-2:]]
    stacked = torch.stack([arguments[0][0]] * 2)
    for door in ("function", "operator"):
        with pytest.raises(
            RuntimeError, match=f"gdn::{op} has no rule for vmap: a call takes a batch by itself"
        ):
            torch.vmap(
                lambda one, door=door: through(door, op, layer, (one, arguments[0][1]), *arguments[1:])
            )(stacked)
    assert all(torch.equal(*pair) for pair in zip(before, arguments[-2:], strict=True))


@pytest.mark.parametrize("door", ["function", "operator"])
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_versions_of_what_is_written(op, door):
    operator, arguments, options = sample(op, "out", more=True)
    if door == "function":
        weights = ol.Weights(*arguments[2:7])
        layer, out = ol.layer(NUMBERS, weights), options["out"]
        if op == "decode":
            layer.decode(arguments[:2], *arguments[7:9], **options)
        else:
            layer.prefill(arguments[:2], arguments[9], *arguments[7:9], **options)
        assert out.any()
    else:
        operator(*arguments, **options)
    some = written("out", arguments, options)
    assert len(some) == 4 and all(
        one._version > 0 for one in some if one is not some[0] and one is not some[1]
    )
    assert all(one._version > 0 for one in some)
    assert all(one._version == 0 for one in (*arguments[:7],))


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_inference_mode(op):
    layer, arguments = layer_call(op)
    with torch.inference_mode():
        given = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in arguments)
        out = getattr(layer, op)(*given)
        assert out.is_inference()
    with pytest.raises(
        ValueError, match="conv_state was made in inference mode, it can be written to in inference mode"
    ):
        getattr(layer, op)(*given)
    assert torch.equal(out, getattr(layer, op)(*arguments))


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_fake_tensors_and_meta(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer, arguments = layer_call(op)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        qkvz, ba = (mode.from_tensor(one) for one in arguments[0])
        out = getattr(layer, op)((qkvz.bfloat16(), ba), *map(mode.from_tensor, arguments[1:]))
        assert out.shape == (B, 4, 8) and out.dtype == torch.bfloat16 and out.is_contiguous()
    reason = getattr(gdn, f"{op}_supported")(layer, (qkvz, ba), *arguments[1:])
    assert reason is not None and "FakeTensor" in reason
    operator, given, options = sample(op)
    meta = [one.to("meta") if isinstance(one, torch.Tensor) else one for one in given]
    assert operator(*meta, **options).device.type == "meta"
    for change, message in [
        ({0: meta[0][:, 1:]}, "mixed_qkvz has [0-9]+ features"),
        ({1: meta[1][1:]}, "mixed_ba has 2 rows, "),
        ({8: given[8]}, "recurrent_state is on cpu, mixed_qkvz is on meta"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            operator(*(change.get(i, one) for i, one in enumerate(meta)), **options)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_modes_and_subclasses_see_the_call(op):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, arguments = layer_call(op)
    torch.manual_seed(0)
    _, others = layer_call(op)
    expected = getattr(layer, op)(*others)
    with Mode():
        assert torch.equal(getattr(layer, op)(*arguments), expected)
    assert f"gdn.{op}.default" in seen

    class Sub(torch.Tensor):
        pass

    (qkvz, ba), *rest = arguments
    assert getattr(layer, op)((qkvz.as_subclass(Sub), ba), *rest).shape == expected.shape
    assert "expected a torch.Tensor itself" in getattr(gdn, f"{op}_supported")(
        layer, (qkvz.as_subclass(Sub), ba), *rest
    )


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_lazily_negated_views_are_read_and_not_written(op):
    layer, arguments = layer_call(op)
    torch.manual_seed(0)
    _, others = layer_call(op)
    (qkvz, ba), *rest = arguments
    negated = torch._neg_view(-qkvz)
    assert negated.is_neg()
    assert torch.equal(getattr(layer, op)((negated, ba), *rest), getattr(layer, op)(*others))
    before = rest[-1].clone()
    with pytest.raises(ValueError, match="recurrent_state is a view that is negated"):
        getattr(layer, op)((qkvz, ba), *rest[:-1], torch._neg_view(rest[-1]))
    assert torch.equal(before, rest[-1])


def test_no_tensor_is_copied():
    """Nothing is allocated but the output, and nothing at all where it is given."""
    for op in ("decode", "prefill"):
        for overload in OVERLOADS:
            operator, arguments, options = sample(op, overload, more=True)
            operator(*arguments, **options)
            with torch.profiler.profile(profile_memory=True) as profile:
                operator(*arguments, **options)
            taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
            out = 0 if overload.endswith("out") else arguments[0].shape[0] * 4 * 8 * 4
            assert taken == out, (op, overload, taken)


@pytest.mark.parametrize("kind", ["Qwen3Next", "Qwen3_5", "Qwen3_5Moe"])
def test_layers_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    name = {"Qwen3Next": "qwen3_next", "Qwen3_5": "qwen3_5", "Qwen3_5Moe": "qwen3_5_moe"}[kind]
    try:
        modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    module = getattr(modeling, f"{kind}GatedDeltaNet")(tiny_models.config(kind, HEADS), 0).eval()
    layer = gdn.Layer.from_module(module)
    assert layer.conv_weight is module.conv1d.weight and layer.norm_weight is module.norm.weight
    hidden = torch.randn(2, 20, 64)
    with torch.no_grad():
        expected = module(hidden)
        rows = hidden.flatten(0, 1)
        if kind == "Qwen3Next":
            projections = module.in_proj_qkvz(rows), module.in_proj_ba(rows)
        else:
            names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
            projections = tuple(getattr(module, one)(rows) for one in names)
        out = layer.prefill(projections, torch.tensor([0, 20, 40]))
        got = module.out_proj(out.flatten(1)).unflatten(0, (2, 20))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="module is a Linear, expected a Gated DeltaNet layer"):
        gdn.Layer.from_module(torch.nn.Linear(2, 2))
    module.activation = "relu"
    with pytest.raises(ValueError, match="activation is 'relu', it must be 'silu'"):
        gdn.Layer.from_module(module)
