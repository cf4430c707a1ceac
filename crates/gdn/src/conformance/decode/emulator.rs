//! The cases on the emulated GPU, which checks every access and runs blocks and threads in a random order.

use gdn_kernels::{
    emulator::{self, Memory, Place, Thread},
    entries,
};

use super::{Access, Call, cases, extents, moved};
use crate::{
    cuda::{decode::Job, share::Profile},
    decode::Plan,
    dtype::Dtype,
    state::Kept,
    view::DeviceAddress,
};

macro_rules! kernels {
    ($job:ident, $gpu:ident: $($name:ident)*) => {
        match $job.kernel {
            // SAFETY: the emulator checks every access.
            $(stringify!($name) => unsafe { entries::$name($gpu, &$job.args) },)*
            other => panic!("there is no kernel {other}"),
        }
    };
}

fn kernel(job: &Job, gpu: &Thread<'_>) {
    kernels!(job, gpu:
        gdn_decode_f32_64 gdn_decode_f32_128 gdn_decode_f32_256 gdn_decode_f32_narrow
        gdn_decode_f32_64_plain gdn_decode_f32_96_plain gdn_decode_f32_128_plain gdn_decode_f32_256_plain
        gdn_decode_bf16_64_plain gdn_decode_bf16_96_plain gdn_decode_bf16_128_plain gdn_decode_bf16_256_plain
        gdn_decode_f32_64_tokens gdn_decode_f32_96_tokens gdn_decode_f32_128_tokens gdn_decode_f32_256_tokens
        gdn_decode_bf16_64_tokens gdn_decode_bf16_96_tokens gdn_decode_bf16_128_tokens gdn_decode_bf16_256_tokens
        gdn_decode_bf16_128_tokens_large
        gdn_decode_f32_few_32 gdn_decode_f32_few_64 gdn_decode_f32_few_128
        gdn_decode_bf16_few_32 gdn_decode_bf16_few_64 gdn_decode_bf16_few_128
        gdn_decode_f16_64 gdn_decode_f16_128 gdn_decode_f16_256 gdn_decode_f16_narrow
        gdn_decode_bf16_64 gdn_decode_bf16_128 gdn_decode_bf16_256 gdn_decode_bf16_narrow);
}

/// Runs a call on the emulator. The kernel that it took.
pub(super) fn emulate(call: &mut Call<'_, '_>, profile: Profile) -> Option<&'static str> {
    emulate_in(&Memory::new(), call, profile, 0, |_| {}, |_| false)
}

/// The same in memory that may have more in it, with another plan, and blocks in another order. Once more where
/// `is_again` says so of the kernel, early behind itself, for what the emulator finds then.
fn emulate_in(
    memory: &Memory,
    call: &mut Call<'_, '_>,
    profile: Profile,
    seed: u64,
    change: impl FnOnce(&mut Plan<DeviceAddress>),
    is_again: impl FnOnce(&'static str) -> bool,
) -> Option<&'static str> {
    let plan = Plan::new(call).unwrap();
    let placed: Vec<_> = extents(&plan)
        .into_iter()
        .map(|extent| {
            // SAFETY: the tensor's memory, from its first element to its last.
            let bytes = unsafe { std::slice::from_raw_parts(extent.at, extent.bytes) };
            let place = Place { misalignment: extent.at.addr() as u64 % 256, ..Place::dense(bytes.len()) };
            let address = match extent.access {
                Access::Reads => memory.input(bytes, place),
                Access::Writes => memory.output(bytes.len(), place),
                Access::Updates => memory.state(bytes, place),
            };
            (extent, address)
        })
        .collect();
    let address = |at: *mut u8| {
        let found = placed.iter().find(|(extent, _)| extent.at == at);
        DeviceAddress(found.expect("a tensor of the plan").1)
    };
    let mut plan = moved(&plan, address);
    change(&mut plan);
    let job = Job::new(&plan, profile).unwrap()?;
    let launch = emulator::Launch::new([job.blocks, 1, 1], job.threads)
        .shared(job.shared)
        .cluster(job.cluster)
        .seed(seed + u64::from(job.blocks) * 31 + u64::from(job.cluster));
    emulator::run_in_step(memory, launch, |gpu| kernel(&job, gpu));
    for (extent, address) in placed.iter().filter(|(extent, _)| extent.access != Access::Reads) {
        let (bytes, stored) = memory.read(*address);
        for (i, (byte, stored)) in bytes.iter().zip(stored).enumerate() {
            if stored == 1 {
                // SAFETY: a byte of the tensor's memory, which the call may write.
                unsafe { extent.at.add(i).write(*byte) };
            }
        }
    }
    if is_again(job.kernel) {
        emulator::run_in_step(memory, launch.early(1), |gpu| kernel(&job, gpu));
    }
    Some(job.kernel)
}

#[test]
fn the_oracle_on_the_emulator() {
    let mut seen = std::collections::BTreeSet::new();
    cases::oracle(&mut |call, profile| {
        emulate_in(&Memory::new(), call, profile, 0, |_| {}, |kernel| seen.insert(kernel));
    });
    assert_eq!(seen.len(), 27, "{seen:?}");
}

#[test]
fn any_layer_on_the_emulator() {
    cases::any_layer(40, &mut |call, profile| {
        emulate(call, profile);
    });
}

#[test]
fn contracts_on_the_emulator() {
    let mut seen = std::collections::BTreeSet::new();
    cases::contracts(&mut |call, profile| seen.extend(emulate(call, profile)));
    for name in ["gdn_decode_f32_64", "gdn_decode_f32_64_tokens", "gdn_decode_bf16_64_tokens"] {
        assert!(seen.contains(name), "{seen:?}");
    }
}

#[test]
fn tokens_at_once_or_one_by_one_on_the_emulator() {
    let mut seen = std::collections::BTreeSet::new();
    cases::tokens_at_once(&mut |call, profile| seen.extend(emulate(call, profile)));
    let of_tokens = seen.iter().filter(|name| name.contains("tokens"));
    assert_eq!(of_tokens.count(), 9, "{seen:?}");
}

#[test]
fn slots_that_are_not_there_on_the_emulator() {
    cases::slots_that_are_not_there(&mut |call, profile| {
        emulate(call, profile);
    });
}

#[test]
fn many_sequences_on_the_emulator() {
    cases::many_sequences(101, &mut |call, profile| {
        emulate(call, profile);
    });
}

/// Windows after each token share memory in SGLang's pool: one of T + W - 2 inputs a sequence. Several
/// threads write one place, and the same there.
#[test]
fn windows_that_share_memory_on_the_emulator() {
    let ways = [(1, 8, 1), (1, 1, 2), (2, 1, 3), (4, 1, 4)];
    let kept = || [cases::Kept::new([2, 3], Dtype::F32, 0), cases::Kept::plain(Dtype::BF16, cases::TOKENS)];
    for ((cluster, steps, seed), before) in ways.into_iter().flat_map(|way| kept().map(|kept| (way, kept))) {
        let profile = cases::profile(cluster, steps, false);
        let mut apart = before.clone();
        apart.run(5, |call| {
            emulate(call, profile);
        });
        let mut together = before.clone();
        let [rows, tokens, channels, columns] = before.windows.sizes;
        let inputs = tokens + columns - 1;
        let (memory, bytes) = (Memory::new(), rows * channels * inputs * 2);
        let pool = memory.agreed(bytes, Place::dense(bytes));
        together.run(5, |call| {
            let in_pool = |plan: &mut Plan<DeviceAddress>| {
                let Kept::EachIn(windows, _) = &mut plan.conv.kept else { panic!("windows of each token") };
                windows.at = DeviceAddress(pool);
                windows.strides = [channels * inputs, 1, inputs, 1];
            };
            emulate_in(&memory, call, profile, seed, in_pool, |_| false);
        });
        let (bytes, stored) = memory.read(pool);
        let bits = |i: usize| u16::from_ne_bytes([bytes[2 * i], bytes[2 * i + 1]]);
        for [row, t, channel, column] in apart.windows.places() {
            let i = (row * channels + channel) * inputs + t + column;
            // There are two sequences, and a row of the pool that is nobody's.
            assert_eq!(stored[2 * i], u8::from(row < 2));
            let got = f32::from_bits(u32::from(bits(i)) << 16);
            assert!(row == 2 || f64::from(got) == apart.windows.get([row, t, channel, column]));
        }
        assert!(together.batch.out.bytes == apart.batch.out.bytes, "{cluster} blocks");
    }
}
