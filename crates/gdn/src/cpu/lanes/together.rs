//! Several registers as one.

use gdn_math::Lanes;

use super::Register;

/// N registers whose steps of a formula take turns: a processor looks only so far ahead, and finds something
/// to do in the steps of the others while a step waits for the one before it.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Together<L, const N: usize>([L; N]);

impl<L: Register, const N: usize> Together<L, N> {
    /// # Safety
    /// The machine has L's instruction set, and `LEN` f32 are readable at `src`, at any alignment.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn load(src: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let mut registers = [L::zero(); N];
            for (n, register) in registers.iter_mut().enumerate() {
                *register = L::load(src.add(n * L::LEN));
            }
            Self(registers)
        }
    }

    /// # Safety
    /// `LEN` f32 are writable at `dst`, at any alignment.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn store(self, dst: *mut f32) {
        for (n, register) in self.0.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { register.store(dst.add(n * L::LEN)) };
        }
    }
}

/// An operation of each register, with those of the other operands at the same place.
macro_rules! each {
    ($($name:ident($($other:ident),*))*) => {$(
        #[inline(always)]
        fn $name(mut self, $($other: Self),*) -> Self {
            for n in 0..N {
                self.0[n] = self.0[n].$name($($other.0[n]),*);
            }
            self
        }
    )*};
}

impl<L: Register, const N: usize> Lanes for Together<L, N> {
    const LEN: usize = N * L::LEN;

    #[inline(always)]
    fn splat(mut self, value: f32) -> Self {
        for n in 0..N {
            self.0[n] = self.0[n].splat(value);
        }
        self
    }

    each! {
        plus(other)
        minus(other)
        times(other)
        over(other)
        mul_add(factor, addend)
        neg_mul_add(factor, addend)
        root()
        at_least(least)
        at_most(most)
        if_greater(other, then, otherwise)
        half_of_power()
        negated()
    }
}
