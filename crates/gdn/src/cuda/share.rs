//! How a decode's work is shared out among blocks and warps, and by which kernel it is done.

use std::ops::RangeInclusive;

use gdn_kernels::{
    decode::{
        NARROW, PLAIN, PLAIN_TOKENS, WARP_ROWS, WIDE,
        args::{BF16, F16, Room, RoomFor},
        bulk_landing, few,
    },
    modules::{DECODE_SHARED, Target, decode_large_warps, decode_warps},
};

use super::device::Gpu;

/// What of a device decides the grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Profile {
    pub(crate) multiprocessors: u32,
    /// The most blocks of a cluster.
    pub(crate) most_cluster: u32,
    /// What kernels are compiled for.
    pub(crate) target: Target,
    /// The most bytes of shared memory of a block.
    pub(crate) most_shared: u32,
    /// Tests and measurements choose for themselves: the blocks of a cluster,
    pub(crate) cluster: Option<u32>,
    /// the pieces of a warp,
    pub(crate) steps: Option<u32>,
    /// whether v heads are computed one after the other,
    pub(crate) one_by_one: bool,
    /// and whether pieces are larger where there are several tokens, which is else so where there is enough to do for
    /// all.
    pub(crate) large_pieces: Option<bool>,
    /// Whether the kernel for few blocks is taken wherever it can be; else it is where it is known to be the best.
    pub(crate) few: Option<bool>,
}

impl Profile {
    /// The least that a device has on which the kernels run.
    pub(crate) const LEAST: Self = Self {
        multiprocessors: 1,
        most_cluster: 1,
        target: Target::Sm80,
        most_shared: 99 << 10,
        cluster: None,
        steps: None,
        one_by_one: false,
        large_pieces: None,
        few: None,
    };

    pub(crate) fn of(gpu: &Gpu) -> Self {
        let info = gpu.info();
        let has_clusters = info.compute_capability >= (9, 0);
        Self {
            multiprocessors: info.multiprocessors,
            most_cluster: if has_clusters { 8 } else { 1 },
            target: if has_clusters { Target::Sm90 } else { Target::Sm80 },
            most_shared: info.shared_bytes_per_block.min(DECODE_SHARED),
            cluster: None,
            steps: None,
            one_by_one: false,
            large_pieces: None,
            few: None,
        }
    }
}

/// Warps that a multiprocessor is given at a time, where each could have fewer rows.
const RESIDENT_WARPS: u64 = 24;

/// Rows of a warp where there is enough to do for all. With twice as many, fewer warps do what each does
/// once: worth it where that is much beside the bytes, and blocks are many; and where the block is too large
/// for two on a multiprocessor.
const FULL_ROWS: u32 = 32;

/// Blocks that are many, for each multiprocessor.
const MANY_BLOCKS: u32 = 6;

/// Those that are so many that it hardly matters how the last of them fill the device.
const VERY_MANY_BLOCKS: u32 = 24;

/// Warps of a block, at most, of which a multiprocessor has two.
const HALF_WARPS: u32 = 8;

/// A kernel, and how it holds rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub(super) name: &'static str,
    kind: u32,
    /// Columns of a row: at most so many, or for plain kernels as many.
    pub(super) columns: u32,
    /// Rows of a piece.
    piece_rows: u32,
    /// Rows of which squares are added up by themselves.
    sum_rows: u32,
    /// Bytes of shared memory in which the pieces of a warp land: 0 for rows of any strides.
    landing: u32,
    /// Rows of a block, for the kernels for few blocks; 0 for all others.
    block_rows: u32,
}

/// Of rows of f32, or of 16 bits as if they were, with two stages of a piece.
const fn wide(kind: u32, name: &'static str, columns: u32, bytes: u32) -> Choice {
    let piece_rows = if columns > 128 { 4 } else { 8 };
    let landing = 2 * piece_rows * columns * bytes;
    Choice { name, kind, columns, piece_rows, sum_rows: piece_rows, landing, block_rows: 0 }
}

const fn narrow(name: &'static str) -> Choice {
    Choice { name, kind: NARROW, columns: 256, piece_rows: 2, sum_rows: 2, landing: 0, block_rows: 0 }
}

/// Of several tokens with rows of bf16, and the same with larger pieces: fewer instructions a row, and fewer warps.
/// They have the same bits.
const SMALL: Choice = wide(PLAIN_TOKENS, "gdn_decode_bf16_128_tokens", 128, 2);
const LARGE: Choice =
    Choice { name: "gdn_decode_bf16_128_tokens_large", piece_rows: 16, landing: 2 * SMALL.landing, ..SMALL };

/// For few blocks of so many rows of a v head, in pieces of so many, with the bits of those for plain calls.
const fn few(name: &'static str, [rows, piece_rows]: [u32; 2], bytes: u32) -> Choice {
    let pieces = rows / few::ROW_WARPS / piece_rows;
    let landing = bulk_landing(pieces, piece_rows * few::HEAD * bytes);
    Choice { block_rows: rows, piece_rows, landing, ..wide(PLAIN, name, few::HEAD, bytes) }
}

/// Numbers of blocks, in tenths of the multiprocessors.
type Tenths = [RangeInclusive<u64>];

/// With states of f32, and of bf16, and for each how many blocks there may be: few, or somewhat more than four for each
/// multiprocessor, where the time of the other kernels jumps.
const FEWS: [&[(Choice, &Tenths)]; 2] = [
    &[
        (few("gdn_decode_f32_few_32", [32, 8], 4), &[0..=5]),
        (few("gdn_decode_f32_few_64", [64, 16], 4), &[0..=15]),
        // Its rows do not come by bulk copies: all of them on their way at once are slower.
        (
            Choice { block_rows: 128, ..wide(PLAIN, "gdn_decode_f32_few_128", few::HEAD, 4) },
            &[0..=20, 40..=55],
        ),
    ],
    // States of bf16 are faster to move, so what each block does once weighs more.
    &[
        (few("gdn_decode_bf16_few_32", [32, 8], 2), &[0..=3]),
        (few("gdn_decode_bf16_few_64", [64, 16], 2), &[0..=15]),
        (few("gdn_decode_bf16_few_128", [128, 16], 2), &[0..=17, 40..=51]),
    ],
];

/// For states of f32, f16 and bf16: those for plain calls, those by the columns of a row, and the one for
/// rows of any strides.
const PLAINS: [&[Choice]; 3] = [
    &[
        wide(PLAIN, "gdn_decode_f32_64_plain", 64, 4),
        wide(PLAIN, "gdn_decode_f32_96_plain", 96, 4),
        wide(PLAIN, "gdn_decode_f32_128_plain", 128, 4),
        wide(PLAIN, "gdn_decode_f32_256_plain", 256, 4),
        wide(PLAIN_TOKENS, "gdn_decode_f32_64_tokens", 64, 4),
        wide(PLAIN_TOKENS, "gdn_decode_f32_96_tokens", 96, 4),
        wide(PLAIN_TOKENS, "gdn_decode_f32_128_tokens", 128, 4),
        wide(PLAIN_TOKENS, "gdn_decode_f32_256_tokens", 256, 4),
    ],
    &[],
    &[
        wide(PLAIN, "gdn_decode_bf16_64_plain", 64, 2),
        wide(PLAIN, "gdn_decode_bf16_96_plain", 96, 2),
        wide(PLAIN, "gdn_decode_bf16_128_plain", 128, 2),
        wide(PLAIN, "gdn_decode_bf16_256_plain", 256, 2),
        wide(PLAIN_TOKENS, "gdn_decode_bf16_64_tokens", 64, 2),
        wide(PLAIN_TOKENS, "gdn_decode_bf16_96_tokens", 96, 2),
        LARGE,
        SMALL,
        wide(PLAIN_TOKENS, "gdn_decode_bf16_256_tokens", 256, 2),
    ],
];
const WIDES: [[Choice; 3]; 3] = [
    [
        wide(WIDE, "gdn_decode_f32_64", 64, 4),
        wide(WIDE, "gdn_decode_f32_128", 128, 4),
        wide(WIDE, "gdn_decode_f32_256", 256, 4),
    ],
    [
        wide(WIDE, "gdn_decode_f16_64", 64, 2),
        wide(WIDE, "gdn_decode_f16_128", 128, 2),
        wide(WIDE, "gdn_decode_f16_256", 256, 2),
    ],
    [
        wide(WIDE, "gdn_decode_bf16_64", 64, 2),
        wide(WIDE, "gdn_decode_bf16_128", 128, 2),
        wide(WIDE, "gdn_decode_bf16_256", 256, 2),
    ],
];
const NARROWS: [Choice; 3] =
    [narrow("gdn_decode_f32_narrow"), narrow("gdn_decode_f16_narrow"), narrow("gdn_decode_bf16_narrow")];

impl Choice {
    /// The kernels for a call of this kind on states of a dtype (its number in the arguments), the best
    /// first, the narrow one last.
    pub(super) fn all(
        dtype: u32,
        kind: u32,
        dk: u32,
        work: &Work,
        profile: &Profile,
    ) -> impl Iterator<Item = &'static Self> {
        let &Work { ratio, dv, .. } = work;
        let can_be_large = kind == PLAIN_TOKENS && dtype == BF16 && dk == LARGE.columns;
        let large = can_be_large && profile.large_pieces.unwrap_or_else(|| Self::large(work, profile));
        let is_for = move |choice: &&Self| match choice.kind {
            // Where a block has a key head to itself, each lane has two channels of v, or none.
            PLAIN | PLAIN_TOKENS => {
                let is_even = dv.is_multiple_of(choice.piece_rows) && (ratio * dv).is_multiple_of(64);
                kind == choice.kind && choice.columns == dk && is_even && (large || choice.name != LARGE.name)
            }
            WIDE => kind != NARROW && choice.columns >= dk,
            _ => true,
        };
        let can_be_few = kind == PLAIN && dtype != F16 && dk == few::HEAD;
        let few = if can_be_few { Self::few(dtype, work, profile) } else { None };
        let dtype = dtype as usize;
        few.into_iter()
            .chain(PLAINS[dtype].iter().chain(&WIDES[dtype]).chain(&NARROWS[dtype..=dtype]).filter(is_for))
    }

    /// The kernel for few blocks, where that is worth it.
    fn few(dtype: u32, work: &Work, profile: &Profile) -> Option<&'static Self> {
        let fews = FEWS[usize::from(dtype == BF16)];
        let share = |choice: &Self| Share::few(choice, work, profile);
        if profile.cluster.is_some() || profile.few == Some(false) {
            let is_wanted = |share: Share| {
                profile.few == Some(true)
                    && profile.cluster == Some(share.cluster)
                    && profile.steps.is_none_or(|steps| steps == share.steps)
            };
            return fews.iter().map(|(choice, _)| choice).find(|choice| share(choice).is_some_and(is_wanted));
        }
        let multiprocessors = u64::from(profile.multiprocessors);
        let fits = |(choice, ranges): &&(Self, &Tenths)| {
            share(choice).is_some_and(|share| {
                let tenths = 10 * u64::from(work.groups) * u64::from(share.cluster);
                let has = |range: &RangeInclusive<u64>| {
                    (range.start() * multiprocessors..=range.end() * multiprocessors).contains(&tenths)
                };
                ranges.iter().any(has)
            })
        };
        fews.iter().find(fits).map(|(choice, _)| choice)
    }

    /// Whether larger pieces are worth their registers: where they leave as many warps on a multiprocessor, where
    /// there is so much to do that a fourth less does not matter, and where each multiprocessor has a block or two.
    fn large(work: &Work, profile: &Profile) -> bool {
        let resident = |choice: &Self| {
            let share = Share::new(choice, work, profile);
            share.map_or(0, |share| choice.most_warps(profile) / share.warps * share.warps)
        };
        let Work { groups, ratio, keeps_each, .. } = *work;
        let multiprocessors = profile.multiprocessors;
        if groups <= multiprocessors / 2 {
            // Three blocks for three v heads have a multiprocessor each, or half of one and smaller pieces.
            let are_thirds = ratio == 3 && groups * 3 > multiprocessors && profile.most_cluster >= 3;
            return groups > multiprocessors / 8 && !are_thirds;
        }
        let (small, large) = (resident(&SMALL), resident(&LARGE));
        large >= small || !keeps_each && work.are(VERY_MANY_BLOCKS, profile) && large * 4 >= small * 3
    }

    /// Whether rows have two bytes a number: there are two stages.
    fn is_small(&self) -> bool {
        self.landing == 4 * self.piece_rows * self.columns
    }

    /// Warps of a block, at most: so many as registers suffice for.
    fn most_warps(&self, profile: &Profile) -> u32 {
        match self.kind {
            NARROW => 8,
            _ if self.name == LARGE.name => decode_large_warps(profile.target),
            kind => decode_warps(profile.target, kind >= PLAIN, self.columns),
        }
    }
}

/// How the rows of a key head's states are shared out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    /// Blocks of a cluster, and those of them that compute a v head together.
    pub(super) cluster: u32,
    pub(super) head_blocks: u32,
    /// v heads of a block, and rows of each.
    pub(super) block_heads: u32,
    pub(super) block_rows: u32,
    /// v heads of a block at a time.
    pub(super) pass_heads: u32,
    /// Pieces of a warp, and warps of a v head.
    pub(super) steps: u32,
    pub(super) head_warps: u32,
    /// Warps of a block.
    pub(super) warps: u32,
    /// Shared memory of a block.
    pub(super) room: Room,
}

/// What is to be shared out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    /// Key heads of all sequences.
    pub(super) groups: u32,
    /// v heads of each, and their rows.
    pub(super) ratio: u32,
    pub(super) dv: u32,
    pub(super) tokens: u32,
    /// Whether the states after all tokens are kept.
    pub(super) keeps_each: bool,
    /// Whether the norms' epsilons and the query's scale are what the kernels for few blocks take, and the rows of a v head's
    /// state lie one behind the other: all that there is.
    pub(super) is_usual: bool,
}

impl Work {
    /// Whether there are so many key heads for each multiprocessor.
    fn are(&self, many: u32, profile: &Profile) -> bool {
        self.groups >= many * profile.multiprocessors
    }
}

impl Share {
    /// `None` where a block has no room for what it computes. Whether there is one does not depend on how
    /// many key heads there are, since kernels differ in their bits.
    pub(super) fn new(choice: &Choice, work: &Work, profile: &Profile) -> Option<Self> {
        if choice.kind == NARROW {
            return Self::in_passes(choice, work, profile);
        }
        if choice.block_rows > 0 {
            return Self::few(choice, work, profile);
        }
        let last = Self::full(choice, work, profile)?;
        if let (Some(cluster), Some(steps)) = (profile.cluster, profile.steps) {
            return Self::of(choice, work, profile, [cluster, steps], true).or(Some(last));
        }
        if let Some(share) = Self::of_few_tokens(choice, work, profile) {
            return Some(share);
        }
        if work.groups > profile.multiprocessors {
            return Some(last);
        }
        let mut best = last;
        let mut most = None;
        for cluster in 1..=work.ratio.max(profile.most_cluster) {
            for steps in (0..=(WARP_ROWS / choice.piece_rows).ilog2()).map(|log| 1 << log) {
                for idle in [false, true] {
                    let share = Self::of(choice, work, profile, [cluster, steps], idle);
                    let Some(share) = share.filter(|_| cluster > 1 || !idle) else { continue };
                    let rank = share.rank(choice, work, profile, idle);
                    if rank > most {
                        (best, most) = (share, rank);
                    }
                }
            }
        }
        Some(best)
    }

    /// What was fastest on an H100 with two to four tokens, of which the last state is kept, and heads of 128
    /// (`docs/gpu-kernels.md`), where it is none of what is taken otherwise.
    fn of_few_tokens(choice: &Choice, work: &Work, profile: &Profile) -> Option<Self> {
        let &Work { groups, ratio, dv, tokens, keeps_each, .. } = work;
        let is_of_128 = choice.kind == PLAIN_TOKENS && choice.columns == 128 && dv == 128;
        if !is_of_128 || keeps_each || !(2..=4).contains(&tokens) {
            return None;
        }
        // Whether key heads are more than so many tenths of the multiprocessors, and at most so many.
        let within = |from: u32, to: u32| {
            let of = |tenths: u32| u64::from(tenths) * u64::from(profile.multiprocessors);
            (of(from) + 1..=of(to)).contains(&(10 * u64::from(groups)))
        };
        let steps = FULL_ROWS / choice.piece_rows;
        let of = |cluster, steps| Self::of(choice, work, profile, [cluster, steps], true);
        if choice.is_small() {
            // Two v heads in half of the warps, so that four blocks have room at once and not two.
            if ratio == 2 && tokens > 2 && within(30, 40) && choice.name == SMALL.name {
                return of(1, 2 * steps);
            }
        } else {
            // A block for each v head. Where there are fewer of them it loses behind a GEMM.
            let are_apart = match (ratio, tokens) {
                (2, 2 | 3) => within(21, 30),
                (3, 2) => within(20, 30) || within(40, 50),
                (4, 2) => within(21, 40),
                _ => false,
            };
            if are_apart {
                return of(ratio, steps);
            }
        }
        // A block of twice the warps, one at a time: the third round of these, or the fifth, takes less than half of one
        // of two blocks with half of the warps.
        let is_third = within(20, 30) && (ratio == 3 || ratio == 4 && (tokens == 2 || !choice.is_small()));
        let is_fifth = within(40, 47) && (ratio == 3 || ratio == 4 && tokens > 2 && !choice.is_small());
        if is_third || is_fifth { of(1, steps) } else { None }
    }

    /// How good it is to do all at once in such shares; `None` where they would not fit.
    fn rank(&self, choice: &Choice, work: &Work, profile: &Profile, idle: bool) -> Option<[u64; 3]> {
        let &Self { cluster, head_blocks, block_heads, head_warps, warps, .. } = self;
        let [groups, cluster, warps, multiprocessors] =
            [work.groups, cluster, warps, profile.multiprocessors].map(u64::from);
        let blocks = groups * cluster;
        if blocks * warps > multiprocessors * RESIDENT_WARPS {
            return None;
        }
        let are_few = blocks <= multiprocessors;
        if choice.kind < PLAIN {
            return (are_few && (idle || cluster == 1)).then_some([blocks, warps, 0]);
        }
        // Blocks of the next call, or another one's of this, fit beside those of so many warps. Large clusters fit
        // badly on a device whose parts are of unlike sizes, so they are not to have a multiprocessor each.
        let half = u64::from(if choice.name == LARGE.name { HALF_WARPS * 3 / 4 } else { HALF_WARPS });
        let alone = are_few && (cluster == 1 || idle && (cluster == 2 || blocks * 2 <= multiprocessors));
        let of_rows = u64::from(block_heads * head_warps);
        if choice.kind == PLAIN_TOKENS {
            // Each block makes the queries and keys of all tokens: two or three with all warps that there are, rather than
            // four or more. Clusters of any size fit where a fourth of the multiprocessors is left over.
            let is_small_cluster = cluster == 2 || cluster == 3;
            let is_pair = is_small_cluster && of_rows > half && groups * 5 > multiprocessors;
            let is_third = cluster == 3
                && choice.name != LARGE.name
                && warps <= half
                && blocks * 2 <= multiprocessors * 3;
            let has_room = idle && blocks * 4 <= multiprocessors * 3;
            let rank = if is_pair { multiprocessors } else { blocks };
            let fits = alone || has_room || is_third || are_few && (is_pair || warps <= half);
            return fits.then_some([rank, warps, u64::from(idle)]);
        }
        let halves = warps <= half && blocks * 2 <= multiprocessors * if cluster > 2 { 3 } else { 4 };
        let is_worth_it = !choice.is_small() && cluster <= 3 || blocks * 2 >= multiprocessors * 5;
        let quarters = warps * 2 <= half
            && cluster > 1
            && head_blocks == 1
            && blocks <= multiprocessors * 3
            && is_worth_it;
        (alone || halves || quarters).then_some([blocks * of_rows, blocks, u64::from(idle)])
    }

    /// Where there is enough to do for the whole device: in as few warps as can be.
    fn full(choice: &Choice, work: &Work, profile: &Profile) -> Option<Self> {
        let of = |cluster, steps| Self::of(choice, work, profile, [cluster, steps], false);
        let steps = FULL_ROWS / choice.piece_rows;
        let is_large = of(1, steps).is_none_or(|share| share.warps > HALF_WARPS);
        let is_small = choice.is_small();
        let are_many = work.are(MANY_BLOCKS, profile);
        if choice.kind == PLAIN && is_large {
            let halves = |cluster| of(cluster, steps).filter(|share| share.warps <= HALF_WARPS);
            if let Some(share) = (2..=work.ratio).find_map(halves) {
                let is_double =
                    is_small && work.are(VERY_MANY_BLOCKS, profile) && share.warps * 2 <= HALF_WARPS;
                return if is_double { of(share.cluster, 2 * steps) } else { Some(share) };
            }
        }
        let [groups, multiprocessors] = [work.groups, profile.multiprocessors].map(u64::from);
        let is_quarter = |share: &Self| share.warps * 2 == HALF_WARPS;
        if work.ratio == 1 && of(1, steps).as_ref().is_some_and(is_quarter) {
            // Twice the warps, in two blocks, or in one with several tokens; where there are more heads, two blocks with
            // as many together.
            let are_twice = groups <= 2 * multiprocessors;
            let share = match choice.kind {
                PLAIN if are_twice => of(2, steps / 2),
                PLAIN if !is_small || groups <= 4 * multiprocessors => of(2, steps),
                PLAIN_TOKENS if are_twice => of(1, steps / 2),
                _ => None,
            };
            if share.is_some() {
                return share;
            }
        }
        // Two blocks of half as many warps fill the device more evenly, where it is filled but a few times.
        let are_some = groups <= 3 * multiprocessors && (!is_small || groups * 4 >= multiprocessors * 5);
        if choice.kind == PLAIN && are_some {
            let is_half = |share: &Self| share.block_heads * 2 == work.ratio && is_quarter(share);
            if let Some(share) = of(2, steps).filter(is_half) {
                return Some(share);
            }
        }
        let is_double = match choice.kind {
            PLAIN => is_large,
            PLAIN_TOKENS => !work.keeps_each && (is_large || is_small && are_many),
            _ => is_large || (is_small || work.tokens > 1) && are_many,
        };
        of(1, if is_double { 2 * steps } else { steps })
            .or_else(|| of(1, 2 * steps))
            .or_else(|| (2..=work.ratio).find_map(|cluster| of(cluster, 1)))
    }

    /// So many blocks a cluster, pieces a warp, and all v heads at once. With `idle` warps a cluster's blocks have some
    /// that have no rows.
    fn of(
        choice: &Choice,
        work: &Work,
        profile: &Profile,
        [cluster, steps]: [u32; 2],
        idle: bool,
    ) -> Option<Self> {
        let Work { ratio, dv, tokens, .. } = *work;
        let steps = steps.min(WARP_ROWS / choice.piece_rows);
        let head_blocks = (cluster / ratio).max(1);
        let (block_heads, block_rows) = (ratio.div_ceil(cluster), dv.div_ceil(head_blocks));
        let is_even = ratio.is_multiple_of(cluster) || cluster.is_multiple_of(ratio);
        let is_whole = head_blocks == 1 || dv.is_multiple_of(head_blocks * choice.piece_rows);
        if cluster > 1 && (cluster > profile.most_cluster || !is_even || !is_whole) {
            return None;
        }
        let head_warps = block_rows.div_ceil(choice.piece_rows).div_ceil(steps);
        // Those of a small block have channels besides (in plain calls a warp does all tokens of its own): as
        // many warps as are at hand at once, and one for the gates and the norm.
        let pairs = choice.columns / 32 + (block_heads * block_rows).div_ceil(64);
        let most_warps = choice.most_warps(profile);
        let sharing = if choice.kind >= PLAIN { 1 } else { tokens };
        let of_channels = (pairs * sharing).min(8).min(most_warps - 1);
        let of_rows = block_heads * head_warps;
        let warps = if cluster > 1 && idle { of_rows.max(of_channels) + 1 } else { of_rows };
        let room = Room::new(RoomFor {
            tokens,
            padded: choice.columns,
            sum_rows: choice.sum_rows,
            dv,
            heads: block_heads,
            block_rows,
            warps,
            landing: choice.landing,
            blocks: cluster,
        });
        let pass_heads = block_heads;
        let share = Self {
            cluster,
            head_blocks,
            block_heads,
            block_rows,
            pass_heads,
            steps,
            head_warps,
            warps,
            room,
        };
        (warps <= most_warps && room.bytes <= profile.most_shared).then_some(share)
    }

    /// A v head a block, or so many of its rows as the kernel says; `None` where that cannot be.
    fn few(choice: &Choice, work: &Work, profile: &Profile) -> Option<Self> {
        let cluster = work.ratio * (few::HEAD / choice.block_rows);
        let steps = choice.block_rows / (few::ROW_WARPS * choice.piece_rows);
        if cluster == 1 || work.dv != few::HEAD || !work.is_usual {
            return None;
        }
        let share = Self::of(choice, work, profile, [cluster, steps], true)?;
        let of = RoomFor {
            tokens: 1,
            padded: choice.columns,
            sum_rows: choice.sum_rows,
            dv: few::HEAD,
            heads: 1,
            block_rows: choice.block_rows,
            warps: few::ROW_WARPS,
            landing: choice.landing,
            blocks: cluster,
        };
        Some(Self { warps: few::WARPS, room: Room::new(of), ..share })
    }

    /// One block a key head, with v heads as many at a time as have room.
    fn in_passes(choice: &Choice, work: &Work, profile: &Profile) -> Option<Self> {
        let most_steps = FULL_ROWS / choice.piece_rows;
        let steps = profile.steps.unwrap_or(most_steps).min(most_steps);
        let mut heads = if profile.one_by_one { 1 } else { work.ratio };
        loop {
            let work = Work { ratio: heads, ..*work };
            let share = Self::of(choice, &work, profile, [1, steps], false)
                .or_else(|| Self::of(choice, &work, profile, [1, most_steps], false));
            if share.is_some() || heads == 1 {
                return share;
            }
            heads = heads.div_ceil(2);
        }
    }
}

#[cfg(test)]
mod tests {
    use gdn_kernels::decode::args::F32;

    use super::*;

    const H100: Profile = Profile {
        multiprocessors: 132,
        most_cluster: 8,
        target: Target::Sm90,
        most_shared: DECODE_SHARED,
        ..Profile::LEAST
    };

    /// Which kernel for few blocks was the best of what was measured on an H100, by key heads of all sequences: its blocks of
    /// a cluster, and rows of a block, with states of f32 and of bf16.
    #[test]
    fn few_blocks_are_chosen_as_was_measured() {
        let cases = [
            (1, 16, Some((4, 32)), Some((2, 64))),
            (1, 32, Some((2, 64)), Some((2, 64))),
            (1, 64, Some((2, 64)), Some((2, 64))),
            (1, 128, None, None),
            (1, 600, None, None),
            (2, 4, Some((8, 32)), Some((8, 32))),
            (2, 8, Some((8, 32)), Some((4, 64))),
            (2, 16, Some((4, 64)), Some((4, 64))),
            (2, 32, Some((4, 64)), Some((4, 64))),
            (2, 48, Some((4, 64)), Some((4, 64))),
            (2, 64, Some((2, 128)), Some((2, 128))),
            (2, 96, Some((2, 128)), Some((2, 128))),
            (2, 112, Some((2, 128)), Some((2, 128))),
            (2, 128, Some((2, 128)), None),
            (2, 256, None, None),
            (2, 272, Some((2, 128)), Some((2, 128))),
            (2, 336, Some((2, 128)), Some((2, 128))),
            (2, 352, Some((2, 128)), None),
            (2, 384, None, None),
            (3, 16, Some((6, 64)), Some((6, 64))),
            (3, 32, Some((6, 64)), Some((6, 64))),
            (3, 64, Some((3, 128)), Some((3, 128))),
            (3, 160, None, None),
            (3, 176, Some((3, 128)), Some((3, 128))),
            (3, 224, Some((3, 128)), Some((3, 128))),
            (3, 240, Some((3, 128)), None),
            (3, 256, None, None),
        ];
        let all = |dtype, [ratio, groups, tokens]: [u32; 3], is_usual| {
            let work = Work { groups, ratio, dv: 128, tokens, keeps_each: false, is_usual };
            let choice = Choice::all(dtype, PLAIN, 128, &work, &H100).next().unwrap();
            let share = Share::new(choice, &work, &H100).unwrap();
            (choice.block_rows > 0).then_some((share.cluster, share.block_rows))
        };
        for (ratio, groups, f32, bf16) in cases {
            for (dtype, expected) in [(F32, f32), (BF16, bf16)] {
                assert_eq!(all(dtype, [ratio, groups, 1], true), expected, "{ratio}, {groups}, {dtype}");
                assert_eq!(all(dtype, [ratio, groups, 1], false), None);
            }
        }
        // Where there are no clusters there are no such kernels.
        let work = Work { groups: 16, ratio: 2, dv: 128, tokens: 1, keeps_each: false, is_usual: true };
        let choice = Choice::all(F32, PLAIN, 128, &work, &Profile::LEAST).next().unwrap();
        assert_eq!(choice.block_rows, 0);
    }

    /// What was the best of what was measured on an H100 without them, by key heads of all sequences: blocks of a cluster,
    /// pieces of a warp, warps.
    #[test]
    fn an_h100_is_filled_as_was_measured() {
        let h100 = Profile { few: Some(false), ..H100 };
        let share = |[ratio, groups, tokens]: [u32; 3], keeps_each, dtype| {
            let work = Work { groups, ratio, dv: 128, tokens, keeps_each, is_usual: true };
            let kind = if tokens > 1 { PLAIN_TOKENS } else { PLAIN };
            let choice = Choice::all(dtype, kind, 128, &work, &h100).next().unwrap();
            let Share { cluster, steps, warps, .. } = Share::new(choice, &work, &h100).unwrap();
            (choice.piece_rows, [cluster, steps, warps])
        };
        let one = [
            (1, 144, [2, 2, 4], [2, 2, 4]),
            (1, 256, [2, 2, 4], [2, 2, 4]),
            (1, 512, [2, 4, 2], [2, 4, 2]),
            (1, 1024, [2, 4, 2], [1, 4, 4]),
            (2, 16, [8, 1, 6], [8, 1, 6]),
            (2, 32, [4, 1, 8], [4, 1, 8]),
            (2, 48, [4, 1, 8], [4, 1, 8]),
            (2, 64, [2, 2, 9], [2, 2, 9]),
            (2, 80, [2, 2, 8], [2, 2, 8]),
            (2, 128, [2, 2, 8], [2, 2, 8]),
            (2, 160, [2, 4, 4], [1, 4, 8]),
            (2, 256, [2, 4, 4], [2, 4, 4]),
            (2, 1024, [1, 4, 8], [1, 4, 8]),
            (2, 8192, [1, 4, 8], [1, 4, 8]),
            (3, 16, [6, 1, 8], [6, 1, 8]),
            (3, 64, [3, 2, 8], [3, 2, 8]),
            (3, 80, [3, 4, 4], [1, 4, 12]),
            (3, 256, [3, 4, 4], [3, 4, 4]),
            (3, 8192, [3, 4, 4], [3, 8, 2]),
            (4, 16, [8, 1, 8], [8, 1, 8]),
            (4, 32, [4, 2, 8], [4, 2, 8]),
            (4, 64, [2, 4, 9], [2, 4, 9]),
            (4, 128, [2, 4, 8], [2, 4, 8]),
            (4, 256, [2, 4, 8], [2, 4, 8]),
        ];
        for (ratio, groups, f32, bf16) in one {
            for (dtype, expected) in [(F32, f32), (BF16, bf16)] {
                assert_eq!(
                    share([ratio, groups, 1], false, dtype),
                    (8, expected),
                    "{ratio}, {groups}, {dtype}"
                );
            }
        }
        let four = [
            (1, 256, [1, 2, 8], 8),
            (1, 320, [1, 4, 4], 8),
            (2, 16, [8, 1, 6], 8),
            (2, 32, [2, 1, 16], 16),
            (2, 64, [2, 1, 16], 16),
            (2, 128, [1, 2, 16], 8),
            (2, 256, [1, 4, 8], 8),
            (2, 1024, [1, 4, 8], 8),
            (2, 8192, [1, 4, 8], 16),
            (3, 16, [6, 1, 9], 8),
            (3, 32, [3, 1, 16], 16),
            (3, 64, [3, 2, 8], 8),
            (3, 256, [1, 8, 6], 16),
            (4, 32, [2, 2, 16], 16),
        ];
        for (ratio, groups, f32, bf16_rows) in four {
            assert_eq!(share([ratio, groups, 4], false, F32), (8, f32), "{ratio}, {groups}");
            assert_eq!(share([ratio, groups, 4], false, BF16).0, bf16_rows, "{ratio}, {groups}");
        }
        // Blocks, pieces and warps by tokens, of f32 and of bf16.
        let few = [
            (2, 256, 3, [1, 4, 8], [1, 4, 8]),
            (2, 288, 3, [2, 4, 7], [1, 4, 8]),
            (2, 384, 2, [2, 4, 7], [1, 4, 8]),
            (2, 400, 3, [1, 4, 8], [1, 8, 4]),
            (2, 528, 4, [1, 4, 8], [1, 8, 4]),
            (2, 544, 4, [1, 4, 8], [1, 4, 8]),
            (3, 256, 2, [1, 8, 6], [1, 4, 6]),
            (3, 272, 2, [3, 4, 7], [1, 2, 12]),
            (3, 272, 4, [1, 4, 12], [1, 2, 12]),
            (3, 384, 3, [1, 4, 12], [1, 2, 12]),
            (3, 400, 4, [1, 8, 6], [1, 4, 6]),
            (3, 608, 4, [1, 4, 12], [1, 2, 12]),
            (3, 640, 4, [1, 8, 6], [1, 4, 6]),
            (4, 320, 2, [4, 4, 7], [1, 4, 16]),
            (4, 320, 3, [1, 4, 16], [1, 8, 8]),
            (4, 560, 4, [1, 4, 16], [1, 8, 8]),
        ];
        for (ratio, groups, tokens, f32, bf16) in few {
            for (dtype, expected) in [(F32, f32), (BF16, bf16)] {
                let (_, got) = share([ratio, groups, tokens], false, dtype);
                assert_eq!(got, expected, "{ratio}, {groups}, {tokens} tokens, {dtype}");
            }
        }
        // States are kept after each token: bf16 gains nothing by more rows a warp (144 us with 4 pieces, 156 with 8 at
        // 1024), and three v heads by larger pieces (205 us in place of 220 at 1024).
        assert_eq!(share([2, 64, 4], true, F32), (8, [2, 1, 16]));
        assert_eq!(share([2, 1024, 4], true, BF16), (8, [1, 4, 8]));
        for groups in [256, 1024] {
            assert_eq!(share([3, groups, 4], true, BF16).0, 16, "{groups}");
        }
    }
}
