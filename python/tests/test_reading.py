"""Tensors of PyTorch's are read where they are: what was done to one since the call before is seen, and whatever is no ordinary tensor."""

import pytest

torch = pytest.importorskip("torch")

import oracle

import gdn

HEADS = (2, 4, 8, 16)
WIDE = oracle.features(HEADS)["mixed_qkvz"]
DTYPES = [torch.bfloat16, torch.float32, torch.int16, torch.int64]


@pytest.fixture(params=DTYPES, ids=str)
def given(request, device):
    return oracle.packed(6, HEADS, request.param, device=device)


def check(qkvz, ba):
    """Both doors, with fresh outputs and with given ones."""
    expected = oracle.split_bits(qkvz.resolve_neg(), ba, HEADS, "interleaved")
    for split in (gdn.split, torch.ops.gdn.split):
        parts = tuple(split(qkvz, ba, *HEADS))
        oracle.same(parts, expected)
    out = tuple(torch.zeros_like(part) for part in parts)
    gdn.split(qkvz, ba, *HEADS, out=out)
    oracle.same(out, expected)


def test_members_are_found():
    """In the release at hand; where it fails, tensors are read by C functions, slower and as well."""
    assert gdn._gdn.register(torch) == ["objects", "c10::TensorImpl"]


@pytest.mark.parametrize("inference", [False, True])
def test_what_was_done_to_a_tensor_is_seen(given, inference):
    qkvz, ba = given
    other = oracle.packed(40, HEADS, qkvz.dtype, device=qkvz.device.type)[0]
    with torch.inference_mode(inference):
        changes = [
            lambda one: one.set_(other[3:9]),
            lambda one: one.as_strided_((6, WIDE), (3 * WIDE, 1), WIDE),
            lambda one: one.resize_(6, WIDE),
            lambda one: one.set_(other.flatten()[1 : 1 + 6 * WIDE].view(6, WIDE)),
            lambda one: setattr(one, "data", other[::2][:6]),
            lambda one: one.squeeze_().unsqueeze_(0).squeeze_(0),
            lambda one: one.set_(torch.cat([other, other], 1)[:6, WIDE:]),
        ]
        qkvz = qkvz.clone()  # made in this mode
        check(qkvz, ba)
        for change in changes:
            change(qkvz)
            check(qkvz, ba)


def test_what_is_not_ordinary_is_none(given):
    """After tensors of its dtype were read in place: lazy views, wrappers, other shapes, devices and layouts."""
    qkvz, ba = given
    check(qkvz, ba)
    if qkvz.is_floating_point():
        check(torch._neg_view(qkvz), ba)
        with pytest.raises(ValueError, match="negated or conjugated"):
            out = tuple(torch.zeros_like(part) for part in gdn.split(qkvz, ba, *HEADS))
            gdn.split(qkvz, ba, *HEADS, out=(torch._neg_view(out[0]), *out[1:]))
        expected = gdn.split(qkvz, ba, *HEADS)
        got = torch.func.vmap(lambda one, other: gdn.split(one, other, *HEADS))(qkvz[None], ba[None])
        oracle.same(tuple(one[0] for one in got), [oracle.bits(one) for one in expected])
    check(torch.nn.Parameter(qkvz, requires_grad=False), ba)
    for other, error in [
        (qkvz[None], "mixed_qkvz has shape"),
        (qkvz[None, None, None, None, None], "mixed_qkvz has .* dims"),
        (qkvz.t(), "stride"),
    ]:
        with pytest.raises(ValueError, match=error):
            gdn.split(other, ba, *HEADS)
    for other, error in ((qkvz.to_sparse(), "(?i)sparse|layout|strided"), (qkvz.to("meta"), "meta")):
        with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError), match=error):
            gdn.split(other, ba, *HEADS)
    freed = qkvz.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="mixed_qkvz has shape .* and no memory"):
        gdn.split(freed, ba, *HEADS)
    check(qkvz, ba)
