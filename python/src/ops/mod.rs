//! The ops on tensors, wherever they are: a file for each, and here what they share.

pub(crate) mod decode;
pub(crate) mod direct;
pub(crate) mod layer;
pub(crate) mod objects;
pub(crate) mod prefill;
pub(crate) mod repack;
mod seen;
pub(crate) mod split;

use std::sync::OnceLock;

use gdn::{Cpu, DeviceAddress, Heads, Layout, Packing, cpu::Executor, cuda};
use pyo3::{
    exceptions::{PyOverflowError, PyRuntimeError},
    prelude::*,
    types::PyString,
};

use crate::{
    tensor::{Device, type_error, value_error},
    threads,
    torch::type_name,
};

/// The numbers that say what the heads are, in the order of the Python functions.
pub(crate) const HEADS: [&str; 4] = ["num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"];

/// The layout that Python's numbers and packing mean.
pub(crate) fn layout(numbers: [i64; 4], packing: &str) -> PyResult<Layout> {
    let heads = heads(numbers)?;
    let packing: Packing = packing.parse().map_err(|e: gdn::ArgumentError| value_error(e.to_string()))?;
    Ok(Layout::new(heads, packing))
}

/// The heads that Python's numbers mean.
pub(crate) fn heads(numbers: [i64; 4]) -> PyResult<Heads> {
    let mut heads = [0; 4];
    for ((number, got), name) in heads.iter_mut().zip(numbers).zip(HEADS) {
        *number = usize::try_from(got)
            .map_err(|_| value_error(format!("{name} is {got}, it must be at least 1")))?;
    }
    let [num_k_heads, num_v_heads, head_k_dim, head_v_dim] = heads;
    Heads::new(num_k_heads, num_v_heads, head_k_dim, head_v_dim).map_err(|e| value_error(e.to_string()))
}

/// The heads as numbers.
pub(crate) fn numbers(heads: &[Bound<'_, PyAny>; 4]) -> PyResult<[i64; 4]> {
    let mut numbers = [0; 4];
    for ((number, object), name) in numbers.iter_mut().zip(heads).zip(HEADS) {
        *number = integer(object, name, 1)?;
    }
    Ok(numbers)
}

/// Four heads in one argument.
pub(crate) fn numbers_of(heads: &Bound<'_, PyAny>) -> PyResult<[i64; 4]> {
    let four: [Bound<'_, PyAny>; 4] = heads.extract().map_err(|_| {
        let got = heads.repr().map_or_else(|_| type_name(heads), |text| text.to_string());
        value_error(format!("heads is {got}, expected ({})", HEADS.join(", ")))
    })?;
    numbers(&four)
}

/// An argument that is a whole number, `least` or more.
pub(crate) fn integer(object: &Bound<'_, PyAny>, argument: &str, least: i64) -> PyResult<i64> {
    let is_above = match object.extract::<i64>() {
        Ok(number) if number >= least => return Ok(number),
        Ok(_) => false,
        Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => object.gt(0)?,
        Err(_) => return Err(not_a(argument, object, "int")),
    };
    // Python writes no number of more than some thousand digits.
    let got = object.str().map_or_else(|_| "too long to be written".to_owned(), |text| text.to_string());
    let expected = if is_above { format!("at most {}", i64::MAX) } else { format!("at least {least}") };
    Err(value_error(format!("{argument} is {got}, it must be {expected}")))
}

/// The same as a size.
pub(crate) fn size(object: &Bound<'_, PyAny>, argument: &str, least: i64) -> PyResult<usize> {
    integer(object, argument, least)
        .and_then(|size| usize::try_from(size).map_err(|e| value_error(format!("{argument}: {e}"))))
}

/// An argument that is a number.
pub(crate) fn real(object: &Bound<'_, PyAny>, argument: &str) -> PyResult<f64> {
    object.extract().map_err(|error: PyErr| match error.is_instance_of::<PyOverflowError>(object.py()) {
        true => value_error(format!("{argument} is too large for a float")),
        false => not_a(argument, object, "float"),
    })
}

/// An argument that is a text.
pub(crate) fn text(object: &Bound<'_, PyAny>, argument: &str) -> PyResult<String> {
    let text = object.cast::<PyString>().map_err(|_| not_a(argument, object, "str"))?;
    Ok(text.to_string_lossy().into_owned())
}

#[cold]
pub(crate) fn not_a(argument: &str, object: &Bound<'_, PyAny>, expected: &str) -> PyErr {
    type_error(format!("{argument} is a {}, expected {expected}", type_name(object)))
}

/// Work for which other threads of Python are let in.
pub(crate) const WORTH_DETACHING: usize = 128 << 10;
/// The least bytes to be read for which one more of the framework's threads is called. They are awake:
/// sharing costs a microsecond between two, five among sixteen.
const WORTH_A_THREAD: usize = 64 << 10;
/// The least bytes to be read for which they are called at all.
const WORTH_CALLING: usize = 256 << 10;

/// Threads of a framework's own.
pub(crate) struct Threads {
    /// The most to be used.
    pub(crate) most: fn() -> usize,
    pub(crate) executor: &'static dyn Executor,
}

/// Where the work is to be done, besides what the tensors say: the framework's own threads and streams, or
/// others.
pub(crate) struct Place {
    /// For tensors of the CPU: the framework's threads. `None` for those of [`threads`].
    pub(crate) threads: Option<Threads>,
    /// The stream of a CUDA device to work on.
    pub(crate) stream: fn(Device) -> PyResult<*mut std::ffi::c_void>,
    /// Memory of a device's for work on that stream. `None` where there is none to be had.
    pub(crate) scratch: Option<Scratch>,
}

/// Calls what it is given with the address of so many bytes, which are free again for what comes after on the
/// stream.
pub(crate) type Scratch = fn(Device, usize, &mut dyn FnMut(DeviceAddress) -> PyResult<()>) -> PyResult<()>;

impl Place {
    /// Our own threads, and the legacy default stream.
    pub(crate) const OURS: Self = Self { threads: None, stream: |_| Ok(std::ptr::null_mut()), scratch: None };

    /// Calls `work` with as many threads as there are and are worth it, for so many bytes to be read.
    #[inline]
    pub(crate) fn on_cpu<T: Send>(
        &self,
        bytes: usize,
        work: impl FnOnce(&Cpu) -> PyResult<T> + Send,
    ) -> PyResult<T> {
        match &self.threads {
            None => threads::with(bytes, work),
            Some(_) if bytes < WORTH_CALLING => work(&Cpu::new().threads(1)),
            Some(Threads { most, executor }) => {
                let threads = most().min(bytes / WORTH_A_THREAD);
                work(&Cpu::new().threads(threads).executor(*executor))
            }
        }
    }
}

pub(crate) fn cuda_error(error: &cuda::CudaError) -> PyErr {
    match error {
        cuda::CudaError::Argument(_) | cuda::CudaError::TooLarge { .. } => value_error(error.to_string()),
        _ => PyRuntimeError::new_err(error.to_string()),
    }
}

/// The device `cuda:ordinal`, made ready at its first call: kernels of the split are loaded then, so that
/// calls can be captured in graphs. One of the decode is loaded when it is first called.
pub(crate) fn gpu(ordinal: i32) -> PyResult<&'static cuda::Gpu> {
    const MOST: usize = 64;
    static GPUS: [OnceLock<cuda::Gpu>; MOST] = [const { OnceLock::new() }; MOST];
    let index = usize::try_from(ordinal).unwrap_or(MOST);
    let Some(cell) = GPUS.get(index) else {
        return Err(value_error(format!("cuda:{ordinal} is not among the {MOST} devices known here")));
    };
    if let Some(gpu) = cell.get() {
        return Ok(gpu);
    }
    // Whose memory a pointer is was asked of the framework.
    let gpu = cuda::Gpu::new(index).map_err(|e| cuda_error(&e))?.check_pointers(false);
    gpu.warmup_split().map_err(|e| cuda_error(&e))?;
    Ok(cell.get_or_init(|| gpu))
}
