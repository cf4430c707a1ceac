//! Every wrong argument is named, with what it has and what was expected, before anything is written.

use gdn::{
    Checkpoints, ConvState, Cpu, Decode, Dtype, Exclusive, Indices, Keep, Prefill, RecurrentState, Shared,
    Slots, Tensor,
};

use crate::{
    batch::{Batch, Form},
    memory::Memory,
    setup::Options,
};

const HEADS: [usize; 4] = [1, 2, 8, 4];

/// A call of two sequences of two tokens.
fn call_of(batch: &mut Batch) -> Decode<Shared<'_>, Exclusive<'_>> {
    Decode {
        layer: batch.setup.layer,
        tokens_per_sequence: 2,
        projections: batch.setup.projections(),
        weights: batch.setup.weights(),
        conv_state: ConvState { state: batch.conv.view_mut(), keep: Keep::Last },
        recurrent_state: RecurrentState { state: batch.recurrent.view_mut(), keep: Keep::Last },
        slots: Slots::in_order(),
        num_accepted_tokens: None,
        out: batch.out.view_mut(),
    }
}

/// Changes such a call, and sees what it says, checked beforehand too, and that nothing was written.
fn decode_says(
    sentence: &str,
    change: impl for<'a> FnOnce(&mut Decode<Shared<'a>, Exclusive<'a>>, &'a Batch),
) {
    let before = Batch::new(&Options::new(HEADS), Form::default(), &[2, 2]);
    let (mut after, other) = (before.clone(), before.clone());
    let mut call = call_of(&mut after);
    change(&mut call, &other);
    let error = gdn::decode(&mut call, &Cpu::new()).unwrap_err();
    assert_eq!(error.to_string(), sentence);
    let error = call.checked().and_then(|checked| checked.run(&Cpu::new())).unwrap_err();
    assert_eq!(error.to_string(), sentence);
    assert!(after.conv.bytes == before.conv.bytes && after.recurrent.bytes == before.recurrent.bytes);
    assert!(after.out.bytes == before.out.bytes);
}

#[test]
fn a_call_that_was_checked_beforehand() {
    let mut whole = Batch::new(&Options::new(HEADS), Form::default(), &[2, 2]);
    let (before, mut checked) = (whole.clone(), whole.clone());
    gdn::decode(&mut call_of(&mut whole), &Cpu::new()).unwrap();
    let call = call_of(&mut checked).checked().unwrap();
    assert_eq!(call.state_bytes(), 2 * 2 * 4 * 8 * 4);
    call.run(&Cpu::new()).unwrap();
    assert!(whole.out.bytes == checked.out.bytes && whole.out.bytes != before.out.bytes);
    assert!(whole.conv.bytes == checked.conv.bytes && whole.conv.bytes != before.conv.bytes);
    assert!(
        whole.recurrent.bytes == checked.recurrent.bytes && whole.recurrent.bytes != before.recurrent.bytes
    );
}

fn leak<T>(x: T) -> &'static mut T {
    Box::leak(Box::new(x))
}

fn indices<const D: usize>(data: &[i64], sizes: [usize; D]) -> Indices<Shared<'static>, D> {
    Indices::new(leak(data.to_vec()).as_slice(), sizes).unwrap()
}

fn tensor<const D: usize>(sizes: [usize; D]) -> Tensor<Shared<'static>, D> {
    leak(Memory::dense(Dtype::F32, sizes)).view()
}

fn tensor_mut<const D: usize>(sizes: [usize; D]) -> Tensor<Exclusive<'static>, D> {
    leak(Memory::dense(Dtype::F32, sizes)).view_mut()
}

fn tensor_of<const D: usize>(dtype: Dtype, sizes: [usize; D]) -> Tensor<Shared<'static>, D> {
    leak(Memory::dense(dtype, sizes)).view()
}

#[test]
fn decode() {
    use gdn::{Packed, Projections::Packed as P, Projections::Unpacked as U, Unpacked};
    let packed =
        |qkvz: [usize; 2], ba: [usize; 2]| P(Packed { mixed_qkvz: tensor(qkvz), mixed_ba: tensor(ba) });
    decode_says("tokens_per_sequence is 0, it must be from 1 to 16", |call, _| call.tokens_per_sequence = 0);
    decode_says("tokens_per_sequence is 17, it must be from 1 to 16", |call, _| {
        call.tokens_per_sequence = 17
    });
    decode_says("the number of rows = 4 is not a multiple of tokens_per_sequence = 3", |call, _| {
        call.tokens_per_sequence = 3;
    });
    decode_says("mixed_qkvz has 31 features, 1+2 heads of 8+4 need 32", |call, _| {
        call.projections = packed([4, 31], [4, 4]);
    });
    decode_says("mixed_ba has 5 features, 1+2 heads of 8+4 need 4", |call, _| {
        call.projections = packed([4, 32], [4, 5]);
    });
    decode_says("mixed_ba has 3 rows, mixed_qkvz has 4", |call, _| {
        call.projections = packed([4, 32], [3, 4])
    });
    decode_says("mixed_qkvz has stride 2 in dim 1, expected 1", |call, _| {
        let qkvz = leak(vec![0f32; 4 * 64]);
        let qkvz = Tensor::with_strides(qkvz, [4, 32], [64, 2]).unwrap();
        call.projections = P(Packed { mixed_qkvz: qkvz, mixed_ba: tensor([4, 4]) });
    });
    decode_says("z has dtype bf16, mixed_qkv has f32", |call, _| {
        call.projections = U(Unpacked {
            mixed_qkv: tensor([4, 24]),
            z: tensor_of(Dtype::BF16, [4, 8]),
            b: tensor([4, 2]),
            a: tensor([4, 2]),
        });
    });
    decode_says("a has dtype f16, b has f32", |call, _| {
        call.projections = U(Unpacked {
            mixed_qkv: tensor([4, 24]),
            z: tensor([4, 8]),
            b: tensor([4, 2]),
            a: tensor_of(Dtype::F16, [4, 2]),
        });
    });
    decode_says("out has 5 rows, mixed_qkvz has 4", |call, _| call.out = tensor_mut([5, 2, 4]));
    decode_says("out has 3 heads, 1+2 heads of 8+4 need 2", |call, _| call.out = tensor_mut([4, 3, 4]));
    decode_says("conv_weight has 25 channels, 1+2 heads of 8+4 need 24", |call, _| {
        call.weights.conv_weight = tensor([25, 4]);
    });
    decode_says("conv_weight has 3 taps, conv_width = 4 need 4", |call, _| {
        call.weights.conv_weight = tensor([24, 3]);
    });
    decode_says("conv_width is 17, it must be from 1 to 16", |call, _| call.layer.conv_width = 17);
    decode_says("conv_bias has 3 channels, 1+2 heads of 8+4 need 24", |call, _| {
        call.weights.conv_bias = Some(tensor([3]));
    });
    decode_says("A_log has 1 heads, 1+2 heads of 8+4 need 2", |call, _| call.weights.A_log = tensor([1]));
    decode_says("dt_bias has 1 heads, 1+2 heads of 8+4 need 2", |call, _| call.weights.dt_bias = tensor([1]));
    decode_says("norm_weight has 8 features, 1+2 heads of 8+4 need 4", |call, _| {
        call.weights.norm_weight = tensor([8]);
    });
    decode_says("conv_state has 23 channels, 1+2 heads of 8+4 need 24", |call, _| {
        call.conv_state.state = tensor_mut([2, 23, 3]);
    });
    decode_says("conv_state has 2 columns, the taps before a token's own need 3", |call, _| {
        call.conv_state.state = tensor_mut([2, 24, 2]);
    });
    decode_says("conv_state has 1 slots, slots of one for each sequence need 2", |call, _| {
        call.conv_state.state = tensor_mut([1, 24, 3]);
    });
    decode_says("recurrent_state has 4 columns (DK), 1+2 heads of 8+4 need 8", |call, _| {
        call.recurrent_state.state = tensor_mut([2, 2, 4, 4]);
    });
    decode_says("recurrent_state has stride 3 in dim 3, expected 1", |call, _| {
        let data = leak(vec![0f32; 1000]);
        let state = Tensor::with_strides_mut(data, [2, 2, 4, 8], [300, 120, 27, 3]);
        call.recurrent_state.state = state.unwrap();
    });
    decode_says("state_indices has 3 rows, 2 sequences need 2", |call, _| {
        call.slots = Slots::of(indices(&[0, 1, 2], [3, 1]));
    });
    decode_says("state_indices[1] is 9, conv_state has 4 slots", |call, _| {
        call.slots = Slots::of(indices(&[0, 9], [2, 1]));
    });
    decode_says(
        "state_indices is 3 for sequences 0 and 1, it must be a slot of its own for each sequence that writes one",
        |call, _| call.slots = Slots::of(indices(&[3, 3], [2, 1])),
    );
    decode_says(
        "state_indices is 1 for sequences 0 and 1, it must be a slot of its own for each sequence that writes one",
        |call, _| {
            call.conv_state.keep = Keep::Nothing;
            call.recurrent_state.keep = Keep::LastAt(indices(&[1, 2], [2]));
        },
    );
    decode_says("num_accepted_tokens is 3 for sequence 1, it must be from 1 to 2", |call, _| {
        call.conv_state.state = tensor_mut([2, 24, 4]);
        call.num_accepted_tokens = Some(indices(&[1, 3], [2]));
    });
    decode_says("conv_state has 3 columns, the taps and all tokens but one need 4", |call, _| {
        call.num_accepted_tokens = Some(indices(&[1, 1], [2]));
    });
    decode_says("conv_state.keep is Each, it must be Last, LastAt, EachIn or Nothing", |call, _| {
        call.conv_state.keep = Keep::Each;
    });
    decode_says(
        "recurrent_state.keep is Each, it must be another choice where there are no state_indices",
        |call, _| call.recurrent_state.keep = Keep::Each,
    );
    decode_says("state_indices has 1 columns, the tokens of a sequence need 2", |call, _| {
        call.slots = Slots::of(indices(&[0, 1], [2, 1]));
        call.recurrent_state.keep = Keep::Each;
    });
    decode_says(
        "recurrent_state.keep.states has 1 states a slot, the tokens of a sequence need 2",
        |call, _| {
            call.recurrent_state.keep = Keep::EachIn { states: tensor_mut([2, 1, 2, 4, 8]), indices: None };
        },
    );
    decode_says("recurrent_state.keep.states has 3 heads, recurrent_state has 2", |call, _| {
        call.recurrent_state.keep = Keep::EachIn { states: tensor_mut([2, 2, 3, 4, 8]), indices: None };
    });
    decode_says(
        "recurrent_state.keep.indices[0] is 7, recurrent_state.keep.states has 2 slots",
        |call, _| {
            let indices = Some(indices(&[7, 1], [2]));
            call.recurrent_state.keep = Keep::EachIn { states: tensor_mut([2, 2, 2, 4, 8]), indices };
        },
    );
    decode_says("conv_state.keep.states has 4 columns, conv_state has 3", |call, _| {
        call.conv_state.keep = Keep::EachIn { states: tensor_mut([2, 2, 24, 4]), indices: None };
    });
}

fn prefill_says(
    sentence: &str,
    change: impl for<'a> FnOnce(&mut Prefill<Shared<'a>, Exclusive<'a>>, &'a Batch),
) {
    let before = Batch::new(&Options::new(HEADS), Form::default(), &[80, 3]);
    let (mut after, other) = (before.clone(), before.clone());
    let mut call = Prefill {
        layer: after.setup.layer,
        cu_seqlens: indices(&[0, 80, 83], [3]),
        projections: after.setup.projections(),
        weights: after.setup.weights(),
        conv_state: Some(after.conv.view_mut()),
        recurrent_state: Some(after.recurrent.view_mut()),
        slots: Slots::in_order(),
        has_initial_state: None,
        checkpoints: None,
        out: after.out.view_mut(),
    };
    change(&mut call, &other);
    let error = gdn::prefill(&mut call, &Cpu::new()).unwrap_err();
    assert_eq!(error.to_string(), sentence);
    assert!(after.conv.bytes == before.conv.bytes && after.recurrent.bytes == before.recurrent.bytes);
    assert!(after.out.bytes == before.out.bytes);
}

#[test]
fn prefill() {
    prefill_says("cu_seqlens has 0 entries, no sequences need 1", |call, _| {
        call.cu_seqlens = indices(&[], [0])
    });
    prefill_says("cu_seqlens is 1 at [0], it must be 0 there", |call, _| {
        call.cu_seqlens = indices(&[1, 80, 83], [3])
    });
    prefill_says("cu_seqlens is 19 at [2], it must be at least the 20 before it", |call, _| {
        call.cu_seqlens = indices(&[0, 20, 19], [3]);
    });
    prefill_says("cu_seqlens is 22 at [2], it must be 83, the number of rows, at the end", |call, _| {
        call.cu_seqlens = indices(&[0, 20, 22], [3]);
    });
    prefill_says("cu_seqlens is -5 at [1], it must be at least the 0 before it", |call, _| {
        call.cu_seqlens = indices(&[0, -5, 83], [3]);
    });
    prefill_says("has_initial_state has 1 entries, 2 sequences need 2", |call, _| {
        call.has_initial_state = Some(indices(&[1], [1]));
    });
    let checkpoints = |every, starts: &[i64], states: [usize; 4]| Checkpoints {
        every,
        starts: indices(starts, [2]),
        recurrent_states: tensor_mut(states),
        conv_states: None,
    };
    prefill_says("checkpoints.every is 48, it must be a multiple of 64, and at least that", |call, _| {
        call.checkpoints = Some(checkpoints(48, &[0, 0], [1, 2, 4, 8]));
    });
    prefill_says("checkpoints.every is 0, it must be a multiple of 64, and at least that", |call, _| {
        call.checkpoints = Some(checkpoints(0, &[0, 0], [1, 2, 4, 8]));
    });
    prefill_says("checkpoints.starts[0] is 1, checkpoints.recurrent_states has 1 slots", |call, _| {
        call.checkpoints = Some(checkpoints(64, &[1, 0], [1, 2, 4, 8]));
    });
    prefill_says("checkpoints.recurrent_states has 5 rows (DV), 1+2 heads of 8+4 need 4", |call, _| {
        call.checkpoints = Some(checkpoints(64, &[0, 0], [1, 2, 5, 8]));
    });
}

#[test]
fn what_overlaps() {
    let mut data = vec![0f32; 4096];
    let at = data.as_mut_ptr().cast::<u8>();
    // SAFETY: within `data`; the views overlap, which the op finds before it follows any of them.
    let (state, out) = unsafe {
        (
            Tensor::from_raw_mut(at, Dtype::F32, [2, 2, 4, 8], [64, 32, 8, 1]).unwrap(),
            Tensor::from_raw_mut(at.add(4 * 100), Dtype::F32, [4, 2, 4], [8, 4, 1]).unwrap(),
        )
    };
    decode_says(
        &format!("recurrent_state overlaps out: 112 bytes at {:#x} belong to both", at.addr() + 400),
        |call, _| {
            call.recurrent_state.state = state;
            call.out = out;
        },
    );
}

#[test]
fn both_states_of_a_sequence_may_share_a_page() {
    let before = Batch::new(&Options::new(HEADS), Form::default(), &[2, 2]);
    let mut after = before.clone();
    after.decode(&Cpu::new());
    // Slots of one page each: 72 f32 of conv state, 64 of recurrent state, as vLLM lays them out.
    let (page, slots) = (160, before.conv.sizes[0]);
    let mut pages = vec![0f32; page * slots];
    for [slot, c, i] in before.conv.places() {
        pages[slot * page + i * 24 + c] = before.conv.get([slot, c, i]) as f32;
    }
    for [slot, h, i, j] in before.recurrent.places() {
        pages[slot * page + 80 + h * 32 + j * 4 + i] = before.recurrent.get([slot, h, i, j]) as f32;
    }
    let at = pages.as_mut_ptr().cast::<u8>();
    let mut out = Memory::dense(Dtype::F32, [4, 2, 4]);
    let order: Vec<i64> = before.slots.clone();
    // SAFETY: within `pages`, whose parts the views share out among themselves.
    let (conv, state) = unsafe {
        (
            Tensor::from_raw_mut(at, Dtype::F32, [slots, 24, 3], [page, 1, 24]).unwrap(),
            Tensor::from_raw_mut(at.add(320), Dtype::F32, [slots, 2, 4, 8], [page, 32, 1, 4]).unwrap(),
        )
    };
    let mut call = Decode {
        layer: before.setup.layer,
        tokens_per_sequence: 2,
        projections: before.setup.projections(),
        weights: before.setup.weights(),
        conv_state: ConvState { state: conv, keep: Keep::Last },
        recurrent_state: RecurrentState { state, keep: Keep::Last },
        slots: Slots::of(Indices::new(&order, [2, 1]).unwrap()),
        num_accepted_tokens: None,
        out: out.view_mut(),
    };
    gdn::decode(&mut call, &Cpu::new()).unwrap();
    let error = crate::memory::relative(&out.all(), &after.out.all());
    assert!(error < 1e-6, "{error}");
}

#[test]
fn views() {
    let mut data = vec![0f32; 10];
    let says = |error: gdn::ArgumentError, sentence: &str| assert_eq!(error.to_string(), sentence);
    says(Tensor::new(&data, [3, 4]).unwrap_err(), "data has 10 elements, expected 12");
    says(Tensor::new(&data, [3, 3]).unwrap_err(), "data has 10 elements, expected 9");
    says(Tensor::with_strides(&data, [3, 4], [4, 1]).unwrap_err(), "data has 10 elements, expected 12");
    assert!(Tensor::with_strides(&data, [3, 4], [0, 1]).is_ok());
    says(
        Tensor::with_strides_mut(&mut data, [3, 4], [0, 1]).unwrap_err(),
        "data has stride 0 in dim 0, expected 1",
    );
    says(
        Tensor::with_strides_mut(&mut data, [3, 4], [3, 1]).unwrap_err(),
        "data has stride 3 in dim 0, expected 4",
    );
    assert!(Tensor::with_strides(&data, [usize::MAX, 2], [usize::MAX, 1]).is_err());
    assert!(Tensor::new(&data, [usize::MAX, usize::MAX]).is_err());
}
