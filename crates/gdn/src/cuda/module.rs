//! [`Kernels`]: what is made once for each context: the embedded PTX, loaded, and streams beside callers'.

use std::{
    ffi::CString,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use cudarc::driver::{
    CudaContext, result,
    sys::{self, CUdevice_attribute, CUfunction, CUfunction_attribute, CUmodule},
};
use gdn_kernels::modules::{self, Code, Kernel, Module};

use super::{
    error::{CudaError, driver},
    side::Sides,
};

/// The kernels of one context, and its streams. Never unloaded: they go with the context.
///
/// They are loaded in families, so that a first call waits for the driver to compile what it needs and no
/// more.
#[derive(Debug)]
pub(super) struct Kernels {
    context_id: u64,
    /// Whether the device knows programmatic dependent launch.
    pub(super) programmatic: bool,
    families: Vec<Family>,
    /// Streams for kernels that run beside others of the same call.
    pub(super) sides: Sides,
}

/// Kernels that are compiled together.
#[derive(Debug)]
struct Family {
    op: &'static str,
    ptx: &'static str,
    kernels: &'static [Kernel],
    code: Option<Arc<Loaded>>,
    loaded: OnceLock<Vec<Function>>,
}

/// Machine code for the device, of all families of a module; loaded when the first of them is, `None` inside
/// where the driver does not take it.
#[derive(Debug)]
struct Loaded {
    bytes: &'static [u8],
    module: OnceLock<Option<Handle>>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Function(pub(super) CUfunction);

#[derive(Debug, Clone, Copy)]
struct Handle(CUmodule);

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Kernels {
    /// Those of a context, loaded or not yet.
    pub(super) fn of(context: &CudaContext, compute_capability: (i32, i32)) -> Result<Arc<Self>, CudaError> {
        static ALL: Mutex<Vec<Arc<Kernels>>> = Mutex::new(Vec::new());
        let mut context_id = 0;
        // SAFETY: a context that `context` keeps alive, and a place for a number. Unlike the handle, the
        // number is never used again.
        unsafe { sys::cuCtxGetId(context.cu_ctx(), &raw mut context_id) }
            .result()
            .map_err(driver(context.ordinal(), "cuCtxGetId"))?;
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = all.iter().find(|kernels| kernels.context_id == context_id) {
            return Ok(Arc::clone(kernels));
        }
        let programmatic = compute_capability >= (9, 0);
        let families = families_for(modules::MODULES, compute_capability);
        let kernels = Arc::new(Self { context_id, programmatic, families, sides: Sides::default() });
        all.push(Arc::clone(&kernels));
        Ok(kernels)
    }

    /// The kernel of this name, one of the table's. The first call for its family loads it.
    pub(super) fn kernel(&self, context: &CudaContext, name: &str) -> Result<CUfunction, CudaError> {
        let place = |family: &Family| family.kernels.iter().position(|kernel| kernel.name == name);
        let (family, i) = self
            .families
            .iter()
            .find_map(|family| Some((family, place(family)?)))
            .expect("names of kernels are those of the table, which has each for every device");
        Ok(family.functions(context)?[i].0)
    }

    /// Loads all that is not loaded yet of some ops.
    pub(super) fn warmup(
        &self,
        context: &CudaContext,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(), CudaError> {
        let mut wanted = self.families.iter().filter(|family| wanted(family.op));
        wanted.try_for_each(|family| family.functions(context).map(|_| ()))
    }
}

/// Of each op the families of the first module that the device takes.
fn families_for(table: &'static [Module], compute_capability: (i32, i32)) -> Vec<Family> {
    let takes = |module: &&Module| module.target.runs_on(compute_capability);
    let of_its_op = |module: &&Module| {
        let first = table.iter().filter(takes).find(|first| first.op == module.op);
        first.is_some_and(|first| std::ptr::eq(first, *module))
    };
    let families = |module: &'static Module| {
        let code = module.code.iter().find(|code| code.capability == compute_capability);
        let code = code.map(|Code { bytes, .. }| Arc::new(Loaded { bytes, module: OnceLock::new() }));
        module.families.iter().map(move |kernels| Family {
            op: module.op,
            ptx: module.ptx,
            kernels,
            code: code.clone(),
            loaded: OnceLock::new(),
        })
    };
    table.iter().filter(of_its_op).flat_map(families).collect()
}

impl Family {
    fn functions(&self, context: &CudaContext) -> Result<&[Function], CudaError> {
        if let Some(functions) = self.loaded.get() {
            return Ok(functions);
        }
        // Of several threads that come here at a time, one loads.
        static LOADING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(functions) = self.loaded.get() {
            return Ok(functions);
        }
        let functions = self.load(context)?;
        Ok(self.loaded.get_or_init(|| functions))
    }

    /// Machine code needs no compilation; a driver that does not take it gets PTX.
    fn load(&self, context: &CudaContext) -> Result<Vec<Function>, CudaError> {
        let _current = Current::new(context)?;
        let code = self.code.as_ref().and_then(|code| {
            // SAFETY: an ELF file, which says itself how long it is.
            let load = || unsafe { result::module::load_data(code.bytes.as_ptr().cast()) }.ok().map(Handle);
            *code.module.get_or_init(load)
        });
        let Handle(module) = match code {
            Some(module) => module,
            None => self.compiled(context)?,
        };
        self.functions_of(module, context)
    }

    /// The PTX as the driver compiles it.
    fn compiled(&self, context: &CudaContext) -> Result<Handle, CudaError> {
        let ptx = CString::new(only(self.ptx, self.kernels)).expect("PTX is a text without zeros");
        // SAFETY: PTX that ends with a zero.
        let module = unsafe { result::module::load_data(ptx.as_ptr().cast()) };
        module.map(Handle).map_err(driver(context.ordinal(), "cuModuleLoadData"))
    }

    fn functions_of(&self, module: CUmodule, context: &CudaContext) -> Result<Vec<Function>, CudaError> {
        let ordinal = context.ordinal();
        let function = |kernel: &Kernel| {
            let name = CString::new(kernel.name).expect("a name without zeros");
            // SAFETY: the module was loaded above and stays.
            let function = unsafe { result::module::get_function(module, name) }
                .map_err(driver(ordinal, "cuModuleGetFunction"))?;
            let most =
                context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
            let most = most.map_err(driver(ordinal, "cuDeviceGetAttribute"))? as u32;
            if kernel.shared > SHARED_BY_DEFAULT {
                let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: a function of the module.
                unsafe {
                    result::function::set_function_attribute(
                        function,
                        attribute,
                        kernel.shared.min(most) as i32,
                    )
                }
                .map_err(driver(ordinal, "cuFuncSetAttribute"))?;
                let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
                // SAFETY: as above.
                unsafe { result::function::set_function_attribute(function, attribute, ALL_SHARED) }
                    .map_err(driver(ordinal, "cuFuncSetAttribute"))?;
            }
            Ok(Function(function))
        };
        self.kernels.iter().map(function).collect()
    }
}

/// Bytes of dynamic shared memory that a launch may ask for without having said so before.
const SHARED_BY_DEFAULT: u32 = 48 << 10;

/// Per cent of a multiprocessor's memory that should be shared memory rather than cache.
const ALL_SHARED: i32 = 100;

/// The PTX of some of the kernels: what comes before the first, and each of them up to the brace that ends
/// it. Kernels share nothing.
fn only(ptx: &str, kernels: &[Kernel]) -> String {
    const ENTRY: &str = ".visible .entry ";
    let mut parts = ptx.split(ENTRY);
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = part.split_once('(').unwrap_or((part, ""));
        if kernels.iter().any(|kernel| kernel.name == name) {
            // The last one: what is written in the machine's own language may have braces of its own.
            let end = rest.rfind("\n}").map_or(rest.len(), |brace| brace + 2);
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
    use gdn_kernels::modules::{MODULES, PROBES, Target};

    use super::*;

    #[test]
    fn every_kernel_is_found_in_the_text() {
        for module in MODULES.iter().chain(PROBES) {
            assert_eq!(module.ptx.matches(".visible .entry gdn_").count(), module.kernels().count());
            for kernels in module.families {
                let text = only(module.ptx, kernels);
                assert_eq!(text.matches(".entry").count(), kernels.len(), "{kernels:?}");
                assert_eq!(text.matches('{').count(), text.matches('}').count(), "{kernels:?}");
                assert!(
                    kernels.iter().all(|kernel| text.contains(&format!(".visible .entry {}(", kernel.name)))
                );
                assert!(text.contains(".version") && text.contains(".target sm_"), "{text}");
            }
        }
    }

    /// What a device without machine code of its own gets.
    #[test]
    fn the_driver_compiles_all_kernels() {
        let gpu = match crate::cuda::Gpu::new(0) {
            Ok(gpu) => gpu,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let context = gpu.stream().context();
        let _current = Current::new(context).unwrap();
        for family in families_for(MODULES, gpu.info().compute_capability) {
            let Handle(module) = family.compiled(context).unwrap();
            let functions = family.functions_of(module, context).unwrap();
            assert_eq!(functions.len(), family.kernels.len());
            let code = family.code.as_ref().map(|_| family.load(context).unwrap().len());
            assert!(code.is_none_or(|count| count == functions.len()));
            // SAFETY: nothing uses its functions.
            unsafe { result::module::unload(module) }.unwrap();
        }
    }

    #[test]
    fn machine_code_is_an_elf_file() {
        for module in MODULES {
            for code in module.code {
                assert!(code.bytes.starts_with(b"\x7fELF"), "{} for {}", module.op, code.gpu);
                assert!(module.target.runs_on(code.capability));
            }
        }
        assert!(MODULES.iter().filter(|m| m.code.iter().any(|c| c.capability == (9, 0))).count() == 5);
    }

    #[test]
    fn a_device_gets_the_best_module_of_each_op() {
        let target = |capability| {
            let families = families_for(MODULES, capability);
            let of_split = |family: &&Family| family.kernels[0].name == "gdn_split_16x1";
            let [split] = families.iter().filter(of_split).collect::<Vec<_>>()[..] else { panic!() };
            MODULES.iter().find(|module| std::ptr::eq(module.ptx, split.ptx)).unwrap().target
        };
        for (capability, expected) in [
            ((8, 0), Target::Sm80),
            ((8, 9), Target::Sm80),
            ((9, 0), Target::Sm90),
            ((10, 0), Target::Sm90),
            ((12, 0), Target::Sm90),
        ] {
            assert_eq!(target(capability), expected, "{capability:?}");
        }
        assert!(Target::Sm90a.runs_on((9, 0)) && !Target::Sm90a.runs_on((10, 0)));
        // On every device every op of the table is there; beside them what is for some devices alone.
        for capability in [(8, 0), (9, 0), (12, 0)] {
            let families = families_for(MODULES, capability);
            for op in MODULES.iter().map(|module| module.op) {
                let count = families
                    .iter()
                    .filter(|f| MODULES.iter().any(|m| m.op == op && std::ptr::eq(m.ptx, f.ptx)))
                    .count();
                let expected = match op {
                    "prefill_wgmma" => capability == (9, 0),
                    "decode_few" => capability >= (9, 0),
                    _ => true,
                };
                assert_eq!(count > 0, expected, "{op} on {capability:?}");
            }
        }
    }
}
