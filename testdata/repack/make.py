"""Makes two small checkpoints, and what transformers' own layers project with them.

  qwen3-next  a randomly initialised `Qwen3NextForCausalLM`, saved by transformers in shards
  fp8         one Gated DeltaNet layer whose `in_proj_qkvz.weight` is fp8 with a scale for each 128x128 block

`NAME.expected.safetensors` holds, for each layer L, `L.hidden`, and `L.mixed_qkv`, `L.z`, `L.b`, `L.a` as the layer's
`forward` made them from it: with the interleaved weights, through its own `fix_query_key_value_ordering`.

Weights of the projections and hidden states are small whole numbers (scales: powers of two), so that each output is
exact in whatever order it is summed, and a test can ask for the same bits.

Run, in this folder, with the versions of ../requirements.txt:

    python make.py [FOLDER]        # writes into FOLDER, by default this one
"""

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from make import recording, write  # noqa: E402

TOKENS = 5


def whole_numbers(*shape):
    return torch.randint(-2, 3, shape).float()


def config(heads, **rest):
    hk, hv, dk, dv = heads
    return Qwen3NextConfig(
        linear_num_key_heads=hk, linear_num_value_heads=hv, linear_key_head_dim=dk, linear_value_head_dim=dv,
        vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=2, num_experts_per_tok=1, **rest,
    )  # fmt: skip


def project(layer, dtype):
    """Hidden states, and the four parts that the layer's forward makes of them."""
    hidden = whole_numbers(1, TOKENS, layer.hidden_size).to(dtype)
    split, conv = [], []
    layer.fix_query_key_value_ordering = recording(layer.fix_query_key_value_ordering, split)
    with mock.patch.object(
        modeling_qwen3_next, "causal_conv1d_fn", recording(modeling_qwen3_next.causal_conv1d_fn, conv)
    ):
        layer(hidden)
    [(_, (_, _, _, z, b, a))], [((mixed_qkv, *_), _)] = split, conv
    parts = {"hidden": hidden, "mixed_qkv": mixed_qkv.transpose(1, 2), "z": z, "b": b, "a": a}
    return {name: tensor[0].reshape(TOKENS, -1).contiguous() for name, tensor in parts.items()}


def qwen3_next(folder):
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(config((3, 6, 8, 16), num_hidden_layers=4)).to(torch.bfloat16)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, modeling_qwen3_next.Qwen3NextGatedDeltaNet):
            for projection in (module.in_proj_qkvz, module.in_proj_ba):
                projection.weight.copy_(whole_numbers(*projection.weight.shape))
    shutil.rmtree(folder / "qwen3-next", ignore_errors=True)
    model.save_pretrained(folder / "qwen3-next", max_shard_size="40KB")
    for name, module in model.named_modules():
        if isinstance(module, modeling_qwen3_next.Qwen3NextGatedDeltaNet):
            expected |= {f"{name}.{part}": tensor for part, tensor in project(module, torch.bfloat16).items()}
    write(folder / "qwen3-next.expected.safetensors", expected, {"tokens": str(TOKENS)})


def fp8(folder):
    torch.manual_seed(1)
    name = "model.layers.0.linear_attn"
    cfg = config((2, 2, 128, 128), num_hidden_layers=1)
    layer = modeling_qwen3_next.Qwen3NextGatedDeltaNet(cfg, layer_idx=0)
    out, hidden = layer.in_proj_qkvz.weight.shape
    weight = whole_numbers(out, hidden)
    scale = 2.0 ** torch.randint(-3, 4, (out // 128, -(-hidden // 128)))
    layer.in_proj_qkvz.weight.copy_(weight * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:out, :hidden])
    layer.in_proj_ba.weight.copy_(whole_numbers(*layer.in_proj_ba.weight.shape))
    target = folder / "fp8"
    target.mkdir(exist_ok=True)
    tensors = {
        f"{name}.in_proj_qkvz.weight": weight.to(torch.float8_e4m3fn),
        f"{name}.in_proj_qkvz.weight_scale_inv": scale,
        f"{name}.in_proj_ba.weight": layer.in_proj_ba.weight.detach().clone(),
        f"{name}.out_proj.weight": torch.randn(32, 256).to(torch.bfloat16),
    }
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    numbers = cfg.to_dict() | {
        "quantization_config": {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", f"{name}.in_proj_ba"],
        }
    }
    (target / "config.json").write_text(json.dumps(numbers, indent=2, default=str) + "\n")
    expected = {f"{name}.{part}": tensor for part, tensor in project(layer, torch.float32).items()}
    write(folder / "fp8.expected.safetensors", expected, {"tokens": str(TOKENS)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    target.mkdir(parents=True, exist_ok=True)
    qwen3_next(target)
    fp8(target)
