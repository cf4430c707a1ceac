//! Tiles of accumulators, and how rows of them become the left side of a product: f16, each row brought into
//! range by a power of two.

use super::element::power;
use crate::gpu::{Bytes16, F16, TensorCore};

/// 8 columns of 16 rows: of rows g and g + 8 columns 2t and 2t + 1.
pub(super) type Tile = [f32; 4];

/// What the tokens of a chunk make: 8 tiles.
pub(super) type Tokens = [Tile; 8];

/// Every tile, and of it both of the lane's rows.
#[inline(always)]
pub(super) fn each<const TILES: usize>(mut f: impl FnMut(usize, usize)) {
    let mut tile = 0;
    while tile < TILES {
        f(tile, 0);
        f(tile, 1);
        tile += 1;
    }
}

/// Powers of two that bring the lane's two rows of some tiles, which are `units` times something, into the
/// range of f16, and those that bring them back to that something. They depend on it alone.
#[inline(always)]
pub(super) fn scales<const TILES: usize>(
    gpu: &impl TensorCore,
    tiles: &[Tile; TILES],
    units: [f32; 2],
) -> ([f32; 2], [f32; 2]) {
    let mut largest = [0.0f32; 2];
    let mut tile = 0;
    while tile < TILES {
        let mut i = 0;
        while i < 4 {
            largest[i / 2] = largest[i / 2].max(tiles[tile][i].abs());
            i += 1;
        }
        tile += 1;
    }
    let (mut up, mut down) = ([0.0; 2], [0.0; 2]);
    let mut r = 0;
    while r < 2 {
        let mut mask = 1;
        while mask < 4 {
            largest[r] = largest[r].max(f32::from_bits(gpu.shuffle_xor(largest[r].to_bits(), mask)));
            mask *= 2;
        }
        (up[r], down[r]) = power(largest[r] * inverse(units[r]));
        up[r] *= inverse(units[r]);
        r += 1;
    }
    (up, down)
}

/// The inverse of a power of two from 2^-126 to 2^126.
#[inline(always)]
pub(super) fn inverse(power: f32) -> f32 {
    f32::from_bits((254 << 23) - power.to_bits())
}

/// Two tiles side by side as the left side of a product, each row times its factor.
#[inline(always)]
pub(super) fn packed(gpu: &impl TensorCore, low: &Tile, high: &Tile, factors: [f32; 2]) -> [u32; 4] {
    let two = |tile: &Tile, r: usize| gpu.pack_f16(tile[2 * r] * factors[r], tile[2 * r + 1] * factors[r]);
    [two(low, 0), two(low, 1), two(high, 0), two(high, 1)]
}

/// Adds the product with 16 x 16 of a right side to two tiles.
#[inline(always)]
pub(super) fn product(
    gpu: &impl TensorCore,
    left: [u32; 4],
    [b0, b1, b2, b3]: [u32; 4],
    sums: &mut Tokens,
    pair: usize,
) {
    sums[2 * pair] = gpu.mma::<F16>(left, [b0, b1], sums[2 * pair]);
    sums[2 * pair + 1] = gpu.mma::<F16>(left, [b2, b3], sums[2 * pair + 1]);
}

/// Where the lane's row of four 8 x 8 matrices begins that are 16 x 16 of a right side: first along the sum,
/// then along its columns.
#[inline(always)]
pub(super) fn right(gpu: &impl TensorCore, row_bytes: u32) -> u32 {
    let (matrix, line) = (gpu.lane() / 8, gpu.lane() % 8);
    (matrix / 2 * 8 + line) * row_bytes + matrix % 2 * 16
}

/// The same of a right side whose rows lie along the sum.
#[inline(always)]
pub(super) fn right_transposed(gpu: &impl TensorCore, row_bytes: u32) -> u32 {
    let (matrix, line) = (gpu.lane() / 8, gpu.lane() % 8);
    (matrix % 2 * 8 + line) * row_bytes + matrix / 2 * 16
}

/// The factors of a token, which begin at `factors` for the lane: of tile `tile` its first or second column.
///
/// # Safety
/// They are in shared memory, for all to see.
#[inline(always)]
pub(super) unsafe fn factor(gpu: &impl TensorCore, factors: u32, tile: usize, column: usize) -> [f32; 4] {
    let at = factors + tile as u32 * 128 + column as u32 * 16;
    // SAFETY: the caller's promise.
    let Bytes16(words) = unsafe { gpu.load_shared16(at) };
    words.map(f32::from_bits)
}

/// Adds the products of a lower triangle's rows, which begin at `at` for the lane, with 64 columns of a left
/// side to `sums`.
///
/// # Safety
/// They are in shared memory, for all to see.
#[inline(always)]
pub(super) unsafe fn by_triangle(
    gpu: &impl TensorCore,
    left: impl Fn(usize) -> [u32; 4],
    at: u32,
    row_bytes: u32,
    sums: &mut Tokens,
) {
    let mut k16 = 0;
    while k16 < 4 {
        let left = left(k16);
        let mut pair = k16;
        while pair < 4 {
            let at = at + pair as u32 * 16 * row_bytes + k16 as u32 * 32;
            // SAFETY: the caller's promise.
            let right = unsafe { gpu.load_matrix4::<false>(at) };
            product(gpu, left, right, sums, pair);
            pair += 1;
        }
        k16 += 1;
    }
}

/// Products of S, whose left sides lie at `left` for the lane, with 64 rows that begin at `at` for it.
///
/// # Safety
/// They are in shared memory, for all to see.
#[inline(always)]
pub(super) unsafe fn of_state<const TILES: usize>(
    gpu: &impl TensorCore,
    left: u32,
    at: u32,
    row_bytes: u32,
) -> Tokens {
    let mut sums = [[0.0; 4]; 8];
    let mut k16 = 0;
    while k16 < TILES / 2 {
        // SAFETY: the caller's promise.
        unsafe {
            let Bytes16(left) = gpu.load_shared16(left + k16 as u32 * 512);
            let mut pair = 0;
            while pair < 4 {
                let at = at + pair as u32 * 16 * row_bytes + k16 as u32 * 32;
                product(gpu, left, gpu.load_matrix4::<false>(at), &mut sums, pair);
                pair += 1;
            }
        }
        k16 += 1;
    }
    sums
}
