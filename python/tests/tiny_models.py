"""The sizes of the tiny models of transformers' that tests make: three layers of Gated DeltaNet, one of attention."""

from __future__ import annotations

from typing import Any

VOCABULARY = 97


def config(kind: str, heads: tuple[int, int, int, int], num_experts: int = 2) -> Any:
    """The configuration of a "Qwen3Next", a "Qwen3_5" or a "Qwen3_5Moe". A token goes to two of the experts: to all where there are two, so
    that a rounding is no other route."""
    import transformers

    num_k, num_v, dim_k, dim_v = heads
    how = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=num_k,
        linear_num_value_heads=num_v,
        linear_key_head_dim=dim_k,
        linear_value_head_dim=dim_v,
    )
    if kind != "Qwen3_5":
        how |= dict(num_experts=num_experts, num_experts_per_tok=2)
        how |= dict(moe_intermediate_size=32, shared_expert_intermediate_size=32)
    name = kind + ("Config" if kind == "Qwen3Next" else "TextConfig")
    return getattr(transformers, name)(**how)
