//! [`Hopper`]: mbarriers, bulk copies and clusters, from compute capability 9.0 on.

use super::Gpu;

/// mbarriers, bulk copies and clusters.
///
/// An mbarrier is 8 bytes of shared memory. It goes through phases: a phase ends when as many arrivals have
/// come as [`Hopper::mbarrier_init`] said, and all bytes that were announced have landed. The first phase has
/// parity 0, the next 1, then 0 again. What a thread did before it arrived is seen by those that waited for
/// that phase.
pub trait Hopper: Gpu {
    /// Makes an mbarrier of the 8 bytes at `at`. To be seen by others only after [`Hopper::mbarrier_fence`]
    /// and a barrier.
    ///
    /// # Safety
    /// `at` is a multiple of 8 within shared memory, and nobody uses these bytes otherwise.
    unsafe fn mbarrier_init(&self, at: u32, arrivals: u32);
    /// Makes the mbarriers that this thread made visible to bulk copies and to the blocks of the cluster.
    fn mbarrier_fence(&self);
    /// Arrives once.
    ///
    /// # Safety
    /// There is an mbarrier at `at`.
    unsafe fn mbarrier_arrive(&self, at: u32);
    /// Arrives once and announces `bytes` more bytes that bulk copies will bring in this phase.
    ///
    /// # Safety
    /// There is an mbarrier at `at`.
    unsafe fn mbarrier_arrive_expect(&self, at: u32, bytes: u32);
    /// Waits until the phase of this `parity` (0 or 1) has ended.
    ///
    /// # Safety
    /// There is an mbarrier at `at`.
    unsafe fn mbarrier_wait(&self, at: u32, parity: u32);

    /// Begins to copy `bytes` bytes from global to shared memory; they arrive at `mbarrier` when they have
    /// landed. One thread calls it for all.
    ///
    /// # Safety
    /// `to`, `from` and `bytes` are multiples of 16, source and destination are there, there is an mbarrier,
    /// and until its phase has ended nobody touches the destination or writes the source.
    unsafe fn bulk_copy(&self, to: u32, from: u64, bytes: u32, mbarrier: u32);
    /// Asks that the `bytes` bytes of global memory at `from`, multiples of 16 both, come near. A hint: nothing is read, and
    /// where there is nothing it does no harm.
    fn bring_bulk_near(&self, from: u64, bytes: u32);
    /// Begins to copy `bytes` bytes from shared to global memory, in a group of this thread's.
    ///
    /// # Safety
    /// `to`, `from` and `bytes` are multiples of 16, and until [`Hopper::bulk_stores_wait`] nobody writes the
    /// source or touches the destination. What other threads wrote there needs [`Hopper::fence_async`] by
    /// them and a barrier before.
    unsafe fn bulk_store(&self, to: u64, from: u32, bytes: u32);
    /// Ends a group of bulk stores.
    fn bulk_stores_commit(&self);
    /// Waits until all of this thread's groups of bulk stores but the `LEFT` latest have been read; their
    /// sources may be written again.
    fn bulk_stores_wait<const LEFT: u32>(&self);
    /// Lets bulk copies and [`Wgmma`](super::Wgmma) see what this thread stored to shared memory. Each
    /// storing thread calls it, before the barrier.
    fn fence_async(&self);

    /// This block within its cluster. In code for devices before 9.0 each block is a cluster of its own.
    fn cluster_rank(&self) -> u32;
    /// Blocks of a cluster; 1 where the launch names none.
    fn cluster_blocks(&self) -> u32;
    /// Says that this thread is here, and goes on. Before it says so again it waits
    /// ([`Hopper::cluster_wait`]).
    fn cluster_arrive(&self);
    /// As [`Hopper::cluster_arrive`], but the others need not see what this thread wrote before, and it is
    /// not waited for.
    fn cluster_arrive_relaxed(&self);
    /// Waits until every thread of the cluster has arrived. What they wrote before they did, all can read
    /// after.
    fn cluster_wait(&self);
    /// Waits until every thread of the cluster is here. What they wrote before, all can read after.
    #[inline(always)]
    fn cluster_barrier(&self) {
        self.cluster_arrive();
        self.cluster_wait();
    }
    /// Reads 4 bytes of the shared memory of block `rank` of the cluster. That block must not end before: a
    /// cluster barrier follows.
    ///
    /// # Safety
    /// `rank` is one of the cluster's, and as for [`Gpu::load_shared4`] there, where the barrier is the
    /// cluster's.
    unsafe fn load_cluster4(&self, at: u32, rank: u32) -> u32;
    /// Reads 16 bytes, as [`Hopper::load_cluster4`] does 4.
    ///
    /// # Safety
    /// That of [`Hopper::load_cluster4`].
    unsafe fn load_cluster16(&self, at: u32, rank: u32) -> super::Bytes16;
    /// Writes 4 bytes to the shared memory of block `rank` of the cluster.
    ///
    /// # Safety
    /// `rank` is one of the cluster's, and as for [`Gpu::store_shared4`] there, where the barrier is the
    /// cluster's.
    unsafe fn store_cluster4(&self, at: u32, rank: u32, value: u32);

    /// Sends 4 bytes to the shared memory of block `rank` of the cluster, for [`Hopper::receive16`] there. Of
    /// what this thread wrote before nothing is passed on. [`EMPTY`] cannot be sent.
    ///
    /// # Safety
    /// `rank` is one of the cluster's. The word was made [`EMPTY`] by that block, with the cluster's barrier
    /// in between, and this is the only one that is sent there. The block does not end before it has received
    /// it.
    unsafe fn send4(&self, at: u32, rank: u32, value: u32);
    /// Waits until none of the 4 words at `at` is [`EMPTY`]. What they are.
    ///
    /// # Safety
    /// `at` is a multiple of 16 within shared memory. The words were written by this thread or before a
    /// barrier that both passed, or are sent.
    unsafe fn receive16(&self, at: u32) -> super::Bytes16;
    /// [`Hopper::receive16`] of the 16 words at `at`, which are looked at side by side.
    ///
    /// # Safety
    /// That of [`Hopper::receive16`], for so many.
    #[inline(always)]
    unsafe fn receive64(&self, at: u32) -> [super::Bytes16; 4] {
        // SAFETY: the caller's promise.
        [0, 16, 32, 48].map(|place| unsafe { self.receive16(at + place) })
    }
}

/// A word that was not sent yet.
pub const EMPTY: u32 = u32::MAX;
