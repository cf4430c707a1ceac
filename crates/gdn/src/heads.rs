//! [`Heads`]: the four numbers that fix every shape of a Gated DeltaNet layer.

use std::fmt;

use crate::argument::ArgumentError;

/// The head counts and head dims of one Gated DeltaNet layer.
///
/// A `Heads` is always valid: every number is at least 1, `num_v_heads` is a multiple of `num_k_heads`, and a
/// row of 8-byte features fits the address space. Query heads are as many as key heads.
///
/// ```
/// let heads = gdn::Heads::new(16, 32, 128, 128)?;
/// assert_eq!(heads.ratio(), 2);
/// assert_eq!(heads.qkvz_features(), 12288);
/// # Ok::<(), gdn::ArgumentError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Heads {
    num_k_heads: usize,
    num_v_heads: usize,
    head_k_dim: usize,
    head_v_dim: usize,
}

impl Heads {
    /// Checks and keeps the four numbers.
    ///
    /// # Errors
    /// [`ArgumentError::Zero`], [`ArgumentError::Multiple`] or [`ArgumentError::TooLarge`].
    pub fn new(
        num_k_heads: usize,
        num_v_heads: usize,
        head_k_dim: usize,
        head_v_dim: usize,
    ) -> Result<Self, ArgumentError> {
        let named = [
            ("num_k_heads", num_k_heads),
            ("num_v_heads", num_v_heads),
            ("head_k_dim", head_k_dim),
            ("head_v_dim", head_v_dim),
        ];
        if let Some(&(argument, _)) = named.iter().find(|(_, value)| *value == 0) {
            return Err(ArgumentError::Zero { argument });
        }
        if !num_v_heads.is_multiple_of(num_k_heads) {
            return Err(ArgumentError::Multiple {
                argument: "num_v_heads",
                got: num_v_heads,
                other: "num_k_heads",
                expected: num_k_heads,
            });
        }
        let features = || {
            let qk = num_k_heads.checked_mul(head_k_dim)?;
            let vz = num_v_heads.checked_mul(head_v_dim)?;
            let row = qk.checked_add(vz)?.checked_mul(2)?.max(num_v_heads.checked_mul(2)?);
            row.checked_mul(8).filter(|bytes| isize::try_from(*bytes).is_ok())
        };
        if features().is_none() {
            let numbers = named.map(|(name, value)| format!("{name} = {value}")).join(", ");
            return Err(ArgumentError::TooLarge { what: format!("rows of {numbers}") });
        }
        Ok(Self { num_k_heads, num_v_heads, head_k_dim, head_v_dim })
    }

    /// The heads that one of `tp_size` tensor-parallel ranks holds.
    ///
    /// # Errors
    /// [`ArgumentError::Zero`] for `tp_size = 0`; [`ArgumentError::Multiple`] where the key heads (and with
    /// them the value heads) do not divide.
    pub fn shard(&self, tp_size: usize) -> Result<Self, ArgumentError> {
        if tp_size == 0 {
            return Err(ArgumentError::Zero { argument: "tp_size" });
        }
        for (argument, got) in [("num_k_heads", self.num_k_heads), ("num_v_heads", self.num_v_heads)] {
            if !got.is_multiple_of(tp_size) {
                return Err(ArgumentError::Multiple { argument, got, other: "tp_size", expected: tp_size });
            }
        }
        Ok(Self { num_k_heads: self.num_k_heads / tp_size, num_v_heads: self.num_v_heads / tp_size, ..*self })
    }

    /// HK: key heads, and as many query heads.
    pub fn num_k_heads(&self) -> usize {
        self.num_k_heads
    }

    /// HV: value heads, and as many gate (z) heads.
    pub fn num_v_heads(&self) -> usize {
        self.num_v_heads
    }

    /// DK: features of a query or key head.
    pub fn head_k_dim(&self) -> usize {
        self.head_k_dim
    }

    /// DV: features of a value or gate head.
    pub fn head_v_dim(&self) -> usize {
        self.head_v_dim
    }

    /// R = HV / HK: value heads for each key head.
    pub fn ratio(&self) -> usize {
        self.num_v_heads / self.num_k_heads
    }

    /// Features of a row of each of the six tensors, in the order of [`TENSORS`](crate::TENSORS).
    pub fn features(&self) -> [usize; 6] {
        let hv = self.num_v_heads;
        [self.qkvz_features(), self.ba_features(), self.qkv_features(), self.z_features(), hv, hv]
    }

    /// Features of a row of `mixed_qkvz`: `2*HK*DK + 2*HV*DV`.
    pub fn qkvz_features(&self) -> usize {
        self.qkv_features() + self.z_features()
    }

    /// Features of a row of `mixed_ba`: `2*HV`.
    pub fn ba_features(&self) -> usize {
        2 * self.num_v_heads
    }

    /// Features of a row of `mixed_qkv`: `2*HK*DK + HV*DV`.
    pub fn qkv_features(&self) -> usize {
        2 * self.num_k_heads * self.head_k_dim + self.num_v_heads * self.head_v_dim
    }

    /// Features of a row of `z`: `HV*DV`.
    pub fn z_features(&self) -> usize {
        self.num_v_heads * self.head_v_dim
    }
}

/// As in `16+32 heads of 128`, or `16+32 heads of 96+128` where the dims differ.
impl fmt::Display for Heads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { num_k_heads, num_v_heads, head_k_dim, head_v_dim } = self;
        write!(f, "{num_k_heads}+{num_v_heads} heads of {head_k_dim}")?;
        if head_v_dim == head_k_dim { Ok(()) } else { write!(f, "+{head_v_dim}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_no_heads() {
        assert_eq!(Heads::new(0, 1, 1, 1), Err(ArgumentError::Zero { argument: "num_k_heads" }));
        assert_eq!(Heads::new(1, 1, 1, 0), Err(ArgumentError::Zero { argument: "head_v_dim" }));
        let error = Heads::new(3, 4, 1, 1).unwrap_err();
        assert_eq!(error.to_string(), "num_v_heads = 4 is not a multiple of num_k_heads = 3");
        assert!(matches!(Heads::new(1 << 40, 1 << 40, 1 << 40, 1), Err(ArgumentError::TooLarge { .. })));
        assert!(matches!(Heads::new(1, usize::MAX, 1, 1), Err(ArgumentError::TooLarge { .. })));
        assert!(matches!(Heads::new(1, 1, 1 << 59, 1), Err(ArgumentError::TooLarge { .. })));
        assert!(Heads::new(1, 1, 1 << 57, 1).is_ok());
    }

    #[test]
    fn shards() {
        let heads = Heads::new(16, 48, 128, 128).unwrap();
        assert_eq!(heads.shard(4), Heads::new(4, 12, 128, 128));
        assert_eq!(heads.shard(0), Err(ArgumentError::Zero { argument: "tp_size" }));
        assert_eq!(
            heads.shard(32).unwrap_err().to_string(),
            "num_k_heads = 16 is not a multiple of tp_size = 32"
        );
    }
}
