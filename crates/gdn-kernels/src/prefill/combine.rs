//! From segment to segment of a sequence: the state that each begins with, `S M + Z` of the one before. A
//! block for each sequence that is cut, v head and 8 rows of S; sums are f32.

use gdn_math::Lanes;

use super::{
    args::{Args, COMBINE_COLUMNS, COMBINE_ROWS, COMBINE_THREADS},
    segment::{Part, Walk},
};
use crate::gpu::{Bytes16, Gpu};

/// Threads share the numbers of a column of M.
const SHARES: u32 = COMBINE_THREADS / COMBINE_COLUMNS;
/// Of which each has so many, at most.
const MOST: usize = (COMBINE_COLUMNS / SHARES) as usize;
const ROWS: usize = COMBINE_ROWS as usize;
/// Bytes of a column of the block's rows.
const COLUMN: u32 = COMBINE_ROWS * 4;
/// Behind the rows: of all shares but the first what they add.
const ADDED: u32 = COMBINE_COLUMNS * COLUMN;

/// The kernel.
///
/// # Safety
/// The arguments describe tensors that are there, and the grid and shared memory were made for them.
#[inline(always)]
pub unsafe fn run(gpu: &impl Gpu, args: &Args) {
    gpu.wait_for_previous();
    let (rest, slice) = args.segments.eighths.divide(gpu.block()[0]);
    let (number, head) = args.num_v_heads.divide(rest);
    // SAFETY: the caller's promises.
    unsafe {
        let part = Part::of_sequence(gpu, args, number);
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

impl<G: Gpu> Block<'_, G> {
    #[inline(always)]
    unsafe fn run(&self, part: Part) {
        let Self { gpu, args, .. } = *self;
        let share = gpu.thread() / COMBINE_COLUMNS;
        let mut walk = part.walk(args);
        // SAFETY: as `run`.
        unsafe {
            // The state at the start of the segment, and how much of M was asked for ahead.
            let mut rows = [0.0; ROWS];
            if walk.is_first() {
                // It began with what the sequence begins with.
                if walk.is_made(args) {
                    rows = self.read(walk.made(args));
                    walk.go_on();
                }
            } else {
                rows = self.read(args.segments.starts[0]);
            }
            let mut of_m = self.ask(&walk);
            while walk.is_made(args) {
                let now = of_m;
                let made = walk.made(args);
                walk.go_on();
                of_m = self.ask(&walk);
                self.hand_over(0, &rows, share == 0);
                if share == 0 {
                    // Z is asked for here, not where it is added to.
                    rows = self.read(made);
                }
                gpu.barrier();
                let sums = self.products(&now);
                self.hand_over(share * ADDED, &sums, share > 0);
                gpu.barrier();
                if share == 0 {
                    self.add(&sums, &mut rows);
                    self.write(made, &rows);
                }
            }
            // For the next window, in which this segment ends.
            if walk.is_open(args) && share == 0 {
                self.write(args.segments.starts[1], &rows);
            }
        }
    }

    /// Whether the thread has a column.
    #[inline(always)]
    fn column(&self) -> Option<u32> {
        let column = self.gpu.thread() % COMBINE_COLUMNS;
        if column < self.args.dk { Some(column) } else { None }
    }

    /// Where the thread's column of the block's first row is.
    #[inline(always)]
    fn place(&self, at: u64, column: u32) -> u64 {
        let row = self.head * self.args.dv + self.first;
        at + u64::from(row) * u64::from(self.args.dk * 4) + u64::from(column * 4)
    }

    /// The thread's column of the block's rows.
    #[inline(always)]
    unsafe fn read(&self, at: u64) -> [f32; ROWS] {
        let mut rows = [0.0; ROWS];
        if let Some(column) = self.column() {
            let at = self.place(at, column);
            let mut r = 0;
            while r < ROWS {
                // SAFETY: as `run`.
                rows[r] =
                    f32::from_bits(unsafe { self.gpu.load4(at + u64::from(r as u32 * self.args.dk * 4)) });
                r += 1;
            }
        }
        rows
    }

    #[inline(always)]
    unsafe fn write(&self, at: u64, rows: &[f32; ROWS]) {
        if let Some(column) = self.column() {
            let at = self.place(at, column);
            let mut r = 0;
            while r < ROWS {
                // SAFETY: as `run`.
                unsafe { self.gpu.store4(at + u64::from(r as u32 * self.args.dk * 4), rows[r].to_bits()) };
                r += 1;
            }
        }
    }

    /// The thread's share of its column of M of a segment, where it has one that ends in the window.
    #[inline(always)]
    unsafe fn ask(&self, walk: &Walk) -> [f32; MOST] {
        let Self { gpu, args, head, .. } = *self;
        let mut numbers = [0.0; MOST];
        if let (Some(column), true) = (self.column(), walk.is_made(args)) {
            let share = args.dk / SHARES;
            let row = args.num_v_heads.get() * args.dv
                + head * args.segments.rows_behind
                + gpu.thread() / COMBINE_COLUMNS * share;
            let at = walk.made(args) + u64::from(row) * u64::from(args.dk * 4) + u64::from(column * 4);
            let mut i = 0;
            while i < MOST {
                if (i as u32) < share {
                    // SAFETY: as `run`.
                    numbers[i] = f32::from_bits(unsafe { gpu.load4(at + u64::from(i as u32 * args.dk * 4)) });
                }
                i += 1;
            }
        }
        numbers
    }

    /// Puts a column of the block's rows into shared memory.
    #[inline(always)]
    unsafe fn hand_over(&self, at: u32, rows: &[f32; ROWS], is_wanted: bool) {
        if let (Some(column), true) = (self.column(), is_wanted) {
            let mut four = 0;
            while four < ROWS / 4 {
                let words = [0, 1, 2, 3].map(|i| rows[4 * four + i].to_bits());
                // SAFETY: as `run`.
                unsafe { self.gpu.store_shared16(at + column * COLUMN + four as u32 * 16, Bytes16(words)) };
                four += 1;
            }
        }
    }

    /// What the thread's share of M adds to its column of the rows.
    #[inline(always)]
    unsafe fn products(&self, of_m: &[f32; MOST]) -> [f32; ROWS] {
        let Self { gpu, args, .. } = *self;
        let share = args.dk / SHARES;
        let first = gpu.thread() / COMBINE_COLUMNS * share;
        let mut sums = [0.0; ROWS];
        let mut i = 0;
        while i < MOST {
            if (i as u32) < share {
                let mut four = 0;
                while four < ROWS / 4 {
                    let at = (first + i as u32) * COLUMN + four as u32 * 16;
                    // SAFETY: as `run`; a barrier is past.
                    let Bytes16(words) = unsafe { gpu.load_shared16(at) };
                    let mut r = 0;
                    while r < 4 {
                        let sum = &mut sums[4 * four + r];
                        *sum = Lanes::mul_add(f32::from_bits(words[r]), of_m[i], *sum);
                        r += 1;
                    }
                    four += 1;
                }
            }
            i += 1;
        }
        sums
    }

    /// Adds all shares' sums to Z.
    #[inline(always)]
    unsafe fn add(&self, sums: &[f32; ROWS], z: &mut [f32; ROWS]) {
        let mut r = 0;
        while r < ROWS {
            z[r] += sums[r];
            r += 1;
        }
        let Some(column) = self.column() else { return };
        let mut share = 1;
        while share < SHARES {
            let mut four = 0;
            while four < ROWS / 4 {
                let at = share * ADDED + column * COLUMN + four as u32 * 16;
                // SAFETY: as `run`; a barrier is past.
                let Bytes16(words) = unsafe { self.gpu.load_shared16(at) };
                let mut r = 0;
                while r < 4 {
                    z[4 * four + r] += f32::from_bits(words[r]);
                    r += 1;
                }
                four += 1;
            }
            share += 1;
        }
    }
}
