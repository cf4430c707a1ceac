"""PyTorch's side: what its operators ``gdn::split`` and ``gdn::merge`` do besides moving bytes.

Schemas and kernels for CPU and CUDA are registered from Rust. Here are shapes for tracing (fake and meta tensors), gradients, and the
calls that have to go through an operator because PyTorch must see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling as is_compiling

from . import _gdn, npu

__all__ = ["is_compiling", "is_plain_cpu", "merge", "moved", "out_features", "split"]

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


def _nothing(*_: Any, **__: Any) -> None:
    """What an out variant returns."""


def _keep_heads(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.heads = inputs[-5:]
    ctx.z_shape = inputs[1].shape


def _split_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.gdn.merge(*(grad.contiguous() for grad in grads), *ctx.heads), *[None] * 5)


def _merge_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    mixed_qkv, z, b, a = torch.ops.gdn.split(*(grad.contiguous() for grad in grads), *ctx.heads)
    return (mixed_qkv, z.view(ctx.z_shape), b, a, *[None] * 5)


torch.library.register_fake("gdn::split", _fake_split)
torch.library.register_fake("gdn::merge", _fake_merge)
torch.library.register_fake("gdn::split.out", _nothing)
torch.library.register_fake("gdn::merge.out", _nothing)
torch.library.register_autograd("gdn::split", _split_backward, setup_context=_keep_heads)
torch.library.register_autograd("gdn::merge", _merge_backward, setup_context=_keep_heads)
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
        return torch.ops.gdn.split.default(*arguments)
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
        return torch.ops.gdn.merge.default(*arguments)
    mixed_qkvz, mixed_ba = _outputs(out, arguments[:4], "(mixed_qkvz, mixed_ba)", 2)
    torch.ops.gdn.merge.out(*arguments, mixed_qkvz=mixed_qkvz, mixed_ba=mixed_ba)
    return mixed_qkvz, mixed_ba


def _outputs(out: Sequence[Tensor], inputs: Sequence[Any], expected: str, number: int) -> Sequence[Tensor]:
    if len(out) != number:
        raise ValueError(f"out is {len(out)} of them, expected the tensors {expected}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise ValueError("out cannot be given where an input requires grad: a written tensor has no gradient")
    return out


def is_plain_cpu(weight: Any) -> bool:
    """Whether Rust can have a weight's memory: anything but tensors of another device, of a subclass, or with gradients to keep."""
    if not isinstance(weight, Tensor):
        return True
    has_gradient = weight.requires_grad and torch.is_grad_enabled()
    is_plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.layout is torch.strided
    is_plain = is_plain and not weight.is_complex() and not weight.is_neg()
    return is_plain and weight.device.type == "cpu" and weight.is_contiguous() and not has_gradient


def out_features(weight: Tensor, dim: int) -> int:
    """The length of a weight's dim of outputs."""
    if dim not in (0, 1) or dim >= weight.dim():
        raise ValueError(f"dim is {dim}, it must be 0 or 1 and one of the weight's {weight.dim()}")
    return weight.shape[dim]


def moved(weight: Tensor, dim: int, moves: list[tuple[int, int]]) -> Tensor:
    """Parts ``(start, length)`` of a dim, one after the other."""
    return torch.cat([weight.narrow(dim, start, length) for start, length in moves], dim)
