"""To import some of an engine's own files, with stand-ins for all others.

The others need a GPU, or packages that are not there.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


class _StandIn(ModuleType):
    """A module in which every name is there: a mock, but for those given."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(
        self, folder: Path, package: str, real: Collection[str], given: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.folder, self.package, self.real, self.given = folder, package, real, given

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self.package and name not in self.given:
            return None
        if name in self.real:
            return importlib.machinery.PathFinder.find_spec(
                name, [str(self.folder.joinpath(*name.split(".")[:-1]))]
            )
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.given.get(module.__name__, {}))


def copied(folder: Path, real: Collection[str], to: Path) -> Path:
    """Copies the modules in `real` and the engine's metadata to the folder `to`, for a test that changes some."""
    for name in real:
        file = Path(*name.split("."))
        file = (
            file.with_suffix(".py") if (folder / file.with_suffix(".py")).is_file() else file / "__init__.py"
        )
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / file, to / file)
    metadata = f"{folder.name}.dist-info"
    shutil.copytree(folder / metadata, to / metadata)
    return to


@contextmanager
def engine(
    folder: Path, package: str, real: Collection[str], given: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[None]:
    """Inside, modules in `real` are imported from `folder`; every other module of `package` is a stand-in.

    `given` has what the stand-ins are to have, by module. It may name modules of other packages. `folder` is
    on `sys.path` inside, for the engine's metadata.
    """
    finder = _Finder(folder, package, real, given or {})
    before = {name for name in sys.modules if name.partition(".")[0] == package or name in finder.given}
    assert not before, f"{before} are imported already"
    sys.meta_path.insert(0, finder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(str(folder))
        for name in list(sys.modules):
            if name.partition(".")[0] == package or name in finder.given:
                del sys.modules[name]
