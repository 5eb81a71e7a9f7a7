//! The device layer of a build without the feature `cuda`: there is no device, so no value of these types.

use super::{
    Properties, Watched,
    call::{Arguments, Boxes},
};
use crate::{Error, Result};

/// A CUDA device.
pub(crate) enum Gpu {}

/// Device memory.
pub(crate) enum Memory {}

/// A point in a device's work.
pub struct Event(Gpu);

impl Gpu {
    pub fn get(_ordinal: usize) -> Result<&'static Self> {
        Err(Error::NotBuiltWithCuda)
    }
    pub fn ordinal(&self) -> usize {
        match *self {}
    }
    pub fn properties(&self) -> &Properties {
        match *self {}
    }
    pub fn allocate(&'static self, _bytes: usize) -> Result<Memory> {
        match *self {}
    }
    pub fn upload(&self, _to: &Memory, _at: usize, _data: &[u8]) -> Result<()> {
        match *self {}
    }
    pub fn upload_beside(&self, _to: &Memory, _data: &[u8], _free: &Event) -> Result<Event> {
        match *self {}
    }
    pub fn wait_for(&self, _event: &Event) -> Result<()> {
        match *self {}
    }
    pub fn limit(&self, _bytes: usize) {
        match *self {}
    }
    pub fn download(&self, _from: &Memory, _at: usize, _out: &mut [u8]) -> Result<()> {
        match *self {}
    }
    pub fn copy(&self, _to: (&Memory, usize), _from: (&Memory, usize), _bytes: usize) -> Result<()> {
        match *self {}
    }
    pub fn zero(&self, _memory: &Memory, _at: usize, _bytes: usize) -> Result<()> {
        match *self {}
    }
    pub fn launch(
        &self,
        _kernel: (&'static str, String),
        _grid: [u32; 3],
        _block: [u32; 3],
        _shared: u32,
        _arguments: Arguments,
    ) -> Result<()> {
        match *self {}
    }
    pub fn tensor_map(&self, _boxes: &Boxes) -> Result<[u64; 16]> {
        match *self {}
    }
    pub fn synchronize(&self) -> Result<()> {
        match *self {}
    }
    pub fn trim(&self) -> Result<()> {
        match *self {}
    }
    pub fn memory_info(&self) -> Result<(usize, usize)> {
        match *self {}
    }
    pub fn event(&self) -> Result<Event> {
        match *self {}
    }
    pub fn watch(&self) {
        match *self {}
    }
    pub fn watched(&self) -> Result<Watched> {
        match *self {}
    }
}

impl Memory {
    pub fn address(&self) -> u64 {
        match *self {}
    }
    pub fn gpu(&self) -> &'static Gpu {
        match *self {}
    }
}

impl Event {
    /// Milliseconds from `earlier` to this one; waits for both.
    ///
    /// # Errors
    /// Those of the device.
    pub fn since(&self, _earlier: &Self) -> Result<f32> {
        match self.0 {}
    }
}

/// Something that is repeated on a device, a training step say; made by [`Device::replay`](crate::Device::replay). In a build without
/// CUDA there is nothing to replay.
pub struct Replay(());

impl Replay {
    pub(crate) fn new(_gpu: Option<&'static Gpu>) -> Self {
        Self(())
    }
    /// Runs `body`.
    ///
    /// # Errors
    /// Those of `body`.
    pub fn run<T, E: From<Error>>(&mut self, body: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        body()
    }
    /// Times that a run's operations were launched as a graph.
    pub fn replayed(&self) -> u64 {
        0
    }
}

/// See the driver's.
pub(crate) fn guard_allocations(_on: bool) {}

/// See the driver's.
pub(crate) fn broken_guards() -> Vec<String> {
    Vec::new()
}
