#!/usr/bin/env python3
"""vLLM's Gated DeltaNet layer on a GPU, everything between its GEMMs, as it is and with gdn in it, in one process.

    pip install ./python && python python/tests/peers.py vllm
    python benches/gpu/vllm_layer.py --csv OUT.csv

The method `_forward_core_fused_norm_packed` is vLLM's own, with its metadata and Triton kernels (python/tests/vllm_rig.py says what is stood in for), decoding and
verifying drafts, on packed projections as Qwen3.5 has them. Graphs of calls, each on slots of its own, together larger than the second-level cache, are replayed in turns; a
figure is the median over the turns, in microseconds a call. Of the drafts before, 1 to all were accepted.
"""

import argparse
import csv
import dataclasses
import datetime
import importlib
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python/tests"), str(ROOT / "benches")]

import peers
import stand_ins
import torch
import triton
from graphs import graph_of, medians

import gdn.integrations.vllm_cuda as cuda
from gdn.integrations.ops import OPS
from gdn.integrations.vllm_cuda_trial import Bench, Step


def metadata_of(bench, batch_size, tokens, calls):
    """Steps on slots of their own, and the states for all of them."""
    layer, step = bench.layer, bench.step
    slots = calls * batch_size + 1
    pages = {one: layer.kv_cache[one] for one in (0, 1)}
    state = torch.randn(slots * bench.drafted, *pages[1].shape[1:], device="cuda").mul_(0.2).to(pages[1].dtype)
    windows = torch.randn(slots * bench.drafted, *pages[0].shape[1:], device="cuda").to(pages[0].dtype)
    vars(layer)["kv_cache"] = [windows, state]
    order = (torch.randperm(slots - 1) + 1).view(calls, batch_size)
    found = []
    for one in order.tolist():
        bench.step = dataclasses.replace(step, slots=tuple(one))
        found.append(bench._metadata())
    return found


def measure(rigs, heads, dtype, tokens, batch_size, turns):
    size = torch.empty(0, dtype=dtype).itemsize
    each = heads[1] * heads[2] * heads[3] * size * tokens
    calls = max(2, min(32, (256 << 20) // (batch_size * each)))
    first = dict(decodes=batch_size)
    if tokens > 1:
        accepted = torch.randint(1, tokens + 1, (batch_size,)).tolist()
        first = dict(drafts=batch_size, accepted=tuple(accepted))
    step = Step(tokens=(tokens,) * batch_size, slots=(1,) * batch_size, **first)
    like = torch.zeros(1, dtype=torch.bfloat16, device="cuda")
    bench = Bench(rigs.layer(heads, num_spec=tokens - 1), step, like, dtype)
    steps = metadata_of(bench, batch_size, tokens, calls)
    module = importlib.import_module(rigs.MODULE)
    own = getattr(module.QwenGatedDeltaNetAttention, cuda.METHOD)
    ours = cuda.core_packed(own, module, OPS, logging.getLogger("bench"), lambda *_: None)
    override = importlib.import_module("vllm.forward_context").override_forward_context
    out = torch.zeros(batch_size * tokens, heads[1], heads[3], dtype=torch.bfloat16, device="cuda")
    graphs = {}
    for who, method in (("vLLM", own), ("gdn", ours)):
        number = iter(range(1 << 30))

        def call(method=method, number=number):
            metadata = steps[next(number) % calls]
            context = SimpleNamespace(attn_metadata={bench.layer.prefix: metadata}, no_compile_layers={})
            with override(context):
                method(bench.layer, *bench.projections, out)

        with torch.no_grad():
            graphs[who] = graph_of(call, calls)
    return medians(graphs, turns, calls)


def numbers(text):
    return [int(one) for one in text.split(",") if one]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="where figures go")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--heads", default="16/32,4/8", help="numbers of k heads and v heads of 128, with a slash")
    parser.add_argument("--batch", default="1,4,16,64")
    parser.add_argument("--tokens", default="1,2,4", help="1 for decoding, more for drafts")
    arguments = parser.parse_args()
    about = [datetime.date.today(), torch.cuda.get_device_name(), f"torch {torch.__version__}", f"triton {triton.__version__}", f"vLLM {peers.WHEELS['vllm'][0]}"]
    out = open(arguments.csv or os.devnull, "w", newline="", buffering=1)
    rows = csv.writer(out)
    rows.writerow(["# " + ", ".join(map(str, about))])
    rows.writerow(["heads", "state", "step", "tokens", "batch", "vLLM us", "with gdn us"])
    import vllm_rig as rigs

    with stand_ins.engine(peers.folder("vllm"), "vllm", rigs.REAL, rigs.given()):
        for text in arguments.heads.split(","):
            heads = (*map(int, text.split("/")), 128, 128)
            for dtype in (torch.float32, torch.bfloat16):
                for tokens in numbers(arguments.tokens):
                    for batch_size in numbers(arguments.batch):
                        figures = measure(rigs, heads, dtype, tokens, batch_size, arguments.turns)
                        theirs, ours = figures["vLLM"], figures["gdn"]
                        step = "decode" if tokens == 1 else "verify"
                        name = str(dtype).removeprefix("torch.")
                        print(f"{text} {name} {step} T={tokens} B={batch_size}: vLLM {theirs:.2f}, gdn {ours:.2f}, {theirs / ours:.2f} times", flush=True)
                        rows.writerow([text, name, step, tokens, batch_size, f"{theirs:.3f}", f"{ours:.3f}"])
                        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
