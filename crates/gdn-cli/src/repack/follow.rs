//! How the tensors of a projection follow its outputs: weights, scales, zero points, adapters.

use gdn::{RepackError, WeightMap};
use safetensors::Dtype;

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
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FollowError {
    #[error("how '{suffix}' follows the outputs of a projection is not known")]
    Unknown { suffix: String },
    #[error("its shape is {shape:?}, {outputs} outputs need {wanted}")]
    Shape { shape: Vec<usize>, outputs: usize, wanted: String },
    #[error(
        "its shape is {shape:?}: {outputs} outputs in {elements} elements of dim {dim} are no whole number in each"
    )]
    Packing { shape: Vec<usize>, outputs: usize, elements: usize, dim: usize },
}

/// Outputs in a block of scales, unless the configuration says otherwise.
const BLOCK: usize = 128;

/// How the tensor `suffix` (what comes after `in_proj_qkvz.`) of a projection of so many outputs follows them. `block` is how
/// many outputs the configuration says share a scale.
pub(super) fn follow(
    suffix: &str,
    dtype: Dtype,
    shape: &[usize],
    outputs: usize,
    block: Option<usize>,
) -> Result<Follow, FollowError> {
    let wrong = |wanted: String| Err(FollowError::Shape { shape: shape.to_vec(), outputs, wanted });
    let along = |dim, grain| Ok(Follow::Along { dim, grain });
    // Outputs packed into the elements of a dim.
    let packed = |dim: usize| match shape.get(dim) {
        Some(&elements) if elements == outputs => along(dim, Grain::One),
        Some(&elements) if elements > 0 && outputs.is_multiple_of(elements) && dtype == Dtype::I32 => {
            along(dim, Grain::Group(outputs / elements))
        }
        Some(&elements) => Err(FollowError::Packing { shape: shape.to_vec(), outputs, elements, dim }),
        None => wrong(format!("{} dims or more", dim + 1)),
    };
    let single = shape.iter().all(|dim| *dim == 1);
    // `lora_B.weight` or, with the name of the adapter, `lora_B.default.weight`.
    let lora = suffix.split('.').next().unwrap_or(suffix);
    match (lora, suffix) {
        ("lora_A", _) => Ok(Follow::Keep),
        ("lora_magnitude_vector", _) if shape.len() == 2 && shape[0] == 1 && shape[1] == outputs => {
            along(1, Grain::One)
        }
        ("lora_B" | "lora_magnitude_vector", _) | (_, "weight" | "bias" | "weight_packed") => {
            match shape.first() {
                Some(&rows) if rows == outputs => along(0, Grain::One),
                _ => wrong(format!("as many rows: {outputs}")),
            }
        }
        (
            _,
            "input_scale"
            | "input_global_scale"
            | "input_zero_point"
            | "weight_global_scale"
            | "weight_scale_2"
            | "weight_g_idx"
            | "g_idx",
        ) => Ok(Follow::Keep),
        (_, "weight_shape") if shape == [2] && matches!(dtype, Dtype::I32 | Dtype::I64) => Ok(Follow::Shape),
        (_, "weight_shape") => wrong("two integers".to_owned()),
        (_, "weight_scale" | "weight_scale_inv" | "weight_zero_point") if single => Ok(Follow::Keep),
        (_, "weight_zero_point") => packed(0),
        (_, "weight_scale" | "weight_scale_inv") => {
            let block = block.unwrap_or(BLOCK);
            match shape.first() {
                Some(&rows) if rows == outputs => along(0, Grain::One),
                Some(&rows) if block > 0 && rows == outputs.div_ceil(block) => along(0, Grain::Block(block)),
                _ => {
                    let blocks = outputs.div_ceil(block.max(1));
                    wrong(format!("{outputs} rows, or {blocks} with blocks of {block}"))
                }
            }
        }
        (_, "qweight" | "qzeros") if shape.len() == 2 => packed(1),
        (_, "scales") => match shape {
            [_, columns] if *columns == outputs => along(1, Grain::One),
            _ => wrong(format!("[groups, {outputs}]")),
        },
        (_, "qweight" | "qzeros") => wrong("2 dims".to_owned()),
        _ => Err(FollowError::Unknown { suffix: suffix.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_checkpoints_have() {
        let out = 12288;
        let along = |dim, grain| Ok(Follow::Along { dim, grain });
        for (suffix, dtype, shape, wanted) in [
            ("weight", Dtype::BF16, &[12288, 2048][..], along(0, Grain::One)),
            ("weight", Dtype::F8_E4M3, &[12288, 2048], along(0, Grain::One)),
            ("bias", Dtype::BF16, &[12288], along(0, Grain::One)),
            ("weight_scale_inv", Dtype::BF16, &[96, 16], along(0, Grain::Block(128))),
            ("weight_scale", Dtype::F32, &[12288, 1], along(0, Grain::One)),
            ("weight_scale", Dtype::F32, &[12288], along(0, Grain::One)),
            ("weight_scale", Dtype::BF16, &[12288, 16], along(0, Grain::One)),
            ("weight_scale", Dtype::F32, &[1], Ok(Follow::Keep)),
            ("weight_scale", Dtype::F32, &[], Ok(Follow::Keep)),
            ("input_scale", Dtype::F32, &[], Ok(Follow::Keep)),
            ("weight_packed", Dtype::I32, &[12288, 256], along(0, Grain::One)),
            ("weight_zero_point", Dtype::I32, &[1536, 16], along(0, Grain::Group(8))),
            ("weight_zero_point", Dtype::I8, &[12288, 16], along(0, Grain::One)),
            ("weight_shape", Dtype::I64, &[2], Ok(Follow::Shape)),
            ("qweight", Dtype::I32, &[256, 12288], along(1, Grain::One)),
            ("qweight", Dtype::I32, &[2048, 1536], along(1, Grain::Group(8))),
            ("qzeros", Dtype::I32, &[16, 1536], along(1, Grain::Group(8))),
            ("qzeros", Dtype::I32, &[16, 3072], along(1, Grain::Group(4))),
            ("scales", Dtype::F16, &[16, 12288], along(1, Grain::One)),
            ("g_idx", Dtype::I32, &[2048], Ok(Follow::Keep)),
            ("lora_A.weight", Dtype::BF16, &[8, 2048], Ok(Follow::Keep)),
            ("lora_B.weight", Dtype::BF16, &[12288, 8], along(0, Grain::One)),
            ("lora_B.default.weight", Dtype::BF16, &[12288, 8], along(0, Grain::One)),
            ("lora_magnitude_vector", Dtype::BF16, &[12288], along(0, Grain::One)),
            ("lora_magnitude_vector.default.weight", Dtype::BF16, &[1, 12288], along(1, Grain::One)),
        ] {
            assert_eq!(follow(suffix, dtype, shape, out, None), wanted, "{suffix} {shape:?}");
        }
        assert_eq!(follow("weight_scale", Dtype::F32, &[192, 32], out, Some(64)), along(0, Grain::Block(64)));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (suffix, dtype, shape, part) in [
            (
                "weight",
                Dtype::BF16,
                &[12280, 2048][..],
                "[12280, 2048], 12288 outputs need as many rows: 12288",
            ),
            ("weight", Dtype::BF16, &[], "12288"),
            ("weight_scale_inv", Dtype::F32, &[95, 16], "12288 rows, or 96 with blocks of 128"),
            ("qzeros", Dtype::I32, &[16, 1152], "12288 outputs in 1152 elements of dim 1"),
            ("qweight", Dtype::F32, &[16, 1536], "1536"),
            ("qweight", Dtype::I32, &[1536], "2 dims"),
            ("scales", Dtype::F16, &[12288, 16], "[groups, 12288]"),
            ("weight_shape", Dtype::F32, &[2], "two integers"),
            ("B", Dtype::I32, &[128, 24576], "how 'B' follows"),
        ] {
            let error = follow(suffix, dtype, shape, 12288, None).unwrap_err().to_string();
            assert!(error.contains(part), "{error} should mention {part}");
        }
    }
}
