//! Rows of a bf16 state as the tensor cores take them: a warp multiplies 16 rows by key and query at a time.
//!
//! A key's or query's f32 is the sum of three bf16, exactly, and products of bf16 are exact in the tensor cores' f32 sums. So
//! the six parts, side by side as columns of one matrix, give what f32 would, with no shuffle for a sum over a row.

use core::marker::PhantomData;

use gdn_math::{Lanes, element::f32_of_bf16};

use super::{
    args::{Args, part_line},
    element::{far, shared},
    rows::{Held, Machine, Place, STAGES, Token, output_and_added},
};
use crate::gpu::{Bf16, Bytes16, SharedWord};

/// Lanes that hold a row.
const LANES: u32 = 4;
/// Rows of a lane in a piece. They are so many apart.
const ROWS: usize = 2;
const APART: u32 = 8;

/// The three bf16 whose sum a number is.
#[inline(always)]
pub(super) fn parts(gpu: &impl Machine, number: f32) -> [u16; 3] {
    let high = gpu.bf16_pair(number, 0.0) as u16;
    let rest = number - f32_of_bf16(high);
    let middle = gpu.bf16_pair(rest, 0.0) as u16;
    let low = gpu.bf16_pair(rest - f32_of_bf16(middle), 0.0) as u16;
    [high, middle, low]
}

/// Dense rows of `32 * CHUNKS` columns. Lane `4 * g + t` holds, of rows g and g + 8 of a piece, columns `32 * c + 8 * t` to
/// `32 * c + 8 * t + 7`: 16 bytes, which are two operands of a product, as the order of columns does not matter there.
pub struct Fragments<const CHUNKS: usize, const KIND: u32> {
    len: u32,
    /// The lane's first row of the first piece, at its first column, and bytes to the next row.
    from: u64,
    of_row: u64,
    /// The same from where a token's state goes.
    to: u64,
    /// Where the lane's part of a piece lands.
    landing: u32,
    s: [[Bytes16; CHUNKS]; ROWS],
    element: PhantomData<Bf16>,
}

impl<const CHUNKS: usize, const KIND: u32> Fragments<CHUNKS, KIND> {
    const STAGE: u32 = (ROWS * CHUNKS) as u32 * 512;

    /// The lane's `n`th row of a piece, counted from the warp's first.
    #[inline(always)]
    fn row(gpu: &impl Machine, step: u32, n: usize) -> u32 {
        step * Self::PIECE + n as u32 * APART + gpu.lane() / LANES
    }

    /// Whether the lane's `n`th row of a piece is there.
    #[inline(always)]
    fn has(&self, gpu: &impl Machine, step: u32, n: usize) -> bool {
        Self::PLAIN || Self::row(gpu, step, n) < self.len
    }

    /// Whether the lane's chunk `c` is there: rows are whole multiples of 16 bytes.
    #[inline(always)]
    fn has_chunk(gpu: &impl Machine, args: &Args, c: usize) -> bool {
        Self::PLAIN || c as u32 * 32 + gpu.lane() % LANES * 8 < args.dk
    }

    /// From the lane's first row of the first piece to its `n`th of this one.
    #[inline(always)]
    fn distance(step: u32, n: usize) -> u64 {
        u64::from(step * Self::PIECE + n as u32 * APART)
    }

    /// Begins to copy a piece, if there is one more.
    ///
    /// # Safety
    /// As [`Held::begin`].
    #[inline(always)]
    unsafe fn send_for(&self, gpu: &impl Machine, args: &Args, step: u32) {
        let stage = self.landing + step % STAGES * Self::STAGE;
        let is_there = step * Self::PIECE < self.len;
        let mut n = 0;
        while is_there && n < ROWS {
            let from = self.from + far(true, Self::distance(step, n), self.of_row);
            let has_row = self.has(gpu, step, n);
            let mut c = 0;
            while c < CHUNKS {
                let there = has_row && Self::has_chunk(gpu, args, c);
                // SAFETY: the caller's promise; nothing is read of what is not there.
                unsafe { gpu.copy16(stage + (n * CHUNKS + c) as u32 * 512, from + c as u64 * 64, there) }
                c += 1;
            }
            n += 1;
        }
        gpu.commit_copies();
    }
}

impl<const CHUNKS: usize, const KIND: u32> Held for Fragments<CHUNKS, KIND> {
    const PIECE: u32 = ROWS as u32 * APART;
    const PADDED: u32 = CHUNKS as u32 * 32;
    const LANDING: u32 = STAGES * Self::STAGE;
    const KIND: u32 = KIND;
    const PARTS: bool = true;

    #[inline(always)]
    unsafe fn begin(gpu: &impl Machine, args: &Args, place: &Place) -> Self {
        let (row, column) = (place.start + gpu.lane() / LANES, gpu.lane() % LANES * 16);
        let [_, of_head, of_row, _] = args.state.strides;
        let [.., to_head, to_row, _] = args.kept.to.strides;
        let at = |of_head: u64, of_row: u64| {
            far(true, u64::from(place.head), of_head) + far(true, u64::from(row), of_row) + u64::from(column)
        };
        let rows = Self {
            len: place.len,
            from: place.state + at(of_head, of_row),
            of_row,
            to: at(to_head, to_row),
            landing: place.landing + gpu.lane() * 16,
            s: [[Bytes16([0; 4]); CHUNKS]; ROWS],
            element: PhantomData,
        };
        let mut step = 0;
        while step < STAGES {
            // SAFETY: the caller's promise.
            unsafe { rows.send_for(gpu, args, step) }
            step += 1;
        }
        rows
    }

    #[inline(always)]
    unsafe fn take(&mut self, gpu: &impl Machine, args: &Args, step: u32) {
        gpu.wait_copies::<{ STAGES - 1 }>();
        let stage = self.landing + step % STAGES * Self::STAGE;
        let mut c = 0;
        while c < CHUNKS {
            let mut n = 0;
            while n < ROWS {
                // SAFETY: what the lane sent for has landed.
                self.s[n][c] = unsafe { Bytes16::load_shared(gpu, stage + (n * CHUNKS + c) as u32 * 512) };
                n += 1;
            }
            c += 1;
        }
        // SAFETY: the caller's promise; the stage was read above.
        unsafe { self.send_for(gpu, args, step + STAGES) }
    }

    #[inline(always)]
    unsafe fn token(&mut self, gpu: &impl Machine, step: u32, token: &Token) -> f32 {
        let (g, t) = (gpu.lane() / LANES, gpu.lane() % LANES);
        // Columns 0 to 2 of the second matrix are the parts of the key, 4 to 6 those of the query, 3 and 7 zeros.
        let is_there = g % 4 < 3;
        let part = token.q + (g - g / 4).min(5) * part_line(Self::PADDED) + t * 16;
        // Two sums, of every other product.
        let mut sums = [[0.0; 4]; 2];
        let mut c = 0;
        while c < CHUNKS {
            // SAFETY: the caller's promise.
            let Bytes16(read) = unsafe { Bytes16::load_shared(gpu, part + c as u32 * 64) };
            let b = read.map(|word| if is_there { word } else { 0 });
            let (Bytes16(first), Bytes16(second)) = (self.s[0][c], self.s[1][c]);
            let mut i = 0;
            while i < 2 {
                let a = [first[2 * i], second[2 * i], first[2 * i + 1], second[2 * i + 1]];
                sums[i] = gpu.mma::<Bf16>(a, [b[2 * i], b[2 * i + 1]], sums[i]);
                i += 1;
            }
            c += 1;
        }
        let [x, y] = sums;
        let mut products = [[0.0; 2]; ROWS];
        let mut n = 0;
        while n < ROWS {
            let two = (x[2 * n] + y[2 * n]) + (x[2 * n + 1] + y[2 * n + 1]);
            let mine = two + f32::from_bits(gpu.shuffle_xor(two.to_bits(), 1));
            let other = f32::from_bits(gpu.shuffle_xor(mine.to_bits(), 2));
            products[n] = if t < 2 { [mine, other] } else { [other, mine] };
            n += 1;
        }
        let (mut outputs, mut added, mut squares) = ([0.0; ROWS], [0.0; ROWS], 0.0);
        let mut n = 0;
        while n < ROWS {
            let row = Self::row(gpu, step, n);
            // SAFETY: the caller's promise. Where there is no row, another one's value does no harm.
            let at = if Self::PLAIN { row } else { row.min(self.len - 1) } * 4;
            let v = unsafe { shared(gpu, token.v + at) };
            (outputs[n], added[n]) = output_and_added(token, products[n][0], products[n][1], v);
            squares += if self.has(gpu, step, n) { outputs[n] * outputs[n] } else { 0.0 };
            n += 1;
        }
        let (row, output) = if t == 0 {
            (Self::row(gpu, step, 0), outputs[0])
        } else {
            (Self::row(gpu, step, 1), outputs[1])
        };
        if t < 2 && (Self::PLAIN || row < self.len) {
            // SAFETY: the caller's promise.
            unsafe { gpu.store_shared4(token.o + row * 4, output.to_bits()) }
        }
        let mut mask = LANES;
        while mask < 32 {
            squares += f32::from_bits(gpu.shuffle_xor(squares.to_bits(), mask));
            mask *= 2;
        }
        let mut c = 0;
        while c < CHUNKS {
            let at = token.k + c as u32 * 128 + t * 32;
            // SAFETY: the caller's promise.
            let (Bytes16(low), Bytes16(high)) =
                unsafe { (Bytes16::load_shared(gpu, at), Bytes16::load_shared(gpu, at + 16)) };
            let k = [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]].map(f32::from_bits);
            let mut n = 0;
            while n < ROWS {
                let Bytes16(words) = &mut self.s[n][c];
                let mut i = 0;
                while i < 4 {
                    let first = f32::from_bits(words[i] << 16) * token.decay;
                    let second = f32::from_bits(words[i] & 0xffff_0000) * token.decay;
                    words[i] = gpu.bf16_pair(
                        Lanes::mul_add(k[2 * i], added[n], first),
                        Lanes::mul_add(k[2 * i + 1], added[n], second),
                    );
                    i += 1;
                }
                n += 1;
            }
            c += 1;
        }
        squares
    }

    #[inline(always)]
    unsafe fn keep(&mut self, gpu: &impl Machine, args: &Args, step: u32, to: u64, _: bool) {
        let [.., to_row, _] = args.kept.to.strides;
        let mut n = 0;
        while n < ROWS {
            let is_kept = to != 0 && self.has(gpu, step, n);
            let row = to + self.to + far(true, Self::distance(step, n), to_row);
            let mut c = 0;
            while c < CHUNKS {
                if is_kept && Self::has_chunk(gpu, args, c) {
                    // SAFETY: the caller's promise.
                    unsafe { gpu.store16(row + c as u64 * 64, self.s[n][c]) }
                }
                c += 1;
            }
            n += 1;
        }
    }
}
