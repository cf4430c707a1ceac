//! The arguments that say how rows are laid out and how the CPU is to work, shared by the commands.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, bail};
use gdn::{Cpu, Heads, Layout, Packing, cpu::Isa};

use crate::files::read_text;

/// Where the heads come from: a preset, a config, or the four numbers.
#[derive(clap::Args)]
pub(crate) struct HeadsArgs {
    /// Heads of a published model, such as Qwen3-Next-80B-A3B (`gdn info` lists them)
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["config", "num_k_heads"], help_heading = "Heads")]
    preset: Option<String>,
    /// Heads from a Hugging Face config.json
    #[arg(long, value_name = "FILE", conflicts_with = "num_k_heads", help_heading = "Heads")]
    config: Option<PathBuf>,
    /// Key heads, and as many query heads
    #[arg(long, value_name = "HK", requires_all = ["num_v_heads", "head_k_dim", "head_v_dim"], help_heading = "Heads")]
    num_k_heads: Option<usize>,
    /// Value heads, a multiple of the key heads
    #[arg(long, value_name = "HV", requires = "num_k_heads", help_heading = "Heads")]
    num_v_heads: Option<usize>,
    /// Features of a query or key head
    #[arg(long, value_name = "DK", requires = "num_k_heads", help_heading = "Heads")]
    head_k_dim: Option<usize>,
    /// Features of a value head
    #[arg(long, value_name = "DV", requires = "num_k_heads", help_heading = "Heads")]
    head_v_dim: Option<usize>,
    /// The heads of one of so many tensor-parallel ranks
    #[arg(long, value_name = "RANKS", help_heading = "Heads")]
    tp_size: Option<usize>,
}

/// The heads, and how they are packed.
#[derive(clap::Args)]
pub(crate) struct LayoutArgs {
    #[command(flatten)]
    pub(crate) heads: HeadsArgs,
    /// Order of the packed features: interleaved (Qwen3-Next) or contiguous (Qwen3.5, Qwen3.6); a preset or a
    /// config with a known model_type says it too
    #[arg(long, help_heading = "Heads")]
    pub(crate) packing: Option<Packing>,
}

const HEADS_KEYS: [&str; 4] = ["num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"];

impl HeadsArgs {
    /// The heads that the arguments name, if they name any, and the packing, if what they name says it.
    pub(crate) fn named(&self) -> anyhow::Result<(Option<Heads>, Option<Packing>)> {
        let (heads, packing) = if let Some(model) = &self.preset {
            let layout = Layout::preset(model).context("--preset")?;
            (Some(layout.heads), Some(layout.packing))
        } else if let Some(path) = &self.config {
            let text = read_text(path, &format!("--config {}", path.display()))?;
            let heads = Heads::from_config(&text).with_context(|| format!("--config {}", path.display()))?;
            (Some(heads), Layout::from_config(&text).ok().map(|layout| layout.packing))
        } else if let (Some(hk), Some(hv), Some(dk), Some(dv)) =
            (self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim)
        {
            (Some(Heads::new(hk, hv, dk, dv)?), None)
        } else {
            (None, None)
        };
        let heads = match (heads, self.tp_size) {
            (Some(heads), Some(tp_size)) => Some(heads.shard(tp_size).context("--tp-size")?),
            (None, Some(_)) => {
                bail!("--tp-size divides heads that --preset, --config or --num-k-heads … name")
            }
            (heads, None) => heads,
        };
        Ok((heads, packing))
    }
}

impl LayoutArgs {
    /// The heads that the arguments name, if they name any, and the packing, if they or what they name say
    /// it.
    pub(crate) fn named(&self) -> anyhow::Result<(Option<Heads>, Option<Packing>)> {
        let (heads, packing) = self.heads.named()?;
        Ok((heads, self.packing.or(packing)))
    }

    /// The layout of a file with this metadata: arguments go before what the file says of itself.
    pub(crate) fn for_file(&self, metadata: &[(String, String)]) -> anyhow::Result<Layout> {
        let (heads, packing) = self.named()?;
        let heads = match heads {
            Some(heads) => heads,
            None => heads_from(metadata)?,
        };
        let packing = match (packing, value_of(metadata, "packing")) {
            (Some(packing), _) => packing,
            (None, Some(name)) => name.parse().context("metadata of the file")?,
            (None, None) => {
                bail!("the file's metadata has no 'packing': give --packing interleaved or contiguous")
            }
        };
        Ok(Layout::new(heads, packing))
    }
}

/// What metadata says under this key.
pub(crate) fn value_of<'a>(metadata: &'a [(String, String)], key: &str) -> Option<&'a str> {
    metadata.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
}

pub(crate) fn heads_from(metadata: &[(String, String)]) -> anyhow::Result<Heads> {
    let mut numbers = [0usize; 4];
    for (number, key) in numbers.iter_mut().zip(HEADS_KEYS) {
        let Some(text) = value_of(metadata, key) else {
            bail!(
                "the file's metadata has no '{key}': name the heads by --preset, --config or --num-k-heads …"
            );
        };
        *number = text.parse().with_context(|| format!("the file's metadata has {key} = '{text}'"))?;
    }
    let [hk, hv, dk, dv] = numbers;
    Heads::new(hk, hv, dk, dv).context("metadata of the file")
}

/// What a file says of its own layout.
pub(crate) fn metadata_of(layout: &Layout) -> [(&'static str, String); 5] {
    let Layout { heads, packing } = layout;
    [
        ("num_k_heads", heads.num_k_heads().to_string()),
        ("num_v_heads", heads.num_v_heads().to_string()),
        ("head_k_dim", heads.head_k_dim().to_string()),
        ("head_v_dim", heads.head_v_dim().to_string()),
        ("packing", packing.to_string()),
    ]
}

/// How the CPU is to compute.
#[derive(clap::Args)]
pub(crate) struct ThreadsArgs {
    /// Threads [default: one for each core, and one alone where there is little to do]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "CPU")]
    threads: Option<u16>,
    /// Instruction set: scalar, avx2, avx512 or neon [default: the best of this machine]
    #[arg(long, help_heading = "CPU")]
    isa: Option<Isa>,
}

/// How a GPU is to do a prefill.
#[derive(Clone, Copy, clap::Args)]
pub(crate) struct SegmentsArg {
    /// Let prefill on a GPU bring segments of a sequence of 2048 tokens and more forward side by side, where
    /// num_v_heads * head_v_dim is at most 1024: one is faster, a batch of them slower, and bits are no
    /// longer those of a sequence that is done in parts. Changes nothing elsewhere
    #[arg(long)]
    pub(crate) segments: bool,
}

/// How the CPU is to move rows.
#[derive(clap::Args)]
pub(crate) struct CpuArgs {
    #[command(flatten)]
    threads: ThreadsArgs,
    /// Rows that a thread takes at a time [default: as many as fit its cache]
    #[arg(long, value_name = "ROWS", help_heading = "CPU")]
    rows_per_iter: Option<usize>,
}

impl ThreadsArgs {
    /// The choices, with the threads ready that were asked for or that work on so many bytes will ask for.
    pub(crate) fn cpu(&self, bytes: usize) -> anyhow::Result<Cpu<'static>> {
        let mut cpu = Cpu::new();
        if let Some(threads) = self.threads {
            let threads = usize::from(threads);
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("--threads")?;
            cpu = cpu.threads(threads);
        } else {
            start_threads(bytes)?;
        }
        if let Some(isa) = self.isa {
            cpu = cpu.isa(isa).context("--isa")?;
        }
        Ok(cpu)
    }
}

impl CpuArgs {
    /// As [`ThreadsArgs::cpu`].
    pub(crate) fn cpu(&self, bytes: usize) -> anyhow::Result<Cpu<'static>> {
        Ok(self.threads.cpu(bytes)?.rows_per_iter(self.rows_per_iter.unwrap_or(0)))
    }
}

/// Below this the library never asks for a second thread.
const BYTES_OF_ONE_THREAD: usize = 1 << 20;

/// Has a thread ready for each core, where work on so many bytes may be shared. (The library would start them
/// when it needs them, and where it gets none it has no one to tell.)
pub(crate) fn start_threads(bytes: usize) -> anyhow::Result<()> {
    static STARTED: AtomicBool = AtomicBool::new(false);
    if bytes > BYTES_OF_ONE_THREAD && !STARTED.swap(true, Ordering::Relaxed) {
        rayon::ThreadPoolBuilder::new().build_global().context("cannot start threads")?;
    }
    Ok(())
}
