//! PyTorch, without C++: its operators registered, its tensors read and made, through the C functions that libtorch exports for
//! extensions which outlive its versions.
//!
//! Declarations: `torch/csrc/inductor/aoti_torch/c/shim.h` and `torch/csrc/stable/c/shim.h` in PyTorch's wheel, 2.10 and later. They
//! are looked up in the libraries that `import torch` has loaded; nothing is linked.

use std::{
    ffi::{CStr, c_char, c_void},
    sync::OnceLock,
};

use libloading::os::unix::{Library, RTLD_LAZY};
use pyo3::{
    Borrowed,
    exceptions::{PyImportError, PyValueError},
    ffi, intern,
    prelude::*,
    types::PyType,
};

use gdn::Block;

use crate::{
    blocks,
    dlpack::Exchange,
    op::Place,
    tensor::{DType, Device, Tensor, type_error, value_error},
};

/// `AtenTensorHandle` and other handles
type Opaque = *mut c_void;
type Kernel = unsafe extern "C-unwind" fn(*mut u64, u64, u64);

type Wrap = unsafe extern "C" fn(Opaque) -> *mut ffi::PyObject;
type FromBlob = unsafe extern "C" fn(
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

/// Declares the functions once: their names, and their types.
macro_rules! functions {
    ($(fn $name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        #[expect(non_snake_case, reason = "one of libtorch's names")]
        struct Functions { $($name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)* }

        impl Functions {
            /// # Errors
            /// The name of the first one that is not there.
            fn load(library: &Library) -> Result<Self, &'static str> {
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

/// How autograd learns that a tensor was written to, for operators, which C gives no way to. C++, and takes what [`Wrap`] takes.
struct Versions {
    /// `at::native::is_inference`
    is_inference: unsafe extern "C" fn(Opaque) -> bool,
    /// `torch::autograd::impl::bump_version`, for tensors that were not made in inference mode: those have no version
    bump: unsafe extern "C" fn(Opaque),
}

/// The element types with a name of libtorch's; others, which are few and have one size each, go by libtorch's number.
const DTYPES: [(&CStr, DType); 18] = {
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

/// The PyTorch of this process.
pub(crate) struct Libtorch {
    call: Functions,
    /// `THPVariable_Wrap`, which makes a Python object of a tensor. It is C++, and takes the address of an `at::Tensor`, which is what
    /// a handle is. (torch 2.14 has `torch_tensor_to_pyobject` in C, which calls it.)
    wrap: Wrap,
    /// `torch_from_blob`, of torch 2.11 and later
    from_blob: Option<FromBlob>,
    /// `c10::detail::torchCheckFail`, which raises
    fail: unsafe extern "C-unwind" fn(*const c_char, *const c_char, u32, *const c_char) -> !,
    versions: Versions,
    /// Its numbers for [`DTYPES`].
    dtypes: [i32; DTYPES.len()],
    cuda: i32,
    exchange: &'static Exchange,
    /// Where PyTorch's threads are.
    process: u32,
    tensor: Py<PyType>,
    parameter: Py<PyType>,
    /// Python functions that say whether somebody wants to see every operator: dispatch modes, tracers.
    watchers: [Py<PyAny>; 2],
    increment_version: Py<PyAny>,
}

static LIBTORCH: OnceLock<Libtorch> = OnceLock::new();

/// What went wrong inside libtorch, which has told its log.
struct Failed(&'static str);

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

mod operators;

/// Finds PyTorch, and registers the operators. Once a process; `torch` is the module.
///
/// # Errors
/// `ImportError` where it lacks a function that is needed.
pub(crate) fn register(torch: &Bound<'_, PyModule>) -> PyResult<()> {
    if LIBTORCH.get().is_some() {
        return Ok(());
    }
    let version = torch.getattr("__version__")?;
    let missing = |what: &str| {
        PyImportError::new_err(format!("torch {version} lacks {what}; gdn needs torch 2.10 or later"))
    };
    let names = if cfg!(target_os = "macos") {
        ["libtorch_cpu.dylib", "libc10.dylib", "libtorch_python.dylib"]
    } else {
        ["libtorch_cpu.so", "libc10.so", "libtorch_python.so"]
    };
    let flags = RTLD_LAZY | libc::RTLD_NOLOAD;
    // SAFETY: libraries that are loaded already, so that nothing of theirs is run.
    let [cpu, c10, python] =
        names.map(|name| unsafe { Library::open(Some(name), flags) }.map_err(|_| missing(name)));
    let (cpu, c10, python) = (cpu?, c10?, python?);
    let call = Functions::load(&cpu).map_err(missing)?;
    // SAFETY: functions of these names have these types.
    let (fail, wrap, from_blob, versions, dtypes) = unsafe {
        let fail = c10
            .get("_ZN3c106detail14torchCheckFailEPKcS2_jS2_")
            .map_err(|_| missing("c10::detail::torchCheckFail"))?;
        let mut dtypes = [0; DTYPES.len()];
        for (number, (name, _)) in dtypes.iter_mut().zip(DTYPES) {
            let name = name.to_str().map_err(|_| missing("a dtype"))?;
            *number = cpu.get::<unsafe extern "C" fn() -> i32>(name).map_err(|_| missing(name))?();
        }
        let wrap = python.get::<Wrap>("_Z16THPVariable_WrapRKN2at10TensorBaseE");
        let wrap = wrap.map_err(|_| missing("THPVariable_Wrap"))?;
        let from_blob = cpu.get::<FromBlob>("torch_from_blob").ok();
        let versions = Versions {
            is_inference: *cpu
                .get("_ZN2at6native12is_inferenceERKNS_6TensorE")
                .map_err(|_| missing("at::native::is_inference"))?,
            bump: *cpu
                .get("_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE")
                .map_err(|_| missing("torch::autograd::impl::bump_version"))?,
        };
        (*fail, *wrap, from_blob.map(|function| *function), versions, dtypes)
    };
    let c = torch.getattr("_C")?;
    let tensor = torch.getattr("Tensor")?.cast_into::<PyType>()?;
    let libtorch = Libtorch {
        // SAFETY: a number.
        cuda: unsafe { (call.aoti_torch_device_type_cuda)() },
        call,
        wrap,
        from_blob,
        fail,
        versions,
        dtypes,
        exchange: Exchange::of(&tensor).ok_or_else(|| missing("__dlpack_c_exchange_api__"))?,
        process: std::process::id(),
        tensor: tensor.unbind(),
        parameter: torch.getattr("nn")?.getattr("Parameter")?.cast_into::<PyType>()?.unbind(),
        watchers: [
            c.getattr("_len_torch_dispatch_stack")?.unbind(),
            c.getattr("_get_tracing_state")?.unbind(),
        ],
        increment_version: c.getattr("_increment_version")?.unbind(),
    };
    let libtorch = LIBTORCH.get_or_init(|| libtorch);
    // SAFETY: schemas and kernels of these operators; the libraries' handles are for ever, as registrations are.
    unsafe { operators::define(libtorch) }.map_err(PyErr::from)
}

/// The PyTorch that [`register`] found.
pub(crate) fn get() -> Option<&'static Libtorch> {
    LIBTORCH.get()
}

/// A tensor as an object of Python's, and what it is.
pub(crate) type Fresh<'py> = (Bound<'py, PyAny>, Tensor);

/// Elements between tensors of one storage are a multiple of this, so that each begins as it would in an allocation of its own.
const STEP: usize = 512;
/// Elements of tensors that are small: as much memory as one of them may hold on to for one that is done with sooner.
pub(crate) const MOST_TOGETHER: usize = 1 << 20;

impl Libtorch {
    /// Whether an object is a tensor that its memory is all of: no subclass, which may have a mind of its own.
    #[inline]
    pub(crate) fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        // SAFETY: reads the type of an object that lives.
        let ty = unsafe { ffi::Py_TYPE(object.as_ptr()) };
        ty == self.tensor.as_ptr().cast() || ty == self.parameter.as_ptr().cast()
    }

    /// Whether an object is any kind of tensor.
    pub(crate) fn is_tensor(&self, object: &Bound<'_, PyAny>) -> bool {
        self.is_plain(object) || object.is_instance(self.tensor.bind(object.py())).unwrap_or(false)
    }

    /// Whether autograd is at work on this thread.
    #[inline]
    pub(crate) fn is_grad_enabled(&self) -> bool {
        // SAFETY: reads a flag of this thread.
        unsafe { (self.call.aoti_torch_grad_mode_is_enabled)() }
    }

    /// Whether a tensor wants a gradient.
    #[inline]
    pub(crate) fn requires_grad(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        tensor.getattr(intern!(tensor.py(), "requires_grad"))?.is_truthy()
    }

    /// Whether a call on plain tensors must be seen by PyTorch: for gradients, or by a mode or a tracer that is active.
    #[inline]
    pub(crate) fn is_watched(&self, read: &[Bound<'_, PyAny>]) -> PyResult<bool> {
        let Some(first) = read.first() else { return Ok(false) };
        let py = first.py();
        if self.is_grad_enabled() {
            for tensor in read {
                if self.requires_grad(tensor)? {
                    return Ok(true);
                }
            }
        }
        for watcher in &self.watchers {
            if watcher.bind(py).call0()?.is_truthy()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Reads a plain tensor; `false` where an object is none, or does not hold the elements as they are: a transform's wrapper, a lazy
    /// conjugate.
    #[inline]
    pub(crate) fn borrow(
        &self,
        object: &Bound<'_, PyAny>,
        argument: &str,
        tensor: &mut Tensor,
    ) -> PyResult<bool> {
        if !self.is_plain(object) {
            return Ok(false);
        }
        match self.exchange.borrow(object, argument, tensor) {
            Ok(()) => {}
            // Ours, about the dims.
            Err(error) if error.is_instance_of::<PyValueError>(object.py()) => return Err(error),
            Err(_) => return Ok(false),
        }
        let is_here = tensor.device.is_cpu() || tensor.device.kind == Device::CUDA;
        // The imaginary part of a conjugate is lazily negated.
        let is_lazy = match tensor.dtype.code {
            DType::COMPLEX => true,
            DType::FLOAT => object.call_method0(intern!(object.py(), "is_neg"))?.is_truthy()?,
            _ => false,
        };
        Ok(is_here && !is_lazy && !tensor.is_hollow())
    }

    /// A fresh, dense tensor with the dtype and device of another, as an object and what it is.
    #[inline]
    pub(crate) fn empty_like<'py>(
        &self,
        object: &Bound<'py, PyAny>,
        like: &Tensor,
        shape: &[usize],
        argument: &str,
    ) -> PyResult<Fresh<'py>> {
        let py = object.py();
        let Some(dtype) = self.number_of(like.dtype) else {
            // A dtype without a number here: slower, and as good.
            let made = object.call_method1(intern!(py, "new_empty"), (shape.to_vec(),))?;
            let mut tensor = Tensor::NONE;
            self.exchange.borrow(&made, argument, &mut tensor)?;
            return Ok((made, tensor));
        };
        let handle = self.empty(shape, dtype, like.device)?;
        Ok((handle.object(py)?, handle.dense(like, shape)?))
    }

    /// Fresh, dense tensors in one storage, as objects at the end of `made` and as what they are in `tensors`: an allocation costs more than
    /// all that is done here besides. `false` where they are of a dtype without a number here, or of more than `most` elements.
    #[inline]
    pub(crate) fn empty_together<'py>(
        &self,
        py: Python<'py>,
        like: &Tensor,
        shapes: impl Iterator<Item = ([usize; 3], usize)> + Clone,
        most: usize,
        made: &mut Vec<Bound<'py, PyAny>>,
        tensors: &mut [Tensor],
    ) -> PyResult<bool> {
        let place = |shape: &[usize]| {
            let elements = shape.iter().fold(1usize, |elements, dim| elements.saturating_mul(*dim));
            elements.saturating_add(STEP - 1) / STEP * STEP
        };
        let all = shapes.clone().fold(0usize, |all, (shape, dims)| all.saturating_add(place(&shape[..dims])));
        let Some(dtype) = self.number_of(like.dtype).filter(|_| all <= most) else { return Ok(false) };
        let storage = self.empty(&[all], dtype, like.device)?;
        let mut offset = 0;
        for ((shape, dims), tensor) in shapes.zip(tensors) {
            let dense = Tensor::dense(0, like.dtype, like.device, &shape[..dims]);
            let (sizes, strides) = (dense.shape().as_ptr(), dense.strides().as_ptr());
            // SAFETY: so many sizes and strides, of elements that are there.
            let part = unsafe {
                ask!(
                    self,
                    aoti_torch__reinterpret_tensor(storage.0, dims as i64, sizes, strides, offset as i64)
                )?
            };
            let part = Handle(part, self);
            made.push(part.object(py)?);
            *tensor = part.dense(like, &shape[..dims])?;
            offset += place(&shape[..dims]);
        }
        Ok(true)
    }

    /// Tells autograd that tensors are to be written to.
    pub(crate) fn advance_versions(&self, out: &Bound<'_, PyAny>) -> PyResult<()> {
        self.increment_version.bind(out.py()).call1((out,)).map(drop)
    }

    fn dtype_of(&self, number: i32) -> DType {
        match self.dtypes.iter().position(|known| *known == number) {
            Some(i) => DTYPES[i].1,
            None => {
                // SAFETY: a number of libtorch's.
                let size = unsafe { (self.call.aoti_torch_dtype_element_size)(number) };
                // No code of DLPack's, and different for every type.
                DType { code: 0x80 | (number as u8 & 0x7f), bits: (8 * size) as u8, lanes: 1 }
            }
        }
    }

    fn number_of(&self, dtype: DType) -> Option<i32> {
        DTYPES.iter().position(|(_, known)| *known == dtype).map(|i| self.dtypes[i])
    }

    fn empty(&self, shape: &[usize], dtype: i32, device: Device) -> Result<Handle<'_>, Failed> {
        let dense = Tensor::dense(0, self.dtype_of(dtype), device, shape);
        let (sizes, strides) = (dense.shape(), dense.strides());
        let (kind, index) = if device.is_cpu() { (0, -1) } else { (self.cuda, device.ordinal) };
        let bytes = shape.iter().fold(dense.dtype.size(), |bytes, dim| bytes.saturating_mul(*dim));
        if let Some(from_blob) = self.from_blob
            && device.is_cpu()
            && bytes >= blocks::LEAST
            && let Ok(mut block) = blocks::take(bytes)
        {
            let start = block.bytes_mut().as_mut_ptr().cast();
            let block = Box::into_raw(Box::new(block)).cast();
            let (mut handle, strided) = (std::ptr::null_mut(), 0);
            // SAFETY: a block of enough bytes, which the tensor has until it gives it to `free`.
            let status = unsafe {
                from_blob(
                    start,
                    sizes.len() as i64,
                    sizes.as_ptr(),
                    strides.as_ptr(),
                    0,
                    dtype,
                    kind,
                    index,
                    &raw mut handle,
                    strided,
                    std::ptr::null(),
                    0,
                    free,
                    block,
                )
            };
            return if status == 0 { Ok(Handle(handle, self)) } else { Err(Failed("torch_from_blob")) };
        }
        // SAFETY: so many sizes and strides.
        let handle = unsafe {
            ask!(
                self,
                aoti_torch_empty_strided(
                    sizes.len() as i64,
                    sizes.as_ptr(),
                    strides.as_ptr(),
                    dtype,
                    kind,
                    index
                )
            )
        }?;
        Ok(Handle(handle, self))
    }
}

/// The end of a tensor that had a block.
unsafe extern "C" fn free(_: *mut c_void, block: *mut c_void) {
    // SAFETY: the box that the tensor was made with, and once.
    blocks::give_back(*unsafe { Box::from_raw(block.cast::<Block>()) });
}

/// PyTorch's threads and streams.
pub(crate) const PLACE: Place = Place { threads: Some((num_threads, parallel_for)), stream };

/// The threads that PyTorch would use. After a fork one: its threads stayed with the parent, and would be waited for.
fn num_threads() -> usize {
    let Some(torch) = get().filter(|torch| torch.process == std::process::id()) else { return 1 };
    // SAFETY: a place for the answer.
    unsafe { ask!(torch, torch_get_num_threads()) }.map_or(1, |threads: u32| threads as usize)
}

/// The stream that PyTorch works on at present.
fn stream(device: Device) -> PyResult<*mut c_void> {
    let stream = get().and_then(|torch| torch.exchange.stream(device));
    stream.ok_or_else(|| Failed("current_work_stream").into())
}

/// PyTorch's own threads, as [`gdn::cpu::Executor`]. They have the last op's rows in their caches, and wait for work without sleep.
fn parallel_for(chunks: usize, work: &(dyn Fn(usize) + Sync)) {
    unsafe extern "C" fn range(begin: i64, end: i64, work: *mut c_void) {
        // SAFETY: the reference below, which lives until all is done.
        let work = unsafe { *work.cast::<&(dyn Fn(usize) + Sync)>() };
        (begin..end).for_each(|i| work(i as usize));
    }
    if let Some(torch) = get() {
        // SAFETY: a function that takes what it is given. Where it fails, the caller finds what was not done.
        unsafe {
            (torch.call.torch_parallel_for)(0, chunks as i64, 1, range, (&raw const work).cast_mut().cast())
        };
    }
}

/// A tensor of libtorch's that is ours to delete.
struct Handle<'a>(Opaque, &'a Libtorch);

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        // SAFETY: owned, and deleted once.
        unsafe { (self.1.call.aoti_torch_delete_tensor_object)(self.0) };
    }
}

impl Handle<'_> {
    /// As an object of Python's.
    fn object<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        // SAFETY: a tensor that lives, and the GIL; a new reference, or null with an exception set.
        unsafe { Bound::from_owned_ptr_or_err(py, (self.1.wrap)(self.0)) }
    }

    /// Tells autograd that the tensor is to be written to.
    fn advance_version(&self) {
        let Versions { is_inference, bump } = &self.1.versions;
        // SAFETY: a tensor that lives, and that has a version.
        unsafe {
            if !is_inference(self.0) {
                bump(self.0);
            }
        }
    }

    /// What it is, known to be dense and like another.
    fn dense(&self, like: &Tensor, shape: &[usize]) -> PyResult<Tensor> {
        // SAFETY: a tensor that lives.
        let address = unsafe { ask!(self.1, aoti_torch_get_data_ptr(self.0))? };
        Ok(Tensor::dense(address as usize, like.dtype, like.device, shape))
    }

    /// Reads what the handle stands for, whose memory is to be written to or not. Its dtype, as libtorch's number.
    fn read(&self, argument: &str, write: bool, tensor: &mut Tensor) -> PyResult<i32> {
        let torch = self.1;
        // SAFETY: a tensor that lives; sizes and strides are `dims` numbers, which it keeps.
        unsafe {
            let dims = usize::try_from(ask!(torch, aoti_torch_get_dim(self.0))?).unwrap_or(0);
            if dims == 0 || dims > crate::tensor::MAX_DIMS {
                return Err(value_error(format!("{argument} has {dims} dims, expected 2")));
            }
            let sizes: *mut i64 = ask!(torch, aoti_torch_get_sizes(self.0))?;
            let strides: *mut i64 = ask!(torch, aoti_torch_get_strides(self.0))?;
            let address = if write {
                ask!(torch, aoti_torch_get_data_ptr(self.0))? as usize
            } else {
                ask!(torch, torch_get_const_data_ptr(self.0))? as usize
            };
            let number = ask!(torch, aoti_torch_get_dtype(self.0))?;
            let kind = ask!(torch, aoti_torch_get_device_type(self.0))?;
            let device = if kind == torch.cuda {
                Device { kind: Device::CUDA, ordinal: ask!(torch, aoti_torch_get_device_index(self.0))? }
            } else {
                Device::CPU
            };
            let numbers = |at: *mut i64| std::slice::from_raw_parts(at, dims);
            let (dtype, sizes, strides) = (torch.dtype_of(number), numbers(sizes), numbers(strides));
            if !tensor.fill(address, dtype, device, false, sizes, Some(strides)) {
                return Err(type_error(format!("{argument} cannot be read")));
            }
            Ok(number)
        }
    }
}

/// The name of an object's type, for errors.
pub(crate) fn type_name(object: &Bound<'_, PyAny>) -> String {
    let object: Borrowed<'_, '_, PyAny> = object.as_borrowed();
    object.get_type().fully_qualified_name().map_or_else(|_| "object".to_owned(), |name| name.to_string())
}
