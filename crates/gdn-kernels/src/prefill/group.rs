//! Two groups of four warps, of which each multiplies together (`wgmma`), with 64 rows of S.
//!
//! The first has S in its registers, 16 whole rows a warp, and takes it from chunk to chunk: what one product
//! leaves is the left side of the next one, without shared memory on the way. The second makes the outputs and
//! copies the chunks that both need; S and U come to it through shared memory, as atoms of 64 columns.

use gdn_math::Lanes;

use super::{
    args::{
        ATOM, CHUNK, FACTORS, GROUP_STAGES, GROUP_THREADS, GroupRoom, RAISED, SCALES, SLICE, ScanRoom,
        T_RAISED, WARP_ROWS, state_row,
    },
    scan::Block,
    states::{Place, States},
    tiles::{Tile, Tokens, down_of_update, factor, faded, from_start, lefts, packed, scale, scaled, sums},
};
use crate::gpu::{
    Accumulators, AsyncCopy, F16, K_MAJOR, Lefts, OTHER_MAJOR, Operand, Swizzle, TensorCore, Wgmma,
};

/// The barrier of the second group.
const OUTPUTS: u32 = 2;
/// Those at which the first arrives when S and U are handed over, and the second waits.
const S_IS_THERE: u32 = 3;
const U_IS_THERE: u32 = 4;
/// Those at which the second arrives when it needs them no more, and the first waits.
const S_IS_FREE: u32 = 5;
const U_IS_FREE: u32 = 6;
/// The same of the chunk's stage, where states are kept behind it.
const CHUNK_IS_FREE: u32 = 7;

/// Where a chunk is in shared memory.
#[derive(Clone, Copy)]
struct Stage {
    base: u32,
    factors: u32,
}

/// A warp of the first group, or of the second, in which there is no S.
pub(super) struct Group<'a, G, const TILES: usize, const OWN: usize> {
    block: &'a Block<'a, true, G>,
    /// The warp's rows, by atoms.
    s: [[Tile; 8]; OWN],
    /// The absolute numbers of the lane's two rows, added up.
    sum: [f32; 2],
}

impl<'a, G: Wgmma + TensorCore + AsyncCopy, const TILES: usize, const OWN: usize> Group<'a, G, TILES, OWN> {
    /// Columns of S in atoms of 64.
    const ATOMS: u32 = (TILES as u32).div_ceil(8);
    const CHUNK_ROOM: ScanRoom = ScanRoom::new(8 * TILES as u32, 64 / SLICE, true);
    const ROOM: GroupRoom = GroupRoom::new(8 * TILES as u32, GROUP_STAGES * Self::CHUNK_ROOM.bytes);

    /// All chunks of the block.
    ///
    /// # Safety
    /// As [`run`](super::scan::run).
    #[inline(always)]
    pub(super) unsafe fn run(block: &'a Block<'a, true, G>) {
        let Block { gpu, from, to, .. } = *block;
        let mut own = Self { block, s: [[[0.0; 4]; 8]; OWN], sum: [0.0; 2] };
        let (in_chain, is_one) = (gpu.thread() < block.copiers, gpu.thread() == block.copiers);
        // SAFETY: the caller's promises.
        unsafe {
            if is_one {
                let mut stage = 0;
                while stage < GROUP_STAGES {
                    gpu.mbarrier_init(Self::ROOM.landed + stage * 8, 1);
                    stage += 1;
                }
                gpu.mbarrier_fence();
            }
            gpu.barrier();
            if !in_chain && from < to {
                gpu.barrier_arrive(S_IS_FREE, GROUP_THREADS);
                gpu.barrier_arrive(U_IS_FREE, GROUP_THREADS);
            }
            if in_chain {
                own.chain();
            } else {
                own.others();
            }
        }
    }

    /// All chunks, for the warps that have S.
    #[inline(always)]
    unsafe fn chain(&mut self) {
        let Block { gpu, from, to, .. } = *self.block;
        // SAFETY: as `run`.
        unsafe {
            // The states come through the last stage.
            let states = self.block.begin();
            if states.at != 0 {
                self.exchange::<true>(&states, self.stage(GROUP_STAGES - 1).base);
                let mut j = 0;
                while j < OWN {
                    self.add_up(j);
                    j += 1;
                }
            }
            if from < to {
                gpu.mbarrier_wait(self.landed(0), 0);
            }
            let mut i = 0;
            loop {
                if from < to {
                    self.advance(i);
                }
                i += 1;
                if self.block.keeps(i) {
                    // When nobody needs the chunk any more, the states go through its stage.
                    gpu.barrier_of(CHUNK_IS_FREE, GROUP_THREADS);
                    let (block, stage) = (self.block, self.stage(i - 1).base);
                    block.keep((from + i).min(to), |states| self.exchange::<false>(states, stage));
                }
                if from + i >= to {
                    break;
                }
            }
        }
    }

    /// The same for those that make the outputs.
    #[inline(always)]
    unsafe fn others(&self) {
        let Block { gpu, from, to, .. } = *self.block;
        let is_one = gpu.thread() == self.block.copiers;
        // SAFETY: as `run`.
        unsafe {
            if is_one {
                self.fetch(0);
                self.fetch(1);
            }
            let mut i = 0;
            loop {
                if from < to {
                    gpu.mbarrier_wait(self.landed(i), i / GROUP_STAGES % 2);
                    self.outputs(i, self.stage(i));
                }
                i += 1;
                if self.block.keeps(i) {
                    gpu.barrier_arrive(CHUNK_IS_FREE, GROUP_THREADS);
                }
                if from + i >= to {
                    break;
                }
            }
            if is_one {
                gpu.bulk_stores_wait::<0>();
            }
        }
    }

    /// Where the chunk is that is `i` after the first.
    #[inline(always)]
    fn stage(&self, i: u32) -> Stage {
        let stage = i % GROUP_STAGES;
        Stage { base: stage * Self::CHUNK_ROOM.bytes, factors: Self::ROOM.factors + stage * FACTORS }
    }

    /// The mbarrier at which its copies arrive.
    #[inline(always)]
    fn landed(&self, i: u32) -> u32 {
        Self::ROOM.landed + i % GROUP_STAGES * 8
    }

    /// Begins to copy the chunk that is `i` after the first, where there is one, into its stage: one thread.
    #[inline(always)]
    unsafe fn fetch(&self, i: u32) {
        let Block { gpu, args, .. } = *self.block;
        let (stage, landed, chunk) = (self.stage(i), self.landed(i), self.block.from + i);
        if chunk >= self.block.to {
            return;
        }
        let (key_head, _) = args.ratio.divide(self.block.head);
        let window_chunk = u64::from(chunk - args.first_chunk);
        let keys = Self::ATOMS * ATOM;
        let key = (window_chunk * u64::from(args.num_k_heads.get()) + u64::from(key_head)) * u64::from(keys);
        let head = self.block.v_head(chunk);
        let square = head * u64::from(ATOM);
        let value = head * u64::from(CHUNK * args.dv * 2) + u64::from(self.block.first * CHUNK * 2);
        let (to, from) = (Self::CHUNK_ROOM, args.scratch);
        // SAFETY: as `run`.
        unsafe {
            gpu.mbarrier_arrive_expect(landed, 2 * keys + 3 * ATOM + FACTORS);
            gpu.bulk_copy(stage.factors, self.block.factors(chunk), FACTORS, landed);
            gpu.bulk_copy(stage.base + to.k, from.k + key, keys, landed);
            gpu.bulk_copy(stage.base + to.v, from.v + value, ATOM, landed);
            gpu.bulk_copy(stage.base + to.t, from.t + square, ATOM, landed);
            gpu.bulk_copy(stage.base + to.q, from.q + key, keys, landed);
            gpu.bulk_copy(stage.base + to.p, from.p + square, ATOM, landed);
        }
    }

    /// The first of the warp's rows among the block's.
    #[inline(always)]
    fn row(&self) -> u32 {
        self.block.gpu.thread() / 32 % 4 * WARP_ROWS
    }

    /// Reads the warp's part of S, or writes it.
    #[inline(always)]
    unsafe fn exchange<const READ: bool>(&mut self, states: &States, room: u32) {
        let row = self.row();
        let room = room + self.block.gpu.thread() / 32 * WARP_ROWS * state_row(64);
        let mut j = 0;
        while j < OWN {
            let place = Place { row: self.block.first + row, column: j as u32 * 64, room };
            let s = &mut self.s[j];
            // The room is the next atom's too.
            self.block.gpu.sync_warp();
            // SAFETY: as `run`.
            unsafe {
                if (j + 1) * 8 <= TILES {
                    self.block.exchange::<READ, 8>(states, place, s);
                } else {
                    self.block.exchange::<READ, 4>(states, place, s);
                }
            }
            j += 1;
        }
    }

    /// Takes S from the chunk's start to its end, in registers. Puts S and U, f16, where their outputs are made.
    #[inline(always)]
    unsafe fn advance(&mut self, after: u32) {
        let (chunk, stage) = (self.block.from + after, self.stage(after));
        let gpu = self.block.gpu;
        let (handed, room, base) = (Self::ROOM, Self::CHUNK_ROOM, stage.base);
        let (row, lane) = (self.row(), gpu.lane());
        let factors = stage.factors + lane % 4 * 32;
        // SAFETY: as `run`; the chunk has landed.
        unsafe {
            // Of V^T four matrices of 8 tokens and 8 rows each, for 16 tokens.
            let (matrix, line) = (lane / 8, lane % 8);
            let v = base
                + room.v
                + row / SLICE * (CHUNK * SLICE * 2)
                + (matrix / 2 * 8 + line) * (SLICE * 2)
                + ((row % SLICE / 8 + matrix % 2) ^ (line / 2)) * 16;
            let two = gpu.load_shared8(stage.factors + CHUNK * 16);
            let (value, lift) = (f32::from_bits(two as u32), f32::from_bits((two >> 32) as u32));
            let mut words = [[0; 4]; 4];
            let mut of_tokens = [[[0.0; 2]; 2]; 8];
            let mut tile = 0;
            while tile < 8 {
                if tile % 2 == 0 {
                    words[tile / 2] = gpu.load_matrix4::<true>(v + tile as u32 / 2 * (16 * SLICE * 2));
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
            gpu.barrier_of(S_IS_FREE, GROUP_THREADS);
            let mut j = 0;
            while j < OWN {
                self.put(handed.s + j as u32 * ATOM, gpu.lefts(&mut left[j]));
                j += 1;
            }
            let mut found = Accumulators::<32>::zero();
            gpu.sums(&mut found);
            gpu.wgmma_begin();
            let mut k16 = 0;
            while k16 < TILES / 2 {
                let k = Operand::k_major(base + room.k).further(k16 as u32 / 4 * ATOM + k16 as u32 % 4 * 32);
                gpu.wgmma_left::<F16, K_MAJOR, 4, 32>(&mut found, &mut left[k16 / 4], k16 % 4, k, k16 > 0);
                k16 += 1;
            }
            gpu.wgmma_commit();
            gpu.fence_async();
            gpu.barrier_arrive(S_IS_THERE, GROUP_THREADS);
            let mut corrections = [[0.0; 4]; 8];
            let mut of_states = [[0.0; 2]; 8];
            let mut tile = 0;
            while tile < 8 {
                let at = tile % 2 * 2;
                let two = [gpu.unpack_f16(words[tile / 2][at]), gpu.unpack_f16(words[tile / 2][at + 1])];
                let mut c = 0;
                while c < 2 {
                    let [value, of_state] = of_tokens[tile][c];
                    of_states[tile][c] = -of_state;
                    corrections[tile][c] = value * two[0][c] * up[0];
                    corrections[tile][c + 2] = value * two[1][c] * up[1];
                    c += 1;
                }
                tile += 1;
            }
            gpu.wgmma_wait::<0>();
            let mut to_ends = [[0.0; 2]; 8];
            let mut tile = 0;
            while tile < 8 {
                to_ends[tile] = [0, 1].map(|c| {
                    let [.., to_end] = factor(gpu, factors, tile, c);
                    to_end
                });
                tile += 1;
            }
            let mut x = eight(gpu.sums(&mut found));
            let mut tile = 0;
            while tile < 8 {
                let mut i = 0;
                while i < 4 {
                    let found = x[tile][i];
                    x[tile][i] = Lanes::mul_add(found, of_states[tile][i % 2], corrections[tile][i]);
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
                let t = Operand::k_major(base + room.t).further(k16 as u32 * 32);
                gpu.wgmma_left::<F16, K_MAJOR, 4, 32>(&mut u, &mut x, k16, t, k16 > 0);
                k16 += 1;
            }
            gpu.wgmma_commit();
            let all = f32::from_bits(gpu.load_shared4(stage.factors + (CHUNK - 1) * 16 + 8));
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
                    end[tile][i] *= to_ends[tile][i % 2] * lift;
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
                let keys = base + room.k + j as u32 * ATOM;
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
            let u = lefts(gpu, &u);
            gpu.barrier_of(U_IS_FREE, GROUP_THREADS);
            self.put(handed.u, &u);
            if lane.is_multiple_of(4) {
                let at = handed.scales + after % 2 * SCALES + (row + lane / 4) * 4;
                let scale = self.block.args.scale / T_RAISED;
                gpu.store_shared4(at, (down[0] * scale).to_bits());
                gpu.store_shared4(at + 32, (down[1] * scale).to_bits());
            }
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
                    gpu.fence_async();
                    gpu.barrier_arrive(U_IS_THERE, GROUP_THREADS);
                }
                // The next chunk; here, for then the compiler does not wait for both products before it makes use of
                // the first.
                if j == 0 && chunk + 1 < self.block.to {
                    gpu.mbarrier_wait(self.landed(after + 1), (after + 1) / GROUP_STAGES % 2);
                }
                j += 1;
            }
        }
    }

    /// Adds the absolute numbers of atom `j` to those of the atoms before.
    #[inline(always)]
    fn add_up(&mut self, j: usize) {
        let [a, b] = sums(self.block.gpu, &self.s[j]);
        self.sum = [self.sum[0] + a, self.sum[1] + b];
    }

    /// Puts 64 columns of the warp's rows where an atom begins.
    #[inline(always)]
    unsafe fn put(&self, atom: u32, words: &[[u32; 4]; 4]) {
        let gpu = self.block.gpu;
        // Of four matrices the first two are eight rows each, the others the same of the next eight columns.
        let (matrix, line) = (gpu.lane() / 8, gpu.lane() % 8);
        let row = self.row() + matrix % 2 * 8 + line;
        let at = Swizzle::Bytes128.place(atom + row * 128) ^ (matrix / 2 * 16);
        // Worked out anew for each chunk: there are no registers to keep all places in.
        let at = gpu.unforeseen(u64::from(at)) as u32;
        let mut k16 = 0;
        while k16 < 4 {
            // SAFETY: as `run`.
            unsafe { gpu.store_matrix4(at ^ (k16 as u32 * 32), words[k16]) };
            k16 += 1;
        }
    }

    /// Begins to multiply S with rows of atoms that begin at `at`.
    #[inline(always)]
    unsafe fn of_state<const REGISTERS: usize>(&self, at: u32, sums: &mut Accumulators<REGISTERS>) {
        let gpu = self.block.gpu;
        let mut k16 = 0;
        while k16 < TILES as u32 / 2 {
            let of = |at: u32| Operand::k_major(at).further(k16 / 4 * ATOM + k16 % 4 * 32);
            // SAFETY: as `run`.
            unsafe { gpu.wgmma::<F16, K_MAJOR, K_MAJOR, REGISTERS>(sums, of(Self::ROOM.s), of(at), k16 > 0) };
            k16 += 1;
        }
    }

    /// The outputs of the chunk that is `ahead` after the first: what its queries find in S, and what the
    /// corrections make. When S is there nobody needs the chunk before any more.
    #[inline(always)]
    unsafe fn outputs(&self, ahead: u32, stage: Stage) {
        let Block { gpu, from, to, .. } = *self.block;
        let is_one = gpu.thread() == self.block.copiers;
        let is_last = from + ahead + 1 >= to;
        let mut sums_of_o = Accumulators::<32>::zero();
        let o = &mut sums_of_o;
        // SAFETY: as `run`; the chunk has landed, S and U are handed over.
        unsafe {
            gpu.barrier_of(S_IS_THERE, GROUP_THREADS);
            gpu.sums(o);
            gpu.wgmma_begin();
            self.of_state(stage.base + Self::CHUNK_ROOM.q, o);
            gpu.wgmma_commit();
            if is_one {
                self.fetch(ahead + GROUP_STAGES - 1);
            }
            gpu.wgmma_wait::<0>();
            if !is_last {
                gpu.barrier_arrive(S_IS_FREE, GROUP_THREADS);
            }
            let mut tiles = eight(gpu.sums(o));
            from_start(gpu, stage.factors + gpu.lane() % 4 * 32, &mut tiles);
            let mut i = 0;
            let sums = gpu.sums(o);
            while i < 32 {
                sums[i] = tiles[i / 4][i % 4];
                i += 1;
            }
            gpu.barrier_of(U_IS_THERE, GROUP_THREADS);
            gpu.sums(o);
            gpu.wgmma_begin();
            let mut k16 = 0;
            while k16 < 4 {
                let u = Operand::k_major(Self::ROOM.u).further(k16 * 32);
                let p = Operand::k_major(stage.base + Self::CHUNK_ROOM.p).further(k16 * 32);
                gpu.wgmma::<F16, K_MAJOR, K_MAJOR, 32>(o, u, p, true);
                k16 += 1;
            }
            gpu.wgmma_commit();
            if is_one {
                // The last chunk's outputs have left the room.
                gpu.bulk_stores_wait::<0>();
            }
            gpu.barrier_of(OUTPUTS, 128);
            gpu.wgmma_wait::<0>();
            if !is_last {
                gpu.barrier_arrive(U_IS_FREE, GROUP_THREADS);
            }
            self.put(Self::ROOM.o, &scaled(gpu, &eight(gpu.sums(o)), [1.0 / RAISED; 2]));
            gpu.fence_async();
            gpu.barrier_of(OUTPUTS, 128);
            if is_one {
                let (chunk, scales) = (from + ahead, Self::ROOM.scales + ahead % 2 * SCALES);
                gpu.bulk_store(self.block.outputs(chunk, self.block.first), Self::ROOM.o, ATOM);
                gpu.bulk_store(self.block.scales(chunk, self.block.first), scales, SCALES);
                gpu.bulk_stores_commit();
            }
        }
    }
}

/// The accumulators of 64 columns as tiles.
#[inline(always)]
fn eight(sums: &[f32; 32]) -> Tokens {
    let mut tiles = [[0.0; 4]; 8];
    let mut i = 0;
    while i < 32 {
        tiles[i / 4][i % 4] = sums[i];
        i += 1;
    }
    tiles
}
