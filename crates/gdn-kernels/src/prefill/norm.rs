//! The last kernel: the gated norm, a block for each chunk and v head. Rows of padding become zeros.

use gdn_math::{Lanes, layer as math, quick};

use super::{
    args::{Args, CHUNK, THREADS},
    element::{load4, size, store4},
    sequence::Sequence,
};
use crate::gpu::TensorCore;

const WARPS: u32 = THREADS / 32;

/// The kernel.
///
/// # Safety
/// The arguments describe tensors that are there, and the grid and shared memory were made for them.
#[inline(always)]
pub unsafe fn run<G: TensorCore>(gpu: &G, args: &Args) {
    gpu.wait_for_previous();
    let (chunk, head) = args.num_v_heads.divide(gpu.block()[0]);
    let (warp, lane, dv) = (gpu.thread() / 32, gpu.lane(), args.dv);
    let of_head = u64::from(chunk * args.num_v_heads.get() + head);
    // `[CHUNK][DV + 1]`, then `[WARPS][CHUNK]`.
    let sums = CHUNK * (dv + 1) * 4;
    // SAFETY: the caller's promises, here and below.
    unsafe {
        let Some((sequence, before)) = Sequence::of_chunk(gpu, args, args.first_chunk + chunk) else {
            return;
        };
        let is_there = sequence.slot >= 0;
        if is_there {
            let from = args.scratch.v + of_head * u64::from(dv * CHUNK * 2);
            let scales = args.scratch.out_scales + of_head * u64::from(dv * 4);
            let mut squares = [0.0f32; 2];
            let mut row = warp;
            while row < dv {
                let two = gpu.load4(from + u64::from(row * CHUNK * 2 + lane * 4));
                let scale = f32::from_bits(gpu.load4(scales + u64::from(row * 4)));
                let two = gpu.unpack_f16(two);
                let mut n = 0;
                while n < 2 {
                    let o = two[n] * scale;
                    squares[n] = Lanes::mul_add(o, o, squares[n]);
                    let token = lane * 2 + n as u32;
                    gpu.store_shared4((token * (dv + 1) + row) * 4, o.to_bits());
                    n += 1;
                }
                row += WARPS;
            }
            let both = u64::from(squares[0].to_bits()) | u64::from(squares[1].to_bits()) << 32;
            gpu.store_shared8(sums + (warp * CHUNK + lane * 2) * 4, both);
        }
        gpu.barrier();
        let tokens = (sequence.len - before).min(u64::from(CHUNK)) as u32;
        let (_, within) = args.ratio.divide(head);
        let (key_head, _) = args.ratio.divide(head);
        let [of_row, of_out_head, of_column] = args.out.strides;
        let element = u64::from(size(args.z.dtype));
        let mut token = warp;
        while token < tokens {
            let row = sequence.start + before + u64::from(token);
            let mut scale = 0.0;
            if is_there {
                let (mut sum, mut n) = (0.0, 0);
                while n < WARPS {
                    sum += f32::from_bits(gpu.load_shared4(sums + (n * CHUNK + token) * 4));
                    n += 1;
                }
                scale = math::rms_scale(sum, dv as f32, args.norm_eps);
            }
            let z = args.z.address
                + row * args.z.row_stride
                + u64::from(key_head) * args.z.head_step
                + u64::from(within * dv) * element;
            let to = args.out.address + row * of_row + u64::from(head) * of_out_head;
            let mut column = lane * 4;
            while column < dv {
                let mut y = [0.0; 4];
                if is_there {
                    let z =
                        load4(gpu, args.z.dtype, z + u64::from(column) * element, element, args.wide != 0);
                    let weight = &args.norm_weight;
                    let at = weight.address + u64::from(column) * weight.stride;
                    let weight = load4(gpu, weight.dtype, at, weight.stride, false);
                    let mut i = 0;
                    while i < 4 {
                        let o = gpu.load_shared4((token * (dv + 1) + column + i as u32) * 4);
                        let gate = if args.sigmoid == 0 { quick::silu(z[i]) } else { quick::sigmoid(z[i]) };
                        y[i] = f32::from_bits(o) * scale * weight[i] * gate;
                        i += 1;
                    }
                }
                let to = to + u64::from(column) * of_column;
                store4(gpu, args.out.dtype, to, of_column, args.wide_out != 0, y);
                column += 128;
            }
            token += WARPS;
        }
    }
}
