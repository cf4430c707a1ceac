"""Fused kernels for the Gated DeltaNet (GDN) layer of Qwen3-Next, Qwen3.5 and Qwen3.6, for CPU and GPU, in Rust.

>>> import torch, gdn
>>> mixed_qkvz, mixed_ba = torch.randn(5, 12288), torch.randn(5, 64)
>>> mixed_qkv, z, b, a = gdn.split(mixed_qkvz, mixed_ba, 16, 32, 128, 128)
>>> mixed_qkv.shape, z.shape, b.shape
(torch.Size([5, 8192]), torch.Size([5, 32, 128]), torch.Size([5, 32]))

Tensors are PyTorch's (CPU, CUDA), NumPy's, or anybody's who speaks DLPack. Where PyTorch is installed it is imported, and
``torch.ops.gdn.split``, ``merge``, ``decode`` and ``prefill`` are operators of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from . import _gdn

try:
    from . import _torch
    from ._torch import is_compiling as _is_compiling
except ImportError as error:
    if error.name != "torch":
        raise
    _torch = None  # type: ignore[assignment]

    def _is_compiling() -> bool:
        return False


from .layer import Layer, decode_supported, prefill_supported

__version__: str = _gdn.__version__
__all__ = [
    "Heads",
    "Layer",
    "Tiling",
    "decode_supported",
    "empty_cache",
    "fused_qkvzba_split_reshape_cat",
    "fused_qkvzba_split_reshape_cat_contiguous",
    "merge",
    "prefill_supported",
    "preset",
    "repack_weight",
    "split",
    "tiling",
]

#: A tensor of PyTorch, an array of NumPy, or of anybody who speaks DLPack.
T = TypeVar("T")


class Heads(NamedTuple):
    """The four numbers that fix every shape of a layer. ``num_v_heads`` is a multiple of ``num_k_heads``."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int

    def shard(self, tp_size: int) -> Heads:
        """The heads of one tensor-parallel rank of ``tp_size``. Raises ``ValueError`` where they do not divide."""
        return Heads(*_gdn.shard(self, tp_size))


class Tiling(NamedTuple):
    """How rows are shared out: worker ``i`` has ``rows_per_core`` rows from ``i * rows_per_core`` on, the last may have fewer."""

    grid: int
    rows_per_core: int
    #: Rows at a time, a power of two.
    rows_per_iter: int


def split(
    mixed_qkvz: T,
    mixed_ba: T,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str = "interleaved",
    *,
    out: tuple[T, T, T, T] | None = None,
    backend: str | None = None,
) -> tuple[T, T, T, T]:
    """Takes packed projections apart, in one pass, bit for bit. The inverse of :func:`merge`.

    With ``HK, HV = num_k_heads, num_v_heads``, ``DK, DV = head_k_dim, head_v_dim`` and ``R = HV / HK``:

    Args:
        mixed_qkvz: ``[N, 2*HK*DK + 2*HV*DV]``, elements of 1, 2, 4 or 8 bytes. Rows are dense and may lie apart.
        mixed_ba: ``[N, 2*HV]``, on the same device; its dtype may be another.
        packing: ``"interleaved"`` (Qwen3-Next: for each k head ``q | k | v of R heads | z of R heads``, and ``b | a``) or
            ``"contiguous"`` (Qwen3.5, Qwen3.6: ``Q | K | V | Z``, and ``B | A``).
        out: Tensors to write to, instead of fresh ones. They may be strided like the inputs, and overlap nothing.
        backend: ``None`` for the one that the device has, or ``"triton"``, which has no derivative.

    Returns:
        ``mixed_qkv [N, 2*HK*DK + HV*DV]`` (all queries, all keys, all values), ``z [N, HV, DV]``, ``b [N, HV]``, ``a [N, HV]``.

    On CUDA tensors the work is one kernel on the current stream, and can be captured in a graph. On CPU tensors of PyTorch it takes
    ``torch.get_num_threads()`` threads where there is enough to do. Gradients flow, unless ``out`` is given.

    Raises:
        ValueError: A shape, a stride, a device or an overlap is wrong. The argument and both numbers are named; nothing has been written.
        TypeError: An argument is no tensor, or its dtype differs from where it must not.
    """
    if backend is None:
        if not _is_compiling():
            parts = _gdn.split(
                mixed_qkvz, mixed_ba, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing, out
            )
            if parts is not None:
                return parts
        return _torch.split(
            mixed_qkvz, mixed_ba, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing, out
        )
    return _backend(backend, mixed_qkvz, mixed_ba).split(
        mixed_qkvz, mixed_ba, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing, out=out
    )


def merge(
    mixed_qkv: T,
    z: T,
    b: T,
    a: T,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str = "interleaved",
    *,
    out: tuple[T, T] | None = None,
    backend: str | None = None,
) -> tuple[T, T]:
    """Puts the four parts together again: the exact inverse of :func:`split`, whose shapes, rules and errors it shares.

    ``z`` is ``[N, HV, DV]`` or the same as ``[N, HV*DV]``. Returns ``mixed_qkvz`` and ``mixed_ba``.
    """
    if backend is None:
        if not _is_compiling():
            packed = _gdn.merge(
                mixed_qkv, z, b, a, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing, out
            )
            if packed is not None:
                return packed
        return _torch.merge(
            mixed_qkv, z, b, a, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing, out
        )
    return _backend(backend, mixed_qkv, z, b, a).merge(
        mixed_qkv, z, b, a, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing, out=out
    )


def _backend(name: str, *tensors: Any) -> Any:
    if name == "triton":
        from . import triton_split

        _torch.check_backend(name, tensors)
        return triton_split
    raise ValueError(f"backend is {name!r}, expected None or 'triton'")


def fused_qkvzba_split_reshape_cat(
    mixed_qkvz: T, mixed_ba: T, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> tuple[T, T, T, T]:
    """:func:`split` of Qwen3-Next's interleaved packing, under the name and arguments that SGLang and vLLM-Ascend have for it."""
    if not _is_compiling():
        parts = _gdn.split(mixed_qkvz, mixed_ba, num_heads_qk, num_heads_v, head_qk, head_v, "interleaved")
        if parts is not None:
            return parts
    return split(mixed_qkvz, mixed_ba, num_heads_qk, num_heads_v, head_qk, head_v)


def fused_qkvzba_split_reshape_cat_contiguous(
    mixed_qkvz: T, mixed_ba: T, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> tuple[T, T, T, T]:
    """:func:`split` of Qwen3.5's contiguous packing, under SGLang's name and arguments."""
    if not _is_compiling():
        parts = _gdn.split(mixed_qkvz, mixed_ba, num_heads_qk, num_heads_v, head_qk, head_v, "contiguous")
        if parts is not None:
            return parts
    return split(mixed_qkvz, mixed_ba, num_heads_qk, num_heads_v, head_qk, head_v, "contiguous")


def repack_weight(
    weight: T,
    heads: tuple[int, int, int, int],
    dim: int = 0,
    *,
    projection: str | None = None,
    to: str = "contiguous",
    block: int = 1,
    group: int = 1,
) -> T:
    """A projection's weight with its outputs in the order of the other packing, after which the split is a view.

    Args:
        weight: ``in_proj_qkvz`` or ``in_proj_ba``, ``[out, hidden]`` with ``dim=0`` or ``[hidden, out]`` with ``dim=1``; or what follows
            its outputs: a bias or a scale for each of them (``[out]``), the ``B`` of a LoRA adapter.
        heads: ``(num_k_heads, num_v_heads, head_k_dim, head_v_dim)``, of the shard where the weight is one.
        dim: Where the outputs are.
        projection: ``"qkvz"`` or ``"ba"``; ``None`` where the length of ``dim`` says which.
        to: The packing that is wanted; it has the other one.
        block: Outputs that share a row: 128 for the ``weight_scale_inv`` of fp8 with 128-wide blocks.
        group: Outputs packed in one element: 8 for 4-bit values in int32.

    Returns:
        A new tensor of the same shape, dtype and device. Works on PyTorch's tensors and NumPy's arrays.

    Raises:
        ValueError: ``dim`` has the wrong length, or blocks or groups would have to part.
        TypeError: ``weight`` is no tensor.
    """
    if _torch is not None and not _torch.is_plain_cpu(weight):
        _torch.check_weight(weight)
        moves = _gdn.weight_moves(tuple(weight.shape), heads, dim, projection, to, block, group)
        return _torch.moved(weight, dim, moves)
    return _gdn.repack_weight(weight, heads, dim, projection, to, block, group)


def tiling(
    rows: int, row_bytes: int, cores: int, buffer_bytes: int = 85 * 1024, max_rows_per_iter: int = 64
) -> Tiling:
    """Plans ``rows`` rows of ``row_bytes`` bytes, inputs and outputs together, for ``cores`` workers that have a buffer each.

    A tile of ``rows_per_iter`` rows fits the buffer wherever a single row does. Defaults are those of an Ascend vector core.
    """
    return Tiling(*_gdn.tiling(rows, row_bytes, cores, buffer_bytes, max_rows_per_iter))


def preset(name: str) -> tuple[Heads, str]:
    """The heads and the packing of a model known by name, as ``"Qwen/Qwen3-Next-80B-A3B-Instruct"``."""
    heads, packing = _gdn.preset(name)
    return Heads(*heads), packing


def empty_cache() -> int:
    """Lets go of the memory of freed tensors that is kept for later ones, and returns its bytes.

    Outputs of 64 KiB and more on the CPU get blocks of memory that are kept when they are freed, 64 of them and 512 MiB at most: memory
    that no cache knows, or fresh pages, would cost as much as the op and more.
    """
    return _gdn.empty_cache()
