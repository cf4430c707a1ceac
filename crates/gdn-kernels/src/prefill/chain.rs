//! 64 rows of S from chunk to chunk by four warps that multiply together (`wgmma`), 16 whole rows a warp, in
//! registers: what one product leaves is the left side of the next one, without shared memory on the way.

use gdn_math::Lanes;

use super::{
    args::{ATOM, CHUNK, SLICE, WARP_ROWS, state_row},
    states::{Place, States, exchange},
    tiles::{Tile, Tokens, down_of_update, factor, faded, left_of_state, lefts, packed, scale, sums},
};
use crate::gpu::{Accumulators, F16, K_MAJOR, Lefts, OTHER_MAJOR, Operand, Swizzle, TensorCore, Wgmma};

/// A warp's 16 rows of S.
pub(super) struct Chain<'a, G, const TILES: usize, const OWN: usize> {
    gpu: &'a G,
    /// By atoms.
    pub(super) s: [[Tile; 8]; OWN],
    /// The absolute numbers of the lane's two rows, added up.
    sum: [f32; 2],
}

/// Where a chunk is in shared memory, that was copied there as it lies in scratch.
#[derive(Clone, Copy)]
pub(super) struct Chunk {
    pub(super) k: u32,
    pub(super) t: u32,
    pub(super) factors: u32,
    /// The lane's part of the values, see [`values`]; `None` for rows without.
    pub(super) values: Option<u32>,
}

/// Where the lane's row begins of the first four matrices, of 8 tokens and 8 rows each, of a warp's values:
/// those of all rows begin at `v`, the warp's are from `row` on.
#[inline(always)]
pub(super) fn values(gpu: &impl TensorCore, v: u32, row: u32) -> u32 {
    let (matrix, line) = (gpu.lane() / 8, gpu.lane() % 8);
    v + row / SLICE * (CHUNK * SLICE * 2)
        + (matrix / 2 * 8 + line) * (SLICE * 2)
        + ((row % SLICE / 8 + matrix % 2) ^ (line / 2)) * 16
}

/// What is done with what a chunk makes, beside the way from S to S.
pub(super) trait Beside<G: Wgmma + TensorCore> {
    /// S as left sides, of which a product is not begun yet.
    ///
    /// # Safety
    /// As [`Chain::advance`], here and below.
    #[inline(always)]
    unsafe fn state(&self, _atom: usize, _words: &[[u32; 4]; 4]) {}
    /// That product has begun.
    #[inline(always)]
    unsafe fn product_begun(&self) {}
    /// U, and what brings its rows back.
    #[inline(always)]
    unsafe fn corrections(&self, _u: &Tokens, _down: [f32; 2]) {}
    /// Half of S is new. Here the next chunk is waited for: later the compiler would wait for all products before
    /// it makes use of the first.
    unsafe fn next(&self);
}

impl<'a, G: Wgmma + TensorCore, const TILES: usize, const OWN: usize> Chain<'a, G, TILES, OWN> {
    /// All zeros.
    #[inline(always)]
    pub(super) fn new(gpu: &'a G) -> Self {
        Self { gpu, s: [[[0.0; 4]; 8]; OWN], sum: [0.0; 2] }
    }

    /// Reads the rows from `row` on of a v head's S, or writes them, through `WARP_ROWS * state_row(64)` bytes at
    /// `room` that are the warp's own.
    ///
    /// # Safety
    /// As [`exchange`].
    #[inline(always)]
    pub(super) unsafe fn exchange<const READ: bool>(
        &mut self,
        head: u32,
        states: &States,
        row: u32,
        room: u32,
    ) {
        let mut j = 0;
        while j < OWN {
            let place = Place { row, column: j as u32 * 64, room };
            let s = &mut self.s[j];
            // The room is the next atom's too.
            self.gpu.sync_warp();
            // SAFETY: the caller's promise.
            unsafe {
                if (j + 1) * 8 <= TILES {
                    exchange::<READ, 8>(self.gpu, head, states, place, s);
                } else {
                    exchange::<READ, 4>(self.gpu, head, states, place, s);
                }
            }
            j += 1;
        }
    }

    /// Comes after S was written from outside.
    #[inline(always)]
    pub(super) fn begin(&mut self) {
        let mut j = 0;
        while j < OWN {
            self.add_up(j);
            j += 1;
        }
    }

    /// Takes S from a chunk's start to its end.
    ///
    /// # Safety
    /// The chunk has landed. All four warps come together.
    #[inline(always)]
    pub(super) unsafe fn advance(&mut self, chunk: Chunk, beside: &impl Beside<G>) {
        let gpu = self.gpu;
        let factors = chunk.factors + gpu.lane() % 4 * 32;
        // SAFETY: the caller's promise.
        unsafe {
            let two = gpu.load_shared8(chunk.factors + CHUNK * 16);
            let (mut value, lift) = (f32::from_bits(two as u32), f32::from_bits((two >> 32) as u32));
            if chunk.values.is_none() {
                value = 0.0;
            }
            let mut words = [[0; 4]; 4];
            let mut of_tokens = [[[0.0; 2]; 2]; 8];
            let mut tile = 0;
            while tile < 8 {
                if tile % 2 == 0
                    && let Some(values) = chunk.values
                {
                    let at = values + tile as u32 / 2 * (16 * SLICE * 2);
                    words[tile / 2] = gpu.load_matrix4::<true>(at);
                }
                let mut c = 0;
                while c < 2 {
                    let [value, of_state, ..] = factor(gpu, factors, tile, c);
                    of_tokens[tile][c] = [value, of_state];
                    c += 1;
                }
                tile += 1;
            }
            let [[up_0, down_0], [up_1, down_1]] = self.sum.map(|sum| scale(sum, value));
            let (up, down) = ([up_0, up_1], [down_0, down_1]);
            let mut words_of = [[[0; 4]; 4]; OWN];
            let mut k16 = 0;
            while k16 < TILES / 2 {
                let s = &self.s[k16 / 4];
                let words = packed(gpu, &s[k16 % 4 * 2], &s[k16 % 4 * 2 + 1], up);
                words_of[k16 / 4][k16 % 4] = words;
                k16 += 1;
            }
            let mut left = words_of.map(Lefts::new);
            let mut j = 0;
            while j < OWN {
                beside.state(j, gpu.lefts(&mut left[j]));
                j += 1;
            }
            let mut found = Accumulators::<32>::zero();
            gpu.sums(&mut found);
            gpu.wgmma_begin();
            let mut k16 = 0;
            while k16 < TILES / 2 {
                let k = Operand::k_major(chunk.k).further(k16 as u32 / 4 * ATOM + k16 as u32 % 4 * 32);
                gpu.wgmma_left::<F16, K_MAJOR, 4, 32>(&mut found, &mut left[k16 / 4], k16 % 4, k, k16 > 0);
                k16 += 1;
            }
            gpu.wgmma_commit();
            beside.product_begun();
            // Read before the product is waited for: the next one would wait for them.
            let mut to_ends = [[0.0; 2]; 8];
            let mut tile = 0;
            while tile < 8 {
                to_ends[tile] = [0, 1].map(|c| {
                    let [.., to_end] = factor(gpu, factors, tile, c);
                    to_end
                });
                tile += 1;
            }
            let mut corrections = [[0.0; 4]; 8];
            let mut tile = 0;
            while tile < 8 {
                let at = tile % 2 * 2;
                let two = [gpu.unpack_f16(words[tile / 2][at]), gpu.unpack_f16(words[tile / 2][at + 1])];
                let mut c = 0;
                while c < 2 {
                    let [value, _] = of_tokens[tile][c];
                    corrections[tile][c] = value * two[0][c] * up[0];
                    corrections[tile][c + 2] = value * two[1][c] * up[1];
                    c += 1;
                }
                tile += 1;
            }
            gpu.wgmma_wait::<0>();
            let mut x = eight(gpu.sums(&mut found));
            let mut tile = 0;
            while tile < 8 {
                let mut i = 0;
                while i < 4 {
                    let [_, of_state] = of_tokens[tile][i % 2];
                    x[tile][i] = Lanes::mul_add(x[tile][i], of_state, corrections[tile][i]);
                    i += 1;
                }
                tile += 1;
            }
            let mut x = Lefts::new(lefts(gpu, &x));
            let mut u = Accumulators::<32>::zero();
            gpu.sums(&mut u);
            gpu.lefts(&mut x);
            gpu.wgmma_begin();
            let mut k16 = 0;
            while k16 < 4 {
                let t = Operand::k_major(chunk.t).further(k16 as u32 * 32);
                gpu.wgmma_left::<F16, K_MAJOR, 4, 32>(&mut u, &mut x, k16, t, k16 > 0);
                k16 += 1;
            }
            gpu.wgmma_commit();
            let all = left_of_state(gpu, chunk.factors);
            let mut j = 0;
            while j < OWN {
                faded(&mut self.s[j], all);
                j += 1;
            }
            gpu.wgmma_wait::<0>();
            let u = eight(gpu.sums(&mut u));
            let mut end = u;
            let mut tile = 0;
            while tile < 8 {
                let mut i = 0;
                while i < 4 {
                    end[tile][i] *= to_ends[tile][i % 2];
                    i += 1;
                }
                tile += 1;
            }
            let mut end = Lefts::new(lefts(gpu, &end));
            gpu.lefts(&mut end);
            let mut found = [Accumulators::<32>::zero(); OWN];
            let mut j = 0;
            while j < OWN {
                gpu.sums(&mut found[j]);
                j += 1;
            }
            gpu.wgmma_begin();
            let mut j = 0;
            while j < OWN {
                let keys = chunk.k + j as u32 * ATOM;
                let mut k16 = 0;
                while k16 < 4 {
                    let k =
                        Operand { leading: ATOM, ..Operand::k_major(keys) }.further(k16 as u32 * 16 * 128);
                    gpu.wgmma_left::<F16, OTHER_MAJOR, 4, 32>(&mut found[j], &mut end, k16, k, k16 > 0);
                    k16 += 1;
                }
                gpu.wgmma_commit();
                j += 1;
            }
            beside.corrections(&u, down);
            let back = down.map(|down| down_of_update(down, lift));
            self.sum = [0.0; 2];
            let mut j = 0;
            while j < OWN {
                if j + 1 < OWN {
                    gpu.wgmma_wait::<1>();
                } else {
                    gpu.wgmma_wait::<0>();
                }
                let found = gpu.sums(&mut found[j]);
                let mut i = 0;
                while i < 32 {
                    let s = &mut self.s[j][i / 4][i % 4];
                    *s = Lanes::mul_add(found[i], back[i % 4 / 2], *s);
                    i += 1;
                }
                self.add_up(j);
                if j == 0 {
                    beside.next();
                }
                j += 1;
            }
        }
    }

    /// Adds the absolute numbers of atom `j` to those of the atoms before.
    #[inline(always)]
    fn add_up(&mut self, j: usize) {
        let [a, b] = sums(self.gpu, &self.s[j]);
        self.sum = [self.sum[0] + a, self.sum[1] + b];
    }
}

/// Bytes of shared memory through which a warp's rows of S come.
pub(super) const ROOM: u32 = WARP_ROWS * state_row(64);

/// Puts 64 columns of a warp's 16 rows, from `row` on, where an atom begins.
///
/// # Safety
/// There is one, and nobody else touches these rows of it; all lanes come together.
#[inline(always)]
pub(super) unsafe fn put(gpu: &(impl Wgmma + TensorCore), atom: u32, row: u32, words: &[[u32; 4]; 4]) {
    // Of four matrices the first two are eight rows each, the others the same of the next eight columns.
    let (matrix, line) = (gpu.lane() / 8, gpu.lane() % 8);
    let row = row + matrix % 2 * 8 + line;
    let at = Swizzle::Bytes128.place(atom + row * 128) ^ (matrix / 2 * 16);
    // Worked out anew for each chunk: there are no registers to keep all places in.
    let at = gpu.unforeseen(u64::from(at)) as u32;
    let mut k16 = 0;
    while k16 < 4 {
        // SAFETY: the caller's promise.
        unsafe { gpu.store_matrix4(at ^ (k16 as u32 * 32), words[k16]) };
        k16 += 1;
    }
}

/// The accumulators of 64 columns as tiles.
#[inline(always)]
pub(super) fn eight(sums: &[f32; 32]) -> Tokens {
    let mut tiles = [[0.0; 4]; 8];
    let mut i = 0;
    while i < 32 {
        tiles[i / 4][i % 4] = sums[i];
        i += 1;
    }
    tiles
}
