//! Prefill on the CPU: a task takes a key head of a sequence, or some of its rows, through all its tokens.

use std::ops::Range;

use super::{
    Cpu,
    chunk::{BLOCK, Lens, States},
    lanes::{Register, for_isa},
    scratch::{self, Pieces},
    slots::{Named, Uses},
    stages::{Group, Widths, at, clear, step},
    threads::{Sent, slices},
};
use crate::{
    argument::ArgumentError,
    prefill::{Plan, Prefill},
    tensor::{Exclusive, Shared},
};

/// Computes the layer between its two GEMMs for all tokens of B sequences, and brings their states up to
/// date.
///
/// Sequences may have any length, 0 included. Cut at multiples of [`CHUNK`](crate::CHUNK) tokens into several calls with
/// f32 states, a sequence gives the same bits as in one, and its results do not depend on its batch, its slot
/// or the threads. On the CPU wrong indices are errors too: `cu_seqlens` that does not ascend from 0 to N,
/// slots past those there are, and a slot that two sequences have.
///
/// # Errors
/// [`ArgumentError`], before anything is written.
pub fn prefill(call: &mut Prefill<Shared<'_>, Exclusive<'_>>, cpu: &Cpu) -> Result<(), ArgumentError> {
    let plan = Plan::new(call)?;
    check(&plan)?;
    let heads = plan.tokens.layer.heads();
    let hk = heads.num_k_heads();
    // Arithmetic, not memory, takes the time: as if every multiplication of the delta rule were bytes, any
    // call is worth all threads.
    let bytes =
        plan.tokens.num_tokens.saturating_mul(heads.num_v_heads() * heads.head_k_dim() * heads.head_v_dim());
    let run = for_isa!(cpu.chosen_isa(), tiled run(task: &Task<'_>, memory: &mut [f32]));
    let num_sequences = plan.slots.num_sequences;
    let lens = Lens::of(heads.head_k_dim(), heads.head_v_dim(), WIDEST_PANEL, heads.ratio());
    let scratch_len = Widths::new(&plan.tokens, BLOCK, WIDEST_PANEL).scratch(&plan.tokens) + lens.scratch();
    let sent = &Sent::new(&raw const plan);
    let share = |tasks: usize, task: &(dyn Fn(&'_ Plan<*mut u8>, usize) -> Task<'_> + Sync)| {
        cpu.share(tasks, bytes, |i| {
            // SAFETY: the plan lives until all tasks have ended.
            let task = task(unsafe { &*sent.get() }, i);
            // SAFETY: `for_isa` looked at the machine. Tasks have no rows of a key head of a sequence in
            // common, the plan was checked, and so were its slots.
            scratch::with(scratch_len, |memory| unsafe { run(&task, memory) });
        });
    };
    // Slices of one value head's rows, so that they are whole panels.
    let (slices, len) =
        slices(heads.head_v_dim(), heads.num_v_heads() * num_sequences, cpu.chosen_threads(bytes));
    if hk * num_sequences >= cpu.chosen_threads(bytes) {
        share(hk * num_sequences, &|plan, i| Task { plan, head: i % hk, sequence: i / hk, step: Step::All });
        return Ok(());
    }
    // Fewer key heads than threads: slices of each head's rows first. The norm takes all rows of a head, and
    // no window may be written while a slice still reads it, so both come after.
    let mut outputs = vec![0f32; plan.tokens.num_tokens * heads.num_v_heads() * heads.head_v_dim()];
    let outputs = &Sent::new(outputs.as_mut_ptr());
    let (dv, ratio) = (heads.head_v_dim(), heads.ratio());
    share(hk * num_sequences * ratio * slices, &|plan, i| {
        let (head, sequence, part) = (i % hk, i / hk % num_sequences, i / hk / num_sequences);
        let (r, first) = (part / slices, part % slices * len);
        let rows = r * dv + first..r * dv + (first + len).min(dv);
        Task { plan, head, sequence, step: Step::Slice(rows, outputs.get()) }
    });
    share(hk * num_sequences, &|plan, i| Task {
        plan,
        head: i % hk,
        sequence: i / hk,
        step: Step::Rest(outputs.get()),
    });
    Ok(())
}

/// Columns of the widest panel of any instruction set.
const WIDEST_PANEL: usize = 32;

/// One key head of a sequence.
struct Task<'a> {
    plan: &'a Plan<*mut u8>,
    head: usize,
    sequence: usize,
    step: Step,
}

/// What a task does. Outputs that steps hand on are `[N, HV, DV]` in f32.
enum Step {
    All,
    /// The delta rule for some rows of the key head's R * DV, within one value head, from a panel's start on.
    Slice(Range<usize>, *mut f32),
    /// Everything else.
    Rest(*const f32),
}

/// Reads and checks the values of indices.
fn check(plan: &Plan<*mut u8>) -> Result<(), ArgumentError> {
    let (n, num_tokens) = (plan.slots.num_sequences, plan.tokens.num_tokens);
    // SAFETY: the plan was checked: there are n + 1 entries.
    let entry = |i: usize| unsafe { plan.cu_seqlens.read([i]) };
    let error = |i: usize, expected: String| ArgumentError::Value {
        argument: "cu_seqlens",
        got: format!("{} at [{i}]", entry(i)),
        expected,
    };
    if entry(0) != 0 {
        return Err(error(0, "0 there".to_owned()));
    }
    if let Some(i) = (0..n).find(|i| entry(*i) > entry(i + 1)) {
        return Err(error(i + 1, format!("at least the {} before it", entry(i))));
    }
    if usize::try_from(entry(n)) != Ok(num_tokens) {
        return Err(error(n, format!("{num_tokens}, the number of rows, at the end")));
    }
    // SAFETY: the plan was checked.
    let live = || (0..n).filter_map(|r| Some((unsafe { plan.slots.slot(r, 0) }?, r, true)));
    if let Some(state) = &plan.conv {
        Uses(live).check(Named { name: "conv_state", operand: &state.state }, "state_indices", n)?;
    }
    if let Some(state) = &plan.recurrent {
        Uses(live).check(Named { name: "recurrent_state", operand: &state.state }, "state_indices", n)?;
    }
    let Some(checkpoints) = &plan.checkpoints else { return Ok(()) };
    let places = || {
        live().flat_map(|(_, r, _)| {
            let len = (entry(r + 1) - entry(r)) as usize;
            // SAFETY: the plan was checked: an entry for each sequence.
            let start = unsafe { checkpoints.starts.read([r]) };
            // A negative start lies past every slot.
            (0..len / checkpoints.every).map(move |i| {
                (usize::try_from(start).map_or(usize::MAX, |start| start.saturating_add(i)), r, true)
            })
        })
    };
    let named = Named { name: "checkpoints.recurrent_states", operand: &checkpoints.recurrent_states };
    Uses(places).check(named, "checkpoints.starts", places().count())
}

/// # Safety
/// No two tasks at a time have a key head of a sequence in common; the plan and its slots were checked; the
/// machine has L's instruction set.
#[inline(always)]
unsafe fn run<L: Register, const M: usize, const N: usize, const REST: usize>(
    task: &Task<'_>,
    memory: &mut [f32],
) {
    let Task { plan, head, sequence, step: ref part } = *task;
    let tokens = &plan.tokens;
    // SAFETY: the plan was checked: entries for each sequence, which ascend from 0.
    let (start, end) =
        unsafe { (plan.cu_seqlens.read([sequence]) as usize, plan.cu_seqlens.read([sequence + 1]) as usize) };
    // SAFETY: as above.
    let Some(slot) = (unsafe { plan.slots.slot(sequence, 0) }) else {
        if !matches!(part, Step::Slice(..)) {
            // SAFETY: rows of this sequence.
            unsafe { clear(tokens, head, start..end) };
        }
        return;
    };
    // SAFETY: as above.
    let is_initial = plan.has_initial_state.is_none_or(|flags| unsafe { flags.read([sequence]) } != 0);
    let heads = tokens.layer.heads();
    let (dk, dv, ratio) = (heads.head_k_dim(), heads.head_v_dim(), heads.ratio());
    let panel = N * L::LEN;
    let widths = Widths::new(tokens, BLOCK, panel);
    let rows = match part {
        Step::Slice(rows, _) => rows.clone(),
        Step::All => 0..ratio * dv,
        Step::Rest(_) => 0..0,
    };
    let is_whole = !matches!(part, Step::Slice(..));
    let mut pieces = Pieces::of(memory);
    // SAFETY: the caller's promises; all that follows is of this sequence and this key head.
    unsafe {
        let mut group = Group::new::<L>(tokens, head, widths, &mut pieces);
        let mut states = States::new(Lens::of(dk, dv, panel, ratio), rows, &mut pieces);
        let before = tokens.layer.conv_width - 1;
        let window = plan.conv.as_ref().filter(|_| is_initial);
        group.read_window::<L>(window.map(|conv| (&conv.state, slot, conv.state.sizes[2] - before)));
        match plan.recurrent.as_ref().filter(|_| is_initial) {
            Some(recurrent) => states.exchange::<L, true>(&recurrent.state, slot, head * ratio),
            None => states.clear(),
        }
        let mut row = start;
        while row < end {
            let n = BLOCK.min(end - row);
            let is_last = row + n == end;
            let next = group.upcoming(row..row + n, !is_last);
            group.take_inputs::<L>(row, n);
            // One call for both: all of a block is compiled into each place that calls it.
            if let Step::Rest(outputs) = part {
                group.take_outputs(*outputs, row, n);
            } else {
                group.prepare::<L>(row, n);
                states.block::<L, M, N, REST>(&mut group, next, is_last);
            }
            if let Step::Slice(rows, outputs) = part {
                group.put_outputs(*outputs, row, n, rows);
            }
            if is_whole {
                group.finish::<L>(row, n);
            }
            group.keep_inputs(n);
            row += n;
            if let Some(checkpoints) = &plan.checkpoints
                && (row - start).is_multiple_of(checkpoints.every)
            {
                let place =
                    checkpoints.starts.read([sequence]) as usize + (row - start) / checkpoints.every - 1;
                states.exchange::<L, false>(&checkpoints.recurrent_states, place, head * ratio);
                if let (Some(windows), true) = (&checkpoints.conv_states, is_whole) {
                    let window = at(windows, [place, 0, windows.sizes[2] - before]);
                    let steps = [step(windows, 1), step(windows, 2)];
                    group.write_window::<L>(window, windows.kind, steps, before, 0);
                }
            }
        }
        if let Some(recurrent) = &plan.recurrent {
            states.exchange::<L, false>(&recurrent.state, slot, head * ratio);
        }
        if let (Some(conv), true) = (&plan.conv, is_whole) {
            let (columns, len) = (conv.state.sizes[2], end - start);
            let from = is_initial.then_some(slot);
            // Without a token an initial state is what it was already.
            if len > 0 || from.is_none() {
                let kept = columns.saturating_sub(len);
                group.roll_window::<L>(&conv.state, [from, Some(slot)], len, kept, columns, start, len);
            }
        }
    }
}
