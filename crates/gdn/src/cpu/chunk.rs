//! A chunk of a prefill: [`CHUNK`] tokens at a time, as products of small matrices, on a state that stays in
//! the second-level cache.
//!
//! For a chunk of one value head, with G the decays' logs summed from the chunk's start and D_ij = G_i - G_j
//! (summed from j + 1 to i, so that it keeps its precision however small G is; D <= 0):
//!
//! ```text
//! X = beta * (V - e^G * K S^T)                    what each key finds in the state, corrected
//! (I + strictLower(beta * e^D * K K^T)) U = X     corrections, less what those before have changed
//! O = e^G * Q S^T + lower(e^D * Q K^T) U          outputs
//! S = e^G_last * S + (e^D_last * U)^T K           the state after the chunk
//! ```
//!
//! (Yang et al., "Gated Delta Networks", 2024, section 3.3, before W and U are formed.) The triangular matrix
//! is inverted by substitution in f32, once a head; the rest is done for a panel of columns of S^T at a time,
//! which stays in the first-level cache. A chunk takes 3 DK DV + (16 to 20) DV multiplications a token, where
//! the recurrence takes 4 DK DV.

use std::ops::Range;

use gdn_math::{layer as math, special::exp};

use super::{
    lanes::{Bf16, Element, F16, F32, Register, WIDEST, turned},
    scratch::{Pieces, padded},
    stages::{Group, ahead::NextChunk, at, for_dtype, in_head, step},
};
use crate::{dtype::Dtype, prefill::CHUNK, tensor::Operand};

/// Lengths of the scratch memory of [`States`].
#[derive(Clone, Copy)]
pub(super) struct Lens {
    dk: usize,
    dv: usize,
    /// Panels of a head's S^T.
    panels: usize,
    /// Columns of a panel.
    panel: usize,
    ratio: usize,
}

impl Lens {
    pub(super) fn of(dk: usize, dv: usize, panel: usize, ratio: usize) -> Self {
        Self { dk, dv, panels: dv.div_ceil(panel), panel, ratio }
    }

    fn state(&self) -> usize {
        self.panels * self.dk * self.panel
    }

    pub(super) fn scratch(&self) -> usize {
        self.ratio * self.state()
            + padded(self.dk) * CHUNK
            + 6 * CHUNK * CHUNK
            + 2 * CHUNK
            + 2 * CHUNK * self.panel
    }
}

/// The states of a key head's value heads, and what a chunk needs beside them.
pub(super) struct States<'a> {
    lens: Lens,
    /// Those of the R * DV rows of the value heads' states that are computed.
    rows: Range<usize>,
    /// Whether the states are zeros still, with which nothing need be multiplied.
    are_zeros: bool,
    /// `[R][panels][DK][panel]`: S^T.
    states: &'a mut [f32],
    /// `[DK][CHUNK]`
    k_transposed: &'a mut [f32],
    /// `[CHUNK][CHUNK]` each: `K K^T` and `Q K^T`.
    kk: &'a mut [f32],
    qk: &'a mut [f32],
    /// `e^D * Q K^T`
    p: &'a mut [f32],
    /// `beta * e^D * K K^T`, below the diagonal.
    m: &'a mut [f32],
    /// The inverse of `I + m`.
    inverse: &'a mut [f32],
    /// `p` times the inverse.
    p_inverse: &'a mut [f32],
    /// `e^G` of each token; `e^D` from each token to the last.
    from_start: &'a mut [f32],
    to_end: &'a mut [f32],
    /// `[CHUNK][panel]` each: X, and `e^D_last * U`.
    x: &'a mut [f32],
    u: &'a mut [f32],
}

/// The numbers of the lanes.
static LANES: [f32; CHUNK] = {
    let mut lanes = [0.0; CHUNK];
    let mut i = 0;
    while i < CHUNK {
        lanes[i] = i as f32;
        i += 1;
    }
    lanes
};

impl<'a> States<'a> {
    /// States whose elements are left over from earlier calls.
    pub(super) fn new(lens: Lens, rows: Range<usize>, memory: &mut Pieces<'a>) -> Self {
        let square = CHUNK * CHUNK;
        let x = CHUNK * lens.panel;
        Self {
            lens,
            rows,
            are_zeros: false,
            states: memory.take(lens.ratio * lens.state()),
            k_transposed: memory.take(padded(lens.dk) * CHUNK),
            kk: memory.take(square),
            qk: memory.take(square),
            p: memory.take(square),
            m: memory.take(square),
            inverse: memory.take(square),
            p_inverse: memory.take(square),
            from_start: memory.take(CHUNK),
            to_end: memory.take(CHUNK),
            x: memory.take(x),
            u: memory.take(x),
        }
    }

    /// Makes the states zeros.
    pub(super) fn clear(&mut self) {
        self.states.fill(0.0);
        self.are_zeros = true;
    }

    /// The panels of value head r that are computed.
    fn panels(&self, r: usize) -> Range<usize> {
        let rows = in_head(&self.rows, r, self.lens.dv);
        if rows.is_empty() { 0..0 } else { rows.start / self.lens.panel..rows.end.div_ceil(self.lens.panel) }
    }

    /// Reads the states of value heads from `first` on out of a slot, or with `READ` false writes them there.
    ///
    /// # Safety
    /// The slot can be read, or written; the machine has L's instruction set.
    #[inline(always)]
    pub(super) unsafe fn exchange<L: Register, const READ: bool>(
        &mut self,
        state: &Operand<*mut u8, Dtype, 4>,
        slot: usize,
        first: usize,
    ) {
        let Lens { dk, dv, panels, panel, ratio } = self.lens;
        self.are_zeros &= !READ;
        let steps = [step(state, 2), step(state, 3)];
        for r in 0..ratio {
            let memory = at(state, [slot, first + r, 0, 0]);
            for p in self.panels(r) {
                let (start, columns) = (p * panel, panel.min(dv - p * panel));
                let own = &mut self.states[(r * panels + p) * dk * panel..][..dk * panel];
                let from = memory.wrapping_add(start * steps[0]);
                for_dtype!(state.kind, E => {
                    // SAFETY: the caller's promises.
                    unsafe { turn::<L, E, READ>(from, steps, columns, own, dk, panel) }
                });
            }
        }
    }

    /// One chunk of all heads: from `group`'s q, k, v and gates to its o. What comes `next` is brought
    /// near meanwhile.
    ///
    /// # Safety
    /// `group` has room for [`CHUNK`] tokens, all of which are prepared; the machine has L's instruction set.
    #[inline(always)]
    pub(super) unsafe fn chunk<L: Register, const M: usize, const N: usize, const REST: usize>(
        &mut self,
        group: &mut Group<'_>,
        mut next: NextChunk,
    ) {
        const { assert!(CHUNK % M == REST) };
        let Lens { dk, panels, panel, ratio, .. } = self.lens;
        let row = padded(dk);
        let updates = (0..ratio).map(|r| self.panels(r).len()).sum::<usize>() * (dk / M);
        let lines = next.lines().div_ceil(updates.max(1));
        // SAFETY: the caller's promises; rows of the scratch memory, as long as they are said to be.
        unsafe {
            for d in (0..row).step_by(L::LEN) {
                for t in (0..CHUNK).step_by(L::LEN) {
                    let mut square = [L::zero(); WIDEST];
                    for (i, register) in square[..L::LEN].iter_mut().enumerate() {
                        *register = L::load(group.k.as_ptr().add((t + i) * row + d));
                    }
                    for (i, register) in turned(square)[..L::LEN].iter().enumerate() {
                        register.store(self.k_transposed.as_mut_ptr().add((d + i) * CHUNK + t));
                    }
                }
            }
            for (rows, products) in [(&*group.k, &mut *self.kk), (&*group.q, &mut *self.qk)] {
                let b = self.k_transposed.as_ptr();
                square::<L, M, REST>(rows.as_ptr(), row, b, |_| dk, products);
            }
            for r in 0..ratio {
                let computed = self.panels(r);
                if computed.is_empty() {
                    continue;
                }
                let decay = self
                    .gates::<L, M, REST>(&group.g[r * CHUNK..][..CHUNK], &group.beta[r * CHUNK..][..CHUNK]);
                for p in computed {
                    let state = self.states[(r * panels + p) * dk * panel..][..dk * panel].as_mut_ptr();
                    let place = Panel { r, column: r * group.head_width + p * panel, state };
                    self.panel::<L, M, N, REST>(group, place, decay, (&mut next, lines));
                }
            }
        }
        self.are_zeros = false;
    }

    /// What the gates of one head make of `K K^T` and `Q K^T`. Gives `e^G` of the whole chunk.
    ///
    /// # Safety
    /// The machine has L's instruction set.
    #[inline(always)]
    unsafe fn gates<L: Register, const M: usize, const REST: usize>(
        &mut self,
        g: &[f32],
        beta: &[f32],
    ) -> f32 {
        // SAFETY: the caller's promise; rows of the scratch memory.
        unsafe {
            let zero = L::zero();
            let mut sum = 0.0;
            for (sums, g) in self.from_start.iter_mut().zip(g) {
                sum += g;
                *sums = sum;
            }
            for column in (0..CHUNK).step_by(L::LEN) {
                let lane = L::load(LANES.as_ptr().add(column));
                let mut differences = zero;
                for i in 0..CHUNK {
                    let (at, here) = (i * CHUNK + column, zero.splat(i as f32));
                    differences = here.if_greater(lane, differences.plus(zero.splat(g[i])), zero);
                    let decay = exp(differences);
                    if i == CHUNK - 1 {
                        decay.store(self.to_end.as_mut_ptr().add(column));
                    }
                    let p = decay.times(L::load(self.qk.as_ptr().add(at)));
                    lane.if_greater(here, zero, p).store(self.p.as_mut_ptr().add(at));
                    let m = decay.times(L::load(self.kk.as_ptr().add(at))).times(zero.splat(beta[i]));
                    here.if_greater(lane, m, zero).store(self.m.as_mut_ptr().add(at));
                }
                let at = self.from_start.as_mut_ptr().add(column);
                exp(L::load(at)).store(at);
            }
            for column in (0..CHUNK).step_by(L::LEN) {
                let lane = L::load(LANES.as_ptr().add(column));
                let mut rows = [zero; CHUNK];
                for (i, row) in rows.iter_mut().enumerate() {
                    // A row of the unit matrix.
                    let (above, below) = (zero.splat(i as f32 + 0.5), zero.splat(i as f32 - 0.5));
                    *row = above.if_greater(lane, lane.if_greater(below, zero.splat(1.0), zero), zero);
                }
                for j in 0..CHUNK {
                    let done = rows[j];
                    done.store(self.inverse.as_mut_ptr().add(j * CHUNK + column));
                    for (i, row) in rows.iter_mut().enumerate().skip(j + 1) {
                        *row = zero.splat(self.m[i * CHUNK + j]).neg_mul_add(done, *row);
                    }
                }
            }
            // Of a triangle rows have as many numbers as there are rows up to them.
            let (a, b) = (self.p.as_ptr(), self.inverse.as_ptr());
            square::<L, M, REST>(a, CHUNK, b, |end| end, self.p_inverse);
            self.from_start[CHUNK - 1]
        }
    }

    /// One panel of one head. With each M rows of the state so many lines of what comes next are asked for.
    ///
    /// # Safety
    /// As [`States::chunk`]; the panel's part of S^T is there.
    #[inline(always)]
    unsafe fn panel<L: Register, const M: usize, const N: usize, const REST: usize>(
        &mut self,
        group: &mut Group<'_>,
        panel: Panel,
        decay: f32,
        (next, lines): (&mut NextChunk, usize),
    ) {
        let (dk, width, state) = (self.lens.dk, N * L::LEN, panel.state);
        // SAFETY: the caller's promises; rows of the scratch memory.
        unsafe {
            for first in (0..CHUNK - REST).step_by(M) {
                self.correct::<L, M, N>(group, panel, first);
            }
            if REST > 0 {
                self.correct::<L, REST, N>(group, panel, CHUNK - REST);
            }
            for first in (0..CHUNK - REST).step_by(M) {
                self.put_out::<L, M, N>(group, panel, first);
            }
            if REST > 0 {
                self.put_out::<L, REST, N>(group, panel, CHUNK - REST);
            }
            for first in (0..CHUNK - REST).step_by(M) {
                self.changes::<L, M, N>(first);
            }
            if REST > 0 {
                self.changes::<L, REST, N>(CHUNK - REST);
            }
            let decay = L::zero().splat(decay);
            let mut first = 0;
            while first + M <= dk {
                next.bring::<L>(lines);
                self.update::<L, M, N>(state.add(first * width), first, decay);
                first += M;
            }
            while first + 2 <= dk {
                self.update::<L, 2, N>(state.add(first * width), first, decay);
                first += 2;
            }
            if first < dk {
                self.update::<L, 1, N>(state.add(first * width), first, decay);
            }
        }
    }

    /// X, of M tokens from `first` on.
    ///
    /// # Safety
    /// As [`States::panel`].
    #[inline(always)]
    unsafe fn correct<L: Register, const M: usize, const N: usize>(
        &mut self,
        group: &Group<'_>,
        Panel { r, column, state }: Panel,
        first: usize,
    ) {
        let (dk, width) = (self.lens.dk, N * L::LEN);
        let row = padded(dk);
        // SAFETY: the caller's promises; rows of the scratch memory.
        unsafe {
            let zero = L::zero();
            let mut tile = [[zero; N]; M];
            if self.are_zeros {
                // NaN for a key that is no number: its square is none either.
                for (m, registers) in tile.iter_mut().enumerate() {
                    *registers = [zero.splat(0.0 * self.kk[(first + m) * (CHUNK + 1)]); N];
                }
            } else {
                multiply(group.k.as_ptr().add(first * row), row, state, width, dk, &mut tile);
            }
            for (m, registers) in tile.into_iter().enumerate() {
                let t = first + m;
                let (scale, beta) = (zero.splat(self.from_start[t]), zero.splat(group.beta[r * CHUNK + t]));
                for (n, register) in registers.into_iter().enumerate() {
                    let v = L::load(group.v.as_ptr().add(t * group.v_width + column + n * L::LEN));
                    let x = math::correction(beta, v, scale.times(register));
                    x.store(self.x.as_mut_ptr().add(t * width + n * L::LEN));
                }
            }
        }
    }

    /// O, of M tokens from `first` on.
    ///
    /// # Safety
    /// As [`States::panel`].
    #[inline(always)]
    unsafe fn put_out<L: Register, const M: usize, const N: usize>(
        &mut self,
        group: &mut Group<'_>,
        Panel { column, state, .. }: Panel,
        first: usize,
    ) {
        let (dk, width) = (self.lens.dk, N * L::LEN);
        let row = padded(dk);
        // SAFETY: the caller's promises; rows of the scratch memory.
        unsafe {
            let zero = L::zero();
            let mut tile = [[zero; N]; M];
            if !self.are_zeros {
                multiply(group.q.as_ptr().add(first * row), row, state, width, dk, &mut tile);
                for (m, registers) in tile.iter_mut().enumerate() {
                    let scale = zero.splat(self.from_start[first + m]);
                    for register in registers {
                        *register = scale.times(*register);
                    }
                }
            }
            let a = self.p_inverse.as_ptr().add(first * CHUNK);
            multiply(a, CHUNK, self.x.as_ptr(), width, first + M, &mut tile);
            for (m, registers) in tile.into_iter().enumerate() {
                let to = group.o.as_mut_ptr().add((first + m) * group.v_width + column);
                for (n, register) in registers.into_iter().enumerate() {
                    register.store(to.add(n * L::LEN));
                }
            }
        }
    }

    /// `e^D_last * U`, of M tokens from `first` on.
    ///
    /// # Safety
    /// As [`States::panel`].
    #[inline(always)]
    unsafe fn changes<L: Register, const M: usize, const N: usize>(&mut self, first: usize) {
        let width = N * L::LEN;
        // SAFETY: the caller's promises; rows of the scratch memory.
        unsafe {
            let zero = L::zero();
            let mut tile = [[zero; N]; M];
            let a = self.inverse.as_ptr().add(first * CHUNK);
            multiply(a, CHUNK, self.x.as_ptr(), width, first + M, &mut tile);
            for (m, registers) in tile.into_iter().enumerate() {
                let scale = zero.splat(self.to_end[first + m]);
                for (n, register) in registers.into_iter().enumerate() {
                    let to = self.u.as_mut_ptr().add((first + m) * width + n * L::LEN);
                    scale.times(register).store(to);
                }
            }
        }
    }

    /// `state = decay * state + k u`: M rows of the state, and of the transposed keys from `first` on.
    ///
    /// # Safety
    /// As [`States::panel`]; the rows are there.
    #[inline(always)]
    unsafe fn update<L: Register, const M: usize, const N: usize>(
        &self,
        state: *mut f32,
        first: usize,
        decay: L,
    ) {
        let width = N * L::LEN;
        // SAFETY: the caller's promises; rows of the scratch memory.
        unsafe {
            let mut tile = [[L::zero(); N]; M];
            for (m, registers) in tile.iter_mut().enumerate() {
                for (n, register) in registers.iter_mut().enumerate() {
                    *register = decay.times(L::load(state.add(m * width + n * L::LEN)));
                }
            }
            let k = self.k_transposed.as_ptr().add(first * CHUNK);
            multiply(k, CHUNK, self.u.as_ptr(), width, CHUNK, &mut tile);
            for (m, registers) in tile.into_iter().enumerate() {
                for (n, register) in registers.into_iter().enumerate() {
                    register.store(state.add(m * width + n * L::LEN));
                }
            }
        }
    }
}

/// Some columns of a value head's S^T.
#[derive(Clone, Copy)]
struct Panel {
    /// Which of the key head's value heads.
    r: usize,
    /// The first column, in rows of [`Group::v`].
    column: usize,
    /// `[DK][panel]`
    state: *mut f32,
}

/// `products = a b`, [`CHUNK`] rows and columns, M rows at a time and then REST: rows of a are `a_row` f32 apart, and of b
/// as many rows count as `depth` says for rows of a that end there.
///
/// # Safety
/// a and b are readable; the machine has L's instruction set.
#[inline(always)]
unsafe fn square<L: Register, const M: usize, const REST: usize>(
    a: *const f32,
    a_row: usize,
    b: *const f32,
    depth: impl Fn(usize) -> usize,
    products: &mut [f32],
) {
    // SAFETY: the caller's promises.
    unsafe {
        for first in (0..CHUNK - REST).step_by(M) {
            let products = &mut products[first * CHUNK..];
            square_rows::<L, M>(a.add(first * a_row), a_row, b, depth(first + M), products);
        }
        if REST > 0 {
            let first = CHUNK - REST;
            let products = &mut products[first * CHUNK..];
            square_rows::<L, REST>(a.add(first * a_row), a_row, b, depth(CHUNK), products);
        }
    }
}

/// M rows of [`square`]: of a, `a_row` f32 apart, and `depth` rows of b.
///
/// # Safety
/// a and b are readable; the machine has L's instruction set.
#[inline(always)]
unsafe fn square_rows<L: Register, const M: usize>(
    a: *const f32,
    a_row: usize,
    b: *const f32,
    depth: usize,
    products: &mut [f32],
) {
    let products = &mut products[..M * CHUNK];
    for column in (0..CHUNK).step_by(L::LEN) {
        // SAFETY: the caller's promises; M rows of products.
        unsafe {
            let mut tile = [[L::zero()]; M];
            multiply(a, a_row, b.add(column), CHUNK, depth, &mut tile);
            for (m, [row]) in tile.into_iter().enumerate() {
                row.store(products.as_mut_ptr().add(m * CHUNK + column));
            }
        }
    }
}

/// `tile += a b`: M rows of a, `a_row` f32 apart, and `depth` rows of b, `b_row` apart, of N registers each.
///
/// # Safety
/// All of them are readable; the machine has L's instruction set.
#[inline(always)]
unsafe fn multiply<L: Register, const M: usize, const N: usize>(
    a: *const f32,
    a_row: usize,
    b: *const f32,
    b_row: usize,
    depth: usize,
    tile: &mut [[L; N]; M],
) {
    for d in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let mut row = [L::zero(); N];
            for (n, register) in row.iter_mut().enumerate() {
                *register = L::load(b.add(d * b_row + n * L::LEN));
            }
            for (m, registers) in tile.iter_mut().enumerate() {
                let factor = L::zero().splat(*a.add(m * a_row + d));
                for (register, x) in registers.iter_mut().zip(row) {
                    *register = factor.mul_add(x, *register);
                }
            }
        }
    }
}

/// Moves the first `columns` rows of a state `[DV, DK]` to or from the columns of a panel `[DK][panel]`.
/// Columns of the panel past `columns` become zeros.
///
/// # Safety
/// The state's elements, at these steps in bytes along DV and DK, can be read or written; the machine has L's
/// instruction set.
#[inline(always)]
unsafe fn turn<L: Register, E: Element, const READ: bool>(
    state: *mut u8,
    [v_step, k_step]: [usize; 2],
    columns: usize,
    panel: &mut [f32],
    dk: usize,
    width: usize,
) {
    if READ && columns < width {
        panel.fill(0.0);
    }
    // What is moved by whole registers: squares of them, whichever dim is dense.
    let whole = |len: usize| len / L::LEN * L::LEN;
    let (c_whole, d_whole) =
        if k_step == E::BYTES || v_step == E::BYTES { (whole(columns), whole(dk)) } else { (0, 0) };
    // SAFETY: the caller's promise.
    unsafe {
        for d in (0..d_whole).step_by(L::LEN) {
            for c in (0..c_whole).step_by(L::LEN) {
                let from = state.add(c * v_step + d * k_step);
                let own = panel.as_mut_ptr().add(d * width + c);
                let mut square = [L::zero(); WIDEST];
                match (READ, k_step == E::BYTES) {
                    (true, true) => {
                        for (i, register) in square[..L::LEN].iter_mut().enumerate() {
                            *register = E::load(from.add(i * v_step));
                        }
                        for (i, register) in turned(square)[..L::LEN].iter().enumerate() {
                            register.store(own.add(i * width));
                        }
                    }
                    (false, true) => {
                        for (i, register) in square[..L::LEN].iter_mut().enumerate() {
                            *register = L::load(own.add(i * width));
                        }
                        for (i, register) in turned(square)[..L::LEN].iter().enumerate() {
                            E::store(*register, from.add(i * v_step));
                        }
                    }
                    (true, false) => {
                        for i in 0..L::LEN {
                            E::load::<L>(from.add(i * k_step)).store(own.add(i * width));
                        }
                    }
                    (false, false) => {
                        for i in 0..L::LEN {
                            E::store(L::load(own.add(i * width)), from.add(i * k_step));
                        }
                    }
                }
            }
        }
        for d in 0..dk {
            for c in if d < d_whole { c_whole } else { 0 }..columns {
                let from = state.add(c * v_step + d * k_step);
                if READ {
                    panel[d * width + c] = E::read(from);
                } else {
                    E::write(panel[d * width + c], from);
                }
            }
        }
    }
}
