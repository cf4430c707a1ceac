//! The gated norm: a thread is a row at a token.

use gdn_math::layer as math;

use super::{
    Block, Pass,
    args::{self, Field},
    element::{bits, far, number, shared, store, store_bf16},
    rows::{Held, Machine},
};
use crate::gpu::Bytes16;

/// Bits of what a row is multiplied with, on their way: of the norm's weight, and of the gate's input at the
/// first token. In plain kernels they share the first word.
#[derive(Clone, Copy, Default)]
pub(super) struct RowBits([u32; 2]);

/// The dtype that an argument has, which is known in plain calls.
#[inline(always)]
fn dtype<H: Held>(dtype: u32) -> u32 {
    if H::PLAIN { args::BF16 } else { dtype }
}

impl<G: Machine> Block<'_, G> {
    /// Reads what a row begins with, at a token.
    ///
    /// # Safety
    /// As [`super::run`]; the row is there.
    #[inline(always)]
    unsafe fn row_at<H: Held>(&self, pass: &Pass, row: u32, t: u32) -> RowBits {
        let Self { gpu, args, .. } = self;
        let (_, of_head) = args.block_rows.divide(row);
        let (z, weight) = (Field { dtype: dtype::<H>(args.z.dtype), ..args.z }, &args.norm_weight);
        let of_z = self.feature(H::WIDE, &z, pass.first * args.dv + pass.start + row, t);
        let of_weight = weight.address + far(H::WIDE, u64::from(pass.start + of_head), weight.stride);
        // SAFETY: the caller's promise.
        let (weight, z) =
            unsafe { (bits(*gpu, dtype::<H>(weight.dtype), of_weight), bits(*gpu, z.dtype, of_z)) };
        RowBits(if H::PLAIN { [weight << 16 | z, 0] } else { [weight, z] })
    }

    /// Reads what the thread's first row begins with.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn row_bits<H: Held>(&self, pass: &Pass) -> RowBits {
        let thread = self.gpu.thread();
        // SAFETY: the caller's promise.
        if thread < pass.rows { unsafe { self.row_at::<H>(pass, thread, 0) } } else { RowBits::default() }
    }

    /// The outputs, a row and token a thread.
    ///
    /// # Safety
    /// As [`super::run`]; outputs and sums of squares are in shared memory, for all to see.
    #[inline(always)]
    pub(super) unsafe fn norm<H: Held>(&self, pass: &Pass, first: RowBits) {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        let gate = if args.sigmoid == 0 { math::Gate::Silu } else { math::Gate::Sigmoid };
        let (mut row, mut t) = (gpu.thread(), 0);
        let mut given = Some(first);
        loop {
            while row >= pass.rows {
                row -= pass.rows;
                t += 1;
            }
            if t >= args.tokens {
                return;
            }
            // SAFETY: the caller's promises.
            unsafe {
                let RowBits([first, second]) = match given.take() {
                    Some(first) if gpu.thread() < pass.rows => first,
                    _ => self.row_at::<H>(pass, row, t),
                };
                let (head, of_head) = args.block_rows.divide(row);
                let mut sums = [0.0; 4];
                let at = room.sums + t * room.sums_bytes + head * room.head_sums;
                let mut piece = 0;
                while piece < room.head_sums {
                    let Bytes16(four) = gpu.load_shared16(at + piece);
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
                let (weight, z) = if H::PLAIN { (first >> 16, first & 0xffff) } else { (first, second) };
                let weight = number(gpu, dtype::<H>(args.norm_weight.dtype), weight);
                let z = number(gpu, dtype::<H>(args.z.dtype), z);
                let y = math::gated(o, scale, weight, z, gate);
                let at = self.out(H::WIDE, pass.first + head, pass.start + of_head, t);
                if H::PLAIN {
                    store_bf16(gpu, at, y);
                } else {
                    store(gpu, args.out.dtype, at, y);
                }
            }
            row += gpu.threads();
        }
    }
}
