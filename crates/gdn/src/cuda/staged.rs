//! Calls of the layer's ops on the host's memory, copied to a GPU and back: for tools. The copies take far
//! longer than any op.

use std::{marker::PhantomData, mem::MaybeUninit};

use cudarc::driver::{CudaSlice, DevicePtr, sys};

use super::{
    device::Gpu,
    error::{CudaError, driver},
    prefill::{prefill_scratch_bytes, prefill_supports},
};
use crate::{
    decode::{self, Decode},
    layer::{Projections, Weights},
    prefill::{self, Checkpoints, Prefill},
    state::{ConvState, Keep, RecurrentState, Slots},
    tensor::{Exclusive, Indices, Operand, Shared, Tensor, dense},
    view::{DeviceAddress, Packed, Unpacked},
};

/// [`gdn::decode`](crate::decode()) on a GPU: copies the tensors there, runs [`Gpu::decode_raw`], copies back
/// what it writes, and waits. With the device's contract for indices: a sequence whose slot is not there is
/// skipped.
///
/// # Errors
/// Those of [`Gpu::decode_raw`].
pub fn decode_host(call: &mut Decode<Shared<'_>, Exclusive<'_>>, gpu: &Gpu) -> Result<(), CudaError> {
    let staged = StagedCall::decode(call, gpu)?;
    staged.launch()?;
    staged.fetch().map(drop)
}

/// [`gdn::prefill`](crate::prefill()) on a GPU: copies the tensors there, runs [`Gpu::prefill_raw`], copies
/// back what it writes, and waits. With the device's contract for indices and `cu_seqlens`.
///
/// # Errors
/// Those of [`Gpu::prefill_raw`].
pub fn prefill_host(call: &mut Prefill<Shared<'_>, Exclusive<'_>>, gpu: &Gpu) -> Result<(), CudaError> {
    let staged = StagedCall::prefill(call, gpu)?;
    staged.launch()?;
    staged.fetch().map(drop)
}

/// A call whose tensors were copied to a GPU, each without gaps. They are `'a`'s on the host.
pub(super) struct StagedCall<'a> {
    op: Op,
    copies: Copies<'a>,
}

enum Op {
    Decode(Decode<DeviceAddress, DeviceAddress>),
    Prefill(Prefill<DeviceAddress, DeviceAddress>, (DeviceAddress, usize)),
}

/// A call on the device, and the memory that it works on.
pub(super) struct OnDevice {
    op: Op,
    gpu: Gpu,
    _memory: Vec<CudaSlice<u8>>,
}

impl<'a> StagedCall<'a> {
    /// # Errors
    /// Those of [`Gpu::decode_raw`], before anything is copied where they are of shapes, dtypes and overlaps.
    pub(super) fn decode(
        call: &'a mut Decode<Shared<'_>, Exclusive<'_>>,
        gpu: &Gpu,
    ) -> Result<Self, CudaError> {
        decode::Plan::new(call)?;
        let mut copies = Copies::new(gpu);
        let Decode { conv_state, recurrent_state, .. } = call;
        let op = Decode {
            layer: call.layer,
            tokens_per_sequence: call.tokens_per_sequence,
            projections: copies.projections(&call.projections)?,
            weights: copies.weights(&call.weights)?,
            conv_state: ConvState {
                state: copies.written(&mut conv_state.state)?,
                keep: copies.keep(&mut conv_state.keep)?,
            },
            recurrent_state: RecurrentState {
                state: copies.written(&mut recurrent_state.state)?,
                keep: copies.keep(&mut recurrent_state.keep)?,
            },
            slots: copies.slots(&call.slots)?,
            num_accepted_tokens: copies.indices_if(call.num_accepted_tokens.as_ref())?,
            out: copies.written(&mut call.out)?,
        };
        Ok(Self { op: Op::Decode(op), copies })
    }

    /// # Errors
    /// Those of [`Gpu::prefill_raw`], before anything is copied where they are of shapes, dtypes and
    /// overlaps.
    pub(super) fn prefill(
        call: &'a mut Prefill<Shared<'_>, Exclusive<'_>>,
        gpu: &Gpu,
    ) -> Result<Self, CudaError> {
        prefill::Plan::new(call)?;
        prefill_supports(&call.layer)?;
        let mut copies = Copies::new(gpu);
        let op = Prefill {
            layer: call.layer,
            cu_seqlens: copies.indices(&call.cu_seqlens)?,
            projections: copies.projections(&call.projections)?,
            weights: copies.weights(&call.weights)?,
            conv_state: call.conv_state.as_mut().map(|state| copies.written(state)).transpose()?,
            recurrent_state: call.recurrent_state.as_mut().map(|state| copies.written(state)).transpose()?,
            slots: copies.slots(&call.slots)?,
            has_initial_state: copies.indices_if(call.has_initial_state.as_ref())?,
            checkpoints: match &mut call.checkpoints {
                Some(kept) => Some(Checkpoints {
                    every: kept.every,
                    starts: copies.indices(&kept.starts)?,
                    recurrent_states: copies.written(&mut kept.recurrent_states)?,
                    conv_states: kept
                        .conv_states
                        .as_mut()
                        .map(|states| copies.written(states))
                        .transpose()?,
                }),
                None => None,
            },
            out: copies.written(&mut call.out)?,
        };
        let (tokens, sequences) = (call.out.sizes()[0], call.cu_seqlens.sizes()[0].saturating_sub(1));
        let bytes = prefill_scratch_bytes(&call.layer, tokens, sequences);
        let scratch = copies.room(bytes)?;
        Ok(Self { op: Op::Prefill(op, (scratch, bytes)), copies })
    }

    /// Queues the op.
    pub(super) fn launch(&self) -> Result<(), CudaError> {
        // SAFETY: the tensors are dense, each in memory of its own, which lives until the stream was waited
        // for: by the driver, when it frees them.
        unsafe { self.op.launch(&self.copies.gpu) }
    }

    /// Copies back what was written, and waits; what remains on the device can be run again.
    pub(super) fn fetch(self) -> Result<OnDevice, CudaError> {
        let Self { op, copies: Copies { gpu, memory, back, .. } } = self;
        let stream = gpu.stream();
        let mut landed = Vec::new();
        for Back { index, host } in back {
            let bytes = host.bytes();
            if bytes == 0 {
                continue;
            }
            let mut gathered = Vec::new();
            let to = host.dense().unwrap_or_else(|| {
                gathered.resize(bytes, 0u8);
                gathered.as_mut_ptr()
            });
            // SAFETY: so many bytes are at both places: of a tensor without gaps that the call has for
            // itself, or of `gathered`, which is kept until the stream has been waited for.
            unsafe {
                let from = memory[index].device_ptr(stream).0;
                sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream.cu_stream())
            }
            .result()
            .map_err(driver(gpu.info().ordinal, "cuMemcpyDtoH"))?;
            landed.push((host, gathered));
        }
        stream.synchronize().map_err(driver(gpu.info().ordinal, "cuStreamSynchronize"))?;
        for (host, gathered) in landed.iter().filter(|(host, _)| host.dense().is_none()) {
            let len = host.stretch();
            for (from, offset) in gathered.chunks_exact(len).zip(host.offsets()) {
                // SAFETY: a stretch of a tensor that the call has for itself.
                unsafe { host.at.add(offset).copy_from_nonoverlapping(from.as_ptr(), len) };
            }
        }
        Ok(OnDevice { op, gpu, _memory: memory })
    }
}

impl OnDevice {
    /// Queues the op once more, on what it left of its states.
    pub(super) fn launch(&self) -> Result<(), CudaError> {
        // SAFETY: as in `StagedCall::launch`.
        unsafe { self.op.launch(&self.gpu) }
    }
}

impl Op {
    /// # Safety
    /// The call's tensors are on the GPU, for nobody else, until its stream has been waited for.
    unsafe fn launch(&self, gpu: &Gpu) -> Result<(), CudaError> {
        let stream = gpu.stream().cu_stream();
        match self {
            // SAFETY: the caller's promise.
            Self::Decode(call) => unsafe { gpu.decode_raw(call, stream) },
            // SAFETY: as above.
            Self::Prefill(call, scratch) => unsafe { gpu.prefill_raw(call, *scratch, stream) },
        }
    }
}

/// Tensors of the host's on the device. `'a` is what the host's memory is borrowed for.
struct Copies<'a> {
    gpu: Gpu,
    memory: Vec<CudaSlice<u8>>,
    back: Vec<Back>,
    _host: PhantomData<&'a mut [u8]>,
}

/// A tensor that is written, and the memory of its copy.
struct Back {
    index: usize,
    host: Elements,
}

impl Copies<'_> {
    fn new(gpu: &Gpu) -> Self {
        Self { gpu: gpu.clone(), memory: Vec::new(), back: Vec::new(), _host: PhantomData }
    }

    fn room(&mut self, bytes: usize) -> Result<DeviceAddress, CudaError> {
        // One byte at least, to have an address. SAFETY: nothing is read of it before it is written: by a
        // copy, or, of scratch memory, by the kernels.
        let memory = unsafe { self.gpu.stream().alloc::<u8>(bytes.max(1)) };
        let memory = memory.map_err(driver(self.gpu.info().ordinal, "cuMemAlloc"))?;
        let address = memory.device_ptr(self.gpu.stream()).0;
        self.memory.push(memory);
        Ok(address.into())
    }

    /// Copies elements, and says where to.
    fn copied(&mut self, elements: &Elements) -> Result<DeviceAddress, CudaError> {
        let bytes = elements.bytes();
        let there = self.room(bytes)?;
        if bytes == 0 {
            return Ok(there);
        }
        let stream = self.gpu.stream();
        let mut gathered: Vec<MaybeUninit<u8>> = Vec::new();
        let from = elements.dense().unwrap_or_else(|| {
            gathered.reserve_exact(bytes);
            let to = gathered.as_mut_ptr().cast::<u8>();
            let len = elements.stretch();
            for (i, offset) in elements.offsets().enumerate() {
                // SAFETY: a stretch of the tensor, and room for all of them. Bytes that were never written
                // may be among them: they are copied and not looked at.
                unsafe { to.add(i * len).copy_from_nonoverlapping(elements.at.add(offset), len) };
            }
            to
        });
        // SAFETY: so many bytes are at both places until the stream has been waited for.
        unsafe { sys::cuMemcpyHtoDAsync_v2(there.0, from.cast(), bytes, stream.cu_stream()) }
            .result()
            .and_then(|()| stream.synchronize())
            .map_err(driver(self.gpu.info().ordinal, "cuMemcpyHtoD"))?;
        Ok(there)
    }

    fn read<const D: usize>(
        &mut self,
        tensor: &Tensor<Shared<'_>, D>,
    ) -> Result<Tensor<DeviceAddress, D>, CudaError> {
        let there = self.copied(&Elements::of(&tensor.operand(), tensor.dtype().size()))?;
        Ok(Tensor::at_device(there, tensor.dtype(), tensor.sizes(), dense(tensor.sizes()))?)
    }

    fn written<const D: usize>(
        &mut self,
        tensor: &mut Tensor<Exclusive<'_>, D>,
    ) -> Result<Tensor<DeviceAddress, D>, CudaError> {
        let host = Elements::of(&tensor.operand(), tensor.dtype().size());
        let index = self.memory.len();
        let there = self.copied(&host)?;
        self.back.push(Back { index, host });
        Ok(Tensor::at_device_mut(there, tensor.dtype(), tensor.sizes(), dense(tensor.sizes()))?)
    }

    fn indices<const D: usize>(
        &mut self,
        indices: &Indices<Shared<'_>, D>,
    ) -> Result<Indices<DeviceAddress, D>, CudaError> {
        let there = self.copied(&Elements::of(&indices.operand(), indices.index_type().size()))?;
        Ok(Indices::at_device(there, indices.index_type(), indices.sizes(), dense(indices.sizes()))?)
    }

    fn indices_if<const D: usize>(
        &mut self,
        indices: Option<&Indices<Shared<'_>, D>>,
    ) -> Result<Option<Indices<DeviceAddress, D>>, CudaError> {
        indices.map(|indices| self.indices(indices)).transpose()
    }

    fn slots(&mut self, slots: &Slots<Shared<'_>>) -> Result<Slots<DeviceAddress>, CudaError> {
        let state_indices = self.indices_if(slots.state_indices.as_ref())?;
        Ok(Slots { state_indices, pad_slot_id: slots.pad_slot_id })
    }

    fn projections(
        &mut self,
        projections: &Projections<Shared<'_>>,
    ) -> Result<Projections<DeviceAddress>, CudaError> {
        Ok(match projections {
            Projections::Packed(Packed { mixed_qkvz, mixed_ba }) => Projections::Packed(Packed {
                mixed_qkvz: self.read(mixed_qkvz)?,
                mixed_ba: self.read(mixed_ba)?,
            }),
            Projections::Unpacked(Unpacked { mixed_qkv, z, b, a }) => Projections::Unpacked(Unpacked {
                mixed_qkv: self.read(mixed_qkv)?,
                z: self.read(z)?,
                b: self.read(b)?,
                a: self.read(a)?,
            }),
        })
    }

    fn weights(&mut self, weights: &Weights<Shared<'_>>) -> Result<Weights<DeviceAddress>, CudaError> {
        Ok(Weights {
            conv_weight: self.read(&weights.conv_weight)?,
            conv_bias: weights.conv_bias.as_ref().map(|bias| self.read(bias)).transpose()?,
            A_log: self.read(&weights.A_log)?,
            dt_bias: self.read(&weights.dt_bias)?,
            norm_weight: self.read(&weights.norm_weight)?,
        })
    }

    fn keep<const E: usize>(
        &mut self,
        keep: &mut Keep<Shared<'_>, Exclusive<'_>, E>,
    ) -> Result<Keep<DeviceAddress, DeviceAddress, E>, CudaError> {
        Ok(match keep {
            Keep::Last => Keep::Last,
            Keep::LastAt(indices) => Keep::LastAt(self.indices(indices)?),
            Keep::Each => Keep::Each,
            Keep::EachIn { states, indices } => {
                Keep::EachIn { states: self.written(states)?, indices: self.indices_if(indices.as_ref())? }
            }
            Keep::Nothing => Keep::Nothing,
        })
    }
}

/// The elements of a tensor of the host's, as stretches without gaps.
struct Elements {
    at: *mut u8,
    /// Bytes of an element.
    size: usize,
    sizes: Vec<usize>,
    /// In elements.
    strides: Vec<usize>,
    /// How many of the last dims have no gaps.
    dense_dims: usize,
}

impl Elements {
    fn of<K, const D: usize>(operand: &Operand<*mut u8, K, D>, size: usize) -> Self {
        let Operand { at, sizes, strides, .. } = operand;
        let whole = dense(*sizes);
        let dense_dims =
            (0..D).rev().take_while(|dim| sizes[*dim] <= 1 || strides[*dim] == whole[*dim]).count();
        Self { at: *at, size, sizes: sizes.to_vec(), strides: strides.to_vec(), dense_dims }
    }

    fn bytes(&self) -> usize {
        self.sizes.iter().product::<usize>() * self.size
    }

    /// Where they are, if there are no gaps at all.
    fn dense(&self) -> Option<*mut u8> {
        (self.dense_dims == self.sizes.len()).then_some(self.at)
    }

    fn outer(&self) -> usize {
        self.sizes.len() - self.dense_dims
    }

    /// Bytes of a stretch.
    fn stretch(&self) -> usize {
        self.sizes[self.outer()..].iter().product::<usize>() * self.size
    }

    /// Where the stretches begin, in bytes, in the order of a tensor without gaps.
    fn offsets(&self) -> impl Iterator<Item = usize> {
        let outer = self.outer();
        (0..self.sizes[..outer].iter().product()).map(move |mut i: usize| {
            let mut offset = 0;
            for dim in (0..outer).rev() {
                offset += i % self.sizes[dim] * self.strides[dim];
                i /= self.sizes[dim];
            }
            offset * self.size
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn stretches_are_all_elements_in_order(
            sizes in prop::array::uniform3(0usize..4),
            order in Just([0, 1, 2]).prop_shuffle(),
            gaps in prop::array::uniform3(0usize..3),
        ) {
            // Strides in any order of the dims, with gaps.
            let mut strides = [0; 3];
            let mut reach = 1;
            for (dim, gap) in order.into_iter().zip(gaps) {
                strides[dim] = reach + gap;
                reach = strides[dim] * sizes[dim].max(1);
            }
            let operand = Operand { at: std::ptr::null_mut(), kind: (), sizes, strides };
            let elements = Elements::of(&operand, 2);
            let mut expected = Vec::new();
            for i in 0..sizes[0] {
                for j in 0..sizes[1] {
                    for k in 0..sizes[2] {
                        expected.push(i * strides[0] + j * strides[1] + k * strides[2]);
                    }
                }
            }
            let len = elements.stretch() / 2;
            let got: Vec<usize> =
                elements.offsets().flat_map(|offset| (0..len).map(move |i| offset / 2 + i)).collect();
            prop_assert_eq!(elements.bytes(), 2 * expected.len());
            prop_assert_eq!(&got, &expected);
            let gapless = expected.iter().enumerate().all(|(i, place)| i == *place);
            prop_assert!(elements.dense().is_none() || gapless);
        }
    }
}
