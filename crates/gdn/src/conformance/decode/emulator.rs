//! The cases on the emulated GPU, which checks every access and runs blocks and threads in a random order.

use gdn_kernels::{
    emulator::{self, Memory, Place, Thread},
    entries,
};

use super::{Access, Call, cases, extents, moved};
use crate::{
    cuda::{decode::Job, share::Profile},
    decode::Plan,
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
        gdn_decode_f16_64 gdn_decode_f16_128 gdn_decode_f16_256 gdn_decode_f16_narrow
        gdn_decode_bf16_64 gdn_decode_bf16_128 gdn_decode_bf16_256 gdn_decode_bf16_narrow);
}

/// Runs a call on the emulator. The kernel that it took.
pub(super) fn emulate(call: &mut Call<'_, '_>, profile: Profile) -> Option<&'static str> {
    let plan = Plan::new(call).unwrap();
    let memory = Memory::new();
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
    let job = Job::new(&moved(&plan, address), profile).unwrap()?;
    let launch = emulator::Launch::new([job.blocks, 1, 1], job.threads)
        .shared(job.shared)
        .cluster(job.cluster)
        .seed(u64::from(job.blocks) * 31 + u64::from(job.cluster));
    emulator::run_in_step(&memory, launch, |gpu| kernel(&job, gpu));
    for (extent, address) in placed.iter().filter(|(extent, _)| extent.access != Access::Reads) {
        let (bytes, stored) = memory.read(*address);
        for (i, (byte, stored)) in bytes.iter().zip(stored).enumerate() {
            if stored == 1 {
                // SAFETY: a byte of the tensor's memory, which the call may write.
                unsafe { extent.at.add(i).write(*byte) };
            }
        }
    }
    Some(job.kernel)
}

#[test]
fn the_oracle_on_the_emulator() {
    let mut seen = std::collections::BTreeSet::new();
    cases::oracle(&mut |call, profile| seen.extend(emulate(call, profile)));
    assert_eq!(seen.len(), 20, "{seen:?}");
}

#[test]
fn any_layer_on_the_emulator() {
    cases::any_layer(40, &mut |call, profile| {
        emulate(call, profile);
    });
}

#[test]
fn contracts_on_the_emulator() {
    cases::contracts(&mut |call, profile| {
        emulate(call, profile);
    });
}

#[test]
fn tokens_at_once_or_one_by_one_on_the_emulator() {
    cases::tokens_at_once(&mut |call, profile| {
        emulate(call, profile);
    });
}

#[test]
fn slots_that_are_not_there_on_the_emulator() {
    cases::slots_that_are_not_there(&mut |call, profile| {
        emulate(call, profile);
    });
}
