//! The cases on the CPU: every instruction set of this machine, through the caches and past them.

use super::{Case, GUARD, Tensor, what};
use crate::{
    cpu::{Cpu, Isa, Stores, merge, split},
    rows::{Rows, RowsMut},
    split::Direction,
    view::{Packed, Unpacked},
};

/// Cases that spread a tensor over more are for devices; tests/large.rs has those of the CPU.
const MOST_BYTES: usize = 1 << 30;
/// Cases of more rows are there for the limits of a grid.
const MOST_ROWS: usize = 1000;

/// A tensor in memory of its own, within guards.
struct Placed<'a> {
    tensor: &'a Tensor,
    memory: Vec<u8>,
    start: usize,
}

impl<'a> Placed<'a> {
    fn new(tensor: &'a Tensor, poison: bool) -> Self {
        let bytes = tensor.span() + 2 * GUARD + 512;
        let mut memory = tensor.image(bytes, 0, true);
        let start = GUARD + memory[GUARD..].as_ptr().align_offset(256) + tensor.shape.misalignment;
        if !poison {
            // In place: the alignment is that of this allocation.
            memory.copy_from_slice(&tensor.image(bytes, start, false));
        }
        Self { tensor, memory, start }
    }

    fn row_stride(&self) -> usize {
        self.tensor.features + self.tensor.shape.padding
    }

    fn rows(&self) -> Rows<'_> {
        let Tensor { element_size, num_rows, features, .. } = *self.tensor;
        let ptr = self.memory[self.start..].as_ptr();
        // SAFETY: the span lies within `memory`, which is borrowed as long as the view.
        unsafe { Rows::from_raw(ptr, element_size, num_rows, features, self.row_stride()) }.unwrap()
    }

    fn rows_mut(&mut self) -> RowsMut<'_> {
        let Tensor { element_size, num_rows, features, .. } = *self.tensor;
        let stride = self.row_stride();
        let ptr = self.memory[self.start..].as_mut_ptr();
        // SAFETY: as above, borrowed exclusively.
        unsafe { RowsMut::from_raw(ptr, element_size, num_rows, features, stride) }.unwrap()
    }
}

fn run(case: &Case, tensors: &[Tensor; 6], direction: Direction, cpu: &Cpu) {
    let mut placed: Vec<Placed<'_>> = tensors
        .iter()
        .enumerate()
        .map(|(i, tensor)| Placed::new(tensor, direction.written().contains(&i)))
        .collect();
    let (packed, unpacked) = placed.split_at_mut(2);
    let layout = case.layout();
    match direction {
        Direction::Split => {
            let [qkv, z, b, a] = unpacked else { unreachable!() };
            let outputs = [qkv, z, b, a].map(Placed::rows_mut);
            let [mixed_qkv, z, b, a] = outputs;
            let from = Packed { mixed_qkvz: packed[0].rows(), mixed_ba: packed[1].rows() };
            split(&layout, from, Unpacked { mixed_qkv, z, b, a }, cpu).unwrap();
        }
        Direction::Merge => {
            let [qkvz, ba] = packed else { unreachable!() };
            let to = Packed { mixed_qkvz: qkvz.rows_mut(), mixed_ba: ba.rows_mut() };
            let rows: Vec<Rows<'_>> = unpacked.iter().map(|placed| placed.rows()).collect();
            let from = Unpacked { mixed_qkv: rows[0], z: rows[1], b: rows[2], a: rows[3] };
            merge(&layout, from, to, cpu).unwrap();
        }
    }
    for (i, Placed { tensor, memory, start }) in placed.iter().enumerate() {
        let wanted = tensor.image(memory.len(), *start, false);
        assert!(*memory == wanted, "{}: differs from the oracle, {cpu:?}", what(case, direction, i));
    }
}

#[test]
fn every_isa() {
    for isa in Isa::ALL {
        let Ok(cpu) = Cpu::new().threads(1).isa(isa) else {
            eprintln!("skipped: this machine has no {isa}");
            continue;
        };
        for case in super::table() {
            let spread = case.shapes().iter().any(|tensor| tensor.span() > MOST_BYTES);
            if spread || case.num_rows > MOST_ROWS {
                continue;
            }
            let tensors = case.tensors();
            for direction in Direction::ALL {
                for stores in [Stores::Cached, Stores::Streaming] {
                    run(&case, &tensors, direction, &cpu.stores(stores));
                }
            }
        }
    }
}
