//! Elements of any dtype as f32: of a state by compile time, of everything else by a number in the arguments.

use gdn_math::element::f32_of_bf16;

use super::args;
use crate::gpu::{Bf16, Bytes16, F16, Gpu};

/// The element type of a state.
pub trait Element {
    /// Bytes of one.
    const BYTES: u32;
    /// Its number in the arguments.
    const DTYPE: u32;

    /// Element `i` of those in 16 bytes.
    fn of(gpu: &impl Gpu, bytes: Bytes16, i: usize) -> f32;

    /// `LEN` numbers, as many as there are in 16 bytes or fewer, to nearest.
    fn packed<const LEN: usize>(gpu: &impl Gpu, values: &[f32; LEN]) -> Bytes16;
}

/// f32.
pub struct F32;

impl Element for F32 {
    const BYTES: u32 = 4;
    const DTYPE: u32 = args::F32;

    #[inline(always)]
    fn of(_: &impl Gpu, Bytes16(words): Bytes16, i: usize) -> f32 {
        f32::from_bits(words[i % 4])
    }

    #[inline(always)]
    fn packed<const LEN: usize>(_: &impl Gpu, values: &[f32; LEN]) -> Bytes16 {
        let mut words = [0; 4];
        let mut i = 0;
        while i < LEN {
            words[i % 4] = values[i].to_bits();
            i += 1;
        }
        Bytes16(words)
    }
}

/// A half of a word.
#[inline(always)]
fn half(Bytes16(words): Bytes16, i: usize) -> u16 {
    (words[i / 2 % 4] >> (i % 2 * 16)) as u16
}

macro_rules! of_16_bits {
    ($($element:ty, $dtype:expr, |$gpu:ident, $bits:ident| $widen:expr, $narrow:ident;)*) => {$(
        impl Element for $element {
            const BYTES: u32 = 2;
            const DTYPE: u32 = $dtype;

            #[inline(always)]
            fn of($gpu: &impl Gpu, bytes: Bytes16, i: usize) -> f32 {
                let $bits = half(bytes, i);
                $widen
            }

            #[inline(always)]
            fn packed<const LEN: usize>(gpu: &impl Gpu, values: &[f32; LEN]) -> Bytes16 {
                let mut words = [0; 4];
                let mut i = 0;
                while i < LEN {
                    let high = if i + 1 < LEN { values[i + 1] } else { 0.0 };
                    words[i / 2 % 4] = gpu.$narrow(values[i], high);
                    i += 2;
                }
                Bytes16(words)
            }
        }
    )*};
}

of_16_bits! {
    F16, args::F16, |gpu, bits| gpu.f32_of_f16(bits), f16_pair;
    Bf16, args::BF16, |_gpu, bits| f32_of_bf16(bits), bf16_pair;
}

/// `index * stride`. In the wide kernels both have 31 bits, which makes it one multiplication.
#[inline(always)]
pub(super) fn far(is_wide: bool, index: u64, stride: u64) -> u64 {
    if is_wide { u64::from(index as u32) * u64::from(stride as u32) } else { index * stride }
}

/// Bytes of an element.
#[inline(always)]
pub(super) fn size(dtype: u32) -> u32 {
    if dtype == args::F32 { 4 } else { 2 }
}

/// The bits of an element of a dtype that the arguments name. Apart from [`number`], so that several can be
/// on their way.
///
/// # Safety
/// It is readable, at a multiple of its size.
#[inline(always)]
pub(super) unsafe fn bits(gpu: &impl Gpu, dtype: u32, address: u64) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { gpu.load4_or_2(address, dtype == args::F32) }
}

/// What these bits stand for. What each dtype would make of them is at hand before one is chosen: no branch.
#[inline(always)]
pub(super) fn number(gpu: &impl Gpu, dtype: u32, bits: u32) -> f32 {
    let (of_bf16, of_f16) = (f32_of_bf16(bits as u16), gpu.f32_of_f16(bits as u16));
    let half = if dtype == args::BF16 { of_bf16 } else { of_f16 };
    if dtype == args::F32 { f32::from_bits(bits) } else { half }
}

/// Reads an element of a dtype that the arguments name.
///
/// # Safety
/// That of [`bits`].
#[inline(always)]
pub(super) unsafe fn load(gpu: &impl Gpu, dtype: u32, address: u64) -> f32 {
    // SAFETY: the caller's promise.
    number(gpu, dtype, unsafe { bits(gpu, dtype, address) })
}

/// Writes an element of a dtype that the arguments name, to nearest.
///
/// # Safety
/// It is writable, at a multiple of its size, and no other thread's.
#[inline(always)]
pub(super) unsafe fn store(gpu: &impl Gpu, dtype: u32, address: u64, value: f32) {
    let (of_bf16, of_f16) = (gpu.bf16_pair(value, 0.0), gpu.f16_pair(value, 0.0));
    let half = if dtype == args::BF16 { of_bf16 } else { of_f16 };
    let bits = if dtype == args::F32 { value.to_bits() } else { half };
    // SAFETY: the caller's promise.
    unsafe { gpu.store4_or_2(address, bits, dtype == args::F32) }
}

/// Writes a bf16, to nearest.
///
/// # Safety
/// That of [`store`].
#[inline(always)]
pub(super) unsafe fn store_bf16(gpu: &impl Gpu, address: u64, value: f32) {
    // SAFETY: the caller's promise.
    unsafe { gpu.store2(address, gpu.bf16_pair(value, 0.0) as u16) }
}

/// An f32 of shared memory.
///
/// # Safety
/// That of [`Gpu::load_shared4`].
#[inline(always)]
pub(super) unsafe fn shared(gpu: &impl Gpu, at: u32) -> f32 {
    // SAFETY: the caller's promise.
    f32::from_bits(unsafe { gpu.load_shared4(at) })
}
