//! `--device`: where an op runs.

use std::{fmt, str::FromStr};

use anyhow::bail;
#[cfg(feature = "cuda")]
use gdn::cuda;
use gdn::{Cpu, Layout, Packed, Rows, RowsMut, Unpacked};

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

impl Device {
    /// # Errors
    /// Where it is not the CPU, the only one on which `what` runs.
    pub(crate) fn expect_cpu(self, what: &str) -> anyhow::Result<()> {
        if self != Self::Cpu {
            bail!("--device {self}: {what} runs on the CPU only so far, give --device cpu");
        }
        Ok(())
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
            Device::Cuda(_) => bail!("--device cuda: this gdn was built without the feature 'cuda'"),
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
