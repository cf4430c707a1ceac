//! [`TensorCore`]: products of small matrices by a warp.

use super::Warp;

/// The type of what is multiplied: 16-bit floating-point numbers, two in a word, the first in the low half.
pub trait Float16 {
    /// Whether it is bfloat16, else IEEE binary16.
    const BF16: bool;
}

/// bfloat16.
#[derive(Clone, Copy, Debug)]
pub struct Bf16;

/// IEEE binary16.
#[derive(Clone, Copy, Debug)]
pub struct F16;

impl Float16 for Bf16 {
    const BF16: bool = true;
}

impl Float16 for F16 {
    const BF16: bool = false;
}

/// `mma.sync` and `ldmatrix`. All 32 lanes come together.
///
/// Lane `l` is `4 * g + t`. Of a 16 x 8 accumulator `d` it holds rows `g` and `g + 8`, columns `2 * t` and `2
/// * t + 1`: `[(g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)]`. Of the 16 x 16 matrix `a` it holds, two elements
/// a word, columns `2t, 2t+1` of rows `g` and `g + 8`, then columns `2t+8, 2t+9` of both. Of the 16 x 8
/// matrix `b` it holds column `g`: rows `2t, 2t+1`, then `2t+8, 2t+9`.
pub trait TensorCore: Warp {
    /// `d = a b + c`, m16n8k16, in f32, with `a` and `b` of type `T`.
    ///
    /// The products are exact. An H100 brings all 16 and `c` to the largest exponent among them, cuts off
    /// what lies below two bits past an f32, adds, and cuts the sum to an f32: `docs/gpu-kernels.md`.
    fn mma<T: Float16>(&self, a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4];

    /// Two f16 in a word, each to nearest, ties to even; NaN becomes `0x7fff`.
    fn pack_f16(&self, low: f32, high: f32) -> u32;
    /// The two f16 of a word, the low one first.
    fn unpack_f16(&self, two: u32) -> [f32; 2];

    /// Reads four 8 x 8 matrices of 16-bit elements. Lane `8 * m + r` says where row `r` of matrix `m` is: 16
    /// bytes of shared memory. Of each matrix lane `4 * g + t` gets columns `2t, 2t+1` of row `g`; with
    /// `TRANSPOSED`, rows `2t, 2t+1` of column `g`.
    ///
    /// # Safety
    /// That of [`Gpu::load_shared16`](super::Gpu::load_shared16), for all lanes.
    unsafe fn load_matrix4<const TRANSPOSED: bool>(&self, at: u32) -> [u32; 4];
    /// As [`TensorCore::load_matrix4`], two matrices, whose rows lanes 0 to 15 name. The others' `at` is not
    /// used.
    ///
    /// # Safety
    /// That of [`TensorCore::load_matrix4`].
    unsafe fn load_matrix2<const TRANSPOSED: bool>(&self, at: u32) -> [u32; 2];
}
