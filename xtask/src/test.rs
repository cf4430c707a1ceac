//! `cargo xtask test`: what a change must pass. CI runs it and nothing else.

use std::time::Instant;

use anyhow::Context;

use crate::{
    ascend, examples, neon, ptx, python,
    shell::{self, apt_install, cargo, command, has, root},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave out what takes minutes: licences, sanitizer, fuzzing, the emulated processor
    #[arg(long)]
    quick: bool,
    /// Leave out the Python package, whose environment is 5 GB
    #[arg(long)]
    no_python: bool,
    /// Only the steps whose names have this in them
    #[arg(long, value_name = "PART")]
    only: Option<String>,
    /// Seconds for each fuzz target
    #[arg(long, default_value_t = 20)]
    fuzz_seconds: u32,
}

const PYTHON: &str = "the Python package";

type Step<'a> = (&'a str, &'a dyn Fn() -> anyhow::Result<()>);

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let quick: [Step<'_>; 4] = [
        ("formatting", &|| shell::run(&mut cargo(&["fmt", "--all", "--check"]))),
        ("clippy", &|| {
            shell::run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-Dwarnings"]))
        }),
        ("documentation", &|| {
            let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"]);
            shell::run(doc.env("RUSTDOCFLAGS", "-Dwarnings"))
        }),
        ("tests", &|| shell::run(&mut cargo(&["test", "--workspace"]))),
    ];
    let slow: [Step<'_>; 9] = [
        ("the library and the command without CUDA", &|| {
            shell::run(&mut cargo(&["clippy", "-p", "gdn", "--all-targets", "--", "-Dwarnings"]))?;
            shell::run(&mut cargo(&["clippy", "-p", "gdn-cli", "--no-default-features", "--", "-Dwarnings"]))
        }),
        ("the PTX of the kernels", &kernels),
        ("examples that are packages of their own", &examples::run),
        ("the Triton kernel, lowered for Ascend and run on the CPU", &|| ascend::run(&[])),
        ("licences and duplicate dependencies", &licences),
        ("tests under the address sanitizer", &sanitizer),
        ("fuzzing", &|| fuzz(args.fuzz_seconds)),
        ("tests on an emulated 64-bit Arm", &neon::test),
        (PYTHON, &python::test),
    ];
    let chosen = |name: &str| {
        let skipped = args.no_python && name == PYTHON;
        !skipped && args.only.as_ref().is_none_or(|part| name.contains(part.as_str()))
    };
    let steps = quick.iter().chain(slow.iter().filter(|_| !args.quick)).filter(|(name, _)| chosen(name));
    for (name, step) in steps {
        let started = Instant::now();
        println!("\n== {name}");
        step().with_context(|| format!("{name} failed"))?;
        println!("== {name}: passed in {:.0} s", started.elapsed().as_secs_f64());
    }
    if args.quick {
        println!("\nskipped (--quick): {}", slow.map(|(name, _)| name).join(", "));
    }
    if args.no_python && !args.quick {
        println!("\nskipped (--no-python): {PYTHON}");
    }
    if let Some(part) = &args.only {
        println!("\nonly '{part}' was run");
    }
    println!("\nall of it passed");
    Ok(())
}

/// That the committed PTX is that of the sources, with the compiler that makes it.
fn kernels() -> anyhow::Result<()> {
    if !ptx::can_build() {
        apt_install(&["rustc-web", "rust-web-src"])?;
    }
    ptx::run(true)
}

/// The version of cargo-deny that is installed where there is none.
const CARGO_DENY: &str = "0.20.2";

fn licences() -> anyhow::Result<()> {
    let tools = root().join("target/tools");
    let path = tools.join("bin/cargo-deny");
    let installed = if has("cargo-deny") { "cargo-deny".into() } else { path };
    if !has(&installed.display().to_string()) {
        // Unoptimised, it is built in a quarter of the time and checks in seconds all the same.
        let mut install =
            cargo(&["install", "cargo-deny", "--version", CARGO_DENY, "--locked", "--debug", "--root"]);
        shell::run(install.arg(&tools))?;
    }
    shell::run(&mut command(&installed.display().to_string(), &["check", "licenses", "bans", "sources"]))
}

/// This machine's target, which the compiler's flags below are for.
const HOST: &str = env!("XTASK_HOST");

/// The copy code with a red zone around every allocation. The sanitizer is in the stable compiler, behind its
/// own lock.
fn sanitizer() -> anyhow::Result<()> {
    if !HOST.ends_with("-linux-gnu") {
        println!("skipped: no sanitizer for {HOST}");
        return Ok(());
    }
    let tests = ["--lib", "--test", "errors", "--test", "golden", "--test", "split"];
    let mut tests = cargo(&[&["test", "--package", "gdn", "--target", HOST], &tests[..]].concat());
    tests
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-Zsanitizer=address")
        .env("CARGO_TARGET_DIR", root().join("target/asan"))
        .env("CARGO_PROFILE_TEST_OPT_LEVEL", "1");
    shell::run(&mut tests)
}

/// What cargo-fuzz passes to the compiler: edges, comparisons and stack depth are reported to libFuzzer.
const FUZZ_FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-sanitizer-coverage-stack-depth --cfg fuzzing \
    -Cllvm-args=-simplifycfg-branch-fold-threshold=0 -Zsanitizer=address -Cdebug-assertions -Coverflow-checks \
    -Ccodegen-units=1";

fn fuzz(seconds: u32) -> anyhow::Result<()> {
    if !HOST.ends_with("-linux-gnu") {
        println!("skipped: no sanitizer for {HOST}");
        return Ok(());
    }
    if !has("c++") {
        apt_install(&["g++"])?;
    }
    let target = root().join("fuzz/target");
    let mut build = cargo(&["build", "--release", "--manifest-path", "fuzz/Cargo.toml", "--target", HOST]);
    build.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", FUZZ_FLAGS).env("CARGO_TARGET_DIR", &target);
    shell::run(&mut build)?;
    for (name, seeds) in [("heads", "config*.json"), ("files", "r*.safetensors")] {
        let corpus = root().join("fuzz/corpus").join(name);
        std::fs::create_dir_all(&corpus)?;
        // libFuzzer takes folders: the first is its own, with what it found before.
        let seeded = root().join("fuzz/target/seeds").join(name);
        seed(&seeded, seeds)?;
        let program = target.join(HOST).join("release").join(name);
        let mut fuzzer = command(&program.display().to_string(), &[]);
        fuzzer.arg(format!("-max_total_time={seconds}")).args([
            "-max_len=65536",
            "-print_final_stats=1",
            "-close_fd_mask=2",
        ]);
        fuzzer.arg(&corpus).arg(&seeded).env("ASAN_OPTIONS", "detect_odr_violation=0");
        shell::run(&mut fuzzer)?;
    }
    Ok(())
}

/// Copies the files of testdata/ that begin and end as the pattern does into a folder.
fn seed(folder: &std::path::Path, pattern: &str) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let (start, end) = pattern.split_once('*').context("a pattern with a star")?;
    for entry in std::fs::read_dir(root().join("testdata"))? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with(start) && name.ends_with(end) {
            std::fs::copy(&path, folder.join(name))?;
        }
    }
    Ok(())
}
