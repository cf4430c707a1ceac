//! What the PTX and the machine's code must be like: what a driver loads, and what the table of kernels says.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::modules::{Collectives, Kernel, Module, Target};

const ENTRY: &str = ".visible .entry ";

/// Drops comments and the panic handler that nothing calls, and tells the compiler of the driver how large a
/// kernel's blocks are.
pub(super) fn clean(module: &Module, text: &str) -> String {
    let mut out = String::from("// Made by `cargo xtask ptx` out of crates/gdn-kernels. Not to be edited.\n");
    let mut in_handler = false;
    let mut bounds = String::new();
    for line in text.lines() {
        if line.starts_with(".visible .func ") && line.contains("rust_begin_unwind") {
            in_handler = true;
        }
        if let Some(name) = line.strip_prefix(ENTRY).map(|rest| rest.trim_end_matches(['(', ')'])) {
            bounds.clear();
            for kernel in module.kernels().filter(|kernel| kernel.name == name) {
                if kernel.threads > 0 {
                    bounds += &format!(".maxntid {}, 1, 1\n", kernel.threads);
                }
                if kernel.in_clusters {
                    bounds += ".explicitcluster\n";
                }
                if kernel.blocks > 0 {
                    bounds += &format!(".minnctapersm {}\n", kernel.blocks);
                }
            }
        }
        let kept = !in_handler && !line.trim_start().starts_with("//") && !line.trim().is_empty();
        if kept {
            if line == "{" {
                out += &std::mem::take(&mut bounds);
            }
            out += line;
            out.push('\n');
        }
        in_handler &= line != "}";
    }
    out
}

/// The text of one kernel.
fn kernel_text<'a>(kernel: &Kernel, text: &'a str) -> Option<&'a str> {
    text.split(ENTRY).skip(1).find(|part| part.split('(').next() == Some(kernel.name))
}

/// That a driver finds everything the text speaks of, that the kernels are those of the table, and what it
/// says of their text.
pub(super) fn text(module: &Module, text: &str) -> Result<()> {
    let undefined: Vec<&str> =
        text.lines().filter(|line| line.contains(".func") || line.trim_start().starts_with("call")).collect();
    ensure!(undefined.is_empty(), "a kernel calls functions (a path that panics?): {undefined:?}");
    let mut got: Vec<&str> = text.split(ENTRY).skip(1).filter_map(|part| part.split('(').next()).collect();
    let mut expected: Vec<&str> = module.kernels().map(|kernel| kernel.name).collect();
    got.sort_unstable();
    expected.sort_unstable();
    ensure!(got == expected && !got.is_empty(), "has the kernels {got:?}, the table says {expected:?}");
    for kernel in module.kernels() {
        let text = kernel_text(kernel, text).context(kernel.name)?;
        let [loads, stores] = kernel.wide;
        let (ld, st) = (text.contains("ld.global.v4.u32"), text.contains("st.global.v4.u32"));
        ensure!(
            (loads == 0 || ld) && (stores == 0 || st),
            "{} does not move 16 bytes at a time",
            kernel.name
        );
        // Every product and sum is rounded once, to the nearest: so that a kernel gives the bits that the
        // host gives. But for the one function of which the emulator can be given the device's numbers.
        let lines: Vec<&str> = text.lines().collect();
        let approximate = (0..lines.len()).find(|&at| {
            let rounded = [".approx", ".ftz", ".rz.f", ".rm.f", ".rp.f", ".full."];
            rounded.iter().any(|part| lines[at].contains(part)) && !is_logistic(&lines, at)
        });
        let approximate = approximate.map(|at| lines[at]);
        ensure!(approximate.is_none(), "{}: not rounded to the nearest: {approximate:?}", kernel.name);
        collectives_in_text(kernel, text)?;
    }
    Ok(())
}

/// Whether line `at` of a kernel is one of those that make `Gpu::logistic`, whose numbers are known: a power and an inverse of
/// one register, and in between what makes the one of the other.
fn is_logistic(lines: &[&str], at: usize) -> bool {
    let line = |at: usize| lines.get(at).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    let begins = |at: usize| {
        let first = line(at)?;
        let (value, _) = first.strip_prefix("ex2.approx.ftz.f32 ")?.split_once(", ")?;
        let sum = format!("fma.rn.f32 {value}, {value}, 0f2F800000, 0f3F800000;");
        let inverse = format!("rcp.approx.ftz.f32 {value}, {value};");
        (line(at + 1)? == sum && line(at + 2)? == inverse).then_some(())
    };
    begins(at).is_some() || at >= 2 && begins(at - 2).is_some()
}

/// That a kernel has as many collectives as the table says.
pub(super) fn collectives_in_text(kernel: &Kernel, text: &str) -> Result<()> {
    let text = kernel_text(kernel, text).unwrap_or(text);
    let count = |starts: &[&str]| {
        let is = |line: &&str| starts.iter().any(|start| line.trim_start().starts_with(start));
        text.lines().filter(is).count() as u32
    };
    let got = Collectives {
        barriers: count(&["bar.sync", "barrier.sync", "barrier.cta.sync"]),
        shuffles: count(&["shfl.sync"]),
        matrices: count(&["ldmatrix.sync"]),
        products: count(&["mma.sync"]),
    };
    same(kernel, got, "PTX")
}

/// The same in the machine's own code.
pub(super) fn collectives_in_code(kernel: &Kernel, code: &[Function]) -> Result<()> {
    let function = find(kernel, code)?;
    let got = Collectives {
        barriers: function.count(&["BAR.SYNC"]),
        shuffles: function.count(&["SHFL."]),
        matrices: function.count(&["LDSM."]),
        products: function.count(&["HMMA."]),
    };
    same(kernel, got, "machine's code")
}

fn same(kernel: &Kernel, got: Collectives, place: &str) -> Result<()> {
    let Some(expected) = kernel.collectives else { return Ok(()) };
    ensure!(got == expected, "{}: {got:?} in the {place}, expected {expected:?}", kernel.name);
    Ok(())
}

fn find<'a>(kernel: &Kernel, code: &'a [Function]) -> Result<&'a Function> {
    code.iter().find(|f| f.name == kernel.name).with_context(|| format!("{}: not assembled", kernel.name))
}

/// What the table says of the machine's own code.
pub(super) fn code(module: &Module, code: &[Function]) -> Result<()> {
    for kernel in module.kernels() {
        let function = find(kernel, code)?;
        let name = kernel.name;
        ensure!(function.spills == 0, "{name} spills {} bytes", function.spills);
        ensure!(
            function.stack <= kernel.stack,
            "{name} has a stack of {} bytes, at most {} are allowed",
            function.stack,
            kernel.stack
        );
        let local = function.count(&["LDL", "STL"]);
        ensure!(local == 0 || kernel.stack > 0, "{name} uses local memory {local} times");
        let at_least = |what: &str, got: u32, least: u32| {
            ensure!(got >= least, "{name}: {got} {what}, at least {least} are expected");
            Ok(())
        };
        let wide = |of: &str| {
            function.instructions.iter().filter(|i| i.starts_with(of) && i.contains(".128")).count()
        };
        at_least("loads of 16 bytes", wide("LDG") as u32, kernel.wide[0])?;
        at_least("stores of 16 bytes", wide("STG") as u32, kernel.wide[1])?;
        at_least("HMMA", function.count(&["HMMA."]), kernel.hmma)?;
        at_least("HGMMA", function.count(&["HGMMA."]), kernel.hgmma)?;
        collectives_in_code(kernel, code)?;
    }
    Ok(())
}

/// What ptxas is asked for: the GPUs that a module of `table` is loaded on. From 9.0 on that is the one for 9.0 where there is
/// one of that op.
pub(super) fn gpus(module: &Module, table: &[Module]) -> &'static [&'static str] {
    let has_other = table.iter().any(|other| other.op == module.op && other.target == Target::Sm90);
    match module.target {
        Target::Sm80 if has_other => &["sm_80", "sm_86", "sm_89"],
        Target::Sm80 => &["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"],
        Target::Sm90 => &["sm_90", "sm_100", "sm_120"],
        Target::Sm90a => &["sm_90a"],
    }
}

/// A kernel in the machine's own code.
pub(super) struct Function {
    name: String,
    /// Name and operands of each instruction, without its predicate.
    instructions: Vec<String>,
    stack: u32,
    spills: u32,
}

impl Function {
    fn count(&self, starts: &[&str]) -> u32 {
        self.instructions.iter().filter(|i| starts.iter().any(|start| i.starts_with(start))).count() as u32
    }
}

/// The assembler of the CUDA toolkit and what looks into its work, a matching pair out of a wheel on PyPI.
pub(super) struct Tools {
    bin: PathBuf,
}

impl Tools {
    pub(super) fn find(target_dir: &Path) -> Result<Self> {
        let tools = target_dir.join("tools");
        let bin = tools.join("triton/backends/nvidia/bin");
        if !bin.join("ptxas").is_file() {
            fs::create_dir_all(&tools)?;
            println!("ptx: ptxas out of the wheel of triton, into {}", tools.display());
            let mut pip = Command::new("python3");
            pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--upgrade"]);
            pip.args(["--disable-pip-version-check", "--root-user-action=ignore"]);
            pip.args(["--require-hashes", "--requirement"])
                .arg(crate::shell::root().join("xtask/src/ptx/requirements.txt"));
            pip.arg("--target").arg(&tools);
            let done = pip.output().context("python3, to fetch ptxas")?;
            ensure!(done.status.success(), "ptxas: {}", String::from_utf8_lossy(&done.stderr));
        }
        Ok(Self { bin })
    }

    /// Assembles for one GPU. The kernels in its code.
    pub(super) fn assemble(&self, ptx: &Path, gpu: &str) -> Result<Vec<Function>> {
        let cubin = ptx.with_extension(format!("{gpu}.cubin"));
        // Blackwell has an assembler of its own there.
        let blackwell = matches!(gpu, "sm_100" | "sm_120");
        let ptxas = self.bin.join(if blackwell { "ptxas-blackwell" } else { "ptxas" });
        let report =
            output(Command::new(ptxas).args(["-v", &format!("-arch={gpu}")]).arg(ptx).arg("-o").arg(&cubin))
                .with_context(|| format!("{} for {gpu}", ptx.display()))?;
        // Said where a product's registers are touched before it is done.
        ensure!(!report.contains("wgmma.mma_async instructions are serialized"), "{report}");
        let said = cubin.with_extension("report");
        fs::write(&said, report)?;
        self.code(&cubin, &said)
    }

    /// The kernels of machine code, of which ptxas said what is in the file `said`.
    pub(super) fn code(&self, cubin: &Path, said: &Path) -> Result<Vec<Function>> {
        let code = output(Command::new(self.bin.join("cuobjdump")).arg("--dump-sass").arg(cubin))?;
        functions(&code, &fs::read_to_string(said)?)
    }
}

/// What a program writes, to both of its outputs.
fn output(command: &mut Command) -> Result<String> {
    let done = command.output().with_context(|| format!("{command:?}"))?;
    let text = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{text}");
    Ok(text.into_owned())
}

/// Out of what cuobjdump and `ptxas -v` write.
fn functions(code: &str, report: &str) -> Result<Vec<Function>> {
    let mut functions = Vec::new();
    for part in code.split("Function : ").skip(1) {
        let name = part.lines().next().unwrap_or_default().trim().to_owned();
        // `/*0010*/  @P0 BAR.SYNC.DEFER_BLOCKING 0x0 ;  /* encoding */`
        let instructions = part.lines().filter_map(|line| {
            let line = line.trim_start().strip_prefix("/*")?.split_once("*/")?.1.split_once(';')?.0.trim();
            let line = if line.starts_with('@') { line.split_once(' ')?.1 } else { line };
            Some(line.trim().to_owned())
        });
        let properties = report
            .split("Function properties for ")
            .skip(1)
            .find(|part| part.lines().next().map(str::trim) == Some(&name))
            .and_then(|part| part.lines().nth(1))
            .with_context(|| format!("what ptxas says of {name}: {report}"))?;
        // `0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads`
        let numbers: Vec<u32> = properties.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [stack, stores, loads] = numbers[..] else {
            anyhow::bail!("what ptxas says of {name}: {properties}");
        };
        functions.push(Function {
            name,
            instructions: instructions.collect(),
            stack,
            spills: stores + loads,
        });
    }
    Ok(functions)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &str =
        ".visible .entry k(\n)\n{\n\tld.global.v4.u32\n\tbar.sync 0;\n\tst.global.v4.u32\n}\n";
    const TABLE: &[&[Kernel]] = &[&[Kernel {
        wide: [1, 1],
        threads: 256,
        blocks: 2,
        hgmma: 1,
        collectives: Some(Collectives { barriers: 1, ..Collectives::NONE }),
        ..Kernel::new("k")
    }]];
    const MODULE: Module = Module { op: "k", target: Target::Sm80, ptx: "", code: &[], families: TABLE };

    /// `Gpu::logistic`, and what comes behind it.
    const LOGISTIC: &str = "\tex2.approx.ftz.f32 %r1, %r2;\n\tfma.rn.f32 %r1, %r1, 0f2F800000, 0f3F800000;\n\
                            \trcp.approx.ftz.f32 %r1, %r1;\n\tst.";

    #[test]
    fn what_no_driver_loads_is_refused() {
        let check = |old: &str, new: &str| text(&MODULE, &KERNEL.replace(old, new));
        assert!(check("", "").is_ok());
        assert!(text(&MODULE, "").is_err());
        check("\tst.", LOGISTIC).unwrap();
        for (old, new, why) in [
            ("ld.global.v4", "ld.global.v2", "16 bytes"),
            ("st.global.v4", "st.global.v2", "16 bytes"),
            (".visible", ".extern .func panic;\n.visible", "calls functions"),
            ("\tst.", "\tcall.uni panic;\n\tst.", "calls functions"),
            (" k(", " other(", "the table says"),
            ("\tbar.sync 0;", "\tbar.sync 0;\n\tbar.sync 0;", "barriers: 2"),
            ("\tbar.sync 0;", "", "barriers: 0"),
            ("\tst.", "\tex2.approx.ftz.f32 %f1, %f2;\n\tst.", "nearest"),
            ("\tst.", "\trcp.approx.ftz.f32 %f1, %f2;\n\tst.", "nearest"),
            ("\tst.", &LOGISTIC.replace("0f3F800000", "0f40000000"), "nearest"),
            ("\tst.", &LOGISTIC.replace("f32 %r1, %r1;", "f32 %r3, %r1;"), "nearest"),
            ("\tst.", &LOGISTIC.replace("fma.rn", "fma.rz"), "nearest"),
        ] {
            let error = format!("{:#}", check(old, new).unwrap_err());
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn slow_or_wrong_code_is_refused() {
        let good = "Function : k\n\t.headerflags\n        /*0000*/  LDG.E.128 R4, [R2] ;  /* 0x0 */\n        /*0010*/  @P0 BAR.SYNC.DEFER_BLOCKING 0x0 ;\n        \
                    /*0020*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;\n        /*0030*/  STG.E.128 [R2], R4 ;\n";
        let report = "ptxas info : Function properties for k\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n";
        let check = |old: &str, new: &str| {
            code(&MODULE, &functions(&good.replace(old, new), &report.replace(old, new)).unwrap())
        };
        check("", "").unwrap();
        for (old, new, why) in [
            ("LDG.E.128", "LDG.E.64", "loads of 16 bytes"),
            ("STG.E.128", "STG.E.64", "stores of 16 bytes"),
            ("STG.E.128", "STL.128", "local memory"),
            ("HGMMA", "HMMA", "HGMMA"),
            ("LDG.E.128 R4, [R2]", "BAR.SYNC 0x0", "loads"),
            ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4]", "BAR.SYNC 0x0", "HGMMA"),
            ("0 bytes stack", "8 bytes stack", "stack of 8"),
            ("0 bytes spill loads", "4 bytes spill loads", "spills 4"),
            ("Function : k", "Function : l", ""),
        ] {
            let Ok(functions) = functions(&good.replace(old, new), &report.replace(old, new)) else {
                continue;
            };
            let error = format!("{:#}", code(&MODULE, &functions).unwrap_err());
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn comments_and_the_panic_handler_go() {
        let handler = ".visible .func _RN_17rust_begin_unwind(\n)\n{\n$L:\n\tbra $L;\n}\n";
        let text =
            clean(&MODULE, &format!("// a\n\n{handler}\t// b\n.visible .entry l(\n)\n{{\n\tret;\n}}\n"));
        assert!(text.ends_with("edited.\n.visible .entry l(\n)\n{\n\tret;\n}\n"), "{text}");
    }

    #[test]
    fn the_size_of_blocks_is_told() {
        let text = clean(&MODULE, KERNEL);
        assert!(text.contains(" k(\n)\n.maxntid 256, 1, 1\n.minnctapersm 2\n{\n"), "{text}");
    }
}
