//! `gdn repack`: a checkpoint whose input projections come out in contiguous order, so that the split is a view.

mod checkpoint;
mod follow;
mod names;
mod plan;
pub(crate) mod verify;
mod write;

use std::{fs, io, path::PathBuf};

use anyhow::{Context, bail};
use gdn::{Layout, Packing};

use self::{
    checkpoint::{Checkpoint, ModuleName, heads_of},
    plan::{Goal, Plan, PlannedShard},
    write::Folder,
};
use crate::{
    files::{Input, available, open, read_text},
    interrupts::{Interrupted, catch_interrupts, check_interrupted},
    layout::HeadsArgs,
    note,
    progress::Progress,
};

#[derive(clap::Args)]
#[command(after_help = "\
The rows of every linear_attn.in_proj_qkvz and in_proj_ba move, and with them biases, scales, zero points and LoRA's B; all other \
tensors and files are carried over byte for byte. Heads come from the arguments, else from SRC's metadata or config.json. What was \
done is recorded in the metadata of every file: loaders that expect the other order must not be given the result.

OUT is written as OUT.partial and gets its name when it is whole. A run that was interrupted is taken up by the same command: \
files that are finished are compared with what they should be, byte by byte, and are not written again. What else is in OUT.partial \
is refused, and so is a source that changes on the way. OUT must not be a symbolic link.")]
pub(crate) struct Args {
    /// The folder of the checkpoint (or adapter) to read
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// The folder to write, which must not be there yet
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Order of features to write: contiguous, or interleaved to undo it
    #[arg(long, default_value = "contiguous")]
    to: Packing,
    /// Names of contiguous projections: fused (in_proj_qkvz, in_proj_ba) or separate (in_proj_qkv, in_proj_z, in_proj_b, in_proj_a)
    #[arg(long, default_value = "fused", hide_possible_values = true)]
    names: Names,
    #[command(flatten)]
    heads: HeadsArgs,
}

/// The names of contiguous projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Names {
    /// As Qwen3-Next has them.
    Fused,
    /// As Qwen3.5 has them.
    Separate,
}

impl Names {
    const ALL: [Self; 2] = [Self::Fused, Self::Separate];

    fn name(self) -> &'static str {
        match self {
            Self::Fused => "fused",
            Self::Separate => "separate",
        }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let source = Checkpoint::open(&args.source)?;
    let goal = goal(args, &source)?;
    let plan =
        Plan::new(&source, goal).with_context(|| format!("cannot repack {}", args.source.display()))?;
    for (tensor, file) in source.unnamed() {
        note(&format!(
            "the index does not name '{tensor}' in {file}; it is repacked or carried over all the same"
        ));
    }
    if !source.left_out.is_empty() {
        note(&format!("not carried over: {}", source.left_out.join(", ")));
    }

    catch_interrupts()?;
    let folder = Folder::open(&args.output, &args.source)?;
    folder.check_names(names_of(&source, &plan))?;
    let result = write(&folder, &source, &plan, goal);
    if result.as_ref().is_err_and(|error| error.is::<Interrupted>()) {
        let partial = folder.path.display();
        return result.with_context(|| {
            format!("finished files stay in {partial}, and the same command goes on from there")
        });
    }
    result?;
    source.check_unchanged().with_context(|| {
        format!("{} may be made of what there was before and after: delete it", folder.path.display())
    })?;
    folder.check_names(names_of(&source, &plan))?;
    folder.finish()
}

/// The files that a destination has.
fn names_of<'p>(source: &'p Checkpoint, plan: &'p Plan) -> impl Iterator<Item = &'p str> {
    let shards = plan.shards.iter().map(|shard| shard.name.as_str());
    let index = plan.index.iter().map(|(name, _)| name.as_str());
    shards.chain(index).chain(source.others.iter().map(String::as_str))
}

/// What is to be done, if it is not done already.
fn goal(args: &Args, source: &Checkpoint) -> anyhow::Result<Goal> {
    let (mut whole, mut part) = (None, None);
    for name in source.shards.iter().flat_map(|shard| shard.input.names()) {
        if let Some(module) = ModuleName::parse(&name) {
            let found = if module.part.is_none() { &mut whole } else { &mut part };
            found.get_or_insert(name);
        }
    }
    let what = format!("cannot repack {}", args.source.display());
    let names = match (&whole, &part) {
        (None, None) => bail!("{what}: it has no linear_attn.in_proj_qkvz or in_proj_ba"),
        (Some(whole), Some(part)) => bail!("{what}: it has both '{whole}' and '{part}'"),
        (Some(_), None) => Names::Fused,
        (None, Some(_)) => Names::Separate,
    };
    let packing = match (source.record, names) {
        (Some(record), _) if record.names != names => {
            bail!(
                "{what}: its metadata speaks of {} names, its tensors' are {}",
                record.names.name(),
                names.name()
            )
        }
        (Some(record), _) => record.layout.packing,
        (None, Names::Separate) => Packing::Contiguous,
        (None, Names::Fused) => Packing::Interleaved,
    };
    if packing == args.to {
        match source.record {
            Some(_) => bail!("{what}: it was repacked before, and is {packing} already"),
            None => bail!("{what}: it is {packing} already"),
        }
    }
    if args.to == Packing::Interleaved && args.names == Names::Separate {
        bail!("--names separate goes with --to contiguous: interleaved projections are in one piece");
    }
    let given = args.heads.named()?.0;
    let heads = match (given, source.record) {
        (Some(given), Some(record)) if given != record.layout.heads => {
            bail!("{what}: it was repacked with {}, the arguments say {given}", record.layout.heads)
        }
        (Some(heads), _) => heads,
        (None, Some(record)) => record.layout.heads,
        (None, None) => heads_of(source)?,
    };
    Ok(Goal::Repacked(Layout::new(heads, args.to), args.names))
}

fn write(folder: &Folder, source: &Checkpoint, plan: &Plan, goal: Goal) -> anyhow::Result<()> {
    let mut missing = Vec::new();
    let total = plan.shards.iter().map(|shard| shard.bytes).sum();
    let mut progress = Progress::new(total);
    for (number, shard) in plan.shards.iter().enumerate() {
        let path = folder.path.join(&shard.name);
        if fs::symlink_metadata(&path).is_err() {
            missing.push(number);
            continue;
        }
        let there = Input::open(&path)?;
        if let Some(fault) = verify::compare(source, shard, &there, true, &mut progress)?.first() {
            bail!("cannot go on with {}: {fault}; delete it to start anew", folder.path.display());
        }
        note(&format!("{} is there, compared with what it should be", shard.name));
    }
    if folder.renamed {
        progress.finish();
        return check_finished(
            folder,
            source,
            plan,
            goal,
            missing.first().map(|number| &plan.shards[*number]),
        );
    }
    let mut needed: u64 = missing.iter().map(|number| plan.shards[*number].bytes).sum();
    for name in &source.others {
        needed += fs::metadata(source.dir.join(name))?.len();
    }
    if let Some(available) = available(&folder.path)
        && available < needed
    {
        bail!("no space for {}: it takes {needed} bytes, {available} are available", folder.path.display());
    }
    write::shards(folder, source, plan, &missing, &mut progress)?;
    for name in &source.others {
        check_interrupted()?;
        let text = carried(source, name, goal)?;
        if let (Some(text), Goal::Repacked(_, Names::Separate)) = (&text, goal)
            && names::names_a_whole(text)
        {
            note(&format!("{name} still names in_proj_qkvz or in_proj_ba outside its lists; look at it"));
        }
        let path = source.dir.join(name);
        write::whole_file(folder, name, |file| match text {
            Some(text) => io::Write::write_all(file, text.as_bytes()),
            None => io::copy(&mut open(&path).map_err(io::Error::other)?, file).map(drop),
        })?;
    }
    if let Some((name, text)) = &plan.index {
        write::whole_file(folder, name, |file| io::Write::write_all(file, text.as_bytes()))?;
    }
    progress.finish();
    Ok(())
}

/// That nothing is to be done but to take away the lock of a run that ended before it could: all that lies beside the shards is as it
/// should be, and no shard is missing.
fn check_finished(
    folder: &Folder,
    source: &Checkpoint,
    plan: &Plan,
    goal: Goal,
    missing: Option<&PlannedShard>,
) -> anyhow::Result<()> {
    let there = folder.path.display();
    if let Some(shard) = missing {
        bail!("cannot write {there}: it is there already, without {}", shard.name);
    }
    for name in &source.others {
        if !verify::same_file(source, name, goal, &folder.path)? {
            bail!("cannot write {there}: it is there already, and {name} is not what it should be");
        }
    }
    if let Some((name, text)) = &plan.index
        && read_text(&folder.path.join(name), name)? != *text
    {
        bail!("cannot write {there}: it is there already, and {name} is not what it should be");
    }
    Ok(())
}

/// The files that may list modules by name.
const LISTS: [&str; 5] = [
    "config.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
];

/// The text of a file that changes on the way, as its lists of modules follow the names. Else it is carried over as it is.
fn carried(source: &Checkpoint, name: &str, goal: Goal) -> anyhow::Result<Option<String>> {
    let rename = match (goal, source.record) {
        (Goal::Repacked(_, Names::Separate), _) => names::separated,
        (Goal::Repacked(..), Some(record)) if record.names == Names::Separate => names::joined,
        _ => return Ok(None),
    };
    if !LISTS.contains(&name) {
        return Ok(None);
    }
    let text = read_text(&source.dir.join(name), name)?;
    Ok(Some(rename(&text)))
}
