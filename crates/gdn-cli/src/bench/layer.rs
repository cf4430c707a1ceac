//! `gdn bench decode` and `gdn bench prefill`.

use anyhow::{Context, bail};
use gdn::{
    Cpu, Dtype, Layer, MAX_TOKENS,
    cpu::{PREFILL_BLOCK, Stores, copy_bytes, multiply_add, silu},
};
use serde_json::json;

use super::{
    Measuring, layout_of,
    source::{Case, OFF, Source, Written},
};
use crate::{
    call::{Bytes, Inputs, Op},
    device::{Backend, Device},
    figures::{available_memory, medians, time},
    layout::{LayoutArgs, SegmentsArg, ThreadsArgs},
    plot::{self, Series},
    terminal::print,
};

#[derive(clap::Args)]
#[command(after_help = "\
Each line is one layer, measured in place on the same states again and again, after a check of some heads \
of some sequences against an f64 oracle. Times are medians over rounds in which the op and what it is \
measured against take turns.

bytes: both states read and written, the projections read, out written; weights are left out. `copy` is the \
faster of memcpy and a streaming copy that reads and writes as many bytes together, by as many threads. The \
share is the copy's time over the op's: 1 is the speed of a copy.

On a GPU calls are replayed as a CUDA graph, and the copy is the driver's own.")]
pub(crate) struct DecodeArgs {
    /// Numbers of sequences to measure
    #[arg(long, value_delimiter = ',', value_name = "B,…", default_value = "1,8,64",
          value_parser = clap::value_parser!(u32).range(1..))]
    batch: Vec<u32>,
    /// Tokens of each sequence
    #[arg(long, value_delimiter = ',', value_name = "T,…", default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..=MAX_TOKENS as i64))]
    tokens: Vec<u32>,
    #[command(flatten)]
    layer: LayerArgs,
}

#[derive(clap::Args)]
#[command(after_help = "\
Each line is one layer, after a check of some heads of some sequences against an f64 oracle. Times are \
medians over rounds in which the op and what it is measured against take turns.

FLOPs: 6 * DK * DV for each token and value head, what every form of the delta rule takes at least (S k, \
the correction of S, S q); all else counts as time lost. `peak` is the time that so many FLOPs take where \
this machine, with the same instructions and as many threads, does fused multiply-adds in registers and \
nothing else. The share is the peak's time over the op's. `floor` is what all multiply-adds of blocks of 16 \
tokens, those of the convolution and `silu` of all features would take at the speed that each has alone.

On a GPU the op is measured as decode is: beside a copy that reads and writes as many bytes as the op does \
outside of its own scratch memory. Calls are replayed as a CUDA graph.")]
pub(crate) struct PrefillArgs {
    /// Numbers of sequences to measure
    #[arg(long, value_delimiter = ',', value_name = "B,…", default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..))]
    batch: Vec<u32>,
    /// Tokens of each sequence
    #[arg(long, value_delimiter = ',', value_name = "T,…", default_value = "64,512,2048,8192",
          value_parser = clap::value_parser!(u32).range(1..))]
    tokens: Vec<u32>,
    #[command(flatten)]
    segments: SegmentsArg,
    #[command(flatten)]
    layer: LayerArgs,
}

#[derive(clap::Args)]
struct LayerArgs {
    #[command(flatten)]
    layout: LayoutArgs,
    /// Types of the projections and of the output, each to be measured
    #[arg(long, value_delimiter = ',', value_name = "DTYPE,…", default_value = "bf16", value_parser = dtype)]
    dtype: Vec<Dtype>,
    /// Types of the recurrent state, each to be measured
    #[arg(long, value_delimiter = ',', value_name = "DTYPE,…", default_value = "f32", value_parser = dtype)]
    state_dtype: Vec<Dtype>,
    /// Where to measure: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    #[command(flatten)]
    cpu: ThreadsArgs,
    #[command(flatten)]
    measuring: Measuring,
}

fn dtype(name: &str) -> Result<Dtype, String> {
    Dtype::parse(name).ok_or_else(|| format!("dtype is '{name}', it must be 'f32', 'f16' or 'bf16'"))
}

pub(crate) fn decode(args: &DecodeArgs) -> anyhow::Result<()> {
    run(Op::Decode, &args.batch, &args.tokens, false, &args.layer)
}

pub(crate) fn prefill(args: &PrefillArgs) -> anyhow::Result<()> {
    run(Op::Prefill, &args.batch, &args.tokens, args.segments.segments, &args.layer)
}

/// What the op's time is held against.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Least {
    /// A copy of as many bytes.
    Copy,
    /// As many FLOPs, and nothing else.
    Peak,
}

impl Least {
    fn of(op: Op, device: Device) -> Self {
        if op == Op::Prefill && device == Device::Cpu { Self::Peak } else { Self::Copy }
    }
}

/// One line.
struct Record {
    case: Case,
    /// Of the CPU; 0 on a GPU.
    threads: usize,
    /// Bytes read and written, or FLOPs.
    work: f64,
    seconds: f64,
    /// What the same work takes where there is nothing else.
    least_seconds: f64,
    /// What all of the op's arithmetic takes at its best, where that was measured.
    floor_seconds: Option<f64>,
}

impl Record {
    fn share(&self) -> f64 {
        self.least_seconds / self.seconds
    }
}

fn run(op: Op, batches: &[u32], tokens: &[u32], segments: bool, args: &LayerArgs) -> anyhow::Result<()> {
    args.measuring.check()?;
    let layer = Layer::new(layout_of(&args.layout)?);
    let cpu = args.cpu.cpu(usize::MAX)?;
    let backend = Backend::new(args.device, cpu)?.segments(segments);
    let segments = segments && args.device != Device::Cpu;
    let least = Least::of(op, args.device);
    let is_beside_peak = least == Least::Peak;
    let unit = backend.unit();
    let cut = if segments { ", segments" } else { "" };
    let title = format!("{}, {}, {}, {unit}{cut}", op.name(), layer.heads(), layer.layout.packing);
    if !args.measuring.json {
        let [work, least, speed] = match least {
            Least::Copy => ["bytes", "copy", "GB/s"],
            Least::Peak => ["FLOPs", "peak", "GFLOP/s"],
        };
        print(&format!(
            "{title}\n{:>6} {:>7} {:>5} {:>5} {:>12} {:>7} {:>12} {:>12} {:>12} {speed:>8} {:>7}",
            "batch",
            "tokens",
            "dtype",
            "state",
            work,
            "threads",
            op.name(),
            least,
            "tokens/s",
            "share",
        ))?;
        if is_beside_peak {
            print(&format!("{:>12}", "floor"))?;
        }
        print("\n")?;
    }
    let mut records: Vec<Record> = Vec::new();
    for &dtype in &args.dtype {
        for &state_dtype in &args.state_dtype {
            for &batch in batches {
                for &tokens in tokens {
                    let (batch, tokens) = (batch as usize, tokens as usize);
                    let case = Case { op, layer, batch, tokens, segments, dtype, state_dtype };
                    let record = measure(&case, args.measuring.seconds, &backend)
                        .with_context(|| format!("{} of {batch} times {tokens} tokens", op.name()))?;
                    let of = (least, args.device, unit);
                    print(&if args.measuring.json { object(&record, of) } else { line(&record) })?;
                    records.push(record);
                }
            }
        }
    }
    if let Some(path) = &args.measuring.plot {
        draw(path, op, least, &title, &records)?;
    }
    Ok(())
}

/// A row of the table.
fn line(record: &Record) -> String {
    let Record {
        case: Case { batch, tokens, dtype, state_dtype, .. },
        threads,
        work,
        seconds,
        least_seconds,
        floor_seconds,
    } = record;
    let floor = floor_seconds.map_or(String::new(), |seconds| format!("{:>12}", time(seconds)));
    format!(
        "{batch:>6} {tokens:>7} {dtype:>5} {state_dtype:>5} {work:>12} {threads:>7} {:>12} {:>12} {:>12.0} {:>8.1} {:>7.3}{floor}\n",
        time(*seconds),
        time(*least_seconds),
        (batch * tokens) as f64 / seconds,
        work / seconds / 1e9,
        record.share(),
    )
}

/// A line of JSON.
fn object(record: &Record, (least, device, unit): (Least, Device, &str)) -> String {
    let Record { case, threads, work, seconds, least_seconds, floor_seconds } = record;
    let Case { op, layer, batch, tokens, segments, dtype, state_dtype } = case;
    let heads = layer.heads();
    let mut object = json!({
        "op": op.name(), "device": device.to_string(), "isa": unit, "threads": threads, "batch": batch, "tokens": tokens,
        "num_k_heads": heads.num_k_heads(), "num_v_heads": heads.num_v_heads(),
        "head_k_dim": heads.head_k_dim(), "head_v_dim": heads.head_v_dim(),
        "packing": layer.layout.packing.name(), "dtype": dtype.name(), "state_dtype": state_dtype.name(),
        "seconds": seconds, "tokens_per_second": (batch * tokens) as f64 / seconds,
    });
    let [work_key, least, share] = match least {
        Least::Copy => ["bytes", "copy_seconds", "share_of_copy"],
        Least::Peak => ["flops", "peak_seconds", "share_of_peak"],
    };
    object[work_key] = json!(*work as u64);
    object[least] = json!(least_seconds);
    object[share] = json!(record.share());
    if *op == Op::Prefill && device != Device::Cpu {
        object["segments"] = json!(segments);
    }
    if let Some(floor_seconds) = floor_seconds {
        object["floor_seconds"] = json!(floor_seconds);
    }
    format!("{object}\n")
}

/// A line for each choice of dtypes and of the number that is not drawn over, beside that of what the op was
/// measured against.
fn draw(path: &std::path::Path, op: Op, least: Least, title: &str, records: &[Record]) -> anyhow::Result<()> {
    // Over the tokens of a batch, or over the batches where that is all there is.
    let over_tokens = op == Op::Prefill;
    let x = |case: &Case| if over_tokens { case.tokens } else { case.batch };
    let name = |case: &Case| {
        let rest = if over_tokens { format!("batch {}", case.batch) } else { format!("T = {}", case.tokens) };
        format!("{}, {rest}, {}, state {}", op.name(), case.dtype, case.state_dtype)
    };
    let [least, speed] = match least {
        Least::Copy => ["copy of the same bytes", "GB/s, read and written"],
        Least::Peak => ["peak", "GFLOP/s"],
    };
    let mut series: Vec<Series> = Vec::new();
    for record in records {
        let name = name(&record.case);
        for (name, seconds) in
            [(format!("{least}: {name}"), record.least_seconds), (name.clone(), record.seconds)]
        {
            let point = (x(&record.case) as f64, record.work / seconds / 1e9);
            match series.iter_mut().find(|series| series.name == name) {
                Some(series) => series.points.push(point),
                None => series.push(Series { name, points: vec![point] }),
            }
        }
    }
    plot::lines(path, title, [if over_tokens { "tokens of a sequence" } else { "sequences" }, speed], &series)
}

/// Bytes that a case reads and writes: both states twice, the projections, `out`.
fn moved(case: &Case) -> Option<usize> {
    let Case { layer, batch, tokens, dtype, state_dtype, .. } = *case;
    let heads = layer.heads();
    let row = (heads.qkvz_features() + heads.ba_features() + heads.z_features()) * dtype.size();
    let state = heads.num_v_heads() * heads.head_v_dim() * heads.head_k_dim() * state_dtype.size();
    let conv_state = layer.conv_channels() * (layer.conv_width - 1) * dtype.size();
    let rows = batch.checked_mul(tokens)?.checked_mul(row)?;
    rows.checked_add(batch.checked_mul(2 * (state + conv_state))?)
}

/// Checks the op on this machine's own choices, then times it.
fn measure(case: &Case, seconds: f64, backend: &Backend) -> anyhow::Result<Record> {
    let moved = moved(case).context("--batch, --tokens: that many do not fit the address space")?;
    // The call's own, the states before it, and what is copied in its place.
    let needed = moved.saturating_mul(3);
    if let Some(available) = available_memory().filter(|available| needed > *available) {
        bail!("measuring takes {needed} bytes of memory, {available} are available");
    }
    let source = Source::new(case)?;
    let mut written = source.results()?;
    match backend {
        Backend::Cpu(cpu) => {
            source.run(&mut written, backend)?;
            source.check(&source.results()?, &written, OFF)?;
            match case.op {
                Op::Decode => measure_bytes(&source, &mut written, moved, seconds, cpu),
                Op::Prefill => measure_flops(&source, &mut written, seconds, cpu),
            }
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => measure_on(&source, &mut written, moved, seconds, gpu),
    }
}

/// On a GPU, within its memory, beside the driver's copy of the same bytes.
#[cfg(feature = "cuda")]
fn measure_on(
    source: &Source,
    written: &mut Written,
    moved: usize,
    seconds: f64,
    gpu: &gdn::cuda::Gpu,
) -> anyhow::Result<Record> {
    use gdn::cuda::Bench;

    use super::source::OFF_IN_F16;
    use crate::call::Call;

    let bench = source.with_call(written, |call| {
        Ok(match call {
            Call::Decode(call) => Bench::decode(call, moved, gpu)?,
            Call::Prefill(call) => Bench::prefill(call, moved, gpu)?,
        })
    })?;
    let off = if source.case.op == Op::Prefill { OFF_IN_F16 } else { OFF };
    source.check(&source.results()?, written, off)?;
    let [seconds, least_seconds] =
        medians(seconds, |contender, repeats| bench.replay(contender == 1, repeats))?
            .map(|seconds| seconds / bench.calls() as f64);
    Ok(Record {
        case: source.case,
        threads: 0,
        work: moved as f64,
        seconds,
        least_seconds,
        floor_seconds: None,
    })
}

/// Beside a copy of the same bytes.
fn measure_bytes(
    source: &Source,
    written: &mut Written,
    moved: usize,
    seconds: f64,
    cpu: &Cpu<'static>,
) -> anyhow::Result<Record> {
    let threads = cpu.chosen_threads(moved);
    let backend = Backend::Cpu(*cpu);
    let (mut src, mut dst) = (Bytes::new(moved / 2)?, Bytes::new(moved / 2)?);
    src.all_mut().fill(0x5A);
    dst.all_mut().fill(0xA5);
    let plain = Cpu::new().threads(threads).stores(Stores::Cached);
    let streaming = plain.stores(Stores::Streaming);
    let [seconds, plain, streaming] = medians(seconds, |contender, repeats| {
        match contender {
            0 => (0..repeats).try_for_each(|_| source.run(written, &backend))?,
            1 => (0..repeats).for_each(|_| copy_bytes(src.all(), dst.all_mut(), &plain)),
            _ => (0..repeats).for_each(|_| copy_bytes(src.all(), dst.all_mut(), &streaming)),
        }
        anyhow::Ok(())
    })?;
    let least_seconds = plain.min(streaming);
    Ok(Record { case: source.case, threads, work: moved as f64, seconds, least_seconds, floor_seconds: None })
}

/// Multiply-adds of a prefill in blocks, at least, and numbers that it takes `silu` of. Beside the delta
/// rule's own: `K K^T` and `Q K^T` for each key head, their triangles times two rows of each state, and the
/// convolution.
fn arithmetic(case: &Case, inputs: &Inputs<'_>) -> [usize; 2] {
    let Case { layer, batch, tokens, .. } = *case;
    let (heads, channels) = (layer.heads(), layer.conv_channels());
    // Two triangles of a square of a block, one of them with its diagonal, are the square itself.
    let keys = heads.num_k_heads() * PREFILL_BLOCK * heads.head_k_dim();
    let values = heads.num_v_heads() * PREFILL_BLOCK * heads.head_v_dim();
    let rows = batch * tokens;
    [
        rows * (inputs.multiply_adds() + keys + values + channels * layer.conv_width),
        rows * (channels + heads.z_features()),
    ]
}

/// Beside bare multiply-adds.
fn measure_flops(
    source: &Source,
    written: &mut Written,
    seconds: f64,
    cpu: &Cpu<'static>,
) -> anyhow::Result<Record> {
    let Case { batch, tokens, .. } = source.case;
    // As `gdn::prefill` has it: arithmetic takes the time, as if every multiplication were a byte to be
    // moved.
    let multiply_adds = batch * tokens * source.inputs()?.multiply_adds();
    let threads = cpu.chosen_threads(multiply_adds / 3);
    let (backend, peak) = (Backend::Cpu(*cpu), cpu.threads(threads));
    let (mut done, mut activated) = (1, 1);
    let [seconds, peak_seconds, silu_seconds] = medians(seconds, |contender, repeats| {
        match contender {
            0 => (0..repeats).try_for_each(|_| source.run(written, &backend))?,
            1 => (0..repeats).for_each(|_| done = multiply_add(&peak)),
            _ => (0..repeats).for_each(|_| activated = silu(&peak)),
        }
        anyhow::Ok(())
    })?;
    let (each, each_silu) = (peak_seconds / done as f64, silu_seconds / activated as f64);
    let [all, silus] = arithmetic(&source.case, &source.inputs()?);
    Ok(Record {
        case: source.case,
        threads,
        work: 2.0 * multiply_adds as f64,
        seconds,
        least_seconds: each * multiply_adds as f64,
        floor_seconds: Some(each * all as f64 + each_silu * silus as f64),
    })
}
