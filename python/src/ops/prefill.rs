//! Prefill: the function, and what both doors come to.

use gdn::{Checkpoints, Cpu, Prefill, cuda};
use pyo3::prelude::*;

use super::{
    layer::{
        CONV_STATE, Host, MORE_INDICES, MORE_STATES, MORE_WINDOWS, Names, OUT, OnDevice, Operands,
        RECURRENT_STATE, SECOND_INDICES, STATE_INDICES, Settings, Side, THIRD_INDICES, names, no_device,
        not_both, refused, refused_by_gpu,
    },
    objects::{Unread, Wish, objects_of, on_objects, projections_of},
};
use crate::{
    ops::{Place, Scratch, gpu, integer, size},
    tensor::{Device, value_error},
};

/// The tensors by position.
pub(crate) static TENSORS: Names =
    names(["cu_seqlens", "has_initial_state", "checkpoint_starts", "state_checkpoints", "conv_checkpoints"]);

/// A call, but for its tensors.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    pub(crate) layer: gdn::Layer,
    pub(crate) pad_slot_id: i64,
    /// 0 where there are no checkpoints.
    pub(crate) checkpoint_every_n_tokens: usize,
    /// [`cuda::Gpu::segments`]; on the CPU nothing changes.
    pub(crate) segments: bool,
}

impl Call {
    /// Checks everything but the values of indices.
    pub(crate) fn check(&self, operands: &Operands, place: &Place) -> PyResult<()> {
        operands.check()?;
        let device = operands.device();
        match device.kind {
            _ if device.is_cpu() => self.build::<Host<'_>>(operands)?.check().map_err(refused),
            Device::CUDA => {
                let call = self.build::<OnDevice>(operands)?;
                scratch_of(operands, place)?;
                self.gpu(device)?.check_prefill(&call).map_err(refused_by_gpu)
            }
            _ => Err(no_device(operands, "prefill", "cpu or cuda")),
        }
    }

    /// Does it, on tensors that [`Call::check`] saw.
    ///
    /// # Safety
    /// The tensors are where they say, and stay; while this runs nothing else writes to those that are read
    /// or touches those that are written. On a GPU the same until the work on the stream is done.
    pub(crate) unsafe fn run(&self, operands: &Operands, place: &Place) -> PyResult<()> {
        let device = operands.device();
        if device.kind == Device::CUDA && !device.is_cpu() {
            let call = self.build::<OnDevice>(operands)?;
            let (gpu, stream) = (self.gpu(device)?, (place.stream)(device)?);
            let (num_tokens, entries) = (call.out.sizes()[0], call.cu_seqlens.sizes()[0]);
            let bytes = cuda::prefill_scratch_bytes(&call.layer, num_tokens, entries.saturating_sub(1));
            return scratch_of(operands, place)?(device, bytes, &mut |at| {
                // SAFETY: the caller's promise, and memory that is free for work on this stream.
                unsafe { gpu.prefill_raw(&call, (at, bytes), stream.cast()) }.map_err(refused_by_gpu)
            });
        }
        if !device.is_cpu() {
            return Err(no_device(operands, "prefill", "cpu or cuda"));
        }
        let mut call = self.build::<Host<'_>>(operands)?;
        let heads = self.layer.heads();
        // Arithmetic takes the time: a multiplication of the delta rule counts as a byte.
        let work = call.out.sizes().iter().fold(heads.head_k_dim(), |work, size| work.saturating_mul(*size));
        place.on_cpu(work, |cpu: &Cpu| gdn::prefill(&mut call, cpu).map_err(refused))
    }

    /// The device, and how it is to do this call.
    fn gpu(&self, device: Device) -> PyResult<cuda::Gpu> {
        Ok(gpu(device.ordinal)?.clone().segments(self.segments))
    }

    /// The library's call.
    fn build<S: Side>(&self, operands: &Operands) -> PyResult<Prefill<S::Read, S::Write>> {
        let heads = self.layer.heads();
        let has = |i| operands.has(i);
        let every = self.checkpoint_every_n_tokens;
        let checkpoints = if every == 0 {
            if let Some(i) = [MORE_INDICES, MORE_STATES, MORE_WINDOWS].into_iter().find(|i| has(*i)) {
                return Err(not_both(TENSORS[i], "where checkpoint_every_n_tokens is 0"));
            }
            None
        } else {
            Some(Checkpoints {
                every,
                starts: operands.entries::<S>(MORE_INDICES)?,
                recurrent_states: operands.write::<S, 4>(MORE_STATES)?,
                conv_states: has(MORE_WINDOWS).then(|| operands.write::<S, 3>(MORE_WINDOWS)).transpose()?,
            })
        };
        let (width, weights) = operands.weights::<S>()?;
        Ok(Prefill {
            layer: gdn::Layer { conv_width: width, ..self.layer },
            cu_seqlens: operands.entries::<S>(SECOND_INDICES)?,
            projections: operands.projections::<S>(&heads)?,
            weights,
            conv_state: has(CONV_STATE).then(|| operands.write::<S, 3>(CONV_STATE)).transpose()?,
            recurrent_state: has(RECURRENT_STATE)
                .then(|| operands.write::<S, 4>(RECURRENT_STATE))
                .transpose()?,
            slots: operands.slots::<S>(self.pad_slot_id)?,
            has_initial_state: has(THIRD_INDICES)
                .then(|| operands.entries::<S>(THIRD_INDICES))
                .transpose()?,
            checkpoints,
            out: operands.write::<S, 3>(OUT)?,
        })
    }
}

/// Where the memory comes from that prefill takes on a GPU.
fn scratch_of(operands: &Operands, place: &Place) -> PyResult<Scratch> {
    place.scratch.ok_or_else(|| {
        value_error(format!(
            "{} is on {} and no torch.Tensor: gdn.prefill takes memory there, from PyTorch's allocator. Give PyTorch \
             tensors, which torch.from_dlpack makes of such arrays without a copy",
            operands.names[operands.first()],
            operands.device()
        ))
    })
}

/// Tokens from a checkpoint to the next, 0 for none.
pub(crate) fn every(number: i64) -> PyResult<usize> {
    usize::try_from(number).map_err(|_| {
        value_error(format!(
            "checkpoint_every_n_tokens is {number}, it must be 0 or a multiple of {}",
            gdn::CHUNK
        ))
    })
}

/// `Layer.prefill`, in the way of [`decode`](super::decode::decode).
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "those of the Python function")]
pub(crate) fn prefill<'py>(
    py: Python<'py>,
    settings: &Settings,
    projections: &Bound<'py, PyAny>,
    cu_seqlens: Option<&Bound<'py, PyAny>>,
    conv_state: Option<&Bound<'py, PyAny>>,
    recurrent_state: Option<&Bound<'py, PyAny>>,
    state_indices: Option<&Bound<'py, PyAny>>,
    pad_slot_id: &Bound<'py, PyAny>,
    has_initial_state: Option<&Bound<'py, PyAny>>,
    checkpoint_every_n_tokens: &Bound<'py, PyAny>,
    checkpoint_starts: Option<&Bound<'py, PyAny>>,
    state_checkpoints: Option<&Bound<'py, PyAny>>,
    conv_checkpoints: Option<&Bound<'py, PyAny>>,
    segments: bool,
    out: Option<&Bound<'py, PyAny>>,
    only_check: bool,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let call = Call {
        layer: settings.layer,
        pad_slot_id: integer(pad_slot_id, "pad_slot_id", i64::MIN)?,
        checkpoint_every_n_tokens: size(checkpoint_every_n_tokens, "checkpoint_every_n_tokens", 0)?,
        segments,
    };
    let projections = projections_of(projections)?;
    let others = [
        (CONV_STATE, conv_state),
        (RECURRENT_STATE, recurrent_state),
        (STATE_INDICES, state_indices),
        (SECOND_INDICES, cu_seqlens),
        (THIRD_INDICES, has_initial_state),
        (MORE_INDICES, checkpoint_starts),
        (MORE_STATES, state_checkpoints),
        (MORE_WINDOWS, conv_checkpoints),
        (OUT, out),
    ];
    let objects = objects_of(&projections, settings.weights(py), others)?;
    let wish = if only_check { Wish::Check } else { Wish::Run };
    let recall = |_: &Unread<'_, 'py>| None::<fn(&Place) -> PyResult<()>>;
    let check = |operands: &Operands, place: &Place| call.check(operands, place);
    // SAFETY: the objects are borrowed for the call. Python's users answer for races, as with any function on
    // arrays.
    let run = |(), operands: &Operands, place: &Place| unsafe { call.run(operands, place) };
    on_objects(py, &TENSORS, &call.layer.heads(), &objects, wish, recall, check, run)
}
