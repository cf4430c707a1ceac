//! What a repacked checkpoint is made of, tensor by tensor, before a byte of it is written.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, bail};
use gdn::{Heads, Layout, Packing, Projection, WeightMap};
use safetensors::{Dtype, tensor::TensorInfo};
use serde_json::Value;

use super::{
    checkpoint::{Checkpoint, Place},
    follow::{Follow, Grain, follow},
    format::Declared,
    mentions::{self, FileOf},
    names::{ModuleName, Names},
    order::{ALIGNMENT, Listed, is_in_usual_order, is_written_as_usual, undone},
    record::Record,
};
use crate::header::{Entry, head};

/// What a checkpoint is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Goal {
    /// The order of the result.
    pub(super) layout: Layout,
    /// The names of its projections.
    pub(super) names: Names,
}

/// Every file with tensors, and the index.
pub(super) struct Plan {
    pub(super) shards: Vec<PlannedShard>,
    /// Its text. `None` where the source has none.
    pub(super) index: Option<(String, String)>,
    /// Files that an undo would write with the same tensors, but not with the same bytes.
    pub(super) not_undone: Vec<String>,
}

pub(super) struct PlannedShard {
    pub(super) name: String,
    /// The length of the header, and the header.
    pub(super) head: Vec<u8>,
    pub(super) tensors: Vec<Planned>,
    /// Of the whole file.
    pub(super) bytes: u64,
}

/// One tensor of the result.
pub(super) struct Planned {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: u64,
    pub(super) content: Content,
}

/// Where a tensor's bytes come from.
pub(super) enum Content {
    /// All from one place.
    Whole(Place),
    /// Indices of a dim that move.
    Gather { dim: usize, parts: Vec<(Place, WeightMap)> },
    /// Nowhere: they are made here.
    Bytes(Vec<u8>),
}

/// From this size on a piece is copied by itself; of smaller ones many are put together first.
pub(super) const LARGE: u64 = 64 << 10;

/// Bytes that stay side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) shard: usize,
    pub(super) from: u64,
    pub(super) len: u64,
}

impl Planned {
    /// The bytes of the tensor where they come from nowhere, or in pieces too small to be copied one by one.
    pub(super) fn in_memory(&self, source: &Checkpoint) -> anyhow::Result<Option<Vec<u8>>> {
        let parts = match &self.content {
            Content::Whole(_) => return Ok(None),
            Content::Bytes(bytes) => return Ok(Some(bytes.clone())),
            Content::Gather { parts, .. } => parts,
        };
        let copies = self.copies()?;
        if self.bytes >= LARGE * copies.len() as u64 {
            return Ok(None);
        }
        let mut read = Vec::with_capacity(parts.len());
        for (place, _) in parts {
            let mut bytes = Vec::new();
            source.read(*place, &mut bytes)?;
            read.push((place, bytes));
        }
        let mut result = Vec::with_capacity(usize::try_from(self.bytes)?);
        for copy in copies {
            let holds = |(place, _): &&(&Place, Vec<u8>)| {
                place.shard == copy.shard && (place.start..place.start + place.bytes).contains(&copy.from)
            };
            let (place, bytes) = read.iter().find(holds).context("a piece lies outside its tensor")?;
            result.extend_from_slice(&bytes[(copy.from - place.start) as usize..][..copy.len as usize]);
        }
        Ok(Some(result))
    }

    /// All bytes of the tensor, in order. None for [`Content::Bytes`].
    pub(super) fn copies(&self) -> anyhow::Result<Vec<Copy>> {
        match &self.content {
            Content::Bytes(_) => Ok(Vec::new()),
            Content::Whole(place) => {
                Ok(vec![Copy { shard: place.shard, from: place.start, len: place.bytes }])
            }
            Content::Gather { dim, parts } => {
                let outer: usize = self.shape[..*dim].iter().product();
                let indices = (outer * self.shape[*dim]) as u64;
                let inner = self.bytes.checked_div(indices).unwrap_or(0);
                let mut copies = Vec::new();
                for n in 0..outer as u64 {
                    for (place, map) in parts {
                        let (from, to) = (n * map.sources() as u64, n * map.destinations() as u64);
                        copies.extend(map.moves().iter().map(|m| {
                            let copy = Copy {
                                shard: place.shard,
                                from: place.start + (from + m.from as u64) * inner,
                                len: m.len as u64 * inner,
                            };
                            ((to + m.to as u64) * inner, copy)
                        }));
                    }
                }
                copies.sort_by_key(|(to, _)| *to);
                let mut end = 0u64;
                let mut result = Vec::with_capacity(copies.len());
                for (to, mut copy) in copies {
                    // What two parts both give is the same in both: the plan saw to that.
                    let known = end.saturating_sub(to).min(copy.len);
                    copy.from += known;
                    copy.len -= known;
                    if to + known != end {
                        bail!("'{}': nothing fills its bytes from {end} on", self.name);
                    }
                    end += copy.len;
                    result.extend((copy.len > 0).then_some(copy));
                }
                if end != self.bytes {
                    bail!("'{}': nothing fills its bytes from {end} on", self.name);
                }
                Ok(result)
            }
        }
    }
}

impl Plan {
    pub(super) fn new(source: &Checkpoint, goal: Goal) -> anyhow::Result<Self> {
        let planner = Planner { source, goal, declared: Declared::read(source)? };
        let mut shards = Vec::new();
        let mut not_undone = Vec::new();
        // The file of every tensor that counts.
        let mut files: HashMap<String, String> = HashMap::new();
        for (number, shard) in source.shards.iter().enumerate() {
            let mut tensors = Vec::new();
            let names = shard.input.names();
            for name in &names {
                let before = tensors.len();
                planner
                    .add(number, name, &mut tensors)
                    .with_context(|| format!("{}: '{name}'", shard.name))?;
                if source.counts(number, name) {
                    let new = tensors[before..].iter().map(|tensor| tensor.name.clone());
                    files.extend(new.map(|name| (name, shard.name.clone())));
                }
            }
            let before: Vec<Listed> = names
                .iter()
                .filter_map(|name| shard.input.place(name))
                .zip(&names)
                .map(|((info, _), name)| Listed { name: name.clone(), dtype: info.dtype })
                .collect();
            if is_in_usual_order(&before) {
                tensors.sort_by(|a, b| a.listed().usual_order(&b.listed()));
            }
            // What was repacked goes back to what it was; else the record says what is done now.
            let metadata = match source.record {
                Some(_) => shard.metadata.clone(),
                None => Record { layout: goal.layout, names: goal.names }.add_to(&shard.metadata),
            };
            let entries = tensors.iter().map(|Planned { name, dtype, shape, bytes, .. }| Entry {
                name,
                dtype: *dtype,
                shape,
                bytes: *bytes,
            });
            let head = head(entries, &metadata, ALIGNMENT).with_context(|| shard.name.clone())?;
            let bytes =
                tensors.iter().try_fold(head.len() as u64, |sum, tensor| sum.checked_add(tensor.bytes));
            let bytes = bytes.with_context(|| format!("{} would be too large", shard.name))?;
            let listed: Vec<Listed> = tensors.iter().map(Planned::listed).collect();
            if !is_written_as_usual(&shard.input)? || undone(&listed, &before) != before {
                not_undone.push(shard.name.clone());
            }
            shards.push(PlannedShard { name: shard.name.clone(), head, tensors, bytes });
        }
        let index = index(source, &shards, goal.names, &|name| files.get(name).cloned())?;
        if let (Some(before), Some((name, text))) = (&source.index, &index) {
            // An undo takes the parts apart where the whole is, and joins them where the first is.
            let undone = |name: &str| {
                let module = ModuleName::parse(name)?;
                files.get(&module.of(if module.part.is_some() { None } else { Some(0) })).cloned()
            };
            let back = match source.names() == goal.names {
                true => text.clone(),
                false => mentions::renamed_index(text, source.names(), &undone)?,
            };
            if mentions::without_number(&back, TOTAL_SIZE)
                != mentions::without_number(&before.text, TOTAL_SIZE)
            {
                not_undone.push(name.clone());
            }
        }
        Ok(Self { shards, index, not_undone })
    }
}

struct Planner<'s> {
    source: &'s Checkpoint,
    goal: Goal,
    declared: Declared,
}

/// A tensor that is read.
struct Source<'s> {
    info: &'s TensorInfo,
    place: Place,
}

impl Planner<'_> {
    fn source(&self, shard: usize, name: &str) -> anyhow::Result<Source<'_>> {
        let (info, start) = self.source.shards[shard].input.place(name).context("there is no such tensor")?;
        let bytes = (info.data_offsets.1 - info.data_offsets.0) as u64;
        Ok(Source { info, place: Place { shard, start, bytes } })
    }

    /// Adds what becomes of the tensor `name`.
    fn add(&self, shard: usize, name: &str, tensors: &mut Vec<Planned>) -> anyhow::Result<()> {
        let source = self.source(shard, name)?;
        let Goal { layout, names } = self.goal;
        let Some(module) = ModuleName::parse(name) else {
            tensors.push(source.as_it_is(name.to_owned()));
            return Ok(());
        };
        match (layout.packing, module.part) {
            (packing, None) => self.whole(&source, &module, layout, packing, names, tensors),
            (Packing::Interleaved, Some(part)) => {
                let [first, second] = [0, 1].map(|part| module.of(Some(part)));
                let other = if part == 0 { &second } else { &first };
                let Some(other_shard) = self.source.shard_beside(shard, name, other) else {
                    match self.source.counts(shard, name) {
                        true => bail!("'{other}' is missing"),
                        false => {
                            bail!("it is an old copy that the index does not take, without one of '{other}'")
                        }
                    }
                };
                if part == 0 {
                    let second = self.source(other_shard, other)?;
                    tensors.push(self.joined([&source, &second], &module, layout)?);
                }
                Ok(())
            }
            (Packing::Contiguous, Some(_)) => bail!("it is contiguous already"),
        }
    }

    /// How a tensor of a projection follows `outputs` outputs, and that its shape allows it.
    fn follow(&self, source: &Source<'_>, module: &ModuleName<'_>, outputs: usize) -> anyhow::Result<Follow> {
        let TensorInfo { dtype, shape, .. } = source.info;
        let format = self.declared.of(&module.module())?;
        let follow = follow(&format, module.suffix, *dtype, shape, outputs)?;
        if let Follow::Along { dim, .. } = follow {
            let indices: usize = shape[..=dim].iter().product();
            if indices > 0 && !source.place.bytes.is_multiple_of(indices as u64) {
                bail!("its shape is {shape:?}, of {dtype}: what moves is no whole number of bytes");
            }
        }
        Ok(follow)
    }

    /// A tensor of a whole projection: repacked as it is, or taken apart.
    fn whole(
        &self,
        source: &Source<'_>,
        module: &ModuleName<'_>,
        layout: Layout,
        packing: Packing,
        names: Names,
        tensors: &mut Vec<Planned>,
    ) -> anyhow::Result<()> {
        let all = module.projection.features(&layout.heads);
        let follow = self.follow(source, module, all)?;
        let map = map_of(&layout.heads, module.projection, packing, follow, &[source])?;
        if names == Names::Fused {
            let mut tensor = source.as_it_is(module.of(None));
            if let (Follow::Along { dim, grain }, Some(map)) = (follow, &map) {
                match grain.of(map) {
                    Ok(map) => tensor.content = Content::Gather { dim, parts: vec![(source.place, map)] },
                    // All of it is the same, wherever it goes.
                    Err(_) if self.alike(source, dim, grain)?.is_some() => {}
                    Err(error) => return Err(error.into()),
                }
            }
            tensors.push(tensor);
            return Ok(());
        }
        for (part, range) in module.projection.tensors(&layout.heads).into_iter().enumerate() {
            let mut tensor = source.as_it_is(module.of(Some(part)));
            let outputs = range.len();
            match follow {
                Follow::Keep => {}
                Follow::Shape => {
                    tensor.content = Content::Bytes(self.with_outputs(source, all, outputs)?);
                }
                Follow::Along { dim, grain } => {
                    tensor.set_dim(dim, grain.len(outputs))?;
                    let Some(map) = &map else {
                        tensors.push(tensor);
                        continue;
                    };
                    tensor.content = match grain.of(&map.destination_part(range)) {
                        Ok(map) => Content::Gather { dim, parts: vec![(source.place, map)] },
                        Err(error) => match self.alike(source, dim, grain)? {
                            Some(alike) if grain.fits(outputs) => {
                                Content::Bytes(alike.bytes(grain.len(outputs)))
                            }
                            _ => return Err(error.into()),
                        },
                    };
                }
            }
            tensors.push(tensor);
        }
        Ok(())
    }

    /// The two parts of a tensor put together.
    fn joined(
        &self,
        parts: [&Source<'_>; 2],
        module: &ModuleName<'_>,
        layout: Layout,
    ) -> anyhow::Result<Planned> {
        let all = module.projection.features(&layout.heads);
        let ranges = module.projection.tensors(&layout.heads);
        let second = module.of(Some(1));
        let follows = [
            self.follow(parts[0], module, ranges[0].len())?,
            self.follow(parts[1], &ModuleName { part: Some(1), ..*module }, ranges[1].len())
                .with_context(|| format!("'{second}'"))?,
        ];
        let [info, other] = [parts[0].info, parts[1].info];
        if info.dtype != other.dtype {
            bail!("it is {}, '{second}' is {}", info.dtype, other.dtype);
        }
        if follows[0] != follows[1] {
            bail!(
                "its shape is {:?}, that of '{second}' is {:?}: they do not go together",
                info.shape,
                other.shape
            );
        }
        let mut tensor = parts[0].as_it_is(module.of(None));
        match follows[0] {
            Follow::Keep => {
                if info.shape != other.shape || !self.same(parts[0].place, parts[1].place)? {
                    bail!("it differs from '{second}': one tensor cannot be both");
                }
            }
            Follow::Shape => {
                self.with_outputs(parts[1], ranges[1].len(), 0)?;
                tensor.content = Content::Bytes(self.with_outputs(parts[0], ranges[0].len(), all)?);
            }
            Follow::Along { dim, grain } => {
                let without = |shape: &[usize]| [&shape[..dim], &shape[dim + 1..]].concat();
                if without(&info.shape) != without(&other.shape) {
                    bail!("its shape is {:?}, that of '{second}' is {:?}", info.shape, other.shape);
                }
                tensor.set_dim(dim, grain.len(all))?;
                let to = Packing::Interleaved;
                let Some(map) = map_of(&layout.heads, module.projection, to, follows[0], &parts)? else {
                    return Ok(tensor);
                };
                let maps = ranges.map(|range| grain.of(&map.source_part(range)));
                if let [Err(error), _] | [_, Err(error)] = &maps {
                    let [one, other] = [self.alike(parts[0], dim, grain)?, self.alike(parts[1], dim, grain)?];
                    tensor.content = match one {
                        Some(alike) if Some(&alike) == other.as_ref() => {
                            Content::Bytes(alike.bytes(grain.len(all)))
                        }
                        _ => return Err(error.clone().into()),
                    };
                    return Ok(tensor);
                }
                let mut gathered = Vec::new();
                for (source, map) in parts.into_iter().zip(maps) {
                    gathered.push((source.place, map?));
                }
                if let Grain::Block(_) = grain {
                    self.agree(&gathered, tensor.bytes / tensor.shape[0].max(1) as u64)
                        .with_context(|| format!("'{second}'"))?;
                }
                tensor.content = Content::Gather { dim, parts: gathered };
            }
        }
        Ok(tensor)
    }

    /// What a packed tensor says of every output, if it says the same of all of them: the zero points of a
    /// symmetric quantisation.
    fn alike(&self, source: &Source<'_>, dim: usize, grain: Grain) -> anyhow::Result<Option<Alike>> {
        let (Grain::Group(per_element), TensorInfo { shape, dtype, .. }) = (grain, source.info) else {
            return Ok(None);
        };
        let outer: usize = shape[..dim].iter().product();
        if dtype.bitsize() != 32 || source.place.bytes == 0 || source.place.bytes > LARGEST_ALIKE {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        self.source.read(source.place, &mut bytes)?;
        let each = bytes.len() / outer;
        let inner = each / shape[dim];
        let mut alike = Alike { inner: Vec::new() };
        for n in bytes.chunks(each) {
            let first = &n[..inner];
            if !n.chunks(inner).all(|element| element == first) || !is_repeated(first, 32 / per_element) {
                return Ok(None);
            }
            alike.inner.push(first.to_vec());
        }
        Ok(Some(alike))
    }

    /// That rows which two parts both give, as blocks of scales reach from one into the other, are the same.
    fn agree(&self, parts: &[(Place, WeightMap)], row_bytes: u64) -> anyhow::Result<()> {
        let mut given: BTreeMap<usize, Place> = BTreeMap::new();
        for (place, map) in parts {
            for (from, to) in map.moves().iter().flat_map(|m| (0..m.len).map(|i| (m.from + i, m.to + i))) {
                let row = Place { start: place.start + from as u64 * row_bytes, bytes: row_bytes, ..*place };
                if let Some(known) = given.insert(to, row)
                    && !self.same(known, row)?
                {
                    bail!("block {to} would be made of outputs of both parts, whose scales differ");
                }
            }
        }
        Ok(())
    }

    fn same(&self, one: Place, other: Place) -> anyhow::Result<bool> {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        self.source.read(one, &mut a)?;
        self.source.read(other, &mut b)?;
        Ok(a == b)
    }

    /// The bytes of a `weight_shape` with other outputs.
    fn with_outputs(&self, source: &Source<'_>, outputs: usize, new: usize) -> anyhow::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.source.read(source.place, &mut bytes)?;
        let size = bytes.len() / 2;
        let mut first = [0; 8];
        first[..size].copy_from_slice(&bytes[..size]);
        let got = u64::from_le_bytes(first);
        if got != outputs as u64 {
            bail!("it says {got} outputs, there are {outputs}");
        }
        bytes[..size].copy_from_slice(&(new as u64).to_le_bytes()[..size]);
        Ok(bytes)
    }
}

/// Where the indices of tensors that follow go, once their shapes have been compared with the heads. None
/// where nothing moves: a map takes memory for each head, of which a tensor without bytes can have as many as
/// there are numbers.
fn map_of(
    heads: &Heads,
    projection: Projection,
    to: Packing,
    follow: Follow,
    parts: &[&Source<'_>],
) -> anyhow::Result<Option<WeightMap>> {
    let Follow::Along { dim, .. } = follow else { return Ok(None) };
    if parts.iter().all(|part| part.place.bytes == 0) {
        return Ok(None);
    }
    let indices = parts.iter().map(|part| part.info.shape[dim]).fold(0, usize::saturating_add);
    Ok(Some(WeightMap::for_indices(heads, projection, to, indices)?))
}

impl Source<'_> {
    fn as_it_is(&self, name: String) -> Planned {
        Planned {
            name,
            dtype: self.info.dtype,
            shape: self.info.shape.clone(),
            bytes: self.place.bytes,
            content: Content::Whole(self.place),
        }
    }
}

impl Planned {
    fn listed(&self) -> Listed {
        Listed { name: self.name.clone(), dtype: self.dtype }
    }

    fn set_dim(&mut self, dim: usize, len: usize) -> anyhow::Result<()> {
        let unit = match self.shape[dim] {
            0 => 0,
            old => self.bytes / old as u64,
        };
        self.bytes = unit.checked_mul(len as u64).context("it would be too large")?;
        self.shape[dim] = len;
        Ok(())
    }
}

/// One element along a dim, which all of them are.
#[derive(PartialEq, Eq)]
struct Alike {
    /// For each index of the dims before.
    inner: Vec<Vec<u8>>,
}

impl Alike {
    /// So many of them.
    fn bytes(&self, len: usize) -> Vec<u8> {
        self.inner.iter().flat_map(|element| element.repeat(len)).collect()
    }
}

/// Larger tensors are no zero points.
const LARGEST_ALIKE: u64 = 64 << 20;

/// Whether every integer of 32 bits is made of the same bits over and over.
fn is_repeated(elements: &[u8], bits: usize) -> bool {
    elements.chunks(4).all(|element| {
        let word = element.iter().rev().fold(0u32, |word, byte| word << 8 | u32::from(*byte));
        bits < 32 && word.rotate_right(bits as u32) == word
    })
}

const TOTAL_SIZE: &[&str] = &["metadata", "total_size"];

/// The index says of every tensor what the source's says of the one it is made from. What need not change
/// stays, to the byte.
fn index(
    source: &Checkpoint,
    shards: &[PlannedShard],
    names: Names,
    file_of: FileOf<'_>,
) -> anyhow::Result<Option<(String, String)>> {
    let Some(index) = &source.index else { return Ok(None) };
    let what = || index.name.clone();
    let mut text = match names == source.names() {
        true => index.text.clone(),
        false => mentions::renamed_index(&index.text, names, file_of).with_context(what)?,
    };
    if let Some(total) = index.json.pointer("/metadata/total_size").and_then(Value::as_u64) {
        let new = shards.iter().map(|shard| shard.bytes - shard.head.len() as u64).sum::<u64>();
        let mut old = 0;
        for shard in &source.shards {
            old += shard.input.data_len();
        }
        if new != old {
            let changed = total.checked_add(new).and_then(|total| total.checked_sub(old));
            let total = changed.with_context(|| {
                format!("{}: its total_size is {total}, the files have {old} bytes of data", index.name)
            })?;
            text = mentions::with_number(&text, TOTAL_SIZE, total).with_context(what)?;
        }
    }
    Ok(Some((index.name.clone(), text)))
}
