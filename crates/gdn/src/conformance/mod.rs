//! Conformance: for each op one table of cases and one bound, and every backend held to them: every
//! instruction set, the emulator wherever tests run, and a GPU where there is one.

mod split;

#[cfg(feature = "cuda")]
mod decode;

#[cfg(feature = "cuda")]
mod prefill;
