//! A chunk of a prefill: [`BLOCK`] tokens at a time, as products of small matrices, on a state that stays in
//! the second-level cache.
//!
//! For a block of one value head, with G the decays' logs summed from the block's start and D_ij = G_i - G_j
//! (summed from j + 1 to i, so that it keeps its precision however small G is; D <= 0):
//!
//! ```text
//! X = beta * (V - e^G * K S^T)                    what each key finds in the state, corrected
//! (I + strictLower(beta * e^D * K K^T)) U = X     corrections, less what those before have changed
//! O = e^G * Q S^T + lower(e^D * Q K^T) U          outputs
//! C = e^D_last * U                                what the block changes
//! S = e^G_last * S + C^T K                        the state after it
//! ```
//!
//! (Yang et al., "Gated Delta Networks", 2024, section 3.3, before W and U are formed.) The triangular matrix
//! is inverted by substitution in f32, once a head; the rest is done for a panel of columns of S^T at a time,
//! which stays in the first-level cache. A block takes 3 DK DV + (16 to 20) DV multiplications a token, where
//! the recurrence takes 4 DK DV.
//!
//! A sequence that begins with zeros has no S for the whole of its first chunk: what its keys and queries would
//! find in S they find in the keys and changes of the blocks before, in block b
//!
//! ```text
//! K S^T = (..(K K_0^T C_0) * e^G_last1 + K K_1^T C_1) * e^G_last2 + .. + K K_(b-1)^T C_(b-1)
//! ```
//!
//! where G_last1 is block 1's, and so on. That takes 32 b DV multiplications a token in place of 2 DK DV, and those of
//! K K_i^T and Q K_i^T for each key head. S is formed once, at the chunk's end or the sequence's.

use std::ops::Range;

use gdn_math::{layer as math, special::exp};

use super::{
    lanes::{Bf16, Element, F16, F32, Register, WIDEST, turned},
    scratch::{Pieces, padded},
    stages::{Group, ahead::NextChunk, at, for_dtype, in_head, step},
};
use crate::{dtype::Dtype, prefill::CHUNK, tensor::Operand};

/// Tokens that prefill multiplies at once.
pub const BLOCK: usize = 16;

/// Blocks of a chunk.
const BLOCKS: usize = CHUNK / BLOCK;

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
            + BLOCKS * self.k_transposed()
            + (2 * BLOCKS + 4) * BLOCK * BLOCK
            + 2 * BLOCK
            + self.ratio * BLOCKS
            + (1 + self.ratio * self.panels * BLOCKS) * BLOCK * self.panel
    }

    fn k_transposed(&self) -> usize {
        padded(self.dk) * BLOCK
    }
}

/// The states of a key head's value heads, and what a block needs beside them.
pub(super) struct States<'a> {
    lens: Lens,
    /// Those of the R * DV rows of the value heads' states that are computed.
    rows: Range<usize>,
    /// Whether the states are zeros still: nothing need be multiplied with them, and nothing is in their
    /// memory.
    are_zeros: bool,
    /// Blocks whose changes are not in the states yet. None where these are no zeros.
    pending: usize,
    /// `[R][panels][DK][panel]`: S^T.
    states: &'a mut [f32],
    /// `[BLOCKS][DK][BLOCK]`: the keys of blocks that are pending, then those of this one.
    k_transposed: &'a mut [f32],
    /// `[BLOCKS][BLOCK][BLOCK]` each: `K K^T` and `Q K^T` of this block's keys and queries, with the keys of blocks that
    /// are pending and then with its own.
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
    /// `[BLOCK][panel]`: X.
    x: &'a mut [f32],
    /// `[R][panels][BLOCKS][BLOCK][panel]`: C of blocks that are pending, and of this one. Without any pending the first
    /// panel's place serves all.
    changes: &'a mut [f32],
    /// `[R][BLOCKS]`: `e^G_last` of blocks that are pending, and of this one.
    decays: &'a mut [f32],
}

/// The numbers of the lanes.
static LANES: [f32; BLOCK] = {
    let mut lanes = [0.0; BLOCK];
    let mut i = 0;
    while i < BLOCK {
        lanes[i] = i as f32;
        i += 1;
    }
    lanes
};

impl<'a> States<'a> {
    /// States whose elements are left over from earlier calls.
    pub(super) fn new(lens: Lens, rows: Range<usize>, memory: &mut Pieces<'a>) -> Self {
        let square = BLOCK * BLOCK;
        let x = BLOCK * lens.panel;
        Self {
            lens,
            rows,
            are_zeros: false,
            pending: 0,
            states: memory.take(lens.ratio * lens.state()),
            k_transposed: memory.take(BLOCKS * lens.k_transposed()),
            kk: memory.take(BLOCKS * square),
            qk: memory.take(BLOCKS * square),
            p: memory.take(square),
            m: memory.take(square),
            inverse: memory.take(square),
            p_inverse: memory.take(square),
            from_start: memory.take(BLOCK),
            to_end: memory.take(BLOCK),
            x: memory.take(x),
            changes: memory.take(lens.ratio * lens.panels * BLOCKS * x),
            // Last: it may be no whole line.
            decays: memory.take(lens.ratio * BLOCKS),
        }
    }

    /// Makes the states zeros.
    pub(super) fn clear(&mut self) {
        self.are_zeros = true;
    }

    /// The panels of value head r that are computed.
    fn panels(&self, r: usize) -> Range<usize> {
        let rows = in_head(&self.rows, r, self.lens.dv);
        if rows.is_empty() { 0..0 } else { rows.start / self.lens.panel..rows.end.div_ceil(self.lens.panel) }
    }

    /// Reads the states of value heads from `first` on out of a slot, or with `READ` false writes them there:
    /// as they are before the first block, or after a whole chunk or the sequence's last block.
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
        debug_assert_eq!(self.pending, 0, "the states are not formed");
        if READ {
            self.are_zeros = false;
        } else if self.are_zeros {
            self.states.fill(0.0);
        }
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

    /// One block of all heads: from `group`'s q, k, v and gates to its o. What comes `next` is brought
    /// near meanwhile.
    ///
    /// # Safety
    /// `group` has room for [`BLOCK`] tokens, all of which are prepared; the machine has L's instruction set.
    #[inline(always)]
    pub(super) unsafe fn block<L: Register, const M: usize, const N: usize, const REST: usize>(
        &mut self,
        group: &mut Group<'_>,
        mut next: NextChunk,
        is_last: bool,
    ) {
        const { assert!(BLOCK % M == REST) };
        let Lens { dk, panels, panel, ratio, .. } = self.lens;
        let row = padded(dk);
        let forms_state = !self.are_zeros || self.pending + 1 == BLOCKS || is_last;
        let updates = (0..ratio).map(|r| self.panels(r).len()).sum::<usize>() * (dk / M);
        let lines = next.lines().div_ceil(updates.max(1));
        // SAFETY: the caller's promises; rows of the scratch memory, as long as they are said to be.
        unsafe {
            let own = self.k_transposed[self.pending * self.lens.k_transposed()..].as_mut_ptr();
            for d in (0..row).step_by(L::LEN) {
                for t in (0..BLOCK).step_by(L::LEN) {
                    let mut square = [L::zero(); WIDEST];
                    for (i, register) in square[..L::LEN].iter_mut().enumerate() {
                        *register = L::load(group.k.as_ptr().add((t + i) * row + d));
                    }
                    for (i, register) in turned(square)[..L::LEN].iter().enumerate() {
                        register.store(own.add((d + i) * BLOCK + t));
                    }
                }
            }
            for (rows, products) in [(&*group.k, &mut *self.kk), (&*group.q, &mut *self.qk)] {
                for b in 0..=self.pending {
                    let keys = self.k_transposed[b * self.lens.k_transposed()..].as_ptr();
                    let products = &mut products[b * BLOCK * BLOCK..][..BLOCK * BLOCK];
                    square::<L, M, REST>(rows.as_ptr(), row, keys, |_| dk, products);
                }
            }
            for r in 0..ratio {
                let computed = self.panels(r);
                if computed.is_empty() {
                    continue;
                }
                self.decays[r * BLOCKS + self.pending] = self
                    .gates::<L, M, REST>(&group.g[r * BLOCK..][..BLOCK], &group.beta[r * BLOCK..][..BLOCK]);
                for p in computed {
                    let place = r * panels + p;
                    let state = self.states[place * dk * panel..][..dk * panel].as_mut_ptr();
                    let kept = if self.are_zeros { place * BLOCKS * BLOCK * panel } else { 0 };
                    let changes = self.changes[kept..].as_mut_ptr();
                    let place = Panel { r, column: r * group.head_width + p * panel, state, changes };
                    self.panel::<L, M, N, REST>(group, place, forms_state, (&mut next, lines));
                }
            }
        }
        if forms_state {
            (self.are_zeros, self.pending) = (false, 0);
        } else {
            self.pending += 1;
        }
    }

    /// What the gates of one head make of `K K^T` and `Q K^T`. Gives `e^G_last`.
    ///
    /// # Safety
    /// The machine has L's instruction set.
    #[inline(always)]
    unsafe fn gates<L: Register, const M: usize, const REST: usize>(
        &mut self,
        g: &[f32],
        beta: &[f32],
    ) -> f32 {
        let own = self.pending * BLOCK * BLOCK;
        // SAFETY: the caller's promise; rows of the scratch memory.
        unsafe {
            let zero = L::zero();
            let mut sum = 0.0;
            for (sums, g) in self.from_start.iter_mut().zip(g) {
                sum += g;
                *sums = sum;
            }
            for column in (0..BLOCK).step_by(L::LEN) {
                let lane = L::load(LANES.as_ptr().add(column));
                let mut differences = zero;
                for i in 0..BLOCK {
                    let (at, here) = (i * BLOCK + column, zero.splat(i as f32));
                    differences = here.if_greater(lane, differences.plus(zero.splat(g[i])), zero);
                    let decay = exp(differences);
                    if i == BLOCK - 1 {
                        decay.store(self.to_end.as_mut_ptr().add(column));
                    }
                    let p = decay.times(L::load(self.qk.as_ptr().add(own + at)));
                    lane.if_greater(here, zero, p).store(self.p.as_mut_ptr().add(at));
                    let m = decay.times(L::load(self.kk.as_ptr().add(own + at))).times(zero.splat(beta[i]));
                    here.if_greater(lane, m, zero).store(self.m.as_mut_ptr().add(at));
                }
                let at = self.from_start.as_mut_ptr().add(column);
                exp(L::load(at)).store(at);
            }
            for column in (0..BLOCK).step_by(L::LEN) {
                let lane = L::load(LANES.as_ptr().add(column));
                let mut rows = [zero; BLOCK];
                for (i, row) in rows.iter_mut().enumerate() {
                    // A row of the unit matrix.
                    let (above, below) = (zero.splat(i as f32 + 0.5), zero.splat(i as f32 - 0.5));
                    *row = above.if_greater(lane, lane.if_greater(below, zero.splat(1.0), zero), zero);
                }
                for j in 0..BLOCK {
                    let done = rows[j];
                    done.store(self.inverse.as_mut_ptr().add(j * BLOCK + column));
                    for (i, row) in rows.iter_mut().enumerate().skip(j + 1) {
                        *row = zero.splat(self.m[i * BLOCK + j]).neg_mul_add(done, *row);
                    }
                }
            }
            // Of a triangle rows have as many numbers as there are rows up to them.
            let (a, b) = (self.p.as_ptr(), self.inverse.as_ptr());
            square::<L, M, REST>(a, BLOCK, b, |end| end, self.p_inverse);
            self.from_start[BLOCK - 1]
        }
    }

    /// One panel of one head. With each M rows of the state so many lines of what comes next are asked for.
    ///
    /// # Safety
    /// As [`States::block`]; the panel's part of S^T is there, and its changes.
    #[inline(always)]
    unsafe fn panel<L: Register, const M: usize, const N: usize, const REST: usize>(
        &mut self,
        group: &mut Group<'_>,
        panel: Panel,
        forms_state: bool,
        (next, lines): (&mut NextChunk, usize),
    ) {
        let dk = self.lens.dk;
        // SAFETY: the caller's promises; rows of the scratch memory.
        unsafe {
            for first in (0..BLOCK - REST).step_by(M) {
                self.correct::<L, M, N>(group, panel, first);
            }
            if REST > 0 {
                self.correct::<L, REST, N>(group, panel, BLOCK - REST);
            }
            for first in (0..BLOCK - REST).step_by(M) {
                self.put_out::<L, M, N>(group, panel, first);
            }
            if REST > 0 {
                self.put_out::<L, REST, N>(group, panel, BLOCK - REST);
            }
            for first in (0..BLOCK - REST).step_by(M) {
                self.change::<L, M, N>(panel, first);
            }
            if REST > 0 {
                self.change::<L, REST, N>(panel, BLOCK - REST);
            }
            if !forms_state {
                next.bring::<L>(lines * (dk / M));
                return;
            }
            let decay = L::zero().splat(self.decays[panel.r * BLOCKS + self.pending]);
            let mut first = 0;
            while first + M <= dk {
                next.bring::<L>(lines);
                self.update::<L, M, N>(panel, first, decay);
                first += M;
            }
            while first + 2 <= dk {
                self.update::<L, 2, N>(panel, first, decay);
                first += 2;
            }
            if first < dk {
                self.update::<L, 1, N>(panel, first, decay);
            }
        }
    }

    /// What M rows of keys or queries, from `first` on, find in the state: `tile` is zeros and becomes that. `squares`
    /// are the rows' products with keys of blocks that are pending.
    ///
    /// # Safety
    /// As [`States::panel`].
    #[inline(always)]
    unsafe fn find<L: Register, const M: usize, const N: usize>(
        &self,
        rows: &[f32],
        squares: &[f32],
        panel: Panel,
        first: usize,
        tile: &mut [[L; N]; M],
    ) {
        let (dk, width) = (self.lens.dk, N * L::LEN);
        let row = padded(dk);
        // SAFETY: the caller's promises; rows of the scratch memory.
        unsafe {
            if !self.are_zeros {
                multiply(rows.as_ptr().add(first * row), row, panel.state, width, dk, tile);
            }
            for b in 0..self.pending {
                let squares = squares.as_ptr().add((b * BLOCK + first) * BLOCK);
                self.bring_forward(panel.r, b, tile);
                multiply(squares, BLOCK, panel.changes.add(b * BLOCK * width), width, BLOCK, tile);
            }
        }
    }

    /// What was found in a state, or that state, after block b's decay.
    ///
    /// # Safety
    /// The machine has L's instruction set.
    #[inline(always)]
    unsafe fn bring_forward<L: Register, const M: usize, const N: usize>(
        &self,
        r: usize,
        b: usize,
        tile: &mut [[L; N]; M],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let decay = L::zero().splat(self.decays[r * BLOCKS + b]);
            for register in tile.as_flattened_mut() {
                *register = decay.times(*register);
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
        panel: Panel,
        first: usize,
    ) {
        let width = N * L::LEN;
        // SAFETY: the caller's promises; rows of the scratch memory.
        unsafe {
            let zero = L::zero();
            let mut tile = [[zero; N]; M];
            if self.are_zeros && self.pending == 0 {
                // NaN for a key that is no number: its square is none either.
                for (m, registers) in tile.iter_mut().enumerate() {
                    *registers = [zero.splat(0.0 * self.kk[(first + m) * (BLOCK + 1)]); N];
                }
            } else {
                self.find(group.k, self.kk, panel, first, &mut tile);
            }
            for (m, registers) in tile.into_iter().enumerate() {
                let t = first + m;
                let (scale, beta) =
                    (zero.splat(self.from_start[t]), zero.splat(group.beta[panel.r * BLOCK + t]));
                for (n, register) in registers.into_iter().enumerate() {
                    let v = L::load(group.v.as_ptr().add(t * group.v_width + panel.column + n * L::LEN));
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
        panel: Panel,
        first: usize,
    ) {
        let width = N * L::LEN;
        // SAFETY: the caller's promises; rows of the scratch memory.
        unsafe {
            let zero = L::zero();
            let mut tile = [[zero; N]; M];
            if !self.are_zeros || self.pending > 0 {
                self.find(group.q, self.qk, panel, first, &mut tile);
                for (m, registers) in tile.iter_mut().enumerate() {
                    let scale = zero.splat(self.from_start[first + m]);
                    for register in registers {
                        *register = scale.times(*register);
                    }
                }
            }
            let a = self.p_inverse.as_ptr().add(first * BLOCK);
            multiply(a, BLOCK, self.x.as_ptr(), width, first + M, &mut tile);
            for (m, registers) in tile.into_iter().enumerate() {
                let to = group.o.as_mut_ptr().add((first + m) * group.v_width + panel.column);
                for (n, register) in registers.into_iter().enumerate() {
                    register.store(to.add(n * L::LEN));
                }
            }
        }
    }

    /// C, of M tokens from `first` on.
    ///
    /// # Safety
    /// As [`States::panel`].
    #[inline(always)]
    unsafe fn change<L: Register, const M: usize, const N: usize>(&mut self, panel: Panel, first: usize) {
        let width = N * L::LEN;
        // SAFETY: the caller's promises; rows of the scratch memory.
        unsafe {
            let zero = L::zero();
            let mut tile = [[zero; N]; M];
            let a = self.inverse.as_ptr().add(first * BLOCK);
            multiply(a, BLOCK, self.x.as_ptr(), width, first + M, &mut tile);
            let own = panel.changes.add((self.pending * BLOCK + first) * width);
            for (m, registers) in tile.into_iter().enumerate() {
                let scale = zero.splat(self.to_end[first + m]);
                for (n, register) in registers.into_iter().enumerate() {
                    scale.times(register).store(own.add(m * width + n * L::LEN));
                }
            }
        }
    }

    /// M rows of the panel's part of S^T, from `first` on, after this block. `decay` is its `e^G_last`.
    ///
    /// # Safety
    /// As [`States::panel`]; the rows are there.
    #[inline(always)]
    unsafe fn update<L: Register, const M: usize, const N: usize>(
        &self,
        panel: Panel,
        first: usize,
        decay: L,
    ) {
        let width = N * L::LEN;
        // SAFETY: the caller's promises; rows of the scratch memory.
        unsafe {
            let state = panel.state.add(first * width);
            let keys = self.k_transposed.as_ptr().add(first * BLOCK);
            let mut tile = [[L::zero(); N]; M];
            if self.are_zeros {
                for b in 0..=self.pending {
                    let keys = keys.add(b * self.lens.k_transposed());
                    self.bring_forward(panel.r, b, &mut tile);
                    multiply(keys, BLOCK, panel.changes.add(b * BLOCK * width), width, BLOCK, &mut tile);
                }
            } else {
                for (m, registers) in tile.iter_mut().enumerate() {
                    for (n, register) in registers.iter_mut().enumerate() {
                        *register = decay.times(L::load(state.add(m * width + n * L::LEN)));
                    }
                }
                multiply(keys, BLOCK, panel.changes, width, BLOCK, &mut tile);
            }
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
    /// `[BLOCKS][BLOCK][panel]`: C.
    changes: *mut f32,
}

/// `products = a b`, [`BLOCK`] rows and columns, M rows at a time and then REST: rows of a are `a_row` f32 apart, and of b
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
        for first in (0..BLOCK - REST).step_by(M) {
            let products = &mut products[first * BLOCK..];
            square_rows::<L, M>(a.add(first * a_row), a_row, b, depth(first + M), products);
        }
        if REST > 0 {
            let first = BLOCK - REST;
            let products = &mut products[first * BLOCK..];
            square_rows::<L, REST>(a.add(first * a_row), a_row, b, depth(BLOCK), products);
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
    let products = &mut products[..M * BLOCK];
    for column in (0..BLOCK).step_by(L::LEN) {
        // SAFETY: the caller's promises; M rows of products.
        unsafe {
            let mut tile = [[L::zero()]; M];
            multiply(a, a_row, b.add(column), BLOCK, depth, &mut tile);
            for (m, [row]) in tile.into_iter().enumerate() {
                row.store(products.as_mut_ptr().add(m * BLOCK + column));
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
