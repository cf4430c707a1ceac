"""The layer between its two GEMMs in float64, token by token, written from its formulas and from nothing of gdn's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import torch
import torch.nn.functional as F

Heads = tuple[int, int, int, int]


@dataclass
class Weights:
    conv_weight: Any
    conv_bias: Any
    A_log: Any
    dt_bias: Any
    norm_weight: Any

    def doubled(self) -> Weights:
        return Weights(*(None if one is None else one.double() for one in vars(self).values()))


@dataclass
class Numbers:
    heads: Heads
    packing: str = "interleaved"
    l2norm_eps: float = 1e-6
    norm_eps: float = 1e-6
    scale: float | None = None
    beta_scale: float = 1.0
    gate: str = "silu"


def channels(heads: Heads) -> int:
    hk, hv, dk, dv = heads
    return 2 * hk * dk + hv * dv


def unpacked(projections: Any, numbers: Numbers) -> list[Any]:
    """mixed_qkv [N, C], z [N, HV, DV], b and a [N, HV], in float64."""
    projections = [one.double() for one in projections]
    if len(projections) == 2:
        projections = oracle.split(*projections, *numbers.heads, numbers.packing)
    _, hv, _, dv = numbers.heads
    mixed_qkv, z, b, a = projections
    return [mixed_qkv, z.reshape(-1, hv, dv), b, a]


def recurrence(numbers: Numbers, weights: Weights, c: Any, b: Any, a: Any, state: Any) -> tuple[Any, Any]:
    """One token from its convolved features [C] on, without the norm: o [HV, DV] and the state after it. All in float64."""
    hk, hv, dk, dv = numbers.heads
    q, k, v = c[: hk * dk].view(hk, dk), c[hk * dk : 2 * hk * dk].view(hk, dk), c[2 * hk * dk :].view(hv, dv)
    scale = dk**-0.5 if numbers.scale is None else numbers.scale
    q = q / (q.square().sum(-1, keepdim=True) + numbers.l2norm_eps).sqrt() * scale
    k = k / (k.square().sum(-1, keepdim=True) + numbers.l2norm_eps).sqrt()
    q, k = q.repeat_interleave(hv // hk, 0), k.repeat_interleave(hv // hk, 0)
    g = -weights.A_log.exp() * F.softplus(a + weights.dt_bias)
    beta = b.sigmoid() * numbers.beta_scale
    state = g.exp()[:, None, None] * state
    read = (state @ k[:, :, None])[..., 0]
    state = state + (beta[:, None] * (v - read))[:, :, None] * k[:, None, :]
    return (state @ q[:, :, None])[..., 0], state


def step(numbers: Numbers, weights: Weights, token: Any, window: Any, state: Any) -> tuple[Any, Any, Any]:
    """One token of one sequence: out [HV, DV], the window [C, W - 1] and the state [HV, DV, DK] after it. All in float64."""
    x, z, b, a = token
    taps = torch.cat([window, x[:, None]], dim=1)
    c = (taps * weights.conv_weight).sum(1)
    c = F.silu(c if weights.conv_bias is None else c + weights.conv_bias)
    o, state = recurrence(numbers, weights, c, b, a, state)
    y = o / (o.square().mean(-1, keepdim=True) + numbers.norm_eps).sqrt() * weights.norm_weight
    return y * (F.silu(z) if numbers.gate == "silu" else z.sigmoid()), taps[:, 1:], state


def sequence(
    numbers: Numbers, weights: Weights, tokens: list[Any], window: Any, state: Any
) -> tuple[Any, list[Any], list[Any]]:
    """Some tokens of one sequence: out [T, HV, DV], and window and state after each."""
    weights = weights.doubled()
    window, state = window.double(), state.double()
    outs, windows, states = [], [], []
    for t in range(tokens[0].shape[0]):
        y, window, state = step(numbers, weights, [one[t] for one in tokens], window, state)
        outs.append(y)
        windows.append(window)
        states.append(state)
    _, hv, _, dv = numbers.heads
    return torch.stack(outs) if outs else torch.zeros(0, hv, dv).double(), windows, states


# ---- layers and calls to hold against it


def weights(heads: Heads, dtype: Any = torch.float32, bias: bool = True, width: int = 4) -> Weights:
    c, (_, hv, _, dv) = channels(heads), heads
    made = [torch.randn(c, width), torch.randn(c) if bias else None, torch.rand(hv), torch.rand(hv)]
    made.append(1 + torch.rand(dv))
    return Weights(*(None if one is None else one.to(dtype) for one in made))


def projections(n: int, numbers: Numbers, kind: str, dtype: Any = torch.float32) -> tuple[Any, ...]:
    """``kind`` is "packed", "unpacked" or "flat" (z as ``[N, HV*DV]``)."""
    wide, (_, hv, _, dv) = oracle.features(numbers.heads), numbers.heads
    if kind == "packed":
        return tuple(torch.randn(n, wide[name]).to(dtype) for name in ("mixed_qkvz", "mixed_ba"))
    z = (n, hv * dv) if kind == "flat" else (n, hv, dv)
    return tuple(torch.randn(shape).to(dtype) for shape in ((n, wide["mixed_qkv"]), z, (n, hv), (n, hv)))


def layer(numbers: Numbers, weights: Weights) -> Any:
    import gdn

    return gdn.Layer(
        numbers.heads,
        numbers.packing,
        **vars(weights),
        l2norm_eps=numbers.l2norm_eps,
        norm_eps=numbers.norm_eps,
        scale=numbers.scale,
        beta_scale=numbers.beta_scale,
        gate=numbers.gate,
    )


def through(
    door: str,
    op: str,
    numbers: Numbers,
    weights: Weights,
    projections: tuple[Any, ...],
    states: tuple[Any, Any],
    ends: tuple[Any, ...],
    out: Any,
    options: dict[str, Any],
) -> Any:
    """Decode or prefill through one of the doors, all of which write in place: "function", "operator", "numpy", the function on
    NumPy's arrays of the same memory, or "direct", what calls of ``Layer.decode`` come to from Python 3.12 on. ``ends`` is
    ``cu_seqlens`` alone, or nothing."""
    if door == "direct":
        import gdn

        return gdn.layer._decode(layer(numbers, weights), projections, *states, out=out, **options)
    if door == "function":
        return getattr(layer(numbers, weights), op)(projections, *ends, *states, out=out, **options)
    if door == "operator":
        operator, is_packed = getattr(torch.ops.gdn, op), len(projections) == 2
        names = ("l2norm_eps", "norm_eps", "scale", "beta_scale", "gate")
        options = {name: getattr(numbers, name) for name in names} | options
        arguments = (*projections, *vars(weights).values(), *states, *ends, *numbers.heads, numbers.packing)
        if out is None:
            return (operator.default if is_packed else operator.unpacked)(*arguments, **options)
        (operator.out if is_packed else operator.unpacked_out)(*arguments, **options, out=out)
        return out

    def array(one: Any) -> Any:
        return one.numpy() if isinstance(one, torch.Tensor) else one

    weights = Weights(*map(array, vars(weights).values()))
    options = {name: array(one) for name, one in options.items()}
    given = [tuple(map(array, tensors)) for tensors in (projections, ends, states)]
    made = getattr(layer(numbers, weights), op)(given[0], *given[1], *given[2], out=array(out), **options)
    assert isinstance(made, np.ndarray)
    return torch.from_numpy(made)


def states(slots: int, heads: Heads, how: str, dtype: Any = torch.float32, width: int = 4) -> tuple[Any, Any]:
    """conv_state and recurrent_state as an engine lays them out, seen as the ops take them, with elements at random."""
    c, (_, hv, dk, dv) = channels(heads), heads
    page = c * (width - 1) + hv * dk * dv
    if how == "dense":
        pair = torch.empty(slots, c, width - 1), torch.empty(slots, hv, dv, dk)
    elif how == "channels last":  # vLLM on a GPU, slots of the recurrent state with gaps
        pair = torch.empty(slots, width - 1, c).transpose(1, 2), torch.empty(slots, 2, hv, dv, dk)[:, 1]
    elif how == "page":  # vLLM on a CPU: both states of a slot one behind the other, [DK, DV]
        pages = torch.empty(slots, page)
        conv = pages[:, : c * (width - 1)].unflatten(1, (width - 1, c)).transpose(1, 2)
        pair = conv, pages[:, c * (width - 1) :].unflatten(1, (hv, dk, dv)).transpose(-1, -2)
    elif how == "wide":  # transformers: as many columns as taps, [DK, DV]
        pair = torch.empty(slots, c, width), torch.empty(slots, hv, dk, dv).transpose(-1, -2)
    else:
        raise ValueError(how)
    conv, state = pair
    if dtype != torch.float32 and how != "page":
        state = torch.empty(state.shape, dtype=dtype)
    conv.copy_(torch.randn(conv.shape))
    state.copy_(torch.randn(state.shape))
    return conv, state


def close(got: Any, expected: Any, what: str = "") -> None:
    """Within one rounding of the dtype, and what float32 makes of some hundred sums between."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    bound = torch.finfo(got.dtype).eps * expected.abs() + 2e-5 * max(1.0, scale)
    error = (got.double() - expected).abs()
    assert (error <= bound).all(), f"{what} {error.max()} with {scale}"


def changed(one: Any, seed: int) -> Any:
    """Each element changed by 1/2048 of itself, up or down."""
    random = torch.Generator().manual_seed(seed)
    return one.double() * (1 + (2 * torch.randint(0, 2, one.shape, generator=random) - 1) / 2048)


def near(got: Any, expected: Any, what: str = "", again: Any = None) -> None:
    """Within what prefill on a GPU promises, whose products are of float16: 5e-4 of the norm, and one rounding to the dtype.

    Where a query hardly meets its keys, or states cancel, the norm makes much of what is left. Then no more is asked than of the exact
    result for inputs and states that are changed as ``changed`` does: ``again(seed)``.
    """
    expected = expected.double()
    rounding = 1.05 * (expected.to(got.dtype).double() - expected).norm()
    error, bound = (got.double() - expected).norm(), 5e-4 * expected.norm() + rounding
    for seed in range(8) if again is not None and error > bound else ():
        bound = max(bound, (again(seed) - expected).norm() + rounding)
    assert got.isfinite().all() and error <= bound, f"{what} off by {error:.2e}, more than {bound:.2e}"
