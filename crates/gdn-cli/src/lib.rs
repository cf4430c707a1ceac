//! The command `gdn`: arguments, files and figures around the library `gdn`.
//!
//! [`run`] is all there is to call; the binary does so, and the fuzz target.

mod bench;
mod device;
mod files;
mod header;
mod info;
mod interrupts;
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
/// standard error says why), 128 and the number of the signal where one ended it: 130 for Ctrl-C.
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
        Command::Repack(args) => repack::run(&args),
        Command::Verify(args) => repack::verify::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Bench(BenchOp::Split(args)) => bench::run(&args),
        Command::Completions { shell } => completions(shell),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<ReaderGone>() => ExitCode::SUCCESS,
        Err(error) => {
            match error.downcast_ref::<Faults>() {
                Some(Faults { what, faults }) => {
                    note(&format!("{what}:"));
                    faults.iter().for_each(|fault| to_stderr("  ", fault));
                }
                None => note(&format!("{error:#}")),
            }
            ExitCode::from(
                error.downcast_ref::<interrupts::Interrupted>().map_or(2, |signal| signal.exit_code()),
            )
        }
    }
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "gdn", &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// What is wrong, and a line for each fault.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {}", faults.join("; "))]
struct Faults {
    what: String,
    faults: Vec<String>,
}

/// Whoever reads our standard output has had enough of it, which is no error.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads standard output")]
struct ReaderGone;

/// Writes to standard output. (`println!` would panic where nobody reads.)
fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        result => result.context("cannot write to standard output"),
    }
}

/// A line on standard error. Where nobody can read it, the work goes on all the same.
fn note(text: &str) {
    to_stderr("gdn: ", text);
}

fn to_stderr(before: &str, text: &str) {
    let _ = io::stderr().write_all(format!("{before}{}\n", one_line(text)).as_bytes());
}

/// The longest line that is printed, in characters.
const LONGEST_LINE: usize = 4000;

/// The text as one line that a terminal can show: names from files may have anything in them, and be of any length. What is no
/// printable character is escaped; of a line that is too long the middle is left out.
fn one_line(text: &str) -> String {
    let mut line = String::new();
    for char in text.chars() {
        match char {
            '"' | '\'' | '\\' => line.push(char),
            _ => line.extend(char.escape_debug()),
        }
    }
    let half = LONGEST_LINE / 2;
    let (first, last) = (line.char_indices().nth(half), line.char_indices().rev().nth(half));
    match (first, last) {
        (Some((first, _)), Some((last, _))) if first < last => {
            format!("{} [{} bytes left out] {}", &line[..first], last - first, &line[last..])
        }
        _ => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_a_terminal_can_show() {
        let hostile = "a'\"\\ü\n\u{1b}[31m\u{202e}\u{0}\u{7f}\r";
        assert_eq!(one_line(hostile), "a'\"\\ü\\n\\u{1b}[31m\\u{202e}\\0\\u{7f}\\r");
        for (chars, cut) in
            [(LONGEST_LINE - 1, false), (LONGEST_LINE, false), (LONGEST_LINE + 2, true), (1 << 20, true)]
        {
            let line = one_line(&format!("{}end", "ü".repeat(chars - 3)));
            assert!(line.chars().count() <= LONGEST_LINE + 40 && line.ends_with("end"), "{chars}");
            assert_eq!(line.contains("left out"), cut, "{chars}");
        }
    }
}
