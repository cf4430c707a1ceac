//! [`Rows`] and [`RowsMut`]: N rows of opaque elements in the host's memory, each row in one piece, any
//! distance from row to row.

use std::{marker::PhantomData, ops::Range};

use bytemuck::Pod;

use crate::{
    argument::ArgumentError,
    view::{Geometry, View},
};

/// A shared view of N rows. Elements are opaque: only their size is known.
///
/// Strides are in elements and go from the start of a row to the start of the next. A view may be a slice of
/// columns of a wider buffer ([`Rows::columns`]): both projections may be views of one merged GEMM output.
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
    pub(crate) view: View<*mut u8>,
    data: PhantomData<&'a [u8]>,
}

/// An exclusive view of N rows, to be written. See [`Rows`].
///
/// Safe code writes through it and never reads, so what lies under it need not be initialised
/// ([`RowsMut::from_raw`]). Bytes between the rows of a strided view are never touched.
#[derive(Debug)]
pub struct RowsMut<'a> {
    pub(crate) view: View<*mut u8>,
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
        Self { view: View { address: ptr.cast_mut(), geometry }, data: PhantomData }
    }

    /// `num_rows` rows of `features` elements, one directly after the other from the start of `data`.
    ///
    /// # Errors
    /// [`ArgumentError::TooShort`], [`ArgumentError::TooLarge`], [`ArgumentError::Zero`] for a `T` of no
    /// bytes.
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
        let geometry = Geometry::of::<T>(num_rows, features, row_stride)?.within(size_of_val(data))?;
        // SAFETY: the rows lie within `data`, borrowed for `'a`.
        Ok(unsafe { Self::at(data.as_ptr().cast(), geometry) })
    }

    /// Dense rows of elements of `element_size` bytes out of raw bytes, at any alignment.
    ///
    /// # Errors
    /// Those of [`Rows::new`], and [`ArgumentError::Multiple`] where the bytes are no whole number of
    /// elements.
    pub fn from_bytes(
        data: &'a [u8],
        element_size: usize,
        num_rows: usize,
        features: usize,
    ) -> Result<Self, ArgumentError> {
        let geometry = dense_within(data.len(), element_size, num_rows, features)?;
        // SAFETY: the rows lie within `data`, borrowed for `'a`.
        Ok(unsafe { Self::at(data.as_ptr(), geometry) })
    }

    /// For engines: rows at a pointer, of any alignment.
    ///
    /// # Errors
    /// [`ArgumentError::RowStride`], [`ArgumentError::TooLarge`], [`ArgumentError::Zero`] for elements of no
    /// bytes.
    ///
    /// # Safety
    /// `ptr` is not null, and for `'a` each of the rows' bytes is initialised, can be read and is written by
    /// nobody. With `num_rows = 0` the pointer is not looked at.
    pub unsafe fn from_raw(
        ptr: *const u8,
        element_size: usize,
        num_rows: usize,
        features: usize,
        row_stride: usize,
    ) -> Result<Self, ArgumentError> {
        let geometry = Geometry::new(num_rows, features, row_stride, element_size)?;
        // SAFETY: the caller's promises.
        Ok(unsafe { Self::at(ptr, geometry) })
    }

    /// Some of the rows.
    ///
    /// # Errors
    /// [`ArgumentError::Range`].
    pub fn rows(&self, rows: Range<usize>) -> Result<Self, ArgumentError> {
        let (offset, geometry) = self.view.geometry.rows(&rows)?;
        // SAFETY: a part of the rows there are.
        Ok(unsafe { Self::at(self.view.address.wrapping_add(offset), geometry) })
    }

    /// Some of the features of every row.
    ///
    /// # Errors
    /// [`ArgumentError::Range`].
    pub fn columns(&self, columns: Range<usize>) -> Result<Self, ArgumentError> {
        let (offset, geometry) = self.view.geometry.columns(&columns)?;
        // SAFETY: a part of the rows there are.
        Ok(unsafe { Self::at(self.view.address.wrapping_add(offset), geometry) })
    }

    /// The bytes of row `row`; `None` past the last row.
    pub fn row(&self, row: usize) -> Option<&'a [u8]> {
        let View { address, geometry } = self.view;
        // SAFETY: the constructors saw to it that every row lies in initialised memory that is readable for
        // `'a`.
        (row < geometry.num_rows).then(|| unsafe {
            std::slice::from_raw_parts(address.add(row * geometry.row_stride), geometry.row_bytes())
        })
    }

    /// N.
    pub fn num_rows(&self) -> usize {
        self.view.geometry.num_rows
    }

    /// Elements of a row.
    pub fn features(&self) -> usize {
        self.view.geometry.features
    }

    /// Elements from the start of a row to the start of the next.
    pub fn row_stride(&self) -> usize {
        self.view.geometry.row_stride / self.view.geometry.element_size
    }

    /// Bytes of an element.
    pub fn element_size(&self) -> usize {
        self.view.geometry.element_size
    }
}

impl<'a> RowsMut<'a> {
    /// # Safety
    /// As [`RowsMut::from_raw`].
    pub(crate) unsafe fn at(ptr: *mut u8, geometry: Geometry) -> Self {
        Self { view: View { address: ptr, geometry }, data: PhantomData }
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
        let geometry = Geometry::of::<T>(num_rows, features, row_stride)?.within(size_of_val(data))?;
        // SAFETY: the rows lie within `data`, borrowed exclusively for `'a`; any bytes are values of a `Pod`.
        Ok(unsafe { Self::at(data.as_mut_ptr().cast(), geometry) })
    }

    /// Dense rows of elements of `element_size` bytes in raw bytes, at any alignment.
    ///
    /// # Errors
    /// Those of [`Rows::from_bytes`].
    pub fn from_bytes(
        data: &'a mut [u8],
        element_size: usize,
        num_rows: usize,
        features: usize,
    ) -> Result<Self, ArgumentError> {
        let geometry = dense_within(data.len(), element_size, num_rows, features)?;
        // SAFETY: the rows lie within `data`, borrowed exclusively for `'a`.
        Ok(unsafe { Self::at(data.as_mut_ptr(), geometry) })
    }

    /// For engines: rows at a pointer, of any alignment, initialised or not.
    ///
    /// # Errors
    /// Those of [`Rows::from_raw`].
    ///
    /// # Safety
    /// `ptr` is not null, and for `'a` each of the rows' bytes can be written, and is neither read nor
    /// written by anybody but the holder of this view. (Views handed to one op that overlap are found and
    /// refused before anything is written.) With `num_rows = 0` the pointer is not looked at.
    pub unsafe fn from_raw(
        ptr: *mut u8,
        element_size: usize,
        num_rows: usize,
        features: usize,
        row_stride: usize,
    ) -> Result<Self, ArgumentError> {
        let geometry = Geometry::new(num_rows, features, row_stride, element_size)?;
        // SAFETY: the caller's promises.
        Ok(unsafe { Self::at(ptr, geometry) })
    }

    /// The same rows for a shorter while, so that this view can be used again.
    pub fn reborrow(&mut self) -> RowsMut<'_> {
        RowsMut { view: self.view, data: PhantomData }
    }

    /// Some of the rows.
    ///
    /// # Errors
    /// [`ArgumentError::Range`].
    pub fn rows(self, rows: Range<usize>) -> Result<Self, ArgumentError> {
        let (offset, geometry) = self.view.geometry.rows(&rows)?;
        // SAFETY: a part of the rows there are, which this view gives up.
        Ok(unsafe { Self::at(self.view.address.wrapping_add(offset), geometry) })
    }

    /// Copies `bytes` into row `row`, from its byte `offset` on.
    ///
    /// ```
    /// let mut data = [0u8; 6];
    /// gdn::RowsMut::new(&mut data, 2, 3)?.write(1, 1, &[7, 8])?;
    /// assert_eq!(data, [0, 0, 0, 0, 7, 8]);
    /// # Ok::<(), gdn::ArgumentError>(())
    /// ```
    ///
    /// # Errors
    /// [`ArgumentError::Range`] where there is no such row, or the row ends before the bytes do.
    pub fn write(&mut self, row: usize, offset: usize, bytes: &[u8]) -> Result<(), ArgumentError> {
        let View { address, geometry } = self.view;
        let end = offset.saturating_add(bytes.len());
        if row >= geometry.num_rows || end > geometry.row_bytes() {
            return Err(match row < geometry.num_rows {
                true => {
                    ArgumentError::Range { argument: "bytes", start: offset, end, len: geometry.row_bytes() }
                }
                false => {
                    let (start, end, len) = (row, row.saturating_add(1), geometry.num_rows);
                    ArgumentError::Range { argument: "rows", start, end, len }
                }
            });
        }
        // SAFETY: the constructors saw to it that every row lies in writable memory that is this view's
        // alone, so that `bytes`, a borrow of something else, does not overlap it.
        unsafe {
            let to = address.add(row * geometry.row_stride + offset);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        Ok(())
    }

    /// Two views of the same rows, the features before `column` and those from it on: outputs may be slices
    /// of one wider buffer.
    ///
    /// # Errors
    /// [`ArgumentError::Range`] where there are fewer than `column` features.
    pub fn split_columns(self, column: usize) -> Result<(Self, Self), ArgumentError> {
        let features = self.view.geometry.features;
        let (_, left) = self.view.geometry.columns(&(0..column))?;
        let (offset, right) = self.view.geometry.columns(&(column..features))?;
        // SAFETY: two parts of the rows there are, without a byte in common, for the view that is given up.
        let at = |offset, geometry| unsafe { Self::at(self.view.address.wrapping_add(offset), geometry) };
        Ok((at(0, left), at(offset, right)))
    }

    /// N.
    pub fn num_rows(&self) -> usize {
        self.view.geometry.num_rows
    }

    /// Elements of a row.
    pub fn features(&self) -> usize {
        self.view.geometry.features
    }

    /// Elements from the start of a row to the start of the next.
    pub fn row_stride(&self) -> usize {
        self.view.geometry.row_stride / self.view.geometry.element_size
    }

    /// Bytes of an element.
    pub fn element_size(&self) -> usize {
        self.view.geometry.element_size
    }
}

/// Dense rows within so many bytes, which are a whole number of elements.
fn dense_within(
    bytes: usize,
    element_size: usize,
    num_rows: usize,
    features: usize,
) -> Result<Geometry, ArgumentError> {
    let geometry = Geometry::new(num_rows, features, features, element_size)?;
    if !bytes.is_multiple_of(element_size) {
        return Err(ArgumentError::Multiple {
            argument: "data.len()",
            got: bytes,
            other: "element_size",
            expected: element_size,
        });
    }
    geometry.within(bytes)
}
