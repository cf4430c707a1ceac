//! What a tensor is, read where PyTorch's inline functions read it: in the members of `c10::TensorImpl`,
//! whose places every C++ extension has compiled in. By C functions it is six calls a tensor.
//!
//! The places are found and checked at import, against what C functions and Python say of tensors that are
//! made for that. What a dtype, a device and a dispatch key set mean is not known here but learned: the first
//! tensor with such a pair of words is read by the C functions, and others with the same pair are of the same
//! kind. So a tensor that is not ordinary (a transform's wrapper, a lazy view, another layout) is none that
//! is read here.

use std::{array, sync::OnceLock};

use pyo3::{intern, prelude::*};

use super::{
    Libtorch, OFFSETS,
    abi::{Failed, ask},
    handle::{CPU, Handle, META},
    inside::Lent,
};
use crate::tensor::{DType, Device, MAX_DIMS, Tensor};

/// Members of `c10::TensorImpl` that follow one another. Sizes and strides are here for so many dims.
#[repr(C)]
#[derive(Clone, Copy)]
struct Members {
    dims: usize,
    sizes: [i64; MAX_DIMS],
    strides: [i64; MAX_DIMS],
    storage_offset: i64,
    numel: i64,
    /// From the low bytes on: the dtype in two, the type of the device, its index, whether there is one, and
    /// flags
    about: u64,
    /// The dispatch key set
    keys: u64,
}

/// Where the words of a tensor's storage and of autograd's are.
#[derive(Clone, Copy)]
struct Places {
    /// Bytes from the start of a `c10::TensorImpl` to the address of its `c10::StorageImpl`.
    storage: usize,
    /// Bytes from the start of that to [`Memory`].
    memory: usize,
    /// Bytes from the start of a `c10::TensorImpl` to the address of what autograd keeps of it, null for nothing.
    autograd: usize,
}

/// The memory of a storage: its address, and who frees it, in two words. Those are others once the memory is
/// shared with a tensor that copies it on write.
#[repr(C)]
#[derive(Clone, Copy, PartialEq)]
struct Memory {
    start: usize,
    owner: [usize; 2],
}

/// What two words mean.
#[derive(Clone, Copy)]
struct Kind {
    about: u64,
    keys: u64,
    device: Device,
    dtype: DType,
    /// libtorch's number for the dtype
    number: i32,
}

/// As many kinds as a process sees: dtypes, with and without inference mode, contiguous or not.
const PLACES: usize = 64;

pub(super) struct Fields {
    /// Bytes from the start of a `c10::TensorImpl` to [`Members`].
    offset: usize,
    places: Places,
    kinds: [OnceLock<Kind>; PLACES],
}

impl Fields {
    /// Looks for the place. `None` where this PyTorch has other members. `keys_of` asks Python for an
    /// object's dispatch keys; `negated` is a tensor `[2, 3]` of the dtype `float` that is lazily negated,
    /// `handle_of` has the tensor in an object.
    pub(super) fn find<'a>(
        torch: &Libtorch,
        py: Python<'_>,
        float: i32,
        negated: &Handle<'_>,
        handle_of: impl Fn(&Bound<'_, PyAny>) -> Lent<'a>,
        keys_of: impl Fn(&Bound<'_, PyAny>) -> Option<u64>,
    ) -> Option<Self> {
        const LENGTHS: [i64; 6] = [2, 3, 1, 5, 4, 2];
        let mut place = None;
        let mut check = |handle: &Handle<'_>, number: i32, kind: i32| {
            // SAFETY: a tensor that lives.
            let (dims, sizes, strides, start) = unsafe {
                let sizes: *mut i64 = ask!(torch, aoti_torch_get_sizes(handle.0)).ok()?;
                let strides: *mut i64 = ask!(torch, aoti_torch_get_strides(handle.0)).ok()?;
                (ask!(torch, aoti_torch_get_dim(handle.0)).ok()?, sizes.addr(), strides.addr(), start(handle))
            };
            let dims = usize::try_from(dims).ok()?;
            let is_inside = dims <= MAX_DIMS;
            if is_inside {
                let offset = sizes.checked_sub(start.addr())?.checked_sub(size_of::<usize>())?;
                let is_same = *place.get_or_insert(offset) == offset && offset < 512;
                if !is_same || strides != sizes + size_of::<[i64; MAX_DIMS]>() {
                    return None;
                }
            }
            let members = start.wrapping_byte_add(place?).cast::<Members>();
            let numel: i64 = LENGTHS.get(..dims)?.iter().product();
            let about = u64::from(number as u16) | u64::from(kind as u8) << 16 | 0xff << 24 | 1 << 32;
            // SAFETY: members of a tensor that lives; each is looked at where those before it are what they
            // should be.
            unsafe {
                ((&raw const (*members).dims).read() == dims
                    && (&raw const (*members).storage_offset).read() == 0
                    && (&raw const (*members).numel).read() == numel
                    && (&raw const (*members).about).read() & 0xff_ffff_ffff == about
                    && (&raw const (*members).keys).read() == keys_of(&handle.object(py).ok()?)?)
                .then_some(())
            }
        };
        let made = |dims: usize, number: i32, kind: i32| {
            let lengths = &LENGTHS[..dims];
            let strides: [i64; LENGTHS.len()] = array::from_fn(|dim| lengths.iter().skip(dim + 1).product());
            // SAFETY: so many sizes and strides.
            let handle = unsafe {
                ask!(
                    torch,
                    aoti_torch_empty_strided(
                        dims as i64,
                        lengths.as_ptr(),
                        strides.as_ptr(),
                        number,
                        kind,
                        -1
                    )
                )
            };
            handle.ok().map(|handle| Handle(handle, torch))
        };
        for (i, number) in torch.dtypes.into_iter().enumerate() {
            check(&made(i % (LENGTHS.len() + 1), number, CPU)?, number, CPU)?;
        }
        let [number, ..] = torch.dtypes;
        check(&made(2, number, META)?, number, META)?;
        check(negated, float, CPU)?;
        let places = Places::find(torch, py, float, place?, handle_of)?;
        Some(Self { offset: place?, places, kinds: [const { OnceLock::new() }; PLACES] })
    }

    #[inline]
    fn members(&self, handle: &Handle<'_>) -> Members {
        // SAFETY: members of a tensor that lives.
        unsafe { start(handle).byte_add(self.offset).cast::<Members>().read() }
    }

    /// The memory of a tensor's storage. `None` where it has no storage.
    #[inline]
    fn memory(&self, handle: &Handle<'_>) -> Option<Memory> {
        // SAFETY: the address of a storage of a tensor that lives, or null, and members of that storage.
        unsafe {
            let storage: *const u8 = start(handle).byte_add(self.places.storage).cast::<*const u8>().read();
            (!storage.is_null()).then(|| storage.byte_add(self.places.memory).cast::<Memory>().read())
        }
    }

    /// Whether autograd keeps nothing of a tensor: then it wants no gradient, and has no tangent. `false` may
    /// be wrong.
    #[inline]
    pub(super) fn is_unknown_to_autograd(&self, handle: &Handle<'_>) -> bool {
        // SAFETY: a word of a tensor that lives.
        unsafe { start(handle).byte_add(self.places.autograd).cast::<usize>().read() == 0 }
    }

    /// What a tensor's two words mean, if that is known.
    #[inline]
    fn kind(&self, about: u64, keys: u64) -> Option<&Kind> {
        let mut known = self.places(about, keys).map_while(OnceLock::get);
        known.find(|kind| kind.about == about && kind.keys == keys)
    }

    /// Where the elements of a tensor on a GPU are, if it is of a kind that is known. Others are not compared.
    #[inline]
    pub(super) fn address(&self, handle: &Handle<'_>) -> Option<usize> {
        // SAFETY: members of a tensor that lives, which nothing changes while Python's objects are read.
        let members = unsafe { &*start(handle).byte_add(self.offset).cast::<Members>() };
        let kind = self.kind(members.about, members.keys).filter(|kind| kind.device.kind == Device::CUDA)?;
        Some(self.memory(handle)?.address(members.storage_offset, kind.dtype))
    }

    /// The places that a kind may be at.
    #[inline]
    fn places(&self, about: u64, keys: u64) -> impl Iterator<Item = &OnceLock<Kind>> {
        let mixed = (about ^ keys.rotate_left(24)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        (0..4).map(move |step| &self.kinds[(mixed as usize + step) % PLACES])
    }

    /// Reads a tensor of a kind that is known: its dtype as libtorch's number. `None`, and nothing filled in,
    /// where it has to be read otherwise.
    #[inline]
    pub(super) fn read(&self, handle: &Handle<'_>, write: bool, into: &mut Tensor) -> Option<i32> {
        let Members { dims, sizes, strides, numel, about, keys, .. } = self.members(handle);
        let kind = self.kind(about, keys)?;
        // Asked of PyTorch, which makes a copy now of what is to be copied on write.
        let address = address(handle, write)?;
        if dims > MAX_DIMS || (address < OFFSETS && numel != 0) {
            return None;
        }
        let on_gpu = kind.device.kind == Device::CUDA;
        let owner = if on_gpu { self.memory(handle)?.owner } else { [0; 2] };
        let numbers = (&sizes[..dims], Some(&strides[..dims]));
        let is_filled = into.fill(address, kind.dtype, kind.device, false, numbers.0, numbers.1);
        if on_gpu {
            let [first, second] = owner;
            into.words = [about, keys, first as u64, second as u64];
        }
        is_filled.then_some(kind.number)
    }

    /// Whether a tensor is what [`Fields::read`] has read: the same numbers, at the same place, in memory that
    /// may be written to as it might then. `false` may be wrong.
    #[inline]
    pub(super) fn is(&self, handle: &Handle<'_>, read: &Tensor) -> bool {
        // SAFETY: members of a tensor that lives, which nothing changes while Python's objects are read.
        let members = unsafe { &*start(handle).byte_add(self.offset).cast::<Members>() };
        let &Members { dims, ref sizes, ref strides, storage_offset, about, keys, .. } = members;
        let [known_about, known_keys, first, second] = read.words;
        if ((known_about ^ about) | (known_keys ^ keys)) != 0 {
            return false;
        }
        let Some(memory) = self.memory(handle) else { return false };
        memory.address(storage_offset, read.dtype) == read.address
            && memory.owner == [first as usize, second as usize]
            && read.lies_so(dims, sizes, strides)
    }

    /// Learns the kind of a tensor that was read otherwise, and is no lazy view.
    #[cold]
    pub(super) fn learn(&self, handle: &Handle<'_>, number: i32, tensor: &Tensor) {
        let Members { dims, sizes, strides, about, keys, .. } = self.members(handle);
        let is_same = dims == tensor.shape().len()
            && dims <= MAX_DIMS
            && sizes[..dims] == *tensor.shape()
            && strides[..dims] == *tensor.strides();
        if is_same {
            let kind = Kind { about, keys, device: tensor.device, dtype: tensor.dtype, number };
            let is_there = |known: &Kind| known.about == about && known.keys == keys;
            let mut places = self.places(about, keys);
            places.find(|place| is_there(place.get_or_init(|| kind)));
        }
    }
}

impl Memory {
    /// Where the elements of a tensor are that begins at such an offset.
    #[inline]
    fn address(&self, storage_offset: i64, dtype: DType) -> usize {
        self.start.wrapping_add((storage_offset as usize).wrapping_mul(dtype.size()))
    }
}

impl Places {
    /// Looks for them in tensors that are made for that. `members` is the offset of [`Members`].
    fn find<'a>(
        torch: &Libtorch,
        py: Python<'_>,
        float: i32,
        members: usize,
        handle_of: impl Fn(&Bound<'_, PyAny>) -> Lent<'a>,
    ) -> Option<Self> {
        const WORD: usize = size_of::<usize>();
        /// Words of a `c10::StorageImpl` that are looked at, which has more.
        const STORAGE_WORDS: usize = 8;
        let made = |length: usize| torch.empty(&[length], float, Device::CPU).ok()?.object(py).ok();
        let storage_of = |object: &Bound<'_, PyAny>| -> Option<usize> {
            let storage = object.call_method0(intern!(py, "untyped_storage")).ok()?;
            storage.getattr(intern!(py, "_cdata")).ok()?.extract().ok()
        };
        let start_of = |object: &Bound<'_, PyAny>| start(&handle_of(object));
        // SAFETY: words of a tensor that lives, before its `Members`.
        let word = |object: &Bound<'_, PyAny>, at: usize| unsafe {
            start_of(object).byte_add(at).cast::<usize>().read()
        };
        let ours = [made(5)?, made(70)?];
        let offsets = || (2 * WORD..members).step_by(WORD);
        let storages = [storage_of(&ours[0])?, storage_of(&ours[1])?];
        let storage = offsets().find(|at| (0..2).all(|i| word(&ours[i], *at) == storages[i]))?;
        let data_of = |object: &Bound<'_, PyAny>| -> Option<usize> {
            object.call_method0(intern!(py, "data_ptr")).ok()?.extract().ok()
        };
        let data = [data_of(&ours[0])?, data_of(&ours[1])?];
        let memory = (0..STORAGE_WORDS - 2).map(|i| i * WORD).find(|at| {
            // SAFETY: words of storages that live.
            (0..2)
                .all(|i| unsafe { *std::ptr::with_exposed_provenance::<usize>(storages[i] + at) } == data[i])
        })?;
        // Autograd learns of a tensor when it wants a gradient.
        let before: Vec<usize> = offsets().map(|at| word(&ours[0], at)).collect();
        ours[0].call_method0(intern!(py, "requires_grad_")).ok()?;
        let is_learned = |(at, before): &(usize, usize)| *before == 0 && word(&ours[0], *at) != 0;
        let (autograd, _) = only(offsets().zip(before).filter(is_learned))?;
        let places = Self { storage, memory, autograd };
        let fields = Fields { offset: members, places, kinds: [const { OnceLock::new() }; PLACES] };
        // Whose memory is shared by a copy on write is seen of its owner, not of its address.
        let memory_of = |object: &Bound<'_, PyAny>| fields.memory(&handle_of(object));
        let (old, part) =
            (memory_of(&ours[1])?, ours[1].get_item(pyo3::types::PySlice::new(py, 3, 9, 2)).ok()?);
        let module = py.import(intern!(py, "torch")).ok()?;
        let lazy = module.call_method1(intern!(py, "_lazy_clone"), (&ours[1],)).ok()?;
        let shared = memory_of(&ours[1])?;
        let is_right = memory_of(&part)?.start == old.start
            && shared.start == old.start
            && memory_of(&lazy)?.start == old.start
            && shared.owner != old.owner
            && memory_of(&lazy)?.owner != old.owner;
        is_right.then_some(places)
    }
}

/// The one thing that there is.
fn only<T>(mut all: impl Iterator<Item = T>) -> Option<T> {
    let first = all.next()?;
    all.next().is_none().then_some(first)
}

/// Where a tensor's elements are, as PyTorch says.
#[inline]
fn address(handle: &Handle<'_>, write: bool) -> Option<usize> {
    // SAFETY: a tensor that lives.
    let at = unsafe {
        match write {
            true => ask!(handle.1, aoti_torch_get_data_ptr(handle.0)).ok()?.addr(),
            false => ask!(handle.1, torch_get_const_data_ptr(handle.0)).ok()?.addr(),
        }
    };
    Some(at)
}

/// Where the rest of a tensor is.
#[inline]
fn start(handle: &Handle<'_>) -> *const u8 {
    // SAFETY: an `at::Tensor` that lives, which begins with the address of its `c10::TensorImpl`.
    unsafe { handle.0.cast::<*const u8>().read() }
}
