//! The head of a safetensors file, as every command reads and writes it: eight bytes of length, and the
//! header in JSON.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
};

use anyhow::{Context, bail};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde_json::json;

/// What a header says.
pub(crate) struct Header {
    pub(crate) metadata: FileMetadata,
    tensors: Metadata,
}

/// `__metadata__`: what a file says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum FileMetadata {
    /// The header has no such key.
    #[default]
    Absent,
    /// `null`, which says as little.
    Null,
    /// In the order of the file.
    Pairs(Vec<(String, String)>),
}

impl FileMetadata {
    pub(crate) fn pairs(&self) -> &[(String, String)] {
        match self {
            Self::Absent | Self::Null => &[],
            Self::Pairs(pairs) => pairs,
        }
    }

    /// The same with these pairs, in place of those it has of the same keys; in the order of the keys.
    pub(crate) fn with(&self, pairs: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        let mut all: BTreeMap<String, String> = self.pairs().iter().cloned().collect();
        all.extend(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)));
        Self::Pairs(all.into_iter().collect())
    }
}

impl Header {
    /// The header of a file, and where its data begins.
    ///
    /// Names, shapes, offsets and the length of the file must fit each other, and no key may come twice.
    pub(crate) fn parse(file: &[u8]) -> anyhow::Result<(Self, usize)> {
        let Some(length) = file.first_chunk::<8>() else {
            bail!(
                "not a safetensors file: it has {} bytes, the length of the header alone takes 8",
                file.len()
            );
        };
        let length = u64::from_le_bytes(*length);
        let Some(header) = usize::try_from(length).ok().and_then(|length| file[8..].get(..length)) else {
            let left = file.len() - 8;
            bail!(
                "not a safetensors file, or a truncated one: its header is said to take {length} bytes, {left} are left"
            );
        };
        let data = file.len() - 8 - header.len();
        let what = "not a valid safetensors header";
        let Entries { metadata, mut tensors } = serde_json::from_slice(header).context(what)?;
        // Of tensors without bytes the first in the header stays the first.
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        let tensors = Metadata::new(None, tensors).context(what)?;
        if tensors.data_len() != data {
            bail!("the header speaks of {} bytes of data, the file has {data}", tensors.data_len());
        }
        Ok((Self { metadata, tensors }, 8 + header.len()))
    }

    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.info(name)
    }

    /// The names of all tensors, in the order of their data.
    pub(crate) fn names(&self) -> Vec<String> {
        self.tensors.offset_keys()
    }
}

/// A header as it is read.
struct Entries {
    metadata: FileMetadata,
    tensors: Vec<(String, TensorInfo)>,
}

const METADATA: &str = "__metadata__";

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Entries { metadata: FileMetadata::Absent, tensors: Vec::new() };
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("{name:?} comes twice")));
                    }
                    if name == METADATA {
                        entries.metadata = map.next_value()?;
                    } else {
                        entries.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl<'de> Deserialize<'de> for FileMetadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = FileMetadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings, or null")
            }
            fn visit_unit<E: Error>(self) -> Result<FileMetadata, E> {
                Ok(FileMetadata::Null)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<FileMetadata, A::Error> {
                let mut pairs = Vec::new();
                let mut seen = HashSet::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format_args!("{METADATA} has {key:?} twice")));
                    }
                    pairs.push((key, value));
                }
                Ok(FileMetadata::Pairs(pairs))
            }
        }
        deserializer.deserialize_any(Strings)
    }
}

/// A tensor that a file will have, after those before it.
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
    pub(crate) bytes: u64,
}

/// The head of a file, as safetensors itself writes it: the same tensors and metadata give the same bytes.
/// Data begins at a multiple of `alignment`.
pub(crate) fn head<'a>(
    tensors: impl IntoIterator<Item = Entry<'a>>,
    metadata: &FileMetadata,
    alignment: usize,
) -> anyhow::Result<Vec<u8>> {
    let mut entries = Vec::new();
    match metadata {
        FileMetadata::Absent => {}
        FileMetadata::Null => entries.push(format!("\"{METADATA}\":null")),
        FileMetadata::Pairs(pairs) => {
            let mut seen = HashSet::new();
            let mut texts = Vec::new();
            for (key, value) in pairs {
                if !seen.insert(key) {
                    bail!("its metadata would have {key:?} twice");
                }
                texts.push(format!("{}:{}", json!(key), json!(value)));
            }
            entries.push(format!("\"{METADATA}\":{{{}}}", texts.join(",")));
        }
    }
    let mut seen = HashSet::from([METADATA]);
    let mut start = 0u64;
    for Entry { name, dtype, shape, bytes } in tensors {
        if !seen.insert(name) {
            bail!("two entries would be named {name:?}");
        }
        let end = start.checked_add(bytes).context("the file would be too large")?;
        let (name, dtype, shape) = (json!(name), json!(dtype), json!(shape));
        entries
            .push(format!("{name}:{{\"dtype\":{dtype},\"shape\":{shape},\"data_offsets\":[{start},{end}]}}"));
        start = end;
    }
    let mut header = format!("{{{}}}", entries.join(","));
    let padded = (8 + header.len()).next_multiple_of(alignment) - 8;
    header.extend(std::iter::repeat_n(' ', padded - header.len()));
    Ok([&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with this header and so many bytes of data.
    fn file(header: &str, data: usize) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
    }

    fn entry(name: &str, bytes: u64) -> Entry<'_> {
        Entry { name, dtype: Dtype::U8, shape: &[], bytes }
    }

    #[test]
    fn metadata_of_every_kind_is_read_and_written_again() {
        let pairs = [("b".to_owned(), "\"\n".to_owned()), ("a".to_owned(), String::new())];
        for (text, metadata) in [
            ("", FileMetadata::Absent),
            (r#""__metadata__":null,"#, FileMetadata::Null),
            (r#""__metadata__":{},"#, FileMetadata::Pairs(Vec::new())),
            (r#""__metadata__":{"b":"\"\n","a":""},"#, FileMetadata::Pairs(pairs.to_vec())),
        ] {
            let text = format!(r#"{{{text}"t":{{"dtype":"U8","shape":[],"data_offsets":[0,1]}}}}"#);
            let (header, data_start) = Header::parse(&file(&text, 1)).unwrap();
            assert_eq!((header.metadata, data_start), (metadata.clone(), 8 + text.len()));
            let head = head([entry("t", 1)], &metadata, 1).unwrap();
            assert_eq!(String::from_utf8_lossy(&head[8..]), text);
        }
    }

    #[test]
    fn what_comes_twice_is_refused() {
        let t = r#""t":{"dtype":"U8","shape":[],"data_offsets":[0,1]}"#;
        for (header, part) in [
            (format!("{{{t},{t}}}"), "\"t\" comes twice"),
            (format!(r#"{{{t},"\u0074":{{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}}}"#), "\"t\" comes"),
            (format!(r#"{{"__metadata__":{{}},{t},"__metadata__":null}}"#), "\"__metadata__\" comes twice"),
            (format!(r#"{{"__metadata__":{{"k":"1","k":"2"}},{t}}}"#), "\"k\" twice"),
            (r#"{"t":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}"#.to_owned(), "duplicate"),
        ] {
            let error = Header::parse(&file(&header, 1)).err().map(|e| format!("{e:#}")).unwrap_or_default();
            assert!(error.contains(part), "{header}: {error}");
        }
        let pairs = FileMetadata::Pairs(vec![("k".into(), "1".into()), ("k".into(), "2".into())]);
        assert!(head([], &pairs, 8).is_err());
        assert!(head([entry("t", 1), entry("t", 1)], &FileMetadata::Absent, 8).is_err());
        assert!(head([entry(METADATA, 1)], &FileMetadata::Absent, 8).is_err());
        assert!(head([entry("t", u64::MAX), entry("u", 1)], &FileMetadata::Absent, 8).is_err());
    }

    #[test]
    fn metadata_of_other_kinds_is_refused() {
        for metadata in ["[]", "1", "\"\"", "true", r#"{"k":1}"#, r#"{"k":null}"#] {
            let header = format!(r#"{{"__metadata__":{metadata}}}"#);
            assert!(Header::parse(&file(&header, 0)).is_err(), "{header}");
        }
    }

    #[test]
    fn tensors_without_bytes_keep_their_order() {
        let names: Vec<String> = (0..40).map(|i| format!("t{}", i * 7 % 40)).collect();
        let entries = names.iter().map(|name| Entry { shape: &[0], ..entry(name, 0) });
        let head = head(entries, &FileMetadata::Absent, 8).unwrap();
        assert_eq!(Header::parse(&head).unwrap().0.names(), names);
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_an_error_or_still_a_file() {
        let entry = Entry { name: "t", dtype: Dtype::BF16, shape: &[2, 2], bytes: 8 };
        let mut file = head([entry], &FileMetadata::Absent, 64).unwrap();
        file.extend([0; 8]);
        assert!(Header::parse(&file).is_ok());
        for cut in 0..file.len() {
            assert!(Header::parse(&file[..cut]).is_err(), "cut to {cut} bytes");
        }
        for bit in 0..file.len() * 8 {
            let mut flipped = file.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let _ = Header::parse(&flipped);
        }
    }
}
