"""``Layer.decode`` on CUDA tensors, through both doors: held to float64, captured in a graph, compiled."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

import oracle_layer as ol
import test_decode
from torch._dynamo.testing import CompileCounterWithBackend

import gdn

pytestmark = pytest.mark.gpus(1)

HEADS = [(2, 4, 128, 128), (4, 12, 64, 64)]


def on_gpu(one):
    return one.cuda() if isinstance(one, torch.Tensor) else one


def sample(heads, layout, dtype=torch.float32, tokens=1):
    """Arguments on the GPU, and what float64 makes of them."""
    torch.manual_seed(0)
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    projections = ol.projections(4 * tokens, numbers, "packed", dtype)
    conv, state = (one.cuda() for one in ol.states(9, heads, layout))
    slots = [3, 1, 7, 0]
    expected = test_decode.expected(numbers, weights, projections, conv.cpu(), state.cpu(), tokens, slots)
    indices = torch.tensor(slots, dtype=torch.int32, device="cuda")
    weights = ol.Weights(*map(on_gpu, vars(weights).values()))
    return numbers, weights, tuple(map(on_gpu, projections)), conv, state, indices, slots, expected


@pytest.mark.parametrize("door", ["function", "operator"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["dense", "channels last"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_against_float64(heads, layout, dtype, tokens, door):
    numbers, weights, projections, conv, state, indices, slots, expected = sample(
        heads, layout, dtype, tokens
    )
    untouched = [slot for slot in range(9) if slot not in slots]
    before = conv[untouched].clone(), state[untouched].clone()
    options = dict(tokens_per_sequence=tokens, state_indices=indices)
    out = test_decode.call(door, numbers, weights, projections, conv, state, **options)
    for r, (y, windows, states) in enumerate(expected):
        ol.close(out[r * tokens : (r + 1) * tokens].cpu(), y)
        ol.close(state[slots[r]].cpu(), states[-1])
        ol.close(conv[slots[r]].cpu(), windows[-1])
    assert torch.equal(conv[untouched], before[0]) and torch.equal(state[untouched], before[1])


def test_a_graph_of_it():
    numbers, weights, projections, conv, state, indices, _, _ = sample(HEADS[0], "dense")
    layer, out = ol.layer(numbers, weights), torch.zeros(4, 4, 128, device="cuda")
    kept = conv.clone(), state.clone()
    how = dict(state_indices=indices, out=out)
    layer.decode(projections, conv, state, **how)  # kernels are loaded
    expected = out.clone(), conv.clone(), state.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.decode(projections, conv, state, **how)
    conv.copy_(kept[0])
    state.copy_(kept[1])
    out.zero_()
    graph.replay()
    assert all(map(torch.equal, (out, conv, state), expected))


OVERLOADS = ["default", "out", "unpacked", "unpacked_out"]


def operator_call(overload):
    """The operator, its arguments and its keywords, always the same."""
    numbers, weights, projections, conv, state, indices, _, _ = sample(HEADS[0], "dense")
    if overload.startswith("unpacked"):
        projections = tuple(one.float() for one in ol.unpacked(projections, numbers))
    options = dict(state_indices=indices)
    if overload.endswith("out"):
        options |= dict(out=torch.zeros(4, 4, 128, device="cuda"))
    given = (*projections, *vars(weights).values(), conv, state, *HEADS[0])
    return getattr(torch.ops.gdn.decode, overload), given, options, (conv, state)


@pytest.mark.parametrize("overload", OVERLOADS)
def test_opcheck(overload):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(*operator_call(overload)[:3], test_utils=checks)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("overload", OVERLOADS)
def test_compiled_whole(overload, backend):
    def run(op, arguments, options):
        out = op(*arguments, **options)
        return (options["out"] if out is None else out) * 2

    op, arguments, options, states = operator_call(overload)
    expected = run(op, arguments, options), *states
    op, arguments, options, states = operator_call(overload)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    got = torch.compile(lambda *given: run(op, *given), backend=counter, fullgraph=True)(arguments, options)
    assert counter.frame_count == 1 and all(map(torch.equal, (got, *states), expected))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_layer_compiled_whole(mode):
    """With CUDA graphs of PyTorch's own, too, call after call."""
    numbers, weights, projections, conv, state, indices, _, _ = sample(HEADS[0], "dense")
    layer = ol.layer(numbers, weights)

    def run(projections, conv, state):
        return layer.decode(projections, conv, state, state_indices=indices).float() + 1

    expected = [run(projections, conv, state) for _ in range(4)]
    expected_states = conv, state
    conv, state = sample(HEADS[0], "dense")[3:5]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, mode=mode)
    for one in expected:
        assert torch.equal(compiled(projections, conv, state), one)
    assert all(map(torch.equal, (conv, state), expected_states))


@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize("how", ["fresh", "out", "refused"])
def test_calls_leak_nothing(how, op):
    numbers, weights, projections, conv, state, indices, _, _ = sample(HEADS[0], "dense")
    layer, cu = ol.layer(numbers, weights), torch.arange(5, dtype=torch.int32, device="cuda")
    given = (projections, conv, state) if op == "decode" else (projections, cu, conv, state)
    options = dict(state_indices=indices if how != "refused" else indices.short())
    if how == "out":
        options["out"] = torch.zeros(4, 4, 128, device="cuda")

    def call():
        try:
            getattr(layer, op)(*given, **options)
        except TypeError:
            assert how == "refused"

    for _ in range(300):
        call()
    gc.collect()
    torch.cuda.synchronize()
    memory, objects = torch.cuda.memory_allocated(), len(gc.get_objects())
    for _ in range(3000):
        call()
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == memory
    assert len(gc.get_objects()) < objects + 100


@pytest.mark.parametrize("how", ["function", "operator"])
@pytest.mark.parametrize("is_given", [True, False])
def test_no_tensor_is_copied(is_given, how):
    """Strides that another would copy: nothing is allocated but the output, and nothing where it is given; nothing waits for the GPU."""
    numbers, weights, projections, conv, state, indices, _, _ = sample(HEADS[0], "page")
    projections = tuple(torch.cat([one, one], 1)[:, : one.shape[1]] for one in projections)
    layer = ol.layer(numbers, weights)
    out = torch.zeros(4, 128, 4, device="cuda").transpose(1, 2) if is_given else None
    given = (*projections, *vars(weights).values(), conv, state, *numbers.heads, numbers.packing)

    def call():
        if how == "function":
            return layer.decode(projections, conv, state, state_indices=indices, out=out)
        if out is None:
            return torch.ops.gdn.decode(*given, state_indices=indices)
        return torch.ops.gdn.decode.out(*given, state_indices=indices, out=out)

    call()
    torch.cuda.synchronize()
    counted = lambda: torch.cuda.memory_stats()["allocation.all.allocated"]
    # A kernel of milliseconds is before it: a call that waited would take as long.
    done = torch.cuda.Event()
    torch.cuda._sleep(400_000_000)
    done.record()
    before = counted()
    for _ in range(3):
        call()
    assert not done.query(), "a call waited for the GPU"
    assert counted() - before == (0 if is_given else 3)


def test_what_is_supported():
    numbers, weights, projections, conv, state, indices, _, _ = sample(HEADS[0], "dense")
    layer = ol.layer(numbers, weights)
    assert gdn.decode_supported(layer, projections, conv, state, state_indices=indices) is None
    assert "state_indices is on cpu" in gdn.decode_supported(
        layer, projections, conv, state, state_indices=indices.cpu()
    )
    wide = ol.Numbers((1, 1, 512, 64))
    layer = ol.layer(wide, ol.Weights(*map(on_gpu, vars(ol.weights(wide.heads)).values())))
    conv, state = (one.cuda() for one in ol.states(4, wide.heads, "dense"))
    projections = tuple(map(on_gpu, ol.projections(4, wide, "packed")))
    assert "512" in gdn.decode_supported(layer, projections, conv, state)


def test_windows_that_share_memory():
    """SGLang keeps T + W - 2 inputs a channel, and takes the windows after each of T tokens for views of them."""
    numbers, weights, projections, conv, state, indices, slots, expected = sample(HEADS[0], "dense", tokens=4)
    layer, (channels, width) = ol.layer(numbers, weights), conv.shape[1:]
    inputs = torch.full((5, channels, 4 + width - 1), torch.nan, device="cuda")
    strides = (inputs.stride(0), 1, inputs.stride(1), 1)
    windows = inputs.as_strided((5, 4, channels, width), strides)
    states = torch.zeros(5, 4, *state.shape[1:], device="cuda")
    kept, rows = (conv.clone(), state.clone()), torch.tensor([4, 0, 2, 1], dtype=torch.int32, device="cuda")
    how = dict(tokens_per_sequence=4, state_indices=indices, intermediate_state_indices=rows)
    layer.decode(
        projections, conv, state, intermediate_states=states, intermediate_conv_windows=windows, **how
    )
    for row, (_, after, _) in zip(rows.tolist(), expected, strict=True):
        for t in range(4):
            assert torch.equal(windows[row, t].double().cpu(), after[t])
    assert inputs[3].isnan().all() and torch.equal(conv, kept[0]) and torch.equal(state, kept[1])
    flat = inputs.as_strided((5, 4, channels, width), (strides[0], 1, 1, 1))
    with pytest.raises(ValueError, match="intermediate_conv_windows"):
        layer.decode(
            projections, conv, state, intermediate_states=states, intermediate_conv_windows=flat, **how
        )


@pytest.mark.parametrize("door", ["function", "operator"])
def test_calls_like_one_before(door):
    """A call that was checked is only compared with one like it. What differs in anything is checked anew."""
    numbers, weights, projections, conv, state, indices, _, _ = sample(HEADS[0], "dense")
    out = torch.zeros(4, 4, 128, device="cuda")
    kept = conv.clone(), state.clone()

    def run(numbers=numbers, out=out, projections=projections, conv=conv, state=state, **options):
        options = dict(tokens_per_sequence=1, state_indices=indices) | options
        return test_decode.call(door, numbers, weights, projections, conv, state, out, **options)

    def fresh(**changed):
        """The same with other tensors, so that nothing was seen before."""
        conv, state = (one.clone() for one in kept)
        return run(conv=conv, state=state, **({"out": torch.zeros_like(out)} | changed)).clone()

    def again(**changed):
        conv.copy_(kept[0])
        state.copy_(kept[1])
        return run(**changed)

    first = again().clone()
    for _ in range(3):
        assert torch.equal(again(), first)
    for changed in [
        dict(numbers=ol.Numbers(HEADS[0], scale=0.5)),
        dict(numbers=ol.Numbers(HEADS[0], gate="sigmoid")),
        dict(pad_slot_id=7),
        dict(disable_state_update=True),
        dict(state_indices=torch.tensor([8, 2, 4, 5], dtype=torch.int64, device="cuda")),
        dict(projections=tuple(one.bfloat16() for one in projections)),
    ]:
        expected = fresh(**changed)
        for _ in range(2):
            assert torch.equal(again(**changed), expected), changed
        assert torch.equal(again(), first)
    # Other elements in the same memory, and the same tensors with other numbers.
    half = out.view(torch.bfloat16)[..., :128]
    for _ in range(2):
        assert torch.equal(again(out=half), first.bfloat16())
    out.zero_()
    assert torch.equal(again(), first)
    # Other memory, and another dtype, under the same object: `module.to()` has it so.
    for other in (2 * weights.norm_weight.data, weights.norm_weight.data.bfloat16()):
        before, weights.norm_weight.data = weights.norm_weight.data, other
        expected = fresh()
        assert torch.equal(again(), expected) and torch.equal(again(), expected)
        weights.norm_weight.data = before
        assert torch.equal(again(), first)
    # The same objects, changed in place.
    for change, back in [
        (
            lambda: out.as_strided_((4, 4, 128), (128, 512, 1)),
            lambda: out.as_strided_((4, 4, 128), (512, 128, 1)),
        ),
        (lambda: indices.set_(indices.flip(0)), lambda: indices.set_(indices.flip(0))),
    ]:
        change()
        expected = fresh(out=torch.empty_strided((4, 4, 128), out.stride(), device="cuda"))
        assert torch.equal(again(), expected) and torch.equal(again(), expected)
        back()
        assert torch.equal(again(), first)
    # What PyTorch is to know of a call is asked, and told, each time.
    versions = [one._version for one in (out, state)]
    run()
    assert [out._version, state._version] == [version + 1 for version in versions]
    projections[0].requires_grad_()
    with pytest.raises(RuntimeError, match="has no derivative"):
        run()
    with torch.no_grad():
        assert torch.equal(again(), first)
    projections[0].requires_grad_(False)
    # What the same memory is to be read as.
    lazy = torch._neg_view(projections[0]), projections[1]
    expected = fresh(projections=(-projections[0], projections[1]))
    assert torch.equal(again(projections=lazy), expected) and torch.equal(again(), first)
    # Memory that is shared until somebody writes to it.
    assert torch.equal(again(), first)
    shared = [torch._lazy_clone(one) for one in (conv, state, out)]
    before = [one.clone() for one in shared]
    for _ in range(2):
        run()
        assert all(map(torch.equal, shared, before))
    assert torch.equal(again(), first)
    refused = (ValueError, RuntimeError)
    for changed, message in [
        (dict(tokens_per_sequence=2), "state_indices has 4 rows"),
        (dict(out=out[:, :, ::2]), "out has 64"),
        (dict(out=state.view(-1)[: out.numel()].view(out.shape)), "out"),
        (dict(conv=conv[:, 1:]), "conv_state has"),
        (dict(state_indices=indices.short()), "state_indices has dtype int16"),
    ]:
        for _ in range(2):
            with pytest.raises((*refused, TypeError), match=message):
                run(**changed)
    assert torch.equal(again(), first)
    weights.A_log.untyped_storage().resize_(0)
    with pytest.raises(refused, match="A_log has shape"):
        again()


def test_threads():
    """Threads with streams of their own, on one layer and on calls like one another's."""
    numbers, weights, projections, conv, state, indices, _, _ = sample(HEADS[0], "dense")
    layer = ol.layer(numbers, weights)
    cu = torch.arange(5, dtype=torch.int32, device="cuda")
    kept = conv.clone(), state.clone()

    def run(conv, state, out):
        for _ in range(30):
            conv.copy_(kept[0])
            state.copy_(kept[1])
            layer.prefill(projections, cu, conv, state, state_indices=indices)
            layer.decode(projections, conv, state, state_indices=indices, out=out)

    mine = [(conv.clone(), state.clone(), torch.zeros(4, 4, 128, device="cuda")) for _ in range(4)]
    run(conv, state, expected := torch.zeros(4, 4, 128, device="cuda"))
    torch.cuda.synchronize()

    def work(given):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            run(*given)
        stream.synchronize()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, mine))
    for one, other, out in mine:
        assert torch.equal(out, expected) and torch.equal(one, conv) and torch.equal(other, state)
