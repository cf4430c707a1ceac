"""What only a GPU has: streams, graphs, several devices."""

import pytest

torch = pytest.importorskip("torch")

import oracle

import gdn

pytestmark = pytest.mark.gpus(1)
HEADS = (16, 32, 128, 128)
FIRST = """
import torch, gdn
qkvz, ba = torch.arange(512.0, device="cuda")[None].repeat(3, 24), torch.ones(3, 64, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    parts = gdn.split(qkvz, ba, 16, 32, 128, 128)
graph.replay()
torch.cuda.synchronize()
again = gdn.split(qkvz.cpu(), ba.cpu(), 16, 32, 128, 128)
assert all(torch.equal(one.cpu(), other) for one, other in zip(parts, again))
print("well")
"""


def test_the_first_call_of_a_process_is_captured(python):
    assert python(FIRST) == "well\n"


@pytest.mark.parametrize("door", [gdn.split, torch.ops.gdn.split], ids=["function", "operator"])
def test_graphs(door):
    qkvz, ba = oracle.packed(33, HEADS, torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parts = door(qkvz, ba, *HEADS)
    for seed in (1, 2):
        qkvz.copy_(oracle.anything(tuple(qkvz.shape), torch.bfloat16, "cuda", seed))
        for part in parts:
            part.fill_(torch.nan)
        graph.replay()
        oracle.same(tuple(parts), oracle.split_bits(qkvz, ba, HEADS, "interleaved"))


@pytest.mark.parametrize("door", [gdn.split, torch.ops.gdn.split], ids=["function", "operator"])
def test_the_current_stream(door):
    """Work queued on a side stream before the op is seen by it, with no synchronisation between."""
    qkvz, ba = oracle.packed(512, HEADS, torch.bfloat16, device="cuda")
    expected = oracle.split_bits(qkvz, ba, HEADS, "interleaved")
    late = torch.zeros_like(qkvz)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(qkvz)
        parts = door(late, ba, *HEADS)
    torch.cuda.current_stream().wait_stream(stream)
    oracle.same(tuple(parts), expected)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("door", [gdn.split, torch.ops.gdn.split], ids=["function", "operator"])
def test_tensors_of_another_device_than_the_current(door):
    qkvz, ba = oracle.packed(65, HEADS, torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0):
        parts = door(qkvz, ba, *HEADS)
        assert torch.cuda.current_device() == 0
    assert all(part.device.index == 1 for part in parts)
    oracle.same(tuple(parts), oracle.split_bits(qkvz, ba, HEADS, "interleaved"))
