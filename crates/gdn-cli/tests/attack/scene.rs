//! A folder with inputs, the command on them, and what must hold afterwards.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// Files of a folder and of those in it, by their path there.
pub type Files = BTreeMap<String, Vec<u8>>;

/// A folder of its own, and the command.
pub struct Scene {
    pub folder: TempDir,
}

impl Scene {
    /// With the files of `inputs`: names in the scene, and what of `testdata/` is copied there.
    pub fn new(inputs: &[(&str, &str)]) -> Self {
        // In memory where that can be: thousands of runs are synced to the disk.
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() };
        let scene = Self { folder: folder.unwrap() };
        for (name, from) in inputs {
            let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(from);
            if from.is_dir() {
                fs::create_dir(scene.path(name)).unwrap();
                for entry in fs::read_dir(&from).unwrap() {
                    let entry = entry.unwrap();
                    fs::copy(entry.path(), scene.path(name).join(entry.file_name())).unwrap();
                }
            } else {
                fs::copy(&from, scene.path(name)).unwrap();
            }
        }
        scene
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The command with these arguments, in the folder.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gdn"));
        command.args(args).current_dir(&self.folder);
        command
    }

    /// The command as a shell starts it, after `before`: limits and redirections.
    pub fn shell(&self, before: &str, args: &str) -> Output {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{before}\nexec \"$GDN\" {args}")]).current_dir(&self.folder);
        shell.env("GDN", env!("CARGO_BIN_EXE_gdn")).output().unwrap()
    }

    pub fn gdn(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What the command said on standard error; it must have succeeded.
    #[track_caller]
    pub fn succeeds(&self, args: &[&str]) -> String {
        let output = self.gdn(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// It must have ended with 2 and a message that has `part`.
    #[track_caller]
    pub fn fails(&self, args: &[&str], part: &str) {
        refused(&self.gdn(args), part);
    }

    /// Everything in the folder, folders with a slash at their end.
    pub fn files(&self) -> Files {
        let mut all = Files::new();
        collect(self.folder.path(), "", &mut all);
        all
    }

    pub fn names(&self) -> Vec<String> {
        self.files().into_keys().collect()
    }
}

#[track_caller]
pub fn refused(output: &Output, part: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(error.contains("gdn: ") && error.contains(part), "'{error}' should say '{part}'");
    assert!(error.chars().all(|char| char == '\n' || !char.is_control()), "{error:?}");
}

fn collect(folder: &Path, before: &str, all: &mut Files) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{before}{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            let name = format!("{name}/");
            collect(&entry.path(), &name, all);
            all.insert(name, Vec::new());
        } else {
            let bytes = if kind.is_file() { fs::read(entry.path()).unwrap() } else { Vec::new() };
            all.insert(name, bytes);
        }
    }
}
