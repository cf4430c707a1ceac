//! Two groups of four warps, of which each multiplies together (`wgmma`), with 64 rows of S.
//!
//! The first takes S from chunk to chunk in its registers (`chain.rs`). The second makes the outputs and
//! copies the chunks that both need; S and U come to it through shared memory, as atoms of 64 columns.

use super::{
    args::{
        ATOM, CHUNK, FACTORS, GROUP_STAGES, GROUP_THREADS, GroupRoom, RAISED, SCALES, SLICE, ScanRoom,
        T_RAISED, WARP_ROWS,
    },
    chain::{self, Beside, Chain, Chunk, eight, put},
    scan::Block,
    states::States,
    tiles::{Tokens, from_start, lefts, scaled},
};
use crate::gpu::{Accumulators, AsyncCopy, F16, K_MAJOR, Operand, TensorCore, Wgmma};

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

/// A warp of the first group, or of the second.
pub(super) struct Group<'a, G, const TILES: usize, const OWN: usize> {
    block: &'a Block<'a, true, G>,
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
        let own = Self { block };
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
    unsafe fn chain(&self) {
        let Block { gpu, from, to, .. } = *self.block;
        let mut chain = Chain::<G, TILES, OWN>::new(gpu);
        // SAFETY: as `run`.
        unsafe {
            // The states come through the last stage.
            let states = self.block.begin();
            if states.at != 0 {
                self.exchange::<true>(&mut chain, &states, Self::stage(GROUP_STAGES - 1).base);
                chain.begin();
            }
            if from < to {
                gpu.mbarrier_wait(self.landed(0), 0);
            }
            // In a register of the warp's: an argument would be waited for after each chunk.
            let has_checkpoints = gpu.uniform(self.block.args.has_checkpoints) != 0;
            let mut i = 0;
            loop {
                if from < to {
                    self.advance(&mut chain, i);
                }
                i += 1;
                if has_checkpoints || from + i >= to {
                    // When nobody needs the chunk any more, the states go through its stage.
                    gpu.barrier_of(CHUNK_IS_FREE, GROUP_THREADS);
                    let stage = Self::stage(i - 1).base;
                    self.block.keep((from + i).min(to), |states| {
                        self.exchange::<false>(&mut chain, states, stage);
                    });
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
                    self.outputs(i, self.stage_of_all(i));
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
    fn stage(i: u32) -> Stage {
        Self::at(i % GROUP_STAGES)
    }

    /// The same, for products: all lanes come together.
    #[inline(always)]
    fn stage_of_all(&self, i: u32) -> Stage {
        Self::at(self.block.gpu.uniform(i % GROUP_STAGES))
    }

    #[inline(always)]
    fn at(stage: u32) -> Stage {
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
        let (stage, landed, chunk) = (Self::stage(i), self.landed(i), self.block.from + i);
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
    unsafe fn exchange<const READ: bool>(
        &self,
        chain: &mut Chain<'_, G, TILES, OWN>,
        states: &States,
        room: u32,
    ) {
        let Block { gpu, first, head, .. } = *self.block;
        let room = room + gpu.thread() / 32 * chain::ROOM;
        // Worked out anew each time: from chunk to chunk there are no registers for it.
        let head = gpu.unforeseen(u64::from(head)) as u32;
        // SAFETY: as `run`.
        unsafe { chain.exchange::<READ>(head, states, first + self.row(), room) };
    }

    /// Takes S from the chunk's start to its end. Puts S and U, f16, where their outputs are made.
    #[inline(always)]
    unsafe fn advance(&self, chain: &mut Chain<'_, G, TILES, OWN>, after: u32) {
        let (stage, room, gpu) = (self.stage_of_all(after), Self::CHUNK_ROOM, self.block.gpu);
        let chunk = Chunk {
            k: stage.base + room.k,
            t: stage.base + room.t,
            factors: stage.factors,
            values: Some(chain::values(gpu, stage.base + room.v, self.row())),
        };
        // SAFETY: as `run`; the chunk has landed.
        unsafe { chain.advance(chunk, &HandedOver { group: self, after }) };
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
            put(gpu, Self::ROOM.o, self.row(), &scaled(gpu, &eight(gpu.sums(o)), [1.0 / RAISED; 2]));
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

/// What goes over to those that make the outputs of the chunk that is `after` the first.
struct HandedOver<'a, G, const TILES: usize, const OWN: usize> {
    group: &'a Group<'a, G, TILES, OWN>,
    after: u32,
}

impl<G: Wgmma + TensorCore + AsyncCopy, const TILES: usize, const OWN: usize> Beside<G>
    for HandedOver<'_, G, TILES, OWN>
{
    #[inline(always)]
    unsafe fn state(&self, atom: usize, words: &[[u32; 4]; 4]) {
        let Group { block: Block { gpu, .. }, .. } = *self.group;
        if atom == 0 {
            gpu.barrier_of(S_IS_FREE, GROUP_THREADS);
        }
        let at = Group::<G, TILES, OWN>::ROOM.s + atom as u32 * ATOM;
        // SAFETY: the caller's promise.
        unsafe { put(*gpu, at, self.group.row(), words) };
    }

    #[inline(always)]
    unsafe fn product_begun(&self) {
        let gpu = self.group.block.gpu;
        gpu.fence_async();
        gpu.barrier_arrive(S_IS_THERE, GROUP_THREADS);
    }

    #[inline(always)]
    unsafe fn corrections(&self, u: &Tokens, down: [f32; 2]) {
        let (gpu, handed) = (self.group.block.gpu, Group::<G, TILES, OWN>::ROOM);
        let (row, lane) = (self.group.row(), gpu.lane());
        let u = lefts(gpu, u);
        gpu.barrier_of(U_IS_FREE, GROUP_THREADS);
        // SAFETY: the caller's promise.
        unsafe {
            put(gpu, handed.u, row, &u);
            if lane.is_multiple_of(4) {
                let at = handed.scales + self.after % 2 * SCALES + (row + lane / 4) * 4;
                let scale = self.group.block.args.scale / T_RAISED;
                gpu.store_shared4(at, (down[0] * scale).to_bits());
                gpu.store_shared4(at + 32, (down[1] * scale).to_bits());
            }
        }
    }

    #[inline(always)]
    unsafe fn next(&self) {
        let Block { gpu, from, to, .. } = *self.group.block;
        gpu.fence_async();
        gpu.barrier_arrive(U_IS_THERE, GROUP_THREADS);
        let next = self.after + 1;
        if from + next < to {
            // SAFETY: the caller's promise.
            unsafe { gpu.mbarrier_wait(self.group.landed(next), next / GROUP_STAGES % 2) };
        }
    }
}
