//! Split and merge on a GPU: the functions to call, on addresses, on cudarc's slices and on the host's rows,
//! and the kernel's arguments and grid for a checked plan.

use cudarc::driver::sys::CUstream;
use gdn_kernels::split::{Args, Divisor, Part, Projection, Shape, Tensor};

use super::{
    device::Gpu,
    error::CudaError,
    host::Staged,
    launch::Launch,
    module::Current,
    views::{RawRows, Rows, RowsMut},
};
use crate::{
    packing::{FeatureMap, Layout, Run},
    rows,
    split::{Direction, Plan},
    view::{DeviceAddress, Packed, TENSORS, Unpacked, View},
};

impl Gpu {
    /// Takes packed projections apart: one kernel launch on `stream`, and nothing else. The call returns
    /// before the work is done. It allocates nothing and waits for nothing, so it can be captured in a CUDA
    /// graph once [`Gpu::warmup`] was called.
    ///
    /// Shapes, element sizes and overlaps are checked as on the CPU. With no rows nothing is launched.
    ///
    /// # Errors
    /// [`CudaError::Argument`], [`CudaError::WrongDevice`], [`CudaError::TooLarge`], [`CudaError::Driver`].
    ///
    /// # Safety
    /// `stream` is a stream of this GPU's context, or null for its default stream. From when the kernel
    /// starts until it is done, all rows are in memory that the device can reach, those of `from` are not
    /// written and those of `to` neither read nor written by anything else.
    pub unsafe fn split_raw(
        &self,
        layout: &Layout,
        from: Packed<RawRows>,
        to: Unpacked<RawRows>,
        stream: CUstream,
    ) -> Result<(), CudaError> {
        let (packed, unpacked) = (from.as_ref().map(|rows| &rows.view), to.as_ref().map(|rows| &rows.view));
        let plan = Plan::new(layout, Direction::Split, packed, unpacked)?;
        // SAFETY: the caller's promise.
        unsafe { run(self, &plan, Profile::of(self.info().multiprocessors), stream) }
    }

    /// Puts the four parts together again: the exact inverse of [`Gpu::split_raw`].
    ///
    /// # Errors
    /// Those of [`Gpu::split_raw`].
    ///
    /// # Safety
    /// That of [`Gpu::split_raw`].
    pub unsafe fn merge_raw(
        &self,
        layout: &Layout,
        from: Unpacked<RawRows>,
        to: Packed<RawRows>,
        stream: CUstream,
    ) -> Result<(), CudaError> {
        let (packed, unpacked) = (to.as_ref().map(|rows| &rows.view), from.as_ref().map(|rows| &rows.view));
        let plan = Plan::new(layout, Direction::Merge, packed, unpacked)?;
        // SAFETY: the caller's promise.
        unsafe { run(self, &plan, Profile::of(self.info().multiprocessors), stream) }
    }
}

/// # Safety
/// `stream` is a stream of the GPU's context, and every row of the plan is there, as [`Gpu::split_raw`] asks.
pub(crate) unsafe fn run(
    gpu: &Gpu,
    plan: &Plan<'_, DeviceAddress>,
    profile: Profile,
    stream: CUstream,
) -> Result<(), CudaError> {
    let Some(job) = Job::new(plan, profile)? else { return Ok(()) };
    let _current = Current::new(gpu.context())?;
    if gpu.check_pointers {
        plan.named().try_for_each(|(argument, view)| gpu.owns(argument, view.address))?;
    }
    let function = gpu.kernels.kernel(gpu.context(), job.kernel())?;
    let [x, y] = job.shape.blocks;
    let launch = Launch { function, blocks: [x, y, 1], threads: job.shape.threads, shared: 0, cluster: 1 };
    // SAFETY: the kernel takes one `Args`; they were made from a checked plan, and the grid for them. The
    // caller answers for the memory and the stream.
    unsafe { gpu.launch(launch, job.args, stream) }
}

/// Takes packed projections apart, on the GPU's stream: the counterpart of [`gdn::split`](crate::split()).
///
/// One kernel launch; the call returns before the work is done. cudarc orders it after whatever was done to
/// the slices before, and what is done to them later after it.
///
/// # Errors
/// [`CudaError::Argument`], [`CudaError::WrongDevice`], [`CudaError::TooLarge`], [`CudaError::Driver`].
pub fn split<T, U>(
    layout: &Layout,
    from: Packed<Rows<'_, T>, Rows<'_, U>>,
    mut to: Unpacked<RowsMut<'_, T>, RowsMut<'_, U>>,
    gpu: &Gpu,
) -> Result<(), CudaError> {
    let (mixed_qkvz, _a) = from.mixed_qkvz.on("mixed_qkvz", gpu)?;
    let (mixed_ba, _b) = from.mixed_ba.on("mixed_ba", gpu)?;
    let (mixed_qkv, _c) = to.mixed_qkv.on("mixed_qkv", gpu)?;
    let (z, _d) = to.z.on("z", gpu)?;
    let (b, _e) = to.b.on("b", gpu)?;
    let (a, _f) = to.a.on("a", gpu)?;
    let (from, to) = (Packed { mixed_qkvz, mixed_ba }, Unpacked { mixed_qkv, z, b, a });
    let gpu = gpu.clone().check_pointers(false);
    // SAFETY: the rows lie within slices of this context, the written ones borrowed exclusively; cudarc
    // orders what comes before and after on the stream, which is the context's.
    unsafe { gpu.split_raw(layout, from, to, gpu.stream().cu_stream()) }
}

/// Puts the four parts together again, on the GPU's stream: the exact inverse of [`split`].
///
/// # Errors
/// Those of [`split`].
pub fn merge<T, U>(
    layout: &Layout,
    from: Unpacked<Rows<'_, T>, Rows<'_, U>>,
    mut to: Packed<RowsMut<'_, T>, RowsMut<'_, U>>,
    gpu: &Gpu,
) -> Result<(), CudaError> {
    let (mixed_qkv, _a) = from.mixed_qkv.on("mixed_qkv", gpu)?;
    let (z, _b) = from.z.on("z", gpu)?;
    let (b, _c) = from.b.on("b", gpu)?;
    let (a, _d) = from.a.on("a", gpu)?;
    let (mixed_qkvz, _e) = to.mixed_qkvz.on("mixed_qkvz", gpu)?;
    let (mixed_ba, _f) = to.mixed_ba.on("mixed_ba", gpu)?;
    let (from, to) = (Unpacked { mixed_qkv, z, b, a }, Packed { mixed_qkvz, mixed_ba });
    let gpu = gpu.clone().check_pointers(false);
    // SAFETY: as in `split`.
    unsafe { gpu.merge_raw(layout, from, to, gpu.stream().cu_stream()) }
}

/// [`gdn::split`](crate::split()) by a GPU, for tensors in the memory of the host. Returns when they are
/// written.
///
/// # Errors
/// [`CudaError::Argument`], before anything is written; [`CudaError::TooLarge`], [`CudaError::Driver`].
pub fn split_host(
    layout: &Layout,
    from: Packed<rows::Rows<'_>>,
    to: Unpacked<rows::RowsMut<'_>>,
    gpu: &Gpu,
) -> Result<(), CudaError> {
    let (packed, unpacked) = (from.as_ref().map(|rows| &rows.view), to.as_ref().map(|rows| &rows.view));
    Plan::new(layout, Direction::Split, packed, unpacked)?;
    let read = [Staged::of(from.mixed_qkvz, gpu)?, Staged::of(from.mixed_ba, gpu)?];
    let mut host = [to.mixed_qkv, to.z, to.b, to.a];
    let mut written = Vec::with_capacity(host.len());
    for rows in &host {
        written.push(Staged::like(rows, gpu)?);
    }
    let from = Packed { mixed_qkvz: read[0].rows(gpu)?, mixed_ba: read[1].rows(gpu)? };
    let to = Unpacked {
        mixed_qkv: written[0].rows_mut(gpu)?,
        z: written[1].rows_mut(gpu)?,
        b: written[2].rows_mut(gpu)?,
        a: written[3].rows_mut(gpu)?,
    };
    // SAFETY: tensors of this device, made above for this call, on the stream that they were made and filled
    // on.
    unsafe { gpu.split_raw(layout, from, to, gpu.stream().cu_stream())? };
    written.iter().zip(&mut host).try_for_each(|(staged, rows)| staged.download(rows, gpu))
}

/// [`gdn::merge`](crate::merge()) by a GPU, for tensors in the memory of the host. Returns when they are
/// written.
///
/// # Errors
/// Those of [`split_host`].
pub fn merge_host(
    layout: &Layout,
    from: Unpacked<rows::Rows<'_>>,
    mut to: Packed<rows::RowsMut<'_>>,
    gpu: &Gpu,
) -> Result<(), CudaError> {
    let (packed, unpacked) = (to.as_ref().map(|rows| &rows.view), from.as_ref().map(|rows| &rows.view));
    Plan::new(layout, Direction::Merge, packed, unpacked)?;
    let host = [from.mixed_qkv, from.z, from.b, from.a];
    let mut read = Vec::with_capacity(host.len());
    for rows in host {
        read.push(Staged::of(rows, gpu)?);
    }
    let mut written = [Staged::like(&to.mixed_qkvz, gpu)?, Staged::like(&to.mixed_ba, gpu)?];
    let from = Unpacked {
        mixed_qkv: read[0].rows(gpu)?,
        z: read[1].rows(gpu)?,
        b: read[2].rows(gpu)?,
        a: read[3].rows(gpu)?,
    };
    let on_device = Packed { mixed_qkvz: written[0].rows_mut(gpu)?, mixed_ba: written[1].rows_mut(gpu)? };
    // SAFETY: as in `split_host`.
    unsafe { gpu.merge_raw(layout, from, on_device, gpu.stream().cu_stream())? };
    written[0].download(&mut to.mixed_qkvz, gpu)?;
    written[1].download(&mut to.mixed_ba, gpu)
}

/// The kernel to launch, its arguments and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) merge: bool,
    /// Whether `qkvz` moves 16 bytes at a time.
    pub(crate) wide: bool,
    pub(crate) args: Args,
    pub(crate) shape: Shape,
}

/// What of a device decides the grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Profile {
    pub(crate) multiprocessors: u32,
    /// Tests cut the rows into slices sooner than the driver makes them.
    pub(crate) most_blocks: u64,
    /// Tests and measurements choose by themselves.
    pub(crate) choice: Option<Choice>,
}

impl Profile {
    pub(crate) fn of(multiprocessors: u32) -> Self {
        Self { multiprocessors, most_blocks: MOST_BLOCKS - 1, choice: None }
    }
}

const WIDEST: usize = 16;
/// Threads of a multiprocessor, of all that the kernels run on within a third.
const RESIDENT: u64 = 2048;
const MOST_COLUMNS: usize = 1 << 29;

impl Job {
    /// The name of the kernel, in the table of them.
    fn kernel(&self) -> &'static str {
        match (self.merge, self.wide, self.shape.rows > 1) {
            (false, true, false) => "gdn_split_16x1",
            (false, true, true) => "gdn_split_16x2",
            (false, false, _) => "gdn_split_narrow",
            (true, true, false) => "gdn_merge_16x1",
            (true, true, true) => "gdn_merge_16x2",
            (true, false, _) => "gdn_merge_narrow",
        }
    }

    /// `None` for no rows: there is nothing to launch.
    ///
    /// # Errors
    /// [`CudaError::TooLarge`].
    pub(crate) fn new(plan: &Plan<'_, DeviceAddress>, profile: Profile) -> Result<Option<Self>, CudaError> {
        let num_rows = plan.num_rows();
        if num_rows == 0 {
            return Ok(None);
        }
        let maps = [plan.map(0), plan.map(1)];
        let words = [0, 1].map(|i| word_of(&maps[i], plan.packed(i), plan.unpacked(i), num_rows));
        let too_large = |i: usize| CudaError::TooLarge {
            argument: TENSORS[i],
            num_rows,
            row_bytes: plan.packed(i).geometry.row_bytes(),
            word: words[i],
        };
        let wide = words[0] == WIDEST;
        let qkvz = lower(&maps[0], plan.packed(0), plan.unpacked(0), words[0]).ok_or_else(|| too_large(0))?;
        let ba = lower(&maps[1], plan.packed(1), plan.unpacked(1), words[1]).ok_or_else(|| too_large(1))?;
        let ba_columns = Divisor::new(ba.columns).ok_or_else(|| too_large(1))?;
        let grid = Grid::new(num_rows as u64, qkvz.columns, ba.columns, wide, profile);
        let Grid { shape, slice_rows, blocks, tiles } = grid.ok_or_else(|| too_large(0))?;
        let args = Args {
            num_rows: num_rows as u64,
            slice_rows,
            blocks,
            tiles,
            qkvz_word: words[0] as u32,
            qkvz,
            ba,
            ba_columns,
            ba_word: words[1] as u32,
        };
        Ok(Some(Self { merge: plan.direction == Direction::Merge, wide, args, shape }))
    }
}

/// The most bytes, 16 at most, that divide every address, distance and length of a projection.
type OnDevice = View<DeviceAddress>;

fn word_of(map: &FeatureMap, packed: &OnDevice, unpacked: &[&OnDevice], num_rows: usize) -> usize {
    let mut all = WIDEST;
    for tensor in std::iter::once(&packed).chain(unpacked) {
        all |= tensor.address.0 as usize;
        if num_rows > 1 {
            all |= tensor.geometry.row_stride;
        }
    }
    for run in map.runs() {
        for features in [run.packed, map.packed_step(), in_tensor(map, run).1, run.len] {
            all |= features * packed.geometry.element_size;
        }
    }
    1 << all.trailing_zeros()
}

/// Which of the two unpacked tensors a run belongs to, and its first feature there.
fn in_tensor(map: &FeatureMap, run: &Run) -> (usize, usize) {
    let [first, second] = map.tensors();
    if run.unpacked < second.start {
        (0, run.unpacked - first.start)
    } else {
        (1, run.unpacked - second.start)
    }
}

/// Everything in words. `None` where there are too many.
fn lower<const PARTS: usize>(
    map: &FeatureMap,
    packed: &OnDevice,
    unpacked: &[&OnDevice],
    word: usize,
) -> Option<Projection<PARTS>> {
    let element_size = packed.geometry.element_size;
    let columns = packed.geometry.row_bytes() / word;
    if columns >= MOST_COLUMNS {
        return None;
    }
    // Fewer than 2^29, so that every number of words below fits.
    let words = |features: usize| (features * element_size / word) as u32;
    let tensor =
        |view: &OnDevice| Tensor { address: view.address.0, stride: view.geometry.row_stride as u64 };
    let mut parts = [Part::NONE; PARTS];
    let mut boundary = u32::MAX;
    for (part, run) in parts.iter_mut().zip(map.runs()) {
        let (second, start) = in_tensor(map, run);
        let first = words(run.packed);
        if second == 1 {
            boundary = boundary.min(first);
        }
        *part = Part { first, step: words(run.len), shift: words(start).wrapping_sub(first) };
    }
    Some(Projection {
        packed: tensor(packed),
        unpacked: [tensor(unpacked[0]), tensor(unpacked[1])],
        columns: columns as u32,
        unit: Divisor::new(columns as u32 / map.count() as u32)?,
        parts,
        second: boundary,
    })
}

/// Block numbers and the words of `ba` in a slice stay below this.
const MOST_BLOCKS: u64 = 1 << 31;

struct Grid {
    shape: Shape,
    slice_rows: u64,
    blocks: u32,
    tiles: Divisor,
}

impl Grid {
    /// `None` where there are more rows than slices can hold.
    fn new(num_rows: u64, columns: u32, ba_columns: u32, wide: bool, profile: Profile) -> Option<Self> {
        let Choice { rows, threads } = choose(num_rows, columns, wide, profile);
        let tiles = columns.div_ceil(threads);
        let (rows_64, tiles_64) = (u64::from(rows), u64::from(tiles));
        // A row takes `tiles / rows` blocks, and its `ba` at most one more.
        let most_rows = profile.most_blocks / u64::from(ba_columns).max(tiles_64 + 1);
        let slice_rows = most_rows.min(num_rows).next_multiple_of(rows_64);
        let slices = num_rows.div_ceil(slice_rows);
        let blocks = slice_rows / rows_64 * tiles_64;
        let ba_blocks = (slice_rows * u64::from(ba_columns)).div_ceil(u64::from(threads) * rows_64);
        if slices > 65_535 {
            return None;
        }
        // Below 2^31 by the choice of `most_rows`.
        let shape = Shape { blocks: [(blocks + ba_blocks) as u32, slices as u32], threads, rows };
        Some(Self { shape, slice_rows, blocks: blocks as u32, tiles: Divisor::new(tiles)? })
    }
}

/// How many rows a thread moves, and the threads of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) rows: u32,
    pub(crate) threads: u32,
}

/// By how often the device is filled. Measured: docs/gpu-kernels.md.
fn choose(num_rows: u64, columns: u32, wide: bool, profile: Profile) -> Choice {
    if let Some(choice) = profile.choice.filter(|_| wide) {
        return choice;
    }
    // The number of threads that leaves the fewest without a column; rows of few words take fewer. The device
    // starts a block every 1.2 ns, whatever its size: below 160 threads a row, that and not the memory would
    // be the limit.
    let idle = |threads: u32| columns.div_ceil(threads) * threads - columns;
    let threads = [192, 224, 256].into_iter().min_by_key(|threads| idle(*threads)).unwrap_or(192);
    let threads = threads.min(columns.next_multiple_of(32));
    let words = num_rows.saturating_mul(u64::from(columns));
    let resident = u64::from(profile.multiprocessors) * RESIDENT;
    let rows = match words {
        _ if !wide => 4,
        // Past what the device holds at a time, while all of it stays in its cache.
        words if words > resident && words <= 6 * resident => 2,
        words if words > resident / 4 && threads < 160 => 2,
        _ => 1,
    };
    Choice { rows, threads }
}
