//! Repacked weights against the oracle of the split, output by output.

mod support;

use gdn::{
    ArgumentError, Heads, Move, Packing, Projection, RepackError, Rows, RowsMut, WeightMap, reference,
    repack_weight,
};
use proptest::prelude::*;
use support::{Shape, Tensor};

/// Where the oracle puts output `f` of the interleaved weight: the tensor, and the output there.
fn place(heads: &Heads, projection: Projection, f: usize) -> (usize, usize) {
    match projection {
        Projection::Qkvz => reference::place_of_qkvz(heads, Packing::Interleaved, f),
        Projection::Ba => reference::place_of_ba(heads, Packing::Interleaved, f),
    }
}

/// The interleaved output that each contiguous one comes from, by the oracle.
fn order(heads: &Heads, projection: Projection) -> Vec<usize> {
    let first = match projection {
        Projection::Qkvz => heads.qkv_features(),
        Projection::Ba => heads.num_v_heads(),
    };
    let mut order = vec![usize::MAX; projection.features(heads)];
    for f in 0..order.len() {
        let (tensor, g) = place(heads, projection, f);
        order[[0, first][tensor] + g] = f;
    }
    order
}

/// What a map does to the numbers of the outputs; those it does not fill are `usize::MAX`.
fn applied(map: &WeightMap) -> Vec<usize> {
    let mut result = vec![usize::MAX; map.destinations()];
    for &Move { from, to, len } in map.moves() {
        for i in 0..len {
            assert_eq!(result[to + i], usize::MAX, "output {} is filled twice", to + i);
            result[to + i] = from + i;
        }
    }
    result
}

fn heads() -> impl Strategy<Value = Heads> {
    (1usize..7, 1usize..6, 1usize..40, 1usize..40)
        .prop_map(|(hk, ratio, dk, dv)| Heads::new(hk, hk * ratio, dk, dv).unwrap())
}

fn projection() -> impl Strategy<Value = Projection> {
    prop::sample::select(Projection::ALL.to_vec())
}

fn shape() -> impl Strategy<Value = Shape> {
    (0usize..5, 0usize..70).prop_map(|(padding, misalignment)| Shape { padding, misalignment })
}

proptest! {
    #[test]
    fn weights_there_and_back(
        heads in heads(), projection in projection(), hidden in 0usize..9, size in prop::sample::select(vec![1usize, 2, 4, 8]),
        dim in 0usize..2, shapes in [shape(), shape(), shape()],
    ) {
        let out = projection.features(&heads);
        let (rows, columns) = if dim == 0 { (out, hidden) } else { (hidden, out) };
        let weight = Tensor::numbered(rows, columns, size, shapes[0], 7);
        let mut repacked = Tensor::poisoned(rows, columns, size, shapes[1]);
        let map = WeightMap::new(&heads, projection, Packing::Contiguous);
        repack_weight(&map, dim, weight.rows(), repacked.rows_mut()).unwrap();
        repacked.assert_guards("repacked");
        for (g, f) in order(&heads, projection).into_iter().enumerate() {
            if dim == 0 {
                prop_assert_eq!(repacked.rows().row(g), weight.rows().row(f));
            } else {
                for n in 0..hidden {
                    let of = |tensor: &Tensor, i| tensor.rows().row(n).unwrap()[i * size..][..size].to_vec();
                    prop_assert_eq!(of(&repacked, g), of(&weight, f));
                }
            }
        }
        let mut undone = Tensor::poisoned(rows, columns, size, shapes[2]);
        let back = WeightMap::new(&heads, projection, Packing::Interleaved);
        repack_weight(&back, dim, repacked.rows(), undone.rows_mut()).unwrap();
        undone.assert_guards("undone");
        for n in 0..rows {
            prop_assert_eq!(undone.rows().row(n), weight.rows().row(n));
        }
    }

    #[test]
    fn parts_are_the_whole_taken_apart(heads in heads(), projection in projection()) {
        let order = order(&heads, projection);
        let mut undone = vec![usize::MAX; order.len()];
        for part in projection.tensors(&heads) {
            let to = WeightMap::new(&heads, projection, Packing::Contiguous).destination_part(part.clone());
            prop_assert_eq!(applied(&to), &order[part.clone()]);
            let back = WeightMap::new(&heads, projection, Packing::Interleaved).source_part(part.clone());
            prop_assert_eq!((back.sources(), back.destinations()), (part.len(), order.len()));
            for (f, g) in applied(&back).into_iter().enumerate().filter(|(_, g)| *g != usize::MAX) {
                prop_assert_eq!(undone[f], usize::MAX);
                undone[f] = order[part.start + g];
            }
        }
        prop_assert_eq!(undone, (0..order.len()).collect::<Vec<_>>());
    }

    #[test]
    fn blocks_keep_every_outputs_scale_or_are_refused(
        heads in heads(), projection in projection(), size in 1usize..48, part in prop::option::of(0usize..2),
    ) {
        let mut map = WeightMap::new(&heads, projection, Packing::Contiguous);
        let mut order = order(&heads, projection);
        if let Some(part) = part {
            let part = projection.tensors(&heads)[part].clone();
            map = map.destination_part(part.clone());
            order = order[part].to_vec();
        }
        let possible = order.chunks(size).all(|block| block.iter().all(|f| f / size == block[0] / size));
        match map.blocks(size) {
            Ok(blocks) => {
                prop_assert!(possible);
                let wanted: Vec<usize> = order.chunks(size).map(|block| block[0] / size).collect();
                prop_assert_eq!(applied(&blocks), wanted);
            }
            Err(error) => prop_assert!(!possible, "{error}"),
        }
        let whole = order.len().is_multiple_of(size)
            && order.chunks(size).all(|g| g[0].is_multiple_of(size) && (0..g.len()).all(|i| g[i] == g[0] + i));
        match map.groups(size) {
            Ok(groups) => {
                prop_assert!(whole);
                let wanted: Vec<usize> = order.chunks(size).map(|group| group[0] / size).collect();
                prop_assert_eq!(applied(&groups), wanted);
            }
            Err(error) => prop_assert!(!whole, "{error}"),
        }
    }

    #[test]
    fn the_shard_of_the_repacked_is_the_repacked_shard(
        hk in 1usize..5, ratio in 1usize..4, dk in 1usize..20, dv in 1usize..20, tp_size in 1usize..5, projection in projection(),
    ) {
        let heads = Heads::new(hk * tp_size, hk * tp_size * ratio, dk, dv).unwrap();
        let shard = heads.shard(tp_size).unwrap();
        let whole = applied(&WeightMap::new(&heads, projection, Packing::Contiguous));
        let of_shard = applied(&WeightMap::new(&shard, projection, Packing::Contiguous));
        // What a loader of contiguous weights takes for a rank: its share of each of [Q | K | V | Z] or [B |
        // A].
        let kinds = match projection {
            Projection::Qkvz => vec![heads.num_k_heads() * dk, heads.num_k_heads() * dk, heads.z_features(), heads.z_features()],
            Projection::Ba => vec![heads.num_v_heads(); 2],
        };
        for rank in 0..tp_size {
            let mut taken = Vec::new();
            let mut start = 0;
            for kind in &kinds {
                let share = kind / tp_size;
                taken.extend_from_slice(&whole[start + rank * share..][..share]);
                start += kind;
            }
            // The rank's share of the interleaved weight is a slice of its rows.
            let first = rank * of_shard.len();
            let repacked: Vec<usize> = of_shard.iter().map(|f| first + f).collect();
            prop_assert_eq!(taken, repacked);
        }
    }
}

#[test]
fn the_models_own_blocks() {
    for (hk, hv) in [(16, 32), (16, 48), (16, 64), (8, 16)] {
        let heads = Heads::new(hk, hv, 128, 128).unwrap();
        let map = WeightMap::new(&heads, Projection::Qkvz, Packing::Contiguous);
        assert_eq!(map.blocks(128).unwrap().destinations(), heads.qkvz_features() / 128);
        assert_eq!(map.groups(8).unwrap().moves().len(), map.moves().len());
    }
    // 64 outputs of in_proj_ba lie within one block, which any permutation leaves as it is.
    let heads = Heads::new(16, 32, 128, 128).unwrap();
    let ba = WeightMap::new(&heads, Projection::Ba, Packing::Contiguous);
    assert_eq!(ba.blocks(128).unwrap().moves(), [Move { from: 0, to: 0, len: 1 }]);
    // R = 2: eight outputs packed together are two heads' [b b a a], which part.
    let error = ba.groups(8).unwrap_err();
    assert_eq!(error, RepackError::Group { size: 8, from: 0, to: 0, len: 2 });
    assert_eq!(
        error.to_string(),
        "outputs 0..2 move to 0, but every 8 outputs are packed together and cannot part"
    );
    let narrow = WeightMap::new(&Heads::new(2, 4, 64, 128).unwrap(), Projection::Qkvz, Packing::Contiguous);
    assert_eq!(
        narrow.blocks(128).unwrap_err().to_string(),
        "block 0 of 128 outputs would be made of outputs 0 and 640, which have the scales of blocks 0 and 5"
    );
}

/// Heads come out of files: neither memory nor time may follow numbers that no tensor has confirmed.
#[test]
fn heads_that_are_too_many_and_dims_that_are_too_large() {
    let many = Heads::new(1 << 40, 1 << 40, 1, 1).unwrap();
    for (projection, indices) in
        [(Projection::Qkvz, 0), (Projection::Ba, 1), (Projection::Qkvz, (1 << 40) - 1)]
    {
        let error = WeightMap::for_indices(&many, projection, Packing::Contiguous, indices).unwrap_err();
        assert_eq!(error, RepackError::Heads { num_k_heads: 1 << 40, indices });
        assert!(error.to_string().contains("num_k_heads = 1099511627776"), "{error}");
    }
    let some = Heads::new(1 << 16, 1 << 16, 1, 1).unwrap();
    let map = WeightMap::for_indices(&some, Projection::Ba, Packing::Contiguous, 1).unwrap();
    assert_eq!(map.blocks(1 << 17).unwrap().moves(), [Move { from: 0, to: 0, len: 1 }]);
    let long = Heads::new(2, 2, 1 << 50, 1 << 50).unwrap();
    let map = WeightMap::new(&long, Projection::Qkvz, Packing::Contiguous);
    let small = WeightMap::new(&Heads::new(2, 2, 2, 2).unwrap(), Projection::Qkvz, Packing::Contiguous);
    assert_eq!(map.blocks(1 << 49).unwrap(), small);
    assert!(matches!(map.blocks((1 << 49) + 1), Err(RepackError::Block { .. })));
}

#[test]
fn wrong_arguments_are_named_and_write_nothing() {
    let heads = Heads::new(2, 4, 8, 8).unwrap();
    let map = WeightMap::new(&heads, Projection::Ba, Packing::Contiguous);
    let weight = vec![1u16; 80];
    let mut to = vec![0u16; 80];
    let mut go = |dim, (rows, columns): (usize, usize), (to_rows, to_columns): (usize, usize)| {
        let from = Rows::new(&weight, rows, columns).unwrap();
        repack_weight(&map, dim, from, RowsMut::new(&mut to, to_rows, to_columns).unwrap())
    };
    assert_eq!(go(2, (8, 3), (8, 3)).unwrap_err().to_string(), "dim is 2, it must be 0 or 1");
    assert_eq!(go(0, (7, 3), (8, 3)).unwrap_err().to_string(), "from has 7 rows, the outputs need 8");
    assert_eq!(go(0, (8, 3), (9, 3)).unwrap_err().to_string(), "to has 9 rows, the outputs need 8");
    assert_eq!(go(0, (8, 3), (8, 4)).unwrap_err().to_string(), "to has 4 columns, from has 3");
    assert_eq!(go(1, (8, 3), (8, 3)).unwrap_err().to_string(), "from has 3 columns, the outputs need 8");
    let zero = RepackError::Argument(ArgumentError::Zero { argument: "size" });
    assert_eq!((map.blocks(0), map.groups(0)), (Err(zero.clone()), Err(zero)));
    assert!(to.iter().all(|element| *element == 0));

    let mut bytes = vec![0u8; 80];
    let wide = RowsMut::new(&mut bytes, 8, 3).unwrap();
    let error = repack_weight(&map, 0, Rows::new(&weight, 8, 3).unwrap(), wide).unwrap_err();
    assert_eq!(error.to_string(), "to has elements of 1 byte, from has elements of 2");
    let mut shared = [0u8; 80];
    let address = shared.as_mut_ptr();
    // SAFETY: the call returns before anything is read or written through either view.
    let (from, to) =
        unsafe { (Rows::from_raw(address, 1, 8, 3, 3), RowsMut::from_raw(address.add(20), 1, 8, 3, 3)) };
    let error = repack_weight(&map, 0, from.unwrap(), to.unwrap()).unwrap_err();
    assert!(matches!(error, RepackError::Argument(ArgumentError::Overlap { bytes: 1..=4, .. })), "{error}");
}
