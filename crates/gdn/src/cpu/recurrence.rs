//! The delta rule token by token, on one value head's state: each row, or each column, goes through the
//! registers once a token, and through memory once in all.

use std::ops::Range;

use gdn_math::layer as math;

use super::{
    lanes::{Element, Register, WIDEST},
    scratch::padded,
};
use crate::decode::MAX_TOKENS;

/// Rows of a state that are computed side by side. Two keep to the order of memory, which its prefetchers ask
/// of a state that no cache holds: four take 1.6 times as long there, and within the second-level cache 0.9
/// times.
const ROWS: usize = 2;
/// Registers of columns that are computed side by side.
const COLUMNS: usize = 4;

/// Where a head's state lies, or the part that is computed side by side of one that is not kept.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) at: *mut u8,
    /// Bytes along the dim that is not dense, the other one being dense.
    pub(super) step: usize,
    /// Whether every part goes to the same memory.
    pub(super) is_scratch: bool,
}

impl Place {
    /// Scratch memory: [`scratch_len`] f32.
    pub(super) fn scratch(memory: &mut [f32], dk: usize, by_rows: bool) -> Self {
        let step = if by_rows { padded(dk) } else { COLUMNS * WIDEST } * size_of::<f32>();
        Self { at: memory.as_mut_ptr().cast(), step, is_scratch: true }
    }
}

/// f32 that a [`Place::scratch`] takes, whatever the dtype of the state.
pub(super) fn scratch_len(dk: usize) -> usize {
    COLUMNS * WIDEST * padded(dk)
}

/// A value head, and its tokens.
pub(super) struct Recurrence {
    pub(super) dk: usize,
    /// The part of DV that is computed. Every part gives the same bits as the whole.
    pub(super) rows: Range<usize>,
    /// `[T][padded(DK)]`, zeros from DK on.
    pub(super) q: *const f32,
    /// As `q`.
    pub(super) k: *const f32,
    /// `[T]` rows of DV, `v_width` apart, readable for whole registers.
    pub(super) v: *const f32,
    /// As `v`, to be written up to DV.
    pub(super) o: *mut f32,
    pub(super) v_width: usize,
    pub(super) num_tokens: usize,
    /// `exp(g)` of each token.
    pub(super) decay: [f32; MAX_TOKENS],
    pub(super) beta: [f32; MAX_TOKENS],
    /// The state before the first token.
    pub(super) from: Place,
    /// The state after each token.
    pub(super) to: [Place; MAX_TOKENS],
}

impl Recurrence {
    /// Computes all tokens, of a state with DK dense (`by_rows`) or DV dense.
    ///
    /// # Safety
    /// All that the fields say is there, states of elements E; the machine has L's instruction set.
    #[inline(always)]
    pub(super) unsafe fn run<L: Register, E: Element>(&self, by_rows: bool) {
        let Range { start, end } = self.rows;
        // SAFETY: the caller's promises.
        unsafe {
            if by_rows {
                let mut row = start;
                while row + ROWS <= end {
                    self.rows::<L, E, ROWS>(row);
                    row += ROWS;
                }
                for row in row..end {
                    self.rows::<L, E, 1>(row);
                }
            } else {
                let mut column = start;
                while column + COLUMNS * L::LEN <= end {
                    self.columns::<L, E, COLUMNS>(column);
                    column += COLUMNS * L::LEN;
                }
                while column + L::LEN <= end {
                    self.columns::<L, E, 1>(column);
                    column += L::LEN;
                }
                for column in column..end {
                    self.columns::<f32, E, 1>(column);
                }
            }
        }
    }

    /// Some rows of a state whose DK is dense.
    #[inline(always)]
    unsafe fn rows<L: Register, E: Element, const N: usize>(&self, first: usize) {
        let (dk, whole) = (self.dk, self.dk / L::LEN * L::LEN);
        let place =
            |place: &Place| place.at.wrapping_add(if place.is_scratch { 0 } else { first * place.step });
        // SAFETY: the caller's promises.
        unsafe {
            let (mut from, mut from_step) = (place(&self.from), self.from.step);
            for t in 0..self.num_tokens {
                let (to, to_step) = (place(&self.to[t]), self.to[t].step);
                let (q, k) = (self.q.add(t * padded(dk)), self.k.add(t * padded(dk)));
                let (v, o) = (self.v.add(t * self.v_width + first), self.o.add(t * self.v_width + first));
                let mut sums = [L::zero(); N];
                for i in (0..whole).step_by(L::LEN) {
                    let key = L::load(k.add(i));
                    for (n, sum) in sums.iter_mut().enumerate() {
                        let src = from.add(n * from_step + i * E::BYTES);
                        *sum = E::load::<L>(src).mul_add(key, *sum);
                    }
                }
                if whole < dk {
                    let key = L::load(k.add(whole));
                    for (n, sum) in sums.iter_mut().enumerate() {
                        let s = load_first::<L, E>(from.add(n * from_step + whole * E::BYTES), dk - whole);
                        *sum = s.mul_add(key, *sum);
                    }
                }
                let decay = L::zero().splat(self.decay[t]);
                let mut corrections = [L::zero(); N];
                for (n, correction) in corrections.iter_mut().enumerate() {
                    let r = self.decay[t] * sums[n].sum();
                    *correction = decay.splat(math::correction(self.beta[t], *v.add(n), r));
                }
                let mut sums = [L::zero(); N];
                for i in (0..whole).step_by(L::LEN) {
                    let (key, query) = (L::load(k.add(i)), L::load(q.add(i)));
                    for (n, sum) in sums.iter_mut().enumerate() {
                        let s = E::load::<L>(from.add(n * from_step + i * E::BYTES));
                        let s = key.mul_add(corrections[n], s.times(decay));
                        E::store(s, to.add(n * to_step + i * E::BYTES));
                        *sum = s.mul_add(query, *sum);
                    }
                }
                if whole < dk {
                    let (key, query) = (L::load(k.add(whole)), L::load(q.add(whole)));
                    for (n, sum) in sums.iter_mut().enumerate() {
                        let s = load_first::<L, E>(from.add(n * from_step + whole * E::BYTES), dk - whole);
                        let s = key.mul_add(corrections[n], s.times(decay));
                        store_first::<L, E>(s, to.add(n * to_step + whole * E::BYTES), dk - whole);
                        *sum = s.mul_add(query, *sum);
                    }
                }
                for (n, sum) in sums.into_iter().enumerate() {
                    *o.add(n) = sum.sum();
                }
                (from, from_step) = (to, to_step);
            }
        }
    }

    /// Some columns of a state whose DV is dense, N registers of them.
    #[inline(always)]
    unsafe fn columns<L: Register, E: Element, const N: usize>(&self, first: usize) {
        let place =
            |place: &Place| place.at.wrapping_add(if place.is_scratch { 0 } else { first * E::BYTES });
        // SAFETY: the caller's promises.
        unsafe {
            let (mut from, mut from_step) = (place(&self.from), self.from.step);
            for t in 0..self.num_tokens {
                let (to, to_step) = (place(&self.to[t]), self.to[t].step);
                let (q, k) = (self.q.add(t * padded(self.dk)), self.k.add(t * padded(self.dk)));
                let (v, o) = (self.v.add(t * self.v_width + first), self.o.add(t * self.v_width + first));
                let zero = L::zero();
                let mut sums = [zero; N];
                for i in 0..self.dk {
                    let key = zero.splat(*k.add(i));
                    for (n, sum) in sums.iter_mut().enumerate() {
                        *sum =
                            E::load::<L>(from.add(i * from_step + n * L::LEN * E::BYTES)).mul_add(key, *sum);
                    }
                }
                let (decay, beta) = (zero.splat(self.decay[t]), zero.splat(self.beta[t]));
                let mut corrections = [zero; N];
                for (n, correction) in corrections.iter_mut().enumerate() {
                    *correction = math::correction(beta, L::load(v.add(n * L::LEN)), decay.times(sums[n]));
                }
                let mut sums = [zero; N];
                for i in 0..self.dk {
                    let (key, query) = (zero.splat(*k.add(i)), zero.splat(*q.add(i)));
                    for (n, sum) in sums.iter_mut().enumerate() {
                        let s = E::load::<L>(from.add(i * from_step + n * L::LEN * E::BYTES));
                        let s = key.mul_add(corrections[n], s.times(decay));
                        E::store(s, to.add(i * to_step + n * L::LEN * E::BYTES));
                        *sum = s.mul_add(query, *sum);
                    }
                }
                for (n, sum) in sums.into_iter().enumerate() {
                    sum.store(o.add(n * L::LEN));
                }
                (from, from_step) = (to, to_step);
            }
        }
    }
}

/// The first `n` elements, and zeros behind them.
///
/// # Safety
/// `n` elements are readable, fewer than a register has; the machine has L's instruction set.
#[inline(always)]
unsafe fn load_first<L: Register, E: Element>(src: *const u8, n: usize) -> L {
    let mut lanes = [0.0; WIDEST];
    for (i, lane) in lanes[..n].iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *lane = unsafe { E::read(src.add(i * E::BYTES)) };
    }
    // SAFETY: as many f32 as the widest register has.
    unsafe { L::load(lanes.as_ptr()) }
}

/// The first `n` lanes.
///
/// # Safety
/// `n` elements are writable, fewer than a register has.
#[inline(always)]
unsafe fn store_first<L: Register, E: Element>(register: L, dst: *mut u8, n: usize) {
    let mut lanes = [0.0; WIDEST];
    // SAFETY: as many f32 as the widest register has.
    unsafe { register.store(lanes.as_mut_ptr()) };
    for (i, lane) in lanes[..n].iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { E::write(*lane, dst.add(i * E::BYTES)) };
    }
}
