//! Decode and prefill on Python's objects: tensors of PyTorch's, or of anybody's who speaks DLPack.

use gdn::Heads;
use pyo3::{
    Borrowed,
    prelude::*,
    types::{PySequence, PyTuple},
};

use super::layer::{
    CONV_WEIGHT, COUNT, NORM_WEIGHT, Names, OUT, Operands, WRITTEN, imagined, is_index, is_written,
};
use crate::{
    dlpack,
    exit::{self, Outside},
    ops::Place,
    outputs::{fresh, handed_over},
    tensor::{Tensor, type_error, value_error},
    torch::{self, Libtorch, type_name},
};

/// The objects that a call of Python's has, by position.
pub(crate) type Objects<'a, 'py> = [Option<Borrowed<'a, 'py, PyAny>>; COUNT];

/// What is asked with a call's objects.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Run,
    /// Only whether it could.
    Check,
}

/// The objects of a call, PyTorch's tensors that were not read yet.
pub(crate) struct Unread<'a, 'py> {
    torch: &'static Libtorch,
    objects: &'a Objects<'a, 'py>,
}

impl Unread<'_, '_> {
    /// Where the elements of one on a GPU are, if that is known without reading it.
    #[inline]
    pub(crate) fn address(&self, i: usize) -> Option<usize> {
        self.torch.address(&*self.objects[i]?)
    }

    /// Whether they are those that were read once, as they were then. `false` may be wrong.
    #[inline]
    pub(crate) fn are(&self, read: &[Option<Tensor>; COUNT]) -> bool {
        self.objects.iter().zip(read).all(|(object, read)| match (object, read) {
            (None, None) => true,
            (Some(object), Some(read)) => self.torch.is_same(object, read),
            _ => false,
        })
    }
}

/// An op on Python's objects: `None` where PyTorch's operator is to be called instead, because PyTorch must
/// see it.
///
/// `check` checks what is known of the tensors, and makes of it what `run` needs, which does it: the tensors
/// are where they say for as long as that takes. `recall` does both at once, for a call that was checked before:
/// what it returns is to be run.
#[expect(clippy::too_many_arguments, reason = "a call, and what is to be done with it")]
pub(crate) fn on_objects<'py, P: Send, R: FnOnce(&Place) -> PyResult<()> + Send>(
    py: Python<'py>,
    names: &'static Names,
    heads: &Heads,
    objects: &Objects<'_, 'py>,
    wish: Wish,
    recall: impl Fn(&Unread<'_, 'py>) -> Option<R>,
    check: impl Fn(&Operands, &Place) -> PyResult<P>,
    run: impl Fn(P, &Operands, &Place) -> PyResult<()> + Sync,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let first = if objects[0].is_some() { 0 } else { 2 };
    let Some(lead) = objects[first] else {
        return Err(value_error(format!("{} is None, expected a tensor", names[first])));
    };
    let torch = torch::get().filter(|torch| torch.is_tensor(&lead));
    let place = if torch.is_some() { torch::PLACE } else { Place::OURS };
    // What is asked of PyTorch may give up the GIL.
    let outside = torch.map(|_| Outside::new(py));
    if let (Wish::Run, Some(torch)) = (wish, torch)
        && let Some(run) = recall(&Unread { torch, objects })
    {
        if !is_told(torch, py, names, objects)? {
            return Ok(None);
        }
        exit::detach(py, outside.as_ref(), || run(&place))?;
        return Ok(objects[OUT].map(|out| out.to_owned()));
    }
    let (mut operands, way) = (Operands::new(names), torch.map(Libtorch::way));
    let (mut lent, mut is_operator) = (Vec::new(), false);
    for (i, object) in objects.iter().enumerate() {
        let Some(object) = object else { continue };
        let tensor = operands.tensors[i].insert(Tensor::NONE);
        match torch.zip(way) {
            Some((torch, way)) if torch.borrow(way, object, names[i], is_written(i), tensor)? => {}
            Some((torch, _)) if torch.is_tensor(object) => {
                if wish == Wish::Check {
                    return Err(torch.unwritable(object, names[i], names[first], &lead));
                }
                is_operator = true;
            }
            None if !torch::is_tensor(object) => lent.extend(dlpack::borrow(object, names[i], tensor)?),
            _ => {
                let (got, expected) = (type_name(object), type_name(&lead));
                return Err(type_error(format!("{} is a {got}, {} is a {expected}", names[i], names[first])));
            }
        }
    }
    let known = operands.tensors[first].unwrap_or(Tensor::NONE);
    let is_fresh = !operands.has(OUT);
    let (mut shape, mut checked) = ([0; 3], None);
    if !is_operator {
        // All that can be known is, so that errors are the same through both doors.
        if is_fresh {
            shape = operands.out_shape(heads)?;
            operands.tensors[OUT] = Some(imagined(&known, &shape));
        }
        checked = Some(check(&operands, &place)?);
    }
    if wish == Wish::Check {
        return Ok(None);
    }
    if let Some(torch) = torch
        && (is_operator || !is_told(torch, py, names, objects)?)
    {
        return Ok(None);
    }
    let (mut buffers, mut out) = (Vec::new(), objects[OUT].map(|out| out.to_owned()));
    if is_fresh {
        let (made, tensor) = fresh(torch, &lead, &known, &shape, names[OUT], &mut buffers)?;
        (out, operands.tensors[OUT]) = (Some(made), Some(tensor));
        // It is elsewhere than was imagined.
        checked = Some(check(&operands, &place)?);
    }
    let Some(checked) = checked else { return Ok(None) };
    exit::detach(py, outside.as_ref(), || run(checked, &operands, &place))?;
    drop(lent);
    match buffers.is_empty() {
        true => Ok(out),
        false => Ok(handed_over(&lead, buffers)?.pop()),
    }
}

/// Tells autograd what is to be written to. `false`, and nothing told, where PyTorch has to see the call.
#[inline]
fn is_told<'py>(
    torch: &Libtorch,
    py: Python<'py>,
    names: &'static Names,
    objects: &Objects<'_, 'py>,
) -> PyResult<bool> {
    // Indices have no derivatives.
    let floats = objects.iter().enumerate().filter(|(i, _)| !is_index(*i)).filter_map(|(_, object)| *object);
    if torch.is_watched(py, floats, std::iter::empty())? {
        return Ok(false);
    }
    let written = WRITTEN.iter().filter_map(|i| Some((objects[*i]?, names[*i])));
    torch.advance_versions(py, written)?;
    Ok(true)
}

/// The projections of a call, two or four tensors in a tuple or list, as a tuple.
pub(crate) fn projections_of<'py>(projections: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyTuple>> {
    match (projections.cast_exact::<PyTuple>(), projections.cast::<PySequence>()) {
        (Ok(tuple), _) => Ok(tuple.clone()),
        // A tensor can be gone through, and is none.
        (_, Ok(sequence)) if !torch::is_tensor(projections) => sequence.to_tuple(),
        _ => Err(type_error(format!("projections is a {}, expected {PROJECTIONS}", type_name(projections)))),
    }
}

/// What they are.
const PROJECTIONS: &str = "(mixed_qkvz, mixed_ba) or (mixed_qkv, z, b, a)";

/// Puts the projections and the five weights of a call, which may be none, among its objects.
#[inline]
pub(crate) fn put_read<'a, 'py>(
    objects: &mut Objects<'a, 'py>,
    projections: &'a Bound<'py, PyTuple>,
    weights: &'a Bound<'py, PyTuple>,
) -> PyResult<()> {
    let start = match projections.len() {
        2 => 0,
        4 => 2,
        got => return Err(value_error(format!("projections has {got} tensors, expected {PROJECTIONS}"))),
    };
    for (object, given) in objects[start..].iter_mut().zip(projections.iter_borrowed()) {
        *object = Some(given);
    }
    if weights.len() != NORM_WEIGHT + 1 - CONV_WEIGHT {
        return Err(value_error(format!("weights has {} tensors, expected 5", weights.len())));
    }
    for (object, given) in objects[CONV_WEIGHT..].iter_mut().zip(weights.iter_borrowed()) {
        *object = Some(given).filter(|given| !given.is_none());
    }
    Ok(())
}

/// A call's objects: projections, weights, and others by position, which may be none.
#[inline]
pub(crate) fn objects_of<'a, 'py, const N: usize>(
    projections: &'a Bound<'py, PyTuple>,
    weights: &'a Bound<'py, PyTuple>,
    others: [(usize, Option<&'a Bound<'py, PyAny>>); N],
) -> PyResult<Objects<'a, 'py>> {
    let mut objects = [None; COUNT];
    put_read(&mut objects, projections, weights)?;
    for (i, given) in others {
        objects[i] = given.map(Bound::as_borrowed);
    }
    Ok(objects)
}
