"""One Gated DeltaNet layer of SGLang's on its own backend and kernels, without the rest of SGLang.

SGLang's files are imported from its wheel (peers.py) inside `stand_ins.engine`: the layers of Qwen3-Next and Qwen3.5, the backends, the metadata,
the kernels. Weights, projections and the pool of states are made here, as its own pool lays them out.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import oracle_layer as ol
import sglang_kernels
import torch

MODELS = {
    "interleaved": ("sglang.srt.models.qwen3_next", "Qwen3GatedDeltaNet"),
    "contiguous": ("sglang.srt.models.qwen3_5", "Qwen3_5GatedDeltaNet"),
}
OPS, SRT = "sglang.kernels.ops", "sglang.srt"
LINEAR = f"{SRT}.layers.attention.linear"
BACKEND, HYBRID = f"{LINEAR}.gdn_backend", f"{SRT}.layers.attention.hybrid_linear_attn_backend"
REAL = {
    "sglang.srt.plugins",
    "sglang.srt.plugins.hook_registry",
    f"{SRT}.environ",
    *(module for module, _ in MODELS.values()),
    BACKEND,
    HYBRID,
    f"{LINEAR}.utils",
    f"{LINEAR}.kernels.gdn_triton",
    f"{LINEAR}.kernels.kernel_backend",
    f"{SRT}.layers.attention.base_attn_backend",
    f"{SRT}.layers.attention.mamba.mamba2_metadata",
    f"{SRT}.layers.attention.mamba.prefill_track_metadata",
    f"{SRT}.layers.radix_linear_attention",
    f"{SRT}.model_executor.forward_context",
    f"{OPS}.attention.triton_gdn_fused_proj",
    f"{OPS}.attention.linear.fused_sigmoid_gating_recurrent",
    f"{OPS}.attention.linear.fused_gdn_gating",
    f"{OPS}.mamba.causal_conv1d_triton",
    f"{OPS}.mamba.mamba_state_scatter_triton",
    *(
        f"{OPS}.attention.fla.{name}"
        for name in "chunk chunk_delta_h chunk_fwd chunk_o cumsum fused_norm_gate fused_recurrent index".split()
    ),
    *(f"{OPS}.attention.fla.{name}" for name in "l2norm layernorm_gated op utils wy_fast".split()),
}


class Struct:
    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def yes(*_: Any) -> bool:
    return True


def no(*_: Any) -> bool:
    return False


class Mode(Enum):
    """SGLang's ForwardMode, as far as steps of a layer go."""

    EXTEND, DECODE, MIXED, IDLE, TARGET_VERIFY = range(5)

    def is_extend(self, **_: Any) -> bool:
        return self in (Mode.EXTEND, Mode.MIXED, Mode.TARGET_VERIFY)

    def is_extend_without_speculative(self) -> bool:
        return self in (Mode.EXTEND, Mode.MIXED)

    def is_decode(self) -> bool:
        return self is Mode.DECODE

    def is_idle(self) -> bool:
        return self is Mode.IDLE

    def is_target_verify(self) -> bool:
        return self is Mode.TARGET_VERIFY


def given() -> dict[str, dict[str, Any]]:
    """What the stand-ins have."""
    import triton

    platform = dict(is_cuda=yes, device_context=lambda device: torch.device(device))
    for name in "is_cpu is_hip is_npu is_xpu is_gfx95_supported cpu_has_amx_support".split():
        platform[name] = no
    platform |= dict(cdiv=triton.cdiv, next_power_of_2=triton.next_power_of_2)
    if torch.cuda.is_available():
        platform["device_context"] = torch.cuda.device
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    hopper, architecture = major >= 9, SimpleNamespace(major=major, minor=minor)
    made = {
        f"{SRT}.utils": platform,
        f"{SRT}.utils.common": platform
        | dict(torch_release=release, rank0_log=lambda text: None, is_pin_memory_available=no),
        "sglang.kernels.jit.utils": dict(
            is_arch_support_pdl=lambda: hopper, get_jit_cuda_arch=lambda: architecture
        ),
        "sglang.kernels.kernel_api_logging": dict(debug_kernel_api=lambda function: function),
        f"{SRT}.batch_invariant_ops": dict(is_batch_invariant_mode_enabled=no),
        f"{SRT}.model_executor.cuda_graph_config": dict(check_cuda_graph_backend=no),
        f"{SRT}.model_executor.runner_utils.prefill_graph": dict(
            is_in_prefill_graph_scope=no, is_in_full_prefill_graph=no
        ),
        f"{SRT}.model_executor.runner_backend_utils.breakable_cuda_graph": dict(
            is_in_breakable_cuda_graph=no, eager_on_graph=lambda **_: lambda function: function
        ),
        f"{SRT}.model_executor.forward_batch_info": dict(ForwardMode=Mode),
        f"{SRT}.mem_cache.memory_pool": dict(MambaPool=SimpleNamespace(SpeculativeState=SimpleNamespace)),
        f"{SRT}.layers.attention.mamba.causal_conv1d": dict(causal_conv1d_fn=_convolution),
    }
    if importlib.util.find_spec("msgspec") is None:
        made["msgspec"] = {"Struct": Struct}
    return made


def _convolution(*args: Any, **kwargs: Any) -> Any:
    """SGLang's own in Triton: the one that its wheel has compiled is not in its Python files."""
    return importlib.import_module(f"{OPS}.mamba.causal_conv1d_triton").causal_conv1d_fn(*args, **kwargs)


@dataclass
class Rig:
    """The layer, its pool of states, and steps of it.

    `tokens` is how many draft tokens there are; `shared` whether windows of consecutive ones share memory, as in SGLang's pool on CUDA.
    """

    packing: str
    heads: tuple[int, int, int, int]
    slots: int = 9
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.float32
    tokens: int = 4
    shared: bool = True
    gate: str | None = None
    rows: int = 6
    layer: Any = field(init=False)
    pool: Any = field(init=False)

    def __post_init__(self) -> None:
        hk, hv, dk, dv = self.heads
        made = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=made, device=self.device) * scale).to(self.dtype)

        self.random = random
        channels = ol.channels(self.heads)
        self.weights = ol.Weights(
            random(channels, 4, scale=0.3),
            None,
            torch.rand(hv, generator=made, device=self.device),
            torch.rand(hv, generator=made, device=self.device),
            1 + random(dv, scale=0.1),
        )
        self.conv = random(self.slots, channels, 3)
        self.state = random(self.slots, hv, dv, dk, scale=0.2).to(self.state_dtype)
        self.steps = torch.zeros(
            self.rows, self.tokens, hv, dv, dk, device=self.device, dtype=self.state_dtype
        )
        if self.shared:
            inner = torch.zeros(self.rows, channels, self.tokens + 2, device=self.device, dtype=self.dtype)
            strides = (inner.stride(0), 1, self.tokens + 2, 1)
            self.windows = inner.as_strided((self.rows, self.tokens, channels, 3), strides)
        else:
            self.windows = torch.zeros(
                self.rows, self.tokens, channels, 3, device=self.device, dtype=self.dtype
            )
        self._make_layer()
        self._make_backend()
        if self.device == "cpu":
            sglang_kernels.put()

    def _make_layer(self) -> None:
        module, name = MODELS[self.packing]
        cls = getattr(importlib.import_module(module), name)
        hk, hv, dk, dv = self.heads
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim = self.heads
        layer.key_dim, layer.value_dim, layer.attn_tp_size = hk * dk, hv * dv, 1
        w = self.weights
        attention = importlib.import_module(f"{SRT}.layers.radix_linear_attention").RadixLinearAttention
        layer.attn = attention(0, hk, hk, hv, dk, dk, dv, w.conv_weight, None, "silu", w.A_log, w.dt_bias)
        gate = {} if self.gate is None else dict(activation=self.gate)
        if self.packing == "interleaved":
            norms = importlib.import_module(f"{OPS}.attention.fla.fused_norm_gate")
            norm = norms.FusedRMSNormGated(dv, eps=1e-6, dtype=self.dtype, device=self.device, **gate)
        else:
            norms = importlib.import_module(f"{OPS}.attention.fla.layernorm_gated")
            norm = norms.RMSNorm(dv, eps=1e-6, dtype=self.dtype, device=self.device, **gate)
        norm.weight.data.copy_(w.norm_weight)
        layer.norm = norm.requires_grad_(False)
        layer._forward_input_proj = lambda hidden: self.projections
        layer.out_proj = lambda core: (core, None)
        self.layer = layer

    def _make_backend(self) -> None:
        backends, hybrid = importlib.import_module(BACKEND), importlib.import_module(HYBRID)
        utils = importlib.import_module(f"{LINEAR}.utils")
        self.cache = SimpleNamespace(
            conv=[self.conv],
            temporal=self.state,
            intermediate_ssm=self.steps,
            intermediate_conv_window=[self.windows],
        )
        for name in "d k g rawv rawk beta".split():
            setattr(self.cache, f"replayssm_{name}", None)
        pool = SimpleNamespace(
            mamba2_layer_cache=lambda layer_id: self.cache,
            mamba_pool=SimpleNamespace(mamba_cache=self.cache, replayssm_is_kda=False),
            mamba_map={0: 0},
            size=self.rows - 1,
        )
        backend = object.__new__(backends.GDNAttnBackend)
        triton = utils.LinearAttnKernelBackend.TRITON
        backend.kernel_dispatcher = backends.GDNKernelDispatcher(triton, triton, triton)
        vars(backend).update(
            req_to_token_pool=pool,
            mis_metadata=None,
            device=self.device,
            conv_states_shape=self.conv.shape,
            enable_unified_memory=False,
            verify_intermediate_state_indices=torch.arange(self.rows, dtype=torch.int32, device=self.device),
            _use_strided_target_verify_qkv=True,
            _track_pools_cache=None,
            _mamba_chunk_size=64,
        )
        outer = object.__new__(hybrid.HybridLinearAttnBackend)
        outer.linear_attn_backend, outer.full_attn_layers = backend, []
        self.backend = backend
        context = importlib.import_module(f"{SRT}.model_executor.forward_context")
        context.set_forward_context(context.ForwardContext(attn_backend=outer))

    # ---- steps

    def project(self, rows: int) -> None:
        wide = ol.oracle.features(self.heads)
        self.projections = self.random(rows, wide["mixed_qkvz"]), self.random(rows, wide["mixed_ba"])

    def step(self, mode: str, slots: list[int] | torch.Tensor, starts: Any = None, **batch: Any) -> Any:
        """Metadata and batch of a step, as SGLang makes them: what `forward` of the layer takes beside its input."""
        metadata = importlib.import_module(f"{SRT}.layers.attention.mamba.mamba2_metadata").ForwardMetadata
        slots = torch.as_tensor(slots, dtype=torch.int32, device=self.device)
        starts = torch.arange(len(slots) + 1) if starts is None else torch.as_tensor(starts)
        starts = starts.to(self.device, torch.int32)
        made = metadata(query_start_loc=starts, mamba_cache_indices=slots)
        for name in list(batch):
            if hasattr(made, name):
                setattr(made, name, batch.pop(name))
        made.has_mamba_track_mask = getattr(made, "has_mamba_track_mask", False)
        self.backend.forward_metadata = made
        kind = Mode[mode]
        return SimpleNamespace(
            **{
                "forward_mode": kind,
                "logical_forward_mode": kind,
                "global_num_token_non_padded_cpu": None,
                "mamba_track_mask": None,
                "batch_size": len(slots),
                "req_pool_indices": torch.arange(len(slots), device=self.device),
                "spec_info": SimpleNamespace(draft_token_num=self.tokens, ragged_verify_layout=None),
                "extend_seq_lens": starts.diff(),
                "extend_seq_lens_cpu": starts.diff().tolist(),
            }
            | batch
        )

    def run(self, batch: Any) -> torch.Tensor:
        """Output [rows, HV, DV] of the layer's `forward`."""
        hidden = torch.zeros(self.projections[0].shape[0], 8, device=self.device, dtype=self.dtype)
        with torch.no_grad():
            return self.layer.forward(hidden, batch).unflatten(-1, (self.heads[1], self.heads[3]))

    def states(self) -> list[torch.Tensor]:
        return [self.conv, self.state, self.steps, self.windows]

    def twice(self, batch: Any, integration: Any) -> tuple[Any, Any]:
        """Output and states of the step through SGLang's own path and through gdn's, each from the same states."""
        before = [one.clone() for one in self.states()]
        theirs = self.run(batch), [one.clone() for one in self.states()]
        for one, kept in zip(self.states(), before, strict=True):
            one.copy_(kept) if one is not self.windows or not self.shared else self._shared().copy_(
                torch.zeros_like(self._shared())
            )
        with integration.installed():
            ours = self.run(batch)
        return theirs, (ours, [one.clone() for one in self.states()])

    def _shared(self) -> torch.Tensor:
        rows, tokens, channels, _ = self.windows.shape
        strides = (self.windows.stride(0), self.windows.stride(2), 1)
        return self.windows.as_strided((rows, channels, tokens + 2), strides)

    def exact(self, slot: int, rows: slice, fresh: bool = False) -> tuple[Any, list[Any], list[Any]]:
        """In float64: output, and window and state after each token, of a sequence of these rows from the states of a slot."""
        gate = {None: "silu", "swish": "silu"}.get(self.gate, self.gate)
        numbers = ol.Numbers(self.heads, self.packing, gate=gate)
        weights = ol.Weights(*(None if one is None else one.cpu() for one in vars(self.weights).values()))
        parts = [one[rows].cpu() for one in ol.unpacked([one.cpu() for one in self.projections], numbers)]
        conv, state = self.conv[slot].cpu(), self.state[slot].cpu()
        if fresh:
            conv, state = torch.zeros_like(conv), torch.zeros_like(state)
        return ol.sequence(numbers, weights, parts, conv, state)


def off(got: torch.Tensor, right: torch.Tensor) -> float:
    """The error as a part of the norm."""
    right = right.double().cpu()
    return ((got.double().cpu() - right).norm() / right.norm().clamp(min=1e-30)).item()
