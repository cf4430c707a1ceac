//! `--device`: where an op runs.

use std::{fmt, str::FromStr};

#[cfg(feature = "cuda")]
use gdn::cuda;
use gdn::{Cpu, Layout, Packed, Rows, RowsMut, Unpacked};

use crate::call::Call;

/// What `--device` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Device {
    #[default]
    Cpu,
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match (name, name.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(ordinal)),
            _ => Err(format!("device is '{name}', it must be 'cpu', 'cuda' or 'cuda:N'")),
        }
    }
}

/// As in `cuda:0`.
impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A device that was found, ready for work.
pub(crate) enum Backend {
    Cpu(Cpu<'static>),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Gpu),
}

impl Backend {
    /// The device, with `cpu` where that is the CPU.
    pub(crate) fn new(device: Device, cpu: Cpu<'static>) -> anyhow::Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Cpu(cpu)),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => Ok(Self::Cuda(cuda::Gpu::new(ordinal)?)),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => anyhow::bail!("--device cuda: this gdn was built without the feature 'cuda'"),
        }
    }

    /// Whether a GPU may bring segments of a prefill's sequence forward side by side. On a CPU nothing
    /// changes.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "there is no GPU"))]
    pub(crate) fn segments(self, segments: bool) -> Self {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => Self::Cuda(gpu.segments(segments)),
            cpu @ Self::Cpu(_) => cpu,
        }
    }

    pub(crate) fn split(
        &self,
        layout: &Layout,
        from: Packed<Rows<'_>>,
        to: Unpacked<RowsMut<'_>>,
    ) -> anyhow::Result<()> {
        match self {
            Self::Cpu(cpu) => Ok(gdn::split(layout, from, to, cpu)?),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => Ok(cuda::split_host(layout, from, to, gpu)?),
        }
    }

    pub(crate) fn merge(
        &self,
        layout: &Layout,
        from: Unpacked<Rows<'_>>,
        to: Packed<RowsMut<'_>>,
    ) -> anyhow::Result<()> {
        match self {
            Self::Cpu(cpu) => Ok(gdn::merge(layout, from, to, cpu)?),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => Ok(cuda::merge_host(layout, from, to, gpu)?),
        }
    }

    /// Decode or prefill.
    pub(crate) fn run(&self, call: &mut Call<'_>) -> anyhow::Result<()> {
        match (self, call) {
            (Self::Cpu(cpu), Call::Decode(call)) => Ok(gdn::decode(call, cpu)?),
            (Self::Cpu(cpu), Call::Prefill(call)) => Ok(gdn::prefill(call, cpu)?),
            #[cfg(feature = "cuda")]
            (Self::Cuda(gpu), Call::Decode(call)) => Ok(cuda::decode_host(call, gpu)?),
            #[cfg(feature = "cuda")]
            (Self::Cuda(gpu), Call::Prefill(call)) => Ok(cuda::prefill_host(call, gpu)?),
        }
    }

    /// What does the work.
    pub(crate) fn unit(&self) -> &'static str {
        match self {
            Self::Cpu(cpu) => cpu.chosen_isa().name(),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => "ptx",
        }
    }

    /// Multiply-adds of a call of decode or prefill, about: enough for all of the device, and to make up for
    /// what a call costs beside, little enough to notice Ctrl-C and to move the progress bar.
    pub(crate) fn piece(&self) -> usize {
        match self {
            Self::Cpu(_) => 1 << 30,
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => 1 << 36,
        }
    }

    /// The device, how it is used, and what its times are of, as `gdn forward` says it.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Cpu(cpu) => {
                let threads = cpu.chosen_threads(usize::MAX);
                let s = if threads == 1 { "" } else { "s" };
                format!("cpu, {}, at most {threads} thread{s}", cpu.chosen_isa())
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => format!("{}; times with the copies there and back", gpu.info()),
        }
    }
}

/// One line for each device, or one that says why there is none.
pub(crate) fn list() -> String {
    #[cfg(feature = "cuda")]
    let lines = match cuda::devices() {
        Ok(devices) if devices.is_empty() => String::from("  a driver, and no device\n"),
        Ok(devices) => devices
            .iter()
            .map(|device| {
                let note = if device.is_supported() { "" } else { " (too old: 8.0 or later is needed)" };
                format!("  {device}{note}\n")
            })
            .collect(),
        Err(error) => format!("  {error}\n"),
    };
    #[cfg(not(feature = "cuda"))]
    let lines = String::from("  built without the feature 'cuda'\n");
    format!("\nNVIDIA GPUs\n{lines}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        assert_eq!("cpu".parse(), Ok(Device::Cpu));
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(Device::Cuda(3)));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(wrong.parse::<Device>().unwrap_err().contains("must be 'cpu', 'cuda' or 'cuda:N'"));
        }
    }
}
