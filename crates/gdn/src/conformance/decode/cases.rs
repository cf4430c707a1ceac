//! The cases, for any backend that runs a [`Call`].

use gdn_kernels::modules::Target;

use super::{
    Call,
    batch::{Batch, Form, bound},
    memory::{Memory, Numbers, Random, relative},
    setup::{Inputs, Options},
};
use crate::{
    cpu::{Cpu, decode},
    cuda::share::Profile,
    decode::Decode,
    dtype::Dtype,
    layer::Gate,
    packing::Packing,
    state::{ConvState, Keep, RecurrentState, Slots},
    tensor::IndexType,
};

/// Runs a call as a device of this profile would.
pub(super) type Run<'a> = dyn FnMut(&mut Call<'_, '_>, Profile) + 'a;

/// Of a device that is full whatever there is to do.
const FULL: Profile = Profile { multiprocessors: 0, most_cluster: 8, target: Target::Sm90, ..Profile::LEAST };

/// With so many blocks a cluster and pieces a warp, as far as there are; v heads all at once or one after the
/// other.
pub(super) fn profile(cluster: u32, steps: u32, one_by_one: bool) -> Profile {
    Profile {
        multiprocessors: 132,
        most_cluster: 8,
        target: Target::Sm90,
        most_shared: 227 << 10,
        cluster: Some(cluster),
        steps: Some(steps),
        one_by_one,
        large_pieces: None,
        few: None,
    }
}

/// By the kernel for few blocks, in clusters of so many, where it can be.
fn few(cluster: u32) -> Profile {
    Profile { few: Some(true), steps: None, ..profile(cluster, 1, false) }
}

/// The same of warps with four pieces each, of which there are others with fewer.
fn few_of_four(cluster: u32) -> Profile {
    Profile { steps: Some(4), ..few(cluster) }
}

/// Whether heads are such as that kernel takes, as it is in plain calls of one token.
fn are_few(heads: [usize; 4]) -> bool {
    heads[2..] == [128, 128]
}

/// Of a device that has little to do, and chooses for itself.
fn free() -> Profile {
    Profile { cluster: None, steps: None, ..profile(1, 1, false) }
}

/// What a call leaves.
fn results(batch: &Batch) -> [&[u8]; 3] {
    [&batch.out.bytes, &batch.conv.bytes, &batch.recurrent.bytes]
}

/// Holds decode of `tokens` tokens to the oracle, and clusters of other sizes and v heads one by one to the
/// same bits.
fn check(options: &Options, form: Form, sequences: usize, tokens: usize, run: &mut Run<'_>) {
    let before = Batch::new(options, form, &vec![tokens; sequences]);
    let what = format!("decode of {tokens}, {options:?}, {form:?}");
    let mut first = before.clone();
    first.decode_by(|call| run(call, profile(1, 8, false)));
    first.check(&before, &what);
    let others = [(1, 2, true), (4, 1, false), (8, 4, true)];
    let others = others.map(|(cluster, steps, one_by_one)| profile(cluster, steps, one_by_one));
    let of_few = are_few(options.heads).then(|| (2..=8).map(few).chain((2..=4).map(few_of_four)));
    for profile in others.into_iter().chain(of_few.into_iter().flatten()) {
        let mut other = before.clone();
        other.decode_by(|call| run(call, profile));
        assert!(results(&first) == results(&other), "{what}: {profile:?} gives other bits");
    }
}

/// Shapes, dtypes, orders and hostile inputs.
pub(super) fn oracle(run: &mut Run<'_>) {
    for heads in [
        [1, 1, 128, 128],
        [2, 6, 64, 64],
        [1, 1, 256, 128],
        [1, 2, 96, 192],
        [2, 2, 80, 48],
        [1, 7, 16, 16],
        [1, 2, 1, 1],
        [2, 4, 7, 5],
        [1, 2, 33, 17],
        [1, 1, 3, 130],
    ] {
        for state_order in [[2, 3], [3, 2]] {
            check(&Options::new(heads), Form { state_order, ..Form::default() }, 2, 1, run);
        }
    }
    for dtype in Dtype::ALL {
        for state_dtype in Dtype::ALL {
            let options =
                Options { dtype, ba_dtype: dtype, weight_dtype: dtype, ..Options::new([1, 2, 64, 32]) };
            for state_order in [[2, 3], [3, 2]] {
                let form =
                    Form { out_dtype: dtype, state_dtype, conv_dtype: dtype, state_order, ..Form::default() };
                check(&options, form, 1, 1, run);
            }
        }
    }
    for state_dtype in [Dtype::F16, Dtype::BF16] {
        for dk in [128, 256] {
            check(&Options::new([1, 1, dk, 24]), Form { state_dtype, ..Form::default() }, 1, 1, run);
        }
    }
    // Plain calls.
    let bf16 = Dtype::BF16;
    for state_dtype in [Dtype::F32, Dtype::BF16] {
        let form = Form { out_dtype: bf16, conv_dtype: bf16, state_dtype, ..Form::default() };
        let plain = |heads| Options { dtype: bf16, weight_dtype: bf16, ..Options::new(heads) };
        for heads in [[1, 2, 64, 32], [1, 4, 96, 48], [1, 6, 128, 32], [1, 1, 256, 64]] {
            check(&plain(heads), form, 2, 1, run);
        }
        for packing in [Packing::Interleaved, Packing::Contiguous] {
            check(&Options { packing, ..plain([2, 4, 64, 64]) }, form, 1, 1, run);
        }
        // Those that the kernel for few blocks takes.
        for heads in [[1, 1, 128, 128], [2, 4, 128, 128], [1, 3, 128, 128], [1, 4, 128, 128]] {
            check(&plain(heads), form, 2, 1, run);
        }
        for inputs in Inputs::ALL {
            check(&Options { inputs, gate: Gate::Sigmoid, ..plain([1, 2, 128, 128]) }, form, 1, 1, run);
        }
        for inputs in Inputs::ALL {
            let tokens = if state_dtype == Dtype::F32 { 3 } else { 1 };
            check(&Options { inputs, ..plain([1, 2, 64, 32]) }, form, 1, tokens, run);
        }
    }
    for inputs in Inputs::ALL {
        let options = Options { inputs, ..Options::new([1, 2, 32, 32]) };
        check(&options, Form::default(), 1, 3, run);
    }
    check(&Options::new([1, 2, 32, 16]), Form::default(), 1, 16, run);
    for lens in [0, 1, 70] {
        check(&Options::new([1, 1, 8, 8]), Form::default(), lens, 1, run);
    }
}

/// Layers at random.
pub(super) fn any_layer(count: u64, run: &mut Run<'_>) {
    for seed in 0..count {
        let mut random = Random(seed * 7919 + 3);
        let mut below = |n: u64| (random.bits() % n) as usize;
        let (hk, ratio) = (below(3) + 1, below(4) + 1);
        let options = Options {
            heads: [hk, hk * ratio, below(39) + 1, below(39) + 1],
            packing: if below(2) == 0 { Packing::Interleaved } else { Packing::Contiguous },
            packed: below(2) == 0,
            dtype: Dtype::ALL[below(3)],
            ba_dtype: Dtype::ALL[below(3)],
            weight_dtype: Dtype::ALL[below(3)],
            conv_width: below(6) + 1,
            conv_bias: below(2) == 0,
            gate: if below(2) == 0 { Gate::Sigmoid } else { Gate::Silu },
            beta_scale: 1.0,
            inputs: Inputs::ALL[below(10)],
            gap: below(9),
            // Elements stay at multiples of their size: two 2-byte steps for f32.
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
        // A state of 16 bits is rounded after every token.
        let most = if form.state_dtype == Dtype::F32 { 3 } else { 1 };
        check(&options, form, below(4), below(most) + 1, run);
    }
}

/// A call with states that are kept in some way, and what it leaves.
#[derive(Clone)]
pub(super) struct Kept {
    pub(super) batch: Batch,
    states: Memory<5>,
    pub(super) windows: Memory<4>,
    is_plain: bool,
    tokens: usize,
}

pub(super) const TOKENS: usize = 3;

impl Kept {
    pub(super) fn new(state_order: [usize; 2], state_dtype: Dtype, more_columns: usize) -> Self {
        let form = Form { state_order, state_dtype, more_columns, ..Form::default() };
        Self::of(&Options::new([2, 4, 24, 40]), form, false, TOKENS)
    }

    /// Of a plain call, as long as no numbers of accepted tokens are given.
    pub(super) fn plain(state_dtype: Dtype, tokens: usize) -> Self {
        let bf16 = Dtype::BF16;
        let form = Form { out_dtype: bf16, conv_dtype: bf16, state_dtype, ..Form::default() };
        let options = Options { dtype: bf16, weight_dtype: bf16, ..Options::new([2, 4, 64, 32]) };
        Self::of(&options, form, true, tokens)
    }

    /// The same of heads that the kernel for few blocks takes.
    fn few(state_dtype: Dtype) -> Self {
        let bf16 = Dtype::BF16;
        let form = Form { out_dtype: bf16, conv_dtype: bf16, state_dtype, ..Form::default() };
        let options = Options { dtype: bf16, weight_dtype: bf16, ..Options::new([1, 2, 128, 128]) };
        Self::of(&options, form, true, 1)
    }

    fn of(options: &Options, form: Form, is_plain: bool, tokens: usize) -> Self {
        let Form { state_order, state_dtype, conv_dtype, .. } = form;
        let mut batch = Batch::new(options, form, &[tokens; 2]);
        let [_, hv, dv, dk] = batch.recurrent.sizes;
        let channels = batch.conv.sizes[1];
        // Slots for a table of one for each token.
        let mut random = Random(99);
        let order = [0, 1, state_order[0], state_order[1]];
        batch.recurrent =
            Memory::poisoned(state_dtype, [9, hv, dv, dk], order, [0; 4], 0).fill(|_| random.normal() * 0.3);
        let columns = batch.conv.sizes[2];
        batch.conv = Memory::dense(conv_dtype, [9, channels, columns]).fill(|_| random.normal());
        let order = [0, 1, 2, state_order[0] + 1, state_order[1] + 1];
        let states = Memory::poisoned(state_dtype, [3, tokens + 1, hv, dv, dk], order, [0, 0, 3, 0, 0], 0);
        let windows = Memory::dense(Dtype::BF16, [3, tokens, channels, 3]);
        Self { batch, states, windows, is_plain, tokens }
    }

    /// The `way`th way to keep states.
    pub(super) fn run(&mut self, way: usize, run: impl FnOnce(&mut Call<'_, '_>)) {
        let table = [3i64, 5, 1, 6, 2, 8];
        let (one, accepted) = ([7i64, -1], [2i64, 3]);
        let to = Numbers::new(&one, IndexType::I32);
        let other = Numbers::new(&[2, 1], if self.is_plain { IndexType::I32 } else { IndexType::I64 });
        let slots = Numbers::new(&table[..2 * self.tokens], IndexType::I32);
        let accepted = Numbers::new(&accepted, IndexType::I32);
        let (mut conv_keep, mut keep, mut number) = (Keep::Last, Keep::Last, None);
        match way {
            0 => {}
            1 => (conv_keep, keep) = (Keep::Nothing, Keep::Nothing),
            2 => (conv_keep, keep) = (Keep::LastAt(to.view([2])), Keep::LastAt(to.view([2]))),
            3 => keep = Keep::Each,
            4 => {
                conv_keep = Keep::EachIn { states: self.windows.view_mut(), indices: Some(other.view([2])) };
                keep = Keep::EachIn { states: self.states.view_mut(), indices: Some(other.view([2])) };
            }
            5 => {
                conv_keep = Keep::EachIn { states: self.windows.view_mut(), indices: None };
                keep = Keep::EachIn { states: self.states.view_mut(), indices: None };
            }
            _ => (keep, number) = (Keep::Each, Some(accepted.view([2]))),
        }
        let batch = &mut self.batch;
        run(&mut Decode {
            layer: batch.setup.layer,
            tokens_per_sequence: self.tokens,
            projections: batch.setup.projections(),
            weights: batch.setup.weights(),
            conv_state: ConvState { state: batch.conv.view_mut(), keep: conv_keep },
            recurrent_state: RecurrentState { state: batch.recurrent.view_mut(), keep },
            slots: Slots::of(slots.view([2, self.tokens])),
            num_accepted_tokens: number,
            out: batch.out.view_mut(),
        });
    }
}

/// Every way to keep states, held to the CPU: each number near, each byte that the CPU leaves alone
/// untouched.
pub(super) fn contracts(run: &mut Run<'_>) {
    fn same<const D: usize>(what: &str, got: &Memory<D>, cpu: &Memory<D>, before: &Memory<D>) {
        let changed = |place: [usize; D]| cpu.get(place).to_bits() != before.get(place).to_bits();
        got.check_untouched(before, what, changed);
        let dtype = got.dtype;
        let (got, cpu) = (got.all(), cpu.all());
        let error = relative(&got, &cpu);
        assert!(error <= bound(&cpu, dtype), "{what} is off the CPU's by {error:.2e}");
    }
    let mut check = |what: &str, before: Kept, way: usize, others: &[Profile]| {
        let (mut cpu, mut first) = (before.clone(), before.clone());
        cpu.run(way, |call| decode(call, &Cpu::new().threads(1)).unwrap());
        first.run(way, |call| run(call, profile(1, 8, false)));
        let names = ["out", "conv_state", "recurrent_state", "states", "windows"];
        let [out, conv, recurrent, states, windows] = names.map(|name| format!("{what}: {name}"));
        same(&out, &first.batch.out, &cpu.batch.out, &before.batch.out);
        same(&conv, &first.batch.conv, &cpu.batch.conv, &before.batch.conv);
        same(&recurrent, &first.batch.recurrent, &cpu.batch.recurrent, &before.batch.recurrent);
        same(&states, &first.states, &cpu.states, &before.states);
        same(&windows, &first.windows, &cpu.windows, &before.windows);
        for profile in others {
            let mut other = before.clone();
            other.run(way, |call| run(call, *profile));
            assert!(
                results(&first.batch) == results(&other.batch)
                    && first.states.bytes == other.states.bytes
                    && first.windows.bytes == other.windows.bytes,
                "{what}: {profile:?} gives other bits"
            );
        }
    };
    let others = [(4, 2), (8, 1), (2, 1)].map(|(cluster, steps)| profile(cluster, steps, true));
    for (state_order, state_dtype) in [([2, 3], Dtype::F32), ([3, 2], Dtype::F32)] {
        for way in 0..=6 {
            let more_columns = if way == 6 { [TOKENS - 1, TOKENS + 1] } else { [0, 2] };
            for more_columns in more_columns {
                let before = Kept::new(state_order, state_dtype, more_columns);
                let what = format!("way {way}, {state_order:?}, {more_columns} more columns");
                check(&what, before, way, &others);
            }
        }
    }
    for state_dtype in [Dtype::F32, Dtype::BF16] {
        for way in 0..=5 {
            for tokens in [1, TOKENS] {
                let what = format!("way {way}, plain, {state_dtype}, {tokens} tokens");
                check(&what, Kept::plain(state_dtype, tokens), way, &others);
            }
            let what = format!("way {way}, few, {state_dtype}");
            check(&what, Kept::few(state_dtype), way, &[few(2), few_of_four(2), few(4), few(8)]);
        }
        // Heads need not lie side by side for that kernel. Rows must: else another one does it.
        for gaps in [[0, 8, 0, 0], [0, 0, 8, 0]] {
            let mut apart = Kept::few(state_dtype);
            let (sizes, mut random) = (apart.batch.recurrent.sizes, Random(7));
            apart.batch.recurrent =
                Memory::poisoned(state_dtype, sizes, [0, 1, 2, 3], gaps, 0).fill(|_| random.normal() * 0.3);
            let what = format!("few, {state_dtype}, gaps {gaps:?}");
            check(&what, apart, 0, &[few(2), few_of_four(2), few(4), few(8)]);
        }
    }
}

/// T tokens are T times one, whatever the dtype of the state, the blocks and the pieces.
pub(super) fn tokens_at_once(run: &mut Run<'_>) {
    for state_dtype in Dtype::ALL {
        for state_order in [[2, 3], [3, 2]] {
            let form = Form { state_dtype, state_order, ..Form::default() };
            at_once(&Options::new([1, 2, 24, 16]), form, run);
        }
    }
    let bf16 = Dtype::BF16;
    let mut plain = |state_dtype, heads| {
        let form = Form { out_dtype: bf16, conv_dtype: bf16, state_dtype, ..Form::default() };
        at_once(&Options { dtype: bf16, weight_dtype: bf16, ..Options::new(heads) }, form, run);
    };
    for dk in [64, 96, 128, 256] {
        plain(Dtype::F32, [1, 2, dk, 32]);
        plain(bf16, [1, 2, dk, 32]);
    }
    // A v head to itself, and more warps than half a multiprocessor's.
    for heads in [[1, 1, 128, 128], [1, 3, 128, 128]] {
        plain(Dtype::F32, heads);
        plain(bf16, heads);
    }
}

fn at_once(options: &Options, form: Form, run: &mut Run<'_>) {
    // Devices that a key head or its v heads fill more or less: where heads are large there are shares for that.
    let multiprocessors: &[u32] = if options.heads[3] > 100 { &[1, 2, 4] } else { &[] };
    let of_few = || multiprocessors.iter().map(|&multiprocessors| Profile { multiprocessors, ..free() });
    let all = Batch::new(options, form, &[5]);
    let mut one = Batch::new(options, form, &[1]);
    let given = one.setup.clone();
    one.setup = all.setup.clone();
    (one.setup.mixed_qkvz, one.setup.mixed_ba) = (given.mixed_qkvz, given.mixed_ba);
    one.setup.num_tokens = 1;
    (one.conv, one.recurrent) = (all.conv.clone(), all.recurrent.clone());
    one.slots = all.slots.clone();
    let mut outputs = Vec::new();
    for t in 0..5 {
        for [_, f] in one.setup.mixed_qkvz.places() {
            one.setup.mixed_qkvz.set([0, f], all.setup.mixed_qkvz.get([t, f]));
        }
        for [_, f] in one.setup.mixed_ba.places() {
            one.setup.mixed_ba.set([0, f], all.setup.mixed_ba.get([t, f]));
        }
        let before = one.clone();
        one.decode_by(|call| run(call, profile(2, 1, false)));
        for profile in [FULL, free()].into_iter().chain(of_few()) {
            let mut again = before.clone();
            again.decode_by(|call| run(call, profile));
            assert!(results(&again) == results(&one), "{options:?}, {form:?}, token {t}, {profile:?}");
        }
        outputs.extend(one.out.all());
    }
    let chosen =
        [(1, 8, false), (1, 2, true), (1, 16, true), (4, 1, false)].map(|(cluster, steps, large)| Profile {
            large_pieces: Some(large),
            ..profile(cluster, steps, false)
        });
    for profile in chosen.into_iter().chain([FULL, free()]).chain(of_few()) {
        let mut all = all.clone();
        all.decode_by(|call| run(call, profile));
        assert_eq!(all.out.all(), outputs, "{options:?}, {form:?}, {profile:?}");
        assert!(all.conv.all() == one.conv.all() && all.recurrent.all() == one.recurrent.all());
    }
}

/// So many sequences at once: each is held to the CPU, and some to the bits of a call with them alone.
pub(super) fn many_sequences(count: usize, run: &mut Run<'_>) {
    let bf16 = Dtype::BF16;
    let plain = Options { dtype: bf16, weight_dtype: bf16, ..Options::new([1, 8, 64, 8]) };
    let of_plain = Form { conv_dtype: bf16, state_dtype: bf16, out_dtype: bf16, ..Form::default() };
    for (options, form) in [(Options::new([2, 2, 8, 8]), Form::default()), (plain, of_plain)] {
        // Of many a layer's inputs are a few tokens' again and again.
        let mut before = Batch::repeated(&options, form, &vec![1; count], 50);
        // Sequences of the large layer share their states, which they leave as they are.
        let keeps = form.state_dtype == Dtype::F32;
        if !keeps {
            let few = Batch::new(&options, form, &[1; 5]);
            (before.conv, before.recurrent) = (few.conv, few.recurrent);
            before.slots = (0..count).map(|r| (r % 7) as i64).collect();
        }
        before.slots[count / 2] = -1;
        let decode = |batch: &mut Batch, run: &mut dyn FnMut(&mut Call<'_, '_>)| {
            batch.decode_by(|call| {
                if !keeps {
                    (call.conv_state.keep, call.recurrent_state.keep) = (Keep::Nothing, Keep::Nothing);
                }
                run(call);
            });
        };
        let (mut cpu, mut got) = (before.clone(), before.clone());
        decode(&mut cpu, &mut |call| crate::cpu::decode(call, &Cpu::new()).unwrap());
        decode(&mut got, &mut |call| {
            run(call, Profile { cluster: None, steps: None, ..profile(1, 1, false) })
        });
        for r in 0..count {
            let (got, cpu) = (got.out_of(r..r + 1), cpu.out_of(r..r + 1));
            let error = relative(&got, &cpu);
            let most = if keeps { 2e-5 } else { 1e-2 };
            assert!(error <= most, "sequence {r} of {count} is off the CPU's by {error:.2e}");
        }
        if keeps {
            for (name, got, cpu) in [
                ("conv_state", got.conv.all(), cpu.conv.all()),
                ("recurrent_state", got.recurrent.all(), cpu.recurrent.all()),
            ] {
                let error = relative(&got, &cpu);
                assert!(error <= 2e-6, "{name} of {count} sequences is off the CPU's by {error:.2e}");
            }
        }
        // The inputs of sequence r are those of r % 50, and where states are shared, so are those of r + 350.
        for r in [0, 1, count - 1] {
            let mut one = Batch::repeated(&options, form, &vec![1; r % 50 + 1], 50);
            one.conv.clone_from(&before.conv);
            one.recurrent.clone_from(&before.recurrent);
            one.slots = vec![-1; r % 50 + 1];
            one.slots[r % 50] = before.slots[r];
            decode(&mut one, &mut |call| run(call, profile(2, 1, false)));
            assert_eq!(got.out_of(r..r + 1), one.out_of(r % 50..r % 50 + 1), "sequence {r} of {count}");
        }
    }
}

/// Padding, and indices that the CPU would refuse, are skipped: zeros, and nothing touched. NaN there reaches
/// nobody.
pub(super) fn slots_that_are_not_there(run: &mut Run<'_>) {
    let plain = Options { dtype: Dtype::BF16, weight_dtype: Dtype::BF16, ..Options::new([2, 4, 64, 32]) };
    let plain_form = Form { out_dtype: Dtype::BF16, conv_dtype: Dtype::BF16, ..Form::default() };
    let of_few = Options { dtype: Dtype::BF16, weight_dtype: Dtype::BF16, ..Options::new([1, 2, 128, 128]) };
    let layers = [
        (Options::new([2, 4, 24, 40]), Form::default(), 2, profile(2, 1, false)),
        (plain, plain_form, 2, profile(2, 1, false)),
        (of_few, plain_form, 1, few(4)),
    ];
    for (options, form, tokens, profile) in layers {
        // A pad_slot_id that no i32 has is nobody's slot.
        for pad_slot_id in [-1, 0, 1 << 32] {
            for wrong in [-1, -7, pad_slot_id, 6, 1 << 30] {
                if i32::try_from(wrong).is_err() {
                    continue;
                }
                let mut before = Batch::new(&options, Form { pad_slot_id, ..form }, &[tokens; 4]);
                before.slots = vec![3, wrong, 1, wrong];
                for t in (0..4 * tokens).filter(|t| t / tokens % 2 == 1) {
                    for f in 0..before.setup.mixed_qkvz.sizes[1] {
                        before.setup.mixed_qkvz.set([t, f], f64::NAN);
                    }
                }
                let mut after = before.clone();
                after.decode_by(|call| run(call, profile));
                // For the check these are padding.
                after.slots = vec![3, -1, 1, -1];
                after.check(&before, &format!("slot {wrong}, padding {pad_slot_id}"));
            }
        }
    }
}
