//! `gdn repack` and `gdn verify` on checkpoints that transformers saved and on such as nobody should have saved.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use gdn::{Heads, Packing, Projection, reference};
use safetensors::{Dtype, SafeTensors, serialize_to_file, tensor::TensorView};
use tempfile::TempDir;

const BIN: &str = env!("CARGO_BIN_EXE_gdn");
const LAYER: &str = "mtp.layers.0.linear_attn";

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/repack").join(name)
}

fn gdn(args: &[&str]) -> Output {
    Command::new(BIN).args(args).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[track_caller]
fn succeeds(args: &[&str]) -> String {
    let output = gdn(args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {error}");
    error
}

/// The error, which must mention all of `parts`.
#[track_caller]
fn fails(args: &[&str], parts: &[&str]) {
    let output = gdn(args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert!(error.contains("gdn: ") && !error.contains("panicked"), "{error}");
    for part in parts {
        assert!(error.contains(part), "{error} should mention {part}");
    }
}

#[track_caller]
fn repack(source: &Path, to: &Path, rest: &[&str]) -> String {
    succeeds(&[&["repack", text(source), "-o", text(to)], rest].concat())
}

#[track_caller]
fn verify(destination: &Path, source: &Path) {
    succeeds(&["verify", text(destination), "--against", text(source)]);
}

/// Every file of a folder.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

#[track_caller]
fn assert_same_files(one: &Path, other: &Path) {
    let (one, other) = (files(one), files(other));
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (name, bytes) in &one {
        assert!(*bytes == other[name], "{name} differs");
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

/// All tensors of a file or of all files of a folder.
fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
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

/// The numbers of a tensor.
fn numbers(tensor: &Tensor) -> Vec<f32> {
    let e4m3 = |byte: &u8| {
        let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
        let value = match exponent {
            0 => mantissa / 8.0 * 2f32.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        if byte & 0x80 == 0 { value } else { -value }
    };
    let data = &tensor.data;
    match tensor.dtype {
        Dtype::BF16 => data.chunks(2).map(|c| f32::from_le_bytes([0, 0, c[0], c[1]])).collect(),
        Dtype::F32 => data.chunks(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect(),
        Dtype::F8_E4M3 => data.iter().map(e4m3).collect(),
        other => panic!("{other}"),
    }
}

/// The bytes that a tensor of this type has for the numbers, which it must hold exactly.
fn bytes_of(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let bytes = values.iter().map(|value| (value.to_le_bytes(), value));
    match dtype {
        Dtype::BF16 => bytes
            .flat_map(|([a, b, c, d], value)| {
                assert_eq!([a, b], [0, 0], "{value} is no bf16");
                [c, d]
            })
            .collect(),
        _ => bytes.flat_map(|(bytes, _)| bytes).collect(),
    }
}

/// `hidden [N, H] @ weight [out, H]^T`, where every sum is exact.
fn gemm(hidden: &[f32], weight: &[f32], width: usize) -> Vec<Vec<f32>> {
    // From positive zero on, as the sums of the real thing.
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).fold(0.0, |sum, (x, w)| sum + x * w);
    hidden.chunks(width).map(|x| weight.chunks(width).map(|w| dot(x, w)).collect()).collect()
}

/// A weight with its block scales applied.
fn weight(all: &BTreeMap<String, Tensor>, module: &str) -> Vec<f32> {
    let tensor = &all[&format!("{module}.weight")];
    let width = tensor.shape[1];
    let mut weight = numbers(tensor);
    if let Some(scales) = all.get(&format!("{module}.weight_scale_inv")) {
        let values = numbers(scales);
        for (i, w) in weight.iter_mut().enumerate() {
            *w *= values[i / width / 128 * scales.shape[1] + i % width / 128];
        }
    }
    weight
}

/// The GEMMs with the repacked weights give, as views, what transformers' layers gave through their split.
fn assert_projects(repacked: &Path, expected: &Path, heads: &Heads, names: &str, layers: usize) {
    let (all, expected) = (tensors(repacked), tensors(expected));
    let mut seen = 0;
    for (name, hidden) in expected.iter().filter(|(name, _)| name.ends_with(".hidden")) {
        let layer = name.strip_suffix(".hidden").unwrap();
        let width = hidden.shape[1];
        let project =
            |module: &str| gemm(&numbers(hidden), &weight(&all, &format!("{layer}.{module}")), width);
        let join = |one: &str, two: &str| -> Vec<Vec<f32>> {
            project(one).into_iter().zip(project(two)).map(|(a, b)| [a, b].concat()).collect()
        };
        let (qkvz, ba) = match names {
            "fused" => (project("in_proj_qkvz"), project("in_proj_ba")),
            _ => (join("in_proj_qkv", "in_proj_z"), join("in_proj_b", "in_proj_a")),
        };
        for (rows, range, part) in [
            (&qkvz, 0..heads.qkv_features(), "mixed_qkv"),
            (&qkvz, heads.qkv_features()..heads.qkvz_features(), "z"),
            (&ba, 0..heads.num_v_heads(), "b"),
            (&ba, heads.num_v_heads()..heads.ba_features(), "a"),
        ] {
            let wanted = &expected[&format!("{layer}.{part}")];
            let got: Vec<f32> = rows.iter().flat_map(|row| row[range.clone()].to_vec()).collect();
            assert!(got.iter().any(|value| *value != 0.0));
            assert_eq!(bytes_of(wanted.dtype, &got), wanted.data, "{layer}.{part}");
        }
        seen += 1;
    }
    assert_eq!(seen, layers);
}

#[test]
fn transformers_own_model_projects_the_same_and_comes_back() {
    for (name, heads, layers) in
        [("qwen3-next", Heads::new(3, 6, 8, 16).unwrap(), 3), ("fp8", Heads::new(2, 2, 128, 128).unwrap(), 1)]
    {
        for names in ["fused", "separate"] {
            let temp = TempDir::new().unwrap();
            let (source, there, back) = (testdata(name), temp.path().join("there"), temp.path().join("back"));
            let before = files(&source);
            repack(&source, &there, &["--names", names]);
            let expected = testdata(&format!("{name}.expected.safetensors"));
            assert_projects(&there, &expected, &heads, names, layers);
            verify(&there, &source);
            let others = |all: BTreeMap<String, Tensor>| -> BTreeMap<String, Tensor> {
                all.into_iter().filter(|(name, _)| !name.contains(".in_proj_")).collect()
            };
            assert_eq!(others(tensors(&there)), others(tensors(&source)));

            repack(&there, &back, &["--to", "interleaved"]);
            assert_same_files(&back, &source);
            verify(&back, &there);
            verify(&back, &source);
            verify(&source, &there);
            assert!(before == files(&source));
            assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 2, "no other folder stays");
        }
    }
}

/// Any bytes, no two stretches alike.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    })
    .take(len)
    .collect()
}

type Shapes<'a> = &'a [(&'a str, Dtype, &'a [usize])];

/// A checkpoint of one file with these tensors of layer [`LAYER`], noise in each.
fn checkpoint(dir: &Path, heads: &Heads, shapes: Shapes<'_>) {
    fs::create_dir_all(dir).unwrap();
    let config = serde_json::json!({"text_config": {
        "linear_num_key_heads": heads.num_k_heads(), "linear_num_value_heads": heads.num_v_heads(),
        "linear_key_head_dim": heads.head_k_dim(), "linear_value_head_dim": heads.head_v_dim(),
    }});
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

fn save(path: &Path, all: &[(String, Tensor)]) {
    let views = all.iter().map(|(name, Tensor { dtype, shape, data })| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    serialize_to_file(views, Some(metadata), path).unwrap();
}

/// What belongs to each output: `per_element` of them lie in one `int32` of dim `dim`, or each has its own element.
fn by_output(tensor: &Tensor, dim: usize, per_element: usize) -> Vec<Vec<u8>> {
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

/// A tensor before and after, with either kind of names, output by output against the oracle.
fn assert_follows(source: &Path, repacked: &Path, heads: &Heads, name: &str, dim: usize, per_element: usize) {
    let (before, after) = (tensors(source), tensors(repacked));
    let (module, suffix) = name.split_once('.').unwrap();
    let qkvz = module == "in_proj_qkvz";
    let parts = if qkvz { ["in_proj_qkv", "in_proj_z"] } else { ["in_proj_b", "in_proj_a"] };
    let original = by_output(&before[&format!("{LAYER}.{name}")], dim, per_element);
    let got = match after.get(&format!("{LAYER}.{name}")) {
        Some(fused) => {
            let all = by_output(fused, dim, per_element);
            let (first, second) = all.split_at(if qkvz { heads.qkv_features() } else { heads.num_v_heads() });
            [first.to_vec(), second.to_vec()]
        }
        None => parts.map(|part| by_output(&after[&format!("{LAYER}.{part}.{suffix}")], dim, per_element)),
    };
    assert_eq!(original.len(), got[0].len() + got[1].len());
    for (f, wanted) in original.iter().enumerate() {
        let (part, g) = match qkvz {
            true => reference::place_of_qkvz(heads, Packing::Interleaved, f),
            false => reference::place_of_ba(heads, Packing::Interleaved, f),
        };
        assert_eq!(got[part][g], *wanted, "{name}: output {f}");
    }
}

/// Segments of 16 outputs, 128 in all; 8 outputs of `in_proj_ba`.
fn small_heads() -> Heads {
    Heads::new(2, 4, 16, 8).unwrap()
}

/// What becomes of the tensors: those that follow the outputs along a dim, so many in an element, and those that are kept.
fn assert_all_follow(shapes: Shapes<'_>, follows: &[(&str, usize, usize)], kept: &[&str]) {
    let heads = small_heads();
    for names in ["fused", "separate"] {
        let temp = TempDir::new().unwrap();
        let [source, there, back] = ["source", "there", "back"].map(|name| temp.path().join(name));
        checkpoint(&source, &heads, shapes);
        repack(&source, &there, &["--names", names]);
        verify(&there, &source);
        for &(name, dim, per_element) in follows {
            assert_follows(&source, &there, &heads, name, dim, per_element);
        }
        let (before, after) = (tensors(&source), tensors(&there));
        for name in kept {
            let (module, suffix) = name.split_once('.').unwrap();
            let modules = match (names, module) {
                ("fused", _) => vec![module],
                (_, "in_proj_qkvz") => vec!["in_proj_qkv", "in_proj_z"],
                _ => vec!["in_proj_b", "in_proj_a"],
            };
            for module in modules {
                assert_eq!(after[&format!("{LAYER}.{module}.{suffix}")], before[&format!("{LAYER}.{name}")]);
            }
        }
        repack(&there, &back, &["--to", "interleaved"]);
        verify(&back, &there);
        assert_same_files(&back, &source);
    }
}

const BA: (&str, Dtype, &[usize]) = ("in_proj_ba.weight", Dtype::BF16, &[8, 64]);

#[test]
fn weights_with_biases_and_scales_of_each_output() {
    let weight = ("in_proj_qkvz.weight", 0, 1);
    assert_all_follow(
        &[
            ("in_proj_qkvz.weight", Dtype::BF16, &[128, 64]),
            ("in_proj_qkvz.bias", Dtype::BF16, &[128]),
            BA,
            ("in_proj_ba.bias", Dtype::F32, &[8]),
        ],
        &[weight, ("in_proj_qkvz.bias", 0, 1), ("in_proj_ba.weight", 0, 1), ("in_proj_ba.bias", 0, 1)],
        &[],
    );
    assert_all_follow(
        &[
            ("in_proj_qkvz.weight", Dtype::F8_E4M3, &[128, 64]),
            ("in_proj_qkvz.weight_scale", Dtype::F32, &[128, 1]),
            ("in_proj_qkvz.input_scale", Dtype::F32, &[]),
            BA,
        ],
        &[weight, ("in_proj_qkvz.weight_scale", 0, 1)],
        &["in_proj_qkvz.input_scale"],
    );
    assert_all_follow(
        &[
            ("in_proj_qkvz.weight", Dtype::I8, &[128, 64]),
            ("in_proj_qkvz.weight_scale", Dtype::F32, &[128]),
            BA,
        ],
        &[weight, ("in_proj_qkvz.weight_scale", 0, 1)],
        &[],
    );
}

#[test]
fn compressed_tensors() {
    let shapes: Shapes<'_> = &[
        ("in_proj_qkvz.weight_packed", Dtype::I32, &[128, 8]),
        ("in_proj_qkvz.weight_scale", Dtype::BF16, &[128, 2]),
        ("in_proj_qkvz.weight_zero_point", Dtype::I32, &[16, 2]),
        ("in_proj_qkvz.weight_shape", Dtype::I64, &[2]),
        ("in_proj_qkvz.weight_g_idx", Dtype::I32, &[64]),
        BA,
    ];
    assert_all_follow(
        shapes,
        &[
            ("in_proj_qkvz.weight_packed", 0, 1),
            ("in_proj_qkvz.weight_scale", 0, 1),
            ("in_proj_qkvz.weight_zero_point", 0, 8),
        ],
        &["in_proj_qkvz.weight_g_idx"],
    );
    // The shapes of the parts are their own.
    let temp = TempDir::new().unwrap();
    let [source, fused, separate] = ["source", "fused", "separate"].map(|name| temp.path().join(name));
    checkpoint(&source, &small_heads(), shapes);
    repack(&source, &fused, &[]);
    repack(&source, &separate, &["--names", "separate"]);
    for (dir, module, outputs) in
        [(&fused, "in_proj_qkvz", 128i64), (&separate, "in_proj_qkv", 96), (&separate, "in_proj_z", 32)]
    {
        let tensor = &tensors(dir)[&format!("{LAYER}.{module}.weight_shape")];
        assert_eq!(tensor.data, [outputs, 64].map(i64::to_le_bytes).concat(), "{module}");
    }
}

#[test]
fn gptq_and_awq() {
    let (scales, qzeros) = (("in_proj_qkvz.scales", 1, 1), ("in_proj_qkvz.qzeros", 1, 8));
    assert_all_follow(
        &[
            ("in_proj_qkvz.qweight", Dtype::I32, &[8, 128]),
            ("in_proj_qkvz.qzeros", Dtype::I32, &[2, 16]),
            ("in_proj_qkvz.scales", Dtype::F16, &[2, 128]),
            ("in_proj_qkvz.g_idx", Dtype::I32, &[64]),
            BA,
        ],
        &[("in_proj_qkvz.qweight", 1, 1), scales, qzeros],
        &["in_proj_qkvz.g_idx"],
    );
    assert_all_follow(
        &[
            ("in_proj_qkvz.qweight", Dtype::I32, &[64, 16]),
            ("in_proj_qkvz.qzeros", Dtype::I32, &[2, 16]),
            ("in_proj_qkvz.scales", Dtype::F16, &[2, 128]),
            BA,
        ],
        &[("in_proj_qkvz.qweight", 1, 8), scales, qzeros],
        &[],
    );
}

#[test]
fn lora_adapters() {
    assert_all_follow(
        &[
            ("in_proj_qkvz.lora_A.weight", Dtype::BF16, &[4, 64]),
            ("in_proj_qkvz.lora_B.weight", Dtype::BF16, &[128, 4]),
            ("in_proj_qkvz.lora_magnitude_vector", Dtype::BF16, &[128]),
            ("in_proj_ba.lora_A.default.weight", Dtype::BF16, &[4, 64]),
            ("in_proj_ba.lora_B.default.weight", Dtype::BF16, &[8, 4]),
        ],
        &[
            ("in_proj_qkvz.lora_B.weight", 0, 1),
            ("in_proj_qkvz.lora_magnitude_vector", 0, 1),
            ("in_proj_ba.lora_B.default.weight", 0, 1),
        ],
        &["in_proj_qkvz.lora_A.weight", "in_proj_ba.lora_A.default.weight"],
    );
}

#[test]
fn what_cannot_follow_is_named() {
    let heads = small_heads();
    let narrow = Heads::new(2, 4, 64, 128).unwrap();
    let cases: &[(Heads, Shapes<'_>, &[&str])] = &[
        (
            heads,
            &[("in_proj_ba.qzeros", Dtype::I32, &[2, 1])],
            &["in_proj_ba.qzeros", "every 8 outputs are packed together"],
        ),
        (
            heads,
            &[("in_proj_qkvz.qzeros", Dtype::I32, &[2, 12])],
            &["in_proj_qkvz.qzeros", "128 outputs in 12 elements"],
        ),
        (heads, &[("in_proj_qkvz.weight", Dtype::BF16, &[120, 64])], &["in_proj_qkvz.weight", "120", "128"]),
        (heads, &[("in_proj_qkvz.B", Dtype::I32, &[8, 8])], &["in_proj_qkvz.B", "not known"]),
        (
            narrow,
            &[
                ("in_proj_qkvz.weight", Dtype::F8_E4M3, &[1280, 8]),
                ("in_proj_qkvz.weight_scale_inv", Dtype::F32, &[10, 1]),
            ],
            &["in_proj_qkvz.weight_scale_inv", "block 0 of 128 outputs", "blocks 0 and 5"],
        ),
    ];
    let temp = TempDir::new().unwrap();
    let out = temp.path().join("out");
    for (number, (heads, shapes, parts)) in cases.iter().enumerate() {
        let source = temp.path().join(number.to_string());
        checkpoint(&source, heads, shapes);
        fails(&["repack", text(&source), "-o", text(&out)], parts);
        assert!(!out.exists() && !temp.path().join("out.partial").exists());
    }
}

#[test]
fn parts_that_do_not_go_together() {
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    let run = |shapes: Shapes<'_>, parts: &[&str]| {
        checkpoint(&at("source"), &small_heads(), shapes);
        fails(&["repack", text(&at("source")), "-o", text(&at("out")), "--to", "interleaved"], parts);
        assert!(!at("out").exists());
    };
    let bf16 = Dtype::BF16;
    run(&[("in_proj_b.weight", bf16, &[4, 64])], &["in_proj_b.weight", "in_proj_a.weight' is missing"]);
    run(&[("in_proj_a.weight", bf16, &[4, 64])], &["in_proj_a.weight", "in_proj_b.weight' is missing"]);
    run(
        &[("in_proj_b.weight", bf16, &[4, 64]), ("in_proj_a.weight", Dtype::F16, &[4, 64])],
        &["BF16", "F16", "in_proj_a.weight"],
    );
    run(
        &[("in_proj_b.weight", bf16, &[4, 64]), ("in_proj_a.weight", bf16, &[4, 32])],
        &["[4, 64]", "[4, 32]", "in_proj_a.weight"],
    );
    run(
        &[("in_proj_b.lora_A.weight", bf16, &[2, 64]), ("in_proj_a.lora_A.weight", bf16, &[2, 64])],
        &["in_proj_b.lora_A.weight", "differs from"],
    );
    run(&[BA, ("in_proj_b.weight", bf16, &[4, 64])], &["both", "in_proj_ba.weight", "in_proj_b.weight"]);
}

#[test]
fn done_is_done() {
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    let source = testdata("qwen3-next");
    let run = |from: &Path, rest: &[&str], parts: &[&str]| {
        fails(&[&["repack", text(from), "-o", text(&at("x"))], rest].concat(), parts);
        assert!(!at("x").exists() && !at("x.partial").exists());
    };
    run(&source, &["--to", "interleaved"], &["interleaved already"]);
    let other = ["--num-k-heads", "3", "--num-v-heads", "3", "--head-k-dim", "8", "--head-v-dim", "16"];
    run(&source, &other, &["in_proj_ba.weight", "[12, 32]", "6 outputs"]);
    repack(&source, &at("fused"), &[]);
    repack(&source, &at("separate"), &["--names", "separate"]);
    for name in ["fused", "separate"] {
        run(&at(name), &[], &["repacked before", "contiguous already"]);
        run(&at(name), &["--names", "separate"], &["repacked before"]);
        fails(&["repack", text(&source), "-o", text(&at(name))], &["there already"]);
    }
    run(&at("fused"), &["--to", "interleaved", "--preset", "Qwen3.6-27B"], &["16+48", "3+6"]);
    run(&at("fused"), &["--to", "interleaved", "--names", "separate"], &["--names separate"]);

    // One file of the original among the rest.
    let name = "model-00001-of-00004.safetensors";
    fs::copy(source.join(name), at("fused").join(name)).unwrap();
    run(&at("fused"), &["--to", "interleaved"], &[name, "not repacked", "contiguous"]);
    // The record has the heads, with or without a configuration.
    fs::remove_file(at("separate").join("config.json")).unwrap();
    repack(&at("separate"), &at("back"), &["--to", "interleaved"]);
    assert!(tensors(&at("back")) == tensors(&source));
    fs::create_dir(at("bare")).unwrap();
    fs::copy(testdata("fp8").join("model.safetensors"), at("bare").join("model.safetensors")).unwrap();
    run(&at("bare"), &[], &["no config.json", "--preset"]);
    // Weights in other formats would be the old ones beside the new.
    fs::copy(testdata("fp8").join("config.json"), at("bare").join("config.json")).unwrap();
    fs::write(at("bare").join("pytorch_model.bin"), "old").unwrap();
    fs::create_dir(at("bare/original")).unwrap();
    let notes = repack(&at("bare"), &at("x"), &[]);
    assert!(notes.contains("not carried over: original, pytorch_model.bin"), "{notes}");
    assert_eq!(files(&at("x")).keys().collect::<Vec<_>>(), ["config.json", "model.safetensors"]);
}

/// A copy of a checkpoint that may be changed.
fn copy_of(source: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for (name, bytes) in files(source) {
        fs::write(to.join(name), bytes).unwrap();
    }
}

#[test]
fn indexes() {
    let temp = TempDir::new().unwrap();
    let source = temp.path().join("source");
    copy_of(&testdata("qwen3-next"), &source);
    let path = source.join("model.safetensors.index.json");
    let original = fs::read_to_string(&path).unwrap();
    let tensor = "model.layers.1.linear_attn.in_proj_ba.weight";
    let with_file = |file: Option<&str>| {
        let mut json: serde_json::Value = serde_json::from_str(&original).unwrap();
        let map = json["weight_map"].as_object_mut().unwrap();
        match file {
            Some(file) => map.insert(tensor.to_owned(), file.into()),
            None => map.remove(tensor),
        };
        fs::write(&path, json.to_string()).unwrap();
    };
    let out = temp.path().join("out");
    let args = ["repack", text(&source), "-o", text(&out)];
    for (file, part) in [
        ("../model.safetensors", "no plain file name"),
        ("/etc/model.safetensors", "no plain file name"),
        ("model-00009-of-00004.safetensors", "not there"),
        ("model-00004-of-00004.safetensors", "does not have it"),
        ("config.json", "no safetensors file"),
    ] {
        with_file(Some(file));
        fails(&args, &[tensor, file, part]);
    }
    fs::write(&path, "{").unwrap();
    fails(&args, &["index.json", "JSON"]);
    fs::write(&path, "[]").unwrap();
    fails(&args, &["weight_map"]);
    assert!(!out.exists());

    // An entry that is missing is named, the tensor repacked, and the new index has it.
    with_file(None);
    let notes = succeeds(&args);
    assert!(notes.contains(tensor), "{notes}");
    assert_eq!(fs::read_to_string(out.join("model.safetensors.index.json")).unwrap(), original);
    verify(&out, &source);

    // Separate names in the index, and the bytes they take.
    fs::write(&path, &original).unwrap();
    let separate = temp.path().join("separate");
    repack(&source, &separate, &["--names", "separate"]);
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(separate.join("model.safetensors.index.json")).unwrap()).unwrap();
    let all = tensors(&separate);
    let named: Vec<&String> = index["weight_map"].as_object().unwrap().keys().collect();
    assert_eq!(named, all.keys().collect::<Vec<_>>());
    assert_eq!(index["metadata"]["total_size"], all.values().map(|t| t.data.len()).sum::<usize>());
}

#[test]
fn hostile_files() {
    let temp = TempDir::new().unwrap();
    let (source, out) = (temp.path().join("source"), temp.path().join("out"));
    fs::create_dir(&source).unwrap();
    fs::copy(testdata("qwen3-next").join("config.json"), source.join("config.json")).unwrap();
    let name = format!("{LAYER}.in_proj_ba.weight");
    let file = |header: &str, data: usize| {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
    };
    let entry = |shape: &str, start: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"BF16","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let good = entry("[12,1]", 0, 24);
    let max = u64::MAX;
    let long = [max.to_le_bytes(), [0; 8]].concat();
    let cut = [1000u64.to_le_bytes(), [0; 8]].concat();
    let overlapping = r#""x":{"dtype":"BF16","shape":[12],"data_offsets":[12,36]}"#;
    for bytes in [
        vec![],
        vec![1, 2, 3],
        long,
        cut,
        file("{", 0),
        file("[]", 0),
        file(&format!("{{{good}}}"), 23),
        file(&format!("{{{good}}}"), 25),
        file(&format!("{{{good},{overlapping}}}"), 36),
        file(&format!("{{{}}}", entry("[12,1]", 24, 0)), 24),
        file(&format!("{{{}}}", entry("[12,1]", max, max)), 24),
        file(&format!("{{{}}}", entry(&format!("[{max},{max}]"), 0, 24)), 24),
        file(&format!("{{{}}}", entry("[0,12]", 0, 0)), 0),
        file(&format!("{{{}}}", entry("[]", 0, 2)), 2),
        file(&format!(r#"{{"__metadata__":{{"x":1}},{good}}}"#), 24),
        file(&format!(r#"{{"__metadata__":{{"gdn.packing":"?"}},{good}}}"#), 24),
        file(&format!(r#"{{"__metadata__":{{"gdn.packing":"contiguous"}},{good}}}"#), 24),
    ] {
        fs::write(source.join("model.safetensors"), bytes).unwrap();
        fails(&["repack", text(&source), "-o", text(&out)], &[]);
        fails(&["verify", text(&testdata("fp8")), "--against", text(&source)], &[]);
        assert!(!out.exists());
    }
    // No input features are nothing to move, and nothing wrong.
    fs::write(source.join("model.safetensors"), file(&format!("{{{}}}", entry("[12,0]", 0, 0)), 0)).unwrap();
    repack(&source, &out, &[]);
    verify(&out, &source);
}

#[test]
fn a_run_is_taken_up_where_it_ended() {
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    let source = testdata("qwen3-next");
    repack(&source, &at("whole"), &[]);

    // As a run leaves it that was killed in its second file.
    let first = "model-00001-of-00004.safetensors";
    let start = || {
        let _ = fs::remove_dir_all(at("out.partial"));
        fs::create_dir(at("out.partial")).unwrap();
        fs::copy(at("whole").join(first), at("out.partial").join(first)).unwrap();
        fs::write(at("out.partial/.gdn-Xy12.tmp"), "half").unwrap();
    };
    start();
    let finished = fs::metadata(at("out.partial").join(first)).unwrap().modified().unwrap();
    let notes = repack(&source, &at("out"), &[]);
    assert!(notes.contains(first), "{notes}");
    assert_same_files(&at("out"), &at("whole"));
    assert_eq!(
        fs::metadata(at("out").join(first)).unwrap().modified().unwrap(),
        finished,
        "not written again"
    );
    assert!(!at("out.partial").exists());

    // A finished file with one wrong byte, and one of a run with other arguments.
    fs::remove_dir_all(at("out")).unwrap();
    start();
    let path = at("out.partial").join(first);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let out = at("out");
    let args = ["repack", text(&source), "-o", text(&out)];
    fails(&args, &[first, "differs from byte", "delete it"]);
    start();
    fails(&[&args[..], &["--names", "separate"]].concat(), &[first, "other arguments"]);
    assert!(!out.exists());

    // Another run has the folder.
    let lock = fs::File::create(at("out.partial/.gdn-lock")).unwrap();
    lock.lock().unwrap();
    fails(&args, &["another run is writing"]);
    drop(lock);
    repack(&source, &out, &[]);
    assert_same_files(&out, &at("whole"));
}

#[test]
fn verify_sees_every_change() {
    let temp = TempDir::new().unwrap();
    let source = testdata("qwen3-next");
    let there = temp.path().join("there");
    repack(&source, &there, &[]);
    let args = ["verify", text(&there), "--against", text(&source)];
    let mut seen = 0;
    for (file, bytes) in files(&there) {
        let mut change = |at: usize, parts: &[&str]| {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            fs::write(there.join(&file), bad).unwrap();
            fails(&args, parts);
            seen += 1;
        };
        if file.ends_with(".safetensors") {
            let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
            for (name, info) in metadata.tensors() {
                change(8 + header + info.data_offsets.0 + 5, &[&file, &name, "differs from byte 5"]);
            }
        } else {
            change(bytes.len() - 1, &[]);
        }
        fs::remove_file(there.join(&file)).unwrap();
        fails(&args, &[]);
        fs::write(there.join(&file), bytes).unwrap();
    }
    assert!(seen > 50, "{seen}");
    succeeds(&args);
    fs::copy(there.join("model-00001-of-00004.safetensors"), there.join("more.safetensors")).unwrap();
    fails(&args, &["more.safetensors is not in"]);
}

#[cfg(unix)]
#[test]
fn links_are_read_and_never_written_through() {
    use std::os::unix::fs::symlink;
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    // As Hugging Face's cache has it.
    copy_of(&testdata("qwen3-next"), &at("blobs"));
    fs::create_dir(at("snapshot")).unwrap();
    for name in files(&at("blobs")).keys() {
        symlink(Path::new("../blobs").join(name), at("snapshot").join(name)).unwrap();
    }
    repack(&at("snapshot"), &at("out"), &[]);
    verify(&at("out"), &testdata("qwen3-next"));
    assert_same_files(&at("blobs"), &testdata("qwen3-next"));
    for entry in fs::read_dir(at("out")).unwrap() {
        assert!(entry.unwrap().file_type().unwrap().is_file(), "files, no links");
    }

    fs::create_dir(at("elsewhere")).unwrap();
    symlink(at("elsewhere"), at("link")).unwrap();
    fails(&["repack", text(&at("snapshot")), "-o", text(&at("link"))], &["symbolic link"]);
    symlink(at("elsewhere"), at("new.partial")).unwrap();
    fails(&["repack", text(&at("snapshot")), "-o", text(&at("new"))], &["new.partial", "no folder"]);
    fs::remove_file(at("new.partial")).unwrap();
    // Links in a folder that a run goes on with.
    fs::create_dir(at("new.partial")).unwrap();
    symlink(at("blobs/config.json"), at("new.partial/config.json")).unwrap();
    repack(&at("snapshot"), &at("new"), &[]);
    assert_same_files(&at("blobs"), &testdata("qwen3-next"));
    assert_same_files(&at("new"), &at("out"));
    assert_eq!(fs::read_dir(at("elsewhere")).unwrap().count(), 0);
    fails(&["repack", text(&at("blobs")), "-o", text(&at("blobs/out"))], &["within the source"]);
    assert!(!at("blobs/out.partial").exists());
}

/// A checkpoint with one more tensor of so many bytes, which take no space.
#[cfg(target_os = "linux")]
fn huge(dir: &Path, bytes: u64) {
    use std::io::Write;
    copy_of(&testdata("fp8"), dir);
    let header = format!(r#"{{"big":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
    let mut file = fs::File::create(dir.join("zzz.safetensors")).unwrap();
    file.write_all(&[&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    file.set_len(8 + header.len() as u64 + bytes).unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_too_small_is_known_before() {
    let temp = TempDir::new().unwrap();
    let (source, out) = (temp.path().join("source"), temp.path().join("out"));
    let bytes = 8u64 << 40;
    huge(&source, bytes);
    fails(&["repack", text(&source), "-o", text(&out)], &["no space", "takes 87960", "are available"]);
    let left: Vec<String> = files(&temp.path().join("out.partial")).into_keys().collect();
    assert_eq!(left, [".gdn-lock"], "no work was done");
}

#[cfg(target_os = "linux")]
#[test]
fn interrupted_and_taken_up() {
    let temp = TempDir::new().unwrap();
    let (source, out) = (temp.path().join("source"), temp.path().join("out"));
    let partial = temp.path().join("out.partial");
    huge(&source, 256 << 20);
    let mut child = Command::new(BIN)
        .args(["repack", text(&source), "-o", text(&out)])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Until the second file is under way.
    let is_second = |entry: fs::DirEntry| {
        entry.file_name().to_string_lossy().ends_with(".tmp")
            && entry.metadata().is_ok_and(|metadata| metadata.len() > 200 << 20)
    };
    while !fs::read_dir(&partial).is_ok_and(|mut entries| entries.any(|e| e.is_ok_and(is_second))) {
        assert!(child.try_wait().unwrap().is_none(), "it came to its end too early");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{error}");
    assert!(error.contains("goes on from there"), "{error}");
    assert!(!out.exists());
    let left: Vec<String> = files(&partial).into_keys().collect();
    assert_eq!(left, [".gdn-lock", "model.safetensors"], "whole files alone");
    let notes = repack(&source, &out, &[]);
    assert!(notes.contains("model.safetensors is there"), "{notes}");
    verify(&out, &source);
}
