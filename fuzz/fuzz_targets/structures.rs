//! Files that are valid but for a few changes, each where a header has something: numbers, names, keys that
//! come twice or not at all, lengths. `gdn split`, `merge` and `repack` refuse them and leave nothing behind,
//! or do what can be undone to the byte. What they accept, the reader of safetensors itself accepts.

#![no_main]

use std::{fs, path::Path, process::ExitCode};

use libfuzzer_sys::{arbitrary, arbitrary::Arbitrary, fuzz_target};
use safetensors::SafeTensors;
use serde_json::json;
use tempfile::TempDir;

/// A valid file, and what is done to it.
#[derive(Arbitrary, Debug)]
struct Case {
    command: Command,
    num_rows: u8,
    contiguous: bool,
    element: Element,
    changes: Vec<Change>,
    file: Option<FileChange>,
}

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq)]
enum Command {
    Split,
    Merge,
    Repack { separate: bool },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Element {
    U8,
    BF16,
    F32,
    F64,
}

/// A change of the node of that number, counted through the whole header.
#[derive(Arbitrary, Debug)]
enum Change {
    Number(u16, Number),
    Text(u16, Text),
    Key(u16, Text),
    Twice(u16),
    Gone(u16),
    Swapped(u16, u16),
    Becomes(u16, Kind),
}

#[derive(Arbitrary, Debug)]
enum Number {
    Near(i8),
    PowerOfTwo(u8, i8),
    Any(u64),
    Negative,
    Fraction,
    Exponent,
}

#[derive(Arbitrary, Debug)]
enum Text {
    Dtype(u8),
    Tensor(u8),
    Metadata(u8),
    Long(u16),
    Any(String),
}

#[derive(Arbitrary, Debug)]
enum Kind {
    Null,
    True,
    Text,
    List,
    Object,
}

/// A change of the file's bytes.
#[derive(Arbitrary, Debug)]
enum FileChange {
    Cut(u16),
    Longer(u8),
    HeaderLength(i8),
    HeaderBit(u16, u8),
    Spaces(u8),
}

/// JSON in which a key may come twice.
#[derive(Clone)]
enum Node {
    Plain(String),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

impl Node {
    fn of(value: &serde_json::Value) -> Self {
        match value {
            serde_json::Value::Array(all) => Self::List(all.iter().map(Self::of).collect()),
            serde_json::Value::Object(all) => Self::Object(
                all.iter().map(|(key, value)| (json!(key).to_string(), Self::of(value))).collect(),
            ),
            plain => Self::Plain(plain.to_string()),
        }
    }

    fn text(&self) -> String {
        let joined = |all: Vec<String>| all.join(",");
        match self {
            Self::Plain(text) => text.clone(),
            Self::List(all) => format!("[{}]", joined(all.iter().map(Self::text).collect())),
            Self::Object(all) => {
                let entries = all.iter().map(|(key, value)| format!("{key}:{}", value.text()));
                format!("{{{}}}", joined(entries.collect()))
            }
        }
    }

    fn count(&self) -> usize {
        match self {
            Self::Plain(_) => 1,
            Self::List(all) => 1 + all.iter().map(Self::count).sum::<usize>(),
            Self::Object(all) => 1 + all.iter().map(|(_, value)| value.count()).sum::<usize>(),
        }
    }

    /// Calls `change` with node `n`, counted from itself on, its place among those beside it, and all of
    /// those.
    fn change(&mut self, n: &mut usize, change: &mut dyn FnMut(&mut Vec<(String, Node)>, usize)) {
        // A list is changed as an object without keys.
        let mut entries: Vec<(String, Node)> = match self {
            Self::Plain(_) => return,
            Self::List(all) => all.drain(..).map(|value| (String::new(), value)).collect(),
            Self::Object(all) => std::mem::take(all),
        };
        let mut at = 0;
        while at < entries.len() && *n > 0 {
            *n -= 1;
            if *n == 0 {
                change(&mut entries, at);
                break;
            }
            entries[at].1.change(n, change);
            at += 1;
        }
        match self {
            Self::Object(all) => *all = entries,
            Self::List(all) => *all = entries.into_iter().map(|(_, value)| value).collect(),
            Self::Plain(_) => {}
        }
    }
}

impl Number {
    fn text(&self, old: &str) -> String {
        let old = old.trim_matches('"').parse::<u64>().unwrap_or(0);
        match self {
            Self::Near(by) => old.wrapping_add_signed(i64::from(*by)).to_string(),
            Self::PowerOfTwo(bit, by) => (1u64 << (bit % 64)).wrapping_add_signed(i64::from(*by)).to_string(),
            Self::Any(number) => number.to_string(),
            Self::Negative => format!("-{old}"),
            Self::Fraction => format!("{old}.0"),
            Self::Exponent => format!("{old}e3"),
        }
    }
}

const DTYPES: [&str; 10] = ["BOOL", "U8", "F4", "F8_E4M3", "BF16", "F16", "F32", "I32", "I64", "C64"];
const TENSORS: [&str; 10] = [
    "__metadata__",
    "mixed_qkvz",
    "mixed_ba",
    "mixed_qkv",
    "z",
    "b",
    "l.linear_attn.in_proj_qkvz.weight",
    "l.linear_attn.in_proj_ba.weight_scale_inv",
    "l.linear_attn.in_proj_z.weight",
    "",
];
const METADATA: [&str; 8] = [
    "num_k_heads",
    "num_v_heads",
    "head_k_dim",
    "head_v_dim",
    "packing",
    "gdn.packing",
    "gdn.names",
    "format",
];

impl Text {
    fn text(&self) -> String {
        let of = |all: &[&str], n: u8| all[usize::from(n) % all.len()].to_owned();
        match self {
            Self::Dtype(n) => of(&DTYPES, *n),
            Self::Tensor(n) => of(&TENSORS, *n),
            Self::Metadata(n) => of(&METADATA, *n),
            Self::Long(length) => "x".repeat(usize::from(*length)),
            Self::Any(text) => text.clone(),
        }
    }
}

fn apply(header: &mut Node, changes: &[Change]) {
    for change in changes.iter().take(4) {
        let (Change::Number(n, _)
        | Change::Text(n, _)
        | Change::Key(n, _)
        | Change::Twice(n)
        | Change::Gone(n)
        | Change::Swapped(n, _)
        | Change::Becomes(n, _)) = change;
        let mut n = usize::from(*n) % header.count();
        header.change(&mut n, &mut |all, at| match change {
            Change::Number(_, number) => {
                if let Node::Plain(old) = &all[at].1 {
                    let new = number.text(old);
                    // Numbers in metadata are text.
                    all[at].1 = Node::Plain(if old.starts_with('"') { format!("\"{new}\"") } else { new });
                }
            }
            Change::Text(_, text) => all[at].1 = Node::Plain(json!(text.text()).to_string()),
            Change::Key(_, text) => all[at].0 = json!(text.text()).to_string(),
            Change::Twice(_) => all.insert(at, all[at].clone()),
            Change::Gone(_) => drop(all.remove(at)),
            Change::Swapped(_, other) => {
                let other = usize::from(*other) % all.len();
                all.swap(at, other);
            }
            Change::Becomes(_, kind) => {
                all[at].1 = match kind {
                    Kind::Null => Node::Plain("null".to_owned()),
                    Kind::True => Node::Plain("true".to_owned()),
                    Kind::Text => Node::Plain("\"\"".to_owned()),
                    Kind::List => Node::List(vec![all[at].1.clone()]),
                    Kind::Object => Node::Object(vec![("\"x\"".to_owned(), all[at].1.clone())]),
                };
            }
        });
    }
}

/// Two key heads, four value heads, of four and two features.
const HEADS: [usize; 4] = [2, 4, 4, 2];

impl Case {
    fn file(&self) -> Vec<u8> {
        let [hk, hv, dk, dv] = HEADS;
        let n = usize::from(self.num_rows % 5);
        let (dtype, size) = match self.element {
            Element::U8 => ("U8", 1),
            Element::BF16 => ("BF16", 2),
            Element::F32 => ("F32", 4),
            Element::F64 => ("F64", 8),
        };
        let (qkvz, qkv) = (2 * hk * dk + 2 * hv * dv, 2 * hk * dk + hv * dv);
        let tensors: Vec<(&str, Vec<usize>)> = match self.command {
            Command::Split => vec![("mixed_qkvz", vec![n, qkvz]), ("mixed_ba", vec![n, 2 * hv])],
            Command::Merge => {
                vec![
                    ("mixed_qkv", vec![n, qkv]),
                    ("z", vec![n, hv, dv]),
                    ("b", vec![n, hv]),
                    ("a", vec![n, hv]),
                ]
            }
            Command::Repack { .. } => vec![
                ("l.linear_attn.in_proj_qkvz.weight", vec![qkvz, n]),
                ("l.linear_attn.in_proj_ba.weight", vec![2 * hv, n]),
                ("l.linear_attn.in_proj_ba.bias", vec![2 * hv]),
                ("other", vec![n, 3]),
            ],
        };
        let mut header = serde_json::Map::new();
        if !matches!(self.command, Command::Repack { .. }) {
            let packing = if self.contiguous { "contiguous" } else { "interleaved" };
            let numbers = ["num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"].into_iter().zip(HEADS);
            let mut metadata: serde_json::Map<_, _> =
                numbers.map(|(key, number)| (key.to_owned(), json!(number.to_string()))).collect();
            metadata.insert("packing".to_owned(), json!(packing));
            header.insert("__metadata__".to_owned(), metadata.into());
        }
        let mut data = 0;
        for (name, shape) in tensors {
            let end = data + shape.iter().product::<usize>() * size;
            header.insert(
                name.to_owned(),
                json!({"dtype": dtype, "shape": shape, "data_offsets": [data, end]}),
            );
            data = end;
        }
        let mut header = Node::of(&header.into());
        apply(&mut header, &self.changes);
        let mut text = header.text().into_bytes();
        if let Some(FileChange::Spaces(spaces)) = self.file {
            text.extend(vec![b' '; usize::from(spaces)]);
        }
        if let Some(FileChange::HeaderBit(at, bit)) = self.file {
            let at = usize::from(at) % text.len();
            text[at] ^= 1 << (bit % 8);
        }
        let mut length = text.len() as u64;
        if let Some(FileChange::HeaderLength(by)) = self.file {
            length = length.wrapping_add_signed(i64::from(by));
        }
        let mut file = [&length.to_le_bytes(), &text[..]].concat();
        file.extend((0..data).map(|byte| byte as u8));
        match self.file {
            Some(FileChange::Cut(at)) => file.truncate(usize::from(at)),
            Some(FileChange::Longer(by)) => file.extend(vec![0; usize::from(by)]),
            _ => {}
        }
        file
    }
}

fn gdn(args: &[&str]) -> bool {
    let code = gdn_cli::run([&["gdn"], args].concat());
    // The only way to look into one.
    format!("{code:?}") == format!("{:?}", ExitCode::SUCCESS)
}

/// All tensors of a file, by name.
fn tensors(path: &str) -> Vec<(String, String, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("what gdn accepts or writes, safetensors reads");
    let all = file.tensors().into_iter();
    let mut all: Vec<_> =
        all.map(|(name, t)| (name, t.dtype().to_string(), t.shape().to_vec(), t.data().to_vec())).collect();
    all.sort();
    all
}

/// Whether a folder has this many entries.
fn has(folder: &Path, entries: usize) -> bool {
    fs::read_dir(folder).expect("ours").count() == entries
}

fuzz_target!(|case: Case| {
    // In memory where that can be: what is written is synced.
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() };
    let folder = folder.expect("a folder for temporary files");
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    let bytes = case.file();
    match case.command {
        Command::Split | Command::Merge => {
            let (one, other, names) = match case.command {
                Command::Split => ("split", "merge", ["mixed_qkvz", "mixed_ba"].as_slice()),
                _ => ("merge", "split", ["mixed_qkv", "z", "b", "a"].as_slice()),
            };
            let (input, out, back) = (path("in"), path("out"), path("back"));
            fs::write(&input, &bytes).expect("room");
            if !gdn(&[one, &input, "-o", &out]) {
                assert!(has(folder.path(), 1), "nothing but the input is left");
                return;
            }
            assert!(gdn(&[other, &out, "-o", &back]), "what was done can be undone");
            let mut wanted = tensors(&input);
            wanted.retain(|(name, ..)| names.contains(&name.as_str()));
            assert_eq!(tensors(&back), wanted);
            assert!(has(folder.path(), 3));
        }
        Command::Repack { separate } => {
            let (source, out, back) = (path("source"), path("out"), path("back"));
            fs::create_dir(&source).expect("ours");
            let file = |folder: &str| format!("{folder}/model.safetensors");
            fs::write(file(&source), &bytes).expect("room");
            let [hk, hv, dk, dv] = HEADS;
            let config = json!({
                "model_type": "qwen3_next", "linear_num_key_heads": hk, "linear_num_value_heads": hv,
                "linear_key_head_dim": dk, "linear_value_head_dim": dv,
            });
            fs::write(format!("{source}/config.json"), config.to_string()).expect("room");
            let names = if separate { "separate" } else { "fused" };
            if !gdn(&["repack", &source, "-o", &out, "--names", names]) {
                assert!(has(folder.path(), 1), "nothing but the source is left");
                return;
            }
            assert!(gdn(&["verify", &out, "--against", &source]), "what was repacked is verified");
            assert!(
                gdn(&["repack", &out, "-o", &back, "--to", "interleaved"]),
                "what was repacked can be undone"
            );
            assert_eq!(tensors(&file(&back)), tensors(&file(&source)));
            assert!(has(folder.path(), 3));
        }
    }
});
