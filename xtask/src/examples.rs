//! `cargo xtask examples`: compiles the examples that are packages of their own, and runs what a CPU can.
//!
//! candle's build for CUDA calls nvcc and links CUDA's libraries. Where there is no nvcc, a stand-in that
//! makes empty files and empty libraries are enough to build the example and to see that it fits candle and
//! that both want the same cudarc; what comes out is never run.

use std::{env, fs, path::PathBuf};

use crate::shell::{cargo, command, has, root, run as run_to_end};

const NVCC: &str = r#"#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 12.8, V12.8.0"; exit 0;; esac
while [ $# -gt 0 ]; do
    case "$1" in
        -o | --output-file) : >"$2"; shift ;;
        --output-directory) folder=$2; shift ;;
        --list-gpu-code) echo sm_80 ;;
        *.cu) source=$1 ;;
    esac
    shift
done
[ -z "$folder" ] || : >"$folder/$(basename "${source%.cu}").ptx"
"#;

/// The libraries that candle links.
const LIBRARIES: [&str; 6] = ["cuda", "nvrtc", "curand", "cublas", "cublasLt", "cudart"];

/// Builds `examples/candle`, and runs its layer on the CPU.
///
/// # Errors
/// What cargo says.
pub(crate) fn run() -> anyhow::Result<()> {
    let target_dir = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let candle = |args: &[&str]| {
        let mut cargo = cargo(args);
        cargo.current_dir(root().join("examples/candle")).env("CARGO_TARGET_DIR", target_dir.join("candle"));
        cargo.env("CARGO_PROFILE_DEV_DEBUG", "0");
        cargo
    };
    run_to_end(&mut candle(&["run", "--bin", "layer"]))?;
    let with_nvcc = has("nvcc");
    let cuda = target_dir.join("tools/no-cuda");
    let nvcc = cuda.join("bin/nvcc");
    if !with_nvcc {
        for folder in ["bin", "include", "lib64"] {
            fs::create_dir_all(cuda.join(folder))?;
        }
        fs::write(&nvcc, NVCC)?;
        #[cfg(unix)]
        fs::set_permissions(&nvcc, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        println!("examples: no nvcc here; a stand-in for it, and empty libraries");
        for library in LIBRARIES {
            let path = cuda.join("lib64").join(format!("lib{library}.so"));
            run_to_end(command("cc", &["-shared", "-x", "c", "/dev/null", "-o"]).arg(&path))?;
        }
    }
    for binary in ["split", "layer_cuda"] {
        let mut cargo = candle(&["rustc", "--bin", binary, "--features", "cuda"]);
        if !with_nvcc {
            cargo.arg("--").arg("-L").arg(cuda.join("lib64"));
            cargo.arg("-Clink-arg=-Wl,--unresolved-symbols=ignore-all");
            cargo.env("NVCC", &nvcc).env("CUDA_HOME", &cuda).env("CUDA_COMPUTE_CAP", "80");
        }
        run_to_end(&mut cargo)?;
    }
    Ok(())
}
