//! The gated norm: a thread is a row at a token.

use gdn_math::layer as math;

use super::{
    Block, Pass,
    args::{self, Field},
    element::{bits, far, number, shared, store, store_bf16},
    rows::{Held, Machine},
};
use crate::gpu::Bytes16;

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

    #[inline(always)]
    fn unpacked(self) -> Self {
        let Self([both, _]) = self;
        Self([both >> 16, both & 0xffff])
    }
}

/// The norm's weight for a row, and its gate.
#[derive(Clone, Copy, Default)]
pub(super) struct RowFactors {
    weight: f32,
    gate: f32,
}

/// The dtype that an argument has, which is known in plain calls.
#[inline(always)]
fn dtype<H: Held>(dtype: u32) -> u32 {
    if H::PLAIN { args::BF16 } else { dtype }
}

impl<G: Machine> Block<'_, G> {
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

    /// Reads what the thread's first row begins with.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn row_bits<H: Held>(&self, pass: &Pass) -> RowBits {
        let row = self.first_row();
        if row < pass.rows {
            // SAFETY: the caller's promise.
            unsafe { self.read_row::<H>(self.row_at::<H>(pass, row, 0)) }
        } else {
            RowBits::default()
        }
    }

    /// What these bits stand for.
    #[inline(always)]
    pub(super) fn row_factors<H: Held>(&self, row: RowBits) -> RowFactors {
        let Self { gpu, args, .. } = self;
        let RowBits([weight, z]) = if H::PLAIN { row.unpacked() } else { row };
        let gate = if args.sigmoid == 0 { math::Gate::Silu } else { math::Gate::Sigmoid };
        let weight = number(*gpu, dtype::<H>(args.norm_weight.dtype), weight);
        RowFactors { weight, gate: math::gate_factor(number(*gpu, dtype::<H>(args.z.dtype), z), gate) }
    }

    /// The outputs, a row and token a thread.
    ///
    /// # Safety
    /// As [`super::run`]; outputs are in shared memory, for all to see, and sums of squares are or come.
    #[inline(always)]
    pub(super) unsafe fn norm<H: Held>(&self, pass: &Pass, first: RowFactors) {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        let behind = |mut row: u32, mut t: u32| {
            while row >= pass.rows {
                row -= pass.rows;
                t += 1;
            }
            (row, t)
        };
        let (mut row, mut t) = behind(self.first_row(), 0);
        let mut factors = first;
        if t > 0 && t < args.tokens {
            // SAFETY: the caller's promise.
            let bits = unsafe { self.read_row::<H>(self.row_at::<H>(pass, row, t)) };
            factors = self.row_factors::<H>(if H::PLAIN { bits.packed() } else { bits });
        }
        while t < args.tokens {
            let (next_row, next_t) = behind(row + gpu.threads(), t);
            // SAFETY: the caller's promises.
            unsafe {
                let mut bits = RowBits::default();
                if next_t < args.tokens {
                    bits = self.read_row::<H>(self.row_at::<H>(pass, next_row, next_t));
                }
                let (head, of_head) = args.block_rows.divide(row);
                let mut sums = [0.0; 4];
                let at = room.sums + t * room.sums_bytes + head * room.head_sums;
                let mut piece = 0;
                while piece < room.head_sums {
                    let Bytes16(four) = gpu.receive16(at + piece);
                    let mut i = 0;
                    while i < 4 {
                        sums[i] += f32::from_bits(four[i]);
                        i += 1;
                    }
                    piece += 16;
                }
                let sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
                let scale = math::rms_scale(sum, args.dv as f32, args.norm_eps);
                let o = shared(gpu, room.o + t * room.rows_bytes + row * 4);
                let y = math::gated_by(o, scale, factors.weight, factors.gate);
                let at = self.out(H::WIDE, pass.first + head, pass.start + of_head, t);
                if H::PLAIN {
                    store_bf16(gpu, at, y);
                } else {
                    store(gpu, args.out.dtype, at, y);
                }
                factors = self.row_factors::<H>(if H::PLAIN { bits.packed() } else { bits });
            }
            (row, t) = (next_row, next_t);
        }
    }
}
