"""What SGLang's kernels do to their arguments, in PyTorch and float64, for machines without a GPU.

Triton's interpreter does not run them: the convolution's masks are none that it knows. Signatures, layouts and which states are written are
theirs; rounding is not, so nothing here is a measure of theirs.
"""

from __future__ import annotations

import importlib
from typing import Any

import oracle
import torch
import torch.nn.functional as F


def put() -> None:
    """These in place of SGLang's, in the modules that call them."""
    backend = importlib.import_module("sglang.srt.layers.attention.linear.gdn_backend")
    kernels = importlib.import_module("sglang.srt.layers.attention.linear.kernels.gdn_triton")
    backend.causal_conv1d_update, backend.causal_conv1d_fn = causal_conv1d_update, causal_conv1d_fn
    backend.fused_gdn_gating, backend.fused_qkv_split_gdn_prefill = fused_gdn_gating, _split
    kernels.fused_recurrent_gated_delta_rule_packed_decode = packed_decode
    kernels.fused_sigmoid_gating_delta_rule_update = recurrent_update
    kernels.chunk_gated_delta_rule = chunk_gated_delta_rule
    models = {"interleaved": "qwen3_next", "contiguous": "qwen3_5"}
    for packing, name in models.items():
        model = importlib.import_module(f"sglang.srt.models.{name}")
        more = "" if packing == "interleaved" else "_contiguous"
        split = lambda *given, _packing=packing: oracle.split(*given, _packing)
        setattr(model, f"fused_qkvzba_split_reshape_cat{more}", split)
    # Two projections and the convolution in one: not here.
    importlib.import_module("sglang.srt.models.qwen3_5")._gdn_decode_fused_proj_conv = False
    importlib.import_module("sglang.kernels.ops.attention.fla.layernorm_gated").layernorm_fn = _norm
    norm = importlib.import_module("sglang.kernels.ops.attention.fla.fused_norm_gate")
    norm.rms_norm_gated = lambda x, z, weight, bias, activation, eps, **more: _norm(
        x, weight, bias, z, eps, activation=activation
    )


def _norm(x: Any, weight: Any, bias: Any, z: Any, eps: float, activation: str, **more: Any) -> Any:
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    z = z.reshape(x.shape).double()
    return (y * (z.sigmoid() if activation == "sigmoid" else F.silu(z))).to(x.dtype)


def _convolve(x: Any, window: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """[C, T] behind a window [C, W - 1]: the activations, and window and inputs in one."""
    taps = torch.cat([window.double(), x.double()], dim=1)
    done = sum(taps[:, j : j + x.shape[1]] * weight[:, j, None].double() for j in range(weight.shape[1]))
    done = F.silu(done if bias is None else done + bias[:, None].double())
    return done.to(x.dtype), taps.to(x.dtype)


def causal_conv1d_update(
    x: Any,
    conv_state: Any,
    weight: Any,
    bias: Any = None,
    activation: Any = None,
    conv_state_indices: Any = None,
    intermediate_conv_window: Any = None,
    intermediate_state_indices: Any = None,
    **trees: Any,
) -> Any:
    flat = x.dim() == 2
    x = x[:, :, None] if flat else x
    out = torch.zeros_like(x)
    for r, slot in enumerate(conv_state_indices.tolist()):
        if slot < 0:
            continue
        out[r], taps = _convolve(x[r], conv_state[slot], weight, bias)
        conv_state[slot] = taps[:, -3:]
        if intermediate_conv_window is not None:
            for t in range(x.shape[2]):
                intermediate_conv_window[intermediate_state_indices[r], t] = taps[:, t + 1 : t + 4]
    return out[:, :, 0] if flat else out


def causal_conv1d_fn(
    x: Any,
    weight: Any,
    bias: Any,
    query_start_loc: Any,
    cache_indices: Any,
    has_initial_state: Any,
    conv_states: Any,
    **more: Any,
) -> Any:
    out, starts = torch.zeros_like(x), query_start_loc.tolist()
    for r, slot in enumerate(cache_indices.tolist()):
        here = slice(starts[r], starts[r + 1])
        window = conv_states[slot] if has_initial_state[r] else torch.zeros_like(conv_states[slot])
        out[:, here], taps = _convolve(x[:, here], window, weight, bias)
        conv_states[slot] = taps[:, -3:]
    return out


def fused_gdn_gating(A_log: Any, a: Any, b: Any, dt_bias: Any) -> tuple[Any, Any]:
    g = -A_log.double().exp() * F.softplus(a.double() + dt_bias.double())
    return g.float()[None], b.double().sigmoid().float()[None]


def _split(mixed_qkv: Any, hq: int, hk: int, hv: int, dq: int, dk: int, dv: int) -> list[Any]:
    parts = mixed_qkv.split([hq * dq, hk * dk, hv * dv], dim=-1)
    return [one.reshape(1, -1, h, d) for one, h, d in zip(parts, (hq, hk, hv), (dq, dk, dv), strict=True)]


def _token(state: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, scale: float) -> tuple[Any, Any]:
    """One token of all heads: out [HV, DV] and the state after it, in float64."""
    repeats = v.shape[0] // q.shape[0]
    q, k = (one.double() for one in (q, k))
    q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() * scale
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    q, k = q.repeat_interleave(repeats, 0), k.repeat_interleave(repeats, 0)
    state = g.double().exp()[:, None, None] * state
    read = torch.einsum("hvk,hk->hv", state, k)
    state = state + torch.einsum("hv,hk->hvk", beta.double()[:, None] * (v.double() - read), k)
    return torch.einsum("hvk,hk->hv", state, q), state


def recurrent_update(
    A_log: Any,
    dt_bias: Any,
    q: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    initial_state_source: Any,
    initial_state_indices: Any,
    cu_seqlens: Any,
    disable_state_update: bool = False,
    intermediate_states_buffer: Any = None,
    intermediate_state_indices: Any = None,
    **more: Any,
) -> Any:
    g, beta = fused_gdn_gating(A_log, a.view(-1, A_log.shape[0]), b.view(-1, A_log.shape[0]), dt_bias)
    out, starts = torch.zeros_like(v), cu_seqlens.tolist()
    for r in range(len(starts) - 1):
        slot = int(initial_state_indices[r])
        if slot < 0:
            continue
        state = initial_state_source[slot].double()
        for i, t in enumerate(range(starts[r], starts[r + 1])):
            given = (q[0, t], k[0, t], v[0, t], g[0, t], beta[0, t])
            out[0, t], state = _token(state, *given, q.shape[-1] ** -0.5)
            if intermediate_states_buffer is not None:
                intermediate_states_buffer[intermediate_state_indices[r], i] = state
        if not disable_state_update:
            initial_state_source[slot] = state
    return out


def packed_decode(
    mixed_qkv: Any,
    a: Any,
    b: Any,
    A_log: Any,
    dt_bias: Any,
    scale: float,
    initial_state: Any,
    out: Any,
    ssm_state_indices: Any,
    use_qk_l2norm_in_kernel: bool,
) -> None:
    _, hv, dv, dk = initial_state.shape
    hk = (mixed_qkv.shape[1] - hv * dv) // (2 * dk)
    q, k, v = _split(mixed_qkv, hk, hk, hv, dk, dk, dv)
    starts = torch.arange(mixed_qkv.shape[0] + 1)
    done = recurrent_update(A_log, dt_bias, q, k, v, a, b, initial_state, ssm_state_indices, starts)
    out.copy_(done.transpose(0, 1))


def chunk_gated_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    initial_state: Any,
    initial_state_indices: Any,
    cu_seqlens: Any,
    **more: Any,
) -> tuple[Any, None, Any]:
    out, starts, before = torch.zeros_like(v), cu_seqlens.tolist(), []
    for r, slot in enumerate(initial_state_indices.tolist()):
        state = initial_state[slot].double()
        for i, t in enumerate(range(starts[r], starts[r + 1])):
            if i % 64 == 0:
                before.append(state.to(q.dtype))
            given = (q[0, t], k[0, t], v[0, t], g[0, t], beta[0, t])
            out[0, t], state = _token(state, *given, q.shape[-1] ** -0.5)
        initial_state[slot] = state
    return out, None, torch.stack(before)[None]
