"""A method with its split and concatenation replaced by one call.

Qwen3-Next's layer takes its projections apart in three statements, in transformers and in vLLM alike:

    query, key, value, z, b, a = self.<split>(<projections>)
    query, key, value = <each with its heads flattened>
    mixed_qkv = torch.cat((query, key, value), ...)

The copy that is made for `torch.cat` cannot be avoided from outside, so the method is compiled anew from its
own source, with these three statements replaced by `mixed_qkv, z, b, a = self.<fused>(<projections>)`. Every
other statement stays, on its own line of its own file, so tracebacks and debuggers show the engine's source.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from gdn.integrations.known import NOTHING_CHANGED, UnknownEngine

FUTURE = __future__.annotations.compiler_flag
TAKEN = ("query", "key", "value")
KEPT = ("z", "b", "a")


def fuse(method: Callable[..., Any], *, split: str, fused: str) -> Callable[..., Any]:
    """`method` compiled anew, with one call of `self.<fused>` for the three statements around `self.<split>`.

    Decorators are applied anew. Raises `UnknownEngine` where the statements are not those described above.
    """
    function, name = inspect.unwrap(method), method.__qualname__
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)

    found = [(block, i) for block in _blocks(tree) for i, one in enumerate(block) if _splits(one, split)]
    if len(found) != 1:
        raise UnknownEngine(f"{name} calls self.{split} {len(found)} times, not once. {NOTHING_CHANGED}")
    block, i = found[0]
    call, concatenation = block[i], block[i + 2] if i + 2 < len(block) else None
    if not (_names(call) == TAKEN + KEPT and _concatenates(concatenation) and _names(block[i + 1]) == TAKEN):
        raise UnknownEngine(
            f"{name} does not flatten and concatenate what self.{split} returns. {NOTHING_CHANGED}"
        )

    call.value.func.attr = fused
    call.targets = [
        ast.Tuple([ast.Name(name, ast.Store()) for name in (concatenation.targets[0].id, *KEPT)], ast.Store())
    ]
    block[i : i + 3] = [ast.fix_missing_locations(call)]

    made: dict[str, Any] = {}
    future = function.__code__.co_flags & FUTURE
    code = compile(tree, inspect.getsourcefile(function), "exec", flags=future, dont_inherit=True)
    exec(code, function.__globals__, made)  # the engine's own source, less two statements
    new = made[function.__name__]
    for one in (new, inspect.unwrap(new)):
        one.__qualname__, one.__module__ = function.__qualname__, function.__module__
    return new


def replace(
    layer: type,
    methods: tuple[str, ...],
    *,
    split: str,
    fused: str,
    by: Callable[..., Any],
    accepts: Callable[[type, dict[str, Any], dict[str, Any]], None] = lambda *made: None,
) -> Callable[[], None]:
    """Gives `layer` the method `fused`, which is `by`, and `methods` that call it. Returns what undoes it.

    `accepts(layer, before, after)` may raise, with the methods by name as they were and as they are to be;
    nothing is changed then.
    """
    before = {name: getattr(layer, name) for name in methods}
    after = {name: fuse(method, split=split, fused=fused) for name, method in before.items()}
    accepts(layer, before, after)
    for name, method in (after | {fused: by}).items():
        setattr(layer, name, method)

    def undo() -> None:
        for name, method in before.items():
            setattr(layer, name, method)
        delattr(layer, fused)

    return undo


def goes_to_gdn(packed: Any, num_k_heads: int, num_v_heads: int) -> bool:
    """Whether `packed` is split by gdn, or as before.

    As before are tensors that are neither on a CPU nor on a CUDA device; and on a CPU those with a single key
    head, or with as many value heads as key heads. There `z`, `b` and `a` were views with strides, and what
    PyTorch's CPU kernels do with them next (sigmoid, silu) rounds otherwise than with dense tensors.
    """
    device = packed.device.type
    return device == "cuda" or (device == "cpu" and num_k_heads not in (1, num_v_heads))


def as_before(layer: Any, split: str, mixed_qkvz: Any, mixed_ba: Any) -> tuple[Any, ...]:
    """What the three statements do."""
    import torch

    *taken, z, b, a = getattr(layer, split)(mixed_qkvz, mixed_ba)
    return torch.cat([one.flatten(-2) for one in taken], dim=-1), z, b, a


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield block


def _splits(one: ast.stmt, split: str) -> bool:
    """Whether `one` is `... = self.<split>(...)`."""
    call = one.value if isinstance(one, ast.Assign) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func) == f"self.{split}"


def _names(one: ast.stmt | None) -> tuple[str, ...] | None:
    """The names that an assignment gives to the parts of a tuple."""
    if isinstance(one, ast.Assign) and len(one.targets) == 1 and isinstance(one.targets[0], ast.Tuple):
        return tuple(getattr(part, "id", "") for part in one.targets[0].elts)
    return None


def _concatenates(one: ast.stmt | None) -> bool:
    """Whether `one` is `<name> = torch.cat((query, key, value), dim=-1)`."""
    if not (isinstance(one, ast.Assign) and len(one.targets) == 1 and isinstance(one.targets[0], ast.Name)):
        return False
    return ast.unparse(one.value) == f"torch.cat(({', '.join(TAKEN)}), dim=-1)"
