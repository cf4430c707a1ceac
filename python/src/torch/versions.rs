//! Version counters: how autograd learns that a tensor was written to.

use pyo3::{Borrowed, exceptions::PyRuntimeError, intern, prelude::*, types::PyTuple};

use super::{Libtorch, abi::Failed, cpp::Versions, handle::Handle};
use crate::tensor::value_error;

impl Libtorch {
    /// Tells autograd that tensors are to be written to.
    ///
    /// # Errors
    /// Where they may not be: tensors that were made in inference mode, outside of it.
    pub(crate) fn advance_versions<'a, 'py: 'a>(
        &self,
        py: Python<'py>,
        written: impl Iterator<Item = (Borrowed<'a, 'py, PyAny>, &'static str)> + Clone,
    ) -> PyResult<()> {
        if let (Some(inside), Some(versions)) = (&self.inside, &self.cpp.versions)
            && written.clone().all(|(object, _)| self.is_plain(&object))
        {
            for (object, name) in written {
                versions.advance(&inside.lend(self, &object), name)?;
            }
            return Ok(());
        }
        if let (Some(unwrap), Some(versions)) = (self.cpp.unwrap, &self.cpp.versions) {
            for (object, name) in written {
                let mut handle = std::ptr::null_mut();
                // SAFETY: a tensor, and a place for a handle, which is there if the function says 0.
                let handle = match unsafe { unwrap(object.as_ptr().cast(), &raw mut handle) } {
                    0 => Handle(handle, self),
                    _ => return Err(Failed("torch_tensor_from_pyobject").into()),
                };
                versions.advance(&handle, name)?;
            }
            return Ok(());
        }
        let is_inference_mode = match &self.cpp.versions {
            // SAFETY: reads a flag of this thread.
            Some(versions) => unsafe { (versions.is_inference_mode)() },
            None => {
                let torch = py.import(intern!(py, "torch"))?;
                torch.call_method0(intern!(py, "is_inference_mode_enabled"))?.is_truthy()?
            }
        };
        if !is_inference_mode {
            for (object, name) in written.clone() {
                if object.call_method0(intern!(py, "is_inference"))?.is_truthy()? {
                    return Err(made_in_inference_mode(name));
                }
            }
        }
        let objects = PyTuple::new(py, written.map(|(object, _)| object).collect::<Vec<_>>())?;
        self.increment_version.bind(py).call1((objects,)).map(drop)
    }

    /// The same for an operator's tensors. Where this PyTorch has no function for it, Python's is called,
    /// which is slower and as good.
    pub(super) fn advance_versions_of<'a>(
        &self,
        handles: impl Iterator<Item = &'a Handle<'a>>,
        names: &[&'static str],
    ) -> PyResult<()> {
        match (&self.cpp.versions, self.cpp.wrap) {
            (Some(versions), _) => {
                handles.zip(names).try_for_each(|(handle, name)| versions.advance(handle, name))
            }
            (None, Some(_)) => Python::attach(|py| {
                let objects = handles.map(|handle| handle.object(py)).collect::<PyResult<Vec<_>>>()?;
                self.advance_versions(py, objects.iter().map(Bound::as_borrowed).zip(names.iter().copied()))
            }),
            (None, None) => Err(PyRuntimeError::new_err(format!(
                "torch {} lacks torch::autograd::impl::bump_version, which operators that write to tensors need; \
                 gdn.split and gdn.merge with out do without",
                self.version
            ))),
        }
    }
}

impl Versions {
    pub(super) fn advance(&self, handle: &Handle<'_>, name: &str) -> PyResult<()> {
        // SAFETY: a tensor that lives, and that has a version.
        unsafe {
            if !(self.is_inference)(handle.0) {
                (self.bump)(handle.0);
            } else if !(self.is_inference_mode)() {
                return Err(made_in_inference_mode(name));
            }
        }
        Ok(())
    }
}

#[cold]
fn made_in_inference_mode(argument: &str) -> PyErr {
    value_error(format!("{argument} was made in inference mode, it can be written to in inference mode only"))
}
