//! Random checkpoints: repacked, every value looked up by a check of its own, undone, compared to the byte.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use gdn::{Heads, Packing, reference};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::checkpoints::*;

/// How the published tensors of a projection speak of its outputs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Speaks {
    /// Along this dim, each index of one output.
    One(usize),
    /// Along dim 0, each index of so many outputs that share it.
    Shared(usize),
    /// Along this dim, each 32-bit integer of so many outputs.
    Packed(usize, usize),
    /// Not of outputs.
    Inputs,
    /// As the two integers of a shape.
    Shape,
}
use Speaks::{Inputs, One, Packed, Shape, Shared};

/// A tensor of a projection: what comes after its name, and its shape where 0 stands for the outputs.
type Spec = (&'static str, Dtype, Vec<usize>, Speaks);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Dialect {
    Plain,
    Fp8,
    Compressed,
    Gptq,
    Awq,
    Mlx,
    ModelOpt,
    ModelSlim,
    Lora,
}
const DIALECTS: [Dialect; 9] = [
    Dialect::Plain,
    Dialect::Fp8,
    Dialect::Compressed,
    Dialect::Gptq,
    Dialect::Awq,
    Dialect::Mlx,
    Dialect::ModelOpt,
    Dialect::ModelSlim,
    Dialect::Lora,
];

/// Inputs of every projection.
const IN: usize = 16;

impl Dialect {
    /// The tensors of `in_proj_qkvz`. `groups` of inputs share a scale: as many as outputs are the ones to
    /// beware of.
    fn specs(self, groups: usize) -> Vec<Spec> {
        use Dtype::{BF16, F8_E4M3, F16, F32, I8, I32, I64, U8, U32};
        let g = groups;
        match self {
            Self::Plain => vec![("weight", BF16, vec![0, IN], One(0)), ("bias", F32, vec![0], One(0))],
            Self::Fp8 => vec![
                ("weight", F8_E4M3, vec![0, IN], One(0)),
                ("weight_scale_inv", F32, vec![0, 2], Shared(8)),
                ("input_scale", F32, vec![], Inputs),
            ],
            Self::Compressed => vec![
                ("weight_packed", I32, vec![0, IN / 8], One(0)),
                ("weight_scale", BF16, vec![0, g], One(0)),
                ("weight_zero_point", I32, vec![0, g], Packed(0, 8)),
                ("weight_shape", I64, vec![2], Shape),
            ],
            Self::Gptq => vec![
                ("qweight", I32, vec![IN / 8, 0], One(1)),
                ("qzeros", I32, vec![g, 0], Packed(1, 8)),
                ("scales", F16, vec![g, 0], One(1)),
                ("g_idx", I32, vec![IN], Inputs),
            ],
            Self::Awq => vec![
                ("qweight", I32, vec![IN, 0], Packed(1, 8)),
                ("qzeros", I32, vec![g, 0], Packed(1, 8)),
                ("scales", F16, vec![g, 0], One(1)),
            ],
            Self::Mlx => vec![
                ("weight", U32, vec![0, IN / 8], One(0)),
                ("scales", BF16, vec![0, g], One(0)),
                ("biases", BF16, vec![0, g], One(0)),
            ],
            Self::ModelOpt => vec![
                ("weight", U8, vec![0, IN / 2], One(0)),
                ("weight_scale", F8_E4M3, vec![0, g], One(0)),
                ("weight_scale_2", F32, vec![], Inputs),
                ("pre_quant_scale", BF16, vec![g], Inputs),
            ],
            Self::ModelSlim => vec![
                ("weight", I8, vec![0, IN], One(0)),
                ("weight_scale", BF16, vec![0, 1], One(0)),
                ("weight_offset", BF16, vec![0, 1], One(0)),
                ("deq_scale", F32, vec![0], One(0)),
                ("quant_bias", I32, vec![0], One(0)),
                ("input_offset", BF16, vec![1], Inputs),
            ],
            Self::Lora => vec![
                ("lora_A.weight", BF16, vec![3, IN], Inputs),
                ("lora_B.weight", BF16, vec![0, 3], One(0)),
            ],
        }
    }

    fn declaration(self) -> Value {
        match self {
            Self::Plain | Self::Lora | Self::ModelSlim => Value::Null,
            Self::Fp8 => json!({"quant_method": "fp8", "weight_block_size": [8, 8]}),
            Self::Compressed => json!({"quant_method": "compressed-tensors", "config_groups": {"group_0":
                {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group"}}}}),
            Self::Gptq => json!({"quant_method": "gptq", "bits": 4}),
            Self::Awq => json!({"quant_method": "awq", "bits": 4, "version": "gemm"}),
            Self::Mlx => json!({"bits": 4, "group_size": 64}),
            Self::ModelOpt => json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        }
    }
}

/// What is drawn.
#[derive(Clone, Debug)]
struct Drawn {
    heads: [usize; 4],
    layers: usize,
    dialect: Dialect,
    /// Interleaved and in one piece, else contiguous and separate.
    interleaved: bool,
    /// As many groups as outputs.
    square: bool,
    shards: usize,
    has_index: bool,
    /// Headers in an order that safetensors would not write.
    odd_headers: bool,
    /// The parts of a projection wherever they fall, else side by side.
    scattered: bool,
    metadata: usize,
    /// To separate names, where there is a choice.
    separate: bool,
    seed: u64,
}

fn drawn() -> impl Strategy<Value = Drawn> {
    let heads = (1..=3usize, 1..=3usize, 1..=2usize, 1..=2usize)
        .prop_map(|(hk, r, dk, dv)| [hk, hk * r, dk * 8, dv * 8]);
    let choices = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (heads, 1..=2usize, 0..DIALECTS.len(), choices, 1..=3usize, 0..4usize, any::<u64>()).prop_map(
        |(heads, layers, dialect, choices, shards, metadata, seed)| {
            let (interleaved, square, has_index, odd_headers, scattered, separate) = choices;
            let dialect = DIALECTS[dialect];
            Drawn {
                heads,
                layers,
                dialect,
                interleaved,
                square,
                shards,
                has_index,
                odd_headers,
                scattered,
                metadata,
                separate,
                seed,
            }
        },
    )
}

/// A source of numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % end
    }
}

/// The projections, each with its whole, its parts, and how many outputs these have.
fn projections(heads: &Heads) -> [(&'static str, [&'static str; 2], [usize; 2]); 2] {
    let hv = heads.num_v_heads();
    [
        ("in_proj_qkvz", ["in_proj_qkv", "in_proj_z"], [heads.qkv_features(), heads.z_features()]),
        ("in_proj_ba", ["in_proj_b", "in_proj_a"], [hv, hv]),
    ]
}

/// What the tensors of the two projections are.
fn specs(drawn: &Drawn, heads: &Heads, whole: &str) -> Vec<Spec> {
    let groups = if drawn.square { heads.qkvz_features() } else { 2 };
    match (whole, drawn.dialect) {
        ("in_proj_qkvz", dialect) => dialect.specs(groups),
        (_, Dialect::Lora) => Dialect::Lora.specs(groups),
        // As everybody leaves it.
        _ => Dialect::Plain.specs(groups),
    }
}

fn indices(speaks: Speaks, outputs: usize) -> usize {
    match speaks {
        Shared(size) => outputs.div_ceil(size),
        Packed(_, size) => outputs / size,
        _ => outputs,
    }
}

/// A tensor for so many outputs.
fn made(spec: &Spec, outputs: usize, seed: u64) -> Tensor {
    let (_, dtype, shape, speaks) = spec;
    let dim = if let One(dim) | Packed(dim, _) = speaks { *dim } else { 0 };
    let mut shape = shape.clone();
    if !matches!(speaks, Inputs | Shape) {
        shape[dim] = indices(*speaks, outputs);
    }
    let data = match speaks {
        Shape => [outputs as i64, IN as i64].map(i64::to_le_bytes).concat(),
        _ => noise(shape.iter().product::<usize>() * dtype.bitsize() / 8, seed),
    };
    Tensor { dtype: *dtype, shape, data }
}

/// One file: its tensors in order.
type File = Vec<(String, Tensor)>;

/// Writes a file byte by byte.
fn write_file(path: &Path, file: &File, metadata: usize) {
    let mut entries = match metadata {
        0 => vec![],
        1 => vec![r#""__metadata__":null"#.to_owned()],
        2 => vec![r#""__metadata__":{}"#.to_owned()],
        _ => vec![r#""__metadata__":{"format":"pt","b":"\"","a":""}"#.to_owned()],
    };
    let mut data = Vec::new();
    for (name, tensor) in file {
        let start = data.len();
        data.extend_from_slice(&tensor.data);
        let (dtype, shape) = (json!(tensor.dtype), json!(tensor.shape));
        let name = json!(name);
        entries.push(format!(
            r#"{name}:{{"dtype":{dtype},"shape":{shape},"data_offsets":[{start},{}]}}"#,
            data.len()
        ));
    }
    fs::write(path, raw_file(&format!("{{{}}}", entries.join(",")), &data)).unwrap();
}

/// Writes what was drawn.
fn write_checkpoint(dir: &Path, drawn: &Drawn) {
    fs::create_dir(dir).unwrap();
    let mut random = Random(drawn.seed);
    let [hk, hv, dk, dv] = drawn.heads;
    let heads = Heads::new(hk, hv, dk, dv).unwrap();
    let mut files: Vec<File> = vec![Vec::new(); drawn.shards];
    let mut seed = drawn.seed;
    let mut listed: Vec<String> = vec!["lm_head".to_owned()];
    let mut described = BTreeMap::new();
    // Tensors that the index leaves out, and files with an old copy of some.
    let (mut unnamed, mut stale) = (BTreeSet::new(), BTreeSet::new());
    for layer in 0..drawn.layers {
        let prefix = format!("model.layers.{layer}.linear_attn");
        for other in ["conv1d.weight", "A_log"] {
            seed += 1;
            let name = format!("{prefix}.{other}");
            let file = random.below(drawn.shards);
            files[file].push((name, made(&("", Dtype::F32, vec![0, 2], One(0)), 6, seed)));
        }
        for (whole, parts, outputs) in projections(&heads) {
            for spec in specs(drawn, &heads, whole) {
                seed += 1;
                let file = random.below(drawn.shards);
                let pieces: Vec<(&str, usize)> = match drawn.interleaved {
                    true => vec![(whole, outputs.iter().sum())],
                    false => parts.into_iter().zip(outputs).collect(),
                };
                let old = (drawn.has_index && drawn.shards > 1 && random.below(4) == 0)
                    .then(|| (file + 1 + random.below(drawn.shards - 1)) % drawn.shards);
                let is_unnamed = drawn.has_index && old.is_none() && random.below(6) == 0;
                for (number, (module, outputs)) in pieces.into_iter().enumerate() {
                    let name = format!("{prefix}.{module}.{}", spec.0);
                    // What does not speak of outputs is the same in both parts, or they could not be joined.
                    let own = if spec.3 == Inputs { seed } else { seed + 1000 * number as u64 };
                    let scattered = drawn.scattered && old.is_none();
                    let file = if scattered { random.below(drawn.shards) } else { file };
                    files[file].push((name.clone(), made(&spec, outputs, own)));
                    if let Some(old) = old {
                        files[old].push((name.clone(), made(&spec, outputs, own + 500)));
                        stale.insert((name.clone(), old));
                    }
                    if is_unnamed || drawn.has_index && scattered && old.is_none() && random.below(6) == 0 {
                        unnamed.insert(name);
                    }
                }
            }
            let modules = if drawn.interleaved { vec![whole] } else { parts.to_vec() };
            for module in modules {
                if whole == "in_proj_ba" {
                    listed.push(format!("{prefix}.{module}"));
                }
                let word = if whole == "in_proj_qkvz" { "W8A8" } else { "FLOAT" };
                described.insert(format!("{prefix}.{module}.weight"), word);
            }
        }
    }
    let is_adapter = drawn.dialect == Dialect::Lora;
    let name_of = |number: usize| format!("part-{}.safetensors", ["b", "a", "c"][number]);
    let mut map = BTreeMap::new();
    for (number, file) in files.iter_mut().enumerate() {
        if drawn.odd_headers {
            for i in (1..file.len()).rev() {
                file.swap(i, random.below(i + 1));
            }
        } else {
            file.sort_by(|(a, x), (b, y)| y.dtype.cmp(&x.dtype).then(a.cmp(b)));
        }
        write_file(&dir.join(name_of(number)), file, drawn.metadata);
        for (name, _) in file.iter() {
            if !unnamed.contains(name) && !stale.contains(&(name.clone(), number)) {
                map.insert(name.clone(), name_of(number));
            }
        }
    }
    if drawn.has_index {
        let total: usize = files.iter().flatten().map(|(_, tensor)| tensor.data.len()).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        let text = if random.below(2) == 0 { format!("{index:#}\n") } else { index.to_string() };
        fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
    }
    let model_type = if drawn.interleaved { "qwen3_next" } else { "qwen3_5_text" };
    let mut config = json!({"model_type": model_type, "linear_num_key_heads": hk, "linear_num_value_heads": hv,
        "linear_key_head_dim": dk, "linear_value_head_dim": dv, "rms_norm_eps": 1e-6});
    let mut declaration = drawn.dialect.declaration();
    if declaration.is_object() {
        declaration["ignore"] = json!(listed);
        let key = if drawn.dialect == Dialect::Mlx { "quantization" } else { "quantization_config" };
        config[key] = declaration;
    }
    if drawn.dialect == Dialect::ModelSlim {
        fs::write(dir.join("quant_model_description.json"), format!("{:#}", json!(described))).unwrap();
    }
    fs::write(dir.join("config.json"), format!("{config:#}\n")).unwrap();
    if is_adapter {
        let modules =
            if drawn.interleaved { vec!["in_proj_qkvz"] } else { vec!["in_proj_qkv", "q_proj", "in_proj_z"] };
        let text = json!({"target_modules": modules, "rank_pattern": {}}).to_string();
        fs::write(dir.join("adapter_config.json"), text).unwrap();
    }
    // Whatever else lies about.
    for (name, text) in [
        ("README.md", "in_proj_qkvz"),
        ("merges.txt", ""),
        ("notes.json", "[\"in_proj\", 1e-06]"),
        (".gitattributes", "x"),
    ] {
        if random.below(2) == 0 {
            fs::write(dir.join(name), text).unwrap();
        }
    }
    if random.below(3) == 0 {
        fs::write(dir.join("pytorch_model.bin"), "old").unwrap();
    }
}

/// All that is known of one tensor of a projection: of every output, in the order of the layer's own tensors,
/// the bytes that speak of it, and those that speak of none.
type Known = (Vec<Vec<u8>>, Vec<u8>);

/// Every tensor of every copy: of projections as [`Known`], others as they are.
#[derive(Debug, Default, PartialEq)]
struct Contents {
    projections: BTreeMap<(String, String), Known>,
    others: BTreeMap<(String, String), Vec<u8>>,
}

/// Reads a folder by the definition of its packing. A copy is known by its file where there is more than one
/// of the name.
fn contents(dir: &Path, drawn: &Drawn, packing: Packing, separate: bool) -> Contents {
    let [hk, hv, dk, dv] = drawn.heads;
    let heads = Heads::new(hk, hv, dk, dv).unwrap();
    let index = fs::read(dir.join("model.safetensors.index.json")).ok();
    let index: Option<Value> = index.map(|bytes| serde_json::from_slice(&bytes).unwrap());
    let mut all: BTreeMap<String, BTreeMap<String, Tensor>> = BTreeMap::new();
    for file in files(dir).into_keys().filter(|name| name.ends_with(".safetensors")) {
        for (name, tensor) in tensors(&dir.join(&file)) {
            all.entry(name).or_default().insert(file.clone(), tensor);
        }
    }
    // The copy that counts has no file in its key.
    let mut copies: BTreeMap<(String, String), Tensor> = BTreeMap::new();
    for (name, there) in all {
        let live = index.as_ref().and_then(|index| index["weight_map"].get(&name)).and_then(Value::as_str);
        let is_only = there.len() == 1;
        for (file, tensor) in there {
            let counts = live.map_or(is_only, |live| live == file);
            copies.insert((name.clone(), if counts { String::new() } else { file }), tensor);
        }
    }
    let mut result = Contents::default();
    for layer in 0..drawn.layers {
        for (whole, parts, outputs) in projections(&heads) {
            for spec in specs(drawn, &heads, whole) {
                let of = |module: &str| format!("model.layers.{layer}.linear_attn.{module}.{}", spec.0);
                let first = of(if separate { parts[0] } else { whole });
                let kept: Vec<String> =
                    copies.keys().filter(|(name, _)| *name == first).map(|(_, file)| file.clone()).collect();
                for file in kept {
                    let mut take = |module: &str| {
                        copies
                            .remove(&(of(module), file.clone()))
                            .unwrap_or_else(|| panic!("{} {file}", of(module)))
                    };
                    let pieces = if separate { parts.map(&mut take).to_vec() } else { vec![take(whole)] };
                    let known = known(&heads, packing, &spec, whole, outputs, &pieces);
                    result.projections.insert((of(whole), file), known);
                }
            }
        }
    }
    result.others = copies.into_iter().map(|(key, tensor)| (key, tensor.data)).collect();
    result
}

fn known(
    heads: &Heads,
    packing: Packing,
    spec: &Spec,
    whole: &str,
    outputs: [usize; 2],
    pieces: &[Tensor],
) -> Known {
    let lens = if pieces.len() == 2 { outputs.to_vec() } else { vec![outputs.iter().sum()] };
    for (piece, len) in pieces.iter().zip(&lens) {
        assert_eq!(piece.dtype, spec.1);
        assert_eq!(piece.shape, made(spec, *len, 0).shape);
    }
    if let Inputs | Shape = spec.3 {
        for (piece, len) in pieces.iter().zip(&lens) {
            let wanted = if spec.3 == Shape { made(spec, *len, 0).data } else { pieces[0].data.clone() };
            assert_eq!(piece.data, wanted);
        }
        return (Vec::new(), if spec.3 == Inputs { pieces[0].data.clone() } else { Vec::new() });
    }
    let pieces: Vec<Vec<Vec<u8>>> = pieces
        .iter()
        .zip(&lens)
        .map(|(piece, len)| match spec.3 {
            One(dim) => by_output(piece, dim, 1),
            Packed(dim, size) => by_output(piece, dim, size),
            Shared(size) => {
                let blocks = by_output(piece, 0, 1);
                (0..*len).map(|output| blocks[output / size].clone()).collect()
            }
            Inputs | Shape => unreachable!(),
        })
        .collect();
    let mut known = vec![Vec::new(); outputs.iter().sum()];
    let place = |f| match whole {
        "in_proj_qkvz" => reference::place_of_qkvz(heads, packing, f),
        _ => reference::place_of_ba(heads, packing, f),
    };
    let joined: Vec<Vec<u8>> = pieces.concat();
    for (f, bytes) in joined.into_iter().enumerate() {
        let (part, g) = place(f);
        known[part * outputs[0] + g] = bytes;
    }
    (known, Vec::new())
}

/// Everything in the folder, as somebody else would find it.
fn assert_index_tells_the_truth(dir: &Path) {
    let Ok(text) = fs::read(dir.join("model.safetensors.index.json")) else { return };
    let index: Value = serde_json::from_slice(&text).unwrap();
    for (name, file) in index["weight_map"].as_object().unwrap() {
        assert!(tensors(&dir.join(file.as_str().unwrap())).contains_key(name), "{name} {file}");
    }
    let folder = files(dir);
    let shards = folder.keys().filter(|name| name.ends_with(".safetensors"));
    let total: usize =
        shards.flat_map(|name| tensors(&dir.join(name)).into_values()).map(|tensor| tensor.data.len()).sum();
    assert_eq!(index["metadata"]["total_size"], total);
}

/// Every module that a JSON file names is there.
fn assert_names_are_there(dir: &Path, drawn: &Drawn) {
    let modules: BTreeSet<String> = files(dir)
        .into_keys()
        .filter(|name| name.ends_with(".safetensors"))
        .flat_map(|name| tensors(&dir.join(name)).into_keys())
        .collect();
    let mut strings = Vec::new();
    fn collect(value: &Value, strings: &mut Vec<String>) {
        match value {
            Value::String(string) => strings.push(string.clone()),
            Value::Array(elements) => elements.iter().for_each(|element| collect(element, strings)),
            Value::Object(members) => members.iter().for_each(|(key, value)| {
                strings.push(key.clone());
                collect(value, strings);
            }),
            _ => {}
        }
    }
    for name in ["config.json", "quant_model_description.json"] {
        if let Ok(text) = fs::read(dir.join(name)) {
            collect(&serde_json::from_slice(&text).unwrap(), &mut strings);
        }
    }
    for string in strings.iter().filter(|string| string.contains("linear_attn.in_proj_")) {
        assert!(modules.iter().any(|name| name.starts_with(string.as_str())), "{string} of {drawn:?}");
    }
}

fn run(drawn: &Drawn) {
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    let (source, there, back) = (at("source"), at("there"), at("back"));
    write_checkpoint(&source, drawn);
    let (from, to) = match drawn.interleaved {
        true => (Packing::Interleaved, Packing::Contiguous),
        false => (Packing::Contiguous, Packing::Interleaved),
    };
    let separate = drawn.interleaved && drawn.separate;
    let names = if separate { "separate" } else { "fused" };
    let to_name = to.to_string();
    let notes = match drawn.interleaved {
        true => repack(&source, &there, &["--names", names]),
        false => repack(&source, &there, &["--to", &to_name]),
    };
    let before = contents(&source, drawn, from, !drawn.interleaved);
    assert_eq!(before, contents(&there, drawn, to, separate));
    assert!(!before.projections.is_empty());
    assert_index_tells_the_truth(&there);
    assert_names_are_there(&there, drawn);
    verify(&there, &source);

    match drawn.interleaved {
        true => repack(&there, &back, &["--to", "interleaved"]),
        false => repack(&there, &back, &["--names", "separate"]),
    };
    assert_eq!(before, contents(&back, drawn, from, !drawn.interleaved));
    verify(&back, &there);
    verify(&back, &source);
    let mut wanted = files(&source);
    wanted.remove("pytorch_model.bin");
    let got = files(&back);
    assert_eq!(wanted.keys().collect::<Vec<_>>(), got.keys().collect::<Vec<_>>());
    for (name, bytes) in &wanted {
        // To the byte, or the difference was named before it was there.
        assert!(got[name] == *bytes || notes.contains(name.as_str()), "{name} differs: {notes}");
    }
    // Where nothing is odd, nothing differs.
    if !drawn.odd_headers && !drawn.scattered && drawn.interleaved {
        assert_same_files_but(&back, &source, "pytorch_model.bin");
    }
    // One wrong byte anywhere is seen.
    let mut random = Random(drawn.seed ^ 1);
    let shards: Vec<String> =
        files(&there).into_keys().filter(|name| name.ends_with(".safetensors")).collect();
    let path = there.join(&shards[random.below(shards.len())]);
    let mut bytes = fs::read(&path).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    if bytes.len() > start {
        let at = start + random.below(bytes.len() - start);
        bytes[at] ^= 1 << random.below(8);
        fs::write(&path, bytes).unwrap();
        fails(&["verify", text(&there), "--against", text(&source)], &["is not what it should be"]);
    }
}

fn assert_same_files_but(one: &Path, other: &Path, but: &str) {
    let (one, mut other) = (files(one), files(other));
    other.remove(but);
    assert!(one == other);
}

proptest! {
    // `PROPTEST_CASES` asks for more.
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(40),
        max_shrink_iters: 100,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_value_is_where_it_must_be_and_comes_back(drawn in drawn()) {
        run(&drawn);
    }
}
