//! Conformance: for each op one table of cases and one bound, and every backend held to them: every
//! instruction set, the emulator wherever tests run, and a GPU where there is one.

mod split;

#[cfg(feature = "cuda")]
mod decode;

#[cfg(feature = "cuda")]
mod prefill;

/// A GPU, on a stream of its own: the default one cannot be captured. Where there is none, says that the test
/// is skipped.
///
/// All are of one context. cudarc waits for the whole device when a context gets its first stream, and while
/// any thread captures one that is an error, which ends the capture too.
#[cfg(feature = "cuda")]
fn gpu() -> Option<crate::cuda::Gpu> {
    use crate::cuda::{CudaError, Gpu};
    static FIRST: std::sync::OnceLock<Result<Gpu, CudaError>> = std::sync::OnceLock::new();
    let on_own_stream = |gpu: &Gpu| Gpu::on(&gpu.stream().context().new_stream().unwrap()).unwrap();
    match FIRST.get_or_init(|| Gpu::new(0).map(|gpu| on_own_stream(&gpu))) {
        Ok(gpu) => Some(on_own_stream(gpu)),
        Err(error @ (CudaError::NoDriver | CudaError::NoDevice { .. })) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
