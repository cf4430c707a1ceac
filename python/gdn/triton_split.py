"""Split and merge as one Triton kernel, for Ascend NPUs and, on request, for CUDA tensors.

`gdn.split` and `gdn.merge` come here for tensors on `npu`, or with `backend="triton"`. What the op does is in
docs/layouts.md, how this kernel is built and checked in docs/ascend.md.

The grid is persistent: a program for each vector core, with a contiguous chunk of rows. A program moves a
block at a time: some rows, all key heads of them where they fit the on-chip buffer, and of each kind of
feature (queries, keys, values, gates, b, a) one tile `[rows, heads, features of a head]`. Each tile is one
strided copy in and one out. Heads are an extent and rows are run-time numbers, so that the program has the
same size for any number of heads, and is compiled once for any number of rows.
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
WORDS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}  # what elements are moved as
ENDLESS = 2**62  # rows, to plan a block that does not depend on how many rows there are


# ---- the kernel
#
# A kind is a run of segments, one for each key head, LEN features long. Segment i begins at feature
# PACKED + i * STEP of the packed row and at UNPACKED + i * LEN of the unpacked row. Where STEP is LEN, the
# segments of a block are one.
# fmt: off


@triton.jit
def _tile(base, row, row_stride, first, STEP: tl.constexpr,
          ROWS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers `[ROWS, HEADS, COLUMNS]`. Everything that grows with the tensor is 64 bits wide."""
    start = base + (row * row_stride + first)
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None, None] * row_stride
    heads = tl.arange(0, HEADS)[None, :, None] * STEP
    return start + (rows + heads + tl.arange(0, COLUMNS)[None, None, :])


@triton.jit
def _inside(left, part, LEN: tl.constexpr, COLUMNS: tl.constexpr, RUNS: tl.constexpr,
            ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """What of a tile is there: of rows the `left` ones, of heads and columns all where extents are exact."""
    mask = (tl.arange(0, ROWS) < left)[:, None, None]
    if HEADS != RUNS:
        mask = mask & (tl.arange(0, HEADS) < RUNS)[None, :, None]
    if PARTS > 1 and COLUMNS * PARTS != LEN:
        mask = mask & (tl.arange(0, BLOCK) < tl.minimum(LEN - part * COLUMNS, COLUMNS))[None, None, :]
    elif BLOCK != COLUMNS:
        mask = mask & (tl.arange(0, BLOCK) < COLUMNS)[None, None, :]
    return mask


@triton.jit
def _place(packed, packed_stride, unpacked, unpacked_stride, row, left, head, part,
           PACKED: tl.constexpr, STEP: tl.constexpr, UNPACKED: tl.constexpr, LEN: tl.constexpr,
           BLOCK: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
           PARTS: tl.constexpr, IN_PACKED: tl.constexpr):
    """A kind's tile of a block in the packed or the unpacked tensor: pointers and mask."""
    ONE: tl.constexpr = STEP == LEN and PARTS == 1
    RUNS: tl.constexpr = 1 if ONE else HEADS
    COLUMNS: tl.constexpr = LEN * HEADS if ONE else (LEN + PARTS - 1) // PARTS
    EXTENT: tl.constexpr = 1 if ONE else BLOCK_HEADS
    mask = _inside(left, part, LEN, COLUMNS, RUNS, ROWS, EXTENT, BLOCK, PARTS)
    if IN_PACKED:
        first = head * STEP + (part * COLUMNS + PACKED)
        tile = _tile(packed, row, packed_stride, first, STEP, ROWS, EXTENT, BLOCK)
    else:
        first = head * LEN + (part * COLUMNS + UNPACKED)
        tile = _tile(unpacked, row, unpacked_stride, first, LEN, ROWS, EXTENT, BLOCK)
    return tile, mask


@triton.jit
def _read(packed, packed_stride, unpacked, unpacked_stride, row, left, head, part,
          PACKED: tl.constexpr, STEP: tl.constexpr, UNPACKED: tl.constexpr, LEN: tl.constexpr,
          BLOCK: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
          PARTS: tl.constexpr, MERGE: tl.constexpr):
    """Loads a kind's tile: of the packed tensor, or of the unpacked one for a merge."""
    tile, mask = _place(packed, packed_stride, unpacked, unpacked_stride, row, left, head, part, PACKED, STEP,
                        UNPACKED, LEN, BLOCK, ROWS, HEADS, BLOCK_HEADS, PARTS, not MERGE)
    return tl.load(tile, mask=mask)


@triton.jit
def _write(data, packed, packed_stride, unpacked, unpacked_stride, row, left, head, part,
           PACKED: tl.constexpr, STEP: tl.constexpr, UNPACKED: tl.constexpr, LEN: tl.constexpr,
           BLOCK: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
           PARTS: tl.constexpr, MERGE: tl.constexpr):
    """Stores what `_read` loaded, on the other side."""
    tile, mask = _place(packed, packed_stride, unpacked, unpacked_stride, row, left, head, part, PACKED, STEP,
                        UNPACKED, LEN, BLOCK, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
    tl.store(tile, data, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rows_per_core", "pieces"])
def split_kernel(
    mixed_qkvz, mixed_ba, mixed_qkv, z, b, a,
    qkvz_stride: tl.int64, ba_stride: tl.int64, qkv_stride: tl.int64,
    z_stride: tl.int64, b_stride: tl.int64, a_stride: tl.int64,
    num_rows: tl.int64, rows_per_core: tl.int64, pieces: tl.int32,
    HK: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    CONTIGUOUS: tl.constexpr, MERGE: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Moves the rows of one core: `ROWS` rows and `HEADS` key heads, or a part of one, at a time.

    Strides are in elements, from row to row; features of a row lie side by side. `pieces` is
    `HK // HEADS * PARTS`. Extents `BLOCK_*` hold `HEADS` heads, and the features of each kind that a head has
    (in contiguous packing, those of `HEADS` heads); where they are larger, masks cut them.
    """
    V: tl.constexpr = R * DV
    QKVZ: tl.constexpr = 2 * DK + 2 * V
    # Interleaved: q, k, v and z are kinds. Contiguous: q, k and v are one, in the same order on both sides.
    Q: tl.constexpr = 2 * DK + V if CONTIGUOUS else DK
    Q_STEP: tl.constexpr = Q if CONTIGUOUS else QKVZ
    Z_AT: tl.constexpr = HK * Q if CONTIGUOUS else 2 * DK + V
    Z_STEP: tl.constexpr = V if CONTIGUOUS else QKVZ
    B_STEP: tl.constexpr = R if CONTIGUOUS else 2 * R
    A_AT: tl.constexpr = HK * R if CONTIGUOUS else R

    first_row = tl.program_id(0).to(tl.int64) * rows_per_core
    end = tl.minimum(first_row + rows_per_core, num_rows)
    blocks = (tl.maximum(end - first_row, 0).to(tl.int32) + (ROWS - 1)) // ROWS
    for step in tl.range(0, blocks * pieces, num_stages=STAGES):
        row = first_row + (step // pieces) * ROWS
        left = end - row
        piece = step % pieces
        head = piece * HEADS if PARTS == 1 else piece // PARTS
        part = 0 if PARTS == 1 else piece % PARTS
        # All of a block is read before any of it is written, so that the copies in are under way together.
        q_ = _read(mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                   0, Q_STEP, 0, Q, BLOCK_Q, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
        if not CONTIGUOUS:
            k_ = _read(mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                       DK, QKVZ, HK * DK, DK, BLOCK_Q, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            v_ = _read(mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                       2 * DK, QKVZ, 2 * HK * DK, V, BLOCK_V, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
        z_ = _read(mixed_qkvz, qkvz_stride, z, z_stride, row, left, head, part,
                   Z_AT, Z_STEP, 0, V, BLOCK_V, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
        b_ = _read(mixed_ba, ba_stride, b, b_stride, row, left, head, part,
                   0, B_STEP, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
        a_ = _read(mixed_ba, ba_stride, a, a_stride, row, left, head, part,
                   A_AT, B_STEP, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
        _write(q_, mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
               0, Q_STEP, 0, Q, BLOCK_Q, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
        if not CONTIGUOUS:
            _write(k_, mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                   DK, QKVZ, HK * DK, DK, BLOCK_Q, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
            _write(v_, mixed_qkvz, qkvz_stride, mixed_qkv, qkv_stride, row, left, head, part,
                   2 * DK, QKVZ, 2 * HK * DK, V, BLOCK_V, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
        _write(z_, mixed_qkvz, qkvz_stride, z, z_stride, row, left, head, part,
               Z_AT, Z_STEP, 0, V, BLOCK_V, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
        _write(b_, mixed_ba, ba_stride, b, b_stride, row, left, head, part,
               0, B_STEP, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)
        _write(a_, mixed_ba, ba_stride, a, a_stride, row, left, head, part,
               A_AT, B_STEP, 0, R, BLOCK_B, ROWS, HEADS, BLOCK_HEADS, PARTS, MERGE)


# fmt: on
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
    num_warps: int | None = None
    """Warps of a program, on a GPU; None for what suits the heads."""
    num_stages: int = 1
    """Blocks under way at a time, on a GPU."""


def warps(heads: tuple[int, int, int, int], element_size: int) -> int:
    """Warps of a program on a GPU: few where each thread moves 16 bytes at a time.

    Where it moves less, its share of a block is a long program, and Triton's compiler takes minutes over one of four warps.
    """
    return 4 if all(dim * element_size % 16 == 0 for dim in heads[2:]) else 8


class Blocks(NamedTuple):
    """How a layout's rows are cut: compile-time numbers of `split_kernel`, and the pieces of a row."""

    rows: int
    heads: int
    parts: int
    block_heads: int
    block_q: int
    block_v: int
    block_b: int
    pieces: int
    row_bytes: int
    """Bytes of inputs and outputs of one row of a block, as the planner counts them; padding included."""


def _divisors(number: int) -> list[int]:
    return [d for d in range(number, 0, -1) if number % d == 0]


@functools.lru_cache(maxsize=256)
def blocks(
    heads: tuple[int, int, int, int], packing: str, sizes: tuple[int, int], profile: Profile
) -> Blocks:
    """Cuts rows into blocks that fit the buffer: as many heads as fit, or a part of one, then as many rows.

    `heads` are `num_k_heads, num_v_heads, head_k_dim, head_v_dim`; `sizes` are bytes of an element of
    `mixed_qkvz` and `mixed_ba`. A block exceeds the buffer only where a single feature of each kind does.
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


def constants(
    heads: tuple[int, int, int, int], packing: str, merge: bool, cut: Blocks, stages: int = 1
) -> dict[str, object]:
    """The compile-time arguments of `split_kernel`, by name."""
    hk, hv, dk, dv = heads
    return {
        "HK": hk,
        "R": hv // hk,
        "DK": dk,
        "DV": dv,
        "CONTIGUOUS": packing == "contiguous",
        "MERGE": merge,
        "ROWS": cut.rows,
        "HEADS": cut.heads,
        "PARTS": cut.parts,
        "BLOCK_HEADS": cut.block_heads,
        "BLOCK_Q": cut.block_q,
        "BLOCK_V": cut.block_v,
        "BLOCK_B": cut.block_b,
        "STAGES": stages,
    }


# ---- checks


def check_heads(
    num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int, packing: str
) -> tuple[int, int, int, int]:
    """The four numbers as a tuple.

    Raises:
        TypeError: one of them is no integer.
        ValueError: one is below 1, `num_v_heads` is no multiple of `num_k_heads`, or the packing is unknown.
    """
    names = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
    for name, number in zip(names, (num_k_heads, num_v_heads, head_k_dim, head_v_dim)):
        if not hasattr(type(number), "__index__") or isinstance(number, bool):
            raise TypeError(f"{name} is a {type(number).__name__}, it must be an integer")
        if number < 1:
            raise ValueError(f"{name} is {number}, it must be at least 1")
    if num_v_heads % num_k_heads:
        raise ValueError(f"num_v_heads = {num_v_heads} is not a multiple of num_k_heads = {num_k_heads}")
    if packing not in PACKINGS:
        raise ValueError(f"packing is {packing!r}, it must be 'interleaved' or 'contiguous'")
    return int(num_k_heads), int(num_v_heads), int(head_k_dim), int(head_v_dim)


def check_inputs(*named: tuple[str, object]) -> None:
    """Raises TypeError where one is no tensor, ValueError where one has no rows to count."""
    import torch

    for name, tensor in named:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, it must be a torch.Tensor")
        if tensor.dim() == 0:
            raise ValueError(f"{name} has 0 dimensions, it must have 2")


def _check_rows(
    name: str, tensor: torch.Tensor, tail: tuple[int, ...], heads: tuple[int, ...], written: bool
) -> None:
    """Raises where `tensor` is not `[N, *tail]`, features side by side and, where written, rows apart."""
    if tensor.dim() != 1 + len(tail):
        raise ValueError(f"{name} has {tensor.dim()} dimensions, it must have {1 + len(tail)}")
    shape, strides = tensor.shape, tensor.stride()
    if tuple(shape[1:]) != tail:
        came, needed = ("x".join(map(str, sizes)) for sizes in (shape[1:], tail))
        hk, hv, dk, dv = heads
        dims = f"{dk}" if dk == dv else f"{dk} and {dv}"
        raise ValueError(f"{name} has {came} features, {hk}+{hv} heads of {dims} need {needed}")
    dense = 1
    for size, stride in zip(reversed(tail), reversed(strides)):
        if size > 1 and stride != dense:
            raise ValueError(
                f"{name} has features {stride} elements apart, only rows may be: expected {dense}"
            )
        dense *= size
    if written and shape[0] > 1 and strides[0] < dense:
        raise ValueError(f"{name} has rows {strides[0]} elements apart, a row that is written has {dense}")


class _Span(NamedTuple):
    """The bytes of a tensor: rows of `row` bytes, `step` apart."""

    start: int
    end: int
    step: int
    row: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Span:
        size, count = tensor.element_size(), tensor.shape[0]
        row, step = tensor.numel() // count * size, tensor.stride(0) * size
        start = tensor.data_ptr()
        return cls(start, start + (count - 1) * step + row, step, row)

    def overlaps(self, other: _Span) -> bool:
        """Whether both may have bytes in common; exact where their rows are equally far apart."""
        if self.end <= other.start or other.end <= self.start:
            return False
        if self.step != other.step or self.step < self.row:
            return True
        apart = (other.start - self.start) % self.step
        return apart < self.row or apart + other.row > self.step


NAMES = ("mixed_qkvz", "mixed_ba", "mixed_qkv", "z", "b", "a")


def check_read(inputs: Sequence[torch.Tensor], heads: tuple[int, int, int, int], merge: bool) -> None:
    """Holds the tensors that are read against the heads and one another, before outputs are made for them.

    Raises:
        TypeError: another element type than its partner's, or elements of a size that the kernel does not take.
        ValueError: a number of rows or features, a stride or a device that does not fit, or a tensor without memory.
    """
    _check_all(NAMES[2:] if merge else NAMES[:2], inputs, heads, inputs[0], NAMES[2 if merge else 0], False)


def check_tensors(
    tensors: Sequence[torch.Tensor], heads: tuple[int, int, int, int], merge: bool, fresh: bool = False
) -> None:
    """Holds the six tensors, in the order of `NAMES`, against the heads, before anything is written.

    `fresh` says that the outputs were just made for the inputs, which were checked.

    Raises:
        TypeError, ValueError: as `check_read`, and where outputs overlap anything.
    """
    if fresh:
        return
    inputs, outputs = (tensors[2:], tensors[:2]) if merge else (tensors[:2], tensors[2:])
    first_name, written = NAMES[2 if merge else 0], NAMES[:2] if merge else NAMES[2:]
    check_read(inputs, heads, merge)
    _check_all(written, outputs, heads, inputs[0], first_name, True)
    for name, tensor, partner in zip(NAMES[2:], tensors[2:], (0, 0, 1, 1)):
        if tensor.dtype != tensors[partner].dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, {NAMES[partner]} has {tensors[partner].dtype}")
    if inputs[0].shape[0]:
        spans = {name: _Span.of(tensor) for name, tensor in zip(NAMES, tensors)}
        for name in written:
            for other, span in spans.items():
                if other != name and spans[name].overlaps(span):
                    raise ValueError(f"{name} overlaps {other}")


def _check_all(
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    heads: tuple[int, int, int, int],
    first: torch.Tensor,
    first_name: str,
    written: bool,
) -> None:
    from gdn import _torch

    hk, hv, dk, dv = heads
    qkv, v = 2 * hk * dk + hv * dv, hv * dv
    tails = dict(zip(NAMES, ((qkv + v,), (2 * hv,), (qkv,), (hv, dv), (hv,), (hv,))))
    partners = {"z": "mixed_qkv", "a": "b"}
    for name, tensor in zip(names, tensors):
        tail = (v,) if name == "z" and tensor.dim() == 2 else tails[name]
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, {first_name} is on {first.device}")
        _check_rows(name, tensor, tail, heads, written)
        if tensor.shape[0] != first.shape[0]:
            raise ValueError(f"{name} has {tensor.shape[0]} rows, {first_name} has {first.shape[0]}")
        if tensor.element_size() not in WORDS:
            sizes = f"elements of {tensor.element_size()} bytes, they must have 1, 2, 4 or 8"
            raise TypeError(f"{name} has dtype {tensor.dtype}: {sizes}")
        partner = dict(zip(names, tensors)).get(partners.get(name, ""))
        if partner is not None and not written and tensor.dtype != partner.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, {partners[name]} has {partner.dtype}")
        _torch.check_memory(**{name: tensor})


# ---- launching


@functools.cache
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
        # The fastest of a sweep on an H200, or within 6 % of it, at one to 65,536 tokens.
        return Profile(cores=4 * torch.cuda.get_device_properties(index).multi_processor_count, exact=False)
    if kind == "cpu" and not isinstance(split_kernel, triton.runtime.JITFunction):
        return Profile(
            cores=4, exact=False
        )  # Triton's interpreter: TRITON_INTERPRET=1 when this was imported
    raise RuntimeError(f"the Triton kernel runs on npu and cuda tensors, these are on {kind}")


def _launch(
    tensors: Sequence[torch.Tensor],
    heads: tuple[int, int, int, int],
    packing: str,
    merge: bool,
    profile: Profile | None,
) -> None:
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
    num_warps = profile.num_warps or warps(heads, qkvz.element_size())
    options = {} if device.type == "npu" else {"num_warps": num_warps}

    def run() -> None:
        split_kernel[(plan.grid,)](
            *words,
            *strides,
            num_rows,
            plan.rows_per_core,
            cut.pieces,
            **constants(heads, packing, merge, cut, profile.num_stages),
            **options,
        )

    module = getattr(torch, device.type, None)
    if device.type != "cpu" and module.current_device() != device.index:
        with module.device(device.index):
            run()
    else:
        run()


def _run(
    inputs: tuple[torch.Tensor, ...],
    out: Sequence[torch.Tensor],
    fresh: bool,
    heads: tuple[int, int, int, int],
    packing: str,
    merge: bool,
    profile: Profile | None,
) -> tuple[torch.Tensor, ...]:
    """Checks the outputs and all six tensors, and runs the kernel. What the outputs are."""
    names = NAMES[:2] if merge else NAMES[2:]
    if len(out) != len(names):
        raise ValueError(f"out has {len(out)} tensors, expected {len(names)}: ({', '.join(names)})")
    check_inputs(*zip(names, out))
    tensors = (*out, *inputs) if merge else (*inputs, *out)
    check_tensors(tensors, heads, merge=merge, fresh=fresh)
    _launch(tensors, heads, packing, merge, profile)
    return tuple(out)


def split(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str = "interleaved",
    out: Sequence[torch.Tensor] | None = None,
    *,
    profile: Profile | None = None,
) -> tuple[torch.Tensor, ...]:
    """Takes packed rows apart: `mixed_qkv`, `z`, `b`, `a`, which are `out` where it is given.

    Shapes, for N rows, `HK`, `HV` heads and dims `DK`, `DV`: `mixed_qkvz` `[N, 2*HK*DK + 2*HV*DV]`,
    `mixed_ba` `[N, 2*HV]`, `mixed_qkv` `[N, 2*HK*DK + HV*DV]`, `z` `[N, HV, DV]`, `b` and `a` `[N, HV]`. Rows
    may lie any distance apart, the features of a row lie side by side. Elements have 1, 2, 4 or 8 bytes.
    `profile` is asked of the device where it is not given.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was written.
        RuntimeError: the device is none that Triton runs on.
    """
    heads = check_heads(num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing)
    check_inputs(("mixed_qkvz", mixed_qkvz), ("mixed_ba", mixed_ba))
    fresh = out is None
    if out is None:
        check_read((mixed_qkvz, mixed_ba), heads, False)
        n, (hk, hv, dk, dv) = mixed_qkvz.shape[0], heads
        qkv, z = mixed_qkvz.new_empty(n, 2 * hk * dk + hv * dv), mixed_qkvz.new_empty(n, hv, dv)
        out = (qkv, z, mixed_ba.new_empty(n, hv), mixed_ba.new_empty(n, hv))
    return _run((mixed_qkvz, mixed_ba), out, fresh, heads, packing, False, profile)


def merge(
    mixed_qkv: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str = "interleaved",
    out: Sequence[torch.Tensor] | None = None,
    *,
    profile: Profile | None = None,
) -> tuple[torch.Tensor, ...]:
    """Puts rows together again: `mixed_qkvz` and `mixed_ba`, which are `out` where it is given.

    Shapes and errors are those of `split`; `z` may be `[N, HV*DV]` too.
    """
    heads = check_heads(num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing)
    check_inputs(("mixed_qkv", mixed_qkv), ("z", z), ("b", b), ("a", a))
    fresh = out is None
    if out is None:
        check_read((mixed_qkv, z, b, a), heads, True)
        n, (hk, hv, dk, dv) = mixed_qkv.shape[0], heads
        out = (mixed_qkv.new_empty(n, 2 * hk * dk + 2 * hv * dv), b.new_empty(n, 2 * hv))
    return _run((mixed_qkv, z, b, a), out, fresh, heads, packing, True, profile)
