//! What every view of tensors has in common, whoever owns the memory: [`Packed`] and [`Unpacked`], the six
//! tensors over any kind of view; where N rows lie; and addresses of a device's memory.

use std::ops::Range;

use crate::argument::ArgumentError;

/// The six tensors of the split and the merge, in the one order of this library: the packed projections, then
/// what they come apart into.
///
/// | | shape | view type |
/// |---|---|---|
/// | `mixed_qkvz` | `[N, 2*HK*DK + 2*HV*DV]` | `V` of [`Packed`] |
/// | `mixed_ba` | `[N, 2*HV]` | `W` of [`Packed`] |
/// | `mixed_qkv` | `[N, 2*HK*DK + HV*DV]` | `V` of [`Unpacked`] |
/// | `z` | `[N, HV, DV]` | `V` of [`Unpacked`] |
/// | `b`, `a` | `[N, HV]` | `W` of [`Unpacked`] |
pub const TENSORS: [&str; 6] = ["mixed_qkvz", "mixed_ba", "mixed_qkv", "z", "b", "a"];

/// The packed projections, as the GEMMs put them out.
///
/// `V` and `W` are views: [`Rows`](crate::Rows) to read and [`RowsMut`](crate::RowsMut) to write on the CPU,
/// `cuda::Rows`, `cuda::RowsMut` and `cuda::RawRows` on a GPU. Elements of `mixed_ba` may have another size
/// than those of `mixed_qkvz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed<V, W = V> {
    /// `[N, 2*HK*DK + 2*HV*DV]`
    pub mixed_qkvz: V,
    /// `[N, 2*HV]`
    pub mixed_ba: W,
}

/// The four tensors that the packed projections come apart into, over the same views as [`Packed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unpacked<V, W = V> {
    /// `[N, 2*HK*DK + HV*DV]`: all queries, all keys, all values.
    pub mixed_qkv: V,
    /// `[N, HV*DV]`, the same memory as `[N, HV, DV]`.
    pub z: V,
    /// `[N, HV]`
    pub b: W,
    /// `[N, HV]`
    pub a: W,
}

impl<V, W> Packed<V, W> {
    /// The same tensors, borrowed.
    pub fn as_ref(&self) -> Packed<&V, &W> {
        Packed { mixed_qkvz: &self.mixed_qkvz, mixed_ba: &self.mixed_ba }
    }
}

impl<V> Packed<V> {
    /// Every tensor seen in another way.
    pub fn map<T>(self, mut f: impl FnMut(V) -> T) -> Packed<T> {
        Packed { mixed_qkvz: f(self.mixed_qkvz), mixed_ba: f(self.mixed_ba) }
    }
}

impl<V, W> Unpacked<V, W> {
    /// The same tensors, borrowed.
    pub fn as_ref(&self) -> Unpacked<&V, &W> {
        Unpacked { mixed_qkv: &self.mixed_qkv, z: &self.z, b: &self.b, a: &self.a }
    }
}

impl<V> Unpacked<V> {
    /// Every tensor seen in another way.
    pub fn map<T>(self, mut f: impl FnMut(V) -> T) -> Unpacked<T> {
        Unpacked { mixed_qkv: f(self.mixed_qkv), z: f(self.z), b: f(self.b), a: f(self.a) }
    }
}

/// The six tensors in the order of [`TENSORS`].
pub fn in_order<V>(packed: Packed<V>, unpacked: Unpacked<V>) -> [V; 6] {
    let (Packed { mixed_qkvz, mixed_ba }, Unpacked { mixed_qkv, z, b, a }) = (packed, unpacked);
    [mixed_qkvz, mixed_ba, mixed_qkv, z, b, a]
}

/// Six tensors in the order of [`TENSORS`], named.
pub fn from_order<V>(tensors: [V; 6]) -> (Packed<V>, Unpacked<V>) {
    let [mixed_qkvz, mixed_ba, mixed_qkv, z, b, a] = tensors;
    (Packed { mixed_qkvz, mixed_ba }, Unpacked { mixed_qkv, z, b, a })
}

/// An address in the memory of a device: a number that nothing on the host follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceAddress(pub u64);

impl From<u64> for DeviceAddress {
    fn from(address: u64) -> Self {
        Self(address)
    }
}

/// Where a tensor begins: a pointer of the host, or a [`DeviceAddress`].
pub trait Address: Copy {
    /// The address as a number, to compare it with others.
    fn number(self) -> usize;
}

impl Address for *mut u8 {
    fn number(self) -> usize {
        self.addr()
    }
}

impl Address for DeviceAddress {
    /// Devices have the host's 64-bit addresses.
    fn number(self) -> usize {
        self.0 as usize
    }
}

/// What the ops see of any view of rows: where it begins, and where the rows lie from there on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<A> {
    /// Written to only where it comes from an exclusive view.
    pub(crate) address: A,
    pub(crate) geometry: Geometry,
}

/// Where N rows lie, relative to the first.
///
/// Kept by every constructor: `row_bytes() <= row_stride`, `(num_rows - 1) * row_stride + row_bytes() <=
/// isize::MAX`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) num_rows: usize,
    pub(crate) features: usize,
    /// Bytes from the start of a row to the start of the next.
    pub(crate) row_stride: usize,
    pub(crate) element_size: usize,
}

impl Geometry {
    pub(crate) const EMPTY: Self = Self { num_rows: 0, features: 0, row_stride: 0, element_size: 1 };

    /// Everything in elements of `element_size` bytes. The stride of at most one row counts for nothing.
    pub(crate) fn new(
        num_rows: usize,
        features: usize,
        row_stride: usize,
        element_size: usize,
    ) -> Result<Self, ArgumentError> {
        if element_size == 0 {
            return Err(ArgumentError::Zero { argument: "element_size" });
        }
        let row_stride = if num_rows <= 1 { features } else { row_stride };
        if row_stride < features {
            return Err(ArgumentError::RowStride { row_stride, features });
        }
        let span = || {
            let elements = num_rows.saturating_sub(1).checked_mul(row_stride)?.checked_add(features)?;
            elements.checked_mul(element_size).filter(|bytes| isize::try_from(*bytes).is_ok())
        };
        match (span(), row_stride.checked_mul(element_size)) {
            (Some(_), Some(row_stride)) => Ok(Self { num_rows, features, row_stride, element_size }),
            _ => Err(ArgumentError::TooLarge {
                what: format!(
                    "{num_rows} rows of {features} features of {element_size} bytes at row_stride = {row_stride}"
                ),
            }),
        }
    }

    /// The same for elements of type `T`.
    pub(crate) fn of<T>(num_rows: usize, features: usize, row_stride: usize) -> Result<Self, ArgumentError> {
        Self::new(num_rows, features, row_stride, size_of::<T>())
    }

    pub(crate) fn row_bytes(&self) -> usize {
        self.features * self.element_size
    }

    /// Itself, where so many bytes of data hold it.
    pub(crate) fn within(self, data_bytes: usize) -> Result<Self, ArgumentError> {
        if self.span() <= data_bytes {
            return Ok(self);
        }
        Err(ArgumentError::TooShort {
            argument: "data",
            got: data_bytes / self.element_size,
            expected: self.span() / self.element_size,
            num_rows: self.num_rows,
            features: self.features,
            row_stride: self.row_stride / self.element_size,
        })
    }

    /// Bytes from the first byte of the first row to the end of the last row.
    pub(crate) fn span(&self) -> usize {
        if self.num_rows == 0 { 0 } else { (self.num_rows - 1) * self.row_stride + self.row_bytes() }
    }

    /// Offset of the first of `rows`, and the geometry of what is left.
    pub(crate) fn rows(mut self, rows: &Range<usize>) -> Result<(usize, Self), ArgumentError> {
        check_range("rows", rows, self.num_rows)?;
        self.num_rows = rows.len();
        Ok((if rows.is_empty() { 0 } else { rows.start * self.row_stride }, self))
    }

    /// Offset of the first of `columns`, and the geometry of what is left.
    pub(crate) fn columns(mut self, columns: &Range<usize>) -> Result<(usize, Self), ArgumentError> {
        check_range("columns", columns, self.features)?;
        self.features = columns.len();
        Ok((if self.num_rows == 0 { 0 } else { columns.start * self.element_size }, self))
    }
}

fn check_range(argument: &'static str, range: &Range<usize>, len: usize) -> Result<(), ArgumentError> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    Err(ArgumentError::Range { argument, start: range.start, end: range.end, len })
}

/// The first bytes that both tensors own, as address and number.
#[inline]
pub(crate) fn overlap<A: Address>(x: &View<A>, y: &View<A>) -> Option<(usize, usize)> {
    let end = |view: &View<A>| view.address.number().saturating_add(view.geometry.span());
    let apart = end(x) <= y.address.number() || end(y) <= x.address.number();
    if apart { None } else { overlap_of_rows(x, y) }
}

/// The same for tensors within one another's reach, exactly: slices of the columns of one wider buffer share
/// no byte. Walks both sequences of rows, each in order of address, side by side.
#[cold]
fn overlap_of_rows<A: Address>(x: &View<A>, y: &View<A>) -> Option<(usize, usize)> {
    let start = |view: &View<A>| view.address.number();
    // The row of `view` in which, or after which, `address` lies.
    let first_row = |view: &View<A>, address: usize| {
        address.saturating_sub(start(view)) / view.geometry.row_stride.max(1)
    };
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
