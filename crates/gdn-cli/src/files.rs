//! safetensors files: reading through a memory map, writing beside the final name.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, Permissions},
    io::Write,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, bail};
use memmap2::{Mmap, MmapMut};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde_json::json;
use tempfile::NamedTempFile;

/// Somebody pressed Ctrl-C. The output's temporary file is removed on the way out.
#[derive(Debug, thiserror::Error)]
#[error("interrupted, no output was written")]
pub(crate) struct Interrupted;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on Ctrl-C is noticed by [`check_interrupted`] instead of ending the process where it stands.
pub(crate) fn catch_interrupts() -> anyhow::Result<()> {
    match ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed)) {
        Ok(()) | Err(ctrlc::Error::MultipleHandlers) => Ok(()),
        Err(error) => Err(error).context("cannot watch for Ctrl-C"),
    }
}

/// [`Interrupted`], if that is so.
pub(crate) fn check_interrupted() -> Result<(), Interrupted> {
    if INTERRUPTED.load(Ordering::Relaxed) { Err(Interrupted) } else { Ok(()) }
}

/// A safetensors file, mapped and its header checked.
pub(crate) struct Input {
    path: PathBuf,
    file: File,
    map: Mmap,
    header: Metadata,
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
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            bail!("not a file");
        }
        // SAFETY: a map of a file that another process cuts short while it is read ends this process with SIGBUS, as it does
        // for every reader of mapped files; nothing here writes to it.
        let map = unsafe { Mmap::map(&file) }?;
        let (header, data_start) = parse(&map)?;
        Ok(Self { path: path.to_owned(), file, map, header, data_start })
    }

    /// What the file says of itself.
    pub(crate) fn metadata(&self) -> HashMap<String, String> {
        self.header.metadata().clone().unwrap_or_default()
    }

    /// The same, in the order of the file.
    pub(crate) fn ordered_metadata(&self) -> anyhow::Result<Vec<(String, String)>> {
        Self::metadata_of_head(self.head())
    }

    /// The same, of a file up to its data.
    pub(crate) fn metadata_of_head(head: &[u8]) -> anyhow::Result<Vec<(String, String)>> {
        #[derive(serde::Deserialize)]
        struct Header {
            #[serde(default, rename = "__metadata__")]
            metadata: Pairs,
        }
        let header: Header = serde_json::from_slice(head.get(8..).unwrap_or_default())?;
        Ok(header.metadata.0)
    }

    /// The file itself, for those who copy from it.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// What the header says of a tensor, and the offset of its data in the file.
    pub(crate) fn place(&self, name: &str) -> Option<(&TensorInfo, u64)> {
        let info = self.header.info(name)?;
        Some((info, (self.data_start + info.data_offsets.0) as u64))
    }

    /// Where data begins.
    pub(crate) fn data_start(&self) -> usize {
        self.data_start
    }

    /// The file up to its data: the length of the header, and the header.
    pub(crate) fn head(&self) -> &[u8] {
        &self.map[..self.data_start]
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    pub(crate) fn tensor<'a>(&'a self, name: &'a str) -> anyhow::Result<Tensor<'a>> {
        let Some(info) = self.header.info(name) else {
            let names = self.names();
            let some = names.iter().take(6).map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
            let rest = if names.len() > 6 { format!(" and {} more", names.len() - 6) } else { String::new() };
            bail!("{} has no tensor '{name}'; it has {some}{rest}", self.path.display());
        };
        let (start, end) = info.data_offsets;
        let data = &self.map[self.data_start..][start..end];
        Ok(Tensor { name, dtype: info.dtype, shape: &info.shape, data })
    }
}

/// An object of strings whose order is kept.
#[derive(Default)]
struct Pairs(Vec<(String, String)>);

impl<'de> serde::Deserialize<'de> for Pairs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Pairs;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// The header of a safetensors file, and where its data begins.
fn parse(bytes: &[u8]) -> anyhow::Result<(Metadata, usize)> {
    let Some(length) = bytes.first_chunk::<8>() else {
        bail!("not a safetensors file: it has {} bytes, the length of the header alone takes 8", bytes.len());
    };
    let length = u64::from_le_bytes(*length);
    let Some(header) = usize::try_from(length).ok().and_then(|length| bytes[8..].get(..length)) else {
        let left = bytes.len() - 8;
        bail!(
            "not a safetensors file, or a truncated one: its header is said to take {length} bytes, {left} are left"
        );
    };
    // This checks names, shapes and offsets, and leaves the length of the file to us.
    let metadata: Metadata = serde_json::from_slice(header).context("not a valid safetensors header")?;
    let data = bytes.len() - 8 - header.len();
    if metadata.data_len() != data {
        bail!("the header speaks of {} bytes of data, the file has {data}", metadata.data_len());
    }
    Ok((metadata, 8 + header.len()))
}

impl Tensor<'_> {
    /// Bytes of an element.
    pub(crate) fn element_size(&self) -> anyhow::Result<usize> {
        let bits = self.dtype.bitsize();
        if !bits.is_multiple_of(8) {
            bail!("'{}' is {}: elements of {bits} bits do not move by bytes", self.name, self.dtype);
        }
        Ok(bits / 8)
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

/// A tensor that an [`Output`] will have.
pub(crate) struct NewTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: usize,
}

/// A safetensors file in the making, under a temporary name beside its final one. Dropped, it leaves nothing behind.
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
        metadata: &BTreeMap<String, String>,
        inputs: &[&Path],
    ) -> anyhow::Result<Self> {
        // A link is written through, not replaced.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let what = || format!("cannot write {}", path.display());
        if path.exists() && !path.is_file() {
            bail!("cannot write {}: there is something that is no file", path.display());
        }
        if inputs.iter().any(|input| fs::canonicalize(input).is_ok_and(|input| input == path)) {
            bail!("cannot write {}: it is the input", path.display());
        }
        Self::create_here(path.clone(), tensors, metadata).with_context(what)
    }

    fn create_here(
        path: PathBuf,
        tensors: Vec<NewTensor>,
        metadata: &BTreeMap<String, String>,
    ) -> anyhow::Result<Self> {
        let header = header(&tensors, metadata)?;
        let data_start = 8 + header.len();
        let data: Option<usize> =
            tensors.iter().try_fold(0usize, |sum, tensor| sum.checked_add(tensor.bytes));
        let bytes =
            data.and_then(|data| data.checked_add(data_start)).context("the file would be too large")?;
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut file = temporary(directory, bytes as u64)?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        // SAFETY: the file is new, its name is random, and it is this process that writes to it. Its space was reserved.
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
        Ok(())
    }
}

/// The header of a file with these tensors, in a fixed order, padded to the alignment of the data.
fn header(tensors: &[NewTensor], metadata: &BTreeMap<String, String>) -> anyhow::Result<String> {
    let mut object = serde_json::Map::new();
    if !metadata.is_empty() {
        object.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut start = 0;
    for NewTensor { name, dtype, shape, bytes } in tensors {
        let end = start + bytes;
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        if object.insert(name.clone(), entry).is_some() {
            bail!("two tensors would be named '{name}'");
        }
        start = end;
    }
    let mut header = serde_json::to_string(&object)?;
    let padded = (8 + header.len()).next_multiple_of(DATA_ALIGNMENT) - 8;
    header.extend(std::iter::repeat_n(' ', padded - header.len()));
    Ok(header)
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

/// Makes the file that long, with its blocks allocated where the system can, so that writing through a map cannot run out of
/// space.
fn reserve(file: &File, directory: &Path, bytes: u64) -> anyhow::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::{fs::FallocateFlags, io::Errno};
        let available = available(directory);
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => return Ok(()),
            Err(Errno::NOSPC | Errno::FBIG) => bail!(
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

    #[test]
    fn headers_are_the_same_every_time_and_data_begins_on_a_line() {
        let tensor =
            |name: &str, bytes| NewTensor { name: name.into(), dtype: Dtype::U8, shape: vec![bytes], bytes };
        for extra in 0..70 {
            let metadata: BTreeMap<_, _> =
                [("k".to_owned(), "x".repeat(extra)), ("a".to_owned(), "\"\n".to_owned())].into();
            let text = header(&[tensor("t", 3), tensor("u", 0)], &metadata).unwrap();
            assert_eq!((8 + text.len()) % DATA_ALIGNMENT, 0);
            assert!(text.starts_with(r#"{"__metadata__":{"a":"#), "{text}");
            let mut file = (text.len() as u64).to_le_bytes().to_vec();
            file.extend(text.as_bytes());
            file.extend([1, 2, 3]);
            let (parsed, data_start) = parse(&file).unwrap();
            assert_eq!((data_start, parsed.info("t").unwrap().data_offsets), (file.len() - 3, (0, 3)));
        }
        assert!(header(&[tensor("t", 3), tensor("t", 3)], &BTreeMap::new()).is_err());
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_an_error_or_still_a_file() {
        let text = header(
            &[NewTensor { name: "t".into(), dtype: Dtype::BF16, shape: vec![2, 2], bytes: 8 }],
            &BTreeMap::new(),
        )
        .unwrap();
        let mut file = (text.len() as u64).to_le_bytes().to_vec();
        file.extend(text.as_bytes());
        file.extend([0; 8]);
        assert!(parse(&file).is_ok());
        for cut in 0..file.len() {
            assert!(parse(&file[..cut]).is_err(), "cut to {cut} bytes");
        }
        for bit in 0..file.len() * 8 {
            let mut flipped = file.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let _ = parse(&flipped);
        }
    }
}
