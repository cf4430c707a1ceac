"""SGLang, through its HookRegistry: `fused_qkvzba_split_reshape_cat` and `..._contiguous`, and the layers that call them.

The two functions are replaced by gdn's own. Around the `forward` of Qwen3-Next's and Qwen3.5's layers is a hook that gives everything between their
two GEMMs to gdn (`gdn.integrations.sglang_layer`), for the ops that `GDN_OPS` names (`gdn.integrations.ops`).

As a plugin, in every process of the engine, by SGLang's own choice of plugins:

    SGLANG_PLUGINS=gdn sglang serve --model-path Qwen/Qwen3-Next-80B-A3B-Instruct

The name has to be there: where SGLANG_PLUGINS is not set SGLang loads every plugin, and this one stays off.
Other plugins that are to be loaded have to be named as well. In one process `install()` does the same. It
does not reach the schedulers that SGLang spawns, as it warns.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import gdn
from gdn.integrations import known
from gdn.integrations.on_import import OnImport
from gdn.integrations.ops import chosen
from gdn.integrations.switch import Switch, Undo

PLUGIN = "gdn"  # the name of the entry point, in SGLANG_PLUGINS
MODULE = "sglang.kernels.ops.attention.triton_gdn_fused_proj"
REGISTRY = "sglang.srt.plugins.hook_registry"
RELEASES = ("0.5.23",)
BY = {
    "fused_qkvzba_split_reshape_cat": gdn.fused_qkvzba_split_reshape_cat,
    "fused_qkvzba_split_reshape_cat_contiguous": gdn.fused_qkvzba_split_reshape_cat_contiguous,
}
SOURCES = {
    "fused_qkvzba_split_reshape_cat": ("2a0c9ecd8a7ce198",),
    "fused_qkvzba_split_reshape_cat_kernel": ("5d3f99ac810a977b",),
    "fused_qkvzba_split_reshape_cat_contiguous": ("ffb71f6b2f5ff855",),
    "fused_qkvzba_split_reshape_cat_contiguous_kernel": ("65c28e1289f1391a",),
}

LAYERS = {
    ("sglang.srt.models.qwen3_next", "Qwen3GatedDeltaNet"): "interleaved",
    ("sglang.srt.models.qwen3_5", "Qwen3_5GatedDeltaNet"): "contiguous",
}
LAYER_SOURCES = {
    "Qwen3GatedDeltaNet": {
        "forward": ("e84fb2ad8083c19e",),
        "_forward_input_proj": ("ad9d6fc10de8d20d",),
    },
    "Qwen3_5GatedDeltaNet": {
        "forward": ("176f57dafb57243d",),
        "_forward_input_proj": ("f652a1eae8d1dd4a",),
    },
}
_logger = logging.getLogger(f"sglang.{__name__}")  # below SGLang's own loggers


def _apply(any_release: bool, now: bool = True) -> Undo:
    """`now=False` leaves it to SGLang to apply the split's hooks, once all plugins have registered theirs."""
    ops = chosen()
    known.check_release("sglang", RELEASES, any_release)
    registry = importlib.import_module(REGISTRY)
    undoes: list[Undo] = []

    def undo() -> None:
        for one in reversed(undoes):
            one()

    try:
        if "split" in ops:
            undoes.append(_put_split(registry, now))
        known.check_platform("sglang")
        if set(ops) != {"split"}:
            for (module, layer), packing in LAYERS.items():
                undoes.append(_when_there(registry, module, layer, packing, ops))
    except BaseException:
        undo()
        raise
    return undo


def _check_free(registry: Any, target: str, function: Any) -> None:
    """Refuses where somebody else has replaced or wrapped the target, or is to."""
    hooks = registry.HookRegistry
    replaced = any(kind == registry.HookType.REPLACE for kind, *_ in hooks._hooks.get(target, ()))
    if replaced or target in hooks._patched or hasattr(function, "__wrapped__"):
        raise known.UnknownEngine(f"another plugin has hooks on {target} already. {known.NOTHING_CHANGED}")


def _put_split(registry: Any, now: bool) -> Undo:
    module = importlib.import_module(MODULE)
    known.check_platform("sglang")
    hooks, targets = registry.HookRegistry, {name: f"{MODULE}.{name}" for name in BY}
    for name, target in targets.items():
        _check_free(registry, target, getattr(module, name, None))
    known.check_sources("sglang", module, SOURCES)

    originals = {name: getattr(module, name) for name in BY}
    undo = _undoing(hooks, module, originals, targets)
    for name, target in targets.items():
        hooks.register(target, BY[name], registry.HookType.REPLACE)
    if not now:
        return undo
    hooks.apply_hooks()
    if any(getattr(module, name) is original for name, original in originals.items()):
        undo()  # the registry only logs why
        raise known.UnknownEngine(f"SGLang's HookRegistry took no hooks on {MODULE}. {known.NOTHING_CHANGED}")
    return undo


def _when_there(registry: Any, module: str, layer: str, packing: str, ops: tuple[str, ...]) -> Undo:
    """Puts the layer's hook now, or when SGLang imports its module: not in processes that run no model."""
    if module in sys.modules:
        return _put_layer(registry, sys.modules[module], layer, packing, ops)
    undoes: list[Undo] = []

    def then(imported: ModuleType) -> None:
        try:
            undoes.append(_put_layer(registry, imported, layer, packing, ops))
        except known.UnknownEngine as refused:
            _logger.warning("gdn leaves %s to SGLang: %s", layer, refused)

    waiting = OnImport(module, then)
    undoes.append(waiting.cancel)

    def undo() -> None:
        for one in reversed(undoes):
            one()

    return undo


def _put_layer(registry: Any, module: ModuleType, layer: str, packing: str, ops: tuple[str, ...]) -> Undo:
    cls, hooks = getattr(module, layer), registry.HookRegistry
    target = f"{module.__name__}.{layer}.forward"
    if hooks._hooks.get(target):
        raise known.UnknownEngine(f"another plugin has hooks on {target} already. {known.NOTHING_CHANGED}")
    known.check_sources("sglang", cls, LAYER_SOURCES[layer])
    original = cls.forward
    hook = importlib.import_module("gdn.integrations.sglang_layer").around(packing, ops, _logger)
    hooks.register(target, hook, registry.HookType.AROUND)
    try:
        # Not `apply_hooks`, which may be at work on another's hook, and have imported the module for it.
        hooks._apply_target(target, hooks._hooks[target])
    except BaseException:
        del hooks._hooks[target]
        raise
    hooks._patched.add(target)

    def undo() -> None:
        others = [one for one in hooks._hooks.pop(target, ()) if one[1] is not hook]
        hooks._patched.discard(target)
        cls.forward = original
        if others:
            hooks._hooks[target] = others
            hooks.apply_hooks()

    return undo


def _undoing(
    hooks: Any, module: ModuleType, originals: dict[str, Callable[..., Any]], targets: dict[str, str]
) -> Undo:
    """The registry has no way back: its entries are taken out, and each name gets back what it had.

    Hooks that others have on the same targets are applied anew.
    """

    def undo() -> None:
        anew = False
        for name, original in originals.items():
            target = targets[name]
            others = [one for one in hooks._hooks.pop(target, ()) if one[1] is not BY[name]]
            if others:
                hooks._hooks[target] = others
            if target in hooks._patched:
                hooks._patched.remove(target)
                _rebind(getattr(module, name), original)
                anew = anew or bool(others)
        if anew:
            hooks.apply_hooks()

    return undo


def _rebind(old: Any, new: Any) -> None:
    """Gives every name of every module that is bound to `old` to `new`: `from ... import` made them."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()) if isinstance(module, ModuleType) else ():
            if value is old:
                setattr(module, name, new)


def _told() -> str:
    ops = chosen()
    told = [f"gdn's own in place of {' and '.join(BY)} of {MODULE}"] if "split" in ops else []
    if rest := [one for one in ops if one != "split"]:
        layers = " and ".join(layer for _, layer in LAYERS)
        told.append(f"gdn.Layer between the GEMMs of {layers} for {', '.join(rest)}")
    return "; ".join(told) or "nothing, since GDN_OPS is empty"


def _caution() -> str | None:
    if _is_named():
        return None
    return (
        "gdn.integrations.sglang.install() reaches this process alone, not the schedulers that SGLang spawns, which run "
        "the model. SGLANG_PLUGINS=gdn reaches all of them"
    )


def _is_named() -> bool:
    return PLUGIN in [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")]


_switch = Switch(_logger, _told, _apply, _caution)
install, uninstall = _switch.install, _switch.uninstall
is_installed, installed = _switch.is_installed, _switch.installed


def plugin() -> None:
    """The entry point in group `sglang.srt.plugins`. Does nothing unless SGLANG_PLUGINS names `gdn`.

    An SGLang that is not known is told so in its log and left as it is.
    """
    if _is_named():
        _switch.install_if_known(now=False)
