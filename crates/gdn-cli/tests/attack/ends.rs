//! Ways for a run to end: signals, limits, streams that nobody reads.
#![cfg(unix)]

use std::{
    fs::{self, File},
    io::Write,
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::scene::{Scene, refused};

/// A file of zeros for `split`, its data a hole on the disk: 240 MB of rows take a while, and no space.
fn large(path: &Path, num_rows: usize) {
    let (qkvz, ba) = (num_rows * 12288 * 2, num_rows * 64 * 2);
    let header = format!(
        r#"{{"mixed_qkvz":{{"dtype":"BF16","shape":[{num_rows},12288],"data_offsets":[0,{qkvz}]}},"mixed_ba":{{"dtype":"BF16","shape":[{num_rows},64],"data_offsets":[{qkvz},{}]}}}}"#,
        qkvz + ba
    );
    let mut file = File::create(path).unwrap();
    file.write_all(&[&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    file.set_len((8 + header.len() + qkvz + ba) as u64).unwrap();
}

const SPLIT: [&str; 8] = ["split", "in", "-o", "out", "--preset", "Qwen3-Next-80B-A3B", "--threads", "1"];

/// Waits until the run has a temporary file.
fn until_it_writes(scene: &Scene, child: &mut Child) {
    let started = Instant::now();
    while fs::read_dir(&scene.folder).unwrap().count() < 2 {
        assert!(child.try_wait().unwrap().is_none(), "it came to its end too early");
        assert!(started.elapsed() < Duration::from_secs(60), "no temporary file appeared");
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn signals_that_ask_for_the_end_leave_nothing_behind() {
    let split = Scene::new(&[]);
    large(&split.path("in"), 10_000);
    let forward = Scene::new(&[("in", "qwen3-next-layer-decode.safetensors")]);
    let signals = [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129), (Signal::XCPU, 152)];
    // These tests may themselves be run under nohup.
    let as_ever = || {
        // SAFETY: it sets what a signal does back to what it does.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
        Ok(())
    };
    for (scene, args) in [(split, &SPLIT[..]), (forward, &["forward", "in", "-o", "out"])] {
        for (signal, code) in signals {
            let mut command = scene.command(args);
            // SAFETY: between fork and exec it makes a system call alone.
            unsafe { command.pre_exec(as_ever) };
            let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            until_it_writes(&scene, &mut child);
            kill_process(Pid::from_child(&child), signal).unwrap();
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{args:?}, {signal:?}: {output:?}");
            assert_eq!(output.stderr, b"gdn: interrupted, no output was written\n");
            assert_eq!(scene.names(), ["in"]);
        }
    }
}

#[test]
fn under_nohup_a_terminal_may_go_away() {
    let scene = Scene::new(&[]);
    large(&scene.path("in"), 4_000);
    let mut nohup = std::process::Command::new("sh");
    let script = format!("trap '' HUP\nexec {} {}", env!("CARGO_BIN_EXE_gdn"), SPLIT.join(" "));
    let mut child = nohup.args(["-c", &script]).current_dir(&scene.folder).spawn().unwrap();
    until_it_writes(&scene, &mut child);
    kill_process(Pid::from_child(&child), Signal::HUP).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(scene.names(), ["in", "out"]);
}

#[test]
fn files_that_may_not_be_so_large() {
    let scene = Scene::new(&[
        ("in", "r3-bf16.safetensors"),
        ("layer", "r1-f32-layer-decode.safetensors"),
        ("source", "repack/qwen3-next"),
    ]);
    let before = scene.files();
    // In blocks of 512 bytes or of 1024.
    refused(&scene.shell("ulimit -f 1", "split in -o out"), "ulimit -f");
    refused(&scene.shell("ulimit -f 1", "forward layer -o out"), "ulimit -f");
    refused(&scene.shell("ulimit -f 20", "repack source -o out"), "ulimit -f");
    assert_eq!(scene.files(), before);
    scene.succeeds(&["repack", "source", "-o", "out"]);
}

#[test]
fn streams_that_nobody_reads() {
    let scene = Scene::new(&[
        ("in", "r3-bf16.safetensors"),
        ("layer", "r1-f32-layer-decode.safetensors"),
        ("source", "repack/qwen3-next"),
    ]);
    // Something to say on the way: a folder is not carried over, and a tensor neither.
    fs::create_dir(scene.path("source/more")).unwrap();
    for (i, stream) in ["2>/dev/full", "2>&-", "2>/dev/full >/dev/full", ">&- 2>&-"].into_iter().enumerate() {
        for args in [
            format!("repack source -o out{i}"),
            format!("split in -o parts{i}"),
            format!("merge parts{i} -o back{i}"),
        ] {
            let output = scene.shell("", &format!("{args} {stream}"));
            assert_eq!(output.status.code(), Some(0), "{args} {stream}: {output:?}");
        }
        let output = scene.shell("", &format!("split nothing -o x {stream}"));
        assert_eq!(output.status.code(), Some(2), "{stream}: {output:?}");
    }
    let part = "cannot write to standard output";
    refused(&scene.shell("", "verify out0 --against source > /dev/full"), part);
    refused(&scene.shell("", "info > /dev/full"), part);
    // What cannot be told is not done.
    refused(&scene.shell("", "forward layer -o result > /dev/full"), part);
    assert!(!scene.path("result").exists());
    assert!(scene.shell("", "forward layer -o result | true").status.success());
    assert!(scene.path("result").exists());
    assert_eq!(scene.shell("", "--help > /dev/full").status.code(), Some(2));
    // A pipe that nobody reads, and no error.
    for args in ["--help", "info", "completions zsh", "verify out0 --against source", "forward layer"] {
        let output = scene.shell("", &format!("{args} | true")).status;
        assert!(output.success(), "{args}");
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn no_thread_to_be_had_is_an_error() {
    use crate::syscalls::{self, Fate};
    let scene = Scene::new(&[
        ("small", "r3-bf16.safetensors"),
        ("layer", "r1-f32-layer-decode.safetensors"),
        ("source", "repack/fp8"),
    ]);
    large(&scene.path("in"), 100);
    let before = scene.files();
    let without_threads = |args: &[&str]| {
        syscalls::run(&mut scene.command(args), |_, call| {
            if call.starts_with("clone") { Fate::Fails(libc::EAGAIN) } else { Fate::Done }
        })
    };
    let several = ["split", "small", "-o", "out", "--threads", "3"];
    let forward = ["forward", "layer", "--threads", "3"];
    for args in [
        &SPLIT[..6],
        &several,
        &forward,
        &["info"],
        &["bench", "split"],
        &["bench", "decode"],
        &["repack", "source", "-o", "new/out"],
    ] {
        let Ok((output, _)) = without_threads(args) else { return };
        refused(&output, "thread");
        assert_eq!(scene.files(), before, "{args:?}");
    }
    // Where one does all the work, no other is needed.
    let (output, _) = without_threads(&["split", "small", "-o", "out"]).unwrap();
    assert!(output.status.success(), "{output:?}");
}
