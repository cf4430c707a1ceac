//! Views, maps, the portable copy code and repacking, on so little that an interpreter of Rust goes through
//! it in seconds: `cargo xtask test` has Miri do so.

use gdn::{
    Cpu, Heads, Layout, Packed, Packing, Projection, Rows, RowsMut, Unpacked, WeightMap, cpu::Isa,
    repack_weight,
};

/// Elements that are all different, of rows that lie `stride` apart, and ones between them that nobody may
/// touch.
fn rows_of(num_rows: usize, features: usize, stride: usize, first: u16) -> Vec<u16> {
    let element = |i: usize| if i % stride < features { first + i as u16 } else { u16::MAX };
    (0..num_rows * stride).map(element).collect()
}

fn strided(data: &[u16], num_rows: usize, features: usize, stride: usize) -> Rows<'_> {
    Rows::with_stride(data, num_rows, features, stride).unwrap()
}

#[test]
fn split_and_merge_of_strided_rows() {
    let heads = Heads::new(2, 4, 3, 2).unwrap();
    let (num_rows, gap) = (3, 5);
    let widths = [heads.qkvz_features(), heads.ba_features()];
    let parts = [heads.qkv_features(), heads.z_features(), heads.num_v_heads(), heads.num_v_heads()];
    for packing in Packing::ALL {
        let layout = Layout::new(heads, packing);
        let cpu = Cpu::new().threads(1).isa(Isa::Scalar).unwrap();
        let [qkvz, ba] = [0, 1].map(|i| rows_of(num_rows, widths[i], widths[i] + gap, 1000 * (i as u16 + 1)));
        let mut outputs = parts.map(|features| vec![u16::MAX; num_rows * (features + gap)]);
        let packed = Packed {
            mixed_qkvz: strided(&qkvz, num_rows, widths[0], widths[0] + gap),
            mixed_ba: strided(&ba, num_rows, widths[1], widths[1] + gap),
        };
        let mut views = outputs
            .iter_mut()
            .zip(parts)
            .map(|(data, features)| RowsMut::with_stride(data, num_rows, features, features + gap).unwrap());
        let mut next = || views.next().unwrap();
        let to = Unpacked { mixed_qkv: next(), z: next(), b: next(), a: next() };
        gdn::split(&layout, packed, to, &cpu).unwrap();

        // Each feature is where the map has it, and nothing is between the rows.
        for n in 0..num_rows {
            let row = |i: usize| &outputs[i][n * (parts[i] + gap)..][..parts[i] + gap];
            for (map, source, width, [one, other]) in
                [(layout.qkvz_map(), &qkvz, widths[0], [0, 1]), (layout.ba_map(), &ba, widths[1], [2, 3])]
            {
                let both = [&row(one)[..parts[one]], &row(other)[..parts[other]]].concat();
                let source = &source[n * (width + gap)..];
                for segment in map.segments() {
                    assert_eq!(
                        both[segment.unpacked..][..segment.len],
                        source[segment.packed..][..segment.len]
                    );
                }
            }
            assert!((0..4).all(|i| row(i)[parts[i]..].iter().all(|element| *element == u16::MAX)));
        }
        let mut back = widths.map(|width| vec![u16::MAX; num_rows * (width + gap)]);
        let view = |i: usize| strided(&outputs[i], num_rows, parts[i], parts[i] + gap);
        let from = Unpacked { mixed_qkv: view(0), z: view(1), b: view(2), a: view(3) };
        let [one, other] = &mut back;
        let to = Packed {
            mixed_qkvz: RowsMut::with_stride(one, num_rows, widths[0], widths[0] + gap).unwrap(),
            mixed_ba: RowsMut::with_stride(other, num_rows, widths[1], widths[1] + gap).unwrap(),
        };
        gdn::merge(&layout, from, to, &cpu).unwrap();
        assert_eq!(back, [qkvz, ba]);
    }
}

#[test]
fn weights_along_both_dims() {
    let heads = Heads::new(2, 4, 3, 2).unwrap();
    for projection in Projection::ALL {
        let outputs = projection.features(&heads);
        let map = WeightMap::new(&heads, projection, Packing::Contiguous);
        let back = WeightMap::new(&heads, projection, Packing::Interleaved);
        for dim in [0, 1] {
            let (num_rows, features) = if dim == 0 { (outputs, 3) } else { (3, outputs) };
            let stride = features + 2;
            let weight = rows_of(num_rows, features, stride, 0);
            let mut there = vec![u16::MAX; weight.len()];
            let mut home = there.clone();
            let view = RowsMut::with_stride(&mut there, num_rows, features, stride).unwrap();
            repack_weight(&map, dim, strided(&weight, num_rows, features, stride), view).unwrap();
            let at = |data: &[u16], output: usize, other: usize| match dim {
                0 => data[output * stride + other],
                _ => data[other * stride + output],
            };
            for m in map.moves() {
                for i in 0..m.len {
                    assert!((0..3).all(|o| at(&there, m.to + i, o) == at(&weight, m.from + i, o)));
                }
            }
            let view = RowsMut::with_stride(&mut home, num_rows, features, stride).unwrap();
            repack_weight(&back, dim, strided(&there, num_rows, features, stride), view).unwrap();
            assert_eq!(home, weight);
        }
    }
}
