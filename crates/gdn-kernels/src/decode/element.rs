//! Elements of any dtype as f32: of a state by compile time, of everything else by a number in the arguments.

use gdn_math::element::{bf16_of_f32, f16_of_f32, f32_of_bf16, f32_of_f16};

use super::args;
use crate::gpu::{Bf16, Bytes16, F16, Gpu};

/// The element type of a state.
pub trait Element {
    /// Bytes of one.
    const BYTES: u32;

    /// Element `i` of those in 16 bytes.
    fn of(bytes: Bytes16, i: usize) -> f32;

    /// What is left of a number that is stored and read again.
    fn rounded(value: f32) -> f32;

    /// `LEN` numbers, as many as there are in 16 bytes, to nearest.
    fn packed<const LEN: usize>(values: &[f32; LEN]) -> Bytes16;

    /// Reads one.
    ///
    /// # Safety
    /// It is readable, at a multiple of its size.
    unsafe fn load(gpu: &impl Gpu, address: u64) -> f32;

    /// Writes one, to nearest.
    ///
    /// # Safety
    /// It is writable, at a multiple of its size, and no other thread's.
    unsafe fn store(gpu: &impl Gpu, address: u64, value: f32);
}

/// f32.
pub struct F32;

impl Element for F32 {
    const BYTES: u32 = 4;

    #[inline(always)]
    fn of(Bytes16(words): Bytes16, i: usize) -> f32 {
        f32::from_bits(words[i % 4])
    }

    #[inline(always)]
    fn rounded(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    fn packed<const LEN: usize>(values: &[f32; LEN]) -> Bytes16 {
        let mut words = [0; 4];
        let mut i = 0;
        while i < LEN {
            words[i % 4] = values[i].to_bits();
            i += 1;
        }
        Bytes16(words)
    }

    #[inline(always)]
    unsafe fn load(gpu: &impl Gpu, address: u64) -> f32 {
        // SAFETY: the caller's promise, here and below.
        f32::from_bits(unsafe { gpu.load4(address) })
    }

    #[inline(always)]
    unsafe fn store(gpu: &impl Gpu, address: u64, value: f32) {
        // SAFETY: as above.
        unsafe { gpu.store4(address, value.to_bits()) }
    }
}

macro_rules! of_16_bits {
    ($($element:ty, $widen:ident, $narrow:ident;)*) => {$(
        impl Element for $element {
            const BYTES: u32 = 2;

            #[inline(always)]
            fn of(Bytes16(words): Bytes16, i: usize) -> f32 {
                $widen((words[i / 2 % 4] >> (i % 2 * 16)) as u16)
            }

            #[inline(always)]
            fn rounded(value: f32) -> f32 {
                $widen($narrow(value))
            }

            #[inline(always)]
            fn packed<const LEN: usize>(values: &[f32; LEN]) -> Bytes16 {
                let mut words = [0; 4];
                let mut i = 0;
                while i < LEN {
                    words[i / 2 % 4] |= u32::from($narrow(values[i])) << (i % 2 * 16);
                    i += 1;
                }
                Bytes16(words)
            }

            #[inline(always)]
            unsafe fn load(gpu: &impl Gpu, address: u64) -> f32 {
                // SAFETY: the caller's promise, here and below.
                $widen(unsafe { gpu.load2(address) })
            }

            #[inline(always)]
            unsafe fn store(gpu: &impl Gpu, address: u64, value: f32) {
                // SAFETY: as above.
                unsafe { gpu.store2(address, $narrow(value)) }
            }
        }
    )*};
}

of_16_bits! {
    F16, f32_of_f16, f16_of_f32;
    Bf16, f32_of_bf16, bf16_of_f32;
}

/// Bytes of an element.
#[inline(always)]
pub(super) fn size(dtype: u32) -> u32 {
    if dtype == args::F32 { 4 } else { 2 }
}

/// Reads an element of a dtype that the arguments name.
///
/// # Safety
/// That of [`Element::load`].
#[inline(always)]
pub(super) unsafe fn load(gpu: &impl Gpu, dtype: u32, address: u64) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        if dtype == args::F32 {
            return F32::load(gpu, address);
        }
        let bits = gpu.load2(address);
        if dtype == args::BF16 { f32_of_bf16(bits) } else { f32_of_f16(bits) }
    }
}

/// Writes an element of a dtype that the arguments name.
///
/// # Safety
/// That of [`Element::store`].
#[inline(always)]
pub(super) unsafe fn store(gpu: &impl Gpu, dtype: u32, address: u64, value: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            args::F32 => F32::store(gpu, address, value),
            args::BF16 => gpu.store2(address, bf16_of_f32(value)),
            _ => gpu.store2(address, f16_of_f32(value)),
        }
    }
}
