//! A call for one row into outputs given allocates nothing, and decode nothing after a thread's first call.

use std::{
    alloc::{GlobalAlloc, Layout as Memory, System},
    cell::Cell,
};

use gdn::{
    ConvState, Cpu, Decode, Heads, Keep, Layer, Layout, Packed, PackedBuf, Packing, Projections,
    RecurrentState, Slots, Tensor, UnpackedBuf, Weights, cpu::Isa,
};

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

#[test]
fn decode_allocates_nothing_after_a_threads_first_call() {
    let layer = Layer::new(Layout::new(Heads::new(2, 4, 32, 32).unwrap(), Packing::Interleaved));
    let (batch, channels) = (5, layer.conv_channels());
    let (mixed_qkvz, mixed_ba) = (vec![0.1f32; batch * 384], vec![0.1f32; batch * 8]);
    let (taps, per_head, norm) = (vec![0.5f32; channels * 4], [0.1f32; 4], [1f32; 32]);
    let (mut conv, mut state) = (vec![0f32; batch * channels * 3], vec![0f32; batch * 4 * 32 * 32]);
    let mut out = vec![0f32; batch * 4 * 32];
    // One thread after the other, so that all are counted; with 16 of them there are fewer key heads than threads.
    let each = |chunks: usize, work: &(dyn Fn(usize) + Sync)| (0..chunks).for_each(work);
    for (isa, threads) in Isa::available().flat_map(|isa| [1, 2, 16].map(|threads| (isa, threads))) {
        let cpu = Cpu::new().threads(threads).executor(&each).isa(isa).unwrap();
        let mut decode = || {
            let mut call = Decode {
                layer,
                tokens_per_sequence: 1,
                projections: Projections::Packed(Packed {
                    mixed_qkvz: Tensor::new(&mixed_qkvz, [batch, 384]).unwrap(),
                    mixed_ba: Tensor::new(&mixed_ba, [batch, 8]).unwrap(),
                }),
                weights: Weights {
                    conv_weight: Tensor::new(&taps, [channels, 4]).unwrap(),
                    conv_bias: None,
                    A_log: Tensor::new(&per_head, [4]).unwrap(),
                    dt_bias: Tensor::new(&per_head, [4]).unwrap(),
                    norm_weight: Tensor::new(&norm, [32]).unwrap(),
                },
                conv_state: ConvState {
                    state: Tensor::new_mut(&mut conv, [batch, channels, 3]).unwrap(),
                    keep: Keep::Last,
                },
                recurrent_state: RecurrentState {
                    state: Tensor::new_mut(&mut state, [batch, 4, 32, 32]).unwrap(),
                    keep: Keep::Last,
                },
                slots: Slots::in_order(),
                num_accepted_tokens: None,
                out: Tensor::new_mut(&mut out, [batch, 4, 32]).unwrap(),
            };
            gdn::decode(&mut call, &cpu).unwrap();
        };
        decode();
        assert_eq!(allocations(decode), 0, "{isa}, {threads} threads");
    }
}
