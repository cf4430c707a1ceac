//! The command `gdn`: arguments, files and figures around the library `gdn`.

mod bench;
mod files;
mod info;
mod layout;
mod plot;
mod progress;
mod repack;
mod transform;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};

/// Fused kernels for the Gated DeltaNet layer of Qwen3-Next, Qwen3.5 and Qwen3.6.
#[derive(Parser)]
#[command(name = "gdn", version, max_term_width = 100, arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Take packed projections apart: mixed_qkvz, mixed_ba to mixed_qkv, z, b, a
    Split(transform::Args),
    /// Put them together again, the exact inverse of split
    Merge(transform::Args),
    /// Put a checkpoint's projections into contiguous order once, after which the split is a view; or undo that
    Repack(repack::Args),
    /// Prove by reading back that a checkpoint is another one repacked
    Verify(repack::verify::Args),
    /// Show this machine and, for given heads, the row layouts before and after the split
    Info(info::Args),
    /// Measure an op against a copy of the same bytes
    #[command(subcommand)]
    Bench(BenchOp),
    /// Print a script that completes gdn's arguments in a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

#[derive(Subcommand)]
enum BenchOp {
    /// The split, over a range of tokens
    Split(bench::Args),
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Split(args) => transform::split(&args),
        Command::Merge(args) => transform::merge(&args),
        Command::Repack(args) => repack::run(&args),
        Command::Verify(args) => repack::verify::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Bench(BenchOp::Split(args)) => bench::run(&args),
        Command::Completions { shell } => completions(shell),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads our output has had enough of it.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "gdn: {error:#}");
            ExitCode::from(if error.is::<files::Interrupted>() { 130 } else { 2 })
        }
    }
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "gdn", &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// Writes to standard output. (`println!` would panic where nobody reads.)
fn print(text: &str) -> anyhow::Result<()> {
    io::stdout()
        .write_all(text.as_bytes())
        .and_then(|()| io::stdout().flush())
        .context("cannot write to standard output")
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
