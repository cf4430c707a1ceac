//! How the projections of a checkpoint lie: by its record, by the arguments, by its config.

use anyhow::{Context, bail};
use gdn::{Heads, Layout, Packing};

use super::{checkpoint::Checkpoint, names::Names};
use crate::layout::LayoutArgs;

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

    /// The order of the outputs of projections with these names, and who says so: the record, else
    /// `--packing`, else the model's config. `None` where nobody does.
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
