//! One table of cases, held against the CPU backend bit for bit: on the emulator wherever tests run, and on a GPU where there is one.

use std::sync::Arc;

use gdn_kernels::{
    emulator::{self, Memory, POISON, Place},
    split,
};

use super::{
    CudaError, Gpu, RawPacked, RawRows, RawUnpacked,
    lower::{Job, Profile},
    raw::operands,
};
use crate::{
    Cpu, Heads, Layout, Packed, PackedMut, Packing, Rows, RowsMut, Unpacked, UnpackedMut,
    split::{Direction, Plan},
};

/// How one tensor lies in memory.
#[derive(Clone, Copy, Debug, Default)]
struct Shape {
    /// Elements between the end of a row and the start of the next.
    padding: usize,
    /// Bytes past a multiple of 256 at which the tensor begins.
    misalignment: usize,
}

/// `mixed_qkvz`, `mixed_ba`, `mixed_qkv`, `z`, `b`, `a`.
type Six<T> = [T; 6];

#[derive(Clone, Copy, Debug)]
struct Case {
    heads: [usize; 4],
    packing: Packing,
    /// Bytes of an element of `qkvz` and of `ba`.
    sizes: [usize; 2],
    shapes: Six<Shape>,
    num_rows: usize,
}

/// The table: heads x packing x element size x strides and alignments x N.
fn table() -> Vec<Case> {
    let aligned = [Shape::default(); 6];
    let mut table = Vec::new();
    let mut add = |heads, sizes, shapes, num_rows| {
        for packing in Packing::ALL {
            table.push(Case { heads, packing, sizes, shapes, num_rows });
        }
    };
    let models = [[16, 32, 128, 128], [16, 48, 128, 128], [4, 8, 128, 128]];
    let odd = [
        [1, 1, 1, 1],
        [1, 1, 128, 128],
        [2, 2, 7, 5],
        [3, 6, 24, 40],
        [4, 4, 96, 96],
        [2, 6, 96, 96],
        [2, 10, 128, 128],
        [1, 8, 128, 64],
        [5, 15, 3, 16],
    ];
    for heads in models.into_iter().chain(odd) {
        for sizes in [[2, 2], [4, 4], [1, 1], [8, 8], [2, 4], [4, 2], [1, 2], [3, 16]] {
            add(heads, sizes, aligned, 5);
        }
    }
    for heads in [[4, 8, 128, 128], [3, 6, 24, 40], [1, 3, 16, 8]] {
        for num_rows in [0, 1, 2, 3, 4, 6, 7, 8, 9, 64, 333] {
            add(heads, [2, 2], aligned, num_rows);
        }
    }
    // Strides and alignments: every width of access, from one tensor that is off or from all.
    for heads in [[2, 4, 64, 64], [3, 6, 24, 40]] {
        for misalignment in [1, 2, 4, 8, 16, 24, 255] {
            add(heads, [2, 2], [Shape { misalignment, padding: 0 }; 6], 5);
            for off in 0..6 {
                let mut shapes = aligned;
                shapes[off].misalignment = misalignment;
                add(heads, [2, 2], shapes, 3);
            }
        }
        for padding in [1, 2, 3, 4, 8, 64, 100] {
            add(heads, [2, 2], [Shape { misalignment: 0, padding }; 6], 5);
            add(heads, [1, 4], [Shape { misalignment: 16, padding }; 6], 5);
            for off in 0..6 {
                let mut shapes = aligned;
                shapes[off].padding = padding;
                add(heads, [2, 2], shapes, 1);
                add(heads, [2, 2], shapes, 3);
            }
        }
    }
    // More row tiles than the y of a grid has, and more rows than 16 bits.
    for num_rows in [65_535, 65_536, 200_000] {
        add([1, 2, 8, 8], [2, 2], aligned, num_rows);
    }
    add([1, 1, 1, 1], [1, 1], aligned, 300_001);
    // Offsets past 2^31 elements and past 2^32 bytes, between few rows.
    let wide = Shape { padding: (1 << 30) + 8, misalignment: 0 };
    add([2, 4, 64, 64], [2, 2], [wide, aligned[1], aligned[2], aligned[3], aligned[4], aligned[5]], 4);
    add([2, 4, 64, 64], [2, 2], [aligned[0], aligned[1], aligned[2], wide, aligned[4], wide], 4);
    table
}

/// A tensor on the host: its rows one after the other, and how they are to lie on the device.
#[derive(Clone)]
struct Tensor {
    rows: Vec<u8>,
    num_rows: usize,
    features: usize,
    element_size: usize,
    shape: Shape,
}

impl Tensor {
    fn row_bytes(&self) -> usize {
        self.features * self.element_size
    }

    fn row_stride(&self) -> usize {
        (self.features + self.shape.padding) * self.element_size
    }

    fn view(&self) -> Rows<'_> {
        Rows::from_bytes(&self.rows, self.element_size, self.num_rows, self.features).unwrap()
    }

    fn view_mut(&mut self) -> RowsMut<'_> {
        RowsMut::from_bytes(&mut self.rows, self.element_size, self.num_rows, self.features).unwrap()
    }

    fn at(&self, address: u64) -> RawRows {
        let stride = self.features + self.shape.padding;
        RawRows::new(address, self.element_size, self.num_rows, self.features, stride).unwrap()
    }

    fn poisoned(mut self) -> Self {
        self.rows.fill(POISON);
        self
    }
}

impl Case {
    fn layout(&self) -> Layout {
        let [hk, hv, dk, dv] = self.heads;
        Layout::new(Heads::new(hk, hv, dk, dv).unwrap(), self.packing)
    }

    /// The shapes of the six tensors, without rows.
    fn shapes(&self) -> Six<Tensor> {
        let heads = self.layout().heads;
        let hv = heads.num_v_heads();
        let features =
            [heads.qkvz_features(), heads.ba_features(), heads.qkv_features(), heads.z_features(), hv, hv];
        let [q, b] = self.sizes;
        let sizes = [q, b, q, q, b, b];
        std::array::from_fn(|i| Tensor {
            rows: Vec::new(),
            num_rows: self.num_rows,
            features: features[i],
            element_size: sizes[i],
            shape: self.shapes[i],
        })
    }

    /// The six tensors: packed ones full of numbers, and the unpacked ones that the CPU makes of them.
    fn tensors(&self) -> Six<Tensor> {
        let layout = self.layout();
        let mut tensors = self.shapes();
        for (i, tensor) in tensors.iter_mut().enumerate() {
            let bytes = tensor.num_rows * tensor.row_bytes();
            tensor.rows = if i < 2 { numbers(bytes, i as u64) } else { vec![POISON; bytes] };
        }
        let [mixed_qkvz, mixed_ba, mixed_qkv, z, b, a] = &mut tensors;
        crate::split(
            &layout,
            Packed { mixed_qkvz: mixed_qkvz.view(), mixed_ba: mixed_ba.view() },
            UnpackedMut {
                mixed_qkv: mixed_qkv.view_mut(),
                z: z.view_mut(),
                b: b.view_mut(),
                a: a.view_mut(),
            },
            &Cpu::new(),
        )
        .unwrap();
        // The merge that is the other direction's truth.
        let mut merged = [mixed_qkvz.clone().poisoned(), mixed_ba.clone().poisoned()];
        let [qkvz, ba] = &mut merged;
        let from = Unpacked { mixed_qkv: mixed_qkv.view(), z: z.view(), b: b.view(), a: a.view() };
        let to = PackedMut { mixed_qkvz: qkvz.view_mut(), mixed_ba: ba.view_mut() };
        crate::merge(&layout, from, to, &Cpu::new()).unwrap();
        assert!(qkvz.rows == mixed_qkvz.rows && ba.rows == mixed_ba.rows);
        tensors
    }
}

/// Bytes without a period in sight.
fn numbers(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut numbers = Vec::with_capacity(bytes + 8);
    while numbers.len() < bytes {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        numbers.extend_from_slice(&(mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb).to_le_bytes());
    }
    numbers.truncate(bytes);
    numbers
}

/// The tensors at these addresses.
fn raw(tensors: &Six<Tensor>, addresses: Six<u64>) -> (RawPacked, RawUnpacked) {
    let [mixed_qkvz, mixed_ba, mixed_qkv, z, b, a] = std::array::from_fn(|i| tensors[i].at(addresses[i]));
    (RawPacked { mixed_qkvz, mixed_ba }, RawUnpacked { mixed_qkv, z, b, a })
}

fn written(direction: Direction) -> std::ops::Range<usize> {
    match direction {
        Direction::Split => 2..6,
        Direction::Merge => 0..2,
    }
}

/// Runs a case on the emulated GPU and holds it to the CPU.
fn emulate(case: &Case, tensors: &Six<Tensor>, direction: Direction, profile: Profile) {
    let memory = Memory::new();
    let addresses: Six<u64> = std::array::from_fn(|i| {
        let tensor = &tensors[i];
        let place = Place {
            misalignment: tensor.shape.misalignment as u64,
            row_bytes: tensor.row_bytes(),
            row_stride: tensor.row_stride() as u64,
        };
        if written(direction).contains(&i) {
            memory.output(tensor.rows.len(), place)
        } else {
            memory.input(&tensor.rows, place)
        }
    });
    let (packed, unpacked) = raw(tensors, addresses);
    let plan = Plan::new(&case.layout(), direction, operands(&packed, &unpacked)).unwrap();
    let Some(job) = Job::new(&plan, profile).unwrap() else {
        assert_eq!(case.num_rows, 0, "{case:?}: nothing to launch");
        return;
    };
    let [x, y] = job.shape.blocks;
    let launch = emulator::Launch { blocks: [x, y, 1], threads: job.shape.threads, shared_bytes: 0 };
    // SAFETY: the emulator checks every access.
    emulator::run(&memory, launch, |gpu| unsafe {
        match (job.wide, job.shape.rows, job.merge) {
            (true, 1, false) => split::run::<true, false, 1>(gpu, &job.args),
            (true, 2, false) => split::run::<true, false, 2>(gpu, &job.args),
            (false, 4, false) => split::run::<false, false, 4>(gpu, &job.args),
            (true, 1, true) => split::run::<true, true, 1>(gpu, &job.args),
            (true, 2, true) => split::run::<true, true, 2>(gpu, &job.args),
            (false, 4, true) => split::run::<false, true, 4>(gpu, &job.args),
            other => panic!("there is no kernel for {other:?}"),
        }
    });
    for i in written(direction) {
        let (rows, stored) = memory.read(addresses[i]);
        assert!(stored.iter().all(|times| *times == 1), "{case:?}: tensor {i}: bytes were left out");
        assert!(rows == tensors[i].rows, "{case:?}: tensor {i} differs from the CPU's");
    }
}

/// A device that looks smaller than it is takes other kernels, and one that takes fewer blocks, slices.
fn profiles() -> [Profile; 3] {
    let [one, h200] = [1, 132].map(Profile::of);
    [one, h200, Profile { most_blocks: 60_000, ..one }]
}

#[test]
fn on_the_emulator() {
    for case in table() {
        let tensors = case.tensors();
        for direction in [Direction::Split, Direction::Merge] {
            for profile in profiles() {
                // One grid in one piece and one in slices is enough of many rows.
                if case.num_rows < 1000 || profile.multiprocessors == 1 {
                    emulate(&case, &tensors, direction, profile);
                }
            }
        }
    }
}

#[test]
fn every_kernel_is_in_the_table() {
    let mut seen = std::collections::BTreeSet::new();
    let mut sliced = false;
    for case in table() {
        let layout = case.layout();
        let tensors = case.shapes();
        let addresses: Six<u64> =
            std::array::from_fn(|i| ((i as u64 + 1) << 40) + case.shapes[i].misalignment as u64);
        let (packed, unpacked) = raw(&tensors, addresses);
        let plan = Plan::new(&layout, Direction::Split, operands(&packed, &unpacked)).unwrap();
        for profile in profiles() {
            if let Some(job) = Job::new(&plan, profile).unwrap() {
                seen.insert((job.wide, job.shape.rows, job.args.qkvz_word, job.args.ba_word));
                sliced |= job.shape.blocks[1] > 1;
            }
        }
    }
    assert!(sliced);
    for rows in [1, 2] {
        assert!(seen.iter().any(|s| (s.0, s.1) == (true, rows)), "16 bytes wide, {rows} rows: {seen:?}");
    }
    for word in [1, 2, 4, 8, 16] {
        assert!(seen.iter().any(|s| s.2 == word), "qkvz by {word} bytes: {seen:?}");
        assert!(seen.iter().any(|s| s.3 == word), "ba by {word} bytes: {seen:?}");
    }
}

mod on_a_gpu {
    use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, sys};

    use super::*;
    use crate::cuda::lower::Choice;

    /// Bytes of poison before and after every tensor.
    const GUARD: usize = 512;
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
            let span = tensor.num_rows.saturating_sub(1) * stride + row;
            let start = GUARD + tensor.shape.misalignment;
            let bytes = start + span + GUARD;
            // SAFETY: filled before it is read, but for the gaps of a tensor that spreads far.
            let mut memory = unsafe { stream.alloc::<u8>(bytes) }.unwrap();
            if bytes <= IMAGE || stride == row {
                stream.memcpy_htod(&image(tensor, bytes, start, poison), &mut memory).unwrap();
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
                assert!(got == image(tensor, bytes, self.start, false), "{what} differs from the CPU's");
                return;
            }
            for n in 0..tensor.num_rows {
                let at = self.start + n * stride;
                let got = stream.clone_dtoh(&self.memory.slice(at..at + row)).unwrap();
                assert!(got == tensor.rows[n * row..][..row], "{what} differs from the CPU's in row {n}");
            }
        }
    }

    /// The bytes of a tensor with its gaps and guards.
    fn image(tensor: &Tensor, bytes: usize, start: usize, poison: bool) -> Vec<u8> {
        let mut image = vec![POISON; bytes];
        if !poison && !tensor.rows.is_empty() {
            let (row, stride) = (tensor.row_bytes(), tensor.row_stride());
            for (n, from) in tensor.rows.chunks(row).enumerate() {
                image[start + n * stride..][..row].copy_from_slice(from);
            }
        }
        image
    }

    fn launch(case: &Case, tensors: &Six<Tensor>, direction: Direction, gpu: &Gpu) {
        let stream = gpu.stream();
        let on_device: Six<OnDevice> =
            std::array::from_fn(|i| OnDevice::new(stream, &tensors[i], written(direction).contains(&i)));
        let (packed, unpacked) = raw(tensors, on_device.each_ref().map(|tensor| tensor.address(stream)));
        let layout = case.layout();
        // SAFETY: six tensors of the case's shape, alive until the stream is done, which `check` waits for.
        unsafe {
            match direction {
                Direction::Split => gpu.split_raw(&layout, packed, unpacked, stream.cu_stream()),
                Direction::Merge => gpu.merge_raw(&layout, unpacked, packed, stream.cu_stream()),
            }
        }
        .unwrap();
        for (i, tensor) in tensors.iter().enumerate() {
            on_device[i].check(stream, tensor, &format!("{case:?}: {direction:?}: tensor {i}"));
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
            let mut gpu = gpu.clone().programmatic(programmatic);
            for case in table().into_iter().filter(&cases) {
                let tensors = case.tensors();
                for direction in [Direction::Split, Direction::Merge] {
                    for profile in profiles() {
                        gpu.profile = profile;
                        launch(&case, &tensors, direction, &gpu);
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
            for direction in [Direction::Split, Direction::Merge] {
                launch(&case, &tensors, direction, &gpu);
            }
        }
    }

    /// Microseconds of a split by rows of a thread and threads of a block, replayed from a graph: what `choose` was chosen by.
    #[test]
    #[ignore = "a measurement"]
    fn measure_choices() {
        let mut gpu = gpu().expect("a GPU");
        let stream = gpu.stream().context().new_stream().unwrap();
        gpu = Gpu::on(&stream).unwrap();
        gpu.warmup().unwrap();
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
                let memory: Six<CudaSlice<u8>> = std::array::from_fn(|i| {
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
                        let mut gpu = gpu.clone().programmatic(*programmatic);
                        gpu.profile.choice = *choice;
                        let addresses = memory.each_ref().map(|memory| memory.device_ptr(&stream).0);
                        let (packed, unpacked) = raw(&tensors, addresses);
                        stream
                            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
                            .unwrap();
                        for _ in 0..calls {
                            // SAFETY: six tensors that outlive the graph.
                            unsafe { gpu.split_raw(&case.layout(), packed, unpacked, stream.cu_stream()) }
                                .unwrap();
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
                    let choice =
                        choice.map_or(String::from("chosen,"), |c| format!("{},{}", c.rows, c.threads));
                    println!(
                        "tune,{}/{},{num_rows},{programmatic},{choice},{:.3}",
                        heads[0], heads[1], times[5]
                    );
                }
            }
        }
    }
}
