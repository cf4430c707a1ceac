//! The third kernel: from chunk to chunk, a block for each sequence (or segment of one, `segment.rs`), v head
//! and 32 or 64 rows of S.
//!
//! Some warps have S in their registers, in f32, and go from chunk to chunk; others make the outputs and copy
//! what all need next. Rows need nothing of one another: everything is transposed, so that rows of S are rows
//! of the accumulators. For a chunk:
//!
//! ```text
//! X^T = beta (V^T - e^G * S K^T)                 what each key finds in the state, corrected
//! U^T = X^T T^T                                  T the inverse of I + strictLower(beta e^D K K^T)
//! O^T = e^G * S Q^T + U^T P^T                    P = lower(e^D Q K^T)
//! S   = e^G_last * S + (e^(G_last - G) * U^T) K
//! ```
//!
//! There are two ways, with the same bits: each warp has 16 whole rows and multiplies for itself (`rows.rs`,
//! `outputs.rs`), or four warps with 16 rows each multiply together (`group.rs`, `chain.rs`).
//!
//! What is multiplied is f16. S, X, U and O of a row are brought into its range by one power of two, which
//! depends on the row of S and on the chunk's largest value (`tiles.rs`): down to 2^-22 of what it is made
//! for, numbers have the 11 bits of an f16. S itself stays f32 and is added to outside of the tensor
//! cores, which cut sums towards zero. As each row is by itself, bits depend on nothing but the row's own
//! history.

use super::{
    args::{
        ATOM, Args, CHUNK, FACTORS, GROUP_ROWS, GROUP_THREADS, SLICE, ScanRoom, T_RAISED, WARP_ROWS, padded,
    },
    element::{load, size, store},
    group::Group,
    outputs::Outputs,
    rows::Rows,
    segment::Part,
};
use crate::gpu::{AsyncCopy, Gpu, TensorCore, Wgmma};

/// A block's part of the call; `BY_GROUP` says how its warps multiply.
pub(super) struct Block<'a, const BY_GROUP: bool, G> {
    pub(super) gpu: &'a G,
    pub(super) args: &'a Args,
    pub(super) room: ScanRoom,
    pub(super) head: u32,
    /// Of the v head's rows the block's first.
    pub(super) first: u32,
    /// Its chunks of the window.
    pub(super) from: u32,
    pub(super) to: u32,
    /// Whether the sequence ends with them.
    pub(super) ends: bool,
    /// The first of the threads that copy, which are the last of the block.
    pub(super) copiers: u32,
}

/// The kernel, for keys of `8 * TILES` numbers, each warp multiplying for itself, which has `OWN` tiles of S in
/// registers.
///
/// # Safety
/// The arguments describe tensors that are there, and the grid and shared memory were made for them.
#[inline(always)]
pub unsafe fn run<const TILES: usize, const OWN: usize, G: TensorCore + AsyncCopy>(gpu: &G, args: &Args) {
    let threads = gpu.threads();
    // SAFETY: the caller's promises.
    unsafe {
        if let Some(block) = Block::<false, G>::new(gpu, args, [threads / 64 * WARP_ROWS, threads / 2]) {
            rows::<TILES, OWN, G>(&block);
            block.end();
        }
    }
}

/// The kernel for blocks of [`GROUP_ROWS`] rows and [`GROUP_THREADS`] threads, four warps multiplying together.
/// Keys have `8 * TILES` numbers; the first group has S in its registers, `OWN` atoms wide.
///
/// # Safety
/// As [`run`].
#[inline(always)]
pub unsafe fn run_by_group<const TILES: usize, const OWN: usize, G: Wgmma + TensorCore + AsyncCopy>(
    gpu: &G,
    args: &Args,
) {
    // SAFETY: the caller's promises.
    unsafe {
        if let Some(block) = Block::<true, G>::new(gpu, args, [GROUP_ROWS, GROUP_THREADS - 128]) {
            Group::<G, TILES, OWN>::run(&block);
            block.end();
        }
    }
}

/// All chunks of a block whose warps multiply for themselves. All threads come to each barrier in the same
/// place.
#[inline(always)]
unsafe fn rows<const TILES: usize, const OWN: usize, G: TensorCore + AsyncCopy>(block: &Block<'_, false, G>) {
    let Block { gpu, args, from, to, .. } = *block;
    let has_rows = gpu.thread() < block.copiers;
    let mut rows = Rows::<G, TILES, OWN>::new(block);
    let outputs = Outputs::<G, TILES>::new(block);
    let stages = args.stages;
    // SAFETY: as `scan`.
    unsafe {
        // The states come through the last stage.
        if has_rows {
            rows.ask(from);
            rows.begin(block.stage(stages - 1));
        } else {
            block.fetch_first::<TILES>();
        }
        gpu.barrier();
        let mut i = 0;
        loop {
            if from < to {
                let base = block.stage(i);
                let mut scales = [1.0; 2];
                if has_rows {
                    scales = rows.hand_over();
                } else {
                    block.wait::<TILES>(i);
                }
                // The chunk has landed, S is handed over.
                gpu.barrier();
                let (tokens, down);
                if has_rows {
                    rows.ask(from + i + 1);
                    (tokens, down) = rows.correct(base, scales);
                } else {
                    if stages > 1 {
                        block.fetch::<TILES>(i + stages - 1);
                    }
                    (tokens, down) = outputs.of_state(base);
                }
                // U is handed over.
                gpu.barrier();
                if has_rows {
                    rows.update(base, tokens, down);
                } else {
                    outputs.put(from + i, base, tokens, down);
                }
            }
            i += 1;
            let is_last = from + i >= to;
            if block.keeps(i) {
                // Nobody needs the chunk any more: the states go through its stage.
                gpu.barrier();
                if has_rows {
                    rows.keep((from + i).min(to), block.stage(i - 1));
                }
                gpu.barrier();
            } else if stages == 1 {
                gpu.barrier();
            }
            if is_last {
                break;
            }
        }
    }
}

/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn part(gpu: &impl Gpu, args: &Args) -> Part {
    // Worked out anew each time: from chunk to chunk there are no registers for it.
    let block = gpu.unforeseen(u64::from(gpu.block()[0])) as u32;
    let (group, _) = args.slices.divide(block);
    let (number, _) = args.num_v_heads.divide(group);
    // SAFETY: the caller's promise.
    unsafe { Part::of_group(gpu, args, number) }
}

impl<'a, const BY_GROUP: bool, G: TensorCore + AsyncCopy> Block<'a, BY_GROUP, G> {
    /// With so many rows, and the first of the threads that copy; `None` where there is nothing to do.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn new(gpu: &'a G, args: &'a Args, [rows, copiers]: [u32; 2]) -> Option<Self> {
        let (group, slice) = args.slices.divide(gpu.block()[0]);
        let (_, head) = args.num_v_heads.divide(group);
        let room = ScanRoom::new(args.dk, rows / SLICE, BY_GROUP);
        // SAFETY: the caller's promise.
        let part = unsafe { part(gpu, args) };
        gpu.wait_for_previous();
        gpu.let_next_start();
        if !part.is_there {
            return None;
        }
        let ends = part.is_last && part.ends(args);
        Some(Self { gpu, args, room, head, first: slice * rows, from: part.from, to: part.to, ends, copiers })
    }

    /// What the block goes through.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    pub(super) unsafe fn part(&self) -> Part {
        // SAFETY: the caller's promise.
        unsafe { part(self.gpu, self.args) }
    }

    /// What is left to do after the last chunk.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn end(&self) {
        if self.ends {
            // SAFETY: the caller's promise.
            unsafe { self.roll_window() };
        }
    }

    /// Where in shared memory the chunk is that is `i` after the first.
    #[inline(always)]
    pub(super) fn stage(&self, i: u32) -> u32 {
        let stage = match self.args.stages {
            3 => i % 3,
            stages => i & (stages - 1),
        };
        stage * self.room.bytes
    }

    /// Whether states are kept after the first `i` chunks.
    #[inline(always)]
    pub(super) fn keeps(&self, i: u32) -> bool {
        self.args.has_checkpoints != 0 || self.from + i >= self.to
    }

    /// The number of the v head, among those of all chunks.
    #[inline(always)]
    pub(super) fn v_head(&self, chunk: u32) -> u64 {
        let chunk = u64::from(chunk - self.args.first_chunk);
        chunk * u64::from(self.args.num_v_heads.get()) + u64::from(self.head)
    }

    /// Where a chunk's factors are in global memory.
    #[inline(always)]
    pub(super) fn factors(&self, chunk: u32) -> u64 {
        self.args.scratch.factors + self.v_head(chunk) * u64::from(FACTORS)
    }

    /// Where the outputs of row `row` of the v head begin: where the values were.
    #[inline(always)]
    pub(super) fn outputs(&self, chunk: u32, row: u32) -> u64 {
        let head = self.v_head(chunk) * u64::from(self.args.dv);
        self.args.scratch.v + (head + u64::from(row)) * u64::from(CHUNK * 2)
    }

    /// Where what outputs are multiplied with begins, from row `row` of the v head on.
    #[inline(always)]
    pub(super) fn scales(&self, chunk: u32, row: u32) -> u64 {
        let place = self.v_head(chunk) * u64::from(self.args.dv) + u64::from(row);
        self.args.scratch.out_scales + place * 4
    }

    /// Puts what brings the outputs of a row, which are [`T_RAISED`], back to what they are.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    pub(super) unsafe fn put_scale(&self, chunk: u32, row: u32, down: f32) {
        let scale = down * (self.args.scale / T_RAISED);
        // SAFETY: the caller's promise.
        unsafe { self.gpu.store4(self.scales(chunk, row), scale.to_bits()) };
    }

    /// Brings the window of the convolution up to date, the block some of the channels. One thread moves a
    /// channel's columns, in order, so that it may move onto itself.
    #[inline(always)]
    unsafe fn roll_window(&self) {
        let Self { gpu, args, .. } = self;
        let (_, slice) = args.slices.divide(gpu.block()[0]);
        let state = &args.conv_state;
        // SAFETY: as `run`.
        let sequence = unsafe { self.part() }.sequence;
        if state.address == 0 || (sequence.len == 0 && sequence.is_initial) {
            return;
        }
        let (dk, hk) = (args.dk, args.num_k_heads.get());
        let channels = 2 * hk * dk + args.num_v_heads.get() * args.dv;
        let blocks = args.num_v_heads.get() * args.slices.get();
        let mut channel = (self.head * args.slices.get() + slice) * gpu.threads() + gpu.thread();
        let columns = u64::from(args.conv_columns);
        let [of_slot, of_channel, of_column] = state.strides;
        while channel < channels {
            let (which, head, feature) = if channel < 2 * hk * dk {
                let (head, feature) = args.head_k_dim.divide(channel);
                if head < hk { (0, head, feature) } else { (1, head - hk, feature) }
            } else {
                let (head, feature) = args.group_v_dim.divide(channel - 2 * hk * dk);
                (2, head, feature)
            };
            let (x, head_step) = args.field(which);
            let x = x + u64::from(head) * head_step + u64::from(feature * size(args.q.dtype));
            let window = state.address + sequence.slot as u64 * of_slot + u64::from(channel) * of_channel;
            let mut column = 0;
            while column < columns {
                // Counted from the sequence's first token.
                let token = column + sequence.len;
                // SAFETY: as `run`.
                unsafe {
                    let mut value = 0.0;
                    if token >= columns {
                        let row = sequence.start + token - columns;
                        value = load(*gpu, args.q.dtype, x + row * args.q.row_stride);
                    } else if sequence.is_initial {
                        value = load(*gpu, state.dtype, window + token * of_column);
                    }
                    store(*gpu, state.dtype, window + column * of_column, value);
                }
                column += 1;
            }
            channel += blocks * gpu.threads();
        }
    }
}

impl<G: TensorCore + AsyncCopy> Block<'_, false, G> {
    /// Begins to copy what fits before the first chunk is looked at, but for the last stage: the copiers.
    /// Keys have `8 * TILES` numbers.
    #[inline(always)]
    unsafe fn fetch_first<const TILES: usize>(&self) {
        let mut i = 0;
        while i + 1 < self.args.stages {
            // SAFETY: as `run`.
            unsafe { self.fetch::<TILES>(i) };
            i += 1;
        }
    }

    /// Waits for the copies of the chunk that is `i` after the first, whose last group is `i + stages - 2`:
    /// the copiers.
    #[inline(always)]
    unsafe fn wait<const TILES: usize>(&self, i: u32) {
        if self.args.stages == 1 {
            // SAFETY: as `run`.
            unsafe { self.fetch::<TILES>(i) };
        }
        if self.args.stages > 2 {
            self.gpu.wait_copies::<1>();
        } else {
            self.gpu.wait_copies::<0>();
        }
    }

    /// Begins to copy the chunk that is `i` after the first, where there is one, into its stage, in a group
    /// of copies: the copiers.
    #[inline(always)]
    unsafe fn fetch<const TILES: usize>(&self, i: u32) {
        let Self { gpu, args, room, .. } = *self;
        let (base, chunk) = (self.stage(i), self.from + i);
        if chunk >= self.to {
            gpu.commit_copies();
            return;
        }
        let (key_head, _) = args.ratio.divide(self.head);
        let window_chunk = u64::from(chunk - args.first_chunk);
        let key = window_chunk * u64::from(args.num_k_heads.get()) + u64::from(key_head);
        let keys = key * u64::from(TILES.div_ceil(8) as u32 * ATOM);
        let head = self.v_head(chunk);
        let square = head * u64::from(ATOM);
        let values = head * u64::from(CHUNK * args.dv * 2) + u64::from(self.first * CHUNK * 2);
        let (thread, copiers) = (self.copier(), self.all_copiers());
        // SAFETY: as `run`.
        unsafe {
            self.copy::<TILES>(base + room.k, args.scratch.k + keys);
            self.copy::<8>(base + room.t, args.scratch.t + square);
            // 64 rows of 64 bytes for each slice; whatever the copiers are, each has the same piece of all
            // its rows, which are a multiple of 16 apart and swizzled alike.
            let slices = (room.bytes - room.v) / (CHUNK * padded(SLICE));
            let to = base + room.v + thread / 4 * padded(SLICE) + ((thread % 4) ^ (thread / 8 % 4)) * 16;
            let from = args.scratch.v + values + u64::from(thread * 16);
            let mut n = 0;
            while n * copiers < slices * CHUNK * 4 {
                let i = self.anew(n);
                gpu.copy16(to + i * (copiers / 4 * padded(SLICE)), from + u64::from(i * copiers * 16), true);
                n += 1;
            }
            if thread < CHUNK {
                let at = self.factors(chunk) + u64::from(thread * 16);
                gpu.copy16(base + room.factors + thread * 16, at, true);
            }
            self.copy::<TILES>(base + room.q, args.scratch.q + keys);
            self.copy::<8>(base + room.p, args.scratch.p + square);
            gpu.commit_copies();
        }
    }

    /// This thread among the copiers. Worked out anew for each chunk: there are no registers to keep places
    /// in.
    #[inline(always)]
    fn copier(&self) -> u32 {
        self.gpu.unforeseen(u64::from(self.gpu.thread() - self.copiers)) as u32
    }

    /// The same number, which is multiplied anew each time.
    #[inline(always)]
    fn anew(&self, n: u32) -> u32 {
        self.gpu.unforeseen(u64::from(n)) as u32
    }

    /// How many copiers there are: 128 or 64.
    #[inline(always)]
    fn all_copiers(&self) -> u32 {
        self.gpu.threads() - self.copiers
    }

    /// Begins to copy 64 rows of so many times 16 bytes from atoms, and pads them.
    #[inline(always)]
    unsafe fn copy<const PIECES: usize>(&self, to: u32, from: u64) {
        // A power of two of 16 bytes a row, so that a thread's are all in one column.
        let (all, pieces) = (PIECES.next_power_of_two() as u32, PIECES as u32);
        let (thread, copiers) = (self.copier(), self.all_copiers());
        let (row, piece, step) = (thread / all, thread % all, copiers / all);
        let from = from + u64::from(piece / 8 * ATOM + row * 128 + piece % 8 * 16);
        // Where the first row's piece belongs. Rows that are 4 apart are swizzled differently, and no rows are
        // less apart.
        let place = piece ^ (row % 8);
        let mut n = 0;
        while n * step < CHUNK {
            let rows = self.anew(n) * step;
            let place = place ^ (rows % 8);
            if PIECES.is_power_of_two() || place < pieces {
                let to = to + (row + rows) * padded(pieces * 8) + place * 16;
                // SAFETY: as `run`.
                unsafe { self.gpu.copy16(to, from + u64::from(rows * 128), true) };
            }
            n += 1;
        }
    }
}
