//! `gdn repack`: a checkpoint whose input projections come out in contiguous order, so that the split is a
//! view.

mod checkpoint;
mod follow;
mod format;
mod mentions;
mod names;
mod order;
mod plan;
mod record;
mod resume;
mod told;
pub(crate) mod verify;
mod write;

use std::{fs, io, path::PathBuf};

use anyhow::{Context, bail};
use gdn::{Layout, Packing};

use self::{
    checkpoint::Checkpoint,
    names::{ModuleName, Names},
    plan::{Goal, Plan, PlannedShard},
    told::Told,
    write::Folder,
};
use crate::{
    files::{Input, available, open, read_text},
    interrupts::{Interrupted, catch_interrupts, check_interrupted},
    layout::LayoutArgs,
    progress::Progress,
    terminal::note,
};

#[derive(clap::Args)]
#[command(after_help = "\
The rows of every linear_attn.in_proj_qkvz and in_proj_ba move, and with them biases, scales, zero points and LoRA's B; all other \
tensors are carried over byte for byte, and so are all other files, except that JSON files follow where names change. Heads and the \
order that SRC is in come from SRC's metadata, if it was repacked before, else from the arguments, else from config.json; which dim \
of a quantised tensor moves comes from the quantisation that is declared, and what is not declared is refused. What was done is recorded \
in the metadata of every file: loaders that expect the other order must not be given the result.

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
    /// Names of contiguous projections: fused (in_proj_qkvz, in_proj_ba) or separate (in_proj_qkv, in_proj_z,
    /// in_proj_b, in_proj_a)
    #[arg(long, default_value = "fused", hide_possible_values = true)]
    names: Names,
    #[command(flatten)]
    layout: LayoutArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let source = Checkpoint::open(&args.source)?;
    let what = || format!("cannot repack {}", args.source.display());
    let goal = goal(args, &source).with_context(what)?;
    let plan = Plan::new(&source, goal).with_context(what)?;
    let mut notes = source.unnamed();
    let others = carried(&source, goal.names, &mut notes)?;
    if !plan.not_undone.is_empty() {
        let files = plan.not_undone.join(", ");
        notes.push(format!(
            "an undo gives the same tensors, but not the same bytes in all files: it will differ in {files}"
        ));
    }
    if !source.left_out.is_empty() {
        notes.push(format!("not carried over: {}", source.left_out.join(", ")));
    }
    notes.iter().for_each(|text| note(text));

    catch_interrupts()?;
    let folder = Folder::open(&args.output, &args.source)?;
    folder.check_names(names_of(&source, &plan))?;
    let path = folder.path.clone();
    let finish = || {
        write(&folder, &source, &plan, &others)?;
        source.check_unchanged().with_context(|| {
            format!("{} may be made of what there was before and after: delete it", path.display())
        })?;
        folder.check_names(names_of(&source, &plan))?;
        folder.finish()
    };
    finish().map_err(|error| match error.downcast_ref::<Interrupted>() {
        Some(interrupted) => {
            let path = path.display();
            let left = format!("finished files stay in {path}, and the same command goes on from there");
            interrupted.with_left(left).into()
        }
        None => error,
    })
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
    match (&whole, &part) {
        (None, None) => bail!("it has no linear_attn.in_proj_qkvz or in_proj_ba"),
        (Some(whole), Some(part)) => bail!("it has both '{whole}' and '{part}'"),
        _ => {}
    }
    let told = Told::new(&args.layout)?;
    let (packing, why) = told.packing(source, source.names())?.context(
        "nothing says which order in_proj_qkvz and in_proj_ba are in: say it with --packing interleaved (as Qwen3-Next's are) or \
         --packing contiguous, or name a config.json with --config",
    )?;
    if packing == args.to {
        match source.record {
            Some(_) => bail!("it was repacked before, and is {packing} already"),
            None if part.is_some() => bail!("it is {packing} already, as {why}"),
            None => bail!(
                "it is {packing} already ({why}); if its in_proj_qkvz and in_proj_ba are not, say so with --packing"
            ),
        }
    }
    if args.to == Packing::Interleaved && args.names == Names::Separate {
        bail!("--names separate goes with --to contiguous: interleaved projections are in one piece");
    }
    Ok(Goal { layout: Layout::new(told.heads(source)?, args.to), names: args.names })
}

fn write(folder: &Folder, source: &Checkpoint, plan: &Plan, others: &[Carried]) -> anyhow::Result<()> {
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
        if let Some(fault) = resume::fault(source, shard, &there, &mut progress)? {
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
            others,
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
    for Carried { name, text } in others {
        check_interrupted()?;
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

/// That nothing is to be done but to take away the lock of a run that ended before it could: all that lies
/// beside the shards is as it should be, and no shard is missing.
fn check_finished(
    folder: &Folder,
    source: &Checkpoint,
    plan: &Plan,
    others: &[Carried],
    missing: Option<&PlannedShard>,
) -> anyhow::Result<()> {
    let there = folder.path.display();
    if let Some(shard) = missing {
        bail!("cannot write {there}: it is there already, without {}", shard.name);
    }
    for Carried { name, text } in others {
        if !resume::same_file(source, name, text.as_deref(), &folder.path)? {
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

/// A file that is neither a shard nor the index.
struct Carried {
    name: String,
    /// Its text, where names in it change on the way. Else it is carried over as it is.
    text: Option<String>,
}

/// All such files, and notes on what they say that cannot follow.
fn carried(source: &Checkpoint, names: Names, notes: &mut Vec<String>) -> anyhow::Result<Vec<Carried>> {
    let follow = |name: &String| {
        let text = match source.names() != names {
            true => followed(source, name, names, notes)?,
            false => None,
        };
        Ok(Carried { name: name.clone(), text })
    };
    source.others.iter().map(follow).collect()
}

/// The text of a file in which names follow, if any do.
fn followed(
    source: &Checkpoint,
    name: &str,
    names: Names,
    notes: &mut Vec<String>,
) -> anyhow::Result<Option<String>> {
    let is_json = name.ends_with(".json");
    if !is_json && !name.ends_with(".yaml") && !name.ends_with(".yml") {
        return Ok(None);
    }
    let text = read_text(&source.dir.join(name), name)?;
    if is_json && text.contains("\"re:") {
        for pattern in mentions::patterns_left(&text, names, &source.renamed()) {
            notes.push(format!(
                "{name}: '{pattern}' matches other projections than before, as their names change: look at it"
            ));
        }
    }
    // Names that are there already would go where others go, in an undo.
    if ![names, source.names()].into_iter().any(|names| mentions::names_gone(&text, names)) {
        return Ok(None);
    }
    let renamed = match is_json.then(|| mentions::renamed(&text, names)) {
        Some(Ok(renamed)) => renamed,
        _ => {
            if mentions::names_gone(&text, names) {
                notes.push(format!(
                    "{name} names projections whose names change, and cannot follow: look at it"
                ));
            }
            return Ok(None);
        }
    };
    if let Some(first) = renamed.left.first() {
        notes.push(format!(
            "{name} still says '{first}', a name that changes, where it cannot follow{}: look at it",
            if renamed.left.len() > 1 {
                format!(", and {} more", renamed.left.len() - 1)
            } else {
                String::new()
            }
        ));
    }
    if mentions::renamed(&renamed.text, source.names())?.text != text {
        notes.push(format!("{name}: an undo lists other names, or the same in another order or spacing"));
    }
    Ok((renamed.text != text).then_some(renamed.text))
}
