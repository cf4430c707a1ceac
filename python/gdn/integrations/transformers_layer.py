"""The `forward` of transformers' Gated DeltaNet layers in inference: GEMM, `gdn.Layer`, GEMM.

States stay in transformers' cache as it lays them out, and are brought up to date in place: `conv_states`
[B, C, W], W columns where W - 1 are needed, and `recurrent_states` [B, HV, DK, DV].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import assume_constant_result, is_dynamo_compiling

import gdn
from gdn import _gdn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: What the layers' own functions do not heed, and kernels that take their place do.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def in_inference(
    original: Callable[..., Any], modeling: Any, norm: type, cache_layer: type
) -> Callable[..., Any]:
    """A `forward` that is gdn's in inference, and `original` elsewhere.

    `modeling` is the module of the layer, `norm` the class of its norm, `cache_layer` the class of layers of
    a cache whose states are known.
    """
    core = modeling.force_accelerate_hooks(["conv1d", "norm"])(_core)

    @functools.wraps(original)
    def forward(
        self: Any,
        hidden_states: Any,
        cache_params: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        if _is_for_gdn(self, hidden_states, norm, kwargs):
            is_known, cache = _cache(self, hidden_states, cache_params, cache_layer)
            heads = (self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim)
            op = "decode" if _is_step(hidden_states, cache) else "prefill"
            if is_known and _has_kernel(op, heads, self.conv_kernel_size, hidden_states.device.type):
                return core(self, modeling.apply_mask_to_padding_states(hidden_states, attention_mask), cache)
        return original(self, hidden_states, cache_params, attention_mask, **kwargs)

    return forward


@assume_constant_result
def _has_kernel(op: str, heads: tuple[int, int, int, int], conv_width: int, device_type: str) -> bool:
    """Whether `gdn.Layer` has `op` for such layers there: a GPU takes some dims only."""
    return _kernels(op, heads, conv_width, device_type)


@functools.cache
def _kernels(op: str, heads: tuple[int, int, int, int], conv_width: int, device_type: str) -> bool:
    settings = _gdn.Settings(heads, "interleaved", 1e-6, 1e-6, None, 1.0, "silu", ())
    return settings.refusal(op, device_type, conv_width) is None


def _is_step(hidden_states: Any, cache: Any) -> bool:
    """Whether this is one token behind those that a cache's layer has seen."""
    return cache is not None and cache.has_previous_state[0] and hidden_states.shape[1] == 1


def _is_for_gdn(layer: Any, hidden_states: Any, norm: type, kwargs: dict[str, Any]) -> bool:
    """Whether nobody wants a derivative, and the layer is as it was made."""
    if hidden_states.dtype not in DTYPES:
        return False
    if torch.is_grad_enabled():
        parameters = (hidden_states, *layer.parameters())
        if any(one.requires_grad for one in parameters):
            return False
    if forward_ad._current_level >= 0:
        return False
    if not is_dynamo_compiling() and torch._C._are_functorch_transforms_active():
        return False
    if any(kwargs.get(name) is not None for name in PACKED):
        return False
    # Hooks are to see what goes in and out.
    is_own = type(layer.norm) is norm and type(layer.conv1d) is torch.nn.Conv1d
    hooks = (layer.norm._forward_hooks, layer.norm._forward_pre_hooks)
    hooks += (layer.conv1d._forward_hooks, layer.conv1d._forward_pre_hooks)
    return is_own and not any(hooks) and layer.activation == "silu" and layer.norm.activation == "silu"


def _cache(layer: Any, hidden_states: Any, cache: Any, cache_layer: type) -> tuple[bool, Any]:
    """The layer of a cache, or `None` without one; and whether its states are as they are known."""
    if cache is None:
        return True, None
    one = cache.layers[layer.layer_idx]
    if not isinstance(one, cache_layer) or one.record_past or one.number_of_states != 1:
        return False, None
    width = layer.conv_kernel_size
    for states, is_there in (
        (one.conv_states[0], one.is_conv_states_initialized[0]),
        (one.recurrent_states[0], one.is_recurrent_states_initialized[0]),
    ):
        if is_there and (states.device != hidden_states.device or states.shape[0] != hidden_states.shape[0]):
            return False, None
    is_known = not one.is_conv_states_initialized[0] or one.conv_kernel_size[0] == width
    # Half of a state is none that the layer itself would leave behind.
    return is_known and (not one.has_previous_state[0] or one.is_recurrent_states_initialized[0]), one


def _states(layer: Any, cache: Any, like: Any, batch_size: int) -> tuple[Any, Any]:
    """Both states of a cache, made where there are none yet, as its own methods make them."""
    if not cache.is_conv_states_initialized[0]:
        none_yet = like.new_empty((batch_size, layer.conv_dim, 0))
        cache.lazy_initialization(conv_states=none_yet, state_idx=0, conv_kernel_size=layer.conv_kernel_size)
    if not cache.is_recurrent_states_initialized[0]:
        shape = (batch_size, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
        # One element stands for all: the cache makes zeros of that shape.
        like = torch.zeros((), dtype=torch.float32, device=like.device).expand(shape)
        cache.lazy_initialization(recurrent_states=like, state_idx=0)
    return cache.conv_states[0], cache.recurrent_states[0].transpose(-1, -2)


def _core(self: Any, hidden_states: Any, cache: Any) -> Any:
    """The layer's output, from hidden states [batch, seq, hidden] that are masked already."""
    batch_size, seq_len, _ = hidden_states.shape
    rows = hidden_states.flatten(0, 1)
    if hasattr(self, "in_proj_qkvz"):
        projections = (self.in_proj_qkvz(rows), self.in_proj_ba(rows))
    else:
        named = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        projections = tuple(projection(rows) for projection in named)
    layer = gdn.Layer.from_module(self)
    states = (None, None) if cache is None else _states(self, cache, projections[0], batch_size)
    if _is_step(hidden_states, cache):
        out = layer.decode(projections, *states)
    else:
        ends = torch.arange(batch_size + 1, dtype=torch.int32, device=rows.device) * seq_len
        fresh = None
        if cache is not None and not cache.has_previous_state[0]:
            fresh = torch.zeros(batch_size, dtype=torch.uint8, device=rows.device)
        out = layer.prefill(projections, ends, *states, has_initial_state=fresh)
        if cache is not None:
            cache.has_previous_state[0] = True
    return self.out_proj(out.flatten(1).unflatten(0, (batch_size, seq_len)))
