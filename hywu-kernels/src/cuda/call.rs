//! Builds a kernel's arguments and launches it.

use super::{Gpu, View, Words};
use crate::{Error, Result, Tensor};
use hywu_core::Dtype;

/// Threads of a block, where nothing speaks for another number.
pub(crate) const BLOCK: u32 = 256;

/// Blocks of `per_block` that cover `n` elements.
///
/// # Errors
/// More blocks than a grid can have.
pub(crate) fn blocks(n: usize, per_block: usize) -> Result<u32> {
    let blocks = n.div_ceil(per_block.max(1));
    match u32::try_from(blocks) {
        Ok(blocks) if blocks <= i32::MAX as u32 => Ok(blocks),
        _ => {
            Err(Error::invalid("launch", format!("{n} elements need {blocks} blocks, more than a grid has")))
        }
    }
}

/// A grid's y or z.
///
/// # Errors
/// More than there can be of `what`.
pub(crate) fn in_grid(op: &'static str, n: usize, what: &str) -> Result<u32> {
    match n {
        0..=65535 => Ok(n as u32),
        _ => Err(Error::invalid(op, format!("{n} {what} are more than a launch takes"))),
    }
}

/// A tensor of two to five axes in device memory, and the boxes of it that Hopper's copy engine moves. Axes from the innermost on.
#[derive(Debug)]
pub(crate) struct Boxes {
    pub address: u64,
    /// Elements along the axes.
    pub dims: Vec<u64>,
    /// Bytes from one to the next along the axes but the innermost; multiples of 16.
    pub pitches: Vec<u64>,
    /// Elements of a box along the axes.
    pub size: Vec<u32>,
}

impl Boxes {
    /// Do the sizes follow the engine's rules?
    fn good(&self) -> bool {
        let whole = std::iter::once(&self.address).chain(&self.pitches).all(|n| n.is_multiple_of(16));
        let counts = self.dims.len() == self.size.len() && self.dims.len() == self.pitches.len() + 1;
        whole
            && counts
            && self.dims.len() <= 5
            && self.dims.iter().all(|n| (1..1 << 32).contains(n))
            && self.size.iter().all(|n| *n <= 256)
    }
}

/// A launch in the making. The kernel `<name>_f32` or `<name>_bf16` of `kernels-cu/<op>/<op>.cu` is called with the arguments in the
/// order of these calls. Lengths and offsets are passed as 64-bit integers (`int64_t`), sizes as 32-bit (`int`).
pub(crate) struct Call {
    gpu: &'static Gpu,
    op: &'static str,
    kernel: String,
    dtype: Dtype,
    arguments: Arguments,
}

/// The arguments of a launch.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Arguments {
    /// Every argument in a slot of its own; a struct takes several.
    pub(super) slots: Vec<u64>,
    pub(super) starts: Vec<usize>,
}

impl Arguments {
    fn push(&mut self, slots: impl IntoIterator<Item = u64>) {
        self.starts.push(self.slots.len());
        self.slots.extend(slots);
    }
}

impl Call {
    /// For the device and the dtype of `tensor`.
    ///
    /// # Errors
    /// A tensor on the host.
    pub fn new(op: &'static str, name: &str, tensor: &Tensor) -> Result<Self> {
        let view = on_gpu(op, tensor)?;
        let kernel = match view.dtype {
            Dtype::F32 => format!("{name}_f32"),
            Dtype::Bf16 => format!("{name}_bf16"),
            Dtype::F16 => return Err(Error::invalid(op, "f16 is a storage format; tensors are f32 or bf16")),
        };
        Ok(Self { gpu: view.gpu(), op, kernel, dtype: view.dtype, arguments: Arguments::default() })
    }
    /// Another kernel for the same device: `name` is the whole name, of a kernel with one dtype only.
    pub fn named(op: &'static str, name: &str, tensor: &Tensor) -> Result<Self> {
        let gpu = on_gpu(op, tensor)?.gpu();
        let (kernel, dtype) = (name.to_owned(), tensor.dtype());
        Ok(Self { gpu, op, kernel, dtype, arguments: Arguments::default() })
    }
    fn slot(mut self, value: u64) -> Self {
        self.arguments.push([value]);
        self
    }
    /// A tensor of the call's own dtype, to read or to write.
    ///
    /// # Errors
    /// A tensor on another device or of another dtype.
    pub fn tensor(self, tensor: &Tensor) -> Result<Self> {
        let dtype = self.dtype;
        self.tensor_as(tensor, dtype)
    }
    /// A tensor of this dtype.
    ///
    /// # Errors
    /// As [`Call::tensor`].
    pub fn tensor_as(self, tensor: &Tensor, dtype: Dtype) -> Result<Self> {
        let view = on_gpu(self.op, tensor)?;
        if view.gpu().ordinal() != self.gpu.ordinal() || view.dtype != dtype {
            let what = format!(
                "an operand is {:?} on {}, the others are on cuda:{} and this one should be {dtype:?}",
                view.dtype,
                tensor.device(),
                self.gpu.ordinal()
            );
            return Err(Error::invalid(self.op, what));
        }
        // Kernels read 16 bytes at a time; every allocation and every part of one starts so.
        debug_assert!(view.address() % 16 == 0 || view.len == 0);
        Ok(self.slot(view.address()))
    }
    /// Integers in device memory (`const int*` or `const uint32_t*`).
    pub fn words(self, words: &Words) -> Self {
        self.slot(words.address())
    }
    /// Device memory whose elements no dtype describes.
    pub fn memory(self, view: &View) -> Self {
        self.slot(view.address())
    }
    /// A tensor, or a null pointer.
    ///
    /// # Errors
    /// As [`Call::tensor`].
    pub fn optional(self, tensor: Option<&Tensor>) -> Result<Self> {
        let dtype = self.dtype;
        self.optional_as(tensor, dtype)
    }
    /// A tensor of this dtype, or a null pointer.
    ///
    /// # Errors
    /// As [`Call::tensor`].
    pub fn optional_as(self, tensor: Option<&Tensor>, dtype: Dtype) -> Result<Self> {
        match tensor {
            Some(tensor) => self.tensor_as(tensor, dtype),
            None => Ok(self.slot(0)),
        }
    }
    /// A size (`int`).
    ///
    /// # Errors
    /// A size that does not fit.
    pub fn size(self, value: usize) -> Result<Self> {
        let value = i32::try_from(value)
            .map_err(|_| Error::invalid(self.op, format!("a size of {value} is more than a kernel takes")))?;
        Ok(self.slot(value as u64))
    }
    /// A length or an offset (`int64_t`).
    pub fn long(self, value: usize) -> Self {
        self.slot(value as u64)
    }
    /// A `float`.
    pub fn float(self, value: f32) -> Self {
        self.slot(u64::from(value.to_bits()))
    }
    /// Plain data (`#[repr(C)]`, no padding) for a struct passed by value.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.arguments.push(bytes.chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_le_bytes(word)
        }));
        self
    }
    /// What the copy engine is told about a tensor (`const __grid_constant__ CUtensorMap`).
    ///
    /// # Errors
    /// Sizes that it does not take.
    pub fn boxes(mut self, boxes: &Boxes) -> Result<Self> {
        if !boxes.good() {
            return Err(Error::invalid(
                self.op,
                format!("sizes that can't be copied by the engine: {boxes:?}"),
            ));
        }
        self.arguments.push(self.gpu.tensor_map(boxes)?);
        Ok(self)
    }
    /// Launches with `shared` bytes of dynamic shared memory. An empty grid is no launch.
    ///
    /// # Errors
    /// Those of the device.
    pub fn launch(self, grid: [u32; 3], block: u32, shared: usize) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let shared = u32::try_from(shared).map_err(|_| Error::invalid(self.op, "too much shared memory"))?;
        self.gpu.launch((self.op, self.kernel), grid, [block, 1, 1], shared, self.arguments)
    }
    /// One thread for every `per_thread` of `n` elements.
    ///
    /// # Errors
    /// Those of the device.
    pub fn over(self, n: usize, per_thread: usize) -> Result<()> {
        let grid = blocks(n, BLOCK as usize * per_thread)?;
        self.launch([grid, 1, 1], BLOCK, 0)
    }
}

pub(super) fn on_gpu<'a>(op: &'static str, tensor: &'a Tensor) -> Result<&'a View> {
    tensor.view().ok_or_else(|| {
        Error::invalid(
            op,
            format!("an operand {:?} is on the host, the others on a CUDA device", tensor.shape()),
        )
    })
}
