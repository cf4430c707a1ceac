"""What the benchmarks on a GPU measure with: calls captured in CUDA graphs, replayed in turns, and tensors as bits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


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


def medians(
    graphs: dict[Name, torch.cuda.CUDAGraph],
    turns: int,
    calls: int = 1,
    before: Callable[[], object] = lambda: None,
) -> dict[Name, float]:
    """Microseconds of a call: the median of so many turns, in each of which all graphs are replayed, of so many calls each.

    `before` comes before each replay and is not timed.
    """
    times: dict[Name, list[float]] = {name: [] for name in graphs}
    for _ in range(turns):
        for name, graph in graphs.items():
            before()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / calls)
    return {name: statistics.median(one) for name, one in times.items()}
