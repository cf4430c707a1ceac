//! `gdn forward`: the core of a layer, everything between its two GEMMs, over a safetensors file.

mod args;
mod work;

use std::fmt::Write as _;

use anyhow::{Context, bail};
use gdn::{Gate, Layer};

pub(crate) use self::args::Args;
use self::work::{RESULTS, Work};
use crate::{
    call::{Bytes, Inputs},
    device::Backend,
    figures::{median, time},
    files::{Input, Output},
    interrupts::catch_interrupts,
    layout::{metadata_of, value_of},
    numbers::{dtype_of, read, relative_error, unit_roundoff},
    terminal::{ReaderGone, note, one_line, print},
};

fn gate_name(gate: Gate) -> &'static str {
    match gate {
        Gate::Silu => "silu",
        Gate::Sigmoid => "sigmoid",
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
    let backend = Backend::new(args.device, cpu)?.segments(args.segments.segments);
    let ignored = input.names_but(&work.used);
    if !ignored.is_empty() {
        note(&format!("not looked at: {}", ignored.join(", ")));
    }

    catch_interrupts()?;
    let mut text = String::new();
    let mut compute = |data: &mut [&mut [u8]]| -> anyhow::Result<()> {
        let seconds = work.run(data, &backend, backend.piece())?;
        text = work.summary(&seconds, &backend);
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
    fn summary(&self, seconds: &[f64], backend: &Backend) -> String {
        let Inputs { layer, dtype, state_dtype, .. } = &self.inputs;
        let (rows, sequences) = (self.num_rows(), self.num_sequences());
        let s = |n: usize| if n == 1 { "" } else { "s" };
        let (first, all) = (seconds[0], median(seconds.to_vec()));
        let mut text = format!(
            "{} of {rows} token{} in {sequences} sequence{}\n  layer            {}, {}, {} taps, gate {}\n  \
             elements         {dtype}, state {state_dtype}\n  \
             on               {}\n  time             {}",
            self.op.name(),
            s(rows),
            s(sequences),
            layer.heads(),
            layer.layout.packing,
            layer.conv_width,
            gate_name(layer.gate),
            backend.describe(),
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
