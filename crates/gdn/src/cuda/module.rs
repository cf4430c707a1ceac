//! [`Kernels`]: the embedded PTX, loaded once for each context.

use std::{
    ffi::CString,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use cudarc::driver::{
    CudaContext, result,
    sys::{self, CUfunction, CUmodule},
};

use super::{
    error::{CudaError, driver},
    lower::Job,
};

/// The kernels of one context. Never unloaded: they go with the context.
#[derive(Debug)]
pub(super) struct Kernels {
    context_id: u64,
    /// Whether the device knows programmatic dependent launch.
    pub(super) programmatic: bool,
    functions: OnceLock<Functions>,
}

/// By direction: 1, 2 and 4 rows a thread 16 bytes wide, and the narrow one.
#[derive(Debug)]
pub(super) struct Functions([[CUfunction; 4]; 2]);

// SAFETY: handles of the driver, which any thread may use.
unsafe impl Send for Functions {}
// SAFETY: as above.
unsafe impl Sync for Functions {}

const NAMES: [[&str; 4]; 2] = [
    ["gdn_split_16x1", "gdn_split_16x2", "gdn_split_16x4", "gdn_split_narrow"],
    ["gdn_merge_16x1", "gdn_merge_16x2", "gdn_merge_16x4", "gdn_merge_narrow"],
];

impl Kernels {
    /// Those of a context, loaded or not yet.
    pub(super) fn of(context: &CudaContext, compute_capability: (i32, i32)) -> Result<Arc<Self>, CudaError> {
        static ALL: Mutex<Vec<Arc<Kernels>>> = Mutex::new(Vec::new());
        let mut context_id = 0;
        // SAFETY: a context that `context` keeps alive, and a place for a number. Unlike the handle, the number is never used again.
        unsafe { sys::cuCtxGetId(context.cu_ctx(), &raw mut context_id) }
            .result()
            .map_err(driver(context.ordinal(), "cuCtxGetId"))?;
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = all.iter().find(|kernels| kernels.context_id == context_id) {
            return Ok(Arc::clone(kernels));
        }
        let programmatic = compute_capability >= (9, 0);
        let kernels = Arc::new(Self { context_id, programmatic, functions: OnceLock::new() });
        all.push(Arc::clone(&kernels));
        Ok(kernels)
    }

    /// The functions. The first call loads them; of several at a time, one does.
    pub(super) fn loaded(&self, context: &CudaContext) -> Result<&Functions, CudaError> {
        if let Some(functions) = self.functions.get() {
            return Ok(functions);
        }
        static LOADING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(functions) = self.functions.get() {
            return Ok(functions);
        }
        let functions = load(context, self.programmatic)?;
        Ok(self.functions.get_or_init(|| functions))
    }
}

impl Functions {
    /// The kernel for a job.
    pub(super) fn of(&self, job: &Job) -> CUfunction {
        let kernel = match (job.wide, job.shape.rows) {
            (true, 1) => 0,
            (true, 2) => 1,
            (true, _) => 2,
            (false, _) => 3,
        };
        self.0[usize::from(job.merge)][kernel]
    }
}

fn load(context: &CudaContext, programmatic: bool) -> Result<Functions, CudaError> {
    let ordinal = context.ordinal();
    let _current = Current::new(context)?;
    let text = if programmatic { gdn_kernels::PTX_SM_90 } else { gdn_kernels::PTX_SM_80 };
    let ptx = CString::new(text).expect("PTX is a text without zeros");
    // SAFETY: PTX that ends with a zero.
    let module: CUmodule = unsafe { result::module::load_data(ptx.as_ptr().cast()) }
        .map_err(driver(ordinal, "cuModuleLoadData"))?;
    let mut functions = [[std::ptr::null_mut(); 4]; 2];
    for (functions, names) in functions.iter_mut().zip(NAMES) {
        for (function, name) in functions.iter_mut().zip(names) {
            let name = CString::new(name).expect("a name without zeros");
            // SAFETY: the module was loaded above and stays.
            *function = unsafe { result::module::get_function(module, name) }
                .map_err(driver(ordinal, "cuModuleGetFunction"))?;
        }
    }
    Ok(Functions(functions))
}

/// Makes a context this thread's current one until dropped, where it is not already.
pub(super) struct Current {
    pushed: bool,
}

impl Current {
    pub(super) fn new(context: &CudaContext) -> Result<Self, CudaError> {
        let ordinal = context.ordinal();
        let current = result::ctx::get_current().map_err(driver(ordinal, "cuCtxGetCurrent"))?;
        let pushed = current != Some(context.cu_ctx());
        if pushed {
            // SAFETY: `context` is alive.
            unsafe { sys::cuCtxPushCurrent_v2(context.cu_ctx()) }
                .result()
                .map_err(driver(ordinal, "cuCtxPushCurrent"))?;
        }
        Ok(Self { pushed })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            let mut context = std::ptr::null_mut();
            // SAFETY: takes off what `new` put there. There is nothing to be done about a failure.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut context) };
        }
    }
}
