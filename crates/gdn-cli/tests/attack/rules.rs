//! What a run may write over, goes on with, and takes away.

use std::fs;
#[cfg(unix)]
use std::os::unix::fs::symlink;

use crate::scene::Scene;

const REPACK: [&str; 4] = ["repack", "source", "-o", "out"];

/// A source, and what it becomes in `whole`.
fn scene() -> Scene {
    let scene = Scene::new(&[("source", "repack/qwen3-next")]);
    scene.succeeds(&["repack", "source", "-o", "whole"]);
    scene
}

/// That the destination is there and is what it should be, and that nothing else is.
#[track_caller]
fn is_whole(scene: &Scene, out: &str) {
    let of = |folder: &str| -> Vec<_> {
        let files = scene.files().into_iter();
        files.filter_map(|(name, bytes)| Some((name.strip_prefix(folder)?.to_owned(), bytes))).collect()
    };
    assert!(of(&format!("{out}/")) == of("whole/"), "{:?}", scene.names());
    assert!(!scene.path(&format!("{out}.partial")).exists());
    scene.succeeds(&["verify", out, "--against", "source"]);
}

#[test]
fn what_another_run_left_does_not_become_part_of_the_destination() {
    let scene = scene();
    type Leave<'s> = &'s dyn Fn(&std::path::Path);
    let file: Leave<'_> = &|path| fs::write(path, "of another source").unwrap();
    let folder: Leave<'_> = &|path| fs::create_dir(path).unwrap();
    #[cfg(unix)]
    let link: Leave<'_> = &|path| symlink("/etc/passwd", path).unwrap();
    let left = [
        ("model-00005-of-00005.safetensors", file),
        ("pytorch_model.bin", file),
        ("tokenizer.json", file),
        (".hidden", file),
        (".gdn-other", file),
        ("original", folder),
        (".gdn-x.tmp", folder),
        #[cfg(unix)]
        ("link.safetensors", link),
    ];
    for (name, leave) in left {
        let path = scene.path("out.partial").join(name);
        fs::create_dir(scene.path("out.partial")).unwrap();
        leave(&path);
        scene.fails(&REPACK, name);
        assert!(fs::symlink_metadata(&path).is_ok(), "{name} was somebody's");
        let left: Vec<_> = fs::read_dir(scene.path("out.partial")).unwrap().collect();
        assert!(left.len() == 1 && !scene.path("out").exists(), "{left:?}");
        if fs::remove_file(&path).is_err() {
            fs::remove_dir(&path).unwrap();
        }
        scene.succeeds(&REPACK);
        is_whole(&scene, "out");
        fs::remove_dir_all(scene.path("out")).unwrap();
    }
}

#[test]
fn a_lock_that_was_left_is_no_part_of_a_checkpoint() {
    let scene = scene();
    for folder in ["source", "whole"] {
        fs::write(scene.path(folder).join(".gdn-lock"), "").unwrap();
    }
    // Read, it is not there.
    scene.succeeds(&["verify", "whole", "--against", "source"]);
    scene.succeeds(&REPACK);
    assert!(!scene.path("out/.gdn-lock").exists());
    fs::remove_file(scene.path("source/.gdn-lock")).unwrap();
    // A run that was killed at its very end is taken up, and only that lock is removed.
    let before = scene.files();
    scene.succeeds(&["repack", "source", "-o", "whole"]);
    let mut wanted = before.clone();
    wanted.remove("whole/.gdn-lock");
    assert_eq!(scene.files(), wanted);
    is_whole(&scene, "out");
    scene.fails(&["repack", "source", "-o", "whole"], "there already");

    // What is not this run's is left as it is.
    fs::write(scene.path("out/.gdn-lock"), "").unwrap();
    type Change<'s> = &'s dyn Fn();
    let config = fs::read(scene.path("out/config.json")).unwrap();
    let changes: [(Change<'_>, Change<'_>); 3] = [
        (&|| fs::write(scene.path("out/config.json"), "{}").unwrap(), &|| {
            fs::write(scene.path("out/config.json"), &config).unwrap();
        }),
        (&|| fs::write(scene.path("out/more"), "").unwrap(), &|| {
            fs::remove_file(scene.path("out/more")).unwrap()
        }),
        (
            &|| fs::rename(scene.path("out/model-00002-of-00004.safetensors"), scene.path("kept")).unwrap(),
            &|| fs::rename(scene.path("kept"), scene.path("out/model-00002-of-00004.safetensors")).unwrap(),
        ),
    ];
    for (change, undo) in changes {
        change();
        let before = scene.files();
        scene.fails(&REPACK, "out");
        assert_eq!(scene.files(), before);
        undo();
    }
    scene.succeeds(&REPACK);
    is_whole(&scene, "out");
}

#[test]
fn a_source_is_never_written_to() {
    let scene = scene();
    fs::rename(scene.path("source"), scene.path("x.partial")).unwrap();
    fs::write(scene.path("x.partial/.gdn-mine.tmp"), "mine").unwrap();
    let before = scene.files();
    for (out, part) in [
        ("x", "where the source is"),
        ("x.partial", "it is the source"),
        ("x.partial/out", "within the source"),
        ("x.partial/a/b/out", "within the source"),
    ] {
        scene.fails(&["repack", "x.partial", "-o", out], part);
        assert_eq!(scene.files(), before, "{out}");
    }
    #[cfg(unix)]
    {
        symlink("x.partial", scene.path("link")).unwrap();
        scene.fails(&["repack", "link", "-o", "x"], "where the source is");
        scene.fails(&["repack", "x.partial", "-o", "link/out"], "within the source");
        fs::remove_file(scene.path("link")).unwrap();
        fs::create_dir(scene.path("x.partial/inner")).unwrap();
        fs::rename(scene.path("whole"), scene.path("x.partial/inner/whole")).unwrap();
        let before = scene.files();
        scene.fails(
            &["repack", "x.partial/inner/whole", "-o", "x", "--to", "interleaved"],
            "where the source is",
        );
        assert_eq!(scene.files(), before);
    }
}

#[test]
fn a_run_that_is_refused_leaves_no_folders() {
    let scene = scene();
    let before = scene.files();
    fs::write(scene.path("file"), "").unwrap();
    scene.fails(&["repack", "source", "-o", "file/out"], "cannot write");
    fs::remove_file(scene.path("file")).unwrap();
    for args in [&["repack", "nothing", "-o", "a/b/out"][..], &["repack", "whole", "-o", "a/b/out"]] {
        assert_eq!(scene.gdn(args).status.code(), Some(2));
        assert_eq!(scene.files(), before, "{args:?}");
    }
    scene.succeeds(&["repack", "source", "-o", "a/b/out"]);
    is_whole(&scene, "a/b/out");
}

/// Many runs for one destination: one makes it, the others say so, and nothing is left of them.
#[test]
fn runs_that_race() {
    let scene = scene();
    let before = scene.files();
    for round in 0..8 {
        let start = |_| scene.command(&REPACK).stderr(std::process::Stdio::piped()).spawn().unwrap();
        let runs: Vec<_> = (0..6).map(start).collect();
        let outputs: Vec<_> = runs.into_iter().map(|run| run.wait_with_output().unwrap()).collect();
        let done = outputs.iter().filter(|output| output.status.success()).count();
        assert_eq!(done, 1, "round {round}: {outputs:?}");
        for output in outputs.iter().filter(|output| !output.status.success()) {
            let error = String::from_utf8_lossy(&output.stderr);
            let expected = error.contains("another run is writing") || error.contains("it is there already");
            assert!(output.status.code() == Some(2) && expected, "round {round}: {error}");
        }
        is_whole(&scene, "out");
        fs::remove_dir_all(scene.path("out")).unwrap();
        assert!(scene.files() == before, "{:?}", scene.names());
    }
}

/// The one rule: no output is a link, and what it leads to stays as it is.
#[cfg(unix)]
#[test]
fn no_output_is_a_link() {
    let scene = Scene::new(&[
        ("source", "repack/fp8"),
        ("in", "r3-bf16.safetensors"),
        ("parts", "r3-bf16.expected.safetensors"),
        ("layer", "r1-f32-layer-decode.safetensors"),
    ]);
    fs::create_dir(scene.path("folder")).unwrap();
    fs::write(scene.path("file"), "precious").unwrap();
    let commands = [&["repack", "source"], &["split", "in"], &["merge", "parts"], &["forward", "layer"]];
    for leads_to in ["file", "folder", "nothing", "in", "source", "/dev/null", "link"] {
        symlink(leads_to, scene.path("link")).unwrap();
        let before = scene.files();
        for args in commands {
            scene.fails(&[args[0], args[1], "-o", "link"], "it is a symbolic link");
            assert_eq!(scene.files(), before, "{args:?} to a link to {leads_to}");
            assert_eq!(fs::read_link(scene.path("link")).unwrap(), std::path::Path::new(leads_to));
        }
        fs::remove_file(scene.path("link")).unwrap();
    }
    // Links on the way are followed.
    symlink("folder", scene.path("way")).unwrap();
    for (args, out) in commands.into_iter().zip(["way/a", "way/b", "way/c", "way/d"]) {
        scene.succeeds(&[args[0], args[1], "-o", out]);
    }
    assert!(scene.path("folder/a").is_dir() && scene.path("folder/b").is_file());
}

/// A source is overwritten in place in the middle of a run, before each of its system calls: what comes out
/// was made from what was there before, or after, or is nothing.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn sources_that_change() {
    use std::{fs::File, os::unix::fs::FileExt, path::Path, time::SystemTime};

    use crate::syscalls::{self, Fate};

    const FORWARD: [&str; 6] = ["forward", "in", "-o", "out", "--threads", "1"];
    let repack = (("source", "repack/qwen3-next"), &REPACK[..], "source/model-00003-of-00004.safetensors");
    let split = (("in", "r3-bf16.safetensors"), &["split", "in", "-o", "out"][..], "in");
    let merge = (("in", "r3-bf16.expected.safetensors"), &["merge", "in", "-o", "out"][..], "in");
    let forward = (("in", "r1-f32-layer-decode.safetensors"), &FORWARD[..], "in");
    for (input, args, file) in [repack, split, merge, forward] {
        // Its last tensor gets other bytes, in place.
        let change = |path: &Path| {
            let file = File::options().write(true).open(path).unwrap();
            let end = file.metadata().unwrap().len();
            file.write_all_at(&[0xa5; 16], end - 16).unwrap();
        };
        let fresh = || {
            let scene = Scene::new(&[input]);
            let file = File::options().write(true).open(scene.path(file)).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
            scene
        };
        let out = |scene: &Scene| -> Vec<_> {
            scene.files().into_iter().filter(|(name, _)| name.starts_with("out")).collect()
        };
        let (before, after) = (fresh(), fresh());
        let Ok((_, calls)) = syscalls::run(&mut before.command(args), |_, _| Fate::Done) else { return };
        change(&after.path(file));
        after.succeeds(args);
        let (before, after) = (out(&before), out(&after));
        assert!(before != after);
        let mut seen = [0; 3];
        for k in 0..calls {
            let scene = fresh();
            let (output, _) = syscalls::run(&mut scene.command(args), |i, _| {
                if i == k {
                    change(&scene.path(file));
                }
                Fate::Done
            })
            .unwrap();
            let got = out(&scene);
            let said = String::from_utf8_lossy(&output.stderr);
            if output.status.success() {
                assert!(got == before || got == after, "{args:?}: changed before call {k}");
                seen[usize::from(got == after)] += 1;
            } else {
                assert!(
                    output.status.code() == Some(2) && said.contains("was changed while it was read"),
                    "{args:?}, {k}: {said}"
                );
                assert!(
                    got.iter().all(|(name, _)| name.starts_with("out.partial")),
                    "{args:?}, {k}: {got:?}"
                );
                seen[2] += 1;
            }
        }
        assert!(seen[1] > 0 && seen[2] > 0, "{args:?}: {seen:?}");
    }
}
