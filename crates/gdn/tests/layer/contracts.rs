//! The contracts of the engines: padding, flags, states that are kept elsewhere, windows of accepted tokens,
//! checkpoints.

use gdn::{
    CHUNK, Checkpoints, ConvState, Decode, Dtype, IndexType, Indices, Keep, Prefill, RecurrentState, Slots,
    reference::layer::State,
};

use crate::{
    batch::{Batch, Form, bound, every_isa},
    memory::{Memory, Numbers, relative},
    setup::{Options, Setup},
};

const HEADS: [usize; 4] = [2, 4, 24, 40];

fn near(got: &[f64], exact: &[f64], what: &str) {
    let error = relative(got, exact);
    assert!(error <= bound(exact, Dtype::F32), "{what} is off by {error:.2e}");
}

/// A slot of a state of four dims.
fn recurrent(memory: &Memory<4>, slot: usize) -> Vec<f64> {
    let [_, a, b, c] = memory.sizes;
    (0..a * b * c).map(|i| memory.get([slot, i / (b * c), i / c % b, i % c])).collect()
}

#[test]
fn padding_changes_nothing_and_its_rows_are_zeros() {
    for (pad_slot_id, paddings) in [(-1, [-1, -7]), (0, [0, -1]), (2, [2, -9])] {
        for (isa, cpu) in every_isa() {
            for is_prefill in [true, false] {
                let lens = if is_prefill { vec![18, 3, 5, 40] } else { vec![2; 4] };
                let form = Form { pad_slot_id, index_type: IndexType::I64, ..Form::default() };
                let mut before = Batch::new(&Options::new(HEADS), form, &lens);
                before.slots = vec![3, paddings[0], 1, paddings[1]];
                // NaN in rows of padding reaches nobody.
                for (r, start) in before.starts().into_iter().enumerate().take(4) {
                    let rows = if before.is_padding(r) { lens[r] } else { 0 };
                    for t in start..start + rows {
                        for f in 0..before.setup.mixed_qkvz.sizes[1] {
                            before.setup.mixed_qkvz.set([t, f], f64::NAN);
                        }
                        for f in 0..before.setup.mixed_ba.sizes[1] {
                            before.setup.mixed_ba.set([t, f], f64::NAN);
                        }
                    }
                }
                let mut after = before.clone();
                if is_prefill {
                    after.prefill(&cpu)
                } else {
                    after.decode(&cpu)
                }
                after.check(&before, &format!("{isa}, padding is {pad_slot_id}"));
            }
        }
    }
}

#[test]
fn sequences_without_an_initial_state_begin_with_zeros() {
    for (isa, cpu) in every_isa() {
        for more_columns in [0, 2, 5] {
            let form = Form { more_columns, ..Form::default() };
            let mut before = Batch::new(&Options::new(HEADS), form, &[18, 3, 0, 1, 40]);
            before.has_initial_state = Some(vec![0, 1, 0, 0, 1]);
            // What a slot holds that is not read may be anything.
            for r in [0, 2, 3] {
                let slot = before.slots[r] as usize;
                for place in before.conv.places().filter(|place| place[0] == slot) {
                    before.conv.set(place, f64::NAN);
                }
                for place in before.recurrent.places().filter(|place| place[0] == slot) {
                    before.recurrent.set(place, f64::NAN);
                }
            }
            let mut after = before.clone();
            after.prefill(&cpu);
            after.check(&before, &format!("{isa}, {more_columns} more columns"));
            // Columns further back than the last W - 1 hold earlier inputs, or zeros.
            let [slot, channels] = [before.slots[3] as usize, before.conv.sizes[1]];
            for c in 0..channels {
                for column in 0..(2 + more_columns) {
                    assert_eq!(after.conv.get([slot, c, column]), 0.0);
                }
                assert_eq!(after.conv.get([slot, c, 2 + more_columns]), before.setup.mixed_qkv.get([21, c]));
            }
        }
    }
}

#[test]
fn prefill_without_states() {
    for (_, cpu) in every_isa() {
        let mut batch = Batch::new(&Options::new(HEADS), Form::default(), &[21]);
        let (exact, _) = batch.setup.exact(0..21, &State::zeros(&batch.setup.numbers()));
        let mut call = Prefill {
            layer: batch.setup.layer,
            cu_seqlens: Indices::new(&[0i64, 21], [2]).unwrap(),
            projections: batch.setup.projections(),
            weights: batch.setup.weights(),
            conv_state: None,
            recurrent_state: None,
            slots: Slots::in_order(),
            has_initial_state: None,
            checkpoints: None,
            out: batch.out.view_mut(),
        };
        gdn::prefill(&mut call, &cpu).unwrap();
        near(&batch.out.all(), &exact, "out");
    }
}

#[test]
fn states_at_checkpoints() {
    for (isa, cpu) in every_isa() {
        for state_order in [[2, 3], [3, 2]] {
            let every = 2 * CHUNK;
            let form = Form { state_order, ..Form::default() };
            let mut before = Batch::new(&Options::new(HEADS), form, &[31, 280, 0, 256]);
            before.has_initial_state = Some(vec![1, 0, 1, 1]);
            let [_, hv, dv, dk] = before.recurrent.sizes;
            let channels = before.conv.sizes[1];
            let mut states = Memory::poisoned(
                Dtype::F32,
                [7, hv, dv, dk],
                [0, 1, state_order[0], state_order[1]],
                [0; 4],
                0,
            );
            let mut windows = Memory::dense(Dtype::F32, [7, channels, 4]);
            let (clean, clean_windows) = (states.clone(), windows.clone());
            let mut after = before.clone();
            // The first has none and may say anything.
            let checkpoints = Checkpoints {
                every,
                starts: Indices::new(&[-5i32, 2, 99, 5], [4]).unwrap(),
                recurrent_states: states.view_mut(),
                conv_states: Some(windows.view_mut()),
            };
            after.prefill_with(&cpu, Some(checkpoints)).unwrap();
            after.check(&before, &format!("{isa}"));
            let starts = before.starts();
            for (r, first) in [(1, 2), (3, 5)] {
                let state = before.state(before.slots[r] as usize);
                let (_, exact) = before.setup.exact(starts[r]..starts[r + 1], &state);
                for i in 0..before.lens[r] / every {
                    let exact = &exact[(i + 1) * every - 1];
                    near(&recurrent(&states, first + i), &exact.recurrent_state, "a checkpoint");
                    let window = (0..channels * 3).map(|k| windows.get([first + i, k / 3, 1 + k % 3]));
                    assert_eq!(window.collect::<Vec<_>>(), exact.conv_state, "{isa}");
                }
            }
            states.check_untouched(&clean, "checkpoints", |[i, ..]| (2..7).contains(&i));
            windows.check_untouched(&clean_windows, "windows", |[i, _, column]| {
                (2..7).contains(&i) && column > 0
            });
        }
    }
}

#[test]
fn states_kept_in_other_slots_or_tensors_or_not_at_all() {
    let tokens = 3;
    for (isa, cpu) in every_isa() {
        for (state_order, state_dtype) in [([2, 3], Dtype::F32), ([3, 2], Dtype::F32)] {
            let form = Form { state_order, state_dtype, ..Form::default() };
            let before = Batch::new(&Options::new(HEADS), form, &[tokens; 2]);
            let [_, hv, dv, dk] = before.recurrent.sizes;
            let channels = before.conv.sizes[1];
            let exact: Vec<_> = (0..2)
                .map(|r| {
                    before.setup.exact(r * tokens..(r + 1) * tokens, &before.state(before.slots[r] as usize))
                })
                .collect();
            let slots = Numbers::new(&before.slots, IndexType::I32);
            let run = |after: &mut Batch, conv: Keep<_, _, 4>, keep: Keep<_, _, 5>| {
                let mut call = Decode {
                    layer: after.setup.layer,
                    tokens_per_sequence: tokens,
                    projections: after.setup.projections(),
                    weights: after.setup.weights(),
                    conv_state: ConvState { state: after.conv.view_mut(), keep: conv },
                    recurrent_state: RecurrentState { state: after.recurrent.view_mut(), keep },
                    slots: Slots::of(slots.view([2, 1])),
                    num_accepted_tokens: None,
                    out: after.out.view_mut(),
                };
                gdn::decode(&mut call, &cpu).unwrap();
                for (r, (out, _)) in exact.iter().enumerate() {
                    near(&after.out_of(r * tokens..(r + 1) * tokens), out, "out");
                }
            };

            // Nowhere.
            let mut after = before.clone();
            run(&mut after, Keep::Nothing, Keep::Nothing);
            assert!(
                after.conv.bytes == before.conv.bytes && after.recurrent.bytes == before.recurrent.bytes,
                "{isa}"
            );

            // In slots of their own; one sequence in none.
            let mut after = before.clone();
            let to = [0i32, -1];
            let at = || Indices::new(&to, [2]).unwrap();
            run(&mut after, Keep::LastAt(at()), Keep::LastAt(at()));
            let last = exact[0].1.last().unwrap();
            near(&recurrent(&after.recurrent, 0), &last.recurrent_state, "a state in another slot");
            assert_eq!(after.state(0).conv_state, last.conv_state);
            after.recurrent.check_untouched(&before.recurrent, "recurrent_state", |[slot, ..]| slot == 0);
            after.conv.check_untouched(&before.conv, "conv_state", |[slot, ..]| slot == 0);

            // After every token, in another tensor.
            let mut after = before.clone();
            let sizes = [3, tokens + 1, hv, dv, dk];
            let order = [0, 1, 2, state_order[0] + 1, state_order[1] + 1];
            let mut states = Memory::poisoned(Dtype::F32, sizes, order, [0, 0, 3, 0, 0], 0);
            let mut windows = Memory::dense(Dtype::BF16, [3, tokens, channels, 3]);
            let (clean, clean_windows) = (states.clone(), windows.clone());
            let to = [2i64, 1];
            let indices = || Some(Indices::new(&to, [2]).unwrap());
            run(
                &mut after,
                Keep::EachIn { states: windows.view_mut(), indices: indices() },
                Keep::EachIn { states: states.view_mut(), indices: indices() },
            );
            for (r, (_, exact)) in exact.iter().enumerate() {
                for (t, exact) in exact.iter().enumerate() {
                    let slot = to[r] as usize;
                    let got: Vec<f64> = (0..hv * dv * dk)
                        .map(|i| states.get([slot, t, i / (dv * dk), i / dk % dv, i % dk]))
                        .collect();
                    near(&got, &exact.recurrent_state, "a state after a token");
                    let got: Vec<f64> =
                        (0..channels * 3).map(|i| windows.get([slot, t, i / 3, i % 3])).collect();
                    assert!(relative(&got, &exact.conv_state) <= bound(&exact.conv_state, Dtype::BF16));
                }
            }
            assert!(after.conv.bytes == before.conv.bytes && after.recurrent.bytes == before.recurrent.bytes);
            states.check_untouched(&clean, "states", |[slot, t, ..]| slot > 0 && t < tokens);
            windows.check_untouched(&clean_windows, "windows", |[slot, ..]| slot > 0);
        }
    }
}

/// Speculative decoding as vLLM has it: states after every token in the slots of a table, one rolling window,
/// and the next call goes on after the tokens that were accepted.
#[test]
fn what_was_not_accepted_is_forgotten() {
    let tokens = 4;
    for (isa, cpu) in every_isa() {
        for conv_order in [[1, 2], [2, 1]] {
            let options = Options::new(HEADS);
            let form = Form { more_columns: tokens - 1, conv_order, ..Form::default() };
            // Three calls of 4 tokens each, of which 1 to 4 are accepted.
            for accepted in 1..=tokens {
                let all = Batch::new(&options, form, &[3 * tokens]);
                let mut table = Batch::new(&options, form, &[tokens]);
                let own = table.setup;
                table.setup =
                    Setup { mixed_qkvz: own.mixed_qkvz, mixed_ba: own.mixed_ba, ..all.setup.clone() };
                let [_, channels, columns] = table.conv.sizes;
                let order = [0, conv_order[0], conv_order[1]];
                table.conv = Memory::poisoned(Dtype::F32, [6, channels, columns], order, [0; 3], 0)
                    .fill(|[slot, c, i]| (slot + 3 * i) as f64 * 0.1 - c as f64 * 0.01);
                let [_, a, b, c] = table.recurrent.sizes;
                table.recurrent =
                    Memory::dense(Dtype::F32, [6, a, b, c]).fill(|place| (place[3] as f64) * 0.01 - 0.1);
                let slots = [3i32, 5, 1, 2];
                // What the sequence is: its accepted tokens, one after the other.
                let mut state = table.state(3);
                // The first call reads the window at the last accepted token of a call that never was.
                let mut first_column = 0;
                for call in 0..3 {
                    let rows = call * tokens..(call + 1) * tokens;
                    if call == 0 {
                        state.conv_state =
                            (0..channels * 3).map(|i| table.conv.get([3, i / 3, i % 3])).collect();
                    }
                    let (exact, states) = all.setup.exact(rows.clone(), &state);
                    for [t, f] in table.setup.mixed_qkvz.places() {
                        table.setup.mixed_qkvz.set([t, f], all.setup.mixed_qkvz.get([rows.start + t, f]));
                    }
                    for [t, f] in table.setup.mixed_ba.places() {
                        table.setup.mixed_ba.set([t, f], all.setup.mixed_ba.get([rows.start + t, f]));
                    }
                    let number = [(first_column + 1) as i64];
                    let mut decode = Decode {
                        layer: table.setup.layer,
                        tokens_per_sequence: tokens,
                        projections: table.setup.projections(),
                        weights: table.setup.weights(),
                        conv_state: ConvState { state: table.conv.view_mut(), keep: Keep::Last },
                        recurrent_state: RecurrentState {
                            state: table.recurrent.view_mut(),
                            keep: Keep::Each,
                        },
                        slots: Slots::of(Indices::new(&slots, [1, 4]).unwrap()),
                        num_accepted_tokens: Some(Indices::new(&number, [1]).unwrap()),
                        out: table.out.view_mut(),
                    };
                    gdn::decode(&mut decode, &cpu).unwrap();
                    near(&table.out.all(), &exact, &format!("out of call {call}, {isa}"));
                    for (t, exact) in states.iter().enumerate() {
                        near(
                            &recurrent(&table.recurrent, slots[t] as usize),
                            &exact.recurrent_state,
                            "a state",
                        );
                    }
                    state = states[accepted - 1].clone();
                    first_column = accepted - 1;
                }
            }
        }
    }
}

#[test]
fn nothing_to_do() {
    for (_, cpu) in every_isa() {
        for lens in [&[][..], &[0], &[0, 0, 0]] {
            let before = Batch::new(&Options::new(HEADS), Form::default(), lens);
            let mut after = before.clone();
            after.prefill(&cpu);
            after.check(&before, "no tokens");
        }
        let before = Batch::new(&Options::new(HEADS), Form::default(), &[]);
        let mut after = before.clone();
        after.decode(&cpu);
        after.check(&before, "no sequences");
    }
}

#[test]
fn more_sequences_than_are_compared_without_a_list() {
    let lens = vec![1; 150];
    for (_, cpu) in every_isa() {
        let before = Batch::new(&Options::new([1, 1, 8, 8]), Form::default(), &lens);
        let mut after = before.clone();
        after.decode(&cpu);
        after.check(&before, "150 sequences");
    }
}
