//! The operators `gdn::split` and `gdn::merge`: their schemas, and kernels on libtorch's stack.

use std::{
    ffi::{CStr, CString, c_char},
    panic::AssertUnwindSafe,
};

use gdn::{Direction, TENSORS};
use pyo3::prelude::*;

use super::{
    Libtorch, PLACE,
    abi::{Failed, Kernel, Opaque, ask},
    get,
    handle::Handle,
};
use crate::{
    ops::{
        self,
        split::{self, Call},
    },
    tensor::Tensor,
};

/// What both operators take after their tensors.
const HEADS: &str =
    "int num_k_heads, int num_v_heads, int head_k_dim, int head_v_dim, str packing=\"interleaved\"";

/// Registers both, with their out variants, for the CPU and CUDA.
///
/// # Safety
/// To be called once.
pub(super) unsafe fn define(torch: &Libtorch) -> Result<(), Failed> {
    let file = c"gdn/python/src/torch/operators.rs".as_ptr();
    let packed = "Tensor mixed_qkvz, Tensor mixed_ba";
    let unpacked = "Tensor mixed_qkv, Tensor z, Tensor b, Tensor a";
    let schemas = [
        format!("split({packed}, {HEADS}) -> ({unpacked})"),
        format!(
            "split.out({packed}, {HEADS}, *, Tensor(a!) mixed_qkv, Tensor(b!) z, Tensor(c!) b, Tensor(d!) a) -> ()"
        ),
        format!("merge({unpacked}, {HEADS}) -> ({packed})"),
        format!("merge.out({unpacked}, {HEADS}, *, Tensor(a!) mixed_qkvz, Tensor(b!) mixed_ba) -> ()"),
    ];
    let check = |status: i32, function| if status == 0 { Ok(()) } else { Err(Failed(function)) };
    // SAFETY: texts that end with a zero, handles that libtorch gave, and kernels that take these operators'
    // arguments.
    unsafe {
        let definitions = ask!(torch, aoti_torch_library_init_def(c"gdn".as_ptr(), file, line!()))?;
        for schema in schemas {
            let schema = CString::new(schema).map_err(|_| Failed("aoti_torch_library_def"))?;
            check(
                (torch.call.aoti_torch_library_def)(definitions, schema.as_ptr()),
                "aoti_torch_library_def",
            )?;
        }
        for key in [c"CPU", c"CUDA"] {
            let library =
                ask!(torch, aoti_torch_library_init_impl(c"gdn".as_ptr(), key.as_ptr(), file, line!()))?;
            let kernels: [(&CStr, Kernel); 4] =
                [(c"split", split), (c"split.out", split_out), (c"merge", merge), (c"merge.out", merge_out)];
            for (name, kernel) in kernels {
                // The oldest version whose conventions are meant.
                let version = 2 << 56 | 10 << 48;
                let status = (torch.call.torch_library_impl)(library, name.as_ptr(), kernel, version);
                check(status, "torch_library_impl")?;
            }
        }
    }
    Ok(())
}

/// A text of libtorch's that is ours to delete.
struct Text<'a>(Opaque, &'a Libtorch);

impl Drop for Text<'_> {
    fn drop(&mut self) {
        // SAFETY: owned, and deleted once.
        unsafe { (self.1.call.torch_delete_string)(self.0) };
    }
}

impl Text<'_> {
    fn as_str(&self) -> Result<&str, Failed> {
        // SAFETY: a text that lives, of so many bytes.
        unsafe {
            let length = ask!(self.1, torch_string_length(self.0))?;
            let start: *const c_char = ask!(self.1, torch_string_c_str(self.0))?;
            std::str::from_utf8(std::slice::from_raw_parts(start.cast(), length))
                .map_err(|_| Failed("torch_string_c_str"))
        }
    }
}

/// The operators. A stack has the arguments, owned by the kernel, and gets the results; what goes wrong is
/// thrown as libtorch throws.
macro_rules! kernels {
    ($($name:ident($direction:ident, $out:literal);)*) => { $(
        unsafe extern "C-unwind" fn $name(stack: *mut u64, _: u64, _: u64) {
            // SAFETY: the stack of this operator.
            unsafe { kernel(stack, Direction::$direction, $out) }
        }
    )* };
}

kernels! {
    split(Split, false);
    split_out(Split, true);
    merge(Merge, false);
    merge_out(Merge, true);
}

/// The most of an error's sentence that PyTorch is told, with a zero at its end.
const SENTENCE: usize = 1024;

/// Nothing here is dropped while what `check` throws goes through: cleaning up would call this library's own
/// unwinder, which is not libtorch's where it was linked in.
///
/// # Safety
/// `stack` is that of the operator.
unsafe fn kernel(stack: *mut u64, direction: Direction, out: bool) {
    let Some(torch) = get() else { return };
    let mut sentence = [0; SENTENCE];
    // SAFETY: the caller's promise.
    if unsafe { succeeds(torch, stack, direction, out, &mut sentence) } {
        return;
    }
    let name = if direction == Direction::Split { c"gdn::split" } else { c"gdn::merge" };
    // SAFETY: texts that end with a zero. It throws, through frames that allow it.
    unsafe { (torch.check)(false, name.as_ptr(), c"gdn".as_ptr(), 0, sentence.as_ptr().cast()) }
}

/// Calls the operator. Where that fails, `sentence` says why, and ends with a zero.
///
/// # Safety
/// As [`kernel`].
#[inline(never)]
unsafe fn succeeds(
    torch: &Libtorch,
    stack: *mut u64,
    direction: Direction,
    out: bool,
    sentence: &mut [u8; SENTENCE],
) -> bool {
    // SAFETY: the caller's promise.
    let done = std::panic::catch_unwind(AssertUnwindSafe(|| unsafe { call(torch, stack, direction, out) }));
    let error = match done {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => Python::attach(|py| error.value(py).to_string()),
        Err(_) => "a bug of gdn: the operator panicked".to_owned(),
    };
    let text = error.replace('\0', " ");
    let length = (0..SENTENCE).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    sentence[..length].copy_from_slice(&text.as_bytes()[..length]);
    false
}

/// # Safety
/// As [`kernel`].
unsafe fn call(torch: &Libtorch, stack: *mut u64, direction: Direction, out: bool) -> PyResult<()> {
    let (read, written) = (direction.read(), direction.written());
    let mut next = 0;
    let mut argument = || {
        next += 1;
        // SAFETY: as many as the schema has.
        unsafe { *stack.add(next - 1) }
    };
    let mut handles = [const { None }; 6];
    for i in read.clone() {
        handles[i] = Some(Handle(argument() as Opaque, torch));
    }
    let heads = std::array::from_fn(|_| argument() as i64);
    let packing = Text(argument() as Opaque, torch);
    if out {
        for i in written.clone() {
            handles[i] = Some(Handle(argument() as Opaque, torch));
        }
    }
    let layout = ops::layout(heads, packing.as_str()?)?;
    let (mut tensors, mut dtypes) = ([Tensor::NONE; 6], [0; 6]);
    for i in read.clone() {
        if let Some(handle) = &handles[i] {
            dtypes[i] = handle.read(TENSORS[i], false, &mut tensors[i])?;
        }
    }
    if !out {
        let num_rows = split::check_read(&tensors, direction, &layout)?[read.start].num_rows;
        let device = tensors[read.start].device;
        for i in written.clone() {
            let shape = split::shape(&layout.heads, i, num_rows);
            let made = torch.empty(&shape, dtypes[direction.like(i)], device);
            handles[i] = Some(made.map_err(|failed| torch.error(failed))?);
        }
    }
    for i in written.clone() {
        if let Some(handle) = &handles[i] {
            handle.read(TENSORS[i], true, &mut tensors[i])?;
        }
    }
    let call = Call::new(layout, direction, &tensors)?;
    if out {
        torch.advance_versions_of(handles[written.clone()].iter().flatten(), &TENSORS[written.clone()])?;
    }
    // SAFETY: tensors that their handles keep; PyTorch's users answer for races as with any operator.
    unsafe { call.run(&PLACE)? };
    if !out {
        for (i, result) in written.enumerate() {
            if let Some(handle) = handles[result].take() {
                // SAFETY: the stack has room for the results, which are its to delete from here on.
                unsafe { *stack.add(i) = handle.0 as u64 };
                std::mem::forget(handle);
            }
        }
    }
    Ok(())
}
