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
///
/// They are loaded in families, so that a first call waits for the driver to compile what it needs and no more.
#[derive(Debug)]
pub(super) struct Kernels {
    context_id: u64,
    /// Whether the device knows programmatic dependent launch.
    pub(super) programmatic: bool,
    families: [OnceLock<Functions>; FAMILIES.len()],
}

/// The kernels that differ in the rows of a thread alone.
#[derive(Debug)]
struct Functions([CUfunction; 2]);

// SAFETY: handles of the driver, which any thread may use.
unsafe impl Send for Functions {}
// SAFETY: as above.
unsafe impl Sync for Functions {}

/// By direction and width: the names for one row a thread and for more.
const FAMILIES: [[&str; 2]; 4] = [
    ["gdn_split_16x1", "gdn_split_16x2"],
    ["gdn_split_narrow"; 2],
    ["gdn_merge_16x1", "gdn_merge_16x2"],
    ["gdn_merge_narrow"; 2],
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
        let families = [const { OnceLock::new() }; FAMILIES.len()];
        let kernels = Arc::new(Self { context_id, programmatic, families });
        all.push(Arc::clone(&kernels));
        Ok(kernels)
    }

    /// The kernel for a job. The first call for its family loads it.
    pub(super) fn function(&self, context: &CudaContext, job: &Job) -> Result<CUfunction, CudaError> {
        let family = 2 * usize::from(job.merge) + usize::from(!job.wide);
        Ok(self.family(context, family)?.0[usize::from(job.shape.rows > 1)])
    }

    /// Loads all that is not loaded yet.
    pub(super) fn warmup(&self, context: &CudaContext) -> Result<(), CudaError> {
        (0..FAMILIES.len()).try_for_each(|family| self.family(context, family).map(|_| ()))
    }

    fn family(&self, context: &CudaContext, family: usize) -> Result<&Functions, CudaError> {
        let cell = &self.families[family];
        if let Some(functions) = cell.get() {
            return Ok(functions);
        }
        // Of several threads that come here at a time, one loads.
        static LOADING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(functions) = cell.get() {
            return Ok(functions);
        }
        let functions = load(context, self.ptx(), FAMILIES[family])?;
        Ok(cell.get_or_init(|| functions))
    }

    fn ptx(&self) -> &'static str {
        if self.programmatic { gdn_kernels::PTX_SM_90 } else { gdn_kernels::PTX_SM_80 }
    }
}

fn load(context: &CudaContext, ptx: &str, names: [&str; 2]) -> Result<Functions, CudaError> {
    let ordinal = context.ordinal();
    let _current = Current::new(context)?;
    let ptx = CString::new(only(ptx, &names)).expect("PTX is a text without zeros");
    // SAFETY: PTX that ends with a zero.
    let module: CUmodule = unsafe { result::module::load_data(ptx.as_ptr().cast()) }
        .map_err(driver(ordinal, "cuModuleLoadData"))?;
    let mut functions = [std::ptr::null_mut(); 2];
    for (function, name) in functions.iter_mut().zip(names) {
        let name = CString::new(name).expect("a name without zeros");
        // SAFETY: the module was loaded above and stays.
        *function = unsafe { result::module::get_function(module, name) }
            .map_err(driver(ordinal, "cuModuleGetFunction"))?;
    }
    Ok(Functions(functions))
}

/// The PTX of some of the kernels: what comes before the first, and each of them up to the brace that ends it. Kernels share nothing.
fn only(ptx: &str, names: &[&str]) -> String {
    const ENTRY: &str = ".visible .entry ";
    let mut kernels = ptx.split(ENTRY);
    let mut text = kernels.next().unwrap_or_default().to_owned();
    for kernel in kernels {
        let (name, rest) = kernel.split_once('(').unwrap_or((kernel, ""));
        if names.contains(&name) {
            let end = rest.find("\n}").map_or(rest.len(), |brace| brace + 2);
            text += &format!("{ENTRY}{name}({}\n", &rest[..end]);
        }
    }
    text
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_found_in_the_text() {
        for ptx in [gdn_kernels::PTX_SM_80, gdn_kernels::PTX_SM_90] {
            let all: Vec<&str> = FAMILIES.concat();
            assert_eq!(ptx.matches(".visible .entry gdn_").count(), 6);
            assert!(all.iter().all(|name| ptx.contains(&format!(".visible .entry {name}("))));
            for names in FAMILIES {
                let text = only(ptx, &names);
                let count = if names[0] == names[1] { 1 } else { 2 };
                assert_eq!(text.matches(".entry").count(), count, "{names:?}");
                assert_eq!(text.matches("\n}").count(), count, "{names:?}");
                assert!(text.contains(".version") && text.contains(".target sm_"), "{text}");
            }
        }
    }
}
