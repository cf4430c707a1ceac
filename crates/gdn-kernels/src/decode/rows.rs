//! The rows of S that a warp computes: from memory to registers, through the tokens, and back.

use core::marker::PhantomData;

use gdn_math::{Lanes, layer as math};

use super::{
    args::Args,
    element::{Element, bits, number, shared, store},
};
use crate::gpu::{AsyncCopy, Bytes16, Hopper, SharedWord, Warp};

/// Pieces of rows that have room in shared memory, the one that is computed included.
const STAGES: u32 = 2;

/// The rows of a warp: `len` from row `start` of a v head on, piece by piece. `LANES` lanes hold a row, each `CHUNKS`
/// times `V` columns of it, and each of the warp's groups of so many lanes `ROWS` rows.
///
/// With `WIDE`, V columns are 16 bytes that lie dense in memory at a multiple of 16; a piece is then on its way to
/// shared memory while the one before it is computed, and no lane touches there what is another one's.
pub(super) struct Rows<
    E,
    const LANES: u32,
    const V: usize,
    const CHUNKS: usize,
    const ROWS: usize,
    const WIDE: bool,
> {
    len: u32,
    /// The lane's first row of the first piece, at its first column, and bytes to the next row and column.
    from: u64,
    of_row: u64,
    of_column: u64,
    /// The same from where a token's state goes.
    to: u64,
    /// Where the lane's part of a piece lands.
    landing: u32,
    s: [[[f32; V]; CHUNKS]; ROWS],
    element: PhantomData<E>,
}

/// What the warp's rows have in common at a token.
#[derive(Clone, Copy)]
pub(super) struct Token {
    pub(super) decay: f32,
    pub(super) beta: f32,
    /// What brings the query and the key to their lengths.
    pub(super) q_scale: f32,
    pub(super) k_scale: f32,
    /// Where the state after it goes: the slot's first element, 0 for nowhere.
    pub(super) to: u64,
    /// Lines of shared memory: the query, the key, the warp's values, and its outputs.
    pub(super) q: u32,
    pub(super) k: u32,
    pub(super) v: u32,
    pub(super) o: u32,
}

impl<E: Element, const LANES: u32, const V: usize, const CHUNKS: usize, const ROWS: usize, const WIDE: bool>
    Rows<E, LANES, V, CHUNKS, ROWS, WIDE>
{
    /// Rows of the warp side by side.
    const GROUPS: u32 = 32 / LANES;
    /// Rows of a piece.
    pub(super) const PIECE: u32 = Self::GROUPS * ROWS as u32;
    /// Numbers of a query or key, with the zeros behind it.
    pub(super) const PADDED: u32 = LANES * (V * CHUNKS) as u32;
    /// Bytes of shared memory in which a warp's pieces land.
    pub(super) const LANDING: u32 = if WIDE { STAGES * Self::STAGE } else { 0 };
    const STAGE: u32 = (ROWS * CHUNKS) as u32 * 512;

    /// Rows of v head `head`; `state` is the slot that they are read from. The first pieces are on their way.
    ///
    /// # Safety
    /// They are there, and `landing` is shared memory of the warp alone.
    #[inline(always)]
    pub(super) unsafe fn begin(
        gpu: &(impl Warp + AsyncCopy),
        args: &Args,
        state: u64,
        head: u32,
        start: u32,
        len: u32,
        landing: u32,
    ) -> Self {
        let (row, column) = (start + gpu.lane() / LANES, gpu.lane() % LANES * V as u32);
        let place = |[of_head, of_row, of_column]: [u64; 3]| {
            u64::from(head) * of_head + u64::from(row) * of_row + u64::from(column) * of_column
        };
        let [_, of_head, of_row, of_column] = args.state.strides;
        let [.., to_head, to_row, to_column] = args.kept.to.strides;
        let rows = Self {
            len,
            from: state + place([of_head, of_row, of_column]),
            of_row,
            of_column,
            to: place([to_head, to_row, to_column]),
            landing: landing + gpu.lane() * 16,
            s: [[[0.0; V]; CHUNKS]; ROWS],
            element: PhantomData,
        };
        let mut step = 0;
        while WIDE && step < STAGES {
            // SAFETY: the caller's promise.
            unsafe { rows.send_for(gpu, args, step) }
            step += 1;
        }
        rows
    }

    /// Whether the lane's `n`th row of a piece is there.
    #[inline(always)]
    fn has(&self, gpu: &impl Warp, step: u32, n: usize) -> bool {
        step * Self::PIECE + n as u32 * Self::GROUPS + gpu.lane() / LANES < self.len
    }

    /// From the lane's first row of the first piece to its `n`th of this one.
    #[inline(always)]
    fn distance(step: u32, n: usize) -> u64 {
        u64::from(step * Self::PIECE + n as u32 * Self::GROUPS)
    }

    /// Whether column `v` of the lane's chunk `c` is there.
    #[inline(always)]
    fn has_column(gpu: &impl Warp, args: &Args, c: usize, v: usize) -> bool {
        ((c as u32 * LANES + gpu.lane() % LANES) * V as u32 + v as u32) < args.dk
    }

    /// Begins to copy a piece, if there is one more.
    ///
    /// # Safety
    /// As [`Rows::begin`].
    #[inline(always)]
    unsafe fn send_for(&self, gpu: &(impl Warp + AsyncCopy), args: &Args, step: u32) {
        let stage = self.landing + step % STAGES * Self::STAGE;
        let is_there = step * Self::PIECE < self.len;
        let mut n = 0;
        while is_there && n < ROWS {
            let from = self.from + Self::distance(step, n) * self.of_row;
            let mut c = 0;
            while c < CHUNKS {
                let there = self.has(gpu, step, n) && Self::has_column(gpu, args, c, 0);
                // SAFETY: the caller's promise; nothing is read of what is not there.
                unsafe {
                    gpu.copy16(
                        stage + (n * CHUNKS + c) as u32 * 512,
                        from + u64::from(c as u32 * LANES * 16),
                        there,
                    );
                }
                c += 1;
            }
            n += 1;
        }
        gpu.commit_copies();
    }

    /// A piece, into registers.
    ///
    /// # Safety
    /// As [`Rows::begin`].
    #[inline(always)]
    unsafe fn take(&mut self, gpu: &(impl Warp + AsyncCopy), args: &Args, step: u32) {
        if WIDE {
            gpu.wait_copies::<{ STAGES - 1 }>();
        }
        let stage = self.landing + step % STAGES * Self::STAGE;
        let of_column = gpu.unforeseen(self.of_column);
        let mut n = 0;
        while n < ROWS {
            let mut c = 0;
            while c < CHUNKS {
                // SAFETY: what the lane sent for has landed; elsewhere the caller's promise.
                unsafe {
                    let bytes = if WIDE {
                        Bytes16::load_shared(gpu, stage + (n * CHUNKS + c) as u32 * 512)
                    } else {
                        Bytes16([0; 4])
                    };
                    let mut v = 0;
                    while v < V {
                        self.s[n][c][v] = if WIDE {
                            E::of(gpu, bytes, v)
                        } else if self.has(gpu, step, n) && Self::has_column(gpu, args, c, v) {
                            let at = self.from
                                + Self::distance(step, n) * self.of_row
                                + (c as u64 * u64::from(LANES) * V as u64 + v as u64) * of_column;
                            number(gpu, E::DTYPE, bits(gpu, E::DTYPE, at))
                        } else {
                            0.0
                        };
                        v += 1;
                    }
                }
                c += 1;
            }
            n += 1;
        }
        if WIDE {
            // SAFETY: the caller's promise; the stage was read above.
            unsafe { self.send_for(gpu, args, step + STAGES) }
        }
    }

    /// The lane's columns of a query or key.
    ///
    /// # Safety
    /// The line is in shared memory, for all to see.
    #[inline(always)]
    unsafe fn line(gpu: &impl Warp, line: u32) -> [[f32; V]; CHUNKS] {
        let mut numbers = [[0.0; V]; CHUNKS];
        let at = line + gpu.lane() % LANES * V as u32 * 4;
        let mut c = 0;
        while c < CHUNKS {
            let at = at + c as u32 * LANES * V as u32 * 4;
            let mut v = 0;
            while v < V {
                // SAFETY: the caller's promise.
                unsafe {
                    if V.is_multiple_of(4) {
                        let Bytes16(four) = Bytes16::load_shared(gpu, at + v as u32 * 4);
                        let mut i = 0;
                        while i < 4 {
                            numbers[c][(v + i) % V] = f32::from_bits(four[i]);
                            i += 1;
                        }
                        v += 4;
                    } else {
                        numbers[c][v] = shared(gpu, at + v as u32 * 4);
                        v += 1;
                    }
                }
            }
            c += 1;
        }
        numbers
    }

    /// All tokens on a piece.
    ///
    /// # Safety
    /// As [`Rows::begin`]; what is at the places in shared memory that `token` names is there for all to see.
    #[inline(always)]
    pub(super) unsafe fn compute<G: Hopper + Warp + AsyncCopy>(
        &mut self,
        gpu: &G,
        args: &Args,
        step: u32,
        mut token: impl FnMut(u32) -> Token,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            self.take(gpu, args, step);
            let mut t = 0;
            while t < args.tokens {
                let token = token(t);
                let place = |n: usize| (Self::distance(step, n) as u32 + gpu.lane() / LANES) * 4;
                let k = Self::line(gpu, token.k);
                let products = self.products(gpu, &k);
                let mut n = 0;
                while n < ROWS {
                    let r = token.decay * (token.k_scale * products[n]);
                    let v = shared(gpu, token.v + place(n));
                    let correction = math::correction(token.beta, v, r) * token.k_scale;
                    let s = &mut self.s[n];
                    each::<V, CHUNKS>(|c, x| {
                        s[c][x] = Lanes::mul_add(k[c][x], correction, s[c][x] * token.decay);
                    });
                    n += 1;
                }
                let products = self.products(gpu, &Self::line(gpu, token.q));
                let mut n = 0;
                while n < ROWS {
                    if gpu.lane().is_multiple_of(LANES) {
                        gpu.store_shared4(token.o + place(n), (token.q_scale * products[n]).to_bits());
                    }
                    n += 1;
                }
                self.keep(gpu, args, step, token.to, t + 1 < args.tokens);
                t += 1;
            }
        }
    }

    /// The products of the lane's rows and a query or key, row by row side by side.
    #[inline(always)]
    fn products(&self, gpu: &impl Warp, line: &[[f32; V]; CHUNKS]) -> [f32; ROWS] {
        let mut sums = [0.0; ROWS];
        let mut n = 0;
        while n < ROWS {
            sums[n] = dot(&self.s[n], line);
            n += 1;
        }
        let mut mask = LANES / 2;
        while mask > 0 {
            let mut n = 0;
            while n < ROWS {
                sums[n] += f32::from_bits(gpu.shuffle_xor(sums[n].to_bits(), mask));
                n += 1;
            }
            mask /= 2;
        }
        sums
    }

    /// Writes a piece to where the state after a token goes, if it goes anywhere. Where tokens follow, what is left of
    /// it in the state's dtype is what they find.
    ///
    /// # Safety
    /// Its rows at `to` are to be written.
    #[inline(always)]
    unsafe fn keep(&mut self, gpu: &impl Warp, args: &Args, step: u32, to: u64, more: bool) {
        let [.., to_row, to_column] = args.kept.to.strides;
        let to_column = gpu.unforeseen(to_column);
        let mut n = 0;
        while n < ROWS {
            let is_kept = to != 0 && self.has(gpu, step, n);
            let row = to + self.to + Self::distance(step, n) * to_row;
            let mut c = 0;
            while c < CHUNKS {
                let bytes = E::packed(gpu, &self.s[n][c]);
                // SAFETY: the caller's promise.
                unsafe {
                    if WIDE {
                        if is_kept && Self::has_column(gpu, args, c, 0) {
                            gpu.store16(row + u64::from(c as u32 * LANES * 16), bytes);
                        }
                    } else {
                        let mut v = 0;
                        while v < V {
                            if is_kept && Self::has_column(gpu, args, c, v) {
                                let column = c as u64 * u64::from(LANES) * V as u64 + v as u64;
                                store(gpu, E::DTYPE, row + column * to_column, self.s[n][c][v]);
                            }
                            v += 1;
                        }
                    }
                }
                let mut v = 0;
                while more && E::BYTES < 4 && v < V {
                    self.s[n][c][v] = E::of(gpu, bytes, v);
                    v += 1;
                }
                c += 1;
            }
            n += 1;
        }
    }
}

/// The lane's part of a product of rows: four sums side by side, which come together at the end.
#[inline(always)]
fn dot<const V: usize, const CHUNKS: usize>(a: &[[f32; V]; CHUNKS], b: &[[f32; V]; CHUNKS]) -> f32 {
    let mut sums = [0.0; 4];
    each::<V, CHUNKS>(|c, x| {
        let i = (c * V + x) % 4;
        sums[i] = Lanes::mul_add(a[c][x], b[c][x], sums[i]);
    });
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// Every column of a lane, in the order in which they are added up.
#[inline(always)]
fn each<const V: usize, const CHUNKS: usize>(mut f: impl FnMut(usize, usize)) {
    let mut c = 0;
    while c < CHUNKS {
        let mut v = 0;
        while v < V {
            f(c, v);
            v += 1;
        }
        c += 1;
    }
}
