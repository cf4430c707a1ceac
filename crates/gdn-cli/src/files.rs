//! safetensors files: reading through a memory map, writing beside the final name.

#[cfg(unix)]
use std::os::unix::fs::MetadataExt;
use std::{
    cell::{Ref, RefCell},
    fs::{self, File, Metadata, Permissions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context, bail};
use memmap2::{Mmap, MmapMut};
use safetensors::{Dtype, tensor::TensorInfo};
use tempfile::NamedTempFile;

use crate::{
    header::{Entry, FileMetadata, Header, head},
    interrupts::check_interrupted,
};

/// What tells whether a file is still the one that was read: which file it is, its size, and when it last
/// changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    #[cfg(unix)]
    inode: (u64, u64),
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            #[cfg(unix)]
            inode: (MetadataExt::dev(metadata), MetadataExt::ino(metadata)),
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }

    /// That the file of this stamp is there and as it was.
    pub(crate) fn check(&self, path: &Path) -> anyhow::Result<()> {
        let now = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        if Self::of(&now) != *self {
            bail!("{} was changed while it was read", path.display());
        }
        Ok(())
    }
}

/// Opens a file for reading. A pipe or a device is refused before anybody waits for what may never come out
/// of it.
pub(crate) fn open(path: &Path) -> anyhow::Result<File> {
    // Asked first, as the mere opening of a device may do something.
    if !fs::metadata(path)?.is_file() {
        bail!("not a file");
    }
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let file = options.open(path)?;
    if !file.metadata()?.is_file() {
        bail!("not a file");
    }
    Ok(file)
}

/// More text than any configuration or index has.
const LONGEST_TEXT: u64 = 256 << 20;

/// Reads a whole file of text, which errors call `name`.
pub(crate) fn read_text(path: &Path, name: &str) -> anyhow::Result<String> {
    let read = || -> anyhow::Result<String> {
        let file = open(path)?;
        let bytes = file.metadata()?.len();
        if bytes > LONGEST_TEXT {
            bail!("it has {bytes} bytes, at most {LONGEST_TEXT} are read");
        }
        let mut text = String::new();
        (&file).take(LONGEST_TEXT).read_to_string(&mut text)?;
        Ok(text)
    };
    read().with_context(|| format!("cannot read {name}"))
}

/// A safetensors file, mapped and its header checked.
pub(crate) struct Input {
    path: PathBuf,
    stamp: Stamp,
    /// Open between the first [`read_at`](Self::read_at) or [`file`](Self::file) and [`close`](Self::close):
    /// a checkpoint may have more files than a process may have open.
    file: RefCell<Option<File>>,
    map: Mmap,
    header: Header,
    data_start: usize,
}

/// A tensor of an [`Input`].
pub(crate) struct Tensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
    pub(crate) data: &'a [u8],
}

impl Input {
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        Self::open_here(path).with_context(|| format!("cannot read {}", path.display()))
    }

    fn open_here(path: &Path) -> anyhow::Result<Self> {
        let file = open(path)?;
        let stamp = Stamp::of(&file.metadata()?);
        // SAFETY: a map of a file that another process cuts short while it is read ends this process with
        // SIGBUS, as it does for every reader of mapped files; nothing here writes to it.
        let map = unsafe { Mmap::map(&file) }?;
        let (header, data_start) = Header::parse(&map)?;
        Ok(Self { path: path.to_owned(), stamp, file: RefCell::new(None), map, header, data_start })
    }

    /// That the file is there and has not changed since it was opened.
    pub(crate) fn check_unchanged(&self) -> anyhow::Result<()> {
        self.stamp.check(&self.path)
    }

    /// Bytes of the whole file.
    pub(crate) fn bytes(&self) -> u64 {
        self.stamp.bytes
    }

    /// What the file says of itself.
    pub(crate) fn metadata(&self) -> &FileMetadata {
        &self.header.metadata
    }

    /// The file itself, for those who copy from it. It is opened where it is not.
    pub(crate) fn file(&self) -> anyhow::Result<Ref<'_, File>> {
        if self.file.borrow().is_none() {
            let file = open(&self.path)?;
            if Stamp::of(&file.metadata()?) != self.stamp {
                bail!("{} was changed while it was read", self.path.display());
            }
            *self.file.borrow_mut() = Some(file);
        }
        Ref::filter_map(self.file.borrow(), Option::as_ref).ok().context("the file was closed")
    }

    /// Fills `buffer` from a place in the file.
    pub(crate) fn read_at(&self, start: u64, buffer: &mut [u8]) -> anyhow::Result<()> {
        let mut file = &*self.file()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(file.read_exact(buffer)?)
    }

    /// Closes the file until it is read again.
    pub(crate) fn close(&self) {
        self.file.replace(None);
    }

    /// What the header says of a tensor, and the offset of its data in the file.
    pub(crate) fn place(&self, name: &str) -> Option<(&TensorInfo, u64)> {
        let info = self.header.info(name)?;
        Some((info, (self.data_start + info.data_offsets.0) as u64))
    }

    /// Bytes of data.
    pub(crate) fn data_len(&self) -> u64 {
        (self.map.len() - self.data_start) as u64
    }

    /// The file up to its data: the length of the header, and the header.
    pub(crate) fn head(&self) -> &[u8] {
        &self.map[..self.data_start]
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.header.names()
    }

    /// The names of the tensors that are not among `used`.
    pub(crate) fn names_but(&self, used: &[&str]) -> Vec<String> {
        self.names().into_iter().filter(|name| !used.contains(&name.as_str())).collect()
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    pub(crate) fn tensor<'a>(&'a self, name: &'a str) -> anyhow::Result<Tensor<'a>> {
        let Some(info) = self.header.info(name) else {
            let names = self.names();
            let some = names.iter().take(6).map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
            let rest = if names.len() > 6 { format!(" and {} more", names.len() - 6) } else { String::new() };
            bail!("the file has no tensor '{name}'; it has {some}{rest}");
        };
        let (start, end) = info.data_offsets;
        let data = &self.map[self.data_start..][start..end];
        Ok(Tensor { name, dtype: info.dtype, shape: &info.shape, data })
    }
}

impl Tensor<'_> {
    /// Bytes of an element.
    pub(crate) fn element_size(&self) -> anyhow::Result<usize> {
        element_size(self.name, self.dtype)
    }

    /// The shape but its last `last` dims, and the product of those: the rows.
    pub(crate) fn rows(&self, last: usize) -> anyhow::Result<(&[usize], usize)> {
        if self.shape.len() <= last {
            bail!("'{}' has shape {:?}, it must have {} dims or more", self.name, self.shape, last + 1);
        }
        let leading = &self.shape[..self.shape.len() - last];
        let rows = leading.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
        Ok((
            leading,
            rows.with_context(|| format!("'{}' has shape {:?}, too many rows", self.name, self.shape))?,
        ))
    }
}

fn element_size(name: &str, dtype: Dtype) -> anyhow::Result<usize> {
    let bits = dtype.bitsize();
    if !bits.is_multiple_of(8) {
        bail!("'{name}' is {dtype}: elements of {bits} bits do not move by bytes");
    }
    Ok(bits / 8)
}

/// A tensor that an [`Output`] will have.
pub(crate) struct NewTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: usize,
}

impl NewTensor {
    /// # Errors
    /// Where it would have more bytes than the address space, or its elements are no whole bytes.
    pub(crate) fn new(name: &str, dtype: Dtype, shape: Vec<usize>) -> anyhow::Result<Self> {
        let size = element_size(name, dtype)?;
        let bytes = shape.iter().try_fold(size, |bytes, dim| bytes.checked_mul(*dim));
        let bytes = bytes.with_context(|| format!("'{name}' of shape {shape:?} would be too large"))?;
        Ok(Self { name: name.to_owned(), dtype, shape, bytes })
    }
}

/// A safetensors file in the making, under a temporary name beside its final one. Dropped, it leaves nothing
/// behind.
pub(crate) struct Output {
    file: NamedTempFile,
    path: PathBuf,
    map: MmapMut,
    data_start: usize,
    tensors: Vec<NewTensor>,
}

/// Where data begins in the files written here: on a cache line, for aligned loads and stores through a map.
const DATA_ALIGNMENT: usize = 64;

impl Output {
    /// Writes the header and reserves the space. `inputs` are files the output must not replace.
    pub(crate) fn create(
        path: &Path,
        tensors: Vec<NewTensor>,
        metadata: &FileMetadata,
        inputs: &[&Path],
    ) -> anyhow::Result<Self> {
        let what = || format!("cannot write {}", path.display());
        match fs::symlink_metadata(path) {
            Ok(there) => check_no_link(path, &there)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(what),
        }
        if path.exists() && !path.is_file() {
            bail!("cannot write {}: there is something that is no file", path.display());
        }
        let there = fs::canonicalize(path).ok();
        if there.is_some() && inputs.iter().any(|input| fs::canonicalize(input).ok() == there) {
            bail!("cannot write {}: it is the input", path.display());
        }
        Self::create_here(path.to_owned(), tensors, metadata).with_context(what)
    }

    fn create_here(path: PathBuf, tensors: Vec<NewTensor>, metadata: &FileMetadata) -> anyhow::Result<Self> {
        let entries = tensors.iter().map(|NewTensor { name, dtype, shape, bytes }| Entry {
            name,
            dtype: *dtype,
            shape,
            bytes: *bytes as u64,
        });
        let head = head(entries, metadata, DATA_ALIGNMENT)?;
        let data_start = head.len();
        let data: Option<usize> =
            tensors.iter().try_fold(0usize, |sum, tensor| sum.checked_add(tensor.bytes));
        let bytes =
            data.and_then(|data| data.checked_add(data_start)).context("the file would be too large")?;
        let mut file = temporary(parent_of(&path), bytes as u64)?;
        file.write_all(&head)?;
        // SAFETY: the file is new, its name is random, and it is this process that writes to it. Its space
        // was reserved.
        let map = unsafe { MmapMut::map_mut(file.as_file()) }?;
        Ok(Self { file, path, map, data_start, tensors })
    }

    /// The data of every tensor, in the order given to [`Output::create`].
    pub(crate) fn data(&mut self) -> Vec<&mut [u8]> {
        let mut rest = &mut self.map[self.data_start..];
        let mut parts = Vec::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            let (part, tail) = rest.split_at_mut(tensor.bytes);
            parts.push(part);
            rest = tail;
        }
        parts
    }

    /// Gives the file its name, whole and on the disk.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        let Self { file, path, map, .. } = self;
        let what = || format!("cannot write {}", path.display());
        map.flush().with_context(what)?;
        drop(map);
        file.as_file().sync_all().with_context(what)?;
        check_interrupted()?;
        file.persist(&path).with_context(what)?;
        let parent = parent_of(&path);
        sync_folder(parent).with_context(|| {
            format!("{} is whole, but {} cannot be synced", path.display(), parent.display())
        })
    }
}

/// The one rule for links as outputs. Those in a Hugging Face cache lead to files that other links share, so
/// none is written through; and none is replaced, as it was made by somebody.
pub(crate) fn check_no_link(output: &Path, there: &Metadata) -> anyhow::Result<()> {
    if there.is_symlink() {
        bail!("cannot write {}: it is a symbolic link, name what is to be written itself", output.display());
    }
    Ok(())
}

/// The folder that a file or folder is in.
pub(crate) fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Has the names in a folder written to the disk.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(path)?.sync_all()?;
    let _ = path;
    Ok(())
}

/// What temporary files are called.
pub(crate) const TEMPORARY: (&str, &str) = (".gdn-", ".tmp");

/// A file of that many bytes under a temporary name. Dropped, it is gone.
pub(crate) fn temporary(directory: &Path, bytes: u64) -> anyhow::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY.0).suffix(TEMPORARY.1);
    #[cfg(unix)]
    builder.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666));
    let file = builder.tempfile_in(directory)?;
    reserve(file.as_file(), directory, bytes)?;
    Ok(file)
}

/// Bytes that may still be written to the file system of `directory`, where it tells.
pub(crate) fn available(directory: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(directory).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = directory;
        None
    }
}

/// Makes the file that long, with its blocks allocated where the system can, so that writing through a map
/// cannot run out of space.
fn reserve(file: &File, directory: &Path, bytes: u64) -> anyhow::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::{fs::FallocateFlags, io::Errno};
        let available = available(directory);
        let reserved = loop {
            check_interrupted()?;
            match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
                Err(Errno::INTR) => {}
                reserved => break reserved,
            }
        };
        match reserved {
            Ok(()) => return Ok(()),
            Err(Errno::FBIG) => {
                bail!("it takes {bytes} bytes, more than a file here may have (see ulimit -f)")
            }
            Err(Errno::NOSPC) => bail!(
                "no space: it takes {bytes} bytes, {} are available",
                available.map_or_else(|| "fewer".to_owned(), |bytes| bytes.to_string())
            ),
            // A file system that cannot allocate ahead, but may tell what it has.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                if let Some(available) = available
                    && available < bytes
                {
                    bail!("no space: it takes {bytes} bytes, {available} are available");
                }
            }
            Err(error) => return Err(error).context("cannot reserve its space"),
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = directory;
    Ok(file.set_len(bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_noticed_before_anything_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let file = File::create(directory.path().join("file")).unwrap();
        let error = reserve(&file, directory.path(), 1 << 60).unwrap_err().to_string();
        assert!(error.contains(&(1u64 << 60).to_string()), "{error}");
        assert_eq!(file.metadata().unwrap().len(), 0);
    }
}
