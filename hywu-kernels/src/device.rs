use crate::{Error, Result};
use std::{fmt, str::FromStr};

/// Where tensors live and ops run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// All cores of this machine.
    #[default]
    Cpu,
    /// CUDA device number n.
    Cuda(usize),
}

impl Device {
    /// Checks that the device can be used.
    ///
    /// # Errors
    /// [`Error::NotBuiltWithCuda`] for a CUDA device: this build has no CUDA kernels.
    pub fn check(self) -> Result<Self> {
        match self {
            Self::Cpu => Ok(self),
            Self::Cuda(_) => Err(Error::NotBuiltWithCuda),
        }
    }
    /// The best device that can be used.
    pub fn best() -> Self {
        Self::Cpu
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;
    /// `cpu`, `cuda`, `cuda:N` or `auto` (the best there is).
    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::invalid("device", format!("`{text}` is not one of auto, cpu, cuda, cuda:N"));
        match text {
            "auto" => Ok(Self::best()),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let n = text.strip_prefix("cuda:").ok_or_else(bad)?;
                Ok(Self::Cuda(n.parse().map_err(|_| bad())?))
            }
        }
    }
}
