//! A checkpoint in a folder: its safetensors files, its index, and whatever else lies there. Only ever read.

use std::{
    cell::{Cell, Ref},
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, bail};
use gdn::{Heads, Layout, Packing, Projection};
use serde_json::Value;

use super::{Names, write::LOCK};
use crate::{
    files::{Input, Stamp, read_text},
    header::FileMetadata,
    layout::{heads_from, metadata_of, value_of},
};

/// What gdn wrote into the metadata of a file that it repacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) layout: Layout,
    pub(super) names: Names,
}

/// All keys of a record begin with this.
const PREFIX: &str = "gdn.";
/// What the file's metadata was where it said nothing: `null` or `{}`.
const BEFORE: &str = "metadata";

impl Record {
    /// The metadata of a file with the record in it.
    pub(super) fn add_to(&self, metadata: &FileMetadata) -> FileMetadata {
        let layout = metadata_of(&self.layout).map(|(key, value)| (format!("{PREFIX}{key}"), value));
        let names = (format!("{PREFIX}names"), self.names.name().to_owned());
        let before = match metadata {
            FileMetadata::Null => Some("null"),
            FileMetadata::Pairs(pairs) if pairs.is_empty() => Some("{}"),
            _ => None,
        };
        let before = before.map(|text| (format!("{PREFIX}{BEFORE}"), text.to_owned()));
        let own = layout.into_iter().chain([names]).chain(before);
        FileMetadata::Pairs(metadata.pairs().iter().cloned().chain(own).collect())
    }

    /// The record in the metadata of a file, and what the metadata was without it.
    fn take_from(metadata: &FileMetadata) -> anyhow::Result<(Option<Self>, FileMetadata)> {
        let (own, rest): (Vec<_>, Vec<_>) =
            metadata.pairs().iter().cloned().partition(|(key, _)| key.starts_with(PREFIX));
        let own: Vec<_> =
            own.into_iter().map(|(key, value)| (key[PREFIX.len()..].to_owned(), value)).collect();
        let Some(packing) = value_of(&own, "packing") else { return Ok((None, metadata.clone())) };
        let packing: Packing = packing.parse().context("metadata of the file")?;
        let names = value_of(&own, "names").unwrap_or_default();
        let names = Names::ALL.into_iter().find(|known| known.name() == names);
        let names = names.context("metadata of the file: gdn.names is neither 'fused' nor 'separate'")?;
        let record = Self { layout: Layout::new(heads_from(&own)?, packing), names };
        let before = match value_of(&own, BEFORE) {
            _ if !rest.is_empty() => FileMetadata::Pairs(rest),
            Some("null") => FileMetadata::Null,
            Some("{}") => FileMetadata::Pairs(Vec::new()),
            _ => FileMetadata::Absent,
        };
        Ok((Some(record), before))
    }
}

/// One safetensors file of a checkpoint.
pub(super) struct Shard {
    pub(super) name: String,
    pub(super) input: Input,
    /// Without gdn's record.
    pub(super) metadata: FileMetadata,
}

/// `….safetensors.index.json`
pub(super) struct Index {
    pub(super) name: String,
    pub(super) text: String,
    pub(super) json: Value,
    /// The file of each tensor.
    pub(super) weight_map: BTreeMap<String, String>,
}

pub(super) struct Checkpoint {
    pub(super) dir: PathBuf,
    /// In order of their names.
    pub(super) shards: Vec<Shard>,
    pub(super) index: Option<Index>,
    /// Files that are neither.
    pub(super) others: Vec<String>,
    /// What is not looked at: folders, and weights in other formats.
    pub(super) left_out: Vec<String>,
    pub(super) record: Option<Record>,
    /// Of every file but the shards, which know their own.
    stamps: Vec<(PathBuf, Stamp)>,
    /// The one shard that is open.
    reading: Cell<usize>,
}

/// Where a tensor's data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) shard: usize,
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// Files that hold weights nobody here can repack, and that must not lie beside repacked ones.
fn is_other_weights(name: &str) -> bool {
    const ENDS: [&str; 9] =
        [".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".bin.index.json"];
    ENDS.iter().any(|end| name.ends_with(end))
}

impl Checkpoint {
    pub(super) fn open(dir: &Path) -> anyhow::Result<Self> {
        Self::open_here(dir).with_context(|| format!("cannot use the checkpoint {}", dir.display()))
    }

    fn open_here(dir: &Path) -> anyhow::Result<Self> {
        let mut checkpoint = Self {
            dir: dir.to_owned(),
            shards: Vec::new(),
            index: None,
            others: Vec::new(),
            left_out: Vec::new(),
            record: None,
            stamps: Vec::new(),
            reading: Cell::new(0),
        };
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            match name.into_string() {
                Ok(name) => names.push(name),
                Err(name) => bail!("a file's name is no UTF-8: {}", name.to_string_lossy()),
            }
        }
        names.sort();
        for name in names {
            // A run that was killed at the very end leaves it beside a checkpoint that is whole.
            if name == LOCK {
                continue;
            }
            let path = dir.join(&name);
            // Through symbolic links, as Hugging Face's cache is made of them.
            let metadata = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
            if !metadata.is_file() || is_other_weights(&name) {
                checkpoint.left_out.push(name);
            } else if name.ends_with(".safetensors") {
                let input = Input::open(&path)?;
                let (record, metadata) =
                    Record::take_from(input.metadata()).with_context(|| format!("cannot read {name}"))?;
                checkpoint.add_record(&name, record)?;
                checkpoint.shards.push(Shard { name, input, metadata });
            } else if name.ends_with(".safetensors.index.json") {
                if let Some(index) = &checkpoint.index {
                    bail!("it has two indexes, {} and {name}", index.name);
                }
                let text = read_text(&path, &name)?;
                checkpoint.stamps.push((path, Stamp::of(&metadata)));
                checkpoint.index = Some(Index::parse(name, text)?);
            } else {
                checkpoint.stamps.push((path, Stamp::of(&metadata)));
                checkpoint.others.push(name);
            }
        }
        if checkpoint.shards.is_empty() {
            bail!("it has no safetensors file");
        }
        checkpoint.check_index()?;
        Ok(checkpoint)
    }

    /// Every file must say the same.
    fn add_record(&mut self, name: &str, record: Option<Record>) -> anyhow::Result<()> {
        if let Some(first) = self.shards.first()
            && record != self.record
        {
            let what = |record: &Option<Record>| match record {
                Some(Record { layout, names }) => {
                    format!("{} ({names}, {})", layout.packing, layout.heads, names = names.name())
                }
                None => "not repacked".to_owned(),
            };
            bail!("{} is {}, {name} is {}", first.name, what(&self.record), what(&record));
        }
        self.record = record;
        Ok(())
    }

    fn check_index(&self) -> anyhow::Result<()> {
        let Some(index) = &self.index else { return Ok(()) };
        let shards: HashMap<&str, &Shard> = self.shards.iter().map(|s| (s.name.as_str(), s)).collect();
        for (tensor, file) in &index.weight_map {
            let shard = shards.get(file.as_str()).with_context(|| {
                format!("{} says '{tensor}' is in {file}, which is not there", index.name)
            })?;
            if shard.input.place(tensor).is_none() {
                bail!("{} says '{tensor}' is in {file}, which does not have it", index.name);
            }
        }
        Ok(())
    }

    /// Tensors that the index does not name, with their files.
    pub(super) fn unnamed(&self) -> Vec<(String, &str)> {
        let Some(index) = &self.index else { return Vec::new() };
        let all =
            self.shards.iter().flat_map(|s| s.input.names().into_iter().map(|name| (name, s.name.as_str())));
        all.filter(|(name, file)| index.weight_map.get(name).is_none_or(|there| there != file)).collect()
    }

    /// The shard that has a tensor: the one the index names, else the first.
    pub(super) fn shard_of(&self, tensor: &str) -> Option<usize> {
        let named = self.index.as_ref().and_then(|index| index.weight_map.get(tensor));
        let has = |s: &Shard| named.is_none_or(|name| *name == s.name) && s.input.place(tensor).is_some();
        self.shards.iter().position(has)
    }

    /// The text of `config.json`, if there is one.
    pub(super) fn config(&self) -> anyhow::Result<Option<String>> {
        let path = self.dir.join("config.json");
        if !self.others.iter().any(|name| name == "config.json") {
            return Ok(None);
        }
        read_text(&path, &path.display().to_string()).map(Some)
    }

    /// That every file is there and has not changed since the checkpoint was opened: what was read goes together.
    pub(super) fn check_unchanged(&self) -> anyhow::Result<()> {
        self.shards.iter().try_for_each(|shard| shard.input.check_unchanged())?;
        self.stamps.iter().try_for_each(|(path, stamp)| stamp.check(path))
    }

    /// A shard's file, which is then the only one that is open.
    pub(super) fn file(&self, shard: usize) -> anyhow::Result<Ref<'_, File>> {
        let last = self.reading.replace(shard);
        if last != shard {
            self.shards[last].input.close();
        }
        self.shards[shard].input.file()
    }

    /// Reads part of a shard into `buffer`, which becomes that long.
    pub(super) fn read(&self, place: Place, buffer: &mut Vec<u8>) -> anyhow::Result<()> {
        buffer.clear();
        buffer.resize(usize::try_from(place.bytes)?, 0);
        self.file(place.shard)?;
        let shard = &self.shards[place.shard];
        shard.input.read_at(place.start, buffer).with_context(|| format!("cannot read {}", shard.name))
    }
}

impl Index {
    fn parse(name: String, text: String) -> anyhow::Result<Self> {
        let json: Value = serde_json::from_str(&text).with_context(|| format!("{name} is no valid JSON"))?;
        let map = json.get("weight_map").and_then(Value::as_object);
        let map = map.with_context(|| format!("{name} has no object 'weight_map'"))?;
        let mut weight_map = BTreeMap::new();
        for (tensor, file) in map {
            let file = file
                .as_str()
                .with_context(|| format!("{name} says '{tensor}' is in {file}, no file name"))?;
            let mut parts = Path::new(file).components();
            let plain =
                matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == file);
            if !plain || file.contains(['/', '\\', '\0']) {
                bail!("{name} says '{tensor}' is in {file:?}: that is no plain file name");
            }
            if !file.ends_with(".safetensors") {
                bail!("{name} says '{tensor}' is in {file:?}: that is no safetensors file");
            }
            weight_map.insert(tensor.clone(), file.to_owned());
        }
        Ok(Self { name, text, json, weight_map })
    }
}

/// A tensor's name that belongs to an input projection: `model.layers.0.linear_attn.in_proj_qkvz.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ModuleName<'a> {
    /// Up to and with `linear_attn.`.
    pub(super) prefix: &'a str,
    pub(super) projection: Projection,
    /// The whole, or its first or second part.
    pub(super) part: Option<usize>,
    /// After the module's name and a dot.
    pub(super) suffix: &'a str,
}

pub(super) fn fused_name(projection: Projection) -> &'static str {
    match projection {
        Projection::Qkvz => "in_proj_qkvz",
        Projection::Ba => "in_proj_ba",
    }
}

pub(super) fn part_names(projection: Projection) -> [&'static str; 2] {
    match projection {
        Projection::Qkvz => ["in_proj_qkv", "in_proj_z"],
        Projection::Ba => ["in_proj_b", "in_proj_a"],
    }
}

impl<'a> ModuleName<'a> {
    pub(super) fn parse(name: &'a str) -> Option<Self> {
        const LAYER: &str = "linear_attn.";
        let start =
            name.match_indices(LAYER).map(|(at, _)| at).find(|at| *at == 0 || name[..*at].ends_with('.'))?;
        let (prefix, rest) = name.split_at(start + LAYER.len());
        let (module, suffix) = rest.split_once('.')?;
        Projection::ALL.into_iter().find_map(|projection| {
            let part = if module == fused_name(projection) {
                None
            } else {
                Some(part_names(projection).iter().position(|part| *part == module)?)
            };
            Some(Self { prefix, projection, part, suffix })
        })
    }

    /// The name of the same tensor of the whole projection (`None`) or of a part.
    pub(super) fn of(&self, part: Option<usize>) -> String {
        let module = match part {
            None => fused_name(self.projection),
            Some(part) => part_names(self.projection)[part],
        };
        format!("{}{module}.{}", self.prefix, self.suffix)
    }
}

/// The heads of a checkpoint that does not say which it was repacked with.
pub(super) fn heads_of(checkpoint: &Checkpoint) -> anyhow::Result<Heads> {
    let config = checkpoint.config()?.with_context(|| {
        format!("{} has no config.json: name the heads with --config or --preset", checkpoint.dir.display())
    })?;
    Heads::from_config(&config).with_context(|| checkpoint.dir.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_projections() {
        let qkvz =
            |prefix, suffix| Some(ModuleName { prefix, projection: Projection::Qkvz, part: None, suffix });
        assert_eq!(
            ModuleName::parse("model.layers.0.linear_attn.in_proj_qkvz.weight"),
            qkvz("model.layers.0.linear_attn.", "weight")
        );
        assert_eq!(
            ModuleName::parse("mtp.layers.0.linear_attn.in_proj_qkvz.weight_scale_inv"),
            qkvz("mtp.layers.0.linear_attn.", "weight_scale_inv")
        );
        assert_eq!(
            ModuleName::parse("base_model.model.x.linear_attn.in_proj_qkvz.lora_B.default.weight"),
            qkvz("base_model.model.x.linear_attn.", "lora_B.default.weight")
        );
        let z = ModuleName::parse("linear_attn.in_proj_z.bias").unwrap();
        assert_eq!((z.part, z.of(None)), (Some(1), "linear_attn.in_proj_qkvz.bias".to_owned()));
        for name in [
            "model.layers.0.linear_attn.out_proj.weight",
            "model.layers.0.linear_attn.in_proj_qkvz",
            "model.layers.0.my_linear_attn.in_proj_qkvz.weight",
            "model.layers.0.self_attn.in_proj_qkvz.weight",
        ] {
            assert_eq!(ModuleName::parse(name), None);
        }
    }

    #[test]
    fn indexes_that_name_paths() {
        for file in
            ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "", ".", "a\\b.safetensors", "x.bin"]
        {
            let text = serde_json::json!({"weight_map": {"w": file}}).to_string();
            let error = Index::parse("i".to_owned(), text).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains("'w'"), "{file}: {error}");
        }
    }
}
