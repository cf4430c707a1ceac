//! [`UnpackedBuf`] and [`PackedBuf`]: fresh tensors, one block of memory for all of them.
//!
//! A fresh page costs a fault and a clearing at its first touch. At 4 KiB a page that is several times the
//! cost of the copy itself, so a large block asks the system for huge pages (2 MiB on x86-64 Linux), one
//! fault for 512 small ones.

use std::ops::Range;

use memmap2::MmapMut;
use thiserror::Error;

use crate::{
    argument::ArgumentError,
    heads::Heads,
    rows::{Rows, RowsMut},
    view::{Geometry, Packed, Unpacked},
};

/// Why there is no memory for fresh tensors.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BufError {
    /// An argument is wrong: elements of no bytes, more bytes than the address space has, or what the op
    /// refuses.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// The system has no block of that size.
    #[error("no memory for {bytes} bytes of tensors: {source}")]
    NoMemory {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Which pages a large block asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Huge ones where the system offers them.
    #[default]
    Huge,
    /// Whatever the system gives to everybody.
    Ordinary,
}

/// Tensors begin on a cache line.
const LINE: usize = 64;
/// The size of a huge page, and of the smallest block that asks for one.
const HUGE: usize = 2 << 20;

/// Cache lines on the heap.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

// SAFETY: an array of bytes, of which zeros are a value.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: an array of bytes without padding: the alignment equals the size.
unsafe impl bytemuck::Pod for Line {}

/// A zeroed block of bytes that begins on a cache line; from 2 MiB on it is mapped from the system, with
/// pages as asked for.
pub struct Block(Memory);

enum Memory {
    Small(Vec<Line>),
    /// Mapped from the system; the block is this range of it, which begins on a huge page.
    Large(MmapMut, Range<usize>),
}

impl Block {
    /// So many bytes.
    ///
    /// # Errors
    /// [`BufError::NoMemory`].
    pub fn new(bytes: usize, pages: Pages) -> Result<Self, BufError> {
        let no_memory = |source| BufError::NoMemory { bytes, source };
        if bytes < HUGE {
            let lines = bytemuck::allocation::try_zeroed_vec(bytes.div_ceil(LINE));
            return lines
                .map(|lines| Self(Memory::Small(lines)))
                .map_err(|()| no_memory(std::io::ErrorKind::OutOfMemory.into()));
        }
        let mapped =
            bytes.checked_add(HUGE).ok_or_else(|| no_memory(std::io::ErrorKind::OutOfMemory.into()))?;
        let map = MmapMut::map_anon(mapped).map_err(no_memory)?;
        let start = map.as_ptr().align_offset(HUGE);
        #[cfg(target_os = "linux")]
        if pages == Pages::Huge {
            // A kernel without huge pages says no, and the block has ordinary ones.
            let _ = map.advise_range(memmap2::Advice::HugePage, start, bytes);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = pages;
        Ok(Self(Memory::Large(map, start..start + bytes)))
    }

    /// All of it, to the end of the last cache line.
    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Memory::Small(lines) => bytemuck::cast_slice(lines),
            Memory::Large(map, block) => &map[block.clone()],
        }
    }

    /// The same, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Small(lines) => bytemuck::cast_slice_mut(lines),
            Memory::Large(map, block) => &mut map[block.clone()],
        }
    }
}

/// Where one tensor lies in a block: the offset of its first byte, and its dense rows from there on.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: usize,
    geometry: Geometry,
}

/// `TENSORS` dense tensors in one block.
struct Tensors<const TENSORS: usize> {
    block: Block,
    places: [Place; TENSORS],
}

impl<const TENSORS: usize> Tensors<TENSORS> {
    /// Each tensor as its features and the size of its elements.
    fn new(num_rows: usize, tensors: [(usize, usize); TENSORS], pages: Pages) -> Result<Self, BufError> {
        let mut end = 0usize;
        let mut places = [Place { offset: 0, geometry: Geometry::EMPTY }; TENSORS];
        for (place, (features, element_size)) in places.iter_mut().zip(tensors) {
            let geometry = Geometry::new(num_rows, features, features, element_size)?;
            let mut next = || {
                let offset = end.checked_next_multiple_of(LINE)?;
                end = offset.checked_add(geometry.span()).filter(|end| isize::try_from(*end).is_ok())?;
                Some(Place { offset, geometry })
            };
            *place = next().ok_or_else(|| ArgumentError::TooLarge {
                what: format!("tensors of {num_rows} rows in one block"),
            })?;
        }
        Ok(Self { block: Block::new(end, pages)?, places })
    }

    fn bytes(&self, tensor: usize) -> &[u8] {
        let Place { offset, geometry } = self.places[tensor];
        &self.block.bytes()[offset..offset + geometry.span()]
    }

    fn rows(&self, tensor: usize) -> Rows<'_> {
        let Place { offset, geometry } = self.places[tensor];
        // SAFETY: `new` made the block large enough for every place, and the block is borrowed as long as the
        // view.
        unsafe { Rows::at(self.block.bytes().as_ptr().wrapping_add(offset), geometry) }
    }
}

macro_rules! tensors {
    ($(#[$doc:meta])* $name:ident, $count:literal, $view:ident,
     [$($(#[$tensor_doc:meta])* $tensor:ident = $index:literal),+], $shapes:expr) => {
        $(#[$doc])*
        pub struct $name(Tensors<$count>);

        impl $name {
            /// Zeroed tensors of `num_rows` rows, for elements of `element_size` bytes (`ba_element_size` for
            /// what belongs to `mixed_ba`).
            ///
            /// # Errors
            /// [`BufError`].
            pub fn new(
                heads: &Heads, num_rows: usize, element_size: usize, ba_element_size: usize,
            ) -> Result<Self, BufError> {
                Self::with_pages(heads, num_rows, element_size, ba_element_size, Pages::default())
            }

            /// The same, with a say in the pages of a block of 2 MiB or more.
            ///
            /// # Errors
            /// [`BufError`].
            pub fn with_pages(
                heads: &Heads, num_rows: usize, element_size: usize, ba_element_size: usize, pages: Pages,
            ) -> Result<Self, BufError> {
                let shapes: fn(&Heads, usize, usize) -> [(usize, usize); $count] = $shapes;
                Tensors::new(num_rows, shapes(heads, element_size, ba_element_size), pages).map(Self)
            }

            /// Every tensor, to be read.
            pub fn as_ref(&self) -> $view<Rows<'_>> {
                $view { $($tensor: self.0.rows($index)),+ }
            }

            /// Every tensor, to be written.
            pub fn as_mut(&mut self) -> $view<RowsMut<'_>> {
                let block = self.0.block.bytes_mut().as_mut_ptr();
                let rows = |Place { offset, geometry }: Place| {
                    // SAFETY: `Tensors::new` made the block large enough for every place, and no two places
                    // have a byte in common; the block is borrowed exclusively as long as the views.
                    unsafe { RowsMut::at(block.wrapping_add(offset), geometry) }
                };
                $view { $($tensor: rows(self.0.places[$index])),+ }
            }

            /// The whole block: the tensors in this order, each from the next cache line on.
            pub fn bytes(&self) -> &[u8] {
                self.0.block.bytes()
            }

            /// The whole block, to be written.
            pub fn bytes_mut(&mut self) -> &mut [u8] {
                self.0.block.bytes_mut()
            }

            $(
                $(#[$tensor_doc])*
                pub fn $tensor(&self) -> &[u8] {
                    self.0.bytes($index)
                }
            )+
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name))
                    .field("places", &self.0.places)
                    .finish_non_exhaustive()
            }
        }
    };
}

tensors! {
    /// The four parts of the projections in one block of memory: what [`split_fresh`](crate::split_fresh)
    /// returns.
    ///
    /// Each tensor is dense and begins on a cache line, so `bytemuck::cast_slice` gives its elements. Keep
    /// the value and hand its [`as_mut`](Self::as_mut) to [`split()`](crate::split()) again: memory that was
    /// touched before is faster.
    UnpackedBuf, 4, Unpacked,
    [
        /// The bytes of `mixed_qkv [N, 2*HK*DK + HV*DV]`.
        mixed_qkv = 0,
        /// The bytes of `z [N, HV, DV]`.
        z = 1,
        /// The bytes of `b [N, HV]`.
        b = 2,
        /// The bytes of `a [N, HV]`.
        a = 3
    ],
    |heads, element_size, ba_element_size| [
        (heads.qkv_features(), element_size),
        (heads.z_features(), element_size),
        (heads.num_v_heads(), ba_element_size),
        (heads.num_v_heads(), ba_element_size),
    ]
}

tensors! {
    /// The packed projections in one block of memory: what [`merge_fresh`](crate::merge_fresh) returns.
    ///
    /// Each tensor is dense and begins on a cache line, so `bytemuck::cast_slice` gives its elements.
    PackedBuf, 2, Packed,
    [
        /// The bytes of `mixed_qkvz [N, 2*HK*DK + 2*HV*DV]`.
        mixed_qkvz = 0,
        /// The bytes of `mixed_ba [N, 2*HV]`.
        mixed_ba = 1
    ],
    |heads, element_size, ba_element_size| [
        (heads.qkvz_features(), element_size),
        (heads.ba_features(), ba_element_size),
    ]
}
