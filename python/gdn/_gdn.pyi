"""The part of the package that is Rust."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, final

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

@final
class Settings:
    def __new__(
        cls,
        heads: Any,
        packing: str,
        l2norm_eps: float,
        norm_eps: float,
        scale: float | None,
        beta_scale: float,
        gate: str,
        weights: tuple[Any, ...],
    ) -> Settings: ...
    def refusal(self, op: str, device_type: str, conv_width: int) -> str | None: ...

def decode(
    settings: Settings,
    projections: Any,
    conv_state: Any,
    recurrent_state: Any,
    tokens_per_sequence: int,
    state_indices: Any | None,
    pad_slot_id: int,
    num_accepted_tokens: Any | None,
    output_state_indices: Any | None,
    disable_state_update: bool,
    intermediate_states: Any | None,
    intermediate_conv_windows: Any | None,
    intermediate_state_indices: Any | None,
    out: Any | None,
    only_check: bool,
) -> Any | None: ...
def shorten(function: Callable[..., Any], plain: Callable[..., Any]) -> tuple[bool, Callable[..., Any]]: ...
def prefill(
    settings: Settings,
    projections: Any,
    cu_seqlens: Any,
    conv_state: Any | None,
    recurrent_state: Any | None,
    state_indices: Any | None,
    pad_slot_id: int,
    has_initial_state: Any | None,
    checkpoint_every_n_tokens: int,
    checkpoint_starts: Any | None,
    state_checkpoints: Any | None,
    conv_checkpoints: Any | None,
    segments: bool,
    out: Any | None,
    only_check: bool,
) -> Any | None: ...
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
def register(torch: ModuleType, without: list[str] = ...) -> list[str]: ...
def tiling(
    rows: int, row_bytes: int, cores: int, buffer_bytes: int, max_rows_per_iter: int
) -> tuple[int, int, int]: ...
def features(heads: tuple[int, ...], packing: str) -> list[int]: ...
def shard(heads: tuple[int, ...], tp_size: int) -> list[int]: ...
def preset(name: str) -> tuple[list[int], str]: ...
def cuda_devices() -> list[str]: ...
def empty_cache() -> int: ...
def isa() -> str: ...
