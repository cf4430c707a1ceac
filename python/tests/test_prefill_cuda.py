"""``Layer.prefill`` on CUDA tensors, through both doors: held to float64, captured in a graph, compiled, refused."""

import pytest

torch = pytest.importorskip("torch")

import oracle_layer as ol
import test_prefill
from oracle import bits
from torch._dynamo.testing import CompileCounterWithBackend

import gdn

pytestmark = pytest.mark.gpus(1)

HEADS = [(2, 4, 128, 128), (1, 3, 64, 96), (2, 2, 96, 64), (1, 2, 192, 64), (1, 1, 256, 128)]
SMALL = (1, 2, 64, 64)
DOORS = ["function", "operator"]
LENGTHS = [17, 0, 1, 130, 64, 15]
CU = [0, 17, 17, 18, 148, 212, 227]
SLOTS = [3, 8, 7, 0, -1, 5]


def on_gpu(one):
    """The same with the tensors, and those inside, on the GPU. Strides stay as they are."""
    if isinstance(one, torch.Tensor):
        there = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda")
        return there.copy_(one)
    if isinstance(one, ol.Weights):
        return ol.Weights(*map(on_gpu, vars(one).values()))
    if isinstance(one, (tuple, list)):
        return type(one)(map(on_gpu, one))
    return {name: on_gpu(part) for name, part in one.items()} if isinstance(one, dict) else one


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Sample:
    """A call's arguments on the GPU: ragged sequences, one of them padding, one that begins with zeros. States are forgotten
    within a chunk, or, where that is slow, in some thousand tokens."""

    def __init__(
        self,
        heads=SMALL,
        layout="dense",
        kind="packed",
        dtype=torch.float32,
        cu=CU,
        slots=SLOTS,
        is_slow=False,
    ):
        self.numbers, weights = ol.Numbers(heads), ol.weights(heads)
        weights.A_log -= 7 * is_slow
        projections = ol.projections(cu[-1], self.numbers, kind, dtype)
        conv, state = ol.states(9, heads, layout)
        self.initial = [r != 3 for r in range(len(cu) - 1)]
        self.on_cpu = weights, projections, conv.clone(), state.clone()
        self.slots, self.cu = slots, cu
        self.expected = [self.exact(r) for r in range(len(slots))]
        self.weights, self.projections = on_gpu(weights), on_gpu(projections)
        self.conv, self.state = conv.cuda(), state.cuda()
        if layout != "page":
            self.conv, self.state = on_gpu(conv), on_gpu(state)
        self.indices = dict(
            state_indices=torch.tensor(slots, dtype=torch.int32, device="cuda"),
            has_initial_state=torch.tensor(self.initial, dtype=torch.bool, device="cuda"),
        )
        self.cu_seqlens = torch.tensor(cu, dtype=torch.int32, device="cuda")
        self.before = self.conv.clone(), self.state.clone()

    def exact(self, r, seed=None):
        """Outputs, windows and states of a sequence in float64; for a seed of inputs and states that are changed a little."""
        weights, projections, conv, state = self.on_cpu
        window, first = (one[max(self.slots[r], 0)] for one in (conv, state))
        window = window[:, conv.shape[2] - weights.conv_weight.shape[-1] + 1 :]
        if not self.initial[r]:
            window, first = torch.zeros_like(window), torch.zeros_like(first)
        parts = [one[self.cu[r] : self.cu[r + 1]] for one in ol.unpacked(projections, self.numbers)]
        if seed is not None:
            parts, first = [ol.changed(one, seed) for one in parts], ol.changed(first, seed)
        return ol.sequence(self.numbers, weights, parts, window, first)

    def run(self, door="function", out=None, **options):
        given = (self.numbers, self.weights, self.projections, self.cu_seqlens, self.conv, self.state)
        return test_prefill.call(door, *given, out, **self.indices, **options)

    def check(self, out):
        width = self.weights.conv_weight.shape[-1]
        for r, (y, windows, states) in enumerate(self.expected):
            rows, slot = out[self.cu[r] : self.cu[r + 1]], self.slots[r]
            if slot < 0:
                assert torch.equal(bits(rows), torch.zeros_like(bits(rows)))
            elif len(y):
                ol.near(rows.cpu(), y, f"out {r}", lambda seed, r=r: self.exact(r, seed)[0])
                ol.near(
                    self.state[slot].cpu(),
                    states[-1],
                    f"state {r}",
                    lambda seed, r=r: self.exact(r, seed)[2][-1],
                )
                assert torch.equal(self.conv[slot][:, 1 - width :].cpu().double(), windows[-1])
        lengths = [end - start for start, end in zip(self.cu, self.cu[1:])]
        kept = [slot for slot, length in zip(self.slots, lengths) if length]
        rest = [slot for slot in range(9) if slot not in kept]
        assert torch.equal(self.conv[rest], self.before[0][rest])
        assert torch.equal(self.state[rest], self.before[1][rest])

    def layer(self):
        return ol.layer(self.numbers, self.weights)

    def again(self):
        """States as they were."""
        self.conv.copy_(self.before[0])
        self.state.copy_(self.before[1])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["dense", "channels last", "page", "wide"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_against_float64(heads, layout, dtype, door):
    sample = Sample(heads, layout, dtype=dtype)
    sample.projections[0][150] = float("nan")  # of the padded sequence
    out = sample.run(door)
    assert out.dtype == dtype and out.shape == (CU[-1], heads[1], heads[3]) and out.is_contiguous()
    sample.check(out)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["unpacked", "flat"])
def test_strides(kind, door):
    """The split's four tensors, rows with gaps between them, weights and an output with any strides: the same bits."""
    sample = Sample(kind=kind)
    first = sample.run(door)
    sample.check(first)
    sample.again()
    sample.projections = tuple(
        torch.cat([one, one], 1)[:, : one.shape[1]] if one.dim() == 2 else one for one in sample.projections
    )
    sample.weights.conv_weight = sample.weights.conv_weight.T.contiguous().T[:, None]
    sample.weights.A_log = sample.weights.A_log.repeat_interleave(3)[::3]
    buffer = torch.full((64, 2, CU[-1] + 2), 7.0, dtype=torch.bfloat16, device="cuda")
    out = buffer[:, :, 1:-1].permute(2, 1, 0)
    assert sample.run(door, out) is out
    # Rows that begin elsewhere are read by other loads; products and sums are the same.
    assert torch.equal(out, first.bfloat16())
    assert (buffer[:, :, [0, -1]] == 7).all()


@pytest.mark.parametrize("door", DOORS)
def test_without_states(door):
    sample = Sample()
    out = test_prefill.call(door, sample.numbers, sample.weights, sample.projections, sample.cu_seqlens)
    sample.initial = [False] * 6
    for r in range(6):
        rows = out[CU[r] : CU[r + 1]].cpu()
        ol.near(rows, sample.exact(r)[0], f"out {r}", lambda seed, r=r: sample.exact(r, seed)[0])


@pytest.mark.parametrize("door", DOORS)
def test_checkpoints(door):
    sample = Sample(cu=[0, 200, 230, 358], slots=[2, 0, 5])
    places = [3, 0, 0]  # the second has none
    states = torch.full((6, *sample.state.shape[1:]), float("nan"), device="cuda")
    windows = torch.full((6, *sample.conv.shape[1:]), float("nan"), device="cuda")
    options = dict(state_checkpoints=states, conv_checkpoints=windows, checkpoint_every_n_tokens=64)
    sample.run(door, checkpoint_starts=torch.tensor(places, device="cuda"), **options)
    for r, (_, some, after) in enumerate(sample.expected):
        for i in range((sample.cu[r + 1] - sample.cu[r]) // 64):
            last = 64 * i + 63
            ol.near(states[places[r] + i].cpu(), after[last], "", lambda seed: sample.exact(r, seed)[2][last])
            assert torch.equal(windows[places[r] + i].cpu().double(), some[last])
    assert states[2].isnan().all() and windows[2].isnan().all()


@pytest.mark.parametrize("cut", [64, 128])
def test_cut_at_chunks_it_gives_the_same_bits(cut):
    sample = Sample(cu=[0, 200], slots=[4])
    whole = sample.run()
    kept = sample.conv.clone(), sample.state.clone()
    sample.again()
    outs, projections = [], sample.projections
    for part in (slice(0, cut), slice(cut, None)):
        sample.projections = tuple(one[part] for one in projections)
        rows = sample.projections[0].shape[0]
        sample.cu_seqlens = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
        outs.append(sample.run())
    assert torch.equal(torch.cat(outs), whole)
    assert torch.equal(sample.conv, kept[0]) and torch.equal(sample.state, kept[1])


@pytest.mark.parametrize("door", DOORS)
def test_segments(door):
    """A long sequence of few heads is cut where that is allowed: other bits, as near to float64, the same alone and beside others.
    Shorter ones, and the bits of whoever did not ask, are as they were."""
    cu, slots = [0, 2200, 2300], [4, 2]
    sample = Sample(cu=cu, slots=slots, is_slow=True)
    sample.initial = [True, True]
    sample.indices.pop("has_initial_state")
    options = dict(state_indices=sample.indices["state_indices"])
    whole = sample.run(door)
    kept = sample.state.clone()
    sample.again()
    cut = sample.run(door, segments=True)
    sample.check(cut)
    cut_state = sample.state.clone()
    assert not torch.equal(cut_state[4], kept[4]), "nothing was cut"
    assert torch.equal(cut[2200:], whole[2200:]) and torch.equal(cut_state[2], kept[2])
    sample.again()
    assert torch.equal(sample.run(door), whole) and torch.equal(sample.state, kept)
    sample.again()
    sample.projections = tuple(one[:2200] for one in sample.projections)
    sample.cu_seqlens = sample.cu_seqlens[:2].clone()
    sample.indices = {name: one[:1].clone() for name, one in options.items()}
    assert torch.equal(sample.run(door, segments=True), cut[:2200])
    assert torch.equal(sample.state[4], cut_state[4])
    # In a graph.
    sample.again()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample.run(door, segments=True)
    sample.again()
    graph.replay()
    assert torch.equal(out, cut[:2200]) and torch.equal(sample.state[4], cut_state[4])


@pytest.mark.parametrize("door", DOORS)
def test_segments_of_many_heads(door):
    """Where the scan has blocks enough, nothing is cut."""
    heads, rows = (4, 20, 64, 64), 2200
    numbers, weights = ol.Numbers(heads), on_gpu(ol.weights(heads))
    projections = on_gpu(ol.projections(rows, numbers, "packed"))
    cu = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
    results = []
    for segments in (False, True):
        conv, state = (one.zero_() for one in on_gpu(ol.states(1, heads, "dense")))
        out = test_prefill.call(door, numbers, weights, projections, cu, conv, state, segments=segments)
        results.append((out, conv, state))
    assert all(map(torch.equal, *results))


def test_decode_goes_on_where_prefill_ends():
    sample = Sample(layout="wide", cu=[0, 100], slots=[0])
    layer, conv, state = sample.layer(), sample.conv[:1], sample.state[:1]
    cu = torch.tensor([0, 80], device="cuda")
    out = [layer.prefill(tuple(one[:80] for one in sample.projections), cu, conv, state)]
    for i in range(80, 100):
        out.append(layer.decode(tuple(one[i : i + 1] for one in sample.projections), conv, state))
    [(y, _, states)] = sample.expected
    ol.near(torch.cat(out).cpu(), y, "out", lambda seed: sample.exact(0, seed)[0])
    ol.near(state[0].cpu(), states[-1], "state", lambda seed: sample.exact(0, seed)[2][-1])


@pytest.mark.parametrize("door", DOORS)
def test_a_graph_of_it(door):
    """Lengths and slots change between replays; the scratch memory is the graph's."""
    sample = Sample(cu=[0, 90, 100, 227], slots=[3, 1, 7])
    out = torch.zeros(227, 2, 64, device="cuda")
    sample.run(door, out)  # kernels are loaded
    sample.again()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample.run(door, out)
    other = torch.randn(64 << 20, device="cuda")  # memory that the first call had
    for cu, slots in [
        ([0, 90, 100, 227], [3, 1, 7]),
        ([0, 1, 227, 227], [0, -1, 3]),
        ([0, 64, 128, 227], [8, 2, -1]),
    ]:
        sample.cu_seqlens.copy_(torch.tensor(cu))
        sample.indices["state_indices"].copy_(torch.tensor(slots))
        sample.again()
        expected = sample.run(door), sample.conv.clone(), sample.state.clone()
        sample.again()
        out.zero_()
        graph.replay()
        assert all(map(torch.equal, (out, sample.conv, sample.state), expected))
    del other


@pytest.mark.parametrize("door", DOORS)
def test_streams(door):
    """The work, and the memory for it, are of the stream that is current."""
    sample = Sample()
    expected = sample.run(door), sample.conv.clone(), sample.state.clone()
    for _ in range(10):
        sample.again()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            out = sample.run(door)
        # What the call before had must not be handed out to this stream meanwhile.
        taken = [torch.full((8 << 20,), float("nan"), device="cuda") for _ in range(4)]
        torch.cuda.current_stream().wait_stream(stream)
        assert all(map(torch.equal, (out, sample.conv, sample.state), expected))
        del taken


@pytest.mark.parametrize("door", DOORS)
def test_memory(door):
    """Scratch memory goes back to PyTorch's allocator; where there is none, it says so as PyTorch does, and nothing is written."""
    sample = Sample()
    out = torch.zeros(CU[-1], 2, 64, device="cuda")
    sample.run(door, out)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sample.run(door, out)
    assert torch.cuda.memory_allocated() == before < torch.cuda.max_memory_allocated()
    sample.again()
    out.zero_()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    hoard = []  # what blocks in use have free
    try:
        torch.cuda.set_per_process_memory_fraction(1e-6)
        for size in (4 << 20, (1 << 20) + 1, 1 << 18, 512):
            with pytest.raises(torch.OutOfMemoryError):
                while True:
                    hoard.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        with pytest.raises(torch.OutOfMemoryError if door == "function" else RuntimeError):
            sample.run(door, out)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not out.any()
    assert torch.equal(sample.conv, sample.before[0]) and torch.equal(sample.state, sample.before[1])
    sample.run(door, out)
    sample.check(out)


def operator_call(sample, overload):
    op = getattr(torch.ops.gdn.prefill, overload)
    given = (
        *sample.projections,
        *vars(sample.weights).values(),
        sample.conv,
        sample.state,
        sample.cu_seqlens,
    )
    options = dict(sample.indices)
    if overload.endswith("out"):
        options |= dict(out=torch.zeros(CU[-1], 2, 64, device="cuda"))
    return op, (*given, *SMALL), options


@pytest.mark.parametrize("overload", ["default", "out", "unpacked", "unpacked_out"])
def test_opcheck(overload):
    sample = Sample(kind="unpacked" if overload.startswith("unpacked") else "packed")
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(*operator_call(sample, overload), test_utils=checks)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("overload", ["default", "out", "unpacked", "unpacked_out"])
def test_compiled_whole(overload, backend):
    sample = Sample(kind="unpacked" if overload.startswith("unpacked") else "packed")

    def run(op, arguments, options):
        out = op(*arguments, **options)
        return (options["out"] if out is None else out) * 2

    expected = run(*operator_call(sample, overload)), sample.conv.clone(), sample.state.clone()
    sample.again()
    counter = CompileCounterWithBackend(backend)
    op, arguments, options = operator_call(sample, overload)
    compiled = torch.compile(lambda *given: run(op, *given), backend=counter, fullgraph=True)
    got = compiled(arguments, options), sample.conv, sample.state
    assert counter.frame_count == 1 and all(map(torch.equal, got, expected))


def test_a_layer_compiled_whole():
    sample = Sample()
    layer = sample.layer()

    def run(projections, cu, conv, state):
        return layer.prefill(projections, cu, conv, state, **sample.indices).float() + 1

    given = sample.projections, sample.cu_seqlens, sample.conv, sample.state
    expected = run(*given)
    sample.again()
    assert torch.equal(torch.compile(run, fullgraph=True)(*given), expected)


def test_what_is_supported():
    sample = Sample()
    reason = lambda *given, **options: gdn.prefill_supported(sample.layer(), *given, **options)
    given = sample.projections, sample.cu_seqlens, sample.conv, sample.state
    assert reason(*given, **sample.indices) is None
    assert "cu_seqlens is on cpu, mixed_qkvz is on cuda:0" in reason(
        sample.projections, sample.cu_seqlens.cpu(), sample.conv, sample.state
    )
    states = torch.zeros(9, 2, 64, 64, device="cuda")
    kept = dict(checkpoint_starts=sample.cu_seqlens[:-1], state_checkpoints=states)
    assert reason(*given, checkpoint_every_n_tokens=64, **kept) is None
    assert (
        reason(*given, checkpoint_every_n_tokens=16, **kept)
        == "checkpoint_every_n_tokens is 16, it must be a multiple of 64, and at least that"
    )
    for heads, width, message in [
        ((1, 2, 32, 64), 4, "head_k_dim is 32, it must be 64, 96, 128, 192 or 256 on a GPU"),
        ((1, 2, 64, 32), 4, "head_v_dim is 32, it must be 64, 96, 128, 192 or 256 on a GPU"),
        ((1, 2, 64, 64), 5, "conv_width is 5, it must be at most 4 on a GPU"),
    ]:
        numbers, weights = ol.Numbers(heads), on_gpu(ol.weights(heads, width=width))
        layer, projections = ol.layer(numbers, weights), on_gpu(ol.projections(20, numbers, "packed"))
        conv, state = on_gpu(ol.states(2, heads, "dense", width=width))
        before, cu = (conv.clone(), state.clone()), torch.tensor([0, 20], device="cuda")
        assert gdn.prefill_supported(layer, projections, cu, conv, state) == message
        with pytest.raises(ValueError, match=message):
            layer.prefill(projections, cu, conv, state)
        assert torch.equal(conv, before[0]) and torch.equal(state, before[1])


def test_no_sequences():
    sample = Sample(cu=[0], slots=[])
    assert sample.run().shape == (0, 2, 64)
    assert torch.equal(sample.state, sample.before[1])


def test_arrays_of_others():
    """CuPy's arrays are read; there is no memory of theirs to work in."""
    cupy = pytest.importorskip("cupy")
    sample, array = Sample(), cupy.from_dlpack
    weights = ol.Weights(*map(array, vars(sample.weights).values()))
    layer, cu = ol.layer(sample.numbers, weights), array(sample.cu_seqlens)
    given = tuple(map(array, sample.projections)), cu, array(sample.conv), array(sample.state)
    options = dict(out=array(torch.zeros(CU[-1], 2, 64, device="cuda")))
    message = "mixed_qkvz is on cuda:0 and no torch.Tensor"
    with pytest.raises(ValueError, match=message):
        layer.prefill(*given, **options)
    assert message in gdn.prefill_supported(layer, *given, **options)
