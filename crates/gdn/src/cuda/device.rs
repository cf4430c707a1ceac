//! The driver, its devices, and [`Gpu`]: one of them and how it is to do the work.

use std::{fmt, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaStream, DriverError, result,
    sys::{self, CUdevice_attribute as Attribute, CUresult},
};

use super::{
    error::{CudaError, driver},
    module::Kernels,
};

/// The CUDA version whose driver has every call made here.
const OLDEST_DRIVER: i32 = 12_000;
/// Compute capability.
const OLDEST_DEVICE: (i32, i32) = (8, 0);

/// What a device says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// The number in `cuda:N`.
    pub ordinal: usize,
    /// The vendor's name.
    pub name: String,
    /// Major and minor number.
    pub compute_capability: (i32, i32),
    /// How many there are.
    pub multiprocessors: u32,
    /// The most bytes of shared memory that a block can have.
    pub shared_bytes_per_block: u32,
    /// Bytes of its memory.
    pub memory_bytes: usize,
    /// Bytes of its second-level cache.
    pub l2_bytes: usize,
}

impl DeviceInfo {
    /// Whether it is new enough for the kernels.
    pub fn is_supported(&self) -> bool {
        self.compute_capability >= OLDEST_DEVICE
    }
}

/// As in `cuda:0: NVIDIA H200, compute capability 9.0, 132 multiprocessors, 139 GiB`.
impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ordinal, name, compute_capability: (major, minor), multiprocessors, memory_bytes, .. } =
            self;
        let gib = memory_bytes >> 30;
        write!(
            f,
            "cuda:{ordinal}: {name}, compute capability {major}.{minor}, {multiprocessors} multiprocessors, {gib} GiB"
        )
    }
}

/// Every device of this machine, those too old for the kernels included.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`], [`CudaError::Driver`]. A driver without devices
/// gives an empty list.
pub fn devices() -> Result<Vec<DeviceInfo>, CudaError> {
    (0..start_driver()?).map(info).collect()
}

/// Loads and starts the driver. The number of devices.
fn start_driver() -> Result<usize, CudaError> {
    // Asked of the system first: cudarc panics where it finds none. Names that cudarc looks for too.
    let names = if cfg!(windows) { ["nvcuda.dll"; 2] } else { ["libcuda.so", "libcuda.so.1"] };
    // SAFETY: the driver's library, which may be loaded by anybody.
    if !names.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok()) {
        return Err(CudaError::NoDriver);
    }
    let mut version = 0;
    // SAFETY: writes the number it is given a place for.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(driver(0, "cuDriverGetVersion"))?;
    if version < OLDEST_DRIVER {
        return Err(CudaError::DriverTooOld { version });
    }
    match result::init() {
        Ok(()) => {}
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        Err(error) => return Err(driver(0, "cuInit")(error)),
    }
    let count = result::device::get_count().map_err(driver(0, "cuDeviceGetCount"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn info(ordinal: usize) -> Result<DeviceInfo, CudaError> {
    let device = result::device::get(ordinal as i32).map_err(driver(ordinal, "cuDeviceGet"))?;
    let attribute = |attribute| {
        // SAFETY: `device` came from the driver.
        unsafe { result::device::get_attribute(device, attribute) }
            .map_err(driver(ordinal, "cuDeviceGetAttribute"))
    };
    Ok(DeviceInfo {
        ordinal,
        name: result::device::get_name(device).map_err(driver(ordinal, "cuDeviceGetName"))?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.unsigned_abs(),
        shared_bytes_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            .unsigned_abs(),
        // SAFETY: `device` came from the driver.
        memory_bytes: unsafe { result::device::total_mem(device) }
            .map_err(driver(ordinal, "cuDeviceTotalMem"))?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.unsigned_abs() as usize,
    })
}

/// A GPU, a stream of it, and how it is to do the work: what [`Cpu`](crate::Cpu) is for the CPU.
///
/// Cheap to clone, and to be made anew for another stream: the kernels are loaded once for each context,
/// whoever asks first.
#[derive(Clone, Debug)]
pub struct Gpu {
    stream: Arc<CudaStream>,
    info: Arc<DeviceInfo>,
    pub(super) kernels: Arc<Kernels>,
    pub(super) programmatic: bool,
    pub(super) check_pointers: bool,
    pub(super) segments: bool,
}

impl Gpu {
    /// Device `cuda:ordinal`, its primary context (the one PyTorch and the CUDA runtime use too) and default
    /// stream.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`], [`CudaError::NoDevice`],
    /// [`CudaError::DeviceTooOld`], [`CudaError::Driver`].
    pub fn new(ordinal: usize) -> Result<Self, CudaError> {
        let count = start_driver()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        // cudarc makes a new context the thread's current one, which is for the caller to choose: PyTorch's
        // current device is that.
        let current = result::ctx::get_current().map_err(driver(ordinal, "cuCtxGetCurrent"))?;
        let context = CudaContext::new(ordinal).map_err(driver(ordinal, "cuDevicePrimaryCtxRetain"));
        // SAFETY: the context that was current a moment ago, or none.
        unsafe { sys::cuCtxSetCurrent(current.unwrap_or(std::ptr::null_mut())) }
            .result()
            .map_err(driver(ordinal, "cuCtxSetCurrent"))?;
        Self::on(&context?.default_stream())
    }

    /// The device and context of a stream.
    ///
    /// # Errors
    /// [`CudaError::DeviceTooOld`], [`CudaError::Driver`].
    pub fn on(stream: &Arc<CudaStream>) -> Result<Self, CudaError> {
        let info = info(stream.context().ordinal())?;
        if !info.is_supported() {
            let DeviceInfo { ordinal, name, compute_capability: (major, minor), .. } = info;
            return Err(CudaError::DeviceTooOld { ordinal, name, major, minor });
        }
        Ok(Self {
            kernels: Kernels::of(stream.context(), info.compute_capability)?,
            stream: Arc::clone(stream),
            info: Arc::new(info),
            programmatic: true,
            check_pointers: true,
            segments: false,
        })
    }

    /// Loads all kernels now rather than each family at its first call. On compute capability 9.0 that takes
    /// milliseconds, on others the driver compiles them for seconds, once: it keeps what it made. Calls that are captured in a CUDA graph are of kernels that were loaded before, by this
    /// or by a call like them.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn warmup(&self) -> Result<(), CudaError> {
        self.kernels.warmup(self.stream.context(), |_| true)
    }

    /// [`Gpu::warmup`] for split and merge alone.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn warmup_split(&self) -> Result<(), CudaError> {
        self.kernels.warmup(self.stream.context(), |op| op == "split")
    }

    /// Whether a launch may overlap the end of the kernel before it in the stream (programmatic dependent
    /// launch). On by default where the device can (compute capability 9.0 and later). The kernel still waits
    /// for everything before it to be done and seen before it reads or writes a byte. Of prefill's kernels the first is
    /// always launched the ordinary way; those behind it, where all are on one stream, may read the call's inputs
    /// earlier, and wait before they touch what a kernel before them writes.
    #[must_use]
    pub fn programmatic(mut self, programmatic: bool) -> Self {
        self.programmatic = programmatic;
        self
    }

    /// Whether raw calls ask the driver whose memory each pointer is. On by default. Without, a pointer of
    /// another device is the caller's responsibility like everything else about it.
    #[must_use]
    pub fn check_pointers(mut self, check: bool) -> Self {
        self.check_pointers = check;
        self
    }

    /// Whether prefill brings segments of a long sequence forward side by side, where a layer has few v heads
    /// (`HV * DV` of at most 1024, DK of at most 128) and so few blocks: 1.3 to 2 times as fast on an H100 for one
    /// of 4096 to 32768 tokens, as fast for one of 2048. Off by default.
    ///
    /// How a sequence is cut depends on its tokens (some 2000 at least) and the heads alone, so its bits do
    /// not depend on its neighbours. But a call for all of it has other bits than several for its parts, equally
    /// far from the exact ones. Batches of long sequences, which fill the device by themselves, take
    /// 1.4 to 1.7 times as long.
    #[must_use]
    pub fn segments(mut self, segments: bool) -> Self {
        self.segments = segments;
        self
    }

    /// The stream on which [`split`](super::split()) and [`merge`](super::merge()) work.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// What the device says of itself.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The same on another stream of its context.
    pub(super) fn on_stream(&self, stream: &Arc<CudaStream>) -> Self {
        Self { stream: Arc::clone(stream), ..self.clone() }
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        self.stream.context()
    }
}
