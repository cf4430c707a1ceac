//! Every value of every tensor, output by output.

use anyhow::Context;
use gdn::Projection;
use safetensors::{Dtype, tensor::TensorInfo};

use super::{
    super::{
        checkpoint::Place,
        format::{Declared, Format, Scales},
        names::ModuleName,
    },
    view::{Pair, Piece, Tensors, View},
};
use crate::{interrupts::check_interrupted, progress::Progress};

/// How many tensors there are of each kind.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) repacked: usize,
    pub(super) identical: usize,
}

/// Compares everything that goes together.
pub(super) fn compare(
    source: &View<'_>,
    destination: &View<'_>,
    declared: &Declared,
    tensors: &Tensors,
    faults: &mut Vec<String>,
    progress: &mut Progress,
) -> anyhow::Result<Counts> {
    let mut counts = Counts::default();
    let is_same = (source.packing, source.names) == (destination.packing, destination.names);
    for (one, other) in &tensors.plain {
        counts.identical += 1;
        let comparison = Comparison { source, destination, from: std::slice::from_ref(one), there: other };
        faults.extend(comparison.whole(progress)?);
    }
    for pair in &tensors.pairs {
        for there in &pair.destination {
            if is_same {
                counts.identical += 1
            } else {
                counts.repacked += 1
            }
            let comparison = Comparison { source, destination, from: &pair.source, there };
            let what = || format!("cannot compare '{}' of {}", there.name, destination.file(there));
            faults.extend(comparison.projection(pair, declared, progress).with_context(what)?);
        }
    }
    Ok(counts)
}

/// What a tensor of a projection speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    /// Of the inputs, or of the whole projection.
    All,
    /// Of the weight's shape, outputs first.
    Shape,
    /// Of its outputs, along one dim.
    Outputs { dim: usize, index: OfIndex },
}

/// Of which outputs an index of the dim speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OfIndex {
    One,
    /// Of so many at once.
    Shared(usize),
    /// Of so many, each in bits of its own of a 32-bit integer.
    Packed(usize),
}

/// By the format's own words. `None` where they do not say.
fn speaks(format: &Format, suffix: &str, info: &TensorInfo, outputs: usize) -> Option<Of> {
    let kind = suffix.split('.').next().unwrap_or(suffix);
    let is_single = info.shape.iter().product::<usize>() == 1 && outputs > 1;
    let of_inputs = [
        "lora_A",
        "input_scale",
        "input_offset",
        "input_global_scale",
        "input_zero_point",
        "pre_quant_scale",
        "g_idx",
        "weight_g_idx",
        "weight_global_scale",
        "weight_scale_2",
    ];
    if of_inputs.contains(&kind) || (kind == "weight_scale" || kind == "weight_scale_inv") && is_single {
        return Some(Of::All);
    }
    if kind == "weight_shape" {
        return Some(Of::Shape);
    }
    // A weight is `[out, in]` everywhere but where GPTQ and AWQ store `[in, out]`.
    let transposed = matches!(format, Format::Gptq { .. } | Format::Awq { .. })
        && ["qweight", "qzeros", "scales"].contains(&kind)
        || kind == "lora_magnitude_vector" && info.shape.len() == 2 && info.shape[0] == 1;
    let index = match (format, kind) {
        (Format::Fp8 { block: Some(block) }, "weight_scale" | "weight_scale_inv")
        | (Format::Compressed { scales: Scales::Block(block), .. }, "weight_scale" | "weight_zero_point") => {
            OfIndex::Shared(*block)
        }
        (Format::Compressed { bits, .. }, "weight_zero_point") if info.dtype == Dtype::I32 => {
            OfIndex::Packed(32usize.checked_div(*bits)?)
        }
        (Format::Gptq { bits }, "qzeros") | (Format::Awq { bits }, "qzeros" | "qweight") => {
            OfIndex::Packed(32usize.checked_div(*bits)?)
        }
        (Format::Unknown(_), "scales" | "weight_scale" | "weight_scale_inv" | "qweight" | "qzeros") => {
            return None;
        }
        (Format::Plain, "scales" | "weight_scale" | "weight_scale_inv" | "qweight" | "qzeros") => {
            return None;
        }
        _ => OfIndex::One,
    };
    Some(Of::Outputs { dim: usize::from(transposed), index })
}

/// One tensor of the destination, and what it was made from.
struct Comparison<'v, 'c> {
    source: &'v View<'c>,
    destination: &'v View<'c>,
    from: &'v [Piece],
    there: &'v Piece,
}

/// Where an index of the destination's tensor comes from.
enum Origin {
    /// These indices of these pieces, each of which it must be.
    Indices(Vec<(usize, usize)>),
    /// For each of its outputs: the piece, the index there, and which of its outputs.
    Bits(Vec<(usize, usize, usize)>),
}

/// How much is compared at a time.
const CHUNK: u64 = 4 << 20;

impl Comparison<'_, '_> {
    fn fault(&self, what: &str) -> Option<String> {
        Some(format!("{}: '{}' {what}", self.destination.file(self.there), self.there.name))
    }

    fn read(
        &self,
        piece: Option<&Piece>,
        start: u64,
        bytes: u64,
        buffer: &mut Vec<u8>,
    ) -> anyhow::Result<()> {
        let (view, piece) = match piece {
            Some(piece) => (self.source, piece),
            None => (self.destination, self.there),
        };
        let (_, place) = view.info(piece);
        view.checkpoint.read(Place { start: place.start + start, bytes, ..place }, buffer)
    }

    /// That dtypes are the same, and the tensor is in the file that it should be in.
    fn place_fault(&self) -> Option<String> {
        let (info, _) = self.destination.info(self.there);
        for piece in self.from {
            let (other, _) = self.source.info(piece);
            if info.dtype != other.dtype {
                return self.fault(&format!("is {}, it should be {}", info.dtype, other.dtype));
            }
        }
        let file = self.destination.file(self.there);
        let files: Vec<&str> = self.from.iter().map(|piece| self.source.file(piece)).collect();
        match files.contains(&file) {
            true => None,
            false => self.fault(&format!("should be in {}", files.join(" or "))),
        }
    }

    /// The tensor as a whole.
    fn whole(&self, progress: &mut Progress) -> anyhow::Result<Option<String>> {
        let (info, place) = self.destination.info(self.there);
        if let Some(fault) = self.place_fault() {
            return Ok(Some(fault));
        }
        for piece in self.from {
            let (other, _) = self.source.info(piece);
            if info.shape != other.shape {
                return Ok(
                    self.fault(&format!("is of shape {:?}, it should be {:?}", info.shape, other.shape))
                );
            }
            let (mut wanted, mut got) = (Vec::new(), Vec::new());
            for start in (0..place.bytes).step_by(CHUNK as usize) {
                check_interrupted()?;
                let bytes = CHUNK.min(place.bytes - start);
                self.read(Some(piece), start, bytes, &mut wanted)?;
                self.read(None, start, bytes, &mut got)?;
                if let Some(at) = first_difference(&wanted, &got) {
                    return Ok(self.fault(&format!("differs from byte {} on", start + at)));
                }
            }
        }
        progress.add(place.bytes);
        Ok(None)
    }

    /// A tensor of a projection.
    fn projection(
        &self,
        pair: &Pair,
        declared: &Declared,
        progress: &mut Progress,
    ) -> anyhow::Result<Option<String>> {
        if let Some(fault) = self.place_fault() {
            return Ok(Some(fault));
        }
        let source = self.source.outputs(pair.projection);
        let destination = self.destination.outputs(pair.projection);
        let own = pair.destination.iter().position(|piece| piece == self.there).unwrap_or_default();
        // For each output of the tensor, where the source has it.
        let mut origins: Vec<Option<(usize, usize)>> = Vec::new();
        for (l, (piece, at)) in destination.into_iter().enumerate() {
            if piece == own {
                origins.resize(origins.len().max(at + 1), None);
                origins[at] = Some(source[l]);
            }
        }
        let origins: Vec<(usize, usize)> =
            origins.into_iter().collect::<Option<_>>().context("the packing leaves an output out")?;
        let module = ModuleName::parse(&self.from[0].name).context("its name is not that of a projection")?;
        let format = declared.of(&module.module())?;
        let (info, _) = self.destination.info(self.there);
        let Some(speaks) = speaks(&format, module.suffix, info, origins.len()) else {
            return Ok(self.fault("cannot be judged: nothing declares of which outputs it speaks"));
        };
        match speaks {
            Of::All => self.whole(progress),
            Of::Shape => self.shape(pair, origins.len()),
            Of::Outputs { dim, index } => self.outputs(pair.projection, dim, index, &origins, progress),
        }
    }

    /// A `weight_shape`.
    fn shape(&self, pair: &Pair, outputs: usize) -> anyhow::Result<Option<String>> {
        let integers = |piece: Option<&Piece>, view: &View<'_>| -> anyhow::Result<Vec<u64>> {
            let (info, place) = view.info(piece.unwrap_or(self.there));
            let mut bytes = Vec::new();
            self.read(piece, 0, place.bytes, &mut bytes)?;
            let size = (info.dtype.bitsize() / 8).max(1);
            Ok(bytes
                .chunks(size)
                .map(|c| c.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)))
                .collect())
        };
        let got = integers(None, self.destination)?;
        for piece in &pair.source {
            let mut wanted = integers(Some(piece), self.source)?;
            if let Some(first) = wanted.first_mut() {
                *first = outputs as u64;
            }
            if wanted != got {
                return Ok(self.fault(&format!("says {got:?}, it should say {wanted:?}")));
            }
        }
        Ok(None)
    }

    /// A tensor that speaks of each output.
    fn outputs(
        &self,
        projection: Projection,
        dim: usize,
        index: OfIndex,
        origins: &[(usize, usize)],
        progress: &mut Progress,
    ) -> anyhow::Result<Option<String>> {
        // How many outputs the source's pieces have.
        let mut outputs = vec![0; self.from.len()];
        for (piece, _) in self.source.outputs(projection) {
            outputs[piece] += 1;
        }
        let indices = |outputs: usize| match index {
            OfIndex::One => outputs,
            OfIndex::Shared(size) | OfIndex::Packed(size) => outputs.div_ceil(size),
        };
        let (info, place) = self.destination.info(self.there);
        let tensors =
            self.from.iter().zip(&outputs).map(|(piece, outputs)| (self.source.info(piece).0, *outputs));
        for (other, outputs) in tensors.chain([(info, origins.len())]) {
            let others = |shape: &[usize]| {
                shape.iter().enumerate().filter(|(d, _)| *d != dim).map(|(_, n)| *n).collect()
            };
            let (one, two): (Vec<usize>, Vec<usize>) = (others(&info.shape), others(&other.shape));
            if other.shape.get(dim) != Some(&indices(outputs)) || one != two {
                return Ok(self.fault(&format!(
                    "is of shape {:?}, what it is made from {:?}: {outputs} outputs take {} indices of dim {dim}",
                    info.shape,
                    other.shape,
                    indices(outputs)
                )));
            }
        }
        let count = indices(origins.len());
        let outer: usize = info.shape[..dim].iter().product();
        if place.bytes == 0 {
            return Ok(None);
        }
        let inner = place.bytes / (outer * count) as u64;
        if inner * (outer * count) as u64 != place.bytes {
            return Ok(self.fault("has outputs of no whole number of bytes"));
        }
        let origins = origins_of_indices(index, origins);
        let lens: Vec<u64> = outputs.iter().map(|outputs| indices(*outputs) as u64 * inner).collect();
        let fault = if outer == 1 && place.bytes > CHUNK && matches!(index, OfIndex::One) {
            self.by_runs(&origins, inner)?
        } else {
            self.by_rows(&origins, index, outer as u64, inner, &lens)?
        };
        progress.add(place.bytes);
        Ok(fault.and_then(|(at, from)| {
            let name = self.from.get(from.0).map(|piece| piece.name.as_str()).unwrap_or_default();
            self.fault(&format!("differs from byte {at} on, from what '{name}' has at {}", from.1))
        }))
    }

    /// A large tensor whose outputs are rows: those that lie side by side in both at once.
    fn by_runs(&self, origins: &[Origin], inner: u64) -> anyhow::Result<Option<(u64, (usize, usize))>> {
        let at = |j: usize| match &origins[j] {
            Origin::Indices(indices) => indices[0],
            Origin::Bits(bits) => (bits[0].0, bits[0].1),
        };
        let (mut wanted, mut got) = (Vec::new(), Vec::new());
        let longest = (CHUNK / inner).max(1) as usize;
        let mut j = 0;
        while j < origins.len() {
            check_interrupted()?;
            let (piece, first) = at(j);
            let mut len = 1;
            while len < longest && j + len < origins.len() && at(j + len) == (piece, first + len) {
                len += 1;
            }
            self.read(Some(&self.from[piece]), first as u64 * inner, len as u64 * inner, &mut wanted)?;
            self.read(None, j as u64 * inner, len as u64 * inner, &mut got)?;
            if let Some(byte) = first_difference(&wanted, &got) {
                return Ok(Some((j as u64 * inner + byte, (piece, first + (byte / inner) as usize))));
            }
            j += len;
        }
        Ok(None)
    }

    /// Any tensor: as many of the dims before as can be held at a time.
    fn by_rows(
        &self,
        origins: &[Origin],
        index: OfIndex,
        outer: u64,
        inner: u64,
        lens: &[u64],
    ) -> anyhow::Result<Option<(u64, (usize, usize))>> {
        let own = origins.len() as u64 * inner;
        let rows = (CHUNK / own.max(1)).max(1);
        let mut wanted = vec![Vec::new(); lens.len()];
        let mut got = Vec::new();
        for n in (0..outer).step_by(rows as usize) {
            check_interrupted()?;
            let rows = rows.min(outer - n);
            for ((piece, len), buffer) in self.from.iter().zip(lens).zip(&mut wanted) {
                self.read(Some(piece), n * len, rows * len, buffer)?;
            }
            self.read(None, n * own, rows * own, &mut got)?;
            for row in 0..rows {
                let element = |piece: usize, at: usize| {
                    &wanted[piece][(row * lens[piece] + at as u64 * inner) as usize..][..inner as usize]
                };
                for (j, origin) in origins.iter().enumerate() {
                    let start = row * own + j as u64 * inner;
                    let there = &got[start as usize..][..inner as usize];
                    let wrong = match origin {
                        Origin::Indices(indices) => {
                            indices.iter().find(|(piece, at)| element(*piece, *at) != there).copied()
                        }
                        Origin::Bits(bits) => {
                            let OfIndex::Packed(size) = index else { continue };
                            let wrong = bits.iter().enumerate().find(|(slot, (piece, at, from))| {
                                !same_bits(element(*piece, *at), *from, there, *slot, 32 / size)
                            });
                            wrong.map(|(_, (piece, at, _))| (*piece, *at))
                        }
                    };
                    if let Some(from) = wrong {
                        let byte = first_difference(element(from.0, from.1), there).unwrap_or(0);
                        return Ok(Some((n * own + start + byte, from)));
                    }
                }
            }
        }
        Ok(None)
    }
}

/// For each index of a tensor's dim, where it comes from, by the origin of each output.
fn origins_of_indices(index: OfIndex, origins: &[(usize, usize)]) -> Vec<Origin> {
    match index {
        OfIndex::One => origins.iter().map(|origin| Origin::Indices(vec![*origin])).collect(),
        OfIndex::Shared(size) => {
            let blocks = origins.chunks(size).map(|block| {
                let mut from: Vec<_> = block.iter().map(|(piece, at)| (*piece, at / size)).collect();
                from.dedup();
                Origin::Indices(from)
            });
            blocks.collect()
        }
        OfIndex::Packed(size) => {
            let elements = origins.chunks(size);
            elements
                .map(|e| Origin::Bits(e.iter().map(|(p, at)| (*p, at / size, at % size)).collect()))
                .collect()
        }
    }
}

/// Whether the bits of two outputs in packed integers are the same.
fn same_bits(one: &[u8], slot: usize, other: &[u8], other_slot: usize, bits: usize) -> bool {
    let value = |bytes: &[u8], slot: usize| {
        let word = bytes.iter().rev().fold(0u32, |word, byte| word << 8 | u32::from(*byte));
        word.checked_shr((slot * bits) as u32).unwrap_or(0) & (u32::MAX >> (32 - bits.min(32)))
    };
    one.chunks(4).zip(other.chunks(4)).all(|(a, b)| value(a, slot) == value(b, other_slot))
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<u64> {
    if a == b {
        return None;
    }
    a.iter().zip(b).position(|(a, b)| a != b).map(|at| at as u64)
}
