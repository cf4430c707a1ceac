//! The two states of a layer, and [`Slots`]: which sequence has which.

use crate::{
    argument::{ArgumentError, Because},
    dtype::Dtype,
    layer::Layer,
    overlap::Extents,
    tensor::{IndexType, Indices, Operand, Space, Tensor},
    view::Address,
};

/// Which slots of the states the sequences of a call have.
///
/// What is padding is said here and holds everywhere: a sequence whose first index is negative or equals
/// `pad_slot_id` is skipped. Its states stay as they are, and its rows of `out` become zeros.
#[derive(Clone, Copy, Debug)]
pub struct Slots<R> {
    /// `[B, K]`: both states of sequence r are read in slot `state_indices[r, 0]`. The recurrent state is
    /// read in slot `state_indices[r, num_accepted_tokens[r] - 1]` where there is such a tensor, and may be
    /// written in the slots of further columns ([`Keep::Each`]). Without indices sequence r has slot r.
    pub state_indices: Option<Indices<R, 2>>,
    /// An index that stands for no slot, beside all negative ones: -1 in SGLang, 0 in vLLM.
    pub pad_slot_id: i64,
}

impl<R> Slots<R> {
    /// Sequence r has slot r.
    pub const fn in_order() -> Self {
        Self { state_indices: None, pad_slot_id: -1 }
    }

    /// Slots by index, `[B, K]`; negative ones are padding.
    pub const fn of(state_indices: Indices<R, 2>) -> Self {
        Self { state_indices: Some(state_indices), pad_slot_id: -1 }
    }
}

/// Which states of several tokens are kept. `E` is one more than the dims of the state.
#[derive(Debug, Default)]
pub enum Keep<R, W, const E: usize> {
    /// The state after the last token, where it was read.
    #[default]
    Last,
    /// The state after the last token, in slot `[r]` of the same tensor for sequence r. A slot that is
    /// padding is not written.
    LastAt(Indices<R, 1>),
    /// The state after token t of sequence r, in slot `state_indices[r, t]` of the same tensor. A slot that
    /// is padding is not written.
    Each,
    /// The state after token t of sequence r, at `[indices[r], t]` of another tensor `[slots, T or more,
    /// ...]` (without indices, at `[r, t]`). A slot that is padding is not written. The state itself stays as
    /// it was.
    EachIn {
        /// Where to.
        states: Tensor<W, E>,
        /// `[B]`
        indices: Option<Indices<R, 1>>,
    },
    /// None: the state stays as it was.
    Nothing,
}

/// The inputs of the convolution before the call.
#[derive(Debug)]
pub struct ConvState<R, W> {
    /// `[slots, C, W - 1 or more]`, oldest first, any strides. The last W - 1 columns are read. Afterwards
    /// the columns hold the last inputs, as many as there are columns.
    pub state: Tensor<W, 3>,
    /// Which windows are kept. Not [`Keep::Each`].
    pub keep: Keep<R, W, 4>,
}

/// S of each v head.
#[derive(Debug)]
pub struct RecurrentState<R, W> {
    /// `[slots, HV, DV, DK]` with DK or DV dense: engines that have `[slots, HV, DK, DV]` give it with
    /// strides in another order.
    pub state: Tensor<W, 4>,
    /// Which states are kept.
    pub keep: Keep<R, W, 5>,
}

/// [`Keep`], checked.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kept<P, const E: usize> {
    Last,
    LastAt(Operand<P, IndexType, 1>),
    Each,
    EachIn(Operand<P, Dtype, E>, Option<Operand<P, IndexType, 1>>),
    Nothing,
}

/// A state and what of it is kept, checked. `D` dims, the first of them slots; `E` is one more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State<P, const D: usize, const E: usize> {
    pub(crate) state: Operand<P, Dtype, D>,
    pub(crate) kept: Kept<P, E>,
}

/// [`Slots`], checked but for the indices' values, which only a backend may read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotsOf<P> {
    pub(crate) num_sequences: usize,
    pub(crate) state_indices: Option<Operand<P, IndexType, 2>>,
    pub(crate) pad_slot_id: i64,
}

const A_SLOT_EACH: &str = "slots of one for each sequence";

impl<P: Address> SlotsOf<P> {
    pub(crate) fn new<R: Space<Raw = P>>(
        slots: &Slots<R>,
        num_sequences: usize,
        extents: &mut Extents,
    ) -> Result<Self, ArgumentError> {
        let state_indices = slots.state_indices.as_ref().map(Indices::operand);
        if let Some(indices) = &state_indices {
            indices.expect("state_indices", 0, "rows", num_sequences, || sequences(num_sequences))?;
            indices.expect_at_least("state_indices", 1, "columns", 1, "a slot for each sequence")?;
            extents.add_indices("state_indices", indices);
        }
        Ok(Self { num_sequences, state_indices, pad_slot_id: slots.pad_slot_id })
    }

    /// Checks what conv and recurrent state have in common: the slots, and what is kept of `tokens` tokens.
    fn keep<R, W, const D: usize, const E: usize>(
        &self,
        names: [&'static str; 4],
        state: Operand<P, Dtype, D>,
        keep: &Keep<R, W, E>,
        inner: [(&'static str, usize); 3],
        tokens: usize,
        extents: &mut Extents,
    ) -> Result<State<P, D, E>, ArgumentError>
    where
        R: Space<Raw = P>,
        W: Space<Raw = P>,
    {
        let [name, keep_name, states_name, indices_name] = names;
        let n = self.num_sequences;
        if self.state_indices.is_none() {
            state.expect_at_least(name, 0, "slots", n, A_SLOT_EACH)?;
        }
        let is_written = matches!(keep, Keep::Last | Keep::LastAt(_) | Keep::Each);
        extents.add(name, &state, is_written);
        let kept = match keep {
            Keep::Last => Kept::Last,
            Keep::Nothing => Kept::Nothing,
            Keep::LastAt(indices) => Kept::LastAt(one_each(keep_name, indices, n, extents)?),
            Keep::Each => {
                let Some(indices) = &self.state_indices else {
                    return Err(ArgumentError::Value {
                        argument: keep_name,
                        got: "Each".to_owned(),
                        expected: "another choice where there are no state_indices".to_owned(),
                    });
                };
                indices.expect_at_least("state_indices", 1, "columns", tokens, "the tokens of a sequence")?;
                Kept::Each
            }
            Keep::EachIn { states, indices } => {
                let states = states.operand();
                states.expect_at_least(
                    states_name,
                    1,
                    "states a slot",
                    tokens,
                    "the tokens of a sequence",
                )?;
                for (dim, (unit, expected)) in (2..E).zip(inner) {
                    states.expect(states_name, dim, unit, expected, || Because::Argument(name))?;
                }
                extents.add(states_name, &states, true);
                let indices = match indices {
                    Some(indices) => Some(one_each(indices_name, indices, n, extents)?),
                    None => {
                        states.expect_at_least(states_name, 0, "slots", n, A_SLOT_EACH)?;
                        None
                    }
                };
                Kept::EachIn(states, indices)
            }
        };
        Ok(State { state, kept })
    }

    /// Checks the inputs of the convolution. With `rolling`, tokens that were not accepted are in the window
    /// too.
    pub(crate) fn conv<R: Space<Raw = P>, W: Space<Raw = P>>(
        &self,
        layer: &Layer,
        state: &Tensor<W, 3>,
        keep: &Keep<R, W, 4>,
        tokens: usize,
        rolling: bool,
        extents: &mut Extents,
    ) -> Result<State<P, 3, 4>, ArgumentError> {
        let operand = state.operand();
        let (channels, window) = (layer.conv_channels(), layer.conv_width - 1);
        let heads = layer.heads();
        operand.expect("conv_state", 1, "channels", channels, || Because::Need(heads.to_string()))?;
        let (least, why) = match rolling {
            false => (window, "the taps before a token's own"),
            true => ((window + tokens).saturating_sub(1), "the taps and all tokens but one"),
        };
        operand.expect_at_least("conv_state", 2, "columns", least, why)?;
        if matches!(keep, Keep::Each) {
            return Err(ArgumentError::Value {
                argument: "conv_state.keep",
                got: "Each".to_owned(),
                expected: "Last, LastAt, EachIn or Nothing".to_owned(),
            });
        }
        let names = ["conv_state", "conv_state.keep", "conv_state.keep.states", "conv_state.keep.indices"];
        let inner = [("channels", channels), ("columns", window), ("", 0)];
        self.keep(names, operand, keep, inner, tokens, extents)
    }

    /// Checks S.
    pub(crate) fn recurrent<R: Space<Raw = P>, W: Space<Raw = P>>(
        &self,
        layer: &Layer,
        state: &Tensor<W, 4>,
        keep: &Keep<R, W, 5>,
        tokens: usize,
        extents: &mut Extents,
    ) -> Result<State<P, 4, 5>, ArgumentError> {
        let operand = state.operand();
        let heads = layer.heads();
        let inner = [
            ("heads", heads.num_v_heads()),
            ("rows (DV)", heads.head_v_dim()),
            ("columns (DK)", heads.head_k_dim()),
        ];
        for (dim, (unit, expected)) in (1..).zip(inner) {
            operand.expect("recurrent_state", dim, unit, expected, || Because::Need(heads.to_string()))?;
        }
        expect_dense("recurrent_state", &operand)?;
        let names = [
            "recurrent_state",
            "recurrent_state.keep",
            "recurrent_state.keep.states",
            "recurrent_state.keep.indices",
        ];
        let checked = self.keep(names, operand, keep, inner, tokens, extents)?;
        if let Kept::EachIn(states, _) = &checked.kept {
            let (dense, name) = (if operand.is_dense(3) { 4 } else { 3 }, names[2]);
            if !states.is_dense(dense) {
                let got = states.strides[dense];
                return Err(ArgumentError::Stride { argument: name, dim: dense, got, expected: 1 });
            }
            if states.kind != operand.kind {
                let because = Because::Argument("recurrent_state");
                return Err(ArgumentError::Dtype {
                    argument: name,
                    got: states.kind,
                    expected: operand.kind,
                    because,
                });
            }
        }
        Ok(checked)
    }
}

/// That DK or DV, the last two dims, is dense.
pub(crate) fn expect_dense<P: Address, const D: usize>(
    argument: &'static str,
    operand: &Operand<P, Dtype, D>,
) -> Result<(), ArgumentError> {
    if operand.is_dense(D - 1) || operand.is_dense(D - 2) {
        return Ok(());
    }
    Err(ArgumentError::Stride { argument, dim: D - 1, got: operand.strides[D - 1], expected: 1 })
}

/// An index tensor with an entry for each sequence.
pub(crate) fn one_each<P: Address, R: Space<Raw = P>>(
    argument: &'static str,
    indices: &Indices<R, 1>,
    num_sequences: usize,
    extents: &mut Extents,
) -> Result<Operand<P, IndexType, 1>, ArgumentError> {
    let operand = indices.operand();
    operand.expect(argument, 0, "entries", num_sequences, || sequences(num_sequences))?;
    extents.add_indices(argument, &operand);
    Ok(operand)
}

fn sequences(num_sequences: usize) -> Because {
    Because::Need(format!("{num_sequences} sequences"))
}
