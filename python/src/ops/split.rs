//! Split and merge of six tensors: the two functions, and what both doors come to.

use std::ops::Range;

use gdn::{
    ArgumentError, Because, Cpu, Direction, Heads, Layout, Packed, Rows, RowsMut, TENSORS, Unpacked, cuda,
    from_order,
};
use pyo3::{
    prelude::*,
    types::{PyList, PyString, PyTuple},
};

use crate::{
    dlpack,
    exit::{self, Outside},
    ops::{self, Place, WORTH_DETACHING, cuda_error, gpu, not_a, numbers},
    outputs::{fresh, handed_over, is_of},
    tensor::{Device, RowsOf, Shape, Tensor, type_error, value_error},
    torch::{self, Libtorch, type_name},
};

/// The names of the outputs, as a tuple.
fn outputs(direction: Direction) -> &'static str {
    match direction {
        Direction::Split => "(mixed_qkv, z, b, a)",
        Direction::Merge => "(mixed_qkvz, mixed_ba)",
    }
}

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

/// How many features a row of them has.
#[inline]
fn features(heads: &Heads, tensor: usize) -> usize {
    match tensor {
        0 => heads.qkvz_features(),
        1 => heads.ba_features(),
        2 => heads.qkv_features(),
        3 => heads.z_features(),
        _ => heads.num_v_heads(),
    }
}

/// A call whose tensors agree about devices and dtypes, and are rows. Shapes and overlaps are for
/// [`gdn::split()`] to check.
pub(crate) struct Call<'a> {
    layout: Layout,
    direction: Direction,
    tensors: &'a [Tensor; 6],
    rows: [RowsOf; 6],
}

/// Checks one tensor as far as that can be done by itself.
#[inline]
fn check(tensor: &Tensor, argument: usize, layout: &Layout) -> PyResult<RowsOf> {
    let (name, heads) = (TENSORS[argument], &layout.heads);
    let inner = (argument == 3).then(|| [heads.num_v_heads(), heads.head_v_dim()]);
    tensor.check(name)?;
    let rows = tensor.rows(name, inner)?;
    if tensor.dtype.size() == 0 {
        return Err(type_error(format!("{name} has dtype {}, expected whole bytes", tensor.dtype)));
    }
    let expected = features(heads, argument);
    if rows.features != expected {
        let because = Because::Need(heads.to_string());
        return Err(wrong_length(name, "features", rows.features, expected, because));
    }
    if rows.num_rows > 1 && rows.row_stride < rows.features {
        let RowsOf { row_stride, features, .. } = rows;
        return Err(value_error(format!("{name}: {}", ArgumentError::RowStride { row_stride, features })));
    }
    Ok(rows)
}

/// Checks all that are read, before anything is made for them or written.
#[inline]
pub(crate) fn check_read(
    tensors: &[Tensor; 6],
    direction: Direction,
    layout: &Layout,
) -> PyResult<[RowsOf; 6]> {
    let mut rows = [RowsOf::NONE; 6];
    for i in direction.read() {
        rows[i] = check(&tensors[i], i, layout)?;
        agree(tensors, &rows, i, direction)?;
    }
    Ok(rows)
}

/// Checks what a tensor has in common with those that say so.
#[inline]
fn agree(tensors: &[Tensor; 6], rows: &[RowsOf; 6], i: usize, direction: Direction) -> PyResult<()> {
    let (tensor, argument, first) = (&tensors[i], TENSORS[i], direction.read().start);
    if tensor.device != tensors[first].device && !(tensor.device.is_cpu() && tensors[first].device.is_cpu()) {
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
    let (got, expected) = (rows[i].num_rows, rows[first].num_rows);
    if got != expected && direction.read().contains(&i) {
        return Err(wrong_length(argument, "rows", got, expected, Because::Argument(TENSORS[first])));
    }
    Ok(())
}

#[cold]
fn wrong_length(
    argument: &'static str,
    unit: &'static str,
    got: usize,
    expected: usize,
    because: Because,
) -> PyErr {
    value_error(ArgumentError::Length { argument, unit, got, expected, because }.to_string())
}

impl<'a> Call<'a> {
    /// `tensors` in the order of [`TENSORS`].
    #[inline]
    pub(crate) fn new(layout: Layout, direction: Direction, tensors: &'a [Tensor; 6]) -> PyResult<Self> {
        let mut rows = check_read(tensors, direction, &layout)?;
        for i in direction.written() {
            rows[i] = check(&tensors[i], i, &layout)?;
            agree(tensors, &rows, i, direction)?;
        }
        Ok(Self { layout, direction, tensors, rows })
    }

    /// The same where the outputs were just made, dense, for inputs that [`check_read`] saw and whose `rows`
    /// it gave.
    #[inline]
    pub(crate) fn with_fresh(
        layout: Layout,
        direction: Direction,
        tensors: &'a [Tensor; 6],
        mut rows: [RowsOf; 6],
    ) -> Self {
        let num_rows = rows[direction.read().start].num_rows;
        for i in direction.written() {
            let features = features(&layout.heads, i);
            rows[i] = RowsOf { num_rows, features, row_stride: features };
        }
        Self { layout, direction, tensors, rows }
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
    /// The tensors are where they say, and stay; while this runs nothing else writes to those that are read
    /// or touches those that are written. On a GPU the same until the work on the stream is done.
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
    let layout = ops::layout(heads, &packing.to_string_lossy())?;
    let out = out.map(|out| given(&out, direction)).transpose()?;
    let first = direction.read().start;
    let torch = torch::get().filter(|torch| torch.is_tensor(&read[0]));
    // What is asked of PyTorch may give up the GIL.
    let outside = torch.map(|_| Outside::new(py));
    let mut lent = Vec::new();
    let mut tensors = [Tensor::NONE; 6];
    let mut is_operator = false;
    for (i, object) in direction.read().zip(&read) {
        match torch {
            Some(torch) if torch.borrow(torch.way(), object, TENSORS[i], false, &mut tensors[i])? => {}
            Some(torch) if torch.is_tensor(object) => is_operator = true,
            None if !torch::is_tensor(object) => {
                lent.extend(dlpack::borrow(object, TENSORS[i], &mut tensors[i])?);
            }
            _ => return Err(other_framework(TENSORS[i], object, TENSORS[first], &read[0])),
        }
    }
    let given = out.iter().flat_map(|out| out.iter_borrowed());
    if let Some(torch) = torch
        && (is_operator || torch.is_watched(py, read.iter().map(Bound::as_borrowed), given)?)
    {
        // What can be checked is checked here all the same, so that errors are the same through both doors.
        let is_known =
            |tensors: &[Tensor; 6], mut which: Range<usize>| which.all(|i| tensors[i].address != 0);
        if is_known(&tensors, direction.read()) {
            check_read(&tensors, direction, &layout)?;
        } else {
            for i in direction.read().filter(|i| tensors[*i].address != 0) {
                check(&tensors[i], i, &layout)?;
            }
        }
        if let Some(out) = &out {
            for (i, object) in direction.written().zip(out.iter_borrowed()) {
                if !torch.is_tensor(&object) {
                    return Err(other_framework(TENSORS[i], &object, TENSORS[first], &read[0]));
                }
                torch.borrow(torch.way(), &object, TENSORS[i], true, &mut tensors[i])?;
            }
            if is_known(&tensors, 0..6) {
                Call::new(layout, direction, &tensors)?;
            }
        }
        return Ok(None);
    }
    let mut buffers = Vec::new();
    let (results, call) = match &out {
        Some(out) => {
            borrow_given(out, direction, torch, &read[0], &mut tensors, &mut lent)?;
            let call = Call::new(layout, direction, &tensors)?;
            if let Some(torch) = torch {
                let name = |i: usize| TENSORS[direction.written().start + i];
                let given = (0..out.len()).filter_map(|i| Some((out.get_borrowed_item(i).ok()?, name(i))));
                torch.advance_versions(py, given)?;
            }
            (out.clone(), call)
        }
        None => {
            let rows = check_read(&tensors, direction, &layout)?;
            let results = made(&layout, direction, torch, &read, &mut tensors, &rows, &mut buffers)?;
            (results, Call::with_fresh(layout, direction, &tensors, rows))
        }
    };
    let place = if torch.is_some() { torch::PLACE } else { Place::OURS };
    if call.is_cpu() && call.bytes() < WORTH_DETACHING {
        // SAFETY: the objects are borrowed for the call. Python's users answer for races, as with any
        // function on arrays.
        unsafe { call.run(&place)? };
    } else {
        // SAFETY: as above.
        exit::detach(py, outside.as_ref(), || unsafe { call.run(&place) })?;
    }
    if buffers.is_empty() {
        Ok(Some(results))
    } else {
        PyTuple::new(py, handed_over(&read[0], buffers)?).map(Some)
    }
}

/// The outputs that were given.
fn given<'py>(out: &Bound<'py, PyAny>, direction: Direction) -> PyResult<Bound<'py, PyTuple>> {
    let given = match (out.cast::<PyTuple>(), out.cast::<PyList>()) {
        (Ok(tuple), _) => tuple.clone(),
        (_, Ok(list)) => list.to_tuple(),
        _ => {
            let got = type_name(out);
            return Err(type_error(format!("out is a {got}, expected a tuple: {}", outputs(direction))));
        }
    };
    let (got, expected) = (given.len(), direction.written().len());
    if got != expected {
        let names = outputs(direction);
        return Err(value_error(format!("out has {got} tensors, expected {expected}: {names}")));
    }
    Ok(given)
}

/// What they are.
fn borrow_given<'py>(
    given: &Bound<'py, PyTuple>,
    direction: Direction,
    torch: Option<&Libtorch>,
    read: &Bound<'py, PyAny>,
    tensors: &mut [Tensor; 6],
    lent: &mut Vec<Bound<'py, PyAny>>,
) -> PyResult<()> {
    let (first, is_grad_enabled) = (direction.read().start, torch.is_some_and(Libtorch::is_grad_enabled));
    for (i, object) in direction.written().zip(given.iter_borrowed()) {
        let argument = TENSORS[i];
        match torch {
            Some(torch) if is_grad_enabled && torch.is_plain(&object) && torch.requires_grad(&object)? => {
                return Err(value_error(format!(
                    "{argument} requires grad: what is written to has no gradient"
                )));
            }
            Some(torch) if torch.borrow(torch.way(), &object, argument, true, &mut tensors[i])? => {}
            Some(torch) if torch.is_tensor(&object) => {
                return Err(torch.unwritable(&object, argument, TENSORS[first], read));
            }
            None if !torch::is_tensor(&object) => {
                lent.extend(dlpack::borrow(&object, argument, &mut tensors[i])?);
            }
            _ => return Err(other_framework(argument, &object, TENSORS[first], read)),
        }
    }
    Ok(())
}

/// Fresh outputs, and what they are.
fn made<'py>(
    layout: &Layout,
    direction: Direction,
    torch: Option<&Libtorch>,
    read: &[Bound<'py, PyAny>],
    tensors: &mut [Tensor; 6],
    rows: &[RowsOf; 6],
    buffers: &mut Vec<dlpack::Buffer>,
) -> PyResult<Bound<'py, PyTuple>> {
    let py = read[0].py();
    let first = direction.read().start;
    if torch.is_none() {
        for (i, object) in direction.read().zip(read) {
            if !is_of(&read[0], object) {
                return Err(other_framework(TENSORS[i], object, TENSORS[first], &read[0]));
            }
        }
    }
    let num_rows = rows[first].num_rows;
    let shape = |i: usize| shape(&layout.heads, i, num_rows);
    let mut made = Vec::with_capacity(direction.written().len());
    let mut left = direction.written();
    while let Some(i) = left.next() {
        let (known, like) = (tensors[direction.like(i)], &read[direction.like(i) - first]);
        if let Some(torch) = torch {
            let same = (i..left.end).filter(|i| tensors[direction.like(*i)].dtype == known.dtype).count();
            // The first output is consumed by the convolution that comes next, long before the others: all of
            // them together where they are small, the others always.
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

/// What is of two frameworks cannot be made like either.
fn other_framework(argument: &str, object: &Bound<'_, PyAny>, other: &str, read: &Bound<'_, PyAny>) -> PyErr {
    let (got, expected) = (type_name(object), type_name(read));
    type_error(format!("{argument} is a {got}, {other} is a {expected}"))
}
