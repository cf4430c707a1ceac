"""``Layer.decode`` and ``torch.ops.gdn.decode`` against float64, through every contract of an engine."""

import pytest

torch = pytest.importorskip("torch")

import oracle_layer as ol
from oracle import bits

import gdn

HEADS = [(2, 4, 16, 8), (1, 1, 8, 8), (3, 21, 4, 12), (2, 2, 80, 48)]
LAYOUTS = ["dense", "channels last", "page", "wide"]
B = 5
DOORS = ["function", "direct", "operator", "numpy"]
if torch.cuda.is_available():
    DOORS += ["cuda function", "cuda operator"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def call(door, numbers, weights, projections, conv, state, out=None, **options):
    """Decode through one of the doors, all of which write in place. ``cuda ...``: on the GPU, and copied back."""
    if door.startswith("cuda "):
        pairs = []

        def there(one):
            if not isinstance(one, torch.Tensor):
                return one
            moved = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda")
            pairs.append((one, moved.copy_(one)))
            return moved

        on_gpu = ol.Weights(*map(there, vars(weights).values()))
        options = {name: there(one) for name, one in options.items()}
        made = call(
            door.removeprefix("cuda "),
            numbers,
            on_gpu,
            tuple(map(there, projections)),
            there(conv),
            there(state),
            there(out),
            **options,
        )
        for one, moved in pairs:
            one.copy_(moved)
        return made.cpu() if out is None else out
    return ol.through(door, "decode", numbers, weights, projections, (conv, state), (), out, options)


def expected(numbers, weights, projections, conv, state, tokens=1, slots=None):
    """Outputs, windows and states after each token, of each sequence, from states as they are before."""
    parts, width = ol.unpacked(projections, numbers), weights.conv_weight.shape[-1]
    sequences = parts[0].shape[0] // tokens
    results = []
    for r in range(sequences):
        slot = r if slots is None else slots[r]
        some = [part[r * tokens : (r + 1) * tokens] for part in parts]
        results.append(
            ol.sequence(numbers, weights, some, conv[slot][:, conv.shape[2] - width + 1 :], state[slot])
        )
    return results


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["packed", "unpacked", "flat"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_one_token(heads, layout, kind, door):
    for packing in ("interleaved", "contiguous"):
        numbers = ol.Numbers(heads, packing)
        weights = ol.weights(heads, bias=packing == "contiguous")
        projections = ol.projections(B, numbers, kind)
        conv, state = ol.states(B, heads, layout)
        before = conv.clone(), state.clone()
        out = call(door, numbers, weights, projections, conv, state)
        assert out.dtype == torch.float32 and out.is_contiguous() and out.shape == (B, heads[1], heads[3])
        for r, (y, windows, states) in enumerate(expected(numbers, weights, projections, *before)):
            ol.close(out[r], y[0], "out")
            ol.close(state[r], states[0], "state")
            assert torch.equal(conv[r][:, -3:].double(), windows[0]), (
                "inputs of the convolution are kept as they are"
            )
            if conv.shape[2] > 3:
                assert torch.equal(conv[r][:, :-1], before[0][r][:, 1:])


@pytest.mark.parametrize("door", [door for door in DOORS if door != "numpy"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype, state_dtype, door):
    heads = HEADS[0]
    numbers, weights = ol.Numbers(heads), ol.weights(heads, torch.bfloat16)
    weights.A_log = weights.A_log.float()
    projections = ol.projections(B, numbers, "packed", dtype)
    projections = (projections[0], projections[1].float())
    conv, state = ol.states(B, heads, "dense", state_dtype)
    conv = conv.to(dtype)
    before = conv.clone(), state.clone()
    out = call(door, numbers, weights, projections, conv, state)
    assert out.dtype == dtype
    for r, (y, windows, states) in enumerate(expected(numbers, weights, projections, *before)):
        ol.close(out[r], y[0], "out")
        ol.close(state[r], states[0], "state")
        assert torch.equal(conv[r].double(), windows[0])


@pytest.mark.parametrize("door", DOORS)
def test_numbers(door):
    heads = HEADS[0]
    numbers = ol.Numbers(heads, "contiguous", 1e-2, 1e-3, 0.7, 2.0, "sigmoid")
    weights = ol.weights(heads, width=3)
    projections = ol.projections(B, numbers, "packed")
    conv, state = ol.states(B, heads, "dense", width=3)
    before = conv.clone(), state.clone()
    out = call(door, numbers, weights, projections, conv, state)
    for r, (y, _, states) in enumerate(expected(numbers, weights, projections, *before)):
        ol.close(out[r], y[0], "out")
        ol.close(state[r], states[0], "state")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_several_tokens_are_several_calls(tokens, door):
    heads = HEADS[0]
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    projections = ol.projections(B * tokens, numbers, "packed")
    conv, state = ol.states(B, heads, "page")
    one = conv.clone(), state.clone()
    out = call(door, numbers, weights, projections, conv, state, tokens_per_sequence=tokens)
    for t in range(tokens):
        some = tuple(part[t::tokens] for part in projections)
        assert torch.equal(call(door, numbers, weights, some, *one), out[t::tokens])
    assert torch.equal(one[0], conv) and torch.equal(one[1], state)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("pad", [-1, 0, 4])
def test_slots_and_padding(pad, door, index):
    heads = HEADS[0]
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    slots = [6, pad, 2, -7, 1]
    projections = ol.projections(5, numbers, "packed")
    projections[0][1] = float("nan")  # of a padded row
    conv, state = ol.states(8, heads, "page")
    before = conv.clone(), state.clone()
    out = torch.full((5, 4, 8), float("nan"))
    strided = torch.tensor(slots, dtype=index).repeat_interleave(2)[::2]
    call(door, numbers, weights, projections, conv, state, out, state_indices=strided, pad_slot_id=pad)
    results = expected(numbers, weights, projections, *before, slots=[max(slot, 0) for slot in slots])
    live = [r for r, slot in enumerate(slots) if slot >= 0 and slot != pad]
    assert live == [0, 2, 4]
    for r, (y, windows, states) in enumerate(results):
        if r in live:
            ol.close(out[r], y[0])
            ol.close(state[slots[r]], states[0])
            assert torch.equal(conv[slots[r]].double(), windows[0])
        else:
            assert torch.equal(bits(out[r]), torch.zeros_like(bits(out[r])))
    untouched = [slot for slot in range(8) if slot not in [slots[r] for r in live]]
    assert torch.equal(conv[untouched], before[0][untouched])
    assert torch.equal(state[untouched], before[1][untouched])


@pytest.mark.parametrize("door", DOORS)
def test_separate_slots_to_read_and_write(door):
    heads = HEADS[0]
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    projections = ol.projections(4, numbers, "packed")
    conv, state = ol.states(6, heads, "dense")
    before = conv.clone(), state.clone()
    read, written = torch.tensor([0, 1]), torch.tensor([4, -1])
    options = dict(state_indices=read, output_state_indices=written, tokens_per_sequence=2)
    out = call(door, numbers, weights, projections, conv, state, **options)
    results = expected(numbers, weights, projections, *before, tokens=2)
    for r, (y, _, _) in enumerate(results):
        ol.close(out[2 * r : 2 * r + 2], y)
    ol.close(state[4], results[0][2][1])
    assert torch.equal(conv[4].double(), results[0][1][1])
    rest = [0, 1, 2, 3, 5]
    assert torch.equal(conv[rest], before[0][rest]) and torch.equal(state[rest], before[1][rest])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("indices", [None, [3, 1]])
def test_verify_as_sglang_does_it(indices, door):
    """States and windows after each token go to tensors of their own, what was read stays."""
    heads, tokens = HEADS[0], 3
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    projections = ol.projections(2 * tokens, numbers, "packed")
    conv, state = ol.states(5, heads, "dense")
    before = conv.clone(), state.clone()
    more = torch.full((5, 4, *state.shape[1:]), float("nan"))
    windows = torch.full((5, 4, *conv.shape[1:]), float("nan"))
    options = dict(state_indices=torch.tensor([2, 4], dtype=torch.int32), tokens_per_sequence=tokens)
    options |= dict(intermediate_states=more, intermediate_conv_windows=windows)
    if indices is not None:
        options |= dict(intermediate_state_indices=torch.tensor(indices))
    out = call(door, numbers, weights, projections, conv, state, **options)
    assert torch.equal(conv, before[0]) and torch.equal(state, before[1])
    results = expected(numbers, weights, projections, *before, tokens=tokens, slots=[2, 4])
    for r, (y, some, states) in enumerate(results):
        ol.close(out[tokens * r : tokens * (r + 1)], y)
        slot = r if indices is None else indices[r]
        for t in range(tokens):
            ol.close(more[slot, t], states[t])
            assert torch.equal(windows[slot, t].double(), some[t])
        assert more[slot, tokens:].isnan().all() and windows[slot, tokens:].isnan().all()
    rest = [slot for slot in range(5) if slot not in (indices or [0, 1])]
    assert more[rest].isnan().all() and windows[rest].isnan().all()


@pytest.mark.parametrize("decode", [gdn.Layer.decode, gdn.layer._decode], ids=["function", "direct"])
@pytest.mark.parametrize("more", [False, True])
def test_options_by_position(more, decode):
    """Their order is part of the interface."""
    heads, tokens = HEADS[0], 3
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    projections = ol.projections(2 * tokens, numbers, "packed")
    conv, state = ol.states(5, heads, "dense")
    kept = [torch.zeros(5, 4, *one.shape[1:]) for one in (state, conv)] if more else [None, None]
    written = (conv, state, *kept[: 2 * more])
    before = [one.clone() for one in written]
    options = {
        "tokens_per_sequence": tokens,
        "state_indices": torch.tensor([2, -1], dtype=torch.int32),
        "pad_slot_id": -1,
        "num_accepted_tokens": None,
        "output_state_indices": None if more else torch.tensor([4, 3]),
        "disable_state_update": False,
        "intermediate_states": kept[0],
        "intermediate_conv_windows": kept[1],
        "intermediate_state_indices": torch.tensor([3, 1]) if more else None,
        "out": torch.zeros(2 * tokens, heads[1], heads[3]),
    }
    layer = ol.layer(numbers, weights)
    decode(layer, projections, conv, state, **options)
    by_name = [one.clone() for one in (*written, options["out"])]
    assert not torch.equal(by_name[2 if more else 1], before[2 if more else 1])
    for one, old in zip((*written, options["out"]), (*before, torch.zeros(1)), strict=True):
        one.copy_(old)
    decode(layer, projections, conv, state, *options.values())
    assert all(map(torch.equal, (*written, options["out"]), by_name))


@pytest.mark.parametrize("door", DOORS)
def test_nothing_is_kept_where_that_is_asked(door):
    numbers, weights = ol.Numbers(HEADS[0]), ol.weights(HEADS[0])
    projections = ol.projections(B, numbers, "packed")
    conv, state = ol.states(B, HEADS[0], "wide")
    before = conv.clone(), state.clone()
    out = call(door, numbers, weights, projections, conv, state, disable_state_update=True)
    assert torch.equal(conv, before[0]) and torch.equal(state, before[1])
    assert torch.equal(out, call(door, numbers, weights, projections, conv, state))
    assert not torch.equal(conv, before[0]) and not torch.equal(state, before[1])


@pytest.mark.parametrize("door", DOORS)
def test_accepted_tokens_as_vllm_has_them(door):
    """A rolling window, and a slot for the state after each token."""
    heads, tokens, width = HEADS[0], 3, 4
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    c, (_, hv, dk, dv) = ol.channels(heads), heads
    slots = torch.tensor([[1, 5, 2], [3, 4, 6]], dtype=torch.int32)
    accepted = torch.tensor([2, 3], dtype=torch.int32)
    conv = torch.randn(8, width - 1 + tokens - 1, c).transpose(1, 2)
    state = torch.randn(8, hv, dv, dk)
    before = conv.clone(), state.clone()
    projections = ol.projections(2 * tokens, numbers, "packed")
    options = dict(
        state_indices=slots, num_accepted_tokens=accepted, tokens_per_sequence=tokens, pad_slot_id=0
    )
    out = call(door, numbers, weights, projections, conv, state, **options)
    parts = ol.unpacked(projections, numbers)
    for r in range(2):
        n, some = int(accepted[r]), [part[r * tokens : (r + 1) * tokens] for part in parts]
        window = before[0][slots[r, 0]][:, n - 1 : n - 1 + width - 1]
        y, _, states = ol.sequence(numbers, weights, some, window, before[1][slots[r, n - 1]])
        ol.close(out[r * tokens : (r + 1) * tokens], y)
        for t in range(tokens):
            ol.close(state[slots[r, t]], states[t])
        rolled = torch.cat([window[:, 1:].double(), some[0].T], 1)
        assert torch.equal(conv[slots[r, 0]].double(), rolled)
    rest = [0, 7]
    assert torch.equal(conv[rest], before[0][rest]) and torch.equal(state[rest], before[1][rest])


@pytest.mark.parametrize("door", ["function", "operator"])
def test_out_of_any_strides_and_dtype(door):
    heads = HEADS[0]
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    projections = ol.projections(B, numbers, "packed")
    conv, state = ol.states(B, heads, "dense")
    first = call(door, numbers, weights, projections, conv.clone(), state.clone())
    buffer = torch.full((8, 4, B + 2), 7.0, dtype=torch.bfloat16)
    out = buffer[:, :, 1:-1].permute(2, 1, 0)
    assert call(door, numbers, weights, projections, conv, state, out) is out
    assert torch.equal(out, first.bfloat16())
    assert (buffer[:, :, [0, -1]] == 7).all()


@pytest.mark.parametrize("door", DOORS)
def test_no_sequences(door):
    numbers, weights = ol.Numbers(HEADS[0]), ol.weights(HEADS[0])
    conv, state = ol.states(2, HEADS[0], "dense")
    before = conv.clone(), state.clone()
    out = call(door, numbers, weights, ol.projections(0, numbers, "packed"), conv, state)
    assert out.shape == (0, 4, 8)
    assert torch.equal(conv, before[0]) and torch.equal(state, before[1])


def test_strided_projections_and_weights():
    heads = HEADS[0]
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    projections = ol.projections(B, numbers, "packed")
    conv, state = ol.states(B, heads, "dense")
    first = call("function", numbers, weights, projections, conv.clone(), state.clone())
    apart = tuple(torch.cat([one, one], 1)[:, : one.shape[1]] for one in projections)
    other = ol.Weights(*vars(weights).values())
    other.conv_weight = weights.conv_weight.T.contiguous().T
    other.A_log = weights.A_log.repeat_interleave(3)[::3]
    assert torch.equal(call("function", numbers, other, apart, conv.clone(), state.clone()), first)
    other.conv_weight = weights.conv_weight[:, None]  # torch.nn.Conv1d's
    assert torch.equal(call("function", numbers, other, projections, conv, state), first)


def test_hostile_values():
    """Decays that underflow, steep gates, keys that are zero: finite, and right."""
    heads = HEADS[0]
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    weights.A_log = torch.tensor([5.0, -30.0, 0.0, 7.0])
    projections = ol.projections(B, numbers, "unpacked")
    mixed_qkv, z, b, a = projections
    mixed_qkv[1] = 0
    b[2], a[3] = 20.0, 90.0
    conv, state = ol.states(B, heads, "dense")
    conv[1], state[4] = 0, 1e4 * state[4]
    weights.conv_bias = None
    before = conv.clone(), state.clone()
    out = call("function", numbers, weights, projections, conv, state)
    for r, (y, _, states) in enumerate(expected(numbers, weights, projections, *before)):
        ol.close(out[r], y[0])
        ol.close(state[r], states[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same_bits(threads):
    heads = (4, 8, 64, 64)
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    projections = ol.projections(17, numbers, "packed")
    conv, state = ol.states(17, heads, "dense")
    one = conv.clone(), state.clone()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = call("function", numbers, weights, projections, *one)
        torch.set_num_threads(threads)
        assert torch.equal(call("function", numbers, weights, projections, conv, state), first)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(conv, one[0]) and torch.equal(state, one[1])


@pytest.mark.gpus(1)
@pytest.mark.parametrize("door", ["function", "operator"])
def test_a_cuda_graph_of_a_decode(door):
    """Slots change between replays; nothing is allocated, waited for or read by the host."""
    heads = (2, 4, 64, 32)
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    on_gpu = ol.Weights(*(one if one is None else one.cuda() for one in vars(weights).values()))
    projections = ol.projections(3, numbers, "packed")
    conv, state = ol.states(8, heads, "dense")
    there = [one.cuda() for one in (*projections, conv, state)]
    slots = torch.tensor([1, 5, 3], dtype=torch.int32, device="cuda")
    out = torch.empty(3, 4, 32, device="cuda")

    def run():
        call(door, numbers, on_gpu, tuple(there[:2]), there[2], there[3], out, state_indices=slots)

    kept = there[2].clone(), there[3].clone()
    run()
    there[2].copy_(kept[0]), there[3].copy_(kept[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for some in ([1, 5, 3], [0, -1, 3], [7, 1, -1]):
        slots.copy_(torch.tensor(some, dtype=torch.int32))
        graph.replay()
        right = call("function", numbers, weights, projections, conv, state, state_indices=slots.cpu())
        ol.close(out.cpu(), right.double())
    ol.close(there[3].cpu(), state.double())
    assert torch.equal(there[2].cpu(), conv)
