//! Memory that a thread keeps from call to call, so that an op need not allocate.

use std::cell::RefCell;

use super::lanes::WIDEST;

thread_local! {
    /// One for each call within a call that there was.
    static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// A length that whole registers of every instruction set walk.
pub(super) const fn padded(len: usize) -> usize {
    len.next_multiple_of(WIDEST)
}

/// Has `work` called with `len` f32 of this thread's memory, from a cache line's start on. What they hold is
/// left over from earlier calls.
pub(super) fn with<T>(len: usize, work: impl FnOnce(&mut [f32]) -> T) -> T {
    // A call within a call, as one that shares out what it was given or a pool that steals work makes, has memory
    // of its own.
    let mut memory = KEPT.with_borrow_mut(Vec::pop).unwrap_or_default();
    if memory.len() < len + WIDEST {
        memory.resize(len + WIDEST, 0.0);
    }
    let start = memory.as_ptr().align_offset(64).min(WIDEST);
    let result = work(&mut memory[start..start + len]);
    KEPT.with_borrow_mut(|kept| kept.push(memory));
    result
}

/// Hands out pieces of one stretch of memory.
pub(super) struct Pieces<'a>(&'a mut [f32]);

impl<'a> Pieces<'a> {
    pub(super) fn of(memory: &'a mut [f32]) -> Self {
        Self(memory)
    }

    /// The next `len` f32.
    pub(super) fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (piece, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        piece
    }
}
