//! [`Wgmma`]: each product one instruction, with all registers of the accumulator in its operands.

use core::arch::asm;

use super::{Nvptx, Shared};
use crate::gpu::{Accumulators, Float16, Lefts, Operand, Wgmma};

/// One product, and the registers' numbers in it.
macro_rules! product {
    ($n:literal, $type:literal, $d:ident, $a:ident, $b:ident, $add:ident, $first:literal $($i:literal)*) => {
        // SAFETY: the caller's promise; `$d` has so many registers.
        unsafe {
            asm!(
                concat!("{{ .reg .pred add; setp.ne.u32 add, {add}, 0; ",
                    "wgmma.mma_async.sync.aligned.m64n", $n, "k16.f32.", $type, ".", $type, " ",
                    "{{", "{", $first, "}", $(", {", $i, "}",)* "}}, {a}, {b}, add, 1, 1, {a_major}, {b_major}; }}"),
                inout(reg32) $d[$first], $(inout(reg32) $d[$i],)*
                add = in(reg32) $add, a = in(reg64) $a, b = in(reg64) $b,
                a_major = const A_MAJOR as u32, b_major = const B_MAJOR as u32,
                options(nostack));
        }
    };
}

/// One with a left side in registers.
macro_rules! product_left {
    ($n:literal, $type:literal, $d:ident, $a:ident, $b:ident, $add:ident, $first:literal $($i:literal)*) => {
        // SAFETY: the caller's promise; `$d` has so many registers.
        unsafe {
            asm!(
                concat!("{{ .reg .pred add; setp.ne.u32 add, {add}, 0; ",
                    "wgmma.mma_async.sync.aligned.m64n", $n, "k16.f32.", $type, ".", $type, " ",
                    "{{", "{", $first, "}", $(", {", $i, "}",)* "}}, {{{a0}, {a1}, {a2}, {a3}}}, {b}, add, 1, 1, {b_major}; }}"),
                inout(reg32) $d[$first], $(inout(reg32) $d[$i],)*
                add = in(reg32) $add, b = in(reg64) $b,
                a0 = in(reg32) $a[0], a1 = in(reg32) $a[1], a2 = in(reg32) $a[2], a3 = in(reg32) $a[3],
                b_major = const B_MAJOR as u32,
                options(nostack));
        }
    };
}

/// What the compiler must have done before this, and must not do before it, to these registers.
macro_rules! settle {
    ($d:ident, $($i:literal)*) => {
        // SAFETY: a comment.
        unsafe { asm!(concat!("// ", $("{", $i, "} "),*), $(inout(reg32) $d[$i],)* options(nomem, nostack)) }
    };
}

macro_rules! sizes {
    ($($registers:literal, $n:literal: $($i:literal)*;)*) => {
        impl<S: Shared> Wgmma for Nvptx<S> {
            #[inline(always)]
            fn wgmma_begin(&self) {
                // SAFETY: orders registers and memory.
                unsafe { asm!("wgmma.fence.sync.aligned;", options(nostack)) }
            }

            #[inline(always)]
            unsafe fn wgmma<T: Float16, const A_MAJOR: bool, const B_MAJOR: bool, const REGISTERS: usize>(
                &self,
                d: &mut Accumulators<REGISTERS>,
                a: Operand,
                b: Operand,
                add: bool,
            ) {
                let (a, b, add) = (a.descriptor(self.0.base()), b.descriptor(self.0.base()), u32::from(add));
                match REGISTERS {
                    $($registers => {
                        // SAFETY: as many registers as `REGISTERS` says.
                        let d = unsafe { &mut *(&raw mut d.values).cast::<[f32; $registers]>() };
                        if T::BF16 {
                            product!($n, "bf16", d, a, b, add, $($i)*);
                        } else {
                            product!($n, "f16", d, a, b, add, $($i)*);
                        }
                    })*
                    // A size there is no product of: a call that `cargo xtask ptx` refuses.
                    _ => panic!(),
                }
            }

            #[inline(always)]
            unsafe fn wgmma_left<T: Float16, const B_MAJOR: bool, const K16: usize, const REGISTERS: usize>(
                &self,
                d: &mut Accumulators<REGISTERS>,
                a: &mut Lefts<K16>,
                k16: usize,
                b: Operand,
                add: bool,
            ) {
                let (a, b, add) = (a.words[k16], b.descriptor(self.0.base()), u32::from(add));
                match REGISTERS {
                    $($registers => {
                        // SAFETY: as many registers as `REGISTERS` says.
                        let d = unsafe { &mut *(&raw mut d.values).cast::<[f32; $registers]>() };
                        if T::BF16 {
                            product_left!($n, "bf16", d, a, b, add, $($i)*);
                        } else {
                            product_left!($n, "f16", d, a, b, add, $($i)*);
                        }
                    })*
                    _ => panic!(),
                }
            }

            #[inline(always)]
            unsafe fn store_matrix4(&self, at: u32, [a, b, c, d]: [u32; 4]) {
                // SAFETY: the caller's promise.
                unsafe {
                    asm!("stmatrix.sync.aligned.m8n8.x4.shared.b16 [{}], {{{}, {}, {}, {}}};",
                        in(reg32) self.shared(at), in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
                }
            }

            #[inline(always)]
            fn wgmma_commit(&self) {
                // SAFETY: ends a group.
                unsafe { asm!("wgmma.commit_group.sync.aligned;", options(nostack)) }
            }

            #[inline(always)]
            fn wgmma_wait<const LEFT: u32>(&self) {
                // SAFETY: waits.
                unsafe { asm!("wgmma.wait_group.sync.aligned {};", const LEFT, options(nostack)) }
            }

            #[inline(always)]
            fn sums<'a, const REGISTERS: usize>(&self, d: &'a mut Accumulators<REGISTERS>) -> &'a mut [f32; REGISTERS] {
                match REGISTERS {
                    $($registers => {
                        // SAFETY: as many registers as `REGISTERS` says.
                        let d = unsafe { &mut *(&raw mut d.values).cast::<[f32; $registers]>() };
                        settle!(d, $($i)*);
                    })*
                    _ => panic!(),
                }
                &mut d.values
            }

            #[inline(always)]
            fn lefts<'a, const K16: usize>(&self, a: &'a mut Lefts<K16>) -> &'a mut [[u32; 4]; K16] {
                let mut k16 = 0;
                while k16 < K16 {
                    let words = &mut a.words[k16];
                    settle!(words, 0 1 2 3);
                    k16 += 1;
                }
                &mut a.words
            }
        }
    };
}

sizes! {
    4, "8": 0 1 2 3;
    8, "16": 0 1 2 3 4 5 6 7;
    16, "32": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15;
    32, "64": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31;
    48, "96": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47;
    64, "128": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63;
    96, "192": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95;
    128, "256": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95 96 97 98 99 100 101 102 103 104 105 106 107 108 109 110 111 112 113 114 115 116 117 118 119 120 121 122 123 124 125 126 127;
}
