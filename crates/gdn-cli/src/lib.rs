//! The command `gdn`: arguments, files and figures around the library `gdn`.
//!
//! [`run`] is all there is to call; the binary does so, and the fuzz target.

mod bench;
mod call;
mod device;
mod figures;
mod files;
mod forward;
mod header;
mod info;
mod interrupts;
mod layout;
mod numbers;
mod plot;
mod progress;
mod repack;
mod terminal;
mod transform;

use std::{ffi::OsString, io, process::ExitCode};

use clap::{CommandFactory, Parser, Subcommand};

use self::terminal::{Faults, ReaderGone, note, print, to_stderr};

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
    /// Compute a layer between its two GEMMs: convolution, gates, delta rule, gated norm
    Forward(forward::Args),
    /// Put a checkpoint's projections into contiguous order once, after which the split is a view; or undo
    /// that
    Repack(repack::Args),
    /// Prove by reading back that a checkpoint is another one repacked
    Verify(repack::verify::Args),
    /// Show this machine and, for given heads, the row layouts before and after the split
    Info(info::Args),
    /// Measure an op against the least that it could take: a copy of the same bytes, or bare arithmetic
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
    Split(bench::split::Args),
    /// A few tokens of each sequence, over a range of batches: against a copy of the states and of all else
    /// that is read and written
    Decode(bench::layer::DecodeArgs),
    /// Many tokens, over a range of them: against fused multiply-adds that do nothing else
    Prefill(bench::layer::PrefillArgs),
}

/// Runs the command with these arguments, the first of which is its own name. Exit codes: 0 done, 2 not done
/// (one line on standard error says why), 128 and the number of the signal where one ended it: 130 for
/// Ctrl-C.
pub fn run(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(usage) => {
            let lost = usage.print().is_err_and(|error| error.kind() != io::ErrorKind::BrokenPipe);
            let code = if lost { 2 } else { usage.exit_code() };
            return ExitCode::from(u8::try_from(code).unwrap_or(2));
        }
    };
    let result = match args.command {
        Command::Split(args) => transform::split(&args),
        Command::Merge(args) => transform::merge(&args),
        Command::Forward(args) => forward::run(&args),
        Command::Repack(args) => repack::run(&args),
        Command::Verify(args) => repack::verify::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Bench(BenchOp::Split(args)) => bench::split::run(&args),
        Command::Bench(BenchOp::Decode(args)) => bench::layer::decode(&args),
        Command::Bench(BenchOp::Prefill(args)) => bench::layer::prefill(&args),
        Command::Completions { shell } => completions(shell),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<ReaderGone>() => ExitCode::SUCCESS,
        Err(error) => {
            // Wherever the signal came in, there is no more to say.
            if let Some(interrupted) = error.downcast_ref::<interrupts::Interrupted>() {
                note(&interrupted.to_string());
                return ExitCode::from(interrupted.exit_code());
            }
            match error.downcast_ref::<Faults>() {
                Some(Faults { what, faults }) => {
                    note(&format!("{what}:"));
                    faults.iter().for_each(|fault| to_stderr("  ", fault));
                }
                None => note(&format!("{error:#}")),
            }
            ExitCode::from(2)
        }
    }
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "gdn", &mut script);
    print(&String::from_utf8_lossy(&script))
}
