//! The core of the layer on the CPU, `decode` and `prefill`, held to the f64 oracle: every instruction set,
//! poisoned outputs, guards around everything.

mod batch;
mod conformance;
mod contracts;
mod errors;
mod invariants;
mod memory;
mod setup;
mod small;
