//! Tensors inside larger, poisoned allocations, and what is right of their elements.

use gdn::{Dtype, Exclusive, IndexType, Indices, Shared, Tensor};
use half::{bf16, f16};

/// Numbers that do not repeat: splitmix64.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to 1.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }
}

pub fn rounded(dtype: Dtype, x: f64) -> f64 {
    match dtype {
        Dtype::F32 => f64::from(x as f32),
        Dtype::F16 => f16::from_f64(x).to_f64(),
        Dtype::BF16 => bf16::from_f64(x).to_f64(),
    }
}

fn encode(dtype: Dtype, x: f64) -> Vec<u8> {
    match dtype {
        Dtype::F32 => (x as f32).to_ne_bytes().to_vec(),
        Dtype::F16 => f16::from_f64(x).to_ne_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f64(x).to_ne_bytes().to_vec(),
    }
}

fn decode(dtype: Dtype, bytes: &[u8]) -> f64 {
    match dtype {
        Dtype::F32 => f32::from_ne_bytes(bytes.try_into().unwrap()).into(),
        Dtype::F16 => f16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
        Dtype::BF16 => bf16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
    }
}

/// What fills every byte that an op must not touch, and every output before it is written. As bf16, f16 and
/// f32 a number that would be noticed.
const POISON: u8 = 0xA5;
const GUARD: usize = 192;

/// A tensor inside a larger, poisoned allocation.
#[derive(Clone)]
pub struct Memory<const D: usize> {
    pub bytes: Vec<u8>,
    start: usize,
    pub dtype: Dtype,
    pub sizes: [usize; D],
    strides: [usize; D],
}

impl<const D: usize> Memory<D> {
    /// Dims from the outermost in memory to the innermost, with so many elements between the end of one step
    /// of a dim and the next.
    pub fn poisoned(
        dtype: Dtype,
        sizes: [usize; D],
        order: [usize; D],
        gaps: [usize; D],
        misalignment: usize,
    ) -> Self {
        let mut strides = [0; D];
        let mut reach = 1;
        for dim in order.into_iter().rev() {
            strides[dim] = reach + gaps[dim];
            reach = strides[dim] * sizes[dim].max(1);
        }
        let bytes = vec![POISON; reach * dtype.size() + 2 * GUARD + 64];
        let start = GUARD + bytes[GUARD..].as_ptr().align_offset(64) + misalignment * dtype.size().min(2);
        Self { bytes, start, dtype, sizes, strides }
    }

    pub fn dense(dtype: Dtype, sizes: [usize; D]) -> Self {
        Self::poisoned(dtype, sizes, std::array::from_fn(|dim| dim), [0; D], 0)
    }

    fn at(&self, place: [usize; D]) -> std::ops::Range<usize> {
        let offset: usize = place.iter().zip(self.strides).map(|(i, stride)| i * stride).sum();
        let start = self.start + offset * self.dtype.size();
        start..start + self.dtype.size()
    }

    pub fn places(&self) -> impl Iterator<Item = [usize; D]> + use<D> {
        let sizes = self.sizes;
        (0..sizes.iter().product()).map(move |mut i: usize| {
            let mut place = [0; D];
            for dim in (0..D).rev() {
                (place[dim], i) = (i % sizes[dim], i / sizes[dim]);
            }
            place
        })
    }

    pub fn get(&self, place: [usize; D]) -> f64 {
        decode(self.dtype, &self.bytes[self.at(place)])
    }

    pub fn set(&mut self, place: [usize; D], x: f64) {
        let range = self.at(place);
        self.bytes[range].copy_from_slice(&encode(self.dtype, x));
    }

    pub fn fill(mut self, mut value: impl FnMut([usize; D]) -> f64) -> Self {
        for place in self.places() {
            let x = value(place);
            self.set(place, x);
        }
        self
    }

    /// All elements, last dim fastest.
    pub fn all(&self) -> Vec<f64> {
        self.places().map(|place| self.get(place)).collect()
    }

    pub fn view(&self) -> Tensor<Shared<'_>, D> {
        // SAFETY: the elements lie within `bytes`, borrowed as long as the view.
        unsafe { Tensor::from_raw(self.bytes.as_ptr().add(self.start), self.dtype, self.sizes, self.strides) }
            .unwrap()
    }

    pub fn view_mut(&mut self) -> Tensor<Exclusive<'_>, D> {
        let at = self.bytes[self.start..].as_mut_ptr();
        // SAFETY: the elements lie within `bytes`, borrowed exclusively as long as the view.
        unsafe { Tensor::from_raw_mut(at, self.dtype, self.sizes, self.strides) }.unwrap()
    }

    /// That no byte but those of elements, and of those only the `changed` ones, differs from what was there
    /// `before`.
    pub fn check_untouched(&self, before: &Self, name: &str, changed: impl Fn([usize; D]) -> bool) {
        let mut own = vec![false; self.bytes.len()];
        for place in self.places().filter(|place| changed(*place)) {
            own[self.at(place)].fill(true);
        }
        for (i, own) in own.into_iter().enumerate() {
            assert!(
                own || self.bytes[i] == before.bytes[i],
                "byte {i} of {name} was written, and is not the call's"
            );
        }
    }
}

impl Memory<2> {
    /// So many rows, these again and again.
    #[allow(dead_code, reason = "for measurements on GPUs")]
    pub fn repeated(&self, rows: usize) -> Self {
        let mut all = Self::dense(self.dtype, [rows, self.sizes[1]]);
        let bytes = self.sizes[1] * self.dtype.size();
        for row in 0..rows {
            let (from, to) = (self.at([row % self.sizes[0], 0]).start, all.at([row, 0]).start);
            all.bytes[to..to + bytes].copy_from_slice(&self.bytes[from..from + bytes]);
        }
        all
    }
}

/// Index data of either type.
#[derive(Clone, Debug)]
pub struct Numbers {
    pub narrow: Vec<i32>,
    pub wide: Vec<i64>,
    pub index_type: IndexType,
}

impl Numbers {
    pub fn new(data: &[i64], index_type: IndexType) -> Self {
        Self { narrow: data.iter().map(|x| *x as i32).collect(), wide: data.to_vec(), index_type }
    }

    pub fn view<const D: usize>(&self, sizes: [usize; D]) -> Indices<Shared<'_>, D> {
        match self.index_type {
            IndexType::I32 => Indices::new(&self.narrow, sizes).unwrap(),
            _ => Indices::new(&self.wide, sizes).unwrap(),
        }
    }
}

/// The norm of the difference as a share of the norm of what is right.
pub fn relative(got: &[f64], right: &[f64]) -> f64 {
    assert_eq!(got.len(), right.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(right).map(|(x, y)| x - y));
    let size = norm(&mut right.iter().copied());
    if error == 0.0 { 0.0 } else { error / size.max(f64::MIN_POSITIVE) }
}
