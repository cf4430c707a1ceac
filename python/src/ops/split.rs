//! Split and merge of six tensors: the two functions, and what both doors come to.

use gdn::{Cpu, Direction, Heads, Layout, Packed, Rows, RowsMut, TENSORS, Unpacked, cuda, from_order};
use pyo3::{
    prelude::*,
    types::{PyString, PyTuple},
};

use crate::{
    dlpack,
    ops::{self, Place, WORTH_DETACHING, cuda_error, gpu, not_a, numbers},
    outputs::{fresh, handed_over},
    tensor::{Device, RowsOf, Shape, Tensor, type_error, value_error},
    torch::{self, Libtorch, type_name},
};

/// The shapes of outputs for N rows, in the order of [`TENSORS`].
pub(crate) fn shape(heads: &Heads, tensor: usize, num_rows: usize) -> Shape {
    match tensor {
        0 => [num_rows, heads.qkvz_features()].into(),
        1 => [num_rows, heads.ba_features()].into(),
        2 => [num_rows, heads.qkv_features()].into(),
        3 => [num_rows, heads.num_v_heads(), heads.head_v_dim()].into(),
        _ => [num_rows, heads.num_v_heads()].into(),
    }
}

/// A call whose tensors agree about devices and dtypes, and are rows. Shapes and overlaps are for [`gdn::split()`] to check.
pub(crate) struct Call<'a> {
    layout: Layout,
    direction: Direction,
    tensors: &'a [Tensor; 6],
    rows: [RowsOf; 6],
}

/// Checks one tensor that is read, as far as it can be checked by itself: for calls that go on elsewhere.
#[inline]
pub(crate) fn check(tensor: &Tensor, argument: usize, layout: &Layout) -> PyResult<RowsOf> {
    let heads = &layout.heads;
    let inner = (argument == 3).then(|| [heads.num_v_heads(), heads.head_v_dim()]);
    let rows = tensor.rows(TENSORS[argument], inner)?;
    if tensor.dtype.size() == 0 {
        return Err(type_error(format!(
            "{} has dtype {}, expected whole bytes",
            TENSORS[argument], tensor.dtype
        )));
    }
    Ok(rows)
}

impl<'a> Call<'a> {
    /// `tensors` in the order of [`TENSORS`].
    #[inline]
    pub(crate) fn new(layout: Layout, direction: Direction, tensors: &'a [Tensor; 6]) -> PyResult<Self> {
        let first = direction.read().start;
        let mut rows = [RowsOf { num_rows: 0, features: 0, row_stride: 0 }; 6];
        for (i, tensor) in tensors.iter().enumerate() {
            rows[i] = check(tensor, i, &layout)?;
            let argument = TENSORS[i];
            if tensor.device != tensors[first].device
                && !(tensor.device.is_cpu() && tensors[first].device.is_cpu())
            {
                let (got, other, expected) = (tensor.device, TENSORS[first], tensors[first].device);
                return Err(value_error(format!("{argument} is on {got}, {other} is on {expected}")));
            }
            let like = direction.like(i);
            if tensor.dtype != tensors[like].dtype {
                let (got, other, expected) = (tensor.dtype, TENSORS[like], tensors[like].dtype);
                return Err(type_error(format!("{argument} has dtype {got}, {other} has {expected}")));
            }
            if tensor.read_only && direction.written().contains(&i) {
                return Err(value_error(format!("{argument} is read-only, it is to be written")));
            }
        }
        Ok(Self { layout, direction, tensors, rows })
    }

    /// Bytes to be read.
    pub(crate) fn bytes(&self) -> usize {
        self.tensors[..2]
            .iter()
            .zip(&self.rows)
            .map(|(tensor, rows)| {
                rows.num_rows.saturating_mul(rows.features).saturating_mul(tensor.dtype.size())
            })
            .fold(0, usize::saturating_add)
    }

    pub(crate) fn is_cpu(&self) -> bool {
        self.tensors[0].device.is_cpu()
    }

    /// Does it.
    ///
    /// # Safety
    /// The tensors are where they say, and stay; while this runs nothing else writes to those that are read or touches those that are
    /// written. On a GPU the same until the work on the stream is done.
    #[inline]
    pub(crate) unsafe fn run(&self, place: &Place) -> PyResult<()> {
        let device = self.tensors[0].device;
        match device.kind {
            _ if device.is_cpu() => {
                // SAFETY: the caller's promise.
                place.on_cpu(self.bytes(), |cpu| unsafe { self.on_cpu(cpu) })
            }
            // SAFETY: the caller's promise.
            Device::CUDA => unsafe { self.on_cuda(device, (place.stream)(device)?) },
            _ => Err(value_error(format!("mixed_qkvz is on {device}, expected cpu or cuda"))),
        }
    }

    /// # Safety
    /// That of [`Call::run`].
    unsafe fn on_cpu(&self, cpu: &Cpu) -> PyResult<()> {
        let bad = |i: usize| move |e: gdn::ArgumentError| value_error(format!("{}: {e}", TENSORS[i]));
        let read = |i: usize| {
            let (tensor, rows) = (&self.tensors[i], &self.rows[i]);
            let ptr = std::ptr::with_exposed_provenance(tensor.address);
            // SAFETY: the caller's promise.
            unsafe { Rows::from_raw(ptr, tensor.dtype.size(), rows.num_rows, rows.features, rows.row_stride) }
                .map_err(bad(i))
        };
        let write = |i: usize| {
            let (tensor, rows) = (&self.tensors[i], &self.rows[i]);
            let ptr = std::ptr::with_exposed_provenance_mut(tensor.address);
            // SAFETY: the caller's promise.
            unsafe {
                RowsMut::from_raw(ptr, tensor.dtype.size(), rows.num_rows, rows.features, rows.row_stride)
            }
            .map_err(bad(i))
        };
        let done = match self.direction {
            Direction::Split => gdn::split(
                &self.layout,
                Packed { mixed_qkvz: read(0)?, mixed_ba: read(1)? },
                Unpacked { mixed_qkv: write(2)?, z: write(3)?, b: write(4)?, a: write(5)? },
                cpu,
            ),
            Direction::Merge => gdn::merge(
                &self.layout,
                Unpacked { mixed_qkv: read(2)?, z: read(3)?, b: read(4)?, a: read(5)? },
                Packed { mixed_qkvz: write(0)?, mixed_ba: write(1)? },
                cpu,
            ),
        };
        done.map_err(|e| value_error(e.to_string()))
    }

    /// # Safety
    /// That of [`Call::run`], and `stream` is one of the device's primary context.
    unsafe fn on_cuda(&self, device: Device, stream: *mut std::ffi::c_void) -> PyResult<()> {
        let gpu = gpu(device.ordinal)?;
        let raw = |i: usize| {
            let (tensor, rows) = (&self.tensors[i], &self.rows[i]);
            cuda::RawRows::new(
                tensor.address as u64,
                tensor.dtype.size(),
                rows.num_rows,
                rows.features,
                rows.row_stride,
            )
            .map_err(|e| value_error(format!("{}: {e}", TENSORS[i])))
        };
        let (packed, unpacked) = from_order([raw(0)?, raw(1)?, raw(2)?, raw(3)?, raw(4)?, raw(5)?]);
        // SAFETY: the caller's promise.
        let done = unsafe {
            match self.direction {
                Direction::Split => gpu.split_raw(&self.layout, packed, unpacked, stream.cast()),
                Direction::Merge => gpu.merge_raw(&self.layout, unpacked, packed, stream.cast()),
            }
        };
        done.map_err(|e| cuda_error(&e))
    }
}

/// `gdn.split`, but for what PyTorch has to see: `None` where the operator is to be called instead.
#[pyfunction]
#[pyo3(signature = (mixed_qkvz, mixed_ba, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing, out = None))]
#[expect(clippy::too_many_arguments, reason = "those of the Python function")]
pub(crate) fn split<'py>(
    mixed_qkvz: Bound<'py, PyAny>,
    mixed_ba: Bound<'py, PyAny>,
    num_k_heads: Bound<'py, PyAny>,
    num_v_heads: Bound<'py, PyAny>,
    head_k_dim: Bound<'py, PyAny>,
    head_v_dim: Bound<'py, PyAny>,
    packing: Bound<'py, PyAny>,
    out: Option<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyTuple>>> {
    let heads = numbers(&[num_k_heads, num_v_heads, head_k_dim, head_v_dim])?;
    run(Direction::Split, [mixed_qkvz, mixed_ba], heads, &packing, out)
}

/// `gdn.merge`, in the same way.
#[pyfunction]
#[pyo3(signature = (mixed_qkv, z, b, a, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing, out = None))]
#[expect(clippy::too_many_arguments, reason = "those of the Python function")]
pub(crate) fn merge<'py>(
    mixed_qkv: Bound<'py, PyAny>,
    z: Bound<'py, PyAny>,
    b: Bound<'py, PyAny>,
    a: Bound<'py, PyAny>,
    num_k_heads: Bound<'py, PyAny>,
    num_v_heads: Bound<'py, PyAny>,
    head_k_dim: Bound<'py, PyAny>,
    head_v_dim: Bound<'py, PyAny>,
    packing: Bound<'py, PyAny>,
    out: Option<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyTuple>>> {
    let heads = numbers(&[num_k_heads, num_v_heads, head_k_dim, head_v_dim])?;
    run(Direction::Merge, [mixed_qkv, z, b, a], heads, &packing, out)
}

/// Either, on the tensors that are read, in the order of [`TENSORS`].
fn run<'py, const READ: usize>(
    direction: Direction,
    read: [Bound<'py, PyAny>; READ],
    heads: [i64; 4],
    packing: &Bound<'py, PyAny>,
    out: Option<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyTuple>>> {
    let py = read[0].py();
    let packing = packing.cast::<PyString>().map_err(|_| not_a("packing", packing, "str"))?;
    let layout = ops::layout(heads, packing.to_str()?)?;
    let first = direction.read().start;
    let torch = torch::get().filter(|torch| torch.is_tensor(&read[0]));
    let mut lent = Vec::new();
    let mut tensors = [Tensor::NONE; 6];
    let mut is_operator = false;
    for (i, object) in direction.read().zip(&read) {
        match torch {
            Some(torch) if torch.borrow(object, TENSORS[i], &mut tensors[i])? => {}
            Some(torch) if torch.is_tensor(object) => {
                tensors[i] = Tensor::NONE;
                is_operator = true;
            }
            Some(_) => return Err(other_framework(TENSORS[i], object, TENSORS[first])),
            None => lent.extend(dlpack::borrow(object, TENSORS[i], &mut tensors[i])?),
        }
    }
    if let Some(torch) = torch
        && (is_operator || torch.is_watched(&read)?)
    {
        // What can be checked is checked here all the same, so that errors are the same through both doors.
        for i in direction.read().filter(|i| tensors[*i].address != 0) {
            check(&tensors[i], i, &layout)?;
        }
        return Ok(None);
    }
    let mut buffers = Vec::new();
    let results = match &out {
        Some(out) => given(out, direction, torch, &mut tensors, &mut lent)?,
        None => made(&layout, direction, torch, &read, &mut tensors, &mut buffers)?,
    };
    let call = Call::new(layout, direction, &tensors)?;
    if let (Some(torch), Some(_)) = (torch, &out) {
        torch.advance_versions(&results)?;
    }
    let place = if torch.is_some() { torch::PLACE } else { Place::OURS };
    if call.is_cpu() && call.bytes() < WORTH_DETACHING {
        // SAFETY: the objects are borrowed for the call. Python's users answer for races, as with any function on arrays.
        unsafe { call.run(&place)? };
    } else {
        // SAFETY: as above.
        py.detach(|| unsafe { call.run(&place) })?;
    }
    if buffers.is_empty() {
        Ok(Some(results))
    } else {
        PyTuple::new(py, handed_over(&read[0], buffers)?).map(Some)
    }
}

/// The outputs that were given, and what they are.
fn given<'py>(
    out: &Bound<'py, PyAny>,
    direction: Direction,
    torch: Option<&Libtorch>,
    tensors: &mut [Tensor; 6],
    lent: &mut Vec<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyTuple>> {
    let py = out.py();
    let given = out
        .extract::<Bound<'py, PyTuple>>()
        .or_else(|_| out.try_iter().and_then(|items| PyTuple::new(py, items.collect::<PyResult<Vec<_>>>()?)));
    let given = given.map_err(|_| out_error(direction, &type_name(out)))?;
    if given.len() != direction.written().len() {
        return Err(out_error(direction, &format!("{} of them", given.len())));
    }
    let is_grad_enabled = torch.is_some_and(Libtorch::is_grad_enabled);
    for (i, object) in direction.written().zip(given.iter_borrowed()) {
        match torch {
            Some(torch) if is_grad_enabled && torch.is_plain(&object) && torch.requires_grad(&object)? => {
                let argument = TENSORS[i];
                return Err(value_error(format!(
                    "{argument} requires grad: what is written to has no gradient"
                )));
            }
            Some(torch) if torch.borrow(&object, TENSORS[i], &mut tensors[i])? => {}
            Some(_) => return Err(other_framework(TENSORS[i], &object, TENSORS[direction.read().start])),
            None => lent.extend(dlpack::borrow(&object, TENSORS[i], &mut tensors[i])?),
        }
    }
    Ok(given)
}

/// Fresh outputs, and what they are.
fn made<'py>(
    layout: &Layout,
    direction: Direction,
    torch: Option<&Libtorch>,
    read: &[Bound<'py, PyAny>],
    tensors: &mut [Tensor; 6],
    buffers: &mut Vec<dlpack::Buffer>,
) -> PyResult<Bound<'py, PyTuple>> {
    let py = read[0].py();
    let first = direction.read().start;
    let num_rows = check(&tensors[first], first, layout)?.num_rows;
    let shape = |i: usize| shape(&layout.heads, i, num_rows);
    let mut made = Vec::with_capacity(direction.written().len());
    let mut left = direction.written();
    while let Some(i) = left.next() {
        let (known, like) = (tensors[direction.like(i)], &read[direction.like(i) - first]);
        if let Some(torch) = torch {
            let same = (i..left.end).filter(|i| tensors[direction.like(*i)].dtype == known.dtype).count();
            // The first output is consumed by the convolution that comes next, long before the others: all of them together where they
            // are small, the others always.
            let is_first = i == direction.written().start;
            let most = if is_first { torch::MOST_TOGETHER } else { usize::MAX };
            let shapes = (i..i + same).map(shape);
            if same > 1 && torch.empty_together(py, &known, shapes, most, &mut made, &mut tensors[i..])? {
                left.start = i + same;
                continue;
            }
        }
        let shape = shape(i);
        let (object, tensor) = fresh(torch, like, &known, &shape, TENSORS[i], buffers)?;
        tensors[i] = tensor;
        made.push(object);
    }
    PyTuple::new(py, made)
}

fn other_framework(argument: &str, object: &Bound<'_, PyAny>, other: &str) -> PyErr {
    type_error(format!("{argument} is a {}, {other} is a PyTorch tensor", type_name(object)))
}

fn out_error(direction: Direction, got: &str) -> PyErr {
    let expected =
        if direction == Direction::Split { "(mixed_qkv, z, b, a)" } else { "(mixed_qkvz, mixed_ba)" };
    value_error(format!("out is {got}, expected the tensors {expected}"))
}
