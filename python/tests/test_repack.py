"""`gdn.repack_weight`: after it, what the projection makes is contiguous, and the split is views."""

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

import oracle
import oracle_numpy
import tiny_models

import gdn

HEADS = [(1, 1, 4, 4), (2, 4, 8, 16), (3, 9, 7, 5), (2, 10, 16, 8), (4, 4, 32, 64)]
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.complex64,
    torch.bool,
    torch.float64,
]


def expected_order(heads, projection):
    """For every output of the contiguous weight, the one of the interleaved weight that it was."""
    at = oracle_numpy.order(*heads, "interleaved")
    names = ["mixed_qkv", "z"] if projection == "qkvz" else ["b", "a"]
    return torch.from_numpy(np.concatenate([at[name] for name in names]))


def outputs(heads, projection):
    return oracle.features(heads)["mixed_qkvz" if projection == "qkvz" else "mixed_ba"]


@pytest.mark.parametrize("projection", ["qkvz", "ba"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_both_dims_and_back(heads, dtype, projection, device):
    order = expected_order(heads, projection).to(device)
    weight = oracle.anything((outputs(heads, projection), 13), dtype, device)
    for dim, given in [
        (0, weight),
        (1, weight.view(oracle.BITS[dtype.itemsize]).t().contiguous().view(dtype)),
    ]:
        before = oracle.bits(given).clone()
        got = gdn.repack_weight(given, heads, dim, projection=projection)
        assert got.dtype == dtype and got.device == given.device and got.is_contiguous()
        assert got.data_ptr() != given.data_ptr()
        assert torch.equal(oracle.bits(got), before.index_select(dim, order))
        back = gdn.repack_weight(got, heads, dim, projection=projection, to="interleaved")
        assert torch.equal(oracle.bits(back), before) and torch.equal(oracle.bits(given), before)


@pytest.mark.parametrize("heads", HEADS[1:], ids=str)
def test_the_split_becomes_views(heads, device):
    """x @ W of the repacked weights is the contiguous packing; of the others, the interleaved one."""
    hidden = torch.randint(-3, 4, (5, 11), device=device).double()
    qkvz = torch.randint(-3, 4, (outputs(heads, "qkvz"), 11), device=device).double()
    ba = torch.randint(-3, 4, (outputs(heads, "ba"), 11), device=device).double()
    parts = gdn.split(hidden @ qkvz.t(), hidden @ ba.t(), *heads)
    after = [hidden @ gdn.repack_weight(weight, heads).t() for weight in (qkvz, ba)]
    qkv, z = after[0].split([parts[0].shape[1], parts[1][0].numel()], 1)
    b, a = after[1].chunk(2, 1)
    for one, view in zip(parts, (qkv, z.unflatten(1, parts[1].shape[1:]), b, a), strict=True):
        assert torch.equal(one, view)
    assert all(map(torch.equal, gdn.split(*after, *heads, "contiguous"), parts))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", ["f4", "i1", "f8", "u2", "c8", ">f4"])
def test_arrays_of_numpy(dtype, dim):
    heads = (3, 9, 7, 5)
    weight = oracle_numpy.anything((outputs(heads, "qkvz"), 6), dtype)
    given = weight if dim == 0 else np.ascontiguousarray(weight.T)
    got = gdn.repack_weight(given, heads, dim)
    order = expected_order(heads, "qkvz").numpy()
    assert type(got) is np.ndarray and got.dtype == given.dtype
    assert got.tobytes() == given.take(order, dim).tobytes()
    assert gdn.repack_weight(got, heads, dim, to="interleaved").tobytes() == given.tobytes()


def test_strided_weights(device):
    heads = (2, 4, 8, 16)
    wide = oracle.anything((160, 40), torch.float32, device)
    for given in (wide[:, 3:20], wide[:, ::2], wide.t().contiguous().t()):
        try:
            got = gdn.repack_weight(given, heads)
        except ValueError as error:
            assert "rows must be dense" in str(error)
        else:
            order = expected_order(heads, "qkvz").to(device)
            assert torch.equal(oracle.bits(got), oracle.bits(given.contiguous())[order])


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_bias_and_scales_of_each_output(kind):
    heads = (2, 4, 8, 16)
    bias = torch.arange(160.0)
    got = gdn.repack_weight(bias if kind == "torch" else bias.numpy(), heads)
    assert torch.equal(torch.as_tensor(got), expected_order(heads, "qkvz").float())


@pytest.mark.parametrize("heads", [(2, 4, 128, 128), (4, 8, 128, 256)], ids=str)
def test_scales_of_blocks(heads, device):
    weight = torch.arange(outputs(heads, "qkvz"), device=device)
    scales = weight[::128, None].expand(-1, 3).contiguous().float()
    got = gdn.repack_weight(scales, heads, block=128)
    assert torch.equal(got[:, 0], gdn.repack_weight(weight, heads)[::128].float())
    with pytest.raises(ValueError, match="128"):
        gdn.repack_weight(torch.ones(3, 2), (2, 4, 16, 32), block=128, projection="qkvz")


def test_packed_groups(device):
    heads = (2, 4, 16, 32)
    every = torch.arange(outputs(heads, "qkvz"), device=device, dtype=torch.int32)
    packed = every[::8].repeat(5, 1)
    got = gdn.repack_weight(packed, heads, 1, group=8)
    assert torch.equal(got[3], gdn.repack_weight(every, heads)[::8])
    with pytest.raises(ValueError):
        gdn.repack_weight(
            torch.ones(5, 26 * 2 // 4, dtype=torch.int32), (2, 4, 3, 5), 1, group=4, projection="qkvz"
        )


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("projection", ["qkvz", "ba"])
def test_shards_of_the_repacked_are_the_shards_repacked(projection, ranks):
    """A rank's weight, packed interleaved, is a slice; contiguous, it is a slice of every part."""
    heads = (4, 12, 8, 16)
    hk, hv, dk, dv = heads
    shard = (hk // ranks, hv // ranks, dk, dv)
    weight = torch.arange(outputs(heads, projection))[:, None].repeat(1, 3)
    whole = gdn.repack_weight(weight, heads, projection=projection)
    sizes = [hk * dk, hk * dk, hv * dv, hv * dv] if projection == "qkvz" else [hv, hv]
    for rank in range(ranks):
        mine = gdn.repack_weight(weight.chunk(ranks)[rank].contiguous(), shard, projection=projection)
        slices = [part.chunk(ranks)[rank] for part in whole.split(sizes)]
        assert torch.equal(mine, torch.cat(slices))


def test_weights_that_require_grad():
    heads = (2, 4, 8, 16)
    weight = torch.randn(160, 5, requires_grad=True)
    got = gdn.repack_weight(weight, heads)
    got.backward(torch.arange(160.0)[:, None].expand(-1, 5))
    order = expected_order(heads, "qkvz")
    assert torch.equal(weight.grad[order][:, 0], torch.arange(160.0))
    parameter = torch.nn.Parameter(torch.randn(160, 5))
    with torch.no_grad():
        assert torch.equal(gdn.repack_weight(parameter, heads), parameter[order])


def test_meta_weights():
    got = gdn.repack_weight(torch.empty(160, 5, device="meta"), (2, 4, 8, 16))
    assert got.shape == (160, 5) and got.device.type == "meta"


@pytest.mark.parametrize("make", [torch.zeros, np.zeros], ids=["torch", "numpy"])
def test_what_is_refused(make):
    heads = (2, 4, 8, 16)
    for arguments, options, message in [
        ((make((161, 5)), heads), {}, "weight has 161 outputs, .* need 160 or 8"),
        ((make((8, 5)), heads), dict(projection="qkvz"), "weight has 8 outputs, .* need 160"),
        ((make((160, 5)), heads), dict(projection="ba"), "weight has 160 outputs, .* need 8"),
        ((make((160, 5)), heads), dict(projection="z"), "projection is 'z', expected 'qkvz' or 'ba'"),
        ((make((160, 5)), heads, 2), {}, "dim is 2, it must be 0 or 1"),
        ((make((160, 5)), heads, -1), {}, "dim is -1, it must be 0 or 1"),
        ((make((160,)), heads, 1), {}, "dim is 1, it must be 0 or 1 and one of the weight's 1"),
        ((make((160, 5)), (2, 3, 8, 16)), {}, "num_v_heads = 3 is not a multiple of num_k_heads = 2"),
        ((make((160, 5)), heads), dict(to="flat"), "to is 'flat'"),
        ((make((4, 2)), heads), dict(block=0, projection="qkvz"), "0"),
    ]:
        with pytest.raises(ValueError, match=message):
            gdn.repack_weight(*arguments, **options)
    for wrong in (None, 3, "weight", [[1.0]]):
        with pytest.raises(TypeError, match="weight"):
            gdn.repack_weight(wrong, heads)
    with pytest.raises((TypeError, ValueError)):
        gdn.repack_weight(make((160, 5)), (2, 4, 8))


def test_transformers_own_layer():
    """The layer's own projections, repacked: what it splits out of the old ones, views of the new ones are."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next import modeling_qwen3_next

    heads = (2, 4, 8, 16)
    config = tiny_models.config("Qwen3Next", heads)
    layer = modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0)
    hidden = torch.randn(1, 5, config.hidden_size)
    with torch.no_grad():
        qkvz, ba = layer.in_proj_qkvz(hidden), layer.in_proj_ba(hidden)
        q, k, v, z, b, a = layer.fix_query_key_value_ordering(qkvz, ba)
        new_qkvz, new_ba = (
            gdn.repack_weight(one.weight, heads) for one in (layer.in_proj_qkvz, layer.in_proj_ba)
        )
        qkvz, ba = (hidden @ new_qkvz.t())[0], (hidden @ new_ba.t())[0]
    expected = torch.cat([part.reshape(5, -1) for part in (q, k, v, z)], 1)
    torch.testing.assert_close(qkvz, expected)
    torch.testing.assert_close(ba, torch.cat([b.reshape(5, -1), a.reshape(5, -1)], 1))
