//! [`AsyncCopy`]: copies from global to shared memory that run on while the thread goes on.

use super::Gpu;

/// `cp.async`. A thread's copies since its last [`AsyncCopy::commit_copies`] make a group, and it waits for
/// its own groups, oldest first. Until then their bytes of shared memory are nobody's to touch, and those of
/// global memory not to be written. Other threads see what was copied after a barrier that comes after the
/// wait.
pub trait AsyncCopy: Gpu {
    /// Begins to copy 16 bytes; where `there` is false zeros are written and nothing is read.
    ///
    /// # Safety
    /// `to` and `from` are multiples of 16; the bytes lie within the block's shared memory and, where
    /// `there`, readable global memory.
    unsafe fn copy16(&self, to: u32, from: u64, there: bool);
    /// Begins to copy 4 bytes, as [`AsyncCopy::copy16`] does.
    ///
    /// # Safety
    /// That of [`AsyncCopy::copy16`], with multiples of 4.
    unsafe fn copy4(&self, to: u32, from: u64, there: bool);
    /// Ends a group, which may be empty.
    fn commit_copies(&self);
    /// Waits until all of this thread's groups but the `LEFT` latest have landed.
    fn wait_copies<const LEFT: u32>(&self);
}
