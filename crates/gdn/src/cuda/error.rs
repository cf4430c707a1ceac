//! [`CudaError`]: why a GPU cannot be had, or did not do what it was asked.

use cudarc::driver::DriverError;
use thiserror::Error;

use crate::argument::ArgumentError;

/// Why a GPU cannot be had, or did not do what it was asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The machine has no NVIDIA driver.
    #[error("no NVIDIA driver on this machine: its library (libcuda.so.1, nvcuda.dll) cannot be loaded")]
    NoDriver,
    /// The driver is older than the kernels.
    #[error("the NVIDIA driver knows CUDA {}.{}, 12.0 or later is needed", version / 1000, version % 1000 / 10)]
    DriverTooOld {
        /// What the driver says: `1000 * major + 10 * minor`.
        version: i32,
    },
    /// There is no such device.
    #[error("no device cuda:{ordinal}, this machine has {count}")]
    NoDevice {
        /// The one asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device is older than the kernels.
    #[error("cuda:{ordinal} ({name}) has compute capability {major}.{minor}, 8.0 or later is needed")]
    DeviceTooOld {
        /// Which device.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Major number of its compute capability.
        major: i32,
        /// Minor number of its compute capability.
        minor: i32,
    },
    /// A tensor lies somewhere else than on the device of the call.
    #[error("{argument} at {address:#x} belongs to {}, the call is for cuda:{expected}", place(*.got))]
    WrongDevice {
        /// Which tensor.
        argument: &'static str,
        /// Its address.
        address: u64,
        /// The device it belongs to; `None` for memory that the driver does not know.
        got: Option<usize>,
        /// The device of the call.
        expected: usize,
    },
    /// An argument is wrong, whatever the device.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// A tensor that is larger than the kernels can count.
    #[error(
        "{argument}: {num_rows} rows of {row_bytes} bytes, moved {word} bytes at a time, are more than a grid can hold"
    )]
    TooLarge {
        /// `mixed_qkvz` or `mixed_ba`.
        argument: &'static str,
        /// N.
        num_rows: usize,
        /// Bytes of a packed row.
        row_bytes: usize,
        /// Bytes of the widest access that the alignment allows.
        word: usize,
    },
    /// A view of a slice that was made for another stream than that of the call.
    #[error("{argument} was made for another stream than that of the call")]
    WrongStream {
        /// Which tensor.
        argument: &'static str,
    },
    /// More sequences than a grid can hold.
    #[error("{num_sequences} sequences of {num_k_heads} key heads are more than a grid can hold")]
    TooManySequences {
        /// B.
        num_sequences: usize,
        /// HK.
        num_k_heads: usize,
    },
    /// The driver refused something. Errors of kernels that were launched earlier come up here too.
    #[error("cuda:{ordinal}: {call} failed: {source}")]
    Driver {
        /// The device.
        ordinal: usize,
        /// What was asked of the driver.
        call: &'static str,
        /// What it said.
        source: DriverError,
    },
}

fn place(device: Option<usize>) -> String {
    device.map_or_else(|| String::from("no device"), |ordinal| format!("cuda:{ordinal}"))
}

/// Names the call that failed.
pub(super) fn driver(ordinal: usize, call: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |source| CudaError::Driver { ordinal, call, source }
}
