//! Tensors with guards: what every test of the op needs.

#![allow(dead_code, reason = "each test file is a crate of its own and uses its part")]

use gdn::{Heads, Packed, Rows, RowsMut, Unpacked};

/// What fills every byte that an op must not touch, and every output before it is written.
const POISON: u8 = 0xA5;
/// Guard bytes before and after every tensor.
const GUARD: usize = 160;

/// How one tensor lies in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape {
    /// Elements between the end of a row and the start of the next.
    pub padding: usize,
    /// Bytes past a cache line at which the tensor begins.
    pub misalignment: usize,
}

/// A tensor inside a larger, poisoned allocation.
pub struct Tensor {
    memory: Vec<u8>,
    start: usize,
    num_rows: usize,
    features: usize,
    stride: usize,
    element_size: usize,
}

impl Tensor {
    pub fn poisoned(num_rows: usize, features: usize, element_size: usize, shape: Shape) -> Self {
        let stride = features + shape.padding;
        let memory = vec![POISON; num_rows * stride * element_size + 2 * GUARD + 128];
        let start = GUARD + memory[GUARD..].as_ptr().align_offset(64) + shape.misalignment;
        Self { memory, start, num_rows, features, stride, element_size }
    }

    /// Every byte of every row from a counter that does not repeat within any row.
    pub fn numbered(num_rows: usize, features: usize, element_size: usize, shape: Shape, seed: u64) -> Self {
        let mut tensor = Self::poisoned(num_rows, features, element_size, shape);
        let mut state = seed;
        for byte in tensor.row_bytes_mut() {
            // splitmix64: a value for each byte, no period in sight.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            *byte = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb).to_be_bytes()[0];
        }
        tensor
    }

    fn row_bytes_mut(&mut self) -> impl Iterator<Item = &mut u8> {
        let (row, stride) = (self.features * self.element_size, self.stride * self.element_size);
        let rows = &mut self.memory[self.start..][..self.num_rows * stride];
        rows.chunks_mut(stride.max(1)).flat_map(move |chunk| &mut chunk[..row])
    }

    pub fn rows(&self) -> Rows<'_> {
        let Self { num_rows, features, stride, element_size, .. } = *self;
        // SAFETY: `num_rows` strides lie within `memory` from `start` on, borrowed as long as the view.
        unsafe {
            Rows::from_raw(self.memory[self.start..].as_ptr(), element_size, num_rows, features, stride)
        }
        .expect("a valid shape")
    }

    pub fn rows_mut(&mut self) -> RowsMut<'_> {
        let Self { num_rows, features, stride, element_size, .. } = *self;
        let ptr = self.memory[self.start..].as_mut_ptr();
        // SAFETY: as above, borrowed exclusively.
        unsafe { RowsMut::from_raw(ptr, element_size, num_rows, features, stride) }.expect("a valid shape")
    }

    /// That nothing was written before, between and after the rows.
    pub fn assert_guards(&self, what: &str) {
        let (row, stride) = (self.features * self.element_size, self.stride * self.element_size);
        let end = self.start + self.num_rows * stride;
        let outside = self.memory[..self.start].iter().chain(&self.memory[end..]);
        let between = self.memory[self.start..end].chunks(stride.max(1)).flat_map(|chunk| &chunk[row..]);
        assert!(outside.chain(between).all(|byte| *byte == POISON), "{what}: written outside its rows");
    }

    pub fn assert_untouched(&self, what: &str) {
        assert!(self.memory.iter().all(|byte| *byte == POISON), "{what}: written");
    }
}

/// The six tensors of the op.
pub struct Case {
    pub mixed_qkvz: Tensor,
    pub mixed_ba: Tensor,
    pub mixed_qkv: Tensor,
    pub z: Tensor,
    pub b: Tensor,
    pub a: Tensor,
}

impl Case {
    /// Packed tensors full of numbers, unpacked ones full of poison. `shapes` in the order of the fields.
    pub fn packed(heads: &Heads, num_rows: usize, sizes: [usize; 2], shapes: [Shape; 6]) -> Self {
        let hv = heads.num_v_heads();
        let [qkvz, ba] = sizes;
        Self {
            mixed_qkvz: Tensor::numbered(num_rows, heads.qkvz_features(), qkvz, shapes[0], 1),
            mixed_ba: Tensor::numbered(num_rows, heads.ba_features(), ba, shapes[1], 2),
            mixed_qkv: Tensor::poisoned(num_rows, heads.qkv_features(), qkvz, shapes[2]),
            z: Tensor::poisoned(num_rows, heads.z_features(), qkvz, shapes[3]),
            b: Tensor::poisoned(num_rows, hv, ba, shapes[4]),
            a: Tensor::poisoned(num_rows, hv, ba, shapes[5]),
        }
    }

    /// Packed tensors full of poison again, as outputs of a merge.
    pub fn poison_packed(&mut self, heads: &Heads, num_rows: usize, sizes: [usize; 2], shapes: [Shape; 2]) {
        self.mixed_qkvz = Tensor::poisoned(num_rows, heads.qkvz_features(), sizes[0], shapes[0]);
        self.mixed_ba = Tensor::poisoned(num_rows, heads.ba_features(), sizes[1], shapes[1]);
    }

    pub fn read_packed(&self) -> Packed<Rows<'_>> {
        Packed { mixed_qkvz: self.mixed_qkvz.rows(), mixed_ba: self.mixed_ba.rows() }
    }

    pub fn read_unpacked(&self) -> Unpacked<Rows<'_>> {
        Unpacked { mixed_qkv: self.mixed_qkv.rows(), z: self.z.rows(), b: self.b.rows(), a: self.a.rows() }
    }

    pub fn for_split(&mut self) -> (Packed<Rows<'_>>, Unpacked<RowsMut<'_>>) {
        (
            Packed { mixed_qkvz: self.mixed_qkvz.rows(), mixed_ba: self.mixed_ba.rows() },
            Unpacked {
                mixed_qkv: self.mixed_qkv.rows_mut(),
                z: self.z.rows_mut(),
                b: self.b.rows_mut(),
                a: self.a.rows_mut(),
            },
        )
    }

    pub fn for_merge(&mut self) -> (Unpacked<Rows<'_>>, Packed<RowsMut<'_>>) {
        (
            Unpacked {
                mixed_qkv: self.mixed_qkv.rows(),
                z: self.z.rows(),
                b: self.b.rows(),
                a: self.a.rows(),
            },
            Packed { mixed_qkvz: self.mixed_qkvz.rows_mut(), mixed_ba: self.mixed_ba.rows_mut() },
        )
    }

    pub fn assert_guards(&self) {
        for (what, tensor) in self.named() {
            tensor.assert_guards(what);
        }
    }

    fn named(&self) -> [(&'static str, &Tensor); 6] {
        [
            ("mixed_qkvz", &self.mixed_qkvz),
            ("mixed_ba", &self.mixed_ba),
            ("mixed_qkv", &self.mixed_qkv),
            ("z", &self.z),
            ("b", &self.b),
            ("a", &self.a),
        ]
    }
}
