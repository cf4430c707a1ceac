//! `bench`.

use std::fs;

use crate::{gdn, no_device, refused, text};

#[test]
fn bench_gives_a_table_json_and_a_picture() {
    let directory = tempfile::tempdir().unwrap();
    let svg = directory.path().join("plot.svg");
    let args = [
        "bench",
        "split",
        "--tokens",
        "1,3",
        "--seconds",
        "0.01",
        "--preset",
        "Qwen3.6-27B",
        "--tp-size",
        "8",
    ];
    let output =
        gdn(&[&args[..], &["--json", "--dtype", "fp8", "--threads", "2", "--plot", text(&svg)]].concat());
    assert!(output.status.success(), "{output:?}");
    let lines: Vec<serde_json::Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    for (line, tokens) in lines.iter().zip([1, 3]) {
        assert_eq!(
            (&line["op"], &line["device"], &line["packing"]),
            (&"split".into(), &"cpu".into(), &"contiguous".into())
        );
        assert_eq!((line["tokens"].as_u64(), line["threads"].as_u64()), (Some(tokens), Some(2)));
        assert_eq!((line["num_k_heads"].as_u64(), line["num_v_heads"].as_u64()), (Some(2), Some(6)));
        assert_eq!((line["head_k_dim"].as_u64(), line["head_v_dim"].as_u64()), (Some(128), Some(128)));
        assert_eq!((&line["dtype"], line["bytes"].as_u64()), (&"fp8".into(), Some(tokens * (2048 + 12))));
        let number = |key: &str| line[key].as_f64().unwrap();
        assert!(number("seconds") > 0.0 && number("copy_seconds") > 0.0);
        assert!((number("ratio_to_copy") - number("seconds") / number("copy_seconds")).abs() < 1e-9);
    }
    assert!(fs::read_to_string(&svg).unwrap().contains("copy of the same bytes"));
    let table = gdn(&args);
    assert!(String::from_utf8_lossy(&table.stdout).contains("ratio"), "{table:?}");
    let output = gdn(&["bench", "split", "--tokens", "4000000000"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

/// On a GPU the record says whether sequences might be cut; elsewhere none is, and decode has no such choice.
#[test]
fn prefill_is_measured_with_segments() {
    let heads = ["--num-k-heads", "1", "--num-v-heads", "2", "--head-k-dim", "64", "--head-v-dim", "64"];
    let run =
        |op, more: &[&str]| gdn(&[&["bench", op, "--seconds", "0.001", "--json"], &heads[..], more].concat());
    let object = |more: &[&str]| -> serde_json::Value {
        let done = run("prefill", more);
        assert!(done.status.success(), "{done:?}");
        serde_json::from_slice(&done.stdout).unwrap()
    };
    assert!(object(&["--tokens", "2", "--segments"]).get("segments").is_none());
    let done = run("decode", &["--segments"]);
    assert!(String::from_utf8_lossy(&done.stderr).contains("unexpected argument '--segments'"), "{done:?}");
    #[cfg(feature = "cuda")]
    if matches!(gdn::cuda::devices().as_deref(), Ok([_, ..])) {
        let on = ["--tokens", "4096", "--device", "cuda"];
        assert_eq!(object(&on)["segments"], false);
        assert_eq!(object(&[&on[..], &["--segments"]].concat())["segments"], true);
    }
}

#[test]
fn decode_and_prefill_are_measured_over_batches_tokens_and_dtypes() {
    let directory = tempfile::tempdir().unwrap();
    let heads = ["--num-k-heads", "2", "--num-v-heads", "6", "--head-k-dim", "24", "--head-v-dim", "16"];
    let which = ["--batch", "1,3", "--tokens", "2", "--dtype", "bf16,f32", "--state-dtype", "f16"];
    let lists = [&which[..], &["--seconds", "0.001", "--threads", "2"]].concat();
    for (op, work, least, share, drawn) in [
        ("decode", "bytes", "copy_seconds", "share_of_copy", "copy of the same bytes"),
        ("prefill", "flops", "peak_seconds", "share_of_peak", "peak"),
    ] {
        let svg = directory.path().join(op);
        let args = [&["bench", op][..], &heads, &lists].concat();
        let output = gdn(&[&args[..], &["--json", "--plot", text(&svg)]].concat());
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let output = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<serde_json::Value> =
            output.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let (tokens, state, state_size) = (2, "f16", 2);
        let mut wanted = Vec::new();
        for (dtype, size) in [("bf16", 2), ("f32", 4)] {
            for batch in [1, 3] {
                let (c, rows) = (2 * 2 * 24 + 6 * 16, batch * tokens);
                let states = 6 * 16 * 24 * state_size + c * 3 * size;
                let row = (c + 6 * 16 + 2 * 6 + 6 * 16) * size;
                let amount = match op {
                    "decode" => 2 * batch * states + rows * row,
                    _ => rows * 6 * (6 * 16 * 24),
                };
                wanted.push((dtype, state, batch, tokens, amount));
            }
        }
        assert_eq!(lines.len(), wanted.len());
        for (line, (dtype, state, batch, tokens, amount)) in lines.iter().zip(wanted) {
            assert_eq!(
                (&line["op"], &line["dtype"], &line["state_dtype"]),
                (&op.into(), &dtype.into(), &state.into())
            );
            assert_eq!((line["batch"].as_u64(), line["tokens"].as_u64()), (Some(batch), Some(tokens)));
            assert_eq!(line[work].as_u64(), Some(amount), "{line}");
            let number = |key: &str| line[key].as_f64().unwrap();
            assert!(number("seconds") > 0.0 && number(least) > 0.0);
            assert!((number(share) - number(least) / number("seconds")).abs() < 1e-9);
            assert!((number("tokens_per_second") * number("seconds") - (batch * tokens) as f64).abs() < 1e-6);
        }
        let picture = fs::read_to_string(&svg).unwrap();
        assert!(picture.contains(drawn) && picture.contains("bf16, state f16"), "{picture}");
        let table = gdn(&[
            "bench",
            op,
            "--batch",
            "1",
            "--tokens",
            "1",
            "--seconds",
            "0.001",
            heads[0],
            "1",
            heads[2],
            "1",
            heads[4],
            "8",
            heads[6],
            "8",
        ]);
        assert!(String::from_utf8_lossy(&table.stdout).contains("share"), "{table:?}");
        for wrong in [
            &["--batch", "4000000000"][..],
            &["--batch", "0"],
            &["--tokens", "0"],
            &["--dtype", "f64"],
            &["--seconds", "0"],
        ] {
            let output = gdn(&[&["bench", op][..], wrong].concat());
            assert_eq!(output.status.code(), Some(2), "{wrong:?}: {output:?}");
        }
    }
    let (device, said) = no_device();
    for op in ["split", "decode", "prefill"] {
        let nothing = tempfile::tempdir().unwrap();
        let svg = nothing.path().join("svg");
        refused(&gdn(&[&["bench", op, "--plot", text(&svg)], &device[..]].concat()), said, &nothing, 0);
    }
    assert_eq!(gdn(&["bench", "decode", "--tokens", "17"]).status.code(), Some(2));
}
