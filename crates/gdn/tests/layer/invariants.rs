//! What must hold bit for bit, whatever the numbers are.

use gdn::{Cpu, Dtype};

use crate::{
    batch::{Batch, Form, every_isa},
    memory::Memory,
    setup::Options,
};

fn forms() -> impl Iterator<Item = (Options, Form)> {
    // Rows of 128 have code of their own.
    [
        (48, Dtype::F32, Dtype::F32, [2, 3]),
        (48, Dtype::BF16, Dtype::F32, [3, 2]),
        (48, Dtype::F16, Dtype::BF16, [2, 3]),
        (128, Dtype::F32, Dtype::F32, [2, 3]),
        (128, Dtype::F32, Dtype::BF16, [2, 3]),
        (128, Dtype::F32, Dtype::F16, [2, 3]),
    ]
    .into_iter()
    .map(|(dk, dtype, state_dtype, state_order)| {
        let options = Options { dtype, ba_dtype: dtype, ..Options::new([2, 4, dk, 40]) };
        let form = Form {
            out_dtype: dtype,
            state_dtype,
            conv_dtype: dtype,
            state_order,
            more_columns: 1,
            ..Form::default()
        };
        (options, form)
    })
}

/// Some tokens of the first sequence of a batch, alone, in slot 0, with the states that it has.
fn part(batch: &Batch, sequence: usize, tokens: std::ops::Range<usize>) -> Batch {
    let start = batch.starts()[sequence];
    let slot = batch.slots[sequence] as usize;
    let [_, hv, dv] = batch.out.sizes;
    let one = |sizes: [usize; 3]| Memory::dense(batch.conv.dtype, [1, sizes[1], sizes[2]]);
    let [_, a, b, c] = batch.recurrent.sizes;
    Batch {
        setup: batch.setup.rows(start + tokens.start..start + tokens.end),
        form: batch.form,
        lens: vec![tokens.len()],
        slots: vec![0],
        conv: one(batch.conv.sizes).fill(|[_, i, j]| batch.conv.get([slot, i, j])),
        recurrent: {
            let [i, j] = batch.form.state_order;
            Memory::poisoned(batch.recurrent.dtype, [1, a, b, c], [0, 1, i, j], [0; 4], 0)
                .fill(|[_, h, i, j]| batch.recurrent.get([slot, h, i, j]))
        },
        out: Memory::dense(batch.out.dtype, [tokens.len(), hv, dv]),
        has_initial_state: batch.has_initial_state.as_ref().map(|flags| vec![flags[sequence]]),
    }
}

/// Slot and outputs of one sequence.
fn results(batch: &Batch, sequence: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let slot = batch.slots[sequence] as usize;
    let starts = batch.starts();
    let [_, c, n] = batch.conv.sizes;
    let conv = (0..c * n).map(|i| batch.conv.get([slot, i / n, i % n])).collect();
    (batch.out_of(starts[sequence]..starts[sequence + 1]), conv, batch.state(slot).recurrent_state)
}

#[test]
fn a_sequence_does_not_depend_on_its_batch_its_slot_or_the_threads() {
    for (options, form) in forms() {
        for (isa, cpu) in every_isa() {
            for (lens, is_prefill) in [(&[20, 1, 0, 37, 18][..], true), (&[2; 5], false)] {
                let mut before = Batch::new(&options, form, lens);
                if is_prefill {
                    before.has_initial_state = Some(vec![0, 1, 1, 0, 1]);
                }
                let run = |batch: &mut Batch, cpu: &Cpu<'_>| {
                    if is_prefill { batch.prefill(cpu) } else { batch.decode(cpu) }
                };
                let mut together = before.clone();
                run(&mut together, &cpu);
                for (sequence, len) in lens.iter().enumerate() {
                    let mut alone = part(&before, sequence, 0..*len);
                    if alone.lens[0] == 0 && !is_prefill {
                        continue;
                    }
                    run(&mut alone, &cpu.threads(1));
                    assert_eq!(results(&together, sequence), results(&alone, 0), "{isa} {options:?}");
                }
                // With more threads than key heads these are cut into slices of rows.
                for threads in [3, 100] {
                    let mut again = before.clone();
                    run(&mut again, &cpu.threads(threads));
                    assert!(again.out.bytes == together.out.bytes && again.conv.bytes == together.conv.bytes);
                    assert!(again.recurrent.bytes == together.recurrent.bytes);
                }
            }
        }
    }
}

#[test]
fn several_tokens_are_as_many_calls() {
    for (options, form) in forms() {
        for (isa, cpu) in every_isa() {
            let tokens = 5;
            let before = Batch::new(&options, form, &[tokens]);
            let mut at_once = before.clone();
            at_once.decode(&cpu);
            let mut state = part(&before, 0, 0..1);
            let mut out = Vec::new();
            for t in 0..tokens {
                let mut one = part(&before, 0, t..t + 1);
                (one.conv, one.recurrent) = (state.conv.clone(), state.recurrent.clone());
                one.decode(&cpu);
                out.extend(one.out.all());
                state = one;
            }
            let (got, conv, recurrent) = results(&at_once, 0);
            let (_, one_conv, one_recurrent) = results(&state, 0);
            assert_eq!((got, conv, recurrent), (out, one_conv, one_recurrent), "{isa} {options:?} {form:?}");
        }
    }
}

#[test]
fn a_prefill_may_be_cut_at_multiples_of_the_chunk() {
    for (options, form) in forms().filter(|(_, form)| form.state_dtype == Dtype::F32) {
        // The inputs before a cut go through the state of the convolution, which has their dtype.
        for (isa, cpu) in every_isa() {
            let tokens = 2 * gdn::CHUNK + 27;
            let mut before = Batch::new(&options, form, &[tokens]);
            for (flag, cut) in
                [0, 1].into_iter().flat_map(|flag| [(flag, gdn::CHUNK), (flag, 2 * gdn::CHUNK)])
            {
                before.has_initial_state = Some(vec![flag]);
                let mut whole = before.clone();
                whole.prefill(&cpu);
                let mut first = part(&before, 0, 0..cut);
                first.prefill(&cpu);
                let mut second = part(&before, 0, cut..tokens);
                second.has_initial_state = None;
                (second.conv, second.recurrent) = (first.conv.clone(), first.recurrent.clone());
                second.prefill(&cpu);
                let mut out = first.out.all();
                out.extend(second.out.all());
                let (got, conv, recurrent) = results(&whole, 0);
                let (_, cut_conv, cut_recurrent) = results(&second, 0);
                assert_eq!(
                    (got, conv, recurrent),
                    (out, cut_conv, cut_recurrent),
                    "{isa} {options:?} {flag} {cut}"
                );
            }
        }
    }
}

#[test]
fn what_an_executor_does_is_the_same() {
    let (options, form) = forms().next().unwrap();
    let before = Batch::new(&options, form, &[20, 30]);
    let (mut rayon, mut own) = (before.clone(), before);
    rayon.prefill(&Cpu::new().threads(2));
    // Backwards, and each task twice.
    let executor = |tasks: usize, work: &(dyn Fn(usize) + Sync)| {
        (0..tasks).rev().for_each(work);
        (0..tasks).for_each(work);
    };
    own.prefill(&Cpu::new().threads(2).executor(&executor));
    assert!(rayon.out.bytes == own.out.bytes && rayon.recurrent.bytes == own.recurrent.bytes);
}
