//! Sequences with states in slots, run through either op and held to the oracle.

use gdn::{
    ArgumentError, Checkpoints, ConvState, Cpu, Decode, Dtype, Exclusive, IndexType, Keep, Prefill,
    RecurrentState, Shared, Slots, cpu::Isa, reference::layer::State,
};

use super::{
    memory::{Memory, Numbers, Random, relative, rounded},
    setup::{Inputs, Options, Setup},
};

/// How the states lie in memory.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    pub conv_dtype: Dtype,
    pub state_dtype: Dtype,
    /// The order of DV and DK in memory, outermost first: `[2, 3]` for DK dense.
    pub state_order: [usize; 2],
    /// The order of channels and columns.
    pub conv_order: [usize; 2],
    /// Columns beyond W - 1.
    pub more_columns: usize,
    pub out_dtype: Dtype,
    /// Elements between slots, heads and rows of states and outputs.
    pub gap: usize,
    pub index_type: IndexType,
    pub pad_slot_id: i64,
}

impl Default for Form {
    fn default() -> Self {
        Self {
            conv_dtype: Dtype::F32,
            state_dtype: Dtype::F32,
            state_order: [2, 3],
            conv_order: [1, 2],
            more_columns: 0,
            out_dtype: Dtype::F32,
            gap: 0,
            index_type: IndexType::I32,
            pad_slot_id: -1,
        }
    }
}

/// Some sequences.
#[derive(Clone)]
pub struct Batch {
    pub setup: Setup,
    pub form: Form,
    pub lens: Vec<usize>,
    /// The slot of each sequence.
    pub slots: Vec<i64>,
    pub conv: Memory<3>,
    pub recurrent: Memory<4>,
    pub out: Memory<3>,
    pub has_initial_state: Option<Vec<i64>>,
}

/// Every instruction set, with more threads than small calls have key heads: those are cut into slices of
/// rows.
pub fn every_isa() -> impl Iterator<Item = (Isa, Cpu<'static>)> {
    Isa::available().map(|isa| (isa, Cpu::new().isa(isa).unwrap().threads(7)))
}

impl Batch {
    /// Sequences of these lengths, in slots that are not in order, with one slot more than there are
    /// sequences.
    pub fn new(options: &Options, form: Form, lens: &[usize]) -> Self {
        let setup = Setup::new(options, lens.iter().sum());
        let heads = setup.layer.heads();
        let mut random = Random(options.seed ^ 0x5107);
        let num_slots = lens.len() + 2;
        let slots = (0..lens.len()).map(|r| ((r + 1) % (lens.len() + 1) + 1) as i64).collect();
        let columns = setup.layer.conv_width - 1 + form.more_columns;
        let [c, d] = form.conv_order;
        let conv_sizes = [num_slots, setup.layer.conv_channels(), columns];
        let conv = Memory::poisoned(form.conv_dtype, conv_sizes, [0, c, d], [form.gap, 0, 0], 0);
        let [i, j] = form.state_order;
        let sizes = [num_slots, heads.num_v_heads(), heads.head_v_dim(), heads.head_k_dim()];
        let mut gaps = [form.gap, form.gap, 0, 0];
        gaps[i] = form.gap;
        let recurrent = Memory::poisoned(form.state_dtype, sizes, [0, 1, i, j], gaps, 0);
        let size = if options.inputs == Inputs::LargeState { 1e4 } else { 0.3 };
        let out_sizes = [setup.num_tokens, heads.num_v_heads(), heads.head_v_dim()];
        Self {
            form,
            lens: lens.to_vec(),
            slots,
            conv: conv.fill(|_| random.normal()),
            recurrent: recurrent.fill(|_| random.normal() * size),
            out: Memory::poisoned(form.out_dtype, out_sizes, [0, 1, 2], [form.gap, 0, 0], 0),
            has_initial_state: None,
            setup,
        }
    }

    /// The same of a large layer, where numbers at random would take long: those of the first `rows` tokens
    /// again and again.
    #[allow(dead_code, reason = "for measurements on GPUs")]
    pub fn repeated(options: &Options, form: Form, lens: &[usize], rows: usize) -> Self {
        let total = lens.iter().sum();
        let few = Setup::new(options, rows);
        let mut batch = Self::new(options, form, &vec![0; lens.len()]);
        let tile = |memory: &Memory<2>| memory.repeated(total);
        batch.setup = Setup {
            num_tokens: total,
            mixed_qkvz: tile(&few.mixed_qkvz),
            mixed_ba: tile(&few.mixed_ba),
            ..few
        };
        let heads = batch.setup.layer.heads();
        batch.out = Memory::dense(form.out_dtype, [total, heads.num_v_heads(), heads.head_v_dim()]);
        batch.lens = lens.to_vec();
        batch
    }

    pub fn starts(&self) -> Vec<usize> {
        let mut start = 0;
        let ends = self.lens.iter().map(|len| {
            start += len;
            start
        });
        std::iter::once(0).chain(ends).collect()
    }

    pub fn is_padding(&self, sequence: usize) -> bool {
        self.slots[sequence] < 0 || self.slots[sequence] == self.form.pad_slot_id
    }

    pub fn prefill(&mut self, cpu: &Cpu<'_>) {
        self.prefill_with(cpu, None).unwrap();
    }

    pub fn prefill_with(
        &mut self,
        cpu: &Cpu<'_>,
        checkpoints: Option<Checkpoints<Shared<'_>, Exclusive<'_>>>,
    ) -> Result<(), ArgumentError> {
        self.prefill_by(checkpoints, |call| gdn::prefill(call, cpu))
    }

    /// The same by any backend.
    pub fn prefill_by<R>(
        &mut self,
        checkpoints: Option<Checkpoints<Shared<'_>, Exclusive<'_>>>,
        run: impl FnOnce(&mut Prefill<Shared<'_>, Exclusive<'_>>) -> R,
    ) -> R {
        let index_type = self.form.index_type;
        let cu_seqlens: Vec<i64> = self.starts().into_iter().map(|start| start as i64).collect();
        let (cu_seqlens, slots) =
            (Numbers::new(&cu_seqlens, index_type), Numbers::new(&self.slots, index_type));
        let flags = self.has_initial_state.as_ref().map(|flags| Numbers::new(flags, index_type));
        let n = self.lens.len();
        // A call may not lengthen what it borrows.
        let mut call = Prefill {
            layer: self.setup.layer,
            cu_seqlens: cu_seqlens.view([n + 1]),
            projections: self.setup.projections(),
            weights: self.setup.weights(),
            conv_state: Some(self.conv.view_mut()),
            recurrent_state: Some(self.recurrent.view_mut()),
            slots: Slots { state_indices: Some(slots.view([n, 1])), pad_slot_id: self.form.pad_slot_id },
            has_initial_state: flags.as_ref().map(|flags| flags.view([n])),
            checkpoints,
            out: self.out.view_mut(),
        };
        run(&mut call)
    }

    /// All sequences must have one length.
    pub fn decode(&mut self, cpu: &Cpu<'_>) {
        self.decode_by(|call| gdn::decode(call, cpu).unwrap());
    }

    /// The same by any backend.
    pub fn decode_by(&mut self, run: impl FnOnce(&mut Decode<Shared<'_>, Exclusive<'_>>)) {
        let slots = Numbers::new(&self.slots, self.form.index_type);
        let n = self.lens.len();
        let mut call = Decode {
            layer: self.setup.layer,
            tokens_per_sequence: self.lens.first().copied().unwrap_or(1),
            projections: self.setup.projections(),
            weights: self.setup.weights(),
            conv_state: ConvState { state: self.conv.view_mut(), keep: Keep::Last },
            recurrent_state: RecurrentState { state: self.recurrent.view_mut(), keep: Keep::Last },
            slots: Slots { state_indices: Some(slots.view([n, 1])), pad_slot_id: self.form.pad_slot_id },
            num_accepted_tokens: None,
            out: self.out.view_mut(),
        };
        run(&mut call);
    }

    /// A slot as the oracle has it.
    pub fn state(&self, slot: usize) -> State {
        let [_, channels, columns] = self.conv.sizes;
        let window = self.setup.layer.conv_width - 1;
        let [_, hv, dv, dk] = self.recurrent.sizes;
        let conv_state = (0..channels * window)
            .map(|i| self.conv.get([slot, i / window.max(1), columns - window + i % window.max(1)]))
            .collect();
        let recurrent_state = (0..hv * dv * dk)
            .map(|i| self.recurrent.get([slot, i / (dv * dk), i / dk % dv, i % dk]))
            .collect();
        State { conv_state, recurrent_state }
    }

    pub fn out_of(&self, rows: std::ops::Range<usize>) -> Vec<f64> {
        let [_, hv, dv] = self.out.sizes;
        rows.flat_map(|t| (0..hv * dv).map(move |i| self.out.get([t, i / dv, i % dv]))).collect()
    }

    /// Holds what a call made of `before` to the oracle, and sees that it touched nothing else.
    pub fn check(&self, before: &Self, what: &str) {
        self.check_to(Precision::F32, before, what);
    }

    /// The same of a backend that computes with another precision.
    pub fn check_to(&self, precision: Precision, before: &Self, what: &str) {
        let starts = self.starts();
        for (r, slot) in self.slots.iter().enumerate() {
            let rows = starts[r]..starts[r + 1];
            let out = self.out_of(rows.clone());
            if self.is_padding(r) {
                assert!(out.iter().all(|x| *x == 0.0), "{what}: rows of padding are not zeros");
                continue;
            }
            let slot = *slot as usize;
            let mut state = before.state(slot);
            if before.has_initial_state.as_ref().is_some_and(|flags| flags[r] == 0) {
                state = State::zeros(&self.setup.numbers());
            }
            let (exact, states) = self.setup.exact(rows.clone(), &state);
            let last = states.last().unwrap_or(&state);
            let got = self.state(slot);
            for (name, got, exact, dtype) in [
                ("out", &out, &exact, self.out.dtype),
                ("conv_state", &got.conv_state, &last.conv_state, self.conv.dtype),
                ("recurrent_state", &got.recurrent_state, &last.recurrent_state, self.recurrent.dtype),
            ] {
                assert!(got.iter().all(|x| x.is_finite()), "{what}: {name} of sequence {r} is not finite");
                let error = relative(got, exact);
                let precision = if name == "conv_state" { Precision::F32 } else { precision };
                let mut bound = precision.bound(exact, dtype);
                // Where a query hardly meets its keys, or states cancel, the norm makes much of what is left:
                // no more is asked than of the exact result for inputs and states that are a few units in the
                // last place off.
                for seed in 0..if error > bound { 8 } else { 0 } {
                    let (near, states) = self.setup.exact_of(rows.clone(), &state, precision.change, seed);
                    let last = states.last().unwrap_or(&state);
                    let near = match name {
                        "out" => &near,
                        "conv_state" => &last.conv_state,
                        _ => &last.recurrent_state,
                    };
                    bound = bound.max(relative(near, exact));
                }
                assert!(
                    error <= bound,
                    "{what}: {name} of sequence {r} is off by {error:.2e}, more than {bound:.2e}"
                );
            }
        }
        let ours: Vec<usize> =
            (0..self.slots.len()).filter(|r| !self.is_padding(*r)).map(|r| self.slots[r] as usize).collect();
        self.conv.check_untouched(&before.conv, "conv_state", |[slot, ..]| ours.contains(&slot));
        self.recurrent
            .check_untouched(&before.recurrent, "recurrent_state", |[slot, ..]| ours.contains(&slot));
        self.out.check_untouched(&before.out, "out", |_| true);
    }
}

/// What a backend computes with.
#[derive(Clone, Copy, Debug)]
pub struct Precision {
    /// The error that a result may have in f32, of its norm.
    pub error: f64,
    /// How far off inputs and states may be for what an ill-conditioned result may be off.
    pub change: f64,
}

impl Precision {
    pub const F32: Self = Self { error: 2e-6, change: 4.0 * f32::EPSILON as f64 };

    /// The error that a result may have: in 16 bits 1.05 times what rounding the exact result to them makes,
    /// and what it may have in f32.
    pub fn bound(&self, exact: &[f64], dtype: Dtype) -> f64 {
        match dtype {
            Dtype::F32 => self.error,
            _ => {
                let nearest: Vec<f64> = exact.iter().map(|x| rounded(dtype, *x)).collect();
                1.05 * relative(&nearest, exact) + self.error
            }
        }
    }
}

/// That of a backend that computes in f32.
pub fn bound(exact: &[f64], dtype: Dtype) -> f64 {
    Precision::F32.bound(exact, dtype)
}
