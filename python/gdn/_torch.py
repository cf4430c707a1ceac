"""PyTorch's side: what its operators ``gdn::split`` and ``gdn::merge`` do besides moving bytes.

Schemas and kernels for CPU and CUDA are registered from Rust. Here are shapes for tracing (fake and meta tensors), gradients, and the
calls that have to go through an operator because PyTorch must see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling as is_compiling

from . import _gdn, npu

__all__ = [
    "check_backend",
    "check_memory",
    "check_weight",
    "has_tangent",
    "is_compiling",
    "is_plain_cpu",
    "merge",
    "moved",
    "split",
]

_gdn.register(torch)

Tensor = torch.Tensor


def _check(name: str, tensor: Tensor, features: int, rows: Any) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name} has {tensor.dim()} dims, expected 2")
    if tensor.shape[1] != features:
        raise ValueError(f"{name} has {tensor.shape[1]} features, expected {features}")
    torch._check(tensor.shape[0] == rows, lambda: f"{name} has {tensor.shape[0]} rows, expected {rows}")


def _check_devices(**tensors: Tensor) -> None:
    first, *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first[1].device:
            raise ValueError(f"{name} is on {tensor.device}, {first[0]} is on {first[1].device}")


def _fake_split(
    mixed_qkvz: Tensor,
    mixed_ba: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str = "interleaved",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkvz, ba, qkv, _ = _gdn.features((num_k_heads, num_v_heads, head_k_dim, head_v_dim), packing)
    rows = mixed_qkvz.shape[0]
    _check("mixed_qkvz", mixed_qkvz, qkvz, rows)
    _check("mixed_ba", mixed_ba, ba, rows)
    _check_devices(mixed_qkvz=mixed_qkvz, mixed_ba=mixed_ba)
    return (
        mixed_qkvz.new_empty((rows, qkv)),
        mixed_qkvz.new_empty((rows, num_v_heads, head_v_dim)),
        mixed_ba.new_empty((rows, num_v_heads)),
        mixed_ba.new_empty((rows, num_v_heads)),
    )


def _fake_merge(
    mixed_qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str = "interleaved",
) -> tuple[Tensor, Tensor]:
    qkvz, ba, qkv, v = _gdn.features((num_k_heads, num_v_heads, head_k_dim, head_v_dim), packing)
    rows = mixed_qkv.shape[0]
    _check("mixed_qkv", mixed_qkv, qkv, rows)
    if z.dim() == 3 and tuple(z.shape[1:]) != (num_v_heads, head_v_dim):
        raise ValueError(f"z has shape {tuple(z.shape)}, expected [N, {num_v_heads}, {head_v_dim}]")
    _check("z", z.flatten(1) if z.dim() == 3 else z, v, rows)
    _check("b", b, num_v_heads, rows)
    _check("a", a, num_v_heads, rows)
    _check_devices(mixed_qkv=mixed_qkv, z=z, b=b, a=a)
    return mixed_qkv.new_empty((rows, qkvz)), b.new_empty((rows, ba))


def _fake_out(*inputs: Any, **outputs: Tensor) -> None:
    """Nothing, which is what an out variant returns. Its outputs are where its inputs are."""
    read = _NAMES["merge" if len(outputs) == 2 else "split"]
    _check_devices(**dict(zip(read, inputs)), **outputs)


#: What the operators read.
_NAMES = {"split": ("mixed_qkvz", "mixed_ba"), "merge": ("mixed_qkv", "z", "b", "a")}


# ---- derivatives. The ops move elements, so they are linear: a tangent moves like its tensor, and a gradient moves back.


class _Split(torch.autograd.Function):
    """``gdn::split`` of tensors with gradients or tangents."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.gdn.split.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.heads = inputs[2:]
        ctx.save_for_forward(*inputs[:2])
        ctx.set_materialize_grads(True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (*_merge(*(grad.contiguous() for grad in grads), *ctx.heads), *[None] * 5)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        qkvz, ba = tangents[:2]
        parts = _split(*_tangents((qkvz, ba), ctx.saved_tensors), *ctx.heads)
        return tuple(
            part if moved is not None else None
            for part, moved in zip(parts, (qkvz, qkvz, ba, ba), strict=True)
        )


class _Merge(torch.autograd.Function):
    """``gdn::merge`` of such tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.gdn.merge.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.heads, ctx.z_shape = inputs[4:], inputs[1].shape
        ctx.save_for_forward(*inputs[:4])
        ctx.set_materialize_grads(True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        mixed_qkv, z, b, a = _split(*(grad.contiguous() for grad in grads), *ctx.heads)
        return (mixed_qkv, z.view(ctx.z_shape), b, a, *[None] * 5)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        packed = _merge(*_tangents(tangents[:4], ctx.saved_tensors), *ctx.heads)
        pairs = (tangents[:2], tangents[2:4])
        return tuple(
            one if any(part is not None for part in pair) else None
            for one, pair in zip(packed, pairs, strict=True)
        )


def _split(*arguments: Any) -> Any:
    """The operator; for transforms of torch.func the function, as they do not see what an operator does for autograd."""
    return (_Split.apply if _is_transformed() else torch.ops.gdn.split.default)(*arguments)


def _merge(*arguments: Any) -> Any:
    return (_Merge.apply if _is_transformed() else torch.ops.gdn.merge.default)(*arguments)


def _is_transformed() -> bool:
    return not is_compiling() and torch._C._are_functorch_transforms_active()


def _tangents(tangents: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that there are, as the op takes them; zeros for the others."""
    return [
        torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        if tangent is None
        else tangent.contiguous()
        for tangent, tensor in zip(tangents, tensors, strict=True)
    ]


def _autograd(name: str, function: Any) -> Any:
    """An operator's kernel for autograd."""
    operator, read = getattr(torch.ops.gdn, name).default, len(_NAMES[name])

    def kernel(keyset: Any, *arguments: Any) -> Any:
        has_gradient = torch._C.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        is_dual = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
        if has_gradient or (is_dual and has_tangent(arguments[:read])):
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    f"functorch transforms do not see into gdn::{name}, call gdn.{name} instead"
                )
            # The dispatcher leaves out what is the default.
            packing = () if len(arguments) == read + 5 else ("interleaved",)
            return function.apply(*arguments, *packing)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return kernel


def _autograd_out(name: str) -> Any:
    """An out variant's kernel for autograd: what is written to has no derivative, and nobody is to miss it."""
    operator, read = getattr(torch.ops.gdn, name).out, len(_NAMES[name])

    def kernel(keyset: Any, *arguments: Any, **outputs: Tensor) -> None:
        _check_written(arguments[:read], tuple(outputs.values()))
        with torch._C._AutoDispatchBelowAutograd():
            operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **outputs)

    return kernel


def _lazy_out(name: str) -> Any:
    """An out variant's kernel for views that are negated or conjugated when they are read. (PyTorch's own cannot write to such outputs.)"""
    operator = getattr(torch.ops.gdn, name).out

    def kernel(*arguments: Any, **outputs: Tensor) -> None:
        for argument, tensor in outputs.items():
            if tensor.is_neg() or tensor.is_conj():
                lazy = "is a view that is negated or conjugated when it is read"
                raise ValueError(f"{argument} {lazy}, it cannot be written to")
        operator(
            *(one.resolve_neg().resolve_conj() if isinstance(one, Tensor) else one for one in arguments),
            **outputs,
        )

    return kernel


# ---- vmap: rows of all samples, one after the other


def _rows(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """A tensor whose samples lie along `dim`, or that is the same in all, as rows."""
    tensor = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1).contiguous()


def _vmap(name: str) -> Any:
    """How an operator goes about samples."""
    operator, names, read = getattr(torch.ops.gdn, name), _NAMES[name], len(_NAMES[name])

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        batch = info.batch_size
        for argument, tensor, dim in zip(names, arguments, in_dims):
            dims = tensor.dim() - (dim is not None)
            if dims != 2 and not (argument == "z" and dims == 3):
                raise ValueError(f"{argument} has {dims} dims, expected 2")
        rows = [_rows(one, dim, batch) for one, dim in zip(arguments[:read], in_dims)]
        results = operator(*rows, *arguments[read:])
        return tuple(one.unflatten(0, (batch, -1)) for one in results), (0,) * len(results)

    return rule


torch.library.register_fake("gdn::split", _fake_split)
torch.library.register_fake("gdn::merge", _fake_merge)
torch.library.register_fake("gdn::split.out", _fake_out)
torch.library.register_fake("gdn::merge.out", _fake_out)
_library = torch.library.Library("gdn", "IMPL")
for _name, _function in (("split", _Split), ("merge", _Merge)):
    _library.impl(_name, _autograd(_name, _function), "Autograd", with_keyset=True)
    _library.impl(f"{_name}.out", _autograd_out(_name), "Autograd", with_keyset=True)
    for _key in ("Negative", "Conjugate"):
        _library.impl(f"{_name}.out", _lazy_out(_name), _key)
    torch.library.register_vmap(f"gdn::{_name}", _vmap(_name))
_npu = npu.register()


def split(
    mixed_qkvz: Tensor,
    mixed_ba: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``gdn.split`` through the operator."""
    arguments = (mixed_qkvz, mixed_ba, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing)
    if out is None:
        return _split(*arguments)
    mixed_qkv, z, b, a = _outputs(out, arguments[:2], "(mixed_qkv, z, b, a)", 4)
    torch.ops.gdn.split.out(*arguments, mixed_qkv=mixed_qkv, z=z, b=b, a=a)
    return mixed_qkv, z, b, a


def merge(
    mixed_qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """``gdn.merge`` through the operator."""
    arguments = (mixed_qkv, z, b, a, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing)
    if out is None:
        return _merge(*arguments)
    mixed_qkvz, mixed_ba = _outputs(out, arguments[:4], "(mixed_qkvz, mixed_ba)", 2)
    torch.ops.gdn.merge.out(*arguments, mixed_qkvz=mixed_qkvz, mixed_ba=mixed_ba)
    return mixed_qkvz, mixed_ba


def _outputs(out: Sequence[Tensor], inputs: Sequence[Any], expected: str, number: int) -> Sequence[Tensor]:
    if len(out) != number:
        raise ValueError(f"out has {len(out)} tensors, expected {number}: {expected}")
    _check_written(inputs, out)
    return out


def _check_written(inputs: Sequence[Any], out: Sequence[Tensor]) -> None:
    """Raises where somebody would miss the derivative of what is written to."""
    # What is no tensor the operator refuses by name.
    inputs, out = ([one for one in some if isinstance(one, Tensor)] for some in (inputs, out))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise ValueError("out cannot be given where an input requires grad: a written tensor has no gradient")
    if has_tangent((*inputs, *out)):
        raise ValueError("out cannot be given where a tensor has a tangent: a written tensor has none")


def check_backend(name: str, tensors: Sequence[Any]) -> None:
    """Raises where somebody would miss the derivative of what a backend makes, which autograd does not see."""
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if wants_gradient or has_tangent(tensors):
        raise ValueError(f"backend is {name!r}, which has no derivative: leave it out where one is wanted")


def has_tangent(tensors: Sequence[Any]) -> bool:
    """Whether a dual level of forward-mode AD is open, and one of the tensors has a tangent there."""
    is_open = forward_ad._current_level >= 0
    return is_open and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_plain_cpu(weight: Any) -> bool:
    """Whether Rust can have a weight's memory: anything but tensors of another device, of a subclass, or with gradients to keep."""
    if not isinstance(weight, Tensor):
        return True
    has_gradient = weight.requires_grad and torch.is_grad_enabled()
    is_plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.layout is torch.strided
    is_plain = is_plain and not weight.is_complex() and not weight.is_neg()
    return is_plain and weight.device.type == "cpu" and weight.is_contiguous() and not has_gradient


def check_weight(weight: Tensor) -> None:
    """Raises where PyTorch cannot take a weight apart."""
    if weight.layout is not torch.strided:
        raise TypeError(f"weight has layout {weight.layout}, expected torch.strided")
    check_memory(weight=weight)


def check_memory(**tensors: Tensor) -> None:
    """Raises where a tensor's storage was freed."""
    for name, tensor in tensors.items():
        # Others have no memory of the process, or not as PyTorch counts it.
        is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type in ("cpu", "cuda")
        if is_plain and tensor.layout is torch.strided and tensor.numel():
            try:
                is_freed = not tensor.untyped_storage().nbytes()
            except (RuntimeError, NotImplementedError):  # a transform's wrapper has none
                continue
            if is_freed:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)} and no memory: was its storage freed?"
                )


def moved(weight: Tensor, dim: int, moves: list[tuple[int, int]]) -> Tensor:
    """Parts ``(start, length)`` of a dim, one after the other."""
    if not moves:
        return weight.clone()
    return torch.cat([weight.narrow(dim, start, length) for start, length in moves], dim)
