//! The compiler that makes PTX, and how it is called.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::modules::Target;

/// The version that made the committed PTX. Another one may make other, equally good text.
pub(super) const VERSION: &str = "1.96.0";
const TRIPLE: &str = "nvptx64-nvidia-cuda";

/// The crates of device code in the order in which they are built, the kernels last. Each sees those before
/// it.
pub(super) const CRATES: [(&str, &str); 2] =
    [("gdn_math", "crates/gdn-math"), ("gdn_kernels", "crates/gdn-kernels")];

/// Without both of these a barrier, shuffle or product behind a branch is copied into each arm of it, where
/// half of the lanes never come: rustc threads jumps through it, and LLVM folds small blocks into the blocks
/// before (rust-lang/rust#137086).
const CONVERGENT: [&str; 2] =
    ["-Zmir-enable-passes=-JumpThreading", "-Cllvm-args=-simplifycfg-max-small-block-size=0"];

/// Loops of known length are unrolled up to so many instructions, by default 300: an array that a loop walks
/// stays in registers only where every index is a constant. The table's gate on stacks finds those that are
/// too long all the same.
const UNROLLED: &str = "-Cllvm-args=-unroll-threshold=5000";

/// What is compiled: the kernels of an op for a target.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) op: &'a str,
    pub(super) target: Target,
    /// Whether collectives stay convergent. Else the compiler is left to itself, to see what it does.
    pub(super) convergent: bool,
}

/// A rustc with the target, and the library source of its version.
pub(super) struct Compiler {
    pub(super) rustc: PathBuf,
    pub(super) library: PathBuf,
}

impl Compiler {
    /// Looks where Debian and rustup put them.
    pub(super) fn find() -> Result<Self> {
        let mut seen = Vec::new();
        let rustup_home = env::var_os("RUSTUP_HOME").map(PathBuf::from).or_else(|| {
            let home = env::var_os("HOME").or_else(|| env::var_os("USERPROFILE"))?;
            Some(Path::new(&home).join(".rustup"))
        });
        let toolchains = rustup_home.and_then(|home| fs::read_dir(home.join("toolchains")).ok());
        let toolchains: Vec<PathBuf> = toolchains.into_iter().flatten().flatten().map(|e| e.path()).collect();
        let candidates = [PathBuf::from("/usr/bin/rustc")]
            .into_iter()
            .chain(toolchains.iter().map(|toolchain| toolchain.join("bin/rustc")));
        for rustc in candidates {
            let Ok(out) = Command::new(&rustc).arg("--version").output() else { continue };
            let version = String::from_utf8_lossy(&out.stdout).into_owned();
            let number = version.split([' ', '-']).nth(1).unwrap_or_default().to_owned();
            seen.push(format!("{} {number}", rustc.display()));
            if number != VERSION {
                continue;
            }
            let sysroot = rustc.parent().and_then(Path::parent).unwrap_or(Path::new("/usr"));
            let libraries = [
                PathBuf::from(format!("/usr/src/rustc-{number}/library")),
                sysroot.join("lib/rustlib/src/rust/library"),
            ];
            if let Some(library) = libraries.into_iter().find(|l| l.join("core/src/lib.rs").is_file()) {
                return Ok(Self { rustc, library });
            }
            seen.push(String::from("without the source of its library"));
        }
        bail!(
            "no rustc {VERSION} with its library source. Debian: apt-get install rustc-web rust-web-src. Elsewhere: \
             rustup toolchain install {VERSION} --component rust-src. Found: {}",
            if seen.is_empty() { String::from("none") } else { seen.join(", ") }
        )
    }

    /// The PTX of a job, as the compiler writes it.
    pub(super) fn build(&self, root: &Path, build_dir: &Path, job: Job<'_>) -> Result<String> {
        let dir = build_dir.join(format!("{VERSION}-{}", job.target.name()));
        fs::create_dir_all(&dir)?;
        let core = dir.join("libcore.rlib");
        let builtins = dir.join("libcompiler_builtins.rlib");
        if !core.is_file() {
            println!("ptx: core for {}", job.target.name());
            let mut rustc = self.rustc(job.target);
            rustc.args(["--crate-name", "core", "--crate-type", "rlib", "--cap-lints", "allow"]);
            make(rustc.arg(self.library.join("core/src/lib.rs")), &core)?;
        }
        if !builtins.is_file() {
            let mut rustc = self.rustc(job.target);
            rustc.args(["--crate-name", "compiler_builtins", "--crate-type", "rlib", "--cap-lints", "allow"]);
            rustc.args(["--cfg", r#"feature="compiler-builtins""#, "--cfg", r#"feature="unmangled-names""#]);
            rustc.args(["--cfg", "optimizations_enabled"]).arg("--extern").arg(with("core=", &core));
            make(rustc.arg(self.library.join("compiler-builtins/compiler-builtins/src/lib.rs")), &builtins)?;
        }
        let mut before: Vec<String> = vec![with("core=", &core), with("compiler_builtins=", &builtins)];
        let ours = dir.join(if job.convergent { "convergent" } else { "left-to-itself" });
        fs::create_dir_all(&ours)?;
        let (kernels, others) = CRATES.split_last().context("the kernels")?;
        for (name, folder) in others {
            let out = ours.join(format!("lib{name}.rlib"));
            let mut rustc = self.our_crate(root, name, folder, job, &before);
            make(rustc.args(["--crate-type", "rlib"]).arg("-L").arg(&dir), &out)?;
            before.push(with(&format!("{name}="), &out));
        }
        let out = ours.join(format!("{}.s", job.op));
        let mut rustc = self.our_crate(root, kernels.0, kernels.1, job, &before);
        rustc.args(["--crate-type", "lib", "--emit", "asm", "--cfg"]).arg(format!("op={:?}", job.op));
        make(rustc.arg("-L").arg(&dir).arg("-L").arg(&ours), &out)?;
        Ok(fs::read_to_string(out)?)
    }

    /// A call that compiles a crate of this workspace.
    fn our_crate(&self, root: &Path, name: &str, folder: &str, job: Job<'_>, before: &[String]) -> Command {
        let mut rustc = self.rustc(job.target);
        rustc.arg(root.join(folder).join("src/lib.rs")).args(["--crate-name", name, "-D", "warnings"]);
        // The text must not depend on where the checkout is.
        rustc.arg("--remap-path-prefix").arg(format!("{}=gdn", root.display()));
        for earlier in before {
            rustc.arg("--extern").arg(earlier);
        }
        rustc.arg(UNROLLED);
        if job.convergent {
            rustc.args(CONVERGENT);
        }
        if job.target != Target::Sm80 {
            rustc.args(["--cfg", "sm_90"]);
        }
        rustc
    }

    fn rustc(&self, target: Target) -> Command {
        let mut rustc = Command::new(&self.rustc);
        // Without what cargo tells its own rustc.
        rustc.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("RUSTUP_TOOLCHAIN");
        rustc.env("RUSTC_BOOTSTRAP", "1");
        rustc.args(["--target", TRIPLE, "--edition", "2024", "-C", "opt-level=3", "-C", "panic=abort"]);
        rustc.arg("-C").arg(format!("target-cpu={}", target.name()));
        if target == Target::Sm90 {
            // Bulk copies are younger than the first PTX for this target. The oldest driver that the library
            // takes knows 8.0.
            rustc.args(["-C", "target-feature=+ptx80"]);
        }
        rustc
    }
}

fn with(prefix: &str, path: &Path) -> String {
    format!("{prefix}{}", path.display())
}

/// Runs a compiler; what it makes is there only if it succeeds.
fn make(command: &mut Command, out: &Path) -> Result<()> {
    let part = out.with_extension("part");
    let done = command.arg("-o").arg(&part).output().with_context(|| format!("{command:?}"))?;
    ensure!(done.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&done.stderr));
    fs::rename(part, out)?;
    Ok(())
}
