//! DLPack, both ways, and NumPy's array interface: other people's tensors read, and our own memory handed
//! out.
//!
//! Structures and names are those of `dlpack.h` 1.3, <https://dmlc.github.io/dlpack/latest/c_api.html>, and
//! of NumPy's `__array_struct__`, <https://numpy.org/doc/stable/reference/arrays.interface.html>.

use std::{
    alloc::Layout,
    ffi::{CStr, c_char, c_int, c_void},
    ptr::NonNull,
    sync::Arc,
};

use pyo3::{
    exceptions::{PyBufferError, PyMemoryError, PyTypeError},
    ffi, intern,
    prelude::*,
    sync::PyOnceLock,
    types::{PyCapsule, PyCapsuleMethods, PyDict, PyType},
};

use crate::{
    exit::Outside,
    tensor::{DType, Device, Tensor, too_many_dims, type_error, value_error},
    torch::type_name,
};

/// `DLTensor`
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLPackVersion`
#[repr(C)]
#[derive(Clone, Copy)]
struct Version {
    major: u32,
    minor: u32,
}

/// `DLManagedTensor`, from before version 1
#[repr(C)]
struct Managed {
    tensor: DlTensor,
    manager_ctx: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

/// `DLManagedTensorVersioned`
#[repr(C)]
struct ManagedVersioned {
    version: Version,
    manager_ctx: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedVersioned)>,
    flags: u64,
    tensor: DlTensor,
}

const READ_ONLY: u64 = 1;
const MAJOR: u32 = 1;
const UNVERSIONED: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";

/// `DLPackExchangeAPI`: a framework's own functions, without a Python object between.
#[repr(C)]
pub(crate) struct Exchange {
    version: Version,
    previous: *const Exchange,
    allocate: *const c_void,
    export: *const c_void,
    import: *const c_void,
    borrow: Option<unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int>,
    current_work_stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int>,
}

// SAFETY: a table of functions that nothing writes to.
unsafe impl Sync for Exchange {}

impl Exchange {
    /// The table of a type of tensors, if it has one of the major version known here.
    pub(crate) fn of(ty: &Bound<'_, PyType>) -> Option<&'static Self> {
        let capsule = ty.getattr(intern!(ty.py(), "__dlpack_c_exchange_api__")).ok()?;
        let capsule = capsule.cast::<PyCapsule>().ok()?;
        let pointer = capsule.pointer_checked(Some(c"dlpack_exchange_api")).ok()?;
        // SAFETY: a capsule of that name holds such a table, which lives as long as the process.
        let table: &'static Self = unsafe { pointer.cast().as_ref() };
        (table.version.major == MAJOR).then_some(table)
    }

    /// The tensor behind an object of the type that the table was found at.
    #[inline]
    pub(crate) fn borrow(
        &self,
        object: &Bound<'_, PyAny>,
        argument: &str,
        into: &mut Tensor,
    ) -> PyResult<()> {
        let Some(borrow) = self.borrow else {
            return Err(type_error(format!("{argument}: its type lends no tensors through DLPack")));
        };
        let mut tensor = std::mem::MaybeUninit::<DlTensor>::uninit();
        // SAFETY: an object of the table's type, and a place for the answer, which is there if the function
        // says 0.
        let tensor = unsafe {
            if borrow(object.as_ptr().cast(), tensor.as_mut_ptr()) != 0 {
                return Err(PyErr::fetch(object.py()));
            }
            tensor.assume_init_ref()
        };
        // SAFETY: just filled in by its owner, which keeps the shape while the object lives.
        unsafe { read(tensor, false, argument, into) }
    }

    /// The stream that the framework works on at present.
    pub(crate) fn stream(&self, device: Device) -> Option<*mut c_void> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: a place for the answer, which is there if the function says 0.
        let status = unsafe { self.current_work_stream?(device.kind, device.ordinal, &raw mut stream) };
        (status == 0).then_some(stream)
    }
}

/// # Safety
/// `tensor` has `ndim` numbers at `shape` and at `strides`, where those are not null.
#[inline]
unsafe fn read(tensor: &DlTensor, read_only: bool, argument: &str, into: &mut Tensor) -> PyResult<()> {
    let dims = usize::try_from(tensor.ndim).unwrap_or(0);
    if dims > crate::tensor::MAX_DIMS {
        return Err(too_many_dims(argument, dims));
    }
    if dims > 0 && tensor.shape.is_null() {
        return Err(value_error(format!("{argument} has {dims} dims and no shape")));
    }
    let numbers = |at: *mut i64| match dims {
        0 => &[][..],
        // SAFETY: the caller's promise.
        _ => unsafe { std::slice::from_raw_parts(at, dims) },
    };
    let strides = (!tensor.strides.is_null()).then(|| numbers(tensor.strides));
    // An offset from nothing is nowhere.
    let offset = if tensor.data.is_null() { 0 } else { tensor.byte_offset as usize };
    let address = (tensor.data as usize).wrapping_add(offset);
    if into.fill(address, tensor.dtype, tensor.device, read_only, numbers(tensor.shape), strides) {
        return Ok(());
    }
    Err(too_many_dims(argument, dims))
}

/// Reads the tensor behind any object that speaks NumPy's array interface or DLPack. What keeps its memory
/// where it is besides the object.
pub(crate) fn borrow<'py>(
    object: &Bound<'py, PyAny>,
    argument: &str,
    into: &mut Tensor,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = object.py();
    // What is asked of others' objects may be Python code.
    let _outside = (!is_numpy(object)).then(|| Outside::new(py));
    let array = object.getattr(intern!(py, "__array_struct__"));
    if is_masked(object)? {
        return Err(type_error(format!(
            "{argument} is a {}, whose mask would be lost: give its data",
            type_name(object)
        )));
    }
    if let Some(capsule) = array.ok().and_then(|array| array.cast_into::<PyCapsule>().ok()) {
        // SAFETY: what the attribute of that name is.
        unsafe { read_array(object, &capsule, argument, into)? };
        return Ok(Some(capsule.into_any()));
    }
    if let Some(exchange) = Exchange::of(&object.get_type()) {
        exchange.borrow(object, argument, into)?;
        return Ok(None);
    }
    let Ok(device) = object.call_method0(intern!(py, "__dlpack_device__")) else {
        let name = object.get_type();
        return Err(type_error(format!(
            "{argument} is a {}, expected a PyTorch tensor, a NumPy array or anything with __dlpack__",
            name.name()?
        )));
    };
    let (kind, _): (i32, i32) = device.extract()?;
    let kwargs = PyDict::new(py);
    if kind == Device::CUDA {
        // The legacy default stream, on which the op will be.
        kwargs.set_item(intern!(py, "stream"), 1)?;
    }
    let dlpack = object.getattr(intern!(py, "__dlpack__"))?;
    let versioned = kwargs.copy()?;
    versioned.set_item(intern!(py, "max_version"), (MAJOR, 3))?;
    let capsule = match dlpack.call((), Some(&versioned)) {
        // An object from before version 1 knows no such argument.
        Err(error) if error.is_instance_of::<PyTypeError>(py) => dlpack.call((), Some(&kwargs))?,
        capsule => capsule?,
    };
    // SAFETY: what `__dlpack__` is there to give; the names say which.
    unsafe {
        let capsule = capsule.cast::<PyCapsule>()?;
        if let Ok(pointer) = capsule.pointer_checked(Some(VERSIONED)) {
            let managed: &ManagedVersioned = pointer.cast().as_ref();
            if managed.version.major != MAJOR {
                let Version { major, minor } = managed.version;
                return Err(type_error(format!(
                    "{argument} speaks DLPack {major}.{minor}, known is {MAJOR}"
                )));
            }
            read(&managed.tensor, managed.flags & READ_ONLY != 0, argument, into)?;
        } else {
            let pointer = capsule.pointer_checked(Some(UNVERSIONED))?;
            let managed: &Managed = pointer.cast().as_ref();
            read(&managed.tensor, false, argument, into)?;
        }
    }
    // JAX does not say through DLPack that nobody may write to its arrays.
    let is_jax = module(py, "jax").is_some_and(|jax| {
        jax.getattr(intern!(py, "Array")).is_ok_and(|array| object.is_instance(&array).unwrap_or(false))
    });
    into.read_only |= is_jax;
    Ok(Some(capsule))
}

/// Whether an object is an array of NumPy's.
pub(crate) fn is_numpy(object: &Bound<'_, PyAny>) -> bool {
    static ARRAY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let py = object.py();
    let found = ARRAY.get(py).or_else(|| {
        let array = module(py, "numpy")?.getattr(intern!(py, "ndarray")).ok()?;
        let array = array.cast_into::<PyType>().ok()?;
        Some(ARRAY.get_or_init(py, || array.unbind()))
    });
    found.is_some_and(|array| object.is_instance(array.bind(py)).unwrap_or(false))
}

/// Whether an object is an array of NumPy's with a mask.
fn is_masked(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = object.py();
    match module(py, "numpy.ma") {
        Some(masked) if is_numpy(object) => object.is_instance(&masked.getattr(intern!(py, "MaskedArray"))?),
        _ => Ok(false),
    }
}

/// A module, if the program has imported it.
pub(crate) fn module<'py>(py: Python<'py>, name: &str) -> Option<Bound<'py, PyAny>> {
    let modules = py.import(intern!(py, "sys")).ok()?.getattr(intern!(py, "modules")).ok()?;
    modules.get_item(name).ok().filter(|module| !module.is_none())
}

/// `PyArrayInterface`
#[repr(C)]
struct ArrayStruct {
    two: c_int,
    nd: c_int,
    typekind: c_char,
    itemsize: c_int,
    flags: c_int,
    shape: *mut isize,
    strides: *mut isize,
    data: *mut c_void,
    descr: *mut ffi::PyObject,
}

const NOT_SWAPPED: c_int = 0x200;
const WRITEABLE: c_int = 0x400;

/// # Safety
/// `capsule` is the `__array_struct__` of `object`.
unsafe fn read_array(
    object: &Bound<'_, PyAny>,
    capsule: &Bound<'_, PyCapsule>,
    argument: &str,
    into: &mut Tensor,
) -> PyResult<()> {
    // SAFETY: the caller's promise.
    let array: &ArrayStruct = unsafe { capsule.pointer_checked(None)?.cast().as_ref() };
    if array.two != 2 {
        return Err(type_error(format!("{argument}: its __array_struct__ begins with {}, not 2", array.two)));
    }
    let kind = array.typekind as u8;
    let code = match kind {
        b'i' => 0,
        b'u' => 1,
        b'f' => 2,
        b'c' => 5,
        b'b' => 6,
        _ => 3,
    };
    let dtype = object.getattr(intern!(object.py(), "dtype"));
    let has_objects = match (&dtype, kind) {
        (_, b'O') => true,
        (Ok(dtype), b'V') => dtype.getattr(intern!(object.py(), "hasobject"))?.is_truthy()?,
        _ => false,
    };
    let bits = u8::try_from(8 * i64::from(array.itemsize)).ok().filter(|bits| !has_objects && *bits > 0);
    let Some(bits) = bits else {
        let name = dtype.map(|dtype| dtype.to_string()).unwrap_or_default();
        return Err(type_error(format!(
            "{argument} has dtype {name}, expected plain numbers of at most 31 bytes"
        )));
    };
    let swapped = u8::from(array.flags & NOT_SWAPPED == 0 && array.itemsize > 1) << 7;
    let dims = usize::try_from(array.nd).unwrap_or(0);
    if dims > crate::tensor::MAX_DIMS {
        return Err(too_many_dims(argument, dims));
    }
    if dims > 0 && (array.shape.is_null() || array.strides.is_null()) {
        return Err(value_error(format!("{argument} has {dims} dims and no shape or strides")));
    }
    let (mut shape, mut strides) = ([1i64; crate::tensor::MAX_DIMS], [1i64; crate::tensor::MAX_DIMS]);
    for dim in 0..dims {
        // SAFETY: `nd` numbers each.
        let (length, bytes) = unsafe { (*array.shape.add(dim), *array.strides.add(dim)) };
        let itemsize = array.itemsize as isize;
        if bytes % itemsize != 0 && length > 1 {
            return Err(value_error(format!(
                "{argument} has a stride of {bytes} bytes in dim {dim}, expected a multiple of its {itemsize}-byte elements"
            )));
        }
        (shape[dim], strides[dim]) = (length as i64, (bytes / itemsize) as i64);
    }
    let dtype = DType { code: code | swapped, bits, lanes: 1 };
    // Of an array with fields the interface has no flags.
    let read_only = match (array.flags & WRITEABLE, kind) {
        (0, b'V') => {
            let flags = object.getattr(intern!(object.py(), "flags"))?;
            !flags.getattr(intern!(object.py(), "writeable"))?.is_truthy()?
        }
        (flag, _) => flag == 0,
    };
    let (shape, strides) = (&shape[..dims], &strides[..dims]);
    if into.fill(array.data as usize, dtype, Device::CPU, read_only, shape, Some(strides)) {
        return Ok(());
    }
    Err(too_many_dims(argument, dims))
}

/// Memory of our own, for frameworks whose arrays cannot be written to: it is filled, then handed over
/// through DLPack.
#[pyclass(module = "gdn", frozen)]
pub(crate) struct Buffer {
    block: Arc<Block>,
    dtype: DType,
    shape: Vec<usize>,
}

struct Block {
    memory: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a block of bytes. They are written while nothing but the op has the buffer, and owned by the
// consumer from then on.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.memory.as_ptr(), self.layout) }
    }
}

impl Buffer {
    /// What JAX wants of memory that it is to use without a copy.
    const ALIGNMENT: usize = 64;

    pub(crate) fn new(shape: &[usize], dtype: DType) -> PyResult<Self> {
        let out_of_memory = || PyMemoryError::new_err(format!("no memory for {shape:?} elements of {dtype}"));
        let bytes = shape.iter().try_fold(dtype.size(), |bytes, dim| bytes.checked_mul(*dim));
        let layout = Layout::from_size_align(bytes.ok_or_else(out_of_memory)?.max(1), Self::ALIGNMENT)
            .map_err(|_| out_of_memory())?;
        // SAFETY: of at least one byte.
        let memory = NonNull::new(unsafe { std::alloc::alloc(layout) }).ok_or_else(out_of_memory)?;
        Ok(Self { block: Arc::new(Block { memory, layout }), dtype, shape: shape.to_vec() })
    }

    pub(crate) fn tensor(&self) -> Tensor {
        Tensor::dense(self.block.memory.as_ptr() as usize, self.dtype, Device::CPU, &self.shape)
    }
}

/// What an exported tensor keeps: its shape, and the memory.
struct Export {
    shape: Vec<i64>,
    strides: Vec<i64>,
    _block: Arc<Block>,
}

#[pymethods]
impl Buffer {
    fn __dlpack_device__(&self) -> (i32, i32) {
        (Device::CPU.kind, Device::CPU.ordinal)
    }

    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let elsewhere = dl_device.is_some_and(|device| device != self.__dlpack_device__());
        if stream.is_some() || elsewhere || copy == Some(true) {
            return Err(PyBufferError::new_err("this memory is the CPU's, and is handed out as it is"));
        }
        let tensor = self.tensor();
        let (shape, strides) = (tensor.shape().to_vec(), tensor.strides().to_vec());
        let export = Box::new(Export { shape, strides, _block: Arc::clone(&self.block) });
        let export = Box::into_raw(export);
        // SAFETY: just made, and given up to the tensor below.
        let (shape, strides) = unsafe { ((*export).shape.as_mut_ptr(), (*export).strides.as_mut_ptr()) };
        let tensor = DlTensor {
            data: self.block.memory.as_ptr().cast(),
            device: Device::CPU,
            ndim: self.shape.len() as i32,
            dtype: self.dtype,
            shape,
            strides,
            byte_offset: 0,
        };
        let manager_ctx = export.cast();
        // SAFETY: the capsule owns the managed tensor until a consumer renames it, as DLPack says; both ends
        // know how to delete it.
        unsafe {
            let capsule = if max_version.is_some_and(|(major, _)| major >= MAJOR) {
                let managed = Box::into_raw(Box::new(ManagedVersioned {
                    version: Version { major: MAJOR, minor: 0 },
                    manager_ctx,
                    deleter: Some(delete_versioned),
                    flags: 0,
                    tensor,
                }));
                ffi::PyCapsule_New(managed.cast(), VERSIONED.as_ptr(), Some(drop_capsule))
            } else {
                let managed = Box::into_raw(Box::new(Managed { tensor, manager_ctx, deleter: Some(delete) }));
                ffi::PyCapsule_New(managed.cast(), UNVERSIONED.as_ptr(), Some(drop_capsule))
            };
            Bound::from_owned_ptr_or_err(py, capsule)
        }
    }
}

unsafe extern "C" fn delete(managed: *mut Managed) {
    // SAFETY: made of two boxes in `__dlpack__`, and deleted once.
    unsafe { drop(Box::from_raw(Box::from_raw(managed).manager_ctx.cast::<Export>())) }
}

unsafe extern "C" fn delete_versioned(managed: *mut ManagedVersioned) {
    // SAFETY: as in `delete`.
    unsafe { drop(Box::from_raw(Box::from_raw(managed).manager_ctx.cast::<Export>())) }
}

/// Deletes what no consumer took.
unsafe extern "C" fn drop_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: a capsule of `__dlpack__`; under its first name it still owns what it holds.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) != 0 {
            delete_versioned(ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()).cast());
        } else if ffi::PyCapsule_IsValid(capsule, UNVERSIONED.as_ptr()) != 0 {
            delete(ffi::PyCapsule_GetPointer(capsule, UNVERSIONED.as_ptr()).cast());
        }
    }
}
