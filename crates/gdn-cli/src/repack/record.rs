//! How the projections of a checkpoint lie: by gdn's own record in the metadata of its files, by the arguments, by its config.

use anyhow::{Context, bail};
use gdn::{Heads, Layout, Packing};

use super::{checkpoint::Checkpoint, names::Names};
use crate::{
    header::FileMetadata,
    layout::{LayoutArgs, heads_from, metadata_of, value_of},
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

/// What the arguments and its own files say of a checkpoint.
pub(super) struct Told {
    /// Of the arguments.
    heads: Option<Heads>,
    /// `--packing`.
    packing: Option<Packing>,
    /// Of the model that `--preset` or `--config` names.
    model: Option<Packing>,
}

impl Told {
    pub(super) fn new(args: &LayoutArgs) -> anyhow::Result<Self> {
        let (heads, model) = args.heads.named()?;
        Ok(Self { heads, packing: args.packing, model })
    }

    /// No arguments.
    pub(super) fn nothing() -> Self {
        Self { heads: None, packing: None, model: None }
    }

    /// The heads: those of the arguments, else of the record, else of `config.json`.
    pub(super) fn heads(&self, checkpoint: &Checkpoint) -> anyhow::Result<Heads> {
        match (self.heads, checkpoint.record) {
            (Some(given), Some(record)) if given != record.layout.heads => {
                bail!("it was repacked with {}, the arguments say {given}", record.layout.heads)
            }
            (Some(heads), _) => Ok(heads),
            (None, Some(record)) => Ok(record.layout.heads),
            (None, None) => {
                let config = checkpoint
                    .config()?
                    .context("it has no config.json: name the heads with --config or --preset")?;
                Ok(Heads::from_config(&config)?)
            }
        }
    }

    /// The order of the outputs of projections with these names, and who says so: the record, else `--packing`, else the
    /// model's config. `None` where nobody does.
    ///
    /// # Errors
    /// Where two of them contradict each other.
    pub(super) fn packing(
        &self,
        checkpoint: &Checkpoint,
        names: Names,
    ) -> anyhow::Result<Option<(Packing, &'static str)>> {
        if let Some(record) = checkpoint.record {
            if record.names != names {
                let (own, got) = (record.names.name(), names.name());
                bail!("its metadata speaks of {own} names, its tensors' are {got}");
            }
            let own = record.layout.packing;
            if let Some(given) = self.packing.filter(|given| *given != own) {
                bail!("its metadata says it was repacked and is {own}, --packing says {given}");
            }
            return Ok(Some((own, "its metadata says so")));
        }
        if names == Names::Separate {
            if self.packing == Some(Packing::Interleaved) {
                bail!(
                    "--packing interleaved goes with in_proj_qkvz and in_proj_ba, it has them in separate parts"
                );
            }
            return Ok(Some((Packing::Contiguous, "separate parts are so")));
        }
        if let Some(given) = self.packing {
            return Ok(Some((given, "--packing says so")));
        }
        let own = match checkpoint.config()? {
            Some(config) => Layout::from_config(&config).ok().map(|layout| layout.packing),
            None => None,
        };
        match (self.model, own) {
            (Some(model), Some(own)) if model != own => bail!(
                "--preset or --config names a model that is {model}, its own config.json one that is {own}: \
                 say which with --packing"
            ),
            (Some(packing), _) => Ok(Some((packing, "--preset or --config names such a model"))),
            (None, Some(packing)) => Ok(Some((packing, "its config.json is that of such a model"))),
            (None, None) => Ok(None),
        }
    }
}
