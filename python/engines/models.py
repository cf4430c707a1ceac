"""Tiny checkpoints of Qwen3-Next and Qwen3.5 with random weights, as an engine reads them, 7 MB each.

    python models.py FOLDER

Two layers of Gated DeltaNet and one of attention; 4 key heads and 8 value heads of 64, which two ranks can
share. A_log and dt_bias are spread as in trained models, so that states are neither forgotten at once nor
kept for ever.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 512
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention"] * 2 + ["full_attention"],
    "vocab_size": VOCABULARY,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 4,  # all of them: which ones a token goes to is no matter of rounding
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "decoder_sparse_step": 1,
}
MODELS = ("qwen3-next", "qwen3.5")


def make(name: str, folder: Path, **sizes: int) -> None:
    """Writes the model `name` in bfloat16, and a tokenizer that calls token 7 "t7". `sizes` are others."""
    if name == "qwen3-next":
        config = transformers.Qwen3NextConfig(**SIZES | EXPERTS | sizes)
        model = transformers.Qwen3NextForCausalLM(config)
    else:
        model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SIZES | sizes))
    fill(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def fill(model: torch.nn.Module) -> None:
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):
                weight.copy_(torch.empty(weight.shape).uniform_(1, 16, generator=made).log())
            elif name.endswith("dt_bias"):
                weight.uniform_(-4, 0, generator=made)
            elif "norm" in name:
                weight.add_(torch.randn(weight.shape, generator=made) * 0.02)
            elif weight.dim() >= 2:
                scale = 0.3 if "conv1d" in name else 1.2 / weight.shape[-1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=made) * scale)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", eos_token="t1", pad_token="t2"
    )


if __name__ == "__main__":
    for name in MODELS:
        make(name, Path(sys.argv[1]) / name)
