//! `gdn verify`: what a repacking should have written, against what is there.

use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use gdn::Packing;

use super::{
    Names, carried,
    checkpoint::{Checkpoint, ModuleName, Place, Record, heads_of},
    plan::{Goal, Plan, Planned, PlannedShard},
};
use crate::{
    Faults,
    files::Input,
    interrupts::{catch_interrupts, check_interrupted},
    layout::HeadsArgs,
    print,
    progress::Progress,
};

#[derive(clap::Args)]
#[command(after_help = "\
What DST should be is worked out from SRC and from the record in DST's metadata; then every tensor, the index and every other file \
of DST is read back and compared. DST may be SRC repacked, SRC undone, or the same as SRC.")]
pub(crate) struct Args {
    /// The checkpoint to look at
    #[arg(value_name = "DST")]
    destination: PathBuf,
    /// The checkpoint it was made from
    #[arg(long, value_name = "SRC")]
    against: PathBuf,
    #[command(flatten)]
    heads: HeadsArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    catch_interrupts()?;
    let source = Checkpoint::open(&args.against)?;
    let destination = Checkpoint::open(&args.destination)?;
    let goal = goal(&source, &destination, &args.heads)?;
    let plan = Plan::new(&source, goal).with_context(|| args.against.display().to_string())?;
    let mut faults = Vec::new();
    let mut progress = Progress::new(plan.shards.iter().map(|shard| shard.bytes).sum());
    for shard in &plan.shards {
        match destination.shards.iter().find(|there| there.name == shard.name) {
            Some(there) => faults.extend(compare(&source, shard, &there.input, false, &mut progress)?),
            None => faults.push(format!("{} is missing", shard.name)),
        }
    }
    progress.finish();
    let planned: BTreeSet<&str> = plan.shards.iter().map(|shard| shard.name.as_str()).collect();
    let added =
        destination.shards.iter().map(|shard| &shard.name).filter(|name| !planned.contains(name.as_str()));
    faults.extend(added.map(|name| format!("{name} is not in {}", args.against.display())));
    match (&plan.index, &destination.index) {
        (Some((name, text)), Some(index)) if *name != index.name || *text != index.text => {
            faults.push(format!("{} is not what it should be", index.name));
        }
        (Some((name, _)), None) => faults.push(format!("{name} is missing")),
        (None, Some(index)) => faults.push(format!("{} is not in {}", index.name, args.against.display())),
        _ => {}
    }
    for name in &source.others {
        if !same_file(&source, name, goal, &args.destination)? {
            faults.push(format!("{name} is missing or is not what it should be"));
        }
    }
    let tensors = || plan.shards.iter().flat_map(|shard| &shard.tensors);
    let moved = tensors().filter(|tensor| tensor.is_moved()).count();
    if faults.is_empty() {
        let all = tensors().count();
        let what = match goal {
            Goal::Same => "the same as".to_owned(),
            Goal::Repacked(layout, Names::Fused) => format!("{}, made from", layout.packing),
            Goal::Repacked(layout, Names::Separate) => {
                format!("{} with separate names, made from", layout.packing)
            }
        };
        return print(&format!(
            "{} is {what} {}: {moved} tensors repacked, {} identical, {} other files identical or renamed within\n",
            args.destination.display(),
            args.against.display(),
            all - moved,
            source.others.len() + usize::from(plan.index.is_some()),
        ));
    }
    let more = faults.len().saturating_sub(20);
    faults.truncate(20);
    faults.extend((more > 0).then(|| format!("and {more} more")));
    let what = format!("{} is not what it should be", args.destination.display());
    Err(Faults { what, faults }.into())
}

/// What `source` should have become.
fn goal(source: &Checkpoint, destination: &Checkpoint, heads: &HeadsArgs) -> anyhow::Result<Goal> {
    match (source.record, destination.record) {
        (None, Some(Record { layout, names })) => Ok(Goal::Repacked(layout, names)),
        (Some(record), None) => {
            Ok(Goal::Repacked(gdn::Layout::new(record.layout.heads, Packing::Interleaved), Names::Fused))
        }
        (Some(one), Some(other)) if one != other => bail!("both were repacked, in different ways"),
        (None, None) if has_parts(source) && !has_parts(destination) => {
            let heads = heads.named()?.0.map_or_else(|| heads_of(source), Ok)?;
            Ok(Goal::Repacked(gdn::Layout::new(heads, Packing::Interleaved), Names::Fused))
        }
        _ => Ok(Goal::Same),
    }
}

fn has_parts(checkpoint: &Checkpoint) -> bool {
    let names = checkpoint.shards.iter().flat_map(|shard| shard.input.names());
    names.into_iter().any(|name| ModuleName::parse(&name).is_some_and(|module| module.part.is_some()))
}

/// Whether a file beside the tensors is what it should be.
pub(super) fn same_file(
    source: &Checkpoint,
    name: &str,
    goal: Goal,
    destination: &Path,
) -> anyhow::Result<bool> {
    let path = destination.join(name);
    if !path.is_file() {
        return Ok(false);
    }
    let what = || format!("cannot read {name}");
    if let Some(text) = carried(source, name, goal)? {
        return Ok(fs::read(&path).with_context(what)? == text.as_bytes());
    }
    let (mut one, mut other) = (fs::File::open(source.dir.join(name))?, fs::File::open(path)?);
    if one.metadata()?.len() != other.metadata()?.len() {
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

/// Reads a file back: what of it is not as planned, with `exactly` also the order of the header.
pub(super) fn compare(
    source: &Checkpoint,
    shard: &PlannedShard,
    there: &Input,
    exactly: bool,
    progress: &mut Progress,
) -> anyhow::Result<Vec<String>> {
    let mut faults = Vec::new();
    if exactly && there.head() != shard.head {
        return Ok(vec![format!("{} was written from something else or with other arguments", shard.name)]);
    }
    let mut planned = BTreeSet::new();
    for tensor in &shard.tensors {
        let name = &tensor.name;
        planned.insert(name.as_str());
        match there.place(name) {
            None => faults.push(format!("{}: '{name}' is missing", shard.name)),
            Some((info, _)) if info.dtype != tensor.dtype || info.shape != tensor.shape => {
                faults.push(format!(
                    "{}: '{name}' is {} {:?}, it should be {} {:?}",
                    shard.name, info.dtype, info.shape, tensor.dtype, tensor.shape
                ))
            }
            Some((_, start)) => {
                let what = || format!("cannot compare '{name}' of {}", shard.name);
                if let Some(byte) = difference(source, tensor, there, start).with_context(what)? {
                    faults.push(format!("{}: '{name}' differs from byte {byte} on", shard.name));
                }
            }
        }
        progress.add(tensor.bytes);
    }
    there.close();
    let added = there.names().into_iter().filter(|name| !planned.contains(name.as_str()));
    faults.extend(added.map(|name| format!("{}: '{name}' should not be there", shard.name)));
    if *there.metadata() != shard.metadata {
        faults.push(format!("{}: its metadata is not what it should be", shard.name));
    }
    Ok(faults)
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
