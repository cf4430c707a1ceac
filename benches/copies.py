"""Copies of bytes on a GPU: what a kernel that moves as many is held against."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(src, dst, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst + at, tl.load(src + at, mask=at < n), mask=at < n)


def triton_copy(src: torch.Tensor, dst: torch.Tensor) -> None:
    s, d = src.view(torch.int32), dst.view(torch.int32)
    copy_kernel[(triton.cdiv(s.numel(), 1024),)](s, d, s.numel(), BLOCK=1024, num_warps=8)


def copy_in_pieces(src: torch.Tensor, dst: torch.Tensor, piece: int = 512 << 20) -> None:
    for at in range(0, src.numel(), piece):
        dst[at : at + piece].copy_(src[at : at + piece])
