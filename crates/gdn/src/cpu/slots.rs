//! Which slots the sequences of a call read and write: the indices' values, read and checked.

use crate::{
    argument::ArgumentError,
    dtype::Dtype,
    state::{Kept, SlotsOf, State},
    tensor::{IndexType, Operand},
};

/// Sequences up to which slots are compared without a list.
const COMPARED: usize = 128;

/// An index, where it is not padding.
fn slot(slots: &SlotsOf<*mut u8>, index: i64) -> Option<usize> {
    if index == slots.pad_slot_id { None } else { usize::try_from(index).ok() }
}

impl SlotsOf<*mut u8> {
    /// What `state_indices` has for a sequence in some column; `None` for padding.
    ///
    /// # Safety
    /// The indices can be read, and the place is one of theirs.
    pub(super) unsafe fn slot(&self, sequence: usize, column: usize) -> Option<usize> {
        match &self.state_indices {
            None => Some(sequence),
            // SAFETY: the caller's promise.
            Some(indices) => slot(self, unsafe { indices.read([sequence, column]) }),
        }
    }

    /// What another index tensor has for a sequence; `None` for padding.
    ///
    /// # Safety
    /// As [`SlotsOf::slot`].
    pub(super) unsafe fn other(
        &self,
        indices: Option<&Operand<*mut u8, IndexType, 1>>,
        sequence: usize,
    ) -> Option<usize> {
        match indices {
            None => Some(sequence),
            // SAFETY: the caller's promise.
            Some(indices) => slot(self, unsafe { indices.read([sequence]) }),
        }
    }

    /// Where the state after token `token` of a sequence goes, if it is kept: a slot of the state itself, or
    /// one of the other tensor and the place in it. `read` is the slot it was read from.
    ///
    /// # Safety
    /// As [`SlotsOf::slot`].
    pub(super) unsafe fn kept<const D: usize, const E: usize>(
        &self,
        state: &State<*mut u8, D, E>,
        sequence: usize,
        read: usize,
        token: usize,
        tokens: usize,
    ) -> Option<usize> {
        let is_last = token + 1 == tokens;
        // SAFETY: the caller's promise.
        unsafe {
            match &state.kept {
                Kept::Last => is_last.then_some(read),
                Kept::LastAt(indices) if is_last => self.other(Some(indices), sequence),
                Kept::Each => self.slot(sequence, token),
                Kept::EachIn(_, indices) => self.other(indices.as_ref(), sequence),
                Kept::LastAt(_) | Kept::Nothing => None,
            }
        }
    }
}

/// A tensor whose slots a call reads or writes, for messages.
#[derive(Clone, Copy)]
pub(super) struct Named<'a, const D: usize> {
    pub(super) name: &'static str,
    pub(super) operand: &'a Operand<*mut u8, Dtype, D>,
}

/// Slots of one tensor, as a call uses them: `(slot, sequence, whether it is written)`, in any order.
pub(super) struct Uses<F>(pub(super) F);

impl<F, I> Uses<F>
where
    F: Fn() -> I,
    I: Iterator<Item = (usize, usize, bool)>,
{
    /// That every slot is there, and that what one sequence writes no other one reads or writes.
    pub(super) fn check<const D: usize>(
        &self,
        tensor: Named<'_, D>,
        indices: &'static str,
        num_sequences: usize,
    ) -> Result<(), ArgumentError> {
        let len = tensor.operand.sizes[0];
        if let Some((slot, at, _)) = (self.0)().find(|(slot, ..)| *slot >= len) {
            let got = i64::try_from(slot).unwrap_or(i64::MAX);
            return Err(ArgumentError::Index {
                argument: indices,
                at,
                got,
                other: tensor.name,
                len,
                unit: "slots",
            });
        }
        let twice = |(slot, one, written): (usize, usize, bool), (same, two, too): (usize, usize, bool)| {
            (slot == same && one != two && (written || too)).then(|| ArgumentError::Value {
                argument: indices,
                got: format!("{slot} for sequences {} and {}", one.min(two), one.max(two)),
                expected: "a slot of its own for each sequence that writes one".to_owned(),
            })
        };
        let clash = if num_sequences <= COMPARED {
            (self.0)().enumerate().find_map(|(i, x)| (self.0)().take(i).find_map(|y| twice(x, y)))
        } else {
            let mut all: Vec<_> = (self.0)().collect();
            all.sort_unstable();
            // Of one slot, all uses stand together: a writer differs from its neighbour if it differs from
            // any.
            all.chunk_by(|x, y| x.0 == y.0).find_map(|uses| {
                let writer = uses.iter().find(|(.., written)| *written)?;
                uses.iter().find_map(|other| twice(*writer, *other))
            })
        };
        clash.map_or(Ok(()), Err)
    }
}
