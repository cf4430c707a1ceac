//! Writing a repacked checkpoint: in a folder beside its final name, one run at a time, file by file.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File, TryLockError},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use anyhow::{Context, bail};
use tempfile::NamedTempFile;

use super::{
    checkpoint::{Checkpoint, LOCK},
    plan::{Copy, LARGE, Plan, Planned, PlannedShard},
};
use crate::{
    files::{Stamp, TEMPORARY, check_no_link, parent_of, sync_folder, temporary},
    interrupts::check_interrupted,
    progress::Progress,
};

/// The folder in which a destination grows, until it is whole and gets its name.
pub(super) struct Folder {
    /// Where the files are: `OUT.partial` or, where a run ended between the renaming and the end of its lock,
    /// `OUT`.
    pub(super) path: PathBuf,
    destination: PathBuf,
    /// Folders that were made for this run.
    made: Vec<PathBuf>,
    /// Whether `path` is the destination.
    pub(super) renamed: bool,
    lock: Option<File>,
}

impl Folder {
    /// Takes the folder for this run alone.
    pub(super) fn open(destination: &Path, source: &Path) -> anyhow::Result<Self> {
        let what = || format!("cannot write {}", destination.display());
        if let Ok(there) = fs::symlink_metadata(destination) {
            check_no_link(destination, &there)?;
        }
        let name = destination.file_name().context("the destination has no name").with_context(what)?;
        let parent = parent_of(destination);
        let mut partial = name.to_owned();
        partial.push(".partial");
        let partial = parent.join(partial);
        apart(destination, &partial, source)?;

        let mut folder = Self {
            path: partial,
            destination: destination.to_owned(),
            made: Vec::new(),
            renamed: is_renamed(destination)?,
            lock: None,
        };
        if folder.renamed {
            folder.path = destination.to_owned();
            folder.take_lock()?;
            return Ok(folder);
        }
        check_free(destination)?;
        folder.make(parent).with_context(what)?;
        folder.take_lock()?;
        // Another run may have come to its end in between.
        check_free(destination)?;
        Ok(folder)
    }

    /// Makes a folder, and those it is in, where they are not there.
    fn make(&mut self, path: &Path) -> io::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent()
            && !parent.as_os_str().is_empty()
        {
            self.make(parent)?;
        }
        match fs::create_dir(path) {
            Ok(()) => self.made.push(path.to_owned()),
            Err(_) if path.is_dir() => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn take_lock(&mut self) -> anyhow::Result<()> {
        let path = self.path.join(LOCK);
        let what = || format!("cannot lock {}", path.display());
        loop {
            match fs::symlink_metadata(&self.path) {
                Ok(there) if !there.is_dir() => {
                    bail!("{} is no folder: it is where the destination is written", self.path.display())
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && !self.renamed => {
                    let partial = self.path.clone();
                    self.make(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
                }
                Err(error) => return Err(error).with_context(what),
                Ok(_) => {}
            }
            if fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
                bail!("{} is no file", path.display());
            }
            let lock =
                File::options().read(true).write(true).create(!self.renamed).truncate(false).open(&path);
            let lock = match lock {
                // The run that had the folder has just taken it away.
                Err(error) if error.kind() == io::ErrorKind::NotFound && !self.renamed => continue,
                lock => lock.with_context(what)?,
            };
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    bail!("another run is writing {}", self.destination.display())
                }
                Err(TryLockError::Error(error)) => return Err(error).with_context(what),
            }
            // Or it has taken away the file that is locked now.
            let locked = Stamp::of(&lock.metadata().with_context(what)?);
            if fs::symlink_metadata(&path).is_ok_and(|there| Stamp::of(&there) == locked) {
                self.lock = Some(lock);
                return Ok(());
            }
        }
    }

    /// Refuses what is there and is not `planned`, as it would become part of the destination. Temporary
    /// files of a run that was killed are removed.
    pub(super) fn check_names<'n>(&self, planned: impl IntoIterator<Item = &'n str>) -> anyhow::Result<()> {
        let planned: HashSet<&OsStr> = planned.into_iter().chain([LOCK]).map(OsStr::new).collect();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name();
            let text = name.to_string_lossy();
            if text.starts_with(TEMPORARY.0) && text.ends_with(TEMPORARY.1) && entry.file_type()?.is_file() {
                fs::remove_file(entry.path())
                    .with_context(|| format!("cannot remove {}", entry.path().display()))?;
            } else if !planned.contains(name.as_os_str()) {
                bail!(
                    "{} has '{text}', which is no part of the destination: delete it, or the folder to start anew",
                    self.path.display()
                );
            }
        }
        Ok(())
    }

    /// Gives the whole folder its name.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        let Self { path, destination, .. } = &self;
        let what = || format!("{} is whole, but cannot become {}", path.display(), destination.display());
        sync_folder(path).with_context(what)?;
        check_interrupted()?;
        if !self.renamed {
            fs::rename(path, destination).with_context(what)?;
            self.renamed = true;
        }
        // The lock goes last: while it is there, the same command goes on from here.
        let Self { destination, .. } = &self;
        let what = |what: &str| {
            format!("{} is whole, but {what}; the same command tries again", destination.display())
        };
        sync_folder(parent_of(destination))
            .with_context(|| what("the folder that it is in cannot be synced"))?;
        fs::remove_file(destination.join(LOCK)).with_context(|| what("its .gdn-lock cannot be removed"))
    }
}

impl Drop for Folder {
    /// Leaves what the same command can go on with, and no more: neither a lock nor a folder without files.
    fn drop(&mut self) {
        if self.renamed {
            return;
        }
        if self.lock.is_some() {
            let _ = fs::remove_file(self.path.join(LOCK));
        }
        for folder in self.made.iter().rev() {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// That neither the destination nor the folder it grows in is the source or within it, nor has it within
/// itself.
fn apart(destination: &Path, partial: &Path, source: &Path) -> anyhow::Result<()> {
    let there = fs::canonicalize(source).with_context(|| format!("cannot read {}", source.display()))?;
    // The nearest folder that is there already.
    let parent = parent_of(destination).ancestors().find_map(|folder| {
        fs::canonicalize(if folder.as_os_str().is_empty() { Path::new(".") } else { folder }).ok()
    });
    if parent.is_some_and(|parent| parent.starts_with(&there)) {
        bail!("cannot write {}: it lies within the source", destination.display());
    }
    if fs::canonicalize(destination).is_ok_and(|destination| destination == there) {
        bail!("cannot write {}: it is the source", destination.display());
    }
    if fs::canonicalize(partial).is_ok_and(|partial| there.starts_with(partial)) {
        bail!(
            "cannot write {}: it is written in {}, where the source is",
            destination.display(),
            partial.display()
        );
    }
    Ok(())
}

/// Whether the destination is what a run made that ended between the renaming and the end of its lock.
fn is_renamed(destination: &Path) -> anyhow::Result<bool> {
    let is_folder = fs::symlink_metadata(destination).is_ok_and(|there| there.is_dir());
    Ok(is_folder && fs::symlink_metadata(destination.join(LOCK)).is_ok_and(|there| there.is_file()))
}

/// That the destination is not there, or is an empty folder of the same file system.
fn check_free(destination: &Path) -> anyhow::Result<()> {
    let what = format!("cannot write {}", destination.display());
    let metadata = match fs::symlink_metadata(destination) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata.context(what.clone())?,
    };
    check_no_link(destination, &metadata)?;
    if !metadata.is_dir() || fs::read_dir(destination).context(what.clone())?.next().is_some() {
        bail!("{what}: it is there already");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if metadata.dev() != fs::metadata(parent_of(destination))?.dev() {
            bail!("{what}: a file system is mounted there, name a folder within it");
        }
    }
    Ok(())
}

/// Files on their way to the disk: one at a time, while the next is written.
#[derive(Default)]
struct Syncing(Option<JoinHandle<anyhow::Result<()>>>);

impl Syncing {
    /// Gives a file its name once it is whole on the disk.
    fn add(&mut self, file: NamedTempFile, path: PathBuf) -> anyhow::Result<()> {
        self.wait()?;
        let sync = move || {
            let what = || format!("cannot write {}", path.display());
            file.as_file().sync_all().with_context(what)?;
            file.persist(&path).with_context(what)?;
            Ok(())
        };
        let thread = std::thread::Builder::new().name("sync".to_owned()).spawn(sync);
        self.0 = Some(thread.context("cannot start the thread that writes to the disk")?);
        Ok(())
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        match self.0.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => bail!("the thread that writes to the disk ended early"),
        }
    }
}

impl Drop for Syncing {
    fn drop(&mut self) {
        // Whoever ended the run has the first error already.
        let _ = self.wait();
    }
}

/// Writes the shards that `missing` names, in order.
pub(super) fn shards(
    folder: &Folder,
    source: &Checkpoint,
    plan: &Plan,
    missing: &[usize],
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let mut syncing = Syncing::default();
    for shard in missing.iter().map(|number| &plan.shards[*number]) {
        let path = folder.path.join(&shard.name);
        let file = temporary(&folder.path, shard.bytes)
            .with_context(|| format!("cannot write {}", path.display()))?;
        write_shard(&file, source, shard, progress)
            .with_context(|| format!("cannot write {}", path.display()))?;
        syncing.add(file, path)?;
    }
    syncing.wait()
}

/// Writes a file of which nobody needs to know how much is there.
pub(super) fn whole_file(
    folder: &Folder,
    name: &str,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> anyhow::Result<()> {
    let path = folder.path.join(name);
    let what = || format!("cannot write {}", path.display());
    let mut file = temporary(&folder.path, 0).with_context(what)?;
    write(file.as_file_mut()).with_context(what)?;
    file.as_file().sync_all().with_context(what)?;
    file.persist(&path).with_context(what)?;
    Ok(())
}

fn write_shard(
    file: &NamedTempFile,
    source: &Checkpoint,
    shard: &PlannedShard,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let mut sink = Sink { source, file: file.as_file(), buffer: Vec::new(), pending: None, progress };
    sink.bytes(&shard.head)?;
    for tensor in &shard.tensors {
        sink.tensor(tensor)?;
    }
    sink.flush_pending()?;
    sink.flush()
}

/// How much the system copies at a time: Ctrl-C is noticed in between.
const CHUNK: u64 = 32 << 20;
/// How much is gathered.
const BUFFER: usize = 4 << 20;

struct Sink<'a> {
    source: &'a Checkpoint,
    file: &'a File,
    buffer: Vec<u8>,
    /// Not yet copied, as what comes next may lie beside it.
    pending: Option<Copy>,
    progress: &'a mut Progress,
}

impl Sink<'_> {
    fn tensor(&mut self, tensor: &Planned) -> anyhow::Result<()> {
        match tensor.in_memory(self.source)? {
            Some(bytes) => self.bytes(&bytes),
            None => tensor.copies()?.into_iter().try_for_each(|copy| self.copy(copy)),
        }
    }

    fn bytes(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.flush_pending()?;
        for part in bytes.chunks(BUFFER) {
            self.buffer.extend_from_slice(part);
            self.flush_if_full()?;
        }
        Ok(())
    }

    fn copy(&mut self, copy: Copy) -> anyhow::Result<()> {
        match &mut self.pending {
            Some(last) if last.shard == copy.shard && last.from + last.len == copy.from => {
                last.len += copy.len
            }
            _ => {
                self.flush_pending()?;
                self.pending = Some(copy);
            }
        }
        Ok(())
    }

    fn flush_pending(&mut self) -> anyhow::Result<()> {
        let Some(Copy { shard, mut from, mut len }) = self.pending.take() else { return Ok(()) };
        let file = self.source.file(shard)?;
        let mut input = &*file;
        let shard = &self.source.shards[shard];
        let what = || format!("cannot read {}", shard.name);
        if len < LARGE {
            let start = self.buffer.len();
            self.buffer.resize(start + len as usize, 0);
            shard.input.read_at(from, &mut self.buffer[start..]).with_context(what)?;
            return self.flush_if_full();
        }
        self.flush()?;
        while len > 0 {
            check_interrupted()?;
            let chunk = len.min(CHUNK);
            input.seek(SeekFrom::Start(from)).with_context(what)?;
            // From file to file in the kernel, where there is such a thing.
            let copied = io::copy(&mut io::Read::take(input, chunk), &mut self.file)?;
            if copied != chunk {
                bail!("{}: it became shorter while it was read", what());
            }
            from += chunk;
            len -= chunk;
            self.progress.add(chunk);
        }
        Ok(())
    }

    fn flush_if_full(&mut self) -> anyhow::Result<()> {
        if self.buffer.len() < BUFFER { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        check_interrupted()?;
        self.file.write_all(&self.buffer)?;
        self.progress.add(self.buffer.len() as u64);
        self.buffer.clear();
        Ok(())
    }
}
