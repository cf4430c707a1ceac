//! Licences, origins, duplicates and known vulnerabilities of what is depended on: here, in `fuzz/` and in
//! the examples.

use anyhow::Context;

use crate::shell::{cargo, command, has, root, run, skip};

/// The version of cargo-deny that is installed where there is none.
const CARGO_DENY: &str = "0.20.2";

/// Each workspace, and what it is held to besides known vulnerabilities. What an example's own dependencies
/// have twice is theirs.
const WORKSPACES: [(&str, &[&str]); 3] = [
    ("Cargo.toml", &["licenses", "bans", "sources"]),
    ("fuzz/Cargo.toml", &["licenses", "bans", "sources"]),
    ("examples/candle/Cargo.toml", &["licenses", "sources"]),
];

/// Checks all of it. Known vulnerabilities are looked for where their database can be fetched.
///
/// # Errors
/// What cargo-deny says.
pub(crate) fn run_all() -> anyhow::Result<()> {
    let deny = installed()?;
    let fetched = command(&deny, &["fetch", "db"]).output().context("cargo-deny")?;
    if !fetched.status.success() {
        let said = String::from_utf8_lossy(&fetched.stderr).into_owned();
        let why = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it does not say why");
        skip(format!("known vulnerabilities: cargo-deny cannot fetch RustSec's database: {why}"));
    }
    for (manifest, checks) in WORKSPACES {
        println!("{manifest}");
        let mut check = command(&deny, &["--locked", "--manifest-path", manifest, "check"]);
        check.args(checks);
        if fetched.status.success() {
            check.arg("advisories");
        }
        run(&mut check)?;
    }
    Ok(())
}

fn installed() -> anyhow::Result<String> {
    let tools = root().join("target/tools");
    let path = tools.join("bin/cargo-deny");
    let installed = if has("cargo-deny") { "cargo-deny".into() } else { path };
    let installed = installed.display().to_string();
    if !has(&installed) {
        // Unoptimised, it is built in a quarter of the time and checks in seconds all the same.
        let mut install = cargo(&["install", "cargo-deny", "--version", CARGO_DENY, "--debug", "--root"]);
        run(install.arg(&tools).env("CARGO_PROFILE_DEV_DEBUG", "0"))?;
    }
    Ok(installed)
}
