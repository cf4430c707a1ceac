//! Decode on a GPU: the functions to call, on addresses and on cudarc's slices, and the kernel's arguments
//! and grid for a checked plan.

use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;
use gdn_kernels::{
    decode::{
        NARROW, PLAIN, PLAIN_TOKENS, WIDE,
        args::{self, Args, Strided, Vector},
        few,
    },
    split::Divisor,
};

use super::{
    device::Gpu,
    error::CudaError,
    launch::Launch,
    module::{Current, Function},
    share::{Choice, Profile, Share, Work},
    slices::{OnStream, Read, Write},
};
use crate::{
    argument::ArgumentError,
    decode::{Decode, Plan},
    dtype::Dtype,
    layer::{Field, Gate, Layer, Tokens},
    state::{Keep, Kept, SlotsOf},
    tensor::{IndexType, Operand},
    view::DeviceAddress,
};

impl Gpu {
    /// [`gdn::decode`](crate::decode()) by one kernel launch on `stream`, and nothing else. The call returns
    /// before the work is done. It allocates nothing, waits for nothing and reads nothing of the device's
    /// memory, so it can be captured in a CUDA graph once [`Gpu::warmup`] was called.
    ///
    /// Shapes, dtypes, strides and overlaps are checked as on the CPU. Indices are read by the kernel, which
    /// skips a sequence whose slot is not there, or whose number of accepted tokens cannot be, as if it were
    /// padding; where two sequences keep a state in one slot, or one where the other reads, what they leave
    /// there is not defined. DK and DV go up to 256, and addresses are multiples of the size of their
    /// elements.
    ///
    /// A result has the same bits whatever B, the slot and the neighbours, and T tokens those of T calls with
    /// one.
    ///
    /// # Errors
    /// [`CudaError::Argument`], [`CudaError::WrongDevice`], [`CudaError::TooManySequences`],
    /// [`CudaError::Driver`].
    ///
    /// # Safety
    /// `stream` is a stream of this GPU's context, or null for its default stream. From when the kernel
    /// starts until it is done, all tensors are in memory that the device can reach, those that are read are
    /// not written, those that are written neither read nor written by anything else, and these have no two
    /// elements in one place.
    pub unsafe fn decode_raw(
        &self,
        call: &Decode<DeviceAddress, DeviceAddress>,
        stream: CUstream,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_decode(&self.plan_decode(call)?, stream) }
    }

    /// All of [`Gpu::decode_raw`] but the launch: a call that is checked, for who makes it often.
    ///
    /// # Errors
    /// [`CudaError::Argument`], [`CudaError::WrongDevice`], [`CudaError::TooManySequences`],
    /// [`CudaError::Driver`].
    pub fn plan_decode(&self, call: &Decode<DeviceAddress, DeviceAddress>) -> Result<DecodePlan, CudaError> {
        let job = Job::checked(self, &Plan::new(call)?, Profile::of(self))?;
        Ok(DecodePlan { job, function: OnceLock::new() })
    }

    /// The launch of a call that was planned for this GPU. It can be repeated while the tensors are where
    /// they were.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    ///
    /// # Safety
    /// That of [`Gpu::decode_raw`], for the tensors of the call that was planned; the plan is one of this
    /// GPU's.
    pub unsafe fn launch_decode(&self, plan: &DecodePlan, stream: CUstream) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        plan.job.as_ref().map_or(Ok(()), |job| unsafe { job.launch(self, &plan.function, stream) })
    }
}

/// A checked call of decode on a GPU ([`Gpu::plan_decode`]): the kernel, its arguments and its grid.
#[derive(Clone, Debug)]
pub struct DecodePlan {
    /// `None` for no sequences.
    job: Option<Job>,
    /// The kernel, once it was launched.
    function: OnceLock<Function>,
}

/// Whether [`Gpu::decode_raw`] takes a call: all that is checked before a kernel is launched, without a
/// device.
///
/// # Errors
/// [`CudaError::Argument`], [`CudaError::TooManySequences`].
pub fn check_decode(call: &Decode<DeviceAddress, DeviceAddress>) -> Result<(), CudaError> {
    Job::new(&Plan::new(call)?, Profile::LEAST).map(|_| ())
}

/// Whether decode on a GPU takes a layer: DK and DV of at most 256.
///
/// # Errors
/// [`ArgumentError::Value`], which says what is not taken.
pub fn decode_supports(layer: &Layer) -> Result<(), ArgumentError> {
    let heads = layer.heads();
    for (argument, got) in [("head_k_dim", heads.head_k_dim()), ("head_v_dim", heads.head_v_dim())] {
        if got > MOST_DIM {
            let expected = format!("at most {MOST_DIM} on a GPU");
            return Err(ArgumentError::Value { argument, got: got.to_string(), expected });
        }
    }
    Ok(())
}

/// # Safety
/// That of [`Gpu::decode_raw`], for the tensors of a plan.
pub(crate) unsafe fn run(
    gpu: &Gpu,
    plan: &Plan<DeviceAddress>,
    profile: Profile,
    stream: CUstream,
) -> Result<(), CudaError> {
    let job = Job::checked(gpu, plan, profile)?;
    // SAFETY: the caller's promise.
    job.map_or(Ok(()), |job| unsafe { job.launch(gpu, &OnceLock::new(), stream) })
}

/// Computes the layer between its two GEMMs for T tokens of each of B sequences, on the GPU's stream: the
/// counterpart of [`gdn::decode`](crate::decode()), and what [`Gpu::decode_raw`] says.
///
/// The tensors are views of slices: [`Tensor::on`](crate::Tensor::on),
/// [`Tensor::on_mut`](crate::Tensor::on_mut), [`Indices::on`](crate::Indices::on).
///
/// # Errors
/// Those of [`Gpu::decode_raw`], and [`CudaError::WrongStream`] for views that were made for another stream
/// than this GPU's.
pub fn decode(call: &mut Decode<Read<'_>, Write<'_>>, gpu: &Gpu) -> Result<(), CudaError> {
    let plan = Plan::new(call)?;
    streams(call, OnStream(gpu.stream().cu_stream()))?;
    // SAFETY: the elements lie within slices that the views borrow, the written ones exclusively and with no
    // two elements in one place; cudarc orders what comes before and after on this stream.
    unsafe { run(gpu, &plan, Profile::of(gpu), gpu.stream().cu_stream()) }
}

/// That all views of a call were made for a stream.
fn streams(call: &Decode<Read<'_>, Write<'_>>, stream: OnStream) -> Result<(), CudaError> {
    fn kept<const E: usize>(keep: &Keep<Read<'_>, Write<'_>, E>) -> [Option<CUstream>; 2] {
        match keep {
            Keep::LastAt(indices) => [Some(indices.space().stream()), None],
            Keep::EachIn { states, indices } => {
                [Some(states.space().stream()), indices.as_ref().map(|indices| indices.space().stream())]
            }
            Keep::Last | Keep::Each | Keep::Nothing => [None; 2],
        }
    }
    stream.expect_inputs(&call.projections, &call.weights)?;
    stream.expect("conv_state", call.conv_state.state.space().stream())?;
    stream.expect("recurrent_state", call.recurrent_state.state.space().stream())?;
    for (argument, keep) in [
        ("conv_state.keep", kept(&call.conv_state.keep)),
        ("recurrent_state.keep", kept(&call.recurrent_state.keep)),
    ] {
        keep.into_iter().flatten().try_for_each(|got| stream.expect(argument, got))?;
    }
    if let Some(indices) = &call.slots.state_indices {
        stream.expect("state_indices", indices.space().stream())?;
    }
    if let Some(indices) = &call.num_accepted_tokens {
        stream.expect("num_accepted_tokens", indices.space().stream())?;
    }
    stream.expect("out", call.out.space().stream())
}

/// The projections of a call: their names, addresses, and bytes of an element.
pub(super) fn projections<E>(
    tokens: &Tokens<DeviceAddress>,
    mut see: impl FnMut(&'static str, DeviceAddress, usize) -> Result<(), E>,
) -> Result<(), E> {
    let is_packed = tokens.q.at == tokens.z.at;
    let names = if is_packed {
        ["mixed_qkvz", "mixed_qkvz", "mixed_ba", "mixed_ba"]
    } else {
        ["mixed_qkv", "z", "b", "a"]
    };
    let fields = [&tokens.q, &tokens.z, &tokens.b, &tokens.a];
    names.into_iter().zip(fields).try_for_each(|(name, field)| see(name, field.at, field.dtype.size()))
}

/// The same of its weights.
pub(super) fn weights<E>(
    tokens: &Tokens<DeviceAddress>,
    mut see: impl FnMut(&'static str, DeviceAddress, usize) -> Result<(), E>,
) -> Result<(), E> {
    see("conv_weight", tokens.conv_weight.at, tokens.conv_weight.kind.size())?;
    let vectors = [
        ("conv_bias", tokens.conv_bias.as_ref()),
        ("A_log", Some(&tokens.A_log)),
        ("dt_bias", Some(&tokens.dt_bias)),
        ("norm_weight", Some(&tokens.norm_weight)),
    ];
    vectors
        .into_iter()
        .filter_map(|(name, vector)| Some((name, vector?)))
        .try_for_each(|(name, vector)| see(name, vector.at, vector.kind.size()))
}

/// That a tensor begins at a multiple of the bytes of its elements.
pub(super) fn aligned(
    argument: &'static str,
    DeviceAddress(address): DeviceAddress,
    size: usize,
) -> Result<(), ArgumentError> {
    if address.is_multiple_of(size as u64) {
        return Ok(());
    }
    let (got, expected) = (format!("at address {address:#x}"), format!("at a multiple of {size}"));
    Err(ArgumentError::Value { argument, got, expected })
}

/// The tensors of a plan that have elements: their names, addresses, and bytes of an element.
fn named<E>(
    plan: &Plan<DeviceAddress>,
    mut see: impl FnMut(&'static str, DeviceAddress, usize) -> Result<(), E>,
) -> Result<(), E> {
    let tokens = &plan.tokens;
    projections(tokens, &mut see)?;
    weights(tokens, &mut see)?;
    see("out", tokens.out.at, tokens.out.kind.size())?;
    if !plan.conv.state.sizes.contains(&0) {
        see("conv_state", plan.conv.state.at, plan.conv.state.kind.size())?;
    }
    see("recurrent_state", plan.recurrent.state.at, plan.recurrent.state.kind.size())?;
    match &plan.conv.kept {
        Kept::EachIn(states, indices) => {
            if !states.sizes.contains(&0) {
                see("conv_state.keep.states", states.at, states.kind.size())?;
            }
            if let Some(indices) = indices {
                see("conv_state.keep.indices", indices.at, indices.kind.size())?;
            }
        }
        Kept::LastAt(indices) => see("conv_state.keep", indices.at, indices.kind.size())?,
        Kept::Last | Kept::Each | Kept::Nothing => {}
    }
    match &plan.recurrent.kept {
        Kept::EachIn(states, indices) => {
            if !states.sizes.contains(&0) {
                see("recurrent_state.keep.states", states.at, states.kind.size())?;
            }
            if let Some(indices) = indices {
                see("recurrent_state.keep.indices", indices.at, indices.kind.size())?;
            }
        }
        Kept::LastAt(indices) => see("recurrent_state.keep", indices.at, indices.kind.size())?,
        Kept::Last | Kept::Each | Kept::Nothing => {}
    }
    if let Some(indices) = &plan.slots.state_indices {
        see("state_indices", indices.at, indices.kind.size())?;
    }
    if let Some(indices) = &plan.num_accepted_tokens {
        see("num_accepted_tokens", indices.at, indices.kind.size())?;
    }
    Ok(())
}

/// The most that DK and DV can be.
const MOST_DIM: usize = 256;

/// The kernel to launch, its arguments and its grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) kernel: &'static str,
    pub(crate) args: Args,
    pub(crate) blocks: u32,
    pub(crate) threads: u32,
    pub(crate) shared: u32,
    pub(crate) cluster: u32,
}

/// Whether every stride of a call has 31 bits, and every number of a slot or token. They are known to be no
/// less than 0.
fn is_near(plan: &Plan<DeviceAddress>, windows: &args::Kept<4>, states: &args::Kept<5>) -> bool {
    let Plan { tokens, conv, recurrent, slots, .. } = plan;
    let fields = [&tokens.q, &tokens.k, &tokens.v, &tokens.z, &tokens.b, &tokens.a];
    let mut all = (plan.tokens.num_tokens | conv.state.sizes[0] | recurrent.state.sizes[0]) as u64
        | windows.slots as u64
        | states.slots as u64;
    let mut see = |strides: &[u64]| all |= strides.iter().fold(0, |all, stride| all | stride);
    fields.iter().for_each(|field| see(&[field.row_stride as u64, field.head_step as u64]));
    see(&strided(&tokens.conv_weight).strides);
    see(&strided(&tokens.out).strides);
    see(&strided(&conv.state).strides);
    see(&strided(&recurrent.state).strides);
    see(&windows.to.strides);
    see(&states.to.strides);
    let vectors = [Some(&tokens.A_log), Some(&tokens.dt_bias), Some(&tokens.norm_weight)];
    vectors.into_iter().chain([tokens.conv_bias.as_ref()]).flatten().for_each(|at| see(&[vector(at).stride]));
    let own = indices(slots.state_indices.as_ref());
    let accepted = indices(plan.num_accepted_tokens.as_ref());
    for at in [own, accepted, windows.indices, states.indices] {
        see(&[at.row, at.column]);
    }
    all < 1 << 31
}

/// Whether a wide call is a plain one, but for its tokens: see [`PLAIN`].
fn is_plain(plan: &Plan<DeviceAddress>, windows: &args::Kept<4>, states: &args::Kept<5>) -> bool {
    let Plan { tokens, conv, slots, .. } = plan;
    let dtypes = [tokens.q.dtype, tokens.v.dtype, tokens.z.dtype, tokens.conv_weight.kind, conv.state.kind];
    let is_bf16 = dtypes.iter().all(|dtype| *dtype == Dtype::BF16)
        && [tokens.norm_weight.kind, tokens.out.kind] == [Dtype::BF16; 2]
        && windows.to.dtype == args::BF16;
    let weight = strided(&tokens.conv_weight);
    let own = indices(slots.state_indices.as_ref());
    let has_4_bytes = |at: &args::Indices| at.address == 0 || at.size == 4;
    is_bf16
        && (weight.address | weight.strides[0]).is_multiple_of(8)
        && tokens.conv_weight.is_dense(1)
        && tokens.conv_bias.is_none()
        && conv.state.sizes[2] == 3
        && plan.num_accepted_tokens.is_none()
        && [own, windows.indices, states.indices].iter().all(has_4_bytes)
}

fn number(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => args::F32,
        Dtype::F16 => args::F16,
        Dtype::BF16 => args::BF16,
    }
}

pub(super) fn field(field: &Field<DeviceAddress>) -> args::Field {
    args::Field {
        address: field.at.0 + field.start as u64,
        row_stride: field.row_stride as u64,
        head_step: field.head_step as u64,
        dtype: number(field.dtype),
    }
}

pub(super) fn vector(vector: &Operand<DeviceAddress, Dtype, 1>) -> Vector {
    let stride = (vector.strides[0] * vector.kind.size()) as u64;
    Vector { address: vector.at.0, stride, dtype: number(vector.kind) }
}

pub(super) fn strided<const D: usize>(tensor: &Operand<DeviceAddress, Dtype, D>) -> Strided<D> {
    let strides = tensor.strides.map(|stride| (stride * tensor.kind.size()) as u64);
    Strided { address: tensor.at.0, strides, dtype: number(tensor.kind) }
}

pub(super) fn indices<const D: usize>(
    indices: Option<&Operand<DeviceAddress, IndexType, D>>,
) -> args::Indices {
    indices.map_or_else(args::Indices::default, |indices| {
        let bytes = |dim: usize| indices.strides.get(dim).map_or(0, |stride| stride * indices.kind.size());
        args::Indices {
            address: indices.at.0,
            row: bytes(0) as u64,
            column: bytes(1) as u64,
            size: indices.kind.size() as u32,
        }
    })
}

/// What is kept of a state: `E` is one more than its dims.
fn kept<const D: usize, const E: usize>(
    state: &Operand<DeviceAddress, Dtype, D>,
    kept: &Kept<DeviceAddress, E>,
    slots: &SlotsOf<DeviceAddress>,
) -> args::Kept<E> {
    // The state itself, as if its slots had one token each.
    let own = Operand {
        at: state.at,
        kind: state.kind,
        sizes: std::array::from_fn(|dim| if dim == 1 { 1 } else { state.sizes[dim.saturating_sub(1)] }),
        strides: std::array::from_fn(|dim| match dim {
            0 => state.strides[0],
            1 => 0,
            _ => state.strides[dim - 1],
        }),
    };
    let one = |at: &Operand<DeviceAddress, IndexType, 1>| args::Indices { column: 0, ..indices(Some(at)) };
    let (to, kind, at) = match kept {
        Kept::Nothing => (&own, args::NOTHING, args::Indices::default()),
        Kept::Last => (&own, args::LAST, args::Indices::default()),
        Kept::LastAt(at) => (&own, args::LAST_AT, one(at)),
        Kept::Each => (&own, args::EACH, indices(slots.state_indices.as_ref())),
        Kept::EachIn(states, at) => (states, args::EACH_IN, at.as_ref().map(one).unwrap_or_default()),
    };
    let slots = if kind == args::EACH_IN { to.sizes[0] } else { state.sizes[0] };
    args::Kept { to: strided(to), slots: slots as i64, kind, indices: at }
}

impl Job {
    /// [`Job::new`], for tensors that lie in the memory of this device, where that is to be seen to.
    fn checked(gpu: &Gpu, plan: &Plan<DeviceAddress>, profile: Profile) -> Result<Option<Self>, CudaError> {
        let job = Self::new(plan, profile)?;
        if job.is_some() && gpu.check_pointers {
            let _current = Current::new(gpu.context())?;
            named(plan, |argument, address, _| gpu.owns(argument, address))?;
        }
        Ok(job)
    }

    /// # Safety
    /// That of [`Gpu::decode_raw`], for the tensors of the plan that this was made of, for such a GPU, whose
    /// kernel `function` is if it is known.
    unsafe fn launch(
        &self,
        gpu: &Gpu,
        function: &OnceLock<Function>,
        stream: CUstream,
    ) -> Result<(), CudaError> {
        let _current = Current::new(gpu.context())?;
        let &Function(function) = match function.get() {
            Some(function) => function,
            None => {
                let found = gpu.kernels.kernel(gpu.context(), self.kernel)?;
                function.get_or_init(|| Function(found))
            }
        };
        let &Self { blocks, threads, shared, cluster, .. } = self;
        let launch = Launch { function, blocks: [blocks, 1, 1], threads, shared, cluster };
        // SAFETY: the kernel takes one `Args`; they were made from a checked plan, and the grid for them. The
        // caller answers for the memory and the stream.
        unsafe { gpu.launch_with(launch, &self.args, stream) }
    }

    /// `None` for no sequences: there is nothing to launch.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for what this backend does not take, [`CudaError::TooManySequences`].
    pub(crate) fn new(plan: &Plan<DeviceAddress>, profile: Profile) -> Result<Option<Self>, CudaError> {
        let (tokens, n) = (&plan.tokens, plan.slots.num_sequences);
        let layer = &tokens.layer;
        let heads = layer.heads();
        let (hk, ratio) = (heads.num_k_heads(), heads.ratio());
        decode_supports(layer)?;
        named(plan, aligned)?;
        if n == 0 {
            return Ok(None);
        }
        let too_many = || CudaError::TooManySequences { num_sequences: n, num_k_heads: hk };
        // Features of a row, so of all channels, have 31 bits with room to spare.
        let features = u32::try_from(heads.qkvz_features()).ok().filter(|features| *features < 1 << 30);
        features.ok_or_else(too_many)?;
        let (dk, dv) = (heads.head_k_dim() as u32, heads.head_v_dim() as u32);
        let (t, ratio) = (plan.tokens_per_sequence as u32, ratio as u32);
        let groups = n.checked_mul(hk).and_then(|groups| u32::try_from(groups).ok()).ok_or_else(too_many)?;
        let state = &plan.recurrent.state;
        let (kept_windows, kept_state) = (
            kept(&plan.conv.state, &plan.conv.kept, &plan.slots),
            kept(state, &plan.recurrent.kept, &plan.slots),
        );
        let read = strided(state);
        let element = state.kind.size() as u64;
        // Rows are dense, and they and all distances between them multiples of 16 bytes.
        let mut all = (u64::from(dk) * element) | read.address | kept_state.to.address;
        for (dim, stride) in read.strides[..3].iter().enumerate() {
            all |= if state.sizes[dim] > 1 { *stride } else { 0 };
        }
        for stride in &kept_state.to.strides[..4] {
            all |= stride;
        }
        let is_wide =
            state.is_dense(3) && (dk == 1 || kept_state.to.strides[4] == element) && all.is_multiple_of(16);
        // The registers that hold a window have room for 4 taps.
        let is_wide = is_wide && layer.conv_width == 4 && is_near(plan, &kept_windows, &kept_state);
        let kind = if !is_wide {
            NARROW
        } else if is_plain(plan, &kept_windows, &kept_state) {
            if t > 1 { PLAIN_TOKENS } else { PLAIN }
        } else {
            WIDE
        };
        let keeps_each = matches!(kept_state.kind, args::EACH | args::EACH_IN);
        let is_usual = few::takes(layer.l2norm_eps, layer.norm_eps, layer.scale)
            && read.strides[2] == u64::from(dk) * state.kind.size() as u64;
        let work = Work { groups, ratio, dv, tokens: t, keeps_each, is_usual };
        let (choice, share) = Choice::all(number(state.kind), kind, dk, &work, &profile)
            .find_map(|choice| Share::new(choice, &work, &profile).map(|share| (choice, share)))
            .ok_or_else(too_many)?;
        let blocks =
            groups.checked_mul(share.cluster).filter(|blocks| *blocks < 1 << 31).ok_or_else(too_many)?;
        let divisor = |number: u32| Divisor::new(number).ok_or_else(too_many);
        let index_columns = plan.slots.state_indices.map_or(1, |indices| indices.sizes[1]);
        let most_accepted = if index_columns > 1 { index_columns.min(t as usize) as u32 } else { t };
        let args = Args {
            num_k_heads: divisor(hk as u32)?,
            cluster: divisor(share.cluster)?,
            head_blocks: divisor(share.head_blocks)?,
            head_warps: divisor(share.head_warps)?,
            block_rows: divisor(share.block_rows)?,
            dk,
            dv,
            ratio,
            tokens: t,
            conv_width: layer.conv_width as u32,
            pass_heads: share.pass_heads,
            block_heads: if share.cluster > 1 { share.block_heads } else { ratio },
            steps: share.steps,
            sigmoid: u32::from(layer.gate == Gate::Sigmoid),
            l2norm_eps: layer.l2norm_eps,
            norm_eps: layer.norm_eps,
            scale: layer.scale,
            beta_scale: layer.beta_scale,
            index_columns: if index_columns > 1 { 2 } else { 1 },
            most_accepted,
            conv_columns: u32::try_from(plan.conv.state.sizes[2]).map_err(|_| too_many())?,
            // Plain kernels look at 32 bits; what does not fit there is no index of theirs.
            pad_slot_id: if kind >= PLAIN {
                i32::try_from(plan.slots.pad_slot_id).map_or(-1, i64::from)
            } else {
                plan.slots.pad_slot_id
            },
            q: field(&tokens.q),
            k_behind_q: field(&tokens.k).address.wrapping_sub(field(&tokens.q).address),
            v: field(&tokens.v),
            z: field(&tokens.z),
            b: field(&tokens.b),
            a: field(&tokens.a),
            conv_weight: strided(&tokens.conv_weight),
            conv_bias: tokens.conv_bias.as_ref().map_or_else(Vector::default, vector),
            A_log: vector(&tokens.A_log),
            dt_bias: vector(&tokens.dt_bias),
            norm_weight: vector(&tokens.norm_weight),
            out: strided(&tokens.out),
            conv_state: strided(&plan.conv.state),
            conv_slots: plan.conv.state.sizes[0] as i64,
            conv_kept: kept_windows,
            state: read,
            slots: state.sizes[0] as i64,
            kept: kept_state,
            room: share.room,
            state_indices: indices(plan.slots.state_indices.as_ref()),
            num_accepted_tokens: indices(plan.num_accepted_tokens.as_ref()),
        };
        Ok(Some(Self {
            kernel: choice.name,
            args,
            blocks,
            threads: share.warps * 32,
            shared: share.room.bytes,
            cluster: share.cluster,
        }))
    }
}
