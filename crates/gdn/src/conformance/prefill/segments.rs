//! Long sequences that are cut into segments: short ones here, cut into short segments.

use super::{
    batch::{Batch, Form},
    cases::{PRECISION, Run, SMALL, WHOLE, results},
    memory::{Memory, Numbers, relative},
    setup::{Inputs, Options},
};
use crate::{
    cuda::{
        prefill::job::Profile,
        segments::{Cut, Cutting},
    },
    dtype::Dtype,
    prefill::Checkpoints,
    tensor::IndexType,
};

/// Sequences of 3 chunks and more, in segments of one and two.
const CUT: Cutting = Cutting::As(Cut { from: 3, most: 3, shortest: 1, longest: 2 });

/// Sequences of 4 chunks and more, in segments of up to 6: more than a block has room for, so that chunks come to where
/// others were, and the states that a sequence begins with.
const LONG_CUT: Cutting = Cutting::As(Cut { from: 4, most: 2, shortest: 1, longest: 6 });

/// The same in up to six segments of two: more than `combine` has room for.
const MANY_CUT: Cutting = Cutting::As(Cut { from: 4, most: 8, shortest: 1, longest: 2 });

/// Blocks and windows whose bits are held to those of one window.
const OTHERS: [(Profile, Option<usize>); 3] = [(SMALL, Some(2)), (SMALL, Some(1)), (WHOLE, Some(3))];

/// The cases.
pub(super) fn segments(run: &mut Run<'_>) {
    for heads in [[1, 2, 64, 64], [1, 1, 128, 96], [1, 1, 96, 192], [1, 1, 64, 256]] {
        let options = Options { dtype: Dtype::BF16, ..Options::new(heads) };
        check(&Batch::new(&options, Form::default(), &[200]), &format!("{heads:?}"), CUT, &OTHERS[..2], run);
    }
    let batch =
        Batch::new(&Options { dtype: Dtype::BF16, ..Options::new([1, 1, 64, 128]) }, Form::default(), &[700]);
    check(&batch, "long segments", LONG_CUT, &[(WHOLE, Some(4)), (SMALL, Some(5))], run);
    check(&batch, "many segments", MANY_CUT, &[(WHOLE, Some(5)), (SMALL, Some(6))], run);
    hostile(run);
    for (state_dtype, state_order) in [(Dtype::BF16, [2, 3]), (Dtype::F16, [3, 2])] {
        let form = Form { state_dtype, state_order, ..Form::default() };
        let batch = Batch::new(&Options::new([1, 1, 64, 64]), form, &[200]);
        check(&batch, &format!("states of {state_dtype}, {state_order:?}"), CUT, &OTHERS[..1], run);
    }
    batches(run);
    checkpoints(run);
}

/// What breaks implementations, with decays as they come and with such that much is left of what the sequence
/// begins with. Where a cut sequence is off by more than the bound, which it is only where the keys are equal or
/// nearly so and beta is up to 2, it is by no more than twice what it is off in one piece.
fn hostile(run: &mut Run<'_>) {
    for inputs in Inputs::ALL {
        for (beta_scale, a_log) in [(1.0, None), (1.0, Some(-4.0)), (2.0, Some(-4.0))] {
            let options = Options { inputs, beta_scale, ..Options::new([1, 1, 64, 64]) };
            let mut before = Batch::new(&options, Form::default(), &[150]);
            if let Some(a_log) = a_log {
                before.setup.a_log.set([0], a_log);
            }
            let slot = before.slots[0] as usize;
            let (out, states) = before.setup.exact(0..150, &before.state(slot));
            let state = &states[149].recurrent_state;
            let mut errors = |profile, window, cutting| {
                let mut after = before.clone();
                after.prefill_by(None, |call| run(call, of(profile, window, cutting)));
                let got = [after.out_of(0..150), after.state(slot).recurrent_state];
                assert!(got.iter().flatten().all(|x| x.is_finite()), "{inputs:?}");
                let errors = [relative(&got[0], &out), relative(&got[1], state)];
                (errors, after)
            };
            let ([out_whole, state_whole], _) = errors(WHOLE, None, Cutting::Never);
            let ([out_cut, state_cut], first) = errors(WHOLE, None, CUT);
            let what = format!(
                "{inputs:?}, {beta_scale}, {a_log:?}: outputs {out_cut:.1e} off, {out_whole:.1e} in one piece, \
                 states {state_cut:.1e}, {state_whole:.1e}"
            );
            println!("{what}");
            // Decays to less than the smallest f32.
            let is_nothing = state.iter().all(|x| x.abs() < 1e-30);
            assert!(out_cut <= PRECISION.error.max(2.0 * out_whole), "{what}");
            assert!(is_nothing || state_cut <= PRECISION.error.max(2.0 * state_whole), "{what}");
            let (_, other) = errors(OTHERS[0].0, OTHERS[0].1, CUT);
            assert!(results(&first) == results(&other), "{what}: windows give other bits");
        }
    }
}

fn of(profile: Profile, window: Option<usize>, cutting: Cutting) -> Profile {
    Profile { window, cutting, ..profile }
}

/// Holds a batch to the oracle, and other windows and blocks to the same bits. What it leaves.
fn check(
    before: &Batch,
    what: &str,
    cutting: Cutting,
    others: &[(Profile, Option<usize>)],
    run: &mut Run<'_>,
) -> Batch {
    let mut first = before.clone();
    first.prefill_by(None, |call| run(call, of(WHOLE, None, cutting)));
    first.check_to(PRECISION, before, what);
    for (profile, window) in others {
        let mut other = before.clone();
        other.prefill_by(None, |call| run(call, of(*profile, *window, cutting)));
        assert!(results(&first) == results(&other), "{what}: windows of {window:?} give other bits");
    }
    first
}

/// Long and short sequences, those without states, without tokens and without a slot side by side. Each has the
/// bits that it has alone, and the short ones those that they have where none is cut.
fn batches(run: &mut Run<'_>) {
    let options = Options { dtype: Dtype::BF16, ..Options::new([1, 2, 64, 64]) };
    let lens = [330, 65, 0, 192, 130, 0, 192, 300, 1];
    let mut before = Batch::new(&options, Form::default(), &lens);
    before.has_initial_state = Some(vec![1, 0, 1, 0, 1, 1, 0, 1, 1]);
    before.slots[6] = -1;
    let whole = check(&before, "a batch", CUT, &OTHERS, run);
    for (i, (start, len)) in before.starts().into_iter().zip(lens).enumerate().filter(|(i, _)| *i != 6) {
        for cutting in [CUT, Cutting::Never] {
            if len > 128 && matches!(cutting, Cutting::Never) {
                continue;
            }
            let mut alone = before.clone();
            alone.setup = before.setup.rows(start..start + len);
            (alone.lens, alone.slots) = (vec![len], vec![before.slots[i]]);
            alone.has_initial_state = before.has_initial_state.as_ref().map(|flags| vec![flags[i]]);
            alone.out = Memory::dense(alone.out.dtype, [len, 2, 64]);
            alone.prefill_by(None, |call| run(call, of(WHOLE, None, cutting)));
            assert!(whole.out_of(start..start + len) == alone.out_of(0..len), "sequence {i}: other outputs");
            let (a, b) = (whole.state(before.slots[i] as usize), alone.state(before.slots[i] as usize));
            assert!(a.recurrent_state == b.recurrent_state, "sequence {i}: other states");
            assert!(a.conv_state == b.conv_state, "sequence {i}: other windows");
        }
    }
}

/// States inside of a sequence that is cut are those of the oracle, and the last of them is the last state.
fn checkpoints(run: &mut Run<'_>) {
    let before = Batch::new(&Options::new([1, 2, 64, 64]), Form::default(), &[320]);
    let mut kept = Vec::new();
    for (profile, window) in [(WHOLE, None), (SMALL, Some(1)), (SMALL, Some(2))] {
        let mut after = before.clone();
        let mut states = Memory::dense(Dtype::F32, [5, 2, 64, 64]);
        let starts = Numbers::new(&[0], IndexType::I64);
        let checkpoints = Checkpoints {
            every: 64,
            starts: starts.view([1]),
            recurrent_states: states.view_mut(),
            conv_states: None,
        };
        after.prefill_by(Some(checkpoints), |call| run(call, of(profile, window, CUT)));
        after.check_to(PRECISION, &before, "with checkpoints");
        let last: Vec<f64> =
            (0..2 * 64 * 64).map(|i| states.get([4, i / 4096, i / 64 % 64, i % 64])).collect();
        assert_eq!(last, after.state(before.slots[0] as usize).recurrent_state);
        let (_, exact) = before.setup.exact(0..320, &before.state(before.slots[0] as usize));
        for i in 0..5 {
            let exact = &exact[64 * i + 63].recurrent_state;
            let got: Vec<f64> = (0..8192).map(|j| states.get([i, j / 4096, j / 64 % 64, j % 64])).collect();
            let error = relative(&got, exact);
            assert!(error <= PRECISION.bound(exact, Dtype::F32), "checkpoint {i}: {error:e}");
        }
        kept.push(states.all());
    }
    for (w, states) in kept.iter().enumerate() {
        let other = states.iter().zip(&kept[0]).position(|(a, b)| a != b);
        assert!(
            other.is_none(),
            "windows {w} give another checkpoint {:?}",
            other.map(|i| [i / 8192, i % 8192])
        );
    }
}
