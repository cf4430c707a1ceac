//! `gdn bench split`: the op against a copy of the same bytes, interleaved, behind a check of every element.

use std::fmt::Write as _;

use anyhow::{Context, bail};
use gdn::{
    Cpu, Layout, PackedBuf, Pages, UnpackedBuf,
    cpu::{Stores, copy_bytes},
    reference,
};
use serde_json::json;

use super::{Measuring, layout_of};
use crate::{
    device::{Backend, Device},
    figures::{available_memory, medians, time},
    layout::{CpuArgs, LayoutArgs},
    plot::{self, Series},
    terminal::print,
};

#[derive(clap::Args)]
#[command(after_help = "\
Times are medians over interleaved rounds. `copy` is the faster of memcpy and a streaming copy of one \
buffer of as many bytes as the op reads, by as many threads. The ratio is the op's time over the copy's.")]
pub(crate) struct Args {
    #[command(flatten)]
    layout: LayoutArgs,
    /// Where to measure: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    #[command(flatten)]
    cpu: CpuArgs,
    /// Numbers of tokens to measure
    #[arg(long, value_delimiter = ',', value_name = "N,…", default_value = "1,8,64,512,4096,16384,65536",
          value_parser = clap::value_parser!(u32).range(1..))]
    tokens: Vec<u32>,
    /// Type of the elements of both projections
    #[arg(long, default_value = "bf16")]
    dtype: Dtype,
    /// Where results go
    #[arg(long, default_value = "given")]
    outputs: Outputs,
    /// How results are stored
    #[arg(long, default_value = "auto")]
    stores: StoresArg,
    #[command(flatten)]
    measuring: Measuring,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Dtype {
    Bf16,
    F16,
    F32,
    F64,
    Fp8,
    Int8,
}

impl Dtype {
    fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::Fp8 | Self::Int8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Outputs {
    /// Into memory that was touched before
    Given,
    /// Into a fresh block of huge pages at each call, freed after it
    Fresh,
    /// Into a fresh block of ordinary pages at each call, freed after it
    FreshOrdinary,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum StoresArg {
    Auto,
    Cached,
    Streaming,
}

/// One line of the table.
struct Record {
    tokens: usize,
    bytes: usize,
    seconds: f64,
    copy_seconds: f64,
    /// Of the CPU; 0 on a GPU.
    threads: usize,
}

impl Record {
    /// Bytes read and written in a second.
    fn bytes_per_second(&self, seconds: f64) -> f64 {
        2.0 * self.bytes as f64 / seconds
    }

    fn ratio(&self) -> f64 {
        self.seconds / self.copy_seconds
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.measuring.check()?;
    let layout = layout_of(&args.layout)?;
    let heads = layout.heads;
    let cpu = args.cpu.cpu(usize::MAX)?.stores(match args.stores {
        StoresArg::Auto => Stores::Auto,
        StoresArg::Cached => Stores::Cached,
        StoresArg::Streaming => Stores::Streaming,
    });
    let backend = Backend::new(args.device, cpu)?;
    if !args.measuring.json {
        print(&format!(
            "split, {heads}, {}, {}, {}\n{:>9} {:>12} {:>7} {:>12} {:>12} {:>8} {:>8}\n",
            layout.packing,
            args.dtype.name(),
            backend.unit(),
            "tokens",
            "bytes",
            "threads",
            "split",
            "copy",
            "GB/s",
            "ratio",
        ))?;
    }
    let mut records = Vec::new();
    for &tokens in &args.tokens {
        let record = match &backend {
            Backend::Cpu(cpu) => measure(&layout, tokens as usize, args, cpu)?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => measure_on(&layout, tokens as usize, args, gpu)?,
        };
        print(&line(&record, &layout, args, backend.unit()))?;
        records.push(record);
    }
    if let Some(path) = &args.measuring.plot {
        let series = |name: &str, seconds: fn(&Record) -> f64| Series {
            name: name.to_owned(),
            points: records
                .iter()
                .map(|record| (record.tokens as f64, record.bytes_per_second(seconds(record)) / 1e9))
                .collect(),
        };
        let title = format!("split, {heads}, {}, {}", layout.packing, args.dtype.name());
        let series = [series("split", |r| r.seconds), series("copy of the same bytes", |r| r.copy_seconds)];
        plot::lines(path, &title, ["tokens", "GB/s, read and written"], &series)?;
    }
    Ok(())
}

fn line(record: &Record, layout: &Layout, args: &Args, unit: &str) -> String {
    let Record { tokens, bytes, seconds, copy_seconds, threads } = *record;
    let mut line = String::new();
    if args.measuring.json {
        let heads = layout.heads;
        let object = json!({
            "op": "split", "device": args.device.to_string(), "isa": unit, "threads": threads, "tokens": tokens,
            "num_k_heads": heads.num_k_heads(), "num_v_heads": heads.num_v_heads(),
            "head_k_dim": heads.head_k_dim(), "head_v_dim": heads.head_v_dim(),
            "packing": layout.packing.name(), "dtype": args.dtype.name(),
            "outputs": match args.outputs {
                Outputs::Given => "given",
                Outputs::Fresh => "fresh",
                Outputs::FreshOrdinary => "fresh-ordinary",
            },
            "bytes": bytes, "seconds": seconds, "copy_seconds": copy_seconds, "ratio_to_copy": record.ratio(),
        });
        let _ = writeln!(line, "{object}");
    } else {
        let _ = writeln!(
            line,
            "{tokens:>9} {bytes:>12} {threads:>7} {:>12} {:>12} {:>8.1} {:>8.3}",
            time(seconds),
            time(copy_seconds),
            record.bytes_per_second(seconds) / 1e9,
            record.ratio(),
        );
    }
    line
}

/// Bytes that differ from their neighbours.
fn fill(bytes: &mut [u8]) {
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0];
    }
}

/// Checks the op on this machine's own choices, then times it.
fn measure(layout: &Layout, tokens: usize, args: &Args, cpu: &Cpu) -> anyhow::Result<Record> {
    let size = args.dtype.bytes();
    let heads = layout.heads;
    let features = heads.qkvz_features() + heads.ba_features();
    let bytes =
        tokens.checked_mul(features * size).context("--tokens: that many do not fit the address space")?;
    if let Some(available) = available_memory().filter(|available| bytes.saturating_mul(4) > *available) {
        bail!(
            "--tokens {tokens}: measuring takes {} bytes of memory, {available} are available",
            bytes.saturating_mul(4)
        );
    }
    let mut packed = PackedBuf::new(&heads, tokens, size, size)?;
    fill(packed.bytes_mut());
    let mut given = UnpackedBuf::new(&heads, tokens, size, size)?;
    given.bytes_mut().fill(0xA5);
    gdn::split(layout, packed.as_ref(), given.as_mut(), cpu)?;
    if let Err(difference) = reference::check(&heads, layout.packing, &packed.as_ref(), &given.as_ref()) {
        bail!("the split is wrong, nothing was measured: {difference}");
    }

    let threads = cpu.chosen_threads(2 * bytes);
    let mut copied = PackedBuf::new(&heads, tokens, size, size)?;
    copied.bytes_mut().fill(0xA5);
    let mut split = || -> Result<(), gdn::BufError> {
        match args.outputs {
            Outputs::Given => Ok(gdn::split(layout, packed.as_ref(), given.as_mut(), cpu)?),
            Outputs::Fresh | Outputs::FreshOrdinary => {
                let pages = if args.outputs == Outputs::Fresh { Pages::Huge } else { Pages::Ordinary };
                let mut fresh = UnpackedBuf::with_pages(&heads, tokens, size, size, pages)?;
                Ok(gdn::split(layout, packed.as_ref(), fresh.as_mut(), cpu)?)
            }
        }
    };
    let plain = Cpu::new().threads(threads).stores(Stores::Cached);
    let streaming = plain.stores(Stores::Streaming);
    let [seconds, plain, streaming] = medians(args.measuring.seconds, |contender, repeats| {
        match contender {
            0 => (0..repeats).try_for_each(|_| split())?,
            1 => (0..repeats).for_each(|_| copy_bytes(packed.bytes(), copied.bytes_mut(), &plain)),
            _ => (0..repeats).for_each(|_| copy_bytes(packed.bytes(), copied.bytes_mut(), &streaming)),
        }
        Ok::<(), gdn::BufError>(())
    })?;
    Ok(Record { tokens, bytes, seconds, copy_seconds: plain.min(streaming), threads })
}

/// The same on a GPU, within its memory: the copy is the driver's own.
#[cfg(feature = "cuda")]
fn measure_on(layout: &Layout, tokens: usize, args: &Args, gpu: &gdn::cuda::Gpu) -> anyhow::Result<Record> {
    use gdn::cuda::Bench;

    let (size, heads) = (args.dtype.bytes(), layout.heads);
    let mut packed = PackedBuf::new(&heads, tokens, size, size)?;
    fill(packed.bytes_mut());
    let mut unpacked = UnpackedBuf::new(&heads, tokens, size, size)?;
    let bench = Bench::split(layout, packed.as_ref(), unpacked.as_mut(), gpu)?;
    if let Err(difference) = reference::check(&heads, layout.packing, &packed.as_ref(), &unpacked.as_ref()) {
        bail!("the split is wrong, nothing was measured: {difference}");
    }
    let [seconds, copy_seconds] =
        medians(args.measuring.seconds, |contender, repeats| bench.replay(contender == 1, repeats))?
            .map(|seconds| seconds / bench.calls() as f64);
    let bytes = tokens * (heads.qkvz_features() + heads.ba_features()) * size;
    Ok(Record { tokens, bytes, seconds, copy_seconds, threads: 0 })
}
