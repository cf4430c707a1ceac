"""Two versions of a method, run on one tiny layer and compared: what they hand on must be the same.

The layer is a stand-in with a few attributes and the engine's own methods. The projections before it are
given, and what comes after (the engine's custom operators, the norm, the output projection) only records what
it gets. So a method may be tried when its module has just been imported: without a model, a GPU or the
engine's configuration.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Handed = list[tuple[str, tuple[Any, ...]]]


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """New tensors are on the CPU and float32: engines set other defaults while they load a model."""
    import torch

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)


def difference(
    before: Callable[..., Any], after: Callable[..., Any], layer: type, tiny: Mapping[str, Any], ops: str
) -> str | None:
    """How what `before` and `after` hand on differs, as the end of a sentence; None where it does not.

    `layer` is the class that has the methods. `tiny` has the attributes of the layer and its `projections`,
    functions of no arguments by the names of the modules that make them; `of_norm` has what its norm has. `ops` is the namespace of the
    engine's operators in `torch.ops`.
    """
    handed = []
    for which, method in (("the engine's own", before), ("gdn's", after)):
        try:
            handed.append(_run(method, layer, tiny, ops))
        except Exception as error:  # whatever a release that nobody here has seen may do
            return f"{which} ended with {type(error).__name__}: {error}"
    ours, theirs = handed[1], handed[0]
    if [name for name, _ in theirs] != [name for name, _ in ours]:
        return f"gdn's calls {[name for name, _ in ours]}, the engine's own {[name for name, _ in theirs]}"
    if not theirs:
        return "the engine's own hands nothing on"
    for (name, given), (_, got) in zip(theirs, ours, strict=True):
        if len(given) != len(got) or not all(map(_same, given, got)):
            return f"{name} gets something else from gdn's than from the engine's own"
    return None


def _run(method: Callable[..., Any], layer: type, tiny: Mapping[str, Any], ops: str) -> Handed:
    """What `method` hands on, in order: the names of those who got it, and copies of what they got."""
    import torch

    handed: Handed = []

    def recording(name: str, result: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            handed.append(
                (name, tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in given))
            )
            return result(*args)

        return record

    attributes = {name: value for name, value in tiny.items() if name not in ("projections", "of_norm")}
    for name, made in tiny["projections"].items():
        attributes[name] = lambda hidden, made=made: (made(), None)
    attributes["norm"] = recording("norm", lambda x, z: x)
    vars(attributes["norm"]).update(tiny.get("of_norm", {}))
    attributes["out_proj"] = recording("out_proj", lambda x: (x, None))
    operators = _Recorded(lambda name: recording(name, lambda *args: None))
    function = inspect.unwrap(method)
    seen = types.FunctionType(
        function.__code__,
        {**function.__globals__, "torch": _Torch(torch, ops, operators)},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    (rows,) = {made().shape[0] for made in tiny["projections"].values()}
    seen(Tiny(layer, **attributes), torch.zeros(rows, 1, dtype=torch.bfloat16))
    return handed


def _same(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


class Tiny:
    """Has the attributes given, and else the methods of `layer`."""

    def __init__(self, layer: type, **attributes: Any) -> None:
        vars(self).update(attributes, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        found = inspect.getattr_static(vars(self)["_layer"], name, None)
        if isinstance(found, staticmethod):
            return found.__func__
        if not inspect.isfunction(found):
            raise AttributeError(f"the tiny layer of the trial has no {name}")
        return types.MethodType(found, self)


class _Recorded:
    """A namespace in which every name is there, as `made` makes it."""

    def __init__(self, made: Callable[[str], Any]) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        return self._made(name)


class _Torch:
    """PyTorch's module with other `torch.ops.<ops>`, and no memory that is not zeroed: it is compared."""

    def __init__(self, torch: Any, ops: str, operators: _Recorded) -> None:
        others = torch.ops
        self._torch, self.empty, self.empty_like = torch, torch.zeros, torch.zeros_like
        self.ops = _Recorded(lambda name: operators if name == ops else getattr(others, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)
