//! [`Isa`]: which instructions there are, and the one place where a call turns to its own.

use std::{fmt, str::FromStr, sync::OnceLock};

use thiserror::Error;

use crate::argument::ArgumentError;

/// An instruction set that the ops were written for. Each promises every feature that its documentation
/// lists: code for a level may use all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// 8-byte moves, on every machine.
    Scalar,
    /// 32-byte registers and streaming stores on x86-64: `avx2`, `fma` and `f16c`.
    Avx2,
    /// 64-byte registers, a cache line each, and streaming stores on x86-64: `avx512f`, `avx512bw`,
    /// `avx512vl`, `avx512dq`, and all of [`Avx2`](Self::Avx2).
    Avx512,
    /// 16-byte registers on 64-bit Arm: `neon`.
    Neon,
}

/// An instruction set that this machine does not have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("isa '{isa}' is not available on this machine; it has {available}")]
pub struct IsaError {
    /// What was asked for.
    pub isa: Isa,
    /// What there is.
    pub available: String,
}

impl Isa {
    /// Every instruction set, each after those it is better than.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Neon];

    /// The best one of this machine. Looked up once.
    pub fn detect() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().unwrap_or(Self::Scalar))
    }

    /// Those of this machine, the best last.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Whether this machine has every feature of it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Itself, where this machine has it.
    ///
    /// # Errors
    /// [`IsaError`] with those there are.
    pub fn checked(self) -> Result<Self, IsaError> {
        if self.is_available() {
            return Ok(self);
        }
        let available = Self::available().map(Self::name).collect::<Vec<_>>().join(", ");
        Err(IsaError { isa: self, available })
    }

    /// `"scalar"`, `"avx2"`, `"avx512"` or `"neon"`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Isa {
    type Err = ArgumentError;

    fn from_str(name: &str) -> Result<Self, ArgumentError> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| ArgumentError::unknown_name("isa", name, "'scalar', 'avx2', 'avx512' or 'neon'"))
    }
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tests {
    use super::*;

    /// Against what Linux says of the processor.
    #[test]
    fn a_level_is_available_where_all_its_features_are() {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap();
        let flags: Vec<&str> = flags.trim_start_matches([' ', '\t', ':']).split_whitespace().collect();
        assert!(flags.contains(&"sse2"), "{flags:?}");
        let avx2 = ["avx2", "fma", "f16c"];
        let avx512 = ["avx512f", "avx512bw", "avx512vl", "avx512dq"];
        let has = |features: &[&str]| features.iter().all(|feature| flags.contains(feature));
        assert_eq!(Isa::Avx2.is_available(), has(&avx2));
        assert_eq!(Isa::Avx512.is_available(), has(&avx2) && has(&avx512));
        assert!(Isa::Scalar.is_available() && !Isa::Neon.is_available());
    }
}
