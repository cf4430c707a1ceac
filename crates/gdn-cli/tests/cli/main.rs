//! The command as a user meets it.

mod bench;
mod forward;
mod split;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

pub(crate) fn gdn(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gdn")).args(args).output().unwrap()
}

pub(crate) fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A device that no machine has, and what is said of it.
pub(crate) fn no_device() -> ([&'static str; 2], &'static str) {
    #[cfg(feature = "cuda")]
    let said = match gdn::cuda::devices() {
        Ok(_) => "no device cuda:999, this machine has",
        Err(_) => "no NVIDIA driver on this machine",
    };
    #[cfg(not(feature = "cuda"))]
    let said = "this gdn was built without the feature 'cuda'";
    (["--device", "cuda:999"], said)
}

/// That the command ended with one clear line and exit code 2, and left nothing in `directory` but `files`.
#[track_caller]
pub(crate) fn refused(output: &Output, part: &str, directory: &TempDir, files: usize) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.starts_with("gdn: ") && error.trim_end().lines().count() == 1, "{error}");
    assert!(error.contains(part), "'{error}' should say '{part}'");
    let left: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), files, "{left:?}");
}
