"""vLLM on a CPU: everything between the layer's two GEMMs, in one operator of gdn's.

`forward_cpu` of `QwenGatedDeltaNetAttention` becomes: the two projections, `torch.ops.vllm.gdn_core_cpu`, the
output projection. The operator reads the engine's metadata of the step, as `cpu_gdn_attention_core` does, and
calls `gdn.Layer.decode` for the decodes, which come first in a batch, and `gdn.Layer.prefill` for the rest.
It reads and writes the engine's own pages:

    kv_cache[0]   conv_state [slots, 3, C], or [slots, C, 3] by VLLM_SSM_CONV_STATE_LAYOUT=DS; bf16
    kv_cache[1]   [slots, HV, DV, DK] by its shape, and in memory [slots, HV, DK, DV]; f32

What is left to the engine: see `left`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

import gdn

ATTENTION = "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention"
OPERATOR = "gdn_core_cpu"
L2NORM_EPS = 1e-5  # of vLLM's operators on a CPU; 1e-6 everywhere else
NULL_BLOCK = 0  # the slot of no sequence


def left(layer: Any) -> str | None:
    """Why vLLM's own path runs `layer` and not gdn's, or None."""
    if layer.num_spec > 0:
        return "speculative decoding"
    if hasattr(layer, "in_proj_qkv"):
        return "separate projections"
    if layer.activation not in ("silu", "swish"):
        return f"a convolution with {layer.activation}"
    norm = layer.norm
    if norm.group_size is not None or not norm.norm_before_gate:
        return "a norm of groups, or behind its gate"
    return None


def layer_of(layer: Any) -> gdn.Layer:
    """The weights of vLLM's `layer`, of this rank. They are vLLM's own tensors."""
    weight = getattr(layer.conv1d, "_cpu_unpacked_conv_weight", layer.conv1d.weight)
    heads = (layer.num_k_heads // layer.tp_size, layer.num_v_heads // layer.tp_size)
    return gdn.Layer(
        (*heads, layer.head_k_dim, layer.head_v_dim),
        "interleaved" if layer.gqa_interleaved_layout else "contiguous",
        conv_weight=weight.detach().flatten(1),
        conv_bias=layer.conv1d.bias,
        A_log=layer.A_log.detach(),
        dt_bias=layer.dt_bias.detach(),
        norm_weight=layer.norm.weight.detach(),
        l2norm_eps=L2NORM_EPS,
        norm_eps=layer.norm.eps,
        gate="sigmoid" if layer.norm.activation == "sigmoid" else "silu",
    )


def states_of(layer: Any, dim_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`conv_state` [slots, C, W - 1] and the state [slots, HV, DV, DK], views of the engine's pages."""
    conv, state = layer.kv_cache
    slots, heads, v_dim, k_dim = state.shape
    return conv if dim_first else conv.transpose(1, 2), state.view(slots, heads, k_dim, v_dim).transpose(2, 3)


def run(
    core: gdn.Layer,
    states: tuple[torch.Tensor, torch.Tensor],
    metadata: Any,
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """One step of one layer: the decodes, then the prefills. Rows of padding are left as they are."""
    slots, starts = metadata.non_spec_state_indices_tensor, metadata.non_spec_query_start_loc
    decodes, rows = metadata.num_decodes, metadata.num_decode_tokens
    if decodes:
        packed = mixed_qkvz[:rows], mixed_ba[:rows]
        core.decode(packed, *states, state_indices=slots[:decodes], pad_slot_id=NULL_BLOCK, out=out[:rows])
    if metadata.num_prefills:
        sequences, end = decodes + metadata.num_prefills, rows + metadata.num_prefill_tokens
        packed = mixed_qkvz[rows:end], mixed_ba[rows:end]
        core.prefill(
            packed,
            starts[decodes : sequences + 1] - rows,
            *states,
            state_indices=slots[decodes:sequences],
            pad_slot_id=NULL_BLOCK,
            has_initial_state=metadata.has_initial_state[decodes:sequences],
            out=out[rows:end],
        )


def gdn_core_cpu(mixed_qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor, layer_name: Any) -> None:
    """The operator: from packed projections to normed and gated heads, `out` [N, HV, DV]."""
    attention = importlib.import_module(ATTENTION)
    context = attention.get_forward_context()
    layer = context.no_compile_layers[attention._resolve_layer_name(layer_name)]
    if context.attn_metadata is None:  # a run to measure memory
        return
    metadata = context.attn_metadata[layer.prefix]
    if metadata.num_actual_tokens == 0:
        return
    core = vars(layer).get("_gdn_core")
    if core is None:
        core = vars(layer)["_gdn_core"] = layer_of(layer)
    run(core, states_of(layer, attention.is_conv_state_dim_first()), metadata, mixed_qkvz, ba, out)


def _fake(mixed_qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor, layer_name: Any) -> None:
    pass


def register() -> None:
    """`torch.ops.vllm.gdn_core_cpu`, once in a process."""
    if hasattr(torch.ops.vllm, OPERATOR):
        return
    utils = importlib.import_module("vllm.utils.torch_utils")
    tensors = dict.fromkeys(("mixed_qkvz", "ba", "out"), torch.Tensor)
    gdn_core_cpu.__annotations__ = {**tensors, "layer_name": utils.LayerNameType, "return": None}
    utils.direct_register_custom_op(OPERATOR, gdn_core_cpu, mutates_args=["out"], fake_impl=_fake)


def forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """`forward_cpu` through gdn, and through `own` where something is left to the engine."""
    encode = importlib.import_module("vllm.utils.torch_utils")._encode_layer_name

    def forward_cpu(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if left(self) is not None:
            return own(self, hidden_states)
        mixed_qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        heads = (self.num_v_heads // self.tp_size, self.head_v_dim)
        out = torch.zeros(mixed_qkvz.shape[0], *heads, dtype=hidden_states.dtype, device=hidden_states.device)
        torch.ops.vllm.gdn_core_cpu(mixed_qkvz, ba, out, encode(self.prefix))
        output, _ = self.out_proj(out.flatten(-2))
        return output

    return forward_cpu
