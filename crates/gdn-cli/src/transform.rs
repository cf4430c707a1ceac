//! `gdn split` and `gdn merge`: the op over a safetensors file.

use std::{ops::Range, path::PathBuf};

use anyhow::{Context, bail};
use gdn::{Layout, Packed, Rows, RowsMut, Unpacked};

use crate::{
    device::{Backend, Device},
    files::{Input, NewTensor, Output, Tensor},
    interrupts::{catch_interrupts, check_interrupted},
    layout::{CpuArgs, LayoutArgs, metadata_of},
    progress::Progress,
    terminal::note,
};

#[derive(clap::Args)]
#[command(after_help = "\
Heads and packing come from the arguments or, where they say nothing, from the metadata of IN (num_k_heads, \
num_v_heads, head_k_dim, head_v_dim, packing). Tensors may have any number of leading dims, which are kept. \
OUT has the results, in the same dtypes, and IN's metadata; it appears under its name when it is whole. OUT \
must not be a symbolic link.")]
pub(crate) struct Args {
    /// The safetensors file to read
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The safetensors file to write
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    layout: LayoutArgs,
    /// Where to do it: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    #[command(flatten)]
    cpu: CpuArgs,
    #[command(flatten)]
    names: Names,
}

/// The names of the six tensors, in files read and written.
#[derive(clap::Args)]
#[command(next_help_heading = "Names of tensors")]
struct Names {
    #[arg(long, value_name = "NAME", default_value = "mixed_qkvz")]
    qkvz_name: String,
    #[arg(long, value_name = "NAME", default_value = "mixed_ba")]
    ba_name: String,
    #[arg(long, value_name = "NAME", default_value = "mixed_qkv")]
    qkv_name: String,
    #[arg(long, value_name = "NAME", default_value = "z")]
    z_name: String,
    #[arg(long, value_name = "NAME", default_value = "b")]
    b_name: String,
    #[arg(long, value_name = "NAME", default_value = "a")]
    a_name: String,
}

pub(crate) fn split(args: &Args) -> anyhow::Result<()> {
    let (input, layout, backend) = open(args)?;
    let heads = layout.heads;
    let (hv, dv) = (heads.num_v_heads(), heads.head_v_dim());
    let mixed_qkvz = source(&input, &args.names.qkvz_name, &[heads.qkvz_features()], &layout)?;
    let mixed_ba = source(&input, &args.names.ba_name, &[heads.ba_features()], &layout)?;
    same_rows(&mixed_qkvz, &mixed_ba)?;
    let outputs = vec![
        mixed_qkvz.derived(&args.names.qkv_name, &[heads.qkv_features()])?,
        mixed_qkvz.derived(&args.names.z_name, &[hv, dv])?,
        mixed_ba.derived(&args.names.b_name, &[hv])?,
        mixed_ba.derived(&args.names.a_name, &[hv])?,
    ];
    let inputs = [&mixed_qkvz, &mixed_ba];
    write(args, &input, &layout, &inputs, outputs, |data, rows| {
        let [mixed_qkv, z, b, a] = data else { unreachable!("four outputs were asked for") };
        let from = Packed { mixed_qkvz: mixed_qkvz.rows(rows)?, mixed_ba: mixed_ba.rows(rows)? };
        let to = Unpacked {
            mixed_qkv: mixed_qkvz.rows_mut(mixed_qkv, heads.qkv_features(), rows)?,
            z: mixed_qkvz.rows_mut(z, heads.z_features(), rows)?,
            b: mixed_ba.rows_mut(b, hv, rows)?,
            a: mixed_ba.rows_mut(a, hv, rows)?,
        };
        backend.split(&layout, from, to)
    })
}

pub(crate) fn merge(args: &Args) -> anyhow::Result<()> {
    let (input, layout, backend) = open(args)?;
    let heads = layout.heads;
    let (hv, dv) = (heads.num_v_heads(), heads.head_v_dim());
    let mixed_qkv = source(&input, &args.names.qkv_name, &[heads.qkv_features()], &layout)?;
    let z = source(&input, &args.names.z_name, &[hv, dv], &layout)?;
    let b = source(&input, &args.names.b_name, &[hv], &layout)?;
    let a = source(&input, &args.names.a_name, &[hv], &layout)?;
    for (other, like) in [(&z, &mixed_qkv), (&b, &mixed_qkv), (&a, &mixed_qkv)] {
        same_rows(like, other)?;
    }
    for (other, like) in [(&z, &mixed_qkv), (&a, &b)] {
        if other.tensor.dtype != like.tensor.dtype {
            let (other, like) = (&other.tensor, &like.tensor);
            bail!("'{}' is {}, '{}' is {}", other.name, other.dtype, like.name, like.dtype);
        }
    }
    let outputs = vec![
        mixed_qkv.derived(&args.names.qkvz_name, &[heads.qkvz_features()])?,
        b.derived(&args.names.ba_name, &[heads.ba_features()])?,
    ];
    let inputs = [&mixed_qkv, &z, &b, &a];
    write(args, &input, &layout, &inputs, outputs, |data, rows| {
        let [mixed_qkvz, mixed_ba] = data else { unreachable!("two outputs were asked for") };
        let from = Unpacked {
            mixed_qkv: mixed_qkv.rows(rows)?,
            z: z.rows(rows)?,
            b: b.rows(rows)?,
            a: a.rows(rows)?,
        };
        let to = Packed {
            mixed_qkvz: mixed_qkv.rows_mut(mixed_qkvz, heads.qkvz_features(), rows)?,
            mixed_ba: b.rows_mut(mixed_ba, heads.ba_features(), rows)?,
        };
        backend.merge(&layout, from, to)
    })
}

fn open(args: &Args) -> anyhow::Result<(Input, Layout, Backend)> {
    let input = Input::open(&args.input)?;
    let layout =
        args.layout.for_file(input.metadata().pairs()).with_context(|| args.input.display().to_string())?;
    let cpu = args.cpu.cpu(usize::try_from(input.bytes()).unwrap_or(usize::MAX).saturating_mul(2))?;
    Ok((input, layout, Backend::new(args.device, cpu)?))
}

/// A tensor that is read, as rows: its last dims are one row, those before them count rows.
struct Source<'a> {
    tensor: Tensor<'a>,
    num_rows: usize,
    leading: usize,
    features: usize,
    element_size: usize,
}

/// The tensor `name`, whose last dims must be `row`.
fn source<'a>(input: &'a Input, name: &'a str, row: &[usize], layout: &Layout) -> anyhow::Result<Source<'a>> {
    let tensor = input.tensor(name)?;
    let element_size = tensor.element_size()?;
    let (leading, num_rows) = tensor.rows(row.len())?;
    let leading = leading.len();
    if tensor.shape[leading..] != *row {
        bail!("'{name}' has shape {:?}, {} need rows of {row:?}", tensor.shape, layout.heads);
    }
    Ok(Source { num_rows, leading, features: row.iter().product(), element_size, tensor })
}

fn same_rows(one: &Source<'_>, other: &Source<'_>) -> anyhow::Result<()> {
    let (leading, other_leading) = (&one.tensor.shape[..one.leading], &other.tensor.shape[..other.leading]);
    if leading != other_leading {
        bail!(
            "'{}' has rows {other_leading:?}, '{}' has rows {leading:?}",
            other.tensor.name,
            one.tensor.name
        );
    }
    Ok(())
}

impl Source<'_> {
    /// A tensor of the same rows and dtype, with other features.
    fn derived(&self, name: &str, row: &[usize]) -> anyhow::Result<NewTensor> {
        let shape = [&self.tensor.shape[..self.leading], row].concat();
        NewTensor::new(name, self.tensor.dtype, shape)
    }

    fn rows(&self, rows: &Range<usize>) -> anyhow::Result<Rows<'_>> {
        let all = Rows::from_bytes(self.tensor.data, self.element_size, self.num_rows, self.features)?;
        Ok(all.rows(rows.clone())?)
    }

    /// The same rows of an output derived from this.
    fn rows_mut<'d>(
        &self,
        data: &'d mut [u8],
        features: usize,
        rows: &Range<usize>,
    ) -> anyhow::Result<RowsMut<'d>> {
        let all = RowsMut::from_bytes(data, self.element_size, self.num_rows, features)?;
        Ok(all.rows(rows.clone())?)
    }
}

/// Input and output bytes of the rows that are handed to the op at a time: enough for every thread, little
/// enough to notice Ctrl-C and to move the progress bar.
const TILE_BYTES: usize = 256 << 20;

/// Writes the output, the rows of a tile at a time.
fn write(
    args: &Args,
    input: &Input,
    layout: &Layout,
    inputs: &[&Source<'_>],
    outputs: Vec<NewTensor>,
    mut op: impl FnMut(&mut [&mut [u8]], &Range<usize>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let used: Vec<&str> = inputs.iter().map(|source| source.tensor.name).collect();
    let left_out = input.names_but(&used);
    if !left_out.is_empty() {
        note(&format!("not carried over: {}", left_out.join(", ")));
    }
    let metadata = input.metadata().with(metadata_of(layout));

    catch_interrupts()?;
    let mut output = Output::create(&args.output, outputs, &metadata, &[&args.input])?;
    let num_rows = inputs[0].num_rows;
    let bytes = |source: &&Source<'_>| source.features.saturating_mul(source.element_size);
    let row_bytes = inputs.iter().map(bytes).fold(0, usize::saturating_add);
    // Heads that no row has yet been compared with may be as large as numbers are.
    let tile_rows = (TILE_BYTES / 2 / row_bytes.max(1)).max(1);
    let mut progress = Progress::new((num_rows * row_bytes) as u64);
    let mut data = output.data();
    for start in (0..num_rows).step_by(tile_rows) {
        check_interrupted()?;
        let rows = start..(start + tile_rows).min(num_rows);
        op(&mut data, &rows)?;
        progress.set((rows.end * row_bytes) as u64);
    }
    progress.finish();
    input.check_unchanged()?;
    output.finish()
}
