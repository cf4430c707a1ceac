//! [`Wgmma`]: products of larger matrices by four warps, on compute capability 9.0 alone (target `sm_90a`).

use super::{Float16, Hopper};

/// How a tile lies in shared memory: which 16-byte pieces of neighbouring rows change places, so that reads
/// by column meet all banks.
///
/// A row of the atom has 16, 32, 64 or 128 bytes, and 8 rows make an atom, which begins at a multiple of its
/// size. Bits 4 and up of an address are xored with bits 7 and up: with 128-byte rows piece `c` of row `r`
/// lies at `c ^ (r % 8)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Rows of 16 bytes, as they come.
    None,
    /// Rows of 32 bytes.
    Bytes32,
    /// Rows of 64 bytes.
    Bytes64,
    /// Rows of 128 bytes.
    Bytes128,
}

impl Swizzle {
    /// Bytes of a row of the atom.
    pub const fn row_bytes(self) -> u32 {
        match self {
            Self::None => 16,
            Self::Bytes32 => 32,
            Self::Bytes64 => 64,
            Self::Bytes128 => 128,
        }
    }

    /// Where what belongs at `at` lies.
    #[inline(always)]
    pub const fn place(self, at: u32) -> u32 {
        at ^ ((at >> 3) & (self.row_bytes() - 16))
    }

    const fn code(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Bytes128 => 1,
            Self::Bytes64 => 2,
            Self::Bytes32 => 3,
        }
    }
}

/// k runs along the rows of the atoms: the index that is summed over. What `mma.sync` calls row-major `a` and
/// column-major `b`.
pub const K_MAJOR: bool = false;
/// m of `a` or n of `b` runs along the rows of the atoms.
pub const OTHER_MAJOR: bool = true;

/// A matrix in shared memory, as `wgmma` takes it. Probed on a device with [`Swizzle::Bytes128`] alone, both
/// ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// First byte of the first atom.
    pub at: u32,
    /// Bytes from there to the first that is meant, a multiple of 16. Apart from `at`, so that what is known
    /// of it beforehand is added to a descriptor that was made once.
    pub offset: u32,
    /// Its atoms.
    pub swizzle: Swizzle,
    /// k-major: not used with a swizzle; without, bytes between the two halves of k16. Other-major: bytes
    /// from one stretch of rows of the atom (64 elements at 128 bytes) to the next along m or n.
    pub leading: u32,
    /// k-major: bytes from 8 rows of m or n to the next 8. Other-major: bytes from 8 k to the next 8.
    pub stride: u32,
}

impl Operand {
    /// A k-major tile whose rows are atoms of 128 bytes, 64 elements: rows `r` follow each other at 128
    /// bytes, 16-byte pieces swizzled.
    pub const fn k_major(at: u32) -> Self {
        Self { at, offset: 0, swizzle: Swizzle::Bytes128, leading: 16, stride: 1024 }
    }

    /// The same `bytes` further on: 32 for the next k16 of a k-major tile.
    #[inline(always)]
    #[must_use]
    pub const fn further(self, bytes: u32) -> Self {
        Self { offset: self.offset + bytes, ..self }
    }

    /// The descriptor, with the block's shared memory beginning at `base`.
    #[inline(always)]
    pub fn descriptor(self, base: u32) -> u64 {
        let field = |bytes: u32| (bytes >> 4) & 0x3fff;
        // Shared memory ends below 2^18: the sum stays within the field, and nothing is carried.
        let low = (field(base + self.at) | field(self.leading) << 16) + (self.offset >> 4);
        let high = field(self.stride) | self.swizzle.code() << 30;
        u64::from(low) | u64::from(high) << 32
    }
}

/// A thread's part of an accumulator of 64 x `N`, of which a warpgroup holds the whole: `N / 2` numbers.
///
/// Warp `w` of the four holds rows `16 * w` to `16 * w + 15`; lane `4 * g + t` of it, for `j` in `0..N / 8`,
/// at `4 * j`: rows `g, g, g + 8, g + 8` and columns `8 * j + 2 * t + [0, 1, 0, 1]`.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "emulator"), allow(dead_code))]
pub struct Accumulators<const REGISTERS: usize> {
    pub(super) values: [f32; REGISTERS],
    /// The emulator's: which product was the last to write them.
    pub(super) product: u64,
}

impl<const REGISTERS: usize> Accumulators<REGISTERS> {
    /// All of them zero.
    #[inline(always)]
    pub const fn zero() -> Self {
        Self::new([0.0; REGISTERS])
    }

    /// These.
    #[inline(always)]
    pub const fn new(values: [f32; REGISTERS]) -> Self {
        Self { values, product: 0 }
    }
}

/// A thread's part of left sides of products that are in registers, of which a warpgroup holds the whole: `K16`
/// matrices of 64 x 16, side by side along the sum.
///
/// Warp `w` of the four holds rows `16 * w` to `16 * w + 15` of each, as [`TensorCore::mma`](super::TensorCore::mma)
/// has its `a`.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "emulator"), allow(dead_code))]
pub struct Lefts<const K16: usize> {
    pub(super) words: [[u32; 4]; K16],
    /// The emulator's: as of [`Accumulators`].
    pub(super) product: u64,
}

impl<const K16: usize> Lefts<K16> {
    /// These.
    #[inline(always)]
    pub const fn new(words: [[u32; 4]; K16]) -> Self {
        Self { words, product: 0 }
    }
}

/// `wgmma`: asynchronous products by a warpgroup, threads `128 * g` to `128 * g + 127` of the block. All 128
/// come together.
///
/// [`Wgmma::wgmma_begin`], products, [`Wgmma::wgmma_commit`], [`Wgmma::wgmma_wait`], and then the sums can be
/// had. From a product to the wait for its group nobody writes its operands.
pub trait Wgmma: Hopper {
    /// Comes before the first product, and where registers of an accumulator or left side were written since,
    /// after [`Wgmma::sums`] or [`Wgmma::lefts`] of it.
    fn wgmma_begin(&self);
    /// `d = a b + d`, or `a b` where not `add`: m64, n = 2 * `REGISTERS` (8 registers to 128), k16, f32 sums,
    /// with `a` (64 x 16) and `b` (16 x n) of type `T`; `A_MAJOR` and `B_MAJOR` are [`K_MAJOR`] or
    /// [`OTHER_MAJOR`].
    ///
    /// # Safety
    /// Both operands lie within shared memory, written before a barrier that came after
    /// [`Hopper::fence_async`] or by bulk copies that were waited for.
    unsafe fn wgmma<T: Float16, const A_MAJOR: bool, const B_MAJOR: bool, const REGISTERS: usize>(
        &self,
        d: &mut Accumulators<REGISTERS>,
        a: Operand,
        b: Operand,
        add: bool,
    );
    /// The same with an `a` that is in registers, matrix `k16` of `a`; k-major.
    ///
    /// # Safety
    /// As [`Wgmma::wgmma`], for `b`.
    unsafe fn wgmma_left<T: Float16, const B_MAJOR: bool, const K16: usize, const REGISTERS: usize>(
        &self,
        d: &mut Accumulators<REGISTERS>,
        a: &mut Lefts<K16>,
        k16: usize,
        b: Operand,
        add: bool,
    );
    /// Writes four 8 x 8 matrices of 16-bit elements, as [`TensorCore::load_matrix4`](super::TensorCore::load_matrix4)
    /// reads them: all 32 lanes of a warp come together. Of matrix `k16` of a left side they are rows 0 to 7 and
    /// rows 8 to 15 of the warp's, then the same of its last 8 columns.
    ///
    /// # Safety
    /// That of [`Gpu::store_shared16`](super::Gpu::store_shared16), for all lanes.
    unsafe fn store_matrix4(&self, at: u32, words: [u32; 4]);
    /// Ends a group of products.
    fn wgmma_commit(&self);
    /// Waits until all groups but the `LEFT` latest are done.
    fn wgmma_wait<const LEFT: u32>(&self);
    /// The sums, of products that were waited for; and the place where what is written to them is written
    /// before what follows.
    fn sums<'a, const REGISTERS: usize>(
        &self,
        d: &'a mut Accumulators<REGISTERS>,
    ) -> &'a mut [f32; REGISTERS];
    /// The same of left sides: no product that was not waited for reads them, and what is written to them is
    /// written before what follows.
    fn lefts<'a, const K16: usize>(&self, a: &'a mut Lefts<K16>) -> &'a mut [[u32; 4]; K16];
}
