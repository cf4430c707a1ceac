//! `gdn.repack_weight`: the permutation applied to a weight in memory.

use gdn::{Layout, Projection, Rows, RowsMut, WeightMap};
use pyo3::{PyErr, prelude::*};

use crate::{
    dlpack, exit, ops,
    outputs::{fresh, handed_over},
    tensor::{Tensor, type_error, value_error},
    torch,
};

fn bad(error: impl std::fmt::Display) -> PyErr {
    value_error(error.to_string())
}

/// How a weight follows a projection's outputs: the arguments after it, but for `dim`.
struct Way {
    layout: Layout,
    projection: Option<Projection>,
    block: usize,
    group: usize,
}

impl Way {
    fn new(
        heads: &Bound<'_, PyAny>,
        projection: Option<&Bound<'_, PyAny>>,
        to: &Bound<'_, PyAny>,
        block: &Bound<'_, PyAny>,
        group: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let projection = projection.map(|object| ops::text(object, "projection")).transpose()?;
        let to = ops::text(to, "to")?;
        let packing = to
            .parse()
            .map_err(|_| value_error(format!("to is '{to}', it must be 'interleaved' or 'contiguous'")))?;
        Ok(Self {
            layout: Layout::new(ops::heads(ops::numbers_of(heads)?)?, packing),
            projection: match projection.as_deref() {
                None => None,
                Some("qkvz") => Some(Projection::Qkvz),
                Some("ba") => Some(Projection::Ba),
                Some(other) => {
                    return Err(value_error(format!("projection is '{other}', expected 'qkvz' or 'ba'")));
                }
            },
            block: ops::size(block, "block", 1)?,
            group: ops::size(group, "group", 1)?,
        })
    }

    /// The projection whose outputs are as many as a weight has, or what follows them.
    fn projection(&self, out_features: usize) -> PyResult<Projection> {
        let Self { layout: Layout { heads, .. }, projection, block, group } = self;
        // Without the permutation, which a block or group that would part has none of.
        let length = |projection: Projection| projection.features(heads).div_ceil(*block) / *group;
        let projections = projection.map_or_else(|| Projection::ALL.to_vec(), |projection| vec![projection]);
        let fitting: Vec<Projection> =
            projections.iter().copied().filter(|p| length(*p) == out_features).collect();
        match *fitting {
            [projection] => Ok(projection),
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

    /// Where the outputs of such a projection go.
    fn map(&self, projection: Projection, out_features: usize) -> PyResult<WeightMap> {
        let Self { layout: Layout { heads, packing }, block, group, .. } = self;
        let map = WeightMap::for_indices(heads, projection, *packing, out_features).map_err(bad)?;
        let map = if *block == 1 { map } else { map.blocks(*block).map_err(bad)? };
        if *group == 1 { Ok(map) } else { map.groups(*group).map_err(bad) }
    }
}

/// The parts `(start, length)` of the outputs, in their new order.
#[pyfunction]
pub(crate) fn weight_moves(
    shape: Vec<usize>,
    heads: Bound<'_, PyAny>,
    dim: Bound<'_, PyAny>,
    projection: Option<Bound<'_, PyAny>>,
    to: Bound<'_, PyAny>,
    block: Bound<'_, PyAny>,
    group: Bound<'_, PyAny>,
) -> PyResult<Vec<(usize, usize)>> {
    let way = Way::new(&heads, projection.as_ref(), &to, &block, &group)?;
    let outputs = shape[dim_of(&dim, &shape)?];
    let projection = way.projection(outputs)?;
    // There are as many as the weight has outputs, whether they have bytes or not.
    if shape.contains(&0) {
        return Ok(Vec::new());
    }
    Ok(way.map(projection, outputs)?.moves().iter().map(|part| (part.from, part.len)).collect())
}

/// The dim of a weight's outputs.
fn dim_of(dim: &Bound<'_, PyAny>, shape: &[usize]) -> PyResult<usize> {
    if !matches!(shape.len(), 1 | 2) {
        return Err(value_error(format!("weight has {} dims, expected 1 or 2", shape.len())));
    }
    let got = ops::integer(dim, "dim", i64::MIN)?;
    usize::try_from(got).ok().filter(|dim| *dim < shape.len()).ok_or_else(|| {
        value_error(format!("dim is {got}, it must be 0 or 1 and one of the weight's {}", shape.len()))
    })
}

/// The weight repacked: a fresh one of the same kind.
#[pyfunction]
pub(crate) fn repack_weight<'py>(
    weight: Bound<'py, PyAny>,
    heads: Bound<'py, PyAny>,
    dim: Bound<'py, PyAny>,
    projection: Option<Bound<'py, PyAny>>,
    to: Bound<'py, PyAny>,
    block: Bound<'py, PyAny>,
    group: Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = weight.py();
    let way = Way::new(&heads, projection.as_ref(), &to, &block, &group)?;
    let torch = torch::get().filter(|torch| torch.is_plain(&weight));
    let mut from = Tensor::NONE;
    let is_read =
        torch.map_or(Ok(false), |torch| torch.borrow(torch.way(), &weight, "weight", false, &mut from))?;
    let _owner = if is_read { None } else { dlpack::borrow(&weight, "weight", &mut from)? };
    from.check("weight")?;
    let shape: Vec<usize> = from.shape().iter().filter_map(|dim| usize::try_from(*dim).ok()).collect();
    let dim = dim_of(&dim, &shape)?;
    let (num_rows, features) = (shape[0], shape.get(1).copied().unwrap_or(1));
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
    let row_stride = usize::try_from(if num_rows > 1 { from.strides()[0] } else { 0 }).map_err(|_| {
        value_error(format!("weight has row stride {}, expected at least 0", from.strides()[0]))
    })?;
    let size = from.dtype.size();
    let pointer = |tensor: &Tensor| std::ptr::with_exposed_provenance_mut::<u8>(tensor.address);
    // SAFETY: a tensor that `weight` keeps.
    let rows = unsafe { Rows::from_raw(pointer(&from), size, num_rows, features, row_stride) }
        .map_err(|e| value_error(format!("weight: {e}")))?;
    let projection = way.projection(shape[dim])?;
    // As above.
    let map = if shape.contains(&0) { None } else { Some(way.map(projection, shape[dim])?) };
    let mut buffers = Vec::new();
    let (made, into) = fresh(torch, &weight, &from, &shape, "weight", &mut buffers)?;
    // SAFETY: a fresh tensor of the same shape that nobody else has.
    let into =
        unsafe { RowsMut::from_raw(pointer(&into), size, num_rows, features, features) }.map_err(bad)?;
    if let Some(map) = map {
        exit::detach(py, None, || gdn::repack_weight(&map, dim, rows, into)).map_err(bad)?;
    }
    if buffers.is_empty() { Ok(made) } else { Ok(handed_over(&weight, buffers)?.remove(0)) }
}
