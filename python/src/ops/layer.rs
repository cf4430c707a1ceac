//! What decode and prefill share: a layer's numbers, their tensors by position, and those as the library
//! takes them.

use std::marker::PhantomData;

use gdn::{
    ArgumentError, DeviceAddress, Dtype, Exclusive, Gate, Heads, IndexType, Indices, Packed, Projections,
    Shared, Space, Unpacked, Weights,
    cuda::{self, CudaError},
};
use pyo3::{PyTraverseError, gc::PyVisit, prelude::*, types::PyTuple};

use crate::{
    ops::{cuda_error, layout, numbers_of, real, text},
    tensor::{DType, Device, Tensor, type_error, value_error},
};

/// The tensors of either op, by position: the projections (of which a call has the first two, or the next
/// four), weights, states, the output, indices, and states that are written besides.
pub(crate) const COUNT: usize = 20;
pub(crate) const CONV_WEIGHT: usize = 6;
pub(crate) const CONV_BIAS: usize = 7;
pub(crate) const NORM_WEIGHT: usize = 10;
pub(crate) const CONV_STATE: usize = 11;
pub(crate) const RECURRENT_STATE: usize = 12;
pub(crate) const OUT: usize = 13;
pub(crate) const STATE_INDICES: usize = 14;
/// Two more index tensors, the second of which says where [`MORE_STATES`] and [`MORE_WINDOWS`] go.
pub(crate) const SECOND_INDICES: usize = 15;
pub(crate) const THIRD_INDICES: usize = 16;
pub(crate) const MORE_INDICES: usize = 17;
pub(crate) const MORE_STATES: usize = 18;
pub(crate) const MORE_WINDOWS: usize = 19;

/// What an op calls its tensors.
pub(crate) type Names = [&'static str; COUNT];

/// The names of both ops up to [`STATE_INDICES`], and five of one of them.
pub(crate) const fn names(others: [&'static str; 5]) -> Names {
    let [a, b, c, d, e] = others;
    [
        "mixed_qkvz",
        "mixed_ba",
        "mixed_qkv",
        "z",
        "b",
        "a",
        "conv_weight",
        "conv_bias",
        "A_log",
        "dt_bias",
        "norm_weight",
        "conv_state",
        "recurrent_state",
        "out",
        "state_indices",
        a,
        b,
        c,
        d,
        e,
    ]
}

/// Those that are written to.
pub(crate) const WRITTEN: [usize; 5] = [CONV_STATE, RECURRENT_STATE, OUT, MORE_STATES, MORE_WINDOWS];

pub(crate) fn is_written(i: usize) -> bool {
    WRITTEN.contains(&i)
}

pub(crate) fn is_index(i: usize) -> bool {
    (STATE_INDICES..=MORE_INDICES).contains(&i)
}

/// The numbers of a layer, checked: what Python's `gdn.Layer` has made of them once; and its weights.
#[pyclass(frozen)]
pub(crate) struct Settings {
    pub(crate) layer: gdn::Layer,
    weights: Py<PyTuple>,
}

impl Settings {
    /// The weights, which are five or none.
    #[inline]
    pub(crate) fn weights<'py>(&self, py: Python<'py>) -> &Bound<'py, PyTuple> {
        self.weights.bind(py)
    }
}

#[pymethods]
impl Settings {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "those of the Python class")]
    fn new(
        heads: Bound<'_, PyAny>,
        packing: Bound<'_, PyAny>,
        l2norm_eps: Bound<'_, PyAny>,
        norm_eps: Bound<'_, PyAny>,
        scale: Option<Bound<'_, PyAny>>,
        beta_scale: Bound<'_, PyAny>,
        gate: Bound<'_, PyAny>,
        weights: Py<PyTuple>,
    ) -> PyResult<Self> {
        let factors = Factors {
            l2norm_eps: real(&l2norm_eps, "l2norm_eps")?,
            norm_eps: real(&norm_eps, "norm_eps")?,
            scale: scale.map(|scale| real(&scale, "scale")).transpose()?,
            beta_scale: real(&beta_scale, "beta_scale")?,
        };
        let layer = layer(numbers_of(&heads)?, &text(&packing, "packing")?, &factors, &text(&gate, "gate")?)?;
        Ok(Self { layer, weights })
    }

    /// For Python's garbage collector: weights may be objects that a layer is an attribute of.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.weights)
    }

    /// Why `op`, decode or prefill, has no kernel for such a layer on a type of devices, whatever the
    /// tensors.
    fn refusal(&self, op: &str, device_type: &str, conv_width: usize) -> Option<String> {
        let layer = gdn::Layer { conv_width, ..self.layer };
        let supported = match (device_type, op) {
            ("cpu", _) => Ok(()),
            ("cuda", "decode") => cuda::decode_supports(&layer),
            ("cuda", _) => cuda::prefill_supports(&layer),
            _ => return Some(format!("gdn.{op} has no kernel on {device_type}")),
        };
        supported.err().map(|error| error.to_string())
    }
}

/// The numbers of a layer that are no whole ones.
pub(crate) struct Factors {
    pub(crate) l2norm_eps: f64,
    pub(crate) norm_eps: f64,
    pub(crate) scale: Option<f64>,
    pub(crate) beta_scale: f64,
}

/// A layer; the width of its convolution is for the weight to say.
pub(crate) fn layer(heads: [i64; 4], packing: &str, factors: &Factors, gate: &str) -> PyResult<gdn::Layer> {
    let mut layer = gdn::Layer::new(layout(heads, packing)?);
    let Factors { l2norm_eps, norm_eps, scale, beta_scale } = *factors;
    for (name, number) in [("l2norm_eps", l2norm_eps), ("norm_eps", norm_eps)] {
        if !(number >= 0.0 && number.is_finite()) {
            return Err(value_error(format!("{name} is {number}, it must be at least 0 and finite")));
        }
    }
    for (name, number) in [("scale", scale.unwrap_or(1.0)), ("beta_scale", beta_scale)] {
        if !number.is_finite() {
            return Err(value_error(format!("{name} is {number}, it must be finite")));
        }
    }
    (layer.l2norm_eps, layer.norm_eps) = (l2norm_eps as f32, norm_eps as f32);
    layer.scale = scale.map_or(layer.scale, |scale| scale as f32);
    layer.beta_scale = beta_scale as f32;
    layer.gate = match gate {
        "silu" => Gate::Silu,
        "sigmoid" => Gate::Sigmoid,
        _ => return Err(value_error(format!("gate is '{gate}', it must be 'silu' or 'sigmoid'"))),
    };
    Ok(layer)
}

/// Where tensors are, as the library sees it: a backend's way to make its views.
pub(crate) trait Side {
    type Read: Space;
    type Write: Space<Raw = <Self::Read as Space>::Raw>;

    fn read<const D: usize>(
        address: usize,
        dtype: Dtype,
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<gdn::Tensor<Self::Read, D>, ArgumentError>;

    fn write<const D: usize>(
        address: usize,
        dtype: Dtype,
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<gdn::Tensor<Self::Write, D>, ArgumentError>;

    /// Windows `[slots, T, C, W - 1]` after each of T tokens.
    fn write_windows(
        address: usize,
        dtype: Dtype,
        sizes: [usize; 4],
        strides: [usize; 4],
    ) -> Result<gdn::Tensor<Self::Write, 4>, ArgumentError> {
        Self::write(address, dtype, sizes, strides)
    }

    fn indices<const D: usize>(
        address: usize,
        index_type: IndexType,
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<Indices<Self::Read, D>, ArgumentError>;
}

/// The host's memory, for views that live as long as a call.
pub(crate) struct Host<'a>(PhantomData<&'a ()>);

// Views are made of what a caller of `run` promised for as long as the call lasts, and are dropped with it:
// see `Checked::run`. Without one, only their shapes are looked at.
impl<'a> Side for Host<'a> {
    type Read = Shared<'a>;
    type Write = Exclusive<'a>;

    fn read<const D: usize>(
        address: usize,
        dtype: Dtype,
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<gdn::Tensor<Shared<'a>, D>, ArgumentError> {
        let at = std::ptr::with_exposed_provenance(address);
        // SAFETY: as above.
        unsafe { gdn::Tensor::from_raw(at, dtype, sizes, strides) }
    }

    fn write<const D: usize>(
        address: usize,
        dtype: Dtype,
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<gdn::Tensor<Exclusive<'a>, D>, ArgumentError> {
        let at = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: as above.
        unsafe { gdn::Tensor::from_raw_mut(at, dtype, sizes, strides) }
    }

    fn indices<const D: usize>(
        address: usize,
        index_type: IndexType,
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<Indices<Shared<'a>, D>, ArgumentError> {
        let at = std::ptr::with_exposed_provenance(address);
        // SAFETY: as above.
        unsafe { Indices::from_raw(at, index_type, sizes, strides) }
    }
}

/// A device's memory: addresses that nothing here follows.
pub(crate) struct OnDevice;

impl Side for OnDevice {
    type Read = DeviceAddress;
    type Write = DeviceAddress;

    fn read<const D: usize>(
        address: usize,
        dtype: Dtype,
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<gdn::Tensor<DeviceAddress, D>, ArgumentError> {
        gdn::Tensor::at_device(address as u64, dtype, sizes, strides)
    }

    fn write<const D: usize>(
        address: usize,
        dtype: Dtype,
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<gdn::Tensor<DeviceAddress, D>, ArgumentError> {
        gdn::Tensor::at_device_mut(address as u64, dtype, sizes, strides)
    }

    /// Those of consecutive tokens may share memory, each one input further on: what they share are the same
    /// inputs, so it does not matter which thread writes there last.
    fn write_windows(
        address: usize,
        dtype: Dtype,
        sizes: [usize; 4],
        strides: [usize; 4],
    ) -> Result<gdn::Tensor<DeviceAddress, 4>, ArgumentError> {
        let ([slots, tokens, channels, columns], [slot, token, channel, column]) = (sizes, strides);
        if tokens < 2 || token != column || sizes.contains(&0) {
            return Self::write(address, dtype, sizes, strides);
        }
        let memory = [slots, channels, tokens.saturating_add(columns - 1)];
        gdn::Tensor::at_device_mut(address as u64, dtype, memory, [slot, channel, column])?;
        gdn::Tensor::at_device(address as u64, dtype, sizes, strides)
    }

    fn indices<const D: usize>(
        address: usize,
        index_type: IndexType,
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<Indices<DeviceAddress, D>, ArgumentError> {
        Indices::at_device(address as u64, index_type, sizes, strides)
    }
}

/// The tensors of a call.
pub(crate) struct Operands {
    pub(crate) names: &'static Names,
    pub(crate) tensors: [Option<Tensor>; COUNT],
}

impl Operands {
    pub(crate) fn new(names: &'static Names) -> Self {
        Self { names, tensors: [const { None }; COUNT] }
    }

    pub(crate) fn has(&self, i: usize) -> bool {
        self.tensors[i].is_some()
    }

    /// The position of the first of the projections.
    pub(crate) fn first(&self) -> usize {
        if self.has(0) { 0 } else { 2 }
    }

    pub(crate) fn device(&self) -> Device {
        self.tensors[self.first()].map_or(Device::CPU, |tensor| tensor.device)
    }

    /// Checks each tensor by itself, and that all are on one device.
    pub(crate) fn check(&self) -> PyResult<()> {
        let (first, device) = (self.first(), self.device());
        for (i, name, tensor) in self.given() {
            tensor.check(name)?;
            if tensor.device != device && !(tensor.device.is_cpu() && device.is_cpu()) {
                let (got, other) = (tensor.device, self.names[first]);
                return Err(value_error(format!("{name} is on {got}, {other} is on {device}")));
            }
            if tensor.read_only && is_written(i) {
                return Err(value_error(format!("{name} is read-only, it is to be written")));
            }
            if is_index(i) {
                index_type(name, tensor)?;
            } else {
                dtype(name, tensor)?;
            }
        }
        Ok(())
    }

    fn given(&self) -> impl Iterator<Item = (usize, &'static str, &Tensor)> {
        let tensors = self.tensors.iter().zip(self.names).enumerate();
        tensors.filter_map(|(i, (tensor, name))| Some((i, *name, tensor.as_ref()?)))
    }

    /// A tensor that a call must have.
    fn known(&self, i: usize) -> PyResult<&Tensor> {
        self.tensors[i]
            .as_ref()
            .ok_or_else(|| value_error(format!("{} is None, expected a tensor", self.names[i])))
    }

    pub(crate) fn read<S: Side, const D: usize>(&self, i: usize) -> PyResult<gdn::Tensor<S::Read, D>> {
        let (name, tensor) = (self.names[i], self.known(i)?);
        let (sizes, strides) = places(name, tensor)?;
        S::read(tensor.address, dtype(name, tensor)?, sizes, strides).map_err(|e| refused(named(e, name)))
    }

    pub(crate) fn write<S: Side, const D: usize>(&self, i: usize) -> PyResult<gdn::Tensor<S::Write, D>> {
        let (name, tensor) = (self.names[i], self.known(i)?);
        let (sizes, strides) = places(name, tensor)?;
        S::write(tensor.address, dtype(name, tensor)?, sizes, strides).map_err(|e| refused(named(e, name)))
    }

    pub(crate) fn write_windows<S: Side>(&self, i: usize) -> PyResult<gdn::Tensor<S::Write, 4>> {
        let (name, tensor) = (self.names[i], self.known(i)?);
        let (sizes, strides) = places(name, tensor)?;
        S::write_windows(tensor.address, dtype(name, tensor)?, sizes, strides)
            .map_err(|e| refused(named(e, name)))
    }

    /// An entry for each sequence.
    pub(crate) fn entries<S: Side>(&self, i: usize) -> PyResult<Indices<S::Read, 1>> {
        let (name, tensor) = (self.names[i], self.known(i)?);
        let (sizes, strides) = places(name, tensor)?;
        S::indices(tensor.address, index_type(name, tensor)?, sizes, strides)
            .map_err(|e| refused(named(e, name)))
    }

    pub(crate) fn slots<S: Side>(&self, pad_slot_id: i64) -> PyResult<gdn::Slots<S::Read>> {
        let Some(tensor) = &self.tensors[STATE_INDICES] else {
            return Ok(gdn::Slots { state_indices: None, pad_slot_id });
        };
        let name = self.names[STATE_INDICES];
        let (sizes, strides) = match tensor.shape().len() {
            1 => {
                let ([n], [stride]) = places::<1>(name, tensor)?;
                ([n, 1], [stride, 0])
            }
            2 => places(name, tensor)?,
            dims => return Err(value_error(format!("{name} has {dims} dims, expected 1 or 2"))),
        };
        let indices = S::indices(tensor.address, index_type(name, tensor)?, sizes, strides);
        let indices = indices.map_err(|e| refused(named(e, name)))?;
        Ok(gdn::Slots { state_indices: Some(indices), pad_slot_id })
    }

    /// Rows of projections; z may have a dim for the heads.
    fn rows<S: Side>(&self, i: usize, heads: &Heads) -> PyResult<gdn::Tensor<S::Read, 2>> {
        let (name, tensor) = (self.names[i], self.known(i)?);
        let inner = (i == 3).then(|| [heads.num_v_heads(), heads.head_v_dim()]);
        let rows = tensor.rows(name, inner)?;
        let (sizes, strides) = ([rows.num_rows, rows.features], [rows.row_stride, 1]);
        S::read(tensor.address, dtype(name, tensor)?, sizes, strides).map_err(|e| refused(named(e, name)))
    }

    pub(crate) fn projections<S: Side>(&self, heads: &Heads) -> PyResult<Projections<S::Read>> {
        let rows = |i| self.rows::<S>(i, heads);
        Ok(if self.has(0) {
            Projections::Packed(Packed { mixed_qkvz: rows(0)?, mixed_ba: rows(1)? })
        } else {
            Projections::Unpacked(Unpacked { mixed_qkv: rows(2)?, z: rows(3)?, b: rows(4)?, a: rows(5)? })
        })
    }

    /// The weights, and the width of the convolution that they have.
    pub(crate) fn weights<S: Side>(&self) -> PyResult<(usize, Weights<S::Read>)> {
        let (name, tensor) = (self.names[CONV_WEIGHT], self.known(CONV_WEIGHT)?);
        let (sizes, strides) = match tensor.shape() {
            // As `torch.nn.Conv1d` has it, a group a channel.
            [_, 1, _] => {
                let ([channels, _, taps], [channel, _, tap]) = places::<3>(name, tensor)?;
                ([channels, taps], [channel, tap])
            }
            [_, _] => places(name, tensor)?,
            shape => {
                return Err(value_error(format!("{name} has shape {shape:?}, expected [C, W] or [C, 1, W]")));
            }
        };
        let conv_weight = S::read(tensor.address, dtype(name, tensor)?, sizes, strides);
        let weights = Weights {
            conv_weight: conv_weight.map_err(|e| refused(named(e, name)))?,
            conv_bias: if self.has(CONV_BIAS) { Some(self.read::<S, 1>(CONV_BIAS)?) } else { None },
            A_log: self.read::<S, 1>(CONV_BIAS + 1)?,
            dt_bias: self.read::<S, 1>(CONV_BIAS + 2)?,
            norm_weight: self.read::<S, 1>(NORM_WEIGHT)?,
        };
        Ok((sizes[1], weights))
    }

    /// The shape of an output for them.
    pub(crate) fn out_shape(&self, heads: &Heads) -> PyResult<[usize; 3]> {
        let rows = self.known(self.first())?.shape().first().copied().unwrap_or(0);
        Ok([usize::try_from(rows).unwrap_or(0), heads.num_v_heads(), heads.head_v_dim()])
    }
}

/// Lengths and strides of so many dims.
fn places<const D: usize>(name: &str, tensor: &Tensor) -> PyResult<([usize; D], [usize; D])> {
    let (shape, strides) = (tensor.shape(), tensor.strides());
    if shape.len() != D {
        return Err(value_error(format!("{name} has {} dims, expected {D}", shape.len())));
    }
    let mut places = ([0; D], [0; D]);
    for dim in 0..D {
        places.0[dim] = usize::try_from(shape[dim]).unwrap_or(0);
        // The stride of at most one element counts for nothing.
        places.1[dim] = match usize::try_from(strides[dim]) {
            Ok(stride) => stride,
            Err(_) if shape[dim] <= 1 => 0,
            Err(_) => {
                let got = strides[dim];
                return Err(value_error(format!(
                    "{name} has stride {got} in dim {dim}, expected none below 0"
                )));
            }
        };
    }
    Ok(places)
}

fn dtype(name: &str, tensor: &Tensor) -> PyResult<Dtype> {
    match tensor.dtype {
        DType { code: DType::FLOAT, bits: 32, lanes: 1 } => Ok(Dtype::F32),
        DType { code: DType::FLOAT, bits: 16, lanes: 1 } => Ok(Dtype::F16),
        DType { code: DType::BFLOAT, bits: 16, lanes: 1 } => Ok(Dtype::BF16),
        got => Err(type_error(format!("{name} has dtype {got}, expected float32, float16 or bfloat16"))),
    }
}

/// Flags are whole numbers too.
fn index_type(name: &str, tensor: &Tensor) -> PyResult<IndexType> {
    let is_flag = name == "has_initial_state";
    match tensor.dtype {
        DType { code: DType::INT, bits: 32, lanes: 1 } => Ok(IndexType::I32),
        DType { code: DType::INT, bits: 64, lanes: 1 } => Ok(IndexType::I64),
        DType { code: DType::BOOL | DType::UINT, bits: 8, lanes: 1 } if is_flag => Ok(IndexType::U8),
        got if is_flag => {
            Err(type_error(format!("{name} has dtype {got}, expected bool, uint8, int32 or int64")))
        }
        got => Err(type_error(format!("{name} has dtype {got}, expected int32 or int64"))),
    }
}

/// An error about a view, told of the tensor that it was to be of.
fn named(error: ArgumentError, name: &'static str) -> ArgumentError {
    match error {
        ArgumentError::Stride { dim, got, expected, .. } => {
            ArgumentError::Stride { argument: name, dim, got, expected }
        }
        ArgumentError::TooLarge { what } => ArgumentError::TooLarge { what: format!("{name}: {what}") },
        other => other,
    }
}

/// What the library calls an argument of an argument, and Python's name for it: longer ones first.
const RENAMED: [(&str, &str); 10] = [
    ("conv_state.keep.states", "intermediate_conv_windows"),
    ("conv_state.keep.indices", "intermediate_state_indices"),
    ("conv_state.keep", "output_state_indices"),
    ("recurrent_state.keep.states", "intermediate_states"),
    ("recurrent_state.keep.indices", "intermediate_state_indices"),
    ("recurrent_state.keep", "output_state_indices"),
    ("checkpoints.every", "checkpoint_every_n_tokens"),
    ("checkpoints.starts", "checkpoint_starts"),
    ("checkpoints.recurrent_states", "state_checkpoints"),
    ("checkpoints.conv_states", "conv_checkpoints"),
];

/// The library's refusal, as Python's exception.
#[cold]
pub(crate) fn refused(error: ArgumentError) -> PyErr {
    let mut text = error.to_string();
    for (ours, theirs) in RENAMED {
        if text.contains(ours) {
            text = text.replace(ours, theirs);
        }
    }
    if !matches!(error, ArgumentError::Dtype { .. }) {
        return value_error(text);
    }
    for (ours, theirs) in [(" bf16", " bfloat16"), (" f16", " float16"), (" f32", " float32")] {
        text = text.replace(ours, theirs);
    }
    type_error(text)
}

/// A call that has two arguments which do not go together.
#[cold]
pub(crate) fn not_both(argument: &str, where_: &str) -> PyErr {
    value_error(format!("{argument} is given, it must be None {where_}"))
}

/// That a call is on a device for which there is a kernel.
#[cold]
pub(crate) fn no_device(operands: &Operands, op: &str, expected: &str) -> PyErr {
    let (name, device) = (operands.names[operands.first()], operands.device());
    value_error(format!("{name} is on {device}, expected {expected}: gdn.{op} has no kernel for others"))
}

/// A GPU's refusal, as Python's exception.
#[cold]
pub(crate) fn refused_by_gpu(error: CudaError) -> PyErr {
    match error {
        CudaError::Argument(error) => refused(error),
        other => cuda_error(&other),
    }
}

/// An output that is not there yet, so that a call can be checked before memory is asked for.
pub(crate) fn imagined(like: &Tensor, shape: &[usize]) -> Tensor {
    // Far from where systems put memory, and at a multiple of every element.
    Tensor::dense((usize::MAX / 4) & !255, like.dtype, like.device, shape)
}
