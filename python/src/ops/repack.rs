//! `gdn.repack_weight`: the permutation applied to a weight in memory.

use gdn::{Heads, Packing, Projection, Rows, RowsMut, WeightMap};
use pyo3::{PyErr, prelude::*};

use crate::{
    dlpack, ops,
    outputs::{fresh, handed_over},
    tensor::{Tensor, type_error, value_error},
    torch,
};

fn bad(error: impl std::fmt::Display) -> PyErr {
    value_error(error.to_string())
}

/// Where the `out_features` outputs of a weight, or what follows them, go.
fn map(
    out_features: usize,
    heads: [i64; 4],
    projection: Option<&str>,
    to: &str,
    block: usize,
    group: usize,
) -> PyResult<WeightMap> {
    let layout = ops::layout(heads, to)?;
    let (heads, to): (Heads, Packing) = (layout.heads, layout.packing);
    let found = |projection| -> PyResult<WeightMap> {
        let map = WeightMap::new(&heads, projection, to);
        let map = if block == 1 { map } else { map.blocks(block).map_err(bad)? };
        if group == 1 { Ok(map) } else { map.groups(group).map_err(bad) }
    };
    // Without the permutation, which a block or group that would part has none of.
    let length = |projection: Projection| projection.features(&heads).div_ceil(block.max(1)) / group.max(1);
    let projections = match projection {
        None => Projection::ALL.to_vec(),
        Some("qkvz") => vec![Projection::Qkvz],
        Some("ba") => vec![Projection::Ba],
        Some(other) => return Err(value_error(format!("projection is '{other}', expected 'qkvz' or 'ba'"))),
    };
    let fitting: Vec<Projection> =
        projections.iter().copied().filter(|p| length(*p) == out_features).collect();
    match *fitting {
        [projection] => found(projection),
        [] => {
            let expected: Vec<String> = projections.iter().map(|p| length(*p).to_string()).collect();
            Err(value_error(format!(
                "weight has {out_features} outputs, {heads} need {}",
                expected.join(" or ")
            )))
        }
        _ => Err(value_error(format!(
            "weight has {out_features} outputs, which either projection has: say which"
        ))),
    }
}

/// The parts `(start, length)` of the outputs, in their new order.
#[pyfunction]
pub(crate) fn weight_moves(
    out_features: usize,
    heads: [i64; 4],
    projection: Option<&str>,
    to: &str,
    block: usize,
    group: usize,
) -> PyResult<Vec<(usize, usize)>> {
    let map = map(out_features, heads, projection, to, block, group)?;
    Ok(map.moves().iter().map(|part| (part.from, part.len)).collect())
}

/// The weight repacked: a fresh one of the same kind.
#[pyfunction]
pub(crate) fn repack_weight<'py>(
    weight: Bound<'py, PyAny>,
    heads: [i64; 4],
    dim: i64,
    projection: Option<&str>,
    to: &str,
    block: usize,
    group: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let py = weight.py();
    let torch = torch::get().filter(|torch| torch.is_plain(&weight));
    let mut from = Tensor::NONE;
    let _owner = dlpack::borrow(&weight, "weight", &mut from)?;
    let shape: Vec<usize> = from.shape().iter().filter_map(|dim| usize::try_from(*dim).ok()).collect();
    let (num_rows, features) = match *shape {
        [outputs] => (outputs, 1),
        [rows, columns] => (rows, columns),
        _ => return Err(value_error(format!("weight has {} dims, expected 1 or 2", shape.len()))),
    };
    let dim = usize::try_from(dim).ok().filter(|dim| *dim < shape.len()).ok_or_else(|| {
        value_error(format!("dim is {dim}, it must be 0 or 1 and one of the weight's {}", shape.len()))
    })?;
    if !from.device.is_cpu() {
        return Err(value_error(format!("weight is on {}, expected cpu", from.device)));
    }
    if from.dtype.size() == 0 {
        return Err(type_error(format!("weight has dtype {}, expected whole bytes", from.dtype)));
    }
    if shape.len() == 2 && features > 1 && num_rows > 0 && from.strides()[1] != 1 {
        return Err(value_error(format!(
            "weight has stride {} in dim 1, expected 1: rows must be dense",
            from.strides()[1]
        )));
    }
    let map = map(shape[dim], heads, projection, to, block, group)?;
    let mut buffers = Vec::new();
    let (made, into) = fresh(torch, &weight, &from, &shape, "weight", &mut buffers)?;
    let row_stride = usize::try_from(if num_rows > 1 { from.strides()[0] } else { 0 }).map_err(|_| {
        value_error(format!("weight has row stride {}, expected at least 0", from.strides()[0]))
    })?;
    let size = from.dtype.size();
    let pointer = |tensor: &Tensor| std::ptr::with_exposed_provenance_mut::<u8>(tensor.address);
    // SAFETY: a tensor that `weight` keeps, and a fresh one of the same shape that nobody else has.
    let (from, into) = unsafe {
        (
            Rows::from_raw(pointer(&from), size, num_rows, features, row_stride).map_err(bad)?,
            RowsMut::from_raw(pointer(&into), size, num_rows, features, features).map_err(bad)?,
        )
    };
    py.detach(|| gdn::repack_weight(&map, dim, from, into)).map_err(bad)?;
    if buffers.is_empty() { Ok(made) } else { Ok(handed_over(&weight, buffers)?.remove(0)) }
}
