//! The weights of a pass: all at hand, or read from their file in the order in which they are used.

use super::pass::Part;
use crate::{GeneratorConfig, Result};
use hywu_core::{Checkpoint, Dtype};
use hywu_kernels::{Bound, Device, ParamSet, Tape, Upload, load_tensor};
use std::{cell::RefCell, sync::Arc};

pub(super) struct Weights {
    device: Device,
    dtype: Dtype,
    source: Source,
}

enum Source {
    Resident(Arc<Bound>),
    Streamed(Streamed),
}

/// A part of the weights, by name, on its way to a device.
type Ahead = (Part, Vec<(String, Upload)>);

/// Weights in their files.
struct Streamed {
    checkpoint: Checkpoint,
    shapes: Vec<(String, Vec<usize>)>,
    /// What is on its way to a device.
    ahead: RefCell<Option<Ahead>>,
}

impl Weights {
    pub fn resident(bound: Bound) -> Self {
        Self { device: bound.device(), dtype: bound.dtype(), source: Source::Resident(Arc::new(bound)) }
    }
    /// Brings all weights to a device.
    ///
    /// # Errors
    /// A weight that is not finite; not enough memory.
    pub fn load(
        config: &GeneratorConfig,
        checkpoint: &Checkpoint,
        device: Device,
        dtype: Dtype,
    ) -> Result<Self> {
        let mut params = ParamSet::new();
        for (name, _) in config.weights()? {
            params.insert(&name, load_tensor(checkpoint, &name, device, dtype)?);
        }
        Ok(Self::resident(params.bind(&Tape::inference(), false)?))
    }
    /// Leaves the weights where they are until they are used.
    pub fn streamed(
        config: &GeneratorConfig,
        checkpoint: Checkpoint,
        device: Device,
        dtype: Dtype,
    ) -> Result<Self> {
        let streamed = Streamed { checkpoint, shapes: config.weights()?, ahead: RefCell::default() };
        let dtype = if device == Device::Cpu { Dtype::F32 } else { dtype };
        Ok(Self { device, dtype, source: Source::Streamed(streamed) })
    }

    pub fn device(&self) -> Device {
        self.device
    }
    /// Type of the arithmetic.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    pub fn is_streamed(&self) -> bool {
        matches!(self.source, Source::Streamed(_))
    }

    /// The weights of a part, or all, under their published names.
    ///
    /// # Errors
    /// A weight that is not finite; not enough memory.
    pub fn part(&self, part: Part) -> Result<Arc<Bound>> {
        let streamed = match &self.source {
            Source::Resident(bound) => return Ok(bound.clone()),
            Source::Streamed(streamed) => streamed,
        };
        let mut params = ParamSet::new();
        match streamed.ahead.take().filter(|(ahead, _)| *ahead == part) {
            Some((_, uploads)) => {
                for (name, upload) in uploads {
                    params.insert(name, upload.finish()?);
                }
            }
            None => {
                for (name, _) in streamed.names(part) {
                    params.insert(name, load_tensor(&streamed.checkpoint, name, self.device, self.dtype)?);
                }
            }
        }
        Ok(Arc::new(params.bind(&Tape::inference(), false)?))
    }

    /// Takes the memory for the part that comes next, if that is on its way to a device. To be called before the work that the
    /// transfer is to hide behind.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn expect(&self, next: Part) -> Result<()> {
        let Source::Streamed(streamed) = &self.source else { return Ok(()) };
        if self.device == Device::Cpu {
            return Ok(());
        }
        let begin = |(name, shape): (&str, &[usize])| {
            Ok((name.to_owned(), Upload::begin(self.device, shape, self.dtype)?))
        };
        let uploads = streamed.names(next).map(begin).collect::<Result<_>>()?;
        streamed.ahead.replace(Some((next, uploads)));
        Ok(())
    }
    /// Sends what was expected. To be called after the work that the transfer is to hide behind.
    ///
    /// # Errors
    /// A weight that is not finite; those of the device.
    pub fn send(&self) -> Result<()> {
        let Source::Streamed(streamed) = &self.source else { return Ok(()) };
        if let Some((_, uploads)) = streamed.ahead.borrow_mut().as_mut() {
            for (name, upload) in uploads {
                upload.send(&streamed.checkpoint, name)?;
            }
        }
        Ok(())
    }
}

impl Streamed {
    /// Names and shapes of a part's weights.
    fn names(&self, part: Part) -> impl Iterator<Item = (&str, &[usize])> {
        let owns = part.owns();
        self.shapes.iter().filter(move |(name, _)| owns(name)).map(|(n, s)| (n.as_str(), s.as_slice()))
    }
}
