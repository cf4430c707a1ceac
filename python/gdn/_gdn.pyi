"""The part of the package that is Rust."""

from types import ModuleType
from typing import Any

__version__: str

def split(
    mixed_qkvz: Any,
    mixed_ba: Any,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str,
    out: Any | None = None,
) -> tuple[Any, Any, Any, Any] | None: ...
def merge(
    mixed_qkv: Any,
    z: Any,
    b: Any,
    a: Any,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str,
    out: Any | None = None,
) -> tuple[Any, Any] | None: ...
def repack_weight(
    weight: Any, heads: tuple[int, ...], dim: int, projection: str | None, to: str, block: int, group: int
) -> Any: ...
def weight_moves(
    shape: tuple[int, ...],
    heads: tuple[int, ...],
    dim: int,
    projection: str | None,
    to: str,
    block: int,
    group: int,
) -> list[tuple[int, int]]: ...
def register(torch: ModuleType, without: list[str] = ...) -> None: ...
def tiling(
    rows: int, row_bytes: int, cores: int, buffer_bytes: int, max_rows_per_iter: int
) -> tuple[int, int, int]: ...
def features(heads: tuple[int, ...], packing: str) -> list[int]: ...
def shard(heads: tuple[int, ...], tp_size: int) -> list[int]: ...
def preset(name: str) -> tuple[list[int], str]: ...
def cuda_devices() -> list[str]: ...
def empty_cache() -> int: ...
def isa() -> str: ...
