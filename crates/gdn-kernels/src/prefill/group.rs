//! Three groups of four warps, of which each multiplies together (`wgmma`), with 64 rows of S.
//!
//! The first two share the columns of S, and the tokens of X and U; the third makes the outputs and copies
//! the chunks that all need. What one makes and another multiplies goes through shared memory, as atoms of 64
//! columns.

use gdn_math::Lanes;

use super::{
    args::{
        ATOM, CHUNK, FACTORS, GROUP_STAGES, GROUP_THREADS, GroupRoom, RAISED, SLICE, ScanRoom, WARP_ROWS,
        state_row,
    },
    scan::Block,
    states::{Place, States},
    tiles::{Tile, Tokens, corrected, down_of_update, factor, from_start, scale, sums},
};
use crate::gpu::{Accumulators, AsyncCopy, F16, K_MAJOR, OTHER_MAJOR, Operand, Swizzle, TensorCore, Wgmma};

/// The barrier of the first two groups.
const CHAIN: u32 = 1;
const CHAIN_THREADS: u32 = 256;
/// That of the third.
const OUTPUTS: u32 = 2;
/// Those at which the first two arrive when S and U are handed over, and the third waits.
const S_IS_THERE: u32 = 3;
const U_IS_THERE: u32 = 4;
/// Those at which the third arrives when it needs them no more, and the first two wait, for each other too.
const S_IS_FREE: u32 = 5;
const U_IS_FREE: u32 = 6;

/// Where a chunk is in shared memory.
#[derive(Clone, Copy)]
struct Stage {
    base: u32,
    factors: u32,
}

/// A warp of one of the first two groups, or of the third, in which there is no S.
pub(super) struct Group<'a, G, const TILES: usize, const OWN: usize> {
    block: &'a Block<'a, true, G>,
    /// 0 to 2.
    group: u32,
    /// Of atoms `group`, `group + 2`: the warp's rows.
    s: [[Tile; 8]; OWN],
}

impl<'a, G: Wgmma + TensorCore + AsyncCopy, const TILES: usize, const OWN: usize> Group<'a, G, TILES, OWN> {
    /// Columns of S in atoms of 64.
    const ATOMS: u32 = (TILES as u32).div_ceil(8);
    const CHUNK_ROOM: ScanRoom = ScanRoom::new(8 * TILES as u32, 64 / SLICE, true);
    const ROOM: GroupRoom = GroupRoom::new(8 * TILES as u32, GROUP_STAGES * Self::CHUNK_ROOM.bytes);

    /// All chunks of the block. All threads that come to a barrier come to it in the same place.
    ///
    /// # Safety
    /// As [`run`](super::scan::run).
    #[inline(always)]
    pub(super) unsafe fn run(block: &'a Block<'a, true, G>) {
        let Block { gpu, from, to, .. } = *block;
        let group = gpu.thread() / 128;
        let mut own = Self { block, group, s: [[[0.0; 4]; 8]; OWN] };
        let (in_chain, is_one) = (group < 2, gpu.thread() == block.copiers);
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
            // The states come through the last stage.
            if in_chain {
                let states = block.begin();
                if states.at != 0 {
                    own.exchange::<true>(&states, own.stage(GROUP_STAGES - 1).base);
                }
            } else if is_one {
                own.fetch(0);
                own.fetch(1);
            }
            let mut i = 0;
            loop {
                if from < to {
                    let stage = own.stage(i);
                    gpu.mbarrier_wait(own.landed(i), i / GROUP_STAGES % 2);
                    if in_chain {
                        let (up, down, lift) = own.hand_over(stage);
                        gpu.fence_async();
                        gpu.barrier_arrive(S_IS_THERE, GROUP_THREADS);
                        gpu.barrier_of(CHAIN, CHAIN_THREADS);
                        own.correct(stage, up, lift);
                        gpu.fence_async();
                        gpu.barrier_arrive(U_IS_THERE, GROUP_THREADS);
                        gpu.barrier_of(CHAIN, CHAIN_THREADS);
                        own.update(from + i, stage, down, lift);
                    } else {
                        own.outputs(i, stage);
                    }
                }
                i += 1;
                let is_last = from + i >= to;
                if block.keeps(i) {
                    // Nobody needs the chunk any more: the states go through its stage.
                    gpu.barrier();
                    if in_chain {
                        let stage = own.stage(i - 1).base;
                        block.keep((from + i).min(to), |states| own.exchange::<false>(states, stage));
                    }
                    gpu.barrier();
                }
                if is_last {
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
            let atom = 2 * j as u32 + self.group;
            let place = Place { row: self.block.first + row, column: atom * 64, room };
            let s = &mut self.s[j];
            // SAFETY: as `run`.
            unsafe {
                if (atom + 1) * 8 <= TILES as u32 {
                    self.block.exchange::<READ, 8>(states, place, s);
                } else if !TILES.is_multiple_of(8) && atom < Self::ATOMS {
                    self.block.exchange::<READ, 4>(states, place, s);
                }
            }
            j += 1;
        }
    }

    /// Where the lane's numbers of its first row are in an atom, in its first tile of 8 columns. Those of
    /// tile `i` are at this `^ 16 * i`.
    #[inline(always)]
    fn place(&self, atom: u32) -> u32 {
        let gpu = self.block.gpu;
        let row = self.row() + gpu.lane() / 4;
        let at = Swizzle::Bytes128.place(atom + row * 128) + gpu.lane() % 4 * 4;
        // Worked out anew for each chunk: there are no registers to keep all places in.
        gpu.unforeseen(u64::from(at)) as u32
    }

    /// Puts two numbers of each of the lane's rows at a [place](Group::place).
    #[inline(always)]
    unsafe fn put_two(&self, place: u32, [low, high]: [u32; 2]) {
        let gpu = self.block.gpu;
        // SAFETY: as `run`.
        unsafe {
            gpu.store_shared4(place, low);
            gpu.store_shared4(place + 8 * 128, high);
        }
    }

    /// Puts S where all multiply it, f16 that were brought into range for the chunk. What rows are
    /// multiplied with for that, and what brings that back; what U is multiplied with in addition, as far as it
    /// is left at the end.
    #[inline(always)]
    unsafe fn hand_over(&self, stage: Stage) -> ([f32; 2], [f32; 2], f32) {
        let (gpu, room) = (self.block.gpu, Self::ROOM);
        let (row, lane) = (self.row() + gpu.lane() / 4, gpu.lane());
        // SAFETY: as `run`.
        unsafe {
            let mut j = 0;
            while j < OWN {
                let [a, b] = sums(gpu, &self.s[j]);
                let atom = 2 * j as u32 + self.group;
                if lane.is_multiple_of(4) && atom < Self::ATOMS {
                    let at = room.sums + atom * 256 + row * 4;
                    gpu.store_shared4(at, a.to_bits());
                    gpu.store_shared4(at + 32, b.to_bits());
                }
                j += 1;
            }
            let two = gpu.load_shared8(stage.factors + CHUNK * 16);
            let (value, lift) = (f32::from_bits(two as u32), f32::from_bits((two >> 32) as u32));
            gpu.barrier_of(S_IS_FREE, GROUP_THREADS);
            let mut sum = [0.0; 2];
            let mut atom = 0;
            while atom < Self::ATOMS {
                let at = room.sums + atom * 256 + row * 4;
                sum[0] += f32::from_bits(gpu.load_shared4(at));
                sum[1] += f32::from_bits(gpu.load_shared4(at + 32));
                atom += 1;
            }
            let [[up_0, down_0], [up_1, down_1]] = sum.map(|sum| scale(sum, value));
            let mut j = 0;
            while j < OWN {
                let atom = 2 * j as u32 + self.group;
                if atom < Self::ATOMS {
                    let place = self.place(room.s + atom * ATOM);
                    let mut tile = 0;
                    while tile < 8 {
                        let [a, b, c, d] = self.s[j][tile];
                        let two = [gpu.pack_f16(a * up_0, b * up_0), gpu.pack_f16(c * up_1, d * up_1)];
                        self.put_two(place ^ (tile as u32 * 16), two);
                        tile += 1;
                    }
                }
                j += 1;
            }
            ([up_0, up_1], [down_0, down_1], lift)
        }
    }

    /// U of the group's 32 tokens of the chunk, which is handed over, and what is left of it at the
    /// chunk's end, as many times themselves as `up` and `lift` say.
    #[inline(always)]
    unsafe fn correct(&self, stage: Stage, up: [f32; 2], lift: f32) {
        let gpu = self.block.gpu;
        let (handed, room, base) = (Self::ROOM, Self::CHUNK_ROOM, stage.base);
        let (lane, first) = (gpu.lane(), self.group * 32);
        // The group's tokens are half of the columns.
        let places = [handed.x, handed.u, handed.u_end].map(|at| self.place(at) ^ (first * 2));
        // SAFETY: as `run`; the chunk was copied and S handed over, and a barrier is past.
        unsafe {
            let mut found = Accumulators::<16>::zero();
            gpu.sums(&mut found);
            gpu.wgmma_begin();
            self.of_state(base + room.k + first * 128, &mut found);
            gpu.wgmma_commit();
            // Of V^T four matrices of 8 tokens and 8 rows each, twice.
            let row = self.row();
            let (matrix, line) = (lane / 8, lane % 8);
            let v = base
                + room.v
                + row / SLICE * (CHUNK * SLICE * 2)
                + (first + matrix / 2 * 8 + line) * (SLICE * 2)
                + ((row % SLICE / 8 + matrix % 2) ^ (line / 2)) * 16;
            let words = [gpu.load_matrix4::<true>(v), gpu.load_matrix4::<true>(v + 16 * SLICE * 2)];
            let factors = stage.factors + first * 16 + lane % 4 * 32;
            gpu.wgmma_wait::<0>();
            let mut x = four(gpu.sums(&mut found));
            corrected(gpu, words[0], factors, up, x.split_at_mut(0).1);
            corrected(gpu, words[1], factors + 256, up, x.split_at_mut(2).1);
            let mut tile = 0;
            while tile < 4 {
                let [a, b, c, d] = x[tile];
                let two = [gpu.pack_f16(a, b), gpu.pack_f16(c, d)];
                self.put_two(places[0] ^ (tile as u32 * 16), two);
                tile += 1;
            }
            gpu.fence_async();
            gpu.barrier_of(U_IS_FREE, GROUP_THREADS);
            let mut u = Accumulators::<16>::zero();
            gpu.sums(&mut u);
            gpu.wgmma_begin();
            let mut k16 = 0;
            while k16 < 4 {
                // Of the first tokens' rows of T what is right of the diagonal is zero.
                let x = Operand::k_major(handed.x).further(k16 * 32);
                let t = Operand::k_major(base + room.t + first * 128).further(k16 * 32);
                gpu.wgmma::<F16, K_MAJOR, K_MAJOR, 16>(&mut u, x, t, k16 > 0);
                k16 += 1;
            }
            gpu.wgmma_commit();
            gpu.wgmma_wait::<0>();
            let u = four(gpu.sums(&mut u));
            let mut tile = 0;
            while tile < 4 {
                let [a, b, c, d] = u[tile];
                let two = [gpu.pack_f16(a, b), gpu.pack_f16(c, d)];
                self.put_two(places[1] ^ (tile as u32 * 16), two);
                let [low, high] = [0, 1].map(|c| {
                    let [.., to_end] = factor(gpu, factors, tile, c);
                    to_end * lift
                });
                let two = [gpu.pack_f16(a * low, b * high), gpu.pack_f16(c * low, d * high)];
                self.put_two(places[2] ^ (tile as u32 * 16), two);
                tile += 1;
            }
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

    /// Brings S to the end of the chunk; `down` brings rows back, and U when it is divided by `lift`.
    #[inline(always)]
    unsafe fn update(&mut self, chunk: u32, stage: Stage, down: [f32; 2], lift: f32) {
        let gpu = self.block.gpu;
        // SAFETY: as `run`; U was handed over, and a barrier is past.
        unsafe {
            let all = f32::from_bits(gpu.load_shared4(stage.factors + (CHUNK - 1) * 16 + 8));
            if self.group == 0 && gpu.lane().is_multiple_of(4) {
                let row = self.block.first + self.row() + gpu.lane() / 4;
                self.block.put_scale(chunk, row, down[0]);
                self.block.put_scale(chunk, row + 8, down[1]);
            }
            let down = down.map(|down| down_of_update(down, lift));
            let keys = stage.base + Self::CHUNK_ROOM.k;
            let mut j = 0;
            while j < OWN {
                let atom = 2 * j as u32 + self.group;
                if atom < Self::ATOMS {
                    let mut sums = Accumulators::<32>::zero();
                    gpu.sums(&mut sums);
                    gpu.wgmma_begin();
                    let mut k16 = 0;
                    while k16 < 4 {
                        let u = Operand::k_major(Self::ROOM.u_end).further(k16 * 32);
                        let k = Operand { leading: ATOM, ..Operand::k_major(keys + atom * ATOM) };
                        let k = k.further(k16 * 16 * 128);
                        gpu.wgmma::<F16, K_MAJOR, OTHER_MAJOR, 32>(&mut sums, u, k, k16 > 0);
                        k16 += 1;
                    }
                    gpu.wgmma_commit();
                    gpu.wgmma_wait::<0>();
                    let sums = gpu.sums(&mut sums);
                    let mut i = 0;
                    while i < 32 {
                        let s = &mut self.s[j][i / 4][i % 4];
                        *s = Lanes::mul_add(*s, all, sums[i] * down[i % 4 / 2]);
                        i += 1;
                    }
                }
                j += 1;
            }
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
            if is_one {
                self.fetch(ahead + GROUP_STAGES - 1);
            }
            gpu.sums(o);
            gpu.wgmma_begin();
            self.of_state(stage.base + Self::CHUNK_ROOM.q, o);
            gpu.wgmma_commit();
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
            let sums = gpu.sums(o);
            let place = self.place(Self::ROOM.o);
            let mut tile = 0;
            while tile < 8 {
                let two = [0, 2]
                    .map(|r| gpu.pack_f16(sums[4 * tile + r] / RAISED, sums[4 * tile + r + 1] / RAISED));
                self.put_two(place ^ (tile as u32 * 16), two);
                tile += 1;
            }
            gpu.fence_async();
            gpu.barrier_of(OUTPUTS, 128);
            if is_one {
                gpu.bulk_store(self.block.outputs(from + ahead, self.block.first), Self::ROOM.o, ATOM);
                gpu.bulk_stores_commit();
            }
        }
    }
}

/// The accumulators of 32 columns as tiles.
#[inline(always)]
fn four(sums: &[f32; 16]) -> [Tile; 4] {
    let mut tiles = [[0.0; 4]; 4];
    let mut i = 0;
    while i < 16 {
        tiles[i / 4][i % 4] = sums[i];
        i += 1;
    }
    tiles
}

/// Of 64 columns.
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
