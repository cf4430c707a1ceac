//! Everything between a layer's two GEMMs on candle's CUDA tensors: candle's memory and stream, no copy.

use std::{cell::RefCell, ops::Deref};

use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, DType, Device, Error, InplaceOp1, Layout, Result, Storage, Tensor,
    bail, cuda_backend::CudaDType, op::BackpropOp,
};
use gdn::{
    ConvState, Decode, Indices, Keep, Packed, Packing, Prefill, Projections, RecurrentState, Slots, Weights,
    cuda::{
        self, Gpu,
        cudarc::driver::{CudaView, CudaViewMut},
    },
};
use half::bf16;

/// A layer and its weights in f32, on a GPU.
struct Layer {
    layer: gdn::Layer,
    device: CudaDevice,
    gpu: Gpu,
    /// `[C, 4]`
    conv: Tensor,
    /// `[HV]`
    a_log: Tensor,
    /// `[HV]`
    dt_bias: Tensor,
    /// `[DV]`
    norm: Tensor,
}

/// The states of all slots, in f32, as mistral.rs has them.
struct States {
    /// `[slots, C, 4]`
    conv: Tensor,
    /// `[slots, HV, DK, DV]`
    recurrent: Tensor,
}

/// What is to be done with the rows of the projections.
#[derive(Clone, Copy)]
enum Op<'a> {
    /// A token of each sequence.
    Decode,
    /// New sequences, one behind the other: i64 `[B + 1]`, where each begins, on the GPU too.
    Prefill { cu_seqlens: &'a Tensor },
}

impl Layer {
    /// Dense bf16 `mixed_qkvz` `[N, ..]` and `mixed_ba` `[N, 2*HV]` to `[N, HV, DV]`. The states in the
    /// `slots` of the sequences, i64 `[B]`, are brought up to date; a negative slot is padding.
    fn run(&self, op: Op, qkvz: &Tensor, ba: &Tensor, states: &States, slots: &Tensor) -> Result<Tensor> {
        let (gpu, heads) = (&self.gpu, self.layer.heads());
        let (n, hv, dk, dv) = (qkvz.dim(0)?, heads.num_v_heads(), heads.head_k_dim(), heads.head_v_dim());
        let (b, all) = (slots.dim(0)?, states.conv.dim(0)?);
        // SAFETY: both ops write every row of the sequences, which are all rows.
        let mut out = unsafe { self.device.alloc::<bf16>(n * hv * dv) }?;
        // SAFETY: the kernels write what they read of it.
        let scratch = |bytes: usize| unsafe { self.device.alloc::<u8>(bytes) };
        let fresh = self.device.alloc_zeros::<u8>(b)?;

        let tensors = [qkvz, ba, &self.conv, &self.a_log, &self.dt_bias, &self.norm, slots];
        let [qkvz, ba, conv, a_log, dt_bias, norm, slots] = tensors.map(Tensor::storage_and_layout);
        let (qkvz, ba, slots) = (slice::<bf16>(&qkvz)?, slice::<bf16>(&ba)?, slice::<i64>(&slots)?);
        let [conv, a_log] = [slice::<f32>(&conv)?, slice::<f32>(&a_log)?];
        let [dt_bias, norm] = [slice::<f32>(&dt_bias)?, slice::<f32>(&norm)?];
        let projections = Projections::Packed(Packed {
            mixed_qkvz: wrap(gdn::Tensor::on(&qkvz, [n, heads.qkvz_features()], None, gpu))?,
            mixed_ba: wrap(gdn::Tensor::on(&ba, [n, heads.ba_features()], None, gpu))?,
        });
        let channels = self.layer.conv_channels();
        let weights = Weights {
            conv_weight: wrap(gdn::Tensor::on(&conv, [channels, 4], None, gpu))?,
            conv_bias: None,
            A_log: wrap(gdn::Tensor::on(&a_log, [hv], None, gpu))?,
            dt_bias: wrap(gdn::Tensor::on(&dt_bias, [hv], None, gpu))?,
            norm_weight: wrap(gdn::Tensor::on(&norm, [dv], None, gpu))?,
        };
        let slots = Slots::of(wrap(Indices::on(&slots, [b, 1], None, gpu))?);
        let mut rest = Some((projections, weights, slots, &mut out));
        change(&states.conv, |mut conv| {
            change(&states.recurrent, |mut recurrent| {
                let Some((projections, weights, slots, out)) = rest.take() else { bail!("called twice") };
                let conv = wrap(gdn::Tensor::on_mut(&mut conv, [all, channels, 4], None, gpu))?;
                // DV is dense here; the op asks for [slots, HV, DV, DK] by its sizes.
                let (sizes, strides) = ([all, hv, dv, dk], [hv * dk * dv, dk * dv, 1, dv]);
                let recurrent = wrap(gdn::Tensor::on_mut(&mut recurrent, sizes, Some(strides), gpu))?;
                let out = wrap(gdn::Tensor::on_mut(out, [n, hv, dv], None, gpu))?;
                match op {
                    Op::Decode => {
                        let mut call = Decode {
                            layer: self.layer,
                            tokens_per_sequence: 1,
                            projections,
                            weights,
                            conv_state: ConvState { state: conv, keep: Keep::Last },
                            recurrent_state: RecurrentState { state: recurrent, keep: Keep::Last },
                            slots,
                            num_accepted_tokens: None,
                            out,
                        };
                        cuda::decode(&mut call, gpu).map_err(Error::wrap)
                    }
                    Op::Prefill { cu_seqlens } => {
                        let cu_seqlens = cu_seqlens.storage_and_layout();
                        let cu_seqlens = slice::<i64>(&cu_seqlens)?;
                        let mut call = Prefill {
                            layer: self.layer,
                            cu_seqlens: wrap(Indices::on(&cu_seqlens, [b + 1], None, gpu))?,
                            projections,
                            weights,
                            conv_state: Some(conv),
                            recurrent_state: Some(recurrent),
                            slots,
                            has_initial_state: Some(wrap(Indices::on(&fresh, [b], None, gpu))?),
                            checkpoints: None,
                            out,
                        };
                        let mut scratch = scratch(cuda::prefill_scratch_bytes(&self.layer, n, b))?;
                        cuda::prefill(&mut call, &mut scratch, gpu).map_err(Error::wrap)
                    }
                }
            })
        })?;
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, self.device.clone()));
        Ok(Tensor::from_storage(storage, (n, hv, dv), BackpropOp::none(), false))
    }
}

fn wrap<T>(made: std::result::Result<T, gdn::ArgumentError>) -> Result<T> {
    made.map_err(Error::wrap)
}

/// An op in place, on the elements of a dense tensor of f32.
struct Change<F>(RefCell<F>);

impl<F: FnMut(CudaViewMut<'_, f32>) -> Result<()>> InplaceOp1 for Change<F> {
    fn name(&self) -> &'static str {
        "gdn"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("not on a GPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("a state must be contiguous") };
        (self.0.borrow_mut())(storage.as_cuda_slice_mut::<f32>()?.slice_mut(from..to))
    }
}

fn change(tensor: &Tensor, f: impl FnMut(CudaViewMut<'_, f32>) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&Change(RefCell::new(f)))
}

/// The elements of a dense tensor on a GPU.
fn slice<'a, T: CudaDType>(
    (storage, layout): &'a (impl Deref<Target = Storage>, &Layout),
) -> Result<CudaView<'a, T>> {
    let Storage::Cuda(storage) = &**storage else { bail!("not on a GPU") };
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("not contiguous") };
    Ok(storage.as_cuda_slice::<T>()?.slice(from..to))
}

fn main() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let heads = gdn::Heads::preset("Qwen3-Next-80B-A3B").map_err(Error::wrap)?;
    let layer = gdn::Layer::new(gdn::Layout::new(heads, Packing::Interleaved));
    let (hv, dk, dv) = (heads.num_v_heads(), heads.head_k_dim(), heads.head_v_dim());
    let random = |size: f64, shape: &[usize]| Tensor::randn(0f64, size, shape, &Device::Cpu);
    let numbers = |size, shape: &[usize]| random(size, shape)?.to_dtype(DType::F32)?.to_device(&device);
    let cuda = device.as_cuda_device()?;
    let layer = Layer {
        layer,
        device: cuda.clone(),
        gpu: Gpu::on(&cuda.cuda_stream()).map_err(Error::wrap)?,
        conv: numbers(0.3, &[layer.conv_channels(), 4])?,
        a_log: numbers(1.0, &[hv])?,
        dt_bias: numbers(1.0, &[hv])?,
        norm: numbers(1.0, &[dv])?,
    };
    let states = || -> Result<States> {
        Ok(States {
            conv: numbers(1.0, &[4, layer.layer.conv_channels(), 4])?,
            recurrent: numbers(1.0, &[4, hv, dk, dv])?,
        })
    };

    // Sequences of 40 and 7 tokens in slots 2 and 0, and one token more of each.
    let qkvz = random(1.0, &[49, heads.qkvz_features()])?.to_dtype(DType::BF16)?;
    let ba = random(1.0, &[49, heads.ba_features()])?.to_dtype(DType::BF16)?;
    let rows = |of: &Tensor, ranges: [std::ops::Range<usize>; 2]| {
        let parts = ranges.map(|range| of.narrow(0, range.start, range.len()));
        let [first, second] = parts;
        Tensor::cat(&[first?, second?], 0)
    };
    let there = |of: &Tensor, ranges: [std::ops::Range<usize>; 2]| rows(of, ranges)?.to_device(&device);
    let begins = |entries: [i64; 3]| Tensor::new(&entries, &device);
    let slots = Tensor::new(&[2i64, 0], &device)?;
    let (whole, in_steps) = (states()?, states()?);
    let op = Op::Prefill { cu_seqlens: &begins([0, 41, 49])? };
    let all = layer.run(op, &qkvz.to_device(&device)?, &ba.to_device(&device)?, &whole, &slots)?;
    let most = [0..40, 41..48];
    let op = Op::Prefill { cu_seqlens: &begins([0, 40, 47])? };
    layer.run(op, &there(&qkvz, most.clone())?, &there(&ba, most)?, &in_steps, &slots)?;
    let last = [40..41, 48..49];
    let (last_qkvz, last_ba) = (there(&qkvz, last.clone())?, there(&ba, last.clone())?);
    let found = layer.run(Op::Decode, &last_qkvz, &last_ba, &in_steps, &slots)?;

    // The norm of the difference as a share of the norm.
    let off = |found: &Tensor, expected: &Tensor| -> Result<f64> {
        let [found, expected] =
            [found, expected].map(|all| all.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all());
        let (found, expected) = (found?, expected?);
        let norm = |of: &Tensor| of.sqr()?.sum_all()?.to_scalar::<f64>();
        Ok((norm(&(found - &expected)?)? / norm(&expected)?).sqrt())
    };
    let expected = rows(&all.to_device(&Device::Cpu)?, last)?;
    let slot = |states: &States| states.recurrent.to_device(&Device::Cpu)?.narrow(0, 2, 1);
    let (out, state) = (off(&found, &expected)?, off(&slot(&in_steps)?, &slot(&whole)?)?);
    println!(
        "decode behind prefill, and prefill alone: the output is off by {out:.1e}, the state by {state:.1e}"
    );
    if !(out < 1e-2 && state < 2e-3) {
        bail!("they should be the same but for rounding");
    }
    Ok(())
}
