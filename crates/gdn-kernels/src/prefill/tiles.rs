//! Tiles of accumulators, and how rows of them become the left side of a product: f16, each row brought into
//! range by a power of two.

use gdn_math::Lanes;

use super::{
    args::{CHUNK, OUT_RAISED, T_RAISED, padded},
    element::power,
};
use crate::gpu::{Bytes16, F16, TensorCore};

/// 8 columns of 16 rows: of rows g and g + 8 columns 2t and 2t + 1.
pub(super) type Tile = [f32; 4];

/// What the tokens of a chunk make: 8 tiles.
pub(super) type Tokens = [Tile; 8];

/// What a row of S, and what a chunk makes of it, are multiplied with to be in the range of f16, and what
/// brings them back.
///
/// A row's absolute numbers add up to `sum`, and values times beta are at most `value`. Keys and queries have
/// a norm of at most 1, beta is at most 2, and a token changes S by a contraction and its value. So no number
/// of S, X, U or O is larger than 2 sum + 2 * 64 value. U and O are made [`T_RAISED`].
#[inline(always)]
pub(super) fn scale(sum: f32, value: f32) -> [f32; 2] {
    let (up, down) = power(Lanes::mul_add(sum, 2.0 * T_RAISED, value * (130.0 * T_RAISED)));
    [up, down]
}

/// The inverse of a power of two from 2^-126 to 2^126.
#[inline(always)]
pub(super) fn inverse(power: f32) -> f32 {
    f32::from_bits((254 << 23) - power.to_bits())
}

/// The absolute numbers of the lane's two rows of some tiles, added up over the four lanes that have them.
#[inline(always)]
pub(super) fn sums(gpu: &impl TensorCore, tiles: &[Tile]) -> [f32; 2] {
    // By columns too: what does not wait for the number before.
    let mut sums = [0.0f32; 4];
    let mut tile = 0;
    while tile < tiles.len() {
        let mut i = 0;
        while i < 4 {
            sums[i] += tiles[tile][i].abs();
            i += 1;
        }
        tile += 1;
    }
    let [a, b, c, d] = sums;
    [gpu.sum::<4>(a + b), gpu.sum::<4>(c + d)]
}

/// The same, added up by atoms of 8 tiles, one after the other.
#[inline(always)]
pub(super) fn sums_by_atoms(gpu: &impl TensorCore, tiles: &[Tile]) -> [f32; 2] {
    let mut sum = [0.0; 2];
    let mut from = 0;
    while from < tiles.len() {
        let count = if tiles.len() - from < 8 { tiles.len() - from } else { 8 };
        let (_, rest) = tiles.split_at(from);
        let [a, b] = sums(gpu, rest.split_at(count).0);
        sum = [sum[0] + a, sum[1] + b];
        from += 8;
    }
    sum
}

/// What brings a row of S back, of the sums that are made with what is left of U at the chunk's end, times
/// `lift`.
#[inline(always)]
pub(super) fn down_of_update(down: f32, lift: f32) -> f32 {
    down * inverse(lift * T_RAISED)
}

/// Two tiles side by side as the left side of a product, each row times its factor.
#[inline(always)]
pub(super) fn packed(gpu: &impl TensorCore, low: &Tile, high: &Tile, factors: [f32; 2]) -> [u32; 4] {
    let two = |tile: &Tile, r: usize| gpu.pack_f16(tile[2 * r] * factors[r], tile[2 * r + 1] * factors[r]);
    [two(low, 0), two(low, 1), two(high, 0), two(high, 1)]
}

/// Two numbers as f16, and what is lost by that: together some 22 bits.
#[inline(always)]
pub(super) fn split(gpu: &impl TensorCore, [a, b]: [f32; 2]) -> [u32; 2] {
    let kept = gpu.pack_f16(a, b);
    let [kept_a, kept_b] = gpu.unpack_f16(kept);
    [kept, gpu.pack_f16(a - kept_a, b - kept_b)]
}

/// What the tokens of a chunk make as the left sides of products.
#[inline(always)]
pub(super) fn lefts(gpu: &impl TensorCore, tokens: &Tokens) -> [[u32; 4]; 4] {
    scaled(gpu, tokens, [1.0; 2])
}

/// 64 columns as the left sides of products, each row times its factor.
#[inline(always)]
pub(super) fn scaled(gpu: &impl TensorCore, tiles: &[Tile; 8], factors: [f32; 2]) -> [[u32; 4]; 4] {
    let mut left = [[0; 4]; 4];
    let mut k16 = 0;
    while k16 < 4 {
        left[k16] = packed(gpu, &tiles[2 * k16], &tiles[2 * k16 + 1], factors);
        k16 += 1;
    }
    left
}

/// What is left of S at the chunk's end: apart from what its tokens make, which comes later.
#[inline(always)]
pub(super) fn faded(tiles: &mut [Tile], all: f32) {
    let mut tile = 0;
    while tile < tiles.len() {
        let mut i = 0;
        while i < 4 {
            tiles[tile][i] *= all;
            i += 1;
        }
        tile += 1;
    }
}

/// Makes X of what 16 keys find in S, in two tiles: `words` are their values, as `ldmatrix` brings them,
/// `factors` is where those of the first begin for the lane, `up` what S is multiplied with.
///
/// # Safety
/// As [`factor`].
#[inline(always)]
pub(super) unsafe fn corrected(
    gpu: &impl TensorCore,
    words: [u32; 4],
    factors: u32,
    up: [f32; 2],
    found: &mut [Tile],
) {
    let mut tile = 0;
    while tile < 2 {
        let two = [gpu.unpack_f16(words[2 * tile]), gpu.unpack_f16(words[2 * tile + 1])];
        let mut c = 0;
        while c < 2 {
            // SAFETY: the caller's promise.
            let [value, of_state, ..] = unsafe { factor(gpu, factors, tile, c) };
            let mut r = 0;
            while r < 2 {
                let at = &mut found[tile][2 * r + c];
                *at = Lanes::mul_add(*at, of_state, value * two[r][c] * up[r]);
                r += 1;
            }
            c += 1;
        }
        tile += 1;
    }
}

/// What queries find in S, times what is left of it at theirs, as many times itself as P
/// makes of U.
///
/// # Safety
/// As [`factor`].
#[inline(always)]
pub(super) unsafe fn from_start(gpu: &impl TensorCore, factors: u32, o: &mut Tokens) {
    let mut tile = 0;
    while tile < 8 {
        let mut c = 0;
        while c < 2 {
            // SAFETY: the caller's promise.
            let [.., from_start, _] = unsafe { factor(gpu, factors, tile, c) };
            o[tile][c] *= from_start;
            o[tile][c + 2] *= from_start;
            c += 1;
        }
        tile += 1;
    }
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

/// What is left of S at the chunk's end, of the factors that begin at `factors`.
///
/// # Safety
/// As [`factor`].
#[inline(always)]
pub(super) unsafe fn left_of_state(gpu: &impl TensorCore, factors: u32) -> f32 {
    // SAFETY: the caller's promise.
    f32::from_bits(unsafe { gpu.load_shared4(factors + (CHUNK - 1) * 16 + 8) }) * (1.0 / OUT_RAISED)
}

/// Where the lane's row of four 8 x 8 matrices begins that are 16 x 16 of a right side: first along the sum,
/// then along its columns.
#[inline(always)]
pub(super) fn right(gpu: &impl TensorCore, row_bytes: u32) -> u32 {
    let (matrix, line) = (gpu.lane() / 8, gpu.lane() % 8);
    (matrix / 2 * 8 + line) * row_bytes + matrix % 2 * 16
}

/// Adds the product with 16 x 16 of a right side to two tiles.
#[inline(always)]
fn product(
    gpu: &impl TensorCore,
    left: [u32; 4],
    [b0, b1, b2, b3]: [u32; 4],
    sums: &mut Tokens,
    pair: usize,
) {
    sums[2 * pair] = gpu.mma::<F16>(left, [b0, b1], sums[2 * pair]);
    sums[2 * pair + 1] = gpu.mma::<F16>(left, [b2, b3], sums[2 * pair + 1]);
}

/// Adds the products of a lower triangle's rows, padded at `at`, with 64 columns of a left side to `sums`.
///
/// # Safety
/// They are in shared memory, for all to see.
#[inline(always)]
pub(super) unsafe fn by_triangle(gpu: &impl TensorCore, left: &[[u32; 4]; 4], at: u32, sums: &mut Tokens) {
    let row_bytes = padded(CHUNK);
    let at = at + right(gpu, row_bytes);
    let mut k16 = 0;
    while k16 < 4 {
        let mut pair = k16;
        while pair < 4 {
            let at = at + pair as u32 * 16 * row_bytes + k16 as u32 * 32;
            // SAFETY: the caller's promise.
            let right = unsafe { gpu.load_matrix4::<false>(at) };
            product(gpu, left[k16], right, sums, pair);
            pair += 1;
        }
        k16 += 1;
    }
}

/// Products of S, whose left sides lie at `left` for the lane, with 64 rows of `8 * TILES` numbers, padded at
/// `at`.
///
/// # Safety
/// They are in shared memory, for all to see.
#[inline(always)]
pub(super) unsafe fn of_state<const TILES: usize>(gpu: &impl TensorCore, left: u32, at: u32) -> Tokens {
    let row_bytes = padded(8 * TILES as u32);
    let at = at + right(gpu, row_bytes);
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
