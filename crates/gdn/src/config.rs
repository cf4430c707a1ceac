//! The layouts of published models: by name ([`PRESETS`]), and out of a Hugging Face `config.json`.

use thiserror::Error;

use crate::{
    argument::ArgumentError,
    heads::Heads,
    packing::{Layout, Packing},
};

/// Why a name or a `config.json` gives no layout.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The numbers are there and are no heads.
    #[error(transparent)]
    Heads(#[from] ArgumentError),
    /// No preset has that name.
    #[error("no preset is named '{name}'; known: {known}")]
    UnknownPreset {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// Text that is not JSON, or lacks a number, or has something else in its place.
    #[error("config.json: {0}")]
    Json(String),
}

/// The models whose layout is known by name, each with its four numbers in the order of [`Heads::new`], and
/// its packing.
///
/// From the `config.json` or the model card that the publisher released on Hugging Face. A name also matches
/// with an organisation in front and a suffix behind: `Qwen/Qwen3-Next-80B-A3B-Instruct-FP8` is
/// `Qwen3-Next-80B-A3B`.
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
    /// The heads of a published model, by the name it has on Hugging Face (see [`PRESETS`]), in any letter
    /// case.
    ///
    /// ```
    /// let heads = gdn::Heads::preset("Qwen/Qwen3-Next-80B-A3B-Instruct")?;
    /// assert_eq!(heads, gdn::Heads::new(16, 32, 128, 128)?);
    /// # Ok::<(), gdn::ConfigError>(())
    /// ```
    ///
    /// # Errors
    /// [`ConfigError::UnknownPreset`] with the names there are.
    pub fn preset(name: &str) -> Result<Self, ConfigError> {
        Layout::preset(name).map(|layout| layout.heads)
    }

    /// Reads the heads from the text of a Hugging Face `config.json`.
    ///
    /// The numbers are `linear_num_key_heads`, `linear_num_value_heads`, `linear_key_head_dim` and
    /// `linear_value_head_dim`, at the top level or, for multimodal models, under `text_config` or
    /// `thinker_config.text_config`. A number that is null is one that is not there.
    ///
    /// # Errors
    /// [`ConfigError::Json`] names the missing or malformed key; the errors of [`Heads::new`] besides.
    pub fn from_config(json: &str) -> Result<Self, ConfigError> {
        let config = parse(json)?;
        let level = text_level(&config);
        let mut numbers = [0; 4];
        for (number, key) in numbers.iter_mut().zip(KEYS) {
            let value = level.get(key).filter(|value| !value.is_null()).ok_or_else(|| {
                ConfigError::Json(format!(
                    "has no '{key}', at the top level or under 'text_config' or 'thinker_config.text_config'"
                ))
            })?;
            *number = value.as_u64().and_then(|n| usize::try_from(n).ok()).ok_or_else(|| {
                ConfigError::Json(format!("'{key}' is {value}, it must be a positive integer"))
            })?;
        }
        let [hk, hv, dk, dv] = numbers;
        Ok(Self::new(hk, hv, dk, dv)?)
    }
}

fn parse(json: &str) -> Result<serde_json::Value, ConfigError> {
    serde_json::from_str(json).map_err(|e| ConfigError::Json(format!("not valid JSON: {e}")))
}

/// The four numbers, in the order of [`Heads::new`].
const KEYS: [&str; 4] =
    ["linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"];

/// The level of a config that speaks of the language model: the first that has one of the numbers, else the
/// top.
fn text_level(config: &serde_json::Value) -> &serde_json::Value {
    let levels = ["", "/text_config", "/thinker_config/text_config"];
    let has =
        |level: &&serde_json::Value| KEYS.iter().any(|key| level.get(key).is_some_and(|v| !v.is_null()));
    levels.into_iter().filter_map(|path| config.pointer(path)).find(has).unwrap_or(config)
}

impl Layout {
    /// The layout of a published model, by the name it has on Hugging Face (see [`PRESETS`]), in any letter
    /// case.
    ///
    /// ```
    /// let layout = gdn::Layout::preset("Qwen/Qwen3.6-27B")?;
    /// assert_eq!((layout.heads.ratio(), layout.packing), (3, gdn::Packing::Contiguous));
    /// # Ok::<(), gdn::ConfigError>(())
    /// ```
    ///
    /// # Errors
    /// [`ConfigError::UnknownPreset`] with the names there are.
    pub fn preset(name: &str) -> Result<Self, ConfigError> {
        let model = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
        let matches = |preset: &str| {
            let rest = model.strip_prefix(&preset.to_ascii_lowercase());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        match PRESETS.iter().find(|(preset, ..)| matches(preset)) {
            Some(&(_, [hk, hv, dk, dv], packing)) => Ok(Self::new(Heads::new(hk, hv, dk, dv)?, packing)),
            None => Err(ConfigError::UnknownPreset {
                name: name.to_owned(),
                known: PRESETS.iter().map(|(preset, ..)| *preset).collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// Reads the heads from the text of a Hugging Face `config.json` (see [`Heads::from_config`]), and the
    /// packing from its `model_type`: `qwen3_next` is interleaved, `qwen3_5` and its kin are contiguous.
    /// Where the top level's says neither, that of the level with the heads does.
    ///
    /// # Errors
    /// Those of [`Heads::from_config`], and [`ConfigError::Json`] for a `model_type` that is missing or not
    /// known.
    pub fn from_config(json: &str) -> Result<Self, ConfigError> {
        let heads = Heads::from_config(json)?;
        let config = parse(json)?;
        let levels = [&config, text_level(&config)].map(|level| level.get("model_type")?.as_str());
        let packing = levels.iter().flatten().find_map(|name| match name {
            name if name.starts_with("qwen3_next") => Some(Packing::Interleaved),
            name if name.starts_with("qwen3_5") => Some(Packing::Contiguous),
            _ => None,
        });
        let packing = packing.ok_or_else(|| {
            let name = levels.into_iter().flatten().next().unwrap_or("missing");
            ConfigError::Json(format!("model_type is {name}: only qwen3_next and qwen3_5 tell the packing"))
        })?;
        Ok(Self::new(heads, packing))
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
    fn configs() {
        let flat = r#"{"linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_key_head_dim": 128,
                       "linear_value_head_dim": 64, "text_config": {"hidden_size": 1}}"#;
        let heads = Heads::new(16, 48, 128, 64).unwrap();
        assert_eq!(Heads::from_config(flat), Ok(heads));
        assert_eq!(Heads::from_config(&format!(r#"{{"text_config": {flat}}}"#)), Ok(heads));
        let nulls = r#""linear_num_key_heads": null, "linear_num_value_heads": null"#;
        for nested in [
            format!(r#"{{{nulls}, "text_config": {flat}}}"#),
            format!(
                r#"{{"model_type": "qwen3_omni", "thinker_config": {{{nulls}, "text_config": {flat}}}}}"#
            ),
            format!(r#"{{"text_config": {{{nulls}}}, "thinker_config": {{"text_config": {flat}}}}}"#),
        ] {
            assert_eq!(Heads::from_config(&nested), Ok(heads), "{nested}");
            let typed = nested.replace(flat, &flat.replacen('{', r#"{"model_type": "qwen3_5_text", "#, 1));
            assert_eq!(Layout::from_config(&typed).unwrap().packing, Packing::Contiguous, "{typed}");
        }
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
