//! The order of the tensors in a file, and what an undo makes of it.

use std::{cmp::Ordering, collections::HashSet};

use safetensors::Dtype;

use super::names::ModuleName;
use crate::{
    files::Input,
    header::{Entry, head},
};

/// Where data begins, as in files that safetensors itself writes.
pub(super) const ALIGNMENT: usize = 8;

/// A tensor in the order of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) dtype: Dtype,
}

impl Listed {
    /// The order in which safetensors itself writes tensors: wide elements first, then by name.
    pub(super) fn usual_order(&self, other: &Self) -> Ordering {
        other.dtype.cmp(&self.dtype).then_with(|| self.name.cmp(&other.name))
    }
}

pub(super) fn is_in_usual_order(tensors: &[Listed]) -> bool {
    tensors.is_sorted_by(|a, b| a.usual_order(b) != Ordering::Greater)
}

/// Whether the head of a file is just as it would be written here.
pub(super) fn is_written_as_usual(input: &Input) -> anyhow::Result<bool> {
    let names = input.names();
    let infos = names.iter().filter_map(|name| input.place(name).map(|(info, _)| (name, info)));
    let entries = infos.map(|(name, info)| Entry {
        name,
        dtype: info.dtype,
        shape: &info.shape,
        bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
    });
    Ok(head(entries, input.metadata(), ALIGNMENT)? == input.head())
}

/// The order that an undo gives to the tensors of a file, back under the names of `before`.
pub(super) fn undone(after: &[Listed], before: &[Listed]) -> Vec<Listed> {
    let there: HashSet<&str> = before.iter().map(|tensor| tensor.name.as_str()).collect();
    let mut back = Vec::new();
    for tensor in after {
        let listed = |name: String| Listed { name, dtype: tensor.dtype };
        match ModuleName::parse(&tensor.name) {
            None => back.push(tensor.clone()),
            Some(_) if there.contains(tensor.name.as_str()) => back.push(tensor.clone()),
            Some(module) => match module.part {
                None => back.extend([0, 1].map(|part| listed(module.of(Some(part))))),
                Some(0) => back.push(listed(module.of(None))),
                Some(_) => {}
            },
        }
    }
    if is_in_usual_order(after) {
        back.sort_by(Listed::usual_order);
    }
    back
}
