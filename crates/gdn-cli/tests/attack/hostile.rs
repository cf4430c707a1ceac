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
    let scene = Scene::new(&[
        ("in", "r3-bf16.safetensors"),
        ("layer", "r1-f32-layer-decode.safetensors"),
        ("source", "repack/fp8"),
    ]);
    let fifo = |name: &str| {
        assert!(std::process::Command::new("mkfifo").arg(scene.path(name)).status().unwrap().success())
    };
    fifo("fifo");
    for input in ["fifo", "/dev/zero", "/dev/tty", "/dev/null", "/dev/full", "/proc/self/fd/0", "source"] {
        for command in ["split", "merge", "forward"] {
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
        ends(&scene, &["forward", "layer", "-o", output], "cannot write");
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
    // Each a little checkpoint of its own, with tensors that are read piece by piece and ones that are
    // carried over.
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

fn config(num_k_heads: u64, num_v_heads: u64, head_k_dim: u64, head_v_dim: u64) -> String {
    json!({
        "model_type": "qwen3_next", "linear_num_key_heads": num_k_heads, "linear_num_value_heads": num_v_heads,
        "linear_key_head_dim": head_k_dim, "linear_value_head_dim": head_v_dim,
    })
    .to_string()
}

/// The most memory that any process of this test has had, in bytes.
#[cfg(target_os = "linux")]
fn most_memory() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: it fills in what it is given.
    let usage = unsafe {
        assert_eq!(libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()), 0);
        usage.assume_init()
    };
    usage.ru_maxrss as u64 * 1024
}

#[test]
fn heads_are_not_believed_before_shapes_are_compared() {
    let scene = Scene::new(&[]);
    let layer = "model.layers.0.linear_attn";
    let many: [[u64; 4]; 6] = [
        [1 << 26, 1 << 26, 1, 1],
        [1 << 40, 1 << 40, 1, 1],
        [1 << 55, 1 << 55, 1, 1],
        [2, 2, 1 << 55, 1 << 55],
        [1, 1, 1 << 56, 1 << 56],
        [1, 1 << 57, 1, 1],
    ];
    for (round, heads) in many.into_iter().enumerate() {
        let [hk, hv, dk, dv] = heads;
        let (qkvz, ba) = (2 * hk * dk + 2 * hv * dv, 2 * hv);
        let source = format!("source{round}");
        fs::create_dir(scene.path(&source)).unwrap();
        let mut text: serde_json::Value = serde_json::from_str(&config(hk, hv, dk, dv)).unwrap();
        // One block of all outputs: a scale of one row fits any heads.
        text["quantization_config"] = json!({"weight_block_size": [1u64 << 60, 128]});
        fs::write(scene.path(&source).join("config.json"), text.to_string()).unwrap();
        let path = scene.path(&source).join("model.safetensors");
        for (suffix, dtype, shape, bytes) in [
            ("in_proj_qkvz.weight", "BF16", json!([12, 2]), 48),
            ("in_proj_ba.weight", "BF16", json!([12, 2]), 48),
            ("in_proj_ba.weight", "BF16", json!([ba, 0]), 0),
            ("in_proj_qkvz.weight", "BF16", json!([qkvz, 0]), 0),
            ("in_proj_qkvz.weight_scale_inv", "F32", json!([1, 2]), 8),
            ("in_proj_ba.weight_scale_inv", "F32", json!([1, 2]), 8),
            ("in_proj_qkvz.qzeros", "I32", json!([2, 1]), 8),
            ("in_proj_qkvz.qzeros", "I32", json!([0, 1]), 0),
        ] {
            let header = json!({format!("{layer}.{suffix}"): {"dtype": dtype, "shape": shape, "data_offsets": [0, bytes]}});
            fs::write(&path, file(&header, bytes)).unwrap();
            for names in ["fused", "separate"] {
                let started = Instant::now();
                let output = scene.gdn(&["repack", &source, "-o", "out", "--names", names]);
                let told = format!("{heads:?}, {suffix} {shape}, {names}: {output:?}");
                match output.status.code() {
                    Some(2) => refused(&output, "gdn: "),
                    code => assert_eq!(code, Some(0), "{told}"),
                }
                assert!(started.elapsed() < Duration::from_secs(20), "{told}");
                let _ = fs::remove_dir_all(scene.path("out"));
            }
        }
        // What a file says of itself.
        let header = json!({
            "__metadata__": {"num_k_heads": hk.to_string(), "num_v_heads": hv.to_string(), "head_k_dim": dk.to_string(),
                "head_v_dim": dv.to_string(), "packing": "interleaved"},
            "mixed_qkvz": {"dtype": "F64", "shape": [0, qkvz], "data_offsets": [0, 0]},
            "mixed_ba": {"dtype": "F64", "shape": [0, ba], "data_offsets": [0, 0]},
        });
        fs::write(scene.path("in"), file(&header, 0)).unwrap();
        let output = scene.gdn(&["split", "in", "-o", "parts"]);
        assert!(matches!(output.status.code(), Some(0 | 2)), "{heads:?}: {output:?}");
        if output.status.success() {
            scene.succeeds(&["merge", "parts", "-o", "back"]);
        }
        assert_eq!(scene.gdn(&["info", "--config", &format!("{source}/config.json")]).status.code(), Some(0));
    }
    #[cfg(target_os = "linux")]
    assert!(most_memory() < 1 << 30, "{} bytes", most_memory());
}

#[test]
fn numbers_at_the_end_of_their_range() {
    let scene = Scene::new(&[("source", "repack/qwen3-next")]);
    let path = scene.path("source/model.safetensors.index.json");
    let mut index: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for total in [u64::MAX, u64::MAX - 1, 1 << 63, 0] {
        index["metadata"]["total_size"] = json!(total);
        fs::write(&path, index.to_string()).unwrap();
        for names in ["fused", "separate"] {
            let output = scene.gdn(&["repack", "source", "-o", "out", "--names", names]);
            match output.status.code() {
                Some(2) => refused(&output, "total_size"),
                code => {
                    assert_eq!(code, Some(0), "{total}, {names}: {output:?}");
                    let _ = fs::remove_dir_all(scene.path("out"));
                }
            }
        }
    }
}
