//! Views of rows in a device's memory: of cudarc's slices, checked, and of bare addresses.

use cudarc::driver::{DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop};

use super::{device::Gpu, error::CudaError};
use crate::{
    argument::ArgumentError,
    view::{DeviceAddress, Geometry, View},
};

/// N rows at an address of a device: numbers that nothing on the host follows.
#[derive(Clone, Copy, Debug)]
pub struct RawRows {
    pub(super) view: View<DeviceAddress>,
}

impl RawRows {
    /// `num_rows` rows of `features` elements of `element_size` bytes, `row_stride` elements from a row to
    /// the next, from `address` on, at any alignment. Accesses are as wide as the alignment allows, 16 bytes
    /// at most.
    ///
    /// # Errors
    /// [`ArgumentError::RowStride`], [`ArgumentError::TooLarge`], [`ArgumentError::Zero`] for elements of no
    /// bytes.
    pub fn new(
        address: impl Into<DeviceAddress>,
        element_size: usize,
        num_rows: usize,
        features: usize,
        row_stride: usize,
    ) -> Result<Self, ArgumentError> {
        let geometry = Geometry::new(num_rows, features, row_stride, element_size)?;
        Ok(Self { view: View { address: address.into(), geometry } })
    }
}

/// A shared view of N rows of a device's memory: what [`Rows`](crate::Rows) is for the host's.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    slice: &'a dyn DevicePtr<T>,
    geometry: Geometry,
}

/// An exclusive view of N rows of a device's memory, to be written.
pub struct RowsMut<'a, T> {
    slice: &'a mut dyn DevicePtrMut<T>,
    geometry: Geometry,
}

fn geometry<T>(
    slice: &(impl DeviceSlice<T> + ?Sized),
    num_rows: usize,
    features: usize,
    row_stride: usize,
) -> Result<Geometry, ArgumentError> {
    Geometry::of::<T>(num_rows, features, row_stride)?.within(slice.num_bytes())
}

impl<'a, T> Rows<'a, T> {
    /// `num_rows` rows of `features` elements, one directly after the other from the start of `slice`, a
    /// `CudaSlice` or a view.
    ///
    /// # Errors
    /// [`ArgumentError::TooShort`], [`ArgumentError::TooLarge`], [`ArgumentError::Zero`] for a `T` of no
    /// bytes.
    pub fn new(
        slice: &'a impl DevicePtr<T>,
        num_rows: usize,
        features: usize,
    ) -> Result<Self, ArgumentError> {
        Self::with_stride(slice, num_rows, features, features)
    }

    /// The same with `row_stride` elements from a row to the next.
    ///
    /// # Errors
    /// Those of [`Rows::new`], and [`ArgumentError::RowStride`].
    pub fn with_stride(
        slice: &'a impl DevicePtr<T>,
        num_rows: usize,
        features: usize,
        row_stride: usize,
    ) -> Result<Self, ArgumentError> {
        Ok(Self { slice, geometry: geometry(slice, num_rows, features, row_stride)? })
    }
}

impl<'a, T> RowsMut<'a, T> {
    /// `num_rows` rows of `features` elements, one directly after the other from the start of `slice`, a
    /// `CudaSlice` or a view.
    ///
    /// # Errors
    /// Those of [`Rows::new`].
    pub fn new(
        slice: &'a mut impl DevicePtrMut<T>,
        num_rows: usize,
        features: usize,
    ) -> Result<Self, ArgumentError> {
        Self::with_stride(slice, num_rows, features, features)
    }

    /// The same with `row_stride` elements from a row to the next.
    ///
    /// # Errors
    /// Those of [`Rows::with_stride`].
    pub fn with_stride(
        slice: &'a mut impl DevicePtrMut<T>,
        num_rows: usize,
        features: usize,
        row_stride: usize,
    ) -> Result<Self, ArgumentError> {
        let geometry = geometry(slice, num_rows, features, row_stride)?;
        Ok(Self { slice, geometry })
    }
}

impl<T> Rows<'_, T> {
    /// The rows as an address on the GPU's stream, which orders the call after what was done to the slice on
    /// other streams. What comes with it is to be dropped once the kernel is launched.
    pub(super) fn on<'g>(
        &'g self,
        argument: &'static str,
        gpu: &'g Gpu,
    ) -> Result<(RawRows, SyncOnDrop<'g>), CudaError> {
        belongs(argument, self.slice, gpu)?;
        let (address, recorded) = self.slice.device_ptr(gpu.stream());
        Ok((RawRows { view: View { address: address.into(), geometry: self.geometry } }, recorded))
    }
}

impl<T> RowsMut<'_, T> {
    /// As [`Rows::on`].
    pub(super) fn on<'g>(
        &'g mut self,
        argument: &'static str,
        gpu: &'g Gpu,
    ) -> Result<(RawRows, SyncOnDrop<'g>), CudaError> {
        belongs(argument, self.slice, gpu)?;
        let (address, recorded) = self.slice.device_ptr_mut(gpu.stream());
        Ok((RawRows { view: View { address: address.into(), geometry: self.geometry } }, recorded))
    }
}

/// That a slice is of the GPU's context.
fn belongs<T>(
    argument: &'static str,
    slice: &(impl DeviceSlice<T> + ?Sized),
    gpu: &Gpu,
) -> Result<(), CudaError> {
    let context = slice.stream().context();
    if context.cu_ctx() == gpu.context().cu_ctx() {
        return Ok(());
    }
    let (got, expected) = (Some(context.ordinal()), gpu.info().ordinal);
    Err(CudaError::WrongDevice { argument, address: 0, got, expected })
}
