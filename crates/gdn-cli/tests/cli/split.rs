//! `split` and `merge`, and what every command has.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use safetensors::SafeTensors;

use crate::{gdn, refused, testdata, text};

/// A file of zeros, its data a hole on the disk.
fn zeros(path: &Path, num_rows: usize, metadata: &str) {
    let (qkvz, ba) = (num_rows * 12288 * 2, num_rows * 64 * 2);
    let header = format!(
        r#"{{{metadata}"mixed_qkvz":{{"dtype":"BF16","shape":[{num_rows},12288],"data_offsets":[0,{qkvz}]}},"mixed_ba":{{"dtype":"BF16","shape":[{num_rows},64],"data_offsets":[{qkvz},{}]}}}}"#,
        qkvz + ba
    );
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + qkvz + ba) as u64).unwrap();
}

#[test]
fn split_and_merge_of_every_case_of_transformers() {
    let directory = tempfile::tempdir().unwrap();
    let mut cases = 0;
    for entry in fs::read_dir(testdata("")).unwrap() {
        let expected_path = entry.unwrap().path();
        let Some(stem) = text(&expected_path).strip_suffix(".expected.safetensors").map(str::to_owned) else {
            continue;
        };
        cases += 1;
        let input_path = format!("{stem}.safetensors");
        let (parts, back) =
            (directory.path().join("parts.safetensors"), directory.path().join("back.safetensors"));
        let output = gdn(&["split", &input_path, "-o", text(&parts)]);
        assert!(
            output.status.success() && output.stderr.is_empty() && output.stdout.is_empty(),
            "{output:?}"
        );
        let output = gdn(&["merge", text(&parts), "-o", text(&back)]);
        assert!(output.status.success(), "{output:?}");
        for (got, wanted) in [(&parts, &expected_path), (&back, &PathBuf::from(&input_path))] {
            let (got, wanted) = (fs::read(got).unwrap(), fs::read(wanted).unwrap());
            let metadata = |bytes: &[u8]| SafeTensors::read_metadata(bytes).unwrap().1.metadata().clone();
            assert_eq!(metadata(&got), metadata(&wanted), "metadata is kept");
            let (got, wanted) =
                (SafeTensors::deserialize(&got).unwrap(), SafeTensors::deserialize(&wanted).unwrap());
            assert_eq!(got.len(), wanted.len());
            for (name, tensor) in wanted.tensors() {
                assert_eq!(got.tensor(&name).unwrap(), tensor, "{stem}: {name}");
            }
        }
    }
    assert!(cases >= 8, "{cases} cases");
}

#[test]
fn heads_from_wherever_they_are_said() {
    let directory = tempfile::tempdir().unwrap();
    let (input, output) = (directory.path().join("in.safetensors"), directory.path().join("out.safetensors"));
    zeros(&input, 3, "");
    let config = testdata("config.json");
    let four = ["--num-k-heads", "16", "--num-v-heads", "32", "--head-k-dim", "128", "--head-v-dim", "128"];
    let good: [&[&str]; 3] = [
        &["--preset", "qwen/qwen3-next-80b-a3b-instruct"],
        &["--config", text(&config)],
        &[&four[..], &["--packing", "interleaved"]].concat(),
    ];
    for heads in good {
        let args = [&["split", text(&input), "-o", text(&output)], heads].concat();
        let result = gdn(&args);
        assert!(result.status.success(), "{heads:?}: {result:?}");
        fs::remove_file(&output).unwrap();
    }
    let run = |heads: &[&str]| gdn(&[&["split", text(&input), "-o", text(&output)], heads].concat());
    refused(&run(&[]), "no 'num_k_heads'", &directory, 1);
    refused(&run(&four), "no 'packing'", &directory, 1);
    refused(&run(&["--preset", "gpt"]), "known: Qwen3-Next-80B-A3B", &directory, 1);
    refused(&run(&["--preset", "Qwen3.6-27B"]), "16+48 heads of 128 need rows of [16384]", &directory, 1);
    refused(
        &run(&["--preset", "Qwen3-Next-80B-A3B", "--tp-size", "3"]),
        "num_k_heads = 16 is not a multiple of tp_size = 3",
        &directory,
        1,
    );
    refused(&run(&["--config", "/nowhere.json"]), "cannot read --config /nowhere.json", &directory, 1);
    refused(
        &run(&[
            "--preset",
            "Qwen3-Next-80B-A3B",
            "--isa",
            if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" },
        ]),
        "not available",
        &directory,
        1,
    );
    // Clap's own errors: two sources, half of the four numbers, no such packing.
    for bad in [
        &["--preset", "x", "--config", "y"][..],
        &["--num-k-heads", "16"],
        &["--packing", "x"],
        &["--threads", "0"],
    ] {
        assert_eq!(run(bad).status.code(), Some(2), "{bad:?}");
    }
}

#[test]
fn files_that_are_not_what_they_should_be() {
    let directory = tempfile::tempdir().unwrap();
    let (input, output) = (directory.path().join("in.safetensors"), directory.path().join("out.safetensors"));
    let whole = fs::read(testdata("r3-bf16.safetensors")).unwrap();
    let run = || gdn(&["split", text(&input), "-o", text(&output)]);
    for cut in [0, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&input, &whole[..cut]).unwrap();
        refused(&run(), "cannot read", &directory, 1);
    }
    let mut endless = whole.clone();
    endless[..8].fill(0xff);
    fs::write(&input, &endless).unwrap();
    refused(&run(), "header is said to take 18446744073709551615 bytes", &directory, 1);
    fs::write(&input, &whole).unwrap();
    let missing = gdn(&["split", text(&input), "-o", text(&output), "--qkvz-name", "nobody"]);
    refused(&missing, "has no tensor 'nobody'; it has", &directory, 1);
    refused(&gdn(&["merge", text(&input), "-o", text(&output)]), "no tensor 'mixed_qkv'", &directory, 1);
    refused(&gdn(&["split", text(&input), "-o", text(&input)]), "it is the input", &directory, 1);
    refused(&gdn(&["split", text(&input), "-o", text(directory.path())]), "no file", &directory, 1);
    let nowhere = directory.path().join("no/such/folder/out.safetensors");
    refused(&gdn(&["split", text(&input), "-o", text(&nowhere)]), "cannot write", &directory, 1);
    refused(
        &gdn(&["split", "/nowhere.safetensors", "-o", text(&output)]),
        "/nowhere.safetensors",
        &directory,
        1,
    );
    refused(&gdn(&["split", text(directory.path()), "-o", text(&output)]), "not a file", &directory, 1);
    // Wrong features: the heads of another model.
    let four = ["--num-k-heads", "2", "--num-v-heads", "6", "--head-k-dim", "32", "--head-v-dim", "32"];
    let wrong = gdn(&[&["split", text(&input), "-o", text(&output)], &four[..]].concat());
    refused(&wrong, "2+6 heads of 32 need rows of", &directory, 1);
}

#[test]
fn an_output_that_is_there_is_replaced_at_once_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.safetensors");
    fs::write(&output, "precious").unwrap();
    refused(
        &gdn(&["split", text(&testdata("config.json")), "-o", text(&output)]),
        "cannot read",
        &directory,
        1,
    );
    assert_eq!(fs::read(&output).unwrap(), b"precious");
    assert!(gdn(&["split", text(&testdata("r3-bf16.safetensors")), "-o", text(&output)]).status.success());
    assert_ne!(fs::read(&output).unwrap(), b"precious");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::write(directory.path().join("mine"), "").unwrap();
        let mode = |name: &str| fs::metadata(directory.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode("out.safetensors"), mode("mine"), "as readable as any new file");
        // A link is neither replaced nor written through, whatever it leads to.
        let precious = fs::read(&output).unwrap();
        let link = directory.path().join("link");
        for leads_to in ["out.safetensors", "nothing", "/dev/null", "."] {
            std::os::unix::fs::symlink(leads_to, &link).unwrap();
            let split = gdn(&["split", text(&testdata("r1-f32.safetensors")), "-o", text(&link)]);
            refused(&split, "symbolic link", &directory, 3);
            assert_eq!(fs::read_link(&link).unwrap(), Path::new(leads_to));
            fs::remove_file(&link).unwrap();
        }
        assert_eq!(fs::read(&output).unwrap(), precious);
    }
}

#[test]
#[cfg(unix)]
fn interrupted() {
    let directory = tempfile::tempdir().unwrap();
    let (input, output) = (directory.path().join("in.safetensors"), directory.path().join("out.safetensors"));
    zeros(&input, 30_000, "");
    let args =
        ["split", text(&input), "-o", text(&output), "--preset", "Qwen3-Next-80B-A3B", "--threads", "1"];
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_gdn")).args(args).stderr(Stdio::piped()).spawn().unwrap();
    // From the moment on at which there is something to clean up.
    let started = Instant::now();
    while fs::read_dir(&directory).unwrap().count() < 2 {
        assert!(started.elapsed() < Duration::from_secs(60), "no temporary file appeared");
        std::thread::sleep(Duration::from_micros(200));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let status = child.wait().unwrap();
    let mut error = String::new();
    child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
    assert_eq!(status.code(), Some(130), "{error}");
    assert!(error.contains("interrupted"), "{error}");
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "only the input is there");
}

#[test]
fn info_help_completions_and_a_reader_that_goes_away() {
    let info = gdn(&["info", "--preset", "Qwen3-Next-80B-A3B"]);
    let info = String::from_utf8(info.stdout).unwrap();
    for part in [
        "scalar",
        "mixed_qkvz    12288  | q 128 | k 128 | v 256 | z 256 |  x 16 key heads",
        "96 segments a row",
    ] {
        assert!(info.contains(part), "{info}");
    }
    assert!(String::from_utf8(gdn(&["info"]).stdout).unwrap().contains("Qwen3.6-27B"));
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = gdn(&["completions", shell]).stdout;
        assert!(String::from_utf8_lossy(&script).contains("rows-per-iter"), "{shell}");
    }
    assert_eq!(gdn(&[]).status.code(), Some(2));
    assert!(String::from_utf8_lossy(&gdn(&["--help"]).stdout).contains("split"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_gdn"))
        .args(["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut error = String::new();
    child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
    assert!(child.wait().unwrap().success() && error.is_empty(), "{error}");
}
