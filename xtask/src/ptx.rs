//! `cargo xtask ptx`: PTX out of `crates/gdn-kernels`, with the stock compiler and nothing else.
//!
//! Needed are a rustc that knows `nvptx64-nvidia-cuda` and the source of `core` of the very same version. Three calls of rustc make
//! core, compiler_builtins and the kernels; unstable features are opened for these alone. What comes out is cleaned of comments and of
//! the panic handler, held against what a driver can load, and assembled by ptxas for every GPU there is to be had.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

/// The version that made the committed PTX. Another one may make other, equally good text.
const VERSION: &str = "1.96.0";
const TARGET: &str = "nvptx64-nvidia-cuda";
/// Name of the file, the least GPU, and what is switched on in the source.
const BUILDS: [(&str, &str, &[&str]); 3] =
    [("sm_80", "sm_80", &[]), ("sm_90", "sm_90", &["programmatic"]), ("probe", "sm_80", &["probe"])];
const GPUS: [u32; 6] = [80, 86, 89, 90, 100, 120];
/// Kernels whose every access to `qkvz` has 16 bytes.
const WIDE: &str = "_16x";
const HASH_FILE: &str = "sources.hash";

/// Whether the compiler and its source are there.
pub(crate) fn can_build() -> bool {
    Compiler::find().is_ok()
}

/// Builds the PTX; with `check`, holds it against the committed one instead of writing it.
///
/// # Errors
/// No compiler (the sentence says how to get one), PTX that is stale, or PTX that no driver would load or that is slow.
pub(crate) fn run(check: bool) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace")?;
    let crate_dir = root.join("crates/gdn-kernels");
    let hash = hash_of_sources(&crate_dir)?;
    let compiler = match Compiler::find() {
        Ok(compiler) => compiler,
        Err(why) if check && env::var_os("CI").is_none() => {
            let recorded = fs::read_to_string(crate_dir.join("ptx").join(HASH_FILE)).unwrap_or_default();
            ensure!(
                recorded.trim() == hash,
                "the sources of the kernels have changed since their PTX was made, and it cannot be made here: {why}"
            );
            println!("ptx: not built again ({why}); the hash of the sources is the recorded one");
            return Ok(());
        }
        Err(why) => bail!("{why}"),
    };
    println!("ptx: {} with {}", compiler.rustc.display(), compiler.library.display());
    let target_dir = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let build_dir = target_dir.join("ptx");
    let ptxas = Ptxas::find(&target_dir)?;
    for (name, cpu, cfgs) in BUILDS {
        let text = compiler.build(&crate_dir, &build_dir, name, cpu, cfgs)?;
        let text = clean(&text);
        loads(&text).with_context(|| format!("{name}.ptx"))?;
        let made = build_dir.join(format!("{name}.ptx"));
        fs::write(&made, &text)?;
        for gpu in GPUS.into_iter().filter(|gpu| !cfgs.contains(&"programmatic") || *gpu >= 90) {
            ptxas.assemble(&made, gpu)?;
        }
        let committed = crate_dir.join("ptx").join(format!("{name}.ptx"));
        if check {
            let old = fs::read_to_string(&committed).unwrap_or_default();
            ensure!(
                old == text,
                "{} is stale: run `cargo xtask ptx` and commit what it writes (this build: {})",
                committed.display(),
                made.display()
            );
        } else {
            fs::write(&committed, &text)?;
        }
        println!("ptx: {name}: {} kernels, {} bytes", text.matches(".visible .entry").count(), text.len());
    }
    let recorded = crate_dir.join("ptx").join(HASH_FILE);
    if check {
        let old = fs::read_to_string(&recorded).unwrap_or_default();
        ensure!(old.trim() == hash, "{} is stale: run `cargo xtask ptx`", recorded.display());
    } else {
        fs::write(recorded, hash + "\n")?;
    }
    Ok(())
}

/// Of every source file that goes into the PTX.
fn hash_of_sources(crate_dir: &Path) -> Result<String> {
    let mut files: Vec<PathBuf> = fs::read_dir(crate_dir.join("src"))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.retain(|file| file.extension().is_some_and(|e| e == "rs") && !file.ends_with("emulator.rs"));
    files.sort();
    let mut text = String::from(VERSION);
    for file in files {
        text += &file.file_name().unwrap_or_default().to_string_lossy();
        // A checkout on Windows may have other line ends.
        text += &fs::read_to_string(file)?.replace("\r\n", "\n");
    }
    // FNV-1a: to notice a change, not to withstand anybody.
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    Ok(format!("{:016x}", text.bytes().fold(0xcbf2_9ce4_8422_2325, fnv)))
}

/// A rustc with the target, and the library source of its version.
struct Compiler {
    rustc: PathBuf,
    library: PathBuf,
}

impl Compiler {
    /// Looks where Debian and rustup put them.
    fn find() -> Result<Self> {
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

    fn build(
        &self,
        crate_dir: &Path,
        build_dir: &Path,
        name: &str,
        cpu: &str,
        cfgs: &[&str],
    ) -> Result<String> {
        let dir = build_dir.join(format!("{VERSION}-{cpu}"));
        fs::create_dir_all(&dir)?;
        let core = dir.join("libcore.rlib");
        let builtins = dir.join("libcompiler_builtins.rlib");
        if !core.is_file() {
            println!("ptx: core for {cpu}");
            let mut rustc = self.rustc(cpu);
            rustc.args(["--crate-name", "core", "--crate-type", "rlib", "--cap-lints", "allow"]);
            make(rustc.arg(self.library.join("core/src/lib.rs")), &core)?;
        }
        if !builtins.is_file() {
            let mut rustc = self.rustc(cpu);
            rustc.args(["--crate-name", "compiler_builtins", "--crate-type", "rlib", "--cap-lints", "allow"]);
            rustc.args(["--cfg", r#"feature="compiler-builtins""#, "--cfg", r#"feature="unmangled-names""#]);
            rustc.args(["--cfg", "optimizations_enabled"]).arg("--extern").arg(with("core=", &core));
            make(rustc.arg(self.library.join("compiler-builtins/compiler-builtins/src/lib.rs")), &builtins)?;
        }
        let mut rustc = self.rustc(cpu);
        rustc.args(["--crate-name", "gdn_kernels", "--crate-type", "lib", "--emit", "asm", "-D", "warnings"]);
        // The text must not depend on where the checkout is.
        rustc.arg("--remap-path-prefix").arg(format!("{}=gdn-kernels", crate_dir.display()));
        rustc.arg("--extern").arg(with("core=", &core));
        rustc.arg("--extern").arg(with("compiler_builtins=", &builtins)).arg("-L").arg(&dir);
        for cfg in cfgs {
            rustc.args(["--cfg", cfg]);
        }
        let out = dir.join(format!("{name}.s"));
        make(rustc.arg(crate_dir.join("src/lib.rs")), &out)?;
        Ok(fs::read_to_string(out)?)
    }

    fn rustc(&self, cpu: &str) -> Command {
        let mut rustc = Command::new(&self.rustc);
        // Without what cargo tells its own rustc.
        rustc.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("RUSTUP_TOOLCHAIN");
        rustc.env("RUSTC_BOOTSTRAP", "1");
        rustc.args(["--target", TARGET, "--edition", "2024", "-C", "opt-level=3", "-C", "panic=abort"]);
        rustc.arg("-C").arg(format!("target-cpu={cpu}"));
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

/// Drops comments, and the panic handler that nothing calls.
fn clean(text: &str) -> String {
    let mut out = String::from("// Made by `cargo xtask ptx` out of crates/gdn-kernels. Not to be edited.\n");
    let mut in_handler = false;
    for line in text.lines() {
        if line.starts_with(".visible .func ") && line.contains("rust_begin_unwind") {
            in_handler = true;
        }
        let kept = !in_handler && !line.trim_start().starts_with("//") && !line.trim().is_empty();
        if kept {
            out += line;
            out.push('\n');
        }
        in_handler &= line != "}";
    }
    out
}

/// That a driver finds everything the text speaks of: no function is called, so none can be missing.
fn loads(text: &str) -> Result<()> {
    let undefined: Vec<&str> =
        text.lines().filter(|line| line.contains(".func") || line.trim_start().starts_with("call")).collect();
    ensure!(undefined.is_empty(), "a kernel calls functions (a path that panics?): {undefined:?}");
    ensure!(text.contains(".visible .entry"), "there is no kernel");
    for kernel in text.split(".visible .entry ").skip(1) {
        let name = kernel.split('(').next().unwrap_or_default();
        let (loads, stores) = (kernel.contains("ld.global.v4.u32"), kernel.contains("st.global.v4.u32"));
        ensure!(!name.contains(WIDE) || loads && stores, "{name} does not move 16 bytes at a time");
    }
    Ok(())
}

/// The assembler of the CUDA toolkit, on the path or out of its wheel on PyPI.
struct Ptxas {
    path: PathBuf,
    /// Of the same wheel as the path, where there is one: looks into what was assembled.
    cuobjdump: Option<PathBuf>,
}

impl Ptxas {
    fn find(target_dir: &Path) -> Result<Self> {
        let tools = target_dir.join("tools");
        // Triton's wheel has the disassembler too, a matching pair.
        let wheel = tools.join("triton/backends/nvidia/bin");
        if !wheel.join("ptxas").is_file() {
            fs::create_dir_all(&tools)?;
            println!("ptx: ptxas out of the wheel of triton, into {}", tools.display());
            let mut pip = Command::new("python3");
            pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--upgrade"]);
            pip.args(["--disable-pip-version-check", "--root-user-action=ignore"]);
            pip.arg("--target").arg(&tools).arg("triton==3.6.0");
            let done = pip.output().context("python3, to fetch ptxas")?;
            ensure!(done.status.success(), "ptxas: {}", String::from_utf8_lossy(&done.stderr));
        }
        // Blackwell has an assembler of its own there.
        Ok(Self { path: wheel.join("ptxas"), cuobjdump: Some(wheel.join("cuobjdump")) })
    }

    /// Assembles for one GPU: no error, no spill, no stack, and the wide kernels move 16 bytes at a time.
    fn assemble(&self, ptx: &Path, gpu: u32) -> Result<()> {
        let cubin = ptx.with_extension(format!("sm_{gpu}.cubin"));
        let newer = self.path.with_file_name("ptxas-blackwell");
        let ptxas = if gpu >= 100 && newer.is_file() { &newer } else { &self.path };
        let done = Command::new(ptxas)
            .arg("-v")
            .arg(format!("-arch=sm_{gpu}"))
            .arg(ptx)
            .arg("-o")
            .arg(&cubin)
            .output()
            .with_context(|| format!("{}", ptxas.display()))?;
        let report = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "{} for sm_{gpu}: {report}", ptx.display());
        let kernels = fs::read_to_string(ptx)?.matches(".visible .entry").count();
        let clean = report.matches("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads").count();
        ensure!(clean == kernels, "{} for sm_{gpu} spills or has a stack:\n{report}", ptx.display());
        if let Some(cuobjdump) = &self.cuobjdump {
            widths(cuobjdump, &cubin, gpu)?;
        }
        Ok(())
    }
}

/// That every wide kernel has as many 16-byte loads and stores as rows, in the machine's own code, and none to local memory.
fn widths(cuobjdump: &Path, cubin: &Path, gpu: u32) -> Result<()> {
    let done = Command::new(cuobjdump).arg("--dump-sass").arg(cubin).output()?;
    let code = String::from_utf8_lossy(&done.stdout);
    ensure!(done.status.success(), "cuobjdump: {}", String::from_utf8_lossy(&done.stderr));
    for function in code.split("Function : ").skip(1) {
        let name = function.lines().next().unwrap_or_default().trim();
        let count = |what: &str| function.matches(what).count();
        let local = count("LDL") + count("STL");
        ensure!(local == 0, "{name} for sm_{gpu} uses local memory");
        if let Some((_, rows)) = name.split_once(WIDE) {
            let rows: usize = rows.parse().with_context(|| name.to_owned())?;
            let (loads, stores) = (count("LDG.E.128"), count("STG.E.128"));
            ensure!(
                loads >= rows && stores >= rows,
                "{name} for sm_{gpu} has {loads} loads and {stores} stores of 16 bytes, {rows} rows need as many"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_driver_loads_is_refused() {
        let kernel = ".visible .entry gdn_split_16x1(\n)\n{\n\tld.global.v4.u32\n\tst.global.v4.u32\n}\n";
        assert!(loads(kernel).is_ok());
        assert!(loads("").is_err());
        assert!(loads(&kernel.replace("ld.global.v4", "ld.global.v2")).is_err());
        assert!(loads(&format!(".extern .func panic;\n{kernel}")).is_err());
        assert!(loads(&kernel.replace("\tst.", "\tcall.uni panic;\n\tst.")).is_err());
    }

    #[test]
    fn comments_and_the_panic_handler_go() {
        let handler = ".visible .func _RN_17rust_begin_unwind(\n)\n{\n$L:\n\tbra $L;\n}\n";
        let text = clean(&format!("// a\n\n{handler}\t// b\n.visible .entry k(\n)\n{{\n\tret;\n}}\n"));
        assert!(text.ends_with("edited.\n.visible .entry k(\n)\n{\n\tret;\n}\n"), "{text}");
    }
}
