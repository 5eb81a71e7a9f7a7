use crate::{
    Device, Error, Result,
    cuda::{self, Gpu, View},
    ops::{on_device, together},
};
use hywu_core::Dtype;
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
};

/// A dense row-major array on a device; cloning shares the storage, writing to a shared one copies it first.
///
/// On the CPU elements are f32. On a CUDA device they are f32 or bf16: ops take operands of one dtype, add up in f32 and round their
/// result to it.
#[derive(Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    storage: Storage,
}

#[derive(Clone)]
enum Storage {
    Host(Arc<Buffer>),
    Cuda(View),
}

/// Host memory that goes back to a pool when dropped: a training step then allocates nothing after the first.
#[derive(Debug)]
pub(crate) struct Buffer {
    data: Vec<f32>,
}

/// Smaller buffers are left to the system allocator.
const POOL_MIN: usize = 1024;
/// Most floats the pool keeps (1 GiB): what is freed beyond that goes back to the system.
const POOL_MAX: usize = 1 << 28;

#[derive(Default)]
struct Pool {
    free: HashMap<usize, Vec<Vec<f32>>>,
    held: usize,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

fn pool<T>(f: impl FnOnce(&mut Pool) -> T) -> T {
    // A panic elsewhere can't leave the pool half-changed: every use is a push or a pop.
    let mut guard = POOL.lock().unwrap_or_else(|e| e.into_inner());
    f(guard.get_or_insert_default())
}

/// Empties the pool.
pub(crate) fn trim() {
    pool(|p| *p = Pool::default());
}

impl Buffer {
    /// `len` floats with unspecified (but initialised) contents. A system that has not so much memory ends the process.
    fn take(len: usize) -> Self {
        Self::of(Self::reuse(len).unwrap_or_else(|| vec![0.0; len]))
    }
    /// The same, for what may be larger than memory.
    fn try_take(len: usize) -> Result<Self> {
        if let Some(data) = Self::reuse(len) {
            return Ok(Self::of(data));
        }
        let mut data = Vec::new();
        let full = |_| Error::OutOfHostMemory { requested: len.saturating_mul(size_of::<f32>()) };
        data.try_reserve_exact(len).map_err(full)?;
        data.resize(len, 0.0);
        Ok(Self::of(data))
    }
    fn reuse(len: usize) -> Option<Vec<f32>> {
        if len < POOL_MIN {
            return None;
        }
        pool(|p| {
            let data = p.free.get_mut(&len)?.pop()?;
            p.held -= len;
            Some(data)
        })
    }
    fn of(mut data: Vec<f32>) -> Self {
        if cfg!(debug_assertions) {
            data.fill(f32::NAN);
        }
        Self { data }
    }
}

/// Bytes that the pool keeps for new tensors.
pub(crate) fn pooled() -> usize {
    pool(|p| p.held * size_of::<f32>())
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let mut copy = Self::take(self.data.len());
        copy.data.copy_from_slice(&self.data);
        copy
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        if data.len() >= POOL_MIN && data.len() == data.capacity() {
            pool(|p| {
                if p.held + data.len() <= POOL_MAX {
                    p.held += data.len();
                    p.free.entry(data.len()).or_default().push(data);
                }
            });
        }
    }
}

fn computable(op: &'static str, dtype: Dtype) -> Result<()> {
    match dtype {
        Dtype::F16 => Err(Error::invalid(op, "f16 is a storage format; tensors are f32 or bf16")),
        Dtype::F32 | Dtype::Bf16 => Ok(()),
    }
}

impl Tensor {
    /// Takes row-major data.
    ///
    /// # Errors
    /// [`Error::Shape`] when the product of `shape` is not `data.len()`.
    pub fn new(shape: &[usize], data: Vec<f32>) -> Result<Self> {
        if shape.iter().product::<usize>() != data.len() {
            return Err(Error::shape("tensor", "data", &[data.len()], format!("{shape:?}")));
        }
        Ok(Self::host(shape, Buffer { data }))
    }
    fn host(shape: &[usize], buffer: Buffer) -> Self {
        Self { shape: shape.to_vec(), storage: Storage::Host(Arc::new(buffer)) }
    }
    /// A 0-d tensor.
    pub fn scalar(value: f32) -> Self {
        Self::full(&[], value)
    }
    /// All zeros, on the CPU.
    pub fn zeros(shape: &[usize]) -> Self {
        Self::full(shape, 0.0)
    }
    /// All one value, on the CPU.
    pub fn full(shape: &[usize], value: f32) -> Self {
        Self::build(shape, |out| out.fill(value))
    }
    /// A new tensor on the CPU whose every element `fill` writes (it starts with unspecified values, NaN in debug builds).
    pub fn build(shape: &[usize], fill: impl FnOnce(&mut [f32])) -> Self {
        let mut buffer = Buffer::take(shape.iter().product());
        fill(&mut buffer.data);
        Self::host(shape, buffer)
    }
    /// Copies an ndarray.
    pub fn from_array<D: ndarray::Dimension>(array: &ndarray::Array<f32, D>) -> Self {
        Self::build(array.shape(), |out| {
            for (o, &x) in out.iter_mut().zip(array.iter()) {
                *o = x;
            }
        })
    }
    /// Copies to an ndarray.
    ///
    /// # Errors
    /// Those of the device.
    pub fn to_array(&self) -> Result<ndarray::ArrayD<f32>> {
        let shape = ndarray::IxDyn(&self.shape);
        // The length is the product of the shape by construction.
        Ok(ndarray::ArrayD::from_shape_vec(shape, self.to_host()?.data().to_vec()).unwrap_or_default())
    }
    /// The device that holds it.
    pub fn device(&self) -> Device {
        match &self.storage {
            Storage::Host(_) => Device::Cpu,
            Storage::Cuda(view) => Device::Cuda(view.gpu().ordinal()),
        }
    }
    /// Type of the elements: always f32 on the CPU.
    pub fn dtype(&self) -> Dtype {
        match &self.storage {
            Storage::Host(_) => Dtype::F32,
            Storage::Cuda(view) => view.dtype,
        }
    }
    /// Is it on a CUDA device?
    pub fn is_cuda(&self) -> bool {
        self.view().is_some()
    }
    /// The same values on a device, rounded to `dtype` where that is a CUDA device (the CPU computes in f32); shares the storage when
    /// nothing changes.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory; f16, which is for files only.
    pub fn to(&self, device: Device, dtype: Dtype) -> Result<Self> {
        computable("to", dtype)?;
        match (&self.storage, device) {
            (Storage::Host(_), Device::Cpu) => Ok(self.clone()),
            (Storage::Host(buffer), Device::Cuda(n)) => {
                let view = View::new(Gpu::get(n)?, buffer.data.len(), Dtype::F32)?;
                // SAFETY: any f32 is four bytes.
                let bytes = unsafe {
                    std::slice::from_raw_parts(buffer.data.as_ptr().cast::<u8>(), 4 * buffer.data.len())
                };
                view.gpu().upload(&view.memory, view.start(), bytes)?;
                Self { shape: self.shape.clone(), storage: Storage::Cuda(view) }.cast(dtype)
            }
            (Storage::Cuda(view), Device::Cuda(n)) if view.gpu().ordinal() == n => self.cast(dtype),
            // Between two devices by way of the host.
            (Storage::Cuda(_), Device::Cuda(_)) => self.to_host()?.to(device, dtype),
            (Storage::Cuda(_), Device::Cpu) => {
                let wide = self.cast(Dtype::F32)?;
                let Storage::Cuda(view) = &wide.storage else { return Ok(wide) };
                let mut buffer = Buffer::take(view.len);
                // SAFETY: any four bytes are an f32; the buffer is that long.
                let bytes = unsafe {
                    std::slice::from_raw_parts_mut(buffer.data.as_mut_ptr().cast::<u8>(), 4 * view.len)
                };
                view.gpu().download(&view.memory, view.start(), bytes)?;
                Ok(Self::host(&self.shape, buffer))
            }
        }
    }
    /// A copy on the CPU, or itself where it is there.
    ///
    /// # Errors
    /// Those of the device: an earlier launch that failed may come out here.
    pub fn to_host(&self) -> Result<Self> {
        self.to(Device::Cpu, Dtype::F32)
    }
    /// The same values where `other` is, in its dtype.
    ///
    /// # Errors
    /// As [`Tensor::to`].
    pub fn to_like(&self, other: &Self) -> Result<Self> {
        self.to(other.device(), other.dtype())
    }
    /// The same values in another dtype; nothing changes on the CPU.
    ///
    /// # Errors
    /// As [`Tensor::to`].
    pub fn cast(&self, dtype: Dtype) -> Result<Self> {
        computable("cast", dtype)?;
        if !self.is_cuda() || self.dtype() == dtype {
            Ok(self.clone())
        } else {
            cuda::elementwise::cast(self, dtype)
        }
    }
    /// A tensor of another shape where this one is, with unspecified contents.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn empty_like(&self, shape: &[usize]) -> Result<Self> {
        self.empty_as(shape, self.dtype())
    }
    /// As [`Tensor::empty_like`], in another dtype.
    ///
    /// # Errors
    /// Not enough memory on a device.
    pub(crate) fn empty_as(&self, shape: &[usize], dtype: Dtype) -> Result<Self> {
        Self::empty(self.device(), shape, dtype)
    }
    /// A tensor on a device, with unspecified contents.
    ///
    /// # Errors
    /// As [`Device::check`]; not enough memory.
    pub(crate) fn empty(device: Device, shape: &[usize], dtype: Dtype) -> Result<Self> {
        Ok(match device {
            Device::Cpu => {
                // What overflows is more than there is, too.
                let len = shape.iter().fold(1, |n: usize, &x| n.saturating_mul(x));
                Self::host(shape, Buffer::try_take(len)?)
            }
            Device::Cuda(n) => {
                let view = View::new(Gpu::get(n)?, shape.iter().product(), dtype)?;
                Self { shape: shape.to_vec(), storage: Storage::Cuda(view) }
            }
        })
    }
    /// Zeros of another shape where this one is.
    ///
    /// # Errors
    /// Not enough memory on a device.
    pub fn zeros_like(&self, shape: &[usize]) -> Result<Self> {
        let mut out = self.empty_like(shape)?;
        out.clear()?;
        Ok(out)
    }
    /// Makes all elements zero, of a tensor that shares its storage with no other.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn clear(&mut self) -> Result<()> {
        match &mut self.storage {
            Storage::Host(buffer) => Arc::make_mut(buffer).data.fill(0.0),
            Storage::Cuda(view) => view.gpu().zero(&view.memory, view.start(), view.bytes())?,
        }
        Ok(())
    }
    /// All one value, in another shape where this one is.
    ///
    /// # Errors
    /// Not enough memory on a device.
    pub fn full_like(&self, shape: &[usize], value: f32) -> Result<Self> {
        Self::full(shape, value).to_like(self)
    }
    /// The part of an allocation that it is; none on the CPU.
    pub(crate) fn view(&self) -> Option<&View> {
        match &self.storage {
            Storage::Host(_) => None,
            Storage::Cuda(view) => Some(view),
        }
    }
    /// `shape` from element `start` on, in the same storage; on the CPU a copy.
    pub(crate) fn part(&self, start: usize, shape: &[usize]) -> Self {
        let len: usize = shape.iter().product();
        debug_assert!(start + len <= self.numel());
        match &self.storage {
            Storage::Host(buffer) => {
                Self::build(shape, |out| out.copy_from_slice(&buffer.data[start..start + len]))
            }
            Storage::Cuda(view) => {
                let view = View { offset: view.offset + start, len, ..view.clone() };
                Self { shape: shape.to_vec(), storage: Storage::Cuda(view) }
            }
        }
    }
    /// How many tensors share its device memory, itself included.
    pub(crate) fn sharers(&self) -> usize {
        self.view().map_or(1, |view| Arc::strong_count(&view.memory))
    }
    /// Makes the storage its own, by a copy where others share it; then it may be written in place.
    ///
    /// # Errors
    /// Not enough memory on a device.
    pub(crate) fn make_unique(&mut self) -> Result<()> {
        let copy = match &self.storage {
            Storage::Host(_) => return Ok(()),
            Storage::Cuda(view) if view.unique() => return Ok(()),
            Storage::Cuda(view) => {
                let copy = View::new(view.gpu(), view.len, view.dtype)?;
                view.gpu().copy((&copy.memory, 0), (&view.memory, view.start()), view.bytes())?;
                copy
            }
        };
        self.storage = Storage::Cuda(copy);
        Ok(())
    }
    /// self += x, of the same number of elements.
    ///
    /// # Errors
    /// Another number of elements, another device or dtype.
    pub fn add_assign(&mut self, x: &Self) -> Result<()> {
        if self.numel() != x.numel() {
            return Err(Error::shape(
                "add_assign",
                "x",
                x.shape(),
                format!("as many elements as {:?}", self.shape),
            ));
        }
        together("add_assign", &[self, x])?;
        self.make_unique()?;
        on_device!(x, elementwise::add_assign(self, x));
        Ok(())
    }
    /// The shape; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// Size of an axis, counted from the end: `dim(1)` is the last.
    pub fn dim_back(&self, axis: usize) -> usize {
        self.shape.len().checked_sub(axis).map_or(1, |i| self.shape[i])
    }
    /// Number of elements.
    pub fn numel(&self) -> usize {
        match &self.storage {
            Storage::Host(buffer) => buffer.data.len(),
            Storage::Cuda(view) => view.len,
        }
    }
    /// The elements, row-major.
    ///
    /// # Panics
    /// For a tensor on a CUDA device; see [`Tensor::to_host`].
    pub fn data(&self) -> &[f32] {
        match &self.storage {
            Storage::Host(buffer) => &buffer.data,
            Storage::Cuda(_) => {
                panic!("the elements of {self:?} are in device memory; to_host() copies them")
            }
        }
    }
    /// The elements for writing; copies first when the storage is shared.
    ///
    /// # Panics
    /// For a tensor on a CUDA device.
    pub fn data_mut(&mut self) -> &mut [f32] {
        match &mut self.storage {
            Storage::Host(buffer) => &mut Arc::make_mut(buffer).data,
            Storage::Cuda(_) => panic!("elements in device memory can't be written from the host"),
        }
    }
    /// The same elements in another shape.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if shape.iter().product::<usize>() != self.numel() {
            return Err(Error::shape(
                "reshape",
                "tensor",
                &self.shape,
                format!("as many elements as {shape:?}"),
            ));
        }
        Ok(Self { shape: shape.to_vec(), storage: self.storage.clone() })
    }
    /// The only element of a tensor of one; waits for the device.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is not exactly one; those of the device.
    pub fn item(&self) -> Result<f32> {
        match self.to_host()?.data() {
            [x] => Ok(*x),
            _ => Err(Error::shape("item", "tensor", &self.shape, "one element")),
        }
    }
    /// Do both share one storage?
    pub fn same_storage(&self, other: &Self) -> bool {
        match (&self.storage, &other.storage) {
            (Storage::Host(a), Storage::Host(b)) => Arc::ptr_eq(a, b),
            (Storage::Cuda(a), Storage::Cuda(b)) => Arc::ptr_eq(&a.memory, &b.memory),
            _ => false,
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor{:?} ", self.shape)?;
        match &self.storage {
            Storage::Host(buffer) => {
                let data = &buffer.data;
                write!(f, "{:?}{}", &data[..data.len().min(8)], if data.len() > 8 { ".." } else { "" })
            }
            Storage::Cuda(view) => write!(f, "{:?} on {}", view.dtype, self.device()),
        }
    }
}
