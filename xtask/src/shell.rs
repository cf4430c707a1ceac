//! Running other programs.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
    time::Duration,
};

use anyhow::{Context, bail};

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// `program args…` in the root of the repository.
pub(crate) fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(root());
    command
}

/// The cargo that runs this, held to the lock file.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut cargo = command(&std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()), &[]);
    let (subcommand, rest) = args.split_at(args.len().min(1));
    cargo.args(subcommand);
    // It has no dependencies to look at.
    if subcommand != ["fmt"] {
        cargo.arg("--locked");
    }
    // What a chore builds is built once and debugged by nobody: without these a build takes two thirds more
    // of a processor's time, and six times the room.
    cargo.env("CARGO_INCREMENTAL", "0").env("CARGO_PROFILE_DEV_DEBUG", "0");
    cargo.args(rest);
    cargo
}

/// Runs to the end; an error where it fails.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

/// Runs what fetches from a network: where it fails it is run again, twice at most, since an index may be out
/// of reach for a moment. The error is the last one's.
pub(crate) fn run_fetching(command: &mut Command) -> anyhow::Result<()> {
    run_again(command, Duration::from_secs(10))
}

fn run_again(command: &mut Command, pause: Duration) -> anyhow::Result<()> {
    for left in [2, 1] {
        let Err(why) = run(command) else { return Ok(()) };
        println!("{why:#}; run again in {} s, {left} more at most", pause.as_secs());
        thread::sleep(pause);
    }
    run(command)
}

/// Whether a program is there to be run.
pub(crate) fn has(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// How a line begins that says what was skipped.
pub(crate) const SKIPPED: &str = "skipped: ";

static ALL_SKIPPED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Says that something is not looked at here, and why: now, and at the end.
pub(crate) fn skip(what: impl Into<String>) {
    let what = what.into();
    println!("{SKIPPED}{what}");
    if let Ok(mut skipped) = ALL_SKIPPED.lock() {
        skipped.push(what);
    }
}

/// What was skipped since this was last asked.
pub(crate) fn skipped() -> Vec<String> {
    ALL_SKIPPED.lock().map(|mut skipped| std::mem::take(&mut *skipped)).unwrap_or_default()
}

/// Waits until no other step calls apt-get, which would refuse to work beside itself. Until what comes back
/// is dropped, the others wait.
pub(crate) fn apt_alone() -> anyhow::Result<File> {
    let path = root().join("target/tools/apt-get.lock");
    fs::create_dir_all(path.with_file_name(""))?;
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    file.lock()?;
    Ok(file)
}

/// Installs Debian packages: as root, or else through sudo where it asks for no password.
pub(crate) fn apt_install(packages: &[&str]) -> anyhow::Result<()> {
    let what = packages.join(" ");
    if !has("apt-get") {
        bail!("{what} must be installed first: there is no apt-get to do it");
    }
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout.trim_ascii() == b"0");
    if !is_root && !has("sudo") {
        bail!("as root, run: apt-get install --no-install-recommends {what}");
    }
    let _alone = apt_alone()?;
    println!(
        "installing on this machine, with apt-get{}: {what}",
        if is_root { "" } else { " through sudo" }
    );
    let apt = |args: &[&str]| {
        let mut command = match is_root {
            true => command("apt-get", &[]),
            false => command("sudo", &["-n", "apt-get"]),
        };
        command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
        run_fetching(&mut command)
    };
    apt(&["update", "-qq"])?;
    apt(&[&["install", "-y", "-qq", "--no-install-recommends"], packages].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fetches_is_run_three_times_at_most() {
        let folder = tempfile::tempdir().unwrap();
        let tries = |succeeds_at: usize| {
            let count = folder.path().join(succeeds_at.to_string());
            let script = format!("echo >> $0; test $(wc -l < $0) -ge {succeeds_at}");
            let mut shell = command("sh", &["-c", &script, &count.display().to_string()]);
            let ended = run_again(&mut shell, Duration::ZERO);
            (ended.is_ok(), fs::read_to_string(count).unwrap().len())
        };
        assert_eq!([1, 3, 4].map(tries), [(true, 1), (true, 3), (false, 3)]);
    }
}
