"""`torch.compile` and `torch.export`: one graph, for any number of rows, with the bits of the oracle."""

import pytest

torch = pytest.importorskip("torch")

import oracle
from test_operators import HEADS, PARTS, WIDE, inputs, parts_of
from torch._dynamo.testing import CompileCounterWithBackend

import gdn

BACKENDS = ["aot_eager", "inductor"]
DOORS = {
    "function": lambda qkvz, ba: gdn.split(qkvz, ba, *HEADS),
    "operator": lambda qkvz, ba: torch.ops.gdn.split(qkvz, ba, *HEADS),
    "drop-in": lambda qkvz, ba: gdn.fused_qkvzba_split_reshape_cat(qkvz, ba, *HEADS),
    "contiguous drop-in": lambda qkvz, ba: gdn.fused_qkvzba_split_reshape_cat_contiguous(qkvz, ba, *HEADS),
}


def packing(door):
    return "contiguous" if door.startswith("contiguous") else "interleaved"


@pytest.fixture(autouse=True)
def from_nothing():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **how):
    """The function compiled whole, and the counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **how), counter


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("door", DOORS)
def test_one_graph_for_any_number_of_rows(door, backend, device):
    def layer(qkvz, ba):
        qkv, z, b, a = DOORS[door](qkvz + 1, ba)
        return qkv * 2, z, b.sigmoid(), a

    run, counter = compiled(layer, backend, dynamic=True)
    for n in (5, 3, 64, 129, 2):
        qkvz, ba = inputs(device, n=n)
        qkv, z, b, a = parts_of([qkvz + 1, ba], packing(door))
        got = run(qkvz, ba)
        assert torch.equal(got[0], qkv * 2) and torch.equal(got[1], z) and torch.equal(got[3], a)
        torch.testing.assert_close(got[2], b.sigmoid())
    assert counter.frame_count == 1
    assert counter.op_count >= 1


@pytest.mark.parametrize("door", DOORS)
def test_marked_rows_are_not_specialised(door, device):
    """Rows marked as dynamic stay so: PyTorch raises where something has fixed them."""
    run, counter = compiled(DOORS[door])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (7, 2, 33):
            qkvz, ba = inputs(device, n=n)
            for one in (qkvz, ba):
                torch._dynamo.mark_dynamic(one, 0)
            assert all(map(torch.equal, run(qkvz, ba), parts_of([qkvz, ba], packing(door))))
    assert counter.frame_count == 1


@pytest.mark.parametrize("n", [0, 1])
def test_no_rows_and_one(n, device):
    run, _ = compiled(DOORS["function"], "inductor")
    tensors = inputs(device, n=n)
    got = run(*tensors)
    for one, other in zip(got, parts_of(tensors), strict=True):
        assert torch.equal(one, other) and one.shape == other.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("door", ["function", "operator"])
def test_out(door, backend, device):
    def write(qkvz, ba, out):
        if door == "function":
            return gdn.split(qkvz, ba, *HEADS, out=out)
        torch.ops.gdn.split.out(qkvz, ba, *HEADS, **dict(zip(PARTS, out)))
        return out

    run, counter = compiled(write, backend, dynamic=True)
    for n in (7, 9):
        tensors = inputs(device, n=n)
        out = tuple(torch.full_like(part, torch.nan) for part in parts_of(tensors))
        got = run(*tensors, out)
        assert all(map(torch.equal, out, parts_of(tensors)))
        assert all(map(torch.equal, got, out))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_that_is_read_before_and_after(backend, device):
    """A write in the middle of a graph is not moved."""

    def layer(qkvz, ba, qkv, z, b, a):
        before = qkv.sum()
        gdn.split(qkvz, ba, *HEADS, out=(qkv, z, b, a))
        return before, qkv + 1

    run, _ = compiled(layer, backend)
    tensors = inputs(device)
    out = [torch.ones_like(part) for part in parts_of(tensors)]
    before, after = run(*tensors, *out)
    assert before.item() == out[0].numel()
    assert torch.equal(after, parts_of(tensors)[0] + 1) and torch.equal(out[1], parts_of(tensors)[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_and_strided_rows(backend, device):
    def both(wide, ba):
        qkvz = wide[:, 3 : 3 + WIDE["mixed_qkvz"]]
        return gdn.merge(*gdn.split(qkvz, ba, *HEADS), *HEADS)

    run, _ = compiled(both, backend, dynamic=True)
    for n in (3, 8):
        qkvz, ba = inputs(device, n=n)
        wide = torch.nn.functional.pad(qkvz, (3, 5))
        got = run(wide, ba)
        assert torch.equal(got[0], qkvz) and torch.equal(got[1], ba)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_that_a_graph_would_transpose(backend, device):
    """What the op needs dense, inductor keeps dense."""

    def layer(columns, ba):
        return gdn.split(columns.t().contiguous() * 2, ba, *HEADS)

    run, _ = compiled(layer, backend)
    qkvz, ba = inputs(device)
    assert all(map(torch.equal, run(qkvz.t().contiguous(), ba), parts_of([qkvz * 2, ba])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, device):
    def loss(qkvz, ba):
        return sum((part * part).sum() for part in gdn.split(qkvz, ba, *HEADS))

    run, counter = compiled(loss, backend, dynamic=True)
    for n in (3, 6):
        tensors = inputs(device, n=n, grad=True)
        run(*tensors).backward()
        for one in tensors:
            torch.testing.assert_close(one.grad, 2 * one.detach())
    assert counter.frame_count == 1


def test_errors_while_compiling(device):
    run, _ = compiled(lambda qkvz, ba: gdn.split(qkvz, ba, 2, 4, 3, 6))
    with pytest.raises(Exception, match="mixed_qkvz has 52 features"):
        run(*inputs(device))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("door", ["function", "operator"])
def test_export(door, strict, device):
    class Layer(torch.nn.Module):
        def forward(self, qkvz, ba):
            return DOORS[door](qkvz, ba)

    rows = torch.export.Dim("rows", min=1, max=4096)
    tensors = inputs(device, n=4)
    exported = torch.export.export(
        Layer(), tuple(tensors), dynamic_shapes=({0: rows}, {0: rows}), strict=strict
    )
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert "gdn.split.default" in targets
    for n in (1, 4, 70):
        tensors = inputs(device, n=n)
        assert all(map(torch.equal, exported.module()(*tensors), parts_of(tensors)))


def test_export_is_saved_and_loaded(tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, qkvz, ba):
            return gdn.split(qkvz, ba, *HEADS)

    exported = torch.export.export(Layer(), tuple(inputs()))
    torch.export.save(exported, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    assert all(map(torch.equal, again(*inputs()), parts_of(inputs())))


def test_functional_graph(device):
    """`make_fx` records the operator, with its heads."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(DOORS["function"], tracing_mode="symbolic")(*inputs(device))
    assert "gdn.split.default" in graph.code
    assert all(map(torch.equal, graph(*inputs(device, n=9)), parts_of(inputs(device, n=9))))


def test_any_dtype_compiles(device):
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.bool):
        run, _ = compiled(DOORS["function"])
        tensors = oracle.packed(3, HEADS, dtype, device=device)
        for one, other in zip(run(*tensors), oracle.split_bits(*tensors, HEADS, "interleaved"), strict=True):
            assert one.dtype == dtype and torch.equal(oracle.bits(one), other)
