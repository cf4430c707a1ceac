//! The smallest door through which `compare.py` reaches the raw launch: a C library with three functions.
//! `cargo build --release -p gdn --features cuda --example gdn_shim`

use std::{ffi::c_char, ptr, sync::OnceLock, time::Instant};

use gdn::{
    Heads, Layout, Packed, Packing, Unpacked,
    cuda::{Gpu, RawRows},
};

/// One call: `mixed_qkvz`, `mixed_ba`, `mixed_qkv`, `z`, `b`, `a`, all dense.
#[repr(C)]
pub struct Call {
    heads: [u64; 4],
    contiguous: u32,
    merge: u32,
    num_rows: u64,
    element_sizes: [u64; 2],
    addresses: [u64; 6],
}

type Error = Box<dyn std::error::Error>;

fn gpu(programmatic: bool) -> &'static Result<Gpu, String> {
    static GPUS: [OnceLock<Result<Gpu, String>>; 2] = [const { OnceLock::new() }; 2];
    GPUS[usize::from(programmatic)].get_or_init(|| {
        Ok(Gpu::new(0).map_err(|e| e.to_string())?.programmatic(programmatic).check_pointers(false))
    })
}

/// # Safety
/// As `Gpu::split_raw`.
unsafe fn launch(call: &Call, stream: u64, programmatic: bool) -> Result<(), Error> {
    let gpu = gpu(programmatic).as_ref().map_err(String::as_str)?;
    let [hk, hv, dk, dv] = call.heads.map(|n| n as usize);
    let packing = if call.contiguous != 0 { Packing::Contiguous } else { Packing::Interleaved };
    let layout = Layout::new(Heads::new(hk, hv, dk, dv)?, packing);
    let heads = &layout.heads;
    let [wide, narrow] = call.element_sizes.map(|n| n as usize);
    let rows = |i: usize, size, features| {
        RawRows::new(call.addresses[i], size, call.num_rows as usize, features, features)
    };
    let packed = Packed {
        mixed_qkvz: rows(0, wide, heads.qkvz_features())?,
        mixed_ba: rows(1, narrow, heads.ba_features())?,
    };
    let unpacked = Unpacked {
        mixed_qkv: rows(2, wide, heads.qkv_features())?,
        z: rows(3, wide, heads.z_features())?,
        b: rows(4, narrow, hv)?,
        a: rows(5, narrow, hv)?,
    };
    let stream = ptr::without_provenance_mut(stream as usize);
    // SAFETY: the caller's promise.
    unsafe {
        match call.merge {
            0 => gpu.split_raw(&layout, packed, unpacked, stream)?,
            _ => gpu.merge_raw(&layout, unpacked, packed, stream)?,
        }
    }
    Ok(())
}

/// Does `calls` calls one after the other. Nanoseconds of the host for each; negative where one failed, with
/// a sentence in `message`.
///
/// # Safety
/// `call` describes tensors as `Gpu::split_raw` wants them, on device 0; `stream` is a `CUstream` of its
/// primary context; `message` has room for `room` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gdn_run(
    call: &Call,
    stream: u64,
    programmatic: bool,
    calls: u64,
    message: *mut c_char,
    room: usize,
) -> f64 {
    let start = Instant::now();
    for _ in 0..calls {
        // SAFETY: the caller's promise.
        if let Err(error) = unsafe { launch(call, stream, programmatic) } {
            let text = error.to_string();
            let length = text.len().min(room.saturating_sub(1));
            // SAFETY: `length + 1 <= room` bytes.
            unsafe {
                ptr::copy_nonoverlapping(text.as_ptr(), message.cast(), length);
                message.add(length).write(0);
            }
            return -1.0;
        }
    }
    start.elapsed().as_nanos() as f64 / calls as f64
}
