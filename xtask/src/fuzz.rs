//! The libFuzzer targets of `fuzz/`.

use std::{fs, path::Path};

use anyhow::Context;

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

/// How long a target runs.
enum Until {
    Seconds(u32),
    Runs(u32),
}

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
    for (name, seeds, until) in [
        ("heads", Some("config*.json"), Until::Seconds(seconds)),
        ("files", Some("r*.safetensors"), Until::Seconds(seconds)),
        ("structures", None, Until::Runs(runs)),
    ] {
        let corpus = root().join("fuzz/corpus").join(name);
        fs::create_dir_all(&corpus)?;
        let program = target.join(HOST).join("release").join(name);
        let mut fuzzer = command(&program.display().to_string(), &[]);
        fuzzer.arg(match until {
            Until::Seconds(seconds) => format!("-max_total_time={seconds}"),
            Until::Runs(runs) => format!("-runs={runs}"),
        });
        // Without what the command itself says.
        fuzzer.args(["-max_len=65536", "-print_final_stats=1", "-close_fd_mask=3"]);
        // libFuzzer takes folders: the first is its own, with what it found before.
        fuzzer.arg(&corpus).env("ASAN_OPTIONS", "detect_odr_violation=0");
        if let Some(seeds) = seeds {
            let seeded = root().join("fuzz/target/seeds").join(name);
            seed(&seeded, seeds)?;
            fuzzer.arg(&seeded);
        }
        run(&mut fuzzer)?;
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
