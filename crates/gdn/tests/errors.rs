//! What a caller can get wrong: each gets an error with both numbers, and nothing is written.

mod support;

use gdn::{
    ArgumentError, Cpu, Heads, Layout, Packed, PackedBuf, Packing, Rows, RowsMut, Unpacked, UnpackedBuf,
    cpu::{Isa, IsaError},
};
use support::{Case, Shape, Tensor};

const SIZES: [usize; 2] = [2, 4];

fn layout() -> Layout {
    Layout::new(Heads::new(2, 6, 4, 5).unwrap(), Packing::Interleaved)
}

fn case(num_rows: usize) -> Case {
    Case::packed(&layout().heads, num_rows, SIZES, [Shape::default(); 6])
}

/// Splits with one thing made wrong, and returns the message. Nothing may have been written.
fn message_of(spoil: impl FnOnce(&mut Case)) -> String {
    let mut case = case(3);
    spoil(&mut case);
    let (from, to) = case.for_split();
    let error = gdn::split(&layout(), from, to, &Cpu::new()).unwrap_err();
    for (what, tensor) in [("mixed_qkv", &case.mixed_qkv), ("z", &case.z), ("b", &case.b), ("a", &case.a)] {
        tensor.assert_untouched(what);
    }
    error.to_string()
}

fn poisoned(num_rows: usize, features: usize, element_size: usize) -> Tensor {
    Tensor::poisoned(num_rows, features, element_size, Shape::default())
}

#[test]
fn features() {
    assert_eq!(
        message_of(|case| case.mixed_qkvz = poisoned(3, 75, 2)),
        "mixed_qkvz has 75 features, 2+6 heads of 4+5 need 76"
    );
    assert!(message_of(|case| case.mixed_ba = poisoned(3, 13, 4)).contains("mixed_ba has 13 features"));
    assert!(message_of(|case| case.mixed_qkv = poisoned(3, 45, 2)).contains("mixed_qkv has 45 features"));
    assert!(message_of(|case| case.z = poisoned(3, 31, 2)).contains("z has 31 features"));
    assert!(message_of(|case| case.b = poisoned(3, 5, 4)).contains("b has 5 features"));
    assert!(message_of(|case| case.a = poisoned(3, 7, 4)).contains("a has 7 features"));
}

#[test]
fn rows_and_elements() {
    assert_eq!(
        message_of(|case| case.mixed_ba = poisoned(2, 12, 4)),
        "mixed_ba has 2 rows, mixed_qkvz has 3"
    );
    assert_eq!(message_of(|case| case.a = poisoned(4, 6, 4)), "a has 4 rows, mixed_qkvz has 3");
    assert_eq!(
        message_of(|case| case.z = poisoned(3, 30, 4)),
        "z has elements of 4 bytes, mixed_qkvz has elements of 2"
    );
    assert_eq!(
        message_of(|case| case.b = poisoned(3, 6, 2)),
        "b has elements of 2 bytes, mixed_ba has elements of 4"
    );

    // A merge reads the other side, and says so.
    let mut case = case(3);
    case.mixed_qkvz = poisoned(2, 76, 2);
    let (from, to) = case.for_merge();
    let error = gdn::merge(&layout(), from, to, &Cpu::new()).unwrap_err().to_string();
    assert_eq!(error, "mixed_qkvz has 2 rows, mixed_qkv has 3");
    case.mixed_qkvz.assert_untouched("mixed_qkvz");
}

#[test]
fn overlaps() {
    let layout = Layout::new(Heads::new(1, 1, 2, 4).unwrap(), Packing::Interleaved);
    let mut memory = vec![0u8; 400];
    let base = memory.as_mut_ptr();
    // SAFETY: the bytes are there; that views overlap is what is tested, and no op gets to look at them.
    let rows = |at: usize, features, stride| unsafe {
        Rows::from_raw(base.add(at), 1, 3, features, stride).unwrap()
    };
    // SAFETY: as above.
    let rows_mut = |at: usize, features, stride| unsafe {
        RowsMut::from_raw(base.add(at), 1, 3, features, stride).unwrap()
    };
    let split = |qkvz, qkv, z, b, a| {
        let from = Packed { mixed_qkvz: qkvz, mixed_ba: rows(390, 2, 2) };
        gdn::split(&layout, from, Unpacked { mixed_qkv: qkv, z, b, a }, &Cpu::new())
    };
    let overlap = |result: Result<(), ArgumentError>| match result {
        Err(ArgumentError::Overlap { argument, other, bytes, .. }) => Some((argument, other, bytes)),
        Err(other) => panic!("another error: {other}"),
        Ok(()) => None,
    };
    let b = || rows_mut(340, 1, 1);
    let a = || rows_mut(350, 1, 1);

    assert_eq!(overlap(split(rows(0, 12, 12), rows_mut(100, 8, 8), rows_mut(200, 4, 4), b(), a())), None);
    // One byte of the last row with the first of the next tensor.
    let result = split(rows(0, 12, 12), rows_mut(35, 8, 8), rows_mut(200, 4, 4), b(), a());
    assert_eq!(overlap(result), Some(("mixed_qkv", "mixed_qkvz", 1)));
    assert_eq!(overlap(split(rows(0, 12, 12), rows_mut(36, 8, 8), rows_mut(200, 4, 4), b(), a())), None);
    // Outputs among themselves.
    let result = split(rows(0, 12, 12), rows_mut(100, 8, 8), rows_mut(123, 4, 4), b(), a());
    assert_eq!(overlap(result), Some(("z", "mixed_qkv", 1)));
    let result = split(rows(0, 12, 12), rows_mut(100, 8, 8), rows_mut(200, 4, 4), b(), rows_mut(342, 1, 1));
    assert_eq!(overlap(result), Some(("a", "b", 1)));
    // Columns of one wider buffer share no byte, and one column too many does.
    assert_eq!(overlap(split(rows(0, 12, 12), rows_mut(100, 8, 12), rows_mut(108, 4, 12), b(), a())), None);
    let result = split(rows(0, 12, 12), rows_mut(100, 8, 12), rows_mut(107, 4, 12), b(), a());
    assert_eq!(overlap(result), Some(("z", "mixed_qkv", 1)));
    // The last rows' columns, wrapped around.
    let result = split(rows(0, 12, 12), rows_mut(100, 8, 12), rows_mut(97, 4, 12), b(), a());
    assert_eq!(overlap(result), Some(("z", "mixed_qkv", 1)));
    // Different strides that meet in one row alone.
    let result = split(rows(0, 12, 12), rows_mut(100, 8, 20), rows_mut(108, 4, 15), b(), a());
    assert_eq!(overlap(result), Some(("z", "mixed_qkv", 4)));
    // Inputs may overlap one another: both projections of one buffer.
    let from = Packed { mixed_qkvz: rows(0, 12, 14), mixed_ba: rows(10, 2, 14) };
    let to = Unpacked { mixed_qkv: rows_mut(100, 8, 8), z: rows_mut(200, 4, 4), b: b(), a: a() };
    gdn::split(&layout, from, to, &Cpu::new()).unwrap();
    // A merge onto what it reads.
    let from =
        Unpacked { mixed_qkv: rows(100, 8, 8), z: rows(200, 4, 4), b: rows(340, 1, 1), a: rows(350, 1, 1) };
    let to = Packed { mixed_qkvz: rows_mut(190, 12, 12), mixed_ba: rows_mut(300, 2, 2) };
    let result = gdn::merge(&layout, from, to, &Cpu::new());
    assert_eq!(overlap(result), Some(("mixed_qkvz", "z", 2)));
}

#[test]
fn exact_overlap_agrees_with_bytes_one_by_one() {
    // Every pair of small strided tensors at every distance, against the set of their bytes.
    let layout = Layout::new(Heads::new(1, 1, 1, 1).unwrap(), Packing::Interleaved);
    let mut memory = vec![0u8; 400];
    let base = memory.as_mut_ptr();
    let bytes = |at: usize, features: usize, stride: usize| -> Vec<usize> {
        (0..3).flat_map(|n| at + n * stride..at + n * stride + features).collect()
    };
    for (qkv_stride, z_stride) in [(3, 1), (4, 4), (5, 7), (9, 2), (7, 5), (3, 11)] {
        for z_at in 60..140 {
            // SAFETY: the bytes are there; that views overlap is what is tested.
            let rows_mut = |at: usize, features, stride| unsafe {
                RowsMut::from_raw(base.add(at), 1, 3, features, stride).unwrap()
            };
            // SAFETY: as above.
            let rows = |at: usize, features| unsafe {
                Rows::from_raw(base.add(at), 1, 3, features, features).unwrap()
            };
            let from = Packed { mixed_qkvz: rows(300, 4), mixed_ba: rows(320, 2) };
            let to = Unpacked {
                mixed_qkv: rows_mut(100, 3, qkv_stride),
                z: rows_mut(z_at, 1, z_stride),
                b: rows_mut(340, 1, 1),
                a: rows_mut(350, 1, 1),
            };
            let shared = bytes(100, 3, qkv_stride).iter().any(|byte| bytes(z_at, 1, z_stride).contains(byte));
            let result = gdn::split(&layout, from, to, &Cpu::new());
            assert_eq!(
                result.is_err(),
                shared,
                "strides {qkv_stride} and {z_stride}, z at {z_at}: {result:?}"
            );
        }
    }
}

#[test]
fn views() {
    let data = [0u16; 10];
    assert!(Rows::new(&data, 2, 5).is_ok());
    let error = Rows::new(&data, 2, 6).unwrap_err();
    assert!(matches!(error, ArgumentError::TooShort { got: 10, expected: 12, .. }), "{error}");
    assert!(error.to_string().starts_with("data has 10 elements, 2 rows of 6 features"), "{error}");
    let error = Rows::with_stride(&data, 2, 5, 4).unwrap_err();
    assert_eq!(error.to_string(), "row_stride = 4 is shorter than a row of 5 features");
    // The stride of a single row counts for nothing, as in PyTorch.
    assert!(Rows::with_stride(&data, 1, 5, 0).is_ok());
    assert!(Rows::with_stride(&data, 0, 5, 0).is_ok());
    assert!(matches!(Rows::new(&data, usize::MAX, 5), Err(ArgumentError::TooLarge { .. })));
    assert!(matches!(Rows::with_stride(&data, 3, 1, usize::MAX / 2), Err(ArgumentError::TooLarge { .. })));
    assert!(matches!(Rows::new(&[(); 4], 2, 2), Err(ArgumentError::Zero { argument: "element_size" })));
    assert!(matches!(
        Rows::from_bytes(&[0; 7], 2, 1, 3),
        Err(ArgumentError::Multiple { got: 7, other: "element_size", expected: 2, .. })
    ));
    assert!(matches!(Rows::from_bytes(&[], 0, 0, 3), Err(ArgumentError::Zero { .. })));
    let rows = Rows::new(&data, 2, 5).unwrap();
    assert!(matches!(rows.rows(1..3), Err(ArgumentError::Range { argument: "rows", end: 3, len: 2, .. })));
    assert!(matches!(
        rows.columns(3..6),
        Err(ArgumentError::Range { argument: "columns", end: 6, len: 5, .. })
    ));
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = rows.rows(2..1);
    assert!(matches!(backwards, Err(ArgumentError::Range { start: 2, end: 1, .. })));
    assert_eq!(rows.row(2), None);
    let mut data = [0u8; 12];
    let (left, right) = RowsMut::new(&mut data, 3, 4).unwrap().split_columns(1).unwrap();
    assert_eq!((left.features(), right.features(), right.num_rows()), (1, 3, 3));
    assert!(right.split_columns(4).is_err());
}

#[test]
fn rows_to_be_written() {
    let mut data = [[1u8, 2, 3, 4], [5, 6, 7, 8]];
    let mut rows = RowsMut::new(data.as_flattened_mut(), 2, 3).unwrap();
    for (row, offset, bytes) in [(2, 0, 1), (usize::MAX, 0, 0), (1, 3, 1), (0, usize::MAX, 2), (1, 0, 4)] {
        let result = rows.write(row, offset, &[9; 4][..bytes]);
        assert!(matches!(result, Err(ArgumentError::Range { .. })), "{row} {offset} {bytes}: {result:?}");
    }
    rows.write(1, 3, &[]).unwrap();
    rows.reborrow().write(1, 1, &[9, 10]).unwrap();
    assert_eq!(data, [[1, 2, 3, 4], [9, 10, 7, 8]]);
}

#[test]
fn memory_that_was_never_written_is_an_output_too() {
    // Under a tool that looks for reads of such memory (miri, valgrind) this finds any that safe code could
    // make.
    use std::mem::MaybeUninit;
    let case = case(5);
    let heads = layout().heads;
    let [.., qkv, z, b, a] = heads.features();
    let mut memory = [(qkv, 2), (z, 2), (b, 4), (a, 4)].map(|(features, size)| {
        let bytes = vec![MaybeUninit::<u8>::uninit(); 5 * features * size];
        (bytes, features, size)
    });
    // SAFETY: so many bytes, which may be written, and which nobody else has.
    let [mixed_qkv, z, b, a] = memory.each_mut().map(|(bytes, features, size)| unsafe {
        RowsMut::from_raw(bytes.as_mut_ptr().cast(), *size, 5, *features, *features).unwrap()
    });
    gdn::split(&layout(), case.read_packed(), Unpacked { mixed_qkv, z, b, a }, &Cpu::new()).unwrap();
    // SAFETY: the split wrote every byte.
    let [mixed_qkv, z, b, a] = memory.each_ref().map(|(bytes, features, size)| unsafe {
        Rows::from_raw(bytes.as_ptr().cast(), *size, 5, *features, *features).unwrap()
    });
    let unpacked = Unpacked { mixed_qkv, z, b, a };
    gdn::reference::check(&heads, layout().packing, &case.read_packed(), &unpacked).unwrap();
}

#[test]
fn no_such_instructions() {
    for isa in Isa::ALL {
        match Cpu::new().isa(isa) {
            Ok(cpu) => assert_eq!(cpu.chosen_isa(), isa),
            Err(IsaError { isa: wanted, available }) => {
                assert_eq!(wanted, isa);
                assert!(available.contains("scalar") && !available.contains(isa.name()));
            }
        }
    }
    // No machine has both.
    assert!(Cpu::new().isa(Isa::Avx2).is_err() || Cpu::new().isa(Isa::Neon).is_err());
    assert!("sse".parse::<Isa>().unwrap_err().to_string().contains("sse"));
}

#[test]
fn buffers_too_large() {
    let heads = layout().heads;
    assert!(UnpackedBuf::new(&heads, usize::MAX / 8, 2, 2).is_err());
    assert!(UnpackedBuf::new(&heads, 1 << 54, 1, 1).unwrap_err().to_string().contains("bytes"));
    assert!(PackedBuf::new(&heads, 1, 0, 1).is_err());
    let buf = UnpackedBuf::new(&heads, 0, 2, 4).unwrap();
    assert_eq!((buf.mixed_qkv().len(), buf.as_ref().z.num_rows()), (0, 0));
}

#[test]
fn fresh_outputs_of_every_size_are_right() {
    // Blocks on the heap, and blocks of huge pages.
    for num_rows in [0, 1, 7, 3000, 30_000] {
        let case = case(num_rows);
        for cpu in [Cpu::new(), Cpu::new().threads(1)] {
            let buf = gdn::split_fresh(&layout(), case.read_packed(), &cpu).unwrap();
            let Layout { heads, packing } = layout();
            gdn::reference::check(&heads, packing, &case.read_packed(), &buf.as_ref()).unwrap();
            let merged = gdn::merge_fresh(&layout(), buf.as_ref(), &cpu).unwrap();
            gdn::reference::check(&heads, packing, &merged.as_ref(), &buf.as_ref()).unwrap();
            assert_eq!(merged.mixed_qkvz().len(), num_rows * 76 * 2);
        }
    }
}
