#!/usr/bin/env python3
"""What transformers' models gain from `gdn.integrations.transformers`, whole forwards and `generate`, with and without in turns.

    pip install ./python torch transformers
    python benches/transformers_models.py --model FOLDER          # makes a model with random weights there, once
    python benches/transformers_models.py --model FOLDER --csv OUT.csv [--only "2048|decode"] [--device cuda]

On a GPU transformers' own layer is flash-linear-attention's where that is installed, and PyTorch's else: run both.

The model has three Gated DeltaNet layers (16/32 heads of 128) and one of attention, hidden 2048, as Qwen3-Next or Qwen3.5 (`--kind`),
in bf16. A figure is the median over the turns. When a model is made its logits with gdn are held to those without: the median token's error
against float32 may be larger by a tenth.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import platform
import re
import statistics
import time
from pathlib import Path

import records
import torch
import transformers

import gdn
import gdn.integrations.transformers as integration

VOCABULARY = 4096
PREFILLS, BATCHES = (512, 2048), (1, 8)
PROMPT, STEPS, GENERATED = 16, 12, 64
DEVICE = "cpu"
COLUMNS = (
    "model",
    "shape",
    "threads",
    "ms_without",
    "ms_with",
    "tokens_s_without",
    "tokens_s_with",
    "ratio",
    "samples",
)


def make(kind: str):
    """The model with random weights that spread gates and decays as trained ones do."""
    common = dict(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    if kind == "qwen3_next":
        experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=512)
        experts |= dict(shared_expert_intermediate_size=512, intermediate_size=2048)
        config = transformers.Qwen3NextConfig(**common, **experts)
        kind = transformers.Qwen3NextForCausalLM
    else:
        config = transformers.Qwen3_5TextConfig(**common, intermediate_size=6144)
        kind = transformers.Qwen3_5ForCausalLM
    with torch.device(DEVICE):
        model = kind(config)
    generator = torch.Generator(DEVICE).manual_seed(1)
    how = dict(generator=generator, device=DEVICE)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name.endswith("A_log"):
                one.copy_(
                    torch.empty(one.shape, device=DEVICE)
                    .uniform_(1, 16, generator=generator)
                    .log()
                )
            elif name.endswith("dt_bias"):
                one.copy_(
                    torch.empty(one.shape, device=DEVICE).uniform_(
                        -4, 0, generator=generator
                    )
                )
            elif one.dim() >= 2:
                scale = 0.3 if "conv1d" in name else 1.2 / one.shape[-1] ** 0.5
                one.copy_(torch.randn(one.shape, **how) * scale)
    return model.to(torch.bfloat16)


def tokens(batch: int, length: int):
    generator = torch.Generator().manual_seed(batch + length)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator).to(DEVICE)


def seconds_of(work) -> float:
    """The device's work included."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def on(is_on: bool):
    return integration.installed() if is_on else contextlib.nullcontext()


def prefill(model, length: int, turns: int):
    """Seconds of a forward, without and with."""
    ids, seconds = tokens(1, length), ([], [])
    for _ in range(turns):
        for is_on in (False, True):
            with on(is_on):
                forward = lambda: model(ids, use_cache=True, logits_to_keep=1)
                seconds[is_on].append(seconds_of(forward))
    return [one[1:] or one for one in seconds]


def decode(model, batch: int, turns: int):
    """Seconds of a step, without and with, each on a cache of its own.

    A mask is given, as `generate` does: without one cuDNN's attention is planned anew for each length of the cache (33 ms on an H100),
    by whoever comes there first.
    """
    ids, seconds, caches = tokens(batch, PROMPT + 1), ([], []), []
    for is_on in (False, True):
        with on(is_on):
            caches.append(model(ids[:, :PROMPT], use_cache=True).past_key_values)
    mask = torch.ones(batch, PROMPT + (turns + 1) * STEPS, dtype=torch.long)
    mask = mask.to(DEVICE)
    for turn in range(turns):
        for is_on in (False, True):
            with on(is_on):
                for step in range(STEPS):
                    last, cache = ids[:, PROMPT:], caches[is_on]
                    seen = mask[:, : cache.get_seq_length() + 1]
                    took = seconds_of(
                        lambda: model(
                            last,
                            attention_mask=seen,
                            past_key_values=cache,
                            use_cache=True,
                        )
                    )
                    if turn or step:
                        seconds[is_on].append(took)
    return seconds


def generate(model, batch: int, turns: int):
    """Seconds of GENERATED greedy tokens behind a short prompt, without and with."""
    ids, seconds = tokens(batch, PROMPT), ([], [])
    how = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    how |= dict(max_new_tokens=GENERATED, min_new_tokens=GENERATED)
    for _ in range(turns):
        for is_on in (False, True):
            with on(is_on):
                seconds[is_on].append(seconds_of(lambda: model.generate(ids, **how)))
    return [one[1:] or one for one in seconds]


def check(model):
    """Logits of a prefill and of steps after it, with gdn and without, against the same model in float32."""
    ids = tokens(2, 96)

    def logits(model):
        step = model(ids[:, :90], use_cache=True)
        out = [step.logits]
        for i in range(90, 96):
            step = model(
                ids[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True
            )
            out.append(step.logits)
        return torch.cat(out, 1).double()

    without = logits(model)
    with integration.installed():
        ours = logits(model)
    exact = logits(model.float())
    model.to(torch.bfloat16)
    # A token that a rounding sends to other experts is off by as much as all others together: so the median token's.
    errors = [
        ((one - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()
        for one in (without, ours)
    ]
    print(
        f"relative error of a token's logits against float32: {errors[0]:.2e} without, {errors[1]:.2e} with"
    )
    assert errors[1] < 1.1 * errors[0], (
        "gdn is further from float32 than transformers' own layer"
    )


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--kind", choices=["qwen3_next", "qwen3_5"], default="qwen3_next"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    DEVICE = arguments.device
    torch.set_num_threads(arguments.threads)
    if not arguments.model.exists():
        model = make(arguments.kind).to(DEVICE)
        with torch.inference_mode():
            check(model)
        model.save_pretrained(arguments.model)
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16
    )
    model = model.eval().to(DEVICE)
    kind = model.config.model_type
    shapes = {f"prefill {n}": (prefill, n, 1, n) for n in PREFILLS}
    shapes |= {f"decode, batch {n}": (decode, n, n, 1) for n in BATCHES}
    shapes |= {f"generate, batch {n}": (generate, n, n, GENERATED) for n in BATCHES}
    versions = f"gdn {gdn.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    where = f"{platform.machine()}, {gdn._gdn.isa()}"
    if DEVICE == "cuda":
        where = f"{torch.cuda.get_device_name()}, fla {importlib.util.find_spec('fla') is not None}"
    about, rows = f"{versions}, {where}, bf16, medians", []
    records.check(arguments.csv, about, COLUMNS)
    with torch.inference_mode():
        for name, (measure, size, batch, length) in shapes.items():
            if re.search(arguments.only, name):
                without, ours = measure(model, size, arguments.turns)
                before, after = statistics.median(without), statistics.median(ours)
                tokens_s = [f"{batch * length / one:.1f}" for one in (before, after)]
                rows.append(
                    [
                        kind,
                        name,
                        arguments.threads,
                        f"{before * 1e3:.3f}",
                        f"{after * 1e3:.3f}",
                    ]
                )
                rows[-1] += [*tokens_s, f"{before / after:.3f}", len(ours)]
                print(
                    f"{kind}, {name}: {before * 1e3:.2f} ms without, {after * 1e3:.2f} with: {before / after:.2f} times"
                )
    records.append(arguments.csv, about, COLUMNS, rows)


if __name__ == "__main__":
    main()
