//! x
#[derive(clap::Args)]
pub(crate) struct Args {}
pub(crate) fn split(_: &Args) -> anyhow::Result<()> {
    Ok(())
}
pub(crate) fn merge(_: &Args) -> anyhow::Result<()> {
    Ok(())
}
