//! What a case of `gdn bench decode` and `gdn bench prefill` is measured on: made of random numbers, and held to
//! the oracle.

use gdn::{ArgumentError, Dtype, Layer, Tensor};

use super::oracle::{self, Made};
use crate::{
    call::{Bytes, Call, Inputs, Op, Results},
    device::Backend,
    numbers,
};

/// What is measured in one line.
#[derive(Clone, Copy)]
pub(super) struct Case {
    pub(super) op: Op,
    pub(super) layer: Layer,
    pub(super) batch: usize,
    /// Of each sequence.
    pub(super) tokens: usize,
    /// Whether a GPU may cut sequences.
    pub(super) segments: bool,
    pub(super) dtype: Dtype,
    pub(super) state_dtype: Dtype,
}

/// Numbers that do not repeat: splitmix64, about normal.
struct Random(u64);

impl Iterator for Random {
    type Item = f64;

    fn next(&mut self) -> Option<f64> {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bits = mixed ^ (mixed >> 31);
        // The sum of four uniform numbers, of deviation 1.
        let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum();
        Some((sum as f64 / 65535.0 - 2.0) * 3f64.sqrt())
    }
}

/// Numbers that repeat after so many; no row has as many features, so that rows differ.
const PERIOD: usize = 65_537;

/// Fills a tensor, each number times `size`.
fn fill(dtype: Dtype, bytes: &mut [u8], size: f64, seed: u64) {
    let first = bytes.len().min(PERIOD * dtype.size());
    let (first, rest) = bytes.split_at_mut(first);
    numbers::write(dtype, first, Random(seed).map(|x| x * size));
    rest.chunks_mut(first.len().max(1)).for_each(|chunk| chunk.copy_from_slice(&first[..chunk.len()]));
}

/// The weights: `conv_weight`, `dt_bias` and `norm_weight` of the activations' dtype, `A_log` f32. Decays
/// reach from a token to hundreds.
fn weights(layer: &Layer, dtype: Dtype) -> [(Dtype, Vec<u8>); 4] {
    let heads = layer.heads();
    let tensor = |dtype: Dtype, len: usize, numbers: &mut dyn Iterator<Item = f64>| {
        let mut bytes = vec![0; len * dtype.size()];
        numbers::write(dtype, &mut bytes, numbers);
        (dtype, bytes)
    };
    let hv = heads.num_v_heads();
    [
        tensor(dtype, layer.conv_channels() * layer.conv_width, &mut Random(1).map(|x| x * 0.5)),
        tensor(Dtype::F32, hv, &mut Random(2).map(|x| x * 1.5 - 3.0)),
        tensor(dtype, hv, &mut Random(3).map(|x| x * 0.5)),
        tensor(dtype, heads.head_v_dim(), &mut Random(4).map(|x| 1.0 + x * 0.1)),
    ]
}

/// What a call reads.
pub(super) struct Source {
    pub(super) case: Case,
    weights: [(Dtype, Vec<u8>); 4],
    mixed_qkvz: Bytes,
    mixed_ba: Bytes,
}

/// What a call writes.
pub(super) struct Written {
    out: Bytes,
    /// `conv_state` and `recurrent_state`.
    states: [Bytes; 2],
}

impl Source {
    pub(super) fn new(case: &Case) -> anyhow::Result<Self> {
        let Case { layer, batch, tokens, dtype, .. } = *case;
        let rows = batch * tokens;
        let mut mixed_qkvz = Bytes::new(rows * layer.heads().qkvz_features() * dtype.size())?;
        let mut mixed_ba = Bytes::new(rows * layer.heads().ba_features() * dtype.size())?;
        fill(dtype, mixed_qkvz.all_mut(), 1.0, 5);
        fill(dtype, mixed_ba.all_mut(), 1.0, 6);
        Ok(Self { case: *case, weights: weights(&layer, dtype), mixed_qkvz, mixed_ba })
    }

    pub(super) fn inputs(&self) -> Result<Inputs<'_>, ArgumentError> {
        let Case { layer, dtype, state_dtype, .. } = self.case;
        let [conv_weight, a_log, dt_bias, norm_weight] = &self.weights;
        let taps = [layer.conv_channels(), layer.conv_width];
        Ok(Inputs {
            layer,
            dtype,
            mixed_qkvz: self.mixed_qkvz.all(),
            ba_dtype: dtype,
            mixed_ba: self.mixed_ba.all(),
            weights: gdn::Weights {
                conv_weight: Tensor::from_bytes(&conv_weight.1, conv_weight.0, taps)?,
                conv_bias: None,
                A_log: Tensor::from_bytes(&a_log.1, a_log.0, [layer.heads().num_v_heads()])?,
                dt_bias: Tensor::from_bytes(&dt_bias.1, dt_bias.0, [layer.heads().num_v_heads()])?,
                norm_weight: Tensor::from_bytes(&norm_weight.1, norm_weight.0, [layer.heads().head_v_dim()])?,
            },
            columns: layer.conv_width - 1,
            conv_dtype: dtype,
            state_dtype,
        })
    }

    /// Memory for the results, the states as before the first call.
    pub(super) fn results(&self) -> anyhow::Result<Written> {
        let Case { layer, batch, tokens, dtype, state_dtype, .. } = self.case;
        let inputs = self.inputs()?;
        let mut out = Bytes::new(batch * tokens * layer.heads().z_features() * dtype.size())?;
        let mut conv_state = Bytes::new(batch * inputs.conv_len() * dtype.size())?;
        let mut recurrent_state = Bytes::new(batch * inputs.state_len() * state_dtype.size())?;
        out.all_mut().fill(0xA5);
        fill(dtype, conv_state.all_mut(), 1.0, 7);
        fill(state_dtype, recurrent_state.all_mut(), 0.1, 8);
        Ok(Written { out, states: [conv_state, recurrent_state] })
    }

    /// Does something with the op's call.
    pub(super) fn with_call<R>(
        &self,
        written: &mut Written,
        then: impl FnOnce(&mut Call<'_>) -> anyhow::Result<R>,
    ) -> anyhow::Result<R> {
        let Case { op, batch, tokens, .. } = self.case;
        let Written { out, states: [conv_state, recurrent_state] } = written;
        let mut results = Results {
            out: out.all_mut(),
            conv_state: conv_state.all_mut(),
            recurrent_state: recurrent_state.all_mut(),
        };
        let cu_seqlens: Vec<i64> = (0..=batch).map(|r| (r * tokens) as i64).collect();
        let inputs = self.inputs()?;
        then(&mut inputs.call(op, 0..batch, 0..batch * tokens, &cu_seqlens, &mut results)?)
    }

    pub(super) fn run(&self, written: &mut Written, backend: &Backend) -> anyhow::Result<()> {
        self.with_call(written, |call| backend.run(call))
    }

    /// Holds some key heads of some sequences to the oracle: first, middle and last. `least` is what results
    /// may be off beside rounding.
    pub(super) fn check(&self, before: &Written, after: &Written, least: f64) -> anyhow::Result<()> {
        let Case { op, layer, batch, tokens, .. } = self.case;
        let [conv_weight, a_log, dt_bias, norm_weight] =
            self.weights.each_ref().map(|(dtype, bytes)| numbers::read(*dtype, bytes).collect());
        let weights = oracle::Weights { conv_weight, a_log, dt_bias, norm_weight };
        let made = Made {
            op,
            inputs: &self.inputs()?,
            weights: &weights,
            tokens,
            before: before.states.each_ref().map(Bytes::all),
            after: after.states.each_ref().map(Bytes::all),
            out: after.out.all(),
            least,
        };
        let last_head = layer.heads().num_k_heads() - 1;
        let mut pairs = vec![(0, 0), (batch / 2, last_head / 2), (batch - 1, last_head)];
        pairs.dedup();
        pairs.into_iter().try_for_each(|(sequence, head)| made.check(sequence, head))
    }
}

/// What a result may be off beside rounding: sums of f32 are rounded in another order; prefill on a GPU
/// multiplies numbers of f16 ([`gdn::cuda::Gpu::prefill_raw`]), two factors that are each off by 2^-11.
pub(super) const OFF: f64 = 2e-6;
#[cfg(feature = "cuda")]
pub(super) const OFF_IN_F16: f64 = 2.0 / 2048.0;

#[cfg(test)]
mod tests {
    use gdn::{Cpu, Heads, Layout, Packing};

    use super::*;

    #[test]
    fn a_wrong_result_is_not_measured() {
        for op in [Op::Decode, Op::Prefill] {
            for (dtype, state_dtype) in
                [(Dtype::F32, Dtype::F32), (Dtype::BF16, Dtype::F32), (Dtype::F16, Dtype::BF16)]
            {
                for packing in Packing::ALL {
                    let layer = Layer::new(Layout::new(Heads::new(2, 6, 16, 24).unwrap(), packing));
                    let case = Case { op, layer, batch: 3, tokens: 4, segments: false, dtype, state_dtype };
                    let source = Source::new(&case).unwrap();
                    let (before, mut after) = (source.results().unwrap(), source.results().unwrap());
                    source.run(&mut after, &Backend::Cpu(Cpu::new())).unwrap();
                    source.check(&before, &after, OFF).unwrap();
                    // The last element of each, which is of the last head of the last sequence.
                    for (i, name) in ["out", "conv_state", "recurrent_state"].into_iter().enumerate() {
                        let dtype = if i == 2 { state_dtype } else { dtype };
                        for wrong in [f64::NAN, 3.0] {
                            let Written { out, states: [conv_state, recurrent_state] } = &mut after;
                            let bytes = [out, conv_state, recurrent_state][i].all_mut();
                            let at = bytes.len() - dtype.size();
                            let right = bytes[at..].to_vec();
                            numbers::write(dtype, &mut bytes[at..], [wrong]);
                            let said = source.check(&before, &after, OFF).unwrap_err().to_string();
                            assert!(said.contains(&format!("{name} of sequence 2, key head 1")), "{said}");
                            let Written { out, states: [conv_state, recurrent_state] } = &mut after;
                            let bytes = [out, conv_state, recurrent_state][i].all_mut();
                            bytes[at..].copy_from_slice(&right);
                        }
                    }
                }
            }
        }
    }
}
