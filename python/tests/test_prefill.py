"""``Layer.prefill`` and ``torch.ops.gdn.prefill`` against float64."""

import copy

import pytest

torch = pytest.importorskip("torch")

import itertools

import oracle_layer as ol
from oracle import bits

import gdn

HEADS = [(2, 4, 16, 8), (1, 3, 8, 24), (2, 2, 32, 64)]
LAYOUTS = ["dense", "channels last", "page", "wide"]
LENGTHS = [17, 0, 1, 64, 15]
CU = [0, 17, 17, 18, 82, 97]
DOORS = ["function", "operator", "numpy"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def call(door, numbers, weights, projections, cu, conv=None, state=None, out=None, **options):
    """Prefill through one of the doors, all of which write in place."""
    cu = cu if isinstance(cu, torch.Tensor) else torch.tensor(cu, dtype=torch.int32)
    return ol.through(door, "prefill", numbers, weights, projections, (conv, state), (cu,), out, options)


def expected(numbers, weights, projections, cu, conv, state, slots=None, initial=None):
    """Outputs, windows and states after each token, of each sequence."""
    parts, width = ol.unpacked(projections, numbers), weights.conv_weight.shape[-1]
    _, hv, dk, dv = numbers.heads
    results = []
    for r, (start, end) in enumerate(itertools.pairwise(cu)):
        slot = r if slots is None else slots[r]
        window = torch.zeros(ol.channels(numbers.heads), width - 1)
        first = torch.zeros(hv, dv, dk)
        if initial is None or initial[r]:
            window = window if conv is None else conv[slot][:, conv.shape[2] - width + 1 :]
            first = first if state is None else state[slot]
        results.append(ol.sequence(numbers, weights, [part[start:end] for part in parts], window, first))
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_sequences(heads, layout):
    """Through every door, and with every kind of projections: one set of numbers, so one oracle."""
    numbers = ol.Numbers(heads, "contiguous" if layout == "wide" else "interleaved")
    weights = ol.weights(heads)
    packed = ol.projections(CU[-1], numbers, "packed")
    parts = [one.float() for one in ol.unpacked(packed, numbers)]
    kinds = dict(packed=packed, unpacked=tuple(parts), flat=(parts[0], parts[1].flatten(1), *parts[2:]))
    before = ol.states(len(LENGTHS), heads, layout)
    results = expected(numbers, weights, packed, CU, *before)
    first = None
    for kind, projections in kinds.items():
        for door in DOORS:
            conv, state = (copy.deepcopy(one) for one in before)
            if layout == "page":
                conv, state = ol.states(len(LENGTHS), heads, layout)
                conv.copy_(before[0])
                state.copy_(before[1])
            out = call(door, numbers, weights, projections, CU, conv, state)
            if first is not None:
                assert torch.equal(out, first), (kind, door)
                continue
            first = out
            assert (
                out.dtype == torch.float32
                and out.is_contiguous()
                and out.shape == (CU[-1], heads[1], heads[3])
            )
            for r, (y, windows, states) in enumerate(results):
                ol.close(out[CU[r] : CU[r + 1]], y, f"out {r}")
                if not LENGTHS[r]:
                    assert torch.equal(conv[r], before[0][r]) and torch.equal(state[r], before[1][r])
                    continue
                ol.close(state[r], states[-1], f"state {r}")
                assert torch.equal(conv[r][:, -3:].double(), windows[-1])


@pytest.mark.parametrize("door", DOORS)
def test_without_states(door):
    numbers, weights = ol.Numbers(HEADS[0]), ol.weights(HEADS[0], bias=False)
    projections = ol.projections(CU[-1], numbers, "packed")
    out = call(door, numbers, weights, projections, CU)
    for r, (y, _, _) in enumerate(expected(numbers, weights, projections, CU, None, None)):
        ol.close(out[CU[r] : CU[r + 1]], y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    numbers, weights = ol.Numbers(HEADS[0]), ol.weights(HEADS[0], torch.bfloat16)
    projections = ol.projections(CU[-1], numbers, "packed", dtype)
    conv, state = ol.states(5, HEADS[0], "dense", dtype)
    conv = conv.to(dtype)
    before = conv.clone(), state.clone()
    out = call("function", numbers, weights, projections, CU, conv, state)
    assert out.dtype == dtype
    for r, (y, windows, states) in enumerate(expected(numbers, weights, projections, CU, *before)):
        ol.close(out[CU[r] : CU[r + 1]], y)
        if LENGTHS[r]:
            ol.close(state[r], states[-1])
            assert torch.equal(conv[r].double(), windows[-1])


@pytest.mark.parametrize("flags", [torch.bool, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("door", DOORS)
def test_slots_padding_and_initial_states(door, index, flags):
    heads = HEADS[0]
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    slots, initial = [4, 0, -1, 6, 2], [1, 1, 1, 0, 0]
    cu = [0, 3, 20, 22, 39, 39]
    projections = ol.projections(cu[-1], numbers, "packed")
    projections[0][20] = float("nan")  # of a padded sequence
    conv, state = ol.states(7, heads, "page")
    before = conv.clone(), state.clone()
    out = torch.full((cu[-1], 4, 8), float("nan"))
    options = dict(state_indices=torch.tensor(slots, dtype=index), pad_slot_id=0)
    options |= dict(has_initial_state=torch.tensor(initial).to(flags))
    call(door, numbers, weights, projections, torch.tensor(cu, dtype=index), conv, state, out, **options)
    results = expected(numbers, weights, projections, cu, *before, [max(slot, 0) for slot in slots], initial)
    for r, (y, windows, states) in enumerate(results):
        rows = out[cu[r] : cu[r + 1]]
        if slots[r] <= 0:
            assert torch.equal(bits(rows), torch.zeros_like(bits(rows)))
        elif len(y):
            ol.close(rows, y)
            ol.close(state[slots[r]], states[-1])
            assert torch.equal(conv[slots[r]].double(), windows[-1])
    # No token and no initial state: zeros.
    assert not conv[2].any() and not state[2].any()
    rest = [0, 1, 3, 5]
    assert torch.equal(conv[rest], before[0][rest]) and torch.equal(state[rest], before[1][rest])


@pytest.mark.parametrize("door", DOORS)
def test_checkpoints(door):
    heads, every = HEADS[0], 64
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    cu = [0, 140, 170, 298]
    projections = ol.projections(cu[-1], numbers, "packed")
    conv, state = ol.states(3, heads, "dense")
    before = conv.clone(), state.clone()
    places = [3, 0, 0]  # the second has none
    states = torch.full((6, *state.shape[1:]), float("nan"))
    windows = torch.full((6, *conv.shape[1:]), float("nan"))
    options = dict(checkpoint_every_n_tokens=every, checkpoint_starts=torch.tensor(places))
    options |= dict(state_checkpoints=states, conv_checkpoints=windows)
    call(door, numbers, weights, projections, cu, conv, state, **options)
    results = expected(numbers, weights, projections, cu, *before)
    for r, (_, some, after) in enumerate(results):
        for i in range((cu[r + 1] - cu[r]) // every):
            ol.close(states[places[r] + i], after[(i + 1) * every - 1])
            assert torch.equal(windows[places[r] + i].double(), some[(i + 1) * every - 1])
    rest = [2, 5]
    assert states[rest].isnan().all() and windows[rest].isnan().all()


@pytest.mark.parametrize("cut", [64, 128])
def test_cut_at_chunks_it_gives_the_same_bits(cut):
    numbers, weights = ol.Numbers(HEADS[2]), ol.weights(HEADS[2])
    projections = ol.projections(140, numbers, "packed")
    conv, state = ol.states(1, HEADS[2], "dense")
    parts = conv.clone(), state.clone()
    out = call("function", numbers, weights, projections, [0, 140], conv, state)
    first = call("function", numbers, weights, tuple(one[:cut] for one in projections), [0, cut], *parts)
    second = call(
        "function", numbers, weights, tuple(one[cut:] for one in projections), [0, 140 - cut], *parts
    )
    assert torch.equal(torch.cat([first, second]), out)
    assert torch.equal(parts[0], conv) and torch.equal(parts[1], state)


@pytest.mark.parametrize("door", DOORS)
def test_segments_change_nothing_on_a_cpu(door):
    """Heads and a length that a GPU would cut: a call that lets it is the same here, and can be checked beforehand."""
    heads = (1, 1, 64, 64)
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    projections = ol.projections(2100, numbers, "packed")
    results = []
    for options in ({}, dict(segments=False), dict(segments=True)):
        conv, state = ol.states(1, heads, "dense")
        conv.zero_(), state.zero_()
        out = call(door, numbers, weights, projections, [0, 2100], conv, state, **options)
        results.append((out, conv, state))
        given = projections, torch.tensor([0, 2100], dtype=torch.int32), conv, state
        assert gdn.prefill_supported(ol.layer(numbers, weights), *given, **options) is None
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    message = "segments" if door != "operator" else "segments|bool"
    with pytest.raises((TypeError, RuntimeError), match=message):
        call(door, numbers, weights, projections, [0, 2100], conv, state, segments="yes")


def test_decode_goes_on_where_prefill_ends():
    numbers, weights = ol.Numbers(HEADS[0]), ol.weights(HEADS[0])
    projections = ol.projections(40, numbers, "packed")
    conv, state = ol.states(1, HEADS[0], "wide")
    before = conv.clone(), state.clone()
    layer = ol.layer(numbers, weights)
    out = [layer.prefill(tuple(one[:30] for one in projections), torch.tensor([0, 30]), conv, state)]
    out += [layer.decode(tuple(one[i : i + 1] for one in projections), conv, state) for i in range(30, 40)]
    [(y, _, states)] = expected(numbers, weights, projections, [0, 40], *before)
    ol.close(torch.cat(out), y)
    ol.close(state[0], states[-1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same_bits(threads):
    heads = (1, 2, 64, 96)
    numbers, weights = ol.Numbers(heads), ol.weights(heads)
    projections = ol.projections(300, numbers, "packed")
    conv, state = ol.states(1, heads, "dense")
    one, before = (conv.clone(), state.clone()), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = call("function", numbers, weights, projections, [0, 300], *one)
        torch.set_num_threads(threads)
        assert torch.equal(call("function", numbers, weights, projections, [0, 300], conv, state), first)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(conv, one[0]) and torch.equal(state, one[1])
