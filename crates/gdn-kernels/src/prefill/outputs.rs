//! Warps that make the outputs of others' rows of S, and copy the chunks that both need.

use super::{
    args::{CHUNK, padded},
    scan::Block,
    tiles::{Tokens, by_triangle, factor, inverse, of_state, right, scales},
};
use crate::gpu::{AsyncCopy, Bytes16, TensorCore};

/// A warp's outputs.
pub(super) struct Outputs<'a, G, const TILES: usize> {
    block: &'a Block<'a, G>,
}

impl<'a, G: TensorCore + AsyncCopy, const TILES: usize> Outputs<'a, G, TILES> {
    /// All chunks of the block. The barriers are, for all threads: one when the state was read; for each
    /// chunk one when it has landed and S is handed over, and one when U is; two around the keeping of
    /// states, one where the only stage is free again.
    ///
    /// # Safety
    /// As [`run`](super::scan::run).
    #[inline(always)]
    pub(super) unsafe fn run(block: &'a Block<'a, G>) {
        let Block { gpu, args, from, to, .. } = *block;
        let outputs = Self { block };
        // SAFETY: the caller's promises, here and below.
        unsafe {
            gpu.barrier();
            let mut i = 0;
            loop {
                if from < to {
                    if args.stages == 1 || i == 0 {
                        block.fetch::<TILES>(i);
                    }
                    gpu.commit_copies();
                    gpu.wait_copies::<0>();
                    gpu.barrier();
                    if args.stages > 1 && from + i + 1 < to {
                        block.fetch::<TILES>(i + 1);
                    }
                    outputs.chunk(from + i, block.stage(i));
                }
                if block.keeps(i) {
                    gpu.barrier();
                    gpu.barrier();
                } else if args.stages == 1 {
                    gpu.barrier();
                }
                i += 1;
                if from + i >= to {
                    break;
                }
            }
        }
    }

    /// One chunk, which is in shared memory from `base` on.
    #[inline(always)]
    unsafe fn chunk(&self, chunk: u32, base: u32) {
        let Block { gpu, room, .. } = *self.block;
        let row_bytes = padded(8 * TILES as u32);
        // SAFETY: as `run`; the chunk was copied and S handed over, and a barrier is past.
        unsafe {
            let mut o = of_state::<TILES>(
                gpu,
                self.block.handed_state(),
                base + room.q + right(gpu, row_bytes),
                row_bytes,
            );
            let down = self.scales(0);
            gpu.barrier();
            // Everything as many times itself as U is multiplied with.
            let units = self.scales(1).map(inverse);
            let factors_of_rows = [down[0] * units[0], down[1] * units[1]];
            let factors = base + room.factors + gpu.lane() % 4 * 32;
            let mut tile = 0;
            while tile < 8 {
                let mut c = 0;
                while c < 2 {
                    let [.., from_start, _] = factor(gpu, factors, tile, c);
                    o[tile][c] = (o[tile][c] * factors_of_rows[0]) * from_start;
                    o[tile][c + 2] = (o[tile][c + 2] * factors_of_rows[1]) * from_start;
                    c += 1;
                }
                tile += 1;
            }
            let handed = self.block.handed_corrections();
            let left = |k16: usize| {
                let Bytes16(left) = gpu.load_shared16(handed + k16 as u32 * 512);
                left
            };
            let at = base + room.p + right(gpu, padded(CHUNK));
            by_triangle(gpu, left, at, padded(CHUNK), &mut o);
            self.put_outputs(chunk, &o, units);
        }
    }

    /// What brings products with S (0) or U (1) back, of the lane's two rows.
    #[inline(always)]
    unsafe fn scales(&self, which: u32) -> [f32; 2] {
        let gpu = self.block.gpu;
        [0, 8].map(|line| {
            let at = self.block.handed_scales(gpu.lane() / 4 + line) + which * 4;
            // SAFETY: as `run`; a barrier is past since they were handed over.
            f32::from_bits(unsafe { gpu.load_shared4(at) })
        })
    }

    /// Puts the outputs, `units` times themselves, where the values were.
    #[inline(always)]
    unsafe fn put_outputs(&self, chunk: u32, o: &Tokens, units: [f32; 2]) {
        let Block { gpu, args, .. } = *self.block;
        let (up, down) = scales(gpu, o, units);
        let lane = gpu.lane();
        let head = self.block.v_head(chunk) * u64::from(args.dv);
        let mut r = 0;
        while r < 2 {
            let row = head + u64::from(self.block.first + self.block.warp_row() + lane / 4 + r as u32 * 8);
            // SAFETY: as `run`.
            unsafe {
                if lane.is_multiple_of(4) {
                    let scale = down[r] * args.scale;
                    gpu.store4(args.scratch.out_scales + row * 4, scale.to_bits());
                }
                let at = args.scratch.v + row * u64::from(CHUNK * 2) + u64::from(lane % 4 * 4);
                let mut tile = 0;
                while tile < 8 {
                    let two = gpu.pack_f16(o[tile][2 * r] * up[r], o[tile][2 * r + 1] * up[r]);
                    gpu.store4(at + tile as u64 * 16, two);
                    tile += 1;
                }
            }
            r += 1;
        }
    }
}
