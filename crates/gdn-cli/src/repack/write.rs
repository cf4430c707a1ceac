//! Writing a repacked checkpoint: in a folder beside its final name, one run at a time, file by file.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use anyhow::{Context, bail};
use tempfile::NamedTempFile;

use super::{
    checkpoint::Checkpoint,
    plan::{Copy, LARGE, Plan, Planned, PlannedShard},
};
use crate::{
    files::{TEMPORARY, check_interrupted, temporary},
    progress::Progress,
};

/// Held while a run writes.
pub(super) const LOCK: &str = ".gdn-lock";

/// The folder in which a destination grows, until it is whole and gets its name.
pub(super) struct Folder {
    pub(super) partial: PathBuf,
    destination: PathBuf,
    lock: File,
}

impl Folder {
    /// Takes the folder for this run alone.
    pub(super) fn open(destination: &Path, source: &Path) -> anyhow::Result<Self> {
        let what = || format!("cannot write {}", destination.display());
        let name = destination.file_name().with_context(what).context("the destination has no name")?;
        let parent = match destination.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).with_context(what)?;
        let source = fs::canonicalize(source).with_context(|| format!("cannot read {}", source.display()))?;
        if fs::canonicalize(parent).with_context(what)?.starts_with(&source) {
            bail!("cannot write {}: it lies within the source", destination.display());
        }
        let mut partial = name.to_owned();
        partial.push(".partial");
        let partial = parent.join(partial);
        check_free(destination, parent)?;

        if let Err(error) = fs::create_dir(&partial)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(error).with_context(|| format!("cannot make {}", partial.display()));
        }
        if !fs::symlink_metadata(&partial)?.is_dir() {
            bail!("{} is no folder: it is where the destination is written", partial.display());
        }
        let path = partial.join(LOCK);
        if fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
            bail!("{} is no file", path.display());
        }
        let lock = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let lock = lock.with_context(|| format!("cannot write {}", path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("another run is writing {}", destination.display()),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        // Another run may have come to its end in between.
        check_free(destination, parent)?;
        let folder = Self { partial, destination: destination.to_owned(), lock };
        folder.clean()?;
        Ok(folder)
    }

    /// What a run that was killed left in the middle.
    fn clean(&self) -> anyhow::Result<()> {
        for entry in fs::read_dir(&self.partial)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(TEMPORARY.0) && name.ends_with(TEMPORARY.1) && entry.file_type()?.is_file() {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Gives the whole folder its name.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        let what = || {
            let Self { partial, destination, .. } = &self;
            format!("{} is whole, but cannot become {}", partial.display(), destination.display())
        };
        sync_folder(&self.partial).with_context(what)?;
        check_interrupted()?;
        fs::rename(&self.partial, &self.destination).with_context(what)?;
        fs::remove_file(self.destination.join(LOCK))?;
        drop(self.lock);
        sync_folder(&self.destination)?;
        sync_folder(self.destination.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
    }
}

/// That the destination is not there, or is an empty folder of the same file system.
fn check_free(destination: &Path, parent: &Path) -> anyhow::Result<()> {
    let Ok(metadata) = fs::symlink_metadata(destination) else { return Ok(()) };
    let what = format!("cannot write {}", destination.display());
    if metadata.is_symlink() {
        bail!("{what}: it is a symbolic link");
    }
    if !metadata.is_dir() || fs::read_dir(destination).context(what.clone())?.next().is_some() {
        bail!("{what}: it is there already");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if metadata.dev() != fs::metadata(parent)?.dev() {
            bail!("{what}: a file system is mounted there, name a folder within it");
        }
    }
    let _ = parent;
    Ok(())
}

fn sync_folder(path: &Path) -> anyhow::Result<()> {
    #[cfg(unix)]
    File::open(path)?.sync_all()?;
    let _ = path;
    Ok(())
}

/// Files on their way to the disk: one at a time, while the next is written.
#[derive(Default)]
struct Syncing(Option<JoinHandle<anyhow::Result<()>>>);

impl Syncing {
    /// Gives a file its name once it is whole on the disk.
    fn add(&mut self, file: NamedTempFile, path: PathBuf) -> anyhow::Result<()> {
        self.wait()?;
        self.0 = Some(std::thread::spawn(move || {
            let what = || format!("cannot write {}", path.display());
            file.as_file().sync_all().with_context(what)?;
            file.persist(&path).with_context(what)?;
            Ok(())
        }));
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
        let path = folder.partial.join(&shard.name);
        let file = temporary(&folder.partial, shard.bytes)
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
    let path = folder.partial.join(name);
    let what = || format!("cannot write {}", path.display());
    let mut file = temporary(&folder.partial, 0).with_context(what)?;
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
        let shard = &self.source.shards[shard];
        let what = || format!("cannot read {}", shard.name);
        let mut input = shard.input.file();
        if len < LARGE {
            let start = self.buffer.len();
            self.buffer.resize(start + len as usize, 0);
            super::checkpoint::read_at(&shard.input, from, &mut self.buffer[start..]).with_context(what)?;
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
