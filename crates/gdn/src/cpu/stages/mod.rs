//! What happens to tokens before and after the delta rule, for one key head and its R value heads:
//! convolution, l2norm, gates; gated norm.
//!
//! Everything goes through rows of f32 in scratch memory, each padded with zeros to whole registers.

use std::ops::Range;

pub(super) mod ahead;
mod elements;
mod window;

use gdn_math::{Lanes, layer as math};

pub(super) use self::elements::{at, for_dtype, step};
use self::elements::{load, load_columns, store};
use super::{
    lanes::{Register, Together, WIDEST},
    scratch::{Pieces, padded},
};
use crate::layer::{Field, Tokens};

/// Registers that formulas with an exponential are computed of side by side.
const SIDE_BY_SIDE: usize = 4;

/// The features of a key head in a field, in some row.
#[inline(always)]
fn features(field: &Field<*mut u8>, head: usize, row: usize) -> *const u8 {
    field.at.wrapping_add(field.start + head * field.head_step + row * field.row_stride)
}

/// One of q, k, v of one key head: some channels of the convolution.
struct Part<'a> {
    field: Field<*mut u8>,
    /// Its first channel.
    channel: usize,
    /// How many.
    len: usize,
    /// f32 from a row of the following to the next.
    row: usize,
    /// `[W][row]`, by tap.
    weights: &'a mut [f32],
    /// `[row]`
    bias: &'a mut [f32],
    /// `[W - 1 + T][row]`: the inputs, those before the call first.
    inputs: &'a mut [f32],
}

impl<'a> Part<'a> {
    /// `len` channels from `channel` on, read in heads of `dim`, with room for `capacity` tokens.
    ///
    /// # Safety
    /// As [`Group::new`].
    #[inline(always)]
    unsafe fn new<L: Register>(
        tokens: &Tokens<*mut u8>,
        field: Field<*mut u8>,
        channel: usize,
        [len, dim]: [usize; 2],
        capacity: usize,
        memory: &mut Pieces<'a>,
    ) -> Self {
        let (row, width) = (part_row(len, dim), tokens.layer.conv_width);
        let (weights, bias) = (memory.take(width * row), memory.take(row));
        let inputs = memory.take((width - 1 + capacity) * row);
        let weight = &tokens.conv_weight;
        let (src, steps) = (at(weight, [channel, 0]), [step(weight, 0), step(weight, 1)]);
        // SAFETY: the channels and taps that the plan was checked for; rows of the scratch memory.
        unsafe {
            load_columns::<L>(weight.kind, src, steps, len, width, |tap| weights[tap * row..].as_mut_ptr());
            match &tokens.conv_bias {
                Some(given) => {
                    load::<L>(given.kind, at(given, [channel]), step(given, 0), len, bias.as_mut_ptr());
                }
                None => bias.fill(0.0),
            }
        }
        Self { field, channel, len, row, weights, bias, inputs }
    }
}

/// f32 of a row of `len` channels that is read in heads of `dim`: whole registers from any head's start on.
fn part_row(len: usize, dim: usize) -> usize {
    padded(len) + if dim.is_multiple_of(WIDEST) { 0 } else { WIDEST }
}

/// One key head with its R value heads: its weights, and rows for up to T tokens of it.
pub(super) struct Group<'a> {
    tokens: &'a Tokens<*mut u8>,
    head: usize,
    /// Rows there is room for.
    capacity: usize,
    parts: [Part<'a>; 3],
    /// `[T][padded(DK)]`, normed and scaled.
    pub(super) q: &'a mut [f32],
    /// `[T][padded(DK)]`, normed.
    pub(super) k: &'a mut [f32],
    /// `[T][v_width]`
    pub(super) v: &'a mut [f32],
    /// f32 from a row of `v` and `o` to the next: R value heads of `head_width` each.
    pub(super) v_width: usize,
    /// f32 from a value head to the next in a row of `v` and `o`: DV, padded.
    pub(super) head_width: usize,
    /// `[R][padded(T)]`: the log of each token's decay.
    pub(super) g: &'a mut [f32],
    /// `[R][padded(T)]`
    pub(super) beta: &'a mut [f32],
    /// `[T][v_width]`: outputs before the norm.
    pub(super) o: &'a mut [f32],
    norm_weight: &'a mut [f32],
    /// `[R]` each, padded.
    a_log: &'a mut [f32],
    dt_bias: &'a mut [f32],
    /// A value head's z.
    z: &'a mut [f32],
    /// A row of any part, or of a head.
    line: &'a mut [f32],
}

/// The widths of rows of a group.
#[derive(Clone, Copy)]
pub(super) struct Widths {
    qk: usize,
    head: usize,
    capacity: usize,
}

impl Widths {
    /// For `capacity` tokens, with rows of value heads padded to a multiple of `panel`.
    pub(super) fn new(tokens: &Tokens<*mut u8>, capacity: usize, panel: usize) -> Self {
        let heads = tokens.layer.heads();
        let head = padded(heads.head_v_dim()).next_multiple_of(panel);
        Self { qk: padded(heads.head_k_dim()), head, capacity }
    }

    /// f32 of scratch memory that a group takes.
    pub(super) fn scratch(&self, tokens: &Tokens<*mut u8>) -> usize {
        let (ratio, width) = (tokens.layer.heads().ratio(), tokens.layer.conv_width);
        let v = ratio * self.head;
        let (dk, dv) = (tokens.layer.heads().head_k_dim(), tokens.layer.heads().head_v_dim());
        let longest = part_row(ratio * dv, dv).max(part_row(dk, dk));
        let channels = 2 * part_row(dk, dk) + part_row(ratio * dv, dv);
        let per_token = 2 * self.qk + 2 * v;
        channels * (width + 1 + width - 1 + self.capacity)
            + self.capacity * per_token
            + 2 * ratio * padded(self.capacity)
            + 2 * padded(ratio)
            + 2 * self.head
            + self.head.max(longest)
    }
}

impl<'a> Group<'a> {
    /// Reads the weights of key head `head`.
    ///
    /// # Safety
    /// The tensors of `tokens` can be read; `memory` has [`Widths::scratch`] f32; the machine has L's
    /// instruction set.
    #[inline(always)]
    pub(super) unsafe fn new<L: Register>(
        tokens: &'a Tokens<*mut u8>,
        head: usize,
        widths: Widths,
        memory: &mut Pieces<'a>,
    ) -> Self {
        let heads = tokens.layer.heads();
        let (dk, dv, ratio) = (heads.head_k_dim(), heads.head_v_dim(), heads.ratio());
        let keys = heads.num_k_heads() * dk;
        let capacity = widths.capacity;
        // No closures here: in one an instruction set's operations would be calls of functions.
        // SAFETY: the caller's promises.
        let parts = unsafe {
            [
                Part::new::<L>(tokens, tokens.q, head * dk, [dk, dk], capacity, memory),
                Part::new::<L>(tokens, tokens.k, keys + head * dk, [dk, dk], capacity, memory),
                Part::new::<L>(
                    tokens,
                    tokens.v,
                    2 * keys + head * ratio * dv,
                    [ratio * dv, dv],
                    capacity,
                    memory,
                ),
            ]
        };
        let v_width = ratio * widths.head;
        let norm_weight = memory.take(widths.head);
        norm_weight.fill(0.0);
        let (a_log, dt_bias) = (memory.take(padded(ratio)), memory.take(padded(ratio)));
        for (operand, start, len, to) in [
            (&tokens.norm_weight, 0, dv, &mut *norm_weight),
            (&tokens.A_log, head * ratio, ratio, &mut *a_log),
            (&tokens.dt_bias, head * ratio, ratio, &mut *dt_bias),
        ] {
            // SAFETY: the elements that the plan was checked for; rows of the scratch memory.
            unsafe {
                load::<L>(operand.kind, at(operand, [start]), step(operand, 0), len, to.as_mut_ptr());
            }
        }
        let longest = parts.iter().map(|part| part.row).max().unwrap_or(0);
        let mut group = Self {
            tokens,
            head,
            capacity,
            parts,
            q: memory.take(capacity * widths.qk),
            k: memory.take(capacity * widths.qk),
            v: memory.take(capacity * v_width),
            v_width,
            head_width: widths.head,
            g: memory.take(ratio * padded(capacity)),
            beta: memory.take(ratio * padded(capacity)),
            o: memory.take(capacity * v_width),
            norm_weight,
            a_log,
            dt_bias,
            z: memory.take(widths.head),
            line: memory.take(widths.head.max(longest)),
        };
        // What lies between a head's dim and its width is read as part of whole registers, and never written
        // again.
        for rows in [&mut group.q, &mut group.k, &mut group.v, &mut group.o] {
            rows.fill(0.0);
        }
        group
    }

    /// Which key head it is.
    pub(super) fn head(&self) -> usize {
        self.head
    }

    /// Takes the inputs of `num_tokens` tokens from row `first` on, after those that lie before them.
    ///
    /// # Safety
    /// The rows can be read, and are no more than the capacity; the machine has L's instruction set.
    #[inline(always)]
    pub(super) unsafe fn take_inputs<L: Register>(&mut self, first: usize, num_tokens: usize) {
        let before = self.tokens.layer.conv_width - 1;
        for part in &mut self.parts {
            for t in 0..num_tokens {
                let src = features(&part.field, self.head, first + t);
                let dst = part.inputs[(before + t) * part.row..].as_mut_ptr();
                // SAFETY: a row of the projections, and one of the scratch memory.
                unsafe { load::<L>(part.field.dtype, src, part.field.dtype.size(), part.len, dst) };
            }
        }
    }

    /// Convolution, l2norm and gates of `num_tokens` tokens from row `first` on, whose inputs were taken.
    /// Rows after them, up to the capacity, are made ones that change no state: zeros.
    ///
    /// # Safety
    /// The rows can be read, and are no more than the capacity; the machine has L's instruction set.
    #[inline(always)]
    pub(super) unsafe fn prepare<L: Register>(&mut self, first: usize, num_tokens: usize) {
        let heads = self.tokens.layer.heads();
        let (dk, dv) = (heads.head_k_dim(), heads.head_v_dim());
        // SAFETY: the machine has the instruction set.
        let zero = unsafe { L::zero() };
        let qk = padded(dk);
        for (i, part) in self.parts.iter_mut().enumerate() {
            let row = part.row;
            // Where the convolved channels go: whole rows of q and k; value heads side by side, each with
            // room to its width.
            let (to, stride, len, step) = match i {
                0 => (&mut *self.q, qk, dk, 0),
                1 => (&mut *self.k, qk, dk, 0),
                _ => (&mut *self.v, self.v_width, dv, self.head_width),
            };
            for (j, start) in (0..part.len).step_by(len).enumerate() {
                // SAFETY: `len` channels of the part from `start` on, `num_tokens` rows; lengths as `Widths`
                // made them.
                unsafe {
                    let (weights, bias) = (part.weights.as_ptr().add(start), part.bias.as_ptr().add(start));
                    let inputs = part.inputs.as_ptr().add(start);
                    let to = to.as_mut_ptr().add(j * step);
                    match self.tokens.layer.conv_width {
                        4 => convolve::<L, 4>(weights, bias, inputs, row, 4, len, num_tokens, to, stride),
                        width => {
                            convolve::<L, 0>(weights, bias, inputs, row, width, len, num_tokens, to, stride)
                        }
                    }
                }
            }
        }
        let layer = &self.tokens.layer;
        for t in 0..num_tokens {
            // SAFETY: rows of the scratch memory.
            unsafe {
                l2norm::<L>(self.q[t * qk..].as_mut_ptr(), qk, layer.l2norm_eps, layer.scale);
                l2norm::<L>(self.k[t * qk..].as_mut_ptr(), qk, layer.l2norm_eps, 1.0);
            }
        }
        self.q[num_tokens * qk..].fill(0.0);
        self.k[num_tokens * qk..].fill(0.0);
        self.v[num_tokens * self.v_width..].fill(0.0);
        let (ratio, tokens) = (heads.ratio(), padded(self.capacity));
        for r in 0..ratio {
            let (g, beta) = (&mut self.g[r * tokens..][..tokens], &mut self.beta[r * tokens..][..tokens]);
            for (field, to) in [(&self.tokens.a, &mut *g), (&self.tokens.b, &mut *beta)] {
                let src = features(field, self.head, first).wrapping_add(r * field.dtype.size());
                // SAFETY: one feature of the tokens' rows, as many as the scratch memory has room for.
                unsafe { load::<L>(field.dtype, src, field.row_stride, num_tokens, to.as_mut_ptr()) };
            }
            for t in (0..num_tokens).step_by(L::LEN) {
                // SAFETY: whole registers of rows that are padded.
                unsafe {
                    let a = L::load(g[t..].as_ptr());
                    let (a_log, dt_bias) = (zero.splat(self.a_log[r]), zero.splat(self.dt_bias[r]));
                    math::log_decay(a, a_log, dt_bias).store(g[t..].as_mut_ptr());
                    let b = L::load(beta[t..].as_ptr());
                    math::beta(b, zero.splat(layer.beta_scale)).store(beta[t..].as_mut_ptr());
                }
            }
            g[num_tokens..].fill(0.0);
            beta[num_tokens..].fill(0.0);
        }
    }

    /// Puts some columns of `o`, of each value head those in `columns`, into rows of all value heads, from
    /// row `first` on.
    ///
    /// # Safety
    /// `all` has `[N, HV, DV]` f32, and nobody else has these.
    pub(super) unsafe fn put_outputs(
        &self,
        all: *mut f32,
        first: usize,
        num_tokens: usize,
        columns: &Range<usize>,
    ) {
        let heads = self.tokens.layer.heads();
        let (dv, ratio) = (heads.head_v_dim(), heads.ratio());
        for t in 0..num_tokens {
            for r in 0..ratio {
                let columns = in_head(columns, r, dv);
                let from = &self.o[t * self.v_width + r * self.head_width..][columns.clone()];
                let row = ((first + t) * heads.num_k_heads() + self.head) * ratio + r;
                // SAFETY: the caller's promise.
                unsafe {
                    all.add(row * dv + columns.start).copy_from_nonoverlapping(from.as_ptr(), from.len())
                };
            }
        }
    }

    /// Takes `o` from there.
    ///
    /// # Safety
    /// `all` has `[N, HV, DV]` f32, and nobody writes these.
    pub(super) unsafe fn take_outputs(&mut self, all: *const f32, first: usize, num_tokens: usize) {
        let heads = self.tokens.layer.heads();
        let (dv, ratio) = (heads.head_v_dim(), heads.ratio());
        for t in 0..num_tokens {
            for r in 0..ratio {
                let row = ((first + t) * heads.num_k_heads() + self.head) * ratio + r;
                let to = &mut self.o[t * self.v_width + r * self.head_width..][..dv];
                // SAFETY: the caller's promise.
                unsafe { to.as_mut_ptr().copy_from_nonoverlapping(all.add(row * dv), dv) };
            }
        }
    }

    /// The gated norm of `num_tokens` tokens of `o`, into rows of `out` from row `first` on.
    ///
    /// # Safety
    /// The rows of z can be read and those of `out` written; the machine has L's instruction set.
    #[inline(always)]
    pub(super) unsafe fn finish<L: Register>(&mut self, first: usize, num_tokens: usize) {
        let (layer, out) = (&self.tokens.layer, &self.tokens.out);
        let heads = layer.heads();
        let (dv, ratio, width) = (heads.head_v_dim(), heads.ratio(), self.head_width);
        // SAFETY: the machine has the instruction set.
        let zero = unsafe { L::zero() };
        let (z_row, y_row) = (&mut *self.z, &mut *self.line);
        let z_field = &self.tokens.z;
        for t in 0..num_tokens {
            for r in 0..ratio {
                let o = self.o[t * self.v_width + r * width..].as_ptr();
                let z = features(z_field, self.head, first + t).wrapping_add(r * dv * z_field.dtype.size());
                // SAFETY: a value head's features of a row; rows of the scratch memory, padded with zeros.
                unsafe {
                    load::<L>(z_field.dtype, z, z_field.dtype.size(), dv, z_row.as_mut_ptr());
                    let sum = sum_of_squares::<L>(o, padded(dv));
                    let scale = math::rms_scale(sum, dv as f32, layer.norm_eps);
                    let whole = dv / (SIDE_BY_SIDE * L::LEN) * (SIDE_BY_SIDE * L::LEN);
                    for i in (0..whole).step_by(SIDE_BY_SIDE * L::LEN) {
                        let o = Together::<L, SIDE_BY_SIDE>::load(o.add(i));
                        let z = Together::load(z_row.as_ptr().add(i));
                        let weight = Together::load(self.norm_weight.as_ptr().add(i));
                        let y = math::gated(o, o.splat(scale), weight, z, layer.gate);
                        y.store(y_row.as_mut_ptr().add(i));
                    }
                    let scale = zero.splat(scale);
                    for i in (whole..dv).step_by(L::LEN) {
                        let (o, z) = (L::load(o.add(i)), L::load(z_row.as_ptr().add(i)));
                        let weight = L::load(self.norm_weight.as_ptr().add(i));
                        math::gated(o, scale, weight, z, layer.gate).store(y_row.as_mut_ptr().add(i));
                    }
                    let dst = at(out, [first + t, self.head * ratio + r, 0]);
                    store::<L>(out.kind, y_row.as_ptr(), dv, dst, step(out, 2));
                }
            }
        }
    }
}

/// What of a key head's R * DV rows is in value head r, as rows of that head.
pub(super) fn in_head(rows: &Range<usize>, r: usize, dv: usize) -> Range<usize> {
    let within = |row: usize| row.clamp(r * dv, (r + 1) * dv) - r * dv;
    within(rows.start)..within(rows.end)
}

/// Zeros in rows of `out`, for one key head's value heads.
///
/// # Safety
/// The rows can be written.
pub(super) unsafe fn clear(tokens: &Tokens<*mut u8>, head: usize, rows: Range<usize>) {
    let (heads, out) = (tokens.layer.heads(), &tokens.out);
    let zero = 0f32;
    for row in rows {
        for h in head * heads.ratio()..(head + 1) * heads.ratio() {
            for i in 0..heads.head_v_dim() {
                // SAFETY: the caller's promise. Zero has the same bits in every dtype.
                unsafe { store::<f32>(out.kind, &raw const zero, 1, at(out, [row, h, i]), 0) };
            }
        }
    }
}

/// silu of the convolution of `len` channels over `num_tokens` tokens. `W` taps, or `width` where it is 0.
///
/// # Safety
/// `width` rows of weights and `width - 1 + num_tokens` of inputs, `row` apart, and one of bias, all readable
/// up to whole registers past `len`; `num_tokens` rows at `to`, `stride` apart, writable so. The machine has
/// L's instruction set.
#[allow(clippy::too_many_arguments, reason = "addresses and distances")]
#[inline(always)]
unsafe fn convolve<L: Register, const W: usize>(
    weights: *const f32,
    bias: *const f32,
    inputs: *const f32,
    row: usize,
    width: usize,
    len: usize,
    num_tokens: usize,
    to: *mut f32,
    stride: usize,
) {
    let width = if W > 0 { W } else { width };
    let mut start = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while start + SIDE_BY_SIDE * L::LEN <= len {
            for t in 0..num_tokens {
                let mut sum = Together::<L, SIDE_BY_SIDE>::load(bias.add(start));
                for tap in 0..width {
                    let weight = Together::load(weights.add(tap * row + start));
                    sum = Together::load(inputs.add((t + tap) * row + start)).mul_add(weight, sum);
                }
                math::activation(sum).store(to.add(t * stride + start));
            }
            start += SIDE_BY_SIDE * L::LEN;
        }
        while start < len {
            for t in 0..num_tokens {
                let mut sum = L::load(bias.add(start));
                for tap in 0..width {
                    let weight = L::load(weights.add(tap * row + start));
                    sum = L::load(inputs.add((t + tap) * row + start)).mul_add(weight, sum);
                }
                let convolved = math::activation(sum);
                if start + L::LEN <= len {
                    convolved.store(to.add(t * stride + start));
                } else {
                    store_first(convolved, len - start, to.add(t * stride + start));
                }
            }
            start += L::LEN;
        }
    }
}

/// The first `n` lanes of a register, and zeros behind them.
///
/// # Safety
/// `LEN` f32 can be written.
#[inline(always)]
unsafe fn store_first<L: Register>(register: L, n: usize, to: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        register.store(to);
        for i in n..L::LEN {
            *to.add(i) = 0.0;
        }
    }
}

/// # Safety
/// `len` f32 are readable, a multiple of every register's length. The machine has L's instruction set.
#[inline(always)]
unsafe fn sum_of_squares<L: Register>(row: *const f32, len: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = L::zero();
        for i in (0..len).step_by(L::LEN) {
            let x = L::load(row.add(i));
            sum = x.mul_add(x, sum);
        }
        sum.sum()
    }
}

/// # Safety
/// `len` f32 are readable and writable, a multiple of every register's length. The machine has L's
/// instruction set.
#[inline(always)]
unsafe fn l2norm<L: Register>(row: *mut f32, len: usize, eps: f32, scale: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let factor = math::l2_scale(sum_of_squares::<L>(row, len), eps, scale);
        let factor = L::zero().splat(factor);
        for i in (0..len).step_by(L::LEN) {
            L::load(row.add(i)).times(factor).store(row.add(i));
        }
    }
}
