"""Makes the test data of the layer's core: what goes into it and comes out of it, as transformers' own layers do it.

Each case builds one Gated DeltaNet layer of transformers (random weights, random hidden states) and a cache, and calls the
layer's own `forward`: a prefill of 70 tokens, then 6 tokens one at a time, for some cases a prefill of 67 more. Each of
these steps becomes a file that `gdn forward` takes. Nothing of the core is worked out here:

  mixed_qkvz, mixed_ba   the outputs of the input projections; of Qwen3.5 cat(in_proj_qkv, in_proj_z) and
                         cat(in_proj_b, in_proj_a): contiguous packing
  conv_weight .. norm_weight   the layer's parameters
  conv_state, recurrent_state  what the cache held before the step; absent before the first one
  expected_out           the output of the layer's norm, which `out_proj` takes
  expected_conv_state, expected_recurrent_state   what the cache held after the step

The cache keeps one conv column more than the convolution reads: its first, the oldest, is dropped. It keeps the recurrent
state as [B, HV, DK, DV]: the last two dims are exchanged.

Run, in this folder, with Python 3.11:

    pip install -r requirements.txt
    python make_layer.py [FOLDER]        # writes into FOLDER, by default this one

The same machine writes the same bytes each time; another processor may round otherwise.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from make import BF16, F32, HEADS, PROJECTIONS, SEED, config_of, write
from transformers import DynamicCache, Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

HIDDEN = 96
PREFILL, DECODE, MORE = 70, 6, 67


class Case(NamedTuple):
    name: str
    packing: str
    heads: tuple[int, int, int, int]  # see HEADS
    dtype: torch.dtype
    batch: int = 1
    more: bool = False  # a second prefill, on the states of the first and of decode


CASES = [
    Case("qwen3-next", "interleaved", (2, 4, 128, 128), BF16),
    Case("qwen3.5", "contiguous", (1, 3, 128, 128), BF16),
    Case("r1-f32", "interleaved", (2, 2, 32, 32), F32, more=True),
    Case("r2-f32", "interleaved", (2, 4, 64, 48), F32),
    Case("r3-bf16", "interleaved", (1, 3, 64, 64), BF16),
    Case("batched-bf16", "interleaved", (2, 4, 32, 32), BF16, batch=2, more=True),
    Case("contiguous-r1-bf16", "contiguous", (3, 3, 16, 24), BF16, more=True),
    Case("contiguous-r2-f16", "contiguous", (2, 4, 32, 32), torch.float16),
    Case("contiguous-r3-f32", "contiguous", (1, 3, 32, 32), F32),
]


def like_trained(layer):
    """Weights with which every stage of the core matters: some heads forget within a token, some remember hundreds."""
    dt = torch.empty_like(layer.dt_bias).uniform_(-7, -2).exp()  # 0.001 to 0.14, as FLA's layer begins
    layer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
    layer.norm.weight.normal_(1, 0.1)
    layer.conv1d.weight.normal_(0, 0.5)
    for proj in ("in_proj_qkvz", "in_proj_ba", *PROJECTIONS):
        if hasattr(layer, proj):
            getattr(layer, proj).weight.normal_(0, 1.2 * HIDDEN**-0.5)


def states(cache):
    """The states that the cache holds, as the files have them."""
    conv, recurrent = cache.get_conv_state(0, state_idx=0), cache.get_recurrent_state(0, state_idx=0)
    if recurrent is None:
        return {}
    return {"conv_state": conv[..., 1:].clone(), "recurrent_state": recurrent.transpose(-1, -2).clone()}


def run(case):
    """The name of the layer's class, its model, its eps, and (suffix, tensors) of each step."""
    interleaved = case.packing == "interleaved"
    layer_cls, config_cls, model, projections = (
        (Qwen3NextGatedDeltaNet, Qwen3NextConfig, "Qwen3-Next", [["in_proj_qkvz"], ["in_proj_ba"]])
        if interleaved
        else (Qwen3_5GatedDeltaNet, Qwen3_5TextConfig, "Qwen3.5", [PROJECTIONS[:2], PROJECTIONS[2:]])
    )
    torch.manual_seed(SEED)
    config = config_of(
        config_cls, case.heads, hidden_size=HIDDEN, num_hidden_layers=1, layer_types=["linear_attention"]
    )
    layer = layer_cls(config, layer_idx=0)
    like_trained(layer)
    layer.to(case.dtype)
    weights = {
        "conv_weight": layer.conv1d.weight.squeeze(1),
        "A_log": layer.A_log,
        "dt_bias": layer.dt_bias,
        "norm_weight": layer.norm.weight,
    }

    seen = {}
    for name in (*projections[0], *projections[1], "norm"):
        getattr(layer, name).register_forward_hook(
            lambda _, __, out, name=name: seen.setdefault(name, []).append(out)
        )
    cache = DynamicCache(config=config)
    steps = [("", [PREFILL]), ("-decode", [1] * DECODE)] + [("-more", [MORE])] * case.more
    made = []
    for suffix, calls in steps:
        seen.clear()
        before = states(cache)
        for num_tokens in calls:
            layer(torch.randn(case.batch, num_tokens, HIDDEN).to(case.dtype), cache_params=cache)
        num_tokens = sum(calls)
        # [batch, tokens of the call, ...] of each call -> [batch * tokens, ...]
        rows = lambda outs, *shape: torch.cat(
            [out.reshape(case.batch, -1, *shape) for out in outs], 1
        ).flatten(0, 1)
        tensors = {
            name: torch.cat([rows(seen[proj], seen[proj][0].shape[-1]) for proj in projs], dim=-1)
            for name, projs in zip(("mixed_qkvz", "mixed_ba"), projections)
        }
        tensors |= weights | before
        if case.batch > 1:
            tensors["cu_seqlens"] = torch.arange(case.batch + 1, dtype=torch.int32) * num_tokens
        tensors["expected_out"] = rows(seen["norm"], layer.num_v_heads, layer.head_v_dim)
        tensors |= {f"expected_{name}": state for name, state in states(cache).items()}
        made.append((suffix, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}))
    return layer_cls.__name__, model, layer.norm.variance_epsilon, made


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for case in CASES:
        layer, model, norm_eps, made = run(case)
        metadata = {name: str(number) for name, number in zip(HEADS, case.heads)} | {"packing": case.packing}
        metadata |= {"norm_eps": str(norm_eps), "gate": "silu", "model": model}
        metadata["source"] = f"transformers {transformers.__version__} {layer}, seed {SEED}"
        for suffix, tensors in made:
            write(folder / f"{case.name}-layer{suffix}.safetensors", tensors, metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
