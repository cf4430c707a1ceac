//! `decode` or `prefill`, over the same tensors: what `gdn forward` and `gdn bench` run.

use std::ops::Range;

use gdn::{
    ArgumentError, Block, BufError, ConvState, Decode, Dtype, Exclusive, Indices, Keep, Layer, MAX_TOKENS,
    Packed, Pages, Prefill, Projections, RecurrentState, Shared, Slots, Tensor, Weights,
};

/// One of the two ops of the layer's core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Op {
    /// Any number of tokens of each sequence
    Prefill,
    /// A few tokens of each sequence, as many of one as of the other
    Decode,
}

impl Op {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }

    /// The op for these sequences: decode where it can.
    pub(crate) fn of(cu_seqlens: &[usize]) -> Self {
        match tokens_of_each(cu_seqlens) {
            Some(1..=MAX_TOKENS) => Self::Decode,
            _ => Self::Prefill,
        }
    }
}

/// The tokens of a sequence, where all have as many.
pub(crate) fn tokens_of_each(cu_seqlens: &[usize]) -> Option<usize> {
    let mut lengths = cu_seqlens.windows(2).map(|pair| pair[1] - pair[0]);
    let first = lengths.next()?;
    lengths.all(|length| length == first).then_some(first)
}

/// Zeroed bytes of the host, in huge pages where there are many.
pub(crate) struct Bytes {
    block: Block,
    len: usize,
}

impl Bytes {
    pub(crate) fn new(len: usize) -> Result<Self, BufError> {
        Ok(Self { block: Block::new(len, Pages::Huge)?, len })
    }

    pub(crate) fn all(&self) -> &[u8] {
        &self.block.bytes()[..self.len]
    }

    pub(crate) fn all_mut(&mut self) -> &mut [u8] {
        &mut self.block.bytes_mut()[..self.len]
    }
}

/// What a call reads: all tokens of all sequences.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) layer: Layer,
    /// Elements of `mixed_qkvz` and of `out`.
    pub(crate) dtype: Dtype,
    pub(crate) mixed_qkvz: &'a [u8],
    pub(crate) ba_dtype: Dtype,
    pub(crate) mixed_ba: &'a [u8],
    pub(crate) weights: Weights<Shared<'a>>,
    /// Columns of the conv state.
    pub(crate) columns: usize,
    pub(crate) conv_dtype: Dtype,
    pub(crate) state_dtype: Dtype,
}

/// What a call writes, of all tokens and sequences; dense.
pub(crate) struct Results<'a> {
    /// `[N, HV, DV]`
    pub(crate) out: &'a mut [u8],
    /// `[B, C, columns]`
    pub(crate) conv_state: &'a mut [u8],
    /// `[B, HV, DV, DK]`
    pub(crate) recurrent_state: &'a mut [u8],
}

/// A call, over the host's memory.
pub(crate) enum Call<'a> {
    Decode(Decode<Shared<'a>, Exclusive<'a>>),
    Prefill(Prefill<Shared<'a>, Exclusive<'a>>),
}

impl Inputs<'_> {
    /// Bytes of a row of `mixed_qkvz`, `mixed_ba` and `out` together.
    pub(crate) fn row_bytes(&self) -> usize {
        let heads = self.layer.heads();
        (heads.qkvz_features() + heads.z_features()) * self.dtype.size()
            + heads.ba_features() * self.ba_dtype.size()
    }

    /// Elements of a sequence's conv state.
    pub(crate) fn conv_len(&self) -> usize {
        self.layer.conv_channels() * self.columns
    }

    /// Elements of a sequence's recurrent state.
    pub(crate) fn state_len(&self) -> usize {
        let heads = self.layer.heads();
        heads.num_v_heads() * heads.head_v_dim() * heads.head_k_dim()
    }

    /// Multiply-adds of the delta rule for a token, at least: each of `S k`, the correction of S and `S q` is
    /// one with every element of S.
    pub(crate) fn multiply_adds(&self) -> usize {
        3 * self.state_len()
    }

    /// The op over some rows of `sequences`, the first of which `cu_seqlens` counts from 0; it brings their
    /// states up to date.
    pub(crate) fn call<'a>(
        &'a self,
        op: Op,
        sequences: Range<usize>,
        rows: Range<usize>,
        cu_seqlens: &'a [i64],
        results: &'a mut Results<'_>,
    ) -> Result<Call<'a>, ArgumentError> {
        let heads = self.layer.heads();
        let (hv, dv, dk) = (heads.num_v_heads(), heads.head_v_dim(), heads.head_k_dim());
        let (num_rows, num_sequences) = (rows.len(), sequences.len());
        let of = |range: &Range<usize>, bytes: usize| range.start * bytes..range.end * bytes;
        let qkvz = of(&rows, heads.qkvz_features() * self.dtype.size());
        let ba = of(&rows, heads.ba_features() * self.ba_dtype.size());
        let projections = Projections::Packed(Packed {
            mixed_qkvz: Tensor::from_bytes(
                &self.mixed_qkvz[qkvz],
                self.dtype,
                [num_rows, heads.qkvz_features()],
            )?,
            mixed_ba: Tensor::from_bytes(&self.mixed_ba[ba], self.ba_dtype, [num_rows, heads.ba_features()])?,
        });
        let out = &mut results.out[of(&rows, hv * dv * self.dtype.size())];
        let out = Tensor::from_bytes_mut(out, self.dtype, [num_rows, hv, dv])?;
        let conv = &mut results.conv_state[of(&sequences, self.conv_len() * self.conv_dtype.size())];
        let sizes = [num_sequences, self.layer.conv_channels(), self.columns];
        let conv = Tensor::<Exclusive<'_>, 3>::from_bytes_mut(conv, self.conv_dtype, sizes)?;
        let recurrent =
            &mut results.recurrent_state[of(&sequences, self.state_len() * self.state_dtype.size())];
        let recurrent = Tensor::from_bytes_mut(recurrent, self.state_dtype, [num_sequences, hv, dv, dk])?;
        let (layer, weights, slots) = (self.layer, self.weights, Slots::in_order());
        Ok(match op {
            Op::Prefill => Call::Prefill(Prefill {
                layer,
                cu_seqlens: Indices::new(cu_seqlens, [num_sequences + 1])?,
                projections,
                weights,
                conv_state: Some(conv),
                recurrent_state: Some(recurrent),
                slots,
                has_initial_state: None,
                checkpoints: None,
                out,
            }),
            Op::Decode => Call::Decode(Decode {
                layer,
                tokens_per_sequence: num_rows / num_sequences.max(1),
                projections,
                weights,
                conv_state: ConvState { state: conv, keep: Keep::Last },
                recurrent_state: RecurrentState { state: recurrent, keep: Keep::Last },
                slots,
                num_accepted_tokens: None,
                out,
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_is_chosen_where_it_can_be() {
        for (cu_seqlens, op) in [
            (&[0, 1][..], Op::Decode),
            (&[0, 16], Op::Decode),
            (&[0, 17], Op::Prefill),
            (&[0, 1, 2, 3], Op::Decode),
            (&[0, 1, 3], Op::Prefill),
            (&[0, 0, 0], Op::Prefill),
            (&[0], Op::Prefill),
        ] {
            assert_eq!(Op::of(cu_seqlens), op, "{cu_seqlens:?}");
        }
    }
}
