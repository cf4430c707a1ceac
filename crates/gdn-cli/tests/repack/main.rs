//! `gdn repack` and `gdn verify` on checkpoints that transformers saved and on such as nobody should have
//! saved.

mod checkpoints;
mod follows;
mod formats;
mod headers;
mod projections;
mod random;
mod runs;
mod sources;
