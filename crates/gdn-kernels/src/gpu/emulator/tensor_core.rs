//! [`TensorCore`] on the host.

use gdn_math::element::{f16_of_f32, f32_of_f16};

use super::{
    Thread, WARP,
    schedule::Company,
    sums::{Factor, Model},
};
use crate::gpu::{Float16, TensorCore};

/// The two numbers in a word.
pub(super) fn pair<T: Float16>(word: u32) -> [Factor; 2] {
    [word as u16, (word >> 16) as u16].map(Factor::new::<T>)
}

type Product = ([u32; 4], [u32; 2], [f32; 4]);

fn product<T: Float16>(_: &Company<'_>, registers: &mut [&mut Product]) {
    let mut a = [[Factor::ZERO; 16]; 16];
    let mut b = [[Factor::ZERO; 16]; 8];
    for (lane, registers) in registers.iter().enumerate() {
        let (g, t) = (lane / 4, lane % 4);
        for (i, word) in registers.0.iter().enumerate() {
            let (row, k) = (g + 8 * (i % 2), 2 * t + 8 * (i / 2));
            a[row][k..k + 2].copy_from_slice(&pair::<T>(*word));
        }
        for (i, word) in registers.1.iter().enumerate() {
            let k = 2 * t + 8 * i;
            b[g][k..k + 2].copy_from_slice(&pair::<T>(*word));
        }
    }
    for (lane, registers) in registers.iter_mut().enumerate() {
        let (g, t) = (lane / 4, lane % 4);
        for (i, sum) in registers.2.iter_mut().enumerate() {
            let (row, column) = (g + 8 * (i / 2), 2 * t + i % 2);
            *sum = Model::HARDWARE.dot(&a[row], &b[column], *sum);
        }
    }
}

type Matrices = (u32, [u32; 4]);

/// Reads `N` matrices.
fn load<const N: usize, const TRANSPOSED: bool>(company: &Company<'_>, registers: &mut [&mut Matrices]) {
    let &Company { cluster, block, first } = company;
    let mut shared = cluster.blocks[block].shared.borrow_mut();
    let clocks = cluster.clocks.borrow();
    let mut rows = [[[0u16; 8]; 8]; N];
    for (lane, registers) in registers.iter().enumerate().take(8 * N) {
        let (at, mut value) = (registers.0, [0; 16]);
        if let Err(why) = shared.load(&clocks, first + lane, at, &mut value) {
            panic!("{} loads a row of a matrix at {at} of shared memory, {why}", cluster.name(first + lane));
        }
        rows[lane / 8][lane % 8] =
            core::array::from_fn(|i| u16::from_ne_bytes([value[2 * i], value[2 * i + 1]]));
    }
    for (lane, registers) in registers.iter_mut().enumerate() {
        let (g, t) = (lane / 4, lane % 4);
        for (matrix, word) in rows.iter().zip(&mut registers.1) {
            let at = |i: usize| if TRANSPOSED { matrix[2 * t + i][g] } else { matrix[g][2 * t + i] };
            *word = u32::from(at(0)) | u32::from(at(1)) << 16;
        }
    }
}

impl TensorCore for Thread<'_> {
    fn pack_f16(&self, low: f32, high: f32) -> u32 {
        let [low, high] = [low, high].map(|x| if x.is_nan() { 0x7fff } else { f16_of_f32(x) });
        u32::from(low) | u32::from(high) << 16
    }

    fn unpack_f16(&self, two: u32) -> [f32; 2] {
        [two as u16, (two >> 16) as u16].map(f32_of_f16)
    }

    fn mma<T: Float16>(&self, a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
        let name = if T::BF16 { "a product of bfloat16" } else { "a product of half precision" };
        self.collective(WARP, name, (a, b, c), product::<T>).2
    }

    unsafe fn load_matrix4<const TRANSPOSED: bool>(&self, at: u32) -> [u32; 4] {
        let name = if TRANSPOSED { "a transposed load of four matrices" } else { "a load of four matrices" };
        self.collective(WARP, name, (at, [0; 4]), load::<4, TRANSPOSED>).1
    }

    unsafe fn load_matrix2<const TRANSPOSED: bool>(&self, at: u32) -> [u32; 2] {
        let name = if TRANSPOSED { "a transposed load of two matrices" } else { "a load of two matrices" };
        let [a, b, ..] = self.collective(WARP, name, (at, [0; 4]), load::<2, TRANSPOSED>).1;
        [a, b]
    }
}
