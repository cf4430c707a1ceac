//! [`Heads`]: the four numbers that fix every shape of a Gated DeltaNet layer.

use std::fmt;

use thiserror::Error;

use crate::{Layout, Packing};

/// The head counts and head dims of one Gated DeltaNet layer.
///
/// A `Heads` is always valid: every number is at least 1, `num_v_heads` is a multiple of `num_k_heads`, and a
/// row of 8-byte features fits the address space. Query heads are as many as key heads.
///
/// ```
/// let heads = gdn::Heads::new(16, 32, 128, 128)?;
/// assert_eq!(heads.ratio(), 2);
/// assert_eq!(heads.qkvz_features(), 12288);
/// # Ok::<(), gdn::HeadsError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Heads {
    num_k_heads: usize,
    num_v_heads: usize,
    head_k_dim: usize,
    head_v_dim: usize,
}

/// Why four numbers, a configuration or a name do not give [`Heads`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeadsError {
    /// One of the four numbers is zero.
    #[error("{name} is 0, it must be at least 1")]
    Zero {
        /// Which one.
        name: &'static str,
    },
    /// The value heads do not divide among the key heads.
    #[error("num_v_heads = {num_v_heads} is not a multiple of num_k_heads = {num_k_heads}")]
    Ratio {
        /// Value heads given.
        num_v_heads: usize,
        /// Key heads given.
        num_k_heads: usize,
    },
    /// A row would not fit the address space.
    #[error(
        "num_k_heads = {num_k_heads}, num_v_heads = {num_v_heads}, head_k_dim = {head_k_dim}, \
         head_v_dim = {head_v_dim}: a row of that many features does not fit the address space"
    )]
    TooLarge {
        /// Key heads given.
        num_k_heads: usize,
        /// Value heads given.
        num_v_heads: usize,
        /// Key dim given.
        head_k_dim: usize,
        /// Value dim given.
        head_v_dim: usize,
    },
    /// The heads do not divide among the ranks.
    #[error("{name} = {heads} does not divide among tp_size = {tp_size} ranks")]
    Shard {
        /// `num_k_heads` or `num_v_heads`.
        name: &'static str,
        /// How many heads there are.
        heads: usize,
        /// Among how many ranks they were to be divided.
        tp_size: usize,
    },
    /// No preset of that name.
    #[error("no preset is named '{name}'; known: {known}")]
    UnknownPreset {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A `config.json` that is no JSON, or lacks a number, or has something else in its place.
    #[error("config.json: {0}")]
    Config(String),
}

/// The models whose layout is known by name, each with its four numbers in the order of [`Heads::new`], and its packing.
///
/// From the `config.json` or the model card that the publisher released on Hugging Face. A name also matches with an
/// organisation in front and a suffix behind: `Qwen/Qwen3-Next-80B-A3B-Instruct-FP8` is `Qwen3-Next-80B-A3B`.
pub const PRESETS: &[(&str, [usize; 4], Packing)] = &[
    ("Qwen3-Next-80B-A3B", [16, 32, 128, 128], Packing::Interleaved),
    ("Qwen3-Coder-Next", [16, 32, 128, 128], Packing::Interleaved),
    ("Qwen3.5-0.8B", [16, 16, 128, 128], Packing::Contiguous),
    ("Qwen3.5-2B", [16, 16, 128, 128], Packing::Contiguous),
    ("Qwen3.5-4B", [16, 32, 128, 128], Packing::Contiguous),
    ("Qwen3.5-9B", [16, 32, 128, 128], Packing::Contiguous),
    ("Qwen3.5-27B", [16, 48, 128, 128], Packing::Contiguous),
    ("Qwen3.5-35B-A3B", [16, 32, 128, 128], Packing::Contiguous),
    ("Qwen3.5-122B-A10B", [16, 64, 128, 128], Packing::Contiguous),
    ("Qwen3.5-397B-A17B", [16, 64, 128, 128], Packing::Contiguous),
    ("Qwen3.6-27B", [16, 48, 128, 128], Packing::Contiguous),
    ("Qwen3.6-35B-A3B", [16, 32, 128, 128], Packing::Contiguous),
];

impl Heads {
    /// Checks and keeps the four numbers.
    ///
    /// # Errors
    /// [`HeadsError::Zero`], [`HeadsError::Ratio`] or [`HeadsError::TooLarge`].
    pub fn new(
        num_k_heads: usize,
        num_v_heads: usize,
        head_k_dim: usize,
        head_v_dim: usize,
    ) -> Result<Self, HeadsError> {
        let named = [
            ("num_k_heads", num_k_heads),
            ("num_v_heads", num_v_heads),
            ("head_k_dim", head_k_dim),
            ("head_v_dim", head_v_dim),
        ];
        if let Some(&(name, _)) = named.iter().find(|(_, value)| *value == 0) {
            return Err(HeadsError::Zero { name });
        }
        if !num_v_heads.is_multiple_of(num_k_heads) {
            return Err(HeadsError::Ratio { num_v_heads, num_k_heads });
        }
        let features = || {
            let qk = num_k_heads.checked_mul(head_k_dim)?;
            let vz = num_v_heads.checked_mul(head_v_dim)?;
            let row = qk.checked_add(vz)?.checked_mul(2)?.max(num_v_heads.checked_mul(2)?);
            row.checked_mul(8).filter(|bytes| isize::try_from(*bytes).is_ok())
        };
        if features().is_none() {
            return Err(HeadsError::TooLarge { num_k_heads, num_v_heads, head_k_dim, head_v_dim });
        }
        Ok(Self { num_k_heads, num_v_heads, head_k_dim, head_v_dim })
    }

    /// The heads of a published model, by the name it has on Hugging Face (see [`PRESETS`]), in any letter case.
    ///
    /// ```
    /// let heads = gdn::Heads::preset("Qwen/Qwen3-Next-80B-A3B-Instruct")?;
    /// assert_eq!(heads, gdn::Heads::new(16, 32, 128, 128)?);
    /// # Ok::<(), gdn::HeadsError>(())
    /// ```
    ///
    /// # Errors
    /// [`HeadsError::UnknownPreset`] with the names there are.
    pub fn preset(name: &str) -> Result<Self, HeadsError> {
        Layout::preset(name).map(|layout| layout.heads)
    }

    /// Reads the heads from the text of a Hugging Face `config.json`.
    ///
    /// The numbers are `linear_num_key_heads`, `linear_num_value_heads`, `linear_key_head_dim` and
    /// `linear_value_head_dim`, at the top level or, for multimodal models, under `text_config`.
    ///
    /// # Errors
    /// [`HeadsError::Config`] names the missing or malformed key; the errors of [`Heads::new`] besides.
    pub fn from_config(json: &str) -> Result<Self, HeadsError> {
        let config = parse(json)?;
        const KEYS: [&str; 4] = [
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
        ];
        let level = text_level(&config, &KEYS);
        let mut numbers = [0; 4];
        for (number, key) in numbers.iter_mut().zip(KEYS) {
            let value = level.get(key).ok_or_else(|| {
                HeadsError::Config(format!("has no '{key}', at the top level or under 'text_config'"))
            })?;
            *number = value.as_u64().and_then(|n| usize::try_from(n).ok()).ok_or_else(|| {
                HeadsError::Config(format!("'{key}' is {value}, it must be a positive integer"))
            })?;
        }
        let [hk, hv, dk, dv] = numbers;
        Self::new(hk, hv, dk, dv)
    }

    /// The heads that one of `tp_size` tensor-parallel ranks holds.
    ///
    /// # Errors
    /// [`HeadsError::Zero`] for `tp_size = 0`; [`HeadsError::Shard`] where the key heads (and with them the value
    /// heads) do not divide.
    pub fn shard(&self, tp_size: usize) -> Result<Self, HeadsError> {
        if tp_size == 0 {
            return Err(HeadsError::Zero { name: "tp_size" });
        }
        for (name, heads) in [("num_k_heads", self.num_k_heads), ("num_v_heads", self.num_v_heads)] {
            if !heads.is_multiple_of(tp_size) {
                return Err(HeadsError::Shard { name, heads, tp_size });
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

fn parse(json: &str) -> Result<serde_json::Value, HeadsError> {
    serde_json::from_str(json).map_err(|e| HeadsError::Config(format!("not valid JSON: {e}")))
}

/// The level of a config that speaks of the language model: `text_config` where it has one of the keys and the top has none.
fn text_level<'a>(config: &'a serde_json::Value, keys: &[&str]) -> &'a serde_json::Value {
    let has = |level: &serde_json::Value| keys.iter().any(|key| level.get(key).is_some());
    match config.get("text_config") {
        Some(text) if !has(config) && has(text) => text,
        _ => config,
    }
}

impl Layout {
    /// The layout of a published model, by the name it has on Hugging Face (see [`PRESETS`]), in any letter case.
    ///
    /// ```
    /// let layout = gdn::Layout::preset("Qwen/Qwen3.6-27B")?;
    /// assert_eq!((layout.heads.ratio(), layout.packing), (3, gdn::Packing::Contiguous));
    /// # Ok::<(), gdn::HeadsError>(())
    /// ```
    ///
    /// # Errors
    /// [`HeadsError::UnknownPreset`] with the names there are.
    pub fn preset(name: &str) -> Result<Self, HeadsError> {
        let model = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
        let matches = |preset: &str| {
            let rest = model.strip_prefix(&preset.to_ascii_lowercase());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        match PRESETS.iter().find(|(preset, ..)| matches(preset)) {
            Some(&(_, [hk, hv, dk, dv], packing)) => Ok(Self::new(Heads::new(hk, hv, dk, dv)?, packing)),
            None => Err(HeadsError::UnknownPreset {
                name: name.to_owned(),
                known: PRESETS.iter().map(|(preset, ..)| *preset).collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// Reads the heads from the text of a Hugging Face `config.json` (see [`Heads::from_config`]), and the packing from its
    /// `model_type`: `qwen3_next` is interleaved, `qwen3_5` and its kin are contiguous.
    ///
    /// # Errors
    /// Those of [`Heads::from_config`], and [`HeadsError::Config`] for a `model_type` that is missing or not known.
    pub fn from_config(json: &str) -> Result<Self, HeadsError> {
        let heads = Heads::from_config(json)?;
        let config = parse(json)?;
        let packing = match config.get("model_type").and_then(|value| value.as_str()) {
            Some(name) if name.starts_with("qwen3_next") => Packing::Interleaved,
            Some(name) if name.starts_with("qwen3_5") => Packing::Contiguous,
            other => {
                let other = other.unwrap_or("missing");
                let message = format!("model_type is {other}: only qwen3_next and qwen3_5 tell the packing");
                return Err(HeadsError::Config(message));
            }
        };
        Ok(Self::new(heads, packing))
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
    fn every_preset_is_valid_and_found_by_its_full_name() {
        for &(name, [hk, hv, dk, dv], packing) in PRESETS {
            assert_eq!(Layout::preset(name).unwrap().packing, packing);
            let heads = Heads::new(hk, hv, dk, dv).unwrap();
            assert_eq!(Heads::preset(name), Ok(heads));
            assert_eq!(Heads::preset(&format!("Qwen/{}-FP8", name.to_uppercase())), Ok(heads));
        }
        let error = Heads::preset("Qwen3.6-27BX").unwrap_err().to_string();
        assert!(error.contains("Qwen3.6-27BX") && error.contains("Qwen3-Next-80B-A3B"), "{error}");
        assert!(Heads::preset("").is_err());
    }

    #[test]
    fn numbers_that_are_no_heads() {
        assert_eq!(Heads::new(0, 1, 1, 1), Err(HeadsError::Zero { name: "num_k_heads" }));
        assert_eq!(Heads::new(1, 1, 1, 0), Err(HeadsError::Zero { name: "head_v_dim" }));
        assert_eq!(Heads::new(3, 4, 1, 1), Err(HeadsError::Ratio { num_v_heads: 4, num_k_heads: 3 }));
        assert!(matches!(Heads::new(1 << 40, 1 << 40, 1 << 40, 1), Err(HeadsError::TooLarge { .. })));
        assert!(matches!(Heads::new(1, usize::MAX, 1, 1), Err(HeadsError::TooLarge { .. })));
        assert!(matches!(Heads::new(1, 1, 1 << 59, 1), Err(HeadsError::TooLarge { .. })));
        assert!(Heads::new(1, 1, 1 << 57, 1).is_ok());
    }

    #[test]
    fn packings_of_configs() {
        let config = |model_type: &str| {
            format!(
                r#"{{{model_type} "linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 1,
                    "linear_value_head_dim": 1}}"#
            )
        };
        for (model_type, packing) in [
            (r#""model_type": "qwen3_next","#, Packing::Interleaved),
            (r#""model_type": "qwen3_5","#, Packing::Contiguous),
            (r#""model_type": "qwen3_5_moe","#, Packing::Contiguous),
        ] {
            assert_eq!(Layout::from_config(&config(model_type)).unwrap().packing, packing);
        }
        for model_type in ["", r#""model_type": "qwen4","#, r#""model_type": 3,"#] {
            assert!(Layout::from_config(&config(model_type)).unwrap_err().to_string().contains("model_type"));
        }
    }

    #[test]
    fn shards() {
        let heads = Heads::new(16, 48, 128, 128).unwrap();
        assert_eq!(heads.shard(4), Heads::new(4, 12, 128, 128));
        assert_eq!(heads.shard(0), Err(HeadsError::Zero { name: "tp_size" }));
        assert_eq!(
            heads.shard(32).unwrap_err().to_string(),
            "num_k_heads = 16 does not divide among tp_size = 32 ranks"
        );
    }

    #[test]
    fn configs() {
        let flat = r#"{"linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_key_head_dim": 128,
                       "linear_value_head_dim": 64, "text_config": {"hidden_size": 1}}"#;
        let heads = Heads::new(16, 48, 128, 64).unwrap();
        assert_eq!(Heads::from_config(flat), Ok(heads));
        assert_eq!(Heads::from_config(&format!(r#"{{"text_config": {flat}}}"#)), Ok(heads));
        for (text, part) in [
            ("{", "not valid JSON"),
            ("[]", "linear_num_key_heads"),
            (r#"{"linear_num_key_heads": 16}"#, "linear_num_value_heads"),
            (r#"{"linear_num_key_heads": -16}"#, "-16"),
            (r#"{"text_config": {"linear_num_key_heads": "x"}}"#, "\"x\""),
        ] {
            let error = Heads::from_config(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error} should mention {part}");
        }
    }
}
