"""PyTorch's side of decode and prefill: shapes for tracing, and calls that have to go through an operator because PyTorch must see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _gdn
from ._torch import _check, _check_devices, has_tangent

__all__ = ["decode", "prefill", "refusal"]

Tensor = torch.Tensor

_PROJECTIONS = {
    "default": ("mixed_qkvz", "mixed_ba"),
    "unpacked": ("mixed_qkv", "z", "b", "a"),
}
_WEIGHTS = ("conv_weight", "conv_bias", "A_log", "dt_bias", "norm_weight")
_STATES = ("conv_state", "recurrent_state")
#: What the operators take after their weights and before the heads.
_OTHERS = {"decode": _STATES, "prefill": (*_STATES, "cu_seqlens")}
#: What they write to.
_WRITTEN = (
    *_STATES,
    "out",
    "intermediate_states",
    "intermediate_conv_windows",
    "state_checkpoints",
    "conv_checkpoints",
)
_OUT = {"default": "out", "unpacked": "unpacked_out"}


def _named(
    op: str, projections: Sequence[str], arguments: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a call by name."""
    names = (*projections, *_WEIGHTS, *_OTHERS[op])
    given = {**dict(zip(names, arguments)), **options}
    return {name: one for name, one in given.items() if isinstance(one, Tensor)}


def _fake(op: str, projections: Sequence[str], is_out: bool) -> Callable[..., Any]:
    def fake(*arguments: Any, **options: Any) -> Any:
        tensors = _named(op, projections, arguments, options)
        start = len(projections) + len(_WEIGHTS) + len(_OTHERS[op])
        heads, packing = arguments[start : start + 4], (*arguments[start + 4 :], "interleaved")[0]
        qkvz, ba, qkv, v = _gdn.features(heads, packing)
        _, num_v_heads, _, head_v_dim = heads
        features = {"mixed_qkvz": qkvz, "mixed_ba": ba, "mixed_qkv": qkv, "z": v, "b": num_v_heads}
        features["a"] = num_v_heads
        first = tensors[projections[0]]
        rows = first.shape[0]
        for name in projections:
            tensor = tensors[name]
            is_heads = name == "z" and tensor.dim() == 3
            _check(name, tensor.flatten(1) if is_heads else tensor, features[name], rows)
        _check_devices(**tensors)
        return None if is_out else first.new_empty((rows, num_v_heads, head_v_dim))

    return fake


def _no_gradient(op: str, name: str, what: str) -> str:
    return (
        f"gdn::{op} has no derivative, and {name} {what}: call it under torch.no_grad() or torch.inference_mode(). "
        "To train, take gdn.split, which has one, and the chunked delta rule of flash-linear-attention "
        "(fla.ops.gated_delta_rule) or of the model's own layer"
    )


def _refusal(op: str, tensors: Mapping[str, Any]) -> str | None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                return _no_gradient(op, name, "requires one")
    for name, tensor in tensors.items() if forward_ad._current_level >= 0 else ():
        if has_tangent((tensor,)):
            return _no_gradient(op, name, "has a tangent")
    return None


def _is_wanted(arguments: Iterable[Any]) -> bool:
    """Whether a derivative may be wanted of a call with these arguments."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in arguments)


def _autograd(op: str, projections: Sequence[str], operator: Any) -> Callable[..., Any]:
    """An operator's kernel for autograd: a refusal where somebody wants a derivative."""

    def kernel(keyset: Any, *arguments: Any, **options: Any) -> Any:
        # Where nobody wants one, nothing needs a name.
        if _is_wanted((*arguments, *options.values())):
            refused = _refusal(op, _named(op, projections, arguments, options))
            if refused is not None:
                raise RuntimeError(refused)
        with torch._C._AutoDispatchBelowAutograd():
            keys = keyset & torch._C._after_autograd_keyset
            return operator.redispatch(keys, *arguments, **options)

    return kernel


def _lazy(op: str, projections: Sequence[str], operator: Any) -> Callable[..., Any]:
    """Its kernel for views that are negated or conjugated when they are read."""

    def resolved(one: Any) -> Any:
        return one.resolve_neg().resolve_conj() if isinstance(one, Tensor) else one

    def kernel(*arguments: Any, **options: Any) -> Any:
        tensors = _named(op, projections, arguments, options)
        for name in _WRITTEN:
            if name in tensors and (tensors[name].is_neg() or tensors[name].is_conj()):
                lazy = "is a view that is negated or conjugated when it is read"
                raise ValueError(f"{name} {lazy}, it cannot be written to")
        return operator(*map(resolved, arguments), **{name: resolved(one) for name, one in options.items()})

    return kernel


def _batched(op: str) -> Callable[..., Any]:
    """Its kernel for `vmap`: states of samples lie in slots, and one call has them all."""

    def kernel(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError(
            f"gdn::{op} has no rule for vmap: a call takes a batch by itself, the rows of all samples one after the "
            "other, and a slot of the states for each"
        )

    return kernel


_library = torch.library.Library("gdn", "IMPL")


def _register() -> None:
    for op in _OTHERS:
        for overload, names in _PROJECTIONS.items():
            for is_out in (False, True):
                kind = _OUT[overload] if is_out else overload
                operator = getattr(getattr(torch.ops.gdn, op), kind)
                name = op if kind == "default" else f"{op}.{kind}"
                torch.library.register_fake(f"gdn::{name}", _fake(op, names, is_out))
                _library.impl(name, _autograd(op, names, operator), "Autograd", with_keyset=True)
                _library.impl(name, _batched(op), "FuncTorchBatched")
                for key in ("Negative", "Conjugate"):
                    _library.impl(name, _lazy(op, names, operator), key)


_register()


def _call(op: str, layer: Any, projections: Any, others: Sequence[Any], out: Any, options: Any) -> Any:
    if len(projections) == 2:
        fresh, given = op.default, op.out
    elif len(projections) == 4:
        fresh, given = op.unpacked, op.unpacked_out
    else:
        expected = "(mixed_qkvz, mixed_ba) or (mixed_qkv, z, b, a)"
        raise ValueError(f"projections has {len(projections)} tensors, expected {expected}")
    arguments = (
        *projections,
        layer.conv_weight,
        layer.conv_bias,
        layer.A_log,
        layer.dt_bias,
        layer.norm_weight,
        *others,
        *layer.heads,
        layer.packing,
    )
    options = dict(
        options,
        l2norm_eps=layer.l2norm_eps,
        norm_eps=layer.norm_eps,
        scale=layer.scale,
        beta_scale=layer.beta_scale,
        gate=layer.gate,
    )
    if out is None and torch.compiler.is_compiling() and not _mutates(others, options):
        # Inductor (seen in torch 2.11 to 2.15) fails on an operator that could mutate and is given nothing to.
        out = projections[0].new_empty((projections[0].shape[0], layer.heads[1], layer.heads[3]))
    if out is None:
        return fresh(*arguments, **options)
    given(*arguments, **options, out=out)
    return out


def _mutates(others: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether a call is given states to bring up to date, or to keep some in."""
    return any(one is not None for one in (*others[:2], *map(options.get, _WRITTEN)))


def decode(layer: Any, projections: Any, others: Sequence[Any], out: Any, **options: Any) -> Any:
    """``layer.decode`` through the operator."""
    return _call(torch.ops.gdn.decode, layer, projections, others, out, options)


def prefill(layer: Any, projections: Any, others: Sequence[Any], out: Any, **options: Any) -> Any:
    """``layer.prefill`` through the operator."""
    return _call(torch.ops.gdn.prefill, layer, projections, others, out, options)


def refusal(op: str, layer: Any, given: Mapping[str, Any]) -> str | None:
    """Why a call's tensors ask for more than the op gives."""

    def tensors() -> Iterator[tuple[str, Any]]:
        projections = given["projections"]
        yield from zip(_PROJECTIONS["default" if len(projections) == 2 else "unpacked"], projections)
        yield from ((name, getattr(layer, name)) for name in _WEIGHTS)
        yield from given.items()

    return _refusal(op, {name: one for name, one in tensors() if isinstance(one, Tensor)})
