#!/usr/bin/env python3
"""SGLang's Gated DeltaNet layer on a GPU, as it is and with gdn in it, in one process.

    pip install ./python && python python/tests/peers.py sglang
    python benches/gpu/sglang_layer.py --csv OUT.csv

The layers are SGLang's own, with their backends and kernels (python/tests/sglang_rig.py says what is stood in for), decoding, verifying drafts, and taking prompts in
(`extend`). `core` is all between the GEMMs, `layer` has them too, for a hidden size of 2048. Graphs of calls of the first two, each on slots of its own, together larger
than the second-level cache, are replayed in turns; a figure is the median over the turns, in microseconds a call. Prompts go in without a graph, as in SGLang: there a
figure is from the call of `forward` until the GPU is through, or of the GPU alone, for a host that is ahead.
"""

import argparse
import contextlib
import csv
import datetime
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["GDN_OPS"] = "split,decode,verify,prefill"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python/tests"), str(ROOT / "benches")]

import peers
import stand_ins
import torch
import triton
from graphs import graph_of, medians

import gdn.integrations.sglang as integration

HIDDEN = 2048
HEADS = (16, 32, 128, 128)


def parts(rig, rows):
    """The layer's `forward` by what is in it: a function of a batch."""
    hv, dv = rig.heads[1::2]
    rig.project(rows)
    hidden = rig.random(rows, HIDDEN)
    wide = [rig.random(one.shape[1], HIDDEN, scale=HIDDEN**-0.5) for one in rig.projections]
    back = rig.random(HIDDEN, hv * dv, scale=(hv * dv) ** -0.5)
    given = rig.layer._forward_input_proj, rig.layer.out_proj
    with_gemms = (
        lambda hidden: tuple(torch.nn.functional.linear(hidden, one) for one in wide),
        lambda core: (torch.nn.functional.linear(core, back), None),
    )

    def run(batch, gemms):
        rig.layer._forward_input_proj, rig.layer.out_proj = gemms
        return rig.layer.forward(hidden, batch)

    return {"core": lambda batch: run(batch, given), "layer": lambda batch: run(batch, with_gemms)}


def subjects(rig, batch_size, tokens, calls):
    """Calls of the layer's `forward`, each on slots of its own, by what is timed."""
    order = torch.randperm(rig.slots)[: calls * batch_size].view(calls, batch_size)
    starts = torch.arange(batch_size + 1) * tokens
    steps = []
    for slots in order:
        batch = rig.step("DECODE" if tokens == 1 else "TARGET_VERIFY", slots, starts)
        steps.append((batch, rig.backend.forward_metadata))

    def call(run):
        def of(i):
            batch, rig.backend.forward_metadata = steps[i]
            return run(batch)

        return of

    return {part: call(run) for part, run in parts(rig, batch_size * tokens).items()}


def measure(rig, batch_size, tokens, calls, turns):
    graphs = {}
    with torch.no_grad():
        for part, run in subjects(rig, batch_size, tokens, calls).items():
            for who in ("SGLang", "gdn"):
                number = iter(range(1 << 30))
                if who == "gdn":
                    integration.install()
                try:
                    graphs[part, who] = graph_of(lambda: run(next(number) % calls), calls)
                finally:
                    integration.uninstall()
    return medians(graphs, turns, calls)


def until_through(run):
    """Microseconds from a call until the GPU is through."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def on_the_gpu(run):
    """Microseconds that the GPU is at a call which has been launched: it has something else to do until then. `None` where the call waits for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(12_000_000)  # cycles, some 7 ms
    start.record()
    run()
    is_launched = not start.query()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 if is_launched else None


#: How prompts are timed.
CLOCKS = {"extend": until_through, "extend on the GPU": on_the_gpu}


def measure_extend(rig, lengths, turns):
    """By each clock the microseconds of a call for prompts of so many tokens, each the first of its slot."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    prefixes = torch.zeros(len(lengths), dtype=torch.int32, device="cuda")
    batch = rig.step("EXTEND", torch.arange(len(lengths)), starts, extend_prefix_lens=prefixes)
    times = {}
    with torch.no_grad():
        for part, run in parts(rig, sum(lengths)).items():
            for turn in range(turns + 1):
                for who in ("SGLang", "gdn"):
                    with integration.installed() if who == "gdn" else contextlib.nullcontext():
                        run(batch)  # what a first call does, and what switching does
                        for name, clock in CLOCKS.items():
                            took = clock(lambda run=run: run(batch))
                            if turn:
                                times.setdefault((name, part, who), []).append(took)
    figures = {name: {} for name in CLOCKS}
    for (name, *key), one in times.items():
        figures[name][tuple(key)] = statistics.median(one) if None not in one else float("nan")
    return figures


def numbers(text):
    """Those of a text with commas between them; none of an empty one."""
    return [int(one) for one in text.split(",") if one]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="where figures go")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--batch", default="1,4,16,64,256")
    parser.add_argument("--tokens", default="1,4", help="1 for decoding, more for drafts")
    parser.add_argument("--prompts", default="512,2048,8192,4x2048", help="lengths of prompts that go in, alone or LENGTHS as often as said")
    arguments = parser.parse_args()
    about = [datetime.date.today(), torch.cuda.get_device_name(), f"torch {torch.__version__}", f"triton {triton.__version__}", f"SGLang {peers.WHEELS['sglang'][0]}"]
    # A figure is written when it is there: who ends the process has those before.
    out = open(arguments.csv or os.devnull, "w", newline="", buffering=1)
    rows = csv.writer(out)
    rows.writerow(["# " + ", ".join(map(str, about))])
    rows.writerow(["packing", "state", "step", "tokens", "batch", "part", "SGLang us", "with gdn us"])

    def keep(packing, state, step, tokens, batch_size, figures):
        name = str(state).removeprefix("torch.")
        for part in ("core", "layer"):
            theirs, ours = figures[part, "SGLang"], figures[part, "gdn"]
            what = f"{packing} {name} {step} T={tokens} B={batch_size} {part}"
            print(f"{what}: SGLang {theirs:.2f}, gdn {ours:.2f}, {theirs / ours:.2f} times", flush=True)
            rows.writerow([packing, name, step, tokens, batch_size, part, f"{theirs:.3f}", f"{ours:.3f}"])

    import sglang_rig as rigs

    with stand_ins.engine(peers.folder("sglang"), "sglang", rigs.REAL, rigs.given()):
        for packing in rigs.MODELS:
            for state in (torch.float32, torch.bfloat16):
                for tokens in numbers(arguments.tokens):
                    for batch_size in numbers(arguments.batch):
                        if tokens > 1 and batch_size > 64:
                            continue
                        calls = max(2, min(32, (256 << 20) // (batch_size * 32 * 128 * 128 * state.itemsize)))
                        rig = rigs.Rig(packing, HEADS, slots=calls * batch_size, state_dtype=state, tokens=tokens, rows=batch_size + 1)
                        figures = measure(rig, batch_size, tokens, calls, arguments.turns)
                        keep(packing, state, "decode" if tokens == 1 else "verify", tokens, batch_size, figures)
                        del rig
                        torch.cuda.empty_cache()
            for prompts in filter(None, arguments.prompts.split(",")):
                *often, length = map(int, prompts.split("x"))
                lengths = (often[0] if often else 1) * [length]
                rig = rigs.Rig(packing, HEADS, slots=len(lengths), rows=len(lengths) + 1)
                for step, figures in measure_extend(rig, lengths, arguments.turns).items():
                    keep(packing, torch.float32, step, length, len(lengths), figures)
                del rig
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
