//! Headers that the format allows, whoever wrote them.

use std::fs;

use tempfile::TempDir;

use crate::checkpoints::*;

#[test]
fn metadata_that_says_nothing_is_valid_and_survives_an_undo() {
    for metadata in
        ["", r#""__metadata__":null,"#, r#""__metadata__":{},"#, r#""__metadata__":{"format":"pt"},"#]
    {
        for names in ["fused", "separate"] {
            let temp = TempDir::new().unwrap();
            let [source, there, back] = ["source", "there", "back"].map(|name| temp.path().join(name));
            fs::create_dir(&source).unwrap();
            fs::write(source.join("config.json"), small_config("qwen3_next")).unwrap();
            let ba = r#""model.layers.0.linear_attn.in_proj_ba.weight":{"dtype":"BF16","shape":[8,4],"data_offsets":[0,64]}"#;
            let qkvz = r#""model.layers.0.linear_attn.in_proj_qkvz.weight":{"dtype":"BF16","shape":[96,4],"data_offsets":[64,832]}"#;
            let file = raw_file(&format!("{{{metadata}{ba},{qkvz}}}"), &noise(832, 7));
            fs::write(source.join("model.safetensors"), file).unwrap();
            repack(&source, &there, &["--names", names]);
            verify(&there, &source);
            repack(&there, &back, &["--to", "interleaved"]);
            verify(&back, &there);
            verify(&back, &source);
            assert_same_files(&back, &source);
        }
    }
}

#[test]
fn every_command_reads_headers_alike() {
    let temp = TempDir::new().unwrap();
    let [source, out] = ["source", "out"].map(|name| temp.path().join(name));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("config.json"), small_config("qwen3_next")).unwrap();
    let tensors = |name: &str| {
        let ba = r#""linear_attn.in_proj_ba.weight":{"dtype":"I8","shape":[8,1],"data_offsets":[0,8]}"#;
        let packed = r#""mixed_ba":{"dtype":"U8","shape":[1,8],"data_offsets":[8,16]}"#;
        format!(r#"{ba},{packed},"{name}":{{"dtype":"U8","shape":[1,96],"data_offsets":[16,112]}}"#)
    };
    let file = source.join("model.safetensors");
    let config = source.join("config.json");
    let split = ["split", text(&file), "-o", text(&out), "--config", text(&config)];
    let repack = ["repack", text(&source), "-o", text(&out)];
    let other = testdata("fp8");
    let verify = ["verify", text(&other), "--against", text(&source)];
    for metadata in ["null", "{}"] {
        let header = format!(r#"{{"__metadata__":{metadata},{}}}"#, tensors("mixed_qkvz"));
        fs::write(&file, raw_file(&header, &noise(112, 1))).unwrap();
        succeeds(&split);
        fs::remove_file(&out).unwrap();
        succeeds(&repack);
        super::checkpoints::verify(&out, &source);
        fs::remove_dir_all(&out).unwrap();
    }
    for (header, part) in [
        (format!("{{{}}}", tensors("mixed_ba")), "\"mixed_ba\" comes twice"),
        (format!(r#"{{"__metadata__":{{"a":"","a":""}},{}}}"#, tensors("mixed_qkvz")), "\"a\" twice"),
        (format!(r#"{{"__metadata__":[],{}}}"#, tensors("mixed_qkvz")), "an object of strings, or null"),
    ] {
        fs::write(&file, raw_file(&header, &noise(112, 1))).unwrap();
        for args in [&split[..], &repack, &verify] {
            fails(args, &["model.safetensors", part]);
        }
        assert!(!out.exists());
    }
}
