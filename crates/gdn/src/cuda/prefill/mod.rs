//! Prefill on a GPU: the functions to call, on addresses and on cudarc's slices.

pub(crate) mod job;
pub(crate) mod scratch;

use cudarc::driver::{DevicePtrMut, sys::CUstream};

use self::job::{Job, Profile, named};
pub use self::{job::prefill_supports, scratch::prefill_scratch_bytes};
use super::{
    device::Gpu,
    error::CudaError,
    module::Current,
    slices::{OnStream, Read, Write},
};
use crate::{
    prefill::{Plan, Prefill},
    view::DeviceAddress,
};

impl Gpu {
    /// [`gdn::prefill`](crate::prefill()) by four kernel launches for each of some windows of chunks, and
    /// nothing else: on `stream`, and where there are several windows, one of the four on a stream beside it,
    /// which waits for all that `stream` had before and which `stream` waits for. The call returns before the
    /// work is done. It allocates no memory of the device, waits for nothing and reads nothing of its memory,
    /// so it can be captured in a CUDA graph once [`Gpu::warmup`] was called; `cu_seqlens`, indices and flags
    /// may change between replays.
    ///
    /// Shapes, dtypes, strides and overlaps are checked as on the CPU; [`prefill_supports`] says which layers
    /// are taken. Addresses are multiples of the
    /// size of their elements. Indices are read by the kernels, which touch nothing outside the tensors
    /// whatever these say: entries of `cu_seqlens` are brought to 0 to N, a sequence whose slot is not there
    /// is skipped as if it were padding. Rows that belong to no sequence are not written; where two sequences
    /// have one slot, what they leave there is not defined.
    ///
    /// Between the six steps numbers are f32 or, where matrices are multiplied, f16 that are scaled row by
    /// row, so results may be some 5e-4 of their norm off the exact ones (6e-4 was the most seen of a v head;
    /// an ill-conditioned one as much as a change of the inputs by 2^-11 makes), before they are rounded to
    /// the dtypes of outputs and states: for f32 too. A result has the same bits whatever the batch, the slot
    /// and the neighbours, and cut at any multiple of [`CHUNK`](crate::CHUNK) with f32 states.
    /// [`Gpu::segments`] trades the last of these for the time of a long sequence of few heads. On another kind
    /// of GPU the last bit may be another: silu and the gate are made by what the machine has for powers of two
    /// and for inverses.
    ///
    /// `scratch` is [`prefill_scratch_bytes`] bytes or more, at a multiple of 256.
    ///
    /// # Errors
    /// [`CudaError::Argument`], [`CudaError::WrongDevice`], [`CudaError::TooManySequences`],
    /// [`CudaError::Driver`].
    ///
    /// # Safety
    /// `stream` is a stream of this GPU's context, or null for its default stream. From when the first kernel
    /// starts until the last is done, all tensors and the scratch memory are in memory that the device can
    /// reach, those that are read are not written, those that are written neither read nor written by
    /// anything else, and these have no two elements in one place.
    pub unsafe fn prefill_raw(
        &self,
        call: &Prefill<DeviceAddress, DeviceAddress>,
        scratch: (DeviceAddress, usize),
        stream: CUstream,
    ) -> Result<(), CudaError> {
        let plan = Plan::new(call)?;
        // SAFETY: the caller's promise.
        unsafe { run(self, &plan, scratch, Profile::of(self), stream) }
    }

    /// Whether [`Gpu::prefill_raw`] takes a call: all that is checked before a kernel is launched, but for
    /// whose memory the addresses are and the scratch memory.
    ///
    /// # Errors
    /// [`CudaError::Argument`], [`CudaError::TooManySequences`].
    pub fn check_prefill(&self, call: &Prefill<DeviceAddress, DeviceAddress>) -> Result<(), CudaError> {
        let scratch = (DeviceAddress(0), usize::MAX);
        Job::new(&Plan::new(call)?, scratch, Profile::of(self)).map(|_| ())
    }
}

/// # Safety
/// That of [`Gpu::prefill_raw`], for the tensors of a plan.
pub(crate) unsafe fn run(
    gpu: &Gpu,
    plan: &Plan<DeviceAddress>,
    scratch: (DeviceAddress, usize),
    profile: Profile,
    stream: CUstream,
) -> Result<(), CudaError> {
    let Some(job) = Job::new(plan, scratch, profile)? else { return Ok(()) };
    let _current = Current::new(gpu.context())?;
    if gpu.check_pointers {
        named(plan, |argument, address, _| gpu.owns(argument, address))?;
        gpu.owns("scratch", scratch.0)?;
    }
    // SAFETY: the arguments were made from a checked plan, and the grids for them. The caller answers for the
    // memory and the stream.
    unsafe { job.launch(gpu, stream) }
}

/// Computes the layer between its two GEMMs for all tokens of B sequences, and brings their states up to
/// date, on the GPU's stream: the counterpart of [`gdn::prefill`](crate::prefill()), and what
/// [`Gpu::prefill_raw`] says.
///
/// The tensors are views of slices, as for [`decode`](super::decode()).
///
/// # Errors
/// Those of [`Gpu::prefill_raw`], and [`CudaError::WrongStream`] for views that were made for another stream
/// than this GPU's.
pub fn prefill(
    call: &mut Prefill<Read<'_>, Write<'_>>,
    scratch: &mut impl DevicePtrMut<u8>,
    gpu: &Gpu,
) -> Result<(), CudaError> {
    let plan = Plan::new(call)?;
    let stream = gpu.stream().cu_stream();
    streams(call, OnStream(stream))?;
    let len = scratch.len();
    let (address, _recorded) = scratch.device_ptr_mut(gpu.stream());
    // SAFETY: the elements lie within slices that the views borrow, the written ones exclusively and with no
    // two elements in one place; cudarc orders what comes before and after on this stream.
    unsafe { run(gpu, &plan, (address.into(), len), Profile::of(gpu), stream) }
}

/// That all views of a call were made for a stream.
fn streams(call: &Prefill<Read<'_>, Write<'_>>, stream: OnStream) -> Result<(), CudaError> {
    stream.expect_inputs(&call.projections, &call.weights)?;
    let checkpoints = call.checkpoints.as_ref();
    for (argument, got) in [
        ("cu_seqlens", Some(call.cu_seqlens.space().stream())),
        ("conv_state", call.conv_state.as_ref().map(|state| state.space().stream())),
        ("recurrent_state", call.recurrent_state.as_ref().map(|state| state.space().stream())),
        ("state_indices", call.slots.state_indices.as_ref().map(|indices| indices.space().stream())),
        ("has_initial_state", call.has_initial_state.as_ref().map(|flags| flags.space().stream())),
        ("checkpoints.starts", checkpoints.map(|kept| kept.starts.space().stream())),
        ("checkpoints.recurrent_states", checkpoints.map(|kept| kept.recurrent_states.space().stream())),
        (
            "checkpoints.conv_states",
            checkpoints.and_then(|kept| Some(kept.conv_states.as_ref()?.space().stream())),
        ),
        ("out", Some(call.out.space().stream())),
    ] {
        got.map_or(Ok(()), |got| stream.expect(argument, got))?;
    }
    Ok(())
}
