//! Every capability on the emulator: the probes held to what they should write, worked out without the
//! emulator.
#![cfg(feature = "emulator")]

use gdn_kernels::{
    emulator::{
        POISON,
        sums::{Factor, Model},
    },
    gpu::{Bf16, F16},
    probe::{
        self,
        cases::{Case, Product, cases, products, words_of},
        hopper, math, warp,
    },
};

/// What a case should write, word by word.
fn expected(case: &Case) -> Vec<u32> {
    let input = words_of(&case.input);
    let threads = case.launch.threads as usize;
    match case.name {
        "gdn_convergence_barrier_and_shuffle" => guarded(case, |thread| thread ^ 16),
        // Lane 4 * g + t: columns 2t, 2t+1 of row g, each word of it twice over 16 of k.
        "gdn_convergence_product" => guarded(case, |thread| {
            let (row, warp) = (thread % 32 / 4, thread & 32);
            let numbers = |lane: u32| [1.0 + (lane | warp) as f32 / 128.0, 1.0];
            let column = thread % 4 * 2;
            let dot = (0..4).map(|t| {
                let ([a, one], [b, _]) = (numbers(row * 4 + t), numbers(column * 4 + t));
                2.0 * (a * b + one)
            });
            dot.sum::<f32>().to_bits()
        }),
        "gdn_convergence_matrices" => guarded(case, |thread| {
            let row = |matrix: u32| (thread & 32) + 8 * matrix + thread % 32 / 4;
            row(0) ^ row(1) << 8 ^ row(2) << 16 ^ row(3) << 24
        }),
        "gdn_probe_block_sums" | "gdn_probe_block_sums_static" => probe::expected(&input, threads),
        "gdn_probe_lanes" => input.chunks(32).flat_map(lanes).collect(),
        "gdn_probe_pairs_of_warps" => {
            let theirs = |i: usize| input[i ^ 32];
            (0..input.len()).map(|i| theirs(i) ^ theirs(i ^ 1).rotate_left(7)).collect()
        }
        "gdn_probe_math" => {
            input.iter().flat_map(|x| math::all(f32::from_bits(*x))).map(f32::to_bits).collect()
        }
        "gdn_probe_logistics" => {
            let logistic = |place: f64| 1.0 / (1.0 + (place - 32.0).exp2());
            let nearest = |place: f32| match place {
                ..8.0 => 1.0,
                128.0.. => 0.0,
                _ => logistic(f64::from(place)) as f32,
            };
            input.iter().map(|place| nearest(f32::from_bits(*place)).to_bits()).collect()
        }
        "gdn_probe_pipeline" => {
            let tiles = case.count.div_ceil(case.launch.threads) as usize;
            folded(&input, threads, tiles, case.count as usize, |neighbour| input[neighbour])
        }
        "gdn_probe_bulk" => {
            let tiles = case.count as usize;
            folded(&input, threads, tiles, tiles * threads, |_| 0)
        }
        "gdn_probe_cluster" => cluster(&input, threads, case.launch.cluster as usize),
        _ => sums(&products(case), Model::HARDWARE),
    }
}

/// Threads below the count: their numbers, and then what `together` says; poison elsewhere.
fn guarded(case: &Case, together: impl Fn(u32) -> u32) -> Vec<u32> {
    let poison = u32::from_ne_bytes([POISON; 4]);
    let words = |word: &dyn Fn(u32) -> u32| -> Vec<u32> {
        (0..case.launch.threads)
            .map(|thread| if thread < case.count { word(thread) } else { poison })
            .collect()
    };
    [words(&|thread| thread), words(&together)].concat()
}

fn lanes(values: &[u32]) -> Vec<u32> {
    let number = |lane: usize| (values[lane] % 1000) as f32 * 0.37;
    let ballot = (0..32).fold(0, |all, lane| all | u32::from(values[lane].is_multiple_of(3)) << lane);
    // Pairs of pairs of pairs, the far ones first.
    let pair = |lane: usize| number(lane) + number(lane ^ 4);
    let four = |lane: usize| pair(lane) + pair(lane ^ 2);
    (0..32usize)
        .flat_map(|lane| {
            let words: [u32; warp::WORDS as usize] = [
                values[lane ^ 5],
                values[(lane * 7 + 3) % 32],
                values[if lane < 3 { lane } else { lane - 3 }],
                values[if lane + 5 < 32 { lane + 5 } else { lane }],
                ballot,
                (four(lane) + four(lane ^ 1)).to_bits(),
                values[9],
            ];
            words
        })
        .collect()
}

/// Tiles of four words a thread, of which each thread folds its neighbour's; behind `pieces` of them there
/// are zeros.
fn folded(
    input: &[u32],
    threads: usize,
    tiles: usize,
    pieces: usize,
    first: impl Fn(usize) -> u32,
) -> Vec<u32> {
    let fold = |thread: usize| {
        let neighbour = (thread + 1) % threads;
        (0..tiles).fold(first(neighbour), |sum, tile| {
            let piece = tile * threads + neighbour;
            let word = |i: usize| if piece < pieces { input[4 * piece + i] } else { 0 };
            let turned = (0..4).fold(0, |all, i| all ^ word(i).rotate_left(8 * i as u32));
            sum.wrapping_mul(31).wrapping_add(turned)
        })
    };
    (0..threads).map(fold).collect()
}

fn cluster(input: &[u32], threads: usize, blocks: usize) -> Vec<u32> {
    let of = |cluster: usize, rank: usize, thread: usize| input[(cluster * blocks + rank) * threads + thread];
    (0..input.len())
        .flat_map(|i| {
            let (cluster, rank, thread) = (i / threads / blocks, i / threads % blocks, i % threads);
            let (next, before) = ((rank + 1) % blocks, (rank + blocks - 1) % blocks);
            let four = |k: usize| of(cluster, next, thread / 4 * 4 + k);
            let sent = |k: usize| of(cluster, before, thread / 4 * 4 + k) & 0xffff | (before as u32) << 16;
            let words: [u32; hopper::WORDS as usize] = [
                of(cluster, next, thread),
                four(0).wrapping_add(four(1)) ^ four(2).wrapping_add(four(3)),
                of(cluster, before, thread).rotate_left(before as u32),
                (rank << 16 | blocks) as u32,
                (0..4).fold(0, |all: u32, k| all.rotate_left(7) ^ sent(k)),
            ];
            words
        })
        .collect()
}

/// The sums of products by the model of the hardware, 16 of k at a time.
fn sums(products: &[Product], model: Model) -> Vec<u32> {
    assert!(!products.is_empty());
    let mut words = Vec::new();
    for Product { a, b, c, bf16, at } in products {
        assert_eq!(*at, words.len());
        let factor = |bits: &u16| if *bf16 { Factor::new::<Bf16>(*bits) } else { Factor::new::<F16>(*bits) };
        let factors = |lines: &[Vec<u16>]| -> Vec<Vec<Factor>> {
            lines.iter().map(|line| line.iter().map(factor).collect()).collect()
        };
        let (a, b) = (factors(a), factors(b));
        for (i, row) in a.iter().enumerate() {
            for (j, column) in b.iter().enumerate() {
                let steps = row.chunks(16).zip(column.chunks(16));
                let sum = steps.fold(c[i * b.len() + j], |sum, (a, b)| model.dot(a, b, sum));
                // And the model itself to f64: every cut loses less than one place of the largest term.
                let terms = row.iter().zip(column).map(|(a, b)| a.value() * b.value());
                let (exact, size) =
                    terms.fold((0.0, 0.0), |(sum, size): (f64, f64), term| (sum + term, size + term.abs()));
                let first = f64::from(c[i * b.len() + j]);
                let bound = (size + first.abs()) * 2f64.powi(-20) + 2f64.powi(-144);
                let near = (f64::from(sum) - exact - first).abs() <= bound;
                // A sum on the way may be too large for an f32.
                let large = size + first.abs();
                let over = !sum.is_finite() && (large.is_nan() || large >= f64::from(f32::MAX));
                assert!(near || over, "{sum} {exact} + {first}");
                words.push(sum.to_bits());
            }
        }
    }
    words
}

#[test]
fn every_probe_writes_what_it_should() {
    for case in cases() {
        let expected = expected(&case);
        for seed in [0, 1, 7] {
            let got = words_of(&case.on_emulator(seed));
            let wrong = got.iter().zip(&expected).position(|(got, expected)| {
                let nan = |bits: &u32| f32::from_bits(*bits).is_nan();
                got != expected && !(nan(got) && nan(expected))
            });
            assert!(
                got.len() == expected.len() && wrong.is_none(),
                "{} {:?}: word {wrong:?} of {}",
                case.name,
                case.launch,
                expected.len()
            );
        }
    }
}

/// The inputs of products tell every other way to add from the one that the hardware has.
#[test]
fn the_inputs_tell_models_of_addition_apart() {
    let hardware = Model::HARDWARE;
    let others = [
        Model { width: 8, ..hardware },
        Model { width: 4, ..hardware },
        Model { extra: 1, ..hardware },
        Model { extra: 3, ..hardware },
        Model { nearest: true, ..hardware },
    ];
    for name in [
        "gdn_probe_product_bf16",
        "gdn_probe_product_f16",
        "gdn_probe_wgmma_bf16_n32",
        "gdn_probe_wgmma_f16_n64",
    ] {
        let all: Vec<Vec<Product>> = cases().iter().filter(|case| case.name == name).map(products).collect();
        let [right, wrong @ ..] = [hardware, others[0], others[1], others[2], others[3], others[4]]
            .map(|model| all.iter().flat_map(|products| sums(products, model)).collect::<Vec<u32>>());
        for (model, wrong) in others.iter().zip(&wrong) {
            let differ = right.iter().zip(wrong).filter(|(a, b)| a != b).count();
            println!("{name}: {differ} of {} words tell {model:?} apart", right.len());
            assert!(differ * 50 > right.len(), "{name}: only {differ} words tell {model:?} apart");
        }
    }
}

/// The table of kernels and the table of cases have the same probes.
#[test]
fn every_probe_has_a_case() {
    let cases: Vec<&str> = cases().iter().map(|case| case.name).collect();
    for module in gdn_kernels::modules::PROBES {
        for kernel in module.kernels() {
            assert!(cases.contains(&kernel.name), "{}", kernel.name);
        }
    }
}
