//! [`Job`]: a checked plan as byte copies, the same for split and merge.

use crate::{
    packing::Run,
    split::{Direction, Operand, Plan, Projection},
};

/// Bytes of a cache line, the unit of streaming stores.
pub(super) const LINE: usize = 64;

/// How what is written gets to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Road {
    /// Ordinary stores.
    Cached,
    /// Streaming stores, straight from the source: every segment is made of whole lines.
    Streamed,
    /// Put together in a stage that stays in the cache, and streamed from there: a line that is streamed in parts would cost
    /// more than one that is not streamed at all.
    Staged,
}

/// A tensor that is written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) ptr: *mut u8,
    pub(super) row_stride: usize,
    pub(super) row_bytes: usize,
    road: Road,
}

impl Target {
    pub(super) fn streamed(&self) -> bool {
        self.road == Road::Streamed
    }
}

/// The segments of one kind: segment `i` of a row goes from `src + i * src_step` to `offset + i * dst_step` of the target's row.
/// All in bytes; `src` is that of row 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segments {
    pub(super) src: *const u8,
    pub(super) src_stride: usize,
    pub(super) src_step: usize,
    pub(super) target: usize,
    pub(super) offset: usize,
    pub(super) dst_step: usize,
    pub(super) len: usize,
}

/// The copies of one projection, in the order of the packed row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    copies: [Segments; 4],
    used: usize,
    /// Segments of each copy.
    pub(super) count: usize,
}

impl Group {
    pub(super) fn copies(&self) -> &[Segments] {
        &self.copies[..self.used]
    }

    /// Bytes of the longest segment.
    pub(super) fn longest(&self) -> usize {
        self.copies().iter().map(|copy| copy.len).max().unwrap_or(0)
    }
}

/// Everything a thread needs to copy any of the rows.
///
/// Every `src` and `ptr` is that of a tensor of `num_rows` rows that the caller of the op vouched for, and every segment
/// lies within its row on both sides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) groups: [Group; 2],
    targets: [Target; 4],
    used: usize,
    pub(super) rows_per_iter: usize,
}

// SAFETY: a job is a list of addresses. Only `copy_rows` follows them, whose callers answer for how.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

/// Where a staged target's tile begins.
#[derive(Clone, Copy)]
pub(super) struct Stage(pub(super) *mut u8);

impl Job {
    /// `stream` says whether targets are to be streamed, those whose rows are worth it.
    pub(super) fn new(plan: &Plan, rows_per_iter: usize, stream: bool) -> Self {
        let mut targets: [Option<Target>; 4] = [None; 4];
        let mut used = 0;
        let mut groups = plan.projections.each_ref().map(|projection| {
            let written: &[Operand] = match plan.direction {
                Direction::Split => &projection.unpacked,
                Direction::Merge => std::slice::from_ref(&projection.packed),
            };
            let first = used;
            for operand in written {
                targets[used] = Some(Target::new(operand, stream));
                used += 1;
            }
            Group::new(projection, plan.direction, first)
        });
        let mut targets = targets.map(|target| target.unwrap_or(Target::NONE));
        for copy in groups.iter_mut().flat_map(|group| &mut group.copies[..group.used]) {
            let target = &mut targets[copy.target];
            let lines = [target.ptr.addr(), target.row_stride, copy.offset, copy.dst_step, copy.len];
            if target.road == Road::Streamed && lines.iter().any(|bytes| bytes % LINE != 0) {
                target.road = Road::Staged;
            }
        }
        Self { groups, targets, used, rows_per_iter }
    }

    pub(super) fn targets(&self) -> &[Target] {
        &self.targets[..self.used]
    }

    /// Bytes that the stages of one thread take.
    pub(super) fn stage_bytes(&self) -> usize {
        (0..self.used).map(|i| self.stage_bytes_of(i)).sum()
    }

    fn stage_bytes_of(&self, target: usize) -> usize {
        match self.targets[target].road {
            Road::Staged => (self.rows_per_iter * self.targets[target].row_bytes).next_multiple_of(LINE),
            Road::Cached | Road::Streamed => 0,
        }
    }

    /// The stages of a thread within its `stage_bytes` of memory, `None` for a target that has none.
    pub(super) fn stages(&self, memory: &mut [u8]) -> [Option<Stage>; 4] {
        let mut rest = memory;
        std::array::from_fn(|i| {
            let bytes = if i < self.used { self.stage_bytes_of(i) } else { 0 };
            let (stage, tail) = std::mem::take(&mut rest).split_at_mut(bytes);
            rest = tail;
            (bytes > 0).then_some(Stage(stage.as_mut_ptr()))
        })
    }
}

impl Target {
    const NONE: Self = Self { ptr: std::ptr::null_mut(), row_stride: 0, row_bytes: 0, road: Road::Cached };

    fn new(operand: &Operand, stream: bool) -> Self {
        let row_bytes = operand.geometry.row_bytes;
        // A row of a few lines has as many that are shared with its neighbours as that are its own.
        let road = if stream && row_bytes >= 8 * LINE { Road::Streamed } else { Road::Cached };
        Self { ptr: operand.ptr, row_stride: operand.geometry.row_stride, row_bytes, road }
    }
}

impl Group {
    /// `first` is the target that the projection's first written tensor is.
    fn new(projection: &Projection, direction: Direction, first: usize) -> Self {
        let Projection { map, packed, unpacked } = projection;
        let size = packed.geometry.element_size;
        let copy = |run: &Run| {
            let second = usize::from(run.unpacked >= map.tensors()[1].start);
            let unpacked_offset = (run.unpacked - map.tensors()[second].start) * size;
            let (packed_offset, packed_step) = (run.packed * size, run.packed_step * size);
            let (unpacked, unpacked_step) = (unpacked[second], run.unpacked_step * size);
            let (from, src_offset, src_step, target, offset, dst_step) = match direction {
                Direction::Split => {
                    (packed, packed_offset, packed_step, first + second, unpacked_offset, unpacked_step)
                }
                Direction::Merge => {
                    (&unpacked, unpacked_offset, unpacked_step, first, packed_offset, packed_step)
                }
            };
            // With no rows the pointer may be anything and is never followed.
            let src = from.ptr.wrapping_add(src_offset).cast_const();
            let src_stride = from.geometry.row_stride;
            Segments { src, src_stride, src_step, target, offset, dst_step, len: run.len * size }
        };
        let none = Segments {
            src: std::ptr::null(),
            src_stride: 0,
            src_step: 0,
            target: 0,
            offset: 0,
            dst_step: 0,
            len: 0,
        };
        let mut copies = [none; 4];
        for (slot, run) in copies.iter_mut().zip(map.runs()) {
            *slot = copy(run);
        }
        Self { copies, used: map.runs().len(), count: map.runs().first().map_or(0, |run| run.count) }
    }
}
