//! CUDA code: the device layer, and launchers, one file per op. A launcher `cuda::<op>::<f>` has the signature of `cpu::<op>::<f>`, but
//! may fail; [`on_device`](crate::ops) chooses between them.
//!
//! Launchers compile in every build; only the device layer is exchanged: [`driver`] talks to the CUDA driver, `absent` has the same
//! names and no device. So nothing above this folder asks whether CUDA was built in.

pub mod attention;
#[cfg_attr(not(feature = "cuda"), path = "blas_absent.rs")]
mod blas;
mod call;
#[cfg_attr(feature = "cuda", path = "driver/mod.rs")]
#[cfg_attr(not(feature = "cuda"), path = "absent.rs")]
mod driver;
pub mod elementwise;
pub mod embedding;
mod hopper;
pub mod local_filter;
pub mod loss;
pub mod low_rank_linear;
pub mod noise;
pub mod optim;
pub mod parameter_tokens;
pub mod patchify;
pub mod residual;
pub mod rms_norm;
pub mod swiglu;
pub mod tile_blend;

pub(crate) use call::{Call, blocks};
pub use driver::{Event, Replay};
pub(crate) use driver::{Gpu, Memory};
pub(crate) use driver::{broken_guards, guard_allocations};

use crate::{Error, Result, Tensor};
use hywu_core::Dtype;
use std::{sync::Arc, time::Duration};

/// What a CUDA device is.
#[derive(Clone, Debug)]
pub struct Properties {
    /// Its name.
    pub name: String,
    /// Compute capability, (9, 0) for Hopper.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of device memory.
    pub memory: usize,
    /// CUDA version of the driver, (13, 0).
    pub driver: (u32, u32),
}

/// An operation that a device has done.
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "made by the driver alone"))]
pub(crate) struct Span {
    pub name: String,
    pub milliseconds: f32,
    /// From the end of the one before, in milliseconds.
    pub idle: f32,
}

/// What a device did while it was watched.
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "made by the driver alone"))]
pub(crate) struct Watched {
    /// In their order.
    pub spans: Vec<Span>,
    /// That the host waited for the device.
    pub waited: Duration,
}

/// Elements in device memory: a part of an allocation.
#[derive(Clone)]
pub(crate) struct View {
    pub memory: Arc<Memory>,
    /// First element.
    pub offset: usize,
    pub len: usize,
    pub dtype: Dtype,
}

impl View {
    /// Unspecified contents.
    pub fn new(gpu: &'static Gpu, len: usize, dtype: Dtype) -> Result<Self> {
        // No allocation is larger, and what is added to a size below can't overflow.
        let bytes = len.checked_mul(dtype.size()).filter(|bytes| *bytes <= isize::MAX as usize);
        let bytes = bytes.ok_or_else(|| Error::invalid("allocate", format!("{len} elements")))?;
        Ok(Self { memory: Arc::new(gpu.allocate(bytes)?), offset: 0, len, dtype })
    }
    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.memory.address() + self.start() as u64
    }
    /// First byte within the allocation.
    pub fn start(&self) -> usize {
        self.offset * self.dtype.size()
    }
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }
    pub fn gpu(&self) -> &'static Gpu {
        self.memory.gpu()
    }
    /// May it be written in place: does no other tensor share it?
    pub fn unique(&self) -> bool {
        Arc::strong_count(&self.memory) == 1
    }
}

/// Elements in 16 bytes: what a thread of a vectorised kernel takes.
pub(crate) fn pack(dtype: Dtype) -> usize {
    16 / dtype.size()
}

/// 32-bit integers in device memory: lengths, indices, offsets.
pub(crate) struct Words(View);

impl Words {
    /// Where `like` is.
    ///
    /// # Errors
    /// A tensor on the host; not enough memory.
    pub fn new(like: &Tensor, values: &[u32]) -> Result<Self> {
        let gpu = call::on_gpu("words", like)?.gpu();
        // Any four bytes; the dtype counts them.
        let view = View::new(gpu, values.len(), Dtype::F32)?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        gpu.upload(&view.memory, view.start(), &bytes)?;
        Ok(Self(view))
    }
    /// Sizes, which a kernel reads as `int`.
    ///
    /// # Errors
    /// As [`Words::new`]; a size beyond 2^31.
    pub fn sizes(like: &Tensor, values: &[usize]) -> Result<Self> {
        let word = |&v: &usize| i32::try_from(v).map(|v| v as u32);
        let words: Vec<u32> = values.iter().map(word).collect::<Result<_, _>>().map_err(|_| {
            Error::invalid(
                "words",
                format!("sizes up to {:?} are more than a kernel takes", values.iter().max()),
            )
        })?;
        Self::new(like, &words)
    }
    pub fn len(&self) -> usize {
        self.0.len
    }
    pub fn address(&self) -> u64 {
        self.0.address()
    }
}
