"""vllm-ascend: `fused_qkvzba_split_reshape_cat`, which Qwen3-Next's layer calls on NPUs.

As a plugin, in every process of the engine, by vLLM's own choice of plugins:

    export VLLM_PLUGINS=ascend,ascend_kv_connector,ascend_model_loader,ascend_model
    VLLM_PLUGINS+=,ascend_service_profiling,gdn_ascend
    vllm serve Qwen/Qwen3-Next-80B-A3B-Instruct

The name has to be there: where VLLM_PLUGINS is not set vLLM loads every plugin, and this one stays off. Where
it is set it is the whole list, so vllm-ascend's own have to be named too. In one process, before the model is
made, `install()` does the same.

Tensors on `npu` go through the Triton kernel of `gdn.triton_split`, which was never run on an NPU here: check
it on yours first, with `python -m gdn.triton_check --time` (docs/ascend.md).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys

import gdn
from gdn.integrations import known
from gdn.integrations.on_import import when_imported
from gdn.integrations.switch import Switch, Undo

PLUGIN = "gdn_ascend"  # the name of the entry point, in VLLM_PLUGINS
MODULE = "vllm_ascend.ops.triton.fla.fused_qkvzba_split_reshape"
LAYER = "vllm_ascend.ops.gdn"  # has it by name
NAME = "fused_qkvzba_split_reshape_cat"
RELEASES = ("0.23",)
SOURCES = {NAME: ("6d9f8eff5c225c73",), f"{NAME}_kernel": ("5cf9706616051081",)}


def _put(by: object, instead_of: object) -> None:
    """Gives `by` every place that has `instead_of`."""
    for name in (MODULE, LAYER):
        module = sys.modules.get(name)
        if getattr(module, NAME, None) is instead_of:
            setattr(module, NAME, by)


def _apply(any_release: bool) -> Undo:
    known.check_release("vllm_ascend", RELEASES, any_release)
    module = importlib.import_module(MODULE)
    known.check_sources("vllm_ascend", module, SOURCES)
    original = getattr(module, NAME)
    _put(gdn.fused_qkvzba_split_reshape_cat, original)
    return lambda: _put(original, gdn.fused_qkvzba_split_reshape_cat)


_switch = Switch(
    logging.getLogger(f"vllm.{__name__}"),  # below vLLM's own logger, whose handlers show it
    f"gdn.{NAME} in place of {MODULE}.{NAME}",
    _apply,
)
install, uninstall = _switch.install, _switch.uninstall
is_installed, installed = _switch.is_installed, _switch.installed


def plugin() -> None:
    """The entry point in group `vllm.general_plugins`. Does nothing unless VLLM_PLUGINS names `gdn_ascend`.

    What has to be replaced is replaced when vllm-ascend imports it. A vllm-ascend that is not known is told
    so in its log and left as it is.
    """
    if PLUGIN in os.environ.get("VLLM_PLUGINS", "").split(","):
        when_imported(MODULE, _switch.install_if_known)
