//! How a decode's work is shared out among blocks and warps, and by which kernel it is done.

use gdn_kernels::{
    decode::{WARP_ROWS, args::Room},
    modules::{DECODE_SHARED, Target, decode_warps},
};

use super::device::Gpu;

/// What of a device decides the grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Profile {
    pub(crate) multiprocessors: u32,
    /// The most blocks of a cluster.
    pub(crate) most_cluster: u32,
    /// The most warps of a block.
    pub(crate) most_warps: u32,
    /// The most bytes of shared memory of a block.
    pub(crate) most_shared: u32,
    /// Tests and measurements choose for themselves: the blocks of a cluster,
    pub(crate) cluster: Option<u32>,
    /// the pieces of a warp,
    pub(crate) steps: Option<u32>,
    /// and whether v heads are computed one after the other.
    pub(crate) one_by_one: bool,
}

impl Profile {
    /// The least that a device has on which the kernels run.
    pub(crate) const LEAST: Self = Self {
        multiprocessors: 1,
        most_cluster: 1,
        most_warps: decode_warps(Target::Sm80),
        most_shared: 99 << 10,
        cluster: None,
        steps: None,
        one_by_one: false,
    };

    pub(crate) fn of(gpu: &Gpu) -> Self {
        let info = gpu.info();
        let has_clusters = info.compute_capability >= (9, 0);
        Self {
            multiprocessors: info.multiprocessors,
            most_cluster: if has_clusters { 8 } else { 1 },
            most_warps: decode_warps(if has_clusters { Target::Sm90 } else { Target::Sm80 }),
            most_shared: info.shared_bytes_per_block.min(DECODE_SHARED),
            cluster: None,
            steps: None,
            one_by_one: false,
        }
    }
}

/// Warps that a multiprocessor is given at a time, where each could have fewer rows.
const RESIDENT_WARPS: u32 = 24;

/// A kernel, and how it holds rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub(super) name: &'static str,
    /// Columns of a row, at most.
    pub(super) columns: u32,
    /// Rows of a piece.
    piece_rows: u32,
    /// Bytes of shared memory in which the pieces of a warp land: 0 for rows of any strides.
    landing: u32,
}

const fn choice(name: &'static str, columns: u32, piece_rows: u32, landing: u32) -> Choice {
    Choice { name, columns, piece_rows, landing }
}

/// For states of f32, f16 and bf16: by the columns of a row, and the one for rows of any strides.
pub(super) const CHOICES: [[Choice; 4]; 3] = [
    [
        choice("gdn_decode_f32_64", 64, 8, 4096),
        choice("gdn_decode_f32_128", 128, 8, 8192),
        choice("gdn_decode_f32_256", 256, 4, 8192),
        choice("gdn_decode_f32_narrow", 256, 4, 0),
    ],
    [
        choice("gdn_decode_f16_64", 64, 8, 2048),
        choice("gdn_decode_f16_128", 128, 8, 4096),
        choice("gdn_decode_f16_256", 256, 4, 4096),
        choice("gdn_decode_f16_narrow", 256, 4, 0),
    ],
    [
        choice("gdn_decode_bf16_64", 64, 8, 2048),
        choice("gdn_decode_bf16_128", 128, 8, 4096),
        choice("gdn_decode_bf16_256", 256, 4, 4096),
        choice("gdn_decode_bf16_narrow", 256, 4, 0),
    ],
];

/// How the rows of a key head's states are shared out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    /// Blocks of a cluster, and v heads of a block.
    pub(super) cluster: u32,
    pub(super) block_heads: u32,
    /// v heads of a block at a time.
    pub(super) pass_heads: u32,
    /// Pieces of a warp, and warps of a v head.
    pub(super) steps: u32,
    pub(super) head_warps: u32,
    /// Warps of a block.
    pub(super) warps: u32,
    /// Bytes of shared memory of a block.
    pub(super) shared: u32,
}

/// What is to be shared out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    /// Key heads of all sequences.
    pub(super) groups: u32,
    /// v heads of each, and their rows.
    pub(super) ratio: u32,
    pub(super) dv: u32,
    pub(super) dk: u32,
    pub(super) tokens: u32,
}

impl Share {
    /// `None` where a block has no room for what it computes. Whether there is one does not depend on how many key heads
    /// there are, since kernels differ in their bits.
    pub(super) fn new(choice: &Choice, work: &Work, profile: &Profile) -> Option<Self> {
        if choice.landing == 0 {
            return Self::in_passes(choice, work, profile);
        }
        // In as few warps as can be.
        let most_steps = WARP_ROWS / choice.piece_rows;
        let last = Self::of(choice, work, profile, 1, most_steps)
            .or_else(|| (2..=work.ratio).find_map(|cluster| Self::of(choice, work, profile, cluster, 1)))?;
        if let (Some(cluster), Some(steps)) = (profile.cluster, profile.steps) {
            return Self::of(choice, work, profile, cluster, steps).or(Some(last));
        }
        // As few pieces a warp, and v heads a block, as leave the device not too much to do at a time.
        let mut best = last;
        let mut most = 0;
        for cluster in 1..=work.ratio {
            for steps in (0..=most_steps.ilog2()).map(|log| 1 << log) {
                let Some(share) = Self::of(choice, work, profile, cluster, steps) else { continue };
                let blocks = u64::from(work.groups) * u64::from(cluster);
                let warps = blocks * u64::from(share.warps);
                let fits = blocks <= u64::from(profile.multiprocessors)
                    && warps <= u64::from(profile.multiprocessors * RESIDENT_WARPS);
                if fits && warps > most {
                    (best, most) = (share, warps);
                }
            }
        }
        Some(best)
    }

    /// So many blocks a cluster, pieces a warp, and all v heads at once.
    fn of(choice: &Choice, work: &Work, profile: &Profile, cluster: u32, steps: u32) -> Option<Self> {
        let steps = steps.min(WARP_ROWS / choice.piece_rows);
        let pieces = work.dv.div_ceil(choice.piece_rows);
        let (head_warps, block_heads) = (pieces.div_ceil(steps), work.ratio.div_ceil(cluster));
        let warps = block_heads * head_warps;
        let all = warps * steps;
        let shared = Room::new(work.tokens, choice.columns, warps, all, choice.landing, cluster).bytes;
        let is_there = cluster == 1
            || cluster <= profile.most_cluster
                && work.ratio.is_multiple_of(cluster)
                && warps * 32 >= 2 * work.dk;
        let has_room =
            warps <= if choice.landing > 0 { profile.most_warps } else { 8 } && shared <= profile.most_shared;
        let share = Self { cluster, block_heads, pass_heads: block_heads, steps, head_warps, warps, shared };
        (is_there && has_room).then_some(share)
    }

    /// One block a key head, with v heads as many at a time as have room.
    fn in_passes(choice: &Choice, work: &Work, profile: &Profile) -> Option<Self> {
        let most_steps = WARP_ROWS / choice.piece_rows;
        let steps = profile.steps.unwrap_or(most_steps).min(most_steps);
        let mut heads = if profile.one_by_one { 1 } else { work.ratio };
        loop {
            let work = Work { ratio: heads, ..*work };
            let share = Self::of(choice, &work, profile, 1, steps)
                .or_else(|| Self::of(choice, &work, profile, 1, most_steps));
            if share.is_some() || heads == 1 {
                return share;
            }
            heads = heads.div_ceil(2);
        }
    }
}
