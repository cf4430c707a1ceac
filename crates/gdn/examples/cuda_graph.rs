//! For engines: the split captured in a CUDA graph, on the engine's own stream and memory, and replayed for
//! new inputs.
//!
//!     cargo run --release -p gdn --features cuda --example cuda_graph

use gdn::cuda::cudarc::driver::{
    CudaContext, CudaSlice, DevicePtr, DevicePtrMut,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL},
};
use gdn::{
    Heads, Layout, Packed, Packing, Unpacked,
    cuda::{Gpu, RawRows, devices},
};

const TOKENS: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let found = devices().map(|devices| devices.into_iter().next());
    match &found {
        Ok(Some(device)) => println!("{device}"),
        Ok(None) => println!("no device on this machine"),
        Err(error) => println!("{error}"),
    }
    if !matches!(found, Ok(Some(_))) {
        return Ok(());
    }
    // The engine's own: a stream, tensors in bf16, seen as u16.
    let stream = CudaContext::new(0)?.new_stream()?;
    let layout = Layout::new(Heads::preset("Qwen3-Next-80B-A3B")?, Packing::Interleaved);
    let heads = layout.heads;
    let hv = heads.num_v_heads();
    let new = |features: usize| stream.alloc_zeros::<u16>(TOKENS * features);
    let (mut qkvz, ba) = (new(heads.qkvz_features())?, new(heads.ba_features())?);
    let (mut qkv, mut z) = (new(heads.qkv_features())?, new(heads.z_features())?);
    let (mut b, mut a) = (new(hv)?, new(hv)?);

    // Kernels are loaded before a capture. A GPU is asked for once, and kept.
    let gpu = Gpu::on(&stream)?;
    gpu.warmup_split()?;

    // As an engine has them: device pointers, an element size, a row stride.
    let rows = |address, features| RawRows::new(address, 2, TOKENS, features, features);
    let read = |slice: &CudaSlice<u16>, features| rows(slice.device_ptr(&stream).0, features);
    let write = |slice: &mut CudaSlice<u16>, features| rows(slice.device_ptr_mut(&stream).0, features);
    let from =
        Packed { mixed_qkvz: read(&qkvz, heads.qkvz_features())?, mixed_ba: read(&ba, heads.ba_features())? };
    let to = Unpacked {
        mixed_qkv: write(&mut qkv, heads.qkv_features())?,
        z: write(&mut z, heads.z_features())?,
        b: write(&mut b, hv)?,
        a: write(&mut a, hv)?,
    };

    stream.begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    // SAFETY: six dense tensors of these shapes on the stream's device, which outlive every replay and which
    // nothing else uses meanwhile.
    unsafe { gpu.split_raw(&layout, from, to, stream.cu_stream())? };
    let graph = stream.end_capture(CUgraphInstantiate_flags(0))?.ok_or("nothing was captured")?;

    for step in 1..4u16 {
        stream.memcpy_htod(&vec![step; TOKENS * heads.qkvz_features()], &mut qkvz)?;
        graph.launch()?;
        let result = stream.clone_dtoh(&qkv)?;
        assert!(result.iter().all(|element| *element == step));
        println!("step {step}: {} elements of mixed_qkv", result.len());
    }
    Ok(())
}
