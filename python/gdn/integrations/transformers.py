"""Hugging Face transformers: the split of `Qwen3NextGatedDeltaNet`, in prefill, decoding and training.

    import gdn.integrations.transformers
    gdn.integrations.transformers.install()

The layer's `forward` is compiled anew, with one call of `gdn.split` where it took the projections apart and
put `mixed_qkv` together (`gdn.integrations.rewrite`). Install before a model is loaded with `device_map`:
accelerate keeps the `forward` that it finds.

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


def _split_with_gdn(self: Any, mixed_qkvz: Any, mixed_ba: Any) -> tuple[Any, ...]:
    """`mixed_qkv` [batch, seq, 2*HK*DK + HV*DV], `z` [batch, seq, HV, DV], `b` and `a` [batch, seq, HV]."""
    if not rewrite.goes_to_gdn(mixed_qkvz, self.num_k_heads, self.num_v_heads):
        return rewrite.as_before(self, SPLIT, mixed_qkvz, mixed_ba)
    heads = (self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim)
    parts = gdn.split(mixed_qkvz.flatten(0, 1), mixed_ba.flatten(0, 1), *heads)
    return tuple(part.unflatten(0, mixed_qkvz.shape[:2]) for part in parts)


def _apply(any_release: bool) -> Undo:
    known.check_release("transformers", RELEASES, any_release)
    layer = getattr(importlib.import_module(MODULE), LAYER)
    known.check_platform("transformers")
    known.check_sources("transformers", layer, SOURCES)
    return rewrite.replace(layer, ("forward",), split=SPLIT, fused=FUSED, by=_split_with_gdn)


_switch = Switch(
    logging.getLogger(__name__),
    f"gdn.split in place of {SPLIT} and torch.cat in {MODULE}.{LAYER}.forward",
    _apply,
)
install, uninstall = _switch.install, _switch.uninstall
is_installed, installed = _switch.is_installed, _switch.installed
