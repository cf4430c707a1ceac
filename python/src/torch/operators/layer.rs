//! The operators `gdn::decode` and `gdn::prefill`.

use pyo3::prelude::*;

use super::{HEADS, Operator, Stack, Text, kernels};
use crate::{
    ops::{
        decode,
        layer::{
            self, CONV_BIAS, CONV_STATE, CONV_WEIGHT, COUNT, Factors, MORE_INDICES, MORE_STATES,
            MORE_WINDOWS, NORM_WEIGHT, Names, OUT, Operands, RECURRENT_STATE, SECOND_INDICES, STATE_INDICES,
            THIRD_INDICES, is_written,
        },
        prefill,
    },
    tensor::Tensor,
    torch::{Libtorch, PLACE, handle::Handle},
};

kernels! {
    decode of c"gdn::decode": decode_on(PACKED, false);
    decode_out of c"gdn::decode": decode_on(PACKED, true);
    decode_unpacked of c"gdn::decode": decode_on(UNPACKED, false);
    decode_unpacked_out of c"gdn::decode": decode_on(UNPACKED, true);
    prefill of c"gdn::prefill": prefill_on(PACKED, false);
    prefill_out of c"gdn::prefill": prefill_on(PACKED, true);
    prefill_unpacked of c"gdn::prefill": prefill_on(UNPACKED, false);
    prefill_unpacked_out of c"gdn::prefill": prefill_on(UNPACKED, true);
}

/// Both, each on packed projections and on those that the split leaves, each with its out variant.
pub(super) fn operators() -> Vec<Operator> {
    let packed = "Tensor mixed_qkvz, Tensor mixed_ba";
    let unpacked = "Tensor mixed_qkv, Tensor z, Tensor b, Tensor a";
    let weights = "Tensor conv_weight, Tensor? conv_bias, Tensor A_log, Tensor dt_bias, Tensor norm_weight";
    let factors = "float l2norm_eps=1e-06, float norm_eps=1e-06, float? scale=None, float beta_scale=1.0, str gate=\"silu\"";
    let decode_of = |projections: &str| {
        format!(
            "{projections}, {weights}, Tensor(a!) conv_state, Tensor(b!) recurrent_state, {HEADS}, *, \
             int tokens_per_sequence=1, Tensor? state_indices=None, int pad_slot_id=-1, \
             Tensor? num_accepted_tokens=None, Tensor? output_state_indices=None, bool disable_state_update=False, \
             Tensor(c!)? intermediate_states=None, Tensor(d!)? intermediate_conv_windows=None, \
             Tensor? intermediate_state_indices=None, {factors}"
        )
    };
    let prefill_of = |projections: &str| {
        format!(
            "{projections}, {weights}, Tensor(a!)? conv_state, Tensor(b!)? recurrent_state, Tensor cu_seqlens, {HEADS}, *, \
             Tensor? state_indices=None, int pad_slot_id=-1, Tensor? has_initial_state=None, \
             int checkpoint_every_n_tokens=0, Tensor? checkpoint_starts=None, Tensor(c!)? state_checkpoints=None, \
             Tensor(d!)? conv_checkpoints=None, bool segments=False, {factors}"
        )
    };
    let mut operators = Vec::with_capacity(8);
    let mut add = |name: &'static std::ffi::CStr, arguments: &str, is_out: bool, kernel| {
        let text = name.to_string_lossy();
        let schema = match is_out {
            false => format!("{text}({arguments}) -> Tensor"),
            true => format!("{text}({arguments}, Tensor(e!) out) -> ()"),
        };
        operators.push(Operator { name, schema, kernel });
    };
    add(c"decode", &decode_of(packed), false, decode);
    add(c"decode.out", &decode_of(packed), true, decode_out);
    add(c"decode.unpacked", &decode_of(unpacked), false, decode_unpacked);
    add(c"decode.unpacked_out", &decode_of(unpacked), true, decode_unpacked_out);
    add(c"prefill", &prefill_of(packed), false, prefill);
    add(c"prefill.out", &prefill_of(packed), true, prefill_out);
    add(c"prefill.unpacked", &prefill_of(unpacked), false, prefill_unpacked);
    add(c"prefill.unpacked_out", &prefill_of(unpacked), true, prefill_unpacked_out);
    operators
}

/// The positions of the projections.
type Given = std::ops::Range<usize>;
const PACKED: Given = 0..2;
const UNPACKED: Given = 2..6;

/// An operator's tensors, by position.
type Handles<'a> = [Option<Handle<'a>>; COUNT];

/// Projections and weights.
///
/// # Safety
/// They come next on the stack.
unsafe fn take_read<'a>(stack: &mut Stack<'a>, given: Given) -> Handles<'a> {
    let mut handles = [const { None }; COUNT];
    // SAFETY: the caller's promise.
    unsafe {
        for i in given.chain(CONV_WEIGHT..=NORM_WEIGHT) {
            handles[i] = if i == CONV_BIAS { stack.maybe_tensor() } else { Some(stack.tensor()) };
        }
    }
    handles
}

/// What an operator's numbers and texts are.
struct Numbers<'a> {
    heads: [i64; 4],
    packing: Text<'a>,
    factors: Factors,
    gate: Text<'a>,
}

impl Numbers<'_> {
    fn layer(&self) -> PyResult<gdn::Layer> {
        layer::layer(self.heads, self.packing.as_str()?, &self.factors, self.gate.as_str()?)
    }
}

/// # Safety
/// They come next on the stack.
unsafe fn take_heads<'a>(stack: &mut Stack<'a>) -> ([i64; 4], Text<'a>) {
    // SAFETY: the caller's promise.
    unsafe { (std::array::from_fn(|_| stack.int()), stack.text()) }
}

/// # Safety
/// They come next on the stack.
unsafe fn take_factors<'a>(stack: &mut Stack<'a>) -> (Factors, Text<'a>) {
    // SAFETY: the caller's promise; fields are evaluated as they are written.
    unsafe {
        let factors = Factors {
            l2norm_eps: stack.float(),
            norm_eps: stack.float(),
            scale: stack.optional().map(f64::from_bits),
            beta_scale: stack.float(),
        };
        (factors, stack.text())
    }
}

/// # Safety
/// `stack` is that of the operator.
unsafe fn decode_on(torch: &'static Libtorch, stack: *mut u64, given: Given, is_out: bool) -> PyResult<()> {
    let mut arguments = Stack { next: stack, torch };
    // SAFETY: the schema's arguments in their order.
    let (handles, numbers, tokens, pad_slot_id, disable_state_update) = unsafe {
        let mut handles = take_read(&mut arguments, given);
        handles[CONV_STATE] = Some(arguments.tensor());
        handles[RECURRENT_STATE] = Some(arguments.tensor());
        let (heads, packing) = take_heads(&mut arguments);
        let tokens = arguments.int();
        handles[STATE_INDICES] = arguments.maybe_tensor();
        let pad_slot_id = arguments.int();
        handles[SECOND_INDICES] = arguments.maybe_tensor();
        handles[THIRD_INDICES] = arguments.maybe_tensor();
        let disable_state_update = arguments.bool();
        handles[MORE_STATES] = arguments.maybe_tensor();
        handles[MORE_WINDOWS] = arguments.maybe_tensor();
        handles[MORE_INDICES] = arguments.maybe_tensor();
        let (factors, gate) = take_factors(&mut arguments);
        handles[OUT] = is_out.then(|| arguments.tensor());
        (handles, Numbers { heads, packing, factors, gate }, tokens, pad_slot_id, disable_state_update)
    };
    let call = decode::Call {
        layer: numbers.layer()?,
        tokens_per_sequence: decode::tokens_per_sequence(tokens)?,
        pad_slot_id,
        disable_state_update,
    };
    let check = |operands: &Operands| call.check(operands);
    // SAFETY: tensors that their handles keep; PyTorch's users answer for races as with any operator.
    let run = |checked: decode::Checked, _: &Operands| unsafe { checked.run(&PLACE) };
    let done = on_handles(torch, &decode::TENSORS, &call.layer.heads(), handles, check, run)?;
    // SAFETY: the stack has room for a result, which is its to delete from here on.
    unsafe { put(stack, done) };
    Ok(())
}

/// # Safety
/// `stack` is that of the operator.
unsafe fn prefill_on(torch: &'static Libtorch, stack: *mut u64, given: Given, is_out: bool) -> PyResult<()> {
    let mut arguments = Stack { next: stack, torch };
    // SAFETY: the schema's arguments in their order.
    let (handles, numbers, every, pad_slot_id, segments) = unsafe {
        let mut handles = take_read(&mut arguments, given);
        handles[CONV_STATE] = arguments.maybe_tensor();
        handles[RECURRENT_STATE] = arguments.maybe_tensor();
        handles[SECOND_INDICES] = Some(arguments.tensor());
        let (heads, packing) = take_heads(&mut arguments);
        handles[STATE_INDICES] = arguments.maybe_tensor();
        let pad_slot_id = arguments.int();
        handles[THIRD_INDICES] = arguments.maybe_tensor();
        let every = arguments.int();
        handles[MORE_INDICES] = arguments.maybe_tensor();
        handles[MORE_STATES] = arguments.maybe_tensor();
        handles[MORE_WINDOWS] = arguments.maybe_tensor();
        let segments = arguments.bool();
        let (factors, gate) = take_factors(&mut arguments);
        handles[OUT] = is_out.then(|| arguments.tensor());
        (handles, Numbers { heads, packing, factors, gate }, every, pad_slot_id, segments)
    };
    let call = prefill::Call {
        layer: numbers.layer()?,
        pad_slot_id,
        checkpoint_every_n_tokens: prefill::every(every)?,
        segments,
    };
    let check = |operands: &Operands| call.check(operands, &PLACE);
    // SAFETY: tensors that their handles keep; PyTorch's users answer for races as with any operator.
    let run = |(), operands: &Operands| unsafe { call.run(operands, &PLACE) };
    let done = on_handles(torch, &prefill::TENSORS, &call.layer.heads(), handles, check, run)?;
    // SAFETY: the stack has room for a result, which is its to delete from here on.
    unsafe { put(stack, done) };
    Ok(())
}

/// # Safety
/// The stack has room for a result.
unsafe fn put(stack: *mut u64, result: Option<Handle<'_>>) {
    if let Some(handle) = result {
        // SAFETY: the caller's promise.
        unsafe { *stack = handle.0 as u64 };
        std::mem::forget(handle);
    }
}

/// An operator on its tensors: the output, where none was given.
fn on_handles<'a, P>(
    torch: &'a Libtorch,
    names: &'static Names,
    heads: &gdn::Heads,
    mut handles: Handles<'a>,
    check: impl Fn(&Operands) -> PyResult<P>,
    run: impl Fn(P, &Operands) -> PyResult<()>,
) -> PyResult<Option<Handle<'a>>> {
    let mut operands = Operands::new(names);
    let mut first_dtype = None;
    for (i, handle) in handles.iter().enumerate() {
        if let Some(handle) = handle {
            let number = handle.read(names[i], is_written(i), operands.tensors[i].insert(Tensor::NONE))?;
            first_dtype.get_or_insert(number);
        }
    }
    let is_fresh = handles[OUT].is_none();
    let first = operands.tensors[operands.first()].unwrap_or(Tensor::NONE);
    let shape = operands.out_shape(heads)?;
    if is_fresh {
        operands.tensors[OUT] = Some(layer::imagined(&first, &shape));
    }
    let mut checked = check(&operands)?;
    if is_fresh {
        let made = torch.empty(&shape, first_dtype.unwrap_or(0), first.device);
        let made = made.map_err(|failed| torch.error(failed))?;
        operands.tensors[OUT] = Some(made.dense(&first, &shape)?);
        handles[OUT] = Some(made);
        checked = check(&operands)?;
    }
    let is_told = |i: usize| is_written(i) && !(i == OUT && is_fresh);
    for (i, handle) in handles.iter().enumerate().filter(|(i, _)| is_told(*i)) {
        if let Some(handle) = handle {
            torch.advance_versions_of(std::iter::once(handle), &names[i..=i])?;
        }
    }
    run(checked, &operands)?;
    Ok(handles[OUT].take().filter(|_| is_fresh))
}
