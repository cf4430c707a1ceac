//! `cargo xtask engines`: a whole vLLM on the CPU, with gdn and without.
//!
//! vLLM and what it requires get an environment of their own under `target/`, over that of the Python tests,
//! which has PyTorch, transformers and gdn: nothing of theirs is there when other tests run.

use crate::{
    python,
    shell::{apt_install, has, root, run as run_to_end, skip},
};

/// Every package that is installed, with the hashes of its files.
const REQUIREMENTS: &str = "python/engines/requirements.txt";
/// vLLM and Inductor compile with it while they run.
const COMPILER: &str = "g++";

/// Runs python/engines, with arguments for pytest, over the environment with the package, which it does not change and asks
/// for where it can run.
///
/// # Errors
/// A test that fails, or something that could not be installed.
pub(crate) fn run(
    below: impl FnOnce() -> anyhow::Result<python::Environment>,
    pytest: &[String],
) -> anyhow::Result<()> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu")) {
        skip("a whole vLLM on the CPU: its wheel is for x86-64 Linux");
        return Ok(());
    }
    if !has(COMPILER)
        && let Err(why) = apt_install(&[COMPILER])
    {
        skip(format!("a whole vLLM on the CPU: {COMPILER} is not here: {why:#}"));
        return Ok(());
    }
    let below = below()?;
    let environment = match below.over("vllm", REQUIREMENTS) {
        Err(why) if !below.reaches_the_index() => {
            skip(format!("a whole vLLM on the CPU: pip cannot reach its index: {why:#}"));
            return Ok(());
        }
        made => made?,
    };
    let mut tests = environment.python(&["-m", "pytest", "--quiet", "-rs", "--durations=5"]);
    tests.args(["-p", "no:cacheprovider", "--rootdir", ".", "."]).args(pytest);
    tests.current_dir(root().join("python/engines"));
    run_to_end(&mut tests)
}
