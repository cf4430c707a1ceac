//! Warps that have rows of S, and take them from chunk to chunk.

use gdn_math::Lanes;

use super::{
    args::{CHUNK, F32, SLICE, Strided, WARP_ROWS, padded, state_row},
    element::{load4, size, store4},
    scan::{Block, number},
    sequence::Sequence,
    tiles::{Tile, Tokens, by_triangle, each, factor, of_state, packed, right, right_transposed, scales},
};
use crate::gpu::{AsyncCopy, Bytes16, F16, TensorCore};

/// A warp's rows of S.
pub(super) struct Rows<'a, G, const TILES: usize> {
    block: &'a Block<'a, G>,
    s: [Tile; TILES],
}

/// The states of all heads of a slot; at 0 there are none.
struct States {
    at: u64,
    /// Bytes from a head, row and column to the next.
    strides: [u64; 3],
    dtype: u32,
    /// See `Args::wide`.
    wide: bool,
}

impl States {
    #[inline(always)]
    fn of(at: u64, states: &Strided<4>, wide: u32) -> Self {
        let [_, of_head, of_row, of_column] = states.strides;
        Self { at, strides: [of_head, of_row, of_column], dtype: states.dtype, wide: wide != 0 }
    }
}

impl<'a, G: TensorCore + AsyncCopy, const TILES: usize> Rows<'a, G, TILES> {
    /// All chunks of the block. The barriers are those of [`Outputs::run`](super::outputs::Outputs::run).
    ///
    /// # Safety
    /// As [`run`](super::scan::run).
    #[inline(always)]
    pub(super) unsafe fn run(block: &'a Block<'a, G>) {
        let Block { gpu, args, from, to, .. } = *block;
        let mut rows = Self { block, s: [[0.0; 4]; TILES] };
        // SAFETY: the caller's promises, here and below.
        unsafe {
            let sequence = Sequence::new(gpu, args, number(gpu, args));
            let mut state = States { at: 0, strides: [0; 3], dtype: F32, wide: true };
            if sequence.first_chunk < args.first_chunk {
                state = rows.carried(0);
            } else if sequence.is_initial {
                state = rows.kept(&sequence);
            }
            if state.at != 0 {
                rows.exchange::<true>(&state, 0);
            }
            gpu.barrier();
            let mut down = rows.hand_over();
            let mut i = 0;
            loop {
                if from < to {
                    gpu.barrier();
                    rows.chunk(block.stage(i), down);
                }
                if block.keeps(i) {
                    gpu.barrier();
                    rows.keep((from + i + 1).min(to), block.stage(i));
                    gpu.barrier();
                } else if args.stages == 1 {
                    gpu.barrier();
                }
                i += 1;
                if from + i >= to {
                    break;
                }
                down = rows.hand_over();
            }
        }
    }

    /// Puts S where the outputs are made, f16 that were brought into range. What brings products back.
    #[inline(always)]
    unsafe fn hand_over(&self) -> [f32; 2] {
        let gpu = self.block.gpu;
        let (up, down) = scales(gpu, &self.s, [1.0; 2]);
        let at = self.block.handed_state();
        let mut k16 = 0;
        // SAFETY: as `run`.
        unsafe {
            while k16 < TILES / 2 {
                let left = packed(gpu, &self.s[2 * k16], &self.s[2 * k16 + 1], up);
                gpu.store_shared16(at + k16 as u32 * 512, Bytes16(left));
                k16 += 1;
            }
            self.hand_over_scales(0, down);
            // The warp itself reads it too.
            gpu.sync_warp();
        }
        down
    }

    /// What brings products with S (0) or with U (1) back.
    #[inline(always)]
    unsafe fn hand_over_scales(&self, which: u32, down: [f32; 2]) {
        let gpu = self.block.gpu;
        if gpu.lane().is_multiple_of(4) {
            let line = gpu.lane() / 4;
            let mut r = 0;
            while r < 2 {
                let at = self.block.handed_scales(line + r as u32 * 8) + which * 4;
                // SAFETY: as `run`.
                unsafe { gpu.store_shared4(at, down[r].to_bits()) };
                r += 1;
            }
        }
    }

    /// One chunk, which is in shared memory from `base` on; `down` is what brings products with S back.
    #[inline(always)]
    unsafe fn chunk(&mut self, base: u32, down: [f32; 2]) {
        let Block { gpu, room, .. } = *self.block;
        let lane = gpu.lane();
        let row_bytes = padded(8 * TILES as u32);
        // SAFETY: as `run`; the chunk was copied, and a barrier is past.
        unsafe {
            // S K^T.
            let mut x = of_state::<TILES>(
                gpu,
                self.block.handed_state(),
                base + room.k + right(gpu, row_bytes),
                row_bytes,
            );
            // X^T. Of V^T four matrices of 8 tokens and 8 rows each.
            let factors = base + room.factors + lane % 4 * 32;
            let row = self.block.warp_row();
            let v = base
                + room.v
                + row / SLICE * CHUNK * padded(SLICE)
                + row % SLICE * 2
                + right(gpu, padded(SLICE));
            let mut pair = 0;
            while pair < 4 {
                let words = gpu.load_matrix4::<true>(v + pair as u32 * 16 * padded(SLICE));
                let mut half = 0;
                while half < 2 {
                    let tile = 2 * pair + half;
                    let two = [gpu.unpack_f16(words[2 * half]), gpu.unpack_f16(words[2 * half + 1])];
                    let mut c = 0;
                    while c < 2 {
                        let [value, found, ..] = factor(gpu, factors, tile, c);
                        let mut r = 0;
                        while r < 2 {
                            let at = &mut x[tile][2 * r + c];
                            *at = (*at * down[r]).neg_mul_add(found, value * two[r][c]);
                            r += 1;
                        }
                        c += 1;
                    }
                    half += 1;
                }
                pair += 1;
            }
            // U^T, as many times itself as X^T is multiplied with.
            let (up_x, _) = scales(gpu, &x, [1.0; 2]);
            let mut u: Tokens = [[0.0; 4]; 8];
            let at = base + room.t + right(gpu, padded(CHUNK));
            let left = |k16: usize| packed(gpu, &x[2 * k16 % 8], &x[(2 * k16 + 1) % 8], up_x);
            by_triangle(gpu, left, at, padded(CHUNK), &mut u);
            let (up, down) = scales(gpu, &u, up_x);
            let at = self.block.handed_corrections();
            let mut k16 = 0;
            while k16 < 4 {
                let left = packed(gpu, &u[2 * k16], &u[2 * k16 + 1], up);
                gpu.store_shared16(at + k16 as u32 * 512, Bytes16(left));
                k16 += 1;
            }
            self.hand_over_scales(1, down);
            gpu.barrier();
            // S. What is left of U at the chunk's end has a size of its own.
            let mut tile = 0;
            while tile < 8 {
                let mut c = 0;
                while c < 2 {
                    let [.., to_end] = factor(gpu, factors, tile, c);
                    u[tile][c] *= to_end;
                    u[tile][c + 2] *= to_end;
                    c += 1;
                }
                tile += 1;
            }
            let (up, down) = scales(gpu, &u, up_x);
            let mut left = [[0; 4]; 4];
            let mut k16 = 0;
            while k16 < 4 {
                left[k16] = packed(gpu, &u[2 * k16], &u[2 * k16 + 1], up);
                k16 += 1;
            }
            let Bytes16(words) = gpu.load_shared16(base + room.factors + (CHUNK - 1) * 16);
            let all = f32::from_bits(words[2]);
            let at = base + room.k + right_transposed(gpu, row_bytes);
            let mut pair = 0;
            while pair < TILES / 2 {
                let mut sums = [[0.0; 4]; 2];
                let mut k16 = 0;
                while k16 < 4 {
                    let at = at + k16 as u32 * 16 * row_bytes + pair as u32 * 32;
                    let [b0, b1, b2, b3] = gpu.load_matrix4::<true>(at);
                    sums[0] = gpu.mma::<F16>(left[k16], [b0, b1], sums[0]);
                    sums[1] = gpu.mma::<F16>(left[k16], [b2, b3], sums[1]);
                    k16 += 1;
                }
                let mut i = 0;
                while i < 8 {
                    let s = &mut self.s[2 * pair + i / 4][i % 4];
                    *s = Lanes::mul_add(*s, all, sums[i / 4][i % 4] * down[i % 4 / 2]);
                    i += 1;
                }
                pair += 1;
            }
        }
    }

    /// Those that are carried from the window before (0), or to the next (1).
    #[inline(always)]
    fn carried(&self, to: usize) -> States {
        let row = u64::from(self.block.args.dk * 4);
        let strides = [row * u64::from(self.block.args.dv), row, 4];
        States { at: self.block.args.scratch.carry[to], strides, dtype: F32, wide: true }
    }

    /// Those of a sequence's slot.
    #[inline(always)]
    fn kept(&self, sequence: &Sequence) -> States {
        let state = &self.block.args.state;
        let at = if state.address == 0 { 0 } else { state.address + sequence.slot as u64 * state.strides[0] };
        States::of(at, state, self.block.args.wide_state)
    }

    /// Reads the rows of S, or writes them, through the warp's part of what is free at `room` of shared
    /// memory.
    #[inline(always)]
    unsafe fn exchange<const READ: bool>(&mut self, states: &States, room: u32) {
        let Block { gpu, args, .. } = *self.block;
        let lane = gpu.lane();
        let row_bytes = state_row(args.dk);
        let room = room + self.block.warp_row() * row_bytes;
        let own = room + lane / 4 * row_bytes + lane % 4 * 8;
        // SAFETY: as `run`.
        unsafe {
            if !READ {
                each::<TILES>(|tile, r| {
                    let at = own + r as u32 * 8 * row_bytes + tile as u32 * 32;
                    let two = [0, 1].map(|c| u64::from(self.s[tile][2 * r + c].to_bits()));
                    gpu.store_shared8(at, two[0] | two[1] << 32);
                });
                gpu.sync_warp();
            }
            let [of_head, of_row, of_column] = states.strides;
            let element = u64::from(size(states.dtype));
            let first = u64::from(self.block.first + self.block.warp_row());
            let at = states.at + u64::from(self.block.head) * of_head + first * of_row;
            // Four columns of a row, or rows of a column, whichever are dense.
            let columns = of_column == element;
            let mut i = lane;
            while i < WARP_ROWS * args.dk / 4 {
                let (row, column, shared_step, step) = if columns {
                    (i / (2 * TILES as u32), i % (2 * TILES as u32) * 4, 4, of_column)
                } else {
                    (i % 4 * 4, i / 4, row_bytes, of_row)
                };
                let at = at + u64::from(row) * of_row + u64::from(column) * of_column;
                let shared = room + row * row_bytes + column * 4;
                if READ {
                    let four = load4(gpu, states.dtype, at, step, states.wide);
                    let mut n = 0;
                    while n < 4 {
                        gpu.store_shared4(shared + n as u32 * shared_step, four[n].to_bits());
                        n += 1;
                    }
                } else {
                    let mut four = [0.0; 4];
                    let mut n = 0;
                    while n < 4 {
                        four[n] = f32::from_bits(gpu.load_shared4(shared + n as u32 * shared_step));
                        n += 1;
                    }
                    store4(gpu, states.dtype, at, step, states.wide, four);
                }
                i += 32;
                // Keeps the compiler from unrolling, for which there are no registers.
                gpu.sync_warp();
            }
            gpu.sync_warp();
            if READ {
                each::<TILES>(|tile, r| {
                    let two = gpu.load_shared8(own + r as u32 * 8 * row_bytes + tile as u32 * 32);
                    self.s[tile][2 * r] = f32::from_bits(two as u32);
                    self.s[tile][2 * r + 1] = f32::from_bits((two >> 32) as u32);
                });
            }
        }
    }

    /// Keeps the states after the chunks before `chunk`: where a checkpoint is, in the slot, for the next
    /// window.
    #[inline(always)]
    unsafe fn keep(&mut self, chunk: u32, room: u32) {
        let Block { gpu, args, to, ends, .. } = *self.block;
        let is_last = chunk == to;
        // SAFETY: as `run`.
        unsafe {
            // Read again: there are no registers to have it at hand all the time.
            let sequence = Sequence::new(gpu, args, number(gpu, args));
            let chunks = chunk - sequence.first_chunk;
            let tokens = u64::from(chunks) * u64::from(CHUNK);
            let mut way = if args.has_checkpoints != 0 { 0 } else { 1 };
            while way < 2 {
                let mut states = if ends { self.kept(&sequence) } else { self.carried(1) };
                // Without a token an initial state is what it was already.
                if !is_last || (chunks == 0 && sequence.is_initial) {
                    states.at = 0;
                }
                if way == 0 {
                    states = States::of(0, &args.checkpoints, args.wide_checkpoints);
                    let (number, rest) = args.every.divide(chunks);
                    if number > 0 && rest == 0 && tokens <= sequence.len {
                        states.at = sequence.checkpoint(gpu, args, number - 1, &args.checkpoints);
                    }
                }
                if states.at != 0 {
                    self.exchange::<false>(&states, room);
                }
                way += 1;
            }
        }
    }
}
