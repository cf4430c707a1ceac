//! [`Rows`] and [`RowsMut`]: N rows of opaque elements, each row in one piece, any distance from row to row.

use std::{marker::PhantomData, ops::Range};

use bytemuck::Pod;

use crate::argument::ArgumentError;

/// Where N rows lie: the geometry that shared and exclusive views have in common.
///
/// Kept by every constructor: `row_bytes() <= row_stride`, `(num_rows - 1) * row_stride + row_bytes() <= isize::MAX`.
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

    pub(crate) fn row_bytes(&self) -> usize {
        self.features * self.element_size
    }

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
    fn rows(mut self, rows: &Range<usize>) -> Result<(usize, Self), ArgumentError> {
        check_range("rows", rows, self.num_rows)?;
        self.num_rows = rows.len();
        Ok((if rows.is_empty() { 0 } else { rows.start * self.row_stride }, self))
    }

    /// Offset of the first of `columns`, and the geometry of what is left.
    fn columns(mut self, columns: &Range<usize>) -> Result<(usize, Self), ArgumentError> {
        check_range("columns", columns, self.features)?;
        self.features = columns.len();
        Ok((if self.num_rows == 0 { 0 } else { columns.start * self.element_size }, self))
    }
}

/// What the ops see of either kind of view: an address, and where the rows lie from there on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    /// Written to only where it comes from a [`RowsMut`].
    pub(crate) ptr: *mut u8,
    pub(crate) geometry: Geometry,
}

fn check_range(axis: &'static str, range: &Range<usize>, len: usize) -> Result<(), ArgumentError> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    Err(ArgumentError::Range { argument: axis, start: range.start, end: range.end, len })
}

pub(crate) fn element_size_of<T>() -> Result<usize, ArgumentError> {
    match size_of::<T>() {
        0 => Err(ArgumentError::Zero { argument: "element_size" }),
        size => Ok(size),
    }
}

/// A shared view of N rows. Elements are opaque: only their size is known.
///
/// Strides are in elements and go from the start of a row to the start of the next. A view may be a slice of columns of a
/// wider buffer ([`Rows::columns`]): both projections may be views of one merged GEMM output.
///
/// ```
/// let gemm = vec![0u16; 3 * 100];                        // three rows of 100 features
/// let rows = gdn::Rows::new(&gemm, 3, 100)?;
/// let (left, right) = (rows.columns(0..96)?, rows.columns(96..100)?);
/// assert_eq!((left.features(), right.features(), right.row_stride()), (96, 4, 100));
/// # Ok::<(), gdn::ArgumentError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub(crate) operand: Operand,
    data: PhantomData<&'a [u8]>,
}

/// An exclusive view of N rows, to be written. See [`Rows`].
///
/// Bytes between the rows of a strided view are never touched.
#[derive(Debug)]
pub struct RowsMut<'a> {
    pub(crate) operand: Operand,
    data: PhantomData<&'a mut [u8]>,
}

// SAFETY: a `Rows` is a `&[u8]` with a shape: whoever may share the one may share the other.
unsafe impl Send for Rows<'_> {}
// SAFETY: as above.
unsafe impl Sync for Rows<'_> {}
// SAFETY: a `RowsMut` is a `&mut [u8]` with a shape, which may be sent.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: a shared `RowsMut` gives access to its shape alone.
unsafe impl Sync for RowsMut<'_> {}

impl<'a> Rows<'a> {
    /// # Safety
    /// As [`Rows::from_raw`].
    pub(crate) unsafe fn at(ptr: *const u8, geometry: Geometry) -> Self {
        Self { operand: Operand { ptr: ptr.cast_mut(), geometry }, data: PhantomData }
    }

    /// `num_rows` rows of `features` elements, one directly after the other from the start of `data`.
    ///
    /// # Errors
    /// [`ArgumentError::TooShort`], [`ArgumentError::TooLarge`], [`ArgumentError::Zero`] for a `T` of no bytes.
    pub fn new<T: Pod>(data: &'a [T], num_rows: usize, features: usize) -> Result<Self, ArgumentError> {
        Self::with_stride(data, num_rows, features, features)
    }

    /// The same with `row_stride` elements from a row to the next.
    ///
    /// # Errors
    /// Those of [`Rows::new`], and [`ArgumentError::RowStride`].
    pub fn with_stride<T: Pod>(
        data: &'a [T],
        num_rows: usize,
        features: usize,
        row_stride: usize,
    ) -> Result<Self, ArgumentError> {
        let bytes = size_of_val(data);
        let geometry =
            Geometry::new(num_rows, features, row_stride, element_size_of::<T>()?)?.within(bytes)?;
        // SAFETY: the rows lie within `data`, borrowed for `'a`.
        Ok(unsafe { Self::at(data.as_ptr().cast(), geometry) })
    }

    /// Dense rows of elements of `element_size` bytes out of raw bytes, at any alignment.
    ///
    /// # Errors
    /// Those of [`Rows::new`].
    pub fn from_bytes(
        data: &'a [u8],
        element_size: usize,
        num_rows: usize,
        features: usize,
    ) -> Result<Self, ArgumentError> {
        check_bytes(data.len(), element_size)?;
        let geometry = Geometry::new(num_rows, features, features, element_size)?.within(data.len())?;
        // SAFETY: the rows lie within `data`, borrowed for `'a`.
        Ok(unsafe { Self::at(data.as_ptr(), geometry) })
    }

    /// The door for engines: rows at a pointer, of any alignment.
    ///
    /// # Errors
    /// [`ArgumentError::RowStride`], [`ArgumentError::TooLarge`], [`ArgumentError::Zero`] for elements of no bytes.
    ///
    /// # Safety
    /// `ptr` is not null, and for `'a` each of the rows' bytes can be read and is written by nobody. With
    /// `num_rows = 0` the pointer is not looked at.
    pub unsafe fn from_raw(
        ptr: *const u8,
        element_size: usize,
        num_rows: usize,
        features: usize,
        row_stride: usize,
    ) -> Result<Self, ArgumentError> {
        check_bytes(0, element_size)?;
        let geometry = Geometry::new(num_rows, features, row_stride, element_size)?;
        // SAFETY: the caller's promises.
        Ok(unsafe { Self::at(ptr, geometry) })
    }

    /// Some of the rows.
    ///
    /// # Errors
    /// [`ArgumentError::Range`].
    pub fn rows(&self, rows: Range<usize>) -> Result<Self, ArgumentError> {
        let (offset, geometry) = self.operand.geometry.rows(&rows)?;
        // SAFETY: a part of the rows there are.
        Ok(unsafe { Self::at(self.operand.ptr.wrapping_add(offset), geometry) })
    }

    /// Some of the features of every row.
    ///
    /// # Errors
    /// [`ArgumentError::Range`].
    pub fn columns(&self, columns: Range<usize>) -> Result<Self, ArgumentError> {
        let (offset, geometry) = self.operand.geometry.columns(&columns)?;
        // SAFETY: a part of the rows there are.
        Ok(unsafe { Self::at(self.operand.ptr.wrapping_add(offset), geometry) })
    }

    /// The bytes of row `row`; `None` past the last row.
    pub fn row(&self, row: usize) -> Option<&'a [u8]> {
        let (Geometry { num_rows, row_stride, .. }, row_bytes) =
            (self.operand.geometry, self.operand.geometry.row_bytes());
        // SAFETY: the constructors saw to it that every row lies in memory readable for `'a`.
        (row < num_rows)
            .then(|| unsafe { std::slice::from_raw_parts(self.operand.ptr.add(row * row_stride), row_bytes) })
    }

    /// N.
    pub fn num_rows(&self) -> usize {
        self.operand.geometry.num_rows
    }

    /// Elements of a row.
    pub fn features(&self) -> usize {
        self.operand.geometry.features
    }

    /// Elements from the start of a row to the start of the next.
    pub fn row_stride(&self) -> usize {
        self.operand.geometry.row_stride / self.operand.geometry.element_size
    }

    /// Bytes of an element.
    pub fn element_size(&self) -> usize {
        self.operand.geometry.element_size
    }
}

impl<'a> RowsMut<'a> {
    /// # Safety
    /// As [`RowsMut::from_raw`].
    pub(crate) unsafe fn at(ptr: *mut u8, geometry: Geometry) -> Self {
        Self { operand: Operand { ptr, geometry }, data: PhantomData }
    }

    /// `num_rows` rows of `features` elements, one directly after the other from the start of `data`.
    ///
    /// # Errors
    /// Those of [`Rows::new`].
    pub fn new<T: Pod>(data: &'a mut [T], num_rows: usize, features: usize) -> Result<Self, ArgumentError> {
        Self::with_stride(data, num_rows, features, features)
    }

    /// The same with `row_stride` elements from a row to the next.
    ///
    /// # Errors
    /// Those of [`Rows::with_stride`].
    pub fn with_stride<T: Pod>(
        data: &'a mut [T],
        num_rows: usize,
        features: usize,
        row_stride: usize,
    ) -> Result<Self, ArgumentError> {
        let geometry = Rows::with_stride(data, num_rows, features, row_stride)?.operand.geometry;
        // SAFETY: the rows lie within `data`, borrowed exclusively for `'a`.
        Ok(unsafe { Self::at(data.as_mut_ptr().cast(), geometry) })
    }

    /// Dense rows of elements of `element_size` bytes in raw bytes, at any alignment.
    ///
    /// # Errors
    /// Those of [`Rows::new`].
    pub fn from_bytes(
        data: &'a mut [u8],
        element_size: usize,
        num_rows: usize,
        features: usize,
    ) -> Result<Self, ArgumentError> {
        let geometry = Rows::from_bytes(data, element_size, num_rows, features)?.operand.geometry;
        // SAFETY: the rows lie within `data`, borrowed exclusively for `'a`.
        Ok(unsafe { Self::at(data.as_mut_ptr(), geometry) })
    }

    /// The door for engines: rows at a pointer, of any alignment, initialised or not.
    ///
    /// # Errors
    /// Those of [`Rows::from_raw`].
    ///
    /// # Safety
    /// `ptr` is not null, and for `'a` each of the rows' bytes can be written, and is neither read nor written by anybody
    /// but the holder of this view. (Views handed to one op that overlap are found and refused before anything is
    /// written.) With `num_rows = 0` the pointer is not looked at.
    pub unsafe fn from_raw(
        ptr: *mut u8,
        element_size: usize,
        num_rows: usize,
        features: usize,
        row_stride: usize,
    ) -> Result<Self, ArgumentError> {
        check_bytes(0, element_size)?;
        let geometry = Geometry::new(num_rows, features, row_stride, element_size)?;
        // SAFETY: the caller's promises.
        Ok(unsafe { Self::at(ptr, geometry) })
    }

    /// The same rows for a shorter while, so that this view can be used again.
    pub fn reborrow(&mut self) -> RowsMut<'_> {
        RowsMut { operand: self.operand, data: PhantomData }
    }

    /// Some of the rows.
    ///
    /// # Errors
    /// [`ArgumentError::Range`].
    pub fn rows(self, rows: Range<usize>) -> Result<Self, ArgumentError> {
        let (offset, geometry) = self.operand.geometry.rows(&rows)?;
        // SAFETY: a part of the rows there are, which this view gives up.
        Ok(unsafe { Self::at(self.operand.ptr.wrapping_add(offset), geometry) })
    }

    /// The bytes of row `row`, to be written; `None` past the last row.
    pub fn row_mut(&mut self, row: usize) -> Option<&mut [u8]> {
        let (Geometry { num_rows, row_stride, .. }, row_bytes) =
            (self.operand.geometry, self.operand.geometry.row_bytes());
        // SAFETY: the constructors saw to it that every row lies in memory that is this view's alone, borrowed with the view.
        (row < num_rows).then(|| unsafe {
            std::slice::from_raw_parts_mut(self.operand.ptr.add(row * row_stride), row_bytes)
        })
    }

    /// Two views of the same rows, the features before `column` and those from it on: outputs may be slices of one wider
    /// buffer.
    ///
    /// # Errors
    /// [`ArgumentError::Range`] where there are fewer than `column` features.
    pub fn split_columns(self, column: usize) -> Result<(Self, Self), ArgumentError> {
        let features = self.operand.geometry.features;
        let (_, left) = self.operand.geometry.columns(&(0..column))?;
        let (offset, right) = self.operand.geometry.columns(&(column..features))?;
        // SAFETY: two parts of the rows there are, without a byte in common, for the view that is given up.
        let at = |offset, geometry| unsafe { Self::at(self.operand.ptr.wrapping_add(offset), geometry) };
        Ok((at(0, left), at(offset, right)))
    }

    /// N.
    pub fn num_rows(&self) -> usize {
        self.operand.geometry.num_rows
    }

    /// Elements of a row.
    pub fn features(&self) -> usize {
        self.operand.geometry.features
    }

    /// Elements from the start of a row to the start of the next.
    pub fn row_stride(&self) -> usize {
        self.operand.geometry.row_stride / self.operand.geometry.element_size
    }

    /// Bytes of an element.
    pub fn element_size(&self) -> usize {
        self.operand.geometry.element_size
    }
}

pub(crate) fn check_bytes(bytes: usize, element_size: usize) -> Result<(), ArgumentError> {
    match element_size {
        0 => Err(ArgumentError::Zero { argument: "element_size" }),
        _ if bytes.is_multiple_of(element_size) => Ok(()),
        _ => Err(ArgumentError::Multiple {
            argument: "data.len()",
            got: bytes,
            other: "element_size",
            expected: element_size,
        }),
    }
}
