//! The CUDA backend through its public doors. Where there is no GPU, the tests that need one say that they
//! are skipped.
#![cfg(feature = "cuda")]

mod support;

use std::{sync::Arc, time::Instant};

use gdn::{
    ArgumentError, Heads, Layout, Packed, Packing, Unpacked,
    cuda::{
        self, CudaError, Gpu, RawRows,
        cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, sys},
    },
    reference,
};
use support::{Case, Shape};

/// The first GPU, on a stream of its own.
fn gpu() -> Option<Gpu> {
    match Gpu::new(0) {
        Ok(gpu) => {
            let stream = gpu.stream().context().new_stream().unwrap();
            Some(Gpu::on(&stream).unwrap())
        }
        Err(error @ (CudaError::NoDriver | CudaError::NoDevice { .. })) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn layout() -> Layout {
    Layout::new(Heads::new(4, 12, 64, 32).unwrap(), Packing::Interleaved)
}

/// The six tensors on the device, 2 and 4 bytes an element.
struct OnDevice {
    layout: Layout,
    num_rows: usize,
    qkvz: CudaSlice<u16>,
    ba: CudaSlice<u32>,
    qkv: CudaSlice<u16>,
    z: CudaSlice<u16>,
    b: CudaSlice<u32>,
    a: CudaSlice<u32>,
}

/// Elements that no two rows, and no two calls with another `seed`, have in common.
fn numbers<T>(count: usize, seed: usize, make: impl Fn(u64) -> T) -> Vec<T> {
    (0..count as u64)
        .map(|i| make((i + ((seed as u64) << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20))
        .collect()
}

fn inputs(layout: &Layout, num_rows: usize, seed: usize) -> (Vec<u16>, Vec<u32>) {
    let heads = layout.heads;
    (
        numbers(num_rows * heads.qkvz_features(), seed, |x| x as u16),
        numbers(num_rows * heads.ba_features(), seed, |x| x as u32),
    )
}

impl OnDevice {
    fn new(stream: &Arc<CudaStream>, layout: Layout, num_rows: usize, seed: usize) -> Self {
        let heads = layout.heads;
        let (qkvz, ba) = inputs(&layout, num_rows, seed);
        let wide = |features: usize| stream.clone_htod(&vec![0xA5A5u16; num_rows * features]).unwrap();
        let narrow = || stream.clone_htod(&vec![0xA5A5_A5A5u32; num_rows * heads.num_v_heads()]).unwrap();
        Self {
            qkvz: stream.clone_htod(&qkvz).unwrap(),
            ba: stream.clone_htod(&ba).unwrap(),
            qkv: wide(heads.qkv_features()),
            z: wide(heads.z_features()),
            b: narrow(),
            a: narrow(),
            layout,
            num_rows,
        }
    }

    fn split(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        let (n, heads) = (self.num_rows, self.layout.heads);
        let hv = heads.num_v_heads();
        cuda::split(
            &self.layout,
            Packed {
                mixed_qkvz: cuda::Rows::new(&self.qkvz, n, heads.qkvz_features())?,
                mixed_ba: cuda::Rows::new(&self.ba, n, heads.ba_features())?,
            },
            Unpacked {
                mixed_qkv: cuda::RowsMut::new(&mut self.qkv, n, heads.qkv_features())?,
                z: cuda::RowsMut::new(&mut self.z, n, heads.z_features())?,
                b: cuda::RowsMut::new(&mut self.b, n, hv)?,
                a: cuda::RowsMut::new(&mut self.a, n, hv)?,
            },
            gpu,
        )
    }

    fn merge(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        let (n, heads) = (self.num_rows, self.layout.heads);
        let hv = heads.num_v_heads();
        cuda::merge(
            &self.layout,
            Unpacked {
                mixed_qkv: cuda::Rows::new(&self.qkv, n, heads.qkv_features())?,
                z: cuda::Rows::new(&self.z, n, heads.z_features())?,
                b: cuda::Rows::new(&self.b, n, hv)?,
                a: cuda::Rows::new(&self.a, n, hv)?,
            },
            Packed {
                mixed_qkvz: cuda::RowsMut::new(&mut self.qkvz, n, heads.qkvz_features())?,
                mixed_ba: cuda::RowsMut::new(&mut self.ba, n, heads.ba_features())?,
            },
            gpu,
        )
    }

    /// As pointers, for the raw layer.
    fn raw(&mut self, stream: &CudaStream) -> (Packed<RawRows>, Unpacked<RawRows>) {
        let (n, heads) = (self.num_rows, self.layout.heads);
        let rows = |address, size, features| RawRows::new(address, size, n, features, features).unwrap();
        let hv = heads.num_v_heads();
        (
            Packed {
                mixed_qkvz: rows(self.qkvz.device_ptr(stream).0, 2, heads.qkvz_features()),
                mixed_ba: rows(self.ba.device_ptr(stream).0, 4, heads.ba_features()),
            },
            Unpacked {
                mixed_qkv: rows(self.qkv.device_ptr_mut(stream).0, 2, heads.qkv_features()),
                z: rows(self.z.device_ptr_mut(stream).0, 2, heads.z_features()),
                b: rows(self.b.device_ptr_mut(stream).0, 4, hv),
                a: rows(self.a.device_ptr_mut(stream).0, 4, hv),
            },
        )
    }

    /// Holds what is on the device to the oracle.
    fn check(&self, stream: &Arc<CudaStream>, seed: usize) {
        let (n, heads) = (self.num_rows, self.layout.heads);
        let (qkvz, ba) = inputs(&self.layout, n, seed);
        let [qkv, z] = [&self.qkv, &self.z].map(|s| stream.clone_dtoh(s).unwrap());
        let [b, a] = [&self.b, &self.a].map(|s| stream.clone_dtoh(s).unwrap());
        let hv = heads.num_v_heads();
        let packed = Packed {
            mixed_qkvz: gdn::Rows::new(&qkvz, n, heads.qkvz_features()).unwrap(),
            mixed_ba: gdn::Rows::new(&ba, n, heads.ba_features()).unwrap(),
        };
        let unpacked = Unpacked {
            mixed_qkv: gdn::Rows::new(&qkv, n, heads.qkv_features()).unwrap(),
            z: gdn::Rows::new(&z, n, heads.z_features()).unwrap(),
            b: gdn::Rows::new(&b, n, hv).unwrap(),
            a: gdn::Rows::new(&a, n, hv).unwrap(),
        };
        reference::check(&heads, self.layout.packing, &packed, &unpacked).unwrap();
    }
}

#[test]
fn a_machine_without_a_driver_or_a_device_says_so() {
    match Gpu::new(1000) {
        Err(CudaError::NoDriver) => {
            let text = CudaError::NoDriver.to_string();
            assert!(text.contains("no NVIDIA driver") && text.contains("libcuda.so.1"), "{text}");
            assert!(matches!(cuda::devices(), Err(CudaError::NoDriver)));
        }
        Err(error @ CudaError::NoDevice { ordinal: 1000, .. }) => {
            let count = cuda::devices().unwrap().len();
            assert_eq!(error.to_string(), format!("no device cuda:1000, this machine has {count}"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn devices_describe_themselves() {
    let Some(gpu) = gpu() else { return };
    let devices = cuda::devices().unwrap();
    assert_eq!(&devices[0], gpu.info());
    assert!(devices[0].is_supported() && devices[0].multiprocessors > 0 && devices[0].memory_bytes > 1 << 30);
    println!("{}", devices[0]);
}

#[test]
fn there_and_back_on_slices() {
    let Some(gpu) = gpu() else { return };
    for num_rows in [0, 1, 77] {
        let mut tensors = OnDevice::new(gpu.stream(), layout(), num_rows, 1);
        tensors.split(&gpu).unwrap();
        tensors.check(gpu.stream(), 1);
        if num_rows > 0 {
            gpu.stream().memset_zeros(&mut tensors.qkvz).unwrap();
            gpu.stream().memset_zeros(&mut tensors.ba).unwrap();
        }
        tensors.merge(&gpu).unwrap();
        let (qkvz, ba) = inputs(&layout(), num_rows, 1);
        assert!(gpu.stream().clone_dtoh(&tensors.qkvz).unwrap() == qkvz);
        assert!(gpu.stream().clone_dtoh(&tensors.ba).unwrap() == ba);
    }
}

#[test]
fn strided_slices() {
    let Some(gpu) = gpu() else { return };
    let (layout, n) = (layout(), 9);
    let shapes = [3, 1, 7, 16, 2, 5].map(|padding| Shape { padding, misalignment: 0 });
    let case = Case::packed(&layout.heads, n, [1, 1], shapes);
    let stream = gpu.stream();
    let upload = |rows: gdn::Rows<'_>| {
        let span = (n - 1) * rows.row_stride() + rows.features();
        let mut bytes = vec![0xA5u8; span];
        for i in 0..n {
            bytes[i * rows.row_stride()..][..rows.features()].copy_from_slice(rows.row(i).unwrap());
        }
        stream.clone_htod(&bytes).unwrap()
    };
    let (packed, unpacked) = (case.read_packed(), case.read_unpacked());
    let (qkvz, ba) = (upload(packed.mixed_qkvz), upload(packed.mixed_ba));
    let views = [unpacked.mixed_qkv, unpacked.z, unpacked.b, unpacked.a];
    let [mut qkv, mut z, mut b, mut a] = views.map(upload);
    let view = |slice, rows: gdn::Rows<'_>| {
        cuda::Rows::with_stride(slice, n, rows.features(), rows.row_stride()).unwrap()
    };
    fn view_mut<'a>(slice: &'a mut CudaSlice<u8>, n: usize, rows: gdn::Rows<'_>) -> cuda::RowsMut<'a, u8> {
        cuda::RowsMut::with_stride(slice, n, rows.features(), rows.row_stride()).unwrap()
    }
    cuda::split(
        &layout,
        Packed { mixed_qkvz: view(&qkvz, packed.mixed_qkvz), mixed_ba: view(&ba, packed.mixed_ba) },
        Unpacked {
            mixed_qkv: view_mut(&mut qkv, n, views[0]),
            z: view_mut(&mut z, n, views[1]),
            b: view_mut(&mut b, n, views[2]),
            a: view_mut(&mut a, n, views[3]),
        },
        &gpu,
    )
    .unwrap();
    let mut on_cpu = Case::packed(&layout.heads, n, [1, 1], shapes);
    let (from, to) = on_cpu.for_split();
    gdn::split(&layout, from, to, &gdn::Cpu::new()).unwrap();
    let wanted = on_cpu.read_unpacked();
    for (got, rows) in [(qkv, wanted.mixed_qkv), (z, wanted.z), (b, wanted.b), (a, wanted.a)] {
        let got = stream.clone_dtoh(&got).unwrap();
        for (i, row) in got.chunks(rows.row_stride()).enumerate() {
            assert_eq!(&row[..rows.features()], rows.row(i).unwrap());
            assert!(row[rows.features()..].iter().all(|byte| *byte == 0xA5), "between rows");
        }
    }
}

#[test]
fn tensors_of_the_host() {
    let Some(gpu) = gpu() else { return };
    let layout = layout();
    for (num_rows, padding) in [(0, 0), (1, 0), (33, 0), (33, 5)] {
        let shapes = [Shape { padding, misalignment: 3 }; 6];
        let mut case = Case::packed(&layout.heads, num_rows, [2, 4], shapes);
        let (from, to) = case.for_split();
        cuda::split_host(&layout, from, to, &gpu).unwrap();
        case.assert_guards();
        reference::check(&layout.heads, layout.packing, &case.read_packed(), &case.read_unpacked()).unwrap();
        case.poison_packed(&layout.heads, num_rows, [2, 4], [shapes[0], shapes[1]]);
        let (from, to) = case.for_merge();
        cuda::merge_host(&layout, from, to, &gpu).unwrap();
        case.assert_guards();
        reference::check(&layout.heads, layout.packing, &case.read_packed(), &case.read_unpacked()).unwrap();
    }
}

#[test]
fn two_threads_on_streams_of_their_own() {
    let Some(gpu) = gpu() else { return };
    let context: Arc<CudaContext> = Arc::clone(gpu.stream().context());
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let context = &context;
            scope.spawn(move || {
                let stream = context.new_stream().unwrap();
                let gpu = Gpu::on(&stream).unwrap();
                for turn in 0..50 {
                    let seed = 1000 * thread + turn;
                    let mut tensors = OnDevice::new(&stream, layout(), 100 + turn, seed);
                    tensors.split(&gpu).unwrap();
                    tensors.check(&stream, seed);
                }
            });
        }
    });
}

#[test]
fn one_stream_after_another() {
    // The second stream reads what the first one wrote, without a word from the caller.
    let Some(first) = gpu() else { return };
    let second = Gpu::on(&first.stream().context().new_stream().unwrap()).unwrap();
    let mut tensors = OnDevice::new(first.stream(), layout(), 5000, 3);
    for _ in 0..20 {
        tensors.split(&first).unwrap();
        first.stream().memset_zeros(&mut tensors.qkvz).unwrap();
        tensors.merge(&second).unwrap();
    }
    tensors.check(second.stream(), 3);
    assert!(second.stream().clone_dtoh(&tensors.qkvz).unwrap() == inputs(&layout(), 5000, 3).0);
}

#[test]
fn a_graph_replayed_after_the_inputs_changed() {
    let Some(gpu) = gpu() else { return };
    gpu.warmup_split().unwrap();
    let stream = Arc::clone(gpu.stream());
    for programmatic in [true, false] {
        for num_rows in [1, 64, 3000] {
            let gpu = gpu.clone().programmatic(programmatic);
            let mut tensors = OnDevice::new(&stream, layout(), num_rows, 0);
            let mut staged = OnDevice::new(&stream, layout(), num_rows, 0);
            let (packed, unpacked) = tensors.raw(&stream);
            let (from, bytes) = (staged.qkvz.device_ptr(&stream).0, tensors.qkvz.num_bytes());
            let (to, cu_stream) = (tensors.qkvz.device_ptr_mut(&stream).0, stream.cu_stream());
            stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            // A copy before the first kernel, and kernels after kernels that write the same memory.
            // SAFETY: memory that lives past the last replay.
            unsafe {
                sys::cuMemcpyDtoDAsync_v2(to, from, bytes, cu_stream).result().unwrap();
                gpu.split_raw(&tensors.layout, packed, unpacked, cu_stream).unwrap();
                gpu.merge_raw(&tensors.layout, unpacked, packed, cu_stream).unwrap();
                gpu.split_raw(&tensors.layout, packed, unpacked, cu_stream).unwrap();
            }
            let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
            for seed in 1..4 {
                let (qkvz, ba) = inputs(&tensors.layout, num_rows, seed);
                stream.memcpy_htod(&qkvz, &mut staged.qkvz).unwrap();
                stream.memcpy_htod(&ba, &mut tensors.ba).unwrap();
                graph.launch().unwrap();
                stream.synchronize().unwrap();
                tensors.check(&stream, seed);
            }
        }
    }
}

#[test]
fn what_is_wrong_is_said() {
    let Some(gpu) = gpu() else { return };
    let stream = gpu.stream();
    let mut tensors = OnDevice::new(stream, layout(), 4, 0);
    let (packed, unpacked) = tensors.raw(stream);
    let host = vec![0u16; 4 * layout().heads.qkvz_features()];
    let features = layout().heads.qkvz_features();
    let on_host = RawRows::new(host.as_ptr().addr() as u64, 2, 4, features, features).unwrap();
    // SAFETY: none of these calls comes to a launch.
    unsafe {
        let wrong = Packed { mixed_qkvz: on_host, ..packed };
        let error = gpu.split_raw(&layout(), wrong, unpacked, stream.cu_stream()).unwrap_err();
        let expected = "belongs to no device, the call is for cuda:0";
        assert!(
            error.to_string().starts_with("mixed_qkvz at 0x") && error.to_string().ends_with(expected),
            "{error}"
        );

        let other = Layout::new(Heads::new(4, 4, 64, 32).unwrap(), Packing::Interleaved);
        let error = gpu.split_raw(&other, packed, unpacked, stream.cu_stream()).unwrap_err();
        assert!(matches!(error, CudaError::Argument(ArgumentError::Length { .. })), "{error}");

        let overlapping = Unpacked { z: RawRows::new(0x1000, 2, 4, 384, 384).unwrap(), ..unpacked };
        let overlapping =
            Unpacked { mixed_qkv: RawRows::new(0x1000, 2, 4, 896, 896).unwrap(), ..overlapping };
        let error = gpu.split_raw(&layout(), packed, overlapping, stream.cu_stream()).unwrap_err();
        assert!(matches!(error, CudaError::Argument(ArgumentError::Overlap { .. })), "{error}");

        // No rows: no pointer is looked at, and nothing is launched.
        let none = |size, features| RawRows::new(0, size, 0, features, features).unwrap();
        let heads = layout().heads;
        let (none_packed, none_unpacked) = (
            Packed { mixed_qkvz: none(2, heads.qkvz_features()), mixed_ba: none(4, heads.ba_features()) },
            Unpacked {
                mixed_qkv: none(2, heads.qkv_features()),
                z: none(2, heads.z_features()),
                b: none(4, heads.num_v_heads()),
                a: none(4, heads.num_v_heads()),
            },
        );
        gpu.split_raw(&layout(), none_packed, none_unpacked, stream.cu_stream()).unwrap();
    }
    let Ok(second) = Gpu::new(1) else {
        eprintln!("skipped: a tensor of another device, as there is only one");
        return;
    };
    let error = tensors.split(&second).unwrap_err();
    assert!(matches!(error, CudaError::WrongDevice { got: Some(0), expected: 1, .. }), "{error}");
    // SAFETY: comes to no launch.
    let error = unsafe { second.split_raw(&layout(), packed, unpacked, second.stream().cu_stream()) };
    assert!(matches!(error, Err(CudaError::WrongDevice { got: Some(0), expected: 1, .. })), "{error:?}");
    let mut there = OnDevice::new(second.stream(), layout(), 40, 5);
    there.split(&second).unwrap();
    there.check(second.stream(), 5);
}

/// To be run by itself in a fresh process, with `CUDA_CACHE_PATH` in an empty folder: `--ignored --exact
/// --nocapture`.
#[test]
#[ignore = "a measurement"]
fn time_to_first_result() {
    let start = Instant::now();
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let mut tensors = OnDevice::new(&stream, layout(), 4, 0);
    stream.synchronize().unwrap();
    let driver = start.elapsed();
    let start = Instant::now();
    let gpu = Gpu::on(&stream).unwrap();
    tensors.split(&gpu).unwrap();
    stream.synchronize().unwrap();
    let first = start.elapsed();
    tensors.check(&stream, 0);
    let start = Instant::now();
    gpu.warmup_split().unwrap();
    println!(
        "the driver's own start {driver:.1?}, first result {first:.1?} after it, the other kernels {:.1?}",
        start.elapsed()
    );
}

/// A call that reads past the end of its input, to see that compute-sanitizer would find one: run it under
/// `--tool memcheck` alone.
#[test]
#[ignore = "wrong on purpose"]
fn a_planted_fault() {
    let gpu = gpu().expect("a GPU");
    let stream = gpu.stream();
    let mut tensors = OnDevice::new(stream, layout(), 1000, 0);
    let (packed, unpacked) = tensors.raw(stream);
    let short = stream.alloc_zeros::<u16>(64).unwrap();
    let features = layout().heads.qkvz_features();
    let mixed_qkvz = RawRows::new(short.device_ptr(stream).0, 2, 1000, features, features).unwrap();
    // SAFETY: not sound.
    let _ =
        unsafe { gpu.split_raw(&layout(), Packed { mixed_qkvz, ..packed }, unpacked, stream.cu_stream()) };
    let _ = stream.synchronize();
}
