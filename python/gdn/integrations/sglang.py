"""SGLang: `fused_qkvzba_split_reshape_cat` and `..._contiguous`, replaced through its HookRegistry.

As a plugin, in every process of the engine, by SGLang's own choice of plugins:

    SGLANG_PLUGINS=gdn sglang serve --model-path Qwen/Qwen3-Next-80B-A3B-Instruct

The name has to be there: where SGLANG_PLUGINS is not set SGLang loads every plugin, and this one stays off.
Other plugins that are to be loaded have to be named as well. In one process, before the engine starts,
`install()` does the same.
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


def _apply(any_release: bool, now: bool = True) -> Undo:
    """`now=False` leaves it to SGLang to apply the hooks, once all plugins have registered theirs."""
    known.check_release("sglang", RELEASES, any_release)
    registry = importlib.import_module(REGISTRY)
    module = importlib.import_module(MODULE)
    known.check_platform("sglang")
    hooks, targets = registry.HookRegistry, {name: f"{MODULE}.{name}" for name in BY}
    for name, target in targets.items():
        replaced = any(kind == registry.HookType.REPLACE for kind, *_ in hooks._hooks.get(target, ()))
        if replaced or target in hooks._patched or hasattr(getattr(module, name, None), "__wrapped__"):
            raise known.UnknownEngine(
                f"another plugin has hooks on {target} already. {known.NOTHING_CHANGED}"
            )
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


_switch = Switch(
    logging.getLogger(f"sglang.{__name__}"),  # below SGLang's own loggers
    f"gdn's own in place of {' and '.join(BY)} of {MODULE}",
    _apply,
)
install, uninstall = _switch.install, _switch.uninstall
is_installed, installed = _switch.is_installed, _switch.installed


def plugin() -> None:
    """The entry point in group `sglang.srt.plugins`. Does nothing unless SGLANG_PLUGINS names `gdn`.

    An SGLang that is not known is told so in its log and left as it is.
    """
    if PLUGIN in [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")]:
        _switch.install_if_known(now=False)
