//! Views of cudarc's slices, ordered on a stream, for the ops of whole layers.

use cudarc::driver::{DevicePtr, DevicePtrMut, SyncOnDrop, sys::CUstream};

use super::{device::Gpu, error::CudaError};
use crate::{
    argument::ArgumentError,
    layer::{Projections, Weights},
    tensor::{Element, Index, Indices, Space, Tensor, expect_apart, placed},
    view::{DeviceAddress, Packed, Unpacked},
};

/// Memory of a slice that a call reads, ordered after what was done to it on other streams; what comes later
/// there is ordered after this view is dropped.
pub struct Read<'a> {
    address: DeviceAddress,
    stream: CUstream,
    _recorded: SyncOnDrop<'a>,
}

/// Memory of a slice that a call reads and writes, ordered like [`Read`].
pub struct Write<'a> {
    address: DeviceAddress,
    stream: CUstream,
    _recorded: SyncOnDrop<'a>,
}

impl Read<'_> {
    pub(super) fn stream(&self) -> CUstream {
        self.stream
    }
}

impl Write<'_> {
    pub(super) fn stream(&self) -> CUstream {
        self.stream
    }
}

impl Space for Read<'_> {
    type Raw = DeviceAddress;

    fn raw(&self) -> DeviceAddress {
        self.address
    }
}

impl Space for Write<'_> {
    type Raw = DeviceAddress;

    fn raw(&self) -> DeviceAddress {
        self.address
    }
}

macro_rules! of_slices {
    ($view:ident, $bound:ident :: $constant:ident) => {
        impl<'a, const D: usize> $view<Read<'a>, D> {
            /// Elements of a slice of the GPU's, for calls on its stream. Strides are in elements; `None` for
            /// no gaps, last dim dense.
            ///
            /// # Errors
            /// [`ArgumentError::TooLarge`](crate::ArgumentError::TooLarge),
            /// [`ArgumentError::Length`](crate::ArgumentError::Length) where the last element lies past the
            /// end.
            pub fn on<T: $bound>(
                slice: &'a impl DevicePtr<T>,
                sizes: [usize; D],
                strides: Option<[usize; D]>,
                gpu: &'a Gpu,
            ) -> Result<Self, ArgumentError> {
                let strides = placed(slice.len(), size_of::<T>(), sizes, strides)?;
                let (address, recorded) = slice.device_ptr(gpu.stream());
                let at =
                    Read { address: address.into(), stream: gpu.stream().cu_stream(), _recorded: recorded };
                Self::over(at, T::$constant, sizes, strides)
            }
        }
    };
}

of_slices!(Tensor, Element::DTYPE);
of_slices!(Indices, Index::INDEX_TYPE);

impl<'a, const D: usize> Tensor<Write<'a>, D> {
    /// Elements of a slice of the GPU's, to be read and written by calls on its stream. Strides are in
    /// elements; `None` for no gaps, last dim dense.
    ///
    /// # Errors
    /// Those of [`Tensor::on`], and
    /// [`ArgumentError::Stride`] where two elements would share memory.
    pub fn on_mut<T: Element>(
        slice: &'a mut impl DevicePtrMut<T>,
        sizes: [usize; D],
        strides: Option<[usize; D]>,
        gpu: &'a Gpu,
    ) -> Result<Self, ArgumentError> {
        let strides = placed(slice.len(), size_of::<T>(), sizes, strides)?;
        expect_apart(sizes, strides)?;
        let (address, recorded) = slice.device_ptr_mut(gpu.stream());
        let at = Write { address: address.into(), stream: gpu.stream().cu_stream(), _recorded: recorded };
        Self::over(at, T::DTYPE, sizes, strides)
    }
}

/// The stream that all views of a call are to have been made for.
#[derive(Clone, Copy)]
pub(super) struct OnStream(pub(super) CUstream);

impl OnStream {
    pub(super) fn expect(self, argument: &'static str, got: CUstream) -> Result<(), CudaError> {
        if got == self.0 { Ok(()) } else { Err(CudaError::WrongStream { argument }) }
    }

    /// Of a layer's projections and weights.
    pub(super) fn expect_inputs(
        self,
        projections: &Projections<Read<'_>>,
        weights: &Weights<Read<'_>>,
    ) -> Result<(), CudaError> {
        match projections {
            Projections::Packed(Packed { mixed_qkvz, mixed_ba }) => {
                self.expect("mixed_qkvz", mixed_qkvz.space().stream())?;
                self.expect("mixed_ba", mixed_ba.space().stream())?;
            }
            Projections::Unpacked(Unpacked { mixed_qkv, z, b, a }) => {
                for (argument, rows) in [("mixed_qkv", mixed_qkv), ("z", z), ("b", b), ("a", a)] {
                    self.expect(argument, rows.space().stream())?;
                }
            }
        }
        self.expect("conv_weight", weights.conv_weight.space().stream())?;
        for (argument, vector) in [
            ("conv_bias", weights.conv_bias.as_ref()),
            ("A_log", Some(&weights.A_log)),
            ("dt_bias", Some(&weights.dt_bias)),
            ("norm_weight", Some(&weights.norm_weight)),
        ] {
            vector.map_or(Ok(()), |vector| self.expect(argument, vector.space().stream()))?;
        }
        Ok(())
    }
}
