//! A checked plan as the kernel's arguments and its grid. Pure: nothing here needs a driver.

use gdn_kernels::split::{Args, Divisor, Part, Projection, Shape, Tensor};

use super::CudaError;
use crate::{
    FeatureMap, Run,
    rows::Operand,
    split::{Direction, Plan},
};

/// The kernel to launch, its arguments and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) merge: bool,
    /// Whether `qkvz` moves 16 bytes at a time.
    pub(super) wide: bool,
    pub(super) args: Args,
    pub(super) shape: Shape,
}

/// What of a device decides the grid.
#[derive(Clone, Copy, Debug)]
pub(super) struct Profile {
    pub(super) multiprocessors: u32,
    /// Tests cut the rows into slices sooner than the driver makes them.
    pub(super) most_blocks: u64,
    /// Tests and measurements choose by themselves.
    pub(super) choice: Option<Choice>,
}

impl Profile {
    pub(super) fn of(multiprocessors: u32) -> Self {
        Self { multiprocessors, most_blocks: MOST_BLOCKS - 1, choice: None }
    }
}

const WIDEST: usize = 16;
/// Threads of a multiprocessor, of all that the kernels run on within a third.
const RESIDENT: u64 = 2048;
const MOST_COLUMNS: usize = 1 << 29;

impl Job {
    /// `None` for no rows: there is nothing to launch.
    ///
    /// # Errors
    /// [`CudaError::TooLarge`].
    pub(super) fn new(plan: &Plan, profile: Profile) -> Result<Option<Self>, CudaError> {
        let num_rows = plan.num_rows();
        if num_rows == 0 {
            return Ok(None);
        }
        let maps = [plan.map(0), plan.map(1)];
        let words = [0, 1].map(|i| word_of(&maps[i], plan.tensors(i), num_rows));
        let too_large = |i: usize| CudaError::TooLarge {
            argument: ["mixed_qkvz", "mixed_ba"][i],
            num_rows,
            row_bytes: plan.tensors(i)[0].geometry.row_bytes(),
            word: words[i],
        };
        let wide = words[0] == WIDEST;
        let qkvz = lower(&maps[0], plan.tensors(0), words[0]).ok_or_else(|| too_large(0))?;
        let ba = lower(&maps[1], plan.tensors(1), words[1]).ok_or_else(|| too_large(1))?;
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
fn word_of(map: &FeatureMap, tensors: &[&Operand], num_rows: usize) -> usize {
    let mut all = WIDEST;
    for tensor in tensors {
        all |= tensor.ptr.addr();
        if num_rows > 1 {
            all |= tensor.geometry.row_stride;
        }
    }
    for run in map.runs() {
        for features in [run.packed, map.packed_step(), in_tensor(map, run).1, run.len] {
            all |= features * tensors[0].geometry.element_size;
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
    tensors: &[&Operand],
    word: usize,
) -> Option<Projection<PARTS>> {
    let element_size = tensors[0].geometry.element_size;
    let columns = tensors[0].geometry.row_bytes() / word;
    if columns >= MOST_COLUMNS {
        return None;
    }
    // Fewer than 2^29, so that every number of words below fits.
    let words = |features: usize| (features * element_size / word) as u32;
    let tensor = |i: usize| Tensor {
        address: tensors[i].ptr.addr() as u64,
        stride: tensors[i].geometry.row_stride as u64,
    };
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
        packed: tensor(0),
        unpacked: [tensor(1), tensor(2)],
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
pub(super) struct Choice {
    pub(super) rows: u32,
    pub(super) threads: u32,
}

/// By how often the device is filled. Measured: docs/gpu-kernels.md.
fn choose(num_rows: u64, columns: u32, wide: bool, profile: Profile) -> Choice {
    if let Some(choice) = profile.choice.filter(|_| wide) {
        return choice;
    }
    // The number of threads that leaves the fewest without a column; rows of few words take fewer. The device starts a block every
    // 1.2 ns, whatever its size: below 160 threads a row, that and not the memory would be the limit.
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
