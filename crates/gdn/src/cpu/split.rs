//! Split and merge on the CPU: the functions to call, and a checked plan, cut into chunks of rows for threads
//! and tiles of rows for their caches, as runs of byte copies.

use std::ops::Range;

use super::{
    Cpu,
    copy::{Copier, LINE, Lane},
};
use crate::{
    argument::ArgumentError,
    buf::{BufError, PackedBuf, UnpackedBuf},
    packing::{FeatureMap, Layout, Run},
    rows::{Rows, RowsMut},
    split::{Direction, Plan},
    tiling::{self, DeviceProfile, Tiling},
    view::{Packed, Unpacked, View},
};

/// Takes packed projections apart, into outputs the caller gives.
///
/// For each row, features move as [`Layout::qkvz_map`] and [`Layout::ba_map`] say; nothing is computed, so
/// elements are opaque and arrive bit for bit. Rows of any tensor may lie any distance apart and at any
/// alignment. Inputs may overlap one another; an output may overlap nothing. With outputs given and work for
/// one thread nothing is allocated.
///
/// ```
/// use gdn::{Cpu, Heads, Layout, Packed, Packing, Rows, RowsMut, Unpacked};
///
/// let layout = Layout::new(Heads::new(1, 2, 1, 2)?, Packing::Interleaved);
/// let qkvz: Vec<u16> = (0..10).collect();                 // q | k | v0 v0 v1 v1 | z0 z0 z1 z1
/// let ba: Vec<f32> = vec![0.1, 0.2, 0.3, 0.4];            // b0 b1 | a0 a1
/// let (mut qkv, mut z) = ([0u16; 6], [0u16; 4]);
/// let (mut b, mut a) = ([0f32; 2], [0f32; 2]);
/// gdn::split(
///     &layout,
///     Packed { mixed_qkvz: Rows::new(&qkvz, 1, 10)?, mixed_ba: Rows::new(&ba, 1, 4)? },
///     Unpacked {
///         mixed_qkv: RowsMut::new(&mut qkv, 1, 6)?,
///         z: RowsMut::new(&mut z, 1, 4)?,
///         b: RowsMut::new(&mut b, 1, 2)?,
///         a: RowsMut::new(&mut a, 1, 2)?,
///     },
///     &Cpu::new(),
/// )?;
/// assert_eq!((qkv, z), ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9]));
/// assert_eq!((b, a), ([0.1, 0.2], [0.3, 0.4]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`ArgumentError`], before anything is written.
pub fn split(
    layout: &Layout,
    from: Packed<Rows<'_>>,
    to: Unpacked<RowsMut<'_>>,
    cpu: &Cpu,
) -> Result<(), ArgumentError> {
    let (from, to) = (from.as_ref().map(|rows| &rows.view), to.as_ref().map(|rows| &rows.view));
    run(&Plan::new(layout, Direction::Split, from, to)?, cpu);
    Ok(())
}

/// Takes packed projections apart, into one fresh block of memory (see [`UnpackedBuf`]).
///
/// Outputs that are kept and used again with [`split()`] are faster: fresh memory costs a page fault for
/// every page.
///
/// # Errors
/// [`BufError`]: what is wrong with an argument, or that there is no memory.
pub fn split_fresh(layout: &Layout, from: Packed<Rows<'_>>, cpu: &Cpu) -> Result<UnpackedBuf, BufError> {
    let Packed { mixed_qkvz, mixed_ba } = from;
    let mut buf = UnpackedBuf::new(
        &layout.heads,
        mixed_qkvz.num_rows(),
        mixed_qkvz.element_size(),
        mixed_ba.element_size(),
    )?;
    split(layout, from, buf.as_mut(), cpu)?;
    Ok(buf)
}

/// Puts the four parts together again, into packed projections the caller gives: the exact inverse of
/// [`split()`].
///
/// # Errors
/// [`ArgumentError`], before anything is written.
pub fn merge(
    layout: &Layout,
    from: Unpacked<Rows<'_>>,
    to: Packed<RowsMut<'_>>,
    cpu: &Cpu,
) -> Result<(), ArgumentError> {
    let (from, to) = (from.as_ref().map(|rows| &rows.view), to.as_ref().map(|rows| &rows.view));
    run(&Plan::new(layout, Direction::Merge, to, from)?, cpu);
    Ok(())
}

/// Puts the four parts together again, into one fresh block of memory (see [`PackedBuf`]).
///
/// # Errors
/// [`BufError`]: what is wrong with an argument, or that there is no memory.
pub fn merge_fresh(layout: &Layout, from: Unpacked<Rows<'_>>, cpu: &Cpu) -> Result<PackedBuf, BufError> {
    let Unpacked { mixed_qkv, b, .. } = from;
    let mut buf =
        PackedBuf::new(&layout.heads, mixed_qkv.num_rows(), mixed_qkv.element_size(), b.element_size())?;
    merge(layout, from, buf.as_mut(), cpu)?;
    Ok(buf)
}

/// What a tile of rows, inputs and outputs together, may take of a core's second-level cache.
const TILE_BYTES: usize = 512 << 10;
/// The most rows of such a tile.
const CACHED_TILE_ROWS: usize = 64;
/// The rows after which a copy past the caches turns from `mixed_qkvz` to `mixed_ba`: the short rows of the
/// second are read best many at a time.
const STREAMED_TILE_ROWS: usize = 512;
/// The largest tile a caller can ask for.
const MAX_TILE_BYTES: usize = 64 << 20;
/// Bytes of the rows that are worth streaming: a row of a few lines has as many that are shared with its
/// neighbours as that are its own, and one that no cache holds would not stay on a stage.
const STREAMED_ROWS: std::ops::RangeInclusive<usize> = 8 * LINE..=4 << 20;

/// Does what was checked.
fn run(plan: &Plan<'_, *mut u8>, cpu: &Cpu) {
    let (num_rows, row_bytes) = (plan.num_rows(), plan.row_bytes());
    // No tensor fills more than the address space, but their sum might.
    let written = num_rows.saturating_mul(row_bytes);
    let threads = cpu.chosen_threads(written.saturating_mul(2));
    let mut work =
        Work { plan, copier: Copier::of(cpu.chosen_isa()), roads: [[Road::Cached; 2]; 2], rows_per_iter: 1 };
    let (mut buffer_bytes, mut max_rows_per_iter) = (TILE_BYTES, CACHED_TILE_ROWS);
    if cpu.chosen_streaming(written) {
        work.choose_roads();
        // What is only streamed leaves nothing in the cache that a tile would have to fit.
        if work.takes(Road::Streamed) && !work.takes(Road::Staged) {
            (buffer_bytes, max_rows_per_iter) = (MAX_TILE_BYTES, STREAMED_TILE_ROWS);
        }
    }
    let device = DeviceProfile { cores: threads, buffer_bytes, max_rows_per_iter };
    let tiling = match num_rows {
        1 => Tiling { grid: 1, rows_per_core: 1, rows_per_iter: 1 },
        _ => tiling::plan(num_rows, 2 * row_bytes, &device),
    };
    work.rows_per_iter = match cpu.rows_per_iter {
        Some(rows) => rows.get().min(MAX_TILE_BYTES / row_bytes).clamp(1, tiling.rows_per_core),
        None => tiling.rows_per_iter,
    };
    let work = &work;
    let chunk = |i: usize| {
        let rows = i * tiling.rows_per_core..((i + 1) * tiling.rows_per_core).min(num_rows);
        // SAFETY: chunks have no row in common.
        unsafe { work.do_rows(rows) }
    };
    // A call for one row is short enough for the way through `share` to be seen.
    match tiling.grid {
        1 => chunk(0),
        grid => cpu.share(grid, written.saturating_mul(2), chunk),
    }
}

/// How what is written gets to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Road {
    /// Ordinary stores.
    Cached,
    /// Streaming stores, straight from the source: every segment is made of whole lines.
    Streamed,
    /// Put together on a stage that stays in the cache, and streamed from there: a line that is streamed in
    /// parts would cost more than one that is not streamed at all.
    Staged,
}

/// Everything a thread needs to copy any of the rows. Small, and the rest made where it is needed: a call for
/// one row finds its inputs and outputs in the first-level cache if little else is there.
struct Work<'a> {
    plan: &'a Plan<'a, *mut u8>,
    copier: &'static Copier,
    /// For each projection, the road of its first and of its second written tensor.
    roads: [[Road; 2]; 2],
    rows_per_iter: usize,
}

// SAFETY: addresses of a plan's tensors. Only `do_rows` follows them, whose callers answer for how.
unsafe impl Sync for Work<'_> {}

impl Work<'_> {
    /// One run of a projection's map as a lane from row 0 of its source to row 0 of its target, and which
    /// target that is.
    #[inline(always)]
    fn lane(&self, projection: usize, map: &FeatureMap, run: &Run) -> (Lane, usize) {
        let (packed, unpacked) = (self.plan.packed(projection), self.plan.unpacked(projection));
        let size = packed.geometry.element_size;
        let second_start = map.tensors()[1].start;
        let second = usize::from(run.unpacked >= second_start);
        let len = run.len * size;
        let packed = (packed, run.packed * size, map.packed_step() * size);
        let unpacked = (unpacked[second], (run.unpacked - second * second_start) * size, len);
        let ((from, src_at, src_step), (to, dst_at, dst_step), target) = match self.plan.direction {
            Direction::Split => (packed, unpacked, second),
            Direction::Merge => (unpacked, packed, 0),
        };
        // With no rows the pointers may be anything and are never followed.
        let src = from.address.wrapping_add(src_at);
        let ahead = match self.plan.direction {
            Direction::Split => from.address.wrapping_add(run.unpacked * size),
            Direction::Merge => src,
        };
        let lane = Lane {
            src,
            dst: to.address.wrapping_add(dst_at),
            src_stride: from.geometry.row_stride,
            dst_stride: to.geometry.row_stride,
            src_step,
            dst_step,
            len,
            ahead,
            streamed: self.roads[projection][target] == Road::Streamed,
        };
        (lane, target)
    }

    /// Chooses a road past the caches for every tensor that is worth it.
    fn choose_roads(&mut self) {
        for projection in 0..2 {
            for target in 0..self.plan.written(projection).len() {
                let geometry = self.plan.written(projection)[target].geometry;
                if !STREAMED_ROWS.contains(&geometry.row_bytes()) {
                    continue;
                }
                let map = self.plan.map(projection);
                let lanes = map.runs().iter().map(|run| self.lane(projection, &map, run));
                let distances =
                    lanes.filter(|(_, of)| *of == target).fold(geometry.row_stride, |all, (lane, _)| {
                        all | lane.dst.addr() | lane.dst_step | lane.len
                    });
                let whole_lines = distances.is_multiple_of(LINE);
                self.roads[projection][target] = if whole_lines { Road::Streamed } else { Road::Staged };
            }
        }
    }

    /// Bytes of the stage of a tensor, 0 where it has none.
    fn stage_bytes(&self, projection: usize, target: usize) -> usize {
        match self.roads[projection][target] {
            Road::Staged => self.rows_per_iter * self.plan.written(projection)[target].geometry.row_bytes(),
            Road::Cached | Road::Streamed => 0,
        }
    }

    fn takes(&self, road: Road) -> bool {
        self.roads.iter().any(|roads| roads.contains(&road))
    }

    /// Bytes of memory for stages. Those of one projection are used at a time.
    fn stages_bytes(&self) -> usize {
        (0..2).map(|p| self.stage_bytes(p, 0) + self.stage_bytes(p, 1)).max().unwrap_or(0)
    }

    /// Copies some of the rows, tile by tile, projection by projection.
    ///
    /// # Safety
    /// No two calls at a time have a row in common.
    #[inline(always)]
    unsafe fn do_rows(&self, rows: Range<usize>) {
        let mut stage = if self.takes(Road::Staged) { vec![0u8; self.stages_bytes()] } else { Vec::new() };
        let mut start = rows.start;
        while start < rows.end {
            let tile = start..(start + self.rows_per_iter).min(rows.end);
            for projection in 0..2 {
                // SAFETY: the caller's promise; the stage is as long as it must be.
                unsafe {
                    self.do_tile(projection, &tile, stage.as_mut_ptr());
                    if !stage.is_empty() {
                        self.stream_stages(projection, &tile, stage.as_ptr());
                    }
                }
            }
            start = tile.end;
        }
        (self.copier.fence)();
    }

    /// # Safety
    /// No two calls at a time have a row in common. `stage` has room for the stages of the projection.
    #[inline(always)]
    unsafe fn do_tile(&self, projection: usize, tile: &Range<usize>, stage: *mut u8) {
        let map = self.plan.map(projection);
        let mut lanes = [Lane::NONE; 4];
        for (slot, run) in lanes.iter_mut().zip(map.runs()) {
            let (mut lane, target) = self.lane(projection, &map, run);
            lane.src = lane.src.wrapping_add(tile.start * lane.src_stride);
            lane.ahead = lane.ahead.wrapping_add(tile.start * lane.src_stride);
            if self.roads[projection][target] == Road::Staged {
                let View { address, geometry } = self.plan.written(projection)[target];
                let offset = lane.dst.addr() - address.addr() + target * self.stage_bytes(projection, 0);
                (lane.dst, lane.dst_stride) = (stage.wrapping_add(offset), geometry.row_bytes());
            } else {
                lane.dst = lane.dst.wrapping_add(tile.start * lane.dst_stride);
            }
            *slot = lane;
        }
        let cached = self.roads[projection] == [Road::Cached; 2];
        let (lanes, count) = (&lanes[..map.runs().len()], map.count());
        // SAFETY: the plan was checked: the tile's rows are there in every tensor, each lane lies within its
        // rows on both sides, and what is written overlaps nothing. A stage has room for a tile of rows.
        unsafe {
            match cached {
                true => (self.copier.copy_cached)(lanes, count, tile.len()),
                false => self.copier.copy_past(lanes, count, tile.len()),
            }
        }
    }

    /// # Safety
    /// As [`Work::do_tile`], which put a tile on the stages.
    #[inline(never)]
    unsafe fn stream_stages(&self, projection: usize, tile: &Range<usize>, stage: *const u8) {
        for (target, View { address, geometry }) in self.plan.written(projection).iter().enumerate() {
            if self.roads[projection][target] != Road::Staged {
                continue;
            }
            let row_bytes = geometry.row_bytes();
            // Dense rows are one stretch of lines, others are streamed one by one.
            let (rows, bytes) = match geometry.row_stride == row_bytes {
                true => (1, tile.len() * row_bytes),
                false => (tile.len(), row_bytes),
            };
            for k in 0..rows {
                // SAFETY: rows of the tile, on the stage and in the tensor.
                unsafe {
                    let src = stage.add(target * self.stage_bytes(projection, 0) + k * row_bytes);
                    let dst = address.add((tile.start + k) * geometry.row_stride);
                    (self.copier.stream)(src, dst, bytes);
                }
            }
        }
    }
}
