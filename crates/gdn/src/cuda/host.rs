//! Rows of the host's memory, copied to a GPU and back: for tools. The copies take far longer than any op.

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, sys};

use super::{
    device::Gpu,
    error::{CudaError, driver},
    views::RawRows,
};
use crate::{
    rows::{Rows, RowsMut},
    view::{Geometry, View},
};

/// A tensor's rows on the device, one after the other.
pub(super) struct Staged {
    memory: CudaSlice<u8>,
    geometry: Geometry,
}

impl Staged {
    /// A copy of rows of the host.
    pub(super) fn of(rows: Rows<'_>, gpu: &Gpu) -> Result<Self, CudaError> {
        let mut staged = Self::room(&rows.view, gpu)?;
        for (ptr, range) in stretches(&rows.view) {
            // SAFETY: rows that the view vouches for, which is borrowed until they are copied.
            let from = unsafe { std::slice::from_raw_parts(ptr.cast_const(), range.len()) };
            let copied = gpu.stream().memcpy_htod(from, &mut staged.memory.slice_mut(range));
            copied.map_err(driver(gpu.info().ordinal, "cuMemcpyHtoD"))?;
        }
        Ok(staged)
    }

    /// Room for what is to be copied into rows of the host.
    pub(super) fn like(rows: &RowsMut<'_>, gpu: &Gpu) -> Result<Self, CudaError> {
        Self::room(&rows.view, gpu)
    }

    fn room(view: &View<*mut u8>, gpu: &Gpu) -> Result<Self, CudaError> {
        let View { geometry, .. } = *view;
        let bytes = geometry.num_rows * geometry.row_bytes();
        // SAFETY: a copy or a kernel writes all of it before it is read.
        let memory = unsafe { gpu.stream().alloc(bytes.max(1)) };
        Ok(Self { memory: memory.map_err(driver(gpu.info().ordinal, "cuMemAlloc"))?, geometry })
    }

    /// The rows on the device, in this order after what was done on the GPU's stream before.
    pub(super) fn rows(&self, gpu: &Gpu) -> Result<RawRows, CudaError> {
        self.at(self.memory.device_ptr(gpu.stream()).0)
    }

    /// The same, to be written.
    pub(super) fn rows_mut(&mut self, gpu: &Gpu) -> Result<RawRows, CudaError> {
        let address = self.memory.device_ptr_mut(gpu.stream()).0;
        self.at(address)
    }

    fn at(&self, address: u64) -> Result<RawRows, CudaError> {
        let Geometry { num_rows, features, element_size, .. } = self.geometry;
        Ok(RawRows::new(address, element_size, num_rows, features, features)?)
    }

    /// Copies the rows back, and waits.
    pub(super) fn download(&self, to: &mut RowsMut<'_>, gpu: &Gpu) -> Result<(), CudaError> {
        let ordinal = gpu.info().ordinal;
        let stream = gpu.stream();
        let (address, _ordered) = self.memory.device_ptr(stream);
        for (ptr, range) in stretches(&to.view) {
            // SAFETY: so many bytes are there on the device, and rows of the host that the view has for
            // itself, initialised or not. The call is over, and the view still borrowed, when the stream has
            // been waited for.
            unsafe {
                sys::cuMemcpyDtoHAsync_v2(
                    ptr.cast(),
                    address + range.start as u64,
                    range.len(),
                    stream.cu_stream(),
                )
            }
            .result()
            .map_err(driver(ordinal, "cuMemcpyDtoH"))?;
        }
        stream.synchronize().map_err(driver(ordinal, "cuStreamSynchronize"))
    }
}

/// The stretches of host memory that a view is made of, and where each goes.
fn stretches(view: &View<*mut u8>) -> impl Iterator<Item = (*mut u8, std::ops::Range<usize>)> + use<> {
    let View { address, geometry } = *view;
    let Geometry { num_rows, row_stride, .. } = geometry;
    let row = geometry.row_bytes();
    let (count, bytes) = if row_stride == row { (num_rows.min(1), num_rows * row) } else { (num_rows, row) };
    (0..count).map(move |n| (address.wrapping_add(n * row_stride), n * bytes..(n + 1) * bytes))
}
