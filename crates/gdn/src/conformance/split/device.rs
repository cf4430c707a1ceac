//! The cases on a GPU. Where there is none, the tests say that they are skipped.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, sys};

use super::{
    Case, GUARD, POISON, Shape, Tensor,
    emulator::{profiles, raw},
    table, what,
};
use crate::{
    cuda::{
        CudaError, Gpu,
        split::{self, Choice, Profile},
    },
    packing::Packing,
    split::{Direction, Plan},
    view::from_order,
};

/// Where a tensor spreads over more, what lies between its rows is not looked at.
const IMAGE: usize = 1 << 30;

/// A tensor on the device, within guards.
struct OnDevice {
    memory: CudaSlice<u8>,
    start: usize,
}

impl OnDevice {
    /// With the rows of `tensor`, or with poison in their place.
    fn new(stream: &Arc<CudaStream>, tensor: &Tensor, poison: bool) -> Self {
        let (row, stride) = (tensor.row_bytes(), tensor.row_stride());
        let start = GUARD + tensor.shape.misalignment;
        let bytes = start + tensor.span() + GUARD;
        // SAFETY: filled before it is read, but for the gaps of a tensor that spreads far.
        let mut memory = unsafe { stream.alloc::<u8>(bytes) }.unwrap();
        if bytes <= IMAGE || stride == row {
            stream.memcpy_htod(&tensor.image(bytes, start, poison), &mut memory).unwrap();
        } else {
            let filler = vec![POISON; row];
            for n in 0..tensor.num_rows {
                let from = if poison { &filler[..] } else { &tensor.rows[n * row..][..row] };
                let at = start + n * stride;
                stream.memcpy_htod(from, &mut memory.slice_mut(at..at + row)).unwrap();
            }
        }
        Self { memory, start }
    }

    fn address(&self, stream: &CudaStream) -> u64 {
        let (base, _ordered) = self.memory.device_ptr(stream);
        assert!(base.is_multiple_of(256), "the driver aligns what it allocates");
        base + self.start as u64
    }

    fn check(&self, stream: &Arc<CudaStream>, tensor: &Tensor, what: &str) {
        let (row, stride, bytes) = (tensor.row_bytes(), tensor.row_stride(), self.memory.len());
        if bytes <= IMAGE || stride == row {
            let got = stream.clone_dtoh(&self.memory).unwrap();
            assert!(got == tensor.image(bytes, self.start, false), "{what} differs from the oracle");
            return;
        }
        for n in 0..tensor.num_rows {
            let at = self.start + n * stride;
            let got = stream.clone_dtoh(&self.memory.slice(at..at + row)).unwrap();
            assert!(got == tensor.rows[n * row..][..row], "{what} differs from the oracle in row {n}");
        }
    }
}

/// # Safety
/// The tensors are at these addresses of the stream's device until the work on it is done.
unsafe fn call(
    case: &Case,
    tensors: &[Tensor; 6],
    addresses: [u64; 6],
    direction: Direction,
    profile: Profile,
    gpu: &Gpu,
) {
    let views = raw(tensors, addresses);
    let (packed, unpacked) = from_order(views.each_ref());
    let plan = Plan::new(&case.layout(), direction, packed, unpacked).unwrap();
    // SAFETY: the caller's promise.
    unsafe { split::run(gpu, &plan, profile, gpu.stream().cu_stream()) }.unwrap();
}

fn launch(case: &Case, tensors: &[Tensor; 6], direction: Direction, profile: Profile, gpu: &Gpu) {
    let stream = gpu.stream();
    let on_device: [OnDevice; 6] =
        std::array::from_fn(|i| OnDevice::new(stream, &tensors[i], direction.written().contains(&i)));
    let addresses = on_device.each_ref().map(|tensor| tensor.address(stream));
    // SAFETY: six tensors of the case's shape, alive until the stream is done, which `check` waits for.
    unsafe { call(case, tensors, addresses, direction, profile, gpu) };
    for (i, tensor) in tensors.iter().enumerate() {
        on_device[i].check(stream, tensor, &what(case, direction, i));
    }
}

fn gpu() -> Option<Gpu> {
    match Gpu::new(0) {
        Ok(gpu) => Some(gpu),
        Err(error @ (CudaError::NoDriver | CudaError::NoDevice { .. })) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn run(cases: impl Fn(&Case) -> bool) {
    let Some(gpu) = gpu() else { return };
    for programmatic in [true, false] {
        let gpu = gpu.clone().programmatic(programmatic);
        for case in table().into_iter().filter(&cases) {
            let tensors = case.tensors();
            for direction in Direction::ALL {
                for profile in profiles() {
                    launch(&case, &tensors, direction, profile, &gpu);
                }
            }
        }
    }
}

// In two, as tools that look at every access take long over many rows.
#[test]
fn few_rows_on_the_gpu() {
    run(|case| case.num_rows < 1000);
}

#[test]
fn many_rows_on_the_gpu() {
    run(|case| case.num_rows >= 1000);
}

/// More than 2^31 elements in one dense tensor. Takes some 10 GB of host memory: `--ignored`.
#[test]
#[ignore = "needs a GPU and 10 GB of host memory"]
fn more_than_2_31_elements_on_the_gpu() {
    let gpu = gpu().expect("a GPU");
    for packing in Packing::ALL {
        let case = Case {
            heads: [16, 32, 128, 128],
            packing,
            sizes: [1, 2],
            shapes: [Shape::default(); 6],
            num_rows: 180_000,
        };
        let tensors = case.tensors();
        assert!(tensors[0].rows.len() > 1 << 31);
        for direction in Direction::ALL {
            launch(&case, &tensors, direction, Profile::of(gpu.info().multiprocessors), &gpu);
        }
    }
}

/// Microseconds of a split by rows of a thread and threads of a block, replayed from a graph: what `choose`
/// was chosen by.
#[test]
#[ignore = "a measurement"]
fn measure_choices() {
    let mut gpu = gpu().expect("a GPU");
    let stream = gpu.stream().context().new_stream().unwrap();
    gpu = Gpu::on(&stream).unwrap();
    gpu.warmup_split().unwrap();
    for heads in [[16, 32, 128, 128], [4, 8, 128, 128]] {
        for num_rows in [1, 8, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768, 131_072] {
            let case = Case {
                heads,
                packing: Packing::Interleaved,
                sizes: [2, 2],
                shapes: [Shape::default(); 6],
                num_rows,
            };
            let tensors = case.shapes();
            let memory: [CudaSlice<u8>; 6] = std::array::from_fn(|i| {
                // SAFETY: what is in it does not matter to the time.
                unsafe { stream.alloc(num_rows * tensors[i].row_bytes()) }.unwrap()
            });
            let mut ways = Vec::new();
            for programmatic in [true, false] {
                for rows in [1, 2] {
                    for threads in [96, 128, 192, 256, 384] {
                        ways.push((programmatic, Some(Choice { rows, threads })));
                    }
                }
                ways.push((programmatic, None));
            }
            let calls = (40_000 / num_rows / heads[0]).clamp(3, 100);
            let graphs: Vec<_> = ways
                .iter()
                .map(|(programmatic, choice)| {
                    let gpu = gpu.clone().programmatic(*programmatic);
                    let profile = Profile { choice: *choice, ..Profile::of(gpu.info().multiprocessors) };
                    let addresses = memory.each_ref().map(|memory| memory.device_ptr(&stream).0);
                    stream
                        .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
                        .unwrap();
                    for _ in 0..calls {
                        // SAFETY: six tensors that outlive the graph.
                        unsafe { call(&case, &tensors, addresses, Direction::Split, profile, &gpu) };
                    }
                    stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap()
                })
                .collect();
            let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            let mut times = vec![Vec::new(); ways.len()];
            for turn in 0..12 {
                for (graph, times) in graphs.iter().zip(&mut times) {
                    let start = stream.record_event(flags).unwrap();
                    graph.launch().unwrap();
                    let end = stream.record_event(flags).unwrap();
                    let took = start.elapsed_ms(&end).unwrap() * 1000.0 / calls as f32;
                    if turn > 1 {
                        times.push(took);
                    }
                }
            }
            for ((programmatic, choice), times) in ways.iter().zip(&mut times) {
                times.sort_by(f32::total_cmp);
                let choice = choice.map_or(String::from("chosen,"), |c| format!("{},{}", c.rows, c.threads));
                println!("tune,{}/{},{num_rows},{programmatic},{choice},{:.3}", heads[0], heads[1], times[5]);
            }
        }
    }
}
