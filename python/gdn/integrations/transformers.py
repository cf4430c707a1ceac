"""Hugging Face transformers: the layers of Qwen3-Next and Qwen3.5, all that is between their GEMMs.

    import gdn.integrations.transformers
    gdn.integrations.transformers.install()

In inference `forward` is a GEMM, `gdn.Layer`'s prefill or decode on the cache's own tensors, and a GEMM
(`gdn.integrations.transformers_layer`). In training it is the layer's own; Qwen3-Next's is compiled anew, with
one call of `gdn.split` where it took the projections apart and put `mixed_qkv` together
(`gdn.integrations.rewrite`). Install before a model is loaded with `device_map`: accelerate keeps the
`forward` that it finds.

What is left to the layer's own split: see `gdn.integrations.rewrite.goes_to_gdn`.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import gdn
from gdn.integrations import known, rewrite
from gdn.integrations.switch import Switch, Undo

MODULE = "transformers.models.qwen3_next.modeling_qwen3_next"
LAYER = "Qwen3NextGatedDeltaNet"
RELEASES = ("5.23",)
SPLIT, FUSED = "fix_query_key_value_ordering", "split_with_gdn"
SOURCES = {SPLIT: ("6527d2afe06683e8",), "forward": ("a5c1b27444531b31",)}

#: The layers whose projections are not packed.
UNPACKED = {
    "transformers.models.qwen3_5.modeling_qwen3_5": "Qwen3_5",
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe": "Qwen3_5Moe",
}
UNPACKED_SOURCES = {"forward": ("e9febb8c7d8be936",)}
#: What the layers call, which gdn does instead.
CALLED = {
    "apply_mask_to_padding_states": ("ac70fe1177ec07ff",),
    "l2norm": ("4b6bd3dc1d2fbcf3",),
    "causal_conv1d_fn": ("f932149bdf42900c",),
    "causal_conv1d_update": ("bac68342342b43d7",),
    "torch_chunk_gated_delta_rule": ("a1bbf783aa6563be",),
    "torch_recurrent_gated_delta_rule": ("4bd6ffbdddc0894f",),
}
NORM = {"forward": ("46c8356c01178b21",)}
CACHE_LAYER = {
    "lazy_initialization": ("1094e8fba34a99f1",),
    "update_conv_state": ("a3cb5a9b54326b1f",),
    "update_recurrent_state": ("1269b2100e6fbf2e",),
}


def _split_with_gdn(self: Any, mixed_qkvz: Any, mixed_ba: Any) -> tuple[Any, ...]:
    """`mixed_qkv` [batch, seq, 2*HK*DK + HV*DV], `z` [batch, seq, HV, DV], `b` and `a` [batch, seq, HV]."""
    if not rewrite.goes_to_gdn(mixed_qkvz, self.num_k_heads, self.num_v_heads):
        return rewrite.as_before(self, SPLIT, mixed_qkvz, mixed_ba)
    heads = (self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim)
    parts = gdn.split(mixed_qkvz.flatten(0, 1), mixed_ba.flatten(0, 1), *heads)
    return tuple(part.unflatten(0, mixed_qkvz.shape[:2]) for part in parts)


def _apply(any_release: bool) -> Undo:
    known.check_release("transformers", RELEASES, any_release)
    packed = importlib.import_module(MODULE)
    modules = [(packed, getattr(packed, LAYER), packed.Qwen3NextRMSNormGated)]
    for path, prefix in UNPACKED.items():
        module = importlib.import_module(path)
        names = (f"{prefix}GatedDeltaNet", f"{prefix}RMSNormGated")
        modules.append((module, *(getattr(module, name) for name in names)))
    cache_layer = importlib.import_module("transformers.cache_utils").LinearAttentionLayer
    known.check_platform("transformers")
    for module, layer, norm in modules:
        known.check_sources("transformers", layer, SOURCES if module is packed else UNPACKED_SOURCES)
        known.check_sources("transformers", module, CALLED)
        known.check_sources("transformers", norm, NORM)
    known.check_sources("transformers", cache_layer, CACHE_LAYER)
    from gdn.integrations.transformers_layer import in_inference

    undo_split = rewrite.replace(modules[0][1], ("forward",), split=SPLIT, fused=FUSED, by=_split_with_gdn)
    before = [(layer, layer.forward) for _, layer, _ in modules]
    for module, layer, norm in modules:
        layer.forward = in_inference(layer.forward, module, norm, cache_layer)

    def undo() -> None:
        for layer, forward in before:
            layer.forward = forward
        undo_split()

    return undo


_switch = Switch(
    logging.getLogger(__name__),
    "gdn.Layer between the GEMMs of Qwen3-Next's and Qwen3.5's layers in inference; gdn.split in place of "
    f"{SPLIT} and torch.cat in {MODULE}.{LAYER}.forward",
    _apply,
)
install, uninstall = _switch.install, _switch.uninstall
is_installed, installed = _switch.is_installed, _switch.installed
