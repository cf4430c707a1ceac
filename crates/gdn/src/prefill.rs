//! The op `prefill`: all tokens of some sequences, through everything between the layer's two GEMMs.

use crate::{
    argument::{ArgumentError, Because},
    dtype::Dtype,
    layer::{Layer, Projections, Tokens, Weights},
    overlap::Extents,
    state::{Keep, Slots, SlotsOf, State, expect_dense, one_each},
    tensor::{IndexType, Indices, Operand, Space, Tensor},
    view::Address,
};

/// The tokens of a chunk: on the CPU and on a GPU [`prefill`](crate::prefill()) cut at any multiple of it gives the same
/// bits, and so far apart at least are [`Checkpoints`].
pub const CHUNK: usize = 64;

/// States inside a sequence, for prefix caching.
#[derive(Debug)]
pub struct Checkpoints<R, W> {
    /// A checkpoint after so many tokens of a sequence, and after every multiple of them that it reaches. A
    /// multiple of [`CHUNK`].
    pub every: usize,
    /// `[B]`: where in `states` those of sequence r begin.
    pub starts: Indices<R, 1>,
    /// `[checkpoints, HV, DV, DK]` with DK or DV dense.
    pub recurrent_states: Tensor<W, 4>,
    /// `[checkpoints, C, W - 1 or more]`: the last columns get the inputs of the convolution up to the
    /// checkpoint.
    pub conv_states: Option<Tensor<W, 3>>,
}

/// The arguments of [`prefill`](crate::prefill()). `R` says where what is read is, `W` where what is written
/// is.
#[derive(Debug)]
pub struct Prefill<R, W> {
    /// What the layer computes.
    pub layer: Layer,
    /// `[B + 1]`, ascending from 0 to N: sequence r has the tokens from `cu_seqlens[r]` to `cu_seqlens[r +
    /// 1]`.
    pub cu_seqlens: Indices<R, 1>,
    /// The projections of N tokens.
    pub projections: Projections<R>,
    /// The weights.
    pub weights: Weights<R>,
    /// The last inputs of the convolution, `[slots, C, W - 1 or more]`, brought up to date as by
    /// [`decode`](crate::decode()). Without it zeros lie before each sequence.
    pub conv_state: Option<Tensor<W, 3>>,
    /// S, `[slots, HV, DV, DK]` with DK or DV dense, brought up to date. Without it each sequence begins with
    /// zeros.
    pub recurrent_state: Option<Tensor<W, 4>>,
    /// Which slots the sequences have.
    pub slots: Slots<R>,
    /// `[B]`: 0 for a sequence that begins with zeros, whatever its slots hold.
    pub has_initial_state: Option<Indices<R, 1>>,
    /// States inside the sequences.
    pub checkpoints: Option<Checkpoints<R, W>>,
    /// `[N, HV, DV]`, any dtype, any strides.
    pub out: Tensor<W, 3>,
}

/// [`Checkpoints`], checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checkpointed<P> {
    pub(crate) every: usize,
    pub(crate) starts: Operand<P, IndexType, 1>,
    pub(crate) recurrent_states: Operand<P, Dtype, 4>,
    pub(crate) conv_states: Option<Operand<P, Dtype, 3>>,
}

impl<R: Space, W: Space<Raw = R::Raw>> Prefill<R, W> {
    /// Checks everything but the values of indices, as the op does first: shapes, dtypes, strides, overlaps.
    /// Memory is not looked at.
    ///
    /// # Errors
    /// [`ArgumentError`].
    pub fn check(&self) -> Result<(), ArgumentError> {
        Plan::new(self).map(drop)
    }
}

/// [`Prefill`], checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<P> {
    pub(crate) tokens: Tokens<P>,
    pub(crate) cu_seqlens: Operand<P, IndexType, 1>,
    pub(crate) slots: SlotsOf<P>,
    pub(crate) has_initial_state: Option<Operand<P, IndexType, 1>>,
    pub(crate) conv: Option<State<P, 3, 4>>,
    pub(crate) recurrent: Option<State<P, 4, 5>>,
    pub(crate) checkpoints: Option<Checkpointed<P>>,
}

impl<P: Address> Plan<P> {
    /// Checks everything but the values of indices.
    pub(crate) fn new<R: Space<Raw = P>, W: Space<Raw = P>>(
        call: &Prefill<R, W>,
    ) -> Result<Self, ArgumentError> {
        let mut extents = Extents::new();
        let Prefill { layer, projections, weights, out, .. } = call;
        let tokens = Tokens::new(layer, projections, weights, out, &mut extents)?;
        let cu_seqlens = call.cu_seqlens.operand();
        cu_seqlens.expect_at_least("cu_seqlens", 0, "entries", 1, "no sequences")?;
        extents.add_indices("cu_seqlens", &cu_seqlens);
        let n = cu_seqlens.sizes[0] - 1;
        let slots = SlotsOf::new(&call.slots, n, &mut extents)?;
        let has_initial_state = match &call.has_initial_state {
            Some(flags) => Some(one_each("has_initial_state", flags, n, &mut extents)?),
            None => None,
        };
        let conv = match &call.conv_state {
            Some(state) => Some(slots.conv::<R, W>(layer, state, &Keep::Last, 1, false, &mut extents)?),
            None => None,
        };
        let recurrent = match &call.recurrent_state {
            Some(state) => Some(slots.recurrent::<R, W>(layer, state, &Keep::Last, 1, &mut extents)?),
            None => None,
        };
        let checkpoints = match &call.checkpoints {
            Some(checkpoints) => Some(Checkpointed::new(layer, checkpoints, n, &mut extents)?),
            None => None,
        };
        extents.check()?;
        Ok(Self { tokens, cu_seqlens, slots, has_initial_state, conv, recurrent, checkpoints })
    }
}

impl<P: Address> Checkpointed<P> {
    fn new<R: Space<Raw = P>, W: Space<Raw = P>>(
        layer: &Layer,
        checkpoints: &Checkpoints<R, W>,
        num_sequences: usize,
        extents: &mut Extents,
    ) -> Result<Self, ArgumentError> {
        let every = checkpoints.every;
        if every == 0 || !every.is_multiple_of(CHUNK) {
            let expected = format!("a multiple of {CHUNK}, and at least that");
            return Err(ArgumentError::Value {
                argument: "checkpoints.every",
                got: every.to_string(),
                expected,
            });
        }
        let starts = one_each("checkpoints.starts", &checkpoints.starts, num_sequences, extents)?;
        let heads = layer.heads();
        let need = || Because::Need(heads.to_string());
        let recurrent_states = checkpoints.recurrent_states.operand();
        let name = "checkpoints.recurrent_states";
        recurrent_states.expect(name, 1, "heads", heads.num_v_heads(), need)?;
        recurrent_states.expect(name, 2, "rows (DV)", heads.head_v_dim(), need)?;
        recurrent_states.expect(name, 3, "columns (DK)", heads.head_k_dim(), need)?;
        expect_dense(name, &recurrent_states)?;
        extents.add(name, &recurrent_states, true);
        let conv_states = match &checkpoints.conv_states {
            None => None,
            Some(states) => {
                let states = states.operand();
                let name = "checkpoints.conv_states";
                states.expect(name, 0, "checkpoints", recurrent_states.sizes[0], || {
                    Because::Argument("checkpoints.recurrent_states")
                })?;
                states.expect(name, 1, "channels", layer.conv_channels(), need)?;
                let why = "the taps before a token's own";
                states.expect_at_least(name, 2, "columns", layer.conv_width - 1, why)?;
                extents.add(name, &states, true);
                Some(states)
            }
        };
        Ok(Self { every, starts, recurrent_states, conv_states })
    }
}
