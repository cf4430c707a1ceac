//! Calls of decode on a GPU that were checked, kept for those like them: what is checked depends on nothing
//! but the call's numbers and on where tensors are, their shapes, strides and dtypes. A loop that decodes has
//! the same again and again, and then only compares them: PyTorch's before they are read, where their members
//! are.

use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use gdn::cuda::{DecodePlan, Gpu};

use super::{
    decode::Call,
    layer::{COUNT, OUT, Operands, RECURRENT_STATE},
    objects::Unread,
};
use crate::tensor::Tensor;

struct Seen {
    call: Call,
    tensors: [Option<Tensor>; COUNT],
    gpu: &'static Gpu,
    plan: Arc<DecodePlan>,
}

/// As many as layers of a large model, several times over.
const PLACES: usize = 256;

static SEEN: [Mutex<Option<Box<Seen>>>; PLACES] = [const { Mutex::new(None) }; PLACES];

/// Where a call is kept, by what differs from layer to layer and from output to output.
fn place(recurrent_state: usize, out: usize) -> &'static Mutex<Option<Box<Seen>>> {
    let mixed = (recurrent_state as u64 ^ (out as u64).rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    &SEEN[(mixed >> 32) as usize % PLACES]
}

/// The call that is kept at a place. `None` too where another thread is there, or was when the process was
/// forked: waiting is not worth it.
fn at(place: &Mutex<Option<Box<Seen>>>) -> Option<MutexGuard<'_, Option<Box<Seen>>>> {
    match place.try_lock() {
        Ok(kept) => Some(kept),
        Err(TryLockError::Poisoned(kept)) => Some(kept.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

fn place_of(operands: &Operands) -> &'static Mutex<Option<Box<Seen>>> {
    let address = |i: usize| operands.tensors[i].map_or(0, |tensor| tensor.address);
    place(address(RECURRENT_STATE), address(OUT))
}

/// What was made of a call like this one, whose tensors were not read yet: they are compared where they are.
pub(crate) fn recall(call: &Call, unread: &Unread<'_, '_>) -> Option<(&'static Gpu, Arc<DecodePlan>)> {
    let kept = at(place(unread.address(RECURRENT_STATE)?, unread.address(OUT)?))?;
    let seen = kept.as_ref().filter(|seen| seen.call == *call && unread.are(&seen.tensors))?;
    Some((seen.gpu, Arc::clone(&seen.plan)))
}

/// What was made of a call like this one.
pub(crate) fn get(call: &Call, operands: &Operands) -> Option<(&'static Gpu, Arc<DecodePlan>)> {
    let mut kept = at(place_of(operands))?;
    let seen = kept.as_mut().filter(|seen| seen.call == *call && seen.tensors == operands.tensors)?;
    // The same tensors, but PyTorch's words for them may be others now.
    seen.tensors = operands.tensors;
    Some((seen.gpu, Arc::clone(&seen.plan)))
}

/// Keeps a call in place of the one that was there.
pub(crate) fn keep(call: &Call, operands: &Operands, gpu: &'static Gpu, plan: &Arc<DecodePlan>) {
    if let Some(mut kept) = at(place_of(operands)) {
        *kept = Some(Box::new(Seen { call: *call, tensors: operands.tensors, gpu, plan: Arc::clone(plan) }));
    }
}
