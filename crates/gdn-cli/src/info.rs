//! `gdn info`: this machine, and a picture of the layouts.

use crate::{layout::LayoutArgs, print};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    layout: LayoutArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let _ = &args.layout;
    print("")
}
