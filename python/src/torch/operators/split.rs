//! The operators `gdn::split` and `gdn::merge`.

use gdn::{Direction, TENSORS};
use pyo3::prelude::*;

use super::{HEADS, Operator, Stack, kernels};
use crate::{
    ops::{
        self,
        split::{self, Call},
    },
    tensor::Tensor,
    torch::{Libtorch, PLACE},
};

kernels! {
    split of c"gdn::split": call(Direction::Split, false);
    split_out of c"gdn::split": call(Direction::Split, true);
    merge of c"gdn::merge": call(Direction::Merge, false);
    merge_out of c"gdn::merge": call(Direction::Merge, true);
}

/// Both, with their out variants.
pub(super) fn operators() -> [Operator; 4] {
    let packed = "Tensor mixed_qkvz, Tensor mixed_ba";
    let unpacked = "Tensor mixed_qkv, Tensor z, Tensor b, Tensor a";
    [
        Operator {
            name: c"split",
            schema: format!("split({packed}, {HEADS}) -> ({unpacked})"),
            kernel: split,
        },
        Operator {
            name: c"split.out",
            schema: format!(
                "split.out({packed}, {HEADS}, *, Tensor(a!) mixed_qkv, Tensor(b!) z, Tensor(c!) b, Tensor(d!) a) -> ()"
            ),
            kernel: split_out,
        },
        Operator {
            name: c"merge",
            schema: format!("merge({unpacked}, {HEADS}) -> ({packed})"),
            kernel: merge,
        },
        Operator {
            name: c"merge.out",
            schema: format!(
                "merge.out({unpacked}, {HEADS}, *, Tensor(a!) mixed_qkvz, Tensor(b!) mixed_ba) -> ()"
            ),
            kernel: merge_out,
        },
    ]
}

/// # Safety
/// `stack` is that of the operator.
unsafe fn call(torch: &Libtorch, stack: *mut u64, direction: Direction, out: bool) -> PyResult<()> {
    let (read, written) = (direction.read(), direction.written());
    let mut arguments = Stack { next: stack, torch };
    let mut handles = [const { None }; 6];
    // SAFETY: the schema's arguments in their order.
    let (heads, packing) = unsafe {
        for i in read.clone() {
            handles[i] = Some(arguments.tensor());
        }
        let heads = std::array::from_fn(|_| arguments.int());
        let packing = arguments.text();
        if out {
            for i in written.clone() {
                handles[i] = Some(arguments.tensor());
            }
        }
        (heads, packing)
    };
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
