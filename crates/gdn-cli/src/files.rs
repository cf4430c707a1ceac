//! x
#[derive(Debug, thiserror::Error)]
#[error("interrupted, nothing was written")]
pub(crate) struct Interrupted;
