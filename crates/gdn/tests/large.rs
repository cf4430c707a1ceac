//! More than 2^31 elements, and offsets past 2^32 bytes.

use gdn::{Cpu, Heads, Layout, Packed, Packing, Rows, RowsMut, Unpacked, reference};
use memmap2::MmapMut;

/// Rows 2 GiB apart: addresses that no 32-bit offset reaches, in memory that is mapped but, but for a few
/// pages, never there.
#[test]
fn offsets_past_four_gigabytes() {
    const STRIDE: usize = (2 << 30) + 4096 + 24;
    let heads = Heads::new(2, 6, 40, 24).unwrap();
    let layout = Layout::new(heads, Packing::Interleaved);
    let num_rows = 3;
    let sparse = || MmapMut::map_anon(num_rows * STRIDE).unwrap();
    let (mut qkvz, mut qkv, mut z) = (sparse(), sparse(), sparse());
    for n in 0..num_rows {
        for (i, byte) in qkvz[n * STRIDE..][..heads.qkvz_features()].iter_mut().enumerate() {
            *byte = (i * 7 + n * 13 + i / 256) as u8;
        }
    }
    let ba: Vec<u8> = (0..num_rows * heads.ba_features()).map(|i| i as u8).collect();
    let (mut b, mut a) = (vec![0u8; num_rows * 6], vec![0u8; num_rows * 6]);
    let strided = |map, features| Rows::with_stride(map, num_rows, features, STRIDE).unwrap();
    let packed = Packed {
        mixed_qkvz: Rows::with_stride(&qkvz[..], num_rows, heads.qkvz_features(), STRIDE).unwrap(),
        mixed_ba: Rows::new(&ba, num_rows, heads.ba_features()).unwrap(),
    };
    let to = Unpacked {
        mixed_qkv: RowsMut::with_stride(&mut qkv[..], num_rows, heads.qkv_features(), STRIDE).unwrap(),
        z: RowsMut::with_stride(&mut z[..], num_rows, heads.z_features(), STRIDE).unwrap(),
        b: RowsMut::new(&mut b, num_rows, 6).unwrap(),
        a: RowsMut::new(&mut a, num_rows, 6).unwrap(),
    };
    gdn::split(&layout, packed, to, &Cpu::new().threads(2)).unwrap();
    let unpacked = Unpacked {
        mixed_qkv: strided(&qkv[..], heads.qkv_features()),
        z: strided(&z[..], heads.z_features()),
        b: Rows::new(&b, num_rows, 6).unwrap(),
        a: Rows::new(&a, num_rows, 6).unwrap(),
    };
    reference::check(&heads, Packing::Interleaved, &packed, &unpacked).unwrap();
}

/// 2^31 elements and some more, dense. The input is one page of memory mapped over and over in effect: only
/// the rows that are looked at were ever written.
#[test]
fn more_than_two_to_the_31_elements() {
    let heads = Heads::new(16, 32, 128, 128).unwrap();
    let layout = Layout::new(heads, Packing::Interleaved);
    let num_rows = (1usize << 31) / heads.qkvz_features() + 3;
    let mut qkvz = MmapMut::map_anon(num_rows * heads.qkvz_features()).unwrap();
    let looked_at = [0, 1, num_rows / 2, num_rows - 4, num_rows - 3, num_rows - 2, num_rows - 1];
    for n in looked_at {
        for (i, byte) in qkvz[n * heads.qkvz_features()..][..heads.qkvz_features()].iter_mut().enumerate() {
            *byte = (i * 7 + n * 13 + i / 256) as u8;
        }
    }
    let ba: Vec<u8> = (0..num_rows * heads.ba_features()).map(|i| (i % 251) as u8).collect();
    let packed = Packed {
        mixed_qkvz: Rows::new(&qkvz[..], num_rows, heads.qkvz_features()).unwrap(),
        mixed_ba: Rows::new(&ba, num_rows, heads.ba_features()).unwrap(),
    };
    let parts = gdn::split_fresh(&layout, packed, &Cpu::new()).unwrap();
    let unpacked = parts.as_ref();
    for n in looked_at {
        let packed = Packed {
            mixed_qkvz: packed.mixed_qkvz.rows(n..n + 1).unwrap(),
            mixed_ba: packed.mixed_ba.rows(n..n + 1).unwrap(),
        };
        let unpacked = Unpacked {
            mixed_qkv: unpacked.mixed_qkv.rows(n..n + 1).unwrap(),
            z: unpacked.z.rows(n..n + 1).unwrap(),
            b: unpacked.b.rows(n..n + 1).unwrap(),
            a: unpacked.a.rows(n..n + 1).unwrap(),
        };
        reference::check(&heads, Packing::Interleaved, &packed, &unpacked).unwrap();
    }
}
