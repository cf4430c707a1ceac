//! `cargo xtask record`: the figures that README and docs/benchmarks.md speak of, measured by `gdn bench` and
//! committed.

use std::{
    fs::{self, File},
    path::Path,
    process::Stdio,
};

use anyhow::Context;

use crate::shell::{self, cargo, command, root};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A short name of the machine: the folder under benches/record/
    machine: String,
    /// The day, as in 2026-01-31: the name of the files
    date: String,
    /// Seconds for each number of tokens
    #[arg(long, default_value = "3")]
    seconds: String,
}

/// What is measured, each as arguments to `gdn bench split`.
const RUNS: &[&[&str]] = &[
    &["--preset", "Qwen3-Next-80B-A3B"],
    &["--preset", "Qwen3-Next-80B-A3B", "--packing", "contiguous"],
    &["--preset", "Qwen3-Next-80B-A3B", "--dtype", "f32"],
    &["--preset", "Qwen3-Next-80B-A3B", "--dtype", "fp8"],
    &["--preset", "Qwen3.6-27B", "--packing", "interleaved"],
    &[
        "--num-k-heads",
        "16",
        "--num-v-heads",
        "32",
        "--head-k-dim",
        "96",
        "--head-v-dim",
        "96",
        "--packing",
        "interleaved",
    ],
    &["--preset", "Qwen3-Next-80B-A3B", "--tokens", "4096,16384,65536", "--threads", "1"],
    &[
        "--preset",
        "Qwen3-Next-80B-A3B",
        "--tokens",
        "4096,16384,65536",
        "--threads",
        "1",
        "--packing",
        "contiguous",
    ],
];

/// Fresh outputs, with huge pages and with ordinary ones.
const FRESH: &[&[&str]] = &[
    &["--preset", "Qwen3-Next-80B-A3B", "--tokens", "64,512,4096,16384", "--outputs", "fresh"],
    &["--preset", "Qwen3-Next-80B-A3B", "--tokens", "64,512,4096,16384", "--outputs", "fresh-ordinary"],
];

fn measure(args: &Args, gdn: &str, path: &Path) -> anyhow::Result<()> {
    let file = File::create(path)?;
    for extra in RUNS.iter().chain(FRESH) {
        println!("gdn bench split {}", extra.join(" "));
        let mut bench = command(gdn, &["bench", "split", "--json", "--seconds", &args.seconds]);
        shell::run(bench.args(*extra).stdout(Stdio::from(file.try_clone()?)))?;
    }
    Ok(())
}

/// Writes `benches/record/MACHINE/DATE.jsonl`, `.svg`, and what the machine is as `.txt`.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    shell::run(&mut cargo(&["build", "--release", "--package", "gdn-cli"]))?;
    let gdn = root().join("target/release/gdn").display().to_string();
    let folder = root().join("benches/record").join(&args.machine);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let path = |extension: &str| folder.join(format!("{}.{extension}", args.date));
    shell::run(command(&gdn, &["info"]).stdout(Stdio::from(File::create(path("txt"))?)))?;
    measure(args, &gdn, &path("jsonl"))?;
    let svg = path("svg").display().to_string();
    shell::run(&mut command(
        &gdn,
        &["bench", "split", "--preset", "Qwen3-Next-80B-A3B", "--seconds", &args.seconds, "--plot", &svg],
    ))
}
