//! The scratch memory of prefill on a GPU, and the windows of chunks that it is for.

use gdn_kernels::prefill::args::{Scratch, Segments};

use crate::{
    cuda::segments::{self, Cutting},
    layer::Layer,
    prefill::CHUNK,
};

const _: () = assert!(CHUNK == gdn_kernels::prefill::args::CHUNK as usize);

/// Scratch memory is for windows of so many chunks that two of them, or one alone, take no more than this.
const MOST_SCRATCH: usize = 1 << 30;

/// One sequence alone goes in two windows, where its chunks times the blocks of 64 rows of S are so many: with
/// fewer, more launches cost more than the scan hides of the others.
const FEWEST: usize = 1024;
/// Of more blocks than [`FEW_BLOCKS`] it takes more, and of more than [`SOME_BLOCKS`], which leave few
/// multiprocessors to the kernels beside them, still more.
const FEWEST_OF_SOME: usize = 3072;
const FEWEST_OF_MANY: usize = 6144;
pub(super) const SOME_BLOCKS: usize = 64;
/// So many leave them none.
const ALL_BLOCKS: usize = 128;
/// So few leave them most: there a long sequence goes in up to four windows, each of so many chunks times blocks.
const FEW_BLOCKS: usize = 32;
const MOST_WINDOWS: usize = 4;
const OF_A_WINDOW: usize = 2048;
/// Of two windows the first is larger, of eight parts so many: the second's convolution and preparation run beside
/// the first's scan, which leaves them half of the device or less.
const OF_EIGHT: usize = 5;

/// Bytes of scratch memory that prefill of `num_tokens` tokens of `num_sequences` sequences takes on a GPU:
/// some 25 KB a token for heads 16/32 of 128, and 1 GiB and two states at most.
pub fn prefill_scratch_bytes(layer: &Layer, num_tokens: usize, num_sequences: usize) -> usize {
    let bytes = [Cutting::Never, Cutting::ByHeads].map(|cutting| {
        let (.., bytes) = memory(layer, 0, [num_tokens, num_sequences], None, cutting);
        bytes
    });
    usize::try_from(bytes[0].max(bytes[1])).unwrap_or(usize::MAX)
}

/// The chunks of a window of a call with so many tokens and sequences, its scratch memory, and the bytes of all:
/// behind what is between the kernels comes what segments of long sequences make.
pub(crate) fn memory(
    layer: &Layer,
    at: u64,
    [num_tokens, num_sequences]: [usize; 2],
    window: Option<usize>,
    cutting: Cutting,
) -> (usize, [Scratch; 2], Segments, u64) {
    let chunks = chunks(num_tokens, num_sequences);
    let segments = cutting.segments(layer, chunks);
    let window = window.unwrap_or_else(|| self::window(layer, chunks, num_sequences, segments.as_ref()));
    let (slots, bytes) = slots(layer, at, chunks, window);
    let Some(segments) = segments else { return (window, slots, Segments::NONE, bytes) };
    let behind = bytes.next_multiple_of(256);
    let segments = segments::placed(segments, layer, at + behind, window);
    (window, slots, segments, behind + segments.bytes)
}

/// Chunks that there are at most: each sequence begins one.
pub(super) fn chunks(num_tokens: usize, num_sequences: usize) -> usize {
    (num_tokens / CHUNK).saturating_add(num_sequences)
}

/// Chunks that there are likely to be: half of the sequences need one more than their tokens fill, all together.
pub(super) fn likely_chunks(num_tokens: usize, num_sequences: usize) -> usize {
    (num_tokens / CHUNK + num_sequences / 2).max(1)
}

/// Chunks of a window. The scan of a window runs beside the other kernels of its neighbours, so one sequence,
/// which has few blocks of a scan, goes in several. Several sequences fill the device with their scans, and so
/// do segments of one; windows would only cut these in pieces.
fn window(layer: &Layer, chunks: usize, num_sequences: usize, segments: Option<&Segments>) -> usize {
    let mut of_one = slot(layer, 0, 1).carry[0];
    if let Some(segments) = segments {
        let placed = segments::placed(*segments, layer, 0, 1);
        of_one += placed.place_bytes.div_ceil(u64::from(segments.shortest.get()));
    }
    let of_one = usize::try_from(of_one).unwrap_or(usize::MAX).max(1);
    let window = if num_sequences == 1 && segments.is_none() { window_of_one(layer, chunks) } else { chunks };
    let room = MOST_SCRATCH / of_one;
    if window + second(chunks, window) <= room {
        return window.max(1);
    }
    chunks.div_ceil(chunks.div_ceil((room / 2).max(1))).max(1)
}

/// Chunks of a window of one sequence, as is fastest.
fn window_of_one(layer: &Layer, chunks: usize) -> usize {
    let heads = layer.heads();
    let blocks = heads.num_v_heads().saturating_mul(heads.head_v_dim()).div_ceil(64);
    let all = chunks.saturating_mul(blocks);
    match blocks {
        ..=FEW_BLOCKS if all >= FEWEST => chunks.div_ceil((all / OF_A_WINDOW).clamp(2, MOST_WINDOWS)),
        ..=SOME_BLOCKS if all >= FEWEST_OF_SOME => larger(chunks),
        ..ALL_BLOCKS if all >= FEWEST_OF_MANY => larger(chunks),
        _ => chunks,
    }
}

/// Chunks of the first of two windows.
fn larger(chunks: usize) -> usize {
    chunks - chunks / 8 * (8 - OF_EIGHT)
}

/// Chunks of the second window, and the most of any with an odd number.
fn second(chunks: usize, window: usize) -> usize {
    (chunks - window.min(chunks)).min(window)
}

/// Scratch memory of a window.
fn slot(layer: &Layer, at: u64, chunks: usize) -> Scratch {
    let heads = layer.heads();
    let [hk, hv, dk, dv] =
        [heads.num_k_heads(), heads.num_v_heads(), heads.head_k_dim(), heads.head_v_dim()].map(|n| n as u64);
    Scratch::new(at, chunks as u64, hk, hv, dk, dv)
}

/// The scratch memory of windows that follow one another, and the bytes of all. Where there are several
/// windows, the next one is made while one is scanned, so two take turns. The states that go on from one to the
/// next come last.
pub(crate) fn slots(layer: &Layer, at: u64, chunks: usize, window: usize) -> ([Scratch; 2], u64) {
    let bytes = |slot: Scratch, at: u64| slot.carry[0] - at;
    let first = slot(layer, at, window);
    let (state, mut end) = (first.carry[1] - first.carry[0], at + bytes(first, at));
    let mut other = first;
    if window < chunks {
        other = slot(layer, end, second(chunks, window));
        end += bytes(other, end);
    }
    let carry = [end, end + state];
    ([Scratch { carry, ..first }, Scratch { carry: [carry[1], carry[0]], ..other }], end - at + 2 * state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        heads::Heads,
        packing::{Layout, Packing},
    };

    fn layer([hk, hv, dk, dv]: [usize; 4]) -> Layer {
        Layer::new(Layout::new(Heads::new(hk, hv, dk, dv).unwrap(), Packing::Interleaved))
    }

    /// What was fastest on an H100.
    #[test]
    fn a_long_sequence_alone_goes_in_windows() {
        for (heads, num_tokens, expected) in [
            ([16, 32, 128, 128], 512, 1),
            ([16, 32, 128, 128], 2048, 1),
            ([16, 32, 128, 128], 3072, 2),
            ([16, 32, 128, 128], 8192, 2),
            ([4, 8, 128, 128], 2048, 1),
            ([4, 8, 128, 128], 8192, 2),
            ([4, 8, 128, 128], 32768, 4),
            ([8, 16, 128, 128], 32768, 4),
            ([16, 48, 128, 128], 2048, 1),
            ([16, 48, 128, 128], 4096, 2),
            ([16, 32, 128, 128], 32768, 2),
            ([16, 32, 128, 128], 65536, 4),
            ([16, 64, 128, 128], 8192, 1),
        ] {
            let count = |num_sequences| {
                let lens = [num_tokens, num_sequences];
                let (window, ..) = memory(&layer(heads), 0, lens, None, Cutting::Never);
                chunks(num_tokens, num_sequences).div_ceil(window)
            };
            assert_eq!(count(1), expected, "{heads:?}, {num_tokens}");
            // Windows would part several sequences, which fill the device together, and segments of one.
            if num_tokens <= 8192 {
                assert_eq!(count(2), 1, "{heads:?}, {num_tokens}");
            }
        }
        let (window, ..) = memory(&layer([4, 8, 128, 128]), 0, [32768, 1], None, Cutting::ByHeads);
        assert!(window > 32768 / CHUNK);
    }

    /// Tensors of 128-byte rows begin at such multiples, whatever the heads and chunks: in the second window's memory, too, and
    /// so do states.
    #[test]
    fn all_begins_at_multiples_of_256() {
        for heads in [[1, 1, 64, 64], [1, 3, 96, 96], [2, 4, 128, 128], [16, 48, 128, 128]] {
            for (chunks, window) in [(5, 3), (7, 7), (4, 1)] {
                let (slots, bytes) = slots(&layer(heads), 4096, chunks, window);
                for slot in slots {
                    let Scratch { q, k, v, t, p, factors, carry, .. } = slot;
                    for at in [q, k, v, t, p, factors, carry[0], carry[1]] {
                        assert!(at.is_multiple_of(256), "{heads:?}, {window} of {chunks}: {slot:?}");
                    }
                    let state = (heads[1] * heads[2] * heads[3] * 4) as u64;
                    assert!(
                        carry[0].max(carry[1]) + state <= 4096 + bytes,
                        "{heads:?}, {window} of {chunks}"
                    );
                }
                let (first, second) = (slots[0], slots[1]);
                assert!(window == chunks || second.q >= first.out_scales, "{heads:?}, {window} of {chunks}");
            }
        }
    }

    /// Two windows, or one, take what is allowed at most, but for a chunk and states.
    #[test]
    fn scratch_is_bounded() {
        for num_sequences in [1, 7] {
            let bytes =
                |num_tokens| prefill_scratch_bytes(&layer([16, 32, 128, 128]), num_tokens, num_sequences);
            assert!(bytes(5_000) < 160 << 20);
            assert!(bytes(10_000_000) > MOST_SCRATCH - (4 << 20));
            assert!(bytes(10_000_000) < MOST_SCRATCH + (8 << 20));
        }
    }
}
