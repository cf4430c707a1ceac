//! The Python module `gdn`: the library's ops on anybody's tensors.
//!
//! This is `gdn._gdn`, what `gdn/__init__.py` stands on. Two doors lead to `ops`: functions for objects of
//! Python, which each op has in its file there, and operators of PyTorch, in `torch`.

mod dlpack;
mod exit;
mod memory;
mod ops;
mod outputs;
mod tensor;
mod threads;
mod torch;

use gdn::Heads;
use pyo3::prelude::*;

use crate::{
    ops::{decode, direct, layer, numbers_of, prefill, repack, size, split, text},
    tensor::value_error,
};

/// Registers the operators of `torch.ops.gdn` with PyTorch, and learns to read its tensors. Functions of C++ in
/// `without` are taken as missing. Returns the names of what is read in place.
#[pyfunction]
#[pyo3(signature = (torch, without = Vec::new()))]
fn register(torch: &Bound<'_, PyModule>, without: Vec<String>) -> PyResult<Vec<&'static str>> {
    torch::register(torch, &without)?;
    Ok(torch::get().map_or_else(Vec::new, torch::Libtorch::in_place))
}

/// Plans `rows` rows of `row_bytes` bytes each, inputs and outputs together: `(grid, rows_per_core,
/// rows_per_iter)`.
#[pyfunction]
fn tiling(
    rows: Bound<'_, PyAny>,
    row_bytes: Bound<'_, PyAny>,
    cores: Bound<'_, PyAny>,
    buffer_bytes: Bound<'_, PyAny>,
    max_rows_per_iter: Bound<'_, PyAny>,
) -> PyResult<(usize, usize, usize)> {
    let (rows, row_bytes) = (size(&rows, "rows", 0)?, size(&row_bytes, "row_bytes", 0)?);
    let profile = gdn::tiling::DeviceProfile {
        cores: size(&cores, "cores", 0)?,
        buffer_bytes: size(&buffer_bytes, "buffer_bytes", 0)?,
        max_rows_per_iter: size(&max_rows_per_iter, "max_rows_per_iter", 0)?,
    };
    let plan = gdn::tiling::plan(rows, row_bytes, &profile);
    Ok((plan.grid, plan.rows_per_core, plan.rows_per_iter))
}

/// The features of a row of `mixed_qkvz`, `mixed_ba`, `mixed_qkv` and `z`, of heads and a packing that are
/// right.
#[pyfunction]
fn features(heads: Bound<'_, PyAny>, packing: Bound<'_, PyAny>) -> PyResult<[usize; 4]> {
    let heads = ops::layout(numbers_of(&heads)?, &text(&packing, "packing")?)?.heads;
    Ok([heads.qkvz_features(), heads.ba_features(), heads.qkv_features(), heads.z_features()])
}

/// The heads of one tensor-parallel rank.
#[pyfunction]
fn shard(heads: Bound<'_, PyAny>, tp_size: Bound<'_, PyAny>) -> PyResult<[usize; 4]> {
    let heads = ops::heads(numbers_of(&heads)?)?;
    Ok(four(&heads.shard(size(&tp_size, "tp_size", 1)?).map_err(|e| value_error(e.to_string()))?))
}

/// The four numbers and the packing of a model known by name.
#[pyfunction]
fn preset(name: Bound<'_, PyAny>) -> PyResult<([usize; 4], &'static str)> {
    let layout = gdn::Layout::preset(&text(&name, "name")?).map_err(|e| value_error(e.to_string()))?;
    Ok((four(&layout.heads), layout.packing.name()))
}

fn four(heads: &Heads) -> [usize; 4] {
    [heads.num_k_heads(), heads.num_v_heads(), heads.head_k_dim(), heads.head_v_dim()]
}

/// One line for each NVIDIA GPU of this machine; the reason where there are none to ask for.
#[pyfunction]
fn cuda_devices(py: Python<'_>) -> PyResult<Vec<String>> {
    let devices = exit::detach(py, None, gdn::cuda::devices).map_err(|e| ops::cuda_error(&e))?;
    Ok(devices.iter().map(ToString::to_string).collect())
}

/// Lets go of the memory that freed tensors have left behind for later ones, 512 MiB at most. The bytes there
/// were.
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
    exit::register(module)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(split::split, module)?)?;
    module.add_function(wrap_pyfunction!(split::merge, module)?)?;
    module.add_class::<layer::Settings>()?;
    module.add_function(wrap_pyfunction!(decode::decode, module)?)?;
    module.add_function(wrap_pyfunction!(direct::shorten, module)?)?;
    module.add_function(wrap_pyfunction!(prefill::prefill, module)?)?;
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
