//! The binary: see the library beside it.

use std::process::ExitCode;

fn main() -> ExitCode {
    gdn_cli::run(std::env::args_os())
}
