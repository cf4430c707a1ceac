//! A call for one row into outputs given allocates nothing.

use std::{
    alloc::{GlobalAlloc, Layout as Memory, System},
    cell::Cell,
};

use gdn::{Cpu, Heads, Layout, PackedBuf, Packing, UnpackedBuf, cpu::Isa};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is handed to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, memory: Memory) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's promises.
        unsafe { System.alloc(memory) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, memory: Memory) {
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(ptr, memory) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

#[test]
fn one_row_allocates_nothing() {
    assert!(allocations(|| drop(std::hint::black_box(vec![1u8; 100]))) == 1, "the count counts");
    let heads = Heads::new(16, 32, 128, 128).unwrap();
    for packing in Packing::ALL {
        let layout = Layout::new(heads, packing);
        for isa in Isa::available() {
            let cpu = Cpu::new().isa(isa).unwrap();
            for num_rows in [0, 1, 8] {
                let mut packed = PackedBuf::new(&heads, num_rows, 2, 2).unwrap();
                let mut unpacked = UnpackedBuf::new(&heads, num_rows, 2, 2).unwrap();
                let split = || gdn::split(&layout, packed.as_ref(), unpacked.as_mut(), &cpu).unwrap();
                assert_eq!(allocations(split), 0, "split of {num_rows} rows, {isa}");
                let merge = || gdn::merge(&layout, unpacked.as_ref(), packed.as_mut(), &cpu).unwrap();
                assert_eq!(allocations(merge), 0, "merge of {num_rows} rows, {isa}");
            }
        }
    }
}
