//! The arguments of `gdn forward`.

use std::path::PathBuf;

use gdn::{Gate, Layer};

use crate::{
    call::Op,
    device::Device,
    layout::{LayoutArgs, SegmentsArg, ThreadsArgs, value_of},
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
    pub(super) input: PathBuf,
    /// The safetensors file to write
    #[arg(short, long, value_name = "OUT")]
    pub(super) output: Option<PathBuf>,
    /// The op [default: decode where all sequences have the same 1 to 16 tokens, else prefill]
    #[arg(long)]
    pub(super) op: Option<Op>,
    /// The largest relative error against what IN expects: exit code 2 and no OUT where one is larger
    #[arg(long, value_name = "ERROR", value_parser = not_negative)]
    pub(super) max_error: Option<f64>,
    #[command(flatten)]
    pub(super) layout: LayoutArgs,
    #[command(flatten)]
    pub(super) layer: LayerArgs,
    /// Where to do it: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub(super) device: Device,
    #[command(flatten)]
    pub(super) segments: SegmentsArg,
    #[command(flatten)]
    pub(super) cpu: ThreadsArgs,
}

/// The numbers of a layer beside its heads.
#[derive(clap::Args)]
#[command(next_help_heading = "Layer")]
pub(crate) struct LayerArgs {
    /// What is added to the mean of squares in the norm [default: 1e-6]
    #[arg(long, value_name = "EPS", value_parser = in_f32)]
    norm_eps: Option<f32>,
    /// What is added to the sum of squares of a query or key [default: 1e-6]
    #[arg(long, value_name = "EPS", value_parser = in_f32)]
    l2norm_eps: Option<f32>,
    /// The factor of sigmoid(b): 2 where a model allows negative eigenvalues [default: 1]
    #[arg(long, value_name = "FACTOR", value_parser = in_f32)]
    beta_scale: Option<f32>,
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

/// A number of the layer, which is computed with in f32: rounded to it, and no larger than it holds.
fn in_f32(text: &str) -> Result<f32, String> {
    let number = not_negative(text)? as f32;
    if number.is_finite() {
        Ok(number)
    } else {
        Err(format!("'{text}' must be at most {:e}, the largest f32", f32::MAX))
    }
}

fn gate(name: &str) -> Result<Gate, String> {
    match name {
        "silu" => Ok(Gate::Silu),
        "sigmoid" => Ok(Gate::Sigmoid),
        _ => Err(format!("gate is '{name}', it must be 'silu' or 'sigmoid'")),
    }
}

impl LayerArgs {
    /// Sets the numbers of `layer`: arguments go before what the file says of itself.
    pub(super) fn set(&self, layer: &mut Layer, metadata: &[(String, String)]) -> anyhow::Result<()> {
        let known = |key: &str| {
            let parse =
                |text| in_f32(text).map_err(|error| anyhow::anyhow!("metadata of the file: {key}: {error}"));
            value_of(metadata, key).map(parse).transpose()
        };
        for (number, argument, key) in [
            (&mut layer.norm_eps, self.norm_eps, "norm_eps"),
            (&mut layer.l2norm_eps, self.l2norm_eps, "l2norm_eps"),
            (&mut layer.beta_scale, self.beta_scale, "beta_scale"),
        ] {
            if let Some(said) = argument.map_or_else(|| known(key), |said| Ok(Some(said)))? {
                *number = said;
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
