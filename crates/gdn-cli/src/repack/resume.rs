//! Going on with a run that ended early: what is there, compared with what it should be.

use std::{io::Read, path::Path};

use anyhow::Context;

use super::{
    checkpoint::{Checkpoint, Place},
    plan::{Planned, PlannedShard},
};
use crate::{
    files::{Input, open},
    interrupts::check_interrupted,
    progress::Progress,
};

/// Whether a file beside the tensors has this text or, without one, what the source's has.
pub(super) fn same_file(
    source: &Checkpoint,
    name: &str,
    text: Option<&str>,
    destination: &Path,
) -> anyhow::Result<bool> {
    let path = destination.join(name);
    if !path.is_file() {
        return Ok(false);
    }
    let Some(text) = text else { return same_bytes(&source.dir.join(name), &path) };
    let what = || format!("cannot read {name}");
    let mut bytes = Vec::new();
    open(&path).with_context(what)?.take(text.len() as u64 + 1).read_to_end(&mut bytes).with_context(what)?;
    Ok(bytes == text.as_bytes())
}

/// Whether two files have the same bytes.
pub(super) fn same_bytes(one: &Path, other: &Path) -> anyhow::Result<bool> {
    let what = || format!("cannot compare {} and {}", one.display(), other.display());
    let (mut one, mut other) = (open(one).with_context(what)?, open(other).with_context(what)?);
    if one.metadata().with_context(what)?.len() != other.metadata().with_context(what)?.len() {
        return Ok(false);
    }
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        check_interrupted()?;
        let read = one.read(&mut a).with_context(what)?;
        if read == 0 {
            return Ok(true);
        }
        if other.read_exact(&mut b[..read]).is_err() || a[..read] != b[..read] {
            return Ok(false);
        }
    }
}

/// What is wrong with a file that should be as planned, if anything is.
pub(super) fn fault(
    source: &Checkpoint,
    shard: &PlannedShard,
    there: &Input,
    progress: &mut Progress,
) -> anyhow::Result<Option<String>> {
    if there.head() != shard.head {
        return Ok(Some(format!("{} was written from something else or with other arguments", shard.name)));
    }
    let mut start = there.head().len() as u64;
    for tensor in &shard.tensors {
        let what = || format!("cannot compare '{}' of {}", tensor.name, shard.name);
        if let Some(byte) = difference(source, tensor, there, start).with_context(what)? {
            return Ok(Some(format!("{}: '{}' differs from byte {byte} on", shard.name, tensor.name)));
        }
        start += tensor.bytes;
        progress.add(tensor.bytes);
    }
    there.close();
    Ok(None)
}

/// How much is compared at a time.
const CHUNK: u64 = 4 << 20;

/// The first byte of a tensor that is not as planned.
fn difference(
    source: &Checkpoint,
    tensor: &Planned,
    there: &Input,
    start: u64,
) -> anyhow::Result<Option<u64>> {
    let first = |a: &[u8], b: &[u8]| a.iter().zip(b).position(|(a, b)| a != b).map(|at| at as u64);
    let (mut wanted, mut got) = (Vec::new(), Vec::new());
    if let Some(bytes) = tensor.in_memory(source)? {
        got.resize(bytes.len(), 0);
        there.read_at(start, &mut got)?;
        return Ok(first(&bytes, &got));
    }
    let mut at = 0;
    for mut copy in tensor.copies()? {
        while copy.len > 0 {
            check_interrupted()?;
            let bytes = copy.len.min(CHUNK);
            source.read(Place { shard: copy.shard, start: copy.from, bytes }, &mut wanted)?;
            got.resize(bytes as usize, 0);
            there.read_at(start + at, &mut got)?;
            if wanted != got {
                return Ok(Some(at + first(&wanted, &got).unwrap_or(0)));
            }
            copy.from += bytes;
            copy.len -= bytes;
            at += bytes;
        }
    }
    Ok(None)
}
