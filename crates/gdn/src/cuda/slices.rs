//! The safe layer: views of cudarc's slices, and [`split`] and [`merge`] over them.

use cudarc::driver::{DevicePtr, DevicePtrMut, DeviceSlice};

use super::{CudaError, Gpu, RawPacked, RawRows, RawUnpacked};
use crate::{
    Layout,
    argument::ArgumentError,
    rows::{Geometry, element_size_of},
};

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
    let bytes = slice.num_bytes();
    Geometry::new(num_rows, features, row_stride, element_size_of::<T>()?)?.within(bytes)
}

impl<'a, T> Rows<'a, T> {
    /// `num_rows` rows of `features` elements, one directly after the other from the start of `slice`, a `CudaSlice` or a view.
    ///
    /// # Errors
    /// [`ArgumentError::TooShort`], [`ArgumentError::TooLarge`], [`ArgumentError::Zero`] for a `T` of no bytes.
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
    /// `num_rows` rows of `features` elements, one directly after the other from the start of `slice`, a `CudaSlice` or a view.
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

/// The packed projections, to be read. `T` are the elements of `qkvz`, `U` those of `ba`.
#[derive(Clone, Copy)]
pub struct Packed<'a, T, U> {
    /// `[N, 2*HK*DK + 2*HV*DV]`
    pub mixed_qkvz: Rows<'a, T>,
    /// `[N, 2*HV]`
    pub mixed_ba: Rows<'a, U>,
}

/// The packed projections, to be written.
pub struct PackedMut<'a, T, U> {
    /// `[N, 2*HK*DK + 2*HV*DV]`
    pub mixed_qkvz: RowsMut<'a, T>,
    /// `[N, 2*HV]`
    pub mixed_ba: RowsMut<'a, U>,
}

/// The four parts of the projections, to be read.
#[derive(Clone, Copy)]
pub struct Unpacked<'a, T, U> {
    /// `[N, 2*HK*DK + HV*DV]`: all queries, all keys, all values.
    pub mixed_qkv: Rows<'a, T>,
    /// `[N, HV*DV]`, the same memory as `[N, HV, DV]`.
    pub z: Rows<'a, T>,
    /// `[N, HV]`
    pub b: Rows<'a, U>,
    /// `[N, HV]`
    pub a: Rows<'a, U>,
}

/// The four parts of the projections, to be written.
pub struct UnpackedMut<'a, T, U> {
    /// `[N, 2*HK*DK + HV*DV]`: all queries, all keys, all values.
    pub mixed_qkv: RowsMut<'a, T>,
    /// `[N, HV*DV]`, the same memory as `[N, HV, DV]`.
    pub z: RowsMut<'a, T>,
    /// `[N, HV]`
    pub b: RowsMut<'a, U>,
    /// `[N, HV]`
    pub a: RowsMut<'a, U>,
}

/// Asks each slice for its address on the GPU's stream (which orders the call after what was done to it on other streams), and
/// keeps what has to be dropped once the kernel is launched.
macro_rules! addresses {
    ($gpu:ident; $($name:ident: $rows:expr, $ask:ident;)*) => {
        $(
            let rows = $rows;
            belongs(stringify!($name), rows.slice, $gpu)?;
            let geometry = rows.geometry;
            let (address, _recorded) = rows.slice.$ask($gpu.stream());
            let $name = (RawRows::with(address, geometry), _recorded);
        )*
    };
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

/// Takes packed projections apart, on the GPU's stream: the counterpart of [`gdn::split`](crate::split()).
///
/// One kernel launch; the call returns before the work is done. cudarc orders it after whatever was done to the slices before, and
/// what is done to them later after it.
///
/// # Errors
/// [`CudaError::Argument`], [`CudaError::WrongDevice`], [`CudaError::TooLarge`], [`CudaError::Driver`].
pub fn split<T, U>(
    layout: &Layout,
    from: Packed<'_, T, U>,
    to: UnpackedMut<'_, T, U>,
    gpu: &Gpu,
) -> Result<(), CudaError> {
    addresses! { gpu;
        mixed_qkvz: from.mixed_qkvz, device_ptr;
        mixed_ba: from.mixed_ba, device_ptr;
        mixed_qkv: to.mixed_qkv, device_ptr_mut;
        z: to.z, device_ptr_mut;
        b: to.b, device_ptr_mut;
        a: to.a, device_ptr_mut;
    }
    let from = RawPacked { mixed_qkvz: mixed_qkvz.0, mixed_ba: mixed_ba.0 };
    let to = RawUnpacked { mixed_qkv: mixed_qkv.0, z: z.0, b: b.0, a: a.0 };
    let gpu = gpu.clone().check_pointers(false);
    // SAFETY: the rows lie within slices of this context, the written ones borrowed exclusively; cudarc orders what comes before and
    // after on the stream, which is the context's.
    unsafe { gpu.split_raw(layout, from, to, gpu.stream().cu_stream()) }
}

/// Puts the four parts together again, on the GPU's stream: the exact inverse of [`split`].
///
/// # Errors
/// Those of [`split`].
pub fn merge<T, U>(
    layout: &Layout,
    from: Unpacked<'_, T, U>,
    to: PackedMut<'_, T, U>,
    gpu: &Gpu,
) -> Result<(), CudaError> {
    addresses! { gpu;
        mixed_qkv: from.mixed_qkv, device_ptr;
        z: from.z, device_ptr;
        b: from.b, device_ptr;
        a: from.a, device_ptr;
        mixed_qkvz: to.mixed_qkvz, device_ptr_mut;
        mixed_ba: to.mixed_ba, device_ptr_mut;
    }
    let from = RawUnpacked { mixed_qkv: mixed_qkv.0, z: z.0, b: b.0, a: a.0 };
    let to = RawPacked { mixed_qkvz: mixed_qkvz.0, mixed_ba: mixed_ba.0 };
    let gpu = gpu.clone().check_pointers(false);
    // SAFETY: as in `split`.
    unsafe { gpu.merge_raw(layout, from, to, gpu.stream().cu_stream()) }
}
