//! Tests whose every access to memory is looked at: under the address sanitizer, and in Miri.

use crate::shell::{cargo, command, has, root, run, skip};

/// This machine's target, which the compiler's flags are for.
pub(crate) const HOST: &str = env!("XTASK_HOST");

/// The library's tests that are worth running on more than this machine as it is: of its ops on the CPU,
/// against their oracles.
pub(crate) const LIBRARY: [&str; 13] = [
    // The emulator comes with the library's tests, and none of these runs it.
    "--config",
    "profile.dev.package.gdn-kernels.opt-level=0",
    "--package",
    "gdn",
    "--lib",
    "--test",
    "errors",
    "--test",
    "golden",
    "--test",
    "split",
    "--test",
    "layer",
];

/// The library's ops, with a red zone around every allocation. The sanitizer is in the stable compiler, behind
/// its own lock. The command, whose unsafe code is two maps of files and a handler of signals, is under it
/// where it is fuzzed.
pub(crate) fn sanitizer() -> anyhow::Result<()> {
    if !HOST.ends_with("-linux-gnu") {
        skip(format!("the address sanitizer: there is none for {HOST}"));
        return Ok(());
    }
    let mut tests = cargo(&[&["test", "--target", HOST], &LIBRARY[..], &["--test", "repack"]].concat());
    // What this processor cannot run is not compiled: wide registers take long, with each access checked.
    #[cfg(target_arch = "x86_64")]
    let without = if std::arch::is_x86_feature_detected!("avx512f") { "" } else { " --cfg without_avx512" };
    #[cfg(not(target_arch = "x86_64"))]
    let without = "";
    tests
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", format!("-Zsanitizer=address{without}"))
        // Tests of errors leak what their views point to.
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .env("CARGO_TARGET_DIR", root().join("target/asan"))
        .env("CARGO_PROFILE_TEST_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
    run(&mut tests)
}

/// The compiler that Miri is of: not every night's has it.
const NIGHTLY: &str = "nightly-2026-05-20";

/// Views, maps, repacking, the portable copy code and decode in an interpreter that knows what Rust leaves
/// undefined.
///
/// It takes hundreds of times as long as a processor: property tests, conformance with every instruction set
/// and prefill, whose smallest work is a chunk of 16 tokens, did not end within five minutes, and the
/// sanitizer sees those. It has no GPU, no huge pages and no maps of files. So it gets tests of its own, of
/// seconds.
pub(crate) fn miri() -> anyhow::Result<()> {
    if !has("rustup") {
        skip("Miri: it comes with rustup, which is not here");
        return Ok(());
    }
    let mut install = command("rustup", &["toolchain", "install", NIGHTLY, "--profile", "minimal"]);
    install.args(["--component", "miri", "--component", "rust-src", "--no-self-update"]);
    let installed = install.output()?;
    if !installed.status.success() {
        let said = String::from_utf8_lossy(&installed.stderr).into_owned();
        let why = said.lines().find(|line| line.starts_with("error")).unwrap_or("rustup does not say why");
        skip(format!("Miri: {NIGHTLY} cannot be installed: {why}"));
        return Ok(());
    }
    for chosen in [&["--test", "small"][..], &["--test", "layer", "--", "small::decode"]] {
        let mut tests =
            command("rustup", &["run", NIGHTLY, "cargo", "miri", "test", "--locked", "--package", "gdn"]);
        tests.args(chosen);
        // The cargo that runs this is another's.
        for name in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"] {
            tests.env_remove(name);
        }
        run(tests.env("CARGO_TARGET_DIR", root().join("target/miri")))?;
    }
    Ok(())
}
