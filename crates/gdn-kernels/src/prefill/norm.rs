//! The last kernel: the gated norm, a block for each chunk and v head. Rows of padding become zeros.
//!
//! Outputs lie transposed in scratch, a row for each column of `out`. `ldmatrix` turns them: as which rows
//! make a matrix is free to choose, a lane gets eight columns of a token that lie side by side, and its gates
//! and results are 16 bytes. Gates come through shared memory as well: registers for them would leave a
//! multiprocessor room for fewer blocks.

use gdn_math::{Lanes, layer as math};

use super::{
    args::{Args, BF16, CHUNK, F16, F32, THREADS, gates_row},
    element::{Eight, of_vector, sigmoid, silu, size, store8},
    sequence::Sequence,
};
use crate::gpu::{AsyncCopy, Bytes16, TensorCore};

/// Bytes of a row of outputs: 16 for each warp.
const ROW: u32 = THREADS / 32 * 16;
/// DV of what the kernel has forms for.
const KNOWN_DV: u32 = 128;
/// Columns that four lanes get at a time.
const COLUMNS: u32 = 32;

/// Where a warp's 16 bytes of a row lie: those of a matrix all in other banks.
#[inline(always)]
fn place(row: u32, warp: u32) -> u32 {
    row * ROW + (warp ^ (row % 2 + row / 8 % 4 * 2)) * 16
}

/// The kernel.
///
/// # Safety
/// The arguments describe tensors that are there, and the grid and shared memory were made for them.
#[inline(always)]
pub unsafe fn run<G: TensorCore + AsyncCopy>(gpu: &G, args: &Args) {
    let is_of_two =
        args.z.dtype == args.out.dtype && args.wide_z == 2 && args.wide_out == 2 && args.dv == KNOWN_DV;
    // SAFETY: the caller's promises; what a form takes as known is so.
    unsafe {
        match (is_of_two, args.z.dtype, args.sigmoid == 0) {
            (true, BF16, true) => block::<BF16, true, G>(gpu, args),
            (true, BF16, false) => block::<BF16, false, G>(gpu, args),
            (true, F16, true) => block::<F16, true, G>(gpu, args),
            (true, F16, false) => block::<F16, false, G>(gpu, args),
            _ => block::<F32, true, G>(gpu, args),
        }
    }
}

/// A block's part. Where `DTYPE` is not f32, gates and results are of that dtype and are moved 16 bytes at a
/// time, rows have [`KNOWN_DV`] columns, and gates are by silu (`SILU`) or sigmoid; otherwise all of that is as the arguments
/// say.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn block<const DTYPE: u32, const SILU: bool, G: TensorCore + AsyncCopy>(gpu: &G, args: &Args) {
    let is_known = DTYPE != F32;
    let dv = if is_known { KNOWN_DV } else { args.dv };
    let is_silu = if is_known { SILU } else { args.sigmoid == 0 };
    let [of_z, of_out] = if is_known { [DTYPE; 2] } else { [args.z.dtype, args.out.dtype] };
    let [wide_z, wide_out] = if is_known { [2; 2] } else { [args.wide_z, args.wide_out] };
    // From the window's last chunk to its first: what the scan wrote last, the second-level cache has.
    let (chunk, head) = args.num_v_heads.divide(gpu.blocks()[0] - 1 - gpu.block()[0]);
    let (warp, lane) = (gpu.thread() / 32, gpu.lane());
    let of_head = u64::from(chunk * args.num_v_heads.get() + head);
    // What rows are multiplied with, then the same times the weights, then the gates.
    let scales = dv * ROW;
    let weighted = scales + dv * 4;
    let gates = weighted + dv * 4;
    // SAFETY: the caller's promises, here and below.
    unsafe {
        let Some((sequence, before)) = Sequence::of_chunk(gpu, args, args.first_chunk + chunk) else {
            // Whoever waits for this kernel waits for those before it, too.
            gpu.wait_for_previous();
            return;
        };
        let is_there = sequence.slot >= 0;
        let tokens = (sequence.len - before).min(u64::from(CHUNK)) as u32;
        let token = warp * 8 + lane / 4;
        let has_token = token < tokens;
        let row = sequence.start + before + u64::from(token);
        let (key_head, within) = args.ratio.divide(head);
        let element = u64::from(size(of_z));
        let [of_row, of_out_head, of_column] = args.out.strides;
        let of_column = if is_known { element } else { of_column };
        // The columns of step `i` for the lane, and their gates.
        let column = |i: u32| i * COLUMNS + lane % 4 * 8;
        let z = args.z.address
            + row * args.z.row_stride
            + u64::from(key_head) * args.z.head_step
            + u64::from(within * dv) * element;
        let gates_at = |i: u32| gates + token * gates_row(dv) + column(i) * 2;
        // A lane copies its own.
        let is_copied = wide_z == 2 && element == 2;
        if is_there && has_token && is_copied {
            let mut i = 0;
            while i * COLUMNS < dv {
                gpu.copy16(gates_at(i), z + u64::from(column(i) * 2), true);
                i += 1;
            }
        }
        // What is above the scan has no part in.
        gpu.wait_for_previous();
        if is_there {
            let from = args.scratch.v + of_head * u64::from(dv * ROW);
            let mut i = gpu.thread();
            while i < dv * ROW / 16 {
                // The pieces of a row lie in another order there, too.
                let (row, piece) = (i / (ROW / 16), i % (ROW / 16));
                gpu.copy16(place(row, piece ^ (row % 8)), from + u64::from(i * 16), true);
                i += THREADS;
            }
            if gpu.thread() < dv {
                let i = gpu.thread();
                let at = args.scratch.out_scales + of_head * u64::from(dv * 4) + u64::from(i * 4);
                let scale = f32::from_bits(gpu.load4(at));
                let weight = of_vector(gpu, &args.norm_weight, i);
                gpu.store_shared4(scales + i * 4, scale.to_bits());
                gpu.store_shared4(weighted + i * 4, (scale * weight).to_bits());
            }
            gpu.commit_copies();
        }
        gpu.wait_copies::<0>();
        gpu.barrier();
        // Eight columns of the lane's token, times what `at` has for columns.
        let outputs = |i: u32, at: u32| {
            let (matrix, line) = (lane / 8, lane % 8);
            let row = i * COLUMNS + line / 2 * 8 + matrix * 2 + line % 2;
            let words = gpu.load_matrix4::<true>(place(row, warp));
            let factors = eight(gpu, at + column(i) * 4);
            let mut o = [0.0f32; 8];
            let mut n = 0;
            while n < 8 {
                let [low, high] = gpu.unpack_f16(words[n / 2]);
                (o[n], o[n + 1]) = (low * factors[n], high * factors[n + 1]);
                n += 2;
            }
            o
        };
        let mut scale = 0.0;
        if is_there {
            let (mut sum, mut i) = (0.0, 0);
            while i * COLUMNS < dv {
                let o = outputs(i, scales);
                let mut n = 0;
                while n < 8 {
                    sum = Lanes::mul_add(o[n], o[n], sum);
                    n += 1;
                }
                i += 1;
            }
            scale = math::rms_scale(gpu.sum::<4>(sum), dv as f32, args.norm_eps);
        }
        // Worked out here: there are no registers to have it at hand before.
        let to = args.out.address + gpu.unforeseen(row) * of_row + u64::from(head) * of_out_head;
        let mut i = 0;
        while i * COLUMNS < dv {
            let mut y = [0.0; 8];
            if is_there {
                let o = outputs(i, weighted);
                let z = if !has_token {
                    Eight::default()
                } else if is_copied {
                    Eight::of(gpu.load_shared16(gates_at(i)))
                } else {
                    Eight::load(gpu, of_z, z + u64::from(column(i)) * element, element, wide_z)
                };
                let z = z.numbers(gpu, of_z, wide_z);
                let mut n = 0;
                while n < 8 {
                    let gate = if is_silu { silu(gpu, z[n]) } else { sigmoid(gpu, z[n]) };
                    y[n] = o[n] * scale * gate;
                    n += 1;
                }
            }
            if has_token {
                let to = to + u64::from(column(i)) * of_column;
                store8(gpu, of_out, to, of_column, wide_out, y);
            }
            i += 1;
        }
    }
}

/// Eight numbers of shared memory.
///
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn eight(gpu: &impl TensorCore, at: u32) -> [f32; 8] {
    // SAFETY: the caller's promise.
    let (Bytes16(low), Bytes16(high)) = unsafe { (gpu.load_shared16(at), gpu.load_shared16(at + 16)) };
    let mut eight = [0.0; 8];
    let mut n = 0;
    while n < 4 {
        (eight[n], eight[n + 4]) = (f32::from_bits(low[n]), f32::from_bits(high[n]));
        n += 1;
    }
    eight
}
