//! `gdn verify`: whether one checkpoint is another one repacked, read back by what the packings mean.
//!
//! Nothing here asks how a repacking goes about its work. Of every output of every projection it is known
//! where the one checkpoint has it and where the other must, from the definition of the packings alone, and
//! what is there is compared.

mod texts;
mod values;
mod view;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use gdn::Packing;

use self::view::{Tensors, View};
use super::{
    checkpoint::{Checkpoint, LOCK},
    format::Declared,
    names::Names,
    resume::same_bytes,
    told::Told,
};
use crate::{
    interrupts::catch_interrupts,
    layout::LayoutArgs,
    progress::Progress,
    terminal::{Faults, note, print},
};

#[derive(clap::Args)]
#[command(after_help = "\
Every value of DST is read back and compared with SRC: where each output of a projection must lie follows from the order that the two \
are in, and from the quantisation that SRC declares. The index and every other file are compared too, and whatever is in DST alone is \
named. DST may be SRC repacked, SRC undone, or a copy of SRC. Heads and the order of SRC come from its metadata, if it was repacked, \
else from the arguments, else from its config.json.")]
pub(crate) struct Args {
    /// The checkpoint to look at
    #[arg(value_name = "DST")]
    destination: PathBuf,
    /// The checkpoint it was made from
    #[arg(long, value_name = "SRC")]
    against: PathBuf,
    #[command(flatten)]
    layout: LayoutArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    catch_interrupts()?;
    let (there, from) = (args.destination.display(), args.against.display());
    if let Some(files) = exact_copy(&args.destination, &args.against)? {
        return print(&format!("{there} is the same as {from}: {files} files identical\n"));
    }
    let source = Checkpoint::open(&args.against)?;
    let destination = Checkpoint::open(&args.destination)?;
    let [source, destination] = views(&args.layout, &source, &destination)?;
    let mut check = Check { faults: Vec::new(), notes: Vec::new() };
    if let Some(record) = destination.checkpoint.record
        && record.layout.heads != source.heads
    {
        let (own, heads) = (record.layout.heads, source.heads);
        check.faults.push(format!("its metadata says it was repacked with {own}, {from} has {heads}"));
    }
    let tensors = Tensors::new(&source, &destination, &mut check.faults);
    let declared = Declared::read(source.checkpoint).with_context(|| from.to_string())?;
    let mut progress = Progress::new(tensors.bytes());
    let counts =
        values::compare(&source, &destination, &declared, &tensors, &mut check.faults, &mut progress)?;
    progress.finish();
    check.shards(&source, &destination);
    check.index(&source, &destination);
    let others = check.others(&source, &destination)?;
    check.added(&source, &destination);
    check.notes.iter().for_each(|text| note(text));
    if check.faults.is_empty() {
        let what = if (source.packing, source.names) == (destination.packing, destination.names) {
            "the same as".to_owned()
        } else {
            let separate = if destination.names == Names::Separate { " with separate names" } else { "" };
            format!("{}{separate}, made from", destination.packing)
        };
        return print(&format!(
            "{there} is {what} {from}: {} tensors repacked, {} identical, {others} other files identical or renamed within\n",
            counts.repacked, counts.identical,
        ));
    }
    let Check { mut faults, .. } = check;
    let more = faults.len().saturating_sub(20);
    faults.truncate(20);
    faults.extend((more > 0).then(|| format!("and {more} more")));
    let what = format!("{there} is not what it should be");
    Err(Faults { what, faults }.into())
}

/// How many files two folders have, if these are the same in both to the byte, whatever they are.
fn exact_copy(one: &Path, other: &Path) -> anyhow::Result<Option<usize>> {
    // What cannot be read is told by what comes next.
    let [Ok(Some(all)), Ok(Some(others))] = [one, other].map(files) else { return Ok(None) };
    if all != others {
        return Ok(None);
    }
    for path in all.keys() {
        if !same_bytes(&one.join(path), &other.join(path))? {
            return Ok(None);
        }
    }
    Ok(Some(all.len()))
}

/// Folders within folders that are looked at.
const DEEPEST: usize = 16;

/// Every file in a folder and the folders in it, with its length. `None` where there is something else.
fn files(dir: &Path) -> io::Result<Option<BTreeMap<PathBuf, u64>>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        if folder.components().count() > DEEPEST {
            return Ok(None);
        }
        for entry in fs::read_dir(dir.join(&folder))? {
            let name = entry?.file_name();
            let path = folder.join(&name);
            let metadata = fs::metadata(dir.join(&path))?;
            if metadata.is_dir() {
                folders.push(path);
            } else if !metadata.is_file() {
                return Ok(None);
            } else if name != LOCK {
                found.insert(path, metadata.len());
            }
        }
    }
    Ok(Some(found))
}

/// The two checkpoints, and how each of them has its projections.
fn views<'c>(
    args: &LayoutArgs,
    source: &'c Checkpoint,
    destination: &'c Checkpoint,
) -> anyhow::Result<[View<'c>; 2]> {
    let told = Told::new(args)?;
    let nothing = Told::nothing();
    let at = |checkpoint: &Checkpoint| checkpoint.dir.display().to_string();
    let heads = match (told.heads(source), destination.record) {
        // The source says nothing of its own.
        (Err(_), Some(record)) if source.record.is_none() && source.config()?.is_none() => {
            record.layout.heads
        }
        (heads, _) => heads.with_context(|| at(source))?,
    };
    // A repacking turns one packing into the other, and writes or takes away the record.
    let turned = |of: &Checkpoint| {
        of.record.map(|record| match record.layout.packing {
            Packing::Contiguous => Packing::Interleaved,
            Packing::Interleaved => Packing::Contiguous,
        })
    };
    let names = [source.names(), destination.names()];
    let own = [
        told.packing(source, names[0]).with_context(|| at(source))?,
        nothing.packing(destination, names[1]).with_context(|| at(destination))?,
    ]
    .map(|own| own.map(|(packing, _)| packing));
    let packings = match (own[0].or(turned(destination)), own[1].or(turned(source))) {
        (Some(one), Some(other)) => [one, other],
        // Neither says anything, nor do they differ.
        (Some(one), None) => [one, one],
        (None, _) => {
            bail!("nothing says which order the projections of {} are in: say it with --packing", at(source))
        }
    };
    Ok([
        View { checkpoint: source, heads, packing: packings[0], names: names[0] },
        View { checkpoint: destination, heads, packing: packings[1], names: names[1] },
    ])
}

/// What was found.
struct Check {
    faults: Vec<String>,
    /// What is right, but written in another way.
    notes: Vec<String>,
}

impl Check {
    /// What the files with tensors say of themselves.
    fn shards(&mut self, source: &View<'_>, destination: &View<'_>) {
        let is_same = (source.packing, source.names) == (destination.packing, destination.names);
        let records = [source, destination].map(|view| view.checkpoint.record);
        let mut differently = Vec::new();
        for shard in &source.checkpoint.shards {
            let name = &shard.name;
            let Some(there) = destination.checkpoint.shards.iter().find(|there| there.name == *name) else {
                self.faults.push(format!("{name} is missing"));
                continue;
            };
            if there.metadata != shard.metadata {
                self.faults.push(format!("{name}: its metadata is not what it should be"));
            }
            if is_same && records[0] == records[1] && shard.input.head() != there.input.head() {
                differently.push(name);
            }
        }
        if let Some(first) = differently.first() {
            let more = match differently.len() {
                1 => String::new(),
                len => format!(", and so do those of {} more files", len - 1),
            };
            self.notes.push(format!("{first}: its header says the same, written differently{more}"));
        }
    }

    fn index(&mut self, source: &View<'_>, destination: &View<'_>) {
        let (before, after) = (&source.checkpoint.index, &destination.checkpoint.index);
        let (Some(before), Some(after)) = (before, after) else {
            if let Some(index) = before {
                self.faults.push(format!("{} is missing", index.name));
            }
            return;
        };
        if before.name != after.name {
            self.faults.push(format!("{} is missing", before.name));
            return;
        }
        match texts::index_fault(source, destination) {
            Some(fault) => self.faults.push(format!("{}: {fault}", after.name)),
            // Where the numbers in it are the same, the texts should be.
            None if before.json == after.json && before.text != after.text => {
                self.notes.push(format!("{} says the same, in another order or spacing", after.name));
            }
            None => {}
        }
    }

    /// Files that are neither shards nor the index; how many there are.
    fn others(&mut self, source: &View<'_>, destination: &View<'_>) -> anyhow::Result<usize> {
        for name in &source.checkpoint.others {
            if !destination.checkpoint.others.contains(name) {
                self.faults.push(format!("{name} is missing"));
                continue;
            }
            let [one, other] = [source, destination].map(|view| view.checkpoint.dir.join(name));
            if same_bytes(&one, &other)? && source.names == destination.names {
                continue;
            }
            match texts::compare(&one, &other, name, destination.names)? {
                texts::Found::Same => {}
                texts::Found::SaysTheSame if source.names != destination.names => {}
                texts::Found::SaysTheSame => {
                    self.notes.push(format!("{name} says the same, in another order or spacing"));
                }
                texts::Found::Fault(fault) => self.faults.push(format!("{name} {fault}")),
            }
        }
        Ok(source.checkpoint.others.len() + usize::from(source.checkpoint.index.is_some()))
    }

    /// Whatever the destination has and the source has not.
    fn added(&mut self, source: &View<'_>, destination: &View<'_>) {
        let names = |view: &View<'_>| -> BTreeSet<String> {
            let Checkpoint { shards, index, others, .. } = view.checkpoint;
            let shards = shards.iter().map(|shard| &shard.name).chain(index.iter().map(|index| &index.name));
            shards.chain(others).cloned().collect()
        };
        for name in names(destination).difference(&names(source)) {
            self.faults.push(format!("{name} is not in {}", source.checkpoint.dir.display()));
        }
        for name in &destination.checkpoint.left_out {
            self.faults.push(match source.checkpoint.left_out.contains(name) {
                true => format!("{name} should not be there: nothing in it was repacked"),
                false => format!("{name} is not in {}", source.checkpoint.dir.display()),
            });
        }
    }
}
