//! [`TensorCore`]: `mma.sync` and `ldmatrix`.

use core::arch::asm;

use super::{Nvptx, Shared};
use crate::gpu::{Float16, TensorCore};

macro_rules! mma {
    ($type:literal, $a:ident, $b:ident, $c:ident) => {{
        let (d0, d1, d2, d3): (f32, f32, f32, f32);
        // SAFETY: registers alone. Not `pure`: all lanes execute it.
        unsafe {
            asm!(concat!("mma.sync.aligned.m16n8k16.row.col.f32.", $type, ".", $type, ".f32 ",
                    "{{{}, {}, {}, {}}}, {{{}, {}, {}, {}}}, {{{}, {}}}, {{{}, {}, {}, {}}};"),
                out(reg32) d0, out(reg32) d1, out(reg32) d2, out(reg32) d3,
                in(reg32) $a[0], in(reg32) $a[1], in(reg32) $a[2], in(reg32) $a[3], in(reg32) $b[0], in(reg32) $b[1],
                in(reg32) $c[0], in(reg32) $c[1], in(reg32) $c[2], in(reg32) $c[3], options(nomem, nostack));
        }
        [d0, d1, d2, d3]
    }};
}

macro_rules! load_matrix4 {
    ($transposed:literal, $at:expr) => {{
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: the caller's promise.
        unsafe {
            asm!(concat!("ldmatrix.sync.aligned.m8n8.x4", $transposed, ".shared.b16 {{{}, {}, {}, {}}}, [{}];"),
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) $at, options(readonly, nostack));
        }
        [a, b, c, d]
    }};
}

macro_rules! load_matrix2 {
    ($transposed:literal, $at:expr) => {{
        let (a, b): (u32, u32);
        // SAFETY: the caller's promise.
        unsafe {
            asm!(concat!("ldmatrix.sync.aligned.m8n8.x2", $transposed, ".shared.b16 {{{}, {}}}, [{}];"),
                out(reg32) a, out(reg32) b, in(reg32) $at, options(readonly, nostack));
        }
        [a, b]
    }};
}

impl<S: Shared> TensorCore for Nvptx<S> {
    #[inline(always)]
    fn mma<T: Float16>(&self, a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
        if T::BF16 { mma!("bf16", a, b, c) } else { mma!("f16", a, b, c) }
    }

    #[inline(always)]
    fn pack_f16(&self, low: f32, high: f32) -> u32 {
        let two: u32;
        // SAFETY: registers alone.
        unsafe {
            asm!("cvt.rn.f16x2.f32 {}, {}, {};", out(reg32) two, in(reg32) high, in(reg32) low,
                options(pure, nomem, nostack));
        }
        two
    }

    #[inline(always)]
    fn unpack_f16(&self, two: u32) -> [f32; 2] {
        let (low, high): (f32, f32);
        // SAFETY: as above.
        unsafe {
            asm!("{{.reg .b16 low, high; mov.b32 {{low, high}}, {2}; cvt.f32.f16 {0}, low; cvt.f32.f16 {1}, high;}}",
                out(reg32) low, out(reg32) high, in(reg32) two, options(pure, nomem, nostack));
        }
        [low, high]
    }

    #[inline(always)]
    unsafe fn load_matrix4<const TRANSPOSED: bool>(&self, at: u32) -> [u32; 4] {
        if TRANSPOSED { load_matrix4!(".trans", self.shared(at)) } else { load_matrix4!("", self.shared(at)) }
    }

    #[inline(always)]
    unsafe fn load_matrix2<const TRANSPOSED: bool>(&self, at: u32) -> [u32; 2] {
        if TRANSPOSED { load_matrix2!(".trans", self.shared(at)) } else { load_matrix2!("", self.shared(at)) }
    }
}
