//! [`Hopper`]: mbarriers, bulk copies, clusters. In code for devices before 9.0 each block is a cluster of
//! its own.

use core::arch::asm;

use super::{Nvptx, Shared};
#[cfg(sm_90)]
use crate::gpu::EMPTY;
#[cfg(not(sm_90))]
use crate::gpu::Gpu;
use crate::gpu::{Bytes16, Hopper};

#[cfg(sm_90)]
unsafe extern "C" {
    #[link_name = "llvm.nvvm.barrier.cluster.arrive.aligned"]
    fn cluster_arrive();
    #[link_name = "llvm.nvvm.barrier.cluster.arrive.relaxed.aligned"]
    fn cluster_arrive_relaxed();
    #[link_name = "llvm.nvvm.barrier.cluster.wait.aligned"]
    fn cluster_wait();
}

impl<S: Shared> Nvptx<S> {
    /// Where byte `at` of the shared memory of a block of the cluster is.
    #[inline(always)]
    #[cfg(sm_90)]
    fn of_cluster(&self, at: u32, rank: u32) -> u32 {
        let address: u32;
        // SAFETY: works out an address.
        unsafe {
            asm!("mapa.shared::cluster.u32 {}, {}, {};",
                out(reg32) address, in(reg32) self.shared(at), in(reg32) rank, options(pure, nomem, nostack));
        }
        address
    }

    /// 16 bytes as they are now, which another block may be writing.
    ///
    /// # Safety
    /// They are in shared memory, at a multiple of 16.
    #[inline(always)]
    #[cfg(sm_90)]
    unsafe fn look16(&self, at: u32) -> Bytes16 {
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ld.volatile.shared.v4.u32 {{{}, {}, {}, {}}}, [{}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) self.shared(at), options(nostack));
        }
        Bytes16([a, b, c, d])
    }
}

impl<S: Shared> Hopper for Nvptx<S> {
    #[inline(always)]
    unsafe fn mbarrier_init(&self, at: u32, arrivals: u32) {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            asm!("mbarrier.init.shared::cta.b64 [{}], {};", in(reg32) self.shared(at), in(reg32) arrivals, options(nostack));
        }
    }

    #[inline(always)]
    fn mbarrier_fence(&self) {
        // SAFETY: orders memory.
        unsafe { asm!("fence.mbarrier_init.release.cluster;", options(nostack)) }
    }

    #[inline(always)]
    unsafe fn mbarrier_arrive(&self, at: u32) {
        // SAFETY: as above.
        unsafe {
            asm!("mbarrier.arrive.shared::cta.b64 _, [{}];", in(reg32) self.shared(at), options(nostack))
        }
    }

    #[inline(always)]
    unsafe fn mbarrier_arrive_expect(&self, at: u32, bytes: u32) {
        // SAFETY: as above.
        unsafe {
            asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{}], {};",
                in(reg32) self.shared(at), in(reg32) bytes, options(nostack));
        }
    }

    // A label within braces is the braces' own.
    #[allow(named_asm_labels)]
    #[inline(always)]
    unsafe fn mbarrier_wait(&self, at: u32, parity: u32) {
        // SAFETY: as above.
        unsafe {
            asm!(
                "{{",
                ".reg .pred done;",
                "again:",
                "mbarrier.try_wait.parity.shared::cta.b64 done, [{}], {};",
                "@!done bra again;",
                "}}",
                in(reg32) self.shared(at), in(reg32) parity, options(nostack));
        }
    }

    #[inline(always)]
    unsafe fn bulk_copy(&self, to: u32, from: u64, bytes: u32, mbarrier: u32) {
        // SAFETY: as above.
        unsafe {
            asm!("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}], {}, [{}];",
                in(reg32) self.shared(to), in(reg64) from, in(reg32) bytes, in(reg32) self.shared(mbarrier),
                options(nostack));
        }
    }

    #[inline(always)]
    fn bring_bulk_near(&self, from: u64, bytes: u32) {
        // SAFETY: a hint.
        unsafe {
            asm!("cp.async.bulk.prefetch.L2.global [{}], {};", in(reg64) from, in(reg32) bytes, options(nostack));
        }
    }

    #[inline(always)]
    unsafe fn bulk_store(&self, to: u64, from: u32, bytes: u32) {
        // SAFETY: as above.
        unsafe {
            asm!("cp.async.bulk.global.shared::cta.bulk_group [{}], [{}], {};",
                in(reg64) to, in(reg32) self.shared(from), in(reg32) bytes, options(nostack));
        }
    }

    #[inline(always)]
    fn bulk_stores_commit(&self) {
        // SAFETY: ends a group of this thread's.
        unsafe { asm!("cp.async.bulk.commit_group;", options(nostack)) }
    }

    #[inline(always)]
    fn bulk_stores_wait<const LEFT: u32>(&self) {
        // SAFETY: waits.
        unsafe { asm!("cp.async.bulk.wait_group.read {};", const LEFT, options(nostack)) }
    }

    #[inline(always)]
    fn fence_async(&self) {
        // SAFETY: orders memory.
        unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) }
    }

    #[cfg(sm_90)]
    #[inline(always)]
    fn cluster_rank(&self) -> u32 {
        let rank: u32;
        // SAFETY: reads a register that every thread has.
        unsafe { asm!("mov.u32 {}, %cluster_ctarank;", out(reg32) rank, options(pure, nomem, nostack)) };
        rank
    }

    #[cfg(not(sm_90))]
    #[inline(always)]
    fn cluster_rank(&self) -> u32 {
        0
    }

    #[cfg(sm_90)]
    #[inline(always)]
    fn cluster_blocks(&self) -> u32 {
        let blocks: u32;
        // SAFETY: as above.
        unsafe { asm!("mov.u32 {}, %cluster_nctarank;", out(reg32) blocks, options(pure, nomem, nostack)) };
        blocks
    }

    #[cfg(not(sm_90))]
    #[inline(always)]
    fn cluster_blocks(&self) -> u32 {
        1
    }

    #[cfg(sm_90)]
    #[inline(always)]
    fn cluster_arrive(&self) {
        // SAFETY: orders memory, nothing else.
        unsafe { cluster_arrive() }
    }

    #[cfg(sm_90)]
    #[inline(always)]
    fn cluster_arrive_relaxed(&self) {
        // SAFETY: orders nothing.
        unsafe { cluster_arrive_relaxed() }
    }

    #[cfg(sm_90)]
    #[inline(always)]
    fn cluster_wait(&self) {
        // SAFETY: orders memory and waits, nothing else.
        unsafe { cluster_wait() }
    }

    #[cfg(not(sm_90))]
    #[inline(always)]
    fn cluster_arrive(&self) {}

    #[cfg(not(sm_90))]
    #[inline(always)]
    fn cluster_arrive_relaxed(&self) {}

    #[cfg(not(sm_90))]
    #[inline(always)]
    fn cluster_wait(&self) {
        self.barrier();
    }

    #[cfg(not(sm_90))]
    #[inline(always)]
    unsafe fn load_cluster4(&self, at: u32, _rank: u32) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { self.load_shared4(at) }
    }

    #[cfg(sm_90)]
    #[inline(always)]
    unsafe fn load_cluster4(&self, at: u32, rank: u32) -> u32 {
        let value: u32;
        // SAFETY: the caller's promise, here and below.
        unsafe {
            asm!("ld.shared::cluster.u32 {}, [{}];",
                out(reg32) value, in(reg32) self.of_cluster(at, rank), options(readonly, nostack));
        }
        value
    }

    #[cfg(not(sm_90))]
    #[inline(always)]
    unsafe fn load_cluster16(&self, at: u32, _rank: u32) -> Bytes16 {
        // SAFETY: the caller's promise.
        unsafe { self.load_shared16(at) }
    }

    #[cfg(sm_90)]
    #[inline(always)]
    unsafe fn load_cluster16(&self, at: u32, rank: u32) -> Bytes16 {
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: as above.
        unsafe {
            asm!("ld.shared::cluster.v4.u32 {{{}, {}, {}, {}}}, [{}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) self.of_cluster(at, rank),
                options(readonly, nostack));
        }
        Bytes16([a, b, c, d])
    }

    #[cfg(not(sm_90))]
    #[inline(always)]
    unsafe fn store_cluster4(&self, at: u32, _rank: u32, value: u32) {
        // SAFETY: the caller's promise.
        unsafe { self.store_shared4(at, value) }
    }

    #[cfg(sm_90)]
    #[inline(always)]
    unsafe fn store_cluster4(&self, at: u32, rank: u32, value: u32) {
        // SAFETY: as above.
        unsafe {
            asm!("st.relaxed.cluster.shared::cluster.u32 [{}], {};",
                in(reg32) self.of_cluster(at, rank), in(reg32) value, options(nostack));
        }
    }

    #[cfg(not(sm_90))]
    #[inline(always)]
    unsafe fn send4(&self, at: u32, _rank: u32, value: u32) {
        // SAFETY: the caller's promise.
        unsafe { self.store_shared4(at, value) }
    }

    #[cfg(sm_90)]
    #[inline(always)]
    unsafe fn send4(&self, at: u32, rank: u32, value: u32) {
        // SAFETY: as above.
        unsafe {
            asm!("st.relaxed.cluster.shared::cluster.u32 [{}], {};",
                in(reg32) self.of_cluster(at, rank), in(reg32) value, options(nostack));
        }
    }

    #[cfg(not(sm_90))]
    #[inline(always)]
    unsafe fn receive16(&self, at: u32) -> Bytes16 {
        // SAFETY: the caller's promise; each block is a cluster of its own, and a barrier lies between.
        unsafe { self.load_shared16(at) }
    }

    // A label within braces is the braces' own.
    #[allow(named_asm_labels)]
    #[cfg(sm_90)]
    #[inline(always)]
    unsafe fn receive16(&self, at: u32) -> Bytes16 {
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: as above.
        unsafe {
            asm!(
                "{{",
                ".reg .pred empty;",
                "again:",
                "ld.volatile.shared.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];",
                "setp.eq.u32 empty, {0}, -1;",
                "setp.eq.or.u32 empty, {1}, -1, empty;",
                "setp.eq.or.u32 empty, {2}, -1, empty;",
                "setp.eq.or.u32 empty, {3}, -1, empty;",
                // A brace at the beginning of a line would end the kernel for who takes the text apart.
                "@empty bra again; }}",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) self.shared(at),
                options(nostack));
        }
        Bytes16([a, b, c, d])
    }

    #[cfg(sm_90)]
    #[inline(always)]
    unsafe fn receive64(&self, at: u32) -> [Bytes16; 4] {
        // SAFETY: the caller's promise.
        let look = |place: u32| unsafe { self.look16(at + place) };
        loop {
            let all = [look(0), look(16), look(32), look(48)];
            let is_empty = all
                .iter()
                .fold(false, |any, Bytes16(four)| four.iter().fold(any, |any, word| any | (*word == EMPTY)));
            if !is_empty {
                return all;
            }
        }
    }
}
