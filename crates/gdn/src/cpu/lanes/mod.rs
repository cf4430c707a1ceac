//! Registers of f32: [`Register`] is [`Lanes`] that go to memory and come from it. A file an instruction set.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::F32x8;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::F32x16;
use gdn_math::Lanes;
#[cfg(target_arch = "aarch64")]
pub(super) use neon::F32x4;

/// The widest register, in f32. Rows of scratch memory are a multiple of it long, so that every instruction
/// set walks them in whole registers.
pub(super) const WIDEST: usize = 16;

/// A register of f32 of one instruction set.
pub(super) trait Register: Lanes {
    /// Zeros.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn zero() -> Self;

    /// # Safety
    /// The machine has the instruction set, and `LEN` f32 are readable at `src`, at any alignment.
    unsafe fn load(src: *const f32) -> Self;

    /// # Safety
    /// `LEN` f32 are writable at `dst`, at any alignment.
    unsafe fn store(self, dst: *mut f32);

    /// # Safety
    /// The machine has the instruction set, and `LEN` bf16 are readable at `src`, at any alignment.
    unsafe fn load_bf16(src: *const u16) -> Self;

    /// # Safety
    /// `LEN` bf16 are writable at `dst`, at any alignment.
    unsafe fn store_bf16(self, dst: *mut u16);

    /// # Safety
    /// The machine has the instruction set, and `LEN` f16 are readable at `src`, at any alignment.
    unsafe fn load_f16(src: *const u16) -> Self;

    /// # Safety
    /// `LEN` f16 are writable at `dst`, at any alignment.
    unsafe fn store_f16(self, dst: *mut u16);

    /// Has the line of `src` brought near, where the instruction set can. Any address will do.
    #[inline(always)]
    fn prefetch(src: *const u8) {
        let _ = src;
    }

    /// The sum of the lanes, halves first: lane i and lane i + LEN/2, and so on.
    fn sum(self) -> f32;
}

/// A function that is generic over a [`Register`], compiled for the instruction set `$isa`, or for the scalar
/// one where this machine does not have it. With `tiled` it is generic over the rows and registers, too, of a
/// tile that a matrix product holds: with operands, no more than there are registers.
macro_rules! for_isa {
    ($isa:expr, $function:ident($($name:ident: $type:ty),*)) => {
        $crate::cpu::lanes::for_isa!(@ $isa, $function, [], [], [], [], ($($name: $type),*))
    };
    ($isa:expr, tiled $function:ident($($name:ident: $type:ty),*)) => {
        $crate::cpu::lanes::for_isa!(
            @ $isa, $function, [, 8, 2], [, 4, 2], [, 4, 4], [, 4, 4], ($($name: $type),*)
        )
    };
    (
        @ $isa:expr, $function:ident,
        [$($avx512:tt)*], [$($avx2:tt)*], [$($neon:tt)*], [$($scalar:tt)*],
        ($($name:ident: $type:ty),*)
    ) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        unsafe fn avx512($($name: $type),*) {
            // SAFETY: the caller's promises.
            unsafe { $function::<$crate::cpu::lanes::F32x16 $($avx512)*>($($name),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($name: $type),*) {
            // SAFETY: the caller's promises.
            unsafe { $function::<$crate::cpu::lanes::F32x8 $($avx2)*>($($name),*) }
        }
        #[cfg(target_arch = "aarch64")]
        #[target_feature(enable = "neon")]
        unsafe fn neon($($name: $type),*) {
            // SAFETY: the caller's promises.
            unsafe { $function::<$crate::cpu::lanes::F32x4 $($neon)*>($($name),*) }
        }
        unsafe fn scalar($($name: $type),*) {
            // SAFETY: the caller's promises.
            unsafe { $function::<f32 $($scalar)*>($($name),*) }
        }
        let isa: $crate::cpu::Isa = $isa;
        let function: unsafe fn($($type),*) = match isa {
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx512 if isa.is_available() => avx512,
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx2 if isa.is_available() => avx2,
            #[cfg(target_arch = "aarch64")]
            $crate::cpu::Isa::Neon if isa.is_available() => neon,
            _ => scalar,
        };
        function
    }};
}
pub(super) use for_isa;

/// An element of a tensor in memory.
pub(super) trait Element: Copy {
    /// Bytes of it.
    const BYTES: usize;

    /// # Safety
    /// As [`Register::load`], for this element.
    unsafe fn load<L: Register>(src: *const u8) -> L;

    /// # Safety
    /// As [`Register::store`], for this element.
    unsafe fn store<L: Register>(register: L, dst: *mut u8);

    /// # Safety
    /// One element is readable at `src`, at any alignment.
    unsafe fn read(src: *const u8) -> f32;

    /// # Safety
    /// One element is writable at `dst`, at any alignment.
    unsafe fn write(value: f32, dst: *mut u8);
}

/// 32 bits.
#[derive(Clone, Copy)]
pub(super) struct F32;
/// The upper 16 bits of an f32.
#[derive(Clone, Copy)]
pub(super) struct Bf16;
/// IEEE 754's 16 bits.
#[derive(Clone, Copy)]
pub(super) struct F16;

macro_rules! element {
    ($element:ty, $bits:ty, $load:ident, $store:ident, $read:expr, $write:expr) => {
        impl Element for $element {
            const BYTES: usize = size_of::<$bits>();

            #[inline(always)]
            unsafe fn load<L: Register>(src: *const u8) -> L {
                // SAFETY: the caller's promise.
                unsafe { L::$load(src.cast()) }
            }

            #[inline(always)]
            unsafe fn store<L: Register>(register: L, dst: *mut u8) {
                // SAFETY: the caller's promise.
                unsafe { register.$store(dst.cast()) }
            }

            #[inline(always)]
            unsafe fn read(src: *const u8) -> f32 {
                // SAFETY: the caller's promise.
                $read(unsafe { src.cast::<$bits>().read_unaligned() })
            }

            #[inline(always)]
            unsafe fn write(value: f32, dst: *mut u8) {
                // SAFETY: the caller's promise.
                unsafe { dst.cast::<$bits>().write_unaligned($write(value)) }
            }
        }
    };
}

element!(F32, f32, load, store, std::convert::identity, std::convert::identity);
element!(Bf16, u16, load_bf16, store_bf16, gdn_math::element::f32_of_bf16, gdn_math::element::bf16_of_f32);
element!(F16, u16, load_f16, store_f16, gdn_math::element::f32_of_f16, gdn_math::element::f16_of_f32);
