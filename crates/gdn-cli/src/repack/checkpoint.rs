//! A checkpoint in a folder: its safetensors files, its index, and whatever else lies there. Only ever read.

use std::{
    cell::{Cell, Ref},
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, bail};
use serde_json::Value;

use super::{
    names::{ModuleName, Names},
    record::Record,
};
use crate::{
    files::{Input, Stamp, read_text},
    header::FileMetadata,
};

/// The file that is held while a run writes, in the folder that it writes: no part of a checkpoint.
pub(super) const LOCK: &str = ".gdn-lock";

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

    /// That every tensor can be found: the index says in which file, else there is one alone that has it.
    fn check_index(&self) -> anyhow::Result<()> {
        let Some(index) = &self.index else {
            let mut seen = HashMap::new();
            for shard in &self.shards {
                for name in shard.input.names() {
                    if let Some(first) = seen.insert(name.clone(), &shard.name) {
                        bail!(
                            "{first} and {} both have '{name}', and no index says which of them counts",
                            shard.name
                        );
                    }
                }
            }
            return Ok(());
        };
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

    /// The names of its projections, where it has any.
    pub(super) fn names(&self) -> Names {
        let mut names = self.shards.iter().flat_map(|shard| shard.input.names());
        let has_parts =
            names.any(|name| ModuleName::parse(&name).is_some_and(|module| module.part.is_some()));
        if has_parts { Names::Separate } else { Names::Fused }
    }

    /// The modules whose names change where those of its projections do: what they are called, and what they
    /// will be.
    pub(super) fn renamed(&self) -> Vec<(Vec<String>, Vec<String>)> {
        let own = self.names();
        let mut modules = BTreeMap::new();
        for name in self.shards.iter().flat_map(|shard| shard.input.names()) {
            let Some(module) = ModuleName::parse(&name) else { continue };
            let of = |part| ModuleName { part, ..module }.module();
            let (whole, parts) = (vec![of(None)], [0, 1].map(|part| of(Some(part))).to_vec());
            modules
                .insert(whole[0].clone(), if own == Names::Fused { (whole, parts) } else { (parts, whole) });
        }
        modules.into_values().collect()
    }

    /// Whether it is this copy of a tensor that counts: the one that the index names or, where it names none,
    /// the only one.
    pub(super) fn counts(&self, shard: usize, tensor: &str) -> bool {
        match self.index.as_ref().and_then(|index| index.weight_map.get(tensor)) {
            Some(file) => *file == self.shards[shard].name,
            None => self.shards.iter().filter(|shard| shard.input.place(tensor).is_some()).count() == 1,
        }
    }

    /// The files in which a copy of a tensor counts: one, or none.
    pub(super) fn files_of(&self, tensor: &str) -> BTreeSet<&str> {
        let shards = self.shards.iter().enumerate();
        let has = |(number, shard): &(usize, &Shard)| {
            shard.input.place(tensor).is_some() && self.counts(*number, tensor)
        };
        shards.filter(has).map(|(_, shard)| shard.name.as_str()).collect()
    }

    /// The shard with the tensor that belongs with one of this shard: with one that counts the one that
    /// counts, with an old copy that of the same file.
    pub(super) fn shard_beside(&self, shard: usize, tensor: &str, other: &str) -> Option<usize> {
        let counts = self.counts(shard, tensor);
        let mut shards = (0..self.shards.len()).filter(|number| counts || *number == shard);
        shards.find(|number| {
            self.shards[*number].input.place(other).is_some() && self.counts(*number, other) == counts
        })
    }

    /// For each file that has tensors of which the index does not say they are there, what there is to say
    /// about it.
    pub(super) fn unnamed(&self) -> Vec<String> {
        let Some(index) = &self.index else { return Vec::new() };
        let mut notes = Vec::new();
        for (number, shard) in self.shards.iter().enumerate() {
            let names = shard.input.names().into_iter();
            let names = names.filter(|name| index.weight_map.get(name) != Some(&shard.name));
            let (unnamed, stale): (Vec<_>, Vec<_>) = names.partition(|name| self.counts(number, name));
            for (names, what) in [
                (stale, "old copies that the index does not take, and neither will the new one"),
                (unnamed, "not in the index, and will not be in the new one"),
            ] {
                let Some(first) = names.first() else { continue };
                let more =
                    if names.len() > 1 { format!(" and {} more", names.len() - 1) } else { String::new() };
                notes.push(format!("{}: '{first}'{more}: {what}", shard.name));
            }
        }
        notes
    }

    /// The text of `config.json`, if there is one.
    pub(super) fn config(&self) -> anyhow::Result<Option<String>> {
        let path = self.dir.join("config.json");
        if !self.others.iter().any(|name| name == "config.json") {
            return Ok(None);
        }
        read_text(&path, &path.display().to_string()).map(Some)
    }

    /// That every file is there and has not changed since the checkpoint was opened: what was read goes
    /// together.
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

#[cfg(test)]
mod tests {
    use super::*;

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
