//! Tensors of a checkpoint: straight from the file to where they are used.

use crate::{
    Device, Error, Result, Tensor,
    cuda::{Event, Gpu},
};
use half::bf16;
use hywu_core::{Checkpoint, Dtype};
use rayon::prelude::*;

/// Numbers that one parallel task reads and looks at.
const CHUNK: usize = 1 << 16;

/// A tensor of a checkpoint on a device, in `dtype` there (on the CPU in f32).
///
/// # Errors
/// A tensor that is missing, not finite, or beyond the range of `dtype`; a device that can't be used, or has not enough memory.
pub fn load_tensor(checkpoint: &Checkpoint, name: &str, device: Device, dtype: Dtype) -> Result<Tensor> {
    let (shape, _) = checkpoint.info(name)?;
    if device == Device::Cpu {
        let mut read = Ok(());
        let tensor = Tensor::build(&shape, |out| read = checkpoint.read_into(name, out));
        return Ok(read.map(|()| tensor)?);
    }
    let tensor = Tensor::empty(device, &shape, dtype)?;
    if let Some(view) = tensor.view() {
        view.gpu().upload(&view.memory, view.start(), &elements(checkpoint, name, dtype)?)?;
    }
    Ok(tensor)
}

/// The bytes of a tensor's elements in f32 or bf16, all of them finite, also when rounded.
fn elements(checkpoint: &Checkpoint, name: &str, dtype: Dtype) -> Result<Vec<u8>> {
    let (shape, stored) = checkpoint.info(name)?;
    if stored != dtype {
        let mut numbers = vec![0.0; shape.iter().product()];
        checkpoint.read_into(name, &mut numbers)?;
        if let Some(i) = dtype.first_beyond(&numbers) {
            return Err(checkpoint.beyond(name, i, numbers[i], dtype).into());
        }
        return Ok(match dtype {
            Dtype::Bf16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        });
    }
    let number = |x: &[u8]| match *x {
        [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        _ => f32::NAN,
    };
    let size = stored.size();
    let mut bytes = vec![0; shape.iter().product::<usize>() * size];
    let bad = bytes.par_chunks_mut(CHUNK * size).enumerate().find_map_first(|(i, part)| {
        if let Err(e) = checkpoint.read_stored(name, i * CHUNK * size, part) {
            return Some(e);
        }
        let j = part.chunks_exact(size).position(|x| !number(x).is_finite())?;
        Some(checkpoint.not_finite(name, i * CHUNK + j, number(&part[j * size..][..size])))
    });
    bad.map_or(Ok(bytes), |e| Err(e.into()))
}

/// A tensor on its way to a CUDA device beside the work there, which it would wait for otherwise: first comes the memory, then the work
/// that hides the transfer, then the transfer, and last the work that reads the tensor.
pub struct Upload {
    tensor: Tensor,
    /// From here on nothing else uses the memory.
    free: Event,
    sent: Option<Event>,
}

impl Upload {
    /// Takes the memory.
    ///
    /// # Errors
    /// The CPU, a device that can't be used or has not enough memory.
    pub fn begin(device: Device, shape: &[usize], dtype: Dtype) -> Result<Self> {
        let Device::Cuda(n) = device else {
            return Err(Error::invalid("upload", "the CPU reads where the data is"));
        };
        Ok(Self { tensor: Tensor::empty(device, shape, dtype)?, free: Gpu::get(n)?.event()?, sent: None })
    }
    /// Sends a tensor of a checkpoint, which has the shape.
    ///
    /// # Errors
    /// As [`load_tensor`]; a tensor of another size.
    pub fn send(&mut self, checkpoint: &Checkpoint, name: &str) -> Result<()> {
        checkpoint.check_shape(name, self.tensor.shape())?;
        let bytes = elements(checkpoint, name, self.tensor.dtype())?;
        if let Some(view) = self.tensor.view() {
            self.sent = Some(view.gpu().upload_beside(&view.memory, &bytes, &self.free)?);
        }
        Ok(())
    }
    /// The tensor, for work that comes from now on.
    ///
    /// # Errors
    /// Nothing was sent; those of the device.
    pub fn finish(mut self) -> Result<Tensor> {
        match self.arrive()? {
            true => Ok(self.tensor.clone()),
            false => Err(Error::invalid("upload", "nothing was sent")),
        }
    }
    /// Lets the device's work wait for what was sent, if anything was.
    fn arrive(&mut self) -> Result<bool> {
        match (self.tensor.view(), self.sent.take()) {
            (Some(view), Some(sent)) => view.gpu().wait_for(&sent).map(|()| true),
            _ => Ok(false),
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // The memory may be given to others, but not before the transfer is over. Where that fails the device is lost.
        let _ = self.arrive();
    }
}
