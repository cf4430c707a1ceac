"""The split and its inverse as one Triton kernel, for Ascend NPUs and, explicitly, for CUDA tensors.

`gdn.split` and `gdn.merge` come here for tensors on `npu`, or with `backend="triton"`. What the op does is in docs/layouts.md, how
this kernel is built and checked in docs/ascend.md.

The grid is persistent: a program for each vector core, with a contiguous chunk of rows. A program moves a block at a time: some
rows, all key heads of them where they fit the on-chip buffer, and of each kind of feature (queries, keys, values, gates, b, a) one
tile `[rows, heads, features of a head]`. Each tile is one strided copy in and one out. Heads are an extent and rows are run-time
numbers, so that the program is the same for any number of either, and is compiled once for each layout.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

PACKINGS = ("interleaved", "contiguous")
ENDLESS = 2**62  # rows, to plan a block that does not depend on how many rows there are


# ---- the kernel
#
# A kind is a run of segments, one for each key head, LEN features long. Segment i begins at feature PACKED + i * STEP of the packed
# row and at UNPACKED + i * LEN of the unpacked row. Where STEP is LEN, the segments of a block are one.


@triton.jit
def _tile(base, row, row_stride, first, STEP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers `[ROWS, HEADS, COLUMNS]`. Everything that grows with the tensor is 64 bits wide."""
    start = base + (row * row_stride + first)
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None, None] * row_stride
    heads = tl.arange(0, HEADS)[None, :, None] * STEP
    return start + (rows + heads + tl.arange(0, COLUMNS)[None, None, :])


@triton.jit
def _inside(rows_left, part, LEN: tl.constexpr, COLUMNS: tl.constexpr, RUNS: tl.constexpr, ROWS: tl.constexpr,
            BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """What of the tile is there: rows always, heads and columns only where the extents are larger than what they hold."""
    mask = (tl.arange(0, ROWS) < rows_left)[:, None, None]
    if BLOCK_HEADS != RUNS:
        mask = mask & (tl.arange(0, BLOCK_HEADS) < RUNS)[None, :, None]
    if COLUMNS * PARTS != LEN and PARTS > 1:
        mask = mask & (tl.arange(0, BLOCK) < tl.minimum(LEN - part * COLUMNS, COLUMNS))[None, None, :]
    elif BLOCK != COLUMNS:
        mask = mask & (tl.arange(0, BLOCK) < COLUMNS)[None, None, :]
    return mask


@triton.jit
def _read(packed, packed_stride, unpacked, unpacked_stride, row, rows_left, head, part,
          PACKED: tl.constexpr, STEP: tl.constexpr, UNPACKED: tl.constexpr, LEN: tl.constexpr, BLOCK: tl.constexpr,
          ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, PARTS: tl.constexpr, MERGE: tl.constexpr):
    """Loads a kind's tile of a block: from the packed tensor, or for a merge from the unpacked one."""
    WHOLE: tl.constexpr = STEP == LEN and PARTS == 1
    RUNS: tl.constexpr = 1 if WHOLE else HEADS
    COLUMNS: tl.constexpr = LEN * HEADS if WHOLE else (LEN + PARTS - 1) // PARTS
    EXTENT: tl.constexpr = 1 if WHOLE else BLOCK_HEADS
    mask = _inside(rows_left, part, LEN, COLUMNS, RUNS, ROWS, EXTENT, BLOCK, PARTS)
    if MERGE:
        first = head * LEN + (part * COLUMNS + UNPACKED)
        tile = _tile(unpacked, row, unpacked_stride, first, LEN, ROWS, EXTENT, BLOCK)
    else:
        first = head * STEP + (part * COLUMNS + PACKED)
        tile = _tile(packed, row, packed_stride, first, STEP, ROWS, EXTENT, BLOCK)
    return tl.load(tile, mask=mask)


@triton.jit
def _write(data, packed, packed_stride, unpacked, unpacked_stride, row, rows_left, head, part,
           PACKED: tl.constexpr, STEP: tl.constexpr, UNPACKED: tl.constexpr, LEN: tl.constexpr, BLOCK: tl.constexpr,
           ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, PARTS: tl.constexpr, MERGE: tl.constexpr):
    """Stores what `_read` loaded, on the other side."""
    WHOLE: tl.constexpr = STEP == LEN and PARTS == 1
    RUNS: tl.constexpr = 1 if WHOLE else HEADS
    COLUMNS: tl.constexpr = LEN * HEADS if WHOLE else (LEN + PARTS - 1) // PARTS
    EXTENT: tl.constexpr = 1 if WHOLE else BLOCK_HEADS
    mask = _inside(rows_left, part, LEN, COLUMNS, RUNS, ROWS, EXTENT, BLOCK, PARTS)
    if MERGE:
        first = head * STEP + (part * COLUMNS + PACKED)
        tile = _tile(packed, row, packed_stride, first, STEP, ROWS, EXTENT, BLOCK)
    else:
        first = head * LEN + (part * COLUMNS + UNPACKED)
        tile = _tile(unpacked, row, unpacked_stride, first, LEN, ROWS, EXTENT, BLOCK)
    tl.store(tile, data, mask=mask)


RUN_TIME = ["num_rows", "rows_per_core", "pieces"]


@triton.jit(do_not_specialize=RUN_TIME)
def split_kernel(
    mixed_qkvz, mixed_ba, mixed_qkv, z, b, a,
    qkvz_stride: tl.int64, ba_stride: tl.int64, qkv_stride: tl.int64, z_stride: tl.int64, b_stride: tl.int64, a_stride: tl.int64,
    num_rows: tl.int64, rows_per_core: tl.int64, pieces: tl.int32,
    HK: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, CONTIGUOUS: tl.constexpr, MERGE: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_B: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Moves the rows of one core, `ROWS` rows and `HEADS` key heads (or one of `PARTS` parts of a head) at a time.

    Strides are in elements, from row to row; features of a row lie side by side. `pieces` is `HK // HEADS * PARTS`. Extents `BLOCK_*`
    hold `HEADS` heads, or the features that a head has of each kind; where they are larger, masks cut them.
    """
    V: tl.constexpr = R * DV
    first_row = tl.program_id(0).to(tl.int64) * rows_per_core
    end = tl.minimum(first_row + rows_per_core, num_rows)
    blocks = (tl.maximum(end - first_row, 0).to(tl.int32) + (ROWS - 1)) // ROWS
    for step in tl.range(0, blocks * pieces, num_stages=STAGES):
        row = first_row + (step // pieces) * ROWS
        left = end - row
        piece = step % pieces
        if PARTS == 1:
            head = piece * HEADS
            part = 0
        else:
            head = piece // PARTS
            part = piece % PARTS
        # All of a block is read before any of it is written: the copies in are under way together.
        if CONTIGUOUS:
            K: tl.constexpr = 2 * DK + V
            qkv_ = _read(mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                         0, K, 0, K, BLOCK_K, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            z_ = _read(mixed_qkvz, qkvz_stride, z, z_stride, row, left, head, part,
                       HK * K, V, 0, V, BLOCK_V, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            b_ = _read(mixed_ba, ba_stride, b, b_stride, row, left, head, part,
                       0, R, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            a_ = _read(mixed_ba, ba_stride, a, a_stride, row, left, head, part,
                       HK * R, R, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            _write(qkv_, mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                   0, K, 0, K, BLOCK_K, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            _write(z_, mixed_qkvz, qkvz_stride, z, z_stride, row, left, head, part,
                   HK * K, V, 0, V, BLOCK_V, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            _write(b_, mixed_ba, ba_stride, b, b_stride, row, left, head, part,
                   0, R, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            _write(a_, mixed_ba, ba_stride, a, a_stride, row, left, head, part,
                   HK * R, R, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
        else:
            S: tl.constexpr = 2 * DK + 2 * V
            q_ = _read(mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                       0, S, 0, DK, BLOCK_K, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            k_ = _read(mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                       DK, S, HK * DK, DK, BLOCK_K, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            v_ = _read(mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                       2 * DK, S, 2 * HK * DK, V, BLOCK_V, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            z_ = _read(mixed_qkvz, qkvz_stride, z, z_stride, row, left, head, part,
                       2 * DK + V, S, 0, V, BLOCK_V, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            b_ = _read(mixed_ba, ba_stride, b, b_stride, row, left, head, part,
                       0, 2 * R, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            a_ = _read(mixed_ba, ba_stride, a, a_stride, row, left, head, part,
                       R, 2 * R, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            _write(q_, mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                   0, S, 0, DK, BLOCK_K, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            _write(k_, mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                   DK, S, HK * DK, DK, BLOCK_K, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            _write(v_, mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                   2 * DK, S, 2 * HK * DK, V, BLOCK_V, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            _write(z_, mixed_qkvz, qkvz_stride, z, z_stride, row, left, head, part,
                   2 * DK + V, S, 0, V, BLOCK_V, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            _write(b_, mixed_ba, ba_stride, b, b_stride, row, left, head, part,
                   0, 2 * R, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            _write(a_, mixed_ba, ba_stride, a, a_stride, row, left, head, part,
                   R, 2 * R, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)


# ---- what is compiled for a layout


class Profile(NamedTuple):
    """What a device offers, as the planner and the compiler ask for it."""

    cores: int
    """Programs that run at a time: vector cores of an NPU."""
    buffer_bytes: int = 85 * 1024
    """Fast memory for the inputs and outputs of a block."""
    max_rows_per_iter: int = 64
    """The most rows in a block, whatever fits."""
    exact: bool = True
    """Whether extents may be any number (Ascend's compiler), or must be powers of two (upstream Triton)."""
    num_warps: int = 8
    """Warps of a program, on a GPU."""
    num_stages: int = 1
    """Blocks under way at a time, on a GPU."""


class Blocks(NamedTuple):
    """How a layout's rows are cut: the compile-time numbers of `split_kernel`, and how many pieces make up a row."""

    rows: int
    heads: int
    parts: int
    block_heads: int
    block_k: int
    block_v: int
    block_b: int
    pieces: int
    row_bytes: int
    """Bytes of inputs and outputs of one row of a block, as the planner counts them; padding included."""


def _divisors(number: int) -> list[int]:
    return [d for d in range(number, 0, -1) if number % d == 0]


@functools.lru_cache(maxsize=256)
def blocks(heads: tuple[int, int, int, int], packing: str, sizes: tuple[int, int], profile: Profile) -> Blocks:
    """Cuts rows into blocks that fit the buffer: as many key heads as fit, a part of a head where one does not, then as many rows.

    `heads` are `num_k_heads, num_v_heads, head_k_dim, head_v_dim`; `sizes` are bytes of an element of `mixed_qkvz` and `mixed_ba`.
    A block exceeds the buffer only where a single feature of each kind does.
    """
    from gdn import tiling

    hk, hv, dk, dv = heads
    r = hv // hk
    contiguous = packing == "contiguous"
    kinds = (2 * dk + r * dv, r * dv, r) if contiguous else (dk, r * dv, r)
    extent = (lambda n: n) if profile.exact else triton.next_power_of_2

    def cut(some: int, parts: int) -> Blocks:
        """A block of `some` heads, or of one head in `parts` parts."""
        whole = contiguous and parts == 1
        k, v, b = (extent(n * some if whole else -(-n // parts)) for n in kinds)
        tall = 1 if whole else extent(some)
        features = (k + v, 2 * b) if contiguous else (2 * k + 2 * v, 2 * b)
        row_bytes = 2 * tall * (features[0] * sizes[0] + features[1] * sizes[1])
        return Blocks(1, some, parts, tall, k, v, b, hk // some * parts, row_bytes)

    cuts = [cut(some, 1) for some in _divisors(hk)]
    chosen = next((c for c in cuts if c.row_bytes <= profile.buffer_bytes), cuts[-1])
    parts = 1
    while chosen.row_bytes > profile.buffer_bytes and parts < max(kinds):
        parts += 1
        chosen = cut(1, parts)
    plan = tiling(ENDLESS, chosen.row_bytes, profile.cores, profile.buffer_bytes, profile.max_rows_per_iter)
    return chosen._replace(rows=plan.rows_per_iter)


def constants(heads: tuple[int, int, int, int], packing: str, merge: bool, cut: Blocks, stages: int = 1) -> dict[str, object]:
    """The compile-time arguments of `split_kernel`, by name."""
    hk, hv, dk, dv = heads
    return dict(
        HK=hk, R=hv // hk, DK=dk, DV=dv, CONTIGUOUS=packing == "contiguous", MERGE=merge, ROWS=cut.rows, HEADS=cut.heads,
        PARTS=cut.parts, BLOCK_HEADS=cut.block_heads, BLOCK_K=cut.block_k, BLOCK_V=cut.block_v, BLOCK_B=cut.block_b, STAGES=stages,
    )  # fmt: skip


# ---- checks


def check_heads(num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int, packing: str) -> tuple[int, int, int, int]:
    """The four numbers as a tuple.

    Raises:
        TypeError: one of them is no integer.
        ValueError: one is below 1, `num_v_heads` is no multiple of `num_k_heads`, or the packing is unknown.
    """
    named = dict(num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_k_dim=head_k_dim, head_v_dim=head_v_dim)
    for name, number in named.items():
        if not hasattr(type(number), "__index__") or isinstance(number, bool):
            raise TypeError(f"{name} is a {type(number).__name__}, it must be an integer")
        if number < 1:
            raise ValueError(f"{name} is {number}, it must be at least 1")
    if num_v_heads % num_k_heads:
        raise ValueError(f"num_v_heads is {num_v_heads}, it must be a multiple of num_k_heads, {num_k_heads}")
    if packing not in PACKINGS:
        raise ValueError(f"packing is {packing!r}, it must be 'interleaved' or 'contiguous'")
    return int(num_k_heads), int(num_v_heads), int(head_k_dim), int(head_v_dim)


def _rows(name: str, tensor: torch.Tensor, num_rows: int, tail: tuple[int, ...], heads: tuple[int, ...], written: bool) -> None:
    """Raises where `tensor` is not `[num_rows, *tail]` with features side by side and rows apart."""
    hk, hv, dk, dv = heads
    dims = f"{dk}" if dk == dv else f"{dk} and {dv}"
    if tensor.dim() != 1 + len(tail):
        raise ValueError(f"{name} has {tensor.dim()} dimensions, it must have {1 + len(tail)}")
    if tensor.shape[0] != num_rows:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, mixed_qkvz has {num_rows}" if name != "mixed_qkvz" else name)
    if tuple(tensor.shape[1:]) != tail:
        came = "x".join(str(n) for n in tensor.shape[1:])
        needed = "x".join(str(n) for n in tail)
        raise ValueError(f"{name} has {came} features, {hk}+{hv} heads of {dims} need {needed}")
    dense = 1
    for size, stride in zip(reversed(tail), reversed(tensor.stride()[1:])):
        if size > 1 and stride != dense:
            raise ValueError(f"{name} has features {stride} elements apart, they must be {dense} apart: only rows may be strided")
        dense *= size
    if written and num_rows > 1 and abs(tensor.stride(0)) < dense:
        raise ValueError(f"{name} has rows {tensor.stride(0)} elements apart, they must be at least {dense} apart to be written")


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether rows of two tensors may share bytes; exact where their rows are equally far apart."""

    def span(t: torch.Tensor) -> tuple[int, int, int]:
        row = t[0].numel() * t.element_size()
        return t.data_ptr(), (t.shape[0] - 1) * t.stride(0) * t.element_size() + row, row

    (at, length, row), (at2, length2, row2) = span(one), span(other)
    if at + length <= at2 or at2 + length2 <= at:
        return False
    step = one.stride(0) * one.element_size()
    if one.shape[0] > 1 and step == other.stride(0) * other.element_size() and step >= row:
        apart = (at2 - at) % step
        return apart < row or apart + row2 > step
    return True


NAMES = ("mixed_qkvz", "mixed_ba", "mixed_qkv", "z", "b", "a")


def check_tensors(tensors: Sequence[torch.Tensor], heads: tuple[int, int, int, int], merge: bool) -> None:
    """Holds the six tensors, in the order of `NAMES`, against the heads, before anything is written.

    Raises:
        TypeError: no tensor, or another element type than its partner's.
        ValueError: a number of rows or features, a stride, an element size or a device that does not fit, or outputs that overlap
            with anything.
    """
    import torch

    hk, hv, dk, dv = heads
    for name, tensor in zip(NAMES, tensors):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, it must be a torch.Tensor")
    qkvz, ba, qkv, z, b, a = tensors
    reads = ("mixed_qkv", "z", "b", "a") if merge else ("mixed_qkvz", "mixed_ba")
    tails = ((2 * hk * dk + 2 * hv * dv,), (2 * hv,), (2 * hk * dk + hv * dv,), (hv, dv), (hv,), (hv,))
    # The inputs first: what the caller gave, before what was made to fit it.
    order = [n for n in NAMES if n in reads] + [n for n in NAMES if n not in reads]
    by_name = dict(zip(NAMES, zip(tensors, tails)))
    num_rows = by_name[order[0]][0].shape[0] if by_name[order[0]][0].dim() else 0
    for name in order:
        tensor, tail = by_name[name]
        if tensor.device != by_name[order[0]][0].device:
            raise ValueError(f"{name} is on {tensor.device}, {order[0]} is on {by_name[order[0]][0].device}")
        _rows(name, tensor, num_rows, tail, heads, written=name not in reads)
    for name, tensor, partner in (("mixed_qkv", qkv, qkvz), ("z", z, qkvz), ("b", b, ba), ("a", a, ba)):
        if tensor.dtype != partner.dtype:
            partner_name = "mixed_qkvz" if partner is qkvz else "mixed_ba"
            raise TypeError(f"{name} is {tensor.dtype}, {partner_name} is {partner.dtype}")
    for name, tensor in (("mixed_qkvz", qkvz), ("mixed_ba", ba)):
        if tensor.element_size() not in (1, 2, 4, 8):
            raise TypeError(f"{name} has elements of {tensor.element_size()} bytes ({tensor.dtype}), they must have 1, 2, 4 or 8")
    if num_rows:
        for name in order:
            if name not in reads:
                for other in NAMES:
                    if other != name and _overlap(by_name[name][0], by_name[other][0]):
                        raise ValueError(f"{name} overlaps with {other}")


# ---- launching


@functools.lru_cache(maxsize=None)
def profile_of(kind: str, index: int) -> Profile:
    """What the device `kind:index` offers.

    Raises:
        RuntimeError: there is no such device to ask, or Triton cannot be run for it.
    """
    import torch

    if kind == "npu":
        properties = triton.runtime.driver.active.utils.get_device_properties(index)
        return Profile(cores=properties["num_vectorcore"])
    if kind == "cuda":
        return Profile(cores=torch.cuda.get_device_properties(index).multi_processor_count, exact=False)
    if kind == "cpu" and not isinstance(split_kernel, triton.runtime.JITFunction):
        return Profile(cores=4, exact=False)  # Triton's interpreter, where TRITON_INTERPRET=1 was set before this module was imported
    raise RuntimeError(f"the Triton kernel runs on npu and cuda tensors, these are on {kind}")


WORDS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}


def _launch(tensors: Sequence[torch.Tensor], heads: tuple[int, int, int, int], packing: str, merge: bool, profile: Profile | None) -> None:
    """Runs the kernel on tensors that were checked, on the current stream of their device."""
    import torch

    from gdn import tiling

    qkvz, ba = tensors[:2]
    num_rows = qkvz.shape[0]
    if num_rows == 0:
        return
    device = qkvz.device
    profile = profile or profile_of(device.type, device.index or 0)
    cut = blocks(heads, packing, (qkvz.element_size(), ba.element_size()), profile)
    plan = tiling(num_rows, cut.row_bytes, profile.cores, profile.buffer_bytes, profile.max_rows_per_iter)
    # Elements are opaque: one program for each size of them, and no bits that a float register could change.
    words = [t.view(getattr(torch, WORDS[t.element_size()])) for t in tensors]
    strides = [t.stride(0) if num_rows > 1 else t[0].numel() for t in tensors]
    options = {} if device.type == "npu" else {"num_warps": profile.num_warps}

    def run() -> None:
        split_kernel[(plan.grid,)](
            *words, *strides, num_rows, plan.rows_per_core, cut.pieces,
            **constants(heads, packing, merge, cut, profile.num_stages), **options,
        )  # fmt: skip

    module = getattr(torch, device.type, None)
    if device.type != "cpu" and module.current_device() != device.index:
        with module.device(device.index):
            run()
    else:
        run()


def split(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str,
    out: Sequence[torch.Tensor],
    *,
    profile: Profile | None = None,
) -> None:
    """Takes packed rows apart, into `out`: `mixed_qkv`, `z`, `b`, `a`.

    Shapes, for N rows, `HK`, `HV` heads and dims `DK`, `DV`: `mixed_qkvz` `[N, 2*HK*DK + 2*HV*DV]`, `mixed_ba` `[N, 2*HV]`, `mixed_qkv`
    `[N, 2*HK*DK + HV*DV]`, `z` `[N, HV, DV]`, `b` and `a` `[N, HV]`. Rows may lie at any stride; the features of a row side by side.
    Elements of 1, 2, 4 or 8 bytes. `profile` is asked of the device where it is not given.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was written.
        RuntimeError: the device is none that Triton runs on.
    """
    heads = check_heads(num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing)
    tensors = (mixed_qkvz, mixed_ba, *out)
    check_tensors(tensors, heads, merge=False)
    _launch(tensors, heads, packing, False, profile)


def merge(
    mixed_qkv: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str,
    out: Sequence[torch.Tensor],
    *,
    profile: Profile | None = None,
) -> None:
    """Puts rows together again, into `out`: `mixed_qkvz`, `mixed_ba`. Shapes and errors are those of [`split`][gdn.triton_split.split]."""
    heads = check_heads(num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing)
    tensors = (*out, mixed_qkv, z, b, a)
    check_tensors(tensors, heads, merge=True)
    _launch(tensors, heads, packing, True, profile)
