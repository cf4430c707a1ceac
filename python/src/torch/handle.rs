//! [`Handle`]: a tensor of libtorch's, as its C functions have it.

use pyo3::prelude::*;

use super::{
    Libtorch, OFFSETS,
    abi::{Failed, Opaque, ask},
    cpp::Wrap,
};
use crate::tensor::{Device, Tensor, no_memory, too_many_dims, value_error};

/// `c10::DeviceType`, whose numbers are in files
pub(super) const CPU: i32 = 0;
pub(super) const META: i32 = 14;

/// A tensor of libtorch's that is ours to delete.
pub(super) struct Handle<'a>(pub(super) Opaque, pub(super) &'a Libtorch);

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        // SAFETY: owned, and deleted once.
        unsafe { (self.1.call.aoti_torch_delete_tensor_object)(self.0) };
    }
}

impl Handle<'_> {
    /// As an object of Python's.
    pub(super) fn object<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        // SAFETY: a tensor that lives, and the GIL; a new reference, or null with an exception set where it
        // is C++.
        unsafe {
            match self.1.cpp.wrap {
                Some(Wrap::C(wrap)) => {
                    let mut object = std::ptr::null_mut();
                    match wrap(self.0, std::ptr::null(), &raw mut object) {
                        0 => Bound::from_owned_ptr_or_err(py, object.cast()),
                        _ => Err(Failed("torch_tensor_to_pyobject").into()),
                    }
                }
                Some(Wrap::Cpp(wrap)) => Bound::from_owned_ptr_or_err(py, wrap(self.0)),
                None => Err(Failed("THPVariable_Wrap").into()),
            }
        }
    }

    /// What it is, known to be dense and like another.
    pub(super) fn dense(&self, like: &Tensor, shape: &[usize]) -> PyResult<Tensor> {
        // SAFETY: a tensor that lives.
        let address = unsafe { ask!(self.1, aoti_torch_get_data_ptr(self.0))? };
        Ok(Tensor::dense(address as usize, like.dtype, like.device, shape))
    }

    /// Reads what the handle stands for, whose memory is to be written to or not. Its dtype, as libtorch's
    /// number.
    pub(super) fn read(&self, argument: &str, write: bool, tensor: &mut Tensor) -> PyResult<i32> {
        let torch = self.1;
        if let Some(number) = torch.fields().and_then(|fields| fields.read(self, write, tensor)) {
            return Ok(number);
        }
        // SAFETY: a tensor that lives; sizes and strides are `dims` numbers, which it keeps.
        unsafe {
            let dims = usize::try_from(ask!(torch, aoti_torch_get_dim(self.0))?).unwrap_or(0);
            let sizes: *mut i64 = ask!(torch, aoti_torch_get_sizes(self.0))?;
            let strides: *mut i64 = ask!(torch, aoti_torch_get_strides(self.0))?;
            let address = if write {
                ask!(torch, aoti_torch_get_data_ptr(self.0))? as usize
            } else {
                ask!(torch, torch_get_const_data_ptr(self.0))? as usize
            };
            let number = ask!(torch, aoti_torch_get_dtype(self.0))?;
            let kind = ask!(torch, aoti_torch_get_device_type(self.0))?;
            let device = match kind {
                CPU => Device::CPU,
                _ if kind == torch.cuda => {
                    Device { kind: Device::CUDA, ordinal: ask!(torch, aoti_torch_get_device_index(self.0))? }
                }
                META => return Err(value_error(format!("{argument} is on meta, expected cpu or cuda"))),
                _ => {
                    return Err(value_error(format!(
                        "{argument} is on PyTorch's device type {kind}, expected cpu or cuda"
                    )));
                }
            };
            let numbers =
                |at: *mut i64| if dims == 0 { &[][..] } else { std::slice::from_raw_parts(at, dims) };
            let (dtype, sizes, strides) = (torch.dtype_of(number), numbers(sizes), numbers(strides));
            let is_freed = address < OFFSETS
                && sizes.iter().all(|length| *length > 0)
                && ask!(torch, aoti_torch_get_storage_size(self.0))? == 0;
            if is_freed {
                return Err(no_memory(argument, sizes));
            }
            if !tensor.fill(address, dtype, device, false, sizes, Some(strides)) {
                return Err(too_many_dims(argument, dims));
            }
            if let Some(inside) = &torch.inside {
                inside.learn(self, number, tensor);
            }
            Ok(number)
        }
    }
}
