//! The formulas of the layer, token by token. Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024), as the
//! Qwen3-Next layer has them.

use crate::{
    lanes::Lanes,
    special::{exp, sigmoid, silu, softplus},
};

/// What comes before the output's last factor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Gate {
    /// `z * sigmoid(z)`, as Qwen3-Next and Qwen3.5.
    #[default]
    Silu,
    /// `sigmoid(z)`
    Sigmoid,
}

/// The log of a token's decay: `g = -exp(A_log) * softplus(a + dt_bias)`, at most 0.
#[inline(always)]
pub fn log_decay<L: Lanes>(a: L, a_log: L, dt_bias: L) -> L {
    exp(a_log).negated().times(softplus(a.plus(dt_bias)))
}

/// How much of a token's correction is written: `sigmoid(b) * beta_scale`.
#[inline(always)]
pub fn beta<L: Lanes>(b: L, beta_scale: L) -> L {
    sigmoid(b).times(beta_scale)
}

/// What a channel's convolution makes of its sum.
#[inline(always)]
pub fn activation<L: Lanes>(sum: L) -> L {
    silu(sum)
}

/// What a query or key is multiplied with, where `sum` is the sum of its squares: `scale / sqrt(sum + eps)`.
#[inline(always)]
pub fn l2_scale<L: Lanes>(sum: L, eps: L, scale: L) -> L {
    scale.over(sum.plus(eps).root())
}

/// What an output is multiplied with, where `sum` is the sum of its `dim` squares: `1 / sqrt(sum / dim +
/// eps)`.
#[inline(always)]
pub fn rms_scale<L: Lanes>(sum: L, dim: L, eps: L) -> L {
    sum.splat(1.0).over(sum.over(dim).plus(eps).root())
}

/// The delta rule's correction: `beta * (v - r)`, where r is what the decayed state has for the key.
#[inline(always)]
pub fn correction<L: Lanes>(beta: L, v: L, r: L) -> L {
    beta.times(v.minus(r))
}

/// The output's gate: silu(z) or sigmoid(z). They differ in what is divided.
#[inline(always)]
pub fn gate_factor<L: Lanes>(z: L, gate: Gate) -> L {
    let numerator = match gate {
        Gate::Silu => z,
        Gate::Sigmoid => z.splat(1.0),
    };
    numerator.over(exp(z.negated()).plus(z.splat(1.0)))
}

/// The output's last step, where its [`gate_factor`] is known.
#[inline(always)]
pub fn gated_by<L: Lanes>(o: L, rms_scale: L, norm_weight: L, gate_factor: L) -> L {
    o.times(rms_scale).times(norm_weight).times(gate_factor)
}

/// The output's last step: `o * rms_scale * norm_weight * gate(z)`.
#[inline(always)]
pub fn gated<L: Lanes>(o: L, rms_scale: L, norm_weight: L, z: L, gate: Gate) -> L {
    gated_by(o, rms_scale, norm_weight, gate_factor(z, gate))
}
