//! The capabilities on NVIDIA GPUs. The only folder with inline assembly.
//!
//! **Collectives stay convergent.** A barrier, a shuffle or a product is executed by all lanes or hangs, and
//! a compiler that puts a copy of it into each arm of a branch breaks it. Where LLVM has an intrinsic, which
//! it knows to be convergent, that is used; products are assembly that is not `pure`. That alone does not do:
//! rustc and LLVM duplicate code before and around it, which two flags switch off for this crate
//! (`xtask/src/ptx/compiler.rs`). `cargo xtask ptx` counts the collectives of `probe/convergence.rs`.

mod async_copy;
mod hopper;
mod tensor_core;
mod warp;
mod wgmma;

use core::arch::{asm, global_asm};

use super::{Bytes16, Gpu};

// The block's dynamic shared memory, as much as the launch says.
global_asm!(".extern .shared .align 1024 .b8 dynamic_shared[];");

/// Where a kernel's shared memory begins.
pub(crate) trait Shared {
    /// Works it out.
    fn find() -> Self;
    /// In the address space of shared memory.
    fn base(&self) -> u32;
}

/// As much as the launch says.
#[allow(dead_code, reason = "a build is of one op")]
pub(crate) struct Dynamic;

impl Shared for Dynamic {
    #[inline(always)]
    fn find() -> Self {
        Self
    }

    #[inline(always)]
    fn base(&self) -> u32 {
        let base: u32;
        // SAFETY: the address of what is declared above.
        unsafe {
            asm!("mov.u32 {}, dynamic_shared;", out(reg32) base, options(pure, nomem, nostack, preserves_flags))
        };
        base
    }
}

/// The same, held in a register: where blocks are in clusters the assembler works it out at each access.
#[allow(dead_code, reason = "as above")]
pub(crate) struct InRegister(u32);

impl Shared for InRegister {
    #[inline(always)]
    fn find() -> Self {
        let base: u32;
        // SAFETY: the address of what is declared above, and y of the block, which is 0: the assembler does not know that.
        unsafe {
            asm!(
                "{{",
                "\t.reg .b32 zero;",
                "\tmov.u32 zero, %ctaid.y;",
                "\tmov.u32 {0}, dynamic_shared;",
                "\tadd.u32 {0}, {0}, zero;",
                "\t}}",
                out(reg32) base, options(nomem, nostack));
        }
        Self(base)
    }

    #[inline(always)]
    fn base(&self) -> u32 {
        self.0
    }
}

/// The thread that asks.
pub(crate) struct Nvptx<S>(S);

impl<S: Shared> Nvptx<S> {
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Self(S::find())
    }

    /// Where byte `at` of shared memory is.
    #[inline(always)]
    fn shared(&self, at: u32) -> u32 {
        self.0.base().wrapping_add(at)
    }
}

unsafe extern "C" {
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.all"]
    fn barrier_all(number: i32);
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.count"]
    fn barrier_count(number: i32, threads: i32);
    #[link_name = "llvm.nvvm.barrier.cta.arrive.aligned.count"]
    fn barrier_arrive_count(number: i32, threads: i32);
}

macro_rules! special {
    ($register:literal) => {{
        let value: u32;
        // SAFETY: reads a register that every thread has.
        unsafe {
            asm!(concat!("mov.u32 {}, ", $register, ";"), out(reg32) value, options(pure, nomem, nostack))
        };
        value
    }};
}

impl<S: Shared> Gpu for Nvptx<S> {
    #[inline(always)]
    fn thread(&self) -> u32 {
        special!("%tid.x")
    }

    #[inline(always)]
    fn threads(&self) -> u32 {
        special!("%ntid.x")
    }

    #[inline(always)]
    fn block(&self) -> [u32; 3] {
        [special!("%ctaid.x"), special!("%ctaid.y"), special!("%ctaid.z")]
    }

    #[inline(always)]
    fn block_anew(&self) -> u32 {
        let block: u32;
        // SAFETY: as above. Without `pure` it is not taken to be what was read before.
        unsafe { asm!("mov.u32 {}, %ctaid.x;", out(reg32) block, options(nomem, nostack)) };
        block
    }

    #[inline(always)]
    fn blocks(&self) -> [u32; 3] {
        [special!("%nctaid.x"), special!("%nctaid.y"), special!("%nctaid.z")]
    }

    #[inline(always)]
    fn barrier(&self) {
        // SAFETY: orders memory and waits, nothing else.
        unsafe { barrier_all(0) }
    }

    #[inline(always)]
    fn barrier_of(&self, number: u32, threads: u32) {
        // SAFETY: as above.
        unsafe { barrier_count(number as i32, threads as i32) }
    }

    #[inline(always)]
    fn barrier_arrive(&self, number: u32, threads: u32) {
        // SAFETY: orders memory, nothing else.
        unsafe { barrier_arrive_count(number as i32, threads as i32) }
    }

    #[inline(always)]
    fn let_next_start(&self) {
        #[cfg(sm_90)]
        // SAFETY: touches no memory.
        unsafe {
            asm!("griddepcontrol.launch_dependents;", options(nomem, nostack));
        }
    }

    #[inline(always)]
    fn wait_for_previous(&self) {
        #[cfg(sm_90)]
        // SAFETY: orders memory and waits, nothing else.
        unsafe {
            asm!("griddepcontrol.wait;", options(nostack));
        }
    }

    #[inline(always)]
    fn f32_of_f16(&self, bits: u16) -> f32 {
        let value: f32;
        // SAFETY: arithmetic, here and below.
        unsafe {
            asm!("cvt.f32.f16 {}, {};", out(reg32) value, in(reg16) bits, options(pure, nomem, nostack))
        }
        value
    }

    #[inline(always)]
    fn f16_pair(&self, low: f32, high: f32) -> u32 {
        let pair: u32;
        // SAFETY: as above.
        unsafe {
            asm!("cvt.rn.f16x2.f32 {}, {}, {};",
                out(reg32) pair, in(reg32) high, in(reg32) low, options(pure, nomem, nostack));
        }
        pair
    }

    #[inline(always)]
    fn bf16_pair(&self, low: f32, high: f32) -> u32 {
        let pair: u32;
        // SAFETY: as above.
        unsafe {
            asm!("cvt.rn.bf16x2.f32 {}, {}, {};",
                out(reg32) pair, in(reg32) high, in(reg32) low, options(pure, nomem, nostack));
        }
        pair
    }

    #[inline(always)]
    fn logistic(&self, place: f32) -> f32 {
        let value: f32;
        // The power is at most 2^96 behind the multiply-add by 2^-32 to 1, whose inverse is no subnormal number; or it is
        // infinite. SAFETY: as above.
        unsafe {
            asm!(
                "ex2.approx.ftz.f32 {0}, {1};",
                "\tfma.rn.f32 {0}, {0}, 0f2F800000, 0f3F800000;",
                "\trcp.approx.ftz.f32 {0}, {0};",
                out(reg32) value, in(reg32) place, options(pure, nomem, nostack));
        }
        value
    }

    #[inline(always)]
    fn unforeseen(&self, mut number: u64) -> u64 {
        // SAFETY: does nothing.
        unsafe { asm!("/* {} */", inout(reg64) number, options(nomem, nostack)) };
        number
    }

    #[inline(always)]
    fn bring_near(&self, address: u64) {
        // SAFETY: a hint, which no address makes wrong.
        unsafe { asm!("prefetch.global.L2 [{}];", in(reg64) address, options(nostack)) }
    }

    #[inline(always)]
    unsafe fn peek4(&self, address: u64) -> u32 {
        let value: u32;
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ld.relaxed.gpu.global.u32 {}, [{}];", out(reg32) value, in(reg64) address, options(nostack));
        }
        value
    }

    #[inline(always)]
    unsafe fn load16(&self, address: u64) -> Bytes16 {
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ld.global.v4.u32 {{{}, {}, {}, {}}}, [{}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) address,
                options(readonly, nostack));
        }
        Bytes16([a, b, c, d])
    }

    #[inline(always)]
    unsafe fn load8(&self, address: u64) -> u64 {
        let value: u64;
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ld.global.u64 {}, [{}];", out(reg64) value, in(reg64) address, options(readonly, nostack));
        }
        value
    }

    #[inline(always)]
    unsafe fn load4(&self, address: u64) -> u32 {
        let value: u32;
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ld.global.u32 {}, [{}];", out(reg32) value, in(reg64) address, options(readonly, nostack));
        }
        value
    }

    #[inline(always)]
    unsafe fn load2(&self, address: u64) -> u16 {
        let value: u16;
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ld.global.u16 {}, [{}];", out(reg16) value, in(reg64) address, options(readonly, nostack));
        }
        value
    }

    #[inline(always)]
    unsafe fn load1(&self, address: u64) -> u8 {
        let value: u32;
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ld.global.u8 {}, [{}];", out(reg32) value, in(reg64) address, options(readonly, nostack));
        }
        value as u8
    }

    #[inline(always)]
    unsafe fn load4_or_2(&self, address: u64, four: bool) -> u32 {
        let value: u32;
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "{{",
                "\t.reg .pred four;",
                "\tsetp.ne.u32 four, {}, 0;",
                "\t@four ld.global.u32 {}, [{}];",
                "\t@!four ld.global.u16 {1}, [{2}];",
                "\t}}",
                in(reg32) u32::from(four), out(reg32) value, in(reg64) address, options(readonly, nostack));
        }
        value
    }

    #[inline(always)]
    unsafe fn store4_or_2(&self, address: u64, value: u32, four: bool) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "{{",
                "\t.reg .pred four;",
                "\tsetp.ne.u32 four, {}, 0;",
                "\t@four st.global.u32 [{}], {};",
                "\t@!four st.global.u16 [{1}], {2};",
                "\t}}",
                in(reg32) u32::from(four), in(reg64) address, in(reg32) value, options(nostack));
        }
    }

    #[inline(always)]
    unsafe fn store16(&self, address: u64, Bytes16([a, b, c, d]): Bytes16) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("st.global.v4.u32 [{}], {{{}, {}, {}, {}}};",
                in(reg64) address, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
        }
    }

    #[inline(always)]
    unsafe fn store8(&self, address: u64, value: u64) {
        // SAFETY: the caller's promise.
        unsafe { asm!("st.global.u64 [{}], {};", in(reg64) address, in(reg64) value, options(nostack)) }
    }

    #[inline(always)]
    unsafe fn store4(&self, address: u64, value: u32) {
        // SAFETY: the caller's promise.
        unsafe { asm!("st.global.u32 [{}], {};", in(reg64) address, in(reg32) value, options(nostack)) }
    }

    #[inline(always)]
    unsafe fn store2(&self, address: u64, value: u16) {
        // SAFETY: the caller's promise.
        unsafe { asm!("st.global.u16 [{}], {};", in(reg64) address, in(reg16) value, options(nostack)) }
    }

    #[inline(always)]
    unsafe fn store1(&self, address: u64, value: u8) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("st.global.u8 [{}], {};", in(reg64) address, in(reg32) u32::from(value), options(nostack));
        }
    }

    #[inline(always)]
    unsafe fn load_shared16(&self, at: u32) -> Bytes16 {
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ld.shared.v4.u32 {{{}, {}, {}, {}}}, [{}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) self.shared(at),
                options(readonly, nostack));
        }
        Bytes16([a, b, c, d])
    }

    #[inline(always)]
    unsafe fn store_shared16(&self, at: u32, Bytes16([a, b, c, d]): Bytes16) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("st.shared.v4.u32 [{}], {{{}, {}, {}, {}}};",
                in(reg32) self.shared(at), in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
        }
    }

    #[inline(always)]
    unsafe fn load_shared8(&self, at: u32) -> u64 {
        let value: u64;
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ld.shared.u64 {}, [{}];", out(reg64) value, in(reg32) self.shared(at), options(readonly, nostack));
        }
        value
    }

    #[inline(always)]
    unsafe fn store_shared8(&self, at: u32, value: u64) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("st.shared.u64 [{}], {};", in(reg32) self.shared(at), in(reg64) value, options(nostack));
        }
    }

    #[inline(always)]
    unsafe fn load_shared4(&self, at: u32) -> u32 {
        let value: u32;
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ld.shared.u32 {}, [{}];", out(reg32) value, in(reg32) self.shared(at), options(readonly, nostack));
        }
        value
    }

    #[inline(always)]
    unsafe fn store_shared4(&self, at: u32, value: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("st.shared.u32 [{}], {};", in(reg32) self.shared(at), in(reg32) value, options(nostack));
        }
    }

    #[inline(always)]
    unsafe fn load_shared2(&self, at: u32) -> u16 {
        let value: u16;
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ld.shared.u16 {}, [{}];", out(reg16) value, in(reg32) self.shared(at), options(readonly, nostack));
        }
        value
    }

    #[inline(always)]
    unsafe fn store_shared2(&self, at: u32, value: u16) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("st.shared.u16 [{}], {};", in(reg32) self.shared(at), in(reg16) value, options(nostack));
        }
    }
}
