//! The first op of the layer: [`split()`] takes the packed projections apart, [`merge`] puts them together again.
//!
//! Everything a caller can get wrong is checked here, once, before the first byte is written; a backend gets a [`Plan`] that is
//! known to be right.

use crate::{
    argument::{ArgumentError, Because},
    buf::{BufError, PackedBuf, UnpackedBuf},
    cpu::{self, Cpu},
    packing::{FeatureMap, Layout},
    rows::{Geometry, Operand, Rows, RowsMut},
};

/// The packed projections, to be read.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// `[N, 2*HK*DK + 2*HV*DV]`
    pub mixed_qkvz: Rows<'a>,
    /// `[N, 2*HV]`; its elements may have another size than those of `mixed_qkvz`.
    pub mixed_ba: Rows<'a>,
}

/// The packed projections, to be written.
#[derive(Debug)]
pub struct PackedMut<'a> {
    /// `[N, 2*HK*DK + 2*HV*DV]`
    pub mixed_qkvz: RowsMut<'a>,
    /// `[N, 2*HV]`; its elements may have another size than those of `mixed_qkvz`.
    pub mixed_ba: RowsMut<'a>,
}

/// The four parts of the projections, to be read.
#[derive(Clone, Copy, Debug)]
pub struct Unpacked<'a> {
    /// `[N, 2*HK*DK + HV*DV]`: all queries, all keys, all values.
    pub mixed_qkv: Rows<'a>,
    /// `[N, HV*DV]`, the same memory as `[N, HV, DV]`.
    pub z: Rows<'a>,
    /// `[N, HV]`
    pub b: Rows<'a>,
    /// `[N, HV]`
    pub a: Rows<'a>,
}

/// The four parts of the projections, to be written.
#[derive(Debug)]
pub struct UnpackedMut<'a> {
    /// `[N, 2*HK*DK + HV*DV]`: all queries, all keys, all values.
    pub mixed_qkv: RowsMut<'a>,
    /// `[N, HV*DV]`, the same memory as `[N, HV, DV]`.
    pub z: RowsMut<'a>,
    /// `[N, HV]`
    pub b: RowsMut<'a>,
    /// `[N, HV]`
    pub a: RowsMut<'a>,
}

/// Takes packed projections apart, into outputs the caller gives.
///
/// For each row, features move as [`Layout::qkvz_map`] and [`Layout::ba_map`] say; nothing is computed, so elements
/// are opaque and arrive bit for bit. Rows of any tensor may lie any distance apart and at any alignment. Inputs may
/// overlap one another; an output may overlap nothing. With outputs given and work for one thread nothing is allocated.
///
/// ```
/// use gdn::{Cpu, Heads, Layout, Packed, Packing, Rows, RowsMut, UnpackedMut};
///
/// let layout = Layout::new(Heads::new(1, 2, 1, 2)?, Packing::Interleaved);
/// let qkvz: Vec<u16> = (0..10).collect();                 // q | k | v0 v0 v1 v1 | z0 z0 z1 z1
/// let ba: Vec<f32> = vec![0.1, 0.2, 0.3, 0.4];            // b0 b1 | a0 a1
/// let (mut qkv, mut z) = ([0u16; 6], [0u16; 4]);
/// let (mut b, mut a) = ([0f32; 2], [0f32; 2]);
/// gdn::split(
///     &layout,
///     Packed { mixed_qkvz: Rows::new(&qkvz, 1, 10)?, mixed_ba: Rows::new(&ba, 1, 4)? },
///     UnpackedMut {
///         mixed_qkv: RowsMut::new(&mut qkv, 1, 6)?,
///         z: RowsMut::new(&mut z, 1, 4)?,
///         b: RowsMut::new(&mut b, 1, 2)?,
///         a: RowsMut::new(&mut a, 1, 2)?,
///     },
///     &Cpu::new(),
/// )?;
/// assert_eq!((qkv, z), ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9]));
/// assert_eq!((b, a), ([0.1, 0.2], [0.3, 0.4]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`ArgumentError`], before anything is written.
pub fn split(layout: &Layout, from: Packed<'_>, to: UnpackedMut<'_>, cpu: &Cpu) -> Result<(), ArgumentError> {
    let plan = Plan::new(
        layout,
        Direction::Split,
        [
            &from.mixed_qkvz.operand,
            &to.mixed_qkv.operand,
            &to.z.operand,
            &from.mixed_ba.operand,
            &to.b.operand,
            &to.a.operand,
        ],
    )?;
    cpu::run(&plan, cpu);
    Ok(())
}

/// Takes packed projections apart, into one fresh block of memory (see [`UnpackedBuf`]).
///
/// Outputs that are kept and used again with [`split()`] are faster: fresh memory costs a page fault for every page.
///
/// # Errors
/// [`BufError`]: what is wrong with an argument, or that there is no memory.
pub fn split_fresh(layout: &Layout, from: Packed<'_>, cpu: &Cpu) -> Result<UnpackedBuf, BufError> {
    let Packed { mixed_qkvz, mixed_ba } = from;
    let mut buf = UnpackedBuf::new(
        &layout.heads,
        mixed_qkvz.num_rows(),
        mixed_qkvz.element_size(),
        mixed_ba.element_size(),
    )?;
    split(layout, from, buf.as_mut(), cpu)?;
    Ok(buf)
}

/// Puts the four parts together again, into packed projections the caller gives: the exact inverse of [`split()`].
///
/// # Errors
/// [`ArgumentError`], before anything is written.
pub fn merge(layout: &Layout, from: Unpacked<'_>, to: PackedMut<'_>, cpu: &Cpu) -> Result<(), ArgumentError> {
    let plan = Plan::new(
        layout,
        Direction::Merge,
        [
            &to.mixed_qkvz.operand,
            &from.mixed_qkv.operand,
            &from.z.operand,
            &to.mixed_ba.operand,
            &from.b.operand,
            &from.a.operand,
        ],
    )?;
    cpu::run(&plan, cpu);
    Ok(())
}

/// Puts the four parts together again, into one fresh block of memory (see [`PackedBuf`]).
///
/// # Errors
/// [`BufError`]: what is wrong with an argument, or that there is no memory.
pub fn merge_fresh(layout: &Layout, from: Unpacked<'_>, cpu: &Cpu) -> Result<PackedBuf, BufError> {
    let Unpacked { mixed_qkv, b, .. } = from;
    let mut buf =
        PackedBuf::new(&layout.heads, mixed_qkv.num_rows(), mixed_qkv.element_size(), b.element_size())?;
    merge(layout, from, buf.as_mut(), cpu)?;
    Ok(buf)
}

/// Which way the features move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Split,
    Merge,
}

/// A call that was checked: shapes and element sizes agree, and what is written overlaps nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) layout: Layout,
    pub(crate) direction: Direction,
    operands: [&'a Operand; 6],
}

/// The order of a plan's operands: for each projection its packed tensor, and the two it comes apart into.
pub(crate) const NAMES: [&str; 6] = ["mixed_qkvz", "mixed_qkv", "z", "mixed_ba", "b", "a"];

impl<'a> Plan<'a> {
    /// Checks operands in the order of [`NAMES`].
    #[inline]
    pub(crate) fn new(
        layout: &Layout,
        direction: Direction,
        operands: [&'a Operand; 6],
    ) -> Result<Self, ArgumentError> {
        let heads = layout.heads;
        let is_written = |i: usize| (direction == Direction::Split) != i.is_multiple_of(3);
        // The first tensor of a projection that is read: that of mixed_qkvz sets N, each the size of its elements.
        let first_read = |projection: usize| 3 * projection + usize::from(direction == Direction::Merge);
        for i in 0..6 {
            let &Geometry { features: got, num_rows, element_size, .. } = &operands[i].geometry;
            let expected = match i {
                0 => heads.qkvz_features(),
                1 => heads.qkv_features(),
                2 => heads.z_features(),
                3 => heads.ba_features(),
                _ => heads.num_v_heads(),
            };
            if got != expected {
                return Err(ArgumentError::Length {
                    argument: NAMES[i],
                    unit: "features",
                    got,
                    expected,
                    because: Because::Need(heads.to_string()),
                });
            }
            let first = first_read(0);
            let expected = operands[first].geometry.num_rows;
            if num_rows != expected {
                return Err(ArgumentError::Length {
                    argument: NAMES[i],
                    unit: "rows",
                    got: num_rows,
                    expected,
                    because: Because::Argument(NAMES[first]),
                });
            }
            let first = first_read(i / 3);
            let expected = operands[first].geometry.element_size;
            if element_size != expected {
                let other = NAMES[first];
                return Err(ArgumentError::ElementSize {
                    argument: NAMES[i],
                    got: element_size,
                    other,
                    expected,
                });
            }
        }
        for i in 0..6 {
            for j in 0..i {
                if (is_written(i) || is_written(j))
                    && let Some((address, bytes)) = overlap(operands[i], operands[j])
                {
                    let (argument, other) =
                        if is_written(i) { (NAMES[i], NAMES[j]) } else { (NAMES[j], NAMES[i]) };
                    return Err(ArgumentError::Overlap { argument, other, address, bytes });
                }
            }
        }
        Ok(Self { layout: *layout, direction, operands })
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.operands[0].geometry.num_rows
    }

    /// The map of the projection `mixed_qkvz` (0) or `mixed_ba` (1).
    #[inline(always)]
    pub(crate) fn map(&self, projection: usize) -> FeatureMap {
        if projection == 0 { self.layout.qkvz_map() } else { self.layout.ba_map() }
    }

    /// The packed tensor of a projection, then the two it comes apart into.
    pub(crate) fn tensors(&self, projection: usize) -> &[&'a Operand] {
        &self.operands[3 * projection..][..3]
    }

    /// Bytes that one row takes, packed or unpacked.
    pub(crate) fn row_bytes(&self) -> usize {
        self.operands[0].geometry.row_bytes() + self.operands[3].geometry.row_bytes()
    }
}

/// The first bytes that both tensors own, as address and number.
#[inline]
pub(crate) fn overlap(x: &Operand, y: &Operand) -> Option<(usize, usize)> {
    let end = |o: &Operand| o.ptr.addr().saturating_add(o.geometry.span());
    if end(x) <= y.ptr.addr() || end(y) <= x.ptr.addr() { None } else { overlap_of_rows(x, y) }
}

/// The same for tensors within one another's reach, exactly: slices of the columns of one wider buffer share no byte. Walks
/// both sequences of rows, each in order of address, side by side.
#[cold]
fn overlap_of_rows(x: &Operand, y: &Operand) -> Option<(usize, usize)> {
    let start = |o: &Operand| o.ptr.addr();
    // The row of `o` in which, or after which, `address` lies.
    let first_row =
        |o: &Operand, address: usize| address.saturating_sub(start(o)) / o.geometry.row_stride.max(1);
    let (mut i, mut j) = (first_row(x, start(y)), first_row(y, start(x)));
    while i < x.geometry.num_rows && j < y.geometry.num_rows {
        let (x_row, y_row) = (start(x) + i * x.geometry.row_stride, start(y) + j * y.geometry.row_stride);
        let (x_end, y_end) = (x_row + x.geometry.row_bytes(), y_row + y.geometry.row_bytes());
        let (from, to) = (x_row.max(y_row), x_end.min(y_end));
        if from < to {
            return Some((from, to - from));
        }
        if x_end <= y_end {
            i += 1;
        } else {
            j += 1;
        }
    }
    None
}
