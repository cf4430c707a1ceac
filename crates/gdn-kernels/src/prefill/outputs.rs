//! Warps that make the outputs of others' rows of S.

use super::{
    args::{RAISED, WARP_ROWS},
    rows::{handed_corrections, handed_scales, handed_state, warp},
    scan::Block,
    tiles::{Tokens, by_triangle, from_start, of_state},
};
use crate::gpu::{AsyncCopy, Bytes16, Swizzle, TensorCore};

/// A warp's outputs.
pub(super) struct Outputs<'a, G, const TILES: usize> {
    block: &'a Block<'a, false, G>,
}

impl<'a, G: TensorCore + AsyncCopy, const TILES: usize> Outputs<'a, G, TILES> {
    #[inline(always)]
    pub(super) fn new(block: &'a Block<'a, false, G>) -> Self {
        Self { block }
    }

    /// What the queries of the chunk at `base` find in S, and what brings it back to what it is.
    ///
    /// # Safety
    /// As [`run`](super::scan::run); the chunk was copied and S handed over, and a barrier is past.
    #[inline(always)]
    pub(super) unsafe fn of_state(&self, base: u32) -> (Tokens, [f32; 2]) {
        let Block { gpu, room, .. } = *self.block;
        // SAFETY: the caller's promise.
        unsafe {
            let o = of_state::<TILES>(gpu, handed_state(self.block), base + room.q);
            let down = [0, 8].map(|line| {
                let at = handed_scales(self.block, gpu.lane() / 4 + line);
                f32::from_bits(gpu.load_shared4(at))
            });
            (o, down)
        }
    }

    /// Adds what the corrections make, and puts the outputs, which `down` brings back.
    ///
    /// # Safety
    /// As [`run`](super::scan::run); U was handed over, and a barrier is past.
    #[inline(always)]
    pub(super) unsafe fn put(&self, chunk: u32, base: u32, mut o: Tokens, down: [f32; 2]) {
        let Block { gpu, room, .. } = *self.block;
        // SAFETY: the caller's promise.
        unsafe {
            from_start(gpu, base + room.factors + gpu.lane() % 4 * 32, &mut o);
            let handed = handed_corrections(self.block);
            let mut left = [[0; 4]; 4];
            let mut k16 = 0;
            while k16 < 4 {
                Bytes16(left[k16]) = gpu.load_shared16(handed + k16 as u32 * 512);
                k16 += 1;
            }
            by_triangle(gpu, &left, base + room.p, &mut o);
            let lane = gpu.lane();
            let line = self.block.first + warp(self.block) * WARP_ROWS + lane / 4;
            let mut r = 0;
            while r < 2 {
                let line = line + r as u32 * 8;
                if lane.is_multiple_of(4) {
                    self.block.put_scale(chunk, line, down[r]);
                }
                let at = self.block.outputs(chunk, line);
                let mut tile = 0;
                while tile < 8 {
                    let two = gpu.pack_f16(o[tile][2 * r] / RAISED, o[tile][2 * r + 1] / RAISED);
                    let place = Swizzle::Bytes128.place(line % 8 * 128 + tile as u32 * 16 + lane % 4 * 4);
                    gpu.store4(at + u64::from(place % 128), two);
                    tile += 1;
                }
                r += 1;
            }
        }
    }
}
