//! gdn's own record of how the projections lie, in the metadata of the files that it repacked.

use anyhow::Context;
use gdn::{Layout, Packing};

use super::names::Names;
use crate::{
    header::FileMetadata,
    layout::{heads_from, metadata_of, value_of},
};

/// What gdn wrote into the metadata of a file that it repacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) layout: Layout,
    pub(super) names: Names,
}

/// All keys of a record begin with this.
const PREFIX: &str = "gdn.";
/// What the file's metadata was where it said nothing: `null` or `{}`.
const BEFORE: &str = "metadata";

impl Record {
    /// The metadata of a file with the record in it.
    pub(super) fn add_to(&self, metadata: &FileMetadata) -> FileMetadata {
        let layout = metadata_of(&self.layout).map(|(key, value)| (format!("{PREFIX}{key}"), value));
        let names = (format!("{PREFIX}names"), self.names.name().to_owned());
        let before = match metadata {
            FileMetadata::Null => Some("null"),
            FileMetadata::Pairs(pairs) if pairs.is_empty() => Some("{}"),
            _ => None,
        };
        let before = before.map(|text| (format!("{PREFIX}{BEFORE}"), text.to_owned()));
        let own = layout.into_iter().chain([names]).chain(before);
        FileMetadata::Pairs(metadata.pairs().iter().cloned().chain(own).collect())
    }

    /// The record in the metadata of a file, and what the metadata was without it.
    pub(super) fn take_from(metadata: &FileMetadata) -> anyhow::Result<(Option<Self>, FileMetadata)> {
        let (own, rest): (Vec<_>, Vec<_>) =
            metadata.pairs().iter().cloned().partition(|(key, _)| key.starts_with(PREFIX));
        let own: Vec<_> =
            own.into_iter().map(|(key, value)| (key[PREFIX.len()..].to_owned(), value)).collect();
        let Some(packing) = value_of(&own, "packing") else { return Ok((None, metadata.clone())) };
        let packing: Packing = packing.parse().context("metadata of the file")?;
        let names = value_of(&own, "names").unwrap_or_default();
        let names = Names::ALL.into_iter().find(|known| known.name() == names);
        let names = names.context("metadata of the file: gdn.names is neither 'fused' nor 'separate'")?;
        let record = Self { layout: Layout::new(heads_from(&own)?, packing), names };
        let before = match value_of(&own, BEFORE) {
            _ if !rest.is_empty() => FileMetadata::Pairs(rest),
            Some("null") => FileMetadata::Null,
            Some("{}") => FileMetadata::Pairs(Vec::new()),
            _ => FileMetadata::Absent,
        };
        Ok((Some(record), before))
    }
}
