//! The cases on a GPU, which must give the emulator's bits. Where there is none, the tests say that they are
//! skipped.

use cudarc::driver::{CudaSlice, DevicePtr, sys};

use super::{
    Access, Call, Extent,
    batch::{Batch, Form},
    cases,
    emulator::emulate,
    extents,
    memory::{Memory, Random, relative},
    moved,
    setup::{Options, Setup},
};
use crate::{
    conformance::gpu,
    cpu::Cpu,
    cuda::{Gpu, decode::run, share::Profile},
    decode::{Decode, Plan},
    dtype::Dtype,
    state::{ConvState, Keep, RecurrentState, Slots},
    view::DeviceAddress,
};

/// Clusters are for devices that have them.
fn on(gpu: &Gpu, profile: Profile) -> Profile {
    let Profile { most_cluster, target, .. } = Profile::of(gpu);
    let cluster = profile.cluster.map(|blocks| blocks.min(most_cluster));
    Profile { cluster, most_cluster, target, ..profile }
}

/// The tensors of a call on the device.
struct Placed {
    plan: Plan<DeviceAddress>,
    /// Each one's memory, and where it begins there.
    tensors: Vec<(Extent, usize, CudaSlice<u8>)>,
}

impl Placed {
    fn new(call: &mut Call<'_, '_>, gpu: &Gpu) -> Self {
        let stream = gpu.stream();
        let plan = Plan::new(call).unwrap();
        let tensors: Vec<_> = extents(&plan)
            .into_iter()
            .map(|extent| {
                let start = extent.at.addr() % 256;
                let mut bytes = vec![0xA5; start + extent.bytes];
                // SAFETY: the tensor's memory, from its first element to its last.
                bytes[start..]
                    .copy_from_slice(unsafe { std::slice::from_raw_parts(extent.at, extent.bytes) });
                // One byte at least, to have an address.
                bytes.push(0xA5);
                (extent, start, stream.clone_htod(&bytes).unwrap())
            })
            .collect();
        let address = |at: *mut u8| {
            let found = tensors.iter().find(|(extent, ..)| extent.at == at);
            let (_, start, memory) = found.expect("a tensor of the plan");
            DeviceAddress(memory.device_ptr(stream).0 + *start as u64)
        };
        let plan = moved(&plan, address);
        stream.synchronize().unwrap();
        Self { plan, tensors }
    }

    fn launch(&self, profile: Profile, gpu: &Gpu) {
        // SAFETY: the tensors are at these addresses until the stream is done, which `fetch` waits for.
        unsafe { run(gpu, &self.plan, on(gpu, profile), gpu.stream().cu_stream()) }.unwrap();
    }

    /// Copies what was written back to the host's tensors.
    fn fetch(&self, gpu: &Gpu) {
        let written = self.tensors.iter().filter(|(extent, ..)| extent.access != Access::Reads);
        for (extent, start, memory) in written {
            let bytes = gpu.stream().clone_dtoh(memory).unwrap();
            let outside = bytes[..*start].iter().chain(&bytes[*start + extent.bytes..]);
            assert!(outside.into_iter().all(|byte| *byte == 0xA5), "written before or after a tensor");
            // SAFETY: the tensor's memory, which the call may write.
            unsafe { std::slice::from_raw_parts_mut(extent.at, extent.bytes) }
                .copy_from_slice(&bytes[*start..*start + extent.bytes]);
        }
    }
}

/// Runs a call on the device, within tensors that are copied there and back.
fn launch(call: &mut Call<'_, '_>, profile: Profile, gpu: &Gpu) {
    let placed = Placed::new(call, gpu);
    placed.launch(profile, gpu);
    placed.fetch(gpu);
}

/// Runs a call on the device and on the emulator, for the same bits.
fn both(call: &mut Call<'_, '_>, profile: Profile, gpu: &Gpu) {
    let plan = Plan::new(call).unwrap();
    let written: Vec<_> =
        extents(&plan).into_iter().filter(|extent| extent.access != Access::Reads).collect();
    let copy = |extent: &Extent| {
        // SAFETY: the memory of a tensor of the call.
        unsafe { std::slice::from_raw_parts(extent.at, extent.bytes) }.to_vec()
    };
    let bytes = || -> Vec<Vec<u8>> { written.iter().map(copy).collect() };
    let before = bytes();
    emulate(call, on(gpu, profile));
    let emulated = bytes();
    for (extent, before) in written.iter().zip(&before) {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(extent.at, extent.bytes) }.copy_from_slice(before);
    }
    launch(call, profile, gpu);
    assert!(bytes() == emulated, "the device's bits are not the emulator's");
}

#[test]
fn the_oracle_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    cases::oracle(&mut |call, profile| both(call, profile, &gpu));
}

#[test]
fn any_layer_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    let gpu = gpu.programmatic(false);
    cases::any_layer(120, &mut |call, profile| both(call, profile, &gpu));
}

#[test]
fn contracts_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    cases::contracts(&mut |call, profile| both(call, profile, &gpu));
    cases::tokens_at_once(&mut |call, profile| both(call, profile, &gpu));
    cases::slots_that_are_not_there(&mut |call, profile| both(call, profile, &gpu));
}

/// More than a grid's second and third dims have room for.
#[test]
fn many_sequences_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    cases::many_sequences(70_001, &mut |call, profile| launch(call, profile, &gpu));
}

/// For tools that look at every access: the device alone.
#[test]
fn contracts_on_the_gpu_alone() {
    let Some(gpu) = gpu() else { return };
    cases::contracts(&mut |call, profile| launch(call, profile, &gpu));
    cases::slots_that_are_not_there(&mut |call, profile| launch(call, profile, &gpu));
}

/// A graph is replayed ten thousand times, with other slots each time, and leaves what as many calls on the
/// CPU leave.
#[test]
fn ten_thousand_replays_with_other_slots() {
    let Some(gpu) = gpu() else { return };
    gpu.warmup().unwrap();
    let stream = gpu.stream();
    let mut cpu = Batch::new(&Options::new([1, 2, 64, 32]), Form::default(), &[1; 3]);
    let mut device = cpu.clone();
    let slots = cpu.recurrent.sizes[0] as u64;
    let mut random = Random(5);
    let mut placed = None;
    let mut indices = None;
    device.decode_by(|call| {
        let new = Placed::new(call, &gpu);
        let at = new.plan.slots.state_indices.as_ref().unwrap().at;
        let is_there = |(_, start, memory): &(Extent, usize, CudaSlice<u8>)| {
            DeviceAddress(memory.device_ptr(stream).0 + *start as u64) == at
        };
        indices = new.tensors.iter().position(is_there);
        placed = Some(new);
    });
    let (mut placed, indices) = (placed.unwrap(), indices.unwrap());
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    placed.launch(Profile::of(&gpu), &gpu);
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
    for _ in 0..10_000 {
        let first = random.bits() % slots;
        // Three different ones, of which one may be padding.
        cpu.slots = (0..3).map(|i| ((first + i * 2) % slots) as i64).collect();
        if random.bits().is_multiple_of(4) {
            cpu.slots[1] = -1;
        }
        let (_, start, memory) = &mut placed.tensors[indices];
        let bytes: Vec<u8> = cpu.slots.iter().flat_map(|slot| (*slot as i32).to_ne_bytes()).collect();
        let mut place = memory.slice_mut(*start..*start + bytes.len());
        stream.memcpy_htod(&bytes, &mut place).unwrap();
        graph.launch().unwrap();
        cpu.decode(&Cpu::new().threads(1));
    }
    placed.fetch(&gpu);
    for (name, got, right) in [
        ("out", device.out.all(), cpu.out.all()),
        ("conv_state", device.conv.all(), cpu.conv.all()),
        ("recurrent_state", device.recurrent.all(), cpu.recurrent.all()),
    ] {
        let error = relative(&got, &right);
        assert!(error < 1e-5, "{name} is off the CPU's by {error:.2e} after ten thousand replays");
    }
}

/// Calls on two streams at a time, on tensors of their own, leave what they leave one after the other.
#[test]
fn two_streams_at_a_time() {
    let Some(first) = gpu() else { return };
    let second = Gpu::on(&first.stream().context().new_stream().unwrap()).unwrap();
    first.warmup().unwrap();
    let batch =
        |seed| Batch::new(&Options { seed, ..Options::new([2, 4, 128, 128]) }, Form::default(), &[1; 5]);
    let alone = |seed, gpu: &Gpu| {
        let mut batch = batch(seed);
        batch.decode_by(|call| {
            let placed = Placed::new(call, gpu);
            (0..200).for_each(|_| placed.launch(Profile::of(gpu), gpu));
            placed.fetch(gpu);
        });
        batch
    };
    let (right, other_right) = (alone(1, &first), alone(2, &first));
    let (mut got, mut other) = (batch(1), batch(2));
    got.decode_by(|call| {
        let placed = Placed::new(call, &first);
        other.decode_by(|call| {
            let other = Placed::new(call, &second);
            for _ in 0..200 {
                placed.launch(Profile::of(&first), &first);
                other.launch(Profile::of(&second), &second);
            }
            other.fetch(&second);
        });
        placed.fetch(&first);
    });
    for (got, right) in [(&got, &right), (&other, &other_right)] {
        let results = |batch: &Batch| [batch.out.all(), batch.recurrent.all(), batch.conv.all()];
        assert_eq!(results(got), results(right));
    }
}

/// Microseconds of a call by heads, state and B, replayed from a graph with slots rotated past the
/// second-level cache, beside a copy of as many bytes as the state has.
#[test]
#[ignore = "a measurement"]
fn measure_decode() {
    let gpu = gpu().expect("a GPU");
    gpu.warmup().unwrap();
    let stream = gpu.stream();
    let heads = [16, 32, 128, 128];
    let [hk, hv, dk, dv] = heads;
    let options = Options { dtype: Dtype::BF16, weight_dtype: Dtype::BF16, ..Options::new(heads) };
    for (dtype, tokens) in [(Dtype::F32, 1), (Dtype::BF16, 1), (Dtype::BF16, 4), (Dtype::F32, 4)] {
        for sequences in [1usize, 4, 16, 64, 512] {
            let setup = Setup::new(&options, tokens);
            let channels = setup.layer.conv_channels();
            let row = hv * dv * dk * dtype.size();
            // Calls of a graph, each on slots of its own, until they are past 256 MiB.
            let calls = ((256 << 20) / (sequences * row)).clamp(2, 64);
            let slots = calls * sequences;
            let zeros = |bytes: usize| stream.alloc_zeros::<u8>(bytes.max(256)).unwrap();
            let (state, conv) = (zeros(slots * row), zeros(slots * channels * 3 * 2));
            let (target, out) = (zeros(slots * row), zeros(sequences * tokens * hv * dv * 2));
            let features = setup.layer.heads().qkvz_features();
            let (qkvz, ba) =
                (zeros(sequences * tokens * features * 2), zeros(sequences * tokens * 2 * hv * 4));
            let upload = |bytes: &[u8]| stream.clone_htod(bytes).unwrap();
            let dense = |memory: &Memory<2>| memory.all().iter().map(|_| 0u16).collect::<Vec<_>>();
            let weight = upload(bytemuck::cast_slice(&dense(&setup.conv_weight)));
            let vector = zeros(4 * dv.max(hv));
            let at = |memory: &CudaSlice<u8>| DeviceAddress(memory.device_ptr(stream).0);
            // Before anything is captured: cudarc orders what is asked for.
            let (weight_at, vector_at) = (at(&weight), at(&vector));
            let [states, windows, copies, outputs, qkvz, ba] =
                [&state, &conv, &target, &out, &qkvz, &ba].map(at);
            let call = |i: usize, cluster: Option<u32>, steps: Option<u32>| {
                let first = (i * sequences) as u64;
                let tensor =
                    |at, dtype, sizes, strides| crate::tensor::Tensor::at_device(at, dtype, sizes, strides);
                let state_at = DeviceAddress(states.0 + first * row as u64);
                let conv_at = DeviceAddress(windows.0 + first * (channels * 6) as u64);
                let n = sequences * tokens;
                let vector =
                    |dtype, len| crate::tensor::Tensor::at_device(vector_at, dtype, [len], [1]).unwrap();
                let decode = Decode::<DeviceAddress, DeviceAddress> {
                    layer: setup.layer,
                    tokens_per_sequence: tokens,
                    projections: crate::layer::Projections::Packed(crate::view::Packed {
                        mixed_qkvz: tensor(qkvz, Dtype::BF16, [n, features], [features, 1]).unwrap(),
                        mixed_ba: tensor(ba, Dtype::F32, [n, 2 * hv], [2 * hv, 1]).unwrap(),
                    }),
                    weights: crate::layer::Weights {
                        conv_weight: tensor(weight_at, Dtype::BF16, [channels, 4], [4, 1]).unwrap(),
                        conv_bias: None,
                        A_log: vector(Dtype::F32, hv),
                        dt_bias: vector(Dtype::BF16, hv),
                        norm_weight: vector(Dtype::BF16, dv),
                    },
                    conv_state: ConvState {
                        state: crate::tensor::Tensor::at_device(
                            conv_at,
                            Dtype::BF16,
                            [sequences, channels, 3],
                            [channels * 3, 3, 1],
                        )
                        .unwrap(),
                        keep: Keep::Last,
                    },
                    recurrent_state: RecurrentState {
                        state: crate::tensor::Tensor::at_device(
                            state_at,
                            dtype,
                            [sequences, hv, dv, dk],
                            [hv * dv * dk, dv * dk, dk, 1],
                        )
                        .unwrap(),
                        keep: Keep::Last,
                    },
                    slots: Slots::in_order(),
                    num_accepted_tokens: None,
                    out: crate::tensor::Tensor::at_device(
                        outputs,
                        Dtype::BF16,
                        [n, hv, dv],
                        [hv * dv, dv, 1],
                    )
                    .unwrap(),
                };
                let plan = Plan::new(&decode).unwrap();
                let gpu = gpu.clone().check_pointers(false);
                // SAFETY: tensors that outlive the graph.
                unsafe {
                    run(&gpu, &plan, Profile { cluster, steps, ..Profile::of(&gpu) }, stream.cu_stream())
                }
                .unwrap();
            };
            let capture = |work: &dyn Fn(usize)| {
                stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
                (0..calls).for_each(work);
                stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap()
            };
            let copy = |i: usize| {
                let offset = (i * sequences * row) as u64;
                let (to, from) = (copies.0 + offset, states.0 + offset);
                // SAFETY: so many bytes are there.
                unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, sequences * row, stream.cu_stream()) }
                    .result()
                    .unwrap();
            };
            let mut ways: Vec<(String, _)> = vec![
                (String::from("chosen"), capture(&|i| call(i, None, None))),
                (String::from("copy"), capture(&copy)),
            ];
            for blocks in [1u32, 2, 4, 8] {
                for steps in [1, 2, 4, 8] {
                    if sequences as u32 * blocks <= 64 || blocks == 1 && steps > 1 {
                        let graph = capture(&|i| call(i, Some(blocks), Some(steps)));
                        ways.push((format!("{blocks}x{steps}"), graph));
                    }
                }
            }
            let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            let mut line = format!("decode,{hk}/{hv},{dtype},T={tokens},B={sequences}");
            for (name, graph) in &ways {
                let mut times: Vec<f32> = (0..9)
                    .map(|_| {
                        let start = stream.record_event(flags).unwrap();
                        graph.launch().unwrap();
                        let end = stream.record_event(flags).unwrap();
                        start.elapsed_ms(&end).unwrap() * 1000.0 / calls as f32
                    })
                    .collect();
                times.sort_by(f32::total_cmp);
                line += &format!(",{name} {:.2}", times[4]);
            }
            println!("{line}");
        }
    }
}
