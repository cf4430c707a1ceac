//! For engines: prompts of unlike lengths through prefill, then tokens one by one through decode, captured
//! once in a CUDA graph, on the engine's own stream and memory. At the end the same tokens go through prefill
//! at once, which must leave the same states.
//!
//!     cargo run --release -p gdn --features cuda --example generate_graph

use gdn::cuda::cudarc::driver::{
    CudaContext, CudaSlice, DevicePtr, DeviceRepr,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL},
};
use gdn::{
    ConvState, Decode, DeviceAddress, Dtype, Heads, IndexType, Indices, Keep, Layer, Layout, Packed, Packing,
    Prefill, Projections, RecurrentState, Slots, Tensor, Weights,
    cuda::{Gpu, devices, prefill_scratch_bytes},
};
use half::bf16;

const PROMPTS: [usize; 3] = [700, 1, 130];
const STEPS: usize = 16;
const B: usize = PROMPTS.len();
/// Slots of the states: those that sequences have, and others for the check.
const SLOTS: usize = 2 * B;

/// Bits of bfloat16 numbers from -scale to scale, the same each time.
fn numbers(count: usize, scale: f32, seed: u64) -> Vec<u16> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bf16::from_f32(((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale).to_bits()
    };
    (0..count).map(|_| next()).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Ok([_, ..]) = devices().as_deref() else {
        println!("no device on this machine");
        return Ok(());
    };
    let stream = CudaContext::new(0)?.new_stream()?;
    let gpu = Gpu::on(&stream)?;
    let layer = Layer::new(Layout::new(Heads::preset("Qwen3-Next-80B-A3B")?, Packing::Interleaved));
    let (heads, channels) = (layer.heads(), layer.conv_channels());
    let (hv, dk, dv) = (heads.num_v_heads(), heads.head_k_dim(), heads.head_v_dim());
    let (wide, narrow) = (heads.qkvz_features(), heads.ba_features());

    // What the GEMMs before the layer would give: the rows of each sequence, prompt and later tokens.
    let rows_of = |r: usize| PROMPTS[r] + STEPS;
    let qkvz: Vec<_> = (0..B).map(|r| numbers(rows_of(r) * wide, 1.0, r as u64)).collect();
    let ba: Vec<_> = (0..B).map(|r| numbers(rows_of(r) * narrow, 2.0, 9 + r as u64)).collect();
    let cut = |all: &[Vec<u16>], features: usize, rows: &dyn Fn(usize) -> std::ops::Range<usize>| {
        let part = |r: usize| &all[r][rows(r).start * features..rows(r).end * features];
        (0..B).flat_map(part).copied().collect::<Vec<_>>()
    };

    // Weights and states, in the engine's memory.
    let weights =
        [numbers(channels * 4, 0.5, 3), numbers(hv, 1.0, 4), numbers(hv, 1.0, 5), numbers(dv, 1.0, 6)];
    let weights = weights.map(|numbers| stream.clone_htod(&numbers));
    let [conv_weight, a_log, dt_bias, norm_weight] = weights;
    let (conv_weight, a_log, dt_bias, norm_weight) = (conv_weight?, a_log?, dt_bias?, norm_weight?);
    let conv = stream.alloc_zeros::<u16>(SLOTS * channels * 3)?;
    let states = stream.alloc_zeros::<f32>(SLOTS * hv * dv * dk)?;
    let weights = || -> Result<_, gdn::ArgumentError> {
        let vector = |slice: &CudaSlice<u16>, len| Tensor::at_device(at(slice), Dtype::BF16, [len], [1]);
        Ok(Weights {
            conv_weight: Tensor::at_device(at(&conv_weight), Dtype::BF16, [channels, 4], [4, 1])?,
            conv_bias: None,
            A_log: vector(&a_log, hv)?,
            dt_bias: vector(&dt_bias, hv)?,
            norm_weight: vector(&norm_weight, dv)?,
        })
    };
    let conv_state =
        || Tensor::at_device_mut(at(&conv), Dtype::BF16, [SLOTS, channels, 3], [channels * 3, 3, 1]);
    let strides = [hv * dv * dk, dv * dk, dk, 1];
    let recurrent_state = || Tensor::at_device_mut(at(&states), Dtype::F32, [SLOTS, hv, dv, dk], strides);
    let rows = |slice: &CudaSlice<u16>, n, features| {
        Tensor::at_device(at(slice), Dtype::BF16, [n, features], [features, 1])
    };
    let heads_of = |slice: &CudaSlice<u16>, n| {
        Tensor::at_device_mut(at(slice), Dtype::BF16, [n, hv, dv], [hv * dv, dv, 1])
    };

    // Prompts, one behind the other; sequence r has slot `first + r`.
    let prefill = |first: usize, lengths: [usize; B]| -> Result<(), Box<dyn std::error::Error>> {
        let n = lengths.iter().sum();
        let qkvz = stream.clone_htod(&cut(&qkvz, wide, &|r| 0..lengths[r]))?;
        let ba = stream.clone_htod(&cut(&ba, narrow, &|r| 0..lengths[r]))?;
        let starts: Vec<i32> = (0..=B).map(|r| lengths[..r].iter().sum::<usize>() as i32).collect();
        let slots: Vec<i32> = (first..first + B).map(|slot| slot as i32).collect();
        let (starts, slots) = (stream.clone_htod(&starts)?, stream.clone_htod(&slots)?);
        let out = stream.alloc_zeros::<u16>(n * hv * dv)?;
        let scratch = stream.alloc_zeros::<u8>(prefill_scratch_bytes(&layer, n, B))?;
        let slots = Indices::at_device(at(&slots).0, IndexType::I32, [B, 1], [1, 1])?;
        let call = Prefill::<DeviceAddress, DeviceAddress> {
            layer,
            projections: Projections::Packed(Packed {
                mixed_qkvz: rows(&qkvz, n, wide)?,
                mixed_ba: rows(&ba, n, narrow)?,
            }),
            weights: weights()?,
            cu_seqlens: Indices::at_device(at(&starts).0, IndexType::I32, [B + 1], [1])?,
            conv_state: Some(conv_state()?),
            recurrent_state: Some(recurrent_state()?),
            slots: Slots::of(slots),
            has_initial_state: None,
            checkpoints: None,
            out: heads_of(&out, n)?,
        };
        // SAFETY: dense tensors on the stream's device, which live until it has done this and which nothing
        // else uses.
        unsafe { gpu.prefill_raw(&call, (at(&scratch), scratch.len()), stream.cu_stream()) }?;
        stream.synchronize()?;
        Ok(())
    };
    prefill(0, PROMPTS)?;

    // A step, in memory that stays: the graph has its addresses.
    let (mut step_qkvz, mut step_ba) =
        (stream.alloc_zeros::<u16>(B * wide)?, stream.alloc_zeros::<u16>(B * narrow)?);
    let out = stream.alloc_zeros::<u16>(B * hv * dv)?;
    let mut slots = stream.clone_htod(&[-1i32; B])?;
    let call = Decode::<DeviceAddress, DeviceAddress> {
        layer,
        tokens_per_sequence: 1,
        projections: Projections::Packed(Packed {
            mixed_qkvz: rows(&step_qkvz, B, wide)?,
            mixed_ba: rows(&step_ba, B, narrow)?,
        }),
        weights: weights()?,
        conv_state: ConvState { state: conv_state()?, keep: Keep::Last },
        recurrent_state: RecurrentState { state: recurrent_state()?, keep: Keep::Last },
        slots: Slots::of(Indices::at_device(at(&slots).0, IndexType::I32, [B, 1], [1, 1])?),
        num_accepted_tokens: None,
        out: heads_of(&out, B)?,
    };
    // SAFETY: as above, until the last replay is done.
    let decode = || unsafe { gpu.decode_raw(&call, stream.cu_stream()) };
    // The first call loads the kernel, on padding alone; the next one is captured. Both are one launch.
    decode()?;
    stream.begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    decode()?;
    let graph = stream.end_capture(CUgraphInstantiate_flags(0))?.ok_or("nothing was captured")?;
    stream.memcpy_htod(&[0, 1, 2], &mut slots)?;
    for step in 0..STEPS {
        let row = |r: usize| PROMPTS[r] + step..PROMPTS[r] + step + 1;
        stream.memcpy_htod(&cut(&qkvz, wide, &row), &mut step_qkvz)?;
        stream.memcpy_htod(&cut(&ba, narrow, &row), &mut step_ba)?;
        graph.launch()?;
    }
    println!("{} tokens of {B} prompts, then {STEPS} of each by a graph", PROMPTS.iter().sum::<usize>());

    prefill(B, PROMPTS.map(|length| length + STEPS))?;
    let states = stream.clone_dtoh(&states)?;
    let (ours, other) = states.split_at(B * hv * dv * dk);
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut ours.iter().zip(other).map(|(a, b)| f64::from(a - b)));
    let error = apart / norm(&mut other.iter().map(|x| f64::from(*x)));
    println!("states are {error:.1e} of their norm apart from those of one prefill");
    if error < 1e-3 { Ok(()) } else { Err("they should be the same".into()) }
}

/// Where a slice is.
fn at<T: DeviceRepr>(slice: &CudaSlice<T>) -> DeviceAddress {
    DeviceAddress(slice.device_ptr(slice.stream()).0)
}
