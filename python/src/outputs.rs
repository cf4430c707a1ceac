//! Fresh tensors, of the framework that an argument is of.

use pyo3::{
    intern,
    prelude::*,
    types::{PyDict, PyTuple},
};

use crate::{
    dlpack,
    exit::Outside,
    tensor::{Tensor, type_error},
    torch::{Libtorch, type_name},
};

/// A fresh tensor like one that is read: of the same framework, device and dtype.
pub(crate) fn fresh<'py>(
    torch: Option<&Libtorch>,
    like: &Bound<'py, PyAny>,
    known: &Tensor,
    shape: &[usize],
    argument: &str,
    buffers: &mut Vec<dlpack::Buffer>,
) -> PyResult<(Bound<'py, PyAny>, Tensor)> {
    let py = like.py();
    if let Some(torch) = torch {
        return torch.empty_like(like, known, shape, argument);
    }
    if dlpack::is_numpy(like) {
        let numpy = py.import(intern!(py, "numpy"))?;
        let kwargs = PyDict::new(py);
        kwargs.set_item(intern!(py, "dtype"), like.getattr(intern!(py, "dtype"))?)?;
        let made = numpy.call_method(intern!(py, "empty"), (PyTuple::new(py, shape)?,), Some(&kwargs))?;
        let mut tensor = Tensor::NONE;
        dlpack::borrow(&made, argument, &mut tensor)?;
        return Ok((made, tensor));
    }
    let like_what = || format!("{} on {}", type_name(like), known.device);
    if !like.hasattr(intern!(py, "__array_namespace__"))? {
        return Err(type_error(format!(
            "out: no {argument} can be made like a {}, give tensors to write to",
            like_what()
        )));
    }
    if !known.device.is_cpu() {
        return Err(type_error(format!(
            "out: no {argument} can be made like a {}: outputs are made on the CPU, and on a GPU as PyTorch's. \
             Give PyTorch tensors, which torch.from_dlpack makes of such arrays without a copy",
            like_what()
        )));
    }
    let buffer = dlpack::Buffer::new(shape, known.dtype)?;
    let tensor = buffer.tensor();
    buffers.push(buffer);
    Ok((py.None().into_bound(py), tensor))
}

/// Whether two arrays that are not PyTorch's are of one framework.
pub(crate) fn is_of(one: &Bound<'_, PyAny>, other: &Bound<'_, PyAny>) -> bool {
    dlpack::is_numpy(one) == dlpack::is_numpy(other)
        && (dlpack::is_numpy(one) || one.get_type().is(other.get_type()))
}

/// Buffers that were filled, as arrays of the framework that `like` is of.
pub(crate) fn handed_over<'py>(
    like: &Bound<'py, PyAny>,
    buffers: Vec<dlpack::Buffer>,
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let py = like.py();
    // What is asked of the framework may be Python code.
    let _outside = Outside::new(py);
    let namespace = like.call_method0(intern!(py, "__array_namespace__"))?;
    let import = namespace.getattr(intern!(py, "from_dlpack"))?;
    buffers.into_iter().map(|buffer| import.call1((Bound::new(py, buffer)?,))).collect()
}
