//! Decode on a GPU: the CPU's own layers and batches (`tests/layer`), held to the f64 oracle, and the
//! contracts held to the CPU. The same cases run on the emulator and on a device, which must give the same
//! bits.

mod cases;
mod device;
mod emulator;

#[allow(dead_code, reason = "prefill and the CPU's instruction sets are for the CPU's own tests")]
#[path = "../../../tests/layer/batch.rs"]
pub(super) mod batch;
#[allow(dead_code, reason = "as above")]
#[path = "../../../tests/layer/memory.rs"]
pub(super) mod memory;
#[allow(dead_code, reason = "as above")]
#[path = "../../../tests/layer/setup.rs"]
pub(super) mod setup;

use crate::{
    decode::{Decode, Plan},
    dtype::Dtype,
    layer::{Field, Tokens},
    state::{Kept, SlotsOf, State},
    tensor::{Exclusive, IndexType, Operand, Shared},
    view::DeviceAddress,
};

/// A call on tensors of the host.
type Call<'a, 'b> = Decode<Shared<'a>, Exclusive<'b>>;

/// What a call does with a tensor's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Reads,
    Writes,
    Updates,
}

/// The memory of a tensor of the host, from its first element to its last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub(super) at: *mut u8,
    pub(super) bytes: usize,
    pub(super) access: Access,
}

/// The memory of some tensors, each once, in the order in which they are met.
#[derive(Debug, Default)]
pub(super) struct Extents(pub(super) Vec<Extent>);

impl Extents {
    pub(super) fn see(&mut self, at: *mut u8, bytes: usize, access: Access) {
        match self.0.iter_mut().find(|extent| extent.at == at) {
            Some(extent) => extent.bytes = extent.bytes.max(bytes),
            None => self.0.push(Extent { at, bytes, access }),
        }
    }

    pub(super) fn tokens(&mut self, tokens: &Tokens<*mut u8>) {
        let heads = tokens.layer.heads();
        let (hk, ratio) = (heads.num_k_heads(), heads.ratio());
        let (dk, dv) = (heads.head_k_dim(), heads.head_v_dim());
        for (field, len) in [
            (&tokens.q, dk),
            (&tokens.k, dk),
            (&tokens.v, ratio * dv),
            (&tokens.z, ratio * dv),
            (&tokens.b, ratio),
            (&tokens.a, ratio),
        ] {
            let row = field.start + (hk - 1) * field.head_step + len * field.dtype.size();
            let rows = tokens.num_tokens.saturating_sub(1) * field.row_stride;
            self.see(field.at, if tokens.num_tokens == 0 { 0 } else { rows + row }, Access::Reads);
        }
        let weight = &tokens.conv_weight;
        self.see(weight.at, span(weight, weight.kind.size()), Access::Reads);
        let vectors = [tokens.A_log, tokens.dt_bias, tokens.norm_weight];
        for vector in vectors.iter().chain(&tokens.conv_bias) {
            self.see(vector.at, span(vector, vector.kind.size()), Access::Reads);
        }
        self.see(tokens.out.at, span(&tokens.out, tokens.out.kind.size()), Access::Writes);
    }
}

pub(super) fn span<K, const D: usize>(operand: &Operand<*mut u8, K, D>, size: usize) -> usize {
    let last = operand.sizes.iter().zip(operand.strides).map(|(n, stride)| n.saturating_sub(1) * stride);
    if operand.sizes.contains(&0) { 0 } else { (last.sum::<usize>() + 1) * size }
}

/// The tensors of a plan on the host, each once, in the order in which they are met.
fn extents(plan: &Plan<*mut u8>) -> Vec<Extent> {
    let mut all = Extents::default();
    all.tokens(&plan.tokens);
    let mut see = |at, bytes, access| all.see(at, bytes, access);
    macro_rules! state {
        ($state:expr) => {
            let access = match &$state.kept {
                Kept::Last | Kept::LastAt(_) | Kept::Each => Access::Updates,
                Kept::EachIn(..) | Kept::Nothing => Access::Reads,
            };
            see($state.state.at, span(&$state.state, $state.state.kind.size()), access);
            if let Kept::EachIn(states, _) = &$state.kept {
                see(states.at, span(states, states.kind.size()), Access::Writes);
            }
            if let Kept::LastAt(indices) | Kept::EachIn(_, Some(indices)) = &$state.kept {
                see(indices.at, span(indices, indices.kind.size()), Access::Reads);
            }
        };
    }
    state!(plan.conv);
    state!(plan.recurrent);
    if let Some(indices) = &plan.slots.state_indices {
        see(indices.at, span(indices, indices.kind.size()), Access::Reads);
    }
    if let Some(indices) = &plan.num_accepted_tokens {
        see(indices.at, span(indices, indices.kind.size()), Access::Reads);
    }
    all.0
}

pub(super) fn moved_operand<K: Copy, const D: usize>(
    Operand { at, kind, sizes, strides }: &Operand<*mut u8, K, D>,
    to: &impl Fn(*mut u8) -> DeviceAddress,
) -> Operand<DeviceAddress, K, D> {
    Operand { at: to(*at), kind: *kind, sizes: *sizes, strides: *strides }
}

pub(super) fn moved_tokens(
    tokens: &Tokens<*mut u8>,
    to: &impl Fn(*mut u8) -> DeviceAddress,
) -> Tokens<DeviceAddress> {
    let Tokens { q, k, v, z, b, a, .. } = *tokens;
    let [q, k, v, z, b, a] = [q, k, v, z, b, a].map(|Field { at, dtype, start, row_stride, head_step }| {
        Field { at: to(at), dtype, start, row_stride, head_step }
    });
    Tokens {
        layer: tokens.layer,
        num_tokens: tokens.num_tokens,
        q,
        k,
        v,
        z,
        b,
        a,
        conv_weight: moved_operand(&tokens.conv_weight, to),
        conv_bias: tokens.conv_bias.as_ref().map(|bias| moved_operand(bias, to)),
        A_log: moved_operand(&tokens.A_log, to),
        dt_bias: moved_operand(&tokens.dt_bias, to),
        norm_weight: moved_operand(&tokens.norm_weight, to),
        out: moved_operand(&tokens.out, to),
    }
}

/// The same plan with its tensors elsewhere.
fn moved(plan: &Plan<*mut u8>, to: impl Fn(*mut u8) -> DeviceAddress) -> Plan<DeviceAddress> {
    fn state<const D: usize, const E: usize>(
        state: &State<*mut u8, D, E>,
        to: &impl Fn(*mut u8) -> DeviceAddress,
    ) -> State<DeviceAddress, D, E> {
        let one = |indices: &Operand<*mut u8, IndexType, 1>| moved_operand(indices, to);
        let kept = match &state.kept {
            Kept::Last => Kept::Last,
            Kept::Each => Kept::Each,
            Kept::Nothing => Kept::Nothing,
            Kept::LastAt(indices) => Kept::LastAt(one(indices)),
            Kept::EachIn(states, indices) => {
                let states: Operand<DeviceAddress, Dtype, E> = moved_operand(states, to);
                Kept::EachIn(states, indices.as_ref().map(one))
            }
        };
        State { state: moved_operand(&state.state, to), kept }
    }
    Plan {
        tokens: moved_tokens(&plan.tokens, &to),
        tokens_per_sequence: plan.tokens_per_sequence,
        slots: SlotsOf {
            num_sequences: plan.slots.num_sequences,
            state_indices: plan.slots.state_indices.as_ref().map(|indices| moved_operand(indices, &to)),
            pad_slot_id: plan.slots.pad_slot_id,
        },
        num_accepted_tokens: plan.num_accepted_tokens.as_ref().map(|indices| moved_operand(indices, &to)),
        conv: state(&plan.conv, &to),
        recurrent: state(&plan.recurrent, &to),
    }
}
