//! The probes with something to do: one table for the emulator and for the device.

use core::ops::Range;
use std::{vec, vec::Vec};

use super::{Args, hopper, math, tensor_core, warp, wgmma};
use crate::{
    emulator::{Launch, Memory, Place, Thread, run_in_step},
    entries,
    gpu::{LOGISTIC, LOGISTIC_MIDDLE},
    modules::{PROBES, Target},
};

/// A probe, what it reads and how it is launched.
pub struct Case {
    /// Of the kernel.
    pub name: &'static str,
    /// The same function on the emulator.
    pub emulated: Kernel,
    /// Grid, block, dynamic or static shared memory, cluster.
    pub launch: Launch,
    /// What is at [`Args::from`].
    pub input: Vec<u8>,
    /// Bytes at [`Args::to`].
    pub written: usize,
    /// [`Args::count`].
    pub count: u32,
    /// Whether all of them are stored to; else some stay poison.
    pub whole: bool,
}

impl Case {
    /// The module that has the kernel: its op and target.
    ///
    /// # Panics
    /// Where there is none.
    pub fn module(&self) -> (&'static str, Target) {
        let has = |module: &&crate::modules::Module| module.kernels().any(|kernel| kernel.name == self.name);
        let module = PROBES.iter().find(has).expect("a probe of the table");
        (module.op, module.target)
    }

    /// What the emulator writes, its threads and blocks in an order that `seed` chooses.
    ///
    /// # Panics
    /// Where the kernel does something wrong.
    pub fn on_emulator(&self, seed: u64) -> Vec<u8> {
        let memory = Memory::new();
        let from = memory.input(&self.input, Place::dense(self.input.len()));
        let to = memory.output(self.written, Place::dense(self.written));
        let args = Args { from, to, count: self.count };
        // SAFETY: the emulator checks every access.
        run_in_step(&memory, self.launch.seed(seed), |gpu| unsafe { (self.emulated)(gpu, &args) });
        let (bytes, stored) = memory.read(to);
        assert!(!self.whole || stored.iter().all(|stored| *stored == 1), "{} left bytes out", self.name);
        bytes
    }
}

/// Words without a period in sight.
fn words(count: u32) -> impl Iterator<Item = u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..count).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u32
    })
}

fn word_bytes(count: u32) -> Vec<u8> {
    words(count).flat_map(u32::to_ne_bytes).collect()
}

/// How large numbers are: powers of two around one, and by how much they differ from it at most. Sums are as
/// large as products.
#[derive(Clone, Copy)]
struct Sizes {
    around: i32,
    spread: u32,
    /// One in so many is an infinity or NaN; 0 for none.
    special: u32,
}

const fn sizes(around: i32, spread: u32) -> Sizes {
    Sizes { around, spread, special: 0 }
}

/// Equal, a little and very different sizes; then, where the type has them, too small for an f32 or just so,
/// and too large; and at last what is not finite.
fn all_sizes(bf16: bool) -> [Sizes; 8] {
    let (small, large) = if bf16 { (-68, 61) } else { (-14, 13) };
    [
        sizes(0, 0),
        sizes(0, 1),
        sizes(0, 3),
        sizes(0, 6),
        sizes(small, 4),
        sizes(small / 2, 8),
        sizes(large, 3),
        Sizes { special: 200, ..sizes(0, 3) },
    ]
}

/// A number of some size by a random word, in a type of so many bits of exponent and fraction.
fn number(word: u32, sizes: Sizes, exponent: u32, fraction: u32) -> u32 {
    let bias = (1 << (exponent - 1)) - 1;
    let most = (1 << exponent) - 1;
    let size = (word >> 8) % (2 * sizes.spread + 1);
    let field = (bias + sizes.around + size as i32 - sizes.spread as i32).clamp(0, most - 1);
    let special = sizes.special > 0 && (word >> 4).is_multiple_of(sizes.special);
    let field = if special { most } else { field } as u32;
    let low = (word.rotate_left(7) ^ word.wrapping_mul(0x9e37_79b1)) & ((1 << fraction) - 1);
    (word & 1) << (exponent + fraction)
        | field << fraction
        | if special { low & (word >> 1) & 1 } else { low }
}

/// 16-bit floating-point numbers.
fn factors(words: &mut impl Iterator<Item = u32>, count: u32, bf16: bool, sizes: Sizes) -> Vec<u8> {
    let (exponent, fraction) = if bf16 { (8, 7) } else { (5, 10) };
    let factor = |word| (number(word, sizes, exponent, fraction) as u16).to_ne_bytes();
    words.take(count as usize).flat_map(factor).collect()
}

/// What the blocks of a product by a warp read.
fn warp_products(blocks: u32, bf16: bool) -> Vec<u8> {
    let words = &mut words(u32::MAX);
    let mut bytes = Vec::new();
    for block in 0..blocks {
        let sizes = all_sizes(bf16)[block as usize % 8];
        bytes.extend(factors(words, 384, bf16, sizes));
        let sums = Sizes { around: 2 * sizes.around, spread: 2 * sizes.spread + 1, ..sizes };
        bytes.extend(words.take(128).flat_map(|word| number(word, sums, 8, 23).to_ne_bytes()));
    }
    bytes
}

/// Numbers that the functions of the layer are asked for, hostile ones among them.
fn numbers() -> Vec<f32> {
    let steps = (-4000..4000).map(|i| i as f32 * 0.0371);
    let special = [
        0.0,
        -0.0,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        f32::MAX,
        f32::MIN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1e-30,
        19.999_998,
        20.0,
        20.000_002,
        88.722_84,
        -87.336_55,
    ];
    steps.chain(special).collect()
}

/// Where the logistic function is asked for: where it is 1 and 0, both ends of that, and in between.
fn places() -> Vec<f32> {
    let Range { start, end } = LOGISTIC;
    let ends = [start, end].into_iter().flat_map(|x| [x.next_down(), x, x.next_up()]);
    let far = [0.0, -0.0, f32::from_bits(1), f32::MIN_POSITIVE, f32::MAX, f32::MIN, f32::INFINITY];
    let far = far.into_iter().chain([f32::NEG_INFINITY, f32::NAN, LOGISTIC_MIDDLE]);
    (-1000..1000).map(|i| i as f32 * 0.1371).chain(ends).chain(far).collect()
}

/// A kernel on the emulator.
pub type Kernel = unsafe fn(&Thread<'_>, &Args);

/// The table.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: &'static str, emulated: Kernel, launch, input, written: u32, count| {
        let whole = !name.starts_with("gdn_convergence");
        cases.push(Case { name, emulated, launch, input, written: written as usize, count, whole });
    };
    for count in [0, 1, 20, 37, 64] {
        let launch = Launch::new([1; 3], 64);
        let (both, matrices) =
            (entries::gdn_convergence_barrier_and_shuffle, entries::gdn_convergence_matrices);
        add("gdn_convergence_barrier_and_shuffle", both, launch, vec![0; 16], 512, count);
        add("gdn_convergence_product", entries::gdn_convergence_product, launch, vec![0; 16], 512, count);
        add("gdn_convergence_matrices", matrices, launch.shared(1024), vec![0; 16], 512, count);
    }
    for (blocks, threads) in [(1, 32), (3, 64), (5, 1024)] {
        let launch = Launch::new([blocks, 1, 1], threads);
        let (all, input) = (blocks * threads, word_bytes(blocks * threads));
        let to = 4 * blocks * (threads + 1);
        add(
            "gdn_probe_block_sums",
            entries::gdn_probe_block_sums,
            launch.shared(threads / 8),
            input.clone(),
            to,
            0,
        );
        add(
            "gdn_probe_block_sums_static",
            entries::gdn_probe_block_sums_static,
            launch.shared(128),
            input.clone(),
            to,
            0,
        );
        add("gdn_probe_lanes", entries::gdn_probe_lanes, launch, input, 4 * all * warp::WORDS, 0);
    }
    for (blocks, threads) in [(1, 64), (7, 896)] {
        let launch = Launch::new([blocks, 1, 1], threads).shared(threads * 4);
        let all = blocks * threads;
        add(
            "gdn_probe_pairs_of_warps",
            entries::gdn_probe_pairs_of_warps,
            launch,
            word_bytes(all),
            4 * all,
            0,
        );
    }
    let numbers = numbers();
    let count = numbers.len() as u32;
    let bytes = numbers.iter().flat_map(|x| x.to_bits().to_ne_bytes()).collect();
    let launch = Launch::new([count.div_ceil(256), 1, 1], 256);
    add("gdn_probe_math", entries::gdn_probe_math, launch, bytes, count * 4 * math::WORDS as u32, count);
    let places = places();
    let count = places.len() as u32;
    let bytes = places.iter().flat_map(|x| x.to_bits().to_ne_bytes()).collect();
    let launch = Launch::new([count.div_ceil(256), 1, 1], 256);
    add("gdn_probe_logistics", entries::gdn_probe_logistics, launch, bytes, count * 4, count);

    for (name, matrices, emulated, matrices_emulated, bf16) in [
        (
            "gdn_probe_product_bf16",
            "gdn_probe_matrices_bf16",
            entries::gdn_probe_product_bf16 as Kernel,
            entries::gdn_probe_matrices_bf16 as Kernel,
            true,
        ),
        (
            "gdn_probe_product_f16",
            "gdn_probe_matrices_f16",
            entries::gdn_probe_product_f16,
            entries::gdn_probe_matrices_f16,
            false,
        ),
    ] {
        let (launch, input) = (Launch::new([24, 1, 1], 32), warp_products(24, bf16));
        let to = 24 * tensor_core::WRITTEN as u32;
        add(name, emulated, launch, input.clone(), to, 0);
        add(matrices, matrices_emulated, launch.shared(1536), input, 2 * to, 0);
    }
    for (threads, count) in [(32, 32), (64, 1), (128, 1000), (256, 256 * 7)] {
        let input = word_bytes(4 * count.max(threads));
        let launch = Launch::new([1; 3], threads).shared(52 * threads);
        add("gdn_probe_pipeline", entries::gdn_probe_pipeline, launch, input, 4 * threads, count);
    }
    for (threads, tiles) in [(32, 1), (128, 2), (128, 9), (256, 12)] {
        let launch = Launch::new([1; 3], threads).shared(128 + 36 * threads);
        add(
            "gdn_probe_bulk",
            entries::gdn_probe_bulk,
            launch,
            word_bytes(4 * threads * tiles),
            4 * threads,
            tiles,
        );
    }
    for (clusters, blocks, threads) in [(3, 1, 32), (5, 2, 64), (2, 4, 128), (1, 8, 32)] {
        let launch = Launch::new([clusters * blocks, 1, 1], threads).shared(12 * threads).cluster(blocks);
        let all = clusters * blocks * threads;
        add(
            "gdn_probe_cluster",
            entries::gdn_probe_cluster,
            launch,
            word_bytes(all),
            4 * all * hopper::WORDS,
            0,
        );
    }
    for (name, emulated, n, bf16) in WGMMA {
        let (m, k) = (wgmma::M, wgmma::K);
        let launch = Launch::new([1; 3], 128).shared((m + n) * k * 2);
        for sizes in all_sizes(bf16) {
            let input = factors(&mut words(u32::MAX), (m + n) * k, bf16, sizes);
            add(name, emulated, launch, input, m * n * 4, 0);
        }
    }
    cases
}

type Wgmma = (&'static str, Kernel, u32, bool);

const WGMMA: [Wgmma; 8] = [
    ("gdn_probe_wgmma_bf16_n32", entries::gdn_probe_wgmma_bf16_n32, 32, true),
    ("gdn_probe_wgmma_f16_n64", entries::gdn_probe_wgmma_f16_n64, 64, false),
    ("gdn_probe_wgmma_bf16_n128", entries::gdn_probe_wgmma_bf16_n128, 128, true),
    ("gdn_probe_wgmma_f16_n128", entries::gdn_probe_wgmma_f16_n128, 128, false),
    ("gdn_probe_wgmma_bf16_n192", entries::gdn_probe_wgmma_bf16_n192, 192, true),
    ("gdn_probe_wgmma_f16_n256", entries::gdn_probe_wgmma_f16_n256, 256, false),
    ("gdn_probe_wgmma_left_f16_n64", entries::gdn_probe_wgmma_left_f16_n64, 64, false),
    ("gdn_probe_wgmma_left_bf16_n128", entries::gdn_probe_wgmma_left_bf16_n128, 128, true),
];

/// The 16-bit words of bytes.
pub fn halves(bytes: &[u8]) -> Vec<u16> {
    bytes.chunks_exact(2).map(|two| u16::from_ne_bytes([two[0], two[1]])).collect()
}

/// The words of bytes.
pub fn words_of(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|four| u32::from_ne_bytes([four[0], four[1], four[2], four[3]])).collect()
}

/// A product as rows of `a`, columns of `b` (both along k) and what is added, and where its sums are in what
/// a case writes.
pub struct Product {
    /// Rows of 16-bit numbers.
    pub a: Vec<Vec<u16>>,
    /// Columns of them.
    pub b: Vec<Vec<u16>>,
    /// Row after row.
    pub c: Vec<f32>,
    /// Whether they are bfloat16.
    pub bf16: bool,
    /// The first word of its sums, rows of as many words as there are columns.
    pub at: usize,
}

/// The products that a case of the tensor cores works out; none for all others.
pub fn products(case: &Case) -> Vec<Product> {
    let bf16 = case.name.contains("bf16");
    if let Some((_, _, n, _)) = WGMMA.iter().find(|(name, ..)| *name == case.name) {
        let (m, n, k) = (wgmma::M as usize, *n as usize, wgmma::K as usize);
        let (a, b) = case.input.split_at(m * k * 2);
        // By the instances in `entries.rs`.
        let (a_other, b_other) = match case.name {
            "gdn_probe_wgmma_bf16_n128" | "gdn_probe_wgmma_f16_n256" | "gdn_probe_wgmma_left_bf16_n128" => {
                (false, true)
            }
            "gdn_probe_wgmma_f16_n128" => (true, false),
            "gdn_probe_wgmma_bf16_n192" => (true, true),
            _ => (false, false),
        };
        let lines = |bytes: &[u8], lines: usize, other: bool| -> Vec<Vec<u16>> {
            let all = halves(bytes);
            let at = |line: usize, i: usize| if other { all[i * lines + line] } else { all[line * k + i] };
            (0..lines).map(|line| (0..k).map(|i| at(line, i)).collect()).collect()
        };
        let (a, b) = (lines(a, m, a_other), lines(b, n, b_other));
        return vec![Product { a, b, c: vec![0.0; m * n], bf16, at: 0 }];
    }
    let per_block = match case.name {
        name if name.starts_with("gdn_probe_product") => 1,
        name if name.starts_with("gdn_probe_matrices") => 2,
        _ => return Vec::new(),
    };
    let blocks = case.input.chunks(tensor_core::READ as usize).enumerate();
    let product = |(block, input): (usize, &[u8]), i: usize| {
        let rows = |bytes: &[u8]| halves(bytes).chunks(16).map(<[u16]>::to_vec).collect::<Vec<_>>();
        let c = words_of(&input[768..]).into_iter().map(f32::from_bits).collect();
        let at = (block * per_block + i) * tensor_core::WRITTEN as usize / 4;
        Product { a: rows(&input[..512]), b: rows(&input[512..768]), c, bf16, at }
    };
    blocks.flat_map(|block| (0..per_block).map(move |i| product(block, i))).collect()
}
