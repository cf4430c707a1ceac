//! Quantisations by what is declared of them, and such as nothing declares.

use std::fs;

use gdn::Heads;
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::checkpoints::*;

/// 128 outputs of `in_proj_qkvz`, 8 of `in_proj_ba`.
fn heads() -> Heads {
    Heads::new(2, 4, 16, 8).unwrap()
}

const BA: (&str, Dtype, &[usize]) = ("in_proj_ba.weight", Dtype::BF16, &[8, 64]);

/// What a checkpoint with this config and these tensors is refused for.
#[track_caller]
fn is_refused(config: &Value, shapes: Shapes<'_>, parts: &[&str]) {
    let temp = TempDir::new().unwrap();
    let (source, out) = (temp.path().join("source"), temp.path().join("out"));
    made(&source, config, shapes);
    fails(&["repack", text(&source), "-o", text(&out)], parts);
    assert!(!out.exists() && !temp.path().join("out.partial").exists());
}

/// A checkpoint with more keys in its config.
fn made(dir: &std::path::Path, config: &Value, shapes: Shapes<'_>) {
    checkpoint(dir, &heads(), &Value::Null, shapes);
    let path = dir.join("config.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value) in config.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    fs::write(path, json.to_string()).unwrap();
}

/// The rows or columns of a tensor of `in_proj_qkvz` after a repacking, in the order they had.
fn order(before: &Tensor, after: &Tensor, dim: usize) -> Vec<usize> {
    let (before, after) = (by_output(before, dim, 1), by_output(after, dim, 1));
    after.iter().map(|output| before.iter().position(|other| other == output).unwrap()).collect()
}

#[test]
fn the_axis_is_what_the_format_says_where_the_shape_would_allow_both() {
    let scales: Shapes<'_> = &[("in_proj_qkvz.scales", Dtype::F16, &[128, 128]), BA];
    let quantization = |config: Value| json!({"quantization_config": config});
    let name = format!("{LAYER}.in_proj_qkvz.scales");
    for (config, dim) in [
        (quantization(json!({"quant_method": "gptq", "bits": 4})), 1),
        (quantization(json!({"quant_method": "awq", "bits": 4, "version": "GEMM"})), 1),
        (quantization(json!({"quant_method": "awq", "bits": 4, "version": "gemv"})), 0),
        (
            quantization(
                json!({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}),
            ),
            1,
        ),
        (json!({"quantization": {"bits": 4, "group_size": 64}}), 0),
    ] {
        let temp = TempDir::new().unwrap();
        let at = |name: &str| temp.path().join(name);
        made(&at("source"), &config, scales);
        repack(&at("source"), &at("there"), &[]);
        verify(&at("there"), &at("source"));
        let [before, after] = ["source", "there"].map(|dir| tensors(&at(dir))[&name].clone());
        let moved = order(&before, &after, dim);
        assert_eq!(moved[..17], [&(0..16).collect::<Vec<_>>()[..], &[64]].concat(), "{config}");
        // Had the other dim moved, it would be seen.
        let wrong = at("wrong");
        copy_of(&at("there"), &wrong);
        let mut all = tensors(&wrong);
        let mut transposed = Tensor { data: Vec::new(), ..before.clone() };
        let outputs = by_output(&before, 1 - dim, 1);
        let columns: Vec<&Vec<u8>> = moved.iter().map(|from| &outputs[*from]).collect();
        transposed.data = match 1 - dim {
            0 => columns.into_iter().flatten().copied().collect(),
            _ => (0..128).flat_map(|n| columns.iter().flat_map(move |c| c[2 * n..][..2].to_vec())).collect(),
        };
        all.insert(name.clone(), transposed);
        rewrite(&wrong.join("model.safetensors"), &all);
        fails(
            &["verify", text(&wrong), "--against", text(&at("source"))],
            &["in_proj_qkvz.scales", "differs"],
        );
    }
}

#[test]
fn what_is_not_declared_is_refused_by_name() {
    let scales: Shapes<'_> = &[("in_proj_qkvz.scales", Dtype::F16, &[128, 128]), BA];
    let scale: Shapes<'_> = &[("in_proj_qkvz.weight_scale", Dtype::F32, &[128, 1]), BA];
    is_refused(&Value::Null, scales, &["in_proj_qkvz.scales", "'scales' follows", "declared"]);
    is_refused(&Value::Null, scale, &["'weight_scale' follows"]);
    for (config, shapes, part) in [
        (json!({"quantization_config": {"quant_method": "hqq"}}), scales, "'hqq'"),
        (json!({"quantization_config": {"quant_method": "fp8"}}), scales, "has no such tensor"),
        (json!({"quantization_config": {"quant_method": "gptq"}}), scales, "'bits'"),
        (json!({"quantization_config": {"quant_method": "gptq", "bits": 3}}), scales, "3 bits"),
        (
            json!({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "marlin"}}),
            scales,
            "marlin",
        ),
        (
            json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}}),
            scale,
            "W4A16_AWQ",
        ),
        (json!({"quantization_config": {"quant_method": "compressed-tensors"}}), scale, "config_groups"),
        (json!({"quantization": {"bits": 4, "mode": "mxfp4"}}), scales, "mxfp4"),
    ] {
        is_refused(&config, shapes, &[part]);
    }
    // A weight of a module that is left alone is what it always is.
    let temp = TempDir::new().unwrap();
    let (source, there) = (temp.path().join("source"), temp.path().join("there"));
    let plain: Shapes<'_> = &[("in_proj_qkvz.weight", Dtype::BF16, &[128, 64]), BA];
    made(&source, &json!({"quantization_config": {"quant_method": "hqq"}}), plain);
    repack(&source, &there, &[]);
    verify(&there, &source);
}

#[test]
fn every_group_has_blocks_of_its_own() {
    let group = |targets: Value, rows: usize| {
        json!({"targets": targets,
            "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [rows, 128]}})
    };
    let config = |qkvz: Value, other: Value| {
        json!({"quantization_config": {"quant_method": "compressed-tensors",
            "config_groups": {"group_0": other, "group_1": qkvz}}})
    };
    // 16 outputs a block, where the first group says 128.
    let shapes: Shapes<'_> = &[
        ("in_proj_qkvz.weight", Dtype::F8_E4M3, &[128, 64]),
        ("in_proj_qkvz.weight_scale", Dtype::F32, &[8, 1]),
        BA,
    ];
    let module = format!("{LAYER}.in_proj_qkvz");
    for targets in
        [json!([module]), json!(["re:.*in_proj_qkvz$"]), json!(["x", "re:mtp\\..*\\.in_proj_[qz]"])]
    {
        let temp = TempDir::new().unwrap();
        let at = |name: &str| temp.path().join(name);
        made(&at("source"), &config(group(targets, 16), group(json!(["Linear"]), 128)), shapes);
        for names in ["fused", "separate"] {
            repack(&at("source"), &at(names), &["--names", names]);
            verify(&at(names), &at("source"));
            let back = at(&format!("{names}-back"));
            repack(&at(names), &back, &["--to", "interleaved"]);
            assert_same_files(&back, &at("source"));
        }
    }
    is_refused(
        &config(group(json!(["x"]), 16), group(json!(["Linear"]), 128)),
        shapes,
        &["weight_scale", "need 1 "],
    );
    is_refused(
        &config(group(json!(["x"]), 16), group(json!(["y"]), 128)),
        shapes,
        &["weight_scale", "declared"],
    );
    is_refused(
        &config(group(json!(["Linear"]), 16), group(json!(["Linear"]), 128)),
        shapes,
        &["two of config.json's config_groups", &module],
    );
    is_refused(
        &config(group(json!(["re:(?=x)"]), 16), group(json!(["Linear"]), 128)),
        shapes,
        &["re:(?=x)", "not understood"],
    );
}

#[test]
fn zero_points_that_are_all_equal_may_stay_packed() {
    let gptq = json!({"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": true}});
    // 64 outputs of `in_proj_ba`, two for each key head, eight in an integer.
    let heads = Heads::new(16, 32, 8, 8).unwrap();
    let qzeros = |row: [u32; 2]| {
        let data = row.iter().flat_map(|word| word.to_le_bytes().repeat(8)).collect();
        Tensor { dtype: Dtype::I32, shape: vec![2, 8], data }
    };
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    let write = |zeros: Tensor| {
        let _ = fs::remove_dir_all(at("source"));
        checkpoint(&at("source"), &heads, &gptq["quantization_config"], &[]);
        let (qweight, scales) = (vec![8, 64], vec![2, 64]);
        let tensor = |dtype: Dtype, shape: Vec<usize>| {
            let data = noise(shape.iter().product::<usize>() * dtype.bitsize() / 8, 3);
            Tensor { dtype, shape, data }
        };
        let all = [
            (format!("{LAYER}.in_proj_ba.qweight"), tensor(Dtype::I32, qweight)),
            (format!("{LAYER}.in_proj_ba.qzeros"), zeros),
            (format!("{LAYER}.in_proj_ba.scales"), tensor(Dtype::F16, scales)),
        ];
        save(&at("source").join("model.safetensors"), &all);
    };
    write(qzeros([0x7777_7777, 0x8888_8888]));
    for names in ["fused", "separate"] {
        let (there, back) = (at(names), at(&format!("{names}-back")));
        repack(&at("source"), &there, &["--names", names]);
        verify(&there, &at("source"));
        if names == "separate" {
            let zeros = &tensors(&there)[&format!("{LAYER}.in_proj_a.qzeros")];
            assert_eq!(
                (&zeros.shape[..], &zeros.data[..5]),
                (&[2, 4][..], &[0x77, 0x77, 0x77, 0x77, 0x77][..])
            );
        }
        repack(&there, &back, &["--to", "interleaved"]);
        verify(&back, &there);
        assert_same_files(&back, &at("source"));
        // Another value in one place is seen.
        let mut file = fs::read(there.join("model.safetensors")).unwrap();
        let at_zero = file.windows(4).position(|bytes| bytes == [0x88; 4]).unwrap();
        file[at_zero] = 0x87;
        fs::write(there.join("model.safetensors"), file).unwrap();
        fails(&["verify", text(&there), "--against", text(&at("source"))], &["qzeros", "differs"]);
    }
    // Two that differ within an integer, and two integers that differ.
    for row in [[0x7777_7778, 0x8888_8888], [0x7777_7777, 0x8988_8888]] {
        write(qzeros(row));
        let out = at("out");
        fails(&["repack", text(&at("source")), "-o", text(&out)], &["qzeros", "every 8 outputs are packed"]);
    }
    let mut zeros = qzeros([0x7777_7777, 0x8888_8888]);
    zeros.data[..4].fill(0x66);
    write(zeros);
    let out = at("out");
    fails(&["repack", text(&at("source")), "-o", text(&out)], &["qzeros", "every 8 outputs are packed"]);
}

#[test]
fn vectors_of_modelslim_and_of_the_inputs() {
    let shapes: Shapes<'_> = &[
        ("in_proj_qkvz.weight", Dtype::I8, &[128, 64]),
        ("in_proj_qkvz.weight_scale", Dtype::BF16, &[128, 1]),
        ("in_proj_qkvz.weight_offset", Dtype::BF16, &[128, 1]),
        ("in_proj_qkvz.deq_scale", Dtype::F32, &[128]),
        ("in_proj_qkvz.quant_bias", Dtype::I32, &[128]),
        ("in_proj_qkvz.input_scale", Dtype::BF16, &[1]),
        ("in_proj_qkvz.input_offset", Dtype::BF16, &[1]),
        BA,
    ];
    let describe = |word: &str| {
        json!({format!("{LAYER}.in_proj_qkvz.weight"): word, format!("{LAYER}.in_proj_ba.weight"): "FLOAT",
            "model_quant_type": word})
    };
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    made(&at("source"), &json!({"quantization_config": {"quant_method": "ascend"}}), shapes);
    let description = at("source").join("quant_model_description.json");
    fs::write(&description, describe("W8A8").to_string()).unwrap();
    for names in ["fused", "separate"] {
        repack(&at("source"), &at(names), &["--names", names]);
        verify(&at(names), &at("source"));
        let back = at(&format!("{names}-back"));
        repack(&at(names), &back, &["--to", "interleaved"]);
        verify(&back, &at("source"));
        assert_same_files(&back, &at("source"));
    }
    let all = tensors(&at("fused"));
    for vector in ["weight_scale", "weight_offset", "deq_scale", "quant_bias"] {
        let name = format!("{LAYER}.in_proj_qkvz.{vector}");
        let moved = order(&tensors(&at("source"))[&name], &all[&name], 0);
        assert_eq!(moved[..17], [&(0..16).collect::<Vec<_>>()[..], &[64]].concat(), "{vector}");
    }
    fs::write(&description, describe("W4A8_DYNAMIC").to_string()).unwrap();
    let out = at("out");
    fails(&["repack", text(&at("source")), "-o", text(&out)], &["'W4A8_DYNAMIC'"]);

    // As long as there are outputs, and it speaks of the inputs.
    let shapes: Shapes<'_> = &[
        ("in_proj_qkvz.weight", Dtype::U8, &[128, 64]),
        ("in_proj_qkvz.weight_scale", Dtype::F8_E4M3, &[128, 8]),
        ("in_proj_qkvz.weight_scale_2", Dtype::F32, &[]),
        ("in_proj_qkvz.pre_quant_scale", Dtype::BF16, &[128]),
        BA,
    ];
    made(&at("modelopt"), &Value::Null, shapes);
    let config = json!({"producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "NVFP4_AWQ", "exclude_modules": [format!("{LAYER}.in_proj_ba")]}});
    fs::write(at("modelopt").join("hf_quant_config.json"), config.to_string()).unwrap();
    repack(&at("modelopt"), &out, &[]);
    verify(&out, &at("modelopt"));
    let name = format!("{LAYER}.in_proj_qkvz.pre_quant_scale");
    assert_eq!(tensors(&out)[&name], tensors(&at("modelopt"))[&name]);
}

#[test]
fn heads_of_a_thinker() {
    let temp = TempDir::new().unwrap();
    let (source, there) = (temp.path().join("source"), temp.path().join("there"));
    let plain: Shapes<'_> = &[("in_proj_qkvz.weight", Dtype::BF16, &[128, 64]), BA];
    made(&source, &Value::Null, plain);
    let config = json!({
        "model_type": "omni", "linear_num_key_heads": null, "linear_num_value_heads": null,
        "thinker_config": {"text_config": {
            "model_type": "qwen3_next_text", "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 16, "linear_value_head_dim": 8,
        }},
    });
    fs::write(source.join("config.json"), config.to_string()).unwrap();
    repack(&source, &there, &[]);
    verify(&there, &source);
}
