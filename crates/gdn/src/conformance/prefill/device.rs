//! The cases on a GPU, which must give the emulator's bits: that has the GPU's own numbers for the one function that is not
//! rounded to the nearest. Where there is no GPU, the tests say that they are skipped.

use std::{
    ffi::CString,
    sync::{OnceLock, mpsc},
};

use cudarc::driver::{CudaGraph, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, result, sys};
use gdn_kernels::{
    emulator::Logistic,
    modules::{Module, PROBES},
    probe,
};

use super::{
    Access, Call,
    batch::{Batch, Form},
    cases,
    emulator::emulate_with,
    extents,
    memory::Random,
    moved, segments,
    setup::Options,
};
use crate::{
    conformance::gpu,
    cuda::{
        Gpu,
        prefill::{
            job::{Job, Profile, Stage, Step},
            run,
        },
        segments::{Cut, Cutting},
    },
    dtype::Dtype,
    prefill::{CHUNK, Plan},
    view::DeviceAddress,
};

/// No more shared memory than the device has.
fn on(gpu: &Gpu, profile: Profile) -> Profile {
    let own = Profile::of(gpu);
    Profile { shared: profile.shared.min(own.shared), wgmma: profile.wgmma && own.wgmma, ..profile }
}

/// The tensors of a call on the device: each with the bytes before it.
struct Placed {
    tensors: Vec<(super::Extent, usize, CudaSlice<u8>)>,
    /// Where the scratch memory is, and how much.
    at: (DeviceAddress, usize),
    _scratch: CudaSlice<u8>,
    plan: Plan<DeviceAddress>,
}

impl Placed {
    fn new(call: &mut Call<'_, '_>, profile: Profile, gpu: &Gpu) -> Self {
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
        let scratch = stream.clone_htod(&vec![0xFF; cases::scratch_bytes(&plan, profile)]).unwrap();
        let address = |at: *mut u8| {
            let found = tensors.iter().find(|(extent, ..)| extent.at == at);
            let (_, start, memory) = found.expect("a tensor of the plan");
            DeviceAddress(memory.device_ptr(stream).0 + *start as u64)
        };
        let plan = moved(&plan, address);
        let at = (DeviceAddress(scratch.device_ptr(stream).0), scratch.len());
        stream.synchronize().unwrap();
        Self { tensors, at, _scratch: scratch, plan }
    }

    fn run(&self, profile: Profile, gpu: &Gpu) {
        let stream = gpu.stream();
        // SAFETY: the tensors are at these addresses as long as `self`, which outlives the stream's work.
        unsafe { run(gpu, &self.plan, self.at, on(gpu, profile), stream.cu_stream()) }.unwrap();
    }

    /// A graph of the call.
    fn capture(&self, profile: Profile, gpu: &Gpu, meanwhile: impl FnOnce()) -> CudaGraph {
        let stream = gpu.stream();
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        self.run(profile, gpu);
        meanwhile();
        stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap()
    }

    /// Brings what the call may have written back to the host's tensors.
    fn fetch(&self, gpu: &Gpu) {
        for (extent, start, memory) in self.tensors.iter().filter(|(e, ..)| e.access != Access::Reads) {
            let bytes = gpu.stream().clone_dtoh(memory).unwrap();
            let outside = bytes[..*start].iter().chain(&bytes[*start + extent.bytes..]);
            assert!(outside.into_iter().all(|byte| *byte == 0xA5), "written before or after a tensor");
            // SAFETY: the tensor's memory, which the call may write.
            unsafe { std::slice::from_raw_parts_mut(extent.at, extent.bytes) }
                .copy_from_slice(&bytes[*start..*start + extent.bytes]);
        }
    }

    /// Copies another call's tensors, of the same sizes, over these on the device.
    fn take_over(&mut self, other: &Self, gpu: &Gpu) {
        for ((extent, to_start, to), (_, from_start, from)) in self.tensors.iter_mut().zip(&other.tensors) {
            let from = from.slice(*from_start..*from_start + extent.bytes);
            let mut to = to.slice_mut(*to_start..*to_start + extent.bytes);
            gpu.stream().memcpy_dtod(&from, &mut to).unwrap();
        }
    }
}

/// Runs a call on the device, within tensors that are copied there and back.
fn launch(call: &mut Call<'_, '_>, profile: Profile, gpu: &Gpu) {
    let placed = Placed::new(call, profile, gpu);
    placed.run(profile, gpu);
    placed.fetch(gpu);
}

/// The device's numbers for the logistic function, each as near as it must be.
fn logistic(gpu: &Gpu) -> Logistic {
    static OWN: OnceLock<Logistic> = OnceLock::new();
    let ask = || {
        let places: Vec<f32> = Logistic::places().collect();
        let stream = gpu.stream();
        stream.context().bind_to_thread().unwrap();
        let has = |module: &&Module| module.kernels().any(|kernel| kernel.name == "gdn_probe_logistics");
        let ptx = CString::new(PROBES.iter().find(has).unwrap().ptx).unwrap();
        let from = stream.clone_htod(&places).unwrap();
        let mut to = stream.alloc_zeros::<f32>(places.len()).unwrap();
        let count = places.len() as u32;
        let mut args =
            probe::Args { from: from.device_ptr(stream).0, to: to.device_ptr_mut(stream).0, count };
        // SAFETY: PTX that ends with a zero, and a kernel of it that takes these arguments; a block has 256 threads.
        unsafe {
            let module = result::module::load_data(ptx.as_ptr().cast()).unwrap();
            let function = result::module::get_function(module, c"gdn_probe_logistics".into()).unwrap();
            let (blocks, mut params) = (count.div_ceil(256), [(&raw mut args).cast()]);
            result::launch_kernel(function, (blocks, 1, 1), (256, 1, 1), 0, stream.cu_stream(), &mut params)
                .unwrap();
        }
        let own = stream.clone_dtoh(&to).unwrap();
        for (place, own) in places.iter().zip(&own) {
            let exact = Logistic::exact(*place);
            assert!((f64::from(*own) - exact).abs() <= 4e-7 * exact, "{place} is {own}, not {exact}");
        }
        Logistic::of(own)
    };
    OWN.get_or_init(ask).clone()
}

/// Runs a call on the device and on the emulator, for the same bits.
fn both(call: &mut Call<'_, '_>, profile: Profile, gpu: &Gpu) {
    let plan = Plan::new(call).unwrap();
    let written: Vec<_> = extents(&plan).into_iter().filter(|e| e.access != Access::Reads).collect();
    let copy = |extent: &super::Extent| {
        // SAFETY: the memory of a tensor of the call.
        unsafe { std::slice::from_raw_parts(extent.at, extent.bytes) }.to_vec()
    };
    let bytes = || -> Vec<Vec<u8>> { written.iter().map(copy).collect() };
    let before = bytes();
    emulate_with(logistic(gpu), call, on(gpu, profile));
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
    cases::hostile(&mut |call, profile| both(call, profile, &gpu));
    cases::fading_states(&mut |call, profile| both(call, profile, &gpu));
}

/// Long keys, where the device has room for them.
fn long(gpu: &Gpu) -> &'static [usize] {
    if Profile::of(gpu).shared >= 163 << 10 {
        return cases::LONG;
    }
    println!("skipped: keys of 192 and 256, for which this GPU has too little shared memory");
    &[]
}

/// A GPU that has room for them.
fn gpu_with_room() -> Option<Gpu> {
    gpu().filter(|gpu| !long(gpu).is_empty())
}

#[test]
fn long_keys_on_the_gpu() {
    let Some(gpu) = gpu_with_room() else { return };
    cases::long_keys(&mut |call, profile| both(call, profile, &gpu));
}

#[test]
fn hostile_long_keys_on_the_gpu() {
    let Some(gpu) = gpu_with_room() else { return };
    cases::hostile_long_keys(&mut |call, profile| both(call, profile, &gpu));
}

/// For tools that look at every access: the device alone.
#[test]
fn long_keys_on_the_gpu_alone() {
    let Some(gpu) = gpu_with_room() else { return };
    cases::long_keys(&mut |call, profile| launch(call, profile, &gpu));
}

#[test]
fn any_layer_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    cases::any_layer(40, long(&gpu), &mut |call, profile| launch(call, profile, &gpu));
    cases::any_layer(8, long(&gpu), &mut |call, profile| both(call, profile, &gpu));
}

#[test]
fn contracts_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    cases::contracts(long(&gpu), &mut |call, profile| both(call, profile, &gpu));
}

/// For tools that look at every access: the device alone.
#[test]
fn contracts_on_the_gpu_alone() {
    let Some(gpu) = gpu() else { return };
    cases::contracts(long(&gpu), &mut |call, profile| launch(call, profile, &gpu));
}

/// Windows that are scanned on a stream beside the caller's.
fn in_windows(gpu: &Gpu) -> Profile {
    Profile { window: Some(2), ..Profile::of(gpu) }
}

fn small() -> Options {
    Options { dtype: Dtype::BF16, ..Options::new([1, 2, 128, 128]) }
}

/// What a call leaves. Not bytes: of two batches they begin at different ones.
fn left_by(batch: &Batch) -> [Vec<f64>; 3] {
    [batch.out.all(), batch.conv.all(), batch.recurrent.all()]
}

/// A hundred batches of any lengths, each launch behind the last one's.
#[test]
fn ragged_batches_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    for seed in 0..100 {
        let mut random = Random(seed + 77);
        let mut below = |n: u64| (random.bits() % n) as usize;
        let lens: Vec<usize> = (0..=below(6)).map(|_| below(260)).collect();
        let before = Batch::new(&Options { seed, ..small() }, Form::default(), &lens);
        let mut batch = before.clone();
        let profile = if below(2) == 0 { in_windows(&gpu) } else { Profile::of(&gpu) };
        batch.prefill_by(None, |call| launch(call, profile, &gpu));
        batch.check_to(cases::PRECISION, &before, &format!("prefill of {lens:?}"));
    }
}

/// One sequence, whose projections take more bytes than 31 bits count.
#[test]
fn a_million_tokens_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    let options = Options { dtype: Dtype::BF16, ..Options::new([2, 2, 128, 128]) };
    cases::beside_the_cpu(&options, &[1_100_003], 4093, &mut |call, _| launch(call, Profile::of(&gpu), &gpu));
}

/// More blocks than 16 bits count, most with little to do.
#[test]
fn thousands_of_tiny_sequences_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    let options = Options { dtype: Dtype::BF16, ..Options::new([1, 8, 64, 64]) };
    let lens = cases::tiny(9001);
    cases::beside_the_cpu(&options, &lens, 4093, &mut |call, _| launch(call, Profile::of(&gpu), &gpu));
}

/// A graph is replayed with other lengths and slots, inputs and states than it was captured with.
#[test]
fn replays_with_other_lengths_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    gpu.warmup().unwrap();
    let profile = in_windows(&gpu);
    let batch = |lens: &[usize]| Batch::new(&small(), Form::default(), lens);
    let mut first = batch(&[300, 0, 100, 200]);
    first.prefill_by(None, |call| {
        let mut placed = Placed::new(call, profile, &gpu);
        let graph = placed.capture(profile, &gpu, || ());
        for lens in [[300, 0, 100, 200], [1, 599, 0, 0], [150; 4], [64, 65, 63, 408]] {
            let (mut right, mut got) = (batch(&lens), batch(&lens));
            right.prefill_by(None, |call| launch(call, profile, &gpu));
            got.prefill_by(None, |call| {
                let mut own = Placed::new(call, profile, &gpu);
                placed.take_over(&own, &gpu);
                graph.launch().unwrap();
                own.take_over(&placed, &gpu);
                own.fetch(&gpu);
            });
            assert!(left_by(&got) == left_by(&right), "{lens:?}");
        }
    });
}

/// While a thread captures its stream, and makes a graph of several calls, another one's calls are its own.
#[test]
fn a_capture_beside_another_thread_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    gpu.warmup().unwrap();
    let profile = in_windows(&gpu);
    let batch = |seed| Batch::new(&Options { seed, ..small() }, Form::default(), &[300, 0, 200]);
    let alone = |seed| {
        let mut batch = batch(seed);
        batch.prefill_by(None, |call| launch(call, profile, &gpu));
        batch
    };
    let (right, other_right) = (alone(1), alone(2));
    // Neither waits for one that has failed: then its end is gone.
    let (captured, is_captured) = mpsc::channel::<()>();
    let (done, is_done) = mpsc::channel::<()>();
    std::thread::scope(|threads| {
        let context = gpu.stream().context().clone();
        let other_right = &other_right;
        threads.spawn(move || {
            let _done = done;
            let gpu = Gpu::on(&context.new_stream().unwrap()).unwrap();
            let _ = is_captured.recv();
            for _ in 0..20 {
                let mut other = batch(2);
                other.prefill_by(None, |call| launch(call, profile, &gpu));
                assert!(left_by(&other) == left_by(other_right), "beside a capture");
            }
        });
        let mut got = batch(1);
        got.prefill_by(None, |call| {
            let placed = Placed::new(call, profile, &gpu);
            let graph = placed.capture(profile, &gpu, || {
                drop(captured);
                let _ = is_done.recv();
            });
            graph.launch().unwrap();
            placed.fetch(&gpu);
        });
        assert!(left_by(&got) == left_by(&right), "captured");
    });
}

/// The median of some work's microseconds on a stream.
fn microseconds(stream: &CudaStream, work: &dyn Fn()) -> f32 {
    let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let mut times: Vec<f32> = (0..12)
        .map(|_| {
            let start = stream.record_event(flags).unwrap();
            work();
            let end = stream.record_event(flags).unwrap();
            start.elapsed_ms(&end).unwrap() * 1000.0
        })
        .collect();
    times.sort_by(f32::total_cmp);
    times[5]
}

/// Prints microseconds of a call and of each of its first four launches, by threads of the scan and windows.
fn measure(gpu: &Gpu, heads: [usize; 4], lens: &[usize]) {
    let stream = gpu.stream();
    let time = |work: &dyn Fn()| microseconds(stream, work);
    let options = Options { dtype: Dtype::BF16, weight_dtype: Dtype::BF16, ..Options::new(heads) };
    let form = Form { out_dtype: Dtype::BF16, conv_dtype: Dtype::BF16, ..Form::default() };
    let mut batch = Batch::repeated(&options, form, lens, 64);
    batch.prefill_by(None, |call| {
        let chunks = lens.iter().sum::<usize>() / CHUNK + lens.len();
        for (threads, windows) in [
            (None, None),
            (Some(128), Some(1)),
            (Some(256), Some(1)),
            (Some(256), Some(2)),
            (Some(256), Some(3)),
            (Some(256), Some(4)),
        ] {
            let window = windows.map(|windows| chunks.div_ceil(windows));
            let profile = Profile { threads, window, ..Profile::of(gpu) };
            let placed = Placed::new(call, profile, gpu);
            let graph = placed.capture(profile, gpu, || ());
            let all = time(&|| graph.launch().unwrap());
            let job = Job::new(&placed.plan, placed.at, profile).unwrap().unwrap();
            let steps: Vec<f32> = job
                .steps()
                .take(4)
                // SAFETY: the tensors are there as long as `placed`.
                .map(|(_, step)| time(&|| unsafe { step.launch(gpu, stream.cu_stream()) }.unwrap()))
                .collect();
            println!(
                "prefill,{heads:?},{lens:?},threads {threads:?},windows {windows:?}: {all:.1} us, \
                 steps {steps:.1?} of {}",
                job.steps().count()
            );
        }
    });
}

#[test]
#[ignore = "a measurement"]
fn measure_prefill() {
    let gpu = gpu().expect("a GPU").check_pointers(false);
    gpu.warmup().unwrap();
    for (heads, lens) in [
        ([16, 32, 128, 128], vec![512]),
        ([16, 32, 128, 128], vec![2048]),
        ([16, 32, 128, 128], vec![8192]),
        ([16, 32, 128, 128], vec![32768]),
        ([16, 32, 128, 128], vec![2048; 4]),
        ([16, 32, 128, 128], vec![100, 1, 3000, 777, 4096]),
        ([4, 8, 128, 128], vec![8192]),
        ([16, 48, 128, 128], vec![8192]),
    ] {
        measure(&gpu, heads, &lens);
    }
}

/// Twice, in turns.
#[test]
#[ignore = "a measurement"]
fn measure_long_keys() {
    let gpu = gpu().expect("a GPU").check_pointers(false);
    gpu.warmup().unwrap();
    for dims in [128, 192, 256, 128, 192, 256] {
        measure(&gpu, [16, 32, dims, dims], &[2048]);
    }
}

#[test]
fn segments_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    segments::segments(&mut |call, profile| both(call, profile, &gpu));
}

/// For tools that look at every access: the device alone.
#[test]
fn segments_on_the_gpu_alone() {
    let Some(gpu) = gpu() else { return };
    segments::segments(&mut |call, profile| launch(call, profile, &gpu));
}

/// Microseconds of a call with segments and without, and of the launches of its first window.
#[test]
#[ignore = "a measurement"]
fn measure_segments() {
    let gpu = gpu().expect("a GPU").check_pointers(false);
    gpu.warmup().unwrap();
    let stream = gpu.stream();
    let time = |work: &dyn Fn()| microseconds(stream, work);
    for (heads, lens) in [
        ([4, 8, 128, 128], vec![1024]),
        ([4, 8, 128, 128], vec![2048]),
        ([4, 8, 128, 128], vec![4096]),
        ([4, 8, 128, 128], vec![8192]),
        ([4, 8, 128, 128], vec![32768]),
        ([4, 8, 128, 128], vec![8192; 4]),
        ([4, 8, 128, 128], vec![2048; 8]),
        ([2, 4, 128, 128], vec![8192]),
        ([8, 16, 128, 128], vec![2048]),
        ([8, 16, 128, 128], vec![8192]),
        ([8, 16, 128, 128], vec![32768]),
        ([16, 32, 128, 128], vec![8192]),
    ] {
        let options = Options { dtype: Dtype::BF16, weight_dtype: Dtype::BF16, ..Options::new(heads) };
        let form = Form { out_dtype: Dtype::BF16, conv_dtype: Dtype::BF16, ..Form::default() };
        let mut batch = Batch::repeated(&options, form, &lens, 64);
        batch.prefill_by(None, |call| {
            let cut = |from, most, shortest| Cutting::As(Cut { from, most, shortest, longest: 32 });
            let more = [cut(16, 8, 4), cut(16, 8, 8), cut(16, 16, 4), cut(16, 5, 8), cut(16, 3, 8)];
            for cutting in [Cutting::Never, Cutting::ByHeads].into_iter().chain(more) {
                let profile = Profile { cutting, ..Profile::of(&gpu) };
                let placed = Placed::new(call, profile, &gpu);
                let graph = placed.capture(profile, &gpu, || ());
                let all = time(&|| graph.launch().unwrap());
                let job = Job::new(&placed.plan, placed.at, profile).unwrap().unwrap();
                let count =
                    if job.steps().any(|(stage, _)| matches!(stage, Stage::States(_))) { 6 } else { 4 };
                let steps = job.steps().take(count);
                // SAFETY: the tensors are there as long as `placed`.
                let run = |step: Step| time(&|| unsafe { step.launch(&gpu, stream.cu_stream()) }.unwrap());
                let steps: Vec<_> = steps.map(|(_, step)| run(step).round()).collect();
                println!("{heads:?},{lens:?},{cutting:?}: {all:.0} {steps:?} of {}", job.steps().count());
            }
        });
    }
}

/// To be run by itself in a fresh process, with `CUDA_CACHE_DISABLE=1`: `--ignored --exact --nocapture`.
#[test]
#[ignore = "a measurement"]
fn time_to_first_prefill() {
    let start = std::time::Instant::now();
    let context = cudarc::driver::CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    stream.clone_htod(&[1u8]).unwrap();
    stream.synchronize().unwrap();
    let driver = start.elapsed();
    let options =
        Options { dtype: Dtype::BF16, weight_dtype: Dtype::BF16, ..Options::new([16, 32, 128, 128]) };
    let form = Form { out_dtype: Dtype::BF16, conv_dtype: Dtype::BF16, ..Form::default() };
    for lens in [vec![100], vec![100], vec![64; 8], vec![64; 8]] {
        let mut batch = Batch::repeated(&options, form, &lens, 64);
        batch.prefill_by(None, |call| {
            let start = std::time::Instant::now();
            let gpu = Gpu::on(&stream).unwrap();
            let profile = Profile::of(&gpu);
            let made = start.elapsed();
            let placed = Placed::new(call, profile, &gpu);
            let start = std::time::Instant::now();
            placed.run(profile, &gpu);
            stream.synchronize().unwrap();
            let first = start.elapsed() + made;
            println!("the driver's own start {driver:.1?}, prefill of {lens:?} {first:.1?} after it");
        });
    }
    let start = std::time::Instant::now();
    Gpu::on(&stream).unwrap().warmup().unwrap();
    println!("all other kernels {:.1?}", start.elapsed());
}
