//! The Python package, as its users get it: the release wheel, installed in a virtual environment of its own,
//! and its tests.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail, ensure};

use crate::shell::{apt_install, command, has, root, run, run_fetching, skip};

/// The Python of the tests: the engines' wheels, which the integrations are held to, are for this one.
const PYTHON: &str = "3.11";
/// What the wheel asks of a system: the glibc of Debian 10, RHEL 8 and Ubuntu 20.04.
const PLATFORM: &str = "manylinux_2_28";
/// Every package that is installed, with the hashes of its files.
const REQUIREMENTS: &str = "python/tests/requirements.txt";
/// What installs them.
const UV: &str = "python/uv.txt";
/// Where an environment has its packages.
const SITE: &str = "lib/python3.11/site-packages";

/// Whether there is a wheel for this machine.
const HAS_WHEEL: bool = cfg!(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")));

/// [`install`], where there is a wheel; else it says that there is none.
///
/// # Errors
/// As [`install`].
pub(crate) fn make() -> anyhow::Result<()> {
    if HAS_WHEEL {
        return install().map(drop);
    }
    skip("the Python package: its wheel is built for Linux");
    Ok(())
}

/// Runs the package's tests in the environment that [`make`] has made, if there is one.
///
/// # Errors
/// What the tests say.
pub(crate) fn test() -> anyhow::Result<()> {
    if !HAS_WHEEL {
        return Ok(());
    }
    let environment = installed()?;
    run(&mut environment.python(&["-m", "ruff", "check", "python"]))?;
    run(&mut environment.python(&["-m", "ruff", "format", "--check", "python"]))?;
    run_fetching(&mut environment.python(&["python/tests/peers.py"]))?;
    // From its own folder, so that `import gdn` finds what is installed and not the sources.
    let mut pytest = environment.program("pytest");
    pytest.args(["-q", "-rs", "--durations=5"]).current_dir(root().join("python"));
    // Threads of PyTorch that wait would keep a core from the steps beside this one.
    run(pytest.env("OMP_NUM_THREADS", "2").env("OMP_WAIT_POLICY", "passive"))?;
    let mut doctest = environment.python(&[
        "-c",
        "import doctest, gdn, sys; sys.exit(doctest.testmod(gdn, optionflags=doctest.ELLIPSIS).failed)",
    ]);
    run(doctest.current_dir(target()))
}

/// Makes the environment of the tests, builds the wheel of the package as it is now, and installs it.
///
/// # Errors
/// What pip or maturin say.
pub(crate) fn install() -> anyhow::Result<Environment> {
    let environment = Environment::ready(&target().join("python/environment"), REQUIREMENTS)?;
    let wheel = environment.build(&target().join("python/wheels"))?;
    println!("python: {}", wheel.display());
    run(environment.pip(&["--force-reinstall", "--no-deps"]).arg(&wheel))?;
    Ok(environment)
}

/// The environment as [`install`] left it.
///
/// # Errors
/// It is not there.
pub(crate) fn installed() -> anyhow::Result<Environment> {
    let environment = Environment { folder: target().join("python/environment") };
    let is_there = environment.folder.join("bin/python").exists();
    ensure!(is_there, "{} has no environment yet", environment.folder.display());
    Ok(environment)
}

fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// A virtual environment.
pub(crate) struct Environment {
    folder: PathBuf,
}

impl Environment {
    /// One more, in the folder `name` beside this one: it has what `requirements` lists and, where that does
    /// not have it, everything of this one.
    ///
    /// # Errors
    /// What pip says.
    pub(crate) fn over(&self, name: &str, requirements: &str) -> anyhow::Result<Self> {
        let environment = Self::ready(&self.folder.with_file_name(name), requirements)?;
        let below = self.folder.canonicalize()?.join(SITE);
        let path = environment.folder.join(SITE).join("below.pth");
        fs::write(&path, below.display().to_string()).with_context(|| path.display().to_string())?;
        Ok(environment)
    }

    /// Whether pip can ask where packages come from.
    pub(crate) fn reaches_the_index(&self) -> bool {
        let asked = self.python(&["-m", "pip", "index", "versions", "pip"]).output();
        asked.is_ok_and(|asked| asked.status.success())
    }

    /// The environment with what `requirements` lists. Made and filled once; filled again where the list is
    /// another.
    fn ready(folder: &Path, requirements: &str) -> anyhow::Result<Self> {
        let environment = Self { folder: folder.to_owned() };
        let wanted =
            fs::read_to_string(root().join(requirements)).with_context(|| requirements.to_owned())?;
        let installed = folder.join("requirements.txt");
        if fs::read_to_string(&installed).is_ok_and(|installed| installed == wanted) {
            return Ok(environment);
        }
        if !folder.join("bin/pip").exists() {
            let python = interpreter()?;
            let make = || command(&python, &["-m", "venv", "--clear"]).arg(folder).status();
            if !make()?.success() {
                apt_install(&["python3-venv"])?;
                ensure!(make()?.success(), "{python} makes no virtual environment");
            }
        }
        let listed = |list| ["--require-hashes", "--no-deps", "--requirement", list];
        run_fetching(&mut environment.pip(&listed(UV)))?;
        if let Err(why) = environment.uv(&listed(requirements)) {
            // It reads no settings of pip's, where another index may be named.
            println!("{why:#}; pip is asked");
            run_fetching(&mut environment.pip(&listed(requirements)))?;
        }
        fs::write(&installed, wanted)?;
        Ok(environment)
    }

    /// A program of the environment, which finds the others.
    fn program(&self, name: &str) -> Command {
        let bin = self.folder.join("bin");
        let mut program = command(&bin.join(name).display().to_string(), &[]);
        let path = env::var_os("PATH").unwrap_or_default();
        let paths = std::iter::once(bin).chain(env::split_paths(&path));
        if let Ok(paths) = env::join_paths(paths) {
            program.env("PATH", paths);
        }
        program.env("VIRTUAL_ENV", &self.folder).env_remove("PYTHONPATH").env_remove("PYTHONHOME");
        // Dozens of tests begin a process that imports PyTorch, which takes twice as long where its source is
        // compiled anew.
        program
            .env_remove("PYTHONDONTWRITEBYTECODE")
            .env("PYTHONPYCACHEPREFIX", self.folder.join("bytecode"));
        program
    }

    /// Its interpreter, with `args`.
    pub(crate) fn python(&self, args: &[&str]) -> Command {
        let mut python = self.program("python");
        python.args(args);
        python
    }

    /// Installs packages by uv, which takes far less of a processor's time than pip for 6 GB.
    fn uv(&self, args: &[&str]) -> anyhow::Result<()> {
        // It unpacks there and links: nothing is there twice.
        let cache = self.folder.join("uv");
        let mut uv = self.program("uv");
        uv.args(["pip", "install", "--quiet", "--python"]).arg(self.folder.join("bin/python"));
        let done = run(uv.args(args).arg("--cache-dir").arg(&cache));
        if cache.exists() {
            fs::remove_dir_all(&cache).with_context(|| cache.display().to_string())?;
        }
        done
    }

    fn pip(&self, args: &[&str]) -> Command {
        let mut pip = self.python(&["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
        // Most of 6 GB of packages is never imported; Python compiles what is, once.
        pip.arg("--no-compile").args(args);
        pip
    }

    /// The wheel that is released: linked by zig against the glibc of [`PLATFORM`], whatever this machine
    /// has.
    fn build(&self, wheels: &Path) -> anyhow::Result<PathBuf> {
        if wheels.exists() {
            fs::remove_dir_all(wheels)?;
        }
        let mut maturin = self.program("maturin");
        maturin.args(["build", "--release", "--locked", "--zig", "--compatibility", PLATFORM, "--out"]);
        // It is stripped.
        maturin.env("CARGO_PROFILE_RELEASE_DEBUG", "0");
        run(maturin.arg(wheels).current_dir(root().join("python")))?;
        let made =
            fs::read_dir(wheels)?.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<_>>>()?;
        let [wheel] = &made[..] else { bail!("maturin made {made:?}, expected one wheel") };
        let name = wheel.file_name().unwrap_or_default().to_string_lossy();
        let tag = format!("-cp310-abi3-{PLATFORM}_{}.whl", env::consts::ARCH);
        ensure!(name.ends_with(&tag), "{name} is not a wheel for {tag}");
        Ok(wheel.clone())
    }
}

/// An interpreter of the version that is wanted.
fn interpreter() -> anyhow::Result<String> {
    let fits = |name: &&str| {
        let version =
            Command::new(name).args(["-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).output();
        version.is_ok_and(|version| version.stdout.trim_ascii() == PYTHON.as_bytes())
    };
    let names = ["python3.11", "python3", "python"];
    if !names.iter().any(fits) && has("apt-get") {
        apt_install(&["python3.11", "python3.11-venv"])?;
    }
    let found = names.into_iter().find(|name| fits(name));
    found.map(str::to_owned).with_context(|| format!("Python {PYTHON} must be installed first"))
}
