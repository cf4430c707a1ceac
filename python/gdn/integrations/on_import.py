"""To act when a module is imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class OnImport(importlib.abc.MetaPathFinder):
    """Calls `then(module)` once, right after `name` has been imported. `cancel` before that undoes it."""

    def __init__(self, name: str, then: Callable[[ModuleType], Any]) -> None:
        self.name, self.then = name, then
        sys.meta_path.insert(0, self)

    def cancel(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        self.cancel()
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.then(module)

        spec.loader.exec_module = exec_module  # of this one loader, made for this one module
        return spec


def when_imported(name: str, then: Callable[[], Any]) -> None:
    """Calls `then` now where the module is there, or once it will be; asked again, still once."""
    if name in sys.modules:
        then()
    elif not any(isinstance(one, OnImport) and one.name == name for one in sys.meta_path):
        OnImport(name, lambda module: then())
