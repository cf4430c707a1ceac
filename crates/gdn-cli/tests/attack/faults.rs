//! Every system call of a run fails once, or is the last: `repack`, `split` and `merge`.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

use std::{fs, io};

use crate::{
    scene::{Files, Scene},
    syscalls::{self, Fate},
};

/// A command, and what is there before and after it.
struct Case {
    inputs: &'static [(&'static str, &'static str)],
    args: &'static [&'static str],
    /// Whether a run that was killed may leave a temporary file, or the same command takes up what it left.
    takes_up: bool,
}

const REPACK: Case = Case {
    inputs: &[("source", "repack/qwen3-next")],
    args: &["repack", "source", "-o", "new/out"],
    takes_up: true,
};
const SEPARATE: Case = Case {
    inputs: &[("source", "repack/fp8")],
    args: &["repack", "source", "-o", "out", "--names", "separate"],
    takes_up: true,
};
const SPLIT: Case =
    Case { inputs: &[("in", "r3-bf16.safetensors")], args: &["split", "in", "-o", "out"], takes_up: false };
const MERGE: Case = Case {
    inputs: &[("in", "r3-bf16.expected.safetensors")],
    args: &["merge", "in", "-o", "out"],
    takes_up: false,
};
const FORWARD: Case = Case {
    inputs: &[("in", "r1-f32-layer-decode.safetensors")],
    args: &["forward", "in", "-o", "out", "--threads", "1", "--max-error", "1e-6"],
    takes_up: false,
};
const ALL: [Case; 5] = [REPACK, SEPARATE, SPLIT, MERGE, FORWARD];

impl Case {
    /// What is there after a run that nothing happens to, and how many calls it makes. `None` where nobody
    /// may look at calls.
    fn whole(&self) -> Option<(Files, usize)> {
        let scene = Scene::new(self.inputs);
        let (output, calls) = match syscalls::run(&mut scene.command(self.args), |_, _| Fate::Done) {
            Ok(run) => run,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL | libc::EPERM)) => {
                println!("skipped: this system does not tell of system calls: {error}");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(calls > 20, "{calls} calls");
        Some((scene.files(), calls))
    }

    /// That what a run left, which had `fate` in its call `k`, is whole or not there, and that the same
    /// command goes on.
    fn check(&self, scene: &Scene, whole: &Files, told: &str, done: bool) {
        let there = scene.files();
        let out = |files: &Files| -> Files {
            let of_out = |name: &str| {
                let name = name.trim_start_matches("new/");
                name == "out" || name.starts_with("out/") && !name.ends_with(".gdn-lock")
            };
            files
                .iter()
                .filter(|(name, _)| of_out(name))
                .map(|(name, bytes)| (name.clone(), bytes.clone()))
                .collect()
        };
        let published = out(&there);
        assert!(published.is_empty() || published == out(whole), "{told}: {:?}", published.keys());
        if done {
            assert!(there == *whole, "{told}: {:?}", there.keys());
        } else {
            let again = scene.gdn(self.args);
            assert_eq!(again.status.code(), Some(0), "{told}, and then {again:?}");
            let mut there = scene.files();
            there.retain(|name, _| self.takes_up || !is_temporary(name));
            assert!(there == *whole, "{told}, and again: {:?}", there.keys());
        }
    }
}

fn is_temporary(name: &str) -> bool {
    name.starts_with(".gdn-") && name.ends_with(".tmp")
}

/// Lets call `k` of a run fail with `error`, for all `k` from `first` on in steps of `step`.
fn every_call_fails(case: &Case, error: i32, first: usize, step: usize) {
    let Some((whole, calls)) = case.whole() else { return };
    let mut refused = 0;
    for k in (first..calls).step_by(step) {
        let scene = Scene::new(case.inputs);
        let mut name = String::new();
        let (output, _) = syscalls::run(&mut scene.command(case.args), |i, call| {
            if i == k {
                name = call.to_owned();
                return Fate::Fails(error);
            }
            Fate::Done
        })
        .unwrap();
        let told = format!(
            "{:?}: call {k}, {name}, failed with {}: {output:?}",
            case.args,
            io::Error::from_raw_os_error(error)
        );
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => {}
            Some(2) => {
                assert!(said.starts_with("gdn: ") && !said.contains("panicked"), "{told}");
                refused += 1;
            }
            _ => panic!("{told}"),
        }
        let left: Vec<String> = scene.names();
        let whole_run = output.status.success();
        assert!(
            case.takes_up || name.starts_with("unlink") || !left.iter().any(|name| is_temporary(name)),
            "{told}: {left:?}"
        );
        case.check(&scene, &whole, &told, whole_run);
    }
    // The rest is what the runtime asks for before the command begins, and what there is another way for.
    assert!(2 * refused > calls, "{:?}: {refused} of {calls} runs noticed", case.args);
}

#[test]
fn every_call_of_a_repack_fails() {
    every_call_fails(&REPACK, libc::EIO, 0, 1);
}

#[test]
fn every_call_of_a_repack_to_separate_names_fails() {
    every_call_fails(&SEPARATE, libc::ENOSPC, 0, 1);
}

#[test]
fn every_call_of_split_and_merge_fails() {
    for case in [SPLIT, MERGE] {
        for error in [libc::EIO, libc::ENOSPC, libc::EAGAIN] {
            every_call_fails(&case, error, 0, 1);
        }
    }
}

#[test]
fn a_kill_in_every_call_of_a_run() {
    for case in ALL {
        let Some((whole, calls)) = case.whole() else { return };
        for k in 0..calls {
            let scene = Scene::new(case.inputs);
            let (output, _) =
                syscalls::run(
                    &mut scene.command(case.args),
                    |i, _| if i == k { Fate::Kills } else { Fate::Done },
                )
                .unwrap();
            assert_eq!(output.status.code(), None, "{output:?}");
            case.check(&scene, &whole, &format!("{:?}: killed in call {k}", case.args), false);
        }
    }
}

/// A run is killed in some call, the next one too, and so on; the last one has its way. Seeded.
#[test]
fn runs_that_are_killed_again_and_again() {
    let mut random = 0x5eed_u64;
    let mut random = move |below: usize| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) as usize % below
    };
    for case in [REPACK, SEPARATE] {
        let Some((whole, calls)) = case.whole() else { return };
        for round in 0..20 {
            let scene = Scene::new(case.inputs);
            let mut told = format!("{:?}, round {round}: killed in calls", case.args);
            for _ in 0..5 {
                let k = random(calls);
                told += &format!(" {k}");
                let (output, _) = syscalls::run(&mut scene.command(case.args), |i, _| {
                    if i == k { Fate::Kills } else { Fate::Done }
                })
                .unwrap();
                if output.status.success() {
                    break;
                }
            }
            if fs::metadata(scene.path(case.args[3])).is_err()
                || scene.names().iter().any(|name| name.ends_with(".gdn-lock"))
            {
                case.check(&scene, &whole, &told, false);
            }
            assert!(scene.files() == whole, "{told}");
        }
    }
}
