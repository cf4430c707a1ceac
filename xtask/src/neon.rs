//! The tests of the op on 64-bit Arm, run by an emulator: another processor's instructions are tested on
//! every machine.
//!
//! rustup's own standard library for that target needs rustup and the network. Debian has both a compiler and
//! that library as packages; they are unpacked under `target/`, beside whatever the machine has, and
//! installed nowhere.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, bail};

use crate::{
    memory::LIBRARY,
    shell::{apt_alone, apt_install, cargo, command, has, root, run, skip},
};

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64";

/// Runs the library's tests on an emulated 64-bit Arm; on such a machine itself they have run already.
pub(crate) fn test() -> anyhow::Result<()> {
    if cfg!(target_arch = "aarch64") {
        println!("this is such a machine: the tests before this one were it");
        return Ok(());
    }
    if !has("apt-get") {
        skip(format!(
            "the compiler and emulator for {TARGET} come from Debian's packages, and there is no apt-get"
        ));
        return Ok(());
    }
    if !has(LINKER) || !has(EMULATOR) {
        apt_install(&["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross", "qemu-user"])?;
    }
    let toolchain = root().join("target/tools/neon");
    if !toolchain.join("rustdoc").exists() {
        let _alone = apt_alone()?;
        unpack(&toolchain)?;
    }
    // A plain core: NEON and nothing later.
    let runner = format!("{EMULATOR} -cpu cortex-a53 -L /usr/aarch64-linux-gnu");
    let mut tests =
        cargo(&[&["test", "--target", TARGET], &LIBRARY[..], &["--test", "allocations"]].concat());
    tests
        .env("RUSTC", toolchain.join("rustc"))
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER)
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", runner)
        .env("CARGO_TARGET_DIR", root().join("target/neon"))
        .env("CARGO_PROFILE_TEST_OPT_LEVEL", "2")
        .env("PROPTEST_CASES", "60");
    run(&mut tests)
}

/// Fetches Debian's compiler with the standard libraries of this machine and of the target, and unpacks them.
fn unpack(toolchain: &Path) -> anyhow::Result<()> {
    let packages = toolchain.join("packages");
    fs::create_dir_all(&packages)?;
    // Lists of its own, with the foreign architecture in them, so that the system's are left as they are.
    let lists = toolchain.join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    let options = [
        "-oAPT::Architectures::=amd64".to_owned(),
        "-oAPT::Architectures::=arm64".to_owned(),
        "-oAPT::Sandbox::User=root".to_owned(),
        format!("-oDir::State::Lists={}", lists.display()),
    ];
    let apt = |args: &[&str]| {
        let mut command = command("apt-get", &[]);
        command.args(&options).args(args).current_dir(&packages);
        command
    };
    run(&mut apt(&["update", "-qq"]))?;
    // All that the compiler needs on a machine with nothing installed, less what every machine with a C
    // compiler has.
    let nothing = format!("-oDir::State::status={}", toolchain.join("nothing").display());
    fs::write(toolchain.join("nothing"), "")?;
    let plan = apt(&[&nothing, "install", "--simulate", "--no-install-recommends", "rustc-web"]).output()?;
    if !plan.status.success() {
        bail!("apt-get cannot plan the compiler: {}", String::from_utf8_lossy(&plan.stderr));
    }
    let plan = String::from_utf8(plan.stdout)?;
    let mut names: Vec<&str> = plan
        .lines()
        .filter_map(|line| line.strip_prefix("Inst ")?.split_whitespace().next())
        .filter(|name| ["rust", "llvm", "z3"].iter().any(|part| name.contains(part)))
        .collect();
    names.push("libstd-rust-web-dev:arm64");
    println!("fetching with apt-get, into {} alone: {}", toolchain.display(), names.join(" "));
    run(&mut apt(&[&["download", "-qq"], &names[..]].concat()))?;
    for package in fs::read_dir(&packages)? {
        let (package, to) = (package?.path(), toolchain.join("root"));
        run(command("dpkg", &["-x"]).arg(&package).arg(&to))?;
    }
    fs::remove_dir_all(&packages)?;
    for program in ["rustc", "rustdoc"] {
        let root = toolchain.join("root");
        let script = format!(
            "#!/bin/sh\nLD_LIBRARY_PATH={root}/usr/lib/x86_64-linux-gnu exec {root}/usr/bin/{program} \"$@\"\n",
            root = root.display()
        );
        let path = toolchain.join(program);
        fs::write(&path, script).with_context(|| path.display().to_string())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}
