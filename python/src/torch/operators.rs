//! The operators of PyTorch: their registration, and what its stack holds. What each does is in a file of its
//! own.

mod layer;
mod split;

use std::{
    ffi::{CStr, CString, c_char},
    panic::AssertUnwindSafe,
};

use pyo3::prelude::*;

use super::{
    Libtorch,
    abi::{Failed, Kernel, Opaque, ask},
    get,
    handle::Handle,
};

/// What every operator takes after its tensors.
const HEADS: &str =
    "int num_k_heads, int num_v_heads, int head_k_dim, int head_v_dim, str packing=\"interleaved\"";

/// An operator: the name that its kernels are known by, its schema, and its kernel.
struct Operator {
    name: &'static CStr,
    schema: String,
    kernel: Kernel,
}

/// Registers all, with their out variants, for the CPU and CUDA.
///
/// # Safety
/// To be called once.
pub(super) unsafe fn define(torch: &Libtorch) -> Result<(), Failed> {
    let file = c"gdn/python/src/torch/operators.rs".as_ptr();
    let operators: Vec<Operator> = split::operators().into_iter().chain(layer::operators()).collect();
    let check = |status: i32, function| if status == 0 { Ok(()) } else { Err(Failed(function)) };
    // SAFETY: texts that end with a zero, handles that libtorch gave, and kernels that take these operators'
    // arguments.
    unsafe {
        let definitions = ask!(torch, aoti_torch_library_init_def(c"gdn".as_ptr(), file, line!()))?;
        for Operator { schema, .. } in &operators {
            let schema = CString::new(schema.as_str()).map_err(|_| Failed("aoti_torch_library_def"))?;
            check(
                (torch.call.aoti_torch_library_def)(definitions, schema.as_ptr()),
                "aoti_torch_library_def",
            )?;
        }
        for key in [c"CPU", c"CUDA"] {
            let library =
                ask!(torch, aoti_torch_library_init_impl(c"gdn".as_ptr(), key.as_ptr(), file, line!()))?;
            for Operator { name, kernel, .. } in &operators {
                // The oldest version whose conventions are meant.
                let version = 2 << 56 | 10 << 48;
                let status = (torch.call.torch_library_impl)(library, name.as_ptr(), *kernel, version);
                check(status, "torch_library_impl")?;
            }
        }
    }
    Ok(())
}

/// A text of libtorch's that is ours to delete.
struct Text<'a>(Opaque, &'a Libtorch);

impl Drop for Text<'_> {
    fn drop(&mut self) {
        // SAFETY: owned, and deleted once.
        unsafe { (self.1.call.torch_delete_string)(self.0) };
    }
}

impl Text<'_> {
    fn as_str(&self) -> Result<&str, Failed> {
        // SAFETY: a text that lives, of so many bytes.
        unsafe {
            let length = ask!(self.1, torch_string_length(self.0))?;
            let start: *const c_char = ask!(self.1, torch_string_c_str(self.0))?;
            std::str::from_utf8(std::slice::from_raw_parts(start.cast(), length))
                .map_err(|_| Failed("torch_string_c_str"))
        }
    }
}

/// The arguments of an operator, which it owns, one after the other. They are all to be taken before anything
/// can go wrong.
struct Stack<'a> {
    next: *mut u64,
    torch: &'a Libtorch,
}

/// Each is of the type that the schema has at its place.
impl<'a> Stack<'a> {
    /// # Safety
    /// There is another argument.
    unsafe fn value(&mut self) -> u64 {
        // SAFETY: the caller's promise.
        unsafe {
            let value = *self.next;
            self.next = self.next.add(1);
            value
        }
    }

    /// # Safety
    /// The next argument is a tensor.
    unsafe fn tensor(&mut self) -> Handle<'a> {
        // SAFETY: the caller's promise.
        Handle(unsafe { self.value() } as Opaque, self.torch)
    }

    /// # Safety
    /// The next argument is an `int`.
    unsafe fn int(&mut self) -> i64 {
        // SAFETY: the caller's promise.
        unsafe { self.value() as i64 }
    }

    /// # Safety
    /// The next argument is a `float`.
    unsafe fn float(&mut self) -> f64 {
        // SAFETY: the caller's promise.
        f64::from_bits(unsafe { self.value() })
    }

    /// # Safety
    /// The next argument is a `bool`.
    unsafe fn bool(&mut self) -> bool {
        // SAFETY: the caller's promise. It has one byte, the others may be anything.
        unsafe { self.value() as u8 != 0 }
    }

    /// # Safety
    /// The next argument is a `str`.
    unsafe fn text(&mut self) -> Text<'a> {
        // SAFETY: the caller's promise.
        Text(unsafe { self.value() } as Opaque, self.torch)
    }

    /// The value of an argument that may be none.
    ///
    /// # Safety
    /// The next argument is one.
    unsafe fn optional(&mut self) -> Option<u64> {
        // SAFETY: the caller's promise: a place of libtorch's that holds the value, or none.
        unsafe {
            let place = self.value() as *mut u64;
            if place.is_null() {
                return None;
            }
            let value = *place;
            self.torch.cpp.delete_value(place);
            Some(value)
        }
    }

    /// # Safety
    /// The next argument is a `Tensor?`.
    unsafe fn maybe_tensor(&mut self) -> Option<Handle<'a>> {
        // SAFETY: the caller's promise.
        unsafe { self.optional() }.map(|value| Handle(value as Opaque, self.torch))
    }
}

/// The kernels: a stack has the arguments, owned by the kernel, and gets the results; what goes wrong is
/// thrown as libtorch throws.
macro_rules! kernels {
    ($($name:ident of $operator:literal: $call:ident($($argument:expr),*);)*) => { $(
        unsafe extern "C-unwind" fn $name(stack: *mut u64, _: u64, _: u64) {
            // SAFETY: the stack of this operator.
            unsafe { super::kernel(stack, $operator, |torch, stack| $call(torch, stack, $($argument),*)) }
        }
    )* };
}
use kernels;

/// The most of an error's sentence that PyTorch is told, with a zero at its end.
const SENTENCE: usize = 1024;

/// Nothing here is dropped while what `check` throws goes through: cleaning up would call this library's own
/// unwinder, which is not libtorch's where it was linked in.
///
/// # Safety
/// `stack` is that of the operator.
unsafe fn kernel(
    stack: *mut u64,
    name: &'static CStr,
    call: unsafe fn(&'static Libtorch, *mut u64) -> PyResult<()>,
) {
    let Some(torch) = get() else { return };
    let mut sentence = [0; SENTENCE];
    // SAFETY: the caller's promise.
    if unsafe { succeeds(torch, stack, call, &mut sentence) } {
        return;
    }
    // SAFETY: texts that end with a zero. It throws, through frames that allow it.
    unsafe { (torch.check)(false, name.as_ptr(), c"gdn".as_ptr(), 0, sentence.as_ptr().cast()) }
}

/// Calls the operator. Where that fails, `sentence` says why, and ends with a zero.
///
/// # Safety
/// As [`kernel`].
#[inline(never)]
unsafe fn succeeds(
    torch: &'static Libtorch,
    stack: *mut u64,
    call: unsafe fn(&'static Libtorch, *mut u64) -> PyResult<()>,
    sentence: &mut [u8; SENTENCE],
) -> bool {
    // SAFETY: the caller's promise.
    let done = std::panic::catch_unwind(AssertUnwindSafe(|| unsafe { call(torch, stack) }));
    let error = match done {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => Python::attach(|py| error.value(py).to_string()),
        Err(_) => "a bug of gdn: the operator panicked".to_owned(),
    };
    let text = error.replace('\0', " ");
    let length = (0..SENTENCE).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    sentence[..length].copy_from_slice(&text.as_bytes()[..length]);
    false
}
