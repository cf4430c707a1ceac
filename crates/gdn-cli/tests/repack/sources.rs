//! Checkpoints as people publish and report them, in which one thing is not as it usually is.

use std::{collections::BTreeMap, fs, path::Path};

use gdn::{Heads, Packing, reference};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::checkpoints::*;

const PREFIX: &str = "model.layers.0.linear_attn";

/// 96 outputs of `in_proj_qkvz`, 8 of `in_proj_ba`.
fn heads() -> Heads {
    Heads::new(2, 4, 8, 8).unwrap()
}

/// A tensor of bf16 noise.
fn tensor(name: &str, shape: &[usize], seed: u64) -> (String, Tensor) {
    let data = noise(2 * shape.iter().product::<usize>(), seed);
    (format!("{PREFIX}.{name}"), Tensor { dtype: Dtype::BF16, shape: shape.to_vec(), data })
}

fn fused(seed: u64) -> Vec<(String, Tensor)> {
    vec![tensor("in_proj_qkvz.weight", &[96, 4], seed), tensor("in_proj_ba.weight", &[8, 4], seed + 1)]
}

fn separate(seed: u64) -> Vec<(String, Tensor)> {
    vec![
        tensor("in_proj_qkv.weight", &[64, 4], seed),
        tensor("in_proj_z.weight", &[32, 4], seed + 1),
        tensor("in_proj_b.weight", &[4, 4], seed + 2),
        tensor("in_proj_a.weight", &[4, 4], seed + 3),
    ]
}

/// A folder with a config, and with more keys in it.
fn folder(dir: &Path, model_type: &str, more: Value) {
    fs::create_dir(dir).unwrap();
    let mut config: Value = serde_json::from_str(&small_config(model_type)).unwrap();
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    fs::write(dir.join("config.json"), format!("{config:#}")).unwrap();
}

fn index(dir: &Path, entries: &[(&str, &str)]) {
    let map: BTreeMap<String, &str> =
        entries.iter().map(|(name, file)| (format!("{PREFIX}.{name}"), *file)).collect();
    let text = format!("{:#}\n", json!({"metadata": {}, "weight_map": map}));
    fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The rows that `in_proj_qkvz` has in contiguous order.
fn contiguous(interleaved: &Tensor) -> Vec<u8> {
    let heads = heads();
    let mut data = vec![0; interleaved.data.len()];
    let row = interleaved.data.len() / heads.qkvz_features();
    for f in 0..heads.qkvz_features() {
        let (tensor, g) = reference::place_of_qkvz(&heads, Packing::Interleaved, f);
        let to = tensor * heads.qkv_features() + g;
        data[to * row..][..row].copy_from_slice(&interleaved.data[f * row..][..row]);
    }
    data
}

/// Repacks with either kind of names, verifies, and undoes; what lies there in between is handed on.
#[track_caller]
fn there_and_back(source: &Path, mut look: impl FnMut(&Path, &str, &str)) {
    for names in ["fused", "separate"] {
        let temp = TempDir::new().unwrap();
        let (there, back) = (temp.path().join("there"), temp.path().join("back"));
        let notes = repack(source, &there, &["--names", names]);
        verify(&there, source);
        look(&there, names, &notes);
        repack(&there, &back, &["--to", "interleaved"]);
        verify(&back, &there);
        verify(&back, source);
        assert_same_files(&back, source);
    }
}

#[test]
fn the_index_decides_which_copy_counts() {
    let name = format!("{PREFIX}.in_proj_qkvz.weight");
    let norm = |seed| tensor("norm.weight", &[8], seed);
    // The old copies come first, in order of the files' names, or last.
    for (live, stale) in [("b.safetensors", "a.safetensors"), ("a.safetensors", "b.safetensors")] {
        let temp = TempDir::new().unwrap();
        let source = temp.path().join("source");
        folder(&source, "qwen3_next", Value::Null);
        save(&source.join(live), &[fused(1), vec![norm(10)]].concat());
        save(&source.join(stale), &[tensor("in_proj_qkvz.weight", &[96, 4], 20), norm(30)]);
        index(&source, &[("in_proj_qkvz.weight", live), ("in_proj_ba.weight", live), ("norm.weight", live)]);
        there_and_back(&source, |there, names, notes| {
            assert!(notes.contains(stale) && notes.contains("old copies"), "{notes}");
            let [whole, old] = [live, stale].map(|file| tensors(&source.join(file)));
            let [new, new_old] = [live, stale].map(|file| tensors(&there.join(file)));
            let get = |all: &BTreeMap<String, Tensor>| match names {
                "fused" => all[&name].data.clone(),
                _ => [
                    &all[&format!("{PREFIX}.in_proj_qkv.weight")],
                    &all[&format!("{PREFIX}.in_proj_z.weight")],
                ]
                .map(|tensor| tensor.data.clone())
                .concat(),
            };
            assert_eq!(get(&new), contiguous(&whole[&name]));
            assert_eq!(get(&new_old), contiguous(&old[&name]));
            for (file, all) in json_of(&there.join("model.safetensors.index.json"))["weight_map"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(tensor, file)| (file, tensor))
            {
                assert_eq!(file, live, "{all}");
            }
            // Either copy in place of the other is noticed.
            for (one, other) in [(live, stale), (stale, live)] {
                let temp = TempDir::new().unwrap();
                let wrong = temp.path().join("wrong");
                copy_of(there, &wrong);
                let mut all = tensors(&there.join(one));
                for (name, tensor) in tensors(&there.join(other)) {
                    all.insert(name, tensor);
                }
                rewrite(&wrong.join(one), &all);
                fails(&["verify", text(&wrong), "--against", text(&source)], &[one]);
            }
        });
    }
}

#[test]
fn an_index_that_lacks_or_invents_and_shards_without_one() {
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    let source = at("source");
    folder(&source, "qwen3_next", Value::Null);
    save(&source.join("a.safetensors"), &fused(1));
    save(&source.join("b.safetensors"), &[tensor("in_proj_qkvz.weight", &[96, 4], 9)]);
    let name = format!("{PREFIX}.in_proj_qkvz.weight");
    let out = at("out");
    let args = ["repack", text(&source), "-o", text(&out)];
    fails(&args, &["a.safetensors", "b.safetensors", &name, "no index says which"]);
    index(&source, &[("in_proj_qkvz.weight", "a.safetensors"), ("in_proj_ba.weight", "b.safetensors")]);
    fails(&args, &["in_proj_ba.weight", "b.safetensors", "does not have it"]);
    assert!(!out.exists());
    // A copy is a copy all the same.
    copy_of(&source, &at("copy"));
    verify(&at("copy"), &source);
    fs::write(at("copy").join("more.txt"), "").unwrap();
    fails(&["verify", text(&at("copy")), "--against", text(&source)], &["b.safetensors"]);
}

#[test]
fn tensors_that_the_index_does_not_name() {
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    let source = at("source");
    folder(&source, "qwen3_next", Value::Null);
    save(&source.join("model.safetensors"), &fused(1));
    let mtp = fused(7).into_iter().map(|(name, tensor)| (name.replace("model.layers", "mtp.layers"), tensor));
    save(&source.join("mtp.safetensors"), &mtp.collect::<Vec<_>>());
    index(
        &source,
        &[("in_proj_qkvz.weight", "model.safetensors"), ("in_proj_ba.weight", "model.safetensors")],
    );
    copy_of(&source, &at("copy"));
    verify(&at("copy"), &source);
    there_and_back(&source, |there, names, notes| {
        assert!(notes.contains("mtp.safetensors") && notes.contains("not in the index"), "{notes}");
        let before = json_of(&source.join("model.safetensors.index.json"));
        let after = json_of(&there.join("model.safetensors.index.json"));
        let entries = |json: &Value| json["weight_map"].as_object().unwrap().len();
        assert_eq!(entries(&after), entries(&before) * if names == "fused" { 1 } else { 2 });
    });
}

#[test]
fn what_is_contiguous_is_never_permuted() {
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    let out = at("out");
    let refused = |source: &Path, rest: &[&str], parts: &[&str]| {
        fails(&[&["repack", text(source), "-o", text(&out)], rest].concat(), parts);
        assert!(!out.exists() && !at("out.partial").exists());
    };
    // Fused names in a model that is contiguous.
    let source = at("source");
    folder(&source, "qwen3_5_text", Value::Null);
    save(&source.join("model.safetensors"), &fused(1));
    refused(&source, &[], &["contiguous already", "config.json", "--packing"]);
    refused(&source, &["--names", "separate"], &["contiguous already", "--packing"]);
    // The word of whoever asks goes before the config's.
    repack(&source, &out, &["--packing", "interleaved"]);
    fs::remove_dir_all(&out).unwrap();
    // Old results, which were permuted all the same, do not pass.
    folder(&at("next"), "qwen3_next", Value::Null);
    save(&at("next").join("model.safetensors"), &fused(1));
    repack(&at("next"), &out, &[]);
    fs::copy(source.join("config.json"), out.join("config.json")).unwrap();
    fails(&["verify", text(&out), "--against", text(&source)], &["in_proj_qkvz.weight", "differs"]);
    fs::remove_dir_all(&out).unwrap();
    // To interleaved and back.
    repack(&source, &out, &["--to", "interleaved"]);
    verify(&out, &source);
    refused_is_done(&out);
    repack(&out, &at("back"), &[]);
    verify(&at("back"), &source);
    assert_same_files(&at("back"), &source);
    fs::remove_dir_all(&out).unwrap();

    // Nothing says it, or two do.
    fs::remove_file(source.join("config.json")).unwrap();
    let numbers = ["--num-k-heads", "2", "--num-v-heads", "4", "--head-k-dim", "8", "--head-v-dim", "8"];
    refused(&source, &numbers, &["nothing says which order", "--packing"]);
    let config = at("next").join("config.json");
    folder(&at("unknown"), "my_model", Value::Null);
    save(&at("unknown").join("model.safetensors"), &fused(1));
    refused(&at("unknown"), &[], &["nothing says which order", "--packing"]);
    repack(&at("unknown"), &out, &["--packing", "interleaved"]);
    let layout = ["--packing", "interleaved"];
    succeeds(&[&["verify", text(&out), "--against", text(&at("unknown"))], &layout[..]].concat());
    verify(&out, &at("unknown"));
    fs::remove_dir_all(&out).unwrap();
    folder(&at("five"), "qwen3_5", Value::Null);
    save(&at("five").join("model.safetensors"), &fused(1));
    refused(&at("five"), &["--config", text(&config)], &["--config", "config.json", "--packing"]);

    // The record goes before all, and must not be contradicted.
    repack(&at("next"), &out, &[]);
    fails(
        &["repack", text(&out), "-o", text(&at("x")), "--to", "interleaved", "--packing", "interleaved"],
        &["its metadata", "--packing"],
    );
    // Separate parts are contiguous.
    folder(&at("parts"), "qwen3_5", Value::Null);
    save(&at("parts").join("model.safetensors"), &separate(1));
    fs::remove_dir_all(&out).unwrap();
    refused(
        &at("parts"),
        &["--to", "interleaved", "--packing", "interleaved"],
        &["--packing interleaved", "separate parts"],
    );
}

#[track_caller]
fn refused_is_done(dir: &Path) {
    let out = dir.with_extension("again");
    fails(&["repack", text(dir), "-o", text(&out), "--to", "interleaved"], &["repacked before"]);
}

#[test]
fn adapters_follow_the_order_of_their_model() {
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    for (model, next) in [("qwen3_next", true), ("qwen3_5", false)] {
        folder(&at(model), model, Value::Null);
        let adapter = at(&format!("{model}-adapter"));
        fs::create_dir(&adapter).unwrap();
        let config = "{\"target_modules\": [\"in_proj_qkvz\", \"out_proj\"],\n \"rank_pattern\": {\"in_proj_qkvz\": 2}}";
        fs::write(adapter.join("adapter_config.json"), config).unwrap();
        save(
            &adapter.join("adapter_model.safetensors"),
            &[
                tensor("in_proj_qkvz.lora_A.weight", &[2, 4], 1),
                tensor("in_proj_qkvz.lora_B.weight", &[96, 2], 2),
            ],
        );
        let config = at(model).join("config.json");
        let out = at(&format!("{model}-out"));
        let args =
            ["repack", text(&adapter), "-o", text(&out), "--config", text(&config), "--names", "separate"];
        if next {
            succeeds(&args);
            succeeds(&["verify", text(&out), "--against", text(&adapter), "--config", text(&config)]);
            verify(&out, &adapter);
            assert_eq!(
                fs::read_to_string(out.join("adapter_config.json")).unwrap(),
                "{\"target_modules\": [\"in_proj_qkv\", \"in_proj_z\", \"out_proj\"],\n \"rank_pattern\": {\"in_proj_qkv\": 2, \"in_proj_z\": 2}}",
            );
            let back = at("back");
            repack(&out, &back, &["--to", "interleaved"]);
            assert_same_files(&back, &adapter);
            verify(&back, &out);
        } else {
            fails(&args, &["contiguous already", "--packing"]);
        }
    }
}

#[test]
fn module_lists_of_a_model_that_others_made_follow() {
    let temp = TempDir::new().unwrap();
    let at = |name: &str| temp.path().join(name);
    let source = at("source");
    let listed = |names: &[&str]| names.iter().map(|name| format!("{PREFIX}.{name}")).collect::<Vec<_>>();
    folder(
        &source,
        "qwen3_5_text",
        json!({"quantization_config": {
            "quant_method": "fp8",
            "modules_to_not_convert": listed(&["in_proj_b", "in_proj_a"]),
            "ignore": listed(&["in_proj_qkv", "out_proj", "in_proj_z", "in_proj_a"]),
        }}),
    );
    save(&source.join("model.safetensors"), &separate(3));
    let notes = repack(&source, &at("out"), &["--to", "interleaved"]);
    let config = json_of(&at("out").join("config.json"));
    assert_eq!(config["quantization_config"]["modules_to_not_convert"], json!(listed(&["in_proj_ba"])));
    assert_eq!(
        config["quantization_config"]["ignore"],
        json!(listed(&["in_proj_qkvz", "out_proj", "in_proj_a"]))
    );
    // One part alone cannot follow, and the undo puts the parts side by side.
    assert!(notes.contains("config.json still says") && notes.contains("in_proj_a"), "{notes}");
    assert!(notes.contains("config.json: an undo lists"), "{notes}");
    verify(&at("out"), &source);
    repack(&at("out"), &at("back"), &["--names", "separate"]);
    verify(&at("back"), &at("out"));
    let said = succeeds(&["verify", text(&at("back")), "--against", text(&source)]);
    assert!(said.contains("config.json says the same, in another order or spacing"), "{said}");
    assert!(tensors(&at("back")) == tensors(&source));
    assert_eq!(
        fs::read(at("back").join("model.safetensors")).unwrap(),
        fs::read(source.join("model.safetensors")).unwrap()
    );

    // Lists that did not follow are noticed.
    fs::copy(source.join("config.json"), at("out").join("config.json")).unwrap();
    fails(&["verify", text(&at("out")), "--against", text(&source)], &["config.json", "quantization_config"]);
}

#[test]
fn names_in_any_json_file_follow() {
    let temp = TempDir::new().unwrap();
    let source = temp.path().join("source");
    folder(&source, "qwen3_next", Value::Null);
    save(&source.join("model.safetensors"), &fused(5));
    let ba = format!("{PREFIX}.in_proj_ba");
    let parts = ["b", "a"].map(|part| format!("{PREFIX}.in_proj_{part}"));
    let files = [
        ("quantization_config.json", json!({"extra_config": {&ba: {"bits": 16}}})),
        ("quant_model_description.json", json!({format!("{ba}.weight"): "FLOAT", "version": "1"})),
        (
            "hf_quant_config.json",
            json!({"quantization": {"exclude_modules": [format!("{ba}*")], "quantized_layers": {&ba: {"x": 1}}}}),
        ),
        ("whatever.json", json!([{"deep": [[&ba]]}])),
        ("other.json", json!({"x": "in_proj"})),
    ];
    for (name, json) in &files {
        fs::write(source.join(name), format!("{json:#}")).unwrap();
    }
    fs::write(source.join("recipe.yaml"), format!("ignore: [{ba}]")).unwrap();
    fs::write(source.join("notes.json"), format!("{{\"note\": \"{ba}\"}}")).unwrap();
    there_and_back(&source, |there, names, notes| {
        let changed =
            |name: &str| fs::read(there.join(name)).unwrap() != fs::read(source.join(name)).unwrap();
        for (name, _) in &files {
            assert_eq!(changed(name), names == "separate" && *name != "other.json", "{name}");
        }
        for name in ["recipe.yaml", "notes.json"] {
            assert_eq!(notes.contains(name), names == "separate", "{notes}");
            assert!(!changed(name));
        }
        if names == "separate" {
            let [b, a] = &parts;
            let json = |name: &str| json_of(&there.join(name));
            assert_eq!(
                json("quantization_config.json"),
                json!({"extra_config": {b: {"bits": 16}, a: {"bits": 16}}})
            );
            assert_eq!(json("whatever.json"), json!([{"deep": [[b, a]]}]));
            // Files that did not follow are noticed.
            for (name, _) in &files[..4] {
                let kept = fs::read(there.join(name)).unwrap();
                fs::copy(source.join(name), there.join(name)).unwrap();
                fails(&["verify", text(there), "--against", text(&source)], &[name]);
                fs::write(there.join(name), kept).unwrap();
            }
        }
    });
}

#[test]
fn files_that_were_added_are_named() {
    let temp = TempDir::new().unwrap();
    let (source, there) = (temp.path().join("source"), temp.path().join("there"));
    folder(&source, "qwen3_next", Value::Null);
    save(&source.join("model.safetensors"), &fused(5));
    fs::write(source.join("pytorch_model.bin"), "old").unwrap();
    repack(&source, &there, &[]);
    verify(&there, &source);
    let args = ["verify", text(&there), "--against", text(&source)];
    for name in ["more.txt", "model.gguf", "more.safetensors.index.json", ".hidden"] {
        fs::write(there.join(name), r#"{"weight_map": {}}"#).unwrap();
        fails(&args, &[name, "is not in"]);
        fs::remove_file(there.join(name)).unwrap();
    }
    fs::create_dir(there.join("folder")).unwrap();
    fails(&args, &["folder", "is not in"]);
    fs::remove_dir(there.join("folder")).unwrap();
    fs::write(there.join("pytorch_model.bin"), "old").unwrap();
    fails(&args, &["pytorch_model.bin", "should not be there"]);
    fs::remove_file(there.join("pytorch_model.bin")).unwrap();
    // Tensors too, of whatever name, and a whole beside its parts.
    let separate = temp.path().join("separate");
    repack(&source, &separate, &["--names", "separate"]);
    for (dir, more) in
        [(&there, "norm.weight"), (&there, "in_proj_qkvz.bias"), (&separate, "in_proj_qkvz.weight")]
    {
        let path = dir.join("model.safetensors");
        let kept = fs::read(&path).unwrap();
        let mut all = tensors(&path);
        let (name, added) = tensor(more, &[96, 4], 77);
        all.insert(name.clone(), added);
        rewrite(&path, &all);
        fails(&["verify", text(dir), "--against", text(&source)], &[&name, "should not be there"]);
        // And what is missing.
        all.remove(&name);
        all.pop_first().unwrap();
        rewrite(&path, &all);
        fails(&["verify", text(dir), "--against", text(&source)], &["in_proj_ba.weight", "missing"]);
        fs::write(&path, kept).unwrap();
        verify(dir, &source);
    }
}
