//! The cases on the emulated GPU, which checks every access and runs blocks and threads in a random order.

use std::collections::{BTreeMap, BTreeSet};

use gdn_kernels::{
    emulator::{self, Logistic, Memory, Place, Thread},
    entries,
};

use super::{Access, Call, cases, extents, moved, segments, setup::Options};
use crate::{
    cuda::prefill::job::{Job, Profile, Stage, Step},
    dtype::Dtype,
    prefill::Plan,
    view::DeviceAddress,
};

macro_rules! kernels {
    ($step:ident, $gpu:ident: $($name:ident)*) => {
        match $step.kernel {
            // SAFETY: the emulator checks every access.
            $(stringify!($name) => unsafe { entries::$name($gpu, &$step.args) },)*
            other => panic!("there is no kernel {other}"),
        }
    };
}

fn kernel(step: &Step, gpu: &Thread<'_>) {
    kernels!(step, gpu:
        gdn_prefill_convolve_128 gdn_prefill_convolve_128_ahead gdn_prefill_convolve_256 gdn_prefill_convolve_any
        gdn_prefill_prepare gdn_prefill_norm
        gdn_prefill_scan_64 gdn_prefill_scan_96 gdn_prefill_scan_128 gdn_prefill_scan_192 gdn_prefill_scan_256
        gdn_prefill_transition_64 gdn_prefill_transition_96 gdn_prefill_transition_128 gdn_prefill_combine
        gdn_prefill_scan_group_64 gdn_prefill_scan_group_96 gdn_prefill_scan_group_128
        gdn_prefill_transition_group_64 gdn_prefill_transition_group_96 gdn_prefill_transition_group_128);
}

/// The launches of a job so far, as far as they matter to what may run beside the next one.
#[derive(Default)]
struct Streams {
    /// Those on the stream beside the caller's since the last scan that was waited for: of each its window, or the one
    /// that it makes states for.
    beside: Vec<(usize, u32)>,
    windows: u32,
    /// The last one on the caller's.
    last: usize,
}

impl Streams {
    /// What [`Launch::beside`](emulator::Launch::beside) and [`Launch::early`](emulator::Launch::early) are of launch `i`.
    fn next(&mut self, i: usize, on_side: bool, (stage, early): (Stage, bool)) -> (u64, usize) {
        if on_side {
            assert!(!early, "{stage:?}");
            self.beside.push((i, self.windows));
            self.windows += u32::from(matches!(stage, Stage::Scan(_)));
            return (0, 0);
        }
        if let Stage::Norm(w) = stage {
            self.beside.retain(|(_, of)| *of > w);
        }
        let beside = self.beside.iter().fold(0, |bits, (j, _)| bits | 1 << (i - j - 1));
        let early = if early { i - self.last } else { 0 };
        self.last = i;
        (beside, early)
    }
}

/// Runs a call on the emulator. The kernels that it took, and their blocks' threads.
fn emulate(call: &mut Call<'_, '_>, profile: Profile) -> Vec<(&'static str, u32)> {
    emulate_with(Logistic::default(), call, profile)
}

/// The same with a GPU's own numbers.
pub(super) fn emulate_with(
    logistic: Logistic,
    call: &mut Call<'_, '_>,
    profile: Profile,
) -> Vec<(&'static str, u32)> {
    let plan = Plan::new(call).unwrap();
    let memory = Memory::of(logistic);
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
    let bytes = cases::scratch_bytes(&plan, profile);
    let scratch = memory.scratch(bytes, Place::dense(bytes));
    let Some(job) = Job::new(&moved(&plan, address), (DeviceAddress(scratch), bytes), profile).unwrap()
    else {
        return Vec::new();
    };
    let (mut kernels, mut streams) = (Vec::new(), Streams::default());
    for (i, (stage, step, early)) in job.launches().enumerate() {
        let (beside, early) = streams.next(i, job.is_on_side(stage), (stage, early));
        let launch = emulator::Launch::new([step.blocks, 1, 1], step.threads).shared(step.shared);
        let launch = launch.seed(i as u64 * 31 + 7).beside(beside).early(early);
        emulator::run_in_step(&memory, launch, |gpu| kernel(&step, gpu));
        kernels.push((step.kernel, step.threads));
    }
    for (extent, address) in placed.iter().filter(|(extent, _)| extent.access != Access::Reads) {
        let (bytes, stored) = memory.read(*address);
        for (i, (byte, stored)) in bytes.iter().zip(stored).enumerate() {
            if stored == 1 {
                // SAFETY: a byte of the tensor's memory, which the call may write.
                unsafe { extent.at.add(i).write(*byte) };
            }
        }
    }
    kernels
}

/// The kernels that calls took, and with how many threads.
type Seen = BTreeMap<&'static str, BTreeSet<u32>>;

fn see(seen: &mut Seen, kernels: Vec<(&'static str, u32)>) {
    for (kernel, threads) in kernels {
        seen.entry(kernel).or_default().insert(threads);
    }
}

#[test]
fn the_oracle_on_the_emulator() {
    let mut seen = Seen::new();
    cases::oracle(&mut |call, profile| see(&mut seen, emulate(call, profile)));
    assert_eq!(seen.len(), 12, "{seen:?}");
    assert_eq!(Vec::from_iter(&seen["gdn_prefill_convolve_128"]), [&64, &128]);
    assert_eq!(Vec::from_iter(&seen["gdn_prefill_convolve_128_ahead"]), [&32]);
}

#[test]
fn long_keys_on_the_emulator() {
    let mut seen = Seen::new();
    cases::long_keys(&mut |call, profile| see(&mut seen, emulate(call, profile)));
    for kernel in ["gdn_prefill_scan_192", "gdn_prefill_scan_256"] {
        assert!(seen.contains_key(kernel), "{seen:?}");
    }
    assert_eq!(Vec::from_iter(&seen["gdn_prefill_convolve_256"]), [&32, &64, &128]);
}

#[test]
fn hostile_long_keys_on_the_emulator() {
    cases::hostile_long_keys(&mut |call, profile| {
        emulate(call, profile);
    });
}

#[test]
fn hostile_inputs_on_the_emulator() {
    cases::hostile(&mut |call, profile| {
        emulate(call, profile);
    });
}

#[test]
fn the_scan_is_chosen_by_layer_and_device() {
    cases::scans();
}

#[test]
fn the_convolution_is_shared_out_by_layer_and_device() {
    cases::convolutions();
}

#[test]
fn what_runs_beside_a_scan_is_chosen_by_layer_and_window() {
    cases::windows();
}

#[test]
fn fading_states_on_the_emulator() {
    cases::fading_states(&mut |call, profile| {
        emulate(call, profile);
    });
}

#[test]
fn any_layer_on_the_emulator() {
    cases::any_layer(8, cases::LONG, &mut |call, profile| {
        emulate(call, profile);
    });
}

#[test]
fn contracts_on_the_emulator() {
    cases::contracts(cases::LONG, &mut |call, profile| {
        emulate(call, profile);
    });
}

/// What a device is held to with a million tokens and thousands of sequences, with fewer.
#[test]
fn beside_the_cpu_on_the_emulator() {
    let options = Options { dtype: Dtype::BF16, ..Options::new([1, 1, 64, 64]) };
    for lens in [vec![1003], cases::tiny(21)] {
        cases::beside_the_cpu(&options, &lens, 93, &mut |call, profile| {
            emulate(call, profile);
        });
    }
}

#[test]
fn segments_on_the_emulator() {
    let mut seen = Seen::new();
    segments::segments(&mut |call, profile| see(&mut seen, emulate(call, profile)));
    assert_eq!(seen.len(), 18, "{seen:?}");
}
