"""vLLM: the split of Qwen3-Next's layer, `QwenGatedDeltaNetAttention`, on CUDA and on the CPU.

As a plugin, in every process of the engine, by vLLM's own choice of plugins:

    VLLM_PLUGINS=gdn vllm serve Qwen/Qwen3-Next-80B-A3B-Instruct

The name has to be there: where VLLM_PLUGINS is not set vLLM loads every plugin, and this one stays off. vLLM
counts VLLM_PLUGINS among what its caches of compiled graphs depend on, so graphs with gdn and without are
kept apart. In one process, before the model is made, `install()` does the same; its graphs are not kept
apart, so set VLLM_DISABLE_COMPILE_CACHE=1 with it.

Only the interleaved packing is touched. Qwen3.5's contiguous packing comes apart into views, and vLLM takes
those. What is left to the layer's own split of the interleaved packing: see
`gdn.integrations.rewrite.goes_to_gdn`.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

import gdn
from gdn.integrations import known, rewrite
from gdn.integrations.on_import import when_imported
from gdn.integrations.switch import Switch, Undo

PLUGIN = "gdn"  # the name of the entry point, in VLLM_PLUGINS
MODULE = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
LAYER = "QwenGatedDeltaNetAttention"
RELEASES = ("0.33",)
METHODS = ("forward_cuda", "forward_cpu")
SPLIT, FUSED = "fix_query_key_value_ordering", "split_with_gdn"
SOURCES = {
    SPLIT: ("624406f3056f447d",),
    "forward_cuda": ("f4e836d850fc6f9c",),
    "forward_cpu": ("dae4b5562b374c07",),
}


def _split_with_gdn(self: Any, mixed_qkvz: Any, mixed_ba: Any) -> tuple[Any, ...]:
    """`mixed_qkv` [N, 2*HK*DK + HV*DV], `z` [N, HV, DV], `b` and `a` [N, HV], of this rank's heads."""
    heads = (self.num_k_heads // self.tp_size, self.num_v_heads // self.tp_size)
    if not rewrite.goes_to_gdn(mixed_qkvz, *heads):
        return rewrite.as_before(self, SPLIT, mixed_qkvz, mixed_ba)
    return gdn.split(mixed_qkvz, mixed_ba, *heads, self.head_k_dim, self.head_v_dim)


def _apply(any_release: bool) -> Undo:
    known.check_release("vllm", RELEASES, any_release)
    layer = getattr(importlib.import_module(MODULE), LAYER)
    known.check_platform("vllm")
    known.check_sources("vllm", layer, SOURCES)
    return rewrite.replace(layer, METHODS, split=SPLIT, fused=FUSED, by=_split_with_gdn)


_switch = Switch(
    logging.getLogger(f"vllm.{__name__}"),  # below vLLM's own logger, whose handlers show it
    f"gdn.split in place of {SPLIT} and torch.cat in {MODULE}.{LAYER}, {' and '.join(METHODS)}",
    _apply,
)
install, uninstall = _switch.install, _switch.uninstall
is_installed, installed = _switch.is_installed, _switch.installed


def plugin() -> None:
    """The entry point in group `vllm.general_plugins`. Does nothing unless VLLM_PLUGINS names `gdn`.

    The layer's module is not imported for it: that would start CUDA in processes that must not. What has to
    be replaced is replaced when vLLM imports it. A vLLM that is not known is told so in its log and left as
    it is.
    """
    if PLUGIN in os.environ.get("VLLM_PLUGINS", "").split(","):
        when_imported(MODULE, _switch.install_if_known)
