//! The projections of transformers' own layers, from weights before and after.

use std::{collections::BTreeMap, fs, path::Path};

use gdn::Heads;
use safetensors::Dtype;
use tempfile::TempDir;

use crate::checkpoints::*;

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
