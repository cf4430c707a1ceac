//! The split of the packed projections and its inverse, the merge: which tensors go where, and the check of a
//! call.
//!
//! Everything a caller can get wrong is checked here, once, before the first byte is written; a backend gets
//! a [`Plan`] that is known to be right. No backend is named here.

use std::ops::Range;

use crate::{
    argument::{ArgumentError, Because},
    packing::{FeatureMap, Layout},
    view::{Address, Geometry, Packed, TENSORS, Unpacked, View, in_order, overlap},
};

/// Which way the features move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the packed tensors to the unpacked ones.
    Split,
    /// From the unpacked tensors to the packed ones.
    Merge,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Split, Self::Merge];

    /// The places in [`TENSORS`] of those that are read.
    pub fn read(self) -> Range<usize> {
        match self {
            Self::Split => 0..2,
            Self::Merge => 2..6,
        }
    }

    /// The places in [`TENSORS`] of those that are written.
    pub fn written(self) -> Range<usize> {
        match self {
            Self::Split => 2..6,
            Self::Merge => 0..2,
        }
    }

    /// The place in [`TENSORS`] of the first tensor that is read of the projection of `tensor`: its elements
    /// have the size, and in Python the dtype, of that one's.
    ///
    /// ```
    /// use gdn::{Direction, TENSORS};
    /// assert_eq!((TENSORS[5], TENSORS[Direction::Split.like(5)]), ("a", "mixed_ba"));
    /// assert_eq!(TENSORS[Direction::Merge.like(5)], "b");
    /// ```
    pub fn like(self, tensor: usize) -> usize {
        let of_ba = matches!(tensor, 1 | 4 | 5);
        match (self, of_ba) {
            (Self::Split, false) => 0,
            (Self::Split, true) => 1,
            (Self::Merge, false) => 2,
            (Self::Merge, true) => 4,
        }
    }
}

/// A call that was checked: shapes and element sizes agree, and what is written overlaps nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<'a, A> {
    pub(crate) layout: Layout,
    pub(crate) direction: Direction,
    /// In the order of [`TENSORS`].
    views: [&'a View<A>; 6],
}

impl<'a, A: Address> Plan<'a, A> {
    /// Checks a call.
    ///
    /// # Errors
    /// [`ArgumentError::Length`], [`ArgumentError::ElementSize`], [`ArgumentError::Overlap`].
    #[inline]
    pub(crate) fn new(
        layout: &Layout,
        direction: Direction,
        packed: Packed<&'a View<A>>,
        unpacked: Unpacked<&'a View<A>>,
    ) -> Result<Self, ArgumentError> {
        let heads = layout.heads;
        let views = in_order(packed, unpacked);
        let features = heads.features();
        let first = direction.read().start;
        for (i, view) in views.iter().enumerate() {
            let &Geometry { features: got, num_rows, element_size, .. } = &view.geometry;
            let argument = TENSORS[i];
            if got != features[i] {
                return Err(ArgumentError::Length {
                    argument,
                    unit: "features",
                    got,
                    expected: features[i],
                    because: Because::Need(heads.to_string()),
                });
            }
            let expected = views[first].geometry.num_rows;
            if num_rows != expected {
                return Err(ArgumentError::Length {
                    argument,
                    unit: "rows",
                    got: num_rows,
                    expected,
                    because: Because::Argument(TENSORS[first]),
                });
            }
            let like = direction.like(i);
            let expected = views[like].geometry.element_size;
            if element_size != expected {
                let other = TENSORS[like];
                return Err(ArgumentError::ElementSize { argument, got: element_size, other, expected });
            }
        }
        for i in direction.written() {
            for j in (0..6).filter(|j| direction.read().contains(j) || *j < i) {
                if let Some((address, bytes)) = overlap(views[i], views[j]) {
                    let (argument, other) = (TENSORS[i], TENSORS[j]);
                    return Err(ArgumentError::Overlap { argument, other, address, bytes });
                }
            }
        }
        Ok(Self { layout: *layout, direction, views })
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.views[0].geometry.num_rows
    }

    /// Bytes that one row takes, packed or unpacked.
    pub(crate) fn row_bytes(&self) -> usize {
        self.packed(0).geometry.row_bytes() + self.packed(1).geometry.row_bytes()
    }

    /// The map of a projection, which is 0 for `mixed_qkvz` and 1 for `mixed_ba`, here and below.
    #[inline(always)]
    pub(crate) fn map(&self, projection: usize) -> FeatureMap {
        if projection == 0 { self.layout.qkvz_map() } else { self.layout.ba_map() }
    }

    /// The packed tensor of a projection.
    pub(crate) fn packed(&self, projection: usize) -> &'a View<A> {
        self.views[projection]
    }

    /// The two tensors that a projection comes apart into.
    pub(crate) fn unpacked(&self, projection: usize) -> &[&'a View<A>] {
        &self.views[2 + 2 * projection..][..2]
    }

    /// The tensors of a projection that are written: two of a split, one of a merge.
    pub(crate) fn written(&self, projection: usize) -> &[&'a View<A>] {
        match self.direction {
            Direction::Split => self.unpacked(projection),
            Direction::Merge => &self.views[projection..][..1],
        }
    }

    /// Every tensor with its name.
    #[cfg(feature = "cuda")]
    pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, &'a View<A>)> + '_ {
        TENSORS.into_iter().zip(self.views)
    }
}
