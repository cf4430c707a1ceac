//! [`Tensor`]: typed elements in memory, with any strides; [`Indices`]: whole numbers likewise.

use std::{fmt, marker::PhantomData};

use bytemuck::Pod;
use half::{bf16, f16};

use crate::{
    argument::{ArgumentError, Because},
    dtype::Dtype,
    view::{Address, DeviceAddress},
};

/// An element type of Rust that is a [`Dtype`].
pub trait Element: Pod + Send + Sync {
    /// Which one.
    const DTYPE: Dtype;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
}

/// The type of an index or a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IndexType {
    /// 8 bits, without a sign: for flags.
    U8,
    /// 32 bits.
    I32,
    /// 64 bits.
    I64,
}

impl IndexType {
    /// Bytes of an index.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }
}

/// An index type of Rust that is an [`IndexType`].
pub trait Index: Pod + Send + Sync {
    /// Which one.
    const INDEX_TYPE: IndexType;
}

impl Index for u8 {
    const INDEX_TYPE: IndexType = IndexType::U8;
}

impl Index for i32 {
    const INDEX_TYPE: IndexType = IndexType::I32;
}

impl Index for i64 {
    const INDEX_TYPE: IndexType = IndexType::I64;
}

/// Host memory that can be read for `'a`.
#[derive(Clone, Copy)]
pub struct Shared<'a>(*const u8, PhantomData<&'a [u8]>);

/// Host memory that can be read and written for `'a`, and by nobody else.
pub struct Exclusive<'a>(*mut u8, PhantomData<&'a mut [u8]>);

// SAFETY: a `&[u8]` without its length.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}
// SAFETY: a `&mut [u8]` without its length.
unsafe impl Send for Exclusive<'_> {}
// SAFETY: a shared `Exclusive` gives access to nothing.
unsafe impl Sync for Exclusive<'_> {}

/// Where memory is, and who may do what with it: [`Shared`] and [`Exclusive`] on the host, [`DeviceAddress`]
/// on a GPU. Not to be implemented elsewhere.
pub trait Space {
    #[doc(hidden)]
    type Raw: Address + fmt::Debug;

    #[doc(hidden)]
    fn raw(&self) -> Self::Raw;
}

impl Space for Shared<'_> {
    type Raw = *mut u8;

    fn raw(&self) -> *mut u8 {
        self.0.cast_mut()
    }
}

impl Space for Exclusive<'_> {
    type Raw = *mut u8;

    fn raw(&self) -> *mut u8 {
        self.0
    }
}

impl Space for DeviceAddress {
    type Raw = Self;

    fn raw(&self) -> Self {
        *self
    }
}

/// The strides and the elements from first to last of a view of so many elements, `None` for a dense one.
#[cfg(feature = "cuda")]
pub(crate) fn placed<const D: usize>(
    len: usize,
    element_size: usize,
    sizes: [usize; D],
    strides: Option<[usize; D]>,
) -> Result<[usize; D], ArgumentError> {
    let strides = strides.unwrap_or_else(|| dense(sizes));
    within(len, span(sizes, strides, element_size)?)?;
    Ok(strides)
}

/// That no two elements share memory.
#[cfg(feature = "cuda")]
pub(crate) fn expect_apart<const D: usize>(
    sizes: [usize; D],
    strides: [usize; D],
) -> Result<(), ArgumentError> {
    match shares_memory(sizes, strides) {
        None => Ok(()),
        Some((dim, got, expected)) => Err(ArgumentError::Stride { argument: "data", dim, got, expected }),
    }
}

/// The number of elements in memory from the first to the last one, both included.
///
/// # Errors
/// [`ArgumentError::TooLarge`] where they are more bytes than the address space has.
fn span<const D: usize>(
    sizes: [usize; D],
    strides: [usize; D],
    element_size: usize,
) -> Result<usize, ArgumentError> {
    if sizes.contains(&0) {
        return Ok(0);
    }
    let last = sizes
        .iter()
        .zip(strides)
        .try_fold(0usize, |sum, (size, stride)| sum.checked_add((size - 1).checked_mul(stride)?));
    last.and_then(|last| last.checked_add(1))
        .filter(|span| span.checked_mul(element_size).is_some_and(|bytes| isize::try_from(bytes).is_ok()))
        .ok_or_else(|| ArgumentError::TooLarge {
            what: format!(
                "a tensor of shape {sizes:?} with strides {strides:?}, {element_size} bytes an element,"
            ),
        })
}

/// The strides of a tensor without gaps, last dim dense.
pub(crate) fn dense<const D: usize>(sizes: [usize; D]) -> [usize; D] {
    let mut strides = [1; D];
    for dim in (1..D).rev() {
        strides[dim - 1] = sizes[dim].max(1).saturating_mul(strides[dim]);
    }
    strides
}

/// A dim along which elements would share memory, with its stride and what it should be at least.
fn shares_memory<const D: usize>(sizes: [usize; D], strides: [usize; D]) -> Option<(usize, usize, usize)> {
    if sizes.contains(&0) {
        return None;
    }
    let mut dims: [usize; D] = std::array::from_fn(|dim| dim);
    dims.sort_unstable_by_key(|dim| strides[*dim]);
    let mut reach = 1;
    for dim in dims.into_iter().filter(|dim| sizes[*dim] > 1) {
        if strides[dim] < reach {
            return Some((dim, strides[dim], reach));
        }
        reach += (sizes[dim] - 1) * strides[dim];
    }
    None
}

macro_rules! view {
    ($view:ident, $kind:ident, $bound:ident :: $constant:ident, $tag:ident) => {
        impl<A: Space, const D: usize> $view<A, D> {
            /// The length of each dim.
            pub fn sizes(&self) -> [usize; D] {
                self.sizes
            }

            /// Elements from one to the next, for each dim.
            pub fn strides(&self) -> [usize; D] {
                self.strides
            }

            /// What its elements are.
            pub fn $tag(&self) -> $kind {
                self.$tag
            }

            /// Where they are.
            #[cfg(feature = "cuda")]
            pub(crate) fn space(&self) -> &A {
                &self.at
            }

            /// Elements at `at`. That they are there, and share no memory where they are to be written, is
            /// the caller's to see.
            #[cfg(feature = "cuda")]
            pub(crate) fn over(
                at: A,
                $tag: $kind,
                sizes: [usize; D],
                strides: [usize; D],
            ) -> Result<Self, ArgumentError> {
                span(sizes, strides, $tag.size())?;
                Ok(Self { at, $tag, sizes, strides })
            }

            pub(crate) fn operand(&self) -> Operand<A::Raw, $kind, D> {
                Operand { at: self.at.raw(), kind: self.$tag, sizes: self.sizes, strides: self.strides }
            }
        }

        impl<const D: usize> $view<DeviceAddress, D> {
            /// Elements in a device's memory, to be read: numbers that nothing on the host follows. Strides
            /// are in elements.
            ///
            /// # Errors
            /// [`ArgumentError::TooLarge`].
            pub fn at_device(
                at: impl Into<DeviceAddress>,
                $tag: $kind,
                sizes: [usize; D],
                strides: [usize; D],
            ) -> Result<Self, ArgumentError> {
                span(sizes, strides, $tag.size())?;
                Ok(Self { at: at.into(), $tag, sizes, strides })
            }
        }

        impl<'a, const D: usize> $view<Shared<'a>, D> {
            /// A view of all of `data`, without gaps, last dim dense.
            ///
            /// # Errors
            /// [`ArgumentError::Length`] where `data` has fewer or more elements.
            pub fn new<T: $bound>(data: &'a [T], sizes: [usize; D]) -> Result<Self, ArgumentError> {
                let strides = dense(sizes);
                whole(data.len(), span(sizes, strides, size_of::<T>())?)?;
                let at = Shared(data.as_ptr().cast(), PhantomData);
                Ok(Self { at, $tag: T::$constant, sizes, strides })
            }

            /// A view of some elements of `data`, the first included. A stride of 0 repeats a dim.
            ///
            /// # Errors
            /// [`ArgumentError::TooLarge`]; [`ArgumentError::Length`] where the last element lies past the
            /// end of `data`.
            pub fn with_strides<T: $bound>(
                data: &'a [T],
                sizes: [usize; D],
                strides: [usize; D],
            ) -> Result<Self, ArgumentError> {
                within(data.len(), span(sizes, strides, size_of::<T>())?)?;
                let at = Shared(data.as_ptr().cast(), PhantomData);
                Ok(Self { at, $tag: T::$constant, sizes, strides })
            }

            /// A view of raw bytes, at any alignment, without gaps, last dim dense.
            ///
            /// # Errors
            /// [`ArgumentError::Length`] where `data` has fewer or more elements.
            pub fn from_bytes(data: &'a [u8], $tag: $kind, sizes: [usize; D]) -> Result<Self, ArgumentError> {
                let strides = dense(sizes);
                whole(data.len() / $tag.size(), span(sizes, strides, $tag.size())?)?;
                Ok(Self { at: Shared(data.as_ptr(), PhantomData), $tag, sizes, strides })
            }

            /// The door for engines: elements at a pointer, of any alignment. Strides are in elements.
            ///
            /// # Errors
            /// [`ArgumentError::TooLarge`].
            ///
            /// # Safety
            /// For `'a` each of the elements can be read and is written by nobody. With no elements the
            /// pointer is not looked at.
            pub unsafe fn from_raw(
                at: *const u8,
                $tag: $kind,
                sizes: [usize; D],
                strides: [usize; D],
            ) -> Result<Self, ArgumentError> {
                span(sizes, strides, $tag.size())?;
                Ok(Self { at: Shared(at, PhantomData), $tag, sizes, strides })
            }
        }
    };
}

/// Elements of one [`Dtype`] with D dims. `A` says where they are and who may write them.
///
/// Strides are in elements, not negative, and go from one element of a dim to the next. Elements may lie at
/// any alignment.
///
/// ```
/// use gdn::{Dtype, Tensor};
/// let data = vec![0f32; 24];
/// let tensor = Tensor::new(&data, [2, 3, 4])?;
/// assert_eq!((tensor.dtype(), tensor.strides()), (Dtype::F32, [12, 4, 1]));
/// let transposed = Tensor::with_strides(&data, [2, 4, 3], [12, 1, 4])?;
/// assert_eq!(transposed.sizes(), [2, 4, 3]);
/// # Ok::<(), gdn::ArgumentError>(())
/// ```
#[derive(Clone, Copy)]
pub struct Tensor<A, const D: usize> {
    at: A,
    dtype: Dtype,
    sizes: [usize; D],
    strides: [usize; D],
}

/// Whole numbers with D dims, as [`Tensor`] has elements.
///
/// ```
/// let cu_seqlens = gdn::Indices::new(&[0i32, 5, 12], [3])?;
/// # Ok::<(), gdn::ArgumentError>(())
/// ```
#[derive(Clone, Copy)]
pub struct Indices<A, const D: usize> {
    at: A,
    index_type: IndexType,
    sizes: [usize; D],
    strides: [usize; D],
}

view!(Tensor, Dtype, Element::DTYPE, dtype);
view!(Indices, IndexType, Index::INDEX_TYPE, index_type);

impl<A, const D: usize> fmt::Debug for Tensor<A, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} with strides {:?}", self.dtype, self.sizes, self.strides)
    }
}

impl<A, const D: usize> fmt::Debug for Indices<A, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?} with strides {:?}", self.index_type, self.sizes, self.strides)
    }
}

impl<const D: usize> Tensor<DeviceAddress, D> {
    /// Elements in a device's memory, to be read and written. Strides are in elements.
    ///
    /// # Errors
    /// [`ArgumentError::TooLarge`]; [`ArgumentError::Stride`] where two elements would share memory.
    #[cfg(feature = "cuda")]
    pub fn at_device_mut(
        at: impl Into<DeviceAddress>,
        dtype: Dtype,
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<Self, ArgumentError> {
        expect_apart(sizes, strides)?;
        Self::at_device(at, dtype, sizes, strides)
    }
}

impl<'a, const D: usize> Tensor<Exclusive<'a>, D> {
    /// A view of all of `data`, to be read and written, without gaps, last dim dense.
    ///
    /// # Errors
    /// [`ArgumentError::Length`] where `data` has fewer or more elements.
    pub fn new_mut<T: Element>(data: &'a mut [T], sizes: [usize; D]) -> Result<Self, ArgumentError> {
        let Tensor { sizes, strides, .. } = Tensor::new(data, sizes)?;
        Ok(Self { at: Exclusive(data.as_mut_ptr().cast(), PhantomData), dtype: T::DTYPE, sizes, strides })
    }

    /// A view of some elements of `data`, to be read and written.
    ///
    /// # Errors
    /// [`ArgumentError::TooLarge`]; [`ArgumentError::Length`] where the last element lies past the end of
    /// `data`; [`ArgumentError::Stride`] where two elements would share memory.
    pub fn with_strides_mut<T: Element>(
        data: &'a mut [T],
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<Self, ArgumentError> {
        within(data.len(), span(sizes, strides, size_of::<T>())?)?;
        // SAFETY: the elements lie within `data`, borrowed exclusively for `'a`.
        unsafe { Self::from_raw_mut(data.as_mut_ptr().cast(), T::DTYPE, sizes, strides) }
    }

    /// A view of raw bytes, to be read and written, at any alignment, without gaps, last dim dense.
    ///
    /// # Errors
    /// [`ArgumentError::Length`] where `data` has fewer or more elements.
    pub fn from_bytes_mut(
        data: &'a mut [u8],
        dtype: Dtype,
        sizes: [usize; D],
    ) -> Result<Self, ArgumentError> {
        let Tensor { sizes, strides, .. } = Tensor::from_bytes(data, dtype, sizes)?;
        Ok(Self { at: Exclusive(data.as_mut_ptr(), PhantomData), dtype, sizes, strides })
    }

    /// The door for engines: elements at a pointer, of any alignment, to be read and written. Strides are in
    /// elements.
    ///
    /// # Errors
    /// [`ArgumentError::TooLarge`]; [`ArgumentError::Stride`] where two elements would share memory.
    ///
    /// # Safety
    /// For `'a` each of the elements can be read and written, and is neither read nor written by anybody but
    /// the holder of this view. What an op only writes need not be initialised. With no elements the pointer
    /// is not looked at.
    pub unsafe fn from_raw_mut(
        at: *mut u8,
        dtype: Dtype,
        sizes: [usize; D],
        strides: [usize; D],
    ) -> Result<Self, ArgumentError> {
        span(sizes, strides, dtype.size())?;
        if let Some((dim, got, expected)) = shares_memory(sizes, strides) {
            return Err(ArgumentError::Stride { argument: "data", dim, got, expected });
        }
        Ok(Self { at: Exclusive(at, PhantomData), dtype, sizes, strides })
    }

    /// The same elements for a shorter while, so that this view can be used again.
    pub fn reborrow(&mut self) -> Tensor<Exclusive<'_>, D> {
        Tensor { at: Exclusive(self.at.0, PhantomData), ..*self }
    }
}

fn within(got: usize, expected: usize) -> Result<(), ArgumentError> {
    if expected <= got {
        return Ok(());
    }
    Err(ArgumentError::Length { argument: "data", unit: "elements", got, expected, because: Because::Op })
}

fn whole(got: usize, expected: usize) -> Result<(), ArgumentError> {
    if expected == got {
        return Ok(());
    }
    Err(ArgumentError::Length { argument: "data", unit: "elements", got, expected, because: Because::Op })
}

/// What an op sees of a view: an address, and where the elements lie from there on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand<P, K, const D: usize> {
    pub(crate) at: P,
    pub(crate) kind: K,
    pub(crate) sizes: [usize; D],
    /// In elements.
    pub(crate) strides: [usize; D],
}

impl<P: Address, K, const D: usize> Operand<P, K, D> {
    /// Checks the length of a dim.
    pub(crate) fn expect(
        &self,
        argument: &'static str,
        dim: usize,
        unit: &'static str,
        expected: usize,
        because: impl FnOnce() -> Because,
    ) -> Result<(), ArgumentError> {
        if self.sizes[dim] == expected {
            return Ok(());
        }
        Err(ArgumentError::Length { argument, unit, got: self.sizes[dim], expected, because: because() })
    }

    /// Checks the least length of a dim, which `what` needs.
    pub(crate) fn expect_at_least(
        &self,
        argument: &'static str,
        dim: usize,
        unit: &'static str,
        expected: usize,
        what: &'static str,
    ) -> Result<(), ArgumentError> {
        let got = self.sizes[dim];
        if got >= expected {
            return Ok(());
        }
        Err(ArgumentError::Length { argument, unit, got, expected, because: Because::Need(what.to_owned()) })
    }

    /// Whether elements along a dim lie side by side.
    pub(crate) fn is_dense(&self, dim: usize) -> bool {
        self.strides[dim] == 1 || self.sizes[dim] <= 1
    }
}

impl<const D: usize> Operand<*mut u8, IndexType, D> {
    /// The index at a place.
    ///
    /// # Safety
    /// The place lies within `sizes`, and the indices can be read.
    pub(crate) unsafe fn read(&self, place: [usize; D]) -> i64 {
        let offset: usize = place.iter().zip(self.strides).map(|(i, stride)| i * stride).sum();
        // SAFETY: the caller's promise.
        unsafe {
            match self.kind {
                IndexType::U8 => i64::from(self.at.add(offset).read()),
                IndexType::I32 => i64::from(self.at.cast::<i32>().add(offset).read_unaligned()),
                IndexType::I64 => self.at.cast::<i64>().add(offset).read_unaligned(),
            }
        }
    }
}
