//! The Python module `gdn`: the library's ops on anybody's tensors.
//!
//! This is `gdn._gdn`, what `gdn/__init__.py` stands on. Two doors lead to `op`: functions for objects of Python, here, and operators of
//! PyTorch, in `libtorch`.

mod blocks;
mod dlpack;
mod fresh;
mod libtorch;
mod op;
mod pool;
mod repack;
mod tensor;

use gdn::{Heads, Layout};
use pyo3::{
    exceptions::PyOverflowError,
    prelude::*,
    types::{PyString, PyTuple},
};

use crate::{
    fresh::{fresh, handed_over},
    libtorch::{Libtorch, type_name},
    op::{Call, Direction, NAMES, Place},
    tensor::{Tensor, type_error, value_error},
};

/// Work for which other threads of Python are let in.
const WORTH_DETACHING: usize = 128 << 10;

/// `gdn.split`, but for what PyTorch has to see: `None` where the operator is to be called instead.
#[pyfunction]
#[pyo3(signature = (mixed_qkvz, mixed_ba, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing, out = None))]
#[expect(clippy::too_many_arguments, reason = "those of the Python function")]
fn split<'py>(
    mixed_qkvz: Bound<'py, PyAny>,
    mixed_ba: Bound<'py, PyAny>,
    num_k_heads: Bound<'py, PyAny>,
    num_v_heads: Bound<'py, PyAny>,
    head_k_dim: Bound<'py, PyAny>,
    head_v_dim: Bound<'py, PyAny>,
    packing: Bound<'py, PyAny>,
    out: Option<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyTuple>>> {
    let heads = numbers([num_k_heads, num_v_heads, head_k_dim, head_v_dim])?;
    run(Direction::Split, [mixed_qkvz, mixed_ba], heads, &packing, out)
}

/// `gdn.merge`, in the same way.
#[pyfunction]
#[pyo3(signature = (mixed_qkv, z, b, a, num_k_heads, num_v_heads, head_k_dim, head_v_dim, packing, out = None))]
#[expect(clippy::too_many_arguments, reason = "those of the Python function")]
fn merge<'py>(
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
    let heads = numbers([num_k_heads, num_v_heads, head_k_dim, head_v_dim])?;
    run(Direction::Merge, [mixed_qkv, z, b, a], heads, &packing, out)
}

/// The heads as numbers. What fits none is as wrong as the largest that does.
fn numbers(heads: [Bound<'_, PyAny>; 4]) -> PyResult<[i64; 4]> {
    let mut numbers = [0; 4];
    for ((number, object), name) in numbers.iter_mut().zip(&heads).zip(op::HEADS) {
        *number = match object.extract::<i64>() {
            Ok(number) => number,
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                if object.lt(0)? {
                    i64::MIN
                } else {
                    i64::MAX
                }
            }
            Err(_) => return Err(not_a(name, object, "int")),
        };
    }
    Ok(numbers)
}

#[cold]
fn not_a(argument: &str, object: &Bound<'_, PyAny>, expected: &str) -> PyErr {
    type_error(format!("{argument} is a {}, expected {expected}", type_name(object)))
}

/// Either, on the tensors that are read, in the order of [`NAMES`].
fn run<'py, const READ: usize>(
    direction: Direction,
    read: [Bound<'py, PyAny>; READ],
    heads: [i64; 4],
    packing: &Bound<'py, PyAny>,
    out: Option<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyTuple>>> {
    let py = read[0].py();
    let packing = packing.cast::<PyString>().map_err(|_| not_a("packing", packing, "str"))?;
    let layout = op::layout(heads, packing.to_str()?)?;
    let first = direction.read().start;
    let torch = libtorch::get().filter(|torch| torch.is_tensor(&read[0]));
    let mut lent = Vec::new();
    let mut tensors = [Tensor::NONE; 6];
    let mut is_operator = false;
    for (i, object) in direction.read().zip(&read) {
        match torch {
            Some(torch) if torch.borrow(object, NAMES[i], &mut tensors[i])? => {}
            Some(torch) if torch.is_tensor(object) => {
                tensors[i] = Tensor::NONE;
                is_operator = true;
            }
            Some(_) => return Err(other_framework(NAMES[i], object, NAMES[first])),
            None => lent.extend(dlpack::borrow(object, NAMES[i], &mut tensors[i])?),
        }
    }
    if let Some(torch) = torch
        && (is_operator || torch.is_watched(&read)?)
    {
        // What can be checked is checked here all the same, so that errors are the same through both doors.
        for i in direction.read().filter(|i| tensors[*i].address != 0) {
            op::check(&tensors[i], i, &layout)?;
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
    let place = if torch.is_some() { libtorch::PLACE } else { Place::OURS };
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
                let argument = NAMES[i];
                return Err(value_error(format!(
                    "{argument} requires grad: what is written to has no gradient"
                )));
            }
            Some(torch) if torch.borrow(&object, NAMES[i], &mut tensors[i])? => {}
            Some(_) => return Err(other_framework(NAMES[i], &object, NAMES[direction.read().start])),
            None => lent.extend(dlpack::borrow(&object, NAMES[i], &mut tensors[i])?),
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
    let num_rows = op::check(&tensors[first], first, layout)?.num_rows;
    let shape = |i: usize| op::shape(&layout.heads, i, num_rows);
    let mut made = Vec::with_capacity(direction.written().len());
    let mut left = direction.written();
    while let Some(i) = left.next() {
        let (known, like) = (tensors[direction.like(i)], &read[direction.like(i) - first]);
        if let Some(torch) = torch {
            let same = (i..left.end).filter(|i| tensors[direction.like(*i)].dtype == known.dtype).count();
            // The first output is consumed by the convolution that comes next, long before the others: all of them together where they
            // are small, the others always.
            let is_first = i == direction.written().start;
            let most = if is_first { libtorch::MOST_TOGETHER } else { usize::MAX };
            let shapes = (i..i + same).map(shape);
            if same > 1 && torch.empty_together(py, &known, shapes, most, &mut made, &mut tensors[i..])? {
                left.start = i + same;
                continue;
            }
        }
        let (shape, dims) = shape(i);
        let (object, tensor) = fresh(torch, like, &known, &shape[..dims], NAMES[i], buffers)?;
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

/// Registers `torch.ops.gdn.split` and `merge` with PyTorch, and learns to read its tensors.
#[pyfunction]
fn register(torch: &Bound<'_, PyModule>) -> PyResult<()> {
    libtorch::register(torch)
}

/// Plans `rows` rows of `row_bytes` bytes each, inputs and outputs together: `(grid, rows_per_core, rows_per_iter)`.
#[pyfunction]
#[pyo3(signature = (rows, row_bytes, cores, buffer_bytes = 87040, max_rows_per_iter = 64))]
fn tiling(
    rows: i64,
    row_bytes: i64,
    cores: i64,
    buffer_bytes: i64,
    max_rows_per_iter: i64,
) -> PyResult<(usize, usize, usize)> {
    let number = |number: i64, name: &str| {
        usize::try_from(number).map_err(|_| value_error(format!("{name} is {number}, it must be at least 0")))
    };
    let profile = gdn::tiling::DeviceProfile {
        cores: number(cores, "cores")?,
        buffer_bytes: number(buffer_bytes, "buffer_bytes")?,
        max_rows_per_iter: number(max_rows_per_iter, "max_rows_per_iter")?,
    };
    let plan = gdn::tiling::plan(number(rows, "rows")?, number(row_bytes, "row_bytes")?, &profile);
    Ok((plan.grid, plan.rows_per_core, plan.rows_per_iter))
}

/// The features of a row of `mixed_qkvz`, `mixed_ba`, `mixed_qkv` and `z`, of heads and a packing that are right.
#[pyfunction]
fn features(heads: [Bound<'_, PyAny>; 4], packing: &str) -> PyResult<[usize; 4]> {
    let heads = op::layout(numbers(heads)?, packing)?.heads;
    Ok([heads.qkvz_features(), heads.ba_features(), heads.qkv_features(), heads.z_features()])
}

/// The heads of one tensor-parallel rank.
#[pyfunction]
fn shard(heads: [Bound<'_, PyAny>; 4], tp_size: i64) -> PyResult<[usize; 4]> {
    let heads = op::layout(numbers(heads)?, "interleaved")?.heads;
    let tp_size = usize::try_from(tp_size)
        .map_err(|_| value_error(format!("tp_size is {tp_size}, it must be at least 1")))?;
    Ok(four(&heads.shard(tp_size).map_err(|e| value_error(e.to_string()))?))
}

/// The four numbers and the packing of a model known by name.
#[pyfunction]
fn preset(name: &str) -> PyResult<([usize; 4], &'static str)> {
    let layout = gdn::Layout::preset(name).map_err(|e| value_error(e.to_string()))?;
    Ok((four(&layout.heads), layout.packing.name()))
}

fn four(heads: &Heads) -> [usize; 4] {
    [heads.num_k_heads(), heads.num_v_heads(), heads.head_k_dim(), heads.head_v_dim()]
}

/// One line for each NVIDIA GPU of this machine; the reason where there are none to ask for.
#[pyfunction]
fn cuda_devices(py: Python<'_>) -> PyResult<Vec<String>> {
    let devices = py.detach(gdn::cuda::devices).map_err(|e| op::cuda_error(&e))?;
    Ok(devices.iter().map(ToString::to_string).collect())
}

/// Lets go of the memory that freed tensors have left behind for later ones, 512 MiB at most. The bytes there were.
#[pyfunction]
fn empty_cache() -> usize {
    blocks::empty()
}

/// The instruction set that CPU tensors are worked on with.
#[pyfunction]
fn isa() -> String {
    gdn::Cpu::new().chosen_isa().to_string()
}

#[pymodule]
fn _gdn(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(split, module)?)?;
    module.add_function(wrap_pyfunction!(merge, module)?)?;
    module.add_function(wrap_pyfunction!(repack::repack_weight, module)?)?;
    module.add_function(wrap_pyfunction!(repack::weight_moves, module)?)?;
    module.add_function(wrap_pyfunction!(register, module)?)?;
    module.add_function(wrap_pyfunction!(tiling, module)?)?;
    module.add_function(wrap_pyfunction!(features, module)?)?;
    module.add_function(wrap_pyfunction!(shard, module)?)?;
    module.add_function(wrap_pyfunction!(preset, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_devices, module)?)?;
    module.add_function(wrap_pyfunction!(empty_cache, module)?)?;
    module.add_function(wrap_pyfunction!(isa, module)?)
}
