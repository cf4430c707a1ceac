//! Where a checkpoint has every output of every projection.

use std::collections::BTreeMap;

use gdn::{Heads, Packing, Projection, reference};
use safetensors::tensor::TensorInfo;

use super::super::{
    checkpoint::{Checkpoint, Place},
    names::{ModuleName, Names},
};

/// A checkpoint, and how it has its projections.
pub(super) struct View<'c> {
    pub(super) checkpoint: &'c Checkpoint,
    pub(super) heads: Heads,
    pub(super) packing: Packing,
    pub(super) names: Names,
}

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) shard: usize,
    pub(super) name: String,
}

impl View<'_> {
    pub(super) fn info(&self, piece: &Piece) -> (&TensorInfo, Place) {
        let found = self.checkpoint.shards[piece.shard].input.place(&piece.name);
        let (info, start) = found.unwrap_or_else(|| unreachable!("the name is one of the file's own"));
        let bytes = (info.data_offsets.1 - info.data_offsets.0) as u64;
        (info, Place { shard: piece.shard, start, bytes })
    }

    pub(super) fn file(&self, piece: &Piece) -> &str {
        &self.checkpoint.shards[piece.shard].name
    }

    /// Where every output of a projection is, in the order of the layer's own tensors (`[Q | K | V]` and then
    /// `Z`, or `B` and then `A`): the number of the piece, and the output there.
    pub(super) fn outputs(&self, projection: Projection) -> Vec<(usize, usize)> {
        let heads = &self.heads;
        let first = match projection {
            Projection::Qkvz => heads.qkv_features(),
            Projection::Ba => heads.num_v_heads(),
        };
        let all = projection.features(heads);
        if self.names == Names::Separate {
            return (0..all).map(|l| if l < first { (0, l) } else { (1, l - first) }).collect();
        }
        let mut outputs = vec![(0, 0); all];
        for f in 0..all {
            let (tensor, g) = match projection {
                Projection::Qkvz => reference::place_of_qkvz(heads, self.packing, f),
                Projection::Ba => reference::place_of_ba(heads, self.packing, f),
            };
            outputs[tensor * first + g] = (0, f);
        }
        outputs
    }
}

/// A tensor of a projection, in one piece or in two, that the two checkpoints both have.
pub(super) struct Pair {
    pub(super) projection: Projection,
    pub(super) source: Vec<Piece>,
    pub(super) destination: Vec<Piece>,
}

/// What is to be compared with what.
pub(super) struct Tensors {
    pub(super) plain: Vec<(Piece, Piece)>,
    pub(super) pairs: Vec<Pair>,
    bytes: u64,
}

/// A copy of a tensor that does not count, as another one does, is known by its file; all others by their
/// name alone.
type Key = (String, Option<String>);

/// Every tensor of a checkpoint by name; of projections by the name of the whole, and piece by piece.
#[derive(Default)]
struct All {
    plain: BTreeMap<Key, Piece>,
    projections: BTreeMap<Key, (Projection, BTreeMap<usize, Piece>)>,
}

impl All {
    fn of(view: &View<'_>) -> Self {
        let mut all = Self::default();
        for (shard, file) in view.checkpoint.shards.iter().enumerate() {
            for name in file.input.names() {
                let file = (!view.checkpoint.counts(shard, &name)).then(|| file.name.clone());
                let piece = Piece { shard, name: name.clone() };
                let is_whole = view.names == Names::Fused;
                match ModuleName::parse(&name) {
                    Some(module) if module.part.is_none() == is_whole => {
                        let part = module.part.unwrap_or(0);
                        let entry = all.projections.entry((module.of(None), file));
                        let (_, pieces) = entry.or_insert_with(|| (module.projection, BTreeMap::new()));
                        pieces.insert(part, piece);
                    }
                    // A whole beside parts belongs to nothing.
                    _ => {
                        all.plain.insert((name, file), piece);
                    }
                }
            }
        }
        all
    }
}

impl Tensors {
    /// Pairs what goes together, and names what has nothing to go with.
    pub(super) fn new(source: &View<'_>, destination: &View<'_>, faults: &mut Vec<String>) -> Self {
        let (before, mut after) = (All::of(source), All::of(destination));
        let mut tensors = Self { plain: Vec::new(), pairs: Vec::new(), bytes: 0 };
        for ((name, file), piece) in before.plain {
            match after.plain.remove(&(name.clone(), file)) {
                None => faults.push(format!("{}: '{name}' is missing", source.file(&piece))),
                Some(there) => {
                    tensors.bytes += destination.info(&there).1.bytes;
                    tensors.plain.push((piece, there));
                }
            }
        }
        for (key, (projection, pieces)) in before.projections {
            let pieces: Vec<Piece> = pieces.into_values().collect();
            let Some((_, there)) = after.projections.remove(&key) else {
                faults.push(format!("{}: what '{}' became is missing", source.file(&pieces[0]), key.0));
                continue;
            };
            let there: Vec<Piece> = there.into_values().collect();
            let wanted = |view: &View<'_>| if view.names == Names::Separate { 2 } else { 1 };
            if (pieces.len(), there.len()) != (wanted(source), wanted(destination)) {
                let (file, name) = (destination.file(&there[0]), key.0);
                faults.push(format!("{file}: one of the two parts of '{name}' is missing"));
                continue;
            }
            tensors.bytes += there.iter().map(|piece| destination.info(piece).1.bytes).sum::<u64>();
            tensors.pairs.push(Pair { projection, source: pieces, destination: there });
        }
        let more = after.projections.into_values().flat_map(|(_, pieces)| pieces.into_values());
        for piece in after.plain.into_values().chain(more) {
            faults.push(format!("{}: '{}' should not be there", destination.file(&piece), piece.name));
        }
        tensors
    }

    /// Of the destination.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}
