//! The project's own chores: `cargo xtask test`, `cargo xtask record`, `cargo xtask ptx`.

#[cfg(test)]
mod arrows;
mod ascend;
mod deny;
mod engines;
mod examples;
mod fuzz;
mod lanes;
mod memory;
mod neon;
mod ptx;
mod python;
mod record;
mod shell;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The project's own chores
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Everything that must hold before a change lands; installs what it needs
    Test(test::Args),
    /// Measure the CPU ops on this machine and write the records under benches/record/
    Record(record::Args),
    /// Build the PTX of the GPU kernels, and hold it against what a driver can load
    Ptx {
        /// Fail where the committed PTX is stale, and write nothing
        #[arg(long)]
        check: bool,
        /// Only the files whose names have this in them, such as prefill.sm_90a, for a look at one: what is
        /// recorded of the sources stays stale until all are built
        #[arg(long, value_name = "PART", conflicts_with = "check")]
        only: Option<String>,
    },
    /// Compile the examples that are packages of their own, and run what a CPU can
    Examples,
    /// Lower the Triton kernel with triton-ascend, and run what comes out on the CPU
    Ascend {
        /// Arguments for pytest
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        pytest: Vec<String>,
    },
    /// Run a whole vLLM on the CPU, with gdn and without
    Engines {
        /// Arguments for pytest
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        pytest: Vec<String>,
    },
}

fn main() -> ExitCode {
    let ended = match Args::parse().task {
        Task::Test(args) => test::run(&args),
        Task::Record(args) => record::run(&args),
        Task::Ptx { check, only } => ptx::run(check, only.as_deref()),
        Task::Examples => examples::run(),
        Task::Ascend { pytest } => ascend::run(&pytest),
        Task::Engines { pytest } => engines::run(python::install, &pytest),
    };
    // Without a backtrace, whatever the environment asks for: it is of this program, not of what failed, and
    // would stand below what did.
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("Error: {why:#}");
            ExitCode::FAILURE
        }
    }
}
