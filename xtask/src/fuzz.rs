//! The libFuzzer targets of `fuzz/`.

use std::{
    fs,
    num::NonZero,
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread::available_parallelism,
};

use anyhow::{Context, bail};

use crate::{
    memory::HOST,
    shell::{apt_install, cargo, command, has, root, run, skip},
};

/// What cargo-fuzz passes to the compiler: edges, comparisons and stack depth are reported to libFuzzer.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-sanitizer-coverage-stack-depth --cfg fuzzing \
    -Cllvm-args=-simplifycfg-branch-fold-threshold=0 -Zsanitizer=address -Cdebug-assertions -Coverflow-checks \
    -Ccodegen-units=1";

/// Any bytes for so many seconds each, and so many files that are valid but for a few changes.
///
/// # Errors
/// What the compiler or a target says.
pub(crate) fn run_all(seconds: u32, runs: u32) -> anyhow::Result<()> {
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
    run(&mut build)?;
    let fuzzer = |name: &str| -> anyhow::Result<Command> {
        let corpus = root().join("fuzz/corpus").join(name);
        fs::create_dir_all(&corpus)?;
        let program = target.join(HOST).join("release").join(name);
        let mut fuzzer = command(&program.display().to_string(), &[]);
        // Without what the command itself says.
        fuzzer.args(["-max_len=65536", "-print_final_stats=1", "-close_fd_mask=3"]);
        // libFuzzer takes folders: the first is its own, with what it found before.
        fuzzer.arg(&corpus).env("ASAN_OPTIONS", "detect_odr_violation=0:malloc_context_size=1");
        Ok(fuzzer)
    };
    for (name, seeds) in [("heads", "config*.json"), ("files", "r*.safetensors")] {
        let seeded = root().join("fuzz/target/seeds").join(name);
        seed(&seeded, seeds)?;
        run(fuzzer(name)?.arg(&seeded).arg(format!("-max_total_time={seconds}")))?;
    }
    // Shared out: each does several hundred a second, and choosing by what is rare would cost it a third of
    // that.
    let processes = u32::try_from(available_parallelism().map_or(1, NonZero::get).min(8))?;
    let started = (0..processes).map(|number| {
        let mut fuzzer = fuzzer("structures")?;
        fuzzer.args([format!("-runs={}", runs.div_ceil(processes)), format!("-seed={}", number + 1)]);
        Ok(fuzzer.arg("-entropic=0").stderr(Stdio::piped()).spawn()?)
    });
    let started = started.collect::<anyhow::Result<Vec<_>>>()?;
    let ended: Vec<_> = started.into_iter().map(Child::wait_with_output).collect::<Result<_, _>>()?;
    for Output { status, stderr, .. } in ended {
        let said = String::from_utf8_lossy(&stderr);
        if !status.success() {
            bail!("structures ended with {status}:\n{said}");
        }
        println!(
            "structures: {}",
            said.lines().filter(|line| line.contains("stat::number")).collect::<String>()
        );
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
