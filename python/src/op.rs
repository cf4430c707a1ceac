//! Split and merge of six tensors, wherever they are: what all doors come to.

use std::{ops::Range, sync::OnceLock};

use gdn::{
    Cpu, Heads, Layout, Packed, PackedMut, Packing, Rows, RowsMut, Unpacked, UnpackedMut, cpu::Executor, cuda,
};
use pyo3::{PyErr, PyResult, exceptions::PyRuntimeError};

use crate::{
    pool,
    tensor::{Device, RowsOf, Tensor, type_error, value_error},
};

/// Which way the features move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Split,
    Merge,
}

impl Direction {
    /// The arguments that are read, by their places in [`NAMES`].
    pub(crate) fn read(self) -> Range<usize> {
        if self == Self::Split { 0..2 } else { 2..6 }
    }

    /// Those that are written.
    pub(crate) fn written(self) -> Range<usize> {
        if self == Self::Split { 2..6 } else { 0..2 }
    }

    /// The argument that is read whose dtype another one has: that of its projection, and of these the first.
    pub(crate) fn like(self, argument: usize) -> usize {
        match (self, argument) {
            (Self::Split, 0 | 2 | 3) => 0,
            (Self::Split, _) => 1,
            (Self::Merge, 0 | 2 | 3) => 2,
            (Self::Merge, _) => 4,
        }
    }
}

/// The arguments in the order of the Python functions: packed, then unpacked.
pub(crate) const NAMES: [&str; 6] = ["mixed_qkvz", "mixed_ba", "mixed_qkv", "z", "b", "a"];

/// The numbers that say what the heads are, in the order of the Python functions.
pub(crate) const HEADS: [&str; 4] = ["num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"];

/// The layout that Python's numbers and packing mean.
pub(crate) fn layout(heads: [i64; 4], packing: &str) -> PyResult<Layout> {
    let mut numbers = [0; 4];
    for ((number, got), name) in numbers.iter_mut().zip(heads).zip(HEADS) {
        *number = usize::try_from(got)
            .map_err(|_| value_error(format!("{name} is {got}, it must be at least 1")))?;
    }
    let [num_k_heads, num_v_heads, head_k_dim, head_v_dim] = numbers;
    let heads = Heads::new(num_k_heads, num_v_heads, head_k_dim, head_v_dim)
        .map_err(|e| value_error(e.to_string()))?;
    let packing: Packing = packing.parse().map_err(|e: gdn::ArgumentError| value_error(e.to_string()))?;
    Ok(Layout::new(heads, packing))
}

/// The shapes of outputs for N rows, in the order of [`NAMES`].
pub(crate) fn shape(heads: &Heads, tensor: usize, num_rows: usize) -> ([usize; 3], usize) {
    match tensor {
        0 => ([num_rows, heads.qkvz_features(), 0], 2),
        1 => ([num_rows, heads.ba_features(), 0], 2),
        2 => ([num_rows, heads.qkv_features(), 0], 2),
        3 => ([num_rows, heads.num_v_heads(), heads.head_v_dim()], 3),
        _ => ([num_rows, heads.num_v_heads(), 0], 2),
    }
}

/// The least bytes to be read for which one more of the framework's threads is called. They are awake: sharing costs a microsecond between
/// two, five among sixteen.
const WORTH_A_THREAD: usize = 64 << 10;
/// The least bytes to be read for which they are called at all.
const WORTH_CALLING: usize = 256 << 10;

/// Where the work is to be done, besides what the tensors say: the framework's own threads and streams, or others.
pub(crate) struct Place {
    /// For tensors of the CPU: the most threads, and who has them. `None` for [`pool`].
    pub(crate) threads: Option<(fn() -> usize, Executor)>,
    /// The stream of a CUDA device to work on.
    pub(crate) stream: fn(Device) -> PyResult<*mut std::ffi::c_void>,
}

impl Place {
    /// Our own threads, and the legacy default stream.
    pub(crate) const OURS: Self = Self { threads: None, stream: |_| Ok(std::ptr::null_mut()) };
}

/// A call whose tensors agree about devices and dtypes, and are rows. Shapes and overlaps are for [`gdn::split()`] to check.
pub(crate) struct Call<'a> {
    layout: Layout,
    direction: Direction,
    tensors: &'a [Tensor; 6],
    rows: [RowsOf; 6],
}

/// Checks one tensor that is read, as far as it can be checked by itself: for calls that go on elsewhere.
#[inline]
pub(crate) fn check(tensor: &Tensor, argument: usize, layout: &Layout) -> PyResult<RowsOf> {
    let heads = &layout.heads;
    let inner = (argument == 3).then(|| [heads.num_v_heads(), heads.head_v_dim()]);
    let rows = tensor.rows(NAMES[argument], inner)?;
    if tensor.dtype.size() == 0 {
        return Err(type_error(format!(
            "{} has dtype {}, expected whole bytes",
            NAMES[argument], tensor.dtype
        )));
    }
    Ok(rows)
}

impl<'a> Call<'a> {
    /// `tensors` in the order of [`NAMES`].
    #[inline]
    pub(crate) fn new(layout: Layout, direction: Direction, tensors: &'a [Tensor; 6]) -> PyResult<Self> {
        let first = direction.read().start;
        let mut rows = [RowsOf { num_rows: 0, features: 0, row_stride: 0 }; 6];
        for (i, tensor) in tensors.iter().enumerate() {
            rows[i] = check(tensor, i, &layout)?;
            let argument = NAMES[i];
            if tensor.device != tensors[first].device
                && !(tensor.device.is_cpu() && tensors[first].device.is_cpu())
            {
                let (got, other, expected) = (tensor.device, NAMES[first], tensors[first].device);
                return Err(value_error(format!("{argument} is on {got}, {other} is on {expected}")));
            }
            let like = direction.like(i);
            if tensor.dtype != tensors[like].dtype {
                let (got, other, expected) = (tensor.dtype, NAMES[like], tensors[like].dtype);
                return Err(type_error(format!("{argument} has dtype {got}, {other} has {expected}")));
            }
            if tensor.read_only && direction.written().contains(&i) {
                return Err(value_error(format!("{argument} is read-only, it is to be written")));
            }
        }
        Ok(Self { layout, direction, tensors, rows })
    }

    /// Bytes to be read.
    pub(crate) fn bytes(&self) -> usize {
        self.tensors[..2]
            .iter()
            .zip(&self.rows)
            .map(|(tensor, rows)| {
                rows.num_rows.saturating_mul(rows.features).saturating_mul(tensor.dtype.size())
            })
            .fold(0, usize::saturating_add)
    }

    pub(crate) fn is_cpu(&self) -> bool {
        self.tensors[0].device.is_cpu()
    }

    /// Does it.
    ///
    /// # Safety
    /// The tensors are where they say, and stay; while this runs nothing else writes to those that are read or touches those that are
    /// written. On a GPU the same until the work on the stream is done.
    #[inline]
    pub(crate) unsafe fn run(&self, place: &Place) -> PyResult<()> {
        let device = self.tensors[0].device;
        match device.kind {
            _ if device.is_cpu() => {
                let bytes = self.bytes();
                // SAFETY: the caller's promise.
                let work = |cpu: &Cpu| unsafe { self.on_cpu(cpu) };
                match place.threads {
                    None => pool::with(bytes, work),
                    Some(_) if bytes < WORTH_CALLING => work(&Cpu::new().threads(1)),
                    Some((threads, executor)) => {
                        let threads = threads().min(bytes / WORTH_A_THREAD);
                        work(&Cpu::new().threads(threads).executor(executor))
                    }
                }
            }
            // SAFETY: the caller's promise.
            Device::CUDA => unsafe { self.on_cuda(device, (place.stream)(device)?) },
            _ => Err(value_error(format!("mixed_qkvz is on {device}, expected cpu or cuda"))),
        }
    }

    /// # Safety
    /// That of [`Call::run`].
    unsafe fn on_cpu(&self, cpu: &Cpu) -> PyResult<()> {
        let bad = |i: usize| move |e: gdn::ArgumentError| value_error(format!("{}: {e}", NAMES[i]));
        let read = |i: usize| {
            let (tensor, rows) = (&self.tensors[i], &self.rows[i]);
            let ptr = std::ptr::with_exposed_provenance(tensor.address);
            // SAFETY: the caller's promise.
            unsafe { Rows::from_raw(ptr, tensor.dtype.size(), rows.num_rows, rows.features, rows.row_stride) }
                .map_err(bad(i))
        };
        let write = |i: usize| {
            let (tensor, rows) = (&self.tensors[i], &self.rows[i]);
            let ptr = std::ptr::with_exposed_provenance_mut(tensor.address);
            // SAFETY: the caller's promise.
            unsafe {
                RowsMut::from_raw(ptr, tensor.dtype.size(), rows.num_rows, rows.features, rows.row_stride)
            }
            .map_err(bad(i))
        };
        let done = match self.direction {
            Direction::Split => gdn::split(
                &self.layout,
                Packed { mixed_qkvz: read(0)?, mixed_ba: read(1)? },
                UnpackedMut { mixed_qkv: write(2)?, z: write(3)?, b: write(4)?, a: write(5)? },
                cpu,
            ),
            Direction::Merge => gdn::merge(
                &self.layout,
                Unpacked { mixed_qkv: read(2)?, z: read(3)?, b: read(4)?, a: read(5)? },
                PackedMut { mixed_qkvz: write(0)?, mixed_ba: write(1)? },
                cpu,
            ),
        };
        done.map_err(|e| value_error(e.to_string()))
    }

    /// # Safety
    /// That of [`Call::run`], and `stream` is one of the device's primary context.
    unsafe fn on_cuda(&self, device: Device, stream: *mut std::ffi::c_void) -> PyResult<()> {
        let gpu = gpu(device.ordinal)?;
        let raw = |i: usize| {
            let (tensor, rows) = (&self.tensors[i], &self.rows[i]);
            cuda::RawRows::new(
                tensor.address as u64,
                tensor.dtype.size(),
                rows.num_rows,
                rows.features,
                rows.row_stride,
            )
            .map_err(|e| value_error(format!("{}: {e}", NAMES[i])))
        };
        let packed = cuda::RawPacked { mixed_qkvz: raw(0)?, mixed_ba: raw(1)? };
        let unpacked = cuda::RawUnpacked { mixed_qkv: raw(2)?, z: raw(3)?, b: raw(4)?, a: raw(5)? };
        // SAFETY: the caller's promise.
        let done = unsafe {
            match self.direction {
                Direction::Split => gpu.split_raw(&self.layout, packed, unpacked, stream.cast()),
                Direction::Merge => gpu.merge_raw(&self.layout, unpacked, packed, stream.cast()),
            }
        };
        done.map_err(|e| cuda_error(&e))
    }
}

pub(crate) fn cuda_error(error: &cuda::CudaError) -> PyErr {
    match error {
        cuda::CudaError::Argument(_) | cuda::CudaError::TooLarge { .. } => value_error(error.to_string()),
        _ => PyRuntimeError::new_err(error.to_string()),
    }
}

/// The device `cuda:ordinal`, made ready at its first call: kernels are loaded then, so that calls can be captured in graphs.
fn gpu(ordinal: i32) -> PyResult<&'static cuda::Gpu> {
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
    gpu.warmup().map_err(|e| cuda_error(&e))?;
    Ok(cell.get_or_init(|| gpu))
}
