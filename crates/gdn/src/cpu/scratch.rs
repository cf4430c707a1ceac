//! Memory that a thread keeps from call to call, so that an op need not allocate.

use std::cell::RefCell;

use super::lanes::WIDEST;

thread_local! {
    static KEPT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A length that whole registers of every instruction set walk.
pub(super) const fn padded(len: usize) -> usize {
    len.next_multiple_of(WIDEST)
}

/// Has `work` called with `len` f32 of this thread's memory, from a cache line's start on. What they hold is
/// left over from earlier calls.
pub(super) fn with<T>(len: usize, work: impl FnOnce(&mut [f32]) -> T) -> T {
    KEPT.with(|kept| {
        // A call within a call, as a pool that steals work may make, has memory of its own.
        let mut own = Vec::new();
        let mut kept = kept.try_borrow_mut().ok();
        let memory = kept.as_deref_mut().unwrap_or(&mut own);
        if memory.len() < len + WIDEST {
            memory.resize(len + WIDEST, 0.0);
        }
        let start = memory.as_ptr().align_offset(64).min(WIDEST);
        work(&mut memory[start..start + len])
    })
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
