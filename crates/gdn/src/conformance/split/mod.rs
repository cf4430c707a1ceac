//! Cases of split and merge, and what the oracle says comes out: every backend is held to them bit for bit.

#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
mod emulator;
mod isa;

use crate::{
    heads::Heads,
    packing::{Layout, Packing},
    reference,
    split::Direction,
    view::TENSORS,
};

/// What fills every byte that an op must not touch, and every output before it is written.
const POISON: u8 = 0xA5;
/// Bytes of poison before and after every tensor.
const GUARD: usize = 512;

/// How one tensor lies in memory.
#[derive(Clone, Copy, Debug, Default)]
struct Shape {
    /// Elements between the end of a row and the start of the next.
    padding: usize,
    /// Bytes past a multiple of 256 at which the tensor begins.
    misalignment: usize,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    heads: [usize; 4],
    packing: Packing,
    /// Bytes of an element of `mixed_qkvz` and of `mixed_ba`.
    sizes: [usize; 2],
    /// In the order of [`TENSORS`].
    shapes: [Shape; 6],
    num_rows: usize,
}

/// The table: heads x packing x element size x strides and alignments x N.
fn table() -> Vec<Case> {
    let aligned = [Shape::default(); 6];
    let mut table = Vec::new();
    let mut add = |heads, sizes, shapes, num_rows| {
        for packing in Packing::ALL {
            table.push(Case { heads, packing, sizes, shapes, num_rows });
        }
    };
    let models = [[16, 32, 128, 128], [16, 48, 128, 128], [4, 8, 128, 128]];
    let odd = [
        [1, 1, 1, 1],
        [1, 1, 128, 128],
        [2, 2, 7, 5],
        [3, 6, 24, 40],
        [4, 4, 96, 96],
        [2, 6, 96, 96],
        [2, 10, 128, 128],
        [1, 8, 128, 64],
        [5, 15, 3, 16],
    ];
    for heads in models.into_iter().chain(odd) {
        for sizes in [[2, 2], [4, 4], [1, 1], [8, 8], [2, 4], [4, 2], [1, 2], [3, 16]] {
            add(heads, sizes, aligned, 5);
        }
    }
    for heads in [[4, 8, 128, 128], [3, 6, 24, 40], [1, 3, 16, 8]] {
        for num_rows in [0, 1, 2, 3, 4, 6, 7, 8, 9, 64, 333] {
            add(heads, [2, 2], aligned, num_rows);
        }
    }
    // Strides and alignments: every width of access, from one tensor that is off or from all.
    for heads in [[2, 4, 64, 64], [3, 6, 24, 40]] {
        for misalignment in [1, 2, 4, 8, 16, 24, 255] {
            add(heads, [2, 2], [Shape { misalignment, padding: 0 }; 6], 5);
            for off in 0..6 {
                let mut shapes = aligned;
                shapes[off].misalignment = misalignment;
                add(heads, [2, 2], shapes, 3);
            }
        }
        for padding in [1, 2, 3, 4, 8, 64, 100] {
            add(heads, [2, 2], [Shape { misalignment: 0, padding }; 6], 5);
            add(heads, [1, 4], [Shape { misalignment: 16, padding }; 6], 5);
            for off in 0..6 {
                let mut shapes = aligned;
                shapes[off].padding = padding;
                add(heads, [2, 2], shapes, 1);
                add(heads, [2, 2], shapes, 3);
            }
        }
    }
    // More row tiles than the y of a grid has, and more rows than 16 bits.
    for num_rows in [65_535, 65_536, 200_000] {
        add([1, 2, 8, 8], [2, 2], aligned, num_rows);
    }
    add([1, 1, 1, 1], [1, 1], aligned, 300_001);
    // Offsets past 2^31 elements and past 2^32 bytes, between few rows.
    let wide = Shape { padding: (1 << 30) + 8, misalignment: 0 };
    add([2, 4, 64, 64], [2, 2], [wide, aligned[1], aligned[2], aligned[3], aligned[4], aligned[5]], 4);
    add([2, 4, 64, 64], [2, 2], [aligned[0], aligned[1], aligned[2], wide, aligned[4], wide], 4);
    table
}

/// A tensor on the host: its rows one after the other, and how they are to lie on the device.
#[derive(Clone)]
struct Tensor {
    rows: Vec<u8>,
    num_rows: usize,
    features: usize,
    element_size: usize,
    shape: Shape,
}

impl Tensor {
    fn row_bytes(&self) -> usize {
        self.features * self.element_size
    }

    fn row_stride(&self) -> usize {
        (self.features + self.shape.padding) * self.element_size
    }

    /// Bytes from the start of the first row to the end of the last.
    fn span(&self) -> usize {
        if self.num_rows == 0 { 0 } else { (self.num_rows - 1) * self.row_stride() + self.row_bytes() }
    }

    /// So many bytes of memory in which the tensor begins at `start`: its rows, or poison in their place, and
    /// poison before, between and after them.
    fn image(&self, bytes: usize, start: usize, poison: bool) -> Vec<u8> {
        let mut image = vec![POISON; bytes];
        if !poison && !self.rows.is_empty() {
            for (n, row) in self.rows.chunks(self.row_bytes()).enumerate() {
                image[start + n * self.row_stride()..][..row.len()].copy_from_slice(row);
            }
        }
        image
    }
}

impl Case {
    fn layout(&self) -> Layout {
        let [hk, hv, dk, dv] = self.heads;
        Layout::new(Heads::new(hk, hv, dk, dv).unwrap(), self.packing)
    }

    /// The shapes of the six tensors, without rows.
    fn shapes(&self) -> [Tensor; 6] {
        let features = self.layout().heads.features();
        std::array::from_fn(|i| Tensor {
            rows: Vec::new(),
            num_rows: self.num_rows,
            features: features[i],
            element_size: self.sizes[Direction::Split.like(i)],
            shape: self.shapes[i],
        })
    }

    /// The six tensors: packed ones full of numbers, and the unpacked ones that the oracle makes of them.
    /// Read from the other end they are a merge.
    fn tensors(&self) -> [Tensor; 6] {
        let Layout { heads, packing } = self.layout();
        let mut tensors = self.shapes();
        for (i, tensor) in tensors.iter_mut().enumerate() {
            let bytes = tensor.num_rows * tensor.row_bytes();
            tensor.rows = if i < 2 { numbers(bytes, i as u64) } else { vec![POISON; bytes] };
        }
        let (packed, unpacked) = tensors.split_at_mut(2);
        let places = [reference::place_of_qkvz as fn(&Heads, Packing, usize) -> _, reference::place_of_ba];
        for (projection, place) in places.into_iter().enumerate() {
            let (from, to) = (&packed[projection], &mut unpacked[2 * projection..][..2]);
            let places = (0..from.features).map(|feature| (feature, place(&heads, packing, feature)));
            let size = from.element_size;
            for (feature, second, target, len) in stretches(places) {
                let (from_row, to_row) = (from.row_bytes(), to[second].row_bytes());
                for n in 0..self.num_rows {
                    let elements = &from.rows[n * from_row + feature * size..][..len * size];
                    to[second].rows[n * to_row + target * size..][..len * size].copy_from_slice(elements);
                }
            }
        }
        tensors
    }
}

/// The oracle's places, with those side by side on both sides taken together: first feature, tensor, feature
/// there, and how many.
fn stretches(places: impl Iterator<Item = (usize, reference::Place)>) -> Vec<(usize, usize, usize, usize)> {
    let mut stretches: Vec<(usize, usize, usize, usize)> = Vec::new();
    for (feature, (second, target)) in places {
        match stretches.last_mut() {
            Some((from, of, to, len)) if (*from + *len, *of, *to + *len) == (feature, second, target) => {
                *len += 1
            }
            _ => stretches.push((feature, second, target, 1)),
        }
    }
    stretches
}

/// How a failure is named.
fn what(case: &Case, direction: Direction, tensor: usize) -> String {
    format!("{case:?}: {direction:?}: {}", TENSORS[tensor])
}

/// Bytes without a period in sight.
fn numbers(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut numbers = Vec::with_capacity(bytes + 8);
    while numbers.len() < bytes {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        numbers.extend_from_slice(&(mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb).to_le_bytes());
    }
    numbers.truncate(bytes);
    numbers
}
