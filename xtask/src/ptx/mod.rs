//! `cargo xtask ptx`: PTX out of `crates/gdn-kernels`, with the stock compiler and nothing else.
//!
//! Needed are a rustc that knows `nvptx64-nvidia-cuda` and the source of `core` of the very same version.
//! Plain calls of rustc make core, compiler_builtins and the crates of device code; unstable features are
//! opened for these alone. What comes out is cleaned of comments and of the panic handler, held against what
//! a driver can load, assembled by ptxas for every GPU that it is loaded on, and held to what the table of
//! kernels says of it (`crates/gdn-kernels/src/modules.rs`). Where the table asks for machine code too, what ptxas
//! made is kept beside it.

mod compiler;
mod gates;

/// What the library embeds, `xtask` makes: the text is not there yet.
macro_rules! text {
    ($file:literal) => {
        ""
    };
}

/// As `text!`.
macro_rules! code {
    ($file:literal) => {
        &[]
    };
}

#[allow(dead_code)]
#[path = "../../../crates/gdn-kernels/src/modules.rs"]
mod modules;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use compiler::{CRATES, Compiler, Job, VERSION};
use gates::Tools;
use modules::{Code, MODULES, Module, PROBES};

const HASH_FILE: &str = "sources.hash";
/// Of each file of machine code its name, the hash of the PTX and the version of ptxas it was made of, and its own.
const CODE_FILE: &str = "code.hash";

/// Whether the compiler and its source are there.
pub(crate) fn can_build() -> bool {
    Compiler::find().is_ok()
}

/// Builds the PTX; with `check`, holds it against the committed one instead of writing it. With `only`, that of
/// the files whose names have this in them, and no more: the hash of the sources stays what it was.
///
/// # Errors
/// No compiler (the sentence says how to get one), PTX that is stale, or PTX that no driver would load, that
/// is wrong or slow.
pub(crate) fn run(check: bool, only: Option<&str>) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace")?;
    let committed = root.join("crates/gdn-kernels/ptx");
    let hash = hash_of_sources(root)?;
    let compiler = match Compiler::find() {
        Ok(compiler) => compiler,
        Err(why) if check && env::var_os("CI").is_none() => {
            let recorded = fs::read_to_string(committed.join(HASH_FILE)).unwrap_or_default();
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
    let build =
        Build { compiler: &compiler, root, dir: target_dir.join("ptx"), tools: Tools::find(&target_dir)? };
    for module in PROBES.iter().chain(MODULES) {
        let file = format!("{}.{}.ptx", module.op, module.target.name());
        if only.is_some_and(|part| !file.contains(part)) {
            continue;
        }
        let text = build.checked(module, &file).with_context(|| file.clone())?;
        keep(check, &committed, &file, text.as_bytes())?;
        for code in module.code {
            code_of(check, &build, &committed, (module, code), &text)?;
        }
        println!("ptx: {file}: {} kernels, {} bytes", module.kernels().count(), text.len());
    }
    if let Some(part) = only {
        println!("ptx: only what has '{part}' in its name");
        return Ok(());
    }
    build.the_gate_bites()?;
    nothing_else(&committed)?;
    let recorded = committed.join(HASH_FILE);
    if check {
        let old = fs::read_to_string(&recorded).unwrap_or_default();
        ensure!(old.trim() == hash, "{} is stale: run `cargo xtask ptx`", recorded.display());
    } else {
        fs::write(recorded, hash + "\n")?;
    }
    Ok(())
}

/// Writes a file among the committed ones; with `check`, sees that it is there already.
fn keep(check: bool, committed: &Path, file: &str, made: &[u8]) -> Result<()> {
    let path = committed.join(file);
    if check {
        let is_there = fs::read(&path).is_ok_and(|old| old == made);
        ensure!(is_there, "{} is stale: run `cargo xtask ptx` and commit what it writes", path.display());
        return Ok(());
    }
    fs::write(&path, made).with_context(|| path.display().to_string())
}

/// Keeps the machine code of a module; with `check`, sees that what is there is of this PTX. Registers are not
/// given out alike by each run of ptxas, so its bytes are not compared: what it was made of is written down, and
/// the code itself is held to the table.
fn code_of(
    check: bool,
    build: &Build<'_>,
    committed: &Path,
    (module, code): (&Module, &Code),
    text: &str,
) -> Result<()> {
    let (file, record) = (file_of_code(module, code), committed.join(CODE_FILE));
    let path = committed.join(&file);
    let lines = fs::read_to_string(&record).unwrap_or_default();
    // ptxas is of a version that is written there.
    let made_of = fnv(format!("{text}{}", include_str!("requirements.txt")).as_bytes());
    let line = |bytes: &[u8]| format!("{file} {made_of} {}", fnv(bytes));
    let is_fresh = fs::read(&path).is_ok_and(|bytes| lines.lines().any(|known| known == line(&bytes)));
    if !is_fresh {
        ensure!(!check, "{} is stale: run `cargo xtask ptx` and commit what it writes", path.display());
        let bytes = fs::read(build.dir.join(&file))?;
        fs::write(&path, &bytes).with_context(|| path.display().to_string())?;
        let start = format!("{file} ");
        let mut lines: Vec<_> = lines.lines().filter(|l| !l.starts_with(&start)).map(str::to_owned).collect();
        lines.push(line(&bytes));
        lines.sort();
        fs::write(record, lines.join("\n") + "\n")?;
    }
    let functions = build.tools.code(&path, &build.dir.join(&file).with_extension("report"))?;
    gates::code(module, &functions).with_context(|| file)
}

fn file_of_code(module: &Module, code: &Code) -> String {
    format!("{}.{}.{}.cubin", module.op, module.target.name(), code.gpu)
}

struct Build<'a> {
    compiler: &'a Compiler,
    root: &'a Path,
    dir: PathBuf,
    tools: Tools,
}

impl Build<'_> {
    /// The PTX of a module, which has passed every gate.
    fn checked(&self, module: &Module, file: &str) -> Result<String> {
        let text = self.made(module, file, true)?;
        gates::text(module, &text)?;
        for gpu in gates::gpus(module, MODULES) {
            let code = self.tools.assemble(&self.dir.join(file), gpu)?;
            gates::code(module, &code).with_context(|| format!("for {gpu}"))?;
        }
        Ok(text)
    }

    fn made(&self, module: &Module, file: &str, convergent: bool) -> Result<String> {
        let job = Job { op: module.op, target: module.target, convergent };
        let text = gates::clean(module, &self.compiler.build(self.root, &self.dir, job)?);
        fs::write(self.dir.join(file), &text)?;
        Ok(text)
    }

    /// Sees that the count of collectives finds what it is for: each probe of them, compiled without the
    /// flags that keep them convergent, must fail it in the PTX, and one at least in the machine's code
    /// (ptxas puts some together again). When a compiler comes that does without the flags, this says so.
    fn the_gate_bites(&self) -> Result<()> {
        let module =
            PROBES.iter().find(|module| module.op == "convergence").context("the probe of convergence")?;
        let file = "left-to-itself.ptx";
        let text = self.made(module, file, false)?;
        let code = self.tools.assemble(&self.dir.join(file), gates::gpus(module, MODULES)[0])?;
        let mut in_code = 0;
        for kernel in module.kernels() {
            let Err(found) = gates::collectives_in_text(kernel, &text) else {
                bail!(
                    "{}: without the flags that keep collectives convergent the count of them finds nothing wrong; either the \
                     count is blind or this compiler needs the flags no longer",
                    kernel.name
                );
            };
            in_code += usize::from(gates::collectives_in_code(kernel, &code).is_err());
            println!("ptx: found, as it must be, without the flags: {found}");
        }
        ensure!(in_code > 0, "without the flags the count finds nothing wrong in the machine's code");
        println!("ptx: and in the machine's code of {in_code} kernels");
        Ok(())
    }
}

/// That no PTX or code lies there of a module that the table has no longer.
fn nothing_else(committed: &Path) -> Result<()> {
    for entry in fs::read_dir(committed)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let known = |module: &Module| {
            name == format!("{}.{}.ptx", module.op, module.target.name())
                || module.code.iter().any(|code| name == file_of_code(module, code))
        };
        ensure!(
            name == HASH_FILE || name == CODE_FILE || PROBES.iter().chain(MODULES).any(known),
            "{} belongs to no module of the table: remove it",
            committed.join(name).display()
        );
    }
    Ok(())
}

/// Of every source file that goes into the PTX, whatever folder it is in.
fn hash_of_sources(root: &Path) -> Result<String> {
    let mut files = Vec::new();
    for (_, folder) in CRATES {
        sources(&root.join(folder).join("src"), &mut files)?;
    }
    files.sort();
    let mut text = String::from(VERSION);
    for file in files {
        // A checkout on Windows may have other line ends and other slashes.
        text += &file.strip_prefix(root)?.to_string_lossy().replace('\\', "/");
        text += &fs::read_to_string(file)?.replace("\r\n", "\n");
    }
    Ok(fnv(text.as_bytes()))
}

/// FNV-1a: to notice a change, not to withstand anybody.
fn fnv(bytes: &[u8]) -> String {
    let next = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", bytes.iter().fold(0xcbf2_9ce4_8422_2325, next))
}

/// The Rust files under a folder. The emulator's go into no PTX.
fn sources(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("gpu/emulator") {
            sources(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_sources_walks_folders() {
        let root = tempfile::tempdir().unwrap();
        let source = root.path().join("crates/gdn-kernels/src");
        for (_, folder) in CRATES {
            fs::create_dir_all(root.path().join(folder).join("src")).unwrap();
        }
        let write = |file: &str, text: &str| {
            let path = source.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            hash_of_sources(root.path()).unwrap()
        };
        let first = write("lib.rs", "mod gpu;");
        let deep = write("gpu/nvptx/warp.rs", "// one");
        assert_ne!(first, deep);
        assert_ne!(deep, write("gpu/nvptx/warp.rs", "// two"));
        assert_eq!(deep, write("gpu/nvptx/warp.rs", "// one"));
        assert_eq!(deep, write("gpu/emulator/warp.rs", "// the host's"));
        assert_eq!(write("lib.rs", "a\r\nb"), write("lib.rs", "a\nb"));
        // The same text in another place is another crate.
        let moved = write("probe/a.rs", "// probe");
        fs::rename(source.join("probe/a.rs"), source.join("a.rs")).unwrap();
        assert_ne!(moved, hash_of_sources(root.path()).unwrap());
    }
}
