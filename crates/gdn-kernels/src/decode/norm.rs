//! The gated norm: a thread is a row at a token.

use gdn_math::layer as math;

use super::{
    Block, Pass,
    args::{self, Field},
    element::{bits, far, number, shared, store, store_bf16},
    rows::{Held, Machine},
};
use crate::gpu::{Bytes16, Gpu};

/// Bits of what a row is multiplied with, on their way: of the norm's weight, and of the gate's input. In
/// plain calls they can share the first word.
#[derive(Clone, Copy, Default)]
pub(super) struct RowBits([u32; 2]);

impl RowBits {
    /// In one word, of a plain call.
    #[inline(always)]
    pub(super) fn packed(self) -> Self {
        let Self([weight, z]) = self;
        Self([weight << 16 | z, 0])
    }

    /// Packed bits of which the compiler does not know what they were made of.
    #[inline(always)]
    pub(super) fn unforeseen(self, gpu: &impl Gpu) -> Self {
        let Self([both, _]) = self;
        Self([gpu.unforeseen(u64::from(both)) as u32, 0])
    }

    #[inline(always)]
    fn unpacked(self) -> Self {
        let Self([both, _]) = self;
        Self([both >> 16, both & 0xffff])
    }
}

/// A row at a token, with all that does not depend on the outputs.
#[derive(Clone, Copy)]
pub(super) struct Ready {
    row: u32,
    t: u32,
    /// Its head's sums of squares, and its output before the norm, in shared memory.
    sums: u32,
    o: u32,
    out: u64,
    /// The norm's weight, and the gate.
    weight: f32,
    gate: f32,
}

impl Ready {
    /// None: after the last token.
    pub(super) const NONE: Self = Self { row: 0, t: u32::MAX, sums: 0, o: 0, out: 0, weight: 0.0, gate: 0.0 };
}

/// The dtype that an argument has, which is known in plain calls.
#[inline(always)]
fn dtype<H: Held>(dtype: u32) -> u32 {
    if H::PLAIN { args::BF16 } else { dtype }
}

/// Adds four sums of squares to those before.
#[inline(always)]
pub(super) fn add_four(sums: &mut [f32; 4], Bytes16(four): Bytes16) {
    let mut i = 0;
    while i < 4 {
        sums[i] += f32::from_bits(four[i]);
        i += 1;
    }
}

/// All of them, in the order that every kernel has.
#[inline(always)]
pub(super) fn added_up(sums: [f32; 4]) -> f32 {
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

impl<G: Machine> Block<'_, G> {
    /// What z goes through.
    #[inline(always)]
    pub(super) fn gate(&self) -> math::Gate {
        if self.args.sigmoid == 0 { math::Gate::Silu } else { math::Gate::Sigmoid }
    }

    /// The thread's first row of a pass, which may not be there. The last warp, which has the fewest rows of
    /// S, has the first.
    #[inline(always)]
    pub(super) fn first_row(&self) -> u32 {
        self.gpu.threads() - 1 - self.gpu.thread()
    }

    /// Where the bits are of what a row is multiplied with, at a token.
    #[inline(always)]
    pub(super) fn row_at<H: Held>(&self, pass: &Pass, row: u32, t: u32) -> [u64; 2] {
        let args = self.args;
        let (_, of_head) = args.block_rows.divide(row);
        let (z, weight) = (Field { dtype: dtype::<H>(args.z.dtype), ..args.z }, &args.norm_weight);
        let of_z = self.feature(H::WIDE, &z, pass.first * args.dv + pass.start + row, t);
        [weight.address + far(H::WIDE, u64::from(pass.start + of_head), weight.stride), of_z]
    }

    /// Reads them.
    ///
    /// # Safety
    /// As [`super::run`]; the row is there.
    #[inline(always)]
    pub(super) unsafe fn read_row<H: Held>(&self, [weight, z]: [u64; 2]) -> RowBits {
        let dtypes = [self.args.norm_weight.dtype, self.args.z.dtype].map(dtype::<H>);
        // SAFETY: the caller's promise.
        unsafe { RowBits([bits(self.gpu, dtypes[0], weight), bits(self.gpu, dtypes[1], z)]) }
    }

    /// Where the bits are of the thread's first row, at its token, and whether it is there.
    #[inline(always)]
    pub(super) fn first_row_at<H: Held>(&self, pass: &Pass) -> ([u64; 2], bool) {
        let [row, t] = self.row_and_token::<H>(pass, self.first_row(), 0);
        let there = t < self.tokens::<H>();
        (self.row_at::<H>(pass, if there { row } else { 0 }, if there { t } else { 0 }), there)
    }

    /// Reads what the thread's first row begins with.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn row_bits<H: Held>(&self, pass: &Pass) -> RowBits {
        let (at, there) = self.first_row_at::<H>(pass);
        // SAFETY: the caller's promise.
        if there { unsafe { self.read_row::<H>(at) } } else { RowBits::default() }
    }

    /// The same row with what these bits stand for.
    #[inline(always)]
    fn with<H: Held>(&self, place: Ready, bits: RowBits) -> Ready {
        let Self { gpu, args, .. } = self;
        // One word is held where two would be.
        let bits = if H::PLAIN { bits.packed().unpacked() } else { bits };
        let RowBits([weight, z]) = bits;
        let gate = self.gate();
        let weight = number(*gpu, dtype::<H>(args.norm_weight.dtype), weight);
        let gate = math::gate_factor(number(*gpu, dtype::<H>(args.z.dtype), z), gate);
        Ready { weight, gate, ..place }
    }

    /// A row at a token, or at later ones, where it lies past the last row of this one.
    #[inline(always)]
    fn row_and_token<H: Held>(&self, pass: &Pass, mut row: u32, mut t: u32) -> [u32; 2] {
        if H::ONE {
            return [row, u32::from(row >= pass.rows)];
        }
        while row >= pass.rows {
            row -= pass.rows;
            t += 1;
        }
        [row, t]
    }

    /// All that does not depend on bits of that row.
    #[inline(always)]
    fn place<H: Held>(&self, pass: &Pass, row: u32, t: u32) -> Ready {
        let Self { args, room, .. } = self;
        let [row, t] = self.row_and_token::<H>(pass, row, t);
        let (head, of_head) = args.block_rows.divide(row);
        Ready {
            row,
            t,
            sums: room.sums + t * room.sums_bytes + head * room.head_sums,
            o: room.o + t * room.rows_bytes + row * 4,
            out: self.out(H::WIDE, pass.first + head, pass.start + of_head, t),
            ..Ready::NONE
        }
    }

    /// What the thread begins with, where these are the bits of its first row.
    #[inline(always)]
    pub(super) fn ready<H: Held>(&self, pass: &Pass, first: RowBits) -> Ready {
        let first = if H::PLAIN { first.unpacked() } else { first };
        self.with::<H>(self.place::<H>(pass, self.first_row(), 0), first)
    }

    /// The outputs, a row and token a thread.
    ///
    /// # Safety
    /// As [`super::run`]; outputs are in shared memory, for all to see, and sums of squares are or come.
    #[inline(always)]
    pub(super) unsafe fn norm<H: Held>(&self, pass: &Pass, first: Ready) {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        let mut now = first;
        while now.t < self.tokens::<H>() {
            let mut next = self.place::<H>(pass, now.row + gpu.threads(), now.t);
            // SAFETY: the caller's promises.
            unsafe {
                let mut bits = RowBits::default();
                if next.t < self.tokens::<H>() {
                    bits = self.read_row::<H>(self.row_at::<H>(pass, next.row, next.t));
                }
                let mut sums = [0.0; 4];
                let mut piece = 0;
                while piece < room.head_sums {
                    add_four(&mut sums, gpu.receive16(now.sums + piece));
                    piece += 16;
                }
                let sum = added_up(sums);
                let scale = math::rms_scale(sum, args.dv as f32, args.norm_eps);
                let y = math::gated_by(shared(gpu, now.o), scale, now.weight, now.gate);
                if H::PLAIN {
                    store_bf16(gpu, now.out, y);
                } else {
                    store(gpu, args.out.dtype, now.out, y);
                }
                if next.t < self.tokens::<H>() {
                    next = self.with::<H>(next, bits);
                }
            }
            now = next;
        }
    }
}
