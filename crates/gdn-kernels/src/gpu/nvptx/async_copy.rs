//! [`AsyncCopy`]: `cp.async`.

use core::arch::asm;

use super::{Nvptx, Shared};
use crate::gpu::AsyncCopy;

impl<S: Shared> AsyncCopy for Nvptx<S> {
    #[inline(always)]
    unsafe fn copy16(&self, to: u32, from: u64, there: bool) {
        let bytes = if there { 16u32 } else { 0 };
        // SAFETY: the caller's promise; of the source so many bytes are read, and the rest is zeros.
        unsafe {
            asm!("cp.async.cg.shared.global [{}], [{}], 16, {};",
                in(reg32) self.shared(to), in(reg64) from, in(reg32) bytes, options(nostack));
        }
    }

    #[inline(always)]
    unsafe fn copy4(&self, to: u32, from: u64, there: bool) {
        let bytes = if there { 4u32 } else { 0 };
        // SAFETY: as above.
        unsafe {
            asm!("cp.async.ca.shared.global [{}], [{}], 4, {};",
                in(reg32) self.shared(to), in(reg64) from, in(reg32) bytes, options(nostack));
        }
    }

    #[inline(always)]
    fn commit_copies(&self) {
        // SAFETY: ends a group of this thread's.
        unsafe { asm!("cp.async.commit_group;", options(nostack)) }
    }

    #[inline(always)]
    fn wait_copies<const LEFT: u32>(&self) {
        // SAFETY: waits.
        unsafe { asm!("cp.async.wait_group {};", const LEFT, options(nostack)) }
    }
}
