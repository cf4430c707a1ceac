//! The tensor inside a Python object of PyTorch's, read where it is: through DLPack's exchange API it is
//! twice the time, as C++ takes a share in each tensor for that.
//!
//! `THPVariable_Unpack`, which does so in C++, is no function of a library but a place in an object, the same
//! for all of them. It is looked for once, in objects whose tensors are known, and not used where it is not
//! found.

use std::{ffi::c_void, mem::ManuallyDrop, ops::Deref};

use pyo3::{intern, prelude::*, types::PyType};

use super::{Libtorch, abi::Opaque, fields::Fields, handle::Handle};
use crate::tensor::{DType, Device, Tensor};

/// How tensors are found in objects, and what is to be known of them that libtorch has no C function for.
pub(super) struct Inside {
    /// Bytes from the start of an object to its `at::Tensor`, whose address is what a handle is.
    offset: usize,
    functions: Functions,
    /// The number of a dispatch key, which is in a thread's set while a transform of `torch.func` is active.
    transformed: u16,
    /// Where what is known of them is read without a call.
    pub(super) fields: Option<Fields>,
}

/// C++.
#[derive(Clone, Copy)]
pub(super) struct Functions {
    /// `at::native::is_neg`
    pub(super) is_neg: unsafe extern "C" fn(Opaque) -> bool,
    /// `c10::impl::tls_is_dispatch_key_included`
    pub(super) is_included: unsafe extern "C" fn(u16) -> bool,
    /// `c10::TensorImpl::requires_grad`, which takes what an `at::Tensor` points to
    pub(super) requires_grad: unsafe extern "C" fn(*const c_void) -> bool,
}

/// A tensor that an object has.
pub(super) struct Lent<'a>(ManuallyDrop<Handle<'a>>);

impl<'a> Deref for Lent<'a> {
    type Target = Handle<'a>;

    fn deref(&self) -> &Handle<'a> {
        &self.0
    }
}

impl Inside {
    /// Looks for the place. `None` where this PyTorch keeps tensors elsewhere, or lacks what is needed.
    pub(super) fn find(torch: &Libtorch, types: [&Bound<'_, PyType>; 2], with_fields: bool) -> Option<Self> {
        const WORD: usize = size_of::<usize>();
        let (functions, py) = (torch.cpp.inside?, types[0].py());
        let c = py.import(intern!(py, "torch")).ok()?.getattr(intern!(py, "_C")).ok()?;
        let key = c.getattr(intern!(py, "DispatchKey")).ok()?;
        let key = key.getattr(intern!(py, "FuncTorchDynamicLayerFrontMode")).ok()?;
        let transformed = key.call_method0(intern!(py, "__int__")).ok()?.extract().ok()?;
        let float = torch.number_of(DType { code: DType::FLOAT, bits: 32, lanes: 1 })?;
        let made = |length: usize| {
            let handle = torch.empty(&[length], float, Device::CPU).ok()?;
            let object = handle.object(py).ok()?;
            Some((handle, object))
        };
        let ours = [made(0)?, made(3)?];
        let size: usize = types[0].getattr(intern!(py, "__basicsize__")).ok()?.extract().ok()?;
        let offset = (2 * WORD..size).step_by(WORD).find(|offset| {
            // SAFETY: words of objects of that size, and the first word of tensors that live: where the rest
            // of one is.
            ours.iter().all(|(handle, object)| unsafe {
                object.get_type().is(types[0])
                    && *object.as_ptr().byte_add(*offset).cast::<usize>() == *handle.0.cast::<usize>()
            })
        })?;
        let mut inside = Self { offset, functions, transformed, fields: None };
        // What Python makes is no different.
        let is_same = types.iter().all(|ty| {
            let object = ty.call0();
            object
                .is_ok_and(|object| inside.lend(torch, &object).object(py).is_ok_and(|same| same.is(&object)))
        });
        inside.fields = inside.find_fields(torch, &c, float).filter(|_| with_fields && is_same);
        is_same.then_some(inside)
    }

    fn find_fields(&self, torch: &Libtorch, c: &Bound<'_, PyAny>, float: i32) -> Option<Fields> {
        let py = c.py();
        // Tensors that are made in inference mode have no version.
        let module = py.import(intern!(py, "torch")).ok()?;
        let ordinary = module.call_method1(intern!(py, "inference_mode"), (false,)).ok()?;
        ordinary.call_method0(intern!(py, "__enter__")).ok()?;
        let found = self.find_ordinary(torch, c, float);
        let nothing = py.None();
        ordinary.call_method1(intern!(py, "__exit__"), (&nothing, &nothing, &nothing)).ok()?;
        found
    }

    fn find_ordinary(&self, torch: &Libtorch, c: &Bound<'_, PyAny>, float: i32) -> Option<Fields> {
        let py = c.py();
        let object = torch.empty(&[2, 3], float, Device::CPU).ok()?.object(py).ok()?;
        let negated = py.import(intern!(py, "torch")).ok()?.call_method1(intern!(py, "_neg_view"), (object,));
        let (negated, keys) = (negated.ok()?, c.getattr(intern!(py, "_dispatch_keys")).ok()?);
        let keys_of = |object: &Bound<'_, PyAny>| {
            keys.call1((object,)).ok()?.call_method0(intern!(py, "raw_repr")).ok()?.extract().ok()
        };
        let handle_of = |object: &Bound<'_, PyAny>| self.lend(torch, object);
        Fields::find(torch, py, float, &self.lend(torch, &negated), handle_of, keys_of)
    }

    /// The tensor of an object of one of the types that [`Inside::find`] was given.
    #[inline]
    pub(super) fn lend<'a>(&self, torch: &'a Libtorch, object: &Bound<'_, PyAny>) -> Lent<'a> {
        // SAFETY: within the object.
        Lent(ManuallyDrop::new(Handle(unsafe { object.as_ptr().byte_add(self.offset) }.cast(), torch)))
    }

    /// Whether a transform is active on this thread, whose wrappers have no memory: libtorch would say so in
    /// its log for each.
    #[inline]
    pub(super) fn is_transformed(&self) -> bool {
        // SAFETY: reads what is this thread's own.
        unsafe { (self.functions.is_included)(self.transformed) }
    }

    #[inline]
    pub(super) fn requires_grad(&self, tensor: &Lent<'_>) -> bool {
        // SAFETY: a tensor that lives, which begins with the address of the rest of it.
        unsafe { (self.functions.requires_grad)(*tensor.0.0.cast()) }
    }

    /// Keeps what a tensor that was read tells of others of its kind.
    #[cold]
    pub(super) fn learn(&self, handle: &Handle<'_>, number: i32, tensor: &Tensor) {
        // SAFETY: a tensor that lives.
        let is_negated = || unsafe { (self.functions.is_neg)(handle.0) };
        if let Some(fields) = &self.fields
            && tensor.dtype.code != DType::COMPLEX
            && !tensor.is_hollow()
            && !is_negated()
        {
            fields.learn(handle, number, tensor);
        }
    }

    /// Reads an ordinary tensor. `false` where it is none, for others to find out what it is.
    #[inline]
    pub(super) fn read(&self, tensor: &Lent<'_>, argument: &str, write: bool, into: &mut Tensor) -> bool {
        if let Some(fields) = &self.fields
            && fields.read(tensor, write, into).is_some()
        {
            return into.dtype.code < DType::OPAQUE;
        }
        // SAFETY: a tensor that lives.
        unsafe {
            tensor.read(argument, write, into).is_ok()
                && into.dtype.code < DType::OPAQUE
                && !into.is_hollow()
                && match into.dtype.code {
                    DType::COMPLEX => false,
                    // The imaginary part of a conjugate is lazily negated.
                    DType::FLOAT | DType::BFLOAT => !(self.functions.is_neg)(tensor.0.0),
                    _ => true,
                }
        }
    }
}
