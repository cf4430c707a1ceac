//! `cargo xtask test`: what a change must pass. CI runs it and nothing else.

use std::time::Instant;

use anyhow::{Context, bail};

use crate::{
    ascend, deny, engines, examples, fuzz, lanes, memory, neon, ptx, python,
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
    /// How many steps run beside each other. Most of them keep two cores busy for a part of their time only
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    lanes: u16,
    /// Seconds for each fuzz target
    #[arg(long, default_value_t = 30)]
    fuzz_seconds: u32,
    /// The step of that very name, as one of several that run beside each other
    #[arg(long, hide = true)]
    step: Option<String>,
}

const ENVIRONMENT: &str = "an environment with the Python package";
const PYTHON: &str = "the Python package";
const ENGINES: &str = "a whole vLLM on the CPU";

/// A part of the tests.
struct Step<'a> {
    name: &'static str,
    /// What no other step that uses it may run beside: a folder of builds, which cargo locks, or an
    /// environment.
    uses: Option<&'static str>,
    /// The step that must have passed before.
    after: Option<&'static str>,
    run: Box<dyn Fn() -> anyhow::Result<()> + 'a>,
}

fn step<'a>(
    name: &'static str,
    uses: Option<&'static str>,
    run: impl Fn() -> anyhow::Result<()> + 'a,
) -> Step<'a> {
    Step { name, uses, after: None, run: Box::new(run) }
}

/// A step that finds what [`ENVIRONMENT`] has made, and changes nothing there.
fn in_environment<'a>(name: &'static str, run: impl Fn() -> anyhow::Result<()> + 'a) -> Step<'a> {
    Step { after: Some(ENVIRONMENT), ..step(name, None, run) }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let quick: [Step<'_>; 4] = [
        step("formatting", None, || shell::run(&mut cargo(&["fmt", "--all", "--check"]))),
        step("clippy", Some("debug"), || {
            shell::run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-Dwarnings"]))
        }),
        step("documentation", Some("debug"), || {
            let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"]);
            shell::run(doc.env("RUSTDOCFLAGS", "-Dwarnings"))
        }),
        step("tests", Some("debug"), || shell::run(&mut cargo(&["test", "--workspace"]))),
    ];
    // The longest first, so that no lane is left with one of them at the end.
    let slow: [Step<'_>; 12] = [
        step(ENVIRONMENT, None, python::make),
        in_environment(PYTHON, python::test),
        in_environment(ENGINES, || engines::run(python::installed, &[])),
        step("tests under the address sanitizer", None, memory::sanitizer),
        step("fuzzing", None, || fuzz::run_all(args.fuzz_seconds)),
        step("tests on an emulated 64-bit Arm", None, neon::test),
        step("the PTX of the kernels", None, kernels),
        step("tests in Miri", None, memory::miri),
        step("the Triton kernel, lowered for Ascend and run on the CPU", Some("debug"), || ascend::run(&[])),
        step("examples that are packages of their own", None, examples::run),
        step("licences, duplicates and known vulnerabilities of dependencies", None, deny::run_all),
        step("the library and the command without CUDA", Some("debug"), || {
            shell::run(&mut cargo(&["clippy", "-p", "gdn", "--all-targets", "--", "-Dwarnings"]))?;
            shell::run(&mut cargo(&["clippy", "-p", "gdn-cli", "--no-default-features", "--", "-Dwarnings"]))
        }),
    ];
    if let Some(name) = &args.step {
        let mut steps = quick.iter().chain(&slow);
        let step = steps.find(|step| step.name == name).with_context(|| format!("no step is '{name}'"))?;
        return (step.run)();
    }
    let is_chosen = |step: &&Step<'_>| {
        let skipped = args.no_python && [ENVIRONMENT, PYTHON, ENGINES].contains(&step.name);
        !skipped && args.only.as_ref().is_none_or(|part| step.name.contains(part.as_str()))
    };
    let all = || quick.iter().chain(slow.iter().filter(|_| !args.quick));
    let wanted: Vec<_> = all().filter(is_chosen).flat_map(|step| [Some(step.name), step.after]).collect();
    let steps: Vec<_> = all().filter(|step| wanted.contains(&Some(step.name))).collect();
    let began = Instant::now();
    let skipped = match steps[..] {
        [] => {
            let names: Vec<_> = quick.iter().chain(&slow).map(|step| step.name).collect();
            bail!("no step is left to run; there are: {}", names.join(", "));
        }
        [only] => {
            println!("\n== {}", only.name);
            (only.run)().with_context(|| format!("{} failed", only.name))?;
            shell::skipped()
        }
        _ => {
            let steps =
                steps.iter().map(|&&Step { name, uses, after, .. }| lanes::Step { name, uses, after });
            let seconds = args.fuzz_seconds.to_string();
            lanes::run(steps.collect(), usize::from(args.lanes), |name| {
                ["test", "--fuzz-seconds", &seconds, "--step", name].map(str::to_owned).into()
            })?
        }
    };
    if args.quick {
        println!("\nskipped (--quick): {}", slow.map(|step| step.name).join(", "));
    }
    if args.no_python && !args.quick {
        println!("\nskipped (--no-python): {ENVIRONMENT}, {PYTHON}, {ENGINES}");
    }
    if let Some(part) = &args.only {
        println!("\nonly '{part}' was run");
    }
    for what in skipped {
        println!("\nskipped: {what}");
    }
    println!("\nall of it passed in {:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// That the committed PTX is that of the sources, with the compiler that makes it.
fn kernels() -> anyhow::Result<()> {
    if !ptx::can_build() {
        apt_install(&["rustc-web", "rust-web-src"])?;
    }
    ptx::run(true, None)
}
