//! [`Bench`]: the op and a copy of the same bytes, ready to be timed.

use std::sync::Arc;

use cudarc::driver::{
    CudaGraph, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError,
    sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL},
};

use super::{
    device::Gpu,
    error::{CudaError, driver},
    views::RawRows,
};
use crate::{
    packing::Layout,
    rows::Rows,
    view::{Packed, Unpacked},
};

/// A split within a GPU's memory, and a copy of as many bytes as it reads, each captured in a CUDA graph of
/// [`Bench::CALLS`] calls: so many that starting the graph does not count.
pub struct Bench {
    stream: Arc<CudaStream>,
    /// The split's, then the copy's.
    graphs: [CudaGraph; 2],
    /// What the graphs work on.
    _memory: Vec<CudaSlice<u8>>,
    results: [Vec<u8>; 4],
    shape: (usize, [usize; 2], [usize; 4]),
}

impl Bench {
    /// Calls in a graph.
    pub const CALLS: usize = 50;

    /// Copies `from` to the GPU, splits it there once, and captures.
    ///
    /// # Errors
    /// Those of [`split`](super::split()), for outputs of the right shape.
    pub fn new(layout: &Layout, from: Packed<Rows<'_>>, gpu: &Gpu) -> Result<Self, CudaError> {
        let ordinal = gpu.info().ordinal;
        let failed = |call: &'static str| move |error: DriverError| driver(ordinal, call)(error);
        // A stream of its own: the default one cannot be captured.
        let stream = gpu.context().new_stream().map_err(failed("cuStreamCreate"))?;
        let gpu = Gpu::on(&stream)?;
        gpu.warmup_split()?;
        let heads = layout.heads;
        let (n, hv) = (from.mixed_qkvz.num_rows(), heads.num_v_heads());
        let sizes = [from.mixed_qkvz.element_size(), from.mixed_ba.element_size()];
        let features = [heads.qkv_features(), heads.z_features(), hv, hv];
        let upload = |bytes: &[u8]| stream.clone_htod(bytes).map_err(failed("cuMemcpyHtoD"));
        let mut memory = Vec::new();
        let mut addresses = Vec::new();
        for (i, rows) in [from.mixed_qkvz, from.mixed_ba].into_iter().enumerate() {
            let bytes: Vec<u8> = (0..n).flat_map(|n| rows.row(n).unwrap_or_default()).copied().collect();
            memory.push(upload(&bytes)?);
            addresses.push((sizes[i], rows.features()));
        }
        for (i, features) in features.into_iter().enumerate() {
            memory.push(upload(&vec![0xA5; n * features * sizes[i / 2]])?);
            addresses.push((sizes[i / 2], features));
        }
        let mut rows = Vec::new();
        for (slice, (size, features)) in memory.iter_mut().zip(addresses) {
            rows.push(RawRows::new(slice.device_ptr_mut(&stream).0, size, n, features, features)?);
        }
        let packed = Packed { mixed_qkvz: rows[0], mixed_ba: rows[1] };
        let unpacked = Unpacked { mixed_qkv: rows[2], z: rows[3], b: rows[4], a: rows[5] };
        // SAFETY: six dense tensors of this device, which live as long as the graphs.
        let split = || unsafe { gpu.split_raw(layout, packed, unpacked, stream.cu_stream()) };
        split()?;
        let mut results = [const { Vec::new() }; 4];
        for (result, slice) in results.iter_mut().zip(&memory[2..]) {
            *result = stream.clone_dtoh(slice).map_err(failed("cuMemcpyDtoH"))?;
        }
        let bytes = memory[..2].iter().map(CudaSlice::len).sum();
        memory.push(upload(&vec![0x5A; bytes])?);
        memory.push(upload(&vec![0; bytes])?);
        let (source, target) = (memory[6].device_ptr(&stream).0, memory[7].device_ptr(&stream).0);
        let copy = || {
            // SAFETY: so many bytes are at both addresses, as long as the graphs live.
            unsafe { sys::cuMemcpyDtoDAsync_v2(target, source, bytes, stream.cu_stream()) }
                .result()
                .map_err(failed("cuMemcpyDtoDAsync"))
        };
        let capture = |call: &dyn Fn() -> Result<(), CudaError>| {
            stream
                .begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
                .map_err(failed("cuStreamBeginCapture"))?;
            let called = (0..Self::CALLS).try_for_each(|_| call());
            let graph = stream.end_capture(CUgraphInstantiate_flags(0)).map_err(failed("cuStreamEndCapture"));
            called?;
            let nothing = DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
            graph?.ok_or_else(|| failed("cuStreamEndCapture")(nothing))
        };
        let graphs = [capture(&split)?, capture(&copy)?];
        Ok(Self { stream, graphs, _memory: memory, results, shape: (n, sizes, features) })
    }

    /// What the split made, copied back.
    ///
    /// # Errors
    /// None that the shapes of [`Bench::new`] can have.
    pub fn unpacked(&self) -> Result<Unpacked<Rows<'_>>, CudaError> {
        let (n, sizes, features) = self.shape;
        let rows = |i: usize| Rows::from_bytes(&self.results[i], sizes[i / 2], n, features[i]);
        Ok(Unpacked { mixed_qkv: rows(0)?, z: rows(1)?, b: rows(2)?, a: rows(3)? })
    }

    /// Replays the split's graph, or that of the copy, so many times, and waits.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn replay(&self, copy: bool, times: usize) -> Result<(), CudaError> {
        let ordinal = self.stream.context().ordinal();
        (0..times)
            .try_for_each(|_| self.graphs[usize::from(copy)].launch())
            .and_then(|()| self.stream.synchronize())
            .map_err(driver(ordinal, "cuGraphLaunch"))
    }
}
