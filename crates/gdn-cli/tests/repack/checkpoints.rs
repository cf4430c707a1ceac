//! Checkpoints: the command on them, what is in them, and such as are made here.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use gdn::{Heads, Projection};
use safetensors::{Dtype, SafeTensors, serialize_to_file, tensor::TensorView};
use serde_json::{Value, json};

pub const BIN: &str = env!("CARGO_BIN_EXE_gdn");
pub const LAYER: &str = "mtp.layers.0.linear_attn";

pub fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/repack").join(name)
}

pub fn gdn(args: &[&str]) -> Output {
    Command::new(BIN).args(args).output().unwrap()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[track_caller]
pub fn succeeds(args: &[&str]) -> String {
    let output = gdn(args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {error}");
    error
}

/// The error, which must mention all of `parts`.
#[track_caller]
pub fn fails(args: &[&str], parts: &[&str]) {
    let output = gdn(args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert!(error.contains("gdn: ") && !error.contains("panicked"), "{error}");
    for part in parts {
        assert!(error.contains(part), "{error} should mention {part}");
    }
}

#[track_caller]
pub fn repack(source: &Path, to: &Path, rest: &[&str]) -> String {
    succeeds(&[&["repack", text(source), "-o", text(to)], rest].concat())
}

#[track_caller]
pub fn verify(destination: &Path, source: &Path) {
    succeeds(&["verify", text(destination), "--against", text(source)]);
}

/// Every file of a folder.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

#[track_caller]
pub fn assert_same_files(one: &Path, other: &Path) {
    let (one, other) = (files(one), files(other));
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (name, bytes) in &one {
        assert!(*bytes == other[name], "{name} differs");
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// All tensors of a file or of all files of a folder.
pub fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let files = if path.is_dir() {
        let files = fs::read_dir(path).unwrap().map(|e| e.unwrap().path());
        files.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect()
    } else {
        vec![path.to_owned()]
    };
    let mut all = BTreeMap::new();
    for file in files {
        let bytes = fs::read(file).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let tensor =
                Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() };
            assert!(all.insert(name, tensor).is_none());
        }
    }
    all
}

/// Any bytes, no two stretches alike.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    })
    .take(len)
    .collect()
}

pub type Shapes<'a> = &'a [(&'a str, Dtype, &'a [usize])];

/// A checkpoint of one file with these tensors of layer [`LAYER`], noise in each, whose config declares this
/// quantisation.
pub fn checkpoint(dir: &Path, heads: &Heads, quantization: &Value, shapes: Shapes<'_>) {
    fs::create_dir_all(dir).unwrap();
    let mut config = json!({"model_type": "qwen3_next", "text_config": {
        "linear_num_key_heads": heads.num_k_heads(), "linear_num_value_heads": heads.num_v_heads(),
        "linear_key_head_dim": heads.head_k_dim(), "linear_value_head_dim": heads.head_v_dim(),
    }});
    if !quantization.is_null() {
        config["quantization_config"] = quantization.clone();
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let outputs = Projection::Qkvz.features(heads) as i64;
    let all = shapes.iter().enumerate().map(|(i, (name, dtype, shape))| {
        let data = match name.ends_with("weight_shape") {
            true => [outputs, 64].map(i64::to_le_bytes).concat(),
            false => noise(shape.iter().product::<usize>() * dtype.bitsize() / 8, i as u64),
        };
        (format!("{LAYER}.{name}"), Tensor { dtype: *dtype, shape: shape.to_vec(), data })
    });
    save(&dir.join("model.safetensors"), &all.collect::<Vec<_>>());
}

pub fn save(path: &Path, all: &[(String, Tensor)]) {
    let views = all.iter().map(|(name, Tensor { dtype, shape, data })| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    serialize_to_file(views, Some(metadata), path).unwrap();
}

/// Writes a file anew with other tensors, and what it says of itself.
pub fn rewrite(path: &Path, all: &BTreeMap<String, Tensor>) {
    let metadata = SafeTensors::read_metadata(&fs::read(path).unwrap()).unwrap().1.metadata().clone();
    let views = all.iter().map(|(name, Tensor { dtype, shape, data })| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    serialize_to_file(views, metadata, path).unwrap();
}

/// A copy of a checkpoint that may be changed.
pub fn copy_of(source: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for (name, bytes) in files(source) {
        fs::write(to.join(name), bytes).unwrap();
    }
}

/// A config of 2+4 heads of 8, 96 and 8 outputs.
pub fn small_config(model_type: &str) -> String {
    let config = json!({
        "model_type": model_type,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    });
    config.to_string()
}

/// A safetensors file with just this header, padded as safetensors does.
pub fn raw_file(header: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{header:0$}", header.len().next_multiple_of(8));
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// What belongs to each output: `per_element` of them lie in one `int32` of dim `dim`, or each has its own
/// element.
pub fn by_output(tensor: &Tensor, dim: usize, per_element: usize) -> Vec<Vec<u8>> {
    let elements = tensor.shape[dim];
    let outer: usize = tensor.shape[..dim].iter().product();
    let inner = tensor.data.len() / outer / elements;
    let piece = |n: usize, f: usize| -> Vec<u8> {
        let element = &tensor.data[(n * elements + f / per_element) * inner..][..inner];
        if per_element == 1 {
            return element.to_vec();
        }
        let bits = 32 / per_element;
        let words = element.chunks(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]));
        words.map(|word| ((word >> (f % per_element * bits)) & ((1 << bits) - 1)) as u8).collect()
    };
    (0..elements * per_element).map(|f| (0..outer).flat_map(|n| piece(n, f)).collect()).collect()
}
