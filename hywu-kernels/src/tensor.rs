use crate::{Device, Error, Result};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
};

/// A dense row-major f32 array; cloning shares the storage, writing to a shared one copies it first.
#[derive(Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    storage: Arc<Buffer>,
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

impl Buffer {
    /// `len` floats with unspecified (but initialised) contents.
    fn take(len: usize) -> Self {
        let reused = if len < POOL_MIN {
            None
        } else {
            pool(|p| {
                let data = p.free.get_mut(&len)?.pop()?;
                p.held -= len;
                Some(data)
            })
        };
        let mut data = reused.unwrap_or_else(|| vec![0.0; len]);
        if cfg!(debug_assertions) {
            data.fill(f32::NAN);
        }
        Self { data }
    }
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

impl Tensor {
    /// Takes row-major data.
    ///
    /// # Errors
    /// [`Error::Shape`] when the product of `shape` is not `data.len()`.
    pub fn new(shape: &[usize], data: Vec<f32>) -> Result<Self> {
        if shape.iter().product::<usize>() != data.len() {
            return Err(Error::shape("tensor", "data", &[data.len()], format!("{shape:?}")));
        }
        Ok(Self { shape: shape.to_vec(), storage: Arc::new(Buffer { data }) })
    }
    /// A 0-d tensor.
    pub fn scalar(value: f32) -> Self {
        Self::full(&[], value)
    }
    /// All zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        Self::full(shape, 0.0)
    }
    /// All one value.
    pub fn full(shape: &[usize], value: f32) -> Self {
        Self::build(shape, |out| out.fill(value))
    }
    /// A new tensor whose every element `fill` writes (it starts with unspecified values, NaN in debug builds).
    pub fn build(shape: &[usize], fill: impl FnOnce(&mut [f32])) -> Self {
        let mut buffer = Buffer::take(shape.iter().product());
        fill(&mut buffer.data);
        Self { shape: shape.to_vec(), storage: Arc::new(buffer) }
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
    pub fn to_array(&self) -> ndarray::ArrayD<f32> {
        let shape = ndarray::IxDyn(&self.shape);
        // The length is the product of the shape by construction.
        ndarray::ArrayD::from_shape_vec(shape, self.data().to_vec()).unwrap_or_default()
    }
    /// The device that holds it.
    pub fn device(&self) -> Device {
        Device::Cpu
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
        self.storage.data.len()
    }
    /// The elements, row-major.
    pub fn data(&self) -> &[f32] {
        &self.storage.data
    }
    /// The elements for writing; copies first when the storage is shared.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut Arc::make_mut(&mut self.storage).data
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
    /// The only element of a tensor of one.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is not exactly one.
    pub fn item(&self) -> Result<f32> {
        match self.data() {
            [x] => Ok(*x),
            _ => Err(Error::shape("item", "tensor", &self.shape, "one element")),
        }
    }
    /// Do both share one storage?
    pub fn same_storage(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage)
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let data = self.data();
        write!(
            f,
            "Tensor{:?} {:?}{}",
            self.shape,
            &data[..data.len().min(8)],
            if data.len() > 8 { ".." } else { "" }
        )
    }
}
