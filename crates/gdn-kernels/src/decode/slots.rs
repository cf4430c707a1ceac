//! Which slots a sequence has: indices are read here, on the device, and those that name no slot are padding.

use super::{
    args::{self, Args, Indices, Kept},
    element::far,
};
use crate::gpu::Gpu;

/// Where a sequence's states are read.
#[derive(Clone, Copy, Default)]
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

/// The index of a sequence in a column; its own number where there are no indices.
///
/// # Safety
/// As [`load`], where there are indices.
#[inline(always)]
unsafe fn index(gpu: &impl Gpu, is_plain: bool, indices: &Indices, sequence: u32, column: u32) -> i64 {
    if indices.address == 0 {
        return i64::from(sequence);
    }
    // SAFETY: the caller's promise.
    unsafe {
        if is_plain {
            let row = far(true, u64::from(sequence), indices.row);
            let at = indices.address + row + far(true, u64::from(column), indices.column);
            i64::from(gpu.load4(at) as i32)
        } else {
            load(gpu, indices, sequence, column)
        }
    }
}

/// The slot that an index names, of so many; -1 for padding.
#[inline(always)]
fn slot(args: &Args, indices: &Indices, index: i64, slots: i64) -> i64 {
    let is_none = index < 0 || index == args.pad_slot_id || index >= slots;
    if is_none && indices.address != 0 { -1 } else { index }
}

impl Read {
    /// Asks for the index of a sequence of a plain call.
    ///
    /// # Safety
    /// The indices of the arguments are there.
    #[inline(always)]
    pub(super) unsafe fn ask(gpu: &impl Gpu, args: &Args, sequence: u32) -> i64 {
        // SAFETY: the caller's promise.
        unsafe { index(gpu, true, &args.state_indices, sequence, 0) }
    }

    /// The same while the kernel before may still write it: for a hint.
    ///
    /// # Safety
    /// As [`Read::ask`].
    #[inline(always)]
    pub(super) unsafe fn peek(gpu: &impl Gpu, args: &Args, sequence: u32) -> i64 {
        let indices = &args.state_indices;
        if indices.address == 0 {
            return i64::from(sequence);
        }
        // SAFETY: the caller's promise.
        i64::from(unsafe { gpu.peek4(indices.address + far(true, u64::from(sequence), indices.row)) } as i32)
    }

    /// [`Read::of`] for a plain call, by what was asked for.
    #[inline(always)]
    pub(super) fn by(args: &Args, first: i64) -> Option<Self> {
        // All numbers have 31 bits, and what is negative is padding.
        let index = first as u32;
        let least = (args.conv_slots as u32).min(args.slots as u32);
        let is_there = index < least && index != args.pad_slot_id as u32;
        let read = Self { conv: i64::from(index), recurrent: i64::from(index), accepted: 0 };
        (is_there || args.state_indices.address == 0).then_some(read)
    }

    /// `None` for a sequence that is skipped: padding, a slot that is not there, a number of accepted tokens
    /// that cannot be. All threads of a cluster find the same.
    ///
    /// # Safety
    /// The indices of the arguments are there.
    #[inline(always)]
    pub(super) unsafe fn of(gpu: &impl Gpu, args: &Args, sequence: u32) -> Option<Self> {
        let indices = &args.state_indices;
        // SAFETY: the caller's promise; a column that is not there belongs to a number that cannot be.
        unsafe {
            let first = index(gpu, false, indices, sequence, 0);
            let (mut accepted, mut of_state) = (0, first);
            if args.num_accepted_tokens.address != 0 {
                let number = load(gpu, &args.num_accepted_tokens, sequence, 0);
                if number < 1 || number > i64::from(args.most_accepted) {
                    return None;
                }
                accepted = number as u32;
                if args.index_columns > 1 {
                    of_state = index(gpu, false, indices, sequence, accepted - 1);
                }
            }
            let conv = slot(args, indices, first, args.conv_slots);
            let recurrent = slot(args, indices, of_state, args.slots);
            if conv < 0 || recurrent < 0 { None } else { Some(Self { conv, recurrent, accepted }) }
        }
    }

    /// The first column of the convolution's window.
    #[inline(always)]
    pub(super) fn first_column(&self, is_plain: bool, args: &Args) -> u32 {
        if is_plain {
            return 0;
        }
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
        is_plain: bool,
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
        // SAFETY: the caller's promise.
        let slot = unsafe { self.slot(gpu, is_plain, args, sequence, read, token) };
        if slot < 0 { 0 } else { self.at(is_plain, slot as u64, token) }
    }

    /// Where the state after token `token` is in a slot.
    #[inline(always)]
    pub(super) fn at(&self, is_plain: bool, slot: u64, token: u32) -> u64 {
        let (of_slot, of_token) = (self.to.strides[0], self.to.strides[1]);
        self.to.address + far(is_plain, slot, of_slot) + far(is_plain, u64::from(token), of_token)
    }

    /// The slot of a state that is kept, -1 for none.
    ///
    /// # Safety
    /// As [`Kept::address`].
    #[inline(always)]
    pub(super) unsafe fn slot(
        &self,
        gpu: &impl Gpu,
        is_plain: bool,
        args: &Args,
        sequence: u32,
        read: i64,
        token: u32,
    ) -> i64 {
        if self.kind == args::LAST {
            return read;
        }
        // SAFETY: the caller's promise.
        let index = unsafe { index(gpu, is_plain, &self.indices, sequence, token) };
        self::slot(args, &self.indices, index, self.slots)
    }
}
