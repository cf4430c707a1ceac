//! Decode on the CPU: each state goes through the caches once, whatever the number of tokens.

use std::{marker::PhantomData, ops::Range};

use gdn_math::special::exp;

use super::{
    Cpu,
    lanes::{Bf16, F16, F32, Register, WIDEST, for_isa},
    recurrence::{Place, Recur, Recurrence, arrange, recurrence, scratch_len},
    scratch::{self, Pieces, padded},
    slots::{Named, Uses},
    stages::{Group, Widths, ahead::Beginning, at, clear, for_dtype, in_head, step},
    threads::{Sent, slices},
};
use crate::{
    argument::ArgumentError,
    decode::{Decode, MAX_TOKENS, Plan},
    dtype::Dtype,
    state::Kept,
    tensor::{Exclusive, Shared},
};

/// Computes the layer between its two GEMMs for T tokens of each of B sequences, and brings their states up
/// to date.
///
/// T tokens at once give the same bits as T calls with one, and a sequence's results do not depend on its
/// batch, its slot or the threads. On the CPU wrong indices are errors too: those past the slots there are,
/// and a slot that two sequences write, or one writes and another reads. Nothing is allocated but each
/// thread's scratch memory, once, lists of slots for more than 128 sequences, and what rayon takes to call its
/// threads.
///
/// All is computed in f32 and rounded once where it is stored. Before that rounding `out` and states are within
/// 2e-6 of the exact result, as a share of its 2-norm. Where a query hardly meets its keys, or states cancel, the
/// norm makes much of the little that is left: there a result is as far off as inputs and states that are four
/// units in the last place off would make it. So it is with [`prefill`](crate::prefill()).
///
/// ```
/// use gdn::{
///     ConvState, Cpu, Decode, Heads, Keep, Layer, Layout, Packed, Packing, Projections, RecurrentState, Slots,
///     Tensor, Weights,
/// };
///
/// let layer = Layer::new(Layout::new(Heads::new(2, 4, 16, 16)?, Packing::Interleaved));
/// let (batch, channels) = (3, layer.conv_channels());
/// let (mixed_qkvz, mixed_ba) = (vec![0.1f32; batch * 192], vec![0.1f32; batch * 8]);   // from the GEMMs
/// let (taps, per_head, norm) = (vec![0.5f32; channels * 4], [0.1f32; 4], [1f32; 16]);   // from the checkpoint
/// let (mut conv, mut state) = (vec![0f32; batch * channels * 3], vec![0f32; batch * 4 * 16 * 16]);
/// let mut out = vec![0f32; batch * 4 * 16];
/// gdn::decode(
///     &mut Decode {
///         layer,
///         tokens_per_sequence: 1,
///         projections: Projections::Packed(Packed {
///             mixed_qkvz: Tensor::new(&mixed_qkvz, [batch, 192])?,
///             mixed_ba: Tensor::new(&mixed_ba, [batch, 8])?,
///         }),
///         weights: Weights {
///             conv_weight: Tensor::new(&taps, [channels, 4])?,
///             conv_bias: None,
///             A_log: Tensor::new(&per_head, [4])?,
///             dt_bias: Tensor::new(&per_head, [4])?,
///             norm_weight: Tensor::new(&norm, [16])?,
///         },
///         conv_state: ConvState {
///             state: Tensor::new_mut(&mut conv, [batch, channels, 3])?,
///             keep: Keep::Last,
///         },
///         recurrent_state: RecurrentState {
///             state: Tensor::new_mut(&mut state, [batch, 4, 16, 16])?,
///             keep: Keep::Last,
///         },
///         slots: Slots::in_order(),
///         num_accepted_tokens: None,
///         out: Tensor::new_mut(&mut out, [batch, 4, 16])?,
///     },
///     &Cpu::new(),
/// )?;
/// assert!(out.iter().all(|y| *y > 0.0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`ArgumentError`], before anything is written.
pub fn decode(call: &mut Decode<Shared<'_>, Exclusive<'_>>, cpu: &Cpu) -> Result<(), ArgumentError> {
    go(&Plan::new(call)?, cpu)
}

/// A call of [`decode`] of which everything is checked but the values of indices: what [`Decode::checked`]
/// makes, for who wants to know that first.
#[derive(Debug)]
pub struct CheckedDecode<'a> {
    plan: Plan<*mut u8>,
    /// What the plan's addresses are of.
    views: PhantomData<Decode<Shared<'a>, Exclusive<'a>>>,
}

// SAFETY: the addresses are those of views, which may be sent.
unsafe impl Send for CheckedDecode<'_> {}

impl<'a> Decode<Shared<'a>, Exclusive<'a>> {
    /// All of [`decode`] that comes before it looks at memory.
    ///
    /// # Errors
    /// [`ArgumentError`].
    pub fn checked(self) -> Result<CheckedDecode<'a>, ArgumentError> {
        Ok(CheckedDecode { plan: Plan::new(&self)?, views: PhantomData })
    }
}

impl CheckedDecode<'_> {
    /// Bytes of the recurrent states of all its sequences.
    pub fn state_bytes(&self) -> usize {
        state_bytes(&self.plan)
    }

    /// Does it: the rest of [`decode`].
    ///
    /// # Errors
    /// [`ArgumentError`] for the values of indices, before anything is written.
    pub fn run(self, cpu: &Cpu) -> Result<(), ArgumentError> {
        go(&self.plan, cpu)
    }
}

fn state_bytes(plan: &Plan<*mut u8>) -> usize {
    let heads = plan.tokens.layer.heads();
    let state =
        heads.num_v_heads() * heads.head_v_dim() * heads.head_k_dim() * plan.recurrent.state.kind.size();
    state.saturating_mul(plan.slots.num_sequences)
}

/// A plan of views that the caller still has.
fn go(plan: &Plan<*mut u8>, cpu: &Cpu) -> Result<(), ArgumentError> {
    check(plan)?;
    let num_sequences = plan.slots.num_sequences;
    if num_sequences == 0 {
        return Ok(());
    }
    let heads = plan.tokens.layer.heads();
    let bytes = state_bytes(plan).saturating_mul(2);
    let threads = cpu.chosen_threads(bytes);
    let (hk, rows) = (heads.num_k_heads(), heads.ratio() * heads.head_v_dim());
    let run = for_isa!(cpu.chosen_isa(), run(task: &Task<'_>, memory: &mut [f32]));
    let recurrence = recurrence(cpu.chosen_isa(), plan.recurrent.state.kind);
    let scratch_len = Widths::new(&plan.tokens, plan.tokens_per_sequence, WIDEST).scratch(&plan.tokens)
        + scratch_len(heads.head_k_dim());
    let sent = &Sent::new(&raw const *plan);
    let work = |head: usize, sequences: Range<usize>, step: Step| {
        // SAFETY: the plan lives until all tasks have ended.
        let task = Task { plan: unsafe { &*sent.get() }, recurrence, head, sequences, step };
        // SAFETY: `for_isa` looked at the machine. Tasks have no rows of a key head of a sequence in common,
        // the plan was checked, and so were its slots.
        scratch::with(scratch_len, |memory| unsafe { run(&task, memory) });
    };
    let (slices, len) = slices(rows, hk * num_sequences, threads);
    if slices == 1 {
        // A head's weights are read once for all the sequences of a task, which are few enough for every
        // thread to have some.
        let blocks = (TASKS_PER_THREAD * threads).div_ceil(hk).min(num_sequences);
        let len = num_sequences.div_ceil(blocks);
        cpu.share(hk * num_sequences.div_ceil(len), bytes, |i| {
            let first = i / hk * len;
            work(i % hk, first..(first + len).min(num_sequences), Step::All);
        });
        return Ok(());
    }
    // Fewer key heads than threads: slices of each head's rows first. The norm takes all rows of a head, and
    // no window may be written while a slice still reads it, so both come after.
    scratch::with(plan.tokens.num_tokens * heads.num_v_heads() * heads.head_v_dim(), |outputs| {
        let outputs = &Sent::new(outputs.as_mut_ptr());
        cpu.share(hk * num_sequences * slices, bytes, |i| {
            let (head, sequence, first) = (i % hk, i / hk % num_sequences, i / hk / num_sequences * len);
            let slice = first..(first + len).min(rows);
            work(head, sequence..sequence + 1, Step::Slice(slice, outputs.get()));
        });
        cpu.share(hk * num_sequences, bytes, |i| {
            work(i % hk, i / hk..i / hk + 1, Step::Rest(outputs.get()));
        });
    });
    Ok(())
}

/// Tasks for each thread, so that one which is late does not hold up the others for long.
const TASKS_PER_THREAD: usize = 32;

/// One key head of some sequences.
struct Task<'a> {
    plan: &'a Plan<*mut u8>,
    /// Of the same instruction set, for the plan's states.
    recurrence: Recur,
    head: usize,
    sequences: Range<usize>,
    step: Step,
}

/// What a task does of each of its sequences. Outputs that steps hand on are `[N, HV, DV]` in f32.
enum Step {
    All,
    /// The delta rule for some rows of the key head's R * DV.
    Slice(Range<usize>, *mut f32),
    /// Everything else.
    Rest(*const f32),
}

/// Reads and checks the values of indices.
fn check(plan: &Plan<*mut u8>) -> Result<(), ArgumentError> {
    let (slots, n, tokens) = (&plan.slots, plan.slots.num_sequences, plan.tokens_per_sequence);
    if let Some(accepted) = &plan.num_accepted_tokens {
        let columns = slots.state_indices.map_or(1, |indices| indices.sizes[1]);
        for r in 0..n {
            // SAFETY: the plan was checked: an entry for each sequence.
            let got = unsafe { accepted.read([r]) };
            // SAFETY: as above.
            let is_padding = unsafe { slots.slot(r, 0) }.is_none();
            let most =
                if slots.state_indices.is_some() && columns > 1 { tokens.min(columns) } else { tokens };
            if !is_padding && !(1..=most as i64).contains(&got) {
                return Err(ArgumentError::Value {
                    argument: "num_accepted_tokens",
                    got: format!("{got} for sequence {r}"),
                    expected: format!("from 1 to {most}"),
                });
            }
        }
    }
    let live = || (0..n).filter_map(|r| Some((r, Read::of(plan, r)?)));
    let conv = Named { name: "conv_state", operand: &plan.conv.state };
    Uses(|| {
        live().flat_map(|(r, read)| {
            // SAFETY: the plan was checked.
            let kept = unsafe { slots.kept(&plan.conv, r, read.conv, tokens - 1, tokens) };
            let kept = kept.filter(|_| !matches!(plan.conv.kept, Kept::EachIn(..)));
            [Some((read.conv, r, false)), kept.map(|slot| (slot, r, true))].into_iter().flatten()
        })
    })
    .check(conv, "state_indices", n)?;
    let recurrent = Named { name: "recurrent_state", operand: &plan.recurrent.state };
    Uses(|| {
        live().flat_map(|(r, read)| {
            let kept = (0..tokens).filter_map(move |t| {
                // SAFETY: the plan was checked.
                let kept = unsafe { slots.kept(&plan.recurrent, r, read.recurrent, t, tokens) };
                kept.filter(|_| !matches!(plan.recurrent.kept, Kept::EachIn(..)))
            });
            std::iter::once((read.recurrent, r, false)).chain(kept.map(move |slot| (slot, r, true)))
        })
    })
    .check(recurrent, "state_indices", n)?;
    let other = |indices, r: usize| {
        // SAFETY: the plan was checked.
        unsafe { slots.other(indices, r) }.map(|slot| (slot, r, true))
    };
    if let Kept::EachIn(states, indices) = &plan.conv.kept {
        let tensor = Named { name: "conv_state.keep.states", operand: states };
        let uses = Uses(|| live().filter_map(|(r, _)| other(indices.as_ref(), r)));
        uses.check(tensor, "conv_state.keep.indices", n)?;
    }
    if let Kept::EachIn(states, indices) = &plan.recurrent.kept {
        let tensor = Named { name: "recurrent_state.keep.states", operand: states };
        let uses = Uses(|| live().filter_map(|(r, _)| other(indices.as_ref(), r)));
        uses.check(tensor, "recurrent_state.keep.indices", n)?;
    }
    Ok(())
}

/// Where the states of a sequence are read.
#[derive(Clone, Copy)]
struct Read {
    conv: usize,
    recurrent: usize,
    /// Tokens of the last call that stay, where some may not.
    accepted: Option<usize>,
}

impl Read {
    /// `None` for padding.
    fn of(plan: &Plan<*mut u8>, sequence: usize) -> Option<Self> {
        // SAFETY: the plan was checked: a row of indices and an entry for each sequence. A column that is not
        // there belongs to a number of accepted tokens that is an error.
        unsafe {
            let conv = plan.slots.slot(sequence, 0)?;
            let accepted = plan.num_accepted_tokens.map(|indices| indices.read([sequence]).max(1) as usize);
            let columns = plan.slots.state_indices.map_or(1, |indices| indices.sizes[1]);
            let column = if columns > 1 { accepted.map_or(0, |n| n - 1) } else { 0 };
            let recurrent = plan.slots.slot(sequence, column.min(columns - 1))?;
            Some(Self { conv, recurrent, accepted })
        }
    }
}

/// # Safety
/// No two tasks at a time have a key head of a sequence in common; the plan and its slots were checked; the
/// machine has L's instruction set.
#[inline(always)]
unsafe fn run<L: Register>(task: &Task<'_>, memory: &mut [f32]) {
    let Task { plan, recurrence, head, ref sequences, ref step } = *task;
    let (tokens, t) = (&plan.tokens, plan.tokens_per_sequence);
    let heads = tokens.layer.heads();
    let (dk, all_rows) = (heads.head_k_dim(), 0..heads.ratio() * heads.head_v_dim());
    // What is computed of the value heads' states.
    let computed = match step {
        Step::All => Some(&all_rows),
        Step::Slice(slice, _) => Some(slice),
        Step::Rest(_) => None,
    };
    let widths = Widths::new(tokens, t, WIDEST);
    let mut pieces = Pieces::of(memory);
    // SAFETY: the caller's promises.
    let mut group = unsafe { Group::new::<L>(tokens, head, widths, &mut pieces) };
    let unkept = pieces.take(scratch_len(dk));
    for r in sequences.clone() {
        let rows = r * t..(r + 1) * t;
        // SAFETY: rows and states of this sequence.
        unsafe {
            let Some(read) = Read::of(plan, r) else {
                if !matches!(step, Step::Slice(..)) {
                    clear(tokens, head, rows);
                }
                continue;
            };
            let columns = plan.conv.state.sizes[2];
            let first = read.accepted.map_or(columns - (tokens.layer.conv_width - 1), |n| n - 1);
            group.read_window::<L>(Some((&plan.conv.state, read.conv, first)));
            group.take_inputs::<L>(rows.start, t);
            if let Step::Rest(outputs) = step {
                group.take_outputs(*outputs, rows.start, t);
            } else {
                group.prepare::<L>(rows.start, t);
            }
            if !matches!(step, Step::Slice(..)) {
                keep_window::<L>(plan, &mut group, r, read);
            }
            if let Some(rows) = computed {
                // The delta rule takes longer than memory does to bring what comes next: the next sequence, or the
                // next key head.
                let next_head = r + 1 == sequences.end;
                let next = if next_head { sequences.start } else { r + 1 };
                let slot = plan.slots.slot(next, 0).filter(|_| !next_head || head + 1 < heads.num_k_heads());
                let upcoming = match slot {
                    Some(slot) => group.beginning(&plan.conv.state, slot, next * t, next_head),
                    None => Beginning::none(),
                };
                recur::<L>(plan, recurrence, &mut group, r, read, unkept, rows, upcoming);
            }
            if let Step::Slice(slice, outputs) = step {
                group.put_outputs(*outputs, rows.start, t, slice);
            }
            if !matches!(step, Step::Slice(..)) {
                group.finish::<L>(rows.start, t);
            }
        }
    }
}

/// The windows of the convolution that are kept.
///
/// # Safety
/// As [`run`], for one sequence, whose tokens are prepared.
#[inline(always)]
unsafe fn keep_window<L: Register>(plan: &Plan<*mut u8>, group: &mut Group<'_>, sequence: usize, read: Read) {
    let (state, t) = (&plan.conv.state, plan.tokens_per_sequence);
    let (columns, width) = (state.sizes[2], plan.tokens.layer.conv_width);
    // SAFETY: the caller's promises.
    unsafe {
        if let Kept::EachIn(windows, _) = &plan.conv.kept {
            for i in 0..t {
                if let Some(slot) = plan.slots.kept(&plan.conv, sequence, read.conv, i, t) {
                    let window = at(windows, [slot, i, 0, 0]);
                    let steps = [step(windows, 2), step(windows, 3)];
                    group.write_window::<L>(window, windows.kind, steps, width - 1, i + 1);
                }
            }
        } else {
            let to = plan.slots.kept(&plan.conv, sequence, read.conv, t - 1, t);
            if let (Some(to), None, true) = (to, read.accepted, columns < width + t) {
                // All that is to be kept was read.
                let steps = [step(state, 1), step(state, 2)];
                group.write_window::<L>(at(state, [to, 0, 0]), state.kind, steps, columns, t);
                return;
            }
            let (old, kept, columns) = match read.accepted {
                // All columns are the last inputs.
                None => (t, columns.saturating_sub(t), columns),
                // From column 0 on what a next call may go back to, of width 1 nothing.
                Some(accepted) => {
                    (accepted, width.saturating_sub(2), (width + t).saturating_sub(2).min(columns))
                }
            };
            group.roll_window::<L>(state, [Some(read.conv), to], old, kept, columns, sequence * t, t);
        }
    }
}

/// The delta rule, for some of the R * DV rows of the value heads' states. What is `upcoming` is brought near
/// meanwhile.
///
/// # Safety
/// As [`run`], for one sequence, whose tokens are prepared.
#[allow(clippy::too_many_arguments, reason = "one call, of parts of a task")]
#[inline(always)]
unsafe fn recur<L: Register>(
    plan: &Plan<*mut u8>,
    recurrence: Recur,
    group: &mut Group<'_>,
    sequence: usize,
    read: Read,
    unkept: &mut [f32],
    rows: &Range<usize>,
    mut upcoming: Beginning,
) {
    let heads = plan.tokens.layer.heads();
    let (dk, dv, ratio) = (heads.head_k_dim(), heads.head_v_dim(), heads.ratio());
    let (state, t) = (&plan.recurrent.state, plan.tokens_per_sequence);
    let by_rows = state.is_dense(3);
    let along = if by_rows { 2 } else { 3 };
    if by_rows {
        for row in
            [&mut *group.q, &mut *group.k].into_iter().flat_map(|rows| rows.chunks_exact_mut(padded(dk)))
        {
            // SAFETY: the machine has the instruction set.
            for_dtype!(state.kind, E => unsafe { arrange::<L, E>(row, dk) });
        }
    }
    let lines = upcoming.lines().div_ceil(if by_rows { rows.len().max(1) } else { dk });
    for j in 0..ratio {
        let (h, rows) = (group.head() * ratio + j, in_head(rows, j, dv));
        if rows.is_empty() {
            continue;
        }
        let place = |slot: usize| Place {
            at: at(state, [slot, h, 0, 0]),
            step: step(state, along),
            is_scratch: false,
        };
        let mut head = Recurrence {
            dk,
            rows,
            q: group.q.as_ptr(),
            k: group.k.as_ptr(),
            v: group.v[j * group.head_width..].as_ptr(),
            o: group.o[j * group.head_width..].as_mut_ptr(),
            v_width: group.v_width,
            num_tokens: t,
            decay: [0.0; MAX_TOKENS],
            beta: [0.0; MAX_TOKENS],
            from: place(read.recurrent),
            to: [Place::scratch(unkept, dk, by_rows); MAX_TOKENS],
            lines,
        };
        let gates = j * padded(t);
        for i in 0..t {
            head.decay[i] = exp(group.g[gates + i]);
            head.beta[i] = group.beta[gates + i];
            // SAFETY: the plan was checked.
            let kept = unsafe { plan.slots.kept(&plan.recurrent, sequence, read.recurrent, i, t) };
            match (kept, &plan.recurrent.kept) {
                (Some(slot), Kept::EachIn(states, _)) => {
                    let at = at(states, [slot, i, h, 0, 0]);
                    head.to[i] = Place { at, step: step(states, along + 1), is_scratch: false };
                }
                (Some(slot), _) => head.to[i] = place(slot),
                (None, _) => {}
            }
        }
        // SAFETY: the caller's promises.
        unsafe { recurrence(&head, by_rows, &mut upcoming) };
    }
}
