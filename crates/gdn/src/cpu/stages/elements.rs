//! Elements of tensors, to and from rows of f32.

use crate::{
    cpu::{
        lanes::{Bf16, Element, F16, F32, Register, WIDEST},
        scratch::padded,
    },
    dtype::Dtype,
    tensor::Operand,
};

/// Has a block compiled for each dtype, with `$element` as its name for it.
macro_rules! for_dtype {
    ($dtype:expr, $element:ident => $work:expr) => {
        match $dtype {
            Dtype::F32 => {
                type $element = F32;
                $work
            }
            Dtype::BF16 => {
                type $element = Bf16;
                $work
            }
            Dtype::F16 => {
                type $element = F16;
                $work
            }
        }
    };
}
pub(in crate::cpu) use for_dtype;

/// `len` elements, `stride` bytes from one to the next, as f32. `dst` has room for whole registers, and zeros
/// are put where they pass `len`.
///
/// # Safety
/// The elements can be read; `dst` has `padded(len)` f32; the machine has L's instruction set.
#[inline(always)]
pub(super) unsafe fn load<L: Register>(
    dtype: Dtype,
    src: *const u8,
    stride: usize,
    len: usize,
    dst: *mut f32,
) {
    for_dtype!(dtype, E => {
        let whole = if stride == E::BYTES { len / L::LEN * L::LEN } else { 0 };
        // SAFETY: the caller's promise.
        unsafe {
            for i in (0..whole).step_by(L::LEN) {
                E::load::<L>(src.add(i * E::BYTES)).store(dst.add(i));
            }
            for i in whole..len {
                *dst.add(i) = E::read(src.add(i * stride));
            }
        }
    });
    for i in len..padded(len) {
        // SAFETY: as above.
        unsafe { *dst.add(i) = 0.0 };
    }
}

/// `len` f32 as elements, `stride` bytes from one to the next.
///
/// # Safety
/// The elements can be written; `src` has `len` f32; the machine has L's instruction set.
#[inline(always)]
pub(super) unsafe fn store<L: Register>(
    dtype: Dtype,
    src: *const f32,
    len: usize,
    dst: *mut u8,
    stride: usize,
) {
    for_dtype!(dtype, E => {
        let whole = if stride == E::BYTES { len / L::LEN * L::LEN } else { 0 };
        // SAFETY: the caller's promise.
        unsafe {
            for i in (0..whole).step_by(L::LEN) {
                E::store(L::load(src.add(i)), dst.add(i * E::BYTES));
            }
            for i in whole..len {
                E::write(*src.add(i), dst.add(i * stride));
            }
        }
    });
}

/// The address of an element.
#[inline(always)]
pub(in crate::cpu) fn at<const D: usize>(operand: &Operand<*mut u8, Dtype, D>, place: [usize; D]) -> *mut u8 {
    let offset: usize = place.iter().zip(operand.strides).map(|(i, stride)| i * stride).sum();
    operand.at.wrapping_add(offset * operand.kind.size())
}

/// Bytes from an element to the next along a dim.
#[inline(always)]
pub(in crate::cpu) fn step<const D: usize>(operand: &Operand<*mut u8, Dtype, D>, dim: usize) -> usize {
    operand.strides[dim] * operand.kind.size()
}

/// Columns of `len` channels as rows of f32, each of them whole registers at `dst(column)`: a channel's
/// columns and the next channel's are `channel` and `column` bytes apart. Zeros where rows pass `len`.
///
/// # Safety
/// As [`load`], for each column.
#[inline(always)]
pub(super) unsafe fn load_columns<L: Register>(
    dtype: Dtype,
    src: *const u8,
    [channel, column]: [usize; 2],
    len: usize,
    columns: usize,
    mut dst: impl FnMut(usize) -> *mut f32,
) {
    // Channels that are loaded by whole registers, of any instruction set.
    let mut whole = 0;
    // SAFETY: the caller's promises.
    unsafe {
        if column == dtype.size() && channel == columns * column {
            whole = len / WIDEST * WIDEST;
            match columns {
                3 => {
                    let rows = [dst(0), dst(1), dst(2)];
                    for_dtype!(dtype, E => for i in (0..whole).step_by(L::LEN) {
                        let side_by_side = load_side_by_side::<L, E, 3>(src.add(i * channel));
                        store_each(L::unzip_three(side_by_side), rows, i);
                    });
                }
                4 => {
                    let rows = [dst(0), dst(1), dst(2), dst(3)];
                    for_dtype!(dtype, E => for i in (0..whole).step_by(L::LEN) {
                        let [a, b, c, d] = load_side_by_side::<L, E, 4>(src.add(i * channel));
                        let ([even, odd], [evens, odds]) = (L::unzip([a, b]), L::unzip([c, d]));
                        let ([a, c], [b, d]) = (L::unzip([even, evens]), L::unzip([odd, odds]));
                        store_each([a, b, c, d], rows, i);
                    });
                }
                _ => whole = 0,
            }
        }
        if whole < len {
            for i in 0..columns {
                let src = src.wrapping_add(whole * channel + i * column);
                load::<L>(dtype, src, channel, len - whole, dst(i).add(whole));
            }
        }
    }
}

/// The inverse of [`load_columns`], of rows at `src(column)`.
///
/// # Safety
/// As [`store`], for each column.
#[inline(always)]
pub(super) unsafe fn store_columns<L: Register>(
    dtype: Dtype,
    src: impl Fn(usize) -> *const f32,
    len: usize,
    columns: usize,
    dst: *mut u8,
    [channel, column]: [usize; 2],
) {
    let mut whole = 0;
    // SAFETY: the caller's promises.
    unsafe {
        if column == dtype.size() && channel == columns * column {
            whole = len / WIDEST * WIDEST;
            match columns {
                3 => {
                    let rows = [src(0), src(1), src(2)];
                    for_dtype!(dtype, E => for i in (0..whole).step_by(L::LEN) {
                        let side_by_side = L::zip_three(load_each(rows, i));
                        store_side_by_side::<L, E, 3>(side_by_side, dst.add(i * channel));
                    });
                }
                4 => {
                    let rows = [src(0), src(1), src(2), src(3)];
                    for_dtype!(dtype, E => for i in (0..whole).step_by(L::LEN) {
                        let [a, b, c, d] = load_each::<L, 4>(rows, i);
                        let ([even, evens], [odd, odds]) = (L::zip([a, c]), L::zip([b, d]));
                        let ([a, b], [c, d]) = (L::zip([even, odd]), L::zip([evens, odds]));
                        store_side_by_side::<L, E, 4>([a, b, c, d], dst.add(i * channel));
                    });
                }
                _ => whole = 0,
            }
        }
        if whole < len {
            for i in 0..columns {
                let dst = dst.wrapping_add(whole * channel + i * column);
                store::<L>(dtype, src(i).add(whole), len - whole, dst, channel);
            }
        }
    }
}

/// N registers of elements.
///
/// # Safety
/// The elements can be read; the machine has L's instruction set.
#[inline(always)]
unsafe fn load_side_by_side<L: Register, E: Element, const N: usize>(src: *const u8) -> [L; N] {
    // SAFETY: the caller's promises.
    unsafe {
        let mut registers = [L::zero(); N];
        for (n, register) in registers.iter_mut().enumerate() {
            *register = E::load(src.add(n * L::LEN * E::BYTES));
        }
        registers
    }
}

/// The inverse of [`load_side_by_side`].
///
/// # Safety
/// The elements can be written.
#[inline(always)]
unsafe fn store_side_by_side<L: Register, E: Element, const N: usize>(registers: [L; N], dst: *mut u8) {
    for (n, register) in registers.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { E::store(register, dst.add(n * L::LEN * E::BYTES)) };
    }
}

/// A register of each row, from `i` on.
///
/// # Safety
/// The rows can be read there; the machine has L's instruction set.
#[inline(always)]
unsafe fn load_each<L: Register, const N: usize>(rows: [*const f32; N], i: usize) -> [L; N] {
    // SAFETY: the caller's promises.
    unsafe {
        let mut registers = [L::zero(); N];
        for (register, row) in registers.iter_mut().zip(rows) {
            *register = L::load(row.add(i));
        }
        registers
    }
}

/// The inverse of [`load_each`].
///
/// # Safety
/// The rows can be written there.
#[inline(always)]
unsafe fn store_each<L: Register, const N: usize>(registers: [L; N], rows: [*mut f32; N], i: usize) {
    for (register, row) in registers.into_iter().zip(rows) {
        // SAFETY: the caller's promise.
        unsafe { register.store(row.add(i)) };
    }
}
