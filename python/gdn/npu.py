"""The operators `gdn::split` and `gdn::merge` for tensors on `npu`, the device that torch_npu brings.

PyTorch keeps one place for a device from outside, PrivateUse1, and torch_npu is in it. Triton, with
triton-ascend behind it, is imported at the first call.
"""

from __future__ import annotations

from typing import Any

import torch


def _split(*arguments: Any) -> tuple[torch.Tensor, ...]:
    from gdn import triton_split

    return triton_split.split(*arguments)


def _merge(*arguments: Any) -> tuple[torch.Tensor, ...]:
    from gdn import triton_split

    return triton_split.merge(*arguments)


def _split_out(*arguments: Any, mixed_qkv: Any, z: Any, b: Any, a: Any, packing: str = "interleaved") -> None:
    tensors, heads = arguments[:2], arguments[2:6]
    _split(*tensors, *heads, *(arguments[6:] or (packing,)), (mixed_qkv, z, b, a))


def _merge_out(*arguments: Any, mixed_qkvz: Any, mixed_ba: Any, packing: str = "interleaved") -> None:
    tensors, heads = arguments[:4], arguments[4:8]
    _merge(*tensors, *heads, *(arguments[8:] or (packing,)), (mixed_qkvz, mixed_ba))


def register() -> torch.library.Library:
    """Gives the operators their kernels for `npu`; they last as long as what is returned."""
    library = torch.library.Library("gdn", "IMPL")
    for name, kernel in (
        ("split", _split),
        ("merge", _merge),
        ("split.out", _split_out),
        ("merge.out", _merge_out),
    ):
        library.impl(name, kernel, "PrivateUse1")
    return library
