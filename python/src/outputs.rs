//! Fresh tensors, of the framework that an argument is of.

use pyo3::{
    intern,
    prelude::*,
    types::{PyDict, PyTuple},
};

use crate::{
    dlpack,
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
    if let Some(numpy) = dlpack::module(py, "numpy")
        && like.is_instance(&numpy.getattr(intern!(py, "ndarray"))?)?
    {
        let kwargs = PyDict::new(py);
        kwargs.set_item(intern!(py, "dtype"), like.getattr(intern!(py, "dtype"))?)?;
        let made = numpy.call_method(intern!(py, "empty"), (PyTuple::new(py, shape)?,), Some(&kwargs))?;
        let mut tensor = Tensor::NONE;
        dlpack::borrow(&made, argument, &mut tensor)?;
        return Ok((made, tensor));
    }
    if !known.device.is_cpu() || !like.hasattr(intern!(py, "__array_namespace__"))? {
        return Err(type_error(format!(
            "out: no {argument} can be made like a {} on {}, give tensors to write to",
            type_name(like),
            known.device
        )));
    }
    let buffer = dlpack::Buffer::new(shape, known.dtype)?;
    let tensor = buffer.tensor();
    buffers.push(buffer);
    Ok((py.None().into_bound(py), tensor))
}

/// Buffers that were filled, as arrays of the framework that `like` is of.
pub(crate) fn handed_over<'py>(
    like: &Bound<'py, PyAny>,
    buffers: Vec<dlpack::Buffer>,
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let py = like.py();
    let namespace = like.call_method0(intern!(py, "__array_namespace__"))?;
    let import = namespace.getattr(intern!(py, "from_dlpack"))?;
    buffers.into_iter().map(|buffer| import.call1((Bound::new(py, buffer)?,))).collect()
}
