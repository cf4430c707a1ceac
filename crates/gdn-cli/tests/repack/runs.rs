//! Runs that must not be, that end early, and whose results are changed afterwards.

use std::{fs, path::Path, process::Command};

use safetensors::SafeTensors;
use tempfile::TempDir;

use crate::checkpoints::*;

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
    run(&at("bare"), &[], &["nothing says which order", "--packing", "--config"]);
    run(&at("bare"), &["--packing", "interleaved"], &["no config.json", "--preset"]);
    // Weights in other formats would be the old ones beside the new.
    fs::copy(testdata("fp8").join("config.json"), at("bare").join("config.json")).unwrap();
    fs::write(at("bare").join("pytorch_model.bin"), "old").unwrap();
    fs::create_dir(at("bare/original")).unwrap();
    let notes = repack(&at("bare"), &at("x"), &[]);
    assert!(notes.contains("not carried over: original, pytorch_model.bin"), "{notes}");
    assert_eq!(files(&at("x")).keys().collect::<Vec<_>>(), ["config.json", "model.safetensors"]);
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

    // An entry that is missing is named, the tensor repacked, and the new index says what the old one does.
    with_file(None);
    let notes = succeeds(&args);
    assert!(notes.contains(tensor), "{notes}");
    let index = |dir: &Path| fs::read_to_string(dir.join("model.safetensors.index.json")).unwrap();
    assert_eq!(index(&out), index(&source));
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
    assert!(!temp.path().join("out.partial").exists(), "no work was done");
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
    assert_eq!(left, ["model.safetensors"], "whole files alone");
    let notes = repack(&source, &out, &[]);
    assert!(notes.contains("model.safetensors is there"), "{notes}");
    verify(&out, &source);
}
