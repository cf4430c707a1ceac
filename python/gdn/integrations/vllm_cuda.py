"""vLLM on CUDA: everything between the layer's two GEMMs through gdn.

`forward_cuda` of `QwenGatedDeltaNetAttention` becomes: the projections, vLLM's own operator
`qwen_gdn_attention_core_fused_norm_packed`, the output projection. That operator is the widest there is: it takes the projections as they are packed and
gives normed and gated heads, and vLLM cuts its graphs around it. It calls `_forward_core_fused_norm_packed`, which becomes gdn's:

    decode     one token of each sequence, first in a batch
    verify     the drafts of speculative decoding, as many of each sequence as there can be
    prefill    the rest: prompts, pieces of them

    kv_cache[0]   conv_state [slots, 3 + drafts, C], or [slots, C, 3 + drafts] by VLLM_SSM_CONV_STATE_LAYOUT=DS
    kv_cache[1]   recurrent state [slots, HV, DV, DK]
    slots         int32; 0 is nobody's

Both states are read and written in vLLM's own pages. What is left to vLLM: see `left` and `_parts`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

import gdn
from gdn.integrations import rewrite
from gdn.integrations.ops import Core

OPERATOR = "qwen_gdn_attention_core_fused_norm_packed"
METHOD = "_forward_core_fused_norm_packed"
SIGNATURES = {
    METHOD: ("self", "mixed_qkvz", "ba", "core_attn_out"),
    "_forward_core_fused_norm": ("self", "mixed_qkv", "b", "a", "output_gate", "core_attn_out"),
    "_forward_core": ("self", "mixed_qkv", "b", "a", "core_attn_out"),
}
SPLIT = "fix_query_key_value_ordering"
NULL_BLOCK = 0  # the slot of no sequence
#: Up to so many value heads of all sequences together drafts are gdn's: for more, vLLM's own kernels are as fast or faster
#: (benches/gpu/vllm_layer.py: 16 sequences of 32 heads, or 64 of 8, are faster with gdn, 64 of 32 slower).
MOST_DRAFTED_HEADS = 512

#: The op, its projections and states, its options; and which rows of the output are its, where they are not one behind the other.
Part = tuple[str, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], dict[str, Any], torch.Tensor | None]


def left(layer: Any) -> str | None:
    """Why vLLM's own path runs `layer` and not gdn's, or None."""
    if hasattr(layer, "in_proj_qkv"):
        return "separate projections"
    if layer.disable_tp_for_ba_proj and layer.tp_size > 1:
        return "projections of which one is split over ranks and the other is not"
    if layer.activation not in ("silu", "swish"):
        return f"a convolution with {layer.activation}"
    norm = layer.norm
    if norm.group_size is not None or not norm.norm_before_gate or norm.bias is not None:
        return "a norm of groups, or behind its gate, or with a bias"
    return None


def forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """`forward_cuda` through the operator, and through `own` where the layer is left to vLLM."""
    encode = importlib.import_module("vllm.utils.torch_utils")._encode_layer_name

    def forward_cuda(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if left(self) is not None:
            return own(self, hidden_states)
        mixed_qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        heads = (self.num_v_heads // self.tp_size, self.head_v_dim)
        core_attn_out = torch.zeros(
            (mixed_qkvz.shape[0], *heads), dtype=hidden_states.dtype, device=hidden_states.device
        )
        getattr(torch.ops.vllm, OPERATOR)(mixed_qkvz, ba, core_attn_out, layer_name=encode(self.prefix))
        output, _ = self.out_proj(core_attn_out.flatten(-2))
        return output

    return forward_cuda


def core_packed(
    own: Callable[..., Any],
    module: Any,
    ops: tuple[str, ...],
    logger: logging.Logger,
    trial: Callable[..., Any],
) -> Callable[..., Any]:
    """`_forward_core_fused_norm_packed` through gdn, for `ops`, and through `own` where something is left to vLLM.

    `module` is that of the layer. When the first layer is run to measure memory, before any request, `trial(layer, theirs, ours, like)` says how what gdn
    makes of a step differs from what vLLM makes of it, or None; where it differs, everything stays vLLM's.
    """
    state: dict[str, Any] = {}

    def theirs(self: Any, mixed_qkvz: torch.Tensor, ba: torch.Tensor, core_attn_out: torch.Tensor) -> None:
        if not self.gqa_interleaved_layout:
            return own(self, mixed_qkvz, ba, core_attn_out)
        heads = (self.num_k_heads // self.tp_size, self.num_v_heads // self.tp_size)
        if rewrite.goes_to_gdn(mixed_qkvz, *heads):
            parts = gdn.split(mixed_qkvz, ba, *heads, self.head_k_dim, self.head_v_dim)
        else:
            parts = rewrite.as_before(self, SPLIT, mixed_qkvz, ba)
        mixed_qkv, z, b, a = parts
        return self._forward_core_fused_norm(
            mixed_qkv=mixed_qkv, b=b, a=a, output_gate=z, core_attn_out=core_attn_out
        )

    def ours(self: Any, mixed_qkvz: torch.Tensor, ba: torch.Tensor, core_attn_out: torch.Tensor) -> None:
        metadata = module.get_forward_context().attn_metadata
        metadata = metadata.get(self.prefix) if isinstance(metadata, dict) else None
        if metadata is None:  # a run to measure memory
            own(self, mixed_qkvz, ba, core_attn_out)  # which warms its kernels up, whatever the packing
            return
        core = _core(self, logger)
        parts = _parts(self, module, metadata, mixed_qkvz, ba, core_attn_out)
        if parts is None or not all(
            part[0] in ops and core.takes(part[0], part[1], *part[2], **part[3]) for part in parts
        ):
            theirs(self, mixed_qkvz, ba, core_attn_out)
            return
        for op, projections, states, how, places in parts:
            run = core.layer.prefill if op == "prefill" else core.layer.decode
            done = run(projections, *states, **how)
            if places is not None:
                core_attn_out.index_copy_(0, places, done)

    def tried(self: Any, mixed_qkvz: torch.Tensor, ba: torch.Tensor, core_attn_out: torch.Tensor) -> None:
        if "why" not in state:
            state["why"] = None  # the trial calls this method, too
            state["why"] = trial(self, theirs, ours, mixed_qkvz)
            if state["why"] is not None:
                logger.warning(
                    "gdn leaves everything between the layer's GEMMs to vLLM: on a step of its own %s",
                    state["why"],
                )
        (ours if state["why"] is None else theirs)(self, mixed_qkvz, ba, core_attn_out)

    return tried


def _core(layer: Any, logger: logging.Logger) -> Core:
    """The layer's core, of this rank, with vLLM's own tensors; made anew where the layer was given others."""
    tensors = (layer.conv1d.weight, layer.conv1d.bias, layer.A_log, layer.dt_bias, layer.norm.weight)
    core = vars(layer).get("_gdn_core")
    if core is None or not core.is_of(tensors):
        heads = (layer.num_k_heads // layer.tp_size, layer.num_v_heads // layer.tp_size)
        made = gdn.Layer(
            (*heads, layer.head_k_dim, layer.head_v_dim),
            "interleaved" if layer.gqa_interleaved_layout else "contiguous",
            conv_weight=tensors[0],
            conv_bias=tensors[1],
            A_log=tensors[2],
            dt_bias=tensors[3],
            norm_weight=tensors[4],
            norm_eps=layer.norm.eps,
            gate="sigmoid" if layer.norm.activation == "sigmoid" else "silu",
        )
        core = vars(layer)["_gdn_core"] = Core(made, tensors, logger)
    return core


def _parts(
    layer: Any,
    module: Any,
    metadata: Any,
    mixed_qkvz: torch.Tensor,
    ba: torch.Tensor,
    out: torch.Tensor,
) -> list[Part] | None:
    """The calls that a step is made of, or None for what is vLLM's.

    vLLM's are: states that prefill has to put out for the cache of prefixes (`mamba_cache_mode="align"` with FlashInfer), drafts of unlike
    lengths, drafts that are fewer than there can be, since what was accepted before may be more than these, and drafts of many sequences.
    """
    if metadata.checkpoint is not None or metadata.flashinfer_checkpoint_plan is not None:
        return None
    conv, state = layer.kv_cache[0], layer.kv_cache[1]
    conv = conv if module.is_conv_state_dim_first() else conv.transpose(-1, -2)
    # vLLM keeps the inputs of the convolution in the first columns, drafts or not.
    states = conv[:, :, : layer.conv1d.weight.shape[-1] - 1], state
    rows = metadata.num_actual_tokens
    drafts, others = None, None
    if metadata.spec_sequence_masks is not None:
        slots = metadata.spec_state_indices_tensor
        tokens = slots.shape[1]
        if metadata.uniform_spec_sequence_length != tokens:
            return None
        sequences = metadata.num_spec_decodes
        if sequences * out.shape[-2] > MOST_DRAFTED_HEADS:
            return None
        verify = dict(
            tokens_per_sequence=tokens,
            state_indices=slots[:sequences],
            num_accepted_tokens=metadata.num_accepted_tokens[:sequences],
            pad_slot_id=NULL_BLOCK,
        )
        if metadata.num_prefills == 0 and metadata.num_decodes == 0:
            end = sequences * tokens
            if end != rows:
                return None
            packed = mixed_qkvz[:end], ba[:end]
            return [("verify", packed, (conv, state), verify | {"out": out[:end]}, None)]
        drafts, others = metadata.spec_token_indx, metadata.non_spec_token_indx
        packed = mixed_qkvz.index_select(0, drafts), ba.index_select(0, drafts)
        parts: list[Part] = [("verify", packed, (conv, state), verify, drafts)]
    else:
        parts = []
    slots = metadata.non_spec_state_indices_tensor
    if metadata.num_prefills == 0:
        if metadata.num_decodes == 0 or slots.shape[0] < rows:
            return None
        how = dict(state_indices=slots[:rows], pad_slot_id=NULL_BLOCK, out=out[:rows])
        return [("decode", (mixed_qkvz[:rows], ba[:rows]), states, how, None)]
    start = 0 if others is not None else metadata.num_decode_tokens
    if start > 0:
        how = dict(state_indices=slots[:start], pad_slot_id=NULL_BLOCK, out=out[:start])
        parts.append(("decode", (mixed_qkvz[:start], ba[:start]), states, how, None))
    sequences = metadata.prefill_query_start_loc.shape[0] - 1
    how = dict(
        state_indices=metadata.prefill_state_indices[:sequences],
        pad_slot_id=NULL_BLOCK,
        has_initial_state=metadata.prefill_has_initial_state[:sequences],
    )
    if others is None:
        end = start + metadata.num_prefill_tokens
        packed = mixed_qkvz[start:end], ba[start:end]
        how["out"] = out[start:end]
    else:
        packed = mixed_qkvz.index_select(0, others), ba.index_select(0, others)
    parts.append(("prefill", packed, (metadata.prefill_query_start_loc, *states), how, others))
    return parts
