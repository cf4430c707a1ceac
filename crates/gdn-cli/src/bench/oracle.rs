//! What the f64 oracle says of a key head of a sequence, with its value heads, in a call of either op.

use anyhow::bail;
use gdn::{Dtype, reference};

use crate::{
    call::{Inputs, Op},
    numbers::{read, relative_error, rounded, unit_roundoff},
};

/// The most tokens of a sequence that are checked, from its first on; its states only where these are all.
const CHECKED_TOKENS: usize = 2048;

/// The weights of a call, in f64, as the oracle has them for all heads.
pub(super) struct Weights {
    pub(super) conv_weight: Vec<f64>,
    pub(super) a_log: Vec<f64>,
    pub(super) dt_bias: Vec<f64>,
    pub(super) norm_weight: Vec<f64>,
}

/// A call that was made, with what it made of its states.
pub(super) struct Made<'a> {
    pub(super) op: Op,
    pub(super) inputs: &'a Inputs<'a>,
    pub(super) weights: &'a Weights,
    /// The tokens of each sequence.
    pub(super) tokens: usize,
    /// `conv_state` and `recurrent_state`, before and after.
    pub(super) before: [&'a [u8]; 2],
    pub(super) after: [&'a [u8]; 2],
    pub(super) out: &'a [u8],
    /// What a result may be off beside what rounding explains, as a share of its norm.
    pub(super) least: f64,
}

impl Made<'_> {
    /// Checks one key head of one sequence.
    ///
    /// # Errors
    /// Where a result is further from the exact one than one rounding to its dtype and `least` explain.
    pub(super) fn check(&self, sequence: usize, head: usize) -> anyhow::Result<()> {
        let Inputs { layer, dtype, ba_dtype, conv_dtype, state_dtype, columns, .. } = *self.inputs;
        let heads = layer.heads();
        let (hk, hv) = (heads.num_k_heads(), heads.num_v_heads());
        let (dk, dv, ratio) = (heads.head_k_dim(), heads.head_v_dim(), heads.ratio());
        let tokens = self.tokens.min(CHECKED_TOKENS);

        // This head's channels of the convolution.
        let v_start = 2 * hk * dk + head * ratio * dv;
        let channels: Vec<usize> = (head * dk..(head + 1) * dk)
            .chain((hk + head) * dk..(hk + head + 1) * dk)
            .chain(v_start..v_start + ratio * dv)
            .collect();
        let v_heads = head * ratio..(head + 1) * ratio;
        // Where the packed features go, by the definition of the packings.
        let mut of_qkvz = [vec![0; heads.qkv_features()], vec![0; heads.z_features()]];
        for f in 0..heads.qkvz_features() {
            let (part, g) = reference::place_of_qkvz(&heads, layer.layout.packing, f);
            of_qkvz[part][g] = f;
        }
        let mut of_ba = [vec![0; hv], vec![0; hv]];
        for f in 0..heads.ba_features() {
            let (part, g) = reference::place_of_ba(&heads, layer.layout.packing, f);
            of_ba[part][g] = f;
        }
        let row = |dtype: Dtype, bytes, features: usize, t: usize| -> Vec<f64> {
            let size = features * dtype.size();
            let t = sequence * self.tokens + t;
            let bytes: &[u8] = bytes;
            read(dtype, &bytes[t * size..(t + 1) * size]).collect()
        };
        let [mut mixed_qkv, mut z, mut b, mut a] = [const { Vec::new() }; 4];
        for t in 0..tokens {
            let qkvz = row(dtype, self.inputs.mixed_qkvz, heads.qkvz_features(), t);
            mixed_qkv.extend(channels.iter().map(|c| qkvz[of_qkvz[0][*c]]));
            z.extend((v_heads.start * dv..v_heads.end * dv).map(|c| qkvz[of_qkvz[1][c]]));
            let ba = row(ba_dtype, self.inputs.mixed_ba, heads.ba_features(), t);
            b.extend(v_heads.clone().map(|h| ba[of_ba[0][h]]));
            a.extend(v_heads.clone().map(|h| ba[of_ba[1][h]]));
        }
        let width = layer.conv_width;
        let conv_weight: Vec<f64> = channels
            .iter()
            .flat_map(|c| self.weights.conv_weight[c * width..(c + 1) * width].to_vec())
            .collect();
        let conv_state = |bytes: &[u8]| -> Vec<f64> {
            let size = columns * conv_dtype.size();
            let all = &bytes[sequence * heads.qkv_features() * size..];
            channels.iter().flat_map(|c| read(conv_dtype, &all[c * size..(c + 1) * size])).collect()
        };
        let recurrent_state = |bytes: &[u8]| -> Vec<f64> {
            let size = dv * dk * state_dtype.size();
            let first = sequence * hv + v_heads.start;
            read(state_dtype, &bytes[first * size..(first + ratio) * size]).collect()
        };

        let numbers = reference::layer::Numbers {
            conv_width: width,
            l2norm_eps: layer.l2norm_eps.into(),
            norm_eps: layer.norm_eps.into(),
            scale: layer.scale.into(),
            beta_scale: layer.beta_scale.into(),
            ..reference::layer::Numbers::new(1, ratio, dk, dv)
        };
        let weights = reference::layer::Weights {
            conv_weight: &conv_weight,
            conv_bias: None,
            a_log: &self.weights.a_log[v_heads.clone()],
            dt_bias: &self.weights.dt_bias[v_heads.clone()],
            norm_weight: &self.weights.norm_weight,
        };
        let mut state = reference::layer::State {
            conv_state: conv_state(self.before[0]),
            recurrent_state: recurrent_state(self.before[1]),
        };
        let of_tokens = reference::layer::Tokens { mixed_qkv: &mixed_qkv, z: &z, b: &b, a: &a };
        let exact = reference::layer::forward(&numbers, &weights, &of_tokens, &mut state);

        let got: Vec<f64> = (0..tokens)
            .flat_map(|t| row(dtype, self.out, hv * dv, t)[v_heads.start * dv..v_heads.end * dv].to_vec())
            .collect();
        // Decode passes the state on from token to token as its dtype holds it.
        let passed_on = if self.op == Op::Decode { tokens - 1 } else { 0 };
        let lost =
            if state_dtype == Dtype::F32 { 0.0 } else { passed_on as f64 * unit_roundoff(state_dtype) };
        let mut results = vec![("out", got, exact, dtype, lost)];
        if tokens == self.tokens {
            let (conv, recurrent) = (conv_state(self.after[0]), recurrent_state(self.after[1]));
            results.push(("conv_state", conv, state.conv_state, conv_dtype, 0.0));
            results.push(("recurrent_state", recurrent, state.recurrent_state, state_dtype, lost));
        }
        for (name, got, exact, dtype, lost) in results {
            let one_rounding =
                relative_error(exact.iter().map(|x| rounded(dtype, *x)), exact.iter().copied());
            let (error, bound) =
                (relative_error(got, exact.iter().copied()), 1.05 * one_rounding + lost + self.least);
            if error.is_nan() || error > bound {
                bail!(
                    "{} is wrong, nothing was measured: {name} of sequence {sequence}, key head {head}, differs from the exact result by {error:.2e}, {bound:.2e} is allowed",
                    self.op.name()
                );
            }
        }
        Ok(())
    }
}
