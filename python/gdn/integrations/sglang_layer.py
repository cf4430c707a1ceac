"""SGLang on a GPU: everything between the two GEMMs of its Gated DeltaNet layers, through gdn.

`forward` of `Qwen3GatedDeltaNet` and `Qwen3_5GatedDeltaNet` becomes: the projections, one call of `gdn.Layer`, the output projection. It
does what `GDNAttnBackend.forward_decode` and `forward_extend` do between them, with the backend's metadata and in the pool's own
tensors, and the norm:

    decode     `packed_decode` and `decode`: one token of each sequence
    verify     `target_verify`: T draft tokens of each; states and windows after each token go where SGLang keeps them
    prefill    `extend`: also mixed batches, with the states that the prefix cache wants

    conv        [slots, C, 3]                    temporal                  [slots, HV, DV, DK]
    intermediate_conv_window [rows, T, C, 3]     intermediate_ssm          [rows, T, HV, DV, DK]
    slots       int32, -1 for what is padding

What is left to SGLang: see `_step`.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

import gdn
from gdn.integrations import known
from gdn.integrations.ops import Core

BACKEND = "sglang.srt.layers.attention.linear.gdn_backend"
HYBRID = "sglang.srt.layers.attention.hybrid_linear_attn_backend"
ATTENTION = "sglang.srt.layers.radix_linear_attention"
UTILS = "sglang.srt.layers.attention.linear.utils"
CONTEXT = "sglang.srt.model_executor.forward_context"
GRAPHS = "sglang.srt.model_executor.runner_utils.prefill_graph"
PLATFORM = "sglang.srt.utils"
#: What the hook does itself or reads the work of: (module, class): functions.
SOURCES = {
    (BACKEND, "GDNAttnBackend"): {
        "forward_decode": ("80fb76f13520d30d",),
        "forward_extend": ("41563017bfb3c164",),
    },
    (HYBRID, "HybridLinearAttnBackend"): {"forward": ("66af09a4052f70b4",)},
    (ATTENTION, "RadixLinearAttention"): {"forward": ("332fdafd795ef66f",)},
    (ATTENTION, None): {"_linear_attention_with_output_impl": ("b2b8dff3845db95e",)},
    (HYBRID, "MambaAttnBackendBase"): {
        "_forward_metadata": ("ba5c3cc1deb01af9",),
        "_init_track_conv_indices": ("3aa85ff2f4d0cff1",),
        "_init_track_ssm_indices": ("98d02024ff85ac00",),
        "_track_mamba_state_decode": ("b65356375e37dcc2",),
        "_track_mamba_state_extend": ("4fe1c5df4b1c61fc",),
    },
    (UTILS, None): {"select_verify_intermediate_state_indices": ("2a5883303d2db957",)},
}
NORMS = ("RMSNorm", "FusedRMSNormGated")
GATES = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}


def around(packing: str, ops: tuple[str, ...], logger: logging.Logger) -> Callable[..., Any]:
    """The hook around `forward` of a layer whose projections are packed so."""
    engine: list[
        Any
    ] = []  # filled at the first call: the backend's modules are not there when the layer's is imported

    def forward(original: Callable[..., Any], layer: Any, hidden_states: Any, forward_batch: Any) -> Any:
        if torch.compiler.is_compiling() or forward_batch.forward_mode.is_idle():
            return original(layer, hidden_states, forward_batch)
        if not engine:
            engine.append(_engine(logger))
        step = None if engine[0] is None else _step(engine[0], layer, forward_batch, hidden_states.shape[0])
        if step is None or step[0] not in ops:
            return original(layer, hidden_states, forward_batch)
        _, rows, run = step
        mixed_qkvz, mixed_ba = layer._forward_input_proj(hidden_states)
        heads = (layer.attn.num_v_heads, layer.attn.head_v_dim)
        out = mixed_qkvz.new_empty(mixed_qkvz.shape[0], *heads)
        core = _core(layer, packing, logger)
        if not run(core, (mixed_qkvz[:rows], mixed_ba[:rows]), out[:rows]):
            with _given(layer, mixed_qkvz, mixed_ba):
                return original(layer, hidden_states, forward_batch)
        if rows < out.shape[0]:
            out[rows:].zero_()  # padding, which what follows reads
        return layer.out_proj(out.flatten(-2))[0]

    return forward


def _engine(logger: logging.Logger) -> Any:
    """SGLang's names that the hook needs. None where SGLang is not the known one, or runs on no GPU of NVIDIA's."""
    if not importlib.import_module(PLATFORM).is_cuda():
        return None
    try:
        for (name, cls), functions in SOURCES.items():
            module = importlib.import_module(name)
            where = module if cls is None else getattr(module, cls)
            known.check_sources("sglang", where, functions)
            for function in functions:
                if hasattr(inspect.getattr_static(where, function), "__wrapped__"):
                    raise known.UnknownEngine(f"another plugin has hooks on {name}.{cls}.{function}")
    except known.UnknownEngine as refused:
        logger.warning("gdn leaves everything between the layer's GEMMs to SGLang: %s", refused)
        return None
    return SimpleNamespace(
        backend=importlib.import_module(BACKEND).GDNAttnBackend,
        get_backend=importlib.import_module(CONTEXT).get_attn_backend,
        is_in_graph_of_prefill=importlib.import_module(GRAPHS).is_in_prefill_graph_scope,
        select_rows=importlib.import_module(UTILS).select_verify_intermediate_state_indices,
    )


@contextmanager
def _given(layer: Any, *projections: torch.Tensor) -> Iterator[None]:
    """Inside, the layer has its projections and does not make them again."""
    attributes, name = vars(layer), "_forward_input_proj"
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = lambda hidden_states: projections
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)


def _is_known(layer: Any) -> bool:
    """Whether the layer is as SGLang makes it, and nobody watches its parts."""
    attn, norm = layer.attn, layer.norm
    if type(norm).__name__ not in NORMS or norm.bias is not None or norm.activation not in GATES:
        return False
    if getattr(norm, "group_size", None) is not None or not getattr(norm, "norm_before_gate", True):
        return False
    if attn.lower_bound is not None or attn.activation not in ("silu", "swish"):
        return False
    if (attn.num_q_heads, attn.head_q_dim) != (attn.num_k_heads, attn.head_k_dim):
        return False
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, attn._forward_hooks, attn._forward_pre_hooks)
    return not any(hooks)


def _core(layer: Any, packing: str, logger: logging.Logger) -> Core:
    """The layer's core, with SGLang's own tensors; made anew where the layer was given others."""
    attn, norm = layer.attn, layer.norm
    tensors = (attn.conv_weights, attn.bias, attn.A_log, attn.dt_bias, norm.weight)
    core = vars(layer).get("_gdn_core")
    if core is None or not core.is_of(tensors):
        names = ("conv_weight", "conv_bias", "A_log", "dt_bias", "norm_weight")
        made = gdn.Layer(
            (attn.num_k_heads, attn.num_v_heads, attn.head_k_dim, attn.head_v_dim),
            packing,
            **dict(zip(names, tensors, strict=True)),
            norm_eps=norm.eps,
            gate=GATES[norm.activation],
        )
        core = vars(layer)["_gdn_core"] = Core(made, tensors, logger)
    return core


def _step(engine: Any, layer: Any, batch: Any, rows: int) -> tuple[str, int, Callable[..., bool]] | None:
    """What this step of a layer is: the op, how many of its rows are no padding, and how it is run. None for what is SGLang's.

    SGLang's are: layers that are not as it makes them, prefill that is captured in a graph, backends of other accelerators and of two
    batches at once, states as ReplaySSM keeps them, multi-item scoring, drafts that are trees or of unlike lengths, and modes
    other than decode, verify, extend and mixed.
    """
    backend, mode = engine.get_backend(), batch.forward_mode
    backend = getattr(backend, "linear_attn_backend", backend)
    if type(backend) is not engine.backend or not _is_known(layer):
        return None
    if engine.is_in_graph_of_prefill() and mode.is_extend():
        return None
    metadata = backend.forward_metadata
    if backend.mis_metadata is not None or metadata.replayssm_write_pos is not None:
        return None
    is_verify = mode.is_target_verify()
    if mode.is_extend() and not is_verify and batch.global_num_token_non_padded_cpu is not None:
        rows = min(rows, batch.global_num_token_non_padded_cpu)
    cache = backend.req_to_token_pool.mamba2_layer_cache(layer.attn.layer_id)
    if rows == 0 or cache.replayssm_d is not None or cache.replayssm_rawv is not None:
        return None
    slots = metadata.mamba_cache_indices
    if batch.logical_forward_mode.is_decode():
        if rows != slots.shape[0]:
            return None
        return "decode", rows, _Decode(backend, layer.attn, batch, cache, slots)
    if is_verify:
        tokens = batch.spec_info.draft_token_num
        ragged = getattr(batch.spec_info, "ragged_verify_layout", None)
        is_chain = metadata.retrieve_parent_token is None and ragged is None
        if not is_chain or cache.intermediate_ssm is None or rows % tokens or rows // tokens > slots.shape[0]:
            return None
        slots = slots[: rows // tokens]
        places = backend.verify_intermediate_state_indices
        size = backend.req_to_token_pool.size
        places = engine.select_rows(places, batch.req_pool_indices, slots >= 0, size)[: slots.shape[0]]
        return "verify", rows, _Verify(cache, slots, places, tokens)
    if mode.name in ("EXTEND", "MIXED"):
        return "prefill", rows, _Prefill(backend, batch, cache, slots)
    return None


class _Decode:
    def __init__(self, backend: Any, attn: Any, batch: Any, cache: Any, slots: torch.Tensor) -> None:
        self.backend, self.attn, self.batch, self.cache, self.slots = backend, attn, batch, cache, slots

    def __call__(self, core: Core, projections: tuple[torch.Tensor, ...], out: torch.Tensor) -> bool:
        conv, state = self.cache.conv[0], self.cache.temporal
        how = dict(state_indices=self.slots, out=out)
        if not core.takes("decode", projections, conv, state, **how):
            return False
        core.layer.decode(projections, conv, state, **how)
        self.backend._track_mamba_state_decode(self.batch, conv, state, self.slots, self.attn.layer_id)
        return True


class _Verify:
    def __init__(self, cache: Any, slots: torch.Tensor, rows: torch.Tensor, tokens: int) -> None:
        self.cache, self.slots, self.rows, self.tokens = cache, slots, rows, tokens

    def __call__(self, core: Core, projections: tuple[torch.Tensor, ...], out: torch.Tensor) -> bool:
        conv, state, windows = self.cache.conv[0], self.cache.temporal, self.cache.intermediate_conv_window[0]
        how = dict(
            tokens_per_sequence=self.tokens,
            state_indices=self.slots,
            intermediate_states=self.cache.intermediate_ssm,
            intermediate_state_indices=self.rows,
            out=out,
        )
        shared = None if windows.is_cuda else _shared(windows)
        if shared is None:
            how["intermediate_conv_windows"] = windows
        else:
            how["disable_state_update"] = (
                True  # of the convolution's; the other has its `intermediate_states`
            )
            if core.layer.packing == "interleaved":
                projections = gdn.split(*projections, *core.layer.heads)
        if not core.takes("verify", projections, conv, state, **how):
            return False
        if shared is not None:
            self._keep_windows(shared, conv, projections[0])
        core.layer.decode(projections, conv, state, **how)
        return True

    def _keep_windows(self, shared: torch.Tensor, conv: torch.Tensor, inputs: torch.Tensor) -> None:
        """What lies before the call and the call's inputs, in `shared`. Of rows of padding, whose slot is -1, nothing is read."""
        slots, width = self.slots.long(), conv.shape[2]
        channels = shared.shape[1]
        taken = inputs[:, :channels].unflatten(0, (-1, self.tokens)).transpose(1, 2)
        shared[self.rows.long()] = torch.cat([conv[slots][:, :, width - 2 :], taken.to(shared.dtype)], dim=2)


def _shared(windows: torch.Tensor) -> torch.Tensor | None:
    """Where windows of consecutive tokens share memory, that memory, [rows, C, T + 2]; None where each has its own.

    SGLang keeps for T tokens T + 2 inputs, and a view of them that moves on by one input a token. On CUDA gdn writes to that view.
    """
    rows, tokens, channels, width = windows.shape
    if tokens == 1 or windows.stride(1) != windows.stride(3):
        return None
    strides = (windows.stride(0), windows.stride(2), windows.stride(3))
    return windows.as_strided((rows, channels, tokens + width - 1), strides)


class _Prefill:
    def __init__(self, backend: Any, batch: Any, cache: Any, slots: torch.Tensor) -> None:
        self.backend, self.batch, self.cache, self.slots = backend, batch, cache, slots

    def __call__(self, core: Core, projections: tuple[torch.Tensor, ...], out: torch.Tensor) -> bool:
        metadata, batch = self.backend.forward_metadata, self.batch
        conv, state = self.cache.conv[0], self.cache.temporal
        how = dict(state_indices=self.slots, has_initial_state=batch.extend_prefix_lens > 0, out=out)
        inner = None
        if metadata.has_mamba_track_mask and metadata.track_ssm_h_src.numel() > 0:
            inner = self._checkpoints(state, out.shape[0])
            how |= inner
        if not core.takes("prefill", projections, metadata.query_start_loc, conv, state, **how):
            return False
        if metadata.has_mamba_track_mask:
            self._track_windows(core.layer, projections, conv)
        core.layer.prefill(projections, metadata.query_start_loc, conv, state, **how)
        if metadata.has_mamba_track_mask:
            states = None if inner is None else inner["state_checkpoints"].unsqueeze(0)
            self.backend._track_mamba_state_extend(batch, states, state, metadata)
        return True

    def _checkpoints(self, state: torch.Tensor, rows: int) -> dict[str, Any]:
        """Room for the states inside the sequences, numbered as SGLang numbers those of its chunks.

        There chunk i of a sequence has the state before it; here a checkpoint is the state after as many tokens. So those of a sequence begin
        at its second chunk. The state before its first is never asked for, nor is that after its last here.
        """
        every, lengths = self.backend.mamba_chunk_size, self.batch.extend_seq_lens
        chunks = (lengths + (every - 1)) // every
        starts = torch.cumsum(chunks, 0) - chunks + 1
        most = rows // every + lengths.shape[0]  # chunks there can be
        return dict(
            checkpoint_every_n_tokens=every,
            checkpoint_starts=starts.to(torch.int32),
            state_checkpoints=state.new_empty(most + 1, *state.shape[1:]),
        )

    def _track_windows(
        self, layer: gdn.Layer, projections: tuple[torch.Tensor, ...], conv: torch.Tensor
    ) -> None:
        """The inputs of the convolution at the places that the prefix cache wants, into its slots."""
        metadata = self.backend.forward_metadata
        places = metadata.track_conv_indices
        taken = [one[places.flatten()] for one in projections]
        if layer.packing == "interleaved":
            taken = gdn.split(*taken, *layer.heads)
        inputs = taken[0][:, : conv.shape[1]].unflatten(0, tuple(places.shape))
        conv[metadata.conv_states_mask_indices] = inputs.transpose(1, 2).to(conv.dtype)
