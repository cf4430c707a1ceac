//! One launch of a kernel on a caller's stream, and whose memory an address is.

use std::ffi::c_void;

use cudarc::driver::sys::{
    self, CUfunction, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
    CUpointer_attribute, CUresult, CUstream,
};

use super::{
    device::Gpu,
    error::{CudaError, driver},
};
use crate::view::DeviceAddress;

/// A kernel and its grid.
pub(super) struct Launch {
    pub(super) function: CUfunction,
    /// Blocks in x, y and z.
    pub(super) blocks: [u32; 3],
    /// Threads of a block.
    pub(super) threads: u32,
    /// Bytes of shared memory of a block.
    pub(super) shared: u32,
    /// Blocks of a cluster, along x; 1 for none.
    pub(super) cluster: u32,
}

impl Gpu {
    /// [`Gpu::launch_with`] of an argument that is made for this launch.
    ///
    /// # Safety
    /// The same.
    pub(super) unsafe fn launch<A>(
        &self,
        launch: Launch,
        args: A,
        stream: CUstream,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(launch, &args, stream) }
    }

    /// Launches a kernel that takes one argument, `args`. It may overlap the end of the kernel before it
    /// where the GPU was told so ([`Gpu::programmatic`]).
    ///
    /// # Safety
    /// The context is the thread's current one, `stream` is a stream of it, and the kernel, which is loaded
    /// there, takes an `A`. What the kernel does with `args` and the grid is the caller's responsibility.
    pub(super) unsafe fn launch_with<A>(
        &self,
        launch: Launch,
        args: &A,
        stream: CUstream,
    ) -> Result<(), CudaError> {
        let programmatic = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let mut cluster = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            ..programmatic
        };
        (cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z) =
            (launch.cluster, 1, 1);
        // Those that are wanted come first.
        let (is_programmatic, in_clusters) =
            (self.programmatic && self.kernels.programmatic, launch.cluster > 1);
        let mut attributes = if is_programmatic { [programmatic, cluster] } else { [cluster, programmatic] };
        let [x, y, z] = launch.blocks;
        let config = CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(is_programmatic) + u32::from(in_clusters),
        };
        let mut params: [*mut c_void; 1] = [(&raw const *args).cast_mut().cast()];
        // SAFETY: the driver reads and copies the one argument before it returns; the caller answers for the rest.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                launch.function,
                params.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(driver(self.info().ordinal, "cuLaunchKernelEx"))
    }

    /// That a tensor lies in the memory of this device.
    pub(super) fn owns(&self, argument: &'static str, address: DeviceAddress) -> Result<(), CudaError> {
        let expected = self.info().ordinal;
        let DeviceAddress(address) = address;
        let mut ordinal: i32 = 0;
        // SAFETY: asks about an address and does not follow it; the answer to this question is an `int`.
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
        if got == Some(expected) {
            return Ok(());
        }
        Err(CudaError::WrongDevice { argument, address, got, expected })
    }
}
