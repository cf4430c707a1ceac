//! Where states lie in global memory, and how 16 rows of one get there and back.

use super::{
    args::{Args, CHUNK, F32, Strided, WARP_ROWS, state_row},
    element::{load4, size, store4},
    scan::Block,
    sequence::Sequence,
    tiles::Tile,
};
use crate::gpu::{AsyncCopy, Bytes16, TensorCore};

/// The states of all heads of a slot; at 0 there are none.
pub(super) struct States {
    pub(super) at: u64,
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

    /// Those of a sequence's slot.
    #[inline(always)]
    pub(super) fn kept(args: &Args, sequence: &Sequence) -> Self {
        let state = &args.state;
        let at = if state.address == 0 { 0 } else { state.address + sequence.slot as u64 * state.strides[0] };
        Self::of(at, state, args.wide_state)
    }

    /// Those in scratch memory: f32, dense, a head so many rows.
    #[inline(always)]
    fn dense(args: &Args, at: u64, rows: u32) -> Self {
        let row = u64::from(args.dk * 4);
        Self { at, strides: [row * u64::from(rows), row, 4], dtype: F32, wide: true }
    }
}

/// 16 rows of some columns of S.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// The first of the v head's rows.
    pub(super) row: u32,
    pub(super) column: u32,
    /// Where in shared memory they come through: a warp's own.
    pub(super) room: u32,
}

impl<const BY_GROUP: bool, G: TensorCore + AsyncCopy> Block<'_, BY_GROUP, G> {
    /// The states that the block begins with: those of the window or of the segment before, of the slot, or
    /// none.
    ///
    /// # Safety
    /// As [`run`](super::scan::run).
    #[inline(always)]
    pub(super) unsafe fn begin(&self) -> States {
        let Self { args, .. } = *self;
        // SAFETY: the caller's promise.
        let part = unsafe { self.part() };
        if part.goes_on() {
            States::dense(args, args.scratch.carry[0], args.dv)
        } else if part.index > 0 {
            States::dense(args, part.begins_with(args), args.dv)
        } else if !part.sequence.is_initial {
            States { at: 0, strides: [0; 3], dtype: F32, wide: true }
        } else if !part.is_last && part.ends(args) {
            // The slot's may have been replaced by the last segment's.
            let (rows, row) = (args.num_v_heads.get() * args.dv, u64::from(args.dk * 4));
            States::dense(args, part.made(args) + u64::from(rows) * row, args.segments.rows_behind)
        } else {
            States::kept(args, &part.sequence)
        }
    }

    /// Keeps the states after the chunks before `chunk`: where a checkpoint is, in the slot, for the next
    /// window. `put` writes them.
    ///
    /// # Safety
    /// As [`run`](super::scan::run).
    #[inline(always)]
    pub(super) unsafe fn keep(&self, chunk: u32, mut put: impl FnMut(&States)) {
        let Self { gpu, args, to, ends, .. } = *self;
        let is_last = chunk == to;
        // SAFETY: the caller's promise.
        unsafe {
            // Read again: there are no registers to have it at hand all the time.
            let part = self.part();
            let sequence = part.sequence;
            let chunks = chunk - sequence.first_chunk;
            let tokens = u64::from(chunks) * u64::from(CHUNK);
            let mut way = if args.has_checkpoints != 0 { 0 } else { 1 };
            while way < 2 {
                let mut states = if ends {
                    States::kept(args, &sequence)
                } else {
                    States::dense(args, args.scratch.carry[1], args.dv)
                };
                // Without a token an initial state is what it was already; what the next segment begins with
                // is there.
                if !is_last || (chunks == 0 && sequence.is_initial) || (!ends && part.to == part.end) {
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
                    put(&states);
                }
                way += 1;
            }
        }
    }

    /// Reads 16 rows of `8 * TILES` columns of S, or writes them.
    ///
    /// # Safety
    /// As [`run`](super::scan::run); all lanes of a warp come together.
    #[inline(always)]
    pub(super) unsafe fn exchange<const READ: bool, const TILES: usize>(
        &self,
        states: &States,
        place: Place,
        s: &mut [Tile],
    ) {
        // Worked out anew each time: from chunk to chunk there are no registers for it.
        let head = self.gpu.unforeseen(u64::from(self.head)) as u32;
        // SAFETY: the caller's promise.
        unsafe { exchange::<READ, TILES>(self.gpu, head, states, place, s) }
    }
}

/// Reads 16 rows of `8 * TILES` columns of a v head's S, or writes them.
///
/// # Safety
/// The states are there, and the room is the warp's own; all lanes come together.
#[inline(always)]
pub(super) unsafe fn exchange<const READ: bool, const TILES: usize>(
    gpu: &impl TensorCore,
    head: u32,
    states: &States,
    place: Place,
    s: &mut [Tile],
) {
    let lane = gpu.lane();
    const { assert!(TILES.is_multiple_of(4)) };
    let row_bytes = state_row(8 * TILES as u32);
    let own = place.room + lane / 4 * row_bytes + lane % 4 * 8;
    // SAFETY: the caller's promise.
    unsafe {
        if !READ {
            each::<TILES>(|tile, r| {
                let at = own + r as u32 * 8 * row_bytes + tile as u32 * 32;
                let two = [0, 1].map(|c| u64::from(s[tile][2 * r + c].to_bits()));
                gpu.store_shared8(at, two[0] | two[1] << 32);
            });
            gpu.sync_warp();
        }
        let [of_head, of_row, of_column] = states.strides;
        let element = u64::from(size(states.dtype));
        let at = states.at
            + u64::from(head) * of_head
            + u64::from(place.row) * of_row
            + u64::from(place.column) * of_column;
        // Four columns of a row, or rows of a column, whichever are dense.
        let columns = of_column == element;
        let (step, shared_step) = if columns { (of_column, 4) } else { (of_row, row_bytes) };
        let place_of = |i: u32| {
            let (row, column) = if columns {
                (i / (2 * TILES as u32), i % (2 * TILES as u32) * 4)
            } else {
                (i % 4 * 4, i / 4)
            };
            let at = at + u64::from(row) * of_row + u64::from(column) * of_column;
            (at, place.room + row * row_bytes + column * 4)
        };
        let mut i = lane;
        if READ && states.dtype == F32 && states.wide {
            // Many are on their way at once, as there are registers before there is S: a sequence of few tokens would
            // wait longer for one after the other than it takes.
            let pieces = if TILES.is_multiple_of(8) { 8 } else { 4 };
            while i < WARP_ROWS * 2 * TILES as u32 {
                let mut fours = [[0; 4]; 8];
                let mut n = 0;
                while n < pieces {
                    let (at, _) = place_of(i + n as u32 * 32);
                    Bytes16(fours[n]) = gpu.load16(at);
                    n += 1;
                }
                let mut n = 0;
                while n < pieces {
                    let (_, shared) = place_of(i + n as u32 * 32);
                    let mut m = 0;
                    while m < 4 {
                        gpu.store_shared4(shared + m as u32 * shared_step, fours[n][m]);
                        m += 1;
                    }
                    n += 1;
                }
                i += pieces as u32 * 32;
                gpu.sync_warp();
            }
        }
        while i < WARP_ROWS * 2 * TILES as u32 {
            let (at, shared) = place_of(i);
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
                s[tile][2 * r] = f32::from_bits(two as u32);
                s[tile][2 * r + 1] = f32::from_bits((two >> 32) as u32);
            });
        }
    }
}

/// Reads 16 rows of f32, dense, of keys of `dk` numbers, from `at` on, each lane what it has of them.
///
/// # Safety
/// They are there.
#[inline(always)]
pub(super) unsafe fn read_dense(gpu: &impl TensorCore, at: u64, dk: u32, tiles: &mut [Tile]) {
    let mut tile = 0;
    while tile < tiles.len() {
        let mut r = 0;
        while r < 2 {
            // SAFETY: the caller's promise.
            let two = unsafe { gpu.load8(in_dense(gpu, at, dk, tile, r)) };
            tiles[tile][2 * r] = f32::from_bits(two as u32);
            tiles[tile][2 * r + 1] = f32::from_bits((two >> 32) as u32);
            r += 1;
        }
        tile += 1;
    }
}

/// Writes them.
///
/// # Safety
/// As [`read_dense`].
#[inline(always)]
pub(super) unsafe fn write_dense(gpu: &impl TensorCore, at: u64, dk: u32, tiles: &[Tile]) {
    let mut tile = 0;
    while tile < tiles.len() {
        let mut r = 0;
        while r < 2 {
            let two = [0, 1].map(|c| u64::from(tiles[tile][2 * r + c].to_bits()));
            // SAFETY: the caller's promise.
            unsafe { gpu.store8(in_dense(gpu, at, dk, tile, r), two[0] | two[1] << 32) };
            r += 1;
        }
        tile += 1;
    }
}

/// Where the lane's two numbers of a tile are, of its first row or of its second.
#[inline(always)]
fn in_dense(gpu: &impl TensorCore, at: u64, dk: u32, tile: usize, r: usize) -> u64 {
    let lane = gpu.lane();
    at + u64::from(lane / 4 * dk * 4 + lane % 4 * 8) + u64::from(r as u32 * 8 * dk * 4 + tile as u32 * 32)
}

/// Every tile, and of it both of the lane's rows.
#[inline(always)]
fn each<const TILES: usize>(mut f: impl FnMut(usize, usize)) {
    let mut tile = 0;
    while tile < TILES {
        f(tile, 0);
        f(tile, 1);
        tile += 1;
    }
}
