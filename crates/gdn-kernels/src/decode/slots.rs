//! Which slots a sequence has: indices are read here, on the device, and those that name no slot are padding.

use super::args::{self, Args, Indices, Kept};
use crate::gpu::Gpu;

/// Where a sequence's states are read.
#[derive(Clone, Copy)]
pub(super) struct Read {
    pub(super) conv: i64,
    pub(super) recurrent: i64,
    /// Tokens of the last call that stay; 0 where all do.
    pub(super) accepted: u32,
}

/// An index of a sequence.
///
/// # Safety
/// The indices are there, and the place is one of theirs.
#[inline(always)]
unsafe fn load(gpu: &impl Gpu, indices: &Indices, sequence: u32, column: u32) -> i64 {
    let at = indices.address + u64::from(sequence) * indices.row + u64::from(column) * indices.column;
    // SAFETY: the caller's promise.
    unsafe {
        match indices.size {
            8 => gpu.load8(at) as i64,
            4 => i64::from(gpu.load4(at) as i32),
            _ => i64::from(gpu.load1(at)),
        }
    }
}

/// The slot of a sequence, of so many; -1 for padding. Without indices it is the sequence's number.
///
/// # Safety
/// As [`load`], where there are indices.
#[inline(always)]
unsafe fn slot(
    gpu: &impl Gpu,
    args: &Args,
    indices: &Indices,
    sequence: u32,
    column: u32,
    slots: i64,
) -> i64 {
    if indices.address == 0 {
        return i64::from(sequence);
    }
    // SAFETY: the caller's promise.
    let slot = unsafe { load(gpu, indices, sequence, column) };
    if slot < 0 || slot == args.pad_slot_id || slot >= slots { -1 } else { slot }
}

impl Read {
    /// `None` for a sequence that is skipped: padding, a slot that is not there, a number of accepted tokens that
    /// cannot be. All threads of a cluster find the same.
    ///
    /// # Safety
    /// The indices of the arguments are there.
    #[inline(always)]
    pub(super) unsafe fn of(gpu: &impl Gpu, args: &Args, sequence: u32) -> Option<Self> {
        // SAFETY: the caller's promise; a column that is not there belongs to a number that cannot be.
        unsafe {
            let conv = slot(gpu, args, &args.state_indices, sequence, 0, args.conv_slots);
            if conv < 0 {
                return None;
            }
            let (mut accepted, mut column) = (0, 0);
            if args.num_accepted_tokens.address != 0 {
                let number = load(gpu, &args.num_accepted_tokens, sequence, 0);
                if number < 1 || number > i64::from(args.most_accepted) {
                    return None;
                }
                accepted = number as u32;
                column = if args.index_columns > 1 { accepted - 1 } else { 0 };
            }
            let recurrent = slot(gpu, args, &args.state_indices, sequence, column, args.slots);
            if recurrent < 0 {
                return None;
            }
            Some(Self { conv, recurrent, accepted })
        }
    }

    /// The first column of the convolution's window.
    #[inline(always)]
    pub(super) fn first_column(&self, args: &Args) -> u32 {
        if self.accepted > 0 { self.accepted - 1 } else { args.conv_columns + 1 - args.conv_width }
    }
}

impl<const D: usize> Kept<D> {
    /// Where the state after token `token` goes, 0 for nowhere. `read` is the slot it was read from.
    ///
    /// # Safety
    /// The indices are there.
    #[inline(always)]
    pub(super) unsafe fn address(
        &self,
        gpu: &impl Gpu,
        args: &Args,
        sequence: u32,
        read: i64,
        token: u32,
    ) -> u64 {
        let is_kept = match self.kind {
            args::NOTHING => false,
            args::LAST | args::LAST_AT => token + 1 == args.tokens,
            _ => true,
        };
        if !is_kept {
            return 0;
        }
        let mut slot = read;
        if self.kind != args::LAST {
            // SAFETY: the caller's promise.
            slot = unsafe { self::slot(gpu, args, &self.indices, sequence, token, self.slots) };
        }
        if slot < 0 {
            return 0;
        }
        let (of_slot, of_token) = (self.to.strides[0], self.to.strides[1]);
        self.to.address + slot as u64 * of_slot + u64::from(token) * of_token
    }
}
