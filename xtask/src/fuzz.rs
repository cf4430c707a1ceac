//! The libFuzzer targets of `fuzz/`.

use std::{
    fs,
    num::NonZero,
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread::{self, available_parallelism},
};

use anyhow::{Context, bail};

use crate::{
    memory::HOST,
    shell::{apt_install, cargo, command, has, root, run, skip},
};

/// What cargo-fuzz passes to the compiler: edges, comparisons and stack depth are reported to libFuzzer. And
/// what the library leaves out.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-sanitizer-coverage-stack-depth --cfg fuzzing \
    -Cllvm-args=-simplifycfg-branch-fold-threshold=0 -Zsanitizer=address -Cdebug-assertions -Coverflow-checks \
    --cfg without_avx2 --cfg without_avx512";

/// Each target for so many seconds: those that are given any bytes beside each other, then that of files that
/// are valid but for a few changes, on every core.
///
/// # Errors
/// What the compiler or a target says.
pub(crate) fn run_all(seconds: u32) -> anyhow::Result<()> {
    if !HOST.ends_with("-linux-gnu") {
        skip(format!("fuzzing: there is no sanitizer for {HOST}"));
        return Ok(());
    }
    if !has("c++") {
        apt_install(&["g++"])?;
    }
    let target = root().join("fuzz/target");
    let mut build = cargo(&["build", "--release", "--manifest-path", "fuzz/Cargo.toml", "--target", HOST]);
    build.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", FLAGS).env("CARGO_TARGET_DIR", &target);
    // Most of their time goes into files. What makes the kernels fast would take longer than they run; so
    // would code for wide registers.
    build.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
    run(&mut build)?;
    let fuzzer = |name: &str| -> anyhow::Result<Command> {
        let corpus = root().join("fuzz/corpus").join(name);
        fs::create_dir_all(&corpus)?;
        let program = target.join(HOST).join("release").join(name);
        let mut fuzzer = command(&program.display().to_string(), &[]);
        // Without what the command itself says.
        fuzzer.args(["-max_len=65536", "-print_final_stats=1", "-close_fd_mask=3"]);
        fuzzer.arg(format!("-max_total_time={seconds}"));
        // libFuzzer takes folders: the first is its own, with what it found before.
        fuzzer.arg(&corpus).env("ASAN_OPTIONS", "detect_odr_violation=0:malloc_context_size=1");
        Ok(fuzzer)
    };
    let mut bytes = Vec::new();
    for (name, seeds) in [("heads", "config*.json"), ("files", "r*.safetensors")] {
        let seeded = root().join("fuzz/target/seeds").join(name);
        seed(&seeded, seeds)?;
        let mut fuzzer = fuzzer(name)?;
        fuzzer.arg(&seeded);
        bytes.push((name, fuzzer));
    }
    // Shared out: each does several hundred a second, and choosing by what is rare would cost it a third of
    // that.
    let processes = available_parallelism().map_or(1, NonZero::get).min(8);
    let mut structures = Vec::new();
    for number in 0..processes {
        let mut fuzzer = fuzzer("structures")?;
        fuzzer.args([format!("-seed={}", number + 1), "-entropic=0".to_owned()]);
        structures.push(("structures", fuzzer));
    }
    beside_each_other(bytes)?;
    beside_each_other(structures)
}

/// Runs targets to their end, and says how much each of them did.
fn beside_each_other(fuzzers: Vec<(&str, Command)>) -> anyhow::Result<()> {
    let started = fuzzers.into_iter().map(|(name, mut fuzzer)| {
        Ok((name, fuzzer.stderr(Stdio::piped()).spawn().with_context(|| name.to_owned())?))
    });
    let started = started.collect::<anyhow::Result<Vec<(&str, Child)>>>()?;
    // What one says fits no pipe while another is waited for.
    let ended: Vec<_> = thread::scope(|scope| {
        let waited =
            started.into_iter().map(|(name, child)| (name, scope.spawn(|| child.wait_with_output())));
        let waited: Vec<_> = waited.collect();
        waited.into_iter().map(|(name, ended)| (name, ended.join())).collect()
    });
    for (name, ended) in ended {
        let Ok(ended) = ended else { bail!("{name}: waiting for it panicked") };
        let Output { status, stderr, .. } = ended?;
        let said = String::from_utf8_lossy(&stderr);
        if !status.success() {
            bail!("{name} ended with {status}:\n{said}");
        }
        let counts = ["stat::number_of_executed_units", "DONE"];
        for line in said.lines().filter(|line| counts.iter().any(|count| line.contains(count))) {
            println!("{name}: {line}");
        }
    }
    Ok(())
}

/// Copies the files of testdata/ that begin and end as the pattern does into a folder.
fn seed(folder: &Path, pattern: &str) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    let (start, end) = pattern.split_once('*').context("a pattern with a star")?;
    for entry in fs::read_dir(root().join("testdata"))? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with(start) && name.ends_with(end) {
            fs::copy(&path, folder.join(name))?;
        }
    }
    Ok(())
}
