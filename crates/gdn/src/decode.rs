//! The op `decode`: a few tokens of each of B sequences, through everything between the layer's two GEMMs.

use crate::{
    argument::ArgumentError,
    layer::{Layer, Projections, Tokens, Weights},
    overlap::Extents,
    state::{ConvState, RecurrentState, Slots, SlotsOf, State, one_each},
    tensor::{IndexType, Indices, Operand, Space, Tensor},
    view::Address,
};

/// The most tokens of a sequence in one call.
pub const MAX_TOKENS: usize = 16;

/// The arguments of [`decode`](crate::decode()). `R` says where what is read is, `W` where what is written
/// is.
///
/// N = B * T: the tokens of a sequence follow one another.
#[derive(Debug)]
pub struct Decode<R, W> {
    /// What the layer computes.
    pub layer: Layer,
    /// T, from 1 to [`MAX_TOKENS`]: the tokens of each sequence.
    pub tokens_per_sequence: usize,
    /// The projections of N tokens.
    pub projections: Projections<R>,
    /// The weights.
    pub weights: Weights<R>,
    /// The last inputs of the convolution.
    pub conv_state: ConvState<R, W>,
    /// S.
    pub recurrent_state: RecurrentState<R, W>,
    /// Which slots the sequences have.
    pub slots: Slots<R>,
    /// `[B]`, speculative decoding: how many tokens of the last call stay, from 1 to T. The recurrent state
    /// is read where the state after that token was put, and the window of the convolution in columns `n - 1
    /// .. n - 1 + W - 1` of `conv_state`; afterwards it starts at column 0 with the last W - 2 of these, and
    /// the T new inputs behind them.
    pub num_accepted_tokens: Option<Indices<R, 1>>,
    /// `[N, HV, DV]`, any dtype, any strides.
    pub out: Tensor<W, 3>,
}

/// [`Decode`], checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<P> {
    pub(crate) tokens: Tokens<P>,
    /// T.
    pub(crate) tokens_per_sequence: usize,
    pub(crate) slots: SlotsOf<P>,
    pub(crate) num_accepted_tokens: Option<Operand<P, IndexType, 1>>,
    pub(crate) conv: State<P, 3, 4>,
    pub(crate) recurrent: State<P, 4, 5>,
}

impl<P: Address> Plan<P> {
    /// Checks everything but the values of indices.
    pub(crate) fn new<R: Space<Raw = P>, W: Space<Raw = P>>(
        call: &Decode<R, W>,
    ) -> Result<Self, ArgumentError> {
        let mut extents = Extents::new();
        let Decode { layer, tokens_per_sequence, projections, weights, out, .. } = call;
        let tokens = Tokens::new(layer, projections, weights, out, &mut extents)?;
        let t = *tokens_per_sequence;
        if !(1..=MAX_TOKENS).contains(&t) {
            let expected = format!("from 1 to {MAX_TOKENS}");
            return Err(ArgumentError::Value {
                argument: "tokens_per_sequence",
                got: t.to_string(),
                expected,
            });
        }
        if !tokens.num_tokens.is_multiple_of(t) {
            return Err(ArgumentError::Multiple {
                argument: "the number of rows",
                got: tokens.num_tokens,
                other: "tokens_per_sequence",
                expected: t,
            });
        }
        let n = tokens.num_tokens / t;
        let slots = SlotsOf::new(&call.slots, n, &mut extents)?;
        let num_accepted_tokens = match &call.num_accepted_tokens {
            Some(indices) => Some(one_each("num_accepted_tokens", indices, n, &mut extents)?),
            None => None,
        };
        let ConvState { state, keep } = &call.conv_state;
        let conv = slots.conv(layer, state, keep, t, num_accepted_tokens.is_some(), &mut extents)?;
        let RecurrentState { state, keep } = &call.recurrent_state;
        let recurrent = slots.recurrent(layer, state, keep, t, &mut extents)?;
        extents.check()?;
        Ok(Self { tokens, tokens_per_sequence: t, slots, num_accepted_tokens, conv, recurrent })
    }
}
