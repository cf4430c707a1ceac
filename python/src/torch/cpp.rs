//! What libtorch has no C function for: C++ functions, by their mangled names. A PyTorch of tomorrow may lack
//! any of them; then what needs it goes a longer way or says so, and everything else goes on.

use std::ffi::{c_char, c_void};

use libloading::os::unix::Library;
use pyo3::ffi;

use super::{
    abi::{Delete, Opaque},
    inside,
};

pub(super) struct Cpp {
    pub(super) wrap: Option<Wrap>,
    /// `torch_tensor_from_pyobject`, of torch 2.14 and later: C, and a new handle
    pub(super) unwrap: Option<unsafe extern "C" fn(*mut c_void, *mut Opaque) -> i32>,
    pub(super) versions: Option<Versions>,
    /// `torch_exception_get_what_without_backtrace`, of torch 2.13 and later: C, what went wrong last on this
    /// thread
    pub(super) what: Option<unsafe extern "C" fn() -> *const c_char>,
    pub(super) seers: Option<Seers>,
    pub(super) inside: Option<inside::Functions>,
    delete: Option<DeleteValue>,
}

/// What says whether somebody on this thread wants to see every operator.
pub(super) struct Seers {
    /// `c10::impl::TorchDispatchModeTLS::stack_len`
    pub(super) modes: unsafe extern "C" fn() -> i64,
    /// `torch::jit::tracer::getTracingState`: a reference to a `std::shared_ptr`, which begins with the
    /// pointer
    pub(super) tracing: unsafe extern "C" fn() -> *const *const c_void,
}

/// What frees the place of an argument that may be none.
#[derive(Clone, Copy)]
enum DeleteValue {
    /// `torch_delete_stable_ivalue`, of torch 2.13 and later: C
    C(Delete),
    /// `operator delete`, of the library that libtorch's `new` is of
    Cpp(unsafe extern "C" fn(*mut u64)),
}

/// What makes a Python object of a tensor.
#[derive(Clone, Copy)]
pub(super) enum Wrap {
    /// `torch_tensor_to_pyobject`, of torch 2.14 and later: C
    C(unsafe extern "C" fn(Opaque, *const c_void, *mut *mut c_void) -> i32),
    /// `THPVariable_Wrap`, which that calls. It takes the address of an `at::Tensor`, which is what a handle
    /// is.
    Cpp(unsafe extern "C" fn(Opaque) -> *mut ffi::PyObject),
}

/// How autograd learns that a tensor was written to. They take what [`Wrap::Cpp`] takes.
pub(super) struct Versions {
    /// `at::native::is_inference`
    pub(super) is_inference: unsafe extern "C" fn(Opaque) -> bool,
    /// `c10::InferenceMode::is_enabled`: on this thread
    pub(super) is_inference_mode: unsafe extern "C" fn() -> bool,
    /// `torch::autograd::impl::bump_version`, for tensors that were not made in inference mode: those have no
    /// version
    pub(super) bump: unsafe extern "C" fn(Opaque),
}

impl Cpp {
    /// What there is in libtorch_cpu and, where they are loaded, libc10 and libtorch_python. Names in
    /// `without` are passed over, as if they were missing.
    pub(super) fn find(
        cpu: &Library,
        c10: Option<&Library>,
        python: Option<&Library>,
        without: &[String],
    ) -> Self {
        // SAFETY: functions of these names have these types.
        unsafe {
            let c = find(cpu, "torch_tensor_to_pyobject", without).map(Wrap::C);
            let wrap =
                |python| find(python, "_Z16THPVariable_WrapRKN2at10TensorBaseE", without).map(Wrap::Cpp);
            let is_inference = find(cpu, "_ZN2at6native12is_inferenceERKNS_6TensorE", without);
            let bump = find(cpu, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", without);
            let mode = |c10| find(c10, "_ZN3c1013InferenceMode10is_enabledEv", without);
            let modes = |c10| find(c10, "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv", without);
            let tracing = find(cpu, "_ZN5torch3jit6tracer15getTracingStateEv", without);
            let delete = find(cpu, "torch_delete_stable_ivalue", without).map(DeleteValue::C);
            let is_neg = find(cpu, "_ZN2at6native6is_negERKNS_6TensorE", without);
            let included =
                |c10| find(c10, "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE", without);
            let requires_grad = |c10| find(c10, "_ZNK3c1010TensorImpl13requires_gradEv", without);
            let (is_included, requires_grad) = (c10.and_then(included), c10.and_then(requires_grad));
            Self {
                inside: is_neg.zip(is_included).zip(requires_grad).map(
                    |((is_neg, is_included), requires_grad)| inside::Functions {
                        is_neg,
                        is_included,
                        requires_grad,
                    },
                ),
                seers: c10.and_then(modes).zip(tracing).map(|(modes, tracing)| Seers { modes, tracing }),
                delete: delete.or_else(|| find(cpu, "_ZdlPv", without).map(DeleteValue::Cpp)),
                wrap: c.or_else(|| python.and_then(wrap)),
                unwrap: find(cpu, "torch_tensor_from_pyobject", without),
                what: find(cpu, "torch_exception_get_what_without_backtrace", without),
                versions: is_inference.zip(bump).zip(c10.and_then(mode)).map(
                    |((is_inference, bump), is_inference_mode)| Versions {
                        is_inference,
                        is_inference_mode,
                        bump,
                    },
                ),
            }
        }
    }
}

impl Cpp {
    /// Frees the place of an argument that may be none. Its 8 bytes stay where this PyTorch has nothing for
    /// that.
    ///
    /// # Safety
    /// A place that libtorch made, which nothing looks at any more.
    pub(super) unsafe fn delete_value(&self, place: *mut u64) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.delete {
                Some(DeleteValue::C(delete)) => drop(delete(place)),
                Some(DeleteValue::Cpp(delete)) => delete(place),
                None => {}
            }
        }
    }
}

/// # Safety
/// The function of that name has the type `T`.
unsafe fn find<T: Copy>(library: &Library, name: &str, without: &[String]) -> Option<T> {
    if without.iter().any(|other| other == name) {
        return None;
    }
    // SAFETY: the caller's promise.
    unsafe { library.get::<T>(name) }.ok().map(|found| *found)
}
