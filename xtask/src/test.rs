//! `cargo xtask test`: what a change must pass. CI runs it and nothing else.

use std::time::Instant;

use anyhow::{Context, bail};

use crate::{
    ascend, deny, engines, examples, fuzz, memory, neon, ptx, python,
    shell::{self, apt_install, cargo},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave out what takes minutes: licences, sanitizer, Miri, fuzzing, the emulated processor
    #[arg(long)]
    quick: bool,
    /// Leave out the Python package and vLLM, whose environments are 6 GB
    #[arg(long)]
    no_python: bool,
    /// Only the steps whose names have this in them
    #[arg(long, value_name = "PART")]
    only: Option<String>,
    /// Seconds for each fuzz target that is given any bytes
    #[arg(long, default_value_t = 20)]
    fuzz_seconds: u32,
    /// Files for the fuzz target that is given valid ones with a few changes
    #[arg(long, default_value_t = 100_000)]
    fuzz_runs: u32,
}

const PYTHON: &str = "the Python package";
const ENGINES: &str = "a whole vLLM on the CPU";

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
    let slow: [Step<'_>; 11] = [
        ("the library and the command without CUDA", &|| {
            shell::run(&mut cargo(&["clippy", "-p", "gdn", "--all-targets", "--", "-Dwarnings"]))?;
            shell::run(&mut cargo(&["clippy", "-p", "gdn-cli", "--no-default-features", "--", "-Dwarnings"]))
        }),
        ("the PTX of the kernels", &kernels),
        ("examples that are packages of their own", &examples::run),
        ("the Triton kernel, lowered for Ascend and run on the CPU", &|| ascend::run(&[])),
        ("licences, duplicates and known vulnerabilities of dependencies", &deny::run_all),
        ("tests under the address sanitizer", &memory::sanitizer),
        ("tests in Miri", &memory::miri),
        ("fuzzing", &|| fuzz::run_all(args.fuzz_seconds, args.fuzz_runs)),
        ("tests on an emulated 64-bit Arm", &neon::test),
        (PYTHON, &python::test),
        (ENGINES, &|| engines::run(&[])),
    ];
    let chosen = |name: &str| {
        let skipped = args.no_python && [PYTHON, ENGINES].contains(&name);
        !skipped && args.only.as_ref().is_none_or(|part| name.contains(part.as_str()))
    };
    let steps = quick.iter().chain(slow.iter().filter(|_| !args.quick)).filter(|(name, _)| chosen(name));
    let steps: Vec<_> = steps.collect();
    if steps.is_empty() {
        let names: Vec<_> = quick.iter().chain(&slow).map(|(name, _)| *name).collect();
        bail!("no step is left to run; there are: {}", names.join(", "));
    }
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
        println!("\nskipped (--no-python): {PYTHON}, {ENGINES}");
    }
    if let Some(part) = &args.only {
        println!("\nonly '{part}' was run");
    }
    for what in shell::skipped() {
        println!("\nskipped: {what}");
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
