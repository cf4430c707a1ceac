//! The command `gdn`: arguments, files and figures around the library `gdn`.
//!
//! [`run`] is all there is to call; the binary does so, and the fuzz target.

mod bench;
mod device;
mod files;
mod header;
mod info;
mod layout;
mod plot;
mod progress;
mod repack;
mod transform;

use std::{
    ffi::OsString,
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

/// Runs the command with these arguments, the first of which is its own name. Exit codes: 0 done, 2 not done (one line on
/// standard error says why), 130 interrupted.
pub fn run(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(usage) => {
            let _ = usage.print();
            return ExitCode::from(u8::try_from(usage.exit_code()).unwrap_or(2));
        }
    };
    let result = match args.command {
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
