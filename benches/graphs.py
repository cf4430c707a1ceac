"""What the benchmarks on a GPU measure with: a call captured in a CUDA graph, and tensors as bits."""

from __future__ import annotations

from collections.abc import Callable

import torch


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor."""
    return t.reshape(-1).view(torch.uint8)


def graph_of(run: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """So many calls, one after the other, as a graph that was not yet replayed."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run()
    return graph
