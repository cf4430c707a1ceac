//! How the tensors of a projection follow its outputs: weights, scales, zero points, adapters.

use gdn::{RepackError, WeightMap};
use safetensors::Dtype;

use super::format::{Format, Scales};

/// How one tensor follows the outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Follow {
    /// Not at all: it belongs to the inputs, or to the whole projection.
    Keep,
    /// It is the shape `[out, in]` of a packed weight, as two integers.
    Shape,
    /// With the indices of one dim.
    Along { dim: usize, grain: Grain },
}

/// What one index of the dim stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grain {
    /// An output.
    One,
    /// So many outputs that share something.
    Block(usize),
    /// So many outputs that are packed into one element.
    Group(usize),
}

impl Grain {
    pub(super) fn of(self, map: &WeightMap) -> Result<WeightMap, RepackError> {
        match self {
            Self::One => Ok(map.clone()),
            Self::Block(size) => map.blocks(size),
            Self::Group(size) => map.groups(size),
        }
    }

    /// Whether so many outputs fill their elements.
    pub(super) fn fits(self, outputs: usize) -> bool {
        match self {
            Self::One | Self::Block(_) => true,
            Self::Group(size) => outputs.is_multiple_of(size),
        }
    }

    /// How many indices `outputs` outputs take.
    pub(super) fn len(self, outputs: usize) -> usize {
        match self {
            Self::One => outputs,
            Self::Block(size) => outputs.div_ceil(size),
            Self::Group(size) => outputs / size,
        }
    }
}

/// Why nobody knows how a tensor follows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FollowError {
    #[error("how '{suffix}' follows the outputs of a projection is not known: {why}")]
    Undeclared { suffix: String, why: String },
    #[error("its shape is {shape:?}, {outputs} outputs need {wanted}")]
    Shape { shape: Vec<usize>, outputs: usize, wanted: String },
}

/// How the tensor `suffix` (what comes after `in_proj_qkvz.`) of a projection of so many outputs follows
/// them, if the module is stored in this format. Which dim it is the format says; the shape must fit.
pub(super) fn follow(
    format: &Format,
    suffix: &str,
    dtype: Dtype,
    shape: &[usize],
    outputs: usize,
) -> Result<Follow, FollowError> {
    let wrong = |wanted: String| Err(FollowError::Shape { shape: shape.to_vec(), outputs, wanted });
    // A dim with so many indices, each of which stands for a grain.
    let along = |dim: usize, grain: Grain| {
        let indices = grain.len(outputs);
        match (shape.get(dim), grain) {
            (_, Grain::Group(size)) if !grain.fits(outputs) => {
                wrong(format!("elements that hold {size} each: that is no whole number of them"))
            }
            (Some(&got), _) if got == indices => Ok(Follow::Along { dim, grain }),
            _ => wrong(format!("{indices} indices in dim {dim}")),
        }
    };
    let dims = |dims: usize| match shape.len() == dims {
        true => Ok(()),
        false => wrong(format!("{dims} dims")).map(drop),
    };
    let undeclared = |why: String| Err(FollowError::Undeclared { suffix: suffix.to_owned(), why });
    // One for each output.
    let vector = || match shape {
        [_] | [_, 1] => along(0, Grain::One),
        _ => wrong(format!("[{outputs}] or [{outputs}, 1]")),
    };
    let is_one = shape.iter().all(|dim| *dim == 1);

    // `lora_B.weight` or, with the name of the adapter, `lora_B.default.weight`.
    match suffix.split('.').next().unwrap_or(suffix) {
        "lora_A" => return Ok(Follow::Keep),
        "lora_B" => {
            dims(2)?;
            return along(0, Grain::One);
        }
        "lora_magnitude_vector" => {
            return if shape.len() == 2 && shape[0] == 1 { along(1, Grain::One) } else { vector() };
        }
        _ => {}
    }
    match suffix {
        "bias" => {
            dims(1)?;
            return along(0, Grain::One);
        }
        // What belongs to the inputs.
        "input_scale" | "input_offset" | "input_global_scale" | "input_zero_point" | "pre_quant_scale" => {
            return Ok(Follow::Keep);
        }
        _ => {}
    }
    let weight = || {
        dims(2)?;
        along(0, Grain::One)
    };
    let is_float = matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64);
    match (format, suffix) {
        // `[out, in]` of a module that is not quantised, whatever others are.
        (_, "weight") if is_float => weight(),
        (Format::Unknown(what), _) => undeclared(format!("{what} is not one that is known here")),
        (Format::Plain, "weight") if matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::I8) => weight(),
        (
            Format::Fp8 { .. }
            | Format::Compressed { .. }
            | Format::ModelOpt
            | Format::Mlx
            | Format::ModelSlim,
            "weight",
        ) => weight(),

        (Format::Fp8 { .. }, "weight_scale" | "weight_scale_inv") if is_one && outputs > 1 => {
            Ok(Follow::Keep)
        }
        (Format::Fp8 { block: Some(block) }, "weight_scale" | "weight_scale_inv") => {
            dims(2)?;
            along(0, Grain::Block(*block))
        }
        (Format::Fp8 { block: None }, "weight_scale" | "weight_scale_inv") => vector(),

        (Format::Compressed { .. }, "weight_packed") => weight(),
        (Format::Compressed { .. }, "weight_shape") => {
            match shape == [2] && matches!(dtype, Dtype::I32 | Dtype::I64) {
                true => Ok(Follow::Shape),
                false => wrong("two integers".to_owned()),
            }
        }
        (Format::Compressed { .. }, "weight_global_scale" | "weight_g_idx") => Ok(Follow::Keep),
        (Format::Compressed { scales, bits }, "weight_scale" | "weight_zero_point") => match scales {
            Scales::Tensor if is_one => Ok(Follow::Keep),
            Scales::Tensor => wrong("one number, as its strategy is 'tensor'".to_owned()),
            Scales::Block(block) => along(0, Grain::Block(*block)),
            // Zero points of fewer bits lie packed in integers.
            Scales::Output if dtype == Dtype::I32 && matches!(bits, 1 | 2 | 4 | 8) => {
                along(0, Grain::Group(32 / bits))
            }
            Scales::Output => along(0, Grain::One),
        },

        (Format::Gptq { .. }, "qweight") => {
            dims(2)?;
            along(1, Grain::One)
        }
        (Format::Awq { bits }, "qweight") | (Format::Gptq { bits } | Format::Awq { bits }, "qzeros") => {
            dims(2)?;
            match dtype {
                Dtype::I32 | Dtype::U32 => along(1, Grain::Group(32 / bits)),
                _ => wrong("integers of 32 bits".to_owned()),
            }
        }
        (Format::Gptq { .. } | Format::Awq { .. }, "scales") => {
            dims(2)?;
            along(1, Grain::One)
        }
        (Format::AwqGemv, "qweight" | "qzeros" | "scales") => weight(),
        (Format::Gptq { .. }, "g_idx") => Ok(Follow::Keep),

        (Format::ModelOpt, "weight_scale") if is_one && outputs > 1 => Ok(Follow::Keep),
        (Format::ModelOpt, "weight_scale") => along(0, Grain::One),
        (Format::ModelOpt, "weight_scale_2") if is_one => Ok(Follow::Keep),
        (Format::Mlx, "scales" | "biases") => weight(),
        (Format::ModelSlim, "weight_scale" | "weight_offset" | "deq_scale" | "quant_bias") => vector(),

        (Format::Plain, _) => undeclared("no quantisation that has it is declared for it".to_owned()),
        _ => undeclared("the quantisation that is declared has no such tensor".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_checkpoints_have() {
        let out = 12288;
        let along = |dim, grain| Ok(Follow::Along { dim, grain });
        let one = along(0, Grain::One);
        let fp8 = Format::Fp8 { block: Some(128) };
        let rows = Format::Compressed { scales: Scales::Output, bits: 4 };
        let blocks = Format::Compressed { scales: Scales::Block(64), bits: 8 };
        let gptq = Format::Gptq { bits: 4 };
        let awq = Format::Awq { bits: 4 };
        let other = Format::Unknown("x".to_owned());
        let (bf16, i32) = (Dtype::BF16, Dtype::I32);
        for (format, suffix, dtype, shape, wanted) in [
            (&Format::Plain, "weight", bf16, &[12288, 2048][..], one.clone()),
            (&other, "weight", bf16, &[12288, 2048], one.clone()),
            (&other, "bias", bf16, &[12288], one.clone()),
            (&fp8, "weight", Dtype::F8_E4M3, &[12288, 2048], one.clone()),
            (&fp8, "weight_scale_inv", bf16, &[96, 16], along(0, Grain::Block(128))),
            (&fp8, "weight_scale", Dtype::F32, &[1], Ok(Follow::Keep)),
            (&fp8, "weight_scale", Dtype::F32, &[], Ok(Follow::Keep)),
            (&fp8, "input_scale", Dtype::F32, &[], Ok(Follow::Keep)),
            (&Format::Fp8 { block: None }, "weight_scale", Dtype::F32, &[12288, 1], one.clone()),
            (&rows, "weight_packed", i32, &[12288, 256], one.clone()),
            (&rows, "weight_scale", bf16, &[12288, 16], one.clone()),
            (&rows, "weight_zero_point", i32, &[1536, 16], along(0, Grain::Group(8))),
            (&rows, "weight_zero_point", Dtype::I8, &[12288, 16], one.clone()),
            (&rows, "weight_shape", Dtype::I64, &[2], Ok(Follow::Shape)),
            (&blocks, "weight_scale", bf16, &[192, 32], along(0, Grain::Block(64))),
            (&gptq, "qweight", i32, &[256, 12288], along(1, Grain::One)),
            (&gptq, "qzeros", i32, &[16, 1536], along(1, Grain::Group(8))),
            (&Format::Gptq { bits: 8 }, "qzeros", i32, &[16, 3072], along(1, Grain::Group(4))),
            (&gptq, "scales", Dtype::F16, &[16, 12288], along(1, Grain::One)),
            (&gptq, "scales", Dtype::F16, &[12288, 12288], along(1, Grain::One)),
            (&gptq, "g_idx", i32, &[2048], Ok(Follow::Keep)),
            (&awq, "qweight", i32, &[2048, 1536], along(1, Grain::Group(8))),
            (&Format::AwqGemv, "scales", Dtype::F16, &[12288, 12288], one.clone()),
            (&Format::Mlx, "weight", Dtype::U32, &[12288, 256], one.clone()),
            (&Format::Mlx, "scales", bf16, &[12288, 12288], one.clone()),
            (&Format::Mlx, "biases", bf16, &[12288, 32], one.clone()),
            (&Format::ModelOpt, "weight", Dtype::U8, &[12288, 1024], one.clone()),
            (&Format::ModelOpt, "weight_scale", Dtype::F8_E4M3, &[12288, 128], one.clone()),
            (&Format::ModelOpt, "weight_scale_2", Dtype::F32, &[], Ok(Follow::Keep)),
            (&Format::ModelOpt, "pre_quant_scale", bf16, &[12288], Ok(Follow::Keep)),
            (&Format::ModelSlim, "weight_offset", bf16, &[12288, 1], one.clone()),
            (&Format::ModelSlim, "deq_scale", Dtype::F32, &[12288], one.clone()),
            (&Format::ModelSlim, "quant_bias", i32, &[12288], one.clone()),
            (&Format::Plain, "lora_A.weight", bf16, &[8, 2048], Ok(Follow::Keep)),
            (&Format::Plain, "lora_B.weight", bf16, &[12288, 8], one.clone()),
            (&Format::Plain, "lora_B.default.weight", bf16, &[12288, 8], one.clone()),
            (&Format::Plain, "lora_magnitude_vector", bf16, &[12288], one.clone()),
            (&Format::Plain, "lora_magnitude_vector.default.weight", bf16, &[1, 12288], along(1, Grain::One)),
        ] {
            assert_eq!(follow(format, suffix, dtype, shape, out), wanted, "{format:?} {suffix} {shape:?}");
        }
    }

    #[test]
    fn what_does_not_fit_or_is_not_declared_is_named() {
        let fp8 = Format::Fp8 { block: Some(128) };
        let gptq = Format::Gptq { bits: 4 };
        for (format, suffix, dtype, shape, part) in [
            (
                &Format::Plain,
                "weight",
                Dtype::BF16,
                &[12280, 2048][..],
                "[12280, 2048], 12288 outputs need 12288",
            ),
            (&Format::Plain, "weight", Dtype::BF16, &[], "12288"),
            (&Format::Plain, "weight", Dtype::U8, &[12288, 1], "'weight'"),
            (&Format::Plain, "weight_scale", Dtype::F32, &[12288, 1], "'weight_scale' follows"),
            (&Format::Plain, "scales", Dtype::F16, &[12288, 12288], "'scales' follows"),
            (&Format::Unknown("quant_method 'x'".to_owned()), "scales", Dtype::F16, &[12288, 12288], "'x'"),
            (&fp8, "scales", Dtype::F16, &[12288, 12288], "has no such tensor"),
            (&fp8, "weight_scale_inv", Dtype::F32, &[95, 16], "12288 outputs need 96 indices in dim 0"),
            (&fp8, "weight_scale_inv", Dtype::F32, &[12288, 16], "12288 outputs need 96 indices"),
            (&gptq, "qzeros", Dtype::I32, &[16, 1152], "12288 outputs need 1536 indices in dim 1"),
            (&gptq, "qzeros", Dtype::F32, &[16, 1536], "32 bits"),
            (&gptq, "qweight", Dtype::I32, &[1536], "2 dims"),
            (&gptq, "scales", Dtype::F16, &[12288, 16], "12288 indices in dim 1"),
            (
                &Format::Compressed { scales: Scales::Output, bits: 4 },
                "weight_shape",
                Dtype::F32,
                &[2],
                "two integers",
            ),
            (&gptq, "B", Dtype::I32, &[128, 24576], "how 'B' follows"),
        ] {
            let error = follow(format, suffix, dtype, shape, 12288).unwrap_err().to_string();
            assert!(error.contains(part), "{error} should mention {part}");
        }
    }
}
