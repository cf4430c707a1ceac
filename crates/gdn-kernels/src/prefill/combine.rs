//! From segment to segment of a sequence: the state that each begins with, `S M + Z` of the one before. A
//! block for each sequence that is cut, v head and 16 rows of S.
//!
//! A warp has 16 columns. Numbers of S and of M are split in two f16 each, what is rounded and what was lost
//! by it, which have 22 bits together, and brought into range by powers of two: of S one for 16 columns of a
//! row, of M ([`transition`](super::transition) does that) one for 16 rows. So products over 16 columns of S
//! are added up in f32 outside of the tensor cores. What the next segment needs is asked for a segment ahead.

use gdn_math::Lanes;

use super::{
    args::{Args, COMBINE_COLUMNS, COMBINE_HALF, COMBINE_ROWS},
    element::power,
    segment::{Part, Walk},
    states::{read_dense, write_dense},
    tiles::{Tile, split},
};
use crate::gpu::{Bytes16, F16, TensorCore};

/// Columns of a warp, and rows of M that are multiplied at a time.
const COLUMNS: u32 = 16;
const SIXTEENS: usize = (COMBINE_COLUMNS / COLUMNS) as usize;
/// Where rows of S are handed over: of each 16 columns two left sides, then what brings rows back.
const LEFT: u32 = 512;
const SCALES: u32 = SIXTEENS as u32 * 2 * LEFT;
const ROW_SCALES: u32 = SIXTEENS as u32 * 4;

/// The warp's columns of the block's rows.
type Rows = [Tile; 2];

/// What a segment that others follow makes: of M, for each 16 rows, the warp's columns as two right sides,
/// and what brings these back; and Z.
#[derive(Clone, Copy)]
struct Made {
    m: [[[u32; 4]; 2]; SIXTEENS],
    scales: [[u32; 4]; 2],
    z: Rows,
}

/// The kernel.
///
/// # Safety
/// The arguments describe tensors that are there, and the grid and shared memory were made for them.
#[inline(always)]
pub unsafe fn run(gpu: &impl TensorCore, args: &Args) {
    let (rest, slice) = args.segments.row_blocks.divide(gpu.block()[0]);
    let (number, head) = args.num_v_heads.divide(rest);
    // SAFETY: the caller's promises.
    unsafe {
        let part = Part::of_sequence(gpu, args, number);
        gpu.wait_for_previous();
        gpu.let_next_start();
        if part.is_there {
            Block { gpu, args, head, first: slice * COMBINE_ROWS }.run(part);
        }
    }
}

struct Block<'a, G> {
    gpu: &'a G,
    args: &'a Args,
    head: u32,
    first: u32,
}

impl<G: TensorCore> Block<'_, G> {
    #[inline(always)]
    unsafe fn run(&self, part: Part) {
        let Self { gpu, args, .. } = *self;
        let mut walk = part.walk(args);
        // SAFETY: as `run`.
        unsafe {
            // The state at the start of the segment.
            let mut rows = Rows::default();
            if walk.is_first() {
                // It began with what the sequence begins with.
                if walk.is_made(args) {
                    rows = self.read(walk.made(args));
                    walk.go_on();
                }
            } else {
                rows = self.read(args.segments.starts[0]);
            }
            let mut next = self.ask(&walk);
            let mut half = 0;
            while walk.is_made(args) {
                let now = next;
                let to = walk.made(args);
                walk.go_on();
                self.hand_over(half, &rows);
                next = self.ask(&walk);
                gpu.barrier();
                if self.has_columns() {
                    rows = self.product(half, &now);
                    self.write(to, &rows);
                }
                // Nobody writes there before all have come to the barrier once more.
                half = COMBINE_HALF - half;
            }
            // For the next window, in which this segment ends.
            if walk.is_open(args) {
                self.write(args.segments.starts[1], &rows);
            }
        }
    }

    /// The warp's first column.
    #[inline(always)]
    fn column(&self) -> u32 {
        self.gpu.thread() / 32 * COLUMNS
    }

    /// Whether it has some.
    #[inline(always)]
    fn has_columns(&self) -> bool {
        self.column() < self.args.dk
    }

    /// Where the warp's columns of the block's rows begin, of states that are dense, from `at` on.
    #[inline(always)]
    fn place(&self, at: u64) -> u64 {
        let row = u64::from(self.head * self.args.dv + self.first) * u64::from(self.args.dk * 4);
        at + row + u64::from(self.column() * 4)
    }

    /// The thread's part of the block's rows.
    #[inline(always)]
    unsafe fn read(&self, at: u64) -> Rows {
        let mut rows = Rows::default();
        if self.has_columns() {
            // SAFETY: as `run`.
            unsafe { read_dense(self.gpu, self.place(at), self.args.dk, &mut rows) };
        }
        rows
    }

    #[inline(always)]
    unsafe fn write(&self, at: u64, rows: &Rows) {
        if self.has_columns() {
            // SAFETY: as `run`.
            unsafe { write_dense(self.gpu, self.place(at), self.args.dk, rows) };
        }
    }

    /// What a segment makes, where it ends in the window.
    #[inline(always)]
    unsafe fn ask(&self, walk: &Walk) -> Made {
        let Self { gpu, args, head, .. } = *self;
        let mut made = Made { m: [[[0; 4]; 2]; SIXTEENS], scales: [[0; 4]; 2], z: Rows::default() };
        if walk.is_made(args) && self.has_columns() {
            let from = walk.made(args);
            let sixteens = args.dk / COLUMNS;
            let at = args.segments.rows_of_m(from, head, args)
                + u64::from(gpu.thread() / 32 * 2 * LEFT + gpu.lane() * 16);
            let scales = args.segments.scales_of_m(from, head, args.num_v_heads.get());
            // SAFETY: as `run`.
            unsafe {
                let mut sixteen = 0;
                while sixteen < SIXTEENS {
                    if (sixteen as u32) < sixteens {
                        let at = at + u64::from(sixteen as u32 * sixteens * 2 * LEFT);
                        Bytes16(made.m[sixteen][0]) = gpu.load16(at);
                        Bytes16(made.m[sixteen][1]) = gpu.load16(at + u64::from(LEFT));
                    }
                    sixteen += 1;
                }
                Bytes16(made.scales[0]) = gpu.load16(scales);
                let mut sixteen = 4;
                while sixteen < SIXTEENS {
                    if (sixteen as u32) < sixteens {
                        made.scales[1][sixteen - 4] = gpu.load4(scales + sixteen as u64 * 4);
                    }
                    sixteen += 1;
                }
                made.z = self.read(from);
            }
        }
        made
    }

    /// Puts the warp's columns where all multiply them; zeros, where it has none.
    #[inline(always)]
    unsafe fn hand_over(&self, half: u32, rows: &Rows) {
        let gpu = self.gpu;
        let (warp, lane) = (gpu.thread() / 32, gpu.lane());
        let (mut kept, mut lost) = ([0; 4], [0; 4]);
        let mut r = 0;
        while r < 2 {
            let [[a, b], [c, d]] = [0, 1].map(|tile: usize| [rows[tile][2 * r], rows[tile][2 * r + 1]]);
            let mut largest = a.abs().max(b.abs()).max(c.abs().max(d.abs()));
            let mut mask = 2;
            while mask > 0 {
                largest = largest.max(f32::from_bits(gpu.shuffle_xor(largest.to_bits(), mask)));
                mask /= 2;
            }
            let (up, down) = power(largest);
            [kept[r], lost[r]] = split(gpu, [a * up, b * up]);
            [kept[r + 2], lost[r + 2]] = split(gpu, [c * up, d * up]);
            if lane.is_multiple_of(4) {
                let at = half + SCALES + (lane / 4 + r as u32 * 8) * ROW_SCALES + warp * 4;
                // SAFETY: as `run`.
                unsafe { gpu.store_shared4(at, down.to_bits()) };
            }
            r += 1;
        }
        let at = half + warp * 2 * LEFT + lane * 16;
        // SAFETY: as `run`.
        unsafe {
            gpu.store_shared16(at, Bytes16(kept));
            gpu.store_shared16(at + LEFT, Bytes16(lost));
        }
    }

    /// The rows that were handed over, times M, and Z.
    #[inline(always)]
    unsafe fn product(&self, half: u32, made: &Made) -> Rows {
        let gpu = self.gpu;
        let scales = half + SCALES + gpu.lane() / 4 * ROW_SCALES;
        let mut rows = made.z;
        let mut downs = [[0; 4]; 2];
        // Of shorter keys the last are zeros: without branches one does not wait for the other.
        let mut sixteen = 0;
        while sixteen < SIXTEENS {
            let left = half + sixteen as u32 * 2 * LEFT + gpu.lane() * 16;
            // SAFETY: as `run`; a barrier is past.
            let (Bytes16(kept), Bytes16(lost)) =
                unsafe { (gpu.load_shared16(left), gpu.load_shared16(left + LEFT)) };
            if sixteen.is_multiple_of(4) {
                let mut r = 0;
                while r < 2 {
                    let at = scales + r as u32 * 8 * ROW_SCALES + sixteen as u32 * 4;
                    // SAFETY: as above.
                    Bytes16(downs[r]) = unsafe { gpu.load_shared16(at) };
                    r += 1;
                }
            }
            let of_m = f32::from_bits(made.scales[sixteen / 4][sixteen % 4]);
            let down = [0, 1].map(|r: usize| f32::from_bits(downs[r][sixteen % 4]) * of_m);
            let [of_kept, of_lost] = made.m[sixteen];
            let mut tile = 0;
            while tile < 2 {
                let two = |words: [u32; 4]| [words[2 * tile], words[2 * tile + 1]];
                let mut found = gpu.mma::<F16>(kept, two(of_lost), [0.0; 4]);
                found = gpu.mma::<F16>(lost, two(of_kept), found);
                found = gpu.mma::<F16>(kept, two(of_kept), found);
                let mut i = 0;
                while i < 4 {
                    rows[tile][i] = Lanes::mul_add(found[i], down[i / 2], rows[tile][i]);
                    i += 1;
                }
                tile += 1;
            }
            sixteen += 1;
        }
        rows
    }
}
