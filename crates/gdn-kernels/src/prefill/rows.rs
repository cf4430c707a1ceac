//! Warps that have 16 rows of S each, multiply for themselves, and take them from chunk to chunk. Of rows that
//! are longer than registers suffice for, the last columns are in shared memory.

use gdn_math::Lanes;

use super::{
    args::{CHUNK, SLICE, ScanRoom, TILE, WARP_ROWS, padded, state_row},
    scan::Block,
    states::Place,
    tiles::{
        Tile, Tokens, by_triangle, corrected, down_of_update, factor, inverse, left_of_state, lefts,
        of_state, packed, right, scale, sums, sums_by_atoms,
    },
};
use crate::gpu::{AsyncCopy, Bytes16, F16, TensorCore};

/// Tiles of S that come out of shared memory, or go there, together.
const FOUR: usize = 4;

/// A warp's rows of S, of `TILES` tiles.
pub(super) struct Rows<'a, G, const TILES: usize, const OWN: usize> {
    block: &'a Block<'a, false, G>,
    /// The first of them. The others are in shared memory.
    s: [Tile; OWN],
    /// Of the chunk that comes next: see `Scratch::factors`.
    values: u64,
    /// What this chunk's U is multiplied with in addition, as far as it is left at the end.
    lift: f32,
}

/// Where a warp hands over to the one that makes its outputs: the left sides of S, for the lane.
#[inline(always)]
pub(super) fn handed_state<G: TensorCore>(block: &Block<'_, false, G>) -> u32 {
    let Block { gpu, args, room, .. } = *block;
    args.stages * room.bytes + warp(block) * ScanRoom::handed(args.dk) + gpu.lane() * 16
}

/// The left sides of U, for the lane.
#[inline(always)]
pub(super) fn handed_corrections<G: TensorCore>(block: &Block<'_, false, G>) -> u32 {
    handed_state(block) + block.args.dk / 16 * 512
}

/// What brings rows back to what they are: row `line` of the warp's.
#[inline(always)]
pub(super) fn handed_scales<G: TensorCore>(block: &Block<'_, false, G>, line: u32) -> u32 {
    handed_corrections(block) - block.gpu.lane() * 16 + 2048 + line * 4
}

/// This warp in its half of the block.
#[inline(always)]
pub(super) fn warp<G: TensorCore>(block: &Block<'_, false, G>) -> u32 {
    let (thread, half) = (block.gpu.thread(), block.copiers);
    // Worked out anew each time: there are no registers to keep places in.
    block.gpu.unforeseen(u64::from((if thread < half { thread } else { thread - half }) / 32)) as u32
}

impl<'a, G: TensorCore + AsyncCopy, const TILES: usize, const OWN: usize> Rows<'a, G, TILES, OWN> {
    #[inline(always)]
    pub(super) fn new(block: &'a Block<'a, false, G>) -> Self {
        Self { block, s: [[0.0; 4]; OWN], values: 0, lift: 1.0 }
    }

    /// Reads the states that the block begins with, through the shared memory at `room`.
    ///
    /// # Safety
    /// As [`run`](super::scan::run).
    #[inline(always)]
    pub(super) unsafe fn begin(&mut self, room: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            let states = self.block.begin();
            if states.at != 0 {
                self.block.exchange::<true, OWN>(&states, self.place(room), &mut self.s);
            }
            let gpu = self.block.gpu;
            let mut tile = self.first_beyond();
            while tile < TILES {
                let mut four = [[0.0; 4]; FOUR];
                if states.at != 0 {
                    // Others are through with the room.
                    gpu.sync_warp();
                    let place = Place { column: 8 * tile as u32, ..self.place(room) };
                    self.block.exchange::<true, FOUR>(&states, place, &mut four);
                }
                self.put(tile, &four);
                tile += FOUR;
            }
        }
    }

    /// Keeps the states after the chunks before `chunk`, through the shared memory at `room`.
    ///
    /// # Safety
    /// As [`run`](super::scan::run); nobody else touches the room between the barriers before and after.
    #[inline(always)]
    pub(super) unsafe fn keep(&mut self, chunk: u32, room: u32) {
        let (block, place) = (self.block, self.place(room));
        // SAFETY: the caller's promise.
        unsafe {
            block.keep(chunk, |states| {
                block.exchange::<false, OWN>(states, place, &mut self.s);
                let mut tile = self.first_beyond();
                while tile < TILES {
                    let place = Place { column: 8 * tile as u32, ..place };
                    block.exchange::<false, FOUR>(states, place, &mut self.get::<FOUR>(tile));
                    tile += FOUR;
                }
            });
        }
    }

    /// The first tile that is in shared memory, in a way that keeps loops over them from being unrolled.
    #[inline(always)]
    fn first_beyond(&self) -> usize {
        if OWN < TILES { self.block.gpu.unforeseen(OWN as u64) as usize } else { TILES }
    }

    /// Where tile `tile`, one of those in shared memory, is for the lane.
    #[inline(always)]
    fn beyond(&self, tile: usize) -> u32 {
        let Block { gpu, args, room, copiers, .. } = *self.block;
        let dk = 8 * TILES as u32;
        let own = warp(self.block) * ScanRoom::beyond(dk) + (tile - OWN) as u32 * TILE;
        args.stages * room.bytes + copiers / 32 * ScanRoom::handed(dk) + own + gpu.lane() * 16
    }

    /// Some of those tiles, from `tile` on.
    ///
    /// # Safety
    /// They were put there.
    #[inline(always)]
    unsafe fn get<const COUNT: usize>(&self, tile: usize) -> [Tile; COUNT] {
        let (at, mut tiles) = (self.beyond(tile), [[0.0; 4]; COUNT]);
        let mut i = 0;
        while i < COUNT {
            // SAFETY: the caller's promise; each lane reads its own.
            let Bytes16(words) = unsafe { self.block.gpu.load_shared16(at + i as u32 * TILE) };
            tiles[i] = words.map(f32::from_bits);
            i += 1;
        }
        tiles
    }

    /// Puts some of them.
    ///
    /// # Safety
    /// There are so many.
    #[inline(always)]
    unsafe fn put<const COUNT: usize>(&self, tile: usize, tiles: &[Tile; COUNT]) {
        let at = self.beyond(tile);
        let mut i = 0;
        while i < COUNT {
            let words = tiles[i].map(f32::to_bits);
            // SAFETY: the caller's promise; each lane has its own place.
            unsafe { self.block.gpu.store_shared16(at + i as u32 * TILE, Bytes16(words)) };
            i += 1;
        }
    }

    #[inline(always)]
    fn place(&self, room: u32) -> Place {
        let row = warp(self.block) * WARP_ROWS;
        Place { row: self.block.first + row, column: 0, room: room + row * state_row(8 * TILES as u32) }
    }

    /// Asks for what [`Rows::hand_over`] needs of a chunk.
    ///
    /// # Safety
    /// As [`run`](super::scan::run).
    #[inline(always)]
    pub(super) unsafe fn ask(&mut self, chunk: u32) {
        if chunk < self.block.to {
            // SAFETY: the caller's promise.
            self.values = unsafe { self.block.gpu.load8(self.block.factors(chunk) + u64::from(CHUNK * 16)) };
        }
    }

    /// Puts S where the outputs are made, f16 that were brought into range. What rows are multiplied with for
    /// that.
    ///
    /// # Safety
    /// As [`run`](super::scan::run); those who make outputs are through with what was handed over before.
    #[inline(always)]
    pub(super) unsafe fn hand_over(&mut self) -> [f32; 2] {
        let gpu = self.block.gpu;
        // SAFETY: the caller's promise.
        unsafe {
            let value = f32::from_bits(self.values as u32);
            self.lift = f32::from_bits((self.values >> 32) as u32);
            let mut sum = sums_by_atoms(gpu, &self.s);
            let mut tile = self.first_beyond();
            while tile < TILES {
                let [a, b] = sums(gpu, &self.get::<FOUR>(tile));
                sum = [sum[0] + a, sum[1] + b];
                tile += FOUR;
            }
            let [[up_0, down_0], [up_1, down_1]] = sum.map(|sum| scale(sum, value));
            let up = [up_0, up_1];
            let at = handed_state(self.block);
            let mut k16 = 0;
            while k16 < OWN / 2 {
                let left = packed(gpu, &self.s[2 * k16], &self.s[2 * k16 + 1], up);
                gpu.store_shared16(at + k16 as u32 * 512, Bytes16(left));
                k16 += 1;
            }
            let mut tile = self.first_beyond();
            while tile < TILES {
                let [low, high] = self.get(tile);
                let left = packed(gpu, &low, &high, up);
                gpu.store_shared16(at + tile as u32 / 2 * 512, Bytes16(left));
                tile += 2;
            }
            if gpu.lane().is_multiple_of(4) {
                let line = gpu.lane() / 4;
                gpu.store_shared4(handed_scales(self.block, line), down_0.to_bits());
                gpu.store_shared4(handed_scales(self.block, line + 8), down_1.to_bits());
            }
            // The warp itself reads it too.
            gpu.sync_warp();
            up
        }
    }

    /// U of the chunk that is in shared memory from `base` on, which is handed over, as many times itself as
    /// S is multiplied with, `up`; and that.
    ///
    /// # Safety
    /// As [`run`](super::scan::run); the chunk was copied, and a barrier is past.
    #[inline(always)]
    pub(super) unsafe fn correct(&self, base: u32, up: [f32; 2]) -> (Tokens, [f32; 2]) {
        let Block { gpu, room, .. } = *self.block;
        // SAFETY: the caller's promise.
        unsafe {
            // S K^T.
            let mut x = of_state::<TILES>(gpu, handed_state(self.block), base + room.k);
            // X^T. Of V^T four matrices of 8 tokens and 8 rows each.
            let factors = base + room.factors + gpu.lane() % 4 * 32;
            let row = warp(self.block) * WARP_ROWS;
            let v = base + room.v + row / SLICE * CHUNK * padded(SLICE) + row % SLICE * 2;
            let mut pair = 0;
            while pair < 4 {
                let at = v + right(gpu, padded(SLICE)) + pair as u32 * 16 * padded(SLICE);
                let words = gpu.load_matrix4::<true>(at);
                corrected(gpu, words, factors + pair as u32 * 256, up, x.split_at_mut(2 * pair).1);
                pair += 1;
            }
            let mut u: Tokens = [[0.0; 4]; 8];
            by_triangle(gpu, &lefts(gpu, &x), base + room.t, &mut u);
            let at = handed_corrections(self.block);
            let left = lefts(gpu, &u);
            let mut k16 = 0;
            while k16 < 4 {
                gpu.store_shared16(at + k16 as u32 * 512, Bytes16(left[k16]));
                k16 += 1;
            }
            (u, up)
        }
    }

    /// Brings S to the end of the chunk at `base`, with its U, which is `up` times itself.
    ///
    /// # Safety
    /// As [`Rows::correct`].
    #[inline(always)]
    pub(super) unsafe fn update(&mut self, base: u32, mut u: Tokens, up: [f32; 2]) {
        let Block { gpu, room, .. } = *self.block;
        let lift = self.lift;
        let down = up.map(|up| down_of_update(inverse(up), lift));
        // SAFETY: the caller's promise.
        unsafe {
            to_end(gpu, base + room.factors + gpu.lane() % 4 * 32, &mut u);
            let left = lefts(gpu, &u);
            let (k, all) = (base + room.k, left_of_state(gpu, base + room.factors));
            update::<TILES, OWN>(gpu, &left, k, all, down, &mut self.s);
            let mut tile = self.first_beyond();
            while tile < TILES {
                let mut two = self.get::<2>(tile);
                let at = keys::<TILES>(gpu, k) + tile as u32 * 16;
                update_two::<TILES, 2>(gpu, &left, at, all, down, &mut two, 0);
                self.put(tile, &two);
                tile += 2;
            }
        }
    }
}

/// Adds the products of 16 columns of a left side with so many columns of 64 rows, padded, which begin at
/// `at`.
///
/// # Safety
/// They are in shared memory, for all to see.
#[inline(always)]
pub(super) unsafe fn from_left(
    gpu: &impl TensorCore,
    left: [u32; 4],
    at: u32,
    row_bytes: u32,
    sums: &mut Tokens,
) {
    let at = at + right(gpu, row_bytes);
    let mut pair = 0;
    while pair < 4 {
        // SAFETY: the caller's promise.
        let [b0, b1, b2, b3] = unsafe { gpu.load_matrix4::<false>(at + pair as u32 * 16 * row_bytes) };
        sums[2 * pair] = gpu.mma::<F16>(left, [b0, b1], sums[2 * pair]);
        sums[2 * pair + 1] = gpu.mma::<F16>(left, [b2, b3], sums[2 * pair + 1]);
        pair += 1;
    }
}

/// What is left of U at the chunk's end, lifted; `factors` is where those of the first token begin for
/// the lane.
///
/// # Safety
/// As [`factor`].
#[inline(always)]
pub(super) unsafe fn to_end(gpu: &impl TensorCore, factors: u32, u: &mut Tokens) {
    let mut tile = 0;
    while tile < 8 {
        let mut c = 0;
        while c < 2 {
            // SAFETY: the caller's promise.
            let [.., to_end] = unsafe { factor(gpu, factors, tile, c) };
            u[tile][c] *= to_end;
            u[tile][c + 2] *= to_end;
            c += 1;
        }
        tile += 1;
    }
}

/// Brings the first tiles of S to a chunk's end: `all` is what is left of it, `left` what is left of U, which
/// `down` brings back, `k` where the keys are, of `8 * TILES` numbers.
///
/// # Safety
/// They are in shared memory, for all to see.
#[inline(always)]
pub(super) unsafe fn update<const TILES: usize, const OWN: usize>(
    gpu: &impl TensorCore,
    left: &[[u32; 4]; 4],
    k: u32,
    all: f32,
    down: [f32; 2],
    s: &mut [Tile; OWN],
) {
    let at = keys::<TILES>(gpu, k);
    let mut pair = 0;
    while pair < OWN / 2 {
        // SAFETY: the caller's promise.
        unsafe {
            update_two::<TILES, OWN>(gpu, left, at + pair as u32 * 32, all, down, s, pair);
        }
        pair += 1;
        // Keeps the compiler from loading more ahead, for which there are no registers.
        gpu.sync_warp();
    }
}

/// Where the lane's row begins of keys of `8 * TILES` numbers that are a right side whose rows lie along the sum.
#[inline(always)]
fn keys<const TILES: usize>(gpu: &impl TensorCore, k: u32) -> u32 {
    let (matrix, line) = (gpu.lane() / 8, gpu.lane() % 8);
    k + (matrix % 2 * 8 + line) * padded(8 * TILES as u32) + matrix / 2 * 16
}

/// Brings a pair of tiles of S to a chunk's end, as [`update`]; `at` is where the lane's row begins of their
/// columns of keys.
///
/// # Safety
/// As [`update`].
#[inline(always)]
unsafe fn update_two<const TILES: usize, const COUNT: usize>(
    gpu: &impl TensorCore,
    left: &[[u32; 4]; 4],
    at: u32,
    all: f32,
    down: [f32; 2],
    s: &mut [Tile; COUNT],
    pair: usize,
) {
    let mut sums = [[0.0; 4]; 2];
    let mut k16 = 0;
    while k16 < 4 {
        let at = at + k16 as u32 * 16 * padded(8 * TILES as u32);
        // SAFETY: the caller's promise.
        let [b0, b1, b2, b3] = unsafe { gpu.load_matrix4::<true>(at) };
        sums[0] = gpu.mma::<F16>(left[k16], [b0, b1], sums[0]);
        sums[1] = gpu.mma::<F16>(left[k16], [b2, b3], sums[1]);
        k16 += 1;
    }
    let mut i = 0;
    while i < 8 {
        let s = &mut s[2 * pair + i / 4][i % 4];
        *s = Lanes::mul_add(sums[i / 4][i % 4], down[i % 4 / 2], *s * all);
        i += 1;
    }
}
