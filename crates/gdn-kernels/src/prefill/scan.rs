//! The third kernel: from chunk to chunk, a block for each sequence, v head and 32 or 64 rows of S.
//!
//! Half of the warps have 16 rows of S each in their registers, in f32, and go from chunk to chunk
//! (`state.rs`); each of the others makes the outputs of one of these and copies what both need
//! next (`outputs.rs`). Rows need nothing of one another: everything is transposed, so that
//! rows of S are rows of the accumulators, and what one product leaves is the left side of the next. For a
//! chunk:
//!
//! ```text
//! X^T = beta (V^T - e^G * S K^T)                 what each key finds in the state, corrected
//! U^T = X^T T^T                                  T the inverse of I + strictLower(beta e^D K K^T)
//! O^T = e^G * S Q^T + U^T P^T                    P = lower(e^D Q K^T)
//! S   = e^G_last * S + (e^(G_last - G) * U^T) K
//! ```
//!
//! What is multiplied is f16, each row of S, X and U brought into its range by a power of two of its own: a
//! row has 11 bits of its largest numbers, whatever their size. S itself stays f32 and is added to outside of
//! the tensor cores, which cut sums towards zero. As each row is by itself, bits depend on nothing but the
//! row's own history.

use super::{
    args::{Args, CHUNK, SLICE, ScanRoom, WARP_ROWS, padded},
    element::{load, size, store},
    outputs::Outputs,
    sequence::Sequence,
    state::Rows,
};
use crate::gpu::{AsyncCopy, Gpu, TensorCore};

/// A block's part of the call.
pub(super) struct Block<'a, G> {
    pub(super) gpu: &'a G,
    pub(super) args: &'a Args,
    pub(super) room: ScanRoom,
    pub(super) head: u32,
    /// Of the v head's rows the block's first.
    pub(super) first: u32,
    /// Its chunks of the window.
    pub(super) from: u32,
    pub(super) to: u32,
    /// Whether the sequence ends in the window.
    pub(super) ends: bool,
}

/// The kernel, for keys of `8 * TILES` numbers.
///
/// # Safety
/// The arguments describe tensors that are there, and the grid and shared memory were made for them.
#[inline(always)]
pub unsafe fn run<const TILES: usize, G: TensorCore + AsyncCopy>(gpu: &G, args: &Args) {
    gpu.wait_for_previous();
    let (group, slice) = args.slices.divide(gpu.block()[0]);
    let (_, head) = args.num_v_heads.divide(group);
    let rows = gpu.threads() / 64 * WARP_ROWS;
    let room = ScanRoom::new(8 * TILES as u32, rows / SLICE);
    // SAFETY: the caller's promises, here and below.
    unsafe {
        let sequence = Sequence::new(gpu, args, number(gpu, args));
        let last = sequence.first_chunk + sequence.chunks().max(1) - 1;
        if sequence.slot < 0 || last < args.first_chunk || sequence.first_chunk >= args.end_chunk {
            return;
        }
        let from = sequence.first_chunk.max(args.first_chunk);
        let to = (sequence.first_chunk + sequence.chunks()).min(args.end_chunk);
        let ends = last < args.end_chunk;
        let block = Block { gpu, args, room, head, first: slice * rows, from, to, ends };
        if gpu.thread() < block.group() {
            Rows::<G, TILES>::run(&block);
        } else {
            Outputs::<G, TILES>::run(&block);
        }
        if ends {
            block.roll_window(slice);
        }
    }
}

/// The number of the block's sequence.
#[inline(always)]
pub(super) fn number(gpu: &impl Gpu, args: &Args) -> u32 {
    let (group, _) = args.slices.divide(gpu.block()[0]);
    let (number, _) = args.num_v_heads.divide(group);
    number
}

impl<G: TensorCore + AsyncCopy> Block<'_, G> {
    /// Half of the block's threads: those with rows of S, and those with their outputs.
    #[inline(always)]
    pub(super) fn group(&self) -> u32 {
        self.gpu.threads() / 2
    }

    /// This thread in its half.
    #[inline(always)]
    pub(super) fn thread(&self) -> u32 {
        let (thread, group) = (self.gpu.thread(), self.group());
        if thread < group { thread } else { thread - group }
    }

    /// The first of the warp's rows among the block's.
    #[inline(always)]
    pub(super) fn warp_row(&self) -> u32 {
        self.thread() / 32 * WARP_ROWS
    }

    /// Where in shared memory the chunk is that is `i` after the first.
    #[inline(always)]
    pub(super) fn stage(&self, i: u32) -> u32 {
        (i & (self.args.stages - 1)) * self.room.bytes
    }

    /// Where a warp hands over to the one that makes its outputs: the left sides of S, for the lane.
    #[inline(always)]
    pub(super) fn handed_state(&self) -> u32 {
        let warp = self.thread() / 32;
        self.args.stages * self.room.bytes + warp * ScanRoom::handed(self.args.dk) + self.gpu.lane() * 16
    }

    /// The left sides of U, for the lane.
    #[inline(always)]
    pub(super) fn handed_corrections(&self) -> u32 {
        self.handed_state() + self.args.dk / 16 * 512
    }

    /// What brings rows of products with S, and with U, back to what they are: row `line` of the warp's.
    #[inline(always)]
    pub(super) fn handed_scales(&self, line: u32) -> u32 {
        self.handed_corrections() - self.gpu.lane() * 16 + 2048 + line * 8
    }

    /// Whether the states are kept after the chunk that is `i` after the first.
    #[inline(always)]
    pub(super) fn keeps(&self, i: u32) -> bool {
        self.args.has_checkpoints != 0 || self.from + i + 1 >= self.to
    }

    /// The number of the v head, among those of all chunks.
    #[inline(always)]
    pub(super) fn v_head(&self, chunk: u32) -> u64 {
        let chunk = u64::from(chunk - self.args.first_chunk);
        chunk * u64::from(self.args.num_v_heads.get()) + u64::from(self.head)
    }

    /// Begins to copy a chunk into a stage: half of the threads.
    #[inline(always)]
    pub(super) unsafe fn fetch<const TILES: usize>(&self, i: u32) {
        let Self { args, room, .. } = *self;
        let (base, chunk) = (self.stage(i), self.from + i);
        let thread = self.thread();
        let (key_head, _) = args.ratio.divide(self.head);
        let window_chunk = u64::from(chunk - args.first_chunk);
        let key = window_chunk * u64::from(args.num_k_heads.get()) + u64::from(key_head);
        let keys = key * u64::from(CHUNK * args.dk * 2);
        let head = self.v_head(chunk);
        let square = head * u64::from(CHUNK * CHUNK * 2);
        // SAFETY: as `run`.
        unsafe {
            self.copy::<TILES>(thread, base + room.k, args.scratch.k + keys);
            self.copy::<8>(thread, base + room.t, args.scratch.t + square);
            let slices = self.gpu.threads() / 128;
            let mut slice = 0;
            while slice < slices {
                let at = args.scratch.v
                    + head * u64::from(CHUNK * args.dv * 2)
                    + u64::from((self.first + slice * SLICE) * CHUNK * 2);
                self.copy::<4>(thread, base + room.v + slice * CHUNK * padded(SLICE), at);
                slice += 1;
            }
            if thread < CHUNK {
                let at = args.scratch.factors + head * u64::from(CHUNK * 16) + u64::from(thread * 16);
                self.gpu.copy16(base + room.factors + thread * 16, at, true);
            }
            self.copy::<TILES>(thread, base + room.q, args.scratch.q + keys);
            self.copy::<8>(thread, base + room.p, args.scratch.p + square);
        }
    }

    /// Begins to copy 64 rows of `WORDS` times 16 bytes.
    #[inline(always)]
    unsafe fn copy<const WORDS: usize>(&self, thread: u32, to: u32, from: u64) {
        let words = WORDS as u32;
        let mut i = thread;
        while i < CHUNK * words {
            let to = to + i / words * padded(words * 8) + i % words * 16;
            // SAFETY: as `run`.
            unsafe { self.gpu.copy16(to, from + u64::from(i * 16), true) };
            i += self.group();
        }
    }

    /// Brings the window of the convolution up to date, the block some of the channels. One thread moves a
    /// channel's columns, in order, so that it may move onto itself.
    #[inline(always)]
    unsafe fn roll_window(&self, slice: u32) {
        let Self { gpu, args, .. } = self;
        let state = &args.conv_state;
        // SAFETY: as `run`.
        let sequence = unsafe { Sequence::new(*gpu, args, number(*gpu, args)) };
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
