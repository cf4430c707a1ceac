//! Everything between a layer's two GEMMs on candle's tensors, on the CPU and without a copy.

use std::cell::RefCell;

use candle_core::{
    CpuStorage, D, DType, Device, Error, IndexOp, InplaceOp1, Layout, Result, Storage, Tensor, WithDType,
    bail,
};
use gdn::{
    ConvState, Cpu, Decode, Exclusive, Indices, Keep, Packed, Packing, Prefill, Projections, RecurrentState,
    Slots, Weights,
};
use half::bf16;

/// A layer and its weights in f32.
struct Layer {
    layer: gdn::Layer,
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
enum Op<'a> {
    /// A token of each sequence.
    Decode,
    /// New sequences, one behind the other, by where each begins.
    Prefill { cu_seqlens: &'a [i64] },
}

impl Layer {
    /// Dense bf16 `mixed_qkvz` `[N, ..]` and `mixed_ba` `[N, 2*HV]` to `[N, HV, DV]`. The states in the
    /// `slots` of the sequences are brought up to date; a negative slot is padding.
    fn run(&self, op: Op, qkvz: &Tensor, ba: &Tensor, states: &States, slots: &[i64]) -> Result<Tensor> {
        let heads = self.layer.heads();
        let (n, hv, dk, dv) = (qkvz.dim(0)?, heads.num_v_heads(), heads.head_k_dim(), heads.head_v_dim());
        let mut out = vec![bf16::ZERO; n * hv * dv];

        let tensors = [qkvz, ba, &self.conv, &self.a_log, &self.dt_bias, &self.norm];
        let [qkvz, ba, conv, a_log, dt_bias, norm] = tensors.map(Tensor::storage_and_layout);
        let projections = Projections::Packed(Packed {
            mixed_qkvz: view(elements::<bf16>(&qkvz)?, [n, heads.qkvz_features()])?,
            mixed_ba: view(elements::<bf16>(&ba)?, [n, heads.ba_features()])?,
        });
        let weights = Weights {
            conv_weight: view(elements::<f32>(&conv)?, [self.layer.conv_channels(), 4])?,
            conv_bias: None,
            A_log: view(elements::<f32>(&a_log)?, [hv])?,
            dt_bias: view(elements::<f32>(&dt_bias)?, [hv])?,
            norm_weight: view(elements::<f32>(&norm)?, [dv])?,
        };
        let indices = Indices::new(slots, [slots.len(), 1]).map_err(Error::wrap)?;
        let fresh = vec![0u8; slots.len()];

        let all = states.conv.dim(0)?;
        change(&states.conv, |conv| {
            let mut conv = Some(conv);
            change(&states.recurrent, |recurrent| {
                let conv = conv.take().unwrap_or_default();
                let sizes = [all, self.layer.conv_channels(), 4];
                let conv = gdn::Tensor::new_mut(conv, sizes).map_err(Error::wrap)?;
                // DV is dense here; the op asks for [slots, HV, DV, DK] by its sizes.
                let (sizes, strides) = ([all, hv, dv, dk], [hv * dk * dv, dk * dv, 1, dv]);
                let recurrent =
                    gdn::Tensor::with_strides_mut(recurrent, sizes, strides).map_err(Error::wrap)?;
                let out: gdn::Tensor<Exclusive, 3> =
                    gdn::Tensor::new_mut(&mut out, [n, hv, dv]).map_err(Error::wrap)?;
                let (layer, slots, cpu) = (self.layer, Slots::of(indices), Cpu::new());
                match op {
                    Op::Decode => gdn::decode(
                        &mut Decode {
                            layer,
                            tokens_per_sequence: 1,
                            projections,
                            weights,
                            conv_state: ConvState { state: conv, keep: Keep::Last },
                            recurrent_state: RecurrentState { state: recurrent, keep: Keep::Last },
                            slots,
                            num_accepted_tokens: None,
                            out,
                        },
                        &cpu,
                    ),
                    Op::Prefill { cu_seqlens } => gdn::prefill(
                        &mut Prefill {
                            layer,
                            cu_seqlens: Indices::new(cu_seqlens, [cu_seqlens.len()]).map_err(Error::wrap)?,
                            projections,
                            weights,
                            conv_state: Some(conv),
                            recurrent_state: Some(recurrent),
                            slots,
                            has_initial_state: Some(
                                Indices::new(&fresh, [fresh.len()]).map_err(Error::wrap)?,
                            ),
                            checkpoints: None,
                            out,
                        },
                        &cpu,
                    ),
                }
                .map_err(Error::wrap)
            })
        })?;
        Tensor::from_vec(out, (n, hv, dv), &Device::Cpu)
    }
}

/// An op in place, on the elements of a dense tensor of f32.
struct Change<F>(RefCell<F>);

impl<F: FnMut(&mut [f32]) -> Result<()>> InplaceOp1 for Change<F> {
    fn name(&self) -> &'static str {
        "gdn"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(all) = storage else { bail!("a state must be f32") };
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("a state must be contiguous") };
        (self.0.borrow_mut())(&mut all[from..to])
    }
}

fn change(tensor: &Tensor, f: impl FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&Change(RefCell::new(f)))
}

/// The elements of a dense tensor on the CPU.
fn elements<'a, T: WithDType>(
    (storage, layout): &'a (impl std::ops::Deref<Target = Storage>, &Layout),
) -> Result<&'a [T]> {
    let Storage::Cpu(storage) = &**storage else { bail!("not on the CPU") };
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("not contiguous") };
    Ok(&storage.as_slice::<T>()?[from..to])
}

fn view<T: gdn::Element, const N: usize>(
    data: &[T],
    sizes: [usize; N],
) -> Result<gdn::Tensor<gdn::Shared<'_>, N>> {
    gdn::Tensor::new(data, sizes).map_err(Error::wrap)
}

fn main() -> Result<()> {
    let heads = gdn::Heads::preset("Qwen3-Next-80B-A3B").map_err(Error::wrap)?;
    let layer = gdn::Layer::new(gdn::Layout::new(heads, Packing::Interleaved));
    let (hv, dk, dv) = (heads.num_v_heads(), heads.head_k_dim(), heads.head_v_dim());
    let random = |shape: &[usize]| Tensor::randn(0f32, 1f32, shape, &Device::Cpu);
    let layer = Layer {
        layer,
        conv: (random(&[layer.conv_channels(), 4])? * 0.3)?,
        a_log: random(&[hv])?,
        dt_bias: random(&[hv])?,
        norm: random(&[dv])?,
    };
    let states = || -> Result<States> {
        Ok(States {
            conv: random(&[4, layer.layer.conv_channels(), 4])?,
            recurrent: random(&[4, hv, dk, dv])?,
        })
    };

    // Sequences of 40 and 7 tokens in slots 2 and 0, and one token more of each.
    let qkvz = random(&[49, heads.qkvz_features()])?.to_dtype(DType::BF16)?;
    let ba = random(&[49, heads.ba_features()])?.to_dtype(DType::BF16)?;
    let rows = |of: &Tensor, ranges: [std::ops::Range<usize>; 2]| {
        Tensor::cat(&[of.i(ranges[0].clone())?, of.i(ranges[1].clone())?], 0)
    };
    let (slots, whole, in_steps) = ([2, 0], states()?, states()?);
    let all = layer.run(Op::Prefill { cu_seqlens: &[0, 41, 49] }, &qkvz, &ba, &whole, &slots)?;
    let most = [0..40, 41..48];
    let (most_qkvz, most_ba) = (rows(&qkvz, most.clone())?, rows(&ba, most)?);
    layer.run(Op::Prefill { cu_seqlens: &[0, 40, 47] }, &most_qkvz, &most_ba, &in_steps, &slots)?;
    let last = [40..41, 48..49];
    let found =
        layer.run(Op::Decode, &rows(&qkvz, last.clone())?, &rows(&ba, last.clone())?, &in_steps, &slots)?;

    let off = |found: &Tensor, expected: &Tensor| -> Result<f32> {
        let difference = found.to_dtype(DType::F32)?.sub(&expected.to_dtype(DType::F32)?)?;
        difference.abs()?.flatten_all()?.max(D::Minus1)?.to_scalar::<f32>()
    };
    let expected = rows(&all, last)?;
    let (out, state) = (off(&found, &expected)?, off(&in_steps.recurrent.i(2)?, &whole.recurrent.i(2)?)?);
    println!("decode behind prefill, and prefill alone: the output is off by {out}, the state by {state}");
    if out > 0.05 || state > 1e-4 {
        bail!("they should be the same but for rounding");
    }
    Ok(())
}
