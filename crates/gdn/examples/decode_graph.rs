//! For engines: decode captured in a CUDA graph, on the engine's own stream and memory, and replayed step by
//! step; slots change between replays.
//!
//!     cargo run --release -p gdn --features cuda --example decode_graph

use gdn::cuda::cudarc::driver::{
    CudaContext, CudaSlice, DevicePtr,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL},
};
use gdn::{
    ConvState, Decode, DeviceAddress, Dtype, Heads, IndexType, Indices, Keep, Layer, Layout, Packed, Packing,
    Projections, RecurrentState, Slots, Tensor, Weights,
    cuda::{Gpu, devices},
};

const SEQUENCES: usize = 4;
const SLOTS: usize = 16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Ok([_, ..]) = devices().as_deref() else {
        println!("no device on this machine");
        return Ok(());
    };
    let stream = CudaContext::new(0)?.new_stream()?;
    let layer = Layer::new(Layout::new(Heads::preset("Qwen3-Next-80B-A3B")?, Packing::Interleaved));
    let (heads, channels) = (layer.heads(), layer.conv_channels());
    let (hv, dk, dv) = (heads.num_v_heads(), heads.head_k_dim(), heads.head_v_dim());
    let state_strides = [hv * dv * dk, dv * dk, dk, 1];
    // The engine's own memory, in bf16 but for the recurrent states.
    let new = |elements: usize, size: usize| stream.alloc_zeros::<u8>(elements * size);
    let (qkvz, ba) = (new(SEQUENCES * heads.qkvz_features(), 2)?, new(SEQUENCES * heads.ba_features(), 2)?);
    let (conv_weight, per_head, norm) = (new(channels * 4, 2)?, new(hv, 2)?, new(dv, 2)?);
    let (conv, states) = (new(SLOTS * channels * 3, 2)?, new(SLOTS * hv * dv * dk, 4)?);
    let (mut indices, out) = (stream.clone_htod(&[0i32; SEQUENCES])?, new(SEQUENCES * hv * dv, 2)?);
    let at = |slice: &CudaSlice<u8>| DeviceAddress(slice.device_ptr(&stream).0);
    let rows = |slice, n| Tensor::at_device(at(slice), Dtype::BF16, [SEQUENCES, n], [n, 1]);
    let vector = |slice, len| Tensor::at_device(at(slice), Dtype::BF16, [len], [1]);
    let slots = Indices::at_device(indices.device_ptr(&stream).0, IndexType::I32, [SEQUENCES, 1], [1, 1])?;
    let call = Decode::<DeviceAddress, DeviceAddress> {
        layer,
        tokens_per_sequence: 1,
        projections: Projections::Packed(Packed {
            mixed_qkvz: rows(&qkvz, heads.qkvz_features())?,
            mixed_ba: rows(&ba, heads.ba_features())?,
        }),
        weights: Weights {
            conv_weight: Tensor::at_device(at(&conv_weight), Dtype::BF16, [channels, 4], [4, 1])?,
            conv_bias: None,
            A_log: vector(&per_head, hv)?,
            dt_bias: vector(&per_head, hv)?,
            norm_weight: vector(&norm, dv)?,
        },
        conv_state: ConvState {
            state: Tensor::at_device_mut(at(&conv), Dtype::BF16, [SLOTS, channels, 3], [channels * 3, 3, 1])?,
            keep: Keep::Last,
        },
        recurrent_state: RecurrentState {
            state: Tensor::at_device_mut(at(&states), Dtype::F32, [SLOTS, hv, dv, dk], state_strides)?,
            keep: Keep::Last,
        },
        slots: Slots::of(slots),
        num_accepted_tokens: None,
        out: Tensor::at_device_mut(at(&out), Dtype::BF16, [SEQUENCES, hv, dv], [hv * dv, dv, 1])?,
    };
    // The first call loads the kernel; the next one is captured. Both are one launch.
    let gpu = Gpu::on(&stream)?;
    // SAFETY: dense tensors on the stream's device, which outlive every replay and which nothing else uses.
    let decode = || unsafe { gpu.decode_raw(&call, stream.cu_stream()) };
    stream.memcpy_htod(&[0, 1, 2, 3], &mut indices)?;
    decode()?;
    stream.begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    decode()?;
    let graph = stream.end_capture(CUgraphInstantiate_flags(0))?.ok_or("nothing was captured")?;
    for first in [4, 8, 12] {
        stream.memcpy_htod(&[first, first + 1, -1, first + 3], &mut indices)?;
        graph.launch()?;
        println!("slots {first} to {}: {} bytes of out", first + 3, stream.clone_dtoh(&out)?.len());
    }
    Ok(())
}
