//! `cargo xtask ascend`: the Triton kernel lowered by triton-ascend, and what comes out run on the CPU
//! through MLIR's own tools.
//!
//! triton-ascend stands in Triton's place, so it gets a folder of its own under `target/`, beside the Python
//! package as it is in the repository. Neither an NPU nor CANN nor PyTorch is needed.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::Context;

use crate::shell::{apt_install, cargo, command, has, root, run as run_to_end, run_fetching, skip};

/// triton-ascend, what it imports, and what the tests are written with, with the hashes of their files.
const REQUIREMENTS: &str = "python/ascend/requirements.txt";
/// triton-ascend 3.2.0 has wheels for it, as vllm-ascend has.
const PYTHON: &str = "python3.11";
/// In step with `VERSION` in python/ascend/execution.py.
const LLVM: u32 = 22;

/// Runs python/ascend, with arguments for pytest.
///
/// # Errors
/// A test that fails, or something that could not be installed.
pub(crate) fn run(pytest: &[String]) -> anyhow::Result<()> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu")) || !has(PYTHON) {
        skip(format!("the Ascend kernel: triton-ascend is for x86-64 Linux here, with {PYTHON}"));
        return Ok(());
    }
    let tools = ["mlir-opt", "mlir-translate", "llc"].map(|tool| format!("{tool}-{LLVM}"));
    if !tools.iter().all(|tool| has(tool)) {
        if !has("apt-get") {
            skip(format!("the Ascend kernel: {} are not here, and there is no apt-get", tools.join(", ")));
            return Ok(());
        }
        apt_install(&[&format!("mlir-{LLVM}-tools"), &format!("llvm-{LLVM}")])?;
    }
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let folder = target.join("ascend");
    let site = install(&folder)?;
    let package = stage(&target, &folder.join("package"))?;
    let path = env::join_paths([package, site])?;
    let mut tests =
        command(PYTHON, &["-m", "pytest", "--quiet", "-p", "no:cacheprovider", "--rootdir", ".", "."]);
    tests.args(pytest).current_dir(root().join("python/ascend")).env("PYTHONPATH", path);
    tests.env("PYTHONDONTWRITEBYTECODE", "1").env_remove("TRITON_INTERPRET");
    run_to_end(&mut tests)
}

/// Puts the packages into a folder of their own, once for each list of them.
fn install(folder: &Path) -> anyhow::Result<PathBuf> {
    let (site, list) = (folder.join("site"), folder.join("site.txt"));
    let wanted = fs::read_to_string(root().join(REQUIREMENTS)).context(REQUIREMENTS)?;
    if fs::read_to_string(&list).is_ok_and(|installed| installed == wanted) {
        return Ok(site);
    }
    if site.exists() {
        fs::remove_dir_all(&site).with_context(|| site.display().to_string())?;
    }
    let mut pip = command(PYTHON, &["-m", "pip", "install", "--quiet", "--no-compile", "--target"]);
    pip.arg(&site).args(["--disable-pip-version-check", "--root-user-action=ignore"]);
    pip.args(["--require-hashes", "--no-deps", "--requirement", REQUIREMENTS]);
    run_fetching(&mut pip)?;
    fs::write(&list, wanted).with_context(|| list.display().to_string())?;
    Ok(site)
}

/// The Python package with its part in Rust, as it is compiled soonest: of it only the planner is used.
fn stage(target: &Path, folder: &Path) -> anyhow::Result<PathBuf> {
    let how = ["gdn.opt-level=0", "gdn-math.opt-level=0", "gdn.debug=0"]
        .map(|one| format!("profile.dev.package.{one}"));
    let mut build = cargo(&["build", "--package", "gdn-python"]);
    build.args(how.iter().flat_map(|one| ["--config", one]));
    run_to_end(&mut build)?;
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let package = folder.join("gdn");
    fs::create_dir_all(&package)?;
    for entry in fs::read_dir(root().join("python/gdn"))? {
        let path = entry?.path();
        if let (Some(name), true) = (path.file_name(), path.extension().is_some_and(|end| end == "py")) {
            fs::copy(&path, package.join(name)).with_context(|| path.display().to_string())?;
        }
    }
    let built = target.join("debug/lib_gdn.so");
    fs::copy(&built, package.join("_gdn.abi3.so")).with_context(|| built.display().to_string())?;
    Ok(folder.to_owned())
}
