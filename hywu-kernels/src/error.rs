/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in an op.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong shape.
    #[error("{op}: {what} has shape {got:?}, expected {expected}")]
    Shape {
        /// The op.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What would be right.
        expected: String,
    },
    /// An argument's value can't work.
    #[error("{op}: {what}")]
    Invalid {
        /// The op.
        op: &'static str,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// A CUDA device was asked of a build without CUDA kernels.
    #[error(
        "this build has no CUDA kernels; use the device `cpu`, or rebuild with `--features cuda` where nvcc 13.0 is found"
    )]
    NotBuiltWithCuda,
    /// There is no CUDA driver on this machine.
    #[error("no CUDA driver: libcuda.so.1 is not there; install NVIDIA's driver, or use the device `cpu`")]
    NoCudaDriver,
    /// The driver can't run these kernels.
    #[error(
        "the CUDA driver is too old: it supports CUDA {}.{}, this build needs {}.{}; update NVIDIA's driver, or use the device `cpu`",
        found.0, found.1, needed.0, needed.1
    )]
    CudaDriverTooOld {
        /// CUDA version that it supports.
        found: (u32, u32),
        /// CUDA version of the kernels.
        needed: (u32, u32),
    },
    /// There is no device of that number.
    #[error("there is no device cuda:{ordinal}; {}", match count {
        0 => "the driver finds no CUDA device, use `cpu`".to_owned(),
        1 => "there is only cuda:0".to_owned(),
        n => format!("there are cuda:0 .. cuda:{}", n - 1),
    })]
    NoCudaDevice {
        /// The number asked for.
        ordinal: usize,
        /// Devices that there are.
        count: usize,
    },
    /// The kernels were not compiled for this device.
    #[error(
        "no kernels for {device}: its compute capability is {}.{}, compiled are {}; {}use the device `cpu`",
        capability.0, capability.1, option_env!("HYWU_CUDA_ARCHS").unwrap_or("none"), match capability {
            // Products of bf16 and asynchronous copies.
            (..=7, _) => "the kernels need 8.0, ".to_owned(),
            (major, minor) => format!("rebuild with HYWU_CUDA_ARCH={major}{minor}, or "),
        }
    )]
    NoKernelImage {
        /// Its name.
        device: String,
        /// Its compute capability.
        capability: (u32, u32),
    },
    /// The device has not enough memory. What was asked for before is still good, and the device can be used on.
    #[error(
        "cuda:{ordinal} is out of memory: {requested} bytes were asked for, {free} of {total} are free; \
         use smaller tiles or batches, or the device `cpu`"
    )]
    OutOfMemory {
        /// Number of the device.
        ordinal: usize,
        /// Bytes asked for.
        requested: usize,
        /// Bytes free, as the driver says.
        free: usize,
        /// Bytes in all.
        total: usize,
    },
    /// The system has not enough memory.
    #[error("out of memory: the system refused {requested} bytes; use smaller tiles or batches")]
    OutOfHostMemory {
        /// Bytes asked for.
        requested: usize,
    },
    /// The CUDA driver refused a call or a kernel failed.
    #[error("CUDA: {call}: {name} ({code}): {message}; {remedy}")]
    Cuda {
        /// What was tried.
        call: String,
        /// The driver's error code.
        code: u32,
        /// Its name.
        name: String,
        /// What it means, in the driver's words.
        message: String,
        /// What to do.
        remedy: &'static str,
    },
    /// An error of files, configs or adapters.
    #[error(transparent)]
    Core(#[from] hywu_core::Error),
}

impl Error {
    /// An [`Error::Shape`].
    pub fn shape(op: &'static str, what: &'static str, got: &[usize], expected: impl Into<String>) -> Self {
        Self::Shape { op, what, got: got.to_vec(), expected: expected.into() }
    }
    /// An [`Error::Invalid`].
    pub fn invalid(op: &'static str, what: impl Into<String>) -> Self {
        Self::Invalid { op, what: what.into() }
    }
}
