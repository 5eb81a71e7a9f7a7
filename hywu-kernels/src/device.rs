use crate::{
    Error, Profile, Result,
    cuda::{Event, Gpu, Properties, Replay, piece},
    system,
    tensor::pooled,
};
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
    /// Opens the device: can it be used?
    ///
    /// # Errors
    /// For a CUDA device that this build, driver or machine does not have: what is missing, and what to do.
    pub fn check(self) -> Result<Self> {
        if let Self::Cuda(n) = self {
            Gpu::get(n)?;
        }
        Ok(self)
    }
    /// The best device that can be used.
    pub fn best() -> Self {
        Self::Cuda(0).check().unwrap_or_default()
    }
    /// What the device is; none for the CPU.
    ///
    /// # Errors
    /// As [`Device::check`].
    pub fn properties(self) -> Result<Option<Properties>> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(n) => Ok(Some(Gpu::get(n)?.properties().clone())),
        }
    }
    /// Free and total bytes of a CUDA device's memory.
    ///
    /// # Errors
    /// As [`Device::check`].
    pub fn memory(self) -> Result<Option<(usize, usize)>> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(n) => Ok(Some(Gpu::get(n)?.memory_info()?)),
        }
    }
    /// Bytes that new tensors can have, those that are kept for them included: of the memory that the system can give this process without
    /// swapping (where the system tells), or of a CUDA device's own, within [`Device::limit_memory`].
    ///
    /// # Errors
    /// As [`Device::check`].
    pub fn available_memory(self) -> Result<u64> {
        match self {
            Self::Cpu => Ok(system::available_memory().saturating_add(pooled() as u64)),
            Self::Cuda(n) => Ok(Gpu::get(n)?.available()? as u64),
        }
    }
    /// Bytes that a tensor of so many bytes takes: a CUDA device's memory is given out in pieces, of which up to an eighth is left over.
    pub fn taken(self, bytes: u64) -> u64 {
        match self {
            Self::Cpu => bytes,
            Self::Cuda(_) => piece(usize::try_from(bytes).unwrap_or(usize::MAX)) as u64,
        }
    }
    /// Gives the memory that tensors no longer use back to the system, which is otherwise kept for the next ones. Waits
    /// until all work is done.
    ///
    /// # Errors
    /// Those of the device.
    pub fn trim(self) -> Result<()> {
        match self {
            Self::Cpu => {
                crate::tensor::trim();
                Ok(())
            }
            Self::Cuda(n) => Gpu::get(n)?.trim(),
        }
    }
    /// Lets tensors, and the memory that is kept for new ones, take no more than so many bytes of a CUDA device; what goes beyond is
    /// [`Error::OutOfMemory`]. Nothing happens on the CPU.
    ///
    /// # Errors
    /// As [`Device::check`].
    pub fn limit_memory(self, bytes: usize) -> Result<()> {
        if let Self::Cuda(n) = self {
            Gpu::get(n)?.limit(bytes);
        }
        Ok(())
    }
    /// Waits until all work is done; an error of an earlier launch may come out here. The CPU is always done.
    ///
    /// # Errors
    /// Those of the device.
    pub fn synchronize(self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Cuda(n) => Gpu::get(n)?.synchronize(),
        }
    }
    /// Marks this point in a CUDA device's work, to wait for it or for timing.
    ///
    /// # Errors
    /// As [`Device::check`].
    pub fn event(self) -> Result<Option<Event>> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(n) => Ok(Some(Gpu::get(n)?.event()?)),
        }
    }

    /// For finding out where the time of something that is repeated there goes; none for the CPU.
    ///
    /// # Errors
    /// As [`Device::check`].
    pub fn profile(self) -> Result<Option<Profile>> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(n) => Ok(Some(Profile::new(Gpu::get(n)?))),
        }
    }

    /// For something that is repeated there, a training step say: a CUDA device launches it as a whole. The CPU just does it.
    pub fn replay(self) -> Replay {
        Replay::new(match self {
            Self::Cpu => None,
            // A device that can't be used says so at the first tensor.
            Self::Cuda(n) => Gpu::get(n).ok(),
        })
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
