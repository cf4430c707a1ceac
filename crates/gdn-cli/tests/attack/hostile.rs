//! Inputs that somebody made to do harm.

use std::{
    fs,
    io::Read,
    process::Stdio,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::scene::{Scene, refused};

/// A safetensors file with this header and so many bytes of data.
fn file(header: &serde_json::Value, data: usize) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

/// The command ends, soon, as it should.
#[track_caller]
fn ends(scene: &Scene, args: &[&str], part: &str) {
    let mut child = scene
        .command(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("{args:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    refused(&child.wait_with_output().unwrap(), part);
}

#[cfg(unix)]
#[test]
fn pipes_and_devices_are_no_files() {
    let scene = Scene::new(&[("in", "r3-bf16.safetensors"), ("source", "repack/fp8")]);
    let fifo = |name: &str| {
        assert!(std::process::Command::new("mkfifo").arg(scene.path(name)).status().unwrap().success())
    };
    fifo("fifo");
    for input in ["fifo", "/dev/zero", "/dev/tty", "/dev/null", "/dev/full", "/proc/self/fd/0", "source"] {
        for command in ["split", "merge"] {
            ends(&scene, &[command, input, "-o", "out"], "cannot read");
        }
        ends(&scene, &["split", "in", "-o", "out", "--config", input], "cannot read --config");
        ends(&scene, &["info", "--config", input], "cannot read --config");
        if input != "source" {
            ends(&scene, &["repack", input, "-o", "out"], "cannot use the checkpoint");
            ends(&scene, &["verify", input, "--against", "source"], "cannot use the checkpoint");
        }
    }
    for output in ["fifo", "/dev/full"] {
        ends(&scene, &["split", "in", "-o", output], "cannot write");
        ends(&scene, &["repack", "source", "-o", output], "cannot write");
    }
    // In the place of files that a run goes on with.
    fs::create_dir(scene.path("out.partial")).unwrap();
    for name in ["out.partial/model.safetensors", "out.partial/.gdn-lock"] {
        fifo(name);
        ends(&scene, &["repack", "source", "-o", "out"], "no");
        fs::remove_file(scene.path(name)).unwrap();
    }
    // In a checkpoint it is no part of it.
    fs::remove_file(scene.path("source/config.json")).unwrap();
    fifo("source/config.json");
    ends(&scene, &["repack", "source", "-o", "out"], "config.json");
    // A configuration that is as large as a disk.
    fs::File::create(scene.path("huge.json")).unwrap().set_len(1 << 40).unwrap();
    ends(&scene, &["info", "--config", "huge.json"], "1099511627776 bytes");
}

#[test]
fn names_from_files_are_shown_and_not_obeyed() {
    let scene = Scene::new(&[("source", "repack/fp8"), ("other", "repack/fp8")]);
    let long = "x".repeat(1 << 20);
    for name in ["\u{1b}[31mred", "two\nlines", "\r\u{8}\u{0}", "\u{202e}txt.exe", &long, "\u{9b}2J"] {
        let header = json!({
            "__metadata__": {"num_k_heads": name},
            name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "mixed_ba": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
        });
        fs::write(scene.path("in"), file(&header, 2)).unwrap();
        let check = |args: &[&str]| {
            let output = scene.gdn(args);
            assert_eq!(output.status.code(), Some(2), "{output:?}");
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(said.len() < 20_000, "{} bytes", said.len());
            for char in said.chars() {
                assert!(char == '\n' || !char.is_control() && char != '\u{202e}', "{said:?}");
            }
            assert!(said.lines().all(|line| line.starts_with("gdn: ") || line.starts_with("  ")), "{said:?}");
        };
        check(&["split", "in", "-o", "out"]);
        check(&["split", "in", "-o", "out", "--preset", "Qwen3.6-27B"]);
        check(&["merge", "in", "-o", "out"]);
        // As a tensor of a projection, in an index, in the middle of a comparison.
        let tensor = format!("a.linear_attn.in_proj_ba.{name}");
        let header = json!({&tensor: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}});
        fs::write(scene.path("source/model.safetensors"), file(&header, 1)).unwrap();
        check(&["repack", "source", "-o", "out"]);
        check(&["verify", "source", "--against", "other"]);
        check(&["verify", "other", "--against", "source"]);
        let index = json!({"weight_map": {&tensor: format!("{name}.safetensors")}});
        fs::write(scene.path("source/model.safetensors.index.json"), index.to_string()).unwrap();
        check(&["repack", "source", "-o", "out"]);
        fs::remove_file(scene.path("source/model.safetensors.index.json")).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn more_files_than_may_be_open() {
    let scene = Scene::new(&[("source", "repack/qwen3-next")]);
    // Each a little checkpoint of its own, with tensors that are read piece by piece and ones that are carried over.
    for i in 0..200 {
        let header = json!({format!("more.{i}"): {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}});
        fs::write(scene.path(&format!("source/more-{i:03}.safetensors")), file(&header, 3)).unwrap();
    }
    for args in ["repack source -o out", "verify out --against source", "repack out -o back --to interleaved"]
    {
        let output = scene.shell("ulimit -n 40", args);
        assert_eq!(output.status.code(), Some(0), "{args}: {output:?}");
    }
    let mut child =
        scene.command(&["verify", "back", "--against", "source"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success() && said.contains("the same as"), "{said}");
}
