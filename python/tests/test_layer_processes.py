"""decode and prefill in threads of Python and in processes that fork; and nothing leaks."""

import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

import oracle_layer as ol
from test_layer_operators import sample
from test_memory import resident
from test_threads import FORKS

import gdn

HEADS = (4, 8, 32, 32)
CALLS = 30_000  # of each door


def given(seed):
    torch.manual_seed(seed)  # of all threads
    numbers, weights = ol.Numbers(HEADS), ol.weights(HEADS)
    return ol.layer(numbers, weights), ol.projections(70, numbers, "packed"), ol.states(1, HEADS, "dense")


def work(layer, projections, states):
    conv, state = (one.clone() for one in states)
    one = conv.clone(), state.clone()
    many = [conv.clone(), state.clone()]
    steps = [layer.decode(tuple(part[t : t + 1] for part in projections), *one) for t in range(70)]
    for start in range(0, 64, 16):
        rows = tuple(part[start : start + 16] for part in projections)
        got = layer.decode(rows, *many, tokens_per_sequence=16)
        assert torch.equal(got, torch.cat(steps[start : start + 16]))
    out = layer.prefill(projections, torch.tensor([0, 70]), conv, state)
    torch.testing.assert_close(out, torch.cat(steps), rtol=1e-3, atol=1e-4)
    return out


def test_threads_of_python_at_once():
    """Each has states of its own; the same bits as alone."""
    calls = [given(seed) for seed in range(4)]
    alone = [work(*call) for call in calls]
    with ThreadPoolExecutor(4) as threads:
        for seed, out in enumerate(threads.map(lambda seed: work(*calls[seed % 4]), range(16))):
            assert torch.equal(out, alone[seed % 4])


def test_errors_in_threads():
    def wrong(seed):
        numbers = ol.Numbers(HEADS)
        layer, (conv, state) = ol.layer(numbers, ol.weights(HEADS)), ol.states(1, HEADS, "dense")
        qkvz, ba = ol.projections(2, numbers, "packed")
        for _ in range(20):
            with pytest.raises(ValueError, match="mixed_ba has 1 rows, mixed_qkvz has 2"):
                layer.decode((qkvz, ba[:1]), conv, state)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(wrong, range(8)))


SETUP = """
import sys
{before}
import {framework}, gdn, numpy as np
{threads}
def make(*shape):
    made = np.sin(np.arange(np.prod(shape), dtype="f4")).reshape(shape)
    return {make}
layer = gdn.Layer((4, 8, 64, 64), conv_weight=make(1024, 4), A_log=make(8), dt_bias=make(8), norm_weight=make(64))
projections = make(600, 1536), make(600, 16)
cu = {cu}
def run():
    conv, state = make(2, 1024, 3), make(2, 8, 64, 64)
    out = layer.prefill(projections, cu, conv, state)
    few = projections[0][:2], projections[1][:2]
    return [np.asarray(one) for one in (out, layer.decode(few, conv, state), conv, state)]
first = run()
qkvz = ba = None
class gdn:
    split = staticmethod(lambda *_: run())
same = lambda parts: all(np.array_equal(*pair) for pair in zip(parts, first))
"""
NUMPY = dict(
    before="sys.modules['torch'] = None",
    framework="numpy",
    threads="",
    make="made",
    cu="np.array([0, 300, 600])",
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_forks(threads, python):
    how = NUMPY
    if threads:
        how = dict(
            before="", framework="torch", make="torch.from_numpy(made)", cu="torch.tensor([0, 300, 600])"
        )
        how |= dict(threads=f"torch.set_num_threads({threads})")
    assert python(FORKS.format(setup=SETUP.format(**how)), timeout=200) == "well\n"


def doors():
    layer = ol.layer(ol.Numbers((2, 4, 16, 8)), ol.weights((2, 4, 16, 8)))
    projections = ol.projections(3, ol.Numbers((2, 4, 16, 8)), "packed")
    states = ol.states(3, (2, 4, 16, 8), "dense")
    cu, indices, out = torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1]), torch.zeros(3, 4, 8)
    made = {
        "decode": lambda: layer.decode(projections, *states, state_indices=indices),
        "decode, out": lambda: layer.decode(projections, *states, out=out),
        "prefill": lambda: layer.prefill(projections, cu, *states),
        "supported": lambda: gdn.decode_supported(layer, projections, *states),
        "refused": lambda: gdn.decode_supported(layer, projections, states[0][:1], states[1]),
    }
    for op in ("decode", "prefill"):
        for overload in ("default", "unpacked_out"):
            operator, arguments, options = sample(op, overload, more=True)
            made[f"{op}.{overload}"] = lambda call=(operator, arguments, options): call[0](
                *call[1], **call[2]
            )
    operator, arguments, options = sample("decode")

    def refused():
        with pytest.raises(RuntimeError):
            operator(*arguments, **options, tokens_per_sequence=2)

    made["operator, refused"] = refused
    watched = [*projections, *states, cu, indices, out, layer.conv_weight, *arguments[:9]]
    return watched, made


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("door", doors()[1])
def test_calls_leak_nothing(door):
    watched, calls = doors()
    call = calls[door]
    for _ in range(3000):
        call()
    gc.collect()
    references, objects = [sys.getrefcount(one) for one in watched], len(gc.get_objects())
    # Memory may grow once, for what threads and allocators keep; a leak grows each time.
    for _ in range(3):
        before = resident()
        for _ in range(CALLS // 10 if "refused" in door else CALLS):
            call()
        gc.collect()
        grown = resident() - before
        if grown < 2 << 20:
            break
    assert [sys.getrefcount(one) for one in watched] == references
    assert len(gc.get_objects()) < objects + 100
    assert grown < 2 << 20, f"{grown} bytes more"
