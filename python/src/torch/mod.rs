//! PyTorch, without C++: its operators registered, its tensors read and made, through functions that are
//! looked up in the libraries which `import torch` has loaded; nothing is linked. `abi` has those of C, which
//! outlive PyTorch's versions; `cpp` those that C lacks.

mod abi;
mod cpp;
mod fields;
mod handle;
mod inside;
mod operators;
mod versions;

use std::{
    ffi::{CStr, c_void},
    sync::OnceLock,
};

use libloading::os::unix::{Library, RTLD_LAZY};
use pyo3::{
    Borrowed,
    exceptions::{PyImportError, PyRuntimeError, PyValueError},
    ffi, intern,
    prelude::*,
    types::{PyDict, PyType},
};

use gdn::{Block, DeviceAddress};

use self::{
    abi::{Check, CurrentStream, DTYPES, Failed, FromBlob, Functions, ask},
    cpp::Cpp,
    fields::Fields,
    handle::Handle,
    inside::Inside,
};
use crate::{
    dlpack::Exchange,
    memory,
    ops::{Place, Threads},
    tensor::{DType, Device, Shape, Tensor, no_memory, type_error, value_error},
};

/// The PyTorch of this process.
pub(crate) struct Libtorch {
    call: Functions,
    from_blob: Option<FromBlob>,
    stream: Option<CurrentStream>,
    check: Check,
    cpp: Cpp,
    inside: Option<Inside>,
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
    /// What Python knows of forward-mode AD: the level that is open.
    forward_ad: Py<PyDict>,
    /// -1, which is the same object each time.
    no_level: Py<PyAny>,
    increment_version: Py<PyAny>,
    version: String,
}

static LIBTORCH: OnceLock<Libtorch> = OnceLock::new();

/// Finds PyTorch, and registers the operators. Once a process; `torch` is the module. Optional functions in
/// `without` are taken as missing.
///
/// # Errors
/// `ImportError` where it lacks a function that is needed: one of C, which PyTorch 2.10 and later have.
pub(crate) fn register(torch: &Bound<'_, PyModule>, without: &[String]) -> PyResult<()> {
    if LIBTORCH.get().is_some() {
        return Ok(());
    }
    let version = torch.getattr("__version__")?.to_string();
    let missing = |what: &str| {
        PyImportError::new_err(format!("torch {version} lacks {what}; gdn needs torch 2.10 or later"))
    };
    let names = if cfg!(target_os = "macos") {
        ["libtorch_cpu.dylib", "libc10.dylib", "libtorch_python.dylib", "libtorch_cuda.dylib"]
    } else {
        ["libtorch_cpu.so", "libc10.so", "libtorch_python.so", "libtorch_cuda.so"]
    };
    let flags = RTLD_LAZY | libc::RTLD_NOLOAD;
    // SAFETY: libraries that are loaded already, so that nothing of theirs is run.
    let [cpu, c10, python, cuda] = names.map(|name| unsafe { Library::open(Some(name), flags) });
    let cpu = cpu.map_err(|_| missing(names[0]))?;
    let call = Functions::load(&cpu).map_err(missing)?;
    // SAFETY: functions of these names have these types.
    let (check, from_blob, dtypes) = unsafe {
        let mut dtypes = [0; DTYPES.len()];
        for (number, (name, _)) in dtypes.iter_mut().zip(DTYPES) {
            let name = name.to_str().map_err(|_| missing("a dtype"))?;
            *number = cpu.get::<unsafe extern "C" fn() -> i32>(name).map_err(|_| missing(name))?();
        }
        let check = cpu.get::<Check>("aoti_torch_check").map_err(|_| missing("aoti_torch_check"))?;
        let from_blob = cpu.get::<FromBlob>("torch_from_blob").ok();
        (*check, from_blob.map(|function| *function), dtypes)
    };
    // SAFETY: the function of that name has that type.
    let stream = cuda
        .ok()
        .and_then(|cuda| unsafe { cuda.get("aoti_torch_get_current_cuda_stream").ok().map(|found| *found) });
    let cpp = Cpp::find(&cpu, c10.as_ref().ok(), python.as_ref().ok(), without);
    let c = torch.getattr("_C")?;
    let tensor = torch.getattr("Tensor")?.cast_into::<PyType>()?;
    let mut libtorch = Libtorch {
        inside: None,
        // SAFETY: a number.
        cuda: unsafe { (call.aoti_torch_device_type_cuda)() },
        call,
        from_blob,
        stream,
        check,
        cpp,
        dtypes,
        exchange: Exchange::of(&tensor).ok_or_else(|| missing("__dlpack_c_exchange_api__"))?,
        process: std::process::id(),
        tensor: tensor.unbind(),
        parameter: torch.getattr("nn")?.getattr("Parameter")?.cast_into::<PyType>()?.unbind(),
        watchers: [
            c.getattr("_len_torch_dispatch_stack")?.unbind(),
            c.getattr("_get_tracing_state")?.unbind(),
        ],
        forward_ad: torch.py().import("torch.autograd.forward_ad")?.dict().unbind(),
        no_level: (-1i64).into_pyobject(torch.py())?.into_any().unbind(),
        increment_version: c.getattr("_increment_version")?.unbind(),
        version,
    };
    let types = [libtorch.tensor.bind(torch.py()), libtorch.parameter.bind(torch.py())];
    let with_fields = !without.iter().any(|name| name == FIELDS);
    libtorch.inside = Inside::find(&libtorch, types, with_fields);
    let libtorch = LIBTORCH.get_or_init(|| libtorch);
    // SAFETY: schemas and kernels of these operators; the libraries' handles are for ever, as registrations
    // are.
    unsafe { operators::define(libtorch) }.map_err(PyErr::from)
}

/// What stands for the places of `c10::TensorImpl`'s members among the functions that may be missing.
const FIELDS: &str = "c10::TensorImpl";

/// The PyTorch that [`register`] found.
pub(crate) fn get() -> Option<&'static Libtorch> {
    LIBTORCH.get()
}

/// How plain tensors are read: inside their objects, or as DLPack has it.
#[derive(Clone, Copy)]
pub(crate) struct Way<'a>(Option<&'a Inside>);

/// A tensor as an object of Python's, and what it is.
pub(crate) type Fresh<'py> = (Bound<'py, PyAny>, Tensor);

/// Elements between tensors of one storage are a multiple of this, so that each begins as it would in an
/// allocation of its own.
const STEP: usize = 512;
/// Elements of tensors that are small: as much memory as one of them may hold on to for one that is done with
/// sooner.
pub(crate) const MOST_TOGETHER: usize = 1 << 20;

impl Libtorch {
    #[inline]
    fn fields(&self) -> Option<&Fields> {
        self.inside.as_ref()?.fields.as_ref()
    }

    /// What of PyTorch's is read in place, without a call of its functions.
    pub(crate) fn in_place(&self) -> Vec<&'static str> {
        let all = [("objects", self.inside.is_some()), (FIELDS, self.fields().is_some())];
        all.into_iter().filter_map(|(name, is_read)| is_read.then_some(name)).collect()
    }

    /// Whether an object is a tensor that its memory is all of: no subclass, which may have a mind of its
    /// own.
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
        if let Some(inside) = self.inside.as_ref().filter(|_| self.is_plain(tensor)) {
            return Ok(inside.requires_grad(&inside.lend(self, tensor)));
        }
        tensor.getattr(intern!(tensor.py(), "requires_grad"))?.is_truthy()
    }

    /// Whether a tensor can neither want a gradient nor have a tangent. `false` may be wrong.
    #[inline]
    fn is_unknown_to_autograd(&self, tensor: &Bound<'_, PyAny>) -> bool {
        let found = self.inside.as_ref().zip(self.fields()).filter(|_| self.is_plain(tensor));
        found.is_some_and(|(inside, fields)| fields.is_unknown_to_autograd(&inside.lend(self, tensor)))
    }

    /// Whether a call on plain tensors must be seen by PyTorch: for gradients or tangents, or by a mode or a
    /// tracer that is active.
    #[inline]
    pub(crate) fn is_watched<'a, 'py: 'a>(
        &self,
        py: Python<'py>,
        read: impl IntoIterator<Item = Borrowed<'a, 'py, PyAny>>,
        mut written: impl Iterator<Item = Borrowed<'a, 'py, PyAny>>,
    ) -> PyResult<bool> {
        // A tangent may be of a tensor that is written to alone, too.
        let mut is_known_to_autograd = written.any(|tensor| !self.is_unknown_to_autograd(&tensor));
        for tensor in read {
            if self.is_unknown_to_autograd(&tensor) {
                continue;
            }
            is_known_to_autograd = true;
            if self.is_grad_enabled() && self.requires_grad(&tensor)? {
                return Ok(true);
            }
        }
        if is_known_to_autograd {
            // A PyTorch that has no such number is asked through the operator.
            let level = self.forward_ad.bind(py).get_item(intern!(py, "_current_level"))?;
            let is_open =
                |level: Bound<'py, PyAny>| !level.is(&self.no_level) && level.extract().unwrap_or(0) >= 0;
            if level.is_none_or(is_open) {
                return Ok(true);
            }
        }
        if let Some(seers) = &self.cpp.seers {
            // SAFETY: both read what is this thread's own; the pointer lives as long as the thread.
            return Ok(unsafe { (seers.modes)() != 0 || !(*(seers.tracing)()).is_null() });
        }
        for watcher in &self.watchers {
            if watcher.bind(py).call0()?.is_truthy()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// How plain tensors are read on this thread at present: for the tensors of one call.
    #[inline]
    pub(crate) fn way(&self) -> Way<'_> {
        Way(self.inside.as_ref().filter(|inside| !inside.is_transformed()))
    }

    /// Reads a plain tensor; `false` where an object is none, or does not hold the elements as they are: a
    /// transform's wrapper, or a lazy conjugate, of which shape and dtype are read all the same. `write`
    /// says whether its elements are to be written to.
    #[inline]
    pub(crate) fn borrow(
        &self,
        way: Way<'_>,
        object: &Bound<'_, PyAny>,
        argument: &str,
        write: bool,
        tensor: &mut Tensor,
    ) -> PyResult<bool> {
        if !self.is_plain(object) {
            return Ok(false);
        }
        if let Way(Some(inside)) = way
            && inside.read(&inside.lend(self, object), argument, write, tensor)
        {
            return Ok(true);
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
            DType::FLOAT | DType::BFLOAT => {
                object.call_method0(intern!(object.py(), "is_neg"))?.is_truthy()?
            }
            _ => false,
        };
        if is_here && tensor.address < OFFSETS && is_freed(object, tensor)? {
            return Err(no_memory(argument, tensor.shape()));
        }
        Ok(is_here && !is_lazy && !tensor.is_hollow())
    }

    /// Where the elements of a plain tensor on a GPU are. `None` where that is not known without reading it.
    #[inline]
    pub(crate) fn address(&self, object: &Bound<'_, PyAny>) -> Option<usize> {
        let (inside, fields) = (self.inside.as_ref()?, self.fields()?);
        self.is_plain(object).then(|| fields.address(&inside.lend(self, object)))?
    }

    /// Whether an object is a plain tensor like one that [`Libtorch::borrow`] has read, as it was then. `false`
    /// may be wrong.
    #[inline]
    pub(crate) fn is_same(&self, object: &Bound<'_, PyAny>, read: &Tensor) -> bool {
        let found = self.inside.as_ref().zip(self.fields()).filter(|_| self.is_plain(object));
        found.is_some_and(|(inside, fields)| fields.is(&inside.lend(self, object), read))
    }

    /// Why a tensor that [`Libtorch::borrow`] does not read cannot be written to. `read` is one that it does.
    #[cold]
    pub(crate) fn unwritable(
        &self,
        object: &Bound<'_, PyAny>,
        argument: &str,
        other: &str,
        read: &Bound<'_, PyAny>,
    ) -> PyErr {
        let get = |object: &Bound<'_, PyAny>, name| object.getattr(name).map(|found| found.to_string());
        let is = |name| object.call_method0(name).is_ok_and(|found| found.is_truthy().unwrap_or(false));
        let text = |found: PyResult<String>| found.unwrap_or_else(|_| "unknown".to_owned());
        let (layout, device, dtype) = (get(object, "layout"), get(object, "device"), get(object, "dtype"));
        if !self.is_plain(object) {
            let got = type_name(object);
            type_error(format!("{argument} is a {got}, expected a torch.Tensor itself to write to"))
        } else if layout.as_deref().ok() != Some("torch.strided") {
            type_error(format!("{argument} has layout {}, expected torch.strided", text(layout)))
        } else if text(get(read, "device")) != text(device) {
            let (got, expected) = (text(get(object, "device")), text(get(read, "device")));
            value_error(format!("{argument} is on {got}, {other} is on {expected}"))
        } else if is("is_neg") || is("is_conj") {
            value_error(format!(
                "{argument} is a view that is negated or conjugated when it is read, it cannot be written to"
            ))
        } else if text(get(read, "dtype")) != text(dtype) {
            let (got, expected) = (text(get(object, "dtype")), text(get(read, "dtype")));
            type_error(format!("{argument} has dtype {got}, {other} has {expected}"))
        } else {
            value_error(format!("{argument} is a tensor of a transform, it cannot be written to"))
        }
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
        let Some(dtype) = self.number_of(like.dtype).filter(|_| self.cpp.wrap.is_some()) else {
            // A dtype without a number here, or a PyTorch without a way to make objects of handles: slower,
            // and as good.
            return self.new_empty(object, shape, argument);
        };
        match self.empty(shape, dtype, like.device) {
            Ok(handle) => Ok((handle.object(py)?, handle.dense(like, shape)?)),
            // No memory, most likely, which Python's function has an exception of its own for.
            Err(_) => self.new_empty(object, shape, argument),
        }
    }

    /// The same through Python.
    #[cold]
    fn new_empty<'py>(
        &self,
        like: &Bound<'py, PyAny>,
        shape: &[usize],
        argument: &str,
    ) -> PyResult<Fresh<'py>> {
        let made = like.call_method1(intern!(like.py(), "new_empty"), (shape.to_vec(),))?;
        let mut tensor = Tensor::NONE;
        self.exchange.borrow(&made, argument, &mut tensor)?;
        Ok((made, tensor))
    }

    /// Fresh, dense tensors in one storage, as objects at the end of `made` and as what they are in
    /// `tensors`: an allocation costs more than all that is done here besides. `false` where
    /// [`Libtorch::empty_like`] has to do it: it would ask Python, there is no memory, or they have more than
    /// `most` elements.
    #[inline]
    pub(crate) fn empty_together<'py>(
        &self,
        py: Python<'py>,
        like: &Tensor,
        shapes: impl Iterator<Item = Shape> + Clone,
        most: usize,
        made: &mut Vec<Bound<'py, PyAny>>,
        tensors: &mut [Tensor],
    ) -> PyResult<bool> {
        let place = |shape: &[usize]| {
            let elements = shape.iter().fold(1usize, |elements, dim| elements.saturating_mul(*dim));
            elements.saturating_add(STEP - 1) / STEP * STEP
        };
        let all = shapes.clone().fold(0usize, |all, shape| all.saturating_add(place(&shape)));
        let is_apt = all <= most && self.cpp.wrap.is_some();
        let Some(dtype) = self.number_of(like.dtype).filter(|_| is_apt) else { return Ok(false) };
        let Ok(storage) = self.empty(&[all], dtype, like.device) else { return Ok(false) };
        let mut offset = 0;
        for (shape, tensor) in shapes.zip(tensors) {
            let dense = Tensor::dense(0, like.dtype, like.device, &shape);
            let (dims, sizes, strides) = (shape.len(), dense.shape().as_ptr(), dense.strides().as_ptr());
            // SAFETY: so many sizes and strides, of elements that are there.
            let part = unsafe {
                ask!(
                    self,
                    aoti_torch__reinterpret_tensor(storage.0, dims as i64, sizes, strides, offset as i64)
                )?
            };
            let part = Handle(part, self);
            made.push(part.object(py)?);
            *tensor = part.dense(like, &shape)?;
            offset += place(&shape);
        }
        Ok(true)
    }

    /// What went wrong in the call before, in PyTorch's words where it has any.
    #[cold]
    fn error(&self, failed: Failed) -> PyErr {
        // SAFETY: a text that ends with a zero, until the next error on this thread; or null.
        let what = self.cpp.what.map(|what| unsafe { what() }).filter(|text| !text.is_null());
        let Some(text) = what else { return failed.into() };
        // SAFETY: as above.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        PyRuntimeError::new_err(format!("PyTorch's {} failed: {text}", failed.0))
    }

    fn dtype_of(&self, number: i32) -> DType {
        match self.dtypes.iter().position(|known| *known == number) {
            Some(i) => DTYPES[i].1,
            None => {
                // SAFETY: a number of libtorch's.
                let size = unsafe { (self.call.aoti_torch_dtype_element_size)(number) };
                // No code of DLPack's, and different for every type.
                DType { code: DType::OPAQUE | (number as u8 & 0x7f), bits: (8 * size) as u8, lanes: 1 }
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
            && bytes >= memory::LEAST
            && let Ok(mut block) = memory::take(bytes)
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

/// Addresses below this one may be no more than an offset into a storage that has no memory. Above it lies
/// what systems map.
const OFFSETS: usize = 1 << 40;

/// Whether the storage of a plain tensor that has elements was given up, and what seems to be an address is
/// none.
#[cold]
fn is_freed(object: &Bound<'_, PyAny>, tensor: &Tensor) -> PyResult<bool> {
    let py = object.py();
    let is_empty = tensor.shape().contains(&0);
    let has_offset = || object.call_method0(intern!(py, "storage_offset"))?.is_truthy();
    if is_empty || (tensor.address != 0 && !has_offset()?) {
        return Ok(false);
    }
    // A transform's wrapper has none.
    let Ok(storage) = object.call_method0(intern!(py, "untyped_storage")) else { return Ok(false) };
    Ok(!storage.call_method0(intern!(py, "nbytes"))?.is_truthy()?)
}

/// Whether an object is any kind of PyTorch's tensors.
pub(crate) fn is_tensor(object: &Bound<'_, PyAny>) -> bool {
    get().is_some_and(|torch| torch.is_tensor(object))
}

/// The end of a tensor that had a block.
unsafe extern "C" fn free(_: *mut c_void, block: *mut c_void) {
    // SAFETY: the box that the tensor was made with, and once.
    memory::give_back(*unsafe { Box::from_raw(block.cast::<Block>()) });
}

/// PyTorch's threads and streams.
pub(crate) const PLACE: Place = Place {
    threads: Some(Threads { most: num_threads, executor: &parallel_for }),
    stream,
    scratch: Some(scratch),
};

/// The threads that PyTorch would use. After a fork one: its threads stayed with the parent, and would be
/// waited for.
fn num_threads() -> usize {
    let Some(torch) = get().filter(|torch| torch.process == std::process::id()) else { return 1 };
    // SAFETY: a place for the answer.
    unsafe { ask!(torch, torch_get_num_threads()) }.map_or(1, |threads: u32| threads as usize)
}

/// The stream that PyTorch works on at present.
fn stream(device: Device) -> PyResult<*mut c_void> {
    let torch = get().ok_or(Failed("current_work_stream"))?;
    if let Some(current) = torch.stream.filter(|_| device.kind == Device::CUDA) {
        let mut stream = std::ptr::null_mut();
        // SAFETY: a place for the answer.
        if unsafe { current(device.ordinal, &raw mut stream) } == 0 {
            return Ok(stream);
        }
    }
    // DLPack's, which asks every kind of accelerator that PyTorch knows of.
    torch.exchange.stream(device).ok_or_else(|| Failed("current_work_stream").into())
}

/// Memory of PyTorch's allocator, which is its again when the call returns: for work on the same stream.
fn scratch(
    device: Device,
    bytes: usize,
    work: &mut dyn FnMut(DeviceAddress) -> PyResult<()>,
) -> PyResult<()> {
    const BYTE: DType = DType { code: DType::UINT, bits: 8, lanes: 1 };
    let torch = get().ok_or(Failed("aoti_torch_empty_strided"))?;
    let number = torch.number_of(BYTE).ok_or(Failed("aoti_torch_dtype_uint8"))?;
    if let Ok(handle) = torch.empty(&[bytes], number, device) {
        // SAFETY: a tensor that lives.
        let address = unsafe { ask!(torch, aoti_torch_get_data_ptr(handle.0))? };
        return work(DeviceAddress(address as u64));
    }
    // No memory, most likely, which Python's function has an exception of its own for.
    Python::attach(|py| {
        let module = py.import(intern!(py, "torch"))?;
        let kwargs = PyDict::new(py);
        kwargs.set_item(intern!(py, "dtype"), module.getattr(intern!(py, "uint8"))?)?;
        kwargs.set_item(intern!(py, "device"), device.to_string())?;
        let made = module.call_method(intern!(py, "empty"), (bytes,), Some(&kwargs))?;
        let address: u64 = made.call_method0(intern!(py, "data_ptr"))?.extract()?;
        work(DeviceAddress(address))
    })
}

/// PyTorch's own threads, as [`gdn::cpu::Executor`]. They have the last op's rows in their caches, and wait
/// for work without sleep.
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

/// The name of an object's type, for errors.
pub(crate) fn type_name(object: &Bound<'_, PyAny>) -> String {
    let object: Borrowed<'_, '_, PyAny> = object.as_borrowed();
    object.get_type().fully_qualified_name().map_or_else(|_| "object".to_owned(), |name| name.to_string())
}
