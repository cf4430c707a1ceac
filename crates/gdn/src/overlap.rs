//! [`Extents`]: the memory of a call's tensors, and whether any of it is another's too.

use crate::{
    argument::ArgumentError,
    dtype::Dtype,
    tensor::{IndexType, Operand},
    view::Address,
};

/// The bytes of a tensor.
#[derive(Clone, Copy, Debug)]
struct Extent {
    argument: &'static str,
    start: usize,
    end: usize,
    /// Bytes from slot to slot and of one slot, where the first dim has the largest stride.
    slot: Option<(usize, usize)>,
    written: bool,
}

impl Extent {
    const NONE: Self = Self { argument: "", start: 0, end: 0, slot: None, written: false };

    fn of<P: Address, K: Copy, const D: usize>(
        argument: &'static str,
        operand: &Operand<P, K, D>,
        element_size: usize,
        written: bool,
    ) -> Self {
        let start = operand.at.number();
        let bytes = |sizes: [usize; D]| {
            // The view's constructor saw to it that this fits.
            let last =
                sizes.iter().zip(operand.strides).map(|(size, stride)| size.saturating_sub(1) * stride);
            if sizes.contains(&0) { 0 } else { (last.sum::<usize>() + 1) * element_size }
        };
        let mut slot = operand.sizes;
        slot[0] = slot[0].min(1);
        let (stride, inner) = (operand.strides[0] * element_size, bytes(slot));
        let slot = (operand.sizes[0] > 1 && inner <= stride).then_some((stride, inner));
        Self { argument, start, end: start.saturating_add(bytes(operand.sizes)), slot, written }
    }

    /// The first bytes that may belong to both, as address and number.
    fn overlap(&self, other: &Self) -> Option<(usize, usize)> {
        let (from, to) = (self.start.max(other.start), self.end.min(other.end));
        if from >= to {
            return None;
        }
        // Slots of two tensors that take turns, such as both states of a sequence in one page: at the same
        // distance, and each in a part of its own.
        if let (Some((stride, mine)), Some((same, theirs))) = (self.slot, other.slot)
            && stride == same
        {
            let apart = other.start.abs_diff(self.start) % stride;
            let (first, second) = if other.start >= self.start { (mine, theirs) } else { (theirs, mine) };
            if first <= apart && apart + second <= stride {
                return None;
            }
        }
        Some((from, to - from))
    }
}

/// The memory of a call's tensors: what is written may overlap nothing else.
pub(crate) struct Extents {
    list: [Extent; 24],
    len: usize,
}

impl Extents {
    pub(crate) fn new() -> Self {
        Self { list: [Extent::NONE; 24], len: 0 }
    }

    pub(crate) fn add<P: Address, const D: usize>(
        &mut self,
        argument: &'static str,
        operand: &Operand<P, Dtype, D>,
        written: bool,
    ) {
        self.push(Extent::of(argument, operand, operand.kind.size(), written));
    }

    pub(crate) fn add_indices<P: Address, const D: usize>(
        &mut self,
        argument: &'static str,
        operand: &Operand<P, IndexType, D>,
    ) {
        self.push(Extent::of(argument, operand, operand.kind.size(), false));
    }

    fn push(&mut self, extent: Extent) {
        self.list[self.len] = extent;
        self.len += 1;
    }

    /// # Errors
    /// [`ArgumentError::Overlap`].
    pub(crate) fn check(&self) -> Result<(), ArgumentError> {
        let list = &self.list[..self.len];
        for (i, x) in list.iter().enumerate() {
            for y in &list[..i] {
                if (x.written || y.written)
                    && let Some((address, bytes)) = x.overlap(y)
                {
                    let (argument, other) =
                        if x.written { (x.argument, y.argument) } else { (y.argument, x.argument) };
                    return Err(ArgumentError::Overlap { argument, other, address, bytes });
                }
            }
        }
        Ok(())
    }
}
