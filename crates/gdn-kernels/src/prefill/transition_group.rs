//! [`transition`](super::transition) by two groups of four warps, of which each multiplies together (`wgmma`),
//! with 64 rows of Z or of M (`chain.rs`). They need nothing of each other but the chunks, which one thread has
//! copied: it waits for a group that is more than a chunk behind its own.

use super::{
    args::{ATOM, Args, CHUNK, FACTORS, SLICE, TransitionGroupRoom, WARP_ROWS},
    chain::{self, Beside, Chain, Chunk},
    transition::Block,
};
use crate::gpu::{TensorCore, Wgmma};

const STAGES: u32 = TransitionGroupRoom::STAGES;
/// Chunks that are copied ahead.
const AHEAD: u32 = 2;
/// Rows of a group.
const ROWS: u32 = 4 * WARP_ROWS;

/// A warp.
struct Group<'a, G, const TILES: usize, const OWN: usize> {
    block: &'a Block<'a, G>,
    chunks: u32,
    /// Whether it is the thread that has chunks copied.
    is_one: bool,
}

/// The kernel, for keys of `8 * TILES` numbers, `OWN` atoms.
///
/// # Safety
/// As [`run`](super::transition::run).
#[inline(always)]
pub unsafe fn run<const TILES: usize, const OWN: usize, G: Wgmma + TensorCore>(gpu: &G, args: &Args) {
    // SAFETY: the caller's promises.
    unsafe {
        if let Some(block) = Block::new(gpu, args) {
            let chunks = block.part.to - block.part.from;
            Group::<G, TILES, OWN> { block: &block, chunks, is_one: gpu.thread() == 0 }.run();
        }
    }
}

impl<G: Wgmma + TensorCore, const TILES: usize, const OWN: usize> Group<'_, G, TILES, OWN> {
    const ROOM: TransitionGroupRoom = TransitionGroupRoom::new(8 * TILES as u32);

    #[inline(always)]
    unsafe fn run(&self) {
        let block = self.block;
        let gpu = block.gpu;
        let mut chain = Chain::<G, TILES, OWN>::new(gpu);
        let group = gpu.thread() / 128;
        let groups = (block.rows() - block.first).min(2 * ROWS).div_ceil(ROWS);
        // SAFETY: as `run`.
        unsafe {
            if self.is_one {
                let mut stage = 0;
                while stage < STAGES {
                    gpu.mbarrier_init(self.landed(stage), 1);
                    gpu.mbarrier_init(self.free(stage), groups * 4);
                    stage += 1;
                }
                gpu.mbarrier_fence();
            }
            gpu.barrier();
            if self.is_one {
                let mut i = 0;
                while i < AHEAD {
                    self.fetch(i);
                    i += 1;
                }
            }
            if group < groups && self.is_there() {
                self.begin(&mut chain);
            }
            // From now on chunks come to where the states came through.
            gpu.barrier();
            if group < groups {
                self.rows(&mut chain);
            }
            // Nobody needs the last chunk.
            gpu.barrier();
            if self.is_there() {
                block.end::<TILES>(chain.s.as_flattened());
            }
        }
    }

    /// Whether the warp has rows. Others of the group multiply zeros.
    #[inline(always)]
    fn is_there(&self) -> bool {
        self.block.row() < self.block.rows()
    }

    /// What the warp's rows are at the beginning.
    #[inline(always)]
    unsafe fn begin(&self, chain: &mut Chain<'_, G, TILES, OWN>) {
        let block = self.block;
        let gpu = block.gpu;
        // SAFETY: as `run`.
        unsafe {
            if let Some(states) = block.initial() {
                // Through the last stages, to which nothing is copied yet.
                let room = AHEAD * Self::ROOM.stage + gpu.thread() / 32 * chain::ROOM;
                chain.exchange::<true>(block.head, &states, block.row(), room);
                gpu.fence_async();
            } else {
                block.begin::<TILES>(chain.s.as_flattened_mut());
            }
            block.put_start::<TILES>(chain.s.as_flattened());
            chain.begin();
        }
    }

    /// From the beginning to the end of the segment in the window.
    #[inline(always)]
    unsafe fn rows(&self, chain: &mut Chain<'_, G, TILES, OWN>) {
        let gpu = self.block.gpu;
        // SAFETY: as `run`.
        unsafe {
            let mut i = 0;
            if self.chunks > 0 {
                gpu.mbarrier_wait(self.landed(0), 0);
            }
            while i < self.chunks {
                chain.advance(self.chunk(gpu.uniform(i % STAGES)), &Fetching { group: self, i });
                // The warp needs the chunk no more.
                gpu.sync_warp();
                if gpu.lane() == 0 {
                    gpu.mbarrier_arrive(self.free(i));
                }
                i += 1;
            }
        }
    }

    /// The chunk in a stage.
    #[inline(always)]
    fn chunk(&self, stage: u32) -> Chunk {
        let Block { gpu, has_values, .. } = *self.block;
        let base = stage * Self::ROOM.stage;
        let row = gpu.thread() / 32 * WARP_ROWS;
        let has_values = has_values && self.is_there();
        Chunk {
            k: base + Self::ROOM.k,
            t: base + Self::ROOM.t,
            factors: Self::ROOM.factors + stage * FACTORS,
            values: has_values.then(|| chain::values(gpu, base + Self::ROOM.v, row)),
        }
    }

    /// The mbarrier at which its copies arrive.
    #[inline(always)]
    fn landed(&self, i: u32) -> u32 {
        Self::ROOM.landed + i % STAGES * 16
    }

    /// The one at which warps arrive that need it no more.
    #[inline(always)]
    fn free(&self, i: u32) -> u32 {
        self.landed(i) + 8
    }

    /// Begins to copy the chunk that is `i` after the first, where there is one, into its stage: one thread.
    #[inline(always)]
    unsafe fn fetch(&self, i: u32) {
        let block = self.block;
        let gpu = block.gpu;
        if i >= self.chunks {
            return;
        }
        let stage = i % STAGES;
        let (chunk, landed, to) = (self.chunk(stage), self.landed(i), stage * Self::ROOM.stage);
        let from = block.sources::<TILES>(block.part.from + i);
        let keys = OWN as u32 * ATOM;
        let values = block.slices() * CHUNK * SLICE * 2;
        // SAFETY: as `run`.
        unsafe {
            if i >= STAGES {
                gpu.mbarrier_wait(self.free(i), (i / STAGES - 1) % 2);
            }
            gpu.mbarrier_arrive_expect(landed, keys + ATOM + values + FACTORS);
            gpu.bulk_copy(chunk.factors, from.factors, FACTORS, landed);
            gpu.bulk_copy(chunk.k, from.k, keys, landed);
            if block.has_values {
                gpu.bulk_copy(to + Self::ROOM.v, from.v, values, landed);
            }
            gpu.bulk_copy(chunk.t, from.t, ATOM, landed);
        }
    }
}

/// The chunk that is `i` after the first has begun.
struct Fetching<'a, G, const TILES: usize, const OWN: usize> {
    group: &'a Group<'a, G, TILES, OWN>,
    i: u32,
}

impl<G: Wgmma + TensorCore, const TILES: usize, const OWN: usize> Beside<G> for Fetching<'_, G, TILES, OWN> {
    #[inline(always)]
    unsafe fn product_begun(&self) {
        if self.group.is_one {
            // SAFETY: the caller's promise.
            unsafe { self.group.fetch(self.i + AHEAD) };
        }
    }

    #[inline(always)]
    unsafe fn next(&self) {
        let next = self.i + 1;
        if next < self.group.chunks {
            // SAFETY: the caller's promise.
            unsafe { self.group.block.gpu.mbarrier_wait(self.group.landed(next), next / STAGES % 2) };
        }
    }
}
