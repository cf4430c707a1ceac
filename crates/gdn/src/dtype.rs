//! [`Dtype`]: the element types that are computed with.

use std::fmt;

/// The type of a tensor's elements, for ops that compute with them. Ops that only move elements take any
/// size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an [`F32`](Self::F32).
    BF16,
}

impl Dtype {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// `"f32"`, `"f16"` or `"bf16"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    /// Bytes of an element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The dtype of a name that safetensors (`BF16`), PyTorch (`torch.bfloat16`), NumPy (`float32`) or this
    /// library gives it; `None` for other names.
    ///
    /// ```
    /// use gdn::Dtype;
    /// assert_eq!(Dtype::parse("torch.bfloat16"), Some(Dtype::BF16));
    /// assert_eq!(Dtype::parse("F16"), Some(Dtype::F16));
    /// assert_eq!(Dtype::parse("int8"), None);
    /// ```
    pub fn parse(name: &str) -> Option<Self> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            "f32" | "F32" | "float32" | "float" => Some(Self::F32),
            "f16" | "F16" | "float16" | "half" => Some(Self::F16),
            "bf16" | "BF16" | "bfloat16" => Some(Self::BF16),
            _ => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for dtype in Dtype::ALL {
            assert_eq!(Dtype::parse(dtype.name()), Some(dtype));
            assert_eq!(Dtype::parse(&dtype.name().to_uppercase()), Some(dtype));
        }
        assert_eq!(
            ["float", "half", "torch.float16"].map(Dtype::parse),
            [Some(Dtype::F32), Some(Dtype::F16), Some(Dtype::F16)]
        );
        assert_eq!(["", "f64", "torch.", "torch.torch.half"].map(Dtype::parse), [None; 4]);
    }
}
