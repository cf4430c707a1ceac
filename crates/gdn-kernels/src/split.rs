//! The split of the packed projections and its inverse, the merge: one kernel, read from either end.
//!
//! A packed row is a sequence of words, and each word has one place in the unpacked tensors that depends on
//! its column alone. A thread takes one column, finds that place once, and moves [`Shape::rows`] words down
//! the rows, all loaded before the first is stored. Blocks start in order, so they are numbered along the row
//! first: what is in flight at a time is one stretch of memory on every side, which is what DRAM pages like.
//! b and a move in the same launch, in the blocks after those.
//!
//! Block numbers have 31 bits. Where that is too few the rows are cut into slices of [`Args::slice_rows`],
//! one for each y of the grid.

use core::mem::MaybeUninit;

use crate::gpu::{Bytes16, Gpu, Word};

/// Where the rows of a tensor lie: the address of the first, and bytes from one to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Tensor {
    /// Address of row 0.
    pub address: u64,
    /// Bytes from a row to the next.
    pub stride: u64,
}

/// The words of one kind (q, k, v or z; b or a) within a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Part {
    /// First word of the kind within a unit; `u32::MAX` where there is no such kind.
    pub first: u32,
    /// From a unit to the next on the unpacked side, in words.
    pub step: u32,
    /// What to add, wrapping, to `unit * step + word` to have the word of the unpacked tensor's row.
    pub shift: u32,
}

impl Part {
    /// No words.
    pub const NONE: Self = Self { first: u32::MAX, step: 0, shift: 0 };
}

/// Division by a number that is known beforehand, for dividends below 2^31: a multiplication and a shift.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Divisor {
    divisor: u32,
    magic: u32,
    shift: u32,
}

impl Divisor {
    /// `None` for zero and from 2^31 on.
    pub const fn new(divisor: u32) -> Option<Self> {
        if divisor == 0 || divisor >= 1 << 31 {
            return None;
        }
        let shift = u32::BITS - (divisor - 1).leading_zeros();
        // 2^(shift-1) < divisor <= 2^shift, so this is from 2^31 to 2^32 - 1.
        let magic = (1u64 << (31 + shift)).div_ceil(divisor as u64);
        Some(Self { divisor, magic: magic as u32, shift })
    }

    /// The number that it divides by.
    #[inline(always)]
    pub const fn get(&self) -> u32 {
        self.divisor
    }

    /// The same, of which the compiler does not know that it is: `unforeseen` is [`Gpu::unforeseen`].
    #[inline(always)]
    pub(crate) fn unforeseen(self, unforeseen: impl FnOnce(u64) -> u64) -> Self {
        Self { shift: unforeseen(u64::from(self.shift)) as u32, ..self }
    }

    /// Quotient and remainder.
    #[inline(always)]
    pub const fn divide(&self, dividend: u32) -> (u32, u32) {
        let quotient = ((dividend as u64 * self.magic as u64) >> 31) as u32 >> self.shift;
        (quotient, dividend.wrapping_sub(quotient.wrapping_mul(self.divisor)))
    }
}

/// One projection: its packed tensor, the two it comes apart into, and which word goes where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Projection<const PARTS: usize> {
    /// `mixed_qkvz` or `mixed_ba`.
    pub packed: Tensor,
    /// `mixed_qkv` and `z`, or `b` and `a`.
    pub unpacked: [Tensor; 2],
    /// Words of a packed row, below 2^31.
    pub columns: u32,
    /// By the words of a unit: a key head, or the whole row where packing is contiguous.
    pub unit: Divisor,
    /// The kinds, in the order of the unit.
    pub parts: [Part; PARTS],
    /// First word of a unit that belongs to the second unpacked tensor.
    pub second: u32,
}

/// What the host hands over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Args {
    /// N.
    pub num_rows: u64,
    /// Rows of a slice, a multiple of those of a thread. All, but where there are too many blocks.
    pub slice_rows: u64,
    /// Blocks of a slice that move `qkvz`, a multiple of `tiles`; those after them move `ba`.
    pub blocks: u32,
    /// By the blocks side by side that move one row of `qkvz`.
    pub tiles: Divisor,
    /// Bytes of a word of `qkvz`.
    pub qkvz_word: u32,
    /// `mixed_qkvz`, in words of `qkvz_word` bytes.
    pub qkvz: Projection<4>,
    /// `mixed_ba`, in words of `ba_word` bytes.
    pub ba: Projection<2>,
    /// By the columns of `ba`.
    pub ba_columns: Divisor,
    /// Bytes of a word of `ba`.
    pub ba_word: u32,
}

/// A grid, and the number of rows that the kernel for it moves with a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks of a slice, and slices: x and y.
    pub blocks: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Rows a thread moves, the const parameter of [`run`].
    pub rows: u32,
}

impl<const PARTS: usize> Projection<PARTS> {
    /// The ways of the words in `column`, from row `row` on; `word` is the bytes of one.
    #[inline(always)]
    fn way<const MERGE: bool>(&self, column: u32, word: u32, row: u64) -> Way {
        let (unit, within) = self.unit.divide(column);
        let mut part = self.parts[0];
        let mut k = 1;
        while k < PARTS {
            if within >= self.parts[k].first {
                part = self.parts[k];
            }
            k += 1;
        }
        let unpacked = if within >= self.second { self.unpacked[1] } else { self.unpacked[0] };
        let at = unit.wrapping_mul(part.step).wrapping_add(within).wrapping_add(part.shift);
        let from_row = |tensor: Tensor, column: u32| {
            let start = tensor.address.wrapping_add(u64::from(column) * u64::from(word));
            Tensor { address: start.wrapping_add(row.wrapping_mul(tensor.stride)), ..tensor }
        };
        let (packed, unpacked) = (from_row(self.packed, column), from_row(unpacked, at));
        if MERGE { Way { from: unpacked, to: packed } } else { Way { from: packed, to: unpacked } }
    }
}

/// Where a column's words come from and go to, row by row.
struct Way {
    from: Tensor,
    to: Tensor,
}

impl Way {
    /// Moves `count` words, at most `ROWS`: all are loaded before the first is stored.
    ///
    /// # Safety
    /// So many words are readable and writable at the two ends, at multiples of `W::BYTES`.
    #[inline(always)]
    unsafe fn go<W: Word, const ROWS: usize>(&self, gpu: &impl Gpu, count: u32) {
        let mut words = [const { MaybeUninit::<W>::uninit() }; ROWS];
        let mut i = 0;
        while i < ROWS {
            if (i as u32) < count {
                let at = self.from.address.wrapping_add(i as u64 * self.from.stride);
                // SAFETY: word `i` of those the caller vouches for.
                words[i] = MaybeUninit::new(unsafe { W::load(gpu, at) });
            }
            i += 1;
        }
        let mut i = 0;
        while i < ROWS {
            if (i as u32) < count {
                let at = self.to.address.wrapping_add(i as u64 * self.to.stride);
                // SAFETY: as above, and the word was loaded above under the same condition.
                unsafe { words[i].assume_init().store(gpu, at) }
            }
            i += 1;
        }
    }

    /// The same with words of `word` bytes: 16, 8, 4, 2 or 1.
    ///
    /// # Safety
    /// As [`Way::go`].
    #[inline(always)]
    unsafe fn go_by<const ROWS: usize>(&self, gpu: &impl Gpu, count: u32, word: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            match word {
                16 => self.go::<Bytes16, ROWS>(gpu, count),
                8 => self.go::<u64, ROWS>(gpu, count),
                4 => self.go::<u32, ROWS>(gpu, count),
                2 => self.go::<u16, ROWS>(gpu, count),
                _ => self.go::<u8, ROWS>(gpu, count),
            }
        }
    }
}

/// The kernel: splits, or merges, `ROWS` rows with a thread. `WIDE` says that the words of `qkvz` have 16
/// bytes; else they have `args.qkvz_word`.
///
/// # Safety
/// The grid is a [`Shape`] made for these arguments, with `rows == ROWS`. Every row of every tensor is
/// readable, those of the written side are writable, and nobody else writes them meanwhile. All addresses,
/// and all strides where there are two rows or more, are multiples of the word of their projection.
#[inline(always)]
pub unsafe fn run<const WIDE: bool, const MERGE: bool, const ROWS: usize>(gpu: &impl Gpu, args: &Args) {
    gpu.let_next_start();
    let [block, slice, _] = gpu.block();
    let start = u64::from(slice) * args.slice_rows;
    let slice_rows = (args.num_rows - start).min(args.slice_rows);
    if block < args.blocks {
        let (down, tile) = args.tiles.divide(block);
        let down = u64::from(down) * ROWS as u64;
        let column = tile * gpu.threads() + gpu.thread();
        // The last slice may be the shorter one.
        if down < slice_rows && column < args.qkvz.columns {
            let left = slice_rows - down;
            let count = if left < ROWS as u64 { left as u32 } else { ROWS as u32 };
            let word = if WIDE { 16 } else { args.qkvz_word };
            let way = args.qkvz.way::<MERGE>(column, word, start + down);
            gpu.wait_for_previous();
            // SAFETY: the column is one of the row's, and `count` rows are left.
            unsafe {
                if WIDE {
                    way.go::<Bytes16, ROWS>(gpu, count);
                } else {
                    way.go_by::<ROWS>(gpu, count, word);
                }
            }
        }
        return;
    }
    // b and a, word by word along the rows.
    gpu.wait_for_previous();
    let words = slice_rows as u32 * args.ba.columns;
    let mut i = (block - args.blocks) * ROWS as u32 * gpu.threads() + gpu.thread();
    let mut turn = 0;
    while turn < ROWS && i < words {
        let (down, column) = args.ba_columns.divide(i);
        let way = args.ba.way::<MERGE>(column, args.ba_word, start + u64::from(down));
        // SAFETY: the column is one of the row's, and the row one of the slice's.
        unsafe { way.go_by::<1>(gpu, 1, args.ba_word) }
        i += gpu.threads();
        turn += 1;
    }
}
