//! Streams beside a caller's, for kernels that may run at the same time as the caller's next ones.

use std::sync::{Mutex, PoisonError};

use cudarc::driver::{
    result,
    sys::{
        self, CUevent, CUevent_flags, CUevent_wait_flags, CUstream, CUstreamCaptureMode,
        CUstreamCaptureStatus,
    },
};

use super::error::{CudaError, driver};

/// So many callers' streams have one of their own; more share them, which costs them time alone.
const MOST: usize = 8;

/// A stream of the highest priority, and events by which it and a caller's stream wait for one another.
#[derive(Debug)]
pub(super) struct Side {
    ordinal: usize,
    stream: CUstream,
    /// The stream that it was last beside: an address that is compared and never followed.
    caller: CUstream,
    forked: CUevent,
    done: [CUevent; 2],
}

// SAFETY: handles of the driver, which any thread may use.
unsafe impl Send for Side {}

/// Those of a context that no call uses. They are never destroyed: they go with the context.
#[derive(Debug, Default)]
pub(super) struct Sides(Mutex<Vec<Side>>);

impl Sides {
    /// One for a call on a caller's stream, until it is given back: two calls never share one while they are
    /// made, so a thread that captures a stream has nothing of another thread in its graph. A side that is
    /// still part of a capture is for the stream that is captured alone.
    ///
    /// The context is the thread's current one.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub(super) fn take(&self, ordinal: usize, caller: CUstream) -> Result<Side, CudaError> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut own, mut other) = (None, None);
        for (i, side) in free.iter().enumerate() {
            match side.capture() {
                CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE if side.caller != caller => {
                    other = Some(i)
                }
                CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED => {}
                _ if side.caller == caller => own = Some(i),
                _ => {}
            }
        }
        let shared = other.filter(|_| free.len() >= MOST);
        match own.or(shared) {
            Some(i) => Ok(Side { caller, ..free.swap_remove(i) }),
            None => Side::new(ordinal, caller),
        }
    }

    pub(super) fn give_back(&self, side: Side) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(side);
    }
}

impl Side {
    fn new(ordinal: usize, caller: CUstream) -> Result<Self, CudaError> {
        // A thread whose stream is being captured may make streams and events all the same: they have no part
        // in it.
        let _relaxed = Relaxed::new(ordinal)?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: writes the two numbers.
        unsafe { sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest) }
            .result()
            .map_err(driver(ordinal, "cuCtxGetStreamPriorityRange"))?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes the handle.
        unsafe { sys::cuStreamCreateWithPriority(&raw mut stream, flags, greatest) }
            .result()
            .map_err(driver(ordinal, "cuStreamCreateWithPriority"))?;
        let event = || {
            result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .map_err(driver(ordinal, "cuEventCreate"))
        };
        Ok(Self { ordinal, stream, caller, forked: event()?, done: [event()?, event()?] })
    }

    pub(super) fn stream(&self) -> CUstream {
        self.stream
    }

    /// What comes on this stream waits for all that the caller's stream has up to now.
    pub(super) fn fork(&self) -> Result<(), CudaError> {
        self.record(self.forked, self.caller)?;
        self.wait(self.stream, self.forked)
    }

    /// Remembers what this stream has up to now, for [`Side::join`] with the same number, modulo 2.
    pub(super) fn mark(&self, number: usize) -> Result<(), CudaError> {
        self.record(self.done[number % 2], self.stream)
    }

    /// What comes on the caller's stream waits for what was marked.
    pub(super) fn join(&self, number: usize) -> Result<(), CudaError> {
        self.wait(self.caller, self.done[number % 2])
    }

    fn record(&self, event: CUevent, stream: CUstream) -> Result<(), CudaError> {
        // SAFETY: an event of this side, and its stream or the caller's.
        unsafe { result::event::record(event, stream) }.map_err(driver(self.ordinal, "cuEventRecord"))
    }

    fn wait(&self, stream: CUstream, event: CUevent) -> Result<(), CudaError> {
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: as above.
        unsafe { result::stream::wait_event(stream, event, flags) }
            .map_err(driver(self.ordinal, "cuStreamWaitEvent"))
    }

    /// Where the driver does not say, as if the capture had failed: the side is not used.
    fn capture(&self) -> CUstreamCaptureStatus {
        let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: writes the status of a stream of this side.
        match unsafe { sys::cuStreamIsCapturing(self.stream, &raw mut status) }.result() {
            Ok(()) => status,
            Err(_) => CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED,
        }
    }
}

/// As long as it lives, the thread may make what a capture elsewhere forbids it.
struct Relaxed {
    before: CUstreamCaptureMode,
}

impl Relaxed {
    fn new(ordinal: usize) -> Result<Self, CudaError> {
        let mut before = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: exchanges the mode of this thread with the one given.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut before) }
            .result()
            .map_err(driver(ordinal, "cuThreadExchangeStreamCaptureMode"))?;
        Ok(Self { before })
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: as above. There is nobody to tell of a failure.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut self.before) };
    }
}
