//! `gdn forward`: the core of a layer, everything between its two GEMMs, over a safetensors file.

mod work;

use std::{fmt::Write as _, path::PathBuf};

use anyhow::{Context, bail};
use gdn::{Cpu, Gate, Layer};

use self::work::{PIECE_MULTIPLY_ADDS, RESULTS, Work};
use crate::{
    call::{Bytes, Inputs, Op},
    device::Device,
    figures::{median, time},
    files::{Input, Output},
    interrupts::catch_interrupts,
    layout::{LayoutArgs, ThreadsArgs, metadata_of, value_of},
    numbers::{dtype_of, read, relative_error, unit_roundoff},
    terminal::{ReaderGone, note, one_line, print},
};

#[derive(clap::Args)]
#[command(after_help = "\
IN holds mixed_qkvz [N, 2*HK*DK + 2*HV*DV], mixed_ba [N, 2*HV], conv_weight [C, W] or [C, 1, W], A_log \
[HV], dt_bias [HV], norm_weight [DV], where C = 2*HK*DK + HV*DV, and may hold conv_bias [C], cu_seqlens [B \
+ 1] (int32 or int64: sequence r has the rows from cu_seqlens[r] to cu_seqlens[r + 1]), and the states \
before: conv_state [B, C, W - 1 or more], recurrent_state [B, HV, DV, DK]; without them zeros. Without \
cu_seqlens mixed_qkvz may be [B, T, ...], B sequences of T tokens, and all rows are one sequence where it \
is [N, ...].

OUT has out [N, HV, DV] in the dtype of mixed_qkvz, conv_state and recurrent_state in the dtypes that IN \
has them in, else in that of mixed_qkvz and in f32, and IN's metadata. It appears under its name when it is \
whole.

Where IN holds expected_out, expected_conv_state or expected_recurrent_state, the error against them is \
printed: the 2-norm of the difference as a share of the 2-norm of what is expected. OUT may then be left \
away.

Heads, packing, norm_eps, l2norm_eps, beta_scale and gate come from the arguments or, where they say \
nothing, from IN's metadata under the same names.")]
pub(crate) struct Args {
    /// The safetensors file to read
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The safetensors file to write
    #[arg(short, long, value_name = "OUT")]
    output: Option<PathBuf>,
    /// The op [default: decode where all sequences have the same 1 to 16 tokens, else prefill]
    #[arg(long)]
    op: Option<Op>,
    /// The largest relative error against what IN expects: exit code 2 and no OUT where one is larger
    #[arg(long, value_name = "ERROR", value_parser = not_negative)]
    max_error: Option<f64>,
    #[command(flatten)]
    layout: LayoutArgs,
    #[command(flatten)]
    layer: LayerArgs,
    /// Where to do it: cpu
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    #[command(flatten)]
    cpu: ThreadsArgs,
}

/// The numbers of a layer beside its heads.
#[derive(clap::Args)]
#[command(next_help_heading = "Layer")]
pub(crate) struct LayerArgs {
    /// What is added to the mean of squares in the norm [default: 1e-6]
    #[arg(long, value_name = "EPS", value_parser = not_negative)]
    norm_eps: Option<f64>,
    /// What is added to the sum of squares of a query or key [default: 1e-6]
    #[arg(long, value_name = "EPS", value_parser = not_negative)]
    l2norm_eps: Option<f64>,
    /// The factor of sigmoid(b): 2 where a model allows negative eigenvalues [default: 1]
    #[arg(long, value_name = "FACTOR", value_parser = not_negative)]
    beta_scale: Option<f64>,
    /// What z goes through: silu or sigmoid [default: silu]
    #[arg(long, value_parser = gate)]
    gate: Option<Gate>,
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err(format!("'{text}' must be a number, 0 or more")),
    }
}

fn gate(name: &str) -> Result<Gate, String> {
    match name {
        "silu" => Ok(Gate::Silu),
        "sigmoid" => Ok(Gate::Sigmoid),
        _ => Err(format!("gate is '{name}', it must be 'silu' or 'sigmoid'")),
    }
}

fn gate_name(gate: Gate) -> &'static str {
    match gate {
        Gate::Silu => "silu",
        Gate::Sigmoid => "sigmoid",
    }
}

impl LayerArgs {
    /// Sets the numbers of `layer`: arguments go before what the file says of itself.
    fn set(&self, layer: &mut Layer, metadata: &[(String, String)]) -> anyhow::Result<()> {
        let known = |key: &str| {
            let parse = |text| {
                not_negative(text).map_err(|error| anyhow::anyhow!("metadata of the file: {key}: {error}"))
            };
            value_of(metadata, key).map(parse).transpose()
        };
        for (number, argument, key) in [
            (&mut layer.norm_eps, self.norm_eps, "norm_eps"),
            (&mut layer.l2norm_eps, self.l2norm_eps, "l2norm_eps"),
            (&mut layer.beta_scale, self.beta_scale, "beta_scale"),
        ] {
            if let Some(said) = argument.map_or_else(|| known(key), |said| Ok(Some(said)))? {
                *number = said as f32;
            }
        }
        layer.gate = match (self.gate, value_of(metadata, "gate")) {
            (Some(gate), _) => gate,
            (None, Some(name)) => {
                gate(name).map_err(|error| anyhow::anyhow!("metadata of the file: {error}"))?
            }
            (None, None) => layer.gate,
        };
        Ok(())
    }
}

/// What a file says of its layer.
fn metadata_of_layer(layer: &Layer) -> impl Iterator<Item = (&'static str, String)> {
    let numbers = [
        ("norm_eps", layer.norm_eps.to_string()),
        ("l2norm_eps", layer.l2norm_eps.to_string()),
        ("beta_scale", layer.beta_scale.to_string()),
        ("gate", gate_name(layer.gate).to_owned()),
    ];
    metadata_of(&layer.layout).into_iter().chain(numbers)
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.device.expect_cpu("forward")?;
    let input = Input::open(&args.input)?;
    let work = Work::of(args, &input).with_context(|| args.input.display().to_string())?;
    if args.output.is_none() && work.expected.iter().all(Option::is_none) {
        bail!("{} has no expected_* tensors to compare with: give -o OUT", args.input.display());
    }
    if args.max_error.is_some() && work.expected.iter().all(Option::is_none) {
        bail!("--max-error: {} has no expected_* tensors to compare with", args.input.display());
    }
    let multiply_adds = work.num_rows().saturating_mul(work.inputs.multiply_adds());
    let cpu = args.cpu.cpu(multiply_adds.max(usize::try_from(input.bytes()).unwrap_or(usize::MAX)))?;
    let ignored = input.names_but(&work.used);
    if !ignored.is_empty() {
        note(&format!("not looked at: {}", ignored.join(", ")));
    }

    catch_interrupts()?;
    let mut text = String::new();
    let mut compute = |data: &mut [&mut [u8]]| -> anyhow::Result<()> {
        let seconds = work.run(data, &cpu, PIECE_MULTIPLY_ADDS)?;
        text = work.summary(&seconds, &cpu);
        let errors = work.errors(data);
        text.push_str(&work.comparison(&input, &errors, data));
        input.check_unchanged()?;
        match args.max_error {
            Some(bound) => within(bound, &errors).inspect_err(|_| _ = print(&text)),
            None => Ok(()),
        }
    };
    if let Some(path) = &args.output {
        let metadata = input.metadata().with(metadata_of_layer(&work.inputs.layer));
        let mut output = Output::create(path, work.results()?, &metadata, &[&args.input])?;
        compute(&mut output.data())?;
        // What cannot be told is not done; whom nobody listens to does his work all the same.
        match print(&text) {
            Err(error) if !error.is::<ReaderGone>() => Err(error),
            _ => output.finish(),
        }
    } else {
        let mut blocks = work.blocks()?;
        let mut data: Vec<&mut [u8]> = blocks.iter_mut().map(Bytes::all_mut).collect();
        compute(&mut data)?;
        print(&text)
    }
}

/// That no error is larger than the bound, or no number at all.
fn within(bound: f64, errors: &[Option<f64>; 3]) -> anyhow::Result<()> {
    let beyond: Vec<String> = RESULTS
        .iter()
        .zip(errors)
        .filter_map(|(name, error)| {
            error.filter(|error| error.is_nan() || *error > bound).map(|error| (name, error))
        })
        .map(|(name, error)| format!("{name} differs from expected_{name} by {error:.2e}"))
        .collect();
    if !beyond.is_empty() {
        bail!("{}, --max-error is {bound:e}", beyond.join(", "));
    }
    Ok(())
}

impl Work<'_> {
    /// The relative errors against what the file expects.
    fn errors(&self, data: &[&mut [u8]]) -> [Option<f64>; 3] {
        std::array::from_fn(|i| {
            let tensor = self.expected[i].as_ref()?;
            let got = read(self.dtypes()[i], data[i]);
            Some(relative_error(got, read(dtype_of(tensor.dtype)?, tensor.data)))
        })
    }

    /// What was done, and how fast.
    fn summary(&self, seconds: &[f64], cpu: &Cpu) -> String {
        let Inputs { layer, dtype, state_dtype, .. } = &self.inputs;
        let (rows, sequences) = (self.num_rows(), self.num_sequences());
        let s = |n: usize| if n == 1 { "" } else { "s" };
        let threads = cpu.chosen_threads(usize::MAX);
        let (first, all) = (seconds[0], median(seconds.to_vec()));
        let mut text = format!(
            "{} of {rows} token{} in {sequences} sequence{}\n  layer            {}, {}, {} taps, gate {}\n  \
             elements         {dtype}, state {state_dtype}\n  \
             on               cpu, {}, at most {threads} thread{}\n  time             {}",
            self.op.name(),
            s(rows),
            s(sequences),
            layer.heads(),
            layer.layout.packing,
            layer.conv_width,
            gate_name(layer.gate),
            cpu.chosen_isa(),
            s(threads),
            time(all),
        );
        if seconds.len() > 1 {
            let _ = write!(text, " (median of {} runs, the first {})", seconds.len(), time(first));
        }
        if rows > 0 {
            let _ = write!(text, ", {:.0} tokens/s", rows as f64 / all.max(1e-9));
        }
        text.push('\n');
        text
    }

    /// How close the results are to what the file expects.
    fn comparison(&self, input: &Input, errors: &[Option<f64>; 3], data: &[&mut [u8]]) -> String {
        if errors.iter().all(Option::is_none) {
            return String::new();
        }
        let source = value_of(input.metadata().pairs(), "source").map(|source| format!(" ({source})"));
        let mut text =
            one_line(&format!("relative error against what the file expects{}", source.unwrap_or_default()));
        text.push('\n');
        for (i, error) in errors.iter().enumerate() {
            let (Some(error), Some(tensor)) = (error, &self.expected[i]) else { continue };
            let same = dtype_of(tensor.dtype) == Some(self.dtypes()[i]) && tensor.data == &*data[i];
            let error = if same { "0, the same bits".to_owned() } else { format!("{error:.1e}") };
            let _ = writeln!(text, "  {:<16} {error}", RESULTS[i]);
        }
        let dtype = self.inputs.dtype;
        let _ = writeln!(
            text,
            "  for comparison   {:.1e}, the most by which one rounding to {dtype} changes a number",
            unit_roundoff(dtype)
        );
        text
    }
}
