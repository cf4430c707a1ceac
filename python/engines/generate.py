"""Greedy generation by vLLM on a CPU, one model after another in this process.

    python generate.py RUNS.json OUT.json

RUNS.json is a list of runs: `model`, a folder; `prompts`, lists of token ids; `tokens`, how many to generate;
`rounds`, how often; `options` for `vllm.LLM`; `install`, whether `gdn.integrations.vllm.installed()` is
around it. OUT.json gets, for each run and prompt of the last round, the `tokens`, at each place the `logprobs`
of the five likeliest, and how many tokens of the prompt were `cached`; and whether gdn was on.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import gdn.integrations.vllm


def generate(run: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams, TokensPrompt

    began = time.perf_counter()
    options = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 16, "seed": 0} | run["options"]
    llm = LLM(model=run["model"], **options)
    loaded = time.perf_counter()
    sampling = SamplingParams(temperature=0, max_tokens=run["tokens"], ignore_eos=True, logprobs=5)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in run["prompts"]]
    for _ in range(run["rounds"]):
        answers = llm.generate(prompts, sampling, use_tqdm=False)
    print(
        f"{run['name']}: {loaded - began:.1f} s to load, {time.perf_counter() - loaded:.1f} s to generate",
        flush=True,
    )
    del llm
    gc.collect()
    return [
        {
            "tokens": list(answer.outputs[0].token_ids),
            "logprobs": [
                {token: one.logprob for token, one in place.items()} for place in answer.outputs[0].logprobs
            ],
            "cached": answer.num_cached_tokens,
        }
        for answer in answers
    ]


def main(runs: Path, out: Path) -> None:
    results = []
    for run in json.loads(runs.read_text()):
        with gdn.integrations.vllm.installed() if run["install"] else contextlib.nullcontext():
            results.append({"outputs": generate(run), "on": gdn.integrations.vllm.is_installed()})
    out.write_text(json.dumps(results))


if __name__ == "__main__":  # the engine spawns processes, which import this file
    main(*map(Path, sys.argv[1:]))
