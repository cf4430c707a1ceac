"""Loads a file of a peer that has `fused_qkvzba_split_reshape_cat`: SGLang's, or the one of vllm-ascend that this library began with."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import triton
import triton.language as tl


class Nothing:
    """Stands in for what the file imports and its kernel does not use."""

    def __getattr__(self, _: str) -> Nothing:
        return self

    def __call__(self, *_: object, **__: object) -> Nothing:
        return self

    def __bool__(self) -> bool:
        return False


class StandIns:
    """Makes the missing imports of the file succeed."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name.split(".")[0] in self.packages:
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec: object) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = self.named
        return module

    @staticmethod
    def named(name: str) -> object:
        """What the stand-in has by a name. It has no file: who looks through all modules, as `inspect` does, passes it by."""
        if name.startswith("__"):
            raise AttributeError(name)
        return {"tl": tl, "triton": triton}.get(name) or Nothing()

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def load(path: str | Path) -> types.ModuleType:
    """The file at `path` as a module, whatever of torch and the engines is missing here.

    Raises:
        FileNotFoundError: there is no such file.
        AttributeError: it has no `fused_qkvzba_split_reshape_cat`.
    """
    packages = ("torch", "vllm", "vllm_ascend", "sglang")
    absent = {package for package in packages if importlib.util.find_spec(package) is None}
    finder = StandIns(absent)
    sys.meta_path.append(finder)
    try:
        spec = importlib.util.spec_from_file_location(f"peer_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in absent]:
            del sys.modules[name]
    if not hasattr(module, "fused_qkvzba_split_reshape_cat"):
        raise AttributeError(f"{path} has no fused_qkvzba_split_reshape_cat")
    return module
