//! What follows the outputs of a projection, output by output, and what cannot.

use std::path::Path;

use gdn::{Heads, Packing, reference};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::checkpoints::*;

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

/// What becomes of the tensors: those that follow the outputs along a dim, so many in an element, and those
/// that are kept.
fn assert_all_follow(
    quantization: Value,
    shapes: Shapes<'_>,
    follows: &[(&str, usize, usize)],
    kept: &[&str],
) {
    let heads = small_heads();
    for names in ["fused", "separate"] {
        let temp = TempDir::new().unwrap();
        let [source, there, back] = ["source", "there", "back"].map(|name| temp.path().join(name));
        checkpoint(&source, &heads, &quantization, shapes);
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
        Value::Null,
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
        json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}}}),
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
        json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}}}),
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
fn a_block_that_both_parts_lie_in() {
    let shapes: Shapes<'_> = &[
        ("in_proj_ba.weight", Dtype::F8_E4M3, &[8, 256]),
        ("in_proj_ba.weight_scale_inv", Dtype::F32, &[1, 2]),
    ];
    let fp8 = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    assert_all_follow(fp8.clone(), shapes, &[("in_proj_ba.weight", 0, 1)], &["in_proj_ba.weight_scale_inv"]);
    // Scales of their own, as noise is.
    let temp = TempDir::new().unwrap();
    let (source, out) = (temp.path().join("source"), temp.path().join("out"));
    let scales = ["in_proj_b.weight_scale_inv", "in_proj_a.weight_scale_inv"];
    checkpoint(&source, &small_heads(), &fp8, &scales.map(|name| (name, Dtype::F32, &[1, 2][..])));
    fails(
        &["repack", text(&source), "-o", text(&out), "--to", "interleaved"],
        &[scales[0], scales[1], "outputs of both parts, whose scales differ"],
    );
}

fn pack_quantized() -> Value {
    let weights = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32});
    json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
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
        pack_quantized(),
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
    checkpoint(&source, &small_heads(), &pack_quantized(), shapes);
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
        json!({"quant_method": "gptq", "bits": 4}),
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
        json!({"quant_method": "awq", "bits": 4, "version": "gemm"}),
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
        Value::Null,
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
    let gptq = json!({"quant_method": "gptq", "bits": 4});
    let fp8 = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    let cases: &[(Heads, Value, Shapes<'_>, &[&str])] = &[
        (
            heads,
            gptq.clone(),
            &[("in_proj_ba.qzeros", Dtype::I32, &[2, 1])],
            &["in_proj_ba.qzeros", "every 8 outputs are packed together"],
        ),
        (
            heads,
            gptq.clone(),
            &[("in_proj_qkvz.qzeros", Dtype::I32, &[2, 12])],
            &["in_proj_qkvz.qzeros", "128 outputs need 16 indices in dim 1"],
        ),
        (
            heads,
            Value::Null,
            &[("in_proj_qkvz.weight", Dtype::BF16, &[120, 64])],
            &["in_proj_qkvz.weight", "120", "128"],
        ),
        (heads, gptq, &[("in_proj_qkvz.B", Dtype::I32, &[8, 8])], &["in_proj_qkvz.B", "not known"]),
        (
            narrow,
            fp8,
            &[
                ("in_proj_qkvz.weight", Dtype::F8_E4M3, &[1280, 8]),
                ("in_proj_qkvz.weight_scale_inv", Dtype::F32, &[10, 1]),
            ],
            &["in_proj_qkvz.weight_scale_inv", "block 0 of 128 outputs", "blocks 0 and 5"],
        ),
    ];
    let temp = TempDir::new().unwrap();
    let out = temp.path().join("out");
    for (number, (heads, quantization, shapes, parts)) in cases.iter().enumerate() {
        let source = temp.path().join(number.to_string());
        checkpoint(&source, heads, quantization, shapes);
        fails(&["repack", text(&source), "-o", text(&out)], parts);
        assert!(!out.exists() && !temp.path().join("out.partial").exists());
    }
}

#[test]
fn parts_that_do_not_go_together() {
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    let run = |shapes: Shapes<'_>, parts: &[&str]| {
        checkpoint(&at("source"), &small_heads(), &Value::Null, shapes);
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
