//! [`ArgumentError`]: what is wrong with an argument, for every op.

use std::fmt;

use thiserror::Error;

use crate::dtype::Dtype;

/// What is wrong with an argument of a call. Nothing has been written.
///
/// Every op and every view has this one error. The message names the argument, what it has and what was
/// expected.
///
/// ```
/// use gdn::{ArgumentError, Heads};
/// let error = Heads::new(3, 4, 128, 128).unwrap_err();
/// assert!(matches!(error, ArgumentError::Multiple { argument: "num_v_heads", got: 4, .. }));
/// assert_eq!(error.to_string(), "num_v_heads = 4 is not a multiple of num_k_heads = 3");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ArgumentError {
    /// A dim of the wrong length: too few features, too many rows.
    #[error("{argument} has {got} {unit}, {}", because.expect(*.expected))]
    Length {
        /// Which tensor.
        argument: &'static str,
        /// What the dim counts, in the plural: `features`, `rows`, `slots`.
        unit: &'static str,
        /// How many it has.
        got: usize,
        /// How many it should have.
        expected: usize,
        /// What says so.
        because: Because,
    },
    /// A tensor with the wrong number of dims.
    #[error("{argument} has {got} dims, expected {expected}")]
    Dims {
        /// Which tensor.
        argument: &'static str,
        /// How many dims it has.
        got: usize,
        /// How many it should have.
        expected: usize,
    },
    /// Elements of a different size than those of another tensor.
    #[error("{argument} has elements of {}, {other} has elements of {expected}", bytes(*.got))]
    ElementSize {
        /// Which tensor.
        argument: &'static str,
        /// Bytes of its elements.
        got: usize,
        /// The tensor it is compared with.
        other: &'static str,
        /// Bytes of that one's elements.
        expected: usize,
    },
    /// A dtype that another tensor does not have, or that the op does not take.
    #[error("{argument} has dtype {got}, {}", because.expect(.expected))]
    Dtype {
        /// Which tensor.
        argument: &'static str,
        /// Its dtype.
        got: Dtype,
        /// The dtype it should have.
        expected: Dtype,
        /// What says so.
        because: Because,
    },
    /// Rows that would overlap.
    #[error("row_stride = {row_stride} is shorter than a row of {features} features")]
    RowStride {
        /// Elements from the start of a row to the start of the next.
        row_stride: usize,
        /// Features of a row.
        features: usize,
    },
    /// A dim whose stride the op cannot follow.
    #[error("{argument} has stride {got} in dim {dim}, expected {expected}")]
    Stride {
        /// Which tensor.
        argument: &'static str,
        /// Which dim, counted from 0.
        dim: usize,
        /// Its stride in elements.
        got: usize,
        /// The stride it should have, in elements.
        expected: usize,
    },
    /// Memory to be written that belongs to another tensor of the call too.
    #[error("{argument} overlaps {other}: {bytes} bytes at {address:#x} belong to both")]
    Overlap {
        /// A tensor to be written.
        argument: &'static str,
        /// The other tensor.
        other: &'static str,
        /// The first address that belongs to both.
        address: usize,
        /// How many bytes from there on belong to both.
        bytes: usize,
    },
    /// Less memory than the shape takes.
    #[error(
        "{argument} has {got} elements, {num_rows} rows of {features} features at row_stride = {row_stride} need {expected}"
    )]
    TooShort {
        /// Which memory.
        argument: &'static str,
        /// Elements it has.
        got: usize,
        /// Elements it should have.
        expected: usize,
        /// Rows asked for.
        num_rows: usize,
        /// Features of a row.
        features: usize,
        /// Elements from the start of a row to the start of the next.
        row_stride: usize,
    },
    /// More bytes than the address space has.
    #[error("{what} do not fit the address space")]
    TooLarge {
        /// What was asked for, with its numbers.
        what: String,
    },
    /// A range that does not lie within its dim.
    #[error("{argument} {start}..{end} do not lie within 0..{len}")]
    Range {
        /// `rows` or `columns`.
        argument: &'static str,
        /// First one asked for.
        start: usize,
        /// One past the last one asked for.
        end: usize,
        /// How many there are.
        len: usize,
    },
    /// An element of an index tensor that points past what it indexes.
    #[error("{argument}[{at}] is {got}, {other} has {len} {unit}")]
    Index {
        /// Which index tensor.
        argument: &'static str,
        /// The position of the element in it.
        at: usize,
        /// The element.
        got: i64,
        /// The tensor it indexes.
        other: &'static str,
        /// How many that one has.
        len: usize,
        /// What they are, in the plural: `slots`, `rows`.
        unit: &'static str,
    },
    /// A number that must be at least 1.
    #[error("{argument} is 0, it must be at least 1")]
    Zero {
        /// Which number.
        argument: &'static str,
    },
    /// A number that another one does not divide.
    #[error("{argument} = {got} is not a multiple of {other} = {expected}")]
    Multiple {
        /// Which number.
        argument: &'static str,
        /// Its value.
        got: usize,
        /// The number that should divide it.
        other: &'static str,
        /// The value of that one.
        expected: usize,
    },
    /// Any other value that an argument must not have.
    #[error("{argument} is {got}, it must be {expected}")]
    Value {
        /// Which argument.
        argument: &'static str,
        /// Its value, names in quotes.
        got: String,
        /// What it must be: `0 or 1`, `'interleaved' or 'contiguous'`.
        expected: String,
    },
}

impl ArgumentError {
    /// A name that is not among those known.
    pub(crate) fn unknown_name(argument: &'static str, got: &str, expected: impl Into<String>) -> Self {
        Self::Value { argument, got: format!("'{got}'"), expected: expected.into() }
    }
}

fn bytes(n: usize) -> String {
    if n == 1 { "1 byte".to_owned() } else { format!("{n} bytes") }
}

/// What says which number or dtype an argument should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Because {
    /// Another argument, which has it: `mixed_qkvz has 3`.
    Argument(&'static str),
    /// Something of several numbers, in the plural: `2+6 heads of 4+5 need 76`.
    Need(String),
    /// The op itself: `expected 3`.
    Op,
}

impl Because {
    fn expect(&self, expected: impl fmt::Display) -> String {
        match self {
            Self::Argument(other) => format!("{other} has {expected}"),
            Self::Need(what) => format!("{what} need {expected}"),
            Self::Op => format!("expected {expected}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences() {
        let length =
            |because| ArgumentError::Length { argument: "z", unit: "rows", got: 2, expected: 3, because };
        for (error, sentence) in [
            (length(Because::Argument("mixed_qkvz")), "z has 2 rows, mixed_qkvz has 3"),
            (length(Because::Need("two sequences".to_owned())), "z has 2 rows, two sequences need 3"),
            (length(Because::Op), "z has 2 rows, expected 3"),
            (
                ArgumentError::Dtype {
                    argument: "z",
                    got: Dtype::F32,
                    expected: Dtype::BF16,
                    because: Because::Argument("mixed_qkvz"),
                },
                "z has dtype f32, mixed_qkvz has bf16",
            ),
            (
                ArgumentError::Index {
                    argument: "state_indices",
                    at: 2,
                    got: 9,
                    other: "recurrent_state",
                    len: 4,
                    unit: "slots",
                },
                "state_indices[2] is 9, recurrent_state has 4 slots",
            ),
            (
                ArgumentError::Stride { argument: "conv_state", dim: 2, got: 3, expected: 1 },
                "conv_state has stride 3 in dim 2, expected 1",
            ),
            (
                ArgumentError::unknown_name("packing", "both", "'interleaved' or 'contiguous'"),
                "packing is 'both', it must be 'interleaved' or 'contiguous'",
            ),
            (ArgumentError::Zero { argument: "conv_width" }, "conv_width is 0, it must be at least 1"),
        ] {
            assert_eq!(error.to_string(), sentence);
        }
        // A result that carries the error stays small.
        assert!(size_of::<ArgumentError>() <= 80, "{}", size_of::<ArgumentError>());
    }
}
