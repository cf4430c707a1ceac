//! The smallest door through which `layer.py` reaches `gdn::prefill` and `gdn::decode`: a C library with one
//! function. `cargo build --release -p gdn --example gdn_layer_shim`

use std::{error::Error, ffi::c_char, ptr};

use gdn::{
    ConvState, Cpu, Decode, Dtype, Exclusive, Heads, Indices, Keep, Layer, Layout, Packed, Packing, Prefill,
    Projections, RecurrentState, Shared, Slots, Tensor, Weights,
};

/// One call over dense tensors of interleaved packing. Activations and weights are bf16 or f32, the recurrent
/// state is f32.
#[repr(C)]
pub struct Call {
    heads: [u64; 4],
    /// Whether activations, weights and the conv state are bf16; else they are f32.
    is_bf16: u64,
    threads: u64,
    batch: u64,
    /// Of each sequence; more than one is a prefill that begins with zeros.
    tokens: u64,
    /// `mixed_qkvz`, `mixed_ba`, `conv_weight`, `A_log`, `dt_bias`, `norm_weight`.
    inputs: [*const u8; 6],
    conv_state: *mut u8,
    recurrent_state: *mut u8,
    out: *mut u8,
}

/// # Safety
/// The addresses of `call` are those of tensors as `Call` says.
unsafe fn run(call: &Call) -> Result<(), Box<dyn Error>> {
    let [hk, hv, dk, dv] = call.heads.map(|n| n as usize);
    let heads = Heads::new(hk, hv, dk, dv)?;
    let layer = Layer::new(Layout::new(heads, Packing::Interleaved));
    let dtype = if call.is_bf16 != 0 { Dtype::BF16 } else { Dtype::F32 };
    let (batch, tokens) = (call.batch as usize, call.tokens as usize);
    let (num_tokens, channels) = (batch * tokens, layer.conv_channels());

    // SAFETY: the caller's promise, here and below.
    let matrix = |i: usize, rows: usize, columns: usize| unsafe {
        Tensor::<Shared<'_>, 2>::from_raw(call.inputs[i], dtype, [rows, columns], [columns, 1])
    };
    // SAFETY: as above.
    let vector = |i: usize, len: usize| unsafe {
        Tensor::<Shared<'_>, 1>::from_raw(call.inputs[i], dtype, [len], [1])
    };
    let projections = Projections::Packed(Packed {
        mixed_qkvz: matrix(0, num_tokens, heads.qkvz_features())?,
        mixed_ba: matrix(1, num_tokens, heads.ba_features())?,
    });
    let weights = Weights {
        conv_weight: matrix(2, channels, layer.conv_width)?,
        conv_bias: None,
        A_log: vector(3, hv)?,
        dt_bias: vector(4, hv)?,
        norm_weight: vector(5, dv)?,
    };
    let taps = layer.conv_width - 1;
    // SAFETY: as above.
    let (conv_state, recurrent_state, out) = unsafe {
        (
            Tensor::<Exclusive<'_>, 3>::from_raw_mut(
                call.conv_state,
                dtype,
                [batch, channels, taps],
                [channels * taps, taps, 1],
            )?,
            Tensor::<Exclusive<'_>, 4>::from_raw_mut(
                call.recurrent_state,
                Dtype::F32,
                [batch, hv, dv, dk],
                [hv * dv * dk, dv * dk, dk, 1],
            )?,
            Tensor::<Exclusive<'_>, 3>::from_raw_mut(
                call.out,
                dtype,
                [num_tokens, hv, dv],
                [hv * dv, dv, 1],
            )?,
        )
    };
    let cpu = Cpu::new().threads(call.threads as usize);
    let slots = Slots::in_order();
    if tokens == 1 {
        gdn::decode(
            &mut Decode {
                layer,
                tokens_per_sequence: 1,
                projections,
                weights,
                conv_state: ConvState { state: conv_state, keep: Keep::Last },
                recurrent_state: RecurrentState { state: recurrent_state, keep: Keep::Last },
                slots,
                num_accepted_tokens: None,
                out,
            },
            &cpu,
        )?;
    } else {
        let cu_seqlens: Vec<i64> = (0..=batch).map(|i| (i * tokens) as i64).collect();
        let fresh = vec![0u8; batch];
        gdn::prefill(
            &mut Prefill {
                layer,
                cu_seqlens: Indices::new(&cu_seqlens, [batch + 1])?,
                projections,
                weights,
                conv_state: Some(conv_state),
                recurrent_state: Some(recurrent_state),
                slots,
                has_initial_state: Some(Indices::new(&fresh, [batch])?),
                checkpoints: None,
                out,
            },
            &cpu,
        )?;
    }
    Ok(())
}

/// 0, or 1 with a sentence in `message`.
///
/// # Safety
/// The addresses of `call` are those of tensors as `Call` says; `message` has room for `room` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gdn_layer_run(call: &Call, message: *mut c_char, room: usize) -> u32 {
    // SAFETY: the caller's promise.
    let Err(error) = (unsafe { run(call) }) else { return 0 };
    let text = error.to_string();
    let length = text.len().min(room.saturating_sub(1));
    // SAFETY: `length + 1 <= room` bytes.
    unsafe {
        ptr::copy_nonoverlapping(text.as_ptr(), message.cast(), length);
        message.add(length).write(0);
    }
    1
}
