"""Nothing leaks, and the blocks of large tensors are used again, never too early."""

import gc
import os
import pickle
import sys

import pytest

torch = pytest.importorskip("torch")

import oracle
import oracle_layer as ol

import gdn
from gdn import _gdn

HEADS = (2, 4, 8, 16)
CALLS = 100_000  # of each door
LARGE = 32 << 20


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def doors():
    qkvz, ba = oracle.packed(3, HEADS, torch.float32)
    parts, packed = gdn.split(qkvz, ba, *HEADS), (torch.empty_like(qkvz), torch.empty_like(ba))
    arrays, wrong = [one.numpy() for one in (qkvz, ba)], ba[:2]
    named = dict(zip(["mixed_qkv", "z", "b", "a"], parts, strict=True))

    def refused(call):
        try:
            call()
        except (ValueError, RuntimeError):
            return
        raise AssertionError("not refused")

    watched = [qkvz, ba, *parts, *packed, *arrays]
    return watched, {
        "split": lambda: gdn.split(qkvz, ba, *HEADS),
        "split, out": lambda: gdn.split(qkvz, ba, *HEADS, out=parts),
        "merge": lambda: gdn.merge(*parts, *HEADS),
        "merge, out": lambda: gdn.merge(*parts, *HEADS, out=packed),
        "operator": lambda: torch.ops.gdn.split(qkvz, ba, *HEADS),
        "operator.out": lambda: torch.ops.gdn.split.out(qkvz, ba, *HEADS, **named),
        "merging operator": lambda: torch.ops.gdn.merge(*parts, *HEADS),
        "drop-in": lambda: gdn.fused_qkvzba_split_reshape_cat(qkvz, ba, *HEADS),
        "numpy": lambda: gdn.split(*arrays, *HEADS),
        "refused": lambda: refused(lambda: gdn.split(qkvz, wrong, *HEADS)),
        "refused, out": lambda: refused(lambda: gdn.split(qkvz, wrong, *HEADS, out=parts)),
        "operator, refused": lambda: refused(lambda: torch.ops.gdn.split(qkvz, wrong, *HEADS)),
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("door", doors()[1])
def test_calls_leak_nothing(door):
    watched, calls = doors()
    call = calls[door]
    for _ in range(1000):
        call()
    gc.collect()
    references = [sys.getrefcount(one) for one in watched]
    small = [sys.getrefcount(one) for one in (None, True, "interleaved", 2)]
    objects, before = len(gc.get_objects()), resident()
    for _ in range(CALLS // 10 if "refused" in door and "operator" in door else CALLS):
        call()
    gc.collect()
    grown = resident() - before
    assert [sys.getrefcount(one) for one in watched] == references
    for one, old in zip((None, True, "interleaved", 2), small, strict=True):
        assert abs(sys.getrefcount(one) - old) < 1000
    assert len(gc.get_objects()) < objects + 100
    assert grown < 4 << 20, f"{grown} bytes more"


def test_jax_and_gradients_leak_nothing():
    qkvz, ba = oracle.packed(3, HEADS, torch.float32)
    qkvz = torch.randn_like(qkvz).requires_grad_()
    ba = torch.randn_like(ba)

    def call():
        sum(part.sum() for part in gdn.split(qkvz, ba, *HEADS)).backward()
        qkvz.grad = None

    for _ in range(200):
        call()
    before = resident()
    for _ in range(5000):
        call()
    gc.collect()
    assert resident() - before < 4 << 20


def large(n=2100):
    """Inputs whose mixed_qkv has more than 32 MiB."""
    return oracle.packed(n, (16, 32, 128, 128), torch.bfloat16)


def split_large(tensors):
    return gdn.split(*tensors, 16, 32, 128, 128)


@pytest.fixture
def no_blocks():
    gc.collect()
    _gdn.empty_cache()
    yield
    gc.collect()
    _gdn.empty_cache()


def has_blocks():
    """Whether this PyTorch lets memory in from outside."""
    parts = split_large(large())
    del parts
    return _gdn.empty_cache() > 0


def test_blocks_are_used_again(no_blocks):
    if not has_blocks():
        pytest.skip("large tensors are PyTorch's own here")
    tensors = large()
    parts = split_large(tensors)
    address = parts[0].data_ptr()
    assert parts[0].nbytes >= LARGE
    assert _gdn.empty_cache() == 0, "what is in use is not in the store"
    del parts
    again = split_large(tensors)
    assert again[0].data_ptr() == address
    del again
    kept = _gdn.empty_cache()
    assert LARGE <= kept <= 4 * LARGE
    assert _gdn.empty_cache() == 0


@pytest.mark.parametrize("n", [4, 16, 64])
def test_every_call_gets_the_memory_of_the_last(n, no_blocks):
    if not has_blocks():
        pytest.skip("tensors are PyTorch's own here")
    tensors = large(n)
    addresses = {split_large(tensors)[0].data_ptr() for _ in range(20)}
    assert len(addresses) == 1


def test_few_blocks_are_kept(no_blocks):
    tensors = large(4)
    held = [split_large(tensors) for _ in range(200)]
    del held
    gc.collect()
    one = 4 * (8192 + 4096 + 64) * 2
    assert _gdn.empty_cache() <= 64 * (one + 4096)


@pytest.mark.parametrize("door", [gdn.split, torch.ops.gdn.split], ids=["function", "operator"])
def test_blocks_in_use_are_left_alone(door, no_blocks):
    """Every tensor that is alive has its own memory, also where only a view of it is."""
    tensors = large()
    expected = oracle.split_bits(*tensors, (16, 32, 128, 128), "interleaved")
    views = []
    for _ in range(3):
        parts = door(*tensors, 16, 32, 128, 128)
        views.append((parts[0][5:7, 3:], parts[0].view(torch.int16).numpy()[9]))
        del parts
        gc.collect()
    fresh = door(tensors[0].clone().fill_(0), tensors[1], 16, 32, 128, 128)
    for view, row in views:
        assert torch.equal(oracle.bits(view), expected[0][5:7, 3:])
        assert (row == expected[0][9].numpy()).all()
    assert not fresh[0].any()


def test_no_more_than_half_a_gigabyte_is_kept(no_blocks):
    if not has_blocks():
        pytest.skip("large tensors are PyTorch's own here")
    tensors = large(4200)
    kept = [split_large(tensors) for _ in range(9)]
    del kept
    gc.collect()
    assert 0 < _gdn.empty_cache() <= 512 << 20


def test_large_tensors_are_tensors_like_any(no_blocks, tmp_path):
    tensors = large()
    expected = oracle.split_bits(*tensors, (16, 32, 128, 128), "interleaved")[0]

    def fresh():
        return split_large(tensors)[0]

    again = pickle.loads(pickle.dumps(fresh()))
    assert torch.equal(oracle.bits(again), expected)
    torch.save(fresh(), tmp_path / "part.pt")
    assert torch.equal(oracle.bits(torch.load(tmp_path / "part.pt")), expected)
    assert torch.equal(oracle.bits(fresh().clone()), expected)
    array = fresh().view(torch.int16).numpy()
    gc.collect()
    assert (array == expected.numpy()).all()
    exchanged = torch.from_dlpack(fresh())
    assert torch.equal(oracle.bits(exchanged), expected)
    shared = fresh().share_memory_()
    assert shared.is_shared() and torch.equal(oracle.bits(shared), expected)
    added = fresh()
    added.zero_()
    assert not added.any()
    assert added.untyped_storage().nbytes() == added.nbytes


def test_large_tensors_are_resized_or_say_why_not(no_blocks):
    part = split_large(large(2100))[0]
    part.resize_(100, 7)
    assert part.shape == (100, 7)
    try:
        part.resize_(5000, 8192)
    except RuntimeError as error:
        assert "not resizable" in str(error)
    else:
        part.fill_(1)
        assert part.sum(dtype=torch.float64) == 5000 * 8192


def test_freed_in_another_thread(no_blocks):
    import threading

    holder = [split_large(large())]
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    assert not holder
    parts = split_large(large())
    assert parts[0].shape == (2100, 8192)


def test_alignment(no_blocks):
    """Fresh tensors lie as PyTorch's do, and large ones on whole pages."""
    assert all(
        part.data_ptr() % 64 == 0 for part in gdn.split(*oracle.packed(5, HEADS, torch.float32), *HEADS)
    )
    assert not has_blocks() or split_large(large())[0].data_ptr() % 4096 == 0


@pytest.mark.parametrize("door", [gdn.split, torch.ops.gdn.split], ids=["function", "operator"])
def test_what_is_read_is_not_copied(door):
    """What PyTorch copies when it is written to stays uncopied where it is read, and is copied where it is written to."""
    is_shared = torch._C._is_cow_tensor
    qkvz, ba = torch.randn(3, 160), torch.randn(3, 8)
    expected = door(qkvz, ba, *HEADS)
    lazy = torch._lazy_clone(qkvz)
    assert all(map(torch.equal, door(lazy, ba, *HEADS), expected)) and is_shared(lazy)
    zeros = [torch.zeros_like(one) for one in expected]
    out = tuple(map(torch._lazy_clone, zeros))
    if door is gdn.split:
        gdn.split(qkvz, ba, *HEADS, out=out)
    else:
        torch.ops.gdn.split.out(qkvz, ba, *HEADS, **dict(zip(["mixed_qkv", "z", "b", "a"], out, strict=True)))
    assert all(map(torch.equal, out, expected)) and not any(one.any() for one in zeros)


def test_what_a_layer_reads_is_not_copied():
    numbers, weights = ol.Numbers(HEADS), ol.weights(HEADS)
    projections, states = ol.projections(2, numbers, "packed"), ol.states(2, HEADS, "dense")
    weights = ol.Weights(*map(torch._lazy_clone, (one for one in vars(weights).values())))
    layer, projections = ol.layer(numbers, weights), tuple(map(torch._lazy_clone, projections))
    out = torch.empty(2, HEADS[1], HEADS[3])
    layer.decode(projections, *states, out=out)
    layer.prefill(projections, torch.tensor([0, 1, 2]), *states, out=out)
    assert all(map(torch._C._is_cow_tensor, (*projections, weights.conv_weight, weights.A_log)))
