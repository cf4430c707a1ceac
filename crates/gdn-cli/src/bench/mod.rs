//! `gdn bench`: an op against the least that it could take, in turns, behind a check by the oracle.

pub(crate) mod layer;
mod oracle;
mod source;
pub(crate) mod split;

use std::path::PathBuf;

use anyhow::bail;
use gdn::{Heads, Layout, Packing};

use crate::layout::LayoutArgs;

/// How long to measure, and where the figures go.
#[derive(clap::Args)]
struct Measuring {
    /// Seconds to spend on each line
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// One JSON object a line instead of a table
    #[arg(long)]
    json: bool,
    /// Draw throughput, beside that of what the op is measured against
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

impl Measuring {
    fn check(&self) -> anyhow::Result<()> {
        if !(self.seconds > 0.0 && self.seconds <= 3600.0) {
            bail!("--seconds is {}, it must be more than 0 and at most 3600", self.seconds);
        }
        Ok(())
    }
}

/// The layout that the arguments name; that of Qwen3-Next where they name none.
fn layout_of(args: &LayoutArgs) -> anyhow::Result<Layout> {
    let (heads, packing) = args.named()?;
    let heads = match heads {
        Some(heads) => heads,
        None => Heads::preset("Qwen3-Next-80B-A3B")?,
    };
    Ok(Layout::new(heads, packing.unwrap_or(Packing::Interleaved)))
}
