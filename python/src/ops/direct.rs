//! Calls of `gdn.Layer.decode` without a frame of Python's, which takes longer than all that is compared of a call.
//!
//! A function of Python's is called through a pointer in it, which from Python 3.12 on may be set to what does
//! the same in less time (`PyFunction_SetVectorcall`). Here it takes the arguments apart and goes where the
//! function would go; whatever is unusual is left to a copy of the function as it was written. Whoever looks
//! at it, Dynamo above all, sees a function of Python's.

use std::{ffi::CStr, panic::AssertUnwindSafe, sync::OnceLock};

use libloading::os::unix::Library;
use pyo3::{
    Borrowed,
    exceptions::PySystemError,
    ffi, intern,
    panic::PanicException,
    prelude::*,
    types::{PyBool, PyDict, PyString, PyTuple},
};

use super::{
    decode::{self, Call},
    integer,
    layer::{
        CONV_STATE, COUNT, MORE_INDICES, MORE_STATES, MORE_WINDOWS, OUT, RECURRENT_STATE, SECOND_INDICES,
        STATE_INDICES, Settings, THIRD_INDICES,
    },
    objects::{Wish, put_read},
    size,
};

type Vectorcall = unsafe extern "C" fn(
    *mut ffi::PyObject,
    *const *mut ffi::PyObject,
    usize,
    *mut ffi::PyObject,
) -> *mut ffi::PyObject;

/// What an argument of the function is.
#[derive(Clone, Copy)]
enum Is {
    Layer,
    Projections,
    Tokens,
    PadSlotId,
    DisableStateUpdate,
    /// A tensor, by position.
    Tensor(usize),
}

/// The arguments, those from the fourth on with their defaults: 1, -1, `False`, or `None`.
const ARGUMENTS: [(&CStr, Is); 14] = [
    (c"self", Is::Layer),
    (c"projections", Is::Projections),
    (c"conv_state", Is::Tensor(CONV_STATE)),
    (c"recurrent_state", Is::Tensor(RECURRENT_STATE)),
    (c"tokens_per_sequence", Is::Tokens),
    (c"state_indices", Is::Tensor(STATE_INDICES)),
    (c"pad_slot_id", Is::PadSlotId),
    (c"num_accepted_tokens", Is::Tensor(SECOND_INDICES)),
    (c"output_state_indices", Is::Tensor(THIRD_INDICES)),
    (c"disable_state_update", Is::DisableStateUpdate),
    (c"intermediate_states", Is::Tensor(MORE_STATES)),
    (c"intermediate_conv_windows", Is::Tensor(MORE_WINDOWS)),
    (c"intermediate_state_indices", Is::Tensor(MORE_INDICES)),
    (c"out", Is::Tensor(OUT)),
];
const NEEDED: usize = 4;

struct Door {
    /// The function as it was written.
    plain: Py<PyAny>,
    /// The arguments' names, interned as those of a call are.
    names: [Py<PyString>; ARGUMENTS.len()],
}

static DOOR: OnceLock<Door> = OnceLock::new();

/// Has calls of `function`, `gdn.Layer.decode`, come here, where this Python can; `plain` is a copy of it. Whether
/// it can, and the same as a function of C, which every Python can call; `function` where somebody has put another one
/// in its place.
#[pyfunction]
pub(crate) fn shorten<'py>(
    function: &Bound<'py, PyAny>,
    plain: Py<PyAny>,
) -> PyResult<(bool, Bound<'py, PyAny>)> {
    let py = function.py();
    type Set = unsafe extern "C" fn(*mut ffi::PyObject, Vectorcall);
    // SAFETY: the function of that name has that type; the interpreter has it for as long as it is.
    let set = unsafe { Library::this().get::<Set>("PyFunction_SetVectorcall").ok().map(|set| *set) };
    // Who imports gdn may have put a function of their own around it, which stays what it is.
    if !function.get_type().is(py.import("types")?.getattr("FunctionType")?) {
        return Ok((false, function.clone()));
    }
    let written: Vec<String> = function.getattr("__code__")?.getattr("co_varnames")?.extract()?;
    let none = || py.None();
    let expected = (1, none(), -1, none(), none(), false, none(), none(), none(), none());
    let has_names = written.iter().zip(ARGUMENTS).all(|(one, (name, _))| name.to_bytes() == one.as_bytes());
    let has_defaults = written.len() >= ARGUMENTS.len() && function.getattr("__defaults__")?.eq(expected)?;
    if !(has_names && has_defaults) {
        return Ok((false, function.clone()));
    }
    let names = ARGUMENTS.map(|(name, _)| PyString::intern(py, name.to_str().unwrap_or_default()).unbind());
    DOOR.get_or_init(|| Door { plain, names });
    if let Some(set) = set {
        // SAFETY: a function of Python's, which does the same as it did.
        unsafe { set(function.as_ptr(), vectorcall) };
    }
    let method = ffi::PyMethodDef {
        ml_name: c"decode".as_ptr(),
        ml_meth: ffi::PyMethodDefPointer { PyCFunctionFastWithKeywords: fastcall },
        ml_flags: ffi::METH_FASTCALL | ffi::METH_KEYWORDS,
        ml_doc: std::ptr::null(),
    };
    // SAFETY: a method that is never freed; a new reference, or null with an exception set.
    let direct = unsafe {
        let method = Box::into_raw(Box::new(method));
        Bound::from_owned_ptr_or_err(
            py,
            ffi::PyCFunction_NewEx(method, std::ptr::null_mut(), std::ptr::null_mut()),
        )
    };
    Ok((set.is_some(), direct?))
}

/// # Safety
/// The interpreter's, for the call of a function of C.
unsafe extern "C" fn fastcall(
    _: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
    names: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: the same arguments.
    unsafe { vectorcall(std::ptr::null_mut(), arguments, count as usize, names) }
}

/// # Safety
/// The interpreter's, for the call of a function.
unsafe extern "C" fn vectorcall(
    _: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: usize,
    names: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: called by the interpreter, which this thread is attached to.
    let py = unsafe { Python::assume_attached() };
    let Some(door) = DOOR.get() else {
        PySystemError::new_err("gdn.Layer.decode was called before it was there").restore(py);
        return std::ptr::null_mut();
    };
    // SAFETY: the interpreter's arguments.
    let call = || unsafe {
        match door.go(py, arguments, count, names)? {
            Some(done) => Ok(done),
            None => door.plainly(py, arguments, count, names),
        }
    };
    match std::panic::catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(object)) => object.into_ptr(),
        Ok(Err(error)) => {
            error.restore(py);
            std::ptr::null_mut()
        }
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no text");
            PanicException::new_err(format!("a bug of gdn: Layer.decode panicked: {text}")).restore(py);
            std::ptr::null_mut()
        }
    }
}

/// `PY_VECTORCALL_ARGUMENTS_OFFSET`: the caller's mark for an argument before the first, in the count of arguments.
const OFFSET: usize = 1 << (usize::BITS - 1);

impl Door {
    /// The call of the function as it was written.
    ///
    /// # Safety
    /// That of [`vectorcall`].
    #[cold]
    unsafe fn plainly<'py>(
        &self,
        py: Python<'py>,
        arguments: *const *mut ffi::PyObject,
        count: usize,
        names: *mut ffi::PyObject,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (count, options) = (count & !OFFSET, PyDict::new(py));
        // SAFETY: as in `go`.
        let given = |i: usize| unsafe { Borrowed::from_ptr(py, *arguments.add(i)) };
        if !names.is_null() {
            // SAFETY: a tuple of names.
            let names = unsafe { Borrowed::from_ptr(py, names).cast_unchecked::<PyTuple>() };
            names.iter().enumerate().try_for_each(|(i, name)| options.set_item(name, given(count + i)))?;
        }
        self.plain.bind(py).call(PyTuple::new(py, (0..count).map(given))?, Some(&options))
    }

    /// The call, `None` where it is to be left to Python.
    ///
    /// # Safety
    /// That of [`vectorcall`].
    #[inline]
    unsafe fn go<'py>(
        &self,
        py: Python<'py>,
        arguments: *const *mut ffi::PyObject,
        count: usize,
        names: *mut ffi::PyObject,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let count = count & !OFFSET;
        if count > ARGUMENTS.len() {
            return Ok(None);
        }
        let mut given: [Option<Borrowed<'_, 'py, PyAny>>; ARGUMENTS.len()] = [None; ARGUMENTS.len()];
        // SAFETY: as many arguments by position, and after them as many as there are names; they live as long as
        // the call.
        unsafe {
            for (i, place) in given[..count].iter_mut().enumerate() {
                *place = Some(Borrowed::from_ptr(py, *arguments.add(i)));
            }
            let named = if names.is_null() { 0 } else { ffi::PyTuple_Size(names) };
            for i in 0..named {
                let name = ffi::PyTuple_GetItem(names, i);
                let Some(place) = self.names.iter().position(|own| own.as_ptr() == name) else {
                    return Ok(None);
                };
                if given[place].is_some() {
                    return Ok(None);
                }
                given[place] = Some(Borrowed::from_ptr(py, *arguments.add(count + i as usize)));
            }
        }
        let ([Some(layer), Some(projections), ..], true) =
            (given, given[..NEEDED].iter().all(Option::is_some))
        else {
            return Ok(None);
        };
        let Ok(projections) = projections.cast_exact::<PyTuple>() else { return Ok(None) };
        let Ok(settings) = layer.getattr(intern!(py, "_settings")) else { return Ok(None) };
        let Ok(settings) = settings.cast::<Settings>() else { return Ok(None) };
        let settings = settings.get();
        let mut call = Call {
            layer: settings.layer,
            tokens_per_sequence: 1,
            pad_slot_id: -1,
            disable_state_update: false,
        };
        let mut objects = [None; COUNT];
        for ((_, is), object) in ARGUMENTS.iter().zip(given) {
            let Some(object) = object else { continue };
            match *is {
                Is::Layer | Is::Projections => {}
                Is::Tensor(i) => objects[i] = Some(object).filter(|object| !object.is_none()),
                Is::Tokens => call.tokens_per_sequence = size(&object, "tokens_per_sequence", 1)?,
                Is::PadSlotId => call.pad_slot_id = integer(&object, "pad_slot_id", i64::MIN)?,
                Is::DisableStateUpdate => match object.cast_exact::<PyBool>() {
                    Ok(flag) => call.disable_state_update = flag.is_true(),
                    Err(_) => return Ok(None),
                },
            }
        }
        put_read(&mut objects, &projections, settings.weights(py))?;
        decode::on_python(py, &call, &objects, Wish::Run)
    }
}
