//! [`Bench`]: an op and a copy of the same bytes, ready to be timed.

use std::{sync::Arc, time::Instant};

use cudarc::driver::{
    CudaGraph, CudaSlice, CudaStream, DevicePtr, DriverError,
    sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL},
};

use super::{
    device::Gpu,
    error::{CudaError, driver},
    host::Staged,
    staged::StagedCall,
};
use crate::{
    decode::Decode,
    packing::Layout,
    prefill::Prefill,
    rows::{Rows, RowsMut},
    tensor::{Exclusive, Shared},
    view::{Packed, Unpacked},
};

/// An op within a GPU's memory, and a copy of as many bytes, each captured in a CUDA graph of
/// [`Bench::calls`] calls: so many that starting the graph does not count. The calls are of the same
/// tensors, one after the other: what fits a cache of the device stays there, for the op and for the copy.
pub struct Bench {
    stream: Arc<CudaStream>,
    calls: usize,
    /// The op's, then the copy's.
    graphs: [CudaGraph; 2],
    /// What the graphs work on.
    _memory: Box<dyn Send>,
}

/// Calls in a graph at most.
const MOST_CALLS: usize = 50;
/// A graph of fewer calls takes about so long: starting it takes some microseconds.
const GRAPH_SECONDS: f64 = 0.01;

/// A stream of its own, and the GPU on it, which does the work as before: the default one cannot be captured.
fn on_own_stream(gpu: &Gpu) -> Result<(Arc<CudaStream>, Gpu), CudaError> {
    let stream = gpu.context().new_stream().map_err(driver(gpu.info().ordinal, "cuStreamCreate"))?;
    let gpu = gpu.on_stream(&stream);
    Ok((stream, gpu))
}

impl Bench {
    /// Splits `from` on the GPU into `to`, once, and captures.
    ///
    /// # Errors
    /// Those of [`split_host`](super::split_host()).
    pub fn split(
        layout: &Layout,
        from: Packed<Rows<'_>>,
        mut to: Unpacked<RowsMut<'_>>,
        gpu: &Gpu,
    ) -> Result<Self, CudaError> {
        let (stream, gpu) = on_own_stream(gpu)?;
        gpu.warmup_split()?;
        let bytes = [from.mixed_qkvz, from.mixed_ba]
            .map(|rows| rows.num_rows() * rows.features() * rows.element_size())
            .iter()
            .sum();
        let packed = [Staged::of(from.mixed_qkvz, &gpu)?, Staged::of(from.mixed_ba, &gpu)?];
        let host = [&mut to.mixed_qkv, &mut to.z, &mut to.b, &mut to.a];
        let mut unpacked = Vec::new();
        for rows in &host {
            unpacked.push(Staged::like(rows, &gpu)?);
        }
        let from = Packed { mixed_qkvz: packed[0].rows(&gpu)?, mixed_ba: packed[1].rows(&gpu)? };
        let mut rows = Vec::new();
        for staged in &mut unpacked {
            rows.push(staged.rows_mut(&gpu)?);
        }
        let into = Unpacked { mixed_qkv: rows[0], z: rows[1], b: rows[2], a: rows[3] };
        // SAFETY: six dense tensors of this device, which live as long as the graphs.
        let split = || unsafe { gpu.split_raw(layout, from, into, stream.cu_stream()) };
        split()?;
        for (staged, rows) in unpacked.iter().zip(host) {
            staged.download(rows, &gpu)?;
        }
        Ok(Self::of(&stream, bytes, &split)?.holding((packed, unpacked)))
    }

    /// Runs decode on the GPU once, as [`decode_host`](super::decode_host()) does, and captures calls that go
    /// on from there, beside a copy that reads and writes `bytes` together.
    ///
    /// # Errors
    /// Those of [`decode_host`](super::decode_host()).
    pub fn decode(
        call: &mut Decode<Shared<'_>, Exclusive<'_>>,
        bytes: usize,
        gpu: &Gpu,
    ) -> Result<Self, CudaError> {
        let (stream, gpu) = on_own_stream(gpu)?;
        Self::staged(&stream, StagedCall::decode(call, &gpu)?, bytes)
    }

    /// The same for [`prefill_host`](super::prefill_host()).
    ///
    /// # Errors
    /// Those of [`prefill_host`](super::prefill_host()).
    pub fn prefill(
        call: &mut Prefill<Shared<'_>, Exclusive<'_>>,
        bytes: usize,
        gpu: &Gpu,
    ) -> Result<Self, CudaError> {
        let (stream, gpu) = on_own_stream(gpu)?;
        Self::staged(&stream, StagedCall::prefill(call, &gpu)?, bytes)
    }

    fn staged(stream: &Arc<CudaStream>, staged: StagedCall<'_>, bytes: usize) -> Result<Self, CudaError> {
        staged.launch()?;
        let call = staged.fetch()?;
        let bench = Self::of(stream, bytes / 2, &|| call.launch())?;
        Ok(bench.holding(call))
    }

    /// Captures an op that was called before, and a copy of `bytes` to as many others.
    fn of(
        stream: &Arc<CudaStream>,
        bytes: usize,
        op: &dyn Fn() -> Result<(), CudaError>,
    ) -> Result<Self, CudaError> {
        let ordinal = stream.context().ordinal();
        let failed = |call: &'static str| move |error: DriverError| driver(ordinal, call)(error);
        let upload = |byte: u8| stream.clone_htod(&vec![byte; bytes.max(1)]).map_err(failed("cuMemcpyHtoD"));
        let memory: [CudaSlice<u8>; 2] = [upload(0x5A)?, upload(0)?];
        let [source, target] = memory.each_ref().map(|slice| slice.device_ptr(stream).0);
        let copy = || {
            // SAFETY: so many bytes are at both addresses, as long as the graphs live.
            unsafe { sys::cuMemcpyDtoDAsync_v2(target, source, bytes, stream.cu_stream()) }
                .result()
                .map_err(failed("cuMemcpyDtoDAsync"))
        };
        let wait = || stream.synchronize().map_err(failed("cuStreamSynchronize"));
        wait()?;
        let began = Instant::now();
        op()?;
        wait()?;
        let once = began.elapsed().as_secs_f64();
        let calls = ((GRAPH_SECONDS / once) as usize).clamp(1, MOST_CALLS);
        let capture = |call: &dyn Fn() -> Result<(), CudaError>| {
            stream
                .begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
                .map_err(failed("cuStreamBeginCapture"))?;
            let called = (0..calls).try_for_each(|_| call());
            let graph = stream.end_capture(CUgraphInstantiate_flags(0)).map_err(failed("cuStreamEndCapture"));
            called?;
            let nothing = DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
            graph?.ok_or_else(|| failed("cuStreamEndCapture")(nothing))
        };
        let graphs = [capture(op)?, capture(&copy)?];
        Ok(Self { stream: Arc::clone(stream), calls, graphs, _memory: Box::new(memory) })
    }

    /// Keeps what the graphs work on.
    fn holding(self, memory: impl Send + 'static) -> Self {
        Self { _memory: Box::new((self._memory, memory)), ..self }
    }

    /// How many calls a replay is.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Replays the op's graph, or that of the copy, so many times, and waits.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_timed_is_done_as_the_gpu_is_to_do_it() {
        let gpu = match Gpu::new(0) {
            Ok(gpu) => gpu.segments(true).programmatic(false).check_pointers(false),
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let (stream, own) = on_own_stream(&gpu).unwrap();
        assert!(Arc::ptr_eq(own.stream(), &stream) && !Arc::ptr_eq(own.stream(), gpu.stream()));
        assert!(own.segments && !own.programmatic && !own.check_pointers);
    }
}
