#!/usr/bin/env python3
"""What a call of decode takes behind another kernel, and what that one takes after it.

    python benches/gpu/behind.py [--sglang FOLDER] [--csv FILE]

Graphs in which calls and another kernel take turns: the layer's GEMM (torch.mm, a hidden size of 2048), or one of a single block. Each
kernel's start and end are the driver's (CUPTI, by torch.profiler), which costs some tenths of a microsecond a kernel. A call lasts from
the end of the kernel before it to the end of its own last one. States and windows lie in slots that no call before has used in 256 MiB,
as in decode.py, whose subjects these are.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
from pathlib import Path

import decode
import torch
from graphs import graph_of
from records import append, check
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COLUMNS = ["heads", "state", "batch", "behind", "alone us", "subject", "subject us", "with subject us"]
BATCHES = (1, 4, 16)
REPLAYS = 5


def kernels(work, calls):
    """Starts and ends of the kernels of a call, in turn, of some replays of a graph of so many calls, by call."""
    turn = itertools.cycle(range(calls))
    graph = graph_of(lambda: work(next(turn)), calls)
    graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    on_device = (event.time_range for event in found.events() if event.device_type == DeviceType.CUDA)
    spans = sorted((time.start, time.end) for time in on_device if time.end > time.start)
    each, rest = divmod(len(spans), REPLAYS * calls)
    assert each > 0 and rest == 0, f"{len(spans)} kernels of {REPLAYS} times {calls} calls"
    return [spans[i : i + each] for i in range(0, len(spans), each)]


def measure(case, sglang):
    """By what comes before and subject: what the former takes alone, the subject, and the former with the subject after it."""
    subjects = {"gdn": decode.ours(case)}
    if sglang:
        subjects["SGLang, 3 launches"] = decode.chain(case, sglang, 3)
    subjects |= decode.copies(case)
    small = torch.zeros(128, device="cuda")
    for before, first in {"GEMM": decode.behind_gemm(case, lambda i: None), "a small kernel": lambda i: small.add_(1)}.items():
        alone = statistics.median(end - start for [(start, end)] in kernels(first, case.calls))
        for name, run in subjects.items():
            calls = kernels(lambda i, run=run: (first(i), run(i)), case.calls)
            took = statistics.median(call[-1][1] - call[0][1] for call in calls)
            # The first of all has no call before it.
            yield before, alone, name, took, statistics.median(end - start for (start, end), *_ in calls[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang", help="the folder of SGLang 0.5.23's files")
    parser.add_argument("--csv", type=Path, help="where figures go")
    parser.add_argument("--heads", default="16/32,4/8,16/48", help="key and value heads of 128")
    arguments = parser.parse_args()
    about = ", ".join([str(datetime.date.today()), torch.cuda.get_device_name(), f"torch {torch.__version__}"])
    check(arguments.csv, about, COLUMNS)
    sglang = decode.Peer(arguments.sglang).load() if arguments.sglang else None
    for pair, state, batch in itertools.product(arguments.heads.split(","), ("float32", "bfloat16"), BATCHES):
        case = decode.Case((*map(int, pair.split("/")), 128, 128), batch, getattr(torch, state), "contiguous")
        rows = [
            [pair, state, batch, before, f"{alone:.2f}", name, f"{took:.2f}", f"{then:.2f}"]
            for before, alone, name, took, then in measure(case, sglang)
        ]
        for row in rows:
            print(*row, sep=", ", flush=True)
        append(arguments.csv, about, COLUMNS, rows)
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
