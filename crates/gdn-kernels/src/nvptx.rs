//! [`Gpu`] for NVIDIA GPUs. The only file with inline assembly.

use core::arch::{asm, global_asm};

use crate::gpu::{Bytes16, Gpu};

/// The thread that asks.
pub(crate) struct Nvptx;

// The block's dynamic shared memory, as much as the launch says.
#[cfg(probe)]
global_asm!(".extern .shared .align 16 .b8 dynamic_shared[];");
#[cfg(not(probe))]
global_asm!("");

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

impl Gpu for Nvptx {
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
    fn blocks(&self) -> [u32; 3] {
        [special!("%nctaid.x"), special!("%nctaid.y"), special!("%nctaid.z")]
    }

    #[inline(always)]
    fn barrier(&self) {
        // SAFETY: orders memory and waits, nothing else.
        unsafe { asm!("bar.sync 0;", options(nostack)) }
    }

    #[inline(always)]
    fn shuffle_xor(&self, value: u32, mask: u32) -> u32 {
        let other: u32;
        // SAFETY: moves a register between lanes.
        unsafe {
            asm!("shfl.sync.bfly.b32 {}, {}, {}, 31, 0xffffffff;",
                out(reg32) other, in(reg32) value, in(reg32) mask, options(nomem, nostack));
        }
        other
    }

    #[inline(always)]
    fn let_next_start(&self) {
        #[cfg(programmatic)]
        // SAFETY: touches no memory.
        unsafe {
            asm!("griddepcontrol.launch_dependents;", options(nomem, nostack));
        }
    }

    #[inline(always)]
    fn wait_for_previous(&self) {
        #[cfg(programmatic)]
        // SAFETY: orders memory and waits, nothing else.
        unsafe {
            asm!("griddepcontrol.wait;", options(nostack));
        }
    }

    #[cfg(probe)]
    #[inline(always)]
    unsafe fn load_shared(&self, at: u32) -> u32 {
        let value: u32;
        // SAFETY: the caller's promise.
        unsafe {
            asm!("{{ .reg .u32 base; mov.u32 base, dynamic_shared; add.u32 base, base, {1}; ld.shared.u32 {0}, [base]; }}",
                out(reg32) value, in(reg32) at, options(nostack));
        }
        value
    }

    #[cfg(probe)]
    #[inline(always)]
    unsafe fn store_shared(&self, at: u32, value: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("{{ .reg .u32 base; mov.u32 base, dynamic_shared; add.u32 base, base, {0}; st.shared.u32 [base], {1}; }}",
                in(reg32) at, in(reg32) value, options(nostack));
        }
    }

    #[cfg(not(probe))]
    #[inline(always)]
    unsafe fn load_shared(&self, _: u32) -> u32 {
        0
    }

    #[cfg(not(probe))]
    #[inline(always)]
    unsafe fn store_shared(&self, _: u32, _: u32) {}

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
}
