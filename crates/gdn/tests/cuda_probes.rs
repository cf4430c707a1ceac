//! Every capability of a GPU that kernels may use: the device held to the emulator, bit for bit. Where there
//! is no GPU, or one without a capability, that is said.
#![cfg(feature = "cuda")]

use std::{collections::BTreeMap, ffi::CString, sync::Arc};

use gdn::cuda::{
    CudaError, Gpu,
    cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, result, sys},
};
use gdn_kernels::{
    emulator::{
        POISON,
        sums::{Factor, Model},
    },
    gpu::{Bf16, F16},
    modules::PROBES,
    probe::{
        Args,
        cases::{Case, Product, cases, products, words_of},
    },
};

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

/// The modules of probes that were loaded, by op.
type Modules = BTreeMap<&'static str, sys::CUmodule>;

/// What the device writes.
fn on_device(stream: &Arc<CudaStream>, modules: &mut Modules, case: &Case) -> Vec<u8> {
    let (op, target) = case.module();
    let module = PROBES.iter().find(|module| (module.op, module.target) == (op, target)).unwrap();
    stream.context().bind_to_thread().unwrap();
    let loaded = *modules.entry(op).or_insert_with(|| {
        let ptx = CString::new(module.ptx).unwrap();
        // SAFETY: PTX that ends with a zero.
        unsafe { result::module::load_data(ptx.as_ptr().cast()) }.unwrap()
    });
    // SAFETY: a module that stays loaded.
    let function = unsafe { result::module::get_function(loaded, CString::new(case.name).unwrap()) }.unwrap();
    let fixed = module.ptx.contains(&format!("{}_shared[", case.name));
    let shared = if fixed { 0 } else { case.launch.shared_bytes };
    let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: a function of that module.
    unsafe { result::function::set_function_attribute(function, most, shared as i32) }.unwrap();

    let from = stream.clone_htod(&case.input).unwrap();
    let mut to = stream.clone_htod(&vec![POISON; case.written]).unwrap();
    let mut args =
        Args { from: from.device_ptr(stream).0, to: to.device_ptr_mut(stream).0, count: case.count };
    let mut cluster = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: case.launch.cluster,
                y: 1,
                z: 1,
            },
        },
    };
    let [x, y, z] = case.launch.blocks;
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: case.launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: stream.cu_stream(),
        attrs: &raw mut cluster,
        numAttrs: u32::from(case.launch.cluster > 1),
    };
    let mut params = [(&raw mut args).cast()];
    // SAFETY: a probe takes `Args`, with what its case says at the two addresses.
    unsafe { sys::cuLaunchKernelEx(&raw const config, function, params.as_mut_ptr(), std::ptr::null_mut()) }
        .result()
        .unwrap_or_else(|error| panic!("{} {:?}: {error}", case.name, case.launch));
    stream.synchronize().unwrap_or_else(|error| panic!("{} {:?}: {error}", case.name, case.launch));
    stream.clone_dtoh(&to).unwrap()
}

/// Words that differ, NaN being NaN.
fn differences(got: &[u32], expected: &[u32]) -> usize {
    let nan = |bits: &u32| f32::from_bits(*bits).is_nan();
    let differ = |(got, expected): &(&u32, &u32)| got != expected && !(nan(got) && nan(expected));
    got.iter().zip(expected).filter(differ).count()
}

/// The sums of products by a model of how they are added.
fn sums(products: &[Product], model: Model) -> Vec<u32> {
    let mut words = Vec::new();
    for Product { a, b, c, bf16, .. } in products {
        let factor = |bits: &u16| if *bf16 { Factor::new::<Bf16>(*bits) } else { Factor::new::<F16>(*bits) };
        let factors = |lines: &[Vec<u16>]| -> Vec<Vec<Factor>> {
            lines.iter().map(|line| line.iter().map(factor).collect()).collect()
        };
        let (a, b) = (factors(a), factors(b));
        for (i, row) in a.iter().enumerate() {
            for (j, column) in b.iter().enumerate() {
                let steps = row.chunks(16).zip(column.chunks(16));
                words.push(steps.fold(c[i * b.len() + j], |sum, (a, b)| model.dot(a, b, sum)).to_bits());
            }
        }
    }
    words
}

/// Which models of addition give what the device gave, and by how many words the others miss it.
fn models(case: &Case, got: &[u32]) -> Vec<(usize, Model)> {
    let products = products(case);
    let mut found = Vec::new();
    for width in [2, 4, 8, 16] {
        for extra in -1..=6 {
            for nearest in [false, true] {
                let model = Model { width, extra, nearest };
                found.push((differences(got, &sums(&products, model)), model));
            }
        }
    }
    found.sort_by_key(|(misses, _)| *misses);
    found
}

#[test]
fn the_device_does_what_the_emulator_does() {
    let Some(gpu) = gpu() else { return };
    let capability = gpu.info().compute_capability;
    let stream = gpu.stream();
    let mut modules = Modules::new();
    let mut wrong = Vec::new();
    println!("{}", gpu.info());
    for case in cases() {
        let (_, target) = case.module();
        let what =
            format!("{} {:?}x{} count {}", case.name, case.launch.blocks, case.launch.threads, case.count);
        if !target.runs_on(capability) {
            println!("skipped: {what}: {} does not run on {capability:?}", target.name());
            continue;
        }
        let got = words_of(&on_device(stream, &mut modules, &case));
        let expected = words_of(&case.on_emulator(0));
        if case.name == "gdn_probe_logistics" {
            // All its numbers are tried where kernels are held to the emulator with them.
            let near = |(got, expected): (&u32, &u32)| {
                let [got, expected] = [got, expected].map(|bits| f32::from_bits(*bits));
                (got - expected).abs() <= 4e-7 * expected || got.is_nan() && expected.is_nan()
            };
            println!("near: {what}: {} words", got.len());
            if got.len() != expected.len() || !got.iter().zip(&expected).all(near) {
                wrong.push(what);
            }
            continue;
        }
        let missed = differences(&got, &expected);
        let products = products(&case);
        if missed == 0 {
            println!("same: {what}: {} words", got.len());
            continue;
        }
        println!("DIFFERENT: {what}: {missed} of {} words", got.len());
        if products.is_empty() {
            wrong.push(what);
            continue;
        }
        let differ = |i: &usize| differences(&got[*i..][..1], &expected[*i..][..1]) > 0;
        for i in (0..got.len()).filter(differ).take(6) {
            println!("    word {i}: {:#010x} on the device, {:#010x} on the emulator", got[i], expected[i]);
        }
        for (misses, model) in models(&case, &got).into_iter().take(4) {
            println!("    {misses} words differ from {model:?}");
        }
        // How tensor cores of other generations add is not known here; they must come as near as the terms'
        // size allows.
        let sizes = products.iter().flat_map(|product| {
            product.a.iter().enumerate().flat_map(move |(i, a)| {
                product.b.iter().enumerate().map(move |(j, b)| {
                    let value = |bits: &u16| {
                        let factor =
                            if product.bf16 { Factor::new::<Bf16>(*bits) } else { Factor::new::<F16>(*bits) };
                        factor.value()
                    };
                    let terms = a.iter().zip(b).map(|(a, b)| (value(a) * value(b)).abs());
                    terms.sum::<f64>() + f64::from(product.c[i * product.b.len() + j]).abs()
                })
            })
        });
        let far = got.iter().zip(&expected).zip(sizes).filter(|((got, expected), size)| {
            let [got, expected] = [got, expected].map(|bits| f64::from(f32::from_bits(**bits)));
            let by = (got - expected).abs();
            by.is_nan() || by > size * 2f64.powi(-20)
        });
        if capability == (9, 0) || far.count() > 0 {
            wrong.push(what);
        }
    }
    assert!(wrong.is_empty(), "the device differs: {wrong:#?}");
}
