//! [`Warp`] through LLVM's intrinsics, which it knows to be convergent.

use super::{Nvptx, Shared};
use crate::gpu::Warp;

const ALL: i32 = -1;
/// Lanes of all the warp take part: the clamp of the shuffles.
const WARP: i32 = 31;

unsafe extern "C" {
    #[link_name = "llvm.nvvm.shfl.sync.bfly.i32"]
    fn shuffle_bfly(lanes: i32, value: i32, mask: i32, clamp: i32) -> i32;
    #[link_name = "llvm.nvvm.shfl.sync.idx.i32"]
    fn shuffle_idx(lanes: i32, value: i32, lane: i32, clamp: i32) -> i32;
    #[link_name = "llvm.nvvm.shfl.sync.up.i32"]
    fn shuffle_up(lanes: i32, value: i32, distance: i32, clamp: i32) -> i32;
    #[link_name = "llvm.nvvm.shfl.sync.down.i32"]
    fn shuffle_down(lanes: i32, value: i32, distance: i32, clamp: i32) -> i32;
    #[link_name = "llvm.nvvm.redux.sync.or"]
    fn or(value: i32, lanes: i32) -> i32;
    #[link_name = "llvm.nvvm.vote.ballot.sync"]
    fn ballot(lanes: i32, yes: bool) -> i32;
    #[link_name = "llvm.nvvm.bar.warp.sync"]
    fn sync_warp(lanes: i32);
}

impl<S: Shared> Warp for Nvptx<S> {
    #[inline(always)]
    fn shuffle_xor(&self, value: u32, mask: u32) -> u32 {
        // SAFETY: moves a register between lanes, here and below.
        unsafe { shuffle_bfly(ALL, value as i32, mask as i32, WARP) as u32 }
    }

    #[inline(always)]
    fn uniform(&self, value: u32) -> u32 {
        // SAFETY: as above. ptxas puts what comes of it into a register of the warp's, and knows no other way to have one of
        // what is in the lanes' without asking what is around it.
        unsafe { or(value as i32, ALL) as u32 }
    }

    #[inline(always)]
    fn shuffle(&self, value: u32, lane: u32) -> u32 {
        // SAFETY: as above.
        unsafe { shuffle_idx(ALL, value as i32, lane as i32, WARP) as u32 }
    }

    #[inline(always)]
    fn shuffle_up(&self, value: u32, distance: u32) -> u32 {
        // SAFETY: as above.
        unsafe { shuffle_up(ALL, value as i32, distance as i32, 0) as u32 }
    }

    #[inline(always)]
    fn shuffle_down(&self, value: u32, distance: u32) -> u32 {
        // SAFETY: as above.
        unsafe { shuffle_down(ALL, value as i32, distance as i32, WARP) as u32 }
    }

    #[inline(always)]
    fn ballot(&self, yes: bool) -> u32 {
        // SAFETY: as above.
        unsafe { ballot(ALL, yes) as u32 }
    }

    #[inline(always)]
    fn sync_warp(&self) {
        // SAFETY: orders memory and waits, nothing else.
        unsafe { sync_warp(ALL) }
    }
}
