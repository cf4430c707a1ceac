//! The cases, for any backend that runs a [`Call`].

use super::{
    Call,
    batch::{Batch, Form, Precision},
    memory::{Memory, Numbers, Random, relative},
    setup::{Inputs, Options},
};
use crate::{
    argument::ArgumentError,
    cpu::Cpu,
    cuda::{
        CudaError,
        prefill::{
            job::{Job, Profile, Stage},
            prefill_scratch_bytes, prefill_supports,
            scratch::memory,
        },
        segments::Cutting,
    },
    dtype::Dtype,
    heads::Heads,
    layer::{Gate, Layer},
    packing::{Layout, Packing},
    prefill::{Checkpoints, Plan},
    tensor::IndexType,
    view::{Address, DeviceAddress},
};

/// Runs a call as a device of this profile would.
pub(super) type Run<'a> = dyn FnMut(&mut Call<'_, '_>, Profile) + 'a;

/// Products are of f16.
pub(super) const PRECISION: Precision = Precision { error: 5e-4, change: 1.0 / 2048.0 };

/// All of shared memory, `wgmma`, as if there were more sequences than multiprocessors.
pub(super) const WHOLE: Profile = Profile {
    multiprocessors: 0,
    shared: 227 << 10,
    wgmma: true,
    window: None,
    threads: None,
    convolve_threads: None,
    cutting: Cutting::ByHeads,
};

/// As little shared memory as any device has, windows of two chunks, blocks of the scan with twice the rows where these fit,
/// threads of the convolution with as many tokens as they can have.
pub(super) const SMALL: Profile = Profile {
    multiprocessors: 132,
    shared: 99 << 10,
    wgmma: false,
    window: Some(2),
    threads: Some(256),
    convolve_threads: Some(32),
    cutting: Cutting::ByHeads,
};

/// Keys that devices with little shared memory do not take.
pub(super) const LONG: &[usize] = &[192, 256];

/// As [`SMALL`], with as little shared memory as any device has that takes these keys.
pub(super) fn small(layer: &Layer) -> Profile {
    Profile { shared: if layer.heads().head_k_dim() > 128 { 163 << 10 } else { SMALL.shared }, ..SMALL }
}

/// Bytes of scratch that a call takes.
pub(super) fn scratch_bytes<P: Address>(plan: &Plan<P>, profile: Profile) -> usize {
    let (layer, tokens, sequences) = (&plan.tokens.layer, plan.tokens.num_tokens, plan.slots.num_sequences);
    let (.., bytes) = memory(layer, 0, [tokens, sequences], profile.window, profile.cutting);
    bytes as usize
}

/// What a call leaves.
pub(super) fn results(batch: &Batch) -> [&[u8]; 3] {
    [&batch.out.bytes, &batch.conv.bytes, &batch.recurrent.bytes]
}

/// Holds prefill of some sequences to the oracle, and other windows and blocks to the same bits.
fn check(options: &Options, form: Form, lens: &[usize], run: &mut Run<'_>) {
    let before = Batch::new(options, form, lens);
    check_batch(&before, &format!("prefill of {lens:?}, {options:?}, {form:?}"), run);
}

fn check_batch(before: &Batch, what: &str, run: &mut Run<'_>) {
    let mut first = before.clone();
    first.prefill_by(None, |call| run(call, WHOLE));
    first.check_to(PRECISION, before, what);
    let layer = &before.setup.layer;
    let mut others = vec![small(layer)];
    if layer.heads().head_k_dim() > 128 {
        // There a block of half the rows has another number of chunks in shared memory.
        others.push(Profile { threads: Some(128), convolve_threads: Some(64), ..WHOLE });
    }
    for profile in others {
        let mut other = before.clone();
        other.prefill_by(None, |call| run(call, profile));
        assert!(results(&first) == results(&other), "{what}: other windows or blocks give other bits");
    }
}

/// Holds prefill of more tokens or sequences than the oracle has time for to that on a CPU, which is held to the
/// oracle by itself: all rows together, each of some, and the states of each sequence.
pub(super) fn beside_the_cpu(options: &Options, lens: &[usize], rows: usize, run: &mut Run<'_>) {
    let before = Batch::repeated(options, Form::default(), lens, rows);
    let what = format!("prefill of {} tokens of {} sequences", before.setup.num_tokens, lens.len());
    let (mut got, mut right) = (before.clone(), before);
    got.prefill_by(None, |call| run(call, WHOLE));
    right.prefill(&Cpu::new());
    let total = right.setup.num_tokens;
    // A row in 61, which are never those of one place in a chunk, and the last ones.
    let some = (0..total).filter(|row| row % 61 == 0 || row + 200 > total);
    let [mut ours, mut theirs] = [Vec::new(), Vec::new()];
    for row in some {
        let [a, b] = [&got, &right].map(|batch| batch.out_of(row..row + 1));
        let error = relative(&a, &b);
        assert!(error < 20.0 * PRECISION.error, "{what}: row {row} of out is off by {error:.2e}");
        ours.extend(a);
        theirs.extend(b);
    }
    let error = relative(&ours, &theirs);
    assert!(error < PRECISION.error, "{what}: out is off by {error:.2e}");
    for (number, slot) in right.slots.iter().enumerate() {
        let [a, b] = [&got, &right].map(|batch| batch.state(*slot as usize));
        assert!(a.conv_state == b.conv_state, "{what}: conv_state of sequence {number} is another");
        let error = relative(&a.recurrent_state, &b.recurrent_state);
        assert!(
            error < 2.0 * PRECISION.error,
            "{what}: recurrent_state of sequence {number} is off by {error:.2e}"
        );
    }
}

/// So many sequences of a few tokens each, one of them a chunk and more.
pub(super) fn tiny(sequences: usize) -> Vec<usize> {
    (0..sequences).map(|r| [1, 0, 3, 2, 64, 1, 65, 5][r % 8]).collect()
}

/// Shapes, dtypes and orders.
pub(super) fn oracle(run: &mut Run<'_>) {
    for heads in [
        [1, 2, 128, 128],
        [2, 2, 64, 64],
        [1, 3, 64, 96],
        [1, 1, 128, 96],
        [1, 1, 96, 192],
        [1, 1, 96, 128],
        [1, 1, 64, 256],
    ] {
        check(&Options::new(heads), Form::default(), &[70], run);
    }
    for (dtype, state_dtype, state_order) in [
        (Dtype::BF16, Dtype::F32, [3, 2]),
        (Dtype::F16, Dtype::BF16, [2, 3]),
        (Dtype::BF16, Dtype::F16, [3, 2]),
    ] {
        let options = Options { dtype, ba_dtype: dtype, weight_dtype: dtype, ..Options::new([1, 2, 64, 64]) };
        let form = Form { out_dtype: dtype, state_dtype, conv_dtype: dtype, state_order, ..Form::default() };
        check(&options, form, &[66, 3], run);
    }
    for (dtype, heads) in [(Dtype::BF16, [1, 1, 96, 192]), (Dtype::F16, [1, 2, 128, 96])] {
        let weight_dtype = Dtype::F32;
        check(&Options { dtype, weight_dtype, ..Options::new(heads) }, Form::default(), &[67], run);
    }
    let lens = [0, 1, 63, 64, 65, 0, 127, 128, 129, 2];
    check(&Options::new([1, 1, 64, 64]), Form::default(), &lens, run);
}

/// Keys of which registers do not hold all columns of the states' rows: every length of values, dtype and
/// order.
pub(super) fn long_keys(run: &mut Run<'_>) {
    for (heads, dtype, state_dtype, state_order) in [
        ([1, 2, 192, 64], Dtype::F32, Dtype::F32, [2, 3]),
        ([1, 1, 192, 96], Dtype::F16, Dtype::F32, [3, 2]),
        ([1, 1, 192, 256], Dtype::BF16, Dtype::BF16, [2, 3]),
        ([2, 2, 256, 64], Dtype::F32, Dtype::F16, [3, 2]),
        ([1, 1, 256, 128], Dtype::F16, Dtype::F32, [2, 3]),
        ([1, 1, 256, 192], Dtype::BF16, Dtype::F32, [3, 2]),
    ] {
        let options = Options { dtype, ba_dtype: dtype, weight_dtype: dtype, ..Options::new(heads) };
        let form = Form { out_dtype: dtype, state_dtype, state_order, ..Form::default() };
        check(&options, form, &[67], run);
    }
    for heads in [[1, 1, 192, 192], [1, 1, 256, 256]] {
        check(&Options::new(heads), Form::default(), &[0, 1, 130], run);
    }
}

/// With such keys what breaks implementations.
pub(super) fn hostile_long_keys(run: &mut Run<'_>) {
    for dk in [192, 256] {
        // Where no key changes a state, 70 tokens' decays may leave nothing of it that an f32 can be.
        let leaves_numbers = |seed: &u64| {
            let options = Options { inputs: Inputs::ZeroKeys, seed: *seed, ..Options::new([1, 2, dk, 64]) };
            let batch = Batch::new(&options, Form::default(), &[70]);
            let (_, states) = batch.setup.exact(0..70, &batch.state(batch.slots[0] as usize));
            let last = &states[69].recurrent_state;
            last.chunks(last.len() / 2).all(|head| head.iter().any(|x| x.abs() > 1e-30))
        };
        let seed = (1..50).find(leaves_numbers).unwrap();
        for (i, inputs) in Inputs::ALL.into_iter().enumerate() {
            let beta_scale = if (i + dk / 64).is_multiple_of(2) { 1.0 } else { 2.0 };
            let options = Options { inputs, beta_scale, seed, ..Options::new([1, 2, dk, 64]) };
            check(&options, Form::default(), &[70], run);
        }
    }
}

/// What breaks implementations.
pub(super) fn hostile(run: &mut Run<'_>) {
    for inputs in Inputs::ALL {
        for beta_scale in [1.0, 2.0] {
            let options = Options { inputs, beta_scale, ..Options::new([1, 2, 64, 64]) };
            check(&options, Form::default(), &[70], run);
        }
    }
}

/// Large states that fade within a chunk to less than what values make: slowly, in some twenty tokens, and in a
/// few. What decays leave of a token may be less than an f16 is normally, and be all there is of the result.
pub(super) fn fading_states(run: &mut Run<'_>) {
    for (dk, beta_scale) in [(64, 1.0), (128, 2.0)] {
        let options =
            Options { inputs: Inputs::LargeState, beta_scale, conv_width: 1, ..Options::new([1, 3, dk, 64]) };
        let mut before = Batch::new(&options, Form::default(), &[70]);
        for (head, log) in [-1.5, -0.3, 0.7].into_iter().enumerate() {
            before.setup.a_log.set([head], log);
        }
        check_batch(&before, &format!("fading states, {options:?}"), run);
    }
}

/// Layers at random, with keys of these lengths too.
pub(super) fn any_layer(count: u64, long: &[usize], run: &mut Run<'_>) {
    for seed in 0..count {
        let mut random = Random(seed * 7919 + 5);
        let mut below = |n: u64| (random.bits() % n) as usize;
        let (hk, ratio) = (below(2) + 1, below(3) + 1);
        let dims = [64, 64, 96, 128];
        let dks = [&dims, long].concat();
        let options = Options {
            heads: [hk, hk * ratio, dks[below(dks.len() as u64)], dims[below(4)]],
            packing: if below(2) == 0 { Packing::Interleaved } else { Packing::Contiguous },
            packed: below(2) == 0,
            dtype: Dtype::ALL[below(3)],
            ba_dtype: Dtype::ALL[below(3)],
            weight_dtype: Dtype::ALL[below(3)],
            conv_width: below(4) + 1,
            conv_bias: below(2) == 0,
            gate: if below(2) == 0 { Gate::Sigmoid } else { Gate::Silu },
            beta_scale: 1.0,
            inputs: Inputs::ALL[below(10)],
            gap: below(9),
            // Elements stay at multiples of their size.
            misalignment: 0,
            seed,
        };
        let form = Form {
            conv_dtype: Dtype::ALL[below(3)],
            state_dtype: Dtype::ALL[below(3)],
            state_order: if below(2) == 0 { [2, 3] } else { [3, 2] },
            conv_order: if below(2) == 0 { [1, 2] } else { [2, 1] },
            more_columns: below(3),
            out_dtype: Dtype::ALL[below(3)],
            gap: below(20),
            index_type: if below(2) == 0 { IndexType::I64 } else { IndexType::I32 },
            pad_slot_id: if below(2) == 0 { 0 } else { -1 },
        };
        let lens: Vec<usize> = (0..below(4)).map(|_| below(150)).collect();
        check(&options, form, &lens, run);
    }
}

/// Padding, flags, neighbours, cuts, checkpoints, wrong indices, refusals; with keys of these lengths too.
pub(super) fn contracts(long: &[usize], run: &mut Run<'_>) {
    padding(run);
    initial_states([1, 2, 64, 64], run);
    alone_and_in_parts([1, 2, 64, 64], run);
    checkpoints([1, 2, 64, 96], run);
    for dk in long {
        initial_states([1, 1, *dk, 64], run);
        alone_and_in_parts([1, 1, *dk, 64], run);
        checkpoints([1, 1, *dk, 96], run);
    }
    refusals();
}

/// Padding, and slots that the CPU would refuse, are skipped: zeros, and nothing touched. NaN there reaches
/// nobody.
fn padding(run: &mut Run<'_>) {
    for wrong in [-1, -7, 6, 1 << 30] {
        let mut before = Batch::new(&Options::new([1, 2, 64, 64]), Form::default(), &[3, 65, 2, 9]);
        before.slots = vec![3, wrong, 1, wrong];
        for t in (3..68).chain(70..79) {
            for f in 0..before.setup.mixed_qkvz.sizes[1] {
                before.setup.mixed_qkvz.set([t, f], f64::NAN);
            }
        }
        let mut after = before.clone();
        after.prefill_by(None, |call| run(call, WHOLE));
        // For the check these are padding.
        after.slots = vec![3, -1, 1, -1];
        after.check_to(PRECISION, &before, &format!("slot {wrong}"));
    }
}

/// Sequences that begin with zeros, whatever their slots hold.
fn initial_states(heads: [usize; 4], run: &mut Run<'_>) {
    let mut before = Batch::new(&Options::new(heads), Form::default(), &[0, 67, 0, 2, 130]);
    before.has_initial_state = Some(vec![0, 0, 1, 0, 1]);
    check_batch(&before, "flags", run);
}

/// A sequence alone, in its batch, and cut at multiples of the chunk.
fn alone_and_in_parts(heads: [usize; 4], run: &mut Run<'_>) {
    let form = Form { more_columns: 1, ..Form::default() };
    let options = Options { dtype: Dtype::BF16, ..Options::new(heads) };
    let before = Batch::new(&options, form, &[5, 200, 64]);
    let small = small(&before.setup.layer);
    let mut whole = before.clone();
    whole.prefill_by(None, |call| run(call, WHOLE));
    let mut parts = before.clone();
    let mut start = 5;
    let mut outputs = Vec::new();
    for len in [64, 128, 8] {
        let mut part = before.clone();
        part.setup = before.setup.rows(start..start + len);
        (part.lens, part.slots) = (vec![len], vec![before.slots[1]]);
        (part.conv, part.recurrent) = (parts.conv.clone(), parts.recurrent.clone());
        part.out = Memory::dense(Dtype::F32, [len, heads[1], heads[3]]);
        part.prefill_by(None, |call| run(call, small));
        (parts.conv, parts.recurrent) = (part.conv.clone(), part.recurrent.clone());
        outputs.extend(part.out.all());
        start += len;
    }
    let slot = before.slots[1] as usize;
    assert_eq!(whole.out_of(5..205), outputs, "cut, outputs have other bits");
    let (whole, parts) = (whole.state(slot), parts.state(slot));
    assert!(
        whole.conv_state == parts.conv_state && whole.recurrent_state == parts.recurrent_state,
        "cut, states have other bits"
    );
}

/// States inside the sequences are those of sequences that end there.
fn checkpoints(heads: [usize; 4], run: &mut Run<'_>) {
    for (state_dtype, is_small) in [(Dtype::F32, false), (Dtype::BF16, true)] {
        let form = Form { state_dtype, ..Form::default() };
        let options = Options::new(heads);
        let lens = [130, 64, 63, 256];
        let before = Batch::new(&options, form, &lens);
        let profile = if is_small { small(&before.setup.layer) } else { WHOLE };
        let mut after = before.clone();
        let [_, hv, dv, dk] = before.recurrent.sizes;
        let channels = before.conv.sizes[1];
        let mut states = Memory::dense(state_dtype, [8, hv, dv, dk]);
        let mut windows = Memory::dense(Dtype::F32, [8, channels, 4]);
        let (untouched_states, untouched_windows) = (states.clone(), windows.clone());
        // Two for the first, one for the second, none, four for the last, for which there is no room for all.
        let starts = Numbers::new(&[1, 0, 7, 4], IndexType::I64);
        let kept = Checkpoints {
            every: 64,
            starts: starts.view([4]),
            recurrent_states: states.view_mut(),
            conv_states: Some(windows.view_mut()),
        };
        after.prefill_by(Some(kept), |call| run(call, profile));
        after.check_to(PRECISION, &before, "with checkpoints");
        let mut made = [false; 8];
        for (sequence, start) in [(0, 1), (1, 0), (3, 4)] {
            for i in 0..lens[sequence] / 64 {
                let mut short = before.clone();
                let first = before.starts()[sequence];
                short.setup = before.setup.rows(first..first + 64 * (i + 1));
                (short.lens, short.slots) = (vec![64 * (i + 1)], vec![before.slots[sequence]]);
                short.out = Memory::dense(Dtype::F32, [64 * (i + 1), hv, dv]);
                short.prefill_by(None, |call| run(call, WHOLE));
                let state = short.state(before.slots[sequence] as usize);
                let place = start + i;
                made[place] = true;
                let got: Vec<f64> = (0..hv * dv * dk)
                    .map(|i| states.get([place, i / (dv * dk), i / dk % dv, i % dk]))
                    .collect();
                assert_eq!(got, state.recurrent_state, "checkpoint {i} of sequence {sequence}");
                let got: Vec<f64> =
                    (0..channels * 3).map(|i| windows.get([place, i / 3, 1 + i % 3])).collect();
                assert_eq!(got, state.conv_state, "window {i} of sequence {sequence}");
            }
        }
        states.check_untouched(&untouched_states, "checkpoints", |[place, ..]| made[place]);
        windows
            .check_untouched(&untouched_windows, "windows", |[place, _, column]| made[place] && column > 0);
    }
}

/// What the kernels do not take is refused by name, with both numbers.
fn refusals() {
    let layer = |heads: [usize; 4]| {
        let [hk, hv, dk, dv] = heads;
        Layer::new(Layout::new(Heads::new(hk, hv, dk, dv).unwrap(), Packing::Interleaved))
    };
    let refused = |layer: &Layer| match prefill_supports(layer) {
        Err(ArgumentError::Value { argument, got, .. }) => (argument, got),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&layer([1, 1, 80, 64])), ("head_k_dim", "80".to_owned()));
    assert_eq!(refused(&layer([1, 1, 320, 64])), ("head_k_dim", "320".to_owned()));
    assert_eq!(refused(&layer([1, 1, 64, 48])), ("head_v_dim", "48".to_owned()));
    assert_eq!(refused(&Layer { conv_width: 5, ..layer([1, 1, 64, 64]) }), ("conv_width", "5".to_owned()));
    assert_eq!(
        refused(&Layer { beta_scale: 2.5, ..layer([1, 1, 64, 64]) }),
        ("beta_scale", "2.5".to_owned())
    );
    for dk in [64, 96, 128, 192, 256] {
        for dv in [64, 96, 128, 192, 256] {
            prefill_supports(&layer([16, 32, dk, dv])).unwrap();
        }
    }
    too_little_shared_memory();
    let mut batch = Batch::new(&Options::new([1, 1, 64, 64]), Form::default(), &[3]);
    batch.prefill_by(None, |call| {
        let plan = super::moved(&Plan::new(call).unwrap(), |at| DeviceAddress(at.addr() as u64));
        let bytes = scratch_bytes(&plan, WHOLE);
        let few = Job::new(&plan, (DeviceAddress(256), bytes - 1), WHOLE).unwrap_err();
        let CudaError::Argument(ArgumentError::Length { argument, got, expected, .. }) = few else {
            panic!("{few}")
        };
        assert_eq!((argument, got, expected), ("scratch", bytes - 1, bytes));
        let odd = Job::new(&plan, (DeviceAddress(264), bytes), WHOLE).unwrap_err();
        assert!(
            matches!(odd, CudaError::Argument(ArgumentError::Value { argument: "scratch", .. })),
            "{odd}"
        );
    });
    // Scratch is bounded, whatever the tokens.
    for tokens in [1000, 10_000, 100_000, 10_000_000] {
        for heads in [[1, 1, 64, 64], [4, 8, 128, 128], [8, 16, 128, 128]] {
            let layer = layer(heads);
            let most = prefill_scratch_bytes(&layer, tokens, 2);
            assert!(most < 1032 << 20, "{most}");
            for cutting in [Cutting::Never, Cutting::ByHeads] {
                let (.., bytes) = memory(&layer, 0, [tokens, 2], None, cutting);
                assert!(bytes as usize <= most, "{heads:?}, {tokens}, {cutting:?}: {bytes}, {most}");
            }
        }
    }
    let most = prefill_scratch_bytes(&layer([16, 32, 128, 128]), 10_000_000, 1);
    assert!(most < 1028 << 20, "{most}");
    assert_eq!(most, prefill_scratch_bytes(&layer([16, 32, 128, 128]), 20_000_000, 1000));
}

/// The launches of one sequence of so many tokens, with as much scratch memory as they like; nothing is launched.
fn with_job(options: &Options, tokens: usize, profile: Profile, see: impl Fn(Job)) {
    Batch::new(options, Form::default(), &[tokens]).prefill_by(None, |call| {
        let plan = super::moved(&Plan::new(call).unwrap(), |at| DeviceAddress(at.addr() as u64));
        see(Job::new(&plan, (DeviceAddress(256), usize::MAX), profile).unwrap().unwrap());
    });
}

/// Which kernel scans, and with how many threads: four warps together wherever they can, few blocks or many.
pub(super) fn scans() {
    let hopper = Profile { multiprocessors: 132, ..WHOLE };
    let ampere = Profile { shared: 163 << 10, wgmma: false, multiprocessors: 108, ..WHOLE };
    for (heads, profile, kernel, threads) in [
        ([1, 1, 128, 64], hopper, "gdn_prefill_scan_group_128", 256),
        ([4, 8, 128, 128], hopper, "gdn_prefill_scan_group_128", 256),
        ([16, 32, 128, 128], hopper, "gdn_prefill_scan_group_128", 256),
        ([4, 8, 64, 64], hopper, "gdn_prefill_scan_group_64", 256),
        // 64 rows are no part of 96.
        ([16, 32, 96, 96], hopper, "gdn_prefill_scan_96", 128),
        ([4, 8, 192, 192], hopper, "gdn_prefill_scan_192", 256),
        ([4, 8, 256, 256], hopper, "gdn_prefill_scan_256", 128),
        ([16, 64, 256, 256], hopper, "gdn_prefill_scan_256", 256),
        ([4, 8, 128, 128], ampere, "gdn_prefill_scan_128", 128),
        ([16, 32, 128, 128], ampere, "gdn_prefill_scan_128", 256),
        ([4, 8, 192, 192], ampere, "gdn_prefill_scan_192", 128),
    ] {
        with_job(&Options::new(heads), 3, profile, |job| {
            let (_, step) = job.steps().find(|(_, step)| step.kernel.contains("_scan_")).unwrap();
            assert_eq!((step.kernel, step.threads), (kernel, threads), "{heads:?}");
        });
    }
}

/// How many threads have a chunk's tokens: as few as leave no multiprocessor idle for long. Where a thread has 32, inputs land
/// in shared memory.
pub(super) fn convolutions() {
    let profile = Profile { multiprocessors: 9, ..WHOLE };
    let (bf16, f32) = (Dtype::BF16, Dtype::F32);
    for (dtype, tokens, threads) in
        [(bf16, 64, 128), (bf16, 576, 128), (bf16, 640, 64), (bf16, 2048, 32), (f32, 2048, 64)]
    {
        let options = Options { dtype, ..Options::new([1, 2, 128, 128]) };
        with_job(&options, tokens, profile, |job| {
            let (_, step) = job.steps().next().unwrap();
            assert_eq!(step.threads, threads, "{dtype:?}, {tokens}");
            assert_eq!(step.kernel.ends_with("_ahead"), threads == 32, "{dtype:?}, {tokens}");
            assert_eq!(step.shared, if threads == 32 { 32 * 128 } else { 0 }, "{dtype:?}, {tokens}");
        });
    }
}

/// Beside other windows' kernels blocks of a scan by four warps together come in pairs, where they are even in
/// number. A preparation may begin before the convolution is done, and the second window's convolution before
/// the first's preparation, where scans have most of the device; later ones not: they write what a norm reads.
/// In one window all may, but for a norm of many blocks.
pub(super) fn windows() {
    let hopper = Profile { multiprocessors: 132, ..WHOLE };
    let prepare = Stage::Prepare;
    for (heads, tokens, window, cluster, expected) in [
        ([16, 48, 128, 128], 130, Some(1), 2, vec![prepare, Stage::Convolve, prepare, prepare]),
        ([16, 32, 128, 128], 130, Some(1), 2, vec![prepare; 3]),
        ([1, 1, 128, 64], 130, Some(1), 1, vec![prepare; 3]),
        ([16, 48, 128, 128], 130, None, 1, vec![prepare, Stage::Scan(0), Stage::Norm(0)]),
        ([1, 48, 64, 64], 640, None, 1, vec![prepare, Stage::Scan(0), Stage::Norm(0)]),
        ([1, 48, 64, 64], 704, None, 1, vec![prepare, Stage::Scan(0)]),
    ] {
        let profile = Profile { window, ..hopper };
        with_job(&Options::new(heads), tokens, profile, |job| {
            for (stage, step) in job.steps() {
                let is_scan = matches!(stage, Stage::Scan(_));
                assert_eq!(step.cluster, if is_scan { cluster } else { 1 }, "{heads:?}, {tokens}");
                assert!(step.shared <= profile.shared, "{stage:?}");
            }
            let early = job.launches().filter(|(.., early)| *early).map(|(stage, ..)| stage);
            assert_eq!(early.collect::<Vec<_>>(), expected, "{heads:?}, {tokens}, {window:?}");
        });
    }
}

/// Keys whose chunks a device has no room for are refused by it, with both numbers, and others are not.
fn too_little_shared_memory() {
    for (dk, takes) in [(128, None), (192, Some(108_672)), (256, Some(137_344))] {
        let mut batch = Batch::new(&Options::new([1, 1, dk, 64]), Form::default(), &[3]);
        batch.prefill_by(None, |call| {
            let plan = super::moved(&Plan::new(call).unwrap(), |at| DeviceAddress(at.addr() as u64));
            let job = |profile| Job::new(&plan, (DeviceAddress(256), usize::MAX), profile);
            job(small(&plan.tokens.layer)).unwrap();
            match (job(SMALL), takes) {
                (Ok(_), None) => (),
                (Err(CudaError::Argument(error)), Some(takes)) => {
                    let ArgumentError::Value { argument: "layout", expected, .. } = &error else {
                        panic!("{error}")
                    };
                    for number in [SMALL.shared, takes] {
                        assert!(expected.contains(&number.to_string()), "{error}");
                    }
                }
                (got, _) => panic!("{got:?}"),
            }
        });
    }
    // Sequences with such keys are not cut into segments, whatever is asked for.
    let layer = |dk| Layer::new(Layout::new(Heads::new(1, 1, dk, 64).unwrap(), Packing::Interleaved));
    assert!(Cutting::ByHeads.segments(&layer(128), 1000).is_some());
    assert!(Cutting::ByHeads.segments(&layer(192), 1000).is_none());
}
