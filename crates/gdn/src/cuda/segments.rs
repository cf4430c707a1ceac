//! Which sequences of a prefill are cut into segments, and what is launched for that. By the layer's heads and
//! a sequence's chunks alone, so that its bits depend on nothing else.

use gdn_kernels::{
    prefill::args::{
        COMBINE_BYTES, COMBINE_COLUMNS, COMBINE_ROWS, COMBINE_THREADS, Segments, TRANSITION_THREADS,
        TransitionGroupRoom, TransitionRoom, WARP_ROWS,
    },
    split::Divisor,
};

use crate::layer::Layer;

/// How a sequence is cut: one of `from` chunks or more into `most` segments, which have from `shortest` to
/// `longest` chunks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub(crate) from: u32,
    pub(crate) most: u32,
    pub(crate) shortest: u32,
    pub(crate) longest: u32,
}

/// Whether sequences are cut.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cutting {
    Never,
    /// As is fastest for the layer.
    ByHeads,
    #[cfg(test)]
    As(Cut),
}

/// Blocks of 64 rows of S that a large device has at work at a time. Not those of the device at hand: on
/// others too a layer's bits are the same.
const BLOCKS: usize = 128;

/// A segment's transition costs as much as its scan, and where there are more heads other windows' kernels run
/// beside the scan. With four segments side by side (heads 8/16 of 128) one sequence of 2048 to 16384 tokens gained 7
/// to 10 %, one of 32768 lost 4.
const FEWEST: u32 = 8;

impl Cutting {
    /// What is done with a layer.
    fn of(self, layer: &Layer) -> Option<Cut> {
        let heads = layer.heads();
        match self {
            Self::Never => None,
            _ if heads.head_k_dim() > COMBINE_COLUMNS as usize => None,
            #[cfg(test)]
            Self::As(cut) => Some(cut),
            Self::ByHeads => {
                let blocks = heads.num_v_heads().saturating_mul(heads.head_v_dim()).div_ceil(64);
                let most = (BLOCKS / blocks.max(1)).min(32) as u32;
                (most >= FEWEST).then_some(Cut { from: 32, most, shortest: 4, longest: 64 })
            }
        }
    }

    /// The cut of a call with so many chunks; `None` where no sequence is long enough. Where their states are
    /// is not said yet.
    pub(crate) fn segments(self, layer: &Layer, chunks: usize) -> Option<Segments> {
        let Cut { from, most, shortest, longest } = self.of(layer)?;
        let heads = layer.heads();
        let rows = (TRANSITION_THREADS / 32 * WARP_ROWS) as usize;
        let divisor = |number: usize| u32::try_from(number).ok().and_then(Divisor::new);
        let slices = heads.head_v_dim().div_ceil(rows) + heads.head_k_dim().div_ceil(rows);
        if chunks < from as usize {
            return None;
        }
        Some(Segments {
            is_cut: 1,
            from,
            most: divisor(most as usize)?,
            shortest: divisor(shortest as usize)?,
            longest,
            slices: divisor(slices)?,
            row_blocks: divisor(heads.head_v_dim() / COMBINE_ROWS as usize)?,
            ..Segments::NONE
        })
    }
}

/// Those segments with their states, from an address on, for windows of so many chunks.
pub(crate) fn placed(segments: Segments, layer: &Layer, at: u64, window: usize) -> Segments {
    let heads = layer.heads();
    let [hv, dk, dv] = [heads.num_v_heads(), heads.head_k_dim(), heads.head_v_dim()].map(|n| n as u64);
    segments.at(at, window as u64, hv, dk, dv)
}

/// The sequences and segments of `num_sequences` sequences with so many chunks that blocks of the scan are for, in
/// windows of some chunks.
pub(crate) fn groups(segments: &Segments, num_sequences: usize, chunks: usize, window: usize) -> usize {
    if segments.is_cut == 0 {
        return num_sequences;
    }
    let shortest = segments.shortest.get() as usize;
    if num_sequences > 1 {
        return num_sequences + window.div_ceil(shortest);
    }
    // However few of the chunks it has: one that goes on from the window before, and one that goes on behind.
    let most = (segments.most.get() as usize).max(chunks.div_ceil(segments.longest as usize));
    most.min(window / shortest + 2)
}

/// A launch that makes what the segments of a window begin with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) kernel: &'static str,
    pub(crate) blocks: u32,
    pub(crate) threads: u32,
    pub(crate) shared: u32,
}

/// Both of them, for as many sequences and windows as in [`groups`], and how many chunks a block has in shared
/// memory, of which the device has `shared` bytes. `by_group` says whether four warps multiply together (`wgmma`):
/// that is faster, with the same bits. `None` for more blocks than a grid can have.
pub(crate) fn grids(
    segments: &mut Segments,
    layer: &Layer,
    [num_sequences, chunks, window]: [usize; 3],
    shared: u32,
    by_group: bool,
) -> Option<[Grid; 2]> {
    let heads = layer.heads();
    let dk = heads.head_k_dim() as u32;
    let room = TransitionRoom::new(dk).bytes;
    segments.stages = if 3 * room <= shared { 3 } else { 2 };
    let of_group = TransitionGroupRoom::new(dk).bytes;
    let by_group = by_group && of_group <= shared;
    let kernel = match (dk, by_group) {
        (64, false) => "gdn_prefill_transition_64",
        (96, false) => "gdn_prefill_transition_96",
        (_, false) => "gdn_prefill_transition_128",
        (64, true) => "gdn_prefill_transition_group_64",
        (96, true) => "gdn_prefill_transition_group_96",
        (_, true) => "gdn_prefill_transition_group_128",
    };
    let count = |number: u64, of_one: u32| {
        let blocks = number.checked_mul(heads.num_v_heads() as u64)?.checked_mul(u64::from(of_one))?;
        u32::try_from(blocks).ok().filter(|blocks| *blocks < 1 << 31)
    };
    let numbers = match num_sequences {
        1 => [groups(segments, 1, chunks, window) as u64, 1],
        _ => [segments.places(window as u64), segments.sequences(window as u64)],
    };
    Some([
        Grid {
            kernel,
            blocks: count(numbers[0], segments.slices.get())?,
            threads: TRANSITION_THREADS,
            shared: if by_group { of_group } else { segments.stages * room },
        },
        Grid {
            kernel: "gdn_prefill_combine",
            blocks: count(numbers[1], segments.row_blocks.get())?,
            threads: COMBINE_THREADS,
            shared: COMBINE_BYTES,
        },
    ])
}
