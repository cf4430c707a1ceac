//! The oracle of split and merge: byte by byte, written from the layouts alone.

use crate::{
    heads::Heads,
    packing::Packing,
    rows::Rows,
    view::{Packed, Unpacked},
};

/// Where a feature of a packed row goes: the tensor (`0` is `mixed_qkv` or `b`, `1` is `z` or `a`) and the
/// feature there.
pub type Place = (usize, usize);

/// Where feature `f` of a row of `mixed_qkvz` goes.
pub fn place_of_qkvz(heads: &Heads, packing: Packing, f: usize) -> Place {
    let (hk, dk, r_dv) = (heads.num_k_heads(), heads.head_k_dim(), heads.ratio() * heads.head_v_dim());
    let (qk, v) = (hk * dk, hk * r_dv);
    match packing {
        Packing::Contiguous if f < 2 * qk + v => (0, f),
        Packing::Contiguous => (1, f - 2 * qk - v),
        Packing::Interleaved => {
            let (head, f) = (f / (2 * dk + 2 * r_dv), f % (2 * dk + 2 * r_dv));
            match f {
                f if f < dk => (0, head * dk + f),
                f if f < 2 * dk => (0, qk + head * dk + (f - dk)),
                f if f < 2 * dk + r_dv => (0, 2 * qk + head * r_dv + (f - 2 * dk)),
                f => (1, head * r_dv + (f - 2 * dk - r_dv)),
            }
        }
    }
}

/// Where feature `f` of a row of `mixed_ba` goes.
pub fn place_of_ba(heads: &Heads, packing: Packing, f: usize) -> Place {
    let (hv, r) = (heads.num_v_heads(), heads.ratio());
    match packing {
        Packing::Contiguous => (f / hv, f % hv),
        Packing::Interleaved => (f % (2 * r) / r, f / (2 * r) * r + f % r),
    }
}

/// Whether `unpacked` is `packed` taken apart, looked at element by element; else where the first difference
/// is.
///
/// # Errors
/// A sentence that names the row and the feature. Shapes are taken to be right.
pub fn check(
    heads: &Heads,
    packing: Packing,
    packed: &Packed<Rows<'_>>,
    unpacked: &Unpacked<Rows<'_>>,
) -> Result<(), String> {
    let Unpacked { mixed_qkv, z, b, a } = unpacked;
    let qkvz: Vec<Place> = (0..heads.qkvz_features()).map(|f| place_of_qkvz(heads, packing, f)).collect();
    let ba: Vec<Place> = (0..heads.ba_features()).map(|f| place_of_ba(heads, packing, f)).collect();
    for (name, from, to, places) in
        [("mixed_qkvz", &packed.mixed_qkvz, [mixed_qkv, z], qkvz), ("mixed_ba", &packed.mixed_ba, [b, a], ba)]
    {
        let size = from.element_size();
        for n in 0..from.num_rows() {
            let source = from.row(n).unwrap_or_default();
            let targets = to.map(|rows| rows.row(n).unwrap_or_default());
            for (f, &(tensor, g)) in places.iter().enumerate() {
                let wanted = source.get(f * size..(f + 1) * size);
                let got = targets[tensor].get(g * size..(g + 1) * size);
                if wanted.is_none() || wanted != got {
                    return Err(format!(
                        "row {n} of {name}: feature {f} is {wanted:02x?}, feature {g} of output {tensor} is {got:02x?}"
                    ));
                }
            }
        }
    }
    Ok(())
}
