//! Decode: the function, and what both doors come to.

use std::sync::Arc;

use gdn::{ConvState, Cpu, Decode, Keep, RecurrentState, cuda};
use pyo3::prelude::*;

use super::{
    layer::{
        CONV_STATE, Host, MORE_INDICES, MORE_STATES, MORE_WINDOWS, Names, OUT, OnDevice, Operands,
        RECURRENT_STATE, SECOND_INDICES, STATE_INDICES, Settings, Side, THIRD_INDICES, names, no_device,
        not_both, refused, refused_by_gpu,
    },
    objects::{Objects, Unread, Wish, objects_of, on_objects, projections_of},
};
use crate::{
    ops::{Place, gpu, integer, seen, size},
    tensor::{Device, value_error},
};

/// The tensors by position.
pub(crate) static TENSORS: Names = names([
    "num_accepted_tokens",
    "output_state_indices",
    "intermediate_state_indices",
    "intermediate_states",
    "intermediate_conv_windows",
]);

/// A call, but for its tensors.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Call {
    pub(crate) layer: gdn::Layer,
    pub(crate) tokens_per_sequence: usize,
    pub(crate) pad_slot_id: i64,
    pub(crate) disable_state_update: bool,
}

/// A call that was checked.
#[expect(clippy::large_enum_variant, reason = "handed on once; a box would cost more")]
pub(crate) enum Checked {
    /// Views that live as long as who calls [`Checked::run`] promises.
    Cpu(gdn::CheckedDecode<'static>),
    /// What is left is the launch.
    Gpu(&'static cuda::Gpu, Arc<cuda::DecodePlan>),
}

impl Call {
    /// Checks everything but the values of indices.
    pub(crate) fn check(&self, operands: &Operands) -> PyResult<Checked> {
        let device = operands.device();
        let is_on_gpu = device.kind == Device::CUDA;
        if let Some((gpu, plan)) = is_on_gpu.then(|| seen::get(self, operands)).flatten() {
            return Ok(Checked::Gpu(gpu, plan));
        }
        operands.check()?;
        match device.kind {
            _ if device.is_cpu() => {
                self.build::<Host<'static>>(operands)?.checked().map(Checked::Cpu).map_err(refused)
            }
            Device::CUDA => {
                let (call, gpu) = (self.build::<OnDevice>(operands)?, gpu(device.ordinal)?);
                let plan = Arc::new(gpu.plan_decode(&call).map_err(refused_by_gpu)?);
                seen::keep(self, operands, gpu, &plan);
                Ok(Checked::Gpu(gpu, plan))
            }
            _ => Err(no_device(operands, "decode", "cpu or cuda")),
        }
    }

    /// The library's call.
    fn build<S: Side>(&self, operands: &Operands) -> PyResult<Decode<S::Read, S::Write>> {
        let heads = self.layer.heads();
        let has = |i| operands.has(i);
        let given = |i: usize, where_| Err(not_both(TENSORS[i], where_));
        let has_more = has(MORE_STATES) || has(MORE_WINDOWS);
        if has(MORE_INDICES) && !has_more {
            return given(
                MORE_INDICES,
                "where neither intermediate_states nor intermediate_conv_windows is given",
            );
        }
        if has(THIRD_INDICES) && has_more {
            return given(THIRD_INDICES, "where intermediate_states or intermediate_conv_windows is given");
        }
        if has(THIRD_INDICES) && self.disable_state_update {
            return given(THIRD_INDICES, "where disable_state_update is True");
        }
        let more_indices = || has(MORE_INDICES).then(|| operands.entries::<S>(MORE_INDICES)).transpose();
        let (width, weights) = operands.weights::<S>()?;
        let conv_keep = if has(MORE_WINDOWS) {
            Keep::EachIn { states: operands.write_windows::<S>(MORE_WINDOWS)?, indices: more_indices()? }
        } else if has(THIRD_INDICES) {
            Keep::LastAt(operands.entries::<S>(THIRD_INDICES)?)
        } else if self.disable_state_update {
            Keep::Nothing
        } else {
            Keep::Last
        };
        let has_columns = operands.tensors[STATE_INDICES].is_some_and(|indices| indices.shape().len() == 2);
        let recurrent_keep = if has(MORE_STATES) {
            Keep::EachIn { states: operands.write::<S, 5>(MORE_STATES)?, indices: more_indices()? }
        } else if has(THIRD_INDICES) {
            Keep::LastAt(operands.entries::<S>(THIRD_INDICES)?)
        } else if self.disable_state_update {
            Keep::Nothing
        } else if has_columns {
            Keep::Each
        } else {
            Keep::Last
        };
        Ok(Decode {
            layer: gdn::Layer { conv_width: width, ..self.layer },
            tokens_per_sequence: self.tokens_per_sequence,
            projections: operands.projections::<S>(&heads)?,
            weights,
            conv_state: ConvState { state: operands.write::<S, 3>(CONV_STATE)?, keep: conv_keep },
            recurrent_state: RecurrentState {
                state: operands.write::<S, 4>(RECURRENT_STATE)?,
                keep: recurrent_keep,
            },
            slots: operands.slots::<S>(self.pad_slot_id)?,
            num_accepted_tokens: has(SECOND_INDICES)
                .then(|| operands.entries::<S>(SECOND_INDICES))
                .transpose()?,
            out: operands.write::<S, 3>(OUT)?,
        })
    }
}

impl Checked {
    /// Does it.
    ///
    /// # Safety
    /// The tensors that were checked are where they said, and stay; while this runs nothing else writes to
    /// those that are read or touches those that are written. On a GPU the same until the work on the stream
    /// is done.
    pub(crate) unsafe fn run(self, place: &Place) -> PyResult<()> {
        match self {
            // SAFETY: the caller's promise.
            Self::Gpu(gpu, plan) => unsafe { launch(gpu, &plan, place) },
            // States are most of what is read.
            Self::Cpu(call) => place.on_cpu(call.state_bytes(), |cpu: &Cpu| call.run(cpu).map_err(refused)),
        }
    }
}

/// # Safety
/// That of [`Checked::run`], for the tensors of the call that was planned.
unsafe fn launch(gpu: &cuda::Gpu, plan: &cuda::DecodePlan, place: &Place) -> PyResult<()> {
    let stream = (place.stream)(Device { kind: Device::CUDA, ordinal: gpu.info().ordinal as i32 })?;
    // SAFETY: the caller's promise.
    unsafe { gpu.launch_decode(plan, stream.cast()) }.map_err(refused_by_gpu)
}

/// Python's name for T, as the library says it.
pub(crate) fn tokens_per_sequence(number: i64) -> PyResult<usize> {
    usize::try_from(number).map_err(|_| {
        let most = gdn::MAX_TOKENS;
        value_error(format!("tokens_per_sequence is {number}, it must be from 1 to {most}"))
    })
}

/// `Layer.decode`, but for what PyTorch has to see: `None` where the operator is to be called instead. With
/// `only_check` whether it could be called: `None`, or an exception.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "those of the Python function")]
pub(crate) fn decode<'py>(
    py: Python<'py>,
    settings: &Settings,
    projections: &Bound<'py, PyAny>,
    conv_state: Option<&Bound<'py, PyAny>>,
    recurrent_state: Option<&Bound<'py, PyAny>>,
    tokens_per_sequence: &Bound<'py, PyAny>,
    state_indices: Option<&Bound<'py, PyAny>>,
    pad_slot_id: &Bound<'py, PyAny>,
    num_accepted_tokens: Option<&Bound<'py, PyAny>>,
    output_state_indices: Option<&Bound<'py, PyAny>>,
    disable_state_update: bool,
    intermediate_states: Option<&Bound<'py, PyAny>>,
    intermediate_conv_windows: Option<&Bound<'py, PyAny>>,
    intermediate_state_indices: Option<&Bound<'py, PyAny>>,
    out: Option<&Bound<'py, PyAny>>,
    only_check: bool,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let call = Call {
        layer: settings.layer,
        tokens_per_sequence: size(tokens_per_sequence, "tokens_per_sequence", 1)?,
        pad_slot_id: integer(pad_slot_id, "pad_slot_id", i64::MIN)?,
        disable_state_update,
    };
    let projections = projections_of(projections)?;
    let others = [
        (CONV_STATE, conv_state),
        (RECURRENT_STATE, recurrent_state),
        (STATE_INDICES, state_indices),
        (SECOND_INDICES, num_accepted_tokens),
        (THIRD_INDICES, output_state_indices),
        (MORE_INDICES, intermediate_state_indices),
        (MORE_STATES, intermediate_states),
        (MORE_WINDOWS, intermediate_conv_windows),
        (OUT, out),
    ];
    let objects = objects_of(&projections, settings.weights(py), others)?;
    let wish = if only_check { Wish::Check } else { Wish::Run };
    on_python(py, &call, &objects, wish)
}

/// The same on a call's objects.
#[inline]
pub(super) fn on_python<'py>(
    py: Python<'py>,
    call: &Call,
    objects: &Objects<'_, 'py>,
    wish: Wish,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let recall = |unread: &Unread<'_, 'py>| {
        let (gpu, plan) = seen::recall(call, unread)?;
        // SAFETY: as below.
        Some(move |place: &Place| unsafe { launch(gpu, &plan, place) })
    };
    let check = |operands: &Operands, _: &Place| call.check(operands);
    // SAFETY: the objects are borrowed for the call. Python's users answer for races, as with any function on
    // arrays.
    let run = |checked: Checked, _: &Operands, place: &Place| unsafe { checked.run(place) };
    on_objects(py, &TENSORS, &call.layer.heads(), objects, wish, recall, check, run)
}
