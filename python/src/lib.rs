//! The Python module `gdn`: the library's ops on anybody's tensors.
//!
//! This is `gdn._gdn`, what `gdn/__init__.py` stands on. Two doors lead to `ops`: functions for objects of Python, which each op has in its
//! file there, and operators of PyTorch, in `torch`.

mod dlpack;
mod memory;
mod ops;
mod outputs;
mod tensor;
mod threads;
mod torch;

use gdn::Heads;
use pyo3::prelude::*;

use crate::{
    ops::{numbers, repack, split},
    tensor::value_error,
};

/// Registers `torch.ops.gdn.split` and `merge` with PyTorch, and learns to read its tensors.
/// Functions of C++ in `without` are taken as missing.
#[pyfunction]
#[pyo3(signature = (torch, without = Vec::new()))]
fn register(torch: &Bound<'_, PyModule>, without: Vec<String>) -> PyResult<()> {
    torch::register(torch, &without)
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
    let heads = ops::layout(numbers(&heads)?, packing)?.heads;
    Ok([heads.qkvz_features(), heads.ba_features(), heads.qkv_features(), heads.z_features()])
}

/// The heads of one tensor-parallel rank.
#[pyfunction]
fn shard(heads: [Bound<'_, PyAny>; 4], tp_size: i64) -> PyResult<[usize; 4]> {
    let heads = ops::layout(numbers(&heads)?, "interleaved")?.heads;
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
    let devices = py.detach(gdn::cuda::devices).map_err(|e| ops::cuda_error(&e))?;
    Ok(devices.iter().map(ToString::to_string).collect())
}

/// Lets go of the memory that freed tensors have left behind for later ones, 512 MiB at most. The bytes there were.
#[pyfunction]
fn empty_cache() -> usize {
    memory::empty()
}

/// The instruction set that CPU tensors are worked on with.
#[pyfunction]
fn isa() -> String {
    gdn::Cpu::new().chosen_isa().to_string()
}

#[pymodule]
fn _gdn(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(split::split, module)?)?;
    module.add_function(wrap_pyfunction!(split::merge, module)?)?;
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
