//! The project's own chores: `cargo xtask test`, `cargo xtask record`.

mod neon;
mod record;
mod shell;
mod test;

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
}

fn main() -> anyhow::Result<()> {
    match Args::parse().task {
        Task::Test(args) => test::run(&args),
        Task::Record(args) => record::run(&args),
    }
}
