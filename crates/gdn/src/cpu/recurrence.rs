//! The delta rule token by token, on one value head's state: each row, or each column, goes through the
//! registers once a token, and through memory once in all.

use std::ops::Range;

use gdn_math::layer as math;

use super::{
    Isa,
    copy::LINE,
    lanes::{Bf16, Element, F16, F32, Register, WIDEST, for_isa},
    scratch::padded,
    stages::{ahead::Beginning, for_dtype},
};
use crate::{decode::MAX_TOKENS, dtype::Dtype};

/// How many bytes ahead lines of a state are asked for: a page of memory, past which a processor does not look by
/// itself.
const AHEAD: usize = 4096;

/// Registers of a row that stays in them, of the 32 of AVX-512, beside those of its key and its query.
const HELD: usize = 8;

/// Registers of columns that are computed side by side: a whole row of a usual head, where it can be, as
/// memory is brought fastest in its order.
const COLUMNS: usize = 8;
/// The same where there are fewer.
const FEWER_COLUMNS: usize = 4;

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

    /// Where a row begins, of a state whose DK is dense.
    #[inline(always)]
    fn row(&self, row: usize) -> *mut u8 {
        self.at.wrapping_add(if self.is_scratch { 0 } else { row * self.step })
    }

    /// Where a column begins, of a state whose DV is dense.
    #[inline(always)]
    fn column<E: Element>(&self, column: usize) -> *mut u8 {
        self.at.wrapping_add(if self.is_scratch { 0 } else { column * E::BYTES })
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
    /// `[T][padded(DK)]`, zeros from DK on. For a state whose DK is dense as [`arrange`] has them.
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
    /// Lines of what is upcoming to be asked for with each row, or of columns with each of their DK numbers.
    pub(super) lines: usize,
}

/// The delta rule, of a state with DK dense (`true`) or DV dense; what is upcoming is asked for meanwhile. It is safe
/// to call where all that the fields say is there.
pub(super) type Recur = unsafe fn(&Recurrence, bool, &mut Beginning);

/// What computes all tokens, of a state of that dtype.
///
/// A function by itself for each dtype: as a part of decode's, compiling that one took most of the crate's time.
pub(super) fn recurrence(isa: Isa, dtype: Dtype) -> Recur {
    for_dtype!(dtype, E => {
        #[inline(always)]
        unsafe fn run<L: Register>(head: &Recurrence, by_rows: bool, upcoming: &mut Beginning) {
            // SAFETY: the caller's promises.
            unsafe { head.run::<L, E>(by_rows, upcoming) }
        }
        for_isa!(isa, run(head: &Recurrence, by_rows: bool, upcoming: &mut Beginning))
    })
}

impl Recurrence {
    /// Computes all tokens, of a state with DK dense (`by_rows`) or DV dense.
    ///
    /// # Safety
    /// All that the fields say is there, states of elements E; the machine has L's instruction set.
    #[inline(always)]
    unsafe fn run<L: Register, E: Element>(&self, by_rows: bool, upcoming: &mut Beginning) {
        let Range { start, end } = self.rows;
        // SAFETY: the caller's promises.
        unsafe {
            let is_held = L::LEN == WIDEST && self.dk == HELD * L::LEN;
            if by_rows && is_held && (E::BYTES == 4 || self.num_tokens == 1) {
                self.held_rows::<L, E>(start..end, upcoming);
            } else if by_rows {
                let side_by_side = if E::BYTES == 4 { 2 } else { 4 };
                let last = end - (end - start) % side_by_side;
                if E::BYTES == 4 {
                    self.all_rows::<L, E, 2>(start..last, upcoming);
                } else {
                    self.all_rows::<L, E, 4>(start..last, upcoming);
                }
                self.all_rows::<L, E, 1>(last..end, upcoming);
            } else {
                let mut column = start;
                while column + COLUMNS * L::LEN <= end {
                    self.columns::<L, E, COLUMNS>(column, upcoming);
                    column += COLUMNS * L::LEN;
                }
                while column + FEWER_COLUMNS * L::LEN <= end {
                    self.columns::<L, E, FEWER_COLUMNS>(column, upcoming);
                    column += FEWER_COLUMNS * L::LEN;
                }
                while column + L::LEN <= end {
                    self.columns::<L, E, 1>(column, upcoming);
                    column += L::LEN;
                }
                for column in column..end {
                    self.columns::<f32, E, 1>(column, upcoming);
                }
            }
        }
    }

    /// Rows of a state whose DK is dense and fills [`HELD`] registers, one after the other. Each is loaded before
    /// its first token and stays; of 16 bits, for one token, as it would have to be rounded between them. All sums
    /// are in the order of [`all_rows`](Self::all_rows), which computes several tokens of 16-bit states.
    #[inline(always)]
    unsafe fn held_rows<L: Register, E: Element>(&self, mut rows: Range<usize>, upcoming: &mut Beginning) {
        // SAFETY: the caller's promises.
        unsafe {
            let k = self.held_input::<L>(self.k, 0);
            if E::BYTES < 4 {
                // A row waits for the sum of its correction, and the one before is changed meanwhile. That leaves
                // no registers for the query.
                let Some(mut row) = rows.next() else { return };
                let mut s = self.held::<L, E>(row);
                let mut correction = self.correct_held::<L>(row, 0, s, k);
                for next in rows {
                    upcoming.bring::<L>(self.lines);
                    let next_s = self.held::<L, E>(next);
                    let next_correction = self.correct_held::<L>(next, 0, next_s, k);
                    let q = self.held_input::<L>(self.q, 0);
                    self.update_held::<L, E>(row, 0, &mut s, k, q, correction);
                    (row, s, correction) = (next, next_s, next_correction);
                }
                let q = self.held_input::<L>(self.q, 0);
                self.update_held::<L, E>(row, 0, &mut s, k, q, correction);
            } else if self.num_tokens == 1 {
                let q = self.held_input::<L>(self.q, 0);
                for row in rows {
                    upcoming.bring::<L>(self.lines);
                    let mut s = self.held::<L, E>(row);
                    let correction = self.correct_held::<L>(row, 0, s, k);
                    self.update_held::<L, E>(row, 0, &mut s, k, q, correction);
                }
            } else {
                for row in rows {
                    upcoming.bring::<L>(self.lines);
                    let mut s = self.held::<L, E>(row);
                    for t in 0..self.num_tokens {
                        let (k, q) = (self.held_input::<L>(self.k, t), self.held_input::<L>(self.q, t));
                        let correction = self.correct_held::<L>(row, t, s, k);
                        self.update_held::<L, E>(row, t, &mut s, k, q, correction);
                    }
                }
            }
        }
    }

    /// A token's key or query.
    #[inline(always)]
    unsafe fn held_input<L: Register>(&self, rows: *const f32, t: usize) -> [L; HELD] {
        // SAFETY: the caller's promises.
        unsafe { load::<L, F32, HELD>(rows.add(t * self.dk).cast()) }
    }

    /// A row before the first token.
    #[inline(always)]
    unsafe fn held<L: Register, E: Element>(&self, row: usize) -> [L; HELD] {
        let at = self.from.row(row);
        prefetch::<L>(at, HELD * L::LEN * E::BYTES);
        // SAFETY: the caller's promises.
        unsafe { load::<L, E, HELD>(at) }
    }

    /// The correction of a row that is held for a token.
    #[inline(always)]
    unsafe fn correct_held<L: Register>(&self, row: usize, t: usize, s: [L; HELD], k: [L; HELD]) -> f32 {
        // SAFETY: the caller's promises.
        unsafe {
            let mut sum = L::zero();
            for (s, k) in s.into_iter().zip(k) {
                sum = s.mul_add(k, sum);
            }
            let v = *self.v.add(t * self.v_width + row);
            math::correction(self.beta[t], v, self.decay[t] * sum.sum())
        }
    }

    /// A row that is held after a token, to memory as well, and its output.
    #[inline(always)]
    unsafe fn update_held<L: Register, E: Element>(
        &self,
        row: usize,
        t: usize,
        s: &mut [L; HELD],
        k: [L; HELD],
        q: [L; HELD],
        correction: f32,
    ) {
        let to = self.to[t];
        // SAFETY: the caller's promises.
        unsafe {
            let (decay, change) = (s[0].splat(self.decay[t]), s[0].splat(correction));
            let mut sum = L::zero();
            for ((s, k), q) in s.iter_mut().zip(k).zip(q) {
                *s = k.mul_add(change, s.times(decay));
                sum = s.mul_add(q, sum);
            }
            // Numbers, as in `update_rows`.
            if correction.is_finite() || !E::NAN_TAKES_TIME {
                store::<L, E, HELD, true>(*s, to.row(row));
            } else {
                store::<L, E, HELD, false>(*s, to.row(row));
            }
            *self.o.add(t * self.v_width + row) = sum.sum();
        }
    }

    /// Rows of a state whose DK is dense, N of them side by side, as many times as there are such.
    #[inline(always)]
    unsafe fn all_rows<L: Register, E: Element, const N: usize>(
        &self,
        rows: Range<usize>,
        upcoming: &mut Beginning,
    ) {
        let steps = rows.len() / N * self.num_tokens;
        // Rows wait for the sums of their corrections, unless other rows' are computed before they are
        // changed. In f32 that costs more than it gains: states of no cache are brought fastest in the order
        // of memory.
        let ahead = usize::from(self.num_tokens == 1 && E::BYTES < 4);
        let mut waiting = [0.0; N];
        for i in 0..steps + ahead {
            // SAFETY: the caller's promises.
            unsafe {
                let mut corrections = [0.0; N];
                if i < steps {
                    let (row, t) = (i / self.num_tokens * N, i % self.num_tokens);
                    let at = self.from.row(rows.start + row);
                    if t == 0 {
                        upcoming.bring::<L>(N * self.lines);
                        if E::BYTES < 4 {
                            for n in 0..N {
                                prefetch::<L>(at.wrapping_add(n * self.from.step), self.dk * E::BYTES);
                            }
                        } else if at.addr() % AHEAD < N * self.from.step {
                            // In f32 more lines take more time than they save.
                            prefetch::<L>(at, LINE);
                        }
                    }
                    corrections = self.correct_rows::<L, E, N>(rows.start + row, t);
                }
                if ahead > 0 {
                    std::mem::swap(&mut corrections, &mut waiting);
                }
                if let Some(i) = i.checked_sub(ahead) {
                    let (row, t) = (i / self.num_tokens * N, i % self.num_tokens);
                    self.update_rows::<L, E, N>(rows.start + row, t, corrections);
                }
            }
        }
    }

    /// Where the state before a token lies.
    #[inline(always)]
    fn before(&self, t: usize) -> Place {
        if t == 0 { self.from } else { self.to[t - 1] }
    }

    /// The corrections of some rows for a token.
    #[inline(always)]
    unsafe fn correct_rows<L: Register, E: Element, const N: usize>(
        &self,
        first: usize,
        t: usize,
    ) -> [f32; N] {
        let (dk, from) = (self.dk, self.before(t));
        let (paired, whole) = (paired::<L>(dk), dk / L::LEN * L::LEN);
        // SAFETY: the caller's promises.
        unsafe {
            let (k, v) = (self.k.add(t * padded(dk)), self.v.add(t * self.v_width + first));
            let at = from.row(first);
            let mut sums = [L::zero(); N];
            for i in (0..paired).step_by(2 * L::LEN) {
                let keys = load::<L, F32, 2>(k.add(i).cast());
                for (n, sum) in sums.iter_mut().enumerate() {
                    let s = load::<L, E, 2>(at.add(n * from.step + i * E::BYTES));
                    *sum = s[1].mul_add(keys[1], s[0].mul_add(keys[0], *sum));
                }
            }
            if paired < whole {
                let key = L::load(k.add(paired));
                for (n, sum) in sums.iter_mut().enumerate() {
                    let s = E::load::<L>(at.add(n * from.step + paired * E::BYTES));
                    *sum = s.mul_add(key, *sum);
                }
            }
            if whole < dk {
                let key = L::load(k.add(whole));
                for (n, sum) in sums.iter_mut().enumerate() {
                    let s = load_first::<L, E>(at.add(n * from.step + whole * E::BYTES), dk - whole);
                    *sum = s.mul_add(key, *sum);
                }
            }
            let sums = each_sum(sums);
            let mut corrections = [0.0; N];
            for (n, correction) in corrections.iter_mut().enumerate() {
                *correction = math::correction(self.beta[t], *v.add(n), self.decay[t] * sums[n]);
            }
            corrections
        }
    }

    /// Some rows' states after a token, and their outputs.
    #[inline(always)]
    unsafe fn update_rows<L: Register, E: Element, const N: usize>(
        &self,
        first: usize,
        t: usize,
        corrections: [f32; N],
    ) {
        // Decay, state and key were numbers where the correction is one. Then so are the new elements of the
        // state, each a product added to another one that is no larger than a number.
        let numbers = corrections.iter().all(|correction| correction.is_finite());
        // SAFETY: the caller's promises.
        unsafe {
            if numbers || !E::NAN_TAKES_TIME {
                self.store_rows::<L, E, N, true>(first, t, corrections);
            } else {
                self.store_rows::<L, E, N, false>(first, t, corrections);
            }
        }
    }

    /// [`update_rows`](Self::update_rows), with `NUMBERS` of states without NaN.
    #[inline(always)]
    unsafe fn store_rows<L: Register, E: Element, const N: usize, const NUMBERS: bool>(
        &self,
        first: usize,
        t: usize,
        corrections: [f32; N],
    ) {
        let (dk, from, to) = (self.dk, self.before(t), self.to[t]);
        let (paired, whole) = (paired::<L>(dk), dk / L::LEN * L::LEN);
        // SAFETY: the caller's promises.
        unsafe {
            let (q, k) = (self.q.add(t * padded(dk)), self.k.add(t * padded(dk)));
            let (src, dst, o) = (from.row(first), to.row(first), self.o.add(t * self.v_width + first));
            let decay = L::zero().splat(self.decay[t]);
            let mut sums = [L::zero(); N];
            for i in (0..paired).step_by(2 * L::LEN) {
                let keys = load::<L, F32, 2>(k.add(i).cast());
                let queries = load::<L, F32, 2>(q.add(i).cast());
                for (n, sum) in sums.iter_mut().enumerate() {
                    let correction = decay.splat(corrections[n]);
                    let s = load::<L, E, 2>(src.add(n * from.step + i * E::BYTES));
                    let s = [
                        keys[0].mul_add(correction, s[0].times(decay)),
                        keys[1].mul_add(correction, s[1].times(decay)),
                    ];
                    store::<L, E, 2, NUMBERS>(s, dst.add(n * to.step + i * E::BYTES));
                    *sum = s[1].mul_add(queries[1], s[0].mul_add(queries[0], *sum));
                }
            }
            if paired < whole {
                let (key, query) = (L::load(k.add(paired)), L::load(q.add(paired)));
                for (n, sum) in sums.iter_mut().enumerate() {
                    let s = E::load::<L>(src.add(n * from.step + paired * E::BYTES));
                    let s = key.mul_add(decay.splat(corrections[n]), s.times(decay));
                    E::store(s, dst.add(n * to.step + paired * E::BYTES));
                    *sum = s.mul_add(query, *sum);
                }
            }
            if whole < dk {
                let (key, query) = (L::load(k.add(whole)), L::load(q.add(whole)));
                for (n, sum) in sums.iter_mut().enumerate() {
                    let s = load_first::<L, E>(src.add(n * from.step + whole * E::BYTES), dk - whole);
                    let s = key.mul_add(decay.splat(corrections[n]), s.times(decay));
                    store_first::<L, E>(s, dst.add(n * to.step + whole * E::BYTES), dk - whole);
                    *sum = s.mul_add(query, *sum);
                }
            }
            for (n, sum) in each_sum(sums).into_iter().enumerate() {
                *o.add(n) = sum;
            }
        }
    }

    /// Some columns of a state whose DV is dense, N registers of them.
    #[inline(always)]
    unsafe fn columns<L: Register, E: Element, const N: usize>(
        &self,
        first: usize,
        upcoming: &mut Beginning,
    ) {
        // SAFETY: the caller's promises.
        unsafe {
            for t in 0..self.num_tokens {
                let from = self.before(t);
                let src = from.column::<E>(first);
                let k = self.k.add(t * padded(self.dk));
                let zero = L::zero();
                let mut sums = [zero; N];
                for i in 0..self.dk {
                    let key = zero.splat(*k.add(i));
                    let s = load::<L, E, N>(src.add(i * from.step));
                    for (sum, s) in sums.iter_mut().zip(s) {
                        *sum = s.mul_add(key, *sum);
                    }
                }
                let (decay, beta) = (zero.splat(self.decay[t]), zero.splat(self.beta[t]));
                let v = self.v.add(t * self.v_width + first);
                let v = arranged::<L, E, N>(load::<L, F32, N>(v.cast()));
                let (mut corrections, mut total) = ([zero; N], zero);
                for (n, correction) in corrections.iter_mut().enumerate() {
                    *correction = math::correction(beta, v[n], decay.times(sums[n]));
                    total = total.plus(*correction);
                }
                // As for rows: where the total is a number, all are.
                if !E::NAN_TAKES_TIME || total.sum().is_finite() {
                    self.store_columns::<L, E, N, true>(first, t, corrections, upcoming);
                } else {
                    self.store_columns::<L, E, N, false>(first, t, corrections, upcoming);
                }
            }
        }
    }

    /// Some columns' states after a token, and their outputs; with `NUMBERS` of states without NaN.
    #[inline(always)]
    unsafe fn store_columns<L: Register, E: Element, const N: usize, const NUMBERS: bool>(
        &self,
        first: usize,
        t: usize,
        corrections: [L; N],
        upcoming: &mut Beginning,
    ) {
        // SAFETY: the caller's promises.
        unsafe {
            let (from, to) = (self.before(t), self.to[t]);
            let (src, dst) = (from.column::<E>(first), to.column::<E>(first));
            let (q, k) = (self.q.add(t * padded(self.dk)), self.k.add(t * padded(self.dk)));
            let decay = L::zero().splat(self.decay[t]);
            let mut sums = [L::zero(); N];
            for i in 0..self.dk {
                upcoming.bring::<L>(self.lines);
                let (key, query) = (decay.splat(*k.add(i)), decay.splat(*q.add(i)));
                let mut s = load::<L, E, N>(src.add(i * from.step));
                for (s, correction) in s.iter_mut().zip(corrections) {
                    *s = key.mul_add(correction, s.times(decay));
                }
                store::<L, E, N, NUMBERS>(s, dst.add(i * to.step));
                for (sum, s) in sums.iter_mut().zip(s) {
                    *sum = s.mul_add(query, *sum);
                }
            }
            let o = self.o.add(t * self.v_width + first);
            store::<L, F32, N, false>(restored::<L, E, N>(sums), o.cast());
        }
    }
}

/// Asks for as many bytes as there are from `at` on, [`AHEAD`] of them. Any address will do.
#[inline(always)]
fn prefetch<L: Register>(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(LINE) {
        L::prefetch(at.wrapping_add(AHEAD + line));
    }
}

/// N registers of elements, by pairs where there are some; see [`Element::load_pair`].
///
/// # Safety
/// The elements can be read; the machine has L's instruction set.
#[inline(always)]
unsafe fn load<L: Register, E: Element, const N: usize>(src: *const u8) -> [L; N] {
    // SAFETY: the caller's promises.
    unsafe {
        let mut registers = [L::zero(); N];
        for (i, pair) in registers.chunks_mut(2).enumerate() {
            let src = src.add(2 * i * L::LEN * E::BYTES);
            match pair {
                [first, second] => [*first, *second] = E::load_pair(src),
                rest => rest[0] = E::load(src),
            }
        }
        registers
    }
}

/// The inverse of [`load`], with `NUMBERS` where no lane is NaN.
///
/// # Safety
/// The elements can be written.
#[inline(always)]
unsafe fn store<L: Register, E: Element, const N: usize, const NUMBERS: bool>(
    registers: [L; N],
    dst: *mut u8,
) {
    for (i, pair) in registers.chunks(2).enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let dst = dst.add(2 * i * L::LEN * E::BYTES);
            match *pair {
                [first, second] => E::store_pair::<L, NUMBERS>([first, second], dst),
                ref rest => E::store(rest[0], dst),
            }
        }
    }
}

/// Registers in the order of memory in that of [`load`].
#[inline(always)]
fn arranged<L: Register, E: Element, const N: usize>(mut registers: [L; N]) -> [L; N] {
    for pair in registers.chunks_exact_mut(2) {
        let [first, second] = E::arranged([pair[0], pair[1]]);
        (pair[0], pair[1]) = (first, second);
    }
    registers
}

/// The inverse of [`arranged`].
#[inline(always)]
fn restored<L: Register, E: Element, const N: usize>(mut registers: [L; N]) -> [L; N] {
    for pair in registers.chunks_exact_mut(2) {
        let [first, second] = E::restored([pair[0], pair[1]]);
        (pair[0], pair[1]) = (first, second);
    }
    registers
}

/// The sum of each register.
#[inline(always)]
fn each_sum<L: Register, const N: usize>(registers: [L; N]) -> [f32; N] {
    let mut sums = [0.0; N];
    for (sums, registers) in sums.chunks_mut(4).zip(registers.chunks(4)) {
        if let &[a, b, c, d] = registers {
            sums.copy_from_slice(&L::four_sums([a, b, c, d]));
        } else {
            for (sum, register) in sums.iter_mut().zip(registers) {
                *sum = register.sum();
            }
        }
    }
    sums
}

/// How much of a row is loaded by pairs of registers.
#[inline(always)]
fn paired<L: Register>(dk: usize) -> usize {
    dk / (2 * L::LEN) * 2 * L::LEN
}

/// Puts a row of q or k in the order in which the elements of a state whose DK is dense are loaded.
///
/// # Safety
/// The machine has L's instruction set.
#[inline(always)]
pub(super) unsafe fn arrange<L: Register, E: Element>(row: &mut [f32], dk: usize) {
    for pair in row[..paired::<L>(dk)].chunks_exact_mut(2 * L::LEN) {
        let (first, second) = pair.split_at_mut(L::LEN);
        // SAFETY: a register each, and the caller's promise.
        unsafe {
            let pair = [L::load(first.as_ptr()), L::load(second.as_ptr())];
            let [one, two] = E::arranged(pair);
            one.store(first.as_mut_ptr());
            two.store(second.as_mut_ptr());
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
