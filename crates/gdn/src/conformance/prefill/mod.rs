//! Prefill on a GPU: the CPU's own layers and batches (`tests/layer`), held to the f64 oracle, and the
//! contracts held to the CPU. The same cases run on the emulator and on a device, which must give the same
//! bits.

mod cases;
mod device;
mod emulator;
mod segments;

use super::decode::{Access, Extent, Extents, batch, memory, moved_operand, moved_tokens, setup, span};
use crate::{
    prefill::{Checkpointed, Plan, Prefill},
    state::{Kept, SlotsOf, State},
    tensor::{Exclusive, Shared},
    view::DeviceAddress,
};

/// A call on tensors of the host.
type Call<'a, 'b> = Prefill<Shared<'a>, Exclusive<'b>>;

/// The tensors of a plan on the host, each once, in the order in which they are met.
fn extents(plan: &Plan<*mut u8>) -> Vec<Extent> {
    let mut all = Extents::default();
    all.tokens(&plan.tokens);
    let mut see = |at, bytes, access| all.see(at, bytes, access);
    see(plan.cu_seqlens.at, span(&plan.cu_seqlens, plan.cu_seqlens.kind.size()), Access::Reads);
    if let Some(indices) = &plan.slots.state_indices {
        see(indices.at, span(indices, indices.kind.size()), Access::Reads);
    }
    if let Some(flags) = &plan.has_initial_state {
        see(flags.at, span(flags, flags.kind.size()), Access::Reads);
    }
    if let Some(State { state, .. }) = &plan.conv {
        see(state.at, span(state, state.kind.size()), Access::Updates);
    }
    if let Some(State { state, .. }) = &plan.recurrent {
        see(state.at, span(state, state.kind.size()), Access::Updates);
    }
    if let Some(kept) = &plan.checkpoints {
        see(kept.starts.at, span(&kept.starts, kept.starts.kind.size()), Access::Reads);
        let states = &kept.recurrent_states;
        see(states.at, span(states, states.kind.size()), Access::Writes);
        if let Some(states) = &kept.conv_states {
            see(states.at, span(states, states.kind.size()), Access::Writes);
        }
    }
    all.0
}

/// The same plan with its tensors elsewhere.
fn moved(plan: &Plan<*mut u8>, to: impl Fn(*mut u8) -> DeviceAddress) -> Plan<DeviceAddress> {
    let to = &to;
    fn state<const D: usize, const E: usize>(
        state: &State<*mut u8, D, E>,
        to: &impl Fn(*mut u8) -> DeviceAddress,
    ) -> State<DeviceAddress, D, E> {
        State { state: moved_operand(&state.state, to), kept: Kept::Last }
    }
    Plan {
        tokens: moved_tokens(&plan.tokens, to),
        cu_seqlens: moved_operand(&plan.cu_seqlens, to),
        slots: SlotsOf {
            num_sequences: plan.slots.num_sequences,
            state_indices: plan.slots.state_indices.as_ref().map(|indices| moved_operand(indices, to)),
            pad_slot_id: plan.slots.pad_slot_id,
        },
        has_initial_state: plan.has_initial_state.as_ref().map(|flags| moved_operand(flags, to)),
        conv: plan.conv.as_ref().map(|conv| state(conv, to)),
        recurrent: plan.recurrent.as_ref().map(|recurrent| state(recurrent, to)),
        checkpoints: plan.checkpoints.as_ref().map(|kept| Checkpointed {
            every: kept.every,
            starts: moved_operand(&kept.starts, to),
            recurrent_states: moved_operand(&kept.recurrent_states, to),
            conv_states: kept.conv_states.as_ref().map(|states| moved_operand(states, to)),
        }),
    }
}
