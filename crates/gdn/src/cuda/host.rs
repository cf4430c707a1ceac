//! The op on a GPU for tensors of the host: copied there, done, copied back. For tools; the copies take far longer than the op.

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

use super::{
    CudaError, Gpu,
    error::driver,
    raw::{RawPacked, RawRows, RawUnpacked},
};
use crate::{
    Layout, Packed, PackedMut, Unpacked, UnpackedMut,
    rows::{Geometry, Operand},
    split::{Direction, Plan},
};

/// A tensor's rows on the device, one after the other.
struct Dense(CudaSlice<u8>);

impl Dense {
    fn new(bytes: usize, gpu: &Gpu) -> Result<Self, CudaError> {
        // SAFETY: `upload` or the kernel writes all of it before it is read.
        unsafe { gpu.stream().alloc(bytes.max(1)) }
            .map(Self)
            .map_err(driver(gpu.info().ordinal, "cuMemAlloc"))
    }

    /// The stretches of host memory that `operand` is made of, and where each goes.
    fn stretches(operand: &Operand) -> impl Iterator<Item = (*mut u8, std::ops::Range<usize>)> + use<> {
        let Operand { ptr, geometry } = *operand;
        let Geometry { num_rows, row_stride, .. } = geometry;
        let row = geometry.row_bytes();
        let (count, bytes) =
            if row_stride == row { (num_rows.min(1), num_rows * row) } else { (num_rows, row) };
        (0..count).map(move |n| (ptr.wrapping_add(n * row_stride), n * bytes..(n + 1) * bytes))
    }

    /// # Safety
    /// `operand` is that of a [`crate::Rows`] that is still borrowed.
    unsafe fn upload(&mut self, operand: &Operand, gpu: &Gpu) -> Result<(), CudaError> {
        for (ptr, range) in Self::stretches(operand) {
            // SAFETY: rows that the view vouches for.
            let from = unsafe { std::slice::from_raw_parts(ptr.cast_const(), range.len()) };
            let copied = gpu.stream().memcpy_htod(from, &mut self.0.slice_mut(range));
            copied.map_err(driver(gpu.info().ordinal, "cuMemcpyHtoD"))?;
        }
        Ok(())
    }

    /// # Safety
    /// `operand` is that of a [`crate::RowsMut`] that is still borrowed, whose rows are initialised.
    unsafe fn download(&self, operand: &Operand, gpu: &Gpu) -> Result<(), CudaError> {
        for (ptr, range) in Self::stretches(operand) {
            // SAFETY: rows that the view vouches for.
            let to = unsafe { std::slice::from_raw_parts_mut(ptr, range.len()) };
            let copied = gpu.stream().memcpy_dtoh(&self.0.slice(range), to);
            copied.map_err(driver(gpu.info().ordinal, "cuMemcpyDtoH"))?;
        }
        gpu.stream().synchronize().map_err(driver(gpu.info().ordinal, "cuStreamSynchronize"))
    }
}

/// [`gdn::split`](crate::split()) by a GPU, for tensors in the memory of the host. Returns when they are written.
///
/// # Errors
/// [`CudaError::Argument`], before anything is written; [`CudaError::TooLarge`], [`CudaError::Driver`].
pub fn split_host(
    layout: &Layout,
    from: Packed<'_>,
    to: UnpackedMut<'_>,
    gpu: &Gpu,
) -> Result<(), CudaError> {
    let UnpackedMut { mixed_qkv, z, b, a } = &to;
    let packed = [from.mixed_qkvz.operand, from.mixed_ba.operand];
    run(layout, Direction::Split, packed, [mixed_qkv, z, b, a].map(|rows| rows.operand), gpu)
}

/// [`gdn::merge`](crate::merge()) by a GPU, for tensors in the memory of the host. Returns when they are written.
///
/// # Errors
/// Those of [`split_host`].
pub fn merge_host(
    layout: &Layout,
    from: Unpacked<'_>,
    to: PackedMut<'_>,
    gpu: &Gpu,
) -> Result<(), CudaError> {
    let Unpacked { mixed_qkv, z, b, a } = from;
    let packed = [to.mixed_qkvz.operand, to.mixed_ba.operand];
    run(layout, Direction::Merge, packed, [mixed_qkv, z, b, a].map(|rows| rows.operand), gpu)
}

fn run(
    layout: &Layout,
    direction: Direction,
    [qkvz, ba]: [Operand; 2],
    [qkv, z, b, a]: [Operand; 4],
    gpu: &Gpu,
) -> Result<(), CudaError> {
    let host = [qkvz, qkv, z, ba, b, a];
    let num_rows = Plan::new(layout, direction, host.each_ref())?.num_rows();
    let mut device = Vec::with_capacity(host.len());
    for operand in &host {
        device.push(Dense::new(num_rows * operand.geometry.row_bytes(), gpu)?);
    }
    let is_written = |i: usize| (direction == Direction::Split) != i.is_multiple_of(3);
    for (i, operand) in host.iter().enumerate().filter(|(i, _)| !is_written(*i)) {
        // SAFETY: of a view that the caller holds.
        unsafe { device[i].upload(operand, gpu)? };
    }
    let mut rows = Vec::with_capacity(host.len());
    for (i, (operand, Dense(slice))) in host.iter().zip(&mut device).enumerate() {
        let Geometry { num_rows, features, element_size, .. } = operand.geometry;
        let stream = gpu.stream();
        let address = if is_written(i) { slice.device_ptr_mut(stream).0 } else { slice.device_ptr(stream).0 };
        rows.push(RawRows::new(address, element_size, num_rows, features, features)?);
    }
    let packed = RawPacked { mixed_qkvz: rows[0], mixed_ba: rows[3] };
    let unpacked = RawUnpacked { mixed_qkv: rows[1], z: rows[2], b: rows[4], a: rows[5] };
    // SAFETY: tensors of this device, made above for this call, on the stream that they were made and filled on.
    unsafe {
        match direction {
            Direction::Split => gpu.split_raw(layout, packed, unpacked, gpu.stream().cu_stream())?,
            Direction::Merge => gpu.merge_raw(layout, unpacked, packed, gpu.stream().cu_stream())?,
        }
    }
    for (i, operand) in host.iter().enumerate().filter(|(i, _)| is_written(*i)) {
        // SAFETY: of a view that the caller holds exclusively. Bytes are written over whatever they are.
        unsafe { device[i].download(operand, gpu)? };
    }
    Ok(())
}
