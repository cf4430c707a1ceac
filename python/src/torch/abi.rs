//! libtorch's C functions: those that it exports for extensions which outlive its versions.
//!
//! Declarations: `torch/csrc/inductor/aoti_torch/c/shim.h` and `torch/csrc/stable/c/shim.h` in PyTorch's
//! wheel, 2.10 and later.

use std::ffi::{CStr, c_char, c_void};

use libloading::os::unix::Library;
use pyo3::PyErr;

use crate::tensor::DType;

/// `AtenTensorHandle` and other handles
pub(super) type Opaque = *mut c_void;
/// A kernel of an operator, and what it gets: the stack, and how many arguments and results are on it.
pub(super) type Kernel = unsafe extern "C-unwind" fn(*mut u64, u64, u64);

/// `torch_from_blob`, of torch 2.11 and later
pub(super) type FromBlob = unsafe extern "C" fn(
    *mut c_void,
    i64,
    *const i64,
    *const i64,
    i64,
    i32,
    i32,
    i32,
    *mut Opaque,
    i32,
    *const u8,
    i64,
    unsafe extern "C" fn(*mut c_void, *mut c_void),
    *mut c_void,
) -> i32;

/// `aoti_torch_get_current_cuda_stream`, of libtorch_cuda: of a device by its index
pub(super) type CurrentStream = unsafe extern "C" fn(i32, *mut *mut c_void) -> i32;

/// `torch_delete_stable_ivalue`, of torch 2.13 and later
pub(super) type Delete = unsafe extern "C" fn(*mut u64) -> i32;

/// `aoti_torch_check`, which throws where the first argument is false
pub(super) type Check = unsafe extern "C-unwind" fn(bool, *const c_char, *const c_char, u32, *const c_char);

/// Declares the functions once: their names, and their types.
macro_rules! functions {
    ($(fn $name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        #[expect(non_snake_case, reason = "one of libtorch's names")]
        pub(super) struct Functions { $(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)* }

        impl Functions {
            /// # Errors
            /// The name of the first one that is not there.
            pub(super) fn load(library: &Library) -> Result<Self, &'static str> {
                Ok(Self { $(
                    // SAFETY: the function of that name has that type.
                    $name: *unsafe { library.get(stringify!($name)) }.map_err(|_| stringify!($name))?,
                )* })
            }
        }
    };
}

functions! {
    fn aoti_torch_library_init_def(*const c_char, *const c_char, u32, *mut Opaque) -> i32;
    fn aoti_torch_library_init_impl(*const c_char, *const c_char, *const c_char, u32, *mut Opaque) -> i32;
    fn aoti_torch_library_def(Opaque, *const c_char) -> i32;
    fn torch_library_impl(Opaque, *const c_char, Kernel, u64) -> i32;
    fn aoti_torch_delete_tensor_object(Opaque) -> i32;
    fn torch_delete_string(Opaque) -> i32;
    fn torch_string_length(Opaque, *mut usize) -> i32;
    fn torch_string_c_str(Opaque, *mut *const c_char) -> i32;
    fn aoti_torch_get_data_ptr(Opaque, *mut *mut c_void) -> i32;
    fn torch_get_const_data_ptr(Opaque, *mut *const c_void) -> i32;
    fn aoti_torch_get_storage_size(Opaque, *mut i64) -> i32;
    fn aoti_torch_get_dim(Opaque, *mut i64) -> i32;
    fn aoti_torch_get_sizes(Opaque, *mut *mut i64) -> i32;
    fn aoti_torch_get_strides(Opaque, *mut *mut i64) -> i32;
    fn aoti_torch_get_dtype(Opaque, *mut i32) -> i32;
    fn aoti_torch_dtype_element_size(i32) -> usize;
    fn aoti_torch_get_device_type(Opaque, *mut i32) -> i32;
    fn aoti_torch_get_device_index(Opaque, *mut i32) -> i32;
    fn aoti_torch_device_type_cuda() -> i32;
    fn aoti_torch__reinterpret_tensor(Opaque, i64, *const i64, *const i64, i64, *mut Opaque) -> i32;
    fn aoti_torch_empty_strided(i64, *const i64, *const i64, i32, i32, i32, *mut Opaque) -> i32;
    fn aoti_torch_grad_mode_is_enabled() -> bool;
    fn torch_get_num_threads(*mut u32) -> i32;
    fn torch_parallel_for(i64, i64, i64, unsafe extern "C" fn(i64, i64, *mut c_void), *mut c_void) -> i32;
}

/// The element types with a name of libtorch's; others, which are few and have one size each, go by
/// libtorch's number.
pub(super) const DTYPES: [(&CStr, DType); 18] = {
    const fn dtype(code: u8, bits: u8) -> DType {
        DType { code, bits, lanes: 1 }
    }
    [
        (c"aoti_torch_dtype_bfloat16", dtype(4, 16)),
        (c"aoti_torch_dtype_float16", dtype(2, 16)),
        (c"aoti_torch_dtype_float32", dtype(2, 32)),
        (c"aoti_torch_dtype_float64", dtype(2, 64)),
        (c"aoti_torch_dtype_float8_e4m3fn", dtype(10, 8)),
        (c"aoti_torch_dtype_float8_e4m3fnuz", dtype(11, 8)),
        (c"aoti_torch_dtype_float8_e5m2", dtype(12, 8)),
        (c"aoti_torch_dtype_float8_e5m2fnuz", dtype(13, 8)),
        (c"aoti_torch_dtype_int8", dtype(0, 8)),
        (c"aoti_torch_dtype_int16", dtype(0, 16)),
        (c"aoti_torch_dtype_int32", dtype(0, 32)),
        (c"aoti_torch_dtype_int64", dtype(0, 64)),
        (c"aoti_torch_dtype_uint8", dtype(1, 8)),
        (c"aoti_torch_dtype_uint16", dtype(1, 16)),
        (c"aoti_torch_dtype_uint32", dtype(1, 32)),
        (c"aoti_torch_dtype_uint64", dtype(1, 64)),
        (c"aoti_torch_dtype_bool", dtype(6, 8)),
        (c"aoti_torch_dtype_complex64", dtype(5, 64)),
    ]
};

/// What went wrong inside libtorch, which has told its log.
pub(super) struct Failed(pub(super) &'static str);

impl From<Failed> for PyErr {
    fn from(Failed(function): Failed) -> Self {
        pyo3::exceptions::PyRuntimeError::new_err(format!("PyTorch's {function} failed"))
    }
}

/// Calls a function that gives a status, and its last argument as the answer.
macro_rules! ask {
    ($torch:expr, $function:ident($($argument:expr),*)) => {{
        let mut answer = std::mem::MaybeUninit::uninit();
        match ($torch.call.$function)($($argument,)* answer.as_mut_ptr()) {
            0 => Ok(answer.assume_init()),
            _ => Err(Failed(stringify!($function))),
        }
    }};
}
pub(super) use ask;
