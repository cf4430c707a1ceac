//! A checked plan of prefill on a GPU as launches: the kernels' arguments, their grids and their order.

use cudarc::driver::sys::CUstream;
use gdn_kernels::{
    modules::Target,
    prefill::args::{
        Args, CONVOLVE_AHEAD_THREADS, CONVOLVE_BYTES, CONVOLVE_THREADS, GROUP_ROWS, GROUP_STAGES,
        GROUP_THREADS, Indices, PREPARE_THREADS, PrepareRoom, SLICE, ScanRoom, Scratch, Strided, TAPS,
        THREADS, norm_bytes,
    },
    split::Divisor,
};

use super::scratch::{SOME_BLOCKS, chunks, likely_chunks, memory};
use crate::{
    argument::{ArgumentError, Because},
    cuda::{
        decode::{aligned, field, indices, projections, strided, vector, weights},
        device::Gpu,
        error::CudaError,
        launch::Launch,
        segments::{self, Cutting, Grid},
        side::Side,
    },
    layer::{Gate, Layer},
    prefill::{CHUNK, Plan},
    view::DeviceAddress,
};

/// The lengths of keys and of values that the kernels are made for.
const DIMS: [usize; 5] = [64, 96, 128, 192, 256];

/// The longest keys for which four warps multiply together: three chunks of longer ones have no room.
const MOST_BY_GROUP: u32 = 128;

/// Threads of the convolution that a multiprocessor has registers for.
const CONVOLVE_ROOM: u64 = 512;
/// Threads that a block of it may have where inputs are read 16 bytes at a time.
const CONVOLVE_CHOICE: [u32; 3] = [2 * CONVOLVE_THREADS, CONVOLVE_THREADS, CONVOLVE_THREADS / 2];
/// What a thread begins with takes as long as so many tokens (535 instructions and some 130, where heads have 128 features).
const CONVOLVE_BEGINS: u32 = 4;

/// Blocks of the norm that it has registers for.
const NORM_ROOM: u64 = 4;
/// Bytes of shared memory of which a block cannot make use.
const RESERVED: u32 = 1024;

/// Whether prefill on a GPU takes a layer: DK and DV of 64, 96, 128, 192 or 256, a `conv_width` of at most 4, a
/// `beta_scale` from 0 to 2 (a larger one lets the delta rule grow without bound).
///
/// A DK of 192 or 256 takes 107 or 135 KiB of shared memory a block, which GPUs of compute capability 8.6, 8.9
/// and 12.0 do not have; [`Gpu::check_prefill`] says that of the GPU at hand.
///
/// # Errors
/// [`ArgumentError::Value`], which says what is not taken.
pub fn prefill_supports(layer: &Layer) -> Result<(), ArgumentError> {
    let refuse = |argument, got: String, expected: String| {
        Err(ArgumentError::Value { argument, got, expected: expected + " on a GPU" })
    };
    let heads = layer.heads();
    for (argument, got) in [("head_k_dim", heads.head_k_dim()), ("head_v_dim", heads.head_v_dim())] {
        if !DIMS.contains(&got) {
            return refuse(argument, got.to_string(), "64, 96, 128, 192 or 256".to_owned());
        }
    }
    if layer.conv_width > TAPS as usize {
        return refuse("conv_width", layer.conv_width.to_string(), format!("at most {TAPS}"));
    }
    if !(0.0..=2.0).contains(&layer.beta_scale) {
        return refuse("beta_scale", layer.beta_scale.to_string(), "from 0 to 2".to_owned());
    }
    Ok(())
}

/// The tensors of a plan that have elements: their names, addresses, and bytes of an element.
pub(super) fn named<E>(
    plan: &Plan<DeviceAddress>,
    mut see: impl FnMut(&'static str, DeviceAddress, usize) -> Result<(), E>,
) -> Result<(), E> {
    let tokens = &plan.tokens;
    if tokens.num_tokens > 0 {
        projections(tokens, &mut see)?;
        see("out", tokens.out.at, tokens.out.kind.size())?;
    }
    weights(tokens, &mut see)?;
    see("cu_seqlens", plan.cu_seqlens.at, plan.cu_seqlens.kind.size())?;
    if let Some(indices) = &plan.slots.state_indices {
        see("state_indices", indices.at, indices.kind.size())?;
    }
    if let Some(flags) = &plan.has_initial_state {
        see("has_initial_state", flags.at, flags.kind.size())?;
    }
    if let Some(conv) = plan.conv.as_ref().filter(|conv| !conv.state.sizes.contains(&0)) {
        see("conv_state", conv.state.at, conv.state.kind.size())?;
    }
    if let Some(recurrent) = plan.recurrent.as_ref().filter(|state| !state.state.sizes.contains(&0)) {
        see("recurrent_state", recurrent.state.at, recurrent.state.kind.size())?;
    }
    if let Some(kept) = plan.checkpoints.as_ref().filter(|kept| kept.recurrent_states.sizes[0] > 0) {
        see("checkpoints.starts", kept.starts.at, kept.starts.kind.size())?;
        let states = &kept.recurrent_states;
        see("checkpoints.recurrent_states", states.at, states.kind.size())?;
        if let Some(states) = kept.conv_states.as_ref().filter(|states| !states.sizes.contains(&0)) {
            see("checkpoints.conv_states", states.at, states.kind.size())?;
        }
    }
    Ok(())
}

/// What of a device decides the grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Profile {
    pub(crate) multiprocessors: u32,
    /// Bytes of shared memory that a block can have.
    pub(crate) shared: u32,
    /// Whether it has `wgmma`.
    pub(crate) wgmma: bool,
    /// Tests choose windows of few chunks, and the threads of a block of the scan and of the convolution.
    pub(crate) window: Option<usize>,
    pub(crate) threads: Option<u32>,
    pub(crate) convolve_threads: Option<u32>,
    /// How long sequences are cut into segments.
    pub(crate) cutting: Cutting,
}

impl Profile {
    pub(crate) fn of(gpu: &Gpu) -> Self {
        let info = gpu.info();
        Self {
            multiprocessors: info.multiprocessors,
            shared: info.shared_bytes_per_block,
            wgmma: Target::Sm90a.runs_on(info.compute_capability),
            window: None,
            threads: None,
            convolve_threads: None,
            cutting: if gpu.segments { Cutting::ByHeads } else { Cutting::Never },
        }
    }
}

/// Threads of a block of the convolution for so many chunks, heads of q, k and v, and features at most. The fewer, the more
/// tokens a thread has, one after the other: so the less there is to begin with, as long as no multiprocessor is idle.
fn convolve_threads(profile: Profile, chunks: u32, heads: u32, features: u32) -> u32 {
    let of_token = if features <= 128 { 16 } else { 32 };
    let room = u64::from(profile.multiprocessors.max(1)) * CONVOLVE_ROOM;
    let took = |threads: &u32| {
        let rounds = (u64::from(chunks) * u64::from(heads) * u64::from(*threads)).div_ceil(room);
        rounds * u64::from(CONVOLVE_BEGINS + CHUNK as u32 * of_token / threads)
    };
    CONVOLVE_CHOICE.into_iter().min_by_key(took).unwrap_or(CONVOLVE_THREADS)
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) kernel: &'static str,
    pub(crate) args: Args,
    pub(crate) blocks: u32,
    pub(crate) threads: u32,
    pub(crate) shared: u32,
    /// Blocks that run side by side.
    pub(crate) cluster: u32,
}

impl Step {
    /// # Safety
    /// That of [`Gpu::launch`], for a step of a job in its order.
    pub(crate) unsafe fn launch(self, gpu: &Gpu, stream: CUstream) -> Result<(), CudaError> {
        let function = gpu.kernels.kernel(gpu.context(), self.kernel)?;
        let Self { blocks, threads, shared, cluster, args, .. } = self;
        let launch = Launch { function, blocks: [blocks, 1, 1], threads, shared, cluster };
        // SAFETY: the kernels take one `Args`; the caller's promise.
        unsafe { gpu.launch(launch, args, stream) }
    }
}

/// The arguments of all windows, and the grids of one chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    /// The last window's chunks end before this one.
    chunks: u32,
    window: u32,
    /// The scratch memory of windows with even and odd numbers.
    slots: [Scratch; 2],
    args: Args,
    convolve: Step,
    prepare: Step,
    /// What makes the states that segments begin with.
    states: Option<[Step; 2]>,
    scan: Step,
    norm: Step,
    early_norm: bool,
}

/// Four elements of `size` bytes each can be read at once where all of these are multiples of them.
fn is_wide(size: u64, all: impl IntoIterator<Item = u64>) -> bool {
    all.into_iter().all(|number| number.is_multiple_of(4 * size))
}

fn no_tensor<const D: usize>() -> Strided<D> {
    Strided { address: 0, strides: [0; D], dtype: 0 }
}

/// Whether rows or columns of states, whichever are dense, can be read four at once.
fn is_wide_state(state: &Strided<4>, size: u64) -> bool {
    let [of_slot, of_head, of_row, of_column] = state.strides;
    let other = if of_column == size { of_row } else { of_column };
    is_wide(size, [state.address, of_slot, of_head, other]) && (of_row == size || of_column == size)
}

impl Job {
    /// `None` for no sequences: there is nothing to launch.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for what this backend does not take, [`CudaError::TooManySequences`].
    pub(crate) fn new(
        plan: &Plan<DeviceAddress>,
        (at, scratch_bytes): (DeviceAddress, usize),
        profile: Profile,
    ) -> Result<Option<Self>, CudaError> {
        let (tokens, num_sequences) = (&plan.tokens, plan.slots.num_sequences);
        let layer = &tokens.layer;
        prefill_supports(layer)?;
        named(plan, aligned)?;
        let chunks = chunks(tokens.num_tokens, num_sequences);
        let lens = [tokens.num_tokens, num_sequences];
        let (window, slots, mut segments, bytes) = memory(layer, at.0, lens, profile.window, profile.cutting);
        if (scratch_bytes as u64) < bytes {
            return Err(ArgumentError::Length {
                argument: "scratch",
                unit: "bytes",
                got: scratch_bytes,
                expected: bytes as usize,
                because: Because::Op,
            }
            .into());
        }
        if !at.0.is_multiple_of(256) {
            let (got, expected) = (format!("at address {:#x}", at.0), "at a multiple of 256".to_owned());
            return Err(ArgumentError::Value { argument: "scratch", got, expected }.into());
        }
        if num_sequences == 0 {
            return Ok(None);
        }
        let heads = layer.heads();
        let (hk, hv, ratio) = (heads.num_k_heads(), heads.num_v_heads(), heads.ratio());
        let too_many = || CudaError::TooManySequences { num_sequences, num_k_heads: hk };
        let count =
            |number: Option<usize>| number.and_then(|n| u32::try_from(n).ok()).filter(|n| *n < 1 << 31);
        let number = |number: usize| count(Some(number)).ok_or_else(too_many);
        // Features of a row, so of all channels, have 31 bits with room to spare.
        number(heads.qkvz_features().saturating_mul(2))?;
        let (dk, dv) = (heads.head_k_dim() as u32, heads.head_v_dim() as u32);
        let room = |rows: u32, by_group, stages| ScanRoom::all(dk, rows / SLICE, by_group, stages);
        let has = |rows: u32, by_group, stages| {
            dv.is_multiple_of(rows) && room(rows, by_group, stages) <= profile.shared
        };
        let halves = count((hv * heads.head_v_dim() / SLICE as usize).checked_mul(num_sequences));
        // Whether scans run beside the other windows' kernels.
        let has_side = window < chunks;
        let can_group = profile.wgmma && dk <= MOST_BY_GROUP && has(GROUP_ROWS, true, GROUP_STAGES);
        // Four warps multiply together where the device can and there are rows for them: that is faster however
        // few blocks there are. Otherwise as few blocks as multiprocessors have half the rows each, and twice as
        // many run side by side; where there are other kernels to run beside them, as few as a quarter. Of long
        // keys blocks of all rows are as good with room for the next chunk.
        let threads = profile.threads.unwrap_or_else(|| {
            let most = if has_side { profile.multiprocessors / 4 } else { profile.multiprocessors };
            let is_few = segments.is_cut == 0 && halves.is_some_and(|halves| halves <= most);
            let has_next = dk > MOST_BY_GROUP && has(2 * SLICE, false, 2);
            if is_few && !can_group && !has_next { 128 } else { 256 }
        });
        let by_group = can_group && threads > 128;
        let threads = if by_group || has(2 * SLICE, false, 1) { threads } else { 128 };
        let rows = if by_group { GROUP_ROWS } else { threads / 128 * SLICE };
        let slices = dv / rows;
        let groups = segments::groups(&segments, num_sequences, chunks, window);
        let scan_blocks = count((hv * slices as usize).checked_mul(groups)).ok_or_else(too_many)?;
        let grids = match segments.is_cut {
            0 => None,
            _ => {
                let lens = [num_sequences, chunks, window];
                Some(
                    segments::grids(&mut segments, layer, lens, profile.shared, profile.wgmma)
                        .ok_or_else(too_many)?,
                )
            }
        };
        let (chunks, window) = (number(chunks)?, number(window)?);
        count((window as usize).checked_mul(2 * hk + hv)).ok_or_else(too_many)?;
        let fits = |stages: &u32| room(rows, by_group, *stages) <= profile.shared;
        let stages = if by_group { GROUP_STAGES } else { [3, 2].into_iter().find(fits).unwrap_or(1) };
        let divisor = |number: u32| Divisor::new(number).ok_or_else(too_many);
        let element = tokens.q.dtype.size() as u64;
        let fields = [&tokens.q, &tokens.k, &tokens.v, &tokens.z].map(field);
        let [q, k, v, z] = fields;
        let weight = strided(&tokens.conv_weight);
        let tap = tokens.conv_weight.kind.size() as u64;
        let wide = is_wide(element, fields.iter().flat_map(|f| [f.address, f.row_stride, f.head_step]))
            && is_wide(tap, [weight.address, weight.strides[0]])
            && weight.strides[1] == tap
            && layer.conv_width == TAPS as usize;
        let (out, out_element) = (strided(&tokens.out), tokens.out.kind.size() as u64);
        let [of_row, of_head, of_column] = out.strides;
        // How many times four elements can be moved at once.
        let width = |size: u64, all: &[u64]| {
            [2, 1].into_iter().find(|width| is_wide(size * width, all.iter().copied())).unwrap_or(0) as u32
        };
        let wide_z = width(element, &[z.address, z.row_stride, z.head_step]);
        let wide_out =
            if of_column == out_element { width(out_element, &[out.address, of_row, of_head]) } else { 0 };
        let state = plan.recurrent.as_ref().map(|recurrent| &recurrent.state);
        let conv = plan.conv.as_ref().map(|conv| &conv.state);
        let kept = plan.checkpoints.as_ref().filter(|kept| kept.recurrent_states.sizes[0] > 0);
        let windows = kept.and_then(|kept| kept.conv_states.as_ref());
        let wide_state = |state: &Strided<4>, size: usize| u32::from(is_wide_state(state, size as u64));
        let columns = |columns: Option<usize>| number(columns.unwrap_or(0));
        let args = Args {
            num_tokens: tokens.num_tokens as u64,
            num_sequences: number(num_sequences)?,
            first_chunk: 0,
            end_chunk: 0,
            num_k_heads: divisor(hk as u32)?,
            num_v_heads: divisor(hv as u32)?,
            all_heads: divisor((2 * hk + hv) as u32)?,
            key_words: divisor(dk / 8)?,
            slices: divisor(slices)?,
            head_k_dim: divisor(dk)?,
            group_v_dim: divisor(ratio as u32 * dv)?,
            ratio: divisor(ratio as u32)?,
            dk,
            dv,
            conv_width: layer.conv_width as u32,
            stages,
            sigmoid: u32::from(layer.gate == Gate::Sigmoid),
            wide: u32::from(wide),
            wide_z,
            wide_out,
            wide_state: state.map_or(0, |state| wide_state(&strided(state), state.kind.size())),
            wide_checkpoints: kept.map_or(0, |kept| {
                wide_state(&strided(&kept.recurrent_states), kept.recurrent_states.kind.size())
            }),
            l2norm_eps: layer.l2norm_eps,
            norm_eps: layer.norm_eps,
            scale: layer.scale,
            beta_scale: layer.beta_scale,
            pad_slot_id: plan.slots.pad_slot_id,
            cu_seqlens: indices(Some(&plan.cu_seqlens)),
            has_initial_state: indices(plan.has_initial_state.as_ref()),
            state_indices: indices(plan.slots.state_indices.as_ref()),
            q,
            k,
            v,
            z,
            b: field(&tokens.b),
            a: field(&tokens.a),
            conv_weight: weight,
            conv_bias: tokens.conv_bias.as_ref().map(vector).unwrap_or_default(),
            A_log: vector(&tokens.A_log),
            dt_bias: vector(&tokens.dt_bias),
            norm_weight: vector(&tokens.norm_weight),
            out,
            conv_state: conv.map_or_else(no_tensor, strided),
            conv_slots: conv.map_or(0, |conv| conv.sizes[0] as i64),
            conv_columns: columns(conv.map(|conv| conv.sizes[2]))?,
            has_checkpoints: u32::from(kept.is_some()),
            every: divisor(number(kept.map_or(1, |kept| kept.every / CHUNK))?)?,
            state: state.map_or_else(no_tensor, strided),
            slots: state.map_or(0, |state| state.sizes[0] as i64),
            starts: kept.map_or_else(Indices::default, |kept| indices(Some(&kept.starts))),
            checkpoints: kept.map_or_else(no_tensor, |kept| strided(&kept.recurrent_states)),
            windows: windows.map_or_else(no_tensor, strided),
            checkpoint_slots: kept.map_or(0, |kept| kept.recurrent_states.sizes[0] as i64),
            window_columns: columns(windows.map(|windows| windows.sizes[2]))?,
            scratch: slots[0],
            segments,
        };
        let by_16_bytes = wide
            && element == 2
            && is_wide(element * 2, fields.iter().flat_map(|f| [f.address, f.row_stride, f.head_step]))
            && tokens.conv_bias.is_none();
        let all_heads = (2 * hk + hv) as u32;
        let convolve_threads = match profile.convolve_threads {
            _ if !by_16_bytes => CONVOLVE_THREADS,
            Some(threads) => threads,
            None => {
                let likely = number(likely_chunks(tokens.num_tokens, num_sequences))?;
                convolve_threads(profile, window.min(likely), all_heads, dk.max(dv))
            }
        };
        let (kernel, shared) = match dk.max(dv) {
            _ if !by_16_bytes => ("gdn_prefill_convolve_any", 0),
            ..=128 if convolve_threads == CONVOLVE_AHEAD_THREADS => {
                ("gdn_prefill_convolve_128_ahead", CONVOLVE_AHEAD_THREADS * CONVOLVE_BYTES)
            }
            ..=128 => ("gdn_prefill_convolve_128", 0),
            _ => ("gdn_prefill_convolve_256", 0),
        };
        let convolve =
            Step { kernel, args, blocks: all_heads, threads: convolve_threads, shared, cluster: 1 };
        let prepare = Step {
            kernel: "gdn_prefill_prepare",
            args,
            blocks: hk as u32,
            threads: PREPARE_THREADS,
            shared: PrepareRoom::new(dk, ratio as u32).bytes,
            cluster: 1,
        };
        let kernel = match (dk, by_group) {
            (64, false) => "gdn_prefill_scan_64",
            (96, false) => "gdn_prefill_scan_96",
            (128, false) => "gdn_prefill_scan_128",
            (192, false) => "gdn_prefill_scan_192",
            (_, false) => "gdn_prefill_scan_256",
            (64, true) => "gdn_prefill_scan_group_64",
            (96, true) => "gdn_prefill_scan_group_96",
            (_, true) => "gdn_prefill_scan_group_128",
        };
        let shared = room(rows, by_group, stages);
        let threads = if by_group { GROUP_THREADS } else { threads };
        // A block of the scan takes up to a sixth longer beside another kernel's on the other multiprocessor of
        // its pair than beside one of its own kind. Two of a cluster get such a pair.
        let cluster = if by_group && has_side && scan_blocks.is_multiple_of(2) { 2 } else { 1 };
        let scan = Step { kernel, args, blocks: scan_blocks, threads, shared, cluster };
        // Where all blocks of the norm find room at once they may begin early, but on the multiprocessors that the
        // scan leaves free no more of them than on any when they are shared out: the others would have nothing to
        // do in the end.
        let of_one = (u64::from(chunks) * hv as u64).div_ceil(u64::from(profile.multiprocessors.max(1)));
        let early_norm = !has_side && of_one <= NORM_ROOM;
        let least = if early_norm { (profile.shared / of_one as u32 - RESERVED) & !15 } else { 0 };
        let norm = Step {
            kernel: "gdn_prefill_norm",
            args,
            blocks: hv as u32,
            threads: THREADS,
            shared: norm_bytes(dv).max(least),
            cluster: 1,
        };
        let states = grids.map(|grids| {
            grids.map(|Grid { kernel, blocks, threads, shared }| Step {
                kernel,
                args,
                blocks,
                threads,
                shared,
                cluster: 1,
            })
        });
        for step in [convolve, prepare, scan, norm].into_iter().chain(states.into_iter().flatten()) {
            if step.shared > profile.shared {
                let expected = format!(
                    "heads that take at most {} bytes of shared memory a block, these take {}",
                    profile.shared, step.shared
                );
                let got = heads.to_string();
                return Err(ArgumentError::Value { argument: "layout", got, expected }.into());
            }
        }
        Ok(Some(Self { chunks, window, slots, args, convolve, prepare, states, scan, norm, early_norm }))
    }

    /// The windows' launches, in an order in which each finds done what it needs. A window's norm comes
    /// behind the next one's scan, which may then run beside it, and beside the kernels that make the window
    /// after that.
    pub(crate) fn steps(&self) -> impl Iterator<Item = (Stage, Step)> + '_ {
        let count = self.chunks.div_ceil(self.window);
        let norm_of = move |w: u32| (Stage::Norm(w), w);
        (0..count).flat_map(move |w| {
            let before = w.checked_sub(1).map(norm_of);
            let last = (w + 1 == count).then(|| norm_of(w));
            let states = [Stage::States(0), Stage::States(1)].map(|stage| Some((stage, w)));
            let [first, second] = if self.states.is_some() { states } else { [None; 2] };
            [
                Some((Stage::Convolve, w)),
                Some((Stage::Prepare, w)),
                first,
                second,
                Some((Stage::Scan(w), w)),
                before,
                last,
            ]
            .into_iter()
            .flatten()
            .map(|(stage, w)| (stage, self.step(stage, w)))
        })
    }

    fn step(&self, stage: Stage, w: u32) -> Step {
        let first_chunk = w * self.window;
        let end_chunk = first_chunk.saturating_add(self.window).min(self.chunks);
        let segments = if w.is_multiple_of(2) { self.args.segments } else { self.args.segments.next() };
        let args =
            Args { first_chunk, end_chunk, scratch: self.slots[w as usize % 2], segments, ..self.args };
        let of_chunks = |step: Step| Step { args, blocks: step.blocks * (end_chunk - first_chunk), ..step };
        match stage {
            Stage::Convolve => of_chunks(self.convolve),
            Stage::Prepare => of_chunks(self.prepare),
            Stage::States(i) => Step { args, ..self.states.map_or(self.scan, |steps| steps[i]) },
            Stage::Scan(_) => Step { args, ..self.scan },
            Stage::Norm(_) => of_chunks(self.norm),
        }
    }

    /// The same, and whether each may begin before the last one on the caller's stream is done.
    pub(crate) fn launches(&self) -> impl Iterator<Item = (Stage, Step, bool)> + '_ {
        let mut last = None;
        self.steps().map(move |(stage, step)| {
            let early = self.may_overlap(last, stage);
            if !self.is_on_side(stage) {
                last = Some(stage);
            }
            (stage, step, early)
        })
    }

    /// The first begins when all before it is done. Where all are on one stream, each waits for what the one
    /// before writes; a norm of many blocks had better begin when the scan is done. Where scans are on another,
    /// a preparation waits so, too, and a convolution needs nothing of a preparation: it had better come before
    /// scans that take most of the device, which wait for all of it to be free, and not before others, which it
    /// would keep out.
    fn may_overlap(&self, last: Option<Stage>, stage: Stage) -> bool {
        match (last, stage) {
            (None, _) => false,
            (_, Stage::Norm(_)) => self.early_norm,
            _ if !self.has_side() => true,
            (Some(Stage::Convolve), Stage::Prepare) => true,
            (Some(Stage::Prepare), Stage::Convolve) => self.scan.blocks as usize > SOME_BLOCKS,
            _ => false,
        }
    }

    /// Whether scans go on a stream beside the caller's.
    fn has_side(&self) -> bool {
        self.window < self.chunks
    }

    /// Whether a launch goes there.
    pub(crate) fn is_on_side(&self, stage: Stage) -> bool {
        self.has_side() && matches!(stage, Stage::States(_) | Stage::Scan(_))
    }

    /// Launches all: where there are several windows, their scans on a stream beside the caller's.
    ///
    /// # Safety
    /// That of [`Gpu::launch`], for the memory of the arguments.
    pub(super) unsafe fn launch(&self, gpu: &Gpu, stream: CUstream) -> Result<(), CudaError> {
        let sides = &gpu.kernels.sides;
        let side = if self.has_side() { Some(sides.take(gpu.info().ordinal, stream)?) } else { None };
        let ordinary = gpu.clone().programmatic(false);
        let mut launched = Ok(());
        for (stage, step, early) in self.launches() {
            let gpu = if early { gpu } else { &ordinary };
            // SAFETY: the caller's promise.
            launched = unsafe { stage.launch(step, gpu, stream, side.as_ref()) };
            if launched.is_err() {
                break;
            }
        }
        if let Some(side) = side {
            if launched.is_err() {
                // The memory may be freed when the caller's stream has come here: it waits for what was
                // launched.
                let _ = side.mark(0).and_then(|()| side.join(0));
            }
            sides.give_back(side);
        }
        launched
    }
}

/// What a launch does, of which window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Convolve,
    Prepare,
    /// What segments begin with, in two launches.
    States(usize),
    Scan(u32),
    Norm(u32),
}

impl Stage {
    /// # Safety
    /// That of [`Job::launch`].
    unsafe fn launch(
        self,
        step: Step,
        gpu: &Gpu,
        stream: CUstream,
        side: Option<&Side>,
    ) -> Result<(), CudaError> {
        match (self, side) {
            (Self::States(_), Some(side)) => {
                side.fork()?;
                // SAFETY: the caller's promise.
                unsafe { step.launch(gpu, side.stream()) }
            }
            (Self::Scan(w), Some(side)) => {
                side.fork()?;
                // SAFETY: the caller's promise.
                unsafe { step.launch(gpu, side.stream()) }?;
                side.mark(w as usize)
            }
            (Self::Norm(w), Some(side)) => {
                side.join(w as usize)?;
                // SAFETY: as above.
                unsafe { step.launch(gpu, stream) }
            }
            // SAFETY: as above.
            _ => unsafe { step.launch(gpu, stream) },
        }
    }
}
