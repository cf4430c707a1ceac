//! Memory for fresh tensors of the CPU, kept when they are freed.
//!
//! `malloc` gives the next tensor another address more often than not, whose lines are in the wrong core's
//! cache or in none: at 400 KB of outputs that took half the time of the call. From 32 MiB on, where glibc's
//! threshold ends, it maps anew for every tensor, and a fresh page costs a fault and a clearing at its first
//! touch: at 100 MB several times what the op itself takes. So tensors get blocks (of huge pages, where
//! large) that go back to a small store, the last one first, as CUDA tensors' memory goes back to PyTorch's
//! allocator.

use std::sync::{Mutex, TryLockError};

use gdn::{Block, BufError, Pages};

/// Tensors of fewer bytes are `malloc`'s.
pub(crate) const LEAST: usize = 64 << 10;
/// The most bytes that are kept for later.
const MOST_KEPT: usize = 512 << 20;
/// The most blocks that are kept: each is looked at where a new one is wanted.
const MOST_BLOCKS: usize = 64;

/// Blocks of no tensor, the longest unused first.
static KEPT: Mutex<Vec<Block>> = Mutex::new(Vec::new());

/// A block of at least so many bytes, with whatever it has in it.
pub(crate) fn take(bytes: usize) -> Result<Block, BufError> {
    with_kept(|kept| {
        // At most a quarter of a block lies idle.
        let fits = |block: &Block| (bytes..=bytes / 3 * 4).contains(&block.bytes().len());
        kept.iter().rposition(fits).map(|i| kept.remove(i))
    })
    .flatten()
    .map_or_else(|| Block::new(bytes, Pages::Huge), Ok)
}

/// Keeps a block, and lets go of those that are too many.
pub(crate) fn give_back(block: Block) {
    let dropped = with_kept(|kept| {
        kept.push(block);
        let mut room = MOST_KEPT;
        let fitting = kept.iter().rev().take(MOST_BLOCKS).take_while(|block| {
            let fits = block.bytes().len() <= room;
            room = room.saturating_sub(block.bytes().len());
            fits
        });
        let surplus = kept.len() - fitting.count();
        kept.drain(..surplus).collect::<Vec<_>>()
    });
    drop(dropped);
}

/// Lets go of all that is kept. The bytes there were.
pub(crate) fn empty() -> usize {
    let kept = with_kept(std::mem::take).unwrap_or_default();
    kept.iter().map(|block| block.bytes().len()).sum()
}

/// `None` where another thread is at it, or was when the process was forked: waiting is not worth it.
fn with_kept<T>(change: impl FnOnce(&mut Vec<Block>) -> T) -> Option<T> {
    match KEPT.try_lock() {
        Ok(mut kept) => Some(change(&mut kept)),
        Err(TryLockError::Poisoned(kept)) => Some(change(&mut kept.into_inner())),
        Err(TryLockError::WouldBlock) => None,
    }
}
