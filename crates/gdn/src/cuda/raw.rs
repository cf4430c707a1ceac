//! The lowest layer: device pointers and a stream, for engines and for other languages.

use std::ffi::c_void;

use cudarc::driver::sys::{
    self, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
    CUpointer_attribute, CUresult, CUstream,
};

use super::{
    device::Gpu,
    error::{CudaError, driver},
    lower::Job,
    module::Current,
};
use crate::{
    Layout,
    argument::ArgumentError,
    rows::{Geometry, Operand, check_bytes},
    split::{Direction, NAMES, Plan},
};

/// N rows in the memory of a device: numbers that nothing on the host follows.
#[derive(Clone, Copy, Debug)]
pub struct RawRows(pub(super) Operand);

// SAFETY: an address as a number, and a shape. Only kernels follow it, whose launchers answer for how.
unsafe impl Send for RawRows {}
// SAFETY: as above.
unsafe impl Sync for RawRows {}

impl RawRows {
    /// `num_rows` rows of `features` elements of `element_size` bytes, `row_stride` elements from a row to the next, from `address`
    /// on, at any alignment. Accesses are as wide as the alignment allows, 16 bytes at most.
    ///
    /// # Errors
    /// [`ArgumentError::RowStride`], [`ArgumentError::TooLarge`], [`ArgumentError::Zero`] for elements of no bytes.
    pub fn new(
        address: u64,
        element_size: usize,
        num_rows: usize,
        features: usize,
        row_stride: usize,
    ) -> Result<Self, ArgumentError> {
        check_bytes(0, element_size)?;
        let geometry = Geometry::new(num_rows, features, row_stride, element_size)?;
        Ok(Self::with(address, geometry))
    }

    pub(super) fn with(address: u64, geometry: Geometry) -> Self {
        Self(Operand { ptr: std::ptr::without_provenance_mut(address as usize), geometry })
    }
}

/// The packed projections on a device.
#[derive(Clone, Copy, Debug)]
pub struct RawPacked {
    /// `[N, 2*HK*DK + 2*HV*DV]`
    pub mixed_qkvz: RawRows,
    /// `[N, 2*HV]`; its elements may have another size than those of `mixed_qkvz`.
    pub mixed_ba: RawRows,
}

/// The four parts of the projections on a device.
#[derive(Clone, Copy, Debug)]
pub struct RawUnpacked {
    /// `[N, 2*HK*DK + HV*DV]`: all queries, all keys, all values.
    pub mixed_qkv: RawRows,
    /// `[N, HV*DV]`, the same memory as `[N, HV, DV]`.
    pub z: RawRows,
    /// `[N, HV]`
    pub b: RawRows,
    /// `[N, HV]`
    pub a: RawRows,
}

/// The order of a plan.
pub(super) fn operands<'a>(packed: &'a RawPacked, unpacked: &'a RawUnpacked) -> [&'a Operand; 6] {
    let (RawPacked { mixed_qkvz, mixed_ba }, RawUnpacked { mixed_qkv, z, b, a }) = (packed, unpacked);
    [mixed_qkvz, mixed_qkv, z, mixed_ba, b, a].map(|rows| &rows.0)
}

impl Gpu {
    /// Takes packed projections apart: one kernel launch on `stream`, and nothing else. The call returns before the work is done. It
    /// allocates nothing and waits for nothing, so it can be captured in a CUDA graph once [`Gpu::warmup`] was called.
    ///
    /// Shapes, element sizes and overlaps are checked as on the CPU. With no rows nothing is launched.
    ///
    /// # Errors
    /// [`CudaError::Argument`], [`CudaError::WrongDevice`], [`CudaError::TooLarge`], [`CudaError::Driver`].
    ///
    /// # Safety
    /// `stream` is a stream of this GPU's context, or null for its default stream. From when the kernel starts until it is done, all
    /// rows are in memory that the device can reach, those of `from` are not written and those of `to` neither read nor
    /// written by anything else.
    pub unsafe fn split_raw(
        &self,
        layout: &Layout,
        from: RawPacked,
        to: RawUnpacked,
        stream: CUstream,
    ) -> Result<(), CudaError> {
        let plan = Plan::new(layout, Direction::Split, operands(&from, &to))?;
        // SAFETY: the caller's promise.
        unsafe { self.launch(&plan, stream) }
    }

    /// Puts the four parts together again: the exact inverse of [`Gpu::split_raw`].
    ///
    /// # Errors
    /// Those of [`Gpu::split_raw`].
    ///
    /// # Safety
    /// That of [`Gpu::split_raw`].
    pub unsafe fn merge_raw(
        &self,
        layout: &Layout,
        from: RawUnpacked,
        to: RawPacked,
        stream: CUstream,
    ) -> Result<(), CudaError> {
        let plan = Plan::new(layout, Direction::Merge, operands(&to, &from))?;
        // SAFETY: the caller's promise.
        unsafe { self.launch(&plan, stream) }
    }

    /// # Safety
    /// `stream` is a stream of this context, and every row of the plan is there, as [`Gpu::split_raw`] asks.
    unsafe fn launch(&self, plan: &Plan<'_>, stream: CUstream) -> Result<(), CudaError> {
        let Some(mut job) = Job::new(plan, self.profile)? else { return Ok(()) };
        let ordinal = self.info().ordinal;
        let _current = Current::new(self.context())?;
        if self.check_pointers {
            self.check(plan)?;
        }
        let function = self.kernels.function(self.context(), &job)?;
        let mut attribute = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let [x, y] = job.shape.blocks;
        let config = CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: 1,
            blockDimX: job.shape.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: stream,
            attrs: &raw mut attribute,
            numAttrs: u32::from(self.programmatic && self.kernels.programmatic),
        };
        let mut params: [*mut c_void; 1] = [(&raw mut job.args).cast()];
        // SAFETY: the kernel takes one `Args`, which the driver copies before it returns; they were made from a checked plan, and the
        // grid for them. The caller answers for the memory and the stream.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, params.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .map_err(driver(ordinal, "cuLaunchKernelEx"))
    }

    /// That every tensor lies on this device.
    fn check(&self, plan: &Plan<'_>) -> Result<(), CudaError> {
        let expected = self.info().ordinal;
        let operands = plan.tensors(0).iter().chain(plan.tensors(1));
        for (argument, operand) in NAMES.into_iter().zip(operands) {
            let address = operand.ptr.addr() as u64;
            let mut ordinal: i32 = 0;
            // SAFETY: asks about an address and follows it not; the answer to this question is an `int`.
            let answer = unsafe {
                sys::cuPointerGetAttribute(
                    (&raw mut ordinal).cast(),
                    CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                    address,
                )
            };
            let got = match answer {
                CUresult::CUDA_SUCCESS => usize::try_from(ordinal).ok(),
                CUresult::CUDA_ERROR_INVALID_VALUE => None,
                _ => return answer.result().map_err(driver(expected, "cuPointerGetAttribute")),
            };
            if got != Some(expected) {
                return Err(CudaError::WrongDevice { argument, address, got, expected });
            }
        }
        Ok(())
    }
}
