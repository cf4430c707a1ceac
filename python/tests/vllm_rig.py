"""vLLM's layer on CUDA without the rest of vLLM: its class, its metadata and, on a GPU, its kernels.

vLLM's files are imported from its wheel (peers.py) inside `stand_ins.engine`. Layers, states and steps are those of the trial
(`gdn.integrations.vllm_cuda_trial`).
"""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace
from typing import Any

import oracle_layer as ol
import torch

import gdn.integrations.vllm as integration

MODULE = integration.MODULE
FLA = "vllm.third_party.flash_linear_attention"
KERNELS = "chunk chunk_delta_h chunk_o chunk_scaled_dot_kkt cumsum fused_gdn_prefill_post_conv fused_recurrent fused_sigmoid_gating"
KERNELS += " index l2norm layernorm_guard op solve_tril utils wy_fast"
REAL = {
    MODULE,
    MODULE.rpartition(".")[0] + ".base",
    "vllm.v1.attention.backends.gdn_attn",
    "vllm.v1.attention.backends.utils",
    "vllm.model_executor.layers.mamba.ops.causal_conv1d",
    "vllm.model_executor.warmup.jit_warmup",
    "vllm.model_executor.warmup.jit_warmup_triton_helper",
    f"{FLA}.ops",
    *(f"{FLA}.ops.{name}" for name in KERNELS.split()),
}


class PluggableLayer(torch.nn.Module):
    @classmethod
    def register(cls, name: str) -> Any:
        return lambda layer: layer


class MambaBase:
    pass


def no(*_: Any, **__: Any) -> bool:
    return False


_context: Any = None


@contextlib.contextmanager
def override_forward_context(context: Any) -> Any:
    global _context
    before, _context = _context, context
    try:
        yield
    finally:
        _context = before


def given() -> dict[str, dict[str, Any]]:
    """What the stand-ins have."""
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    on_gpu = torch.cuda.is_available()
    family = torch.cuda.get_device_capability()[0] * 10 if on_gpu else 0
    platform = SimpleNamespace(
        device_type="cuda",
        is_cuda=lambda: True,
        is_cuda_alike=lambda: on_gpu,
        is_arch_support_pdl=lambda: family >= 90,
        is_device_capability_family=lambda number, device_id=0: number == family,
        **dict.fromkeys(("is_rocm", "is_cpu", "is_xpu", "is_out_of_tree"), no),
    )
    aiter = SimpleNamespace(are_gdn_triton_kernels_available=no, is_rdna_gdn_triton_kernels_available=no)
    units = (
        (lambda *_: torch.cuda.get_device_properties(0).multi_processor_count) if on_gpu else (lambda *_: 1)
    )

    def to_device(tensor: Any, device: Any, dtype: Any = None) -> Any:
        return torch.as_tensor(tensor, dtype=dtype).to(device)

    cdiv = lambda a, b: -(a // -b)
    return {
        "vllm.forward_context": {
            "get_forward_context": lambda: _context,
            "override_forward_context": override_forward_context,
        },
        "vllm.model_executor.custom_op": {"CustomOp": PluggableLayer, "PluggableLayer": PluggableLayer},
        "vllm.model_executor.layers.mamba.abstract": {"MambaBase": MambaBase},
        "vllm.model_executor.layers.mamba.mamba_utils": {"is_conv_state_dim_first": no},
        "vllm.compilation.breakable_cudagraph": {"eager_break_during_capture": lambda function: function},
        "vllm._aiter_ops": {"rocm_aiter_ops": aiter},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"tl": tl, "triton": triton, "tldevice": libdevice, "HAS_TRITON": True},
        "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": contextlib.nullcontext},
        "vllm.utils.math_utils": {
            "cdiv": cdiv,
            "next_power_of_2": triton.next_power_of_2,
            "round_down": lambda a, b: a // b * b,
            "RCP_LN2": 1.4426950216293335,
        },
        "vllm.utils.platform_utils": {"num_compute_units": units},
        "vllm.utils.torch_utils": {
            "_encode_layer_name": lambda name: name,
            "_resolve_layer_name": lambda name: name,
            "async_tensor_h2d": to_device,
            "np_to_pinned_tensor": torch.from_numpy,
            "PIN_MEMORY": False,
        },
    }


def layer(
    heads: tuple[int, int, int, int],
    interleaved: bool = False,
    num_spec: int = 0,
    tp_size: int = 1,
    gate: str = "silu",
) -> Any:
    """What a layer of vLLM has, that steps are made for; `heads` are one rank's."""
    from gdn.integrations.trial import Tiny

    module = importlib.import_module(MODULE)
    hk, hv, dk, dv = (heads[0] * tp_size, heads[1] * tp_size, *heads[2:])
    rule = module.ChunkGatedDeltaRule.forward_native
    return Tiny(
        module.QwenGatedDeltaNetAttention,
        num_k_heads=hk,
        num_v_heads=hv,
        head_k_dim=dk,
        head_v_dim=dv,
        key_dim=hk * dk,
        value_dim=hv * dv,
        tp_size=tp_size,
        tp_rank=0,
        prefix="layers.0",
        activation="silu",
        gqa_interleaved_layout=interleaved,
        layer_norm_epsilon=1e-6,
        disable_tp_for_ba_proj=False,
        enable_packed_recurrent_decode=True,
        gdn_decode_kernel="triton",
        num_spec=num_spec,
        norm=SimpleNamespace(eps=1e-6, activation=gate),
        chunk_gated_delta_rule=lambda **given: rule(None, **given),
        get_state_dtype=lambda: (torch.bfloat16, torch.float32),
    )


def exact(bench: Any, r: int) -> tuple[Any, list[Any], list[Any]]:
    """In float64: output, and window and state after each token, of sequence `r` of a step."""
    step, layer = bench.step, bench.layer
    packing = "interleaved" if layer.gqa_interleaved_layout else "contiguous"
    gate = "sigmoid" if layer.norm.activation == "sigmoid" else "silu"
    numbers = ol.Numbers(bench.heads, packing, gate=gate)
    parts = (layer.conv1d.weight[:, 0], None, layer.A_log, layer.dt_bias, layer.norm.weight)
    weights = ol.Weights(*(None if one is None else one.cpu() for one in parts))
    first = sum(step.tokens[:r])
    rows = slice(first, first + step.tokens[r])
    tokens = [one[rows] for one in ol.unpacked([one.cpu() for one in bench.projections], numbers)]
    slots = bench.slots_of(r)
    conv, state = layer.kv_cache[0].transpose(1, 2)[slots[0]].cpu(), layer.kv_cache[1].cpu()
    skipped = step.accepted[r] - 1 if r < step.drafts else 0
    window, before = conv[:, skipped : skipped + 3], state[slots[skipped]]
    if r in step.fresh:
        window, before = torch.zeros_like(window), torch.zeros_like(before)
    return ol.sequence(numbers, weights, tokens, window, before)
