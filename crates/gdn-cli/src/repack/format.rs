//! How the weights of a checkpoint are quantised, as it declares it. Nothing here looks at a tensor.

use anyhow::{Context, bail};
use regex::Regex;
use serde_json::{Map, Value};

use super::checkpoint::Checkpoint;
use crate::files::read_text;

/// How the tensors of one module are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Nothing is declared.
    Plain,
    /// fp8 as DeepSeek and Qwen publish it: one scale for a block of so many outputs, or for each output or
    /// tensor.
    Fp8 { block: Option<usize> },
    /// compressed-tensors.
    Compressed { scales: Scales, bits: usize },
    /// GPTQ: `[in, out]`.
    Gptq { bits: usize },
    /// AWQ's layout for GEMM: `[in, out]`.
    Awq { bits: usize },
    /// AWQ's layout for GEMV: `[out, in]`.
    AwqGemv,
    /// NVIDIA's ModelOpt.
    ModelOpt,
    /// MLX: `[out, in]`.
    Mlx,
    /// Ascend's msModelSlim, 8 bits.
    ModelSlim,
    /// Something else, with its name.
    Unknown(String),
}

/// What shares a scale of compressed-tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scales {
    Tensor,
    /// An output, or a group of inputs of one output.
    Output,
    /// So many outputs.
    Block(usize),
}

/// What a checkpoint declares.
pub(super) struct Declared(Kind);

enum Kind {
    /// The same for all modules.
    All(Format),
    /// Groups of modules, by what selects them.
    Groups(Vec<(Vec<Target>, Format)>),
    /// ModelOpt's algorithm, and those of single modules.
    ModelOpt { all: String, modules: Map<String, Value> },
    /// msModelSlim's word for each tensor.
    ModelSlim(Map<String, Value>),
}

enum Target {
    Module(String),
    Matches(Regex),
    /// A class of modules.
    Linear,
}

/// Where else than in `config.json` quantisation is declared.
const FILES: [&str; 5] = [
    "quant_model_description.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
];

impl Declared {
    pub(super) fn read(checkpoint: &Checkpoint) -> anyhow::Result<Self> {
        let config = checkpoint.config()?.unwrap_or_else(|| "{}".to_owned());
        let config: Value = serde_json::from_str(&config).context("config.json is no valid JSON")?;
        let levels = ["", "/text_config", "/thinker_config/text_config"];
        let levels = || levels.iter().filter_map(|path| config.pointer(path));
        let keys = ["quantization_config", "compression_config"];
        let own = levels().find_map(|level| {
            keys.iter().find_map(|key| level.get(key)).filter(|value| value.get("quant_method").is_some())
        });
        let method = own.and_then(|own| own.get("quant_method")).and_then(Value::as_str).unwrap_or_default();
        if let Some(own) = own
            && method != "ascend"
        {
            return Self::of_config(own, method).context("config.json");
        }
        if let Some(mlx) =
            levels().find_map(|level| level.get("quantization")).filter(|q| q.get("bits").is_some())
        {
            let all = mlx.get("mode").and_then(Value::as_str).unwrap_or("affine");
            return Ok(Self(Kind::All(match all {
                "affine" => Format::Mlx,
                other => Format::Unknown(format!("MLX's {other}")),
            })));
        }
        if let Some(file) = FILES.into_iter().find(|file| checkpoint.others.iter().any(|name| name == file)) {
            let text = read_text(&checkpoint.dir.join(file), file)?;
            let json: Value =
                serde_json::from_str(&text).with_context(|| format!("{file} is no valid JSON"))?;
            return Self::of_file(file, &json).with_context(|| file.to_owned());
        }
        Ok(Self(Kind::All(match method {
            "" => Format::Plain,
            other => Format::Unknown(format!("quant_method '{other}'")),
        })))
    }

    fn of_file(file: &str, json: &Value) -> anyhow::Result<Self> {
        let text = |key: &str| json.get(key).and_then(Value::as_str);
        match file {
            "quant_model_description.json" => {
                let words = json.as_object().context("it is no object")?;
                Ok(Self(Kind::ModelSlim(words.clone())))
            }
            "hf_quant_config.json" => {
                let own = json.get("quantization").context("it has no 'quantization'")?;
                Self::of_config(own, "modelopt")
            }
            "quant_config.json" if text("quant_method").is_none() && json.get("w_bit").is_some() => {
                Self::of_config(json, "awq")
            }
            "quantize_config.json" if text("quant_method").is_none() && json.get("bits").is_some() => {
                Self::of_config(json, "gptq")
            }
            _ => match text("quant_method") {
                Some(method) => Self::of_config(json, method),
                None => Ok(Self(Kind::All(Format::Unknown(format!("{file} without a quant_method"))))),
            },
        }
    }

    fn of_config(config: &Value, method: &str) -> anyhow::Result<Self> {
        let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or_default();
        let unknown = |what: String| Ok(Self(Kind::All(Format::Unknown(what))));
        let bits = || {
            let bits = config.get("bits").or_else(|| config.get("w_bit"));
            let bits =
                bits.and_then(Value::as_u64).context("it does not say how many 'bits' a weight has")?;
            usize::try_from(bits).ok().filter(|bits| matches!(bits, 2 | 4 | 8)).with_context(|| {
                format!("a weight has {bits} bits: a whole number of outputs in 32 bits takes 2, 4 or 8")
            })
        };
        let awq = |version: &str| match version.to_ascii_lowercase().as_str() {
            "gemm" | "" => Ok(Self(Kind::All(Format::Awq { bits: bits()? }))),
            "gemv" => Ok(Self(Kind::All(Format::AwqGemv))),
            other => unknown(format!("AWQ's version '{other}'")),
        };
        match method {
            "fp8" => {
                let block = config.get("weight_block_size").filter(|value| !value.is_null());
                let block = block.map(|block| block_rows(block.get(0).unwrap_or(block))).transpose()?;
                Ok(Self(Kind::All(Format::Fp8 { block })))
            }
            "compressed-tensors" => Self::groups(config),
            "gptq" => match text("checkpoint_format") {
                "" | "gptq" | "gptq_v2" => Ok(Self(Kind::All(Format::Gptq { bits: bits()? }))),
                other => unknown(format!("GPTQ's checkpoint_format '{other}'")),
            },
            "awq" => awq(text("version")),
            "auto-round" | "intel/auto-round" => {
                let packing = format!("{}{}", text("packing_format"), text("backend"));
                match packing.trim_start_matches("auto_round:").trim_start_matches("auto_") {
                    "gptq" => Ok(Self(Kind::All(Format::Gptq { bits: bits()? }))),
                    "awq" => awq(""),
                    _ => unknown(format!("auto-round's packing_format '{packing}'")),
                }
            }
            "modelopt" | "modelopt_fp4" => {
                let modules = config.get("quantized_layers").and_then(Value::as_object);
                let modules = modules.cloned().unwrap_or_default();
                Ok(Self(Kind::ModelOpt { all: text("quant_algo").to_owned(), modules }))
            }
            other => unknown(format!("quant_method '{other}'")),
        }
    }

    fn groups(config: &Value) -> anyhow::Result<Self> {
        let groups = config.get("config_groups").and_then(Value::as_object);
        let groups = groups.context("compressed-tensors without an object 'config_groups'")?;
        let mut all = Vec::new();
        for (name, group) in groups {
            let format = Self::group(group).with_context(|| format!("config_groups.{name}"))?;
            let targets = group.get("targets").and_then(Value::as_array).into_iter().flatten();
            let targets = targets.filter_map(Value::as_str).map(|target| match target.strip_prefix("re:") {
                // Python's `re.match` begins at the start, and ends where it likes.
                Some(pattern) => Regex::new(&format!("^(?:{pattern})")).map(Target::Matches).with_context(|| {
                    format!("config_groups.{name}: its target '{target}' is a pattern that is not understood here")
                }),
                None if target == "Linear" => Ok(Target::Linear),
                None => Ok(Target::Module(target.to_owned())),
            });
            all.push((targets.collect::<anyhow::Result<_>>()?, format));
        }
        Ok(Self(Kind::Groups(all)))
    }

    fn group(group: &Value) -> anyhow::Result<Format> {
        let Some(weights) = group.get("weights").filter(|weights| !weights.is_null()) else {
            return Ok(Format::Plain);
        };
        let structure = weights.get("block_structure").filter(|value| !value.is_null());
        let scales = match weights.get("strategy").and_then(Value::as_str) {
            Some("tensor") => Scales::Tensor,
            Some("channel" | "group" | "tensor_group") => Scales::Output,
            Some("block") => {
                let rows = structure.and_then(|structure| structure.get(0));
                Scales::Block(block_rows(rows.context("strategy 'block' without a 'block_structure'")?)?)
            }
            other => return Ok(Format::Unknown(format!("compressed-tensors' strategy {other:?}"))),
        };
        let bits = weights.get("num_bits").and_then(Value::as_u64).context("it has no 'num_bits'")?;
        Ok(Format::Compressed { scales, bits: usize::try_from(bits)? })
    }

    /// How the tensors of a module are stored, by its name without a dot at its end.
    pub(super) fn of(&self, module: &str) -> anyhow::Result<Format> {
        match &self.0 {
            Kind::All(format) => Ok(format.clone()),
            Kind::Groups(groups) => {
                let by = |wanted: fn(&Target, &str) -> bool| {
                    groups
                        .iter()
                        .filter(move |(targets, _)| targets.iter().any(|target| wanted(target, module)))
                };
                // A name goes before a pattern, and a pattern before a class.
                let ranks: [fn(&Target, &str) -> bool; 3] = [
                    |target, module| matches!(target, Target::Module(name) if name == module),
                    |target, module| matches!(target, Target::Matches(pattern) if pattern.is_match(module)),
                    |target, _| matches!(target, Target::Linear),
                ];
                for rank in ranks {
                    let mut found = by(rank).map(|(_, format)| format);
                    let Some(first) = found.next() else { continue };
                    if found.any(|other| other != first) {
                        bail!("two of config.json's config_groups have '{module}' for a target and differ");
                    }
                    return Ok(first.clone());
                }
                Ok(Format::Plain)
            }
            Kind::ModelOpt { all, modules } => {
                let own = modules.get(module).and_then(|module| module.get("quant_algo"));
                let algorithm = own.and_then(Value::as_str).unwrap_or(all);
                Ok(match algorithm {
                    "FP8" | "FP8_PER_CHANNEL_PER_TOKEN" | "NVFP4" | "NVFP4_AWQ" => Format::ModelOpt,
                    "MIXED_PRECISION" => Format::Plain,
                    other => Format::Unknown(format!("ModelOpt's '{other}'")),
                })
            }
            Kind::ModelSlim(words) => {
                let word = words.get(&format!("{module}.weight")).and_then(Value::as_str);
                Ok(match word {
                    Some("W8A8" | "W8A8_DYNAMIC" | "W8A8_MIX" | "W8A16") => Format::ModelSlim,
                    Some("FLOAT") | None => Format::Plain,
                    Some(other) => Format::Unknown(format!("msModelSlim's '{other}'")),
                })
            }
        }
    }
}

fn block_rows(rows: &Value) -> anyhow::Result<usize> {
    match rows.as_u64().and_then(|rows| usize::try_from(rows).ok()).filter(|rows| *rows > 0) {
        Some(rows) => Ok(rows),
        None => bail!("the block size is {rows}, it must be a positive integer"),
    }
}
