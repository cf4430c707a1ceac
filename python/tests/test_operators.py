"""`torch.ops.gdn` as an operator among PyTorch's own: registration, gradients, transforms, modes, versions."""

import pytest

torch = pytest.importorskip("torch")

import oracle

import gdn

HEADS = (2, 4, 3, 5)
WIDE = oracle.features(HEADS)
PACKINGS = ["interleaved", "contiguous"]
OPERATORS = ["split", "split.out", "merge", "merge.out"]
PARTS = ["mixed_qkv", "z", "b", "a"]


def inputs(device="cpu", dtype=torch.float32, n=3, grad=False):
    torch.manual_seed(n)
    make = dict(dtype=dtype, device=device, requires_grad=grad)
    return [torch.randn(n, WIDE[name], **make) for name in ("mixed_qkvz", "mixed_ba")]


def parts_of(tensors, packing="interleaved"):
    return oracle.split(*tensors, *HEADS, packing)


def sample(name, device, grad=False, packing="interleaved"):
    """The operator and arguments for it."""
    qkvz, ba = inputs(device)
    parts = parts_of([qkvz, ba], packing)
    read, written = ((qkvz, ba), parts) if name.startswith("split") else (parts, (qkvz, ba))
    read = [one.clone().requires_grad_(grad) for one in read]
    out, names = {}, PARTS if name.startswith("split") else ["mixed_qkvz", "mixed_ba"]
    if name.endswith(".out"):
        out = dict(zip(names, map(torch.zeros_like, written), strict=True))
    operator = getattr(getattr(torch.ops.gdn, name.partition(".")[0]), "out" if out else "default")
    return operator, (*read, *HEADS, packing), out


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, grad, packing, device):
    if grad and name.endswith(".out"):
        pytest.skip("an out variant has no gradient")
    operator, arguments, out = sample(name, device, grad, packing)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    if not name.endswith(".out"):
        checks += ("test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(operator, arguments, out, test_utils=checks)


def test_schemas():
    schemas = {name: str(sample(name, "cpu")[0]._schema) for name in OPERATORS}
    heads = "SymInt" if "SymInt" in schemas["split"] else "int"
    tail = f"{heads} num_k_heads, {heads} num_v_heads, {heads} head_k_dim, {heads} head_v_dim, "
    tail += 'str packing="interleaved"'
    packed, parts = "Tensor mixed_qkvz, Tensor mixed_ba", "Tensor mixed_qkv, Tensor z, Tensor b, Tensor a"
    assert schemas["split"] == f"gdn::split({packed}, {tail}) -> ({parts})"
    assert schemas["merge"] == f"gdn::merge({parts}, {tail}) -> ({packed})"
    assert schemas["split.out"] == (
        f"gdn::split.out({packed}, {tail}, *, Tensor(a!) mixed_qkv, Tensor(b!) z, Tensor(c!) b, Tensor(d!) a) -> ()"
    )
    assert schemas["merge.out"] == (
        f"gdn::merge.out({parts}, {tail}, *, Tensor(a!) mixed_qkvz, Tensor(b!) mixed_ba) -> ()"
    )


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("door", [gdn, torch.ops.gdn], ids=["functions", "operators"])
def test_gradients(door, packing, device):
    tensors = inputs(device, torch.float64, grad=True)
    parts = [part.detach().requires_grad_() for part in parts_of(tensors, packing)]
    for call, given in [
        (lambda *given: door.split(*given, *HEADS, packing), tensors),
        (lambda *given: door.merge(*given, *HEADS, packing), parts),
    ]:
        assert torch.autograd.gradcheck(call, given)
        assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (1, 2), (0, 3)], ids=str)
def test_gradients_of_some_outputs(used, device):
    ours, theirs = inputs(device, grad=True), inputs(device, grad=True)
    parts, expected = gdn.split(*ours, *HEADS), parts_of(theirs)
    weights = [torch.randn_like(part) for part in expected]
    sum((parts[i] * weights[i]).sum() for i in used).backward()
    sum((expected[i] * weights[i]).sum() for i in used).backward()
    for one, other in zip(ours, theirs, strict=True):
        other = torch.zeros_like(other) if other.grad is None else other.grad
        assert (one.grad is None and not other.any()) or torch.equal(one.grad, other)


def test_gradients_that_are_expanded_or_strided(device):
    ours, theirs = inputs(device, grad=True), inputs(device, grad=True)
    for tensors, parts in [(ours, gdn.split(*ours, *HEADS)), (theirs, parts_of(theirs))]:
        strided = [torch.ones(1, *part.shape[1:], device=device).expand_as(part) for part in parts]
        strided[2] = torch.arange(12.0, device=device).reshape(4, 3).t()
        torch.autograd.backward(parts, strided)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_of_a_merge(flat, device):
    ours = [part.detach().requires_grad_() for part in parts_of(inputs(device))]
    given = [ours[0], ours[1].flatten(1) if flat else ours[1], *ours[2:]]
    packed = gdn.merge(*given, *HEADS)
    weights = [torch.randn_like(one) for one in packed]
    (packed[0] * weights[0]).sum().backward()
    assert torch.equal(ours[0].grad, parts_of(weights)[0]) and torch.equal(ours[1].grad, parts_of(weights)[1])
    assert all(one.grad is None or not one.grad.any() for one in ours[2:])
    del packed


def test_one_input_requires_grad(device):
    qkvz, ba = inputs(device)
    qkvz.requires_grad_()
    parts = gdn.split(qkvz, ba, *HEADS)
    sum(part.sum() for part in parts).backward()
    assert torch.equal(qkvz.grad, torch.ones_like(qkvz)) and ba.grad is None


def test_integers_beside_floats_that_require_grad(device):
    qkvz, ba = inputs(device)
    qkvz.requires_grad_()
    parts = gdn.split(qkvz, ba.to(torch.int32), *HEADS)
    assert parts[2].dtype == torch.int32 and not parts[2].requires_grad
    (parts[0].sum() + parts[1].sum()).backward()
    assert torch.equal(qkvz.grad, torch.ones_like(qkvz))


@pytest.mark.parametrize("door", [gdn.split, torch.ops.gdn.split], ids=["function", "operator"])
def test_no_grad_and_inference(door, device):
    qkvz, ba = inputs(device, grad=True)
    expected = [part.detach() for part in parts_of([qkvz, ba])]
    with torch.no_grad():
        parts = door(qkvz, ba, *HEADS)
        assert not any(part.requires_grad for part in parts)
    with torch.inference_mode():
        inside = door(qkvz, ba, *HEADS)
        assert all(part.is_inference() for part in inside)
        again = door(inside[0].new_ones(3, WIDE["mixed_qkvz"]), inside[2].new_ones(3, 8), *HEADS)
    for got in (parts, inside):
        assert all(map(torch.equal, got, expected))
    assert all((part == 1).all() for part in again)
    assert all(part.requires_grad for part in door(qkvz, ba, *HEADS))


def split_into(door, qkvz, ba, out):
    if door == "function":
        gdn.split(qkvz, ba, *HEADS, out=out)
    else:
        torch.ops.gdn.split.out(qkvz, ba, *HEADS, **dict(zip(PARTS, out)))


@pytest.mark.parametrize("door", ["function", "operator"])
def test_versions_of_what_is_written(door, device):
    qkvz, ba = inputs(device)
    out = tuple(torch.empty_like(part) for part in parts_of([qkvz, ba]))
    packed = (torch.empty_like(qkvz), torch.empty_like(ba))
    before = [one._version for one in (*out, *packed)]
    split_into(door, qkvz, ba, out)
    if door == "function":
        gdn.merge(*out, *HEADS, out=packed)
    else:
        torch.ops.gdn.merge.out(*out, *HEADS, mixed_qkvz=packed[0], mixed_ba=packed[1])
    bumped = [one._version > old for one, old in zip((*out, *packed), before, strict=True)]
    assert all(bumped)
    assert qkvz._version == ba._version == 0


@pytest.mark.parametrize("door", ["function", "operator"])
def test_a_saved_tensor_that_is_written_is_noticed(door, device):
    qkvz, ba = inputs(device)
    out = tuple(torch.ones_like(part) for part in parts_of([qkvz, ba]))
    weight = torch.ones_like(out[0], requires_grad=True)
    product = weight * out[0]
    split_into(door, qkvz, ba, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("door", ["function", "operator"])
def test_out_under_inference_mode(door, device):
    qkvz, ba = inputs(device)
    with torch.inference_mode():
        out = tuple(torch.zeros_like(part) for part in parts_of([qkvz, ba]))
        split_into(door, qkvz, ba, out)
    assert all(map(torch.equal, out, parts_of([qkvz, ba])))
    out = tuple(torch.zeros_like(part) for part in out)
    with torch.inference_mode():
        split_into(door, qkvz, ba, out)
    assert all(part._version == 1 for part in out), "ordinary tensors have versions there too"


def test_out_and_gradients_do_not_mix(device):
    qkvz, ba = inputs(device, grad=True)
    out = tuple(torch.zeros_like(part) for part in parts_of([qkvz.detach(), ba.detach()]))
    with pytest.raises(ValueError, match="out cannot be given where an input requires grad"):
        gdn.split(qkvz, ba, *HEADS, out=out)
    assert not any(one.any() for one in out)
    with torch.no_grad():
        gdn.split(qkvz, ba, *HEADS, out=out)
    assert all(map(torch.equal, out, parts_of([qkvz, ba])))


@pytest.mark.parametrize("wrong", [None, 7, "x"])
def test_out_beside_what_is_no_tensor(wrong, device):
    """It is refused in words, wherever it is, also where PyTorch has to see the call: by the way to its operators."""
    from gdn import _torch

    read = inputs(device, grad=True)
    out = [torch.zeros_like(part) for part in parts_of([one.detach() for one in read])]
    parts, packed = [part.clone().requires_grad_() for part in out], [torch.zeros_like(one) for one in read]
    refused = pytest.raises((TypeError, ValueError, RuntimeError))
    for ours, theirs, given, written in (
        (gdn.split, _torch.split, read, out),
        (gdn.merge, _torch.merge, parts, packed),
    ):
        cases = [
            ([wrong if j == i else one for j, one in enumerate(given)], written) for i in range(len(given))
        ]
        cases += [
            (given, [wrong if j == i else one for j, one in enumerate(written)]) for i in range(len(written))
        ]
        for some, into in cases:
            with refused:
                ours(*some, *HEADS, out=tuple(into))
            with refused:
                theirs(*some, *HEADS, "interleaved", tuple(into))
    assert not any(one.any() for one in (*out, *packed))


def test_derivatives_are_not_lost(device):
    """The operators' out variants and the other backend have none, and say so."""
    fw = torch.autograd.forward_ad
    qkvz, ba = inputs(device)
    parts = parts_of([qkvz, ba])
    out = {name: torch.zeros_like(part) for name, part in zip(PARTS, parts, strict=True)}
    packed = dict(mixed_qkvz=torch.zeros_like(qkvz), mixed_ba=torch.zeros_like(ba))
    split, merge = torch.ops.gdn.split.out, torch.ops.gdn.merge.out

    def refused(message, qkvz, parts, out):
        with pytest.raises(ValueError, match=f"out cannot be given where .* {message}"):
            split(qkvz, ba, *HEADS, **out)
        with pytest.raises(ValueError, match=f"out cannot be given where .* {message}"):
            merge(*parts, *HEADS, **packed)
        with pytest.raises(ValueError, match="backend is 'triton', which has no derivative"):
            gdn.split(qkvz, ba, *HEADS, backend="triton")
        with pytest.raises(ValueError, match="backend is 'triton', which has no derivative"):
            gdn.merge(*parts, *HEADS, backend="triton")

    refused(
        "requires grad", qkvz.clone().requires_grad_(), [parts[0].clone().requires_grad_(), *parts[1:]], out
    )
    with fw.dual_level():
        duals = [fw.make_dual(one, torch.ones_like(one)) for one in (qkvz, parts[0], out["mixed_qkv"])]
        refused("has a tangent", duals[0], [duals[1], *parts[1:]], out)
        with pytest.raises(ValueError, match="has a tangent"):
            split(qkvz, ba, *HEADS, **out | dict(mixed_qkv=duals[2]))
        assert not any(one.any() for one in (*out.values(), *packed.values()))
        split(qkvz, ba, *HEADS, **out)
    with torch.no_grad():
        split(qkvz.clone().requires_grad_(), ba, *HEADS, **out)
    assert all(map(torch.equal, out.values(), parts))


def test_out_that_requires_grad_is_refused(device):
    qkvz, ba = inputs(device)
    out = tuple(torch.zeros_like(part).requires_grad_() for part in parts_of([qkvz, ba]))
    with pytest.raises(ValueError, match="mixed_qkv requires grad"):
        gdn.split(qkvz, ba, *HEADS, out=out)
    assert not any(one.any() for one in out)


def test_tensors_of_two_devices_are_refused():
    qkvz, ba = inputs("cpu")
    for tensors in ((qkvz.to("meta"), ba), (qkvz, ba.to("meta"))):
        with pytest.raises((ValueError, RuntimeError), match="mixed_ba is on"):
            gdn.split(*tensors, *HEADS)


@pytest.mark.parametrize("n", [0, 3])
def test_one_of_several_tensors_on_meta(n):
    qkvz, ba = inputs("cpu", n=n)
    parts = dict(zip(PARTS, parts_of([qkvz, ba]), strict=True))
    for name in PARTS:
        wrong = parts | {name: parts[name].to("meta")}
        for call in (
            lambda: torch.ops.gdn.split.out(qkvz, ba, *HEADS, **wrong),
            lambda: torch.ops.gdn.merge(*wrong.values(), *HEADS),
            lambda: torch.ops.gdn.merge.out(*wrong.values(), *HEADS, mixed_qkvz=qkvz, mixed_ba=ba),
        ):
            with pytest.raises((ValueError, RuntimeError), match="is on (meta|cpu), "):
                call()


@pytest.mark.parametrize("packing", PACKINGS)
def test_functional_gradients(packing, device):
    qkvz, ba = inputs(device)
    weights = [torch.randn_like(part) for part in parts_of([qkvz, ba])]

    def loss(split, qkvz, ba):
        parts = split(qkvz, ba, *HEADS, packing)
        return sum((part.square() * weight).sum() for part, weight in zip(parts, weights, strict=True))

    expected = torch.func.grad(lambda *t: loss(oracle.split, *t), argnums=(0, 1))(qkvz, ba)
    got = torch.func.grad(lambda *t: loss(gdn.split, *t), argnums=(0, 1))(qkvz, ba)
    assert all(map(torch.equal, got, expected))
    with pytest.raises(RuntimeError, match="functorch transforms do not see into gdn::split, call gdn.split"):
        torch.func.grad(lambda *t: loss(torch.ops.gdn.split, *t), argnums=(0, 1))(qkvz, ba)


def batch_of(device, dim=0):
    return [torch.stack([one, 2 * one, 3 * one], dim) for one in inputs(device)]


@pytest.mark.parametrize("door", [gdn, torch.ops.gdn], ids=["functions", "operators"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap(dim, door, device):
    batch = batch_of(device, dim)
    got = torch.vmap(lambda *t: door.split(*t, *HEADS), in_dims=dim)(*batch)
    expected = [
        torch.stack(some)
        for some in zip(*[parts_of([one.select(dim, i) for one in batch]) for i in range(3)])
    ]
    assert all(map(torch.equal, got, expected))
    back = torch.vmap(lambda *t: door.merge(*t, *HEADS), out_dims=dim)(*got)
    assert all(map(torch.equal, back, batch))
    # One of the tensors is the same in all.
    got = torch.vmap(lambda *t: door.split(*t, *HEADS), in_dims=(dim, None))(
        batch[0], batch[1].select(dim, 1).contiguous()
    )
    assert all(map(torch.equal, got[:2], expected[:2]))
    assert all(torch.equal(part, expected[i][1].expand_as(part)) for i, part in enumerate(got) if i > 1)


def test_vmap_of_gradients(device):
    batch = batch_of(device)

    def loss(split, qkvz, ba):
        return sum(part.pow(3).sum() for part in split(qkvz, ba, *HEADS, "interleaved"))

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        got, expected = (
            torch.vmap(transform(lambda *t: loss(split, *t), argnums=(0, 1)))(*batch)
            for split in (gdn.split, oracle.split)
        )
        assert all(map(torch.allclose, got, expected))


@pytest.mark.parametrize("door", [gdn, torch.ops.gdn], ids=["functions", "operators"])
def test_vmap_says_what_is_wrong(door, device):
    batch = batch_of(device)
    for wrong, message in [
        ((batch[0][:, 0], batch[1]), "mixed_qkvz has 1 dims, expected 2"),
        ((batch[0][..., 1:], batch[1]), "mixed_qkvz has 51 features"),
        ((batch[0], batch[1][:, 1:]), "mixed_ba has 6 rows, mixed_qkvz has 9"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.vmap(lambda *t: door.split(*t, *HEADS))(*wrong)
    out = tuple(torch.zeros_like(part) for part in parts_of(inputs(device)))
    with pytest.raises((ValueError, RuntimeError), match="Batching rule not implemented for gdn::split.out"):
        torch.vmap(lambda *t: gdn.split(*t, *HEADS, out=out) and t[0])(*batch)
    assert not any(part.any() for part in out)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("door", [gdn, torch.ops.gdn], ids=["functions", "operators"])
def test_forward_mode(door, packing, device):
    """The op is linear: what it does to tensors it does to their tangents."""
    fw = torch.autograd.forward_ad
    tensors = inputs(device)
    tangents = [torch.randn_like(one) for one in tensors]
    parts, moved = parts_of(tensors, packing), parts_of(tangents, packing)
    with fw.dual_level():
        duals = [fw.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
        got = door.split(*duals, *HEADS, packing)
        for one, part, tangent in zip(got, parts, moved, strict=True):
            primal, found = fw.unpack_dual(one)
            assert torch.equal(primal, part) and torch.equal(found, tangent)
        back = [fw.unpack_dual(one) for one in door.merge(*got, *HEADS, packing)]
        assert all(torch.equal(one.primal, other) for one, other in zip(back, tensors))
        assert all(torch.equal(one.tangent, other) for one, other in zip(back, tangents))
        # Of one tensor alone; that of the other's parts is zero.
        got = [fw.unpack_dual(one).tangent for one in door.split(duals[0], tensors[1], *HEADS, packing)]
        assert torch.equal(got[0], moved[0]) and torch.equal(got[1], moved[1])
        assert not any(tangent is not None and tangent.any() for tangent in got[2:])
        plain = door.split(*tensors, *HEADS, packing)
        assert all(fw.unpack_dual(one).tangent is None for one in plain)
    if door is gdn:
        _, got = torch.func.jvp(lambda *t: gdn.split(*t, *HEADS, packing), tuple(tensors), tuple(tangents))
        assert all(map(torch.equal, got, moved))


@pytest.mark.parametrize("door", [gdn, torch.ops.gdn], ids=["functions", "operators"])
def test_forward_mode_beside_integers_and_gradients(door, device):
    fw = torch.autograd.forward_ad
    qkvz, ba = inputs(device, torch.float64)
    with fw.dual_level():
        dual = fw.make_dual(qkvz, torch.ones_like(qkvz))
        parts = door.split(dual, ba.to(torch.int32), *HEADS)
        assert torch.equal(fw.unpack_dual(parts[0]).tangent, torch.ones_like(parts[0]))
        assert fw.unpack_dual(parts[2]).tangent is None and parts[2].dtype == torch.int32
    tensors = inputs(device, torch.float64, grad=True)
    check = dict(check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradcheck(lambda *t: door.split(*t, *HEADS), tensors, **check)
    assert torch.autograd.gradgradcheck(lambda *t: door.split(*t, *HEADS), tensors, check_fwd_over_rev=True)


@pytest.mark.parametrize("door", ["function", "operator"])
@pytest.mark.parametrize("kind", ["negated", "conjugated"])
def test_lazy_views_are_read_and_not_written(kind, door, device):
    dtype = torch.float32 if kind == "negated" else torch.complex64
    lazy = torch._neg_view if kind == "negated" else torch.conj
    qkvz, ba = inputs(device, dtype)
    out = tuple(torch.zeros_like(part) for part in parts_of([qkvz, ba]))
    split_into(door, lazy(qkvz), ba, out)
    assert all(map(torch.equal, out, parts_of([lazy(qkvz), ba])))
    before = [one.clone() for one in out]
    for i, name in enumerate(PARTS):
        with pytest.raises(ValueError, match=f"{name} is a view that is negated or conjugated"):
            split_into(door, qkvz, ba, (*out[:i], lazy(out[i]), *out[i + 1 :]))
    assert all(map(torch.equal, out, before))


def test_what_is_written_has_no_tangent(device):
    fw = torch.autograd.forward_ad
    qkvz, ba = inputs(device)
    out = tuple(torch.zeros_like(part) for part in parts_of([qkvz, ba]))
    with fw.dual_level():
        with pytest.raises(ValueError, match="out cannot be given where a tensor has a tangent"):
            gdn.split(fw.make_dual(qkvz, torch.ones_like(qkvz)), ba, *HEADS, out=out)
        dual = (fw.make_dual(out[0], torch.ones_like(out[0])), *out[1:])
        with pytest.raises(ValueError, match="out cannot be given where a tensor has a tangent"):
            gdn.split(qkvz, ba, *HEADS, out=dual)
        assert not any(one.any() for one in out)
        gdn.split(qkvz, ba, *HEADS, out=out)
    assert all(map(torch.equal, out, parts_of([qkvz, ba])))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_op(device):
    def both(qkvz, ba):
        return gdn.split(qkvz, ba, 2, 4, 3, 5)

    traced = torch.jit.trace(both, inputs(device), check_trace=False)
    assert "gdn::split" in str(traced.graph)
    other = inputs(device, n=8)
    assert all(map(torch.equal, traced(*other), parts_of(other)))


def test_fake_tensors(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        qkvz, ba = (
            torch.empty(7, WIDE["mixed_qkvz"], device=device),
            torch.empty(7, 8, device=device, dtype=torch.half),
        )
        parts = gdn.split(qkvz, ba, *HEADS)
        packed = gdn.merge(*parts, *HEADS)
    assert [tuple(part.shape) for part in parts] == [(7, 32), (7, 4, 5), (7, 4), (7, 4)]
    assert [part.dtype for part in parts] == [torch.float32] * 2 + [torch.half] * 2
    assert all(part.is_contiguous() and part.device.type == device for part in parts)
    assert [tuple(one.shape) for one in packed] == [tuple(qkvz.shape), tuple(ba.shape)]


@pytest.mark.parametrize("door", [gdn, torch.ops.gdn], ids=["functions", "operators"])
def test_meta_tensors_are_checked(door):
    qkvz, ba = (one.to("meta") for one in inputs())
    parts = door.split(qkvz, ba, *HEADS)
    assert all(part.device.type == "meta" for part in (*parts, *door.merge(*parts, *HEADS)))
    for call, message in [
        (lambda: door.split(qkvz[:, 1:], ba, *HEADS), "mixed_qkvz has 51 features"),
        (lambda: door.split(qkvz, ba[1:], *HEADS), "mixed_ba has 2 rows, "),
        (lambda: door.split(qkvz, ba, 0, 4, 3, 5), "num_k_heads is 0, it must be at least 1"),
        (lambda: door.split(qkvz, ba, *HEADS, "flat"), "packing is 'flat'"),
        (lambda: door.merge(parts[0], parts[1].transpose(1, 2), *parts[2:], *HEADS), "z has shape"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()


def test_dispatch_modes_see_the_call(device):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    tensors = inputs(device)
    out = tuple(torch.empty_like(part) for part in parts_of(tensors))
    with Mode():
        gdn.split(*tensors, *HEADS)
        gdn.split(*tensors, *HEADS, out=out)
        gdn.merge(*out, *HEADS)
    assert [name for name in seen if name.startswith("gdn")] == [
        "gdn.split.default",
        "gdn.split.out",
        "gdn.merge.default",
    ]
    assert all(map(torch.equal, out, parts_of(tensors)))


def test_function_modes_see_the_call(device):
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    tensors = inputs(device)
    with Mode(), torch.device(device):
        assert all(map(torch.equal, gdn.split(*tensors, *HEADS), parts_of(tensors)))


def test_autocast_leaves_dtypes(device):
    tensors = inputs(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        parts = gdn.split(*tensors, *HEADS)
    assert all(part.dtype == torch.float32 for part in parts)


def test_the_profiler_names_the_operator():
    tensors = inputs()
    with torch.profiler.profile() as profile:
        torch.ops.gdn.split(*tensors, *HEADS)
    assert any(event.key == "gdn::split" for event in profile.key_averages())


def test_deepcopy_and_checkpoint(device):
    from torch.utils.checkpoint import checkpoint

    ours, theirs = inputs(device, grad=True), inputs(device, grad=True)
    sum(
        part.square().sum()
        for part in checkpoint(lambda *t: gdn.split(*t, *HEADS), *ours, use_reentrant=False)
    ).backward()
    sum(part.square().sum() for part in parts_of(theirs)).backward()
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours, theirs, strict=True))


def test_importing_again_registers_once(python):
    text = """
import importlib, sys, torch, gdn
for name in [name for name in sys.modules if name == "gdn" or name == "gdn._torch"]:
    del sys.modules[name]
try:
    import gdn
except Exception as error:
    print(type(error).__name__, error)
print(torch.ops.gdn.split(torch.ones(1, 52), torch.ones(1, 8), 2, 4, 3, 5)[0].shape)
"""
    assert python(text).endswith("torch.Size([1, 32])\n")
