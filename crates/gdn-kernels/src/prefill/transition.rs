//! What a segment makes of the state that it begins with, `S -> S M + Z`: a block for each segment that
//! others follow, v head and 128 rows of Z or of M.
//!
//! The scan without outputs, a warp 16 rows: those of Z from zeros, those of M from the identity and without
//! values. The first segment of a sequence begins with what the sequence begins with, so it has no M.
//!
//! There are two ways, with the same bits, as of the scan: here each warp multiplies for itself, and four
//! together in `transition_group.rs`.

use super::{
    args::{
        ATOM, Args, CHUNK, FACTORS, SLICE, TRANSITION_THREADS, TransitionRoom, WARP_ROWS, padded, state_row,
    },
    element::power,
    rows::{from_left, to_end, update},
    segment::Part,
    states::{Place, States, exchange, read_dense, write_dense},
    tiles::{
        Tile, Tokens, by_triangle, corrected, down_of_update, left_of_state, lefts, packed, scale, split,
        sums_by_atoms,
    },
};
use crate::gpu::{AsyncCopy, Bytes16, Swizzle, TensorCore};

/// Rows of a block.
pub(super) const ROWS: u32 = TRANSITION_THREADS / 32 * WARP_ROWS;

/// A block's part of the call.
pub(super) struct Block<'a, G> {
    pub(super) gpu: &'a G,
    pub(super) args: &'a Args,
    pub(super) part: Part,
    pub(super) head: u32,
    /// Whether the rows are of Z.
    pub(super) has_values: bool,
    /// The first of the block's rows.
    pub(super) first: u32,
}

/// Where what the block needs of a chunk begins in scratch.
pub(super) struct Sources {
    pub(super) k: u64,
    pub(super) t: u64,
    pub(super) v: u64,
    pub(super) factors: u64,
}

/// The kernel, for keys of `8 * TILES` numbers.
///
/// # Safety
/// The arguments describe tensors that are there, and the grid and shared memory were made for them.
#[inline(always)]
pub unsafe fn run<const TILES: usize, G: TensorCore + AsyncCopy>(gpu: &G, args: &Args) {
    // SAFETY: the caller's promises.
    unsafe {
        if let Some(block) = Block::new(gpu, args) {
            block.run::<TILES>();
        }
    }
}

impl<'a, G: TensorCore> Block<'a, G> {
    /// `None` where there is nothing to do.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    pub(super) unsafe fn new(gpu: &'a G, args: &'a Args) -> Option<Self> {
        let (rest, slice) = args.segments.slices.divide(gpu.block()[0]);
        let (place, head) = args.num_v_heads.divide(rest);
        let of_values = args.dv.div_ceil(ROWS);
        let has_values = slice < of_values;
        // SAFETY: the caller's promises.
        let part = unsafe { Part::of_place(gpu, args, place) };
        gpu.wait_for_previous();
        gpu.let_next_start();
        if !part.is_there || (part.index == 0 && !has_values) {
            return None;
        }
        let first = ROWS * if has_values { slice } else { slice - of_values };
        Some(Self { gpu, args, part, head, has_values, first })
    }

    /// Rows of Z, or of M.
    #[inline(always)]
    pub(super) fn rows(&self) -> u32 {
        if self.has_values { self.args.dv } else { self.args.dk }
    }

    /// The warp's first.
    #[inline(always)]
    pub(super) fn row(&self) -> u32 {
        self.first + self.gpu.thread() / 32 * WARP_ROWS
    }

    /// The warp's own part of the shared memory that the chunks come to, for its rows in f32.
    #[inline(always)]
    fn room<const TILES: usize>(&self) -> u32 {
        (self.row() - self.first) * state_row(8 * TILES as u32)
    }

    /// Where the warp's rows are in what was made of a segment: those of Z, or those behind it.
    #[inline(always)]
    fn place(&self, at: u64, of_values: bool) -> u64 {
        let Self { args, head, .. } = *self;
        let row_bytes = u64::from(args.dk * 4);
        let before = if of_values { 0 } else { args.num_v_heads.get() * args.dv };
        let rows = before + head * if of_values { args.dv } else { args.segments.rows_behind } + self.row();
        at + u64::from(rows) * row_bytes
    }

    /// Where a chunk is in scratch.
    #[inline(always)]
    pub(super) fn sources<const TILES: usize>(&self, chunk: u32) -> Sources {
        let Self { args, head, .. } = *self;
        let window_chunk = u64::from(chunk - args.first_chunk);
        let (key_head, _) = args.ratio.divide(head);
        let key = window_chunk * u64::from(args.num_k_heads.get()) + u64::from(key_head);
        let v_head = window_chunk * u64::from(args.num_v_heads.get()) + u64::from(head);
        let values = v_head * u64::from(CHUNK * args.dv * 2) + u64::from(self.first * CHUNK * 2);
        Sources {
            k: args.scratch.k + key * u64::from(TILES.div_ceil(8) as u32 * ATOM),
            t: args.scratch.t + v_head * u64::from(ATOM),
            v: args.scratch.v + values,
            factors: args.scratch.factors + v_head * u64::from(FACTORS),
        }
    }

    /// Slices of the values that the block's rows have.
    #[inline(always)]
    pub(super) fn slices(&self) -> u32 {
        if self.has_values { (self.args.dv - self.first).min(ROWS) / SLICE } else { 0 }
    }

    /// The states of the slot that the rows begin with, where they do.
    #[inline(always)]
    pub(super) fn initial(&self) -> Option<States> {
        let Self { args, part, .. } = self;
        let is_first = self.has_values && part.index == 0 && !part.goes_on();
        (is_first && part.sequence.is_initial)
            .then(|| States::kept(args, &part.sequence))
            .filter(|states| states.at != 0)
    }

    /// What the rows begin with otherwise, if not with zeros.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    pub(super) unsafe fn begin<const TILES: usize>(&self, s: &mut [Tile]) {
        let Self { gpu, args, part, .. } = *self;
        let (row, lane) = (self.row(), gpu.lane());
        let (s, _) = s.split_at_mut(TILES);
        if part.goes_on() {
            // SAFETY: the caller's promise.
            unsafe {
                read_dense(gpu, self.place(args.segments.open[0], self.has_values), args.dk, s);
            }
        } else if !self.has_values {
            let mut tile = 0;
            while tile < TILES {
                let mut i = 0;
                while i < 4 {
                    let line = row + lane / 4 + i as u32 / 2 * 8;
                    let column = tile as u32 * 8 + lane % 4 * 2 + i as u32 % 2;
                    s[tile][i] = if line == column { 1.0 } else { 0.0 };
                    i += 1;
                }
                tile += 1;
            }
        }
    }

    /// Puts what the sequence begins with where the scan of its first segment finds it: another block of the
    /// scan puts the last states where these were read.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    pub(super) unsafe fn put_start<const TILES: usize>(&self, s: &[Tile]) {
        let Self { args, part, .. } = *self;
        let is_first = self.has_values && part.index == 0 && !part.goes_on();
        if is_first && part.sequence.is_initial && part.ends(args) {
            // SAFETY: the caller's promise.
            unsafe { self.put::<TILES>(self.place(part.made(args), false), s) };
        }
    }

    /// Puts what was made of the warp's rows, through its [`room`](Self::room).
    ///
    /// # Safety
    /// As [`run`]; nobody needs the chunks any more.
    #[inline(always)]
    pub(super) unsafe fn end<const TILES: usize>(&self, s: &[Tile]) {
        let Self { args, part, .. } = *self;
        // SAFETY: as `run`.
        unsafe {
            if !part.ends(args) {
                self.put::<TILES>(self.place(args.segments.open[1], self.has_values), s);
            } else if self.has_values {
                self.put::<TILES>(self.place(part.made(args), true), s);
            } else {
                self.put_split::<TILES>(part.made(args), s);
            }
        }
    }

    /// Puts 16 rows of M as right sides, see [`Segments`](super::args::Segments).
    #[inline(always)]
    unsafe fn put_split<const TILES: usize>(&self, to: u64, s: &[Tile]) {
        let Self { gpu, args, head, .. } = *self;
        let (row, lane) = (self.row(), gpu.lane());
        let row_bytes = padded(8 * TILES as u32);
        let room = self.room::<TILES>();
        let lost_room = room + WARP_ROWS * row_bytes;
        let mut largest = 0.0f32;
        let mut tile = 0;
        while tile < TILES {
            let [a, b, c, d] = s[tile].map(f32::abs);
            largest = largest.max(a.max(b).max(c.max(d)));
            tile += 1;
        }
        let mut mask = 16;
        while mask > 0 {
            largest = largest.max(f32::from_bits(gpu.shuffle_xor(largest.to_bits(), mask)));
            mask /= 2;
        }
        let (up, down) = power(largest);
        // SAFETY: as `run`.
        unsafe {
            let own = room + lane / 4 * row_bytes + lane % 4 * 4;
            let mut tile = 0;
            while tile < TILES {
                let mut r = 0;
                while r < 2 {
                    let [kept, lost] = split(gpu, [s[tile][2 * r] * up, s[tile][2 * r + 1] * up]);
                    let at = own + r as u32 * 8 * row_bytes + tile as u32 * 16;
                    gpu.store_shared4(at, kept);
                    gpu.store_shared4(at + WARP_ROWS * row_bytes, lost);
                    r += 1;
                }
                tile += 1;
            }
            gpu.sync_warp();
            // Of 16 by 16 numbers the two matrices of the first 8 columns come first.
            let line = (lane / 8 % 2 * 8 + lane % 8) * row_bytes + lane / 16 * 16;
            let to_rows = args.segments.rows_of_m(to, head, args) + u64::from(row * args.dk * 4 + lane * 16);
            let mut sixteen = 0;
            while sixteen < TILES as u32 / 2 {
                let to = to_rows + u64::from(sixteen * 1024);
                gpu.store16(to, Bytes16(gpu.load_matrix4::<true>(room + line + sixteen * 32)));
                gpu.store16(to + 512, Bytes16(gpu.load_matrix4::<true>(lost_room + line + sixteen * 32)));
                sixteen += 1;
            }
            if lane == 0 {
                let scales = args.segments.scales_of_m(to, head, args.num_v_heads.get());
                gpu.store4(scales + u64::from(row / WARP_ROWS * 4), down.to_bits());
            }
        }
    }

    /// Puts the warp's rows, the first of which begins at `to`.
    #[inline(always)]
    unsafe fn put<const TILES: usize>(&self, to: u64, s: &[Tile]) {
        let (s, _) = s.split_at(TILES);
        // SAFETY: as `run`.
        unsafe { write_dense(self.gpu, to, self.args.dk, s) };
    }
}

impl<G: TensorCore + AsyncCopy> Block<'_, G> {
    #[inline(always)]
    unsafe fn run<const TILES: usize>(&self) {
        let Self { gpu, args, part, .. } = *self;
        let (chunks, stages) = (part.to - part.from, args.segments.stages);
        let mut s = [[0.0; 4]; TILES];
        let is_there = self.row() < self.rows();
        // SAFETY: as `run`.
        unsafe {
            if is_there {
                if let Some(states) = self.initial() {
                    let place = Place { row: self.row(), column: 0, room: self.room::<TILES>() };
                    exchange::<true, TILES>(gpu, self.head, &states, place, &mut s);
                } else {
                    self.begin::<TILES>(&mut s);
                }
                self.put_start::<TILES>(&s);
            }
            // The states came through where the chunks come.
            gpu.barrier();
            let mut i = 0;
            while i + 1 < stages {
                self.fetch::<TILES>(i);
                i += 1;
            }
            let mut i = 0;
            while i < chunks {
                if stages > 2 {
                    gpu.wait_copies::<1>();
                } else {
                    gpu.wait_copies::<0>();
                }
                // The chunk has landed, and nobody needs the one before.
                gpu.barrier();
                self.fetch::<TILES>(i + stages - 1);
                if is_there {
                    self.step::<TILES>(self.stage::<TILES>(i), &mut s);
                }
                i += 1;
            }
            gpu.wait_copies::<0>();
            // Nobody needs the last chunk.
            gpu.barrier();
            if is_there {
                self.end::<TILES>(&s);
            }
        }
    }

    /// Where in shared memory the chunk is that is `i` after the first.
    #[inline(always)]
    fn stage<const TILES: usize>(&self, i: u32) -> u32 {
        let stage = match self.args.segments.stages {
            3 => i % 3,
            _ => i % 2,
        };
        stage * TransitionRoom::new(8 * TILES as u32).bytes
    }

    /// Brings the warp's rows to the end of the chunk at `base`.
    #[inline(always)]
    unsafe fn step<const TILES: usize>(&self, base: u32, s: &mut [Tile; TILES]) {
        let (gpu, room) = (self.gpu, TransitionRoom::new(8 * TILES as u32));
        let k_row = padded(8 * TILES as u32);
        // SAFETY: as `run`; the chunk was copied, and a barrier is past.
        unsafe {
            let two = gpu.load_shared8(base + room.factors + CHUNK * 16);
            let (mut value, lift) = (f32::from_bits(two as u32), f32::from_bits((two >> 32) as u32));
            if !self.has_values {
                value = 0.0;
            }
            let [[up_0, down_0], [up_1, down_1]] = sums_by_atoms(gpu, s).map(|sum| scale(sum, value));
            let up = [up_0, up_1];
            let mut x: Tokens = [[0.0; 4]; 8];
            let mut k16 = 0;
            while k16 < TILES / 2 {
                let left = packed(gpu, &s[2 * k16], &s[2 * k16 + 1], up);
                from_left(gpu, left, base + room.k + k16 as u32 * 32, k_row, &mut x);
                k16 += 1;
            }
            let factors = base + room.factors + gpu.lane() % 4 * 32;
            let row = self.row() - self.first;
            let v = base + room.v + row / SLICE * CHUNK * padded(SLICE) + row % SLICE * 2;
            let mut pair = 0;
            while pair < 4 {
                let mut words = [0; 4];
                if self.has_values {
                    let at = v + super::tiles::right(gpu, padded(SLICE)) + pair as u32 * 16 * padded(SLICE);
                    words = gpu.load_matrix4::<true>(at);
                }
                corrected(gpu, words, factors + pair as u32 * 256, up, x.split_at_mut(2 * pair).1);
                pair += 1;
            }
            let mut u: Tokens = [[0.0; 4]; 8];
            by_triangle(gpu, &lefts(gpu, &x), base + room.t, &mut u);
            to_end(gpu, factors, &mut u);
            let down = [down_0, down_1].map(|down| down_of_update(down, lift));
            let all = left_of_state(gpu, base + room.factors);
            update::<TILES, TILES>(gpu, &lefts(gpu, &u), base + room.k, all, down, s);
        }
    }

    /// Begins to copy the chunk that is `i` after the first, where there is one, into its stage.
    #[inline(always)]
    unsafe fn fetch<const TILES: usize>(&self, i: u32) {
        let Self { gpu, part, .. } = *self;
        let (base, room) = (self.stage::<TILES>(i), TransitionRoom::new(8 * TILES as u32));
        if part.from + i < part.to {
            let from = self.sources::<TILES>(part.from + i);
            let thread = gpu.unforeseen(u64::from(gpu.thread())) as u32;
            // SAFETY: as `run`.
            unsafe {
                self.copy_atoms(base + room.k, from.k, TILES as u32);
                self.copy_atoms(base + room.t, from.t, 8);
                self.copy_values(base + room.v, from.v, self.slices());
                if thread <= CHUNK {
                    let at = u64::from(thread * 16);
                    gpu.copy16(base + room.factors + thread * 16, from.factors + at, true);
                }
            }
        }
        gpu.commit_copies();
    }

    /// Begins to copy 64 rows of so many times 16 bytes from atoms, and pads them.
    #[inline(always)]
    unsafe fn copy_atoms(&self, to: u32, from: u64, pieces: u32) {
        let gpu = self.gpu;
        let mut i = gpu.unforeseen(u64::from(gpu.thread())) as u32;
        while i < CHUNK * pieces {
            let (row, piece) = (i / pieces, i % pieces);
            let at = Swizzle::Bytes128.place(piece / 8 * ATOM + row * 128 + piece % 8 * 16);
            // SAFETY: as `run`.
            unsafe { gpu.copy16(to + row * padded(pieces * 8) + piece * 16, from + u64::from(at), true) };
            i += TRANSITION_THREADS;
        }
    }

    /// Begins to copy the values of so many slices, and pads them.
    #[inline(always)]
    unsafe fn copy_values(&self, to: u32, from: u64, slices: u32) {
        let gpu = self.gpu;
        let mut i = gpu.unforeseen(u64::from(gpu.thread())) as u32;
        while i < slices * CHUNK * 4 {
            let (row, piece) = (i / 4, (i % 4) ^ (i / 8 % 4));
            // SAFETY: as `run`.
            unsafe { gpu.copy16(to + row * padded(SLICE) + piece * 16, from + u64::from(i * 16), true) };
            i += TRANSITION_THREADS;
        }
    }
}
