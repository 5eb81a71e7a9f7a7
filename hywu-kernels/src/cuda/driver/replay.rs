//! Replay: host code that is run again and again with the same device operations becomes one CUDA graph, launched as a whole.
//!
//! The code runs every time. The first time it only warms up; the second time its operations are done and written down, up to the
//! first that waits for the device or to the code's end; from then on they are compared with the list and held back until there, and
//! the graph that was made of the list is launched with the arguments of this time.
//!
//! One rule makes this safe: what is held back is launched before anything else reaches the stream, whichever thread it comes from,
//! and before memory leaves for the driver. So the device does the same work in the same order as without a replay, and memory may
//! be reused as always. Where the code does something else than the list says, what was held back is launched one by one.

use super::{Gpu, lock, memory, memory::Private, op::Op, recording::Recording};
use crate::{Error, Result};
use std::{
    cell::Cell,
    mem,
    sync::Arc,
    thread::{self, ThreadId},
};

/// So many runs in a row that differ from their list end the attempt.
const MOST_FAILURES: u32 = 3;

/// Something that is repeated on a device, a training step say; made by [`Device::replay`](crate::Device::replay). Whoever repeats it
/// keeps this, one for every shape that takes turns.
///
/// The memory of a replay's tensors is its own until it is dropped: what a run frees serves the next one, and no other replay.
pub struct Replay {
    gpu: Option<&'static Gpu>,
    cache: Option<Arc<Private>>,
    recording: Option<Recording>,
    warm: bool,
    /// In a row.
    failures: u32,
    replayed: u64,
}

/// What becomes of an operation.
enum Mode {
    /// It is done.
    Eager,
    /// It is done and written down.
    Record(Recording),
    /// It is compared with this one of the list, and held back.
    Replay(Recording, usize),
}

/// A run of a replay that is under way; a device has one at a time.
pub(super) struct Region {
    thread: ThreadId,
    cache: Arc<Private>,
    mode: Mode,
    /// A recording that can be used the next time.
    ready: Option<Recording>,
    replayed: bool,
}

thread_local! {
    /// Runs that this thread is in.
    static RUNS: Cell<u32> = const { Cell::new(0) };
}

/// Is this thread in a run of a replay?
pub(in crate::cuda) fn in_replay() -> bool {
    RUNS.get() > 0
}

/// Ends a run, also one that panics.
struct Run(Option<&'static Gpu>);

impl Drop for Run {
    fn drop(&mut self) {
        RUNS.set(RUNS.get() - 1);
        if let Some(gpu) = self.0.take() {
            // Only after a panic: what was held back is done as without a replay.
            let _ = gpu.leave(false);
        }
    }
}

impl Replay {
    pub(crate) fn new(gpu: Option<&'static Gpu>) -> Self {
        Self { gpu, cache: None, recording: None, warm: false, failures: 0, replayed: 0 }
    }

    /// Runs `body`, with the results that it has by itself: the same bits on every run, whether it was replayed or not. Within it
    /// products come from our own kernels only, since cuBLASLt's can't be part of a replay.
    ///
    /// A body that fails has done on the device what it did before it failed. In a run within another run the outer one is replayed;
    /// of several threads that run on one device at the same time, one. Where operations differ from run to run, where allocations are
    /// guarded for a test, in a [`Profile`](crate::Profile) and with HYWU_CUDA_SYNC=1 nothing is replayed.
    ///
    /// # Errors
    /// Those of `body`; those of the device.
    pub fn run<T, E: From<Error>>(&mut self, body: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let Some(gpu) = self.gpu else { return body() };
        RUNS.set(RUNS.get() + 1);
        let mut run = Run(None);
        let replaying = self.recording.is_some();
        if !self.enter(gpu) {
            return body();
        }
        run.0 = Some(gpu);
        let result = body();
        run.0 = None;
        let (region, left) = gpu.leave(result.is_ok());
        if let Some(region) = region {
            self.replayed += u64::from(region.replayed);
            self.recording = region.ready;
        }
        match (&self.recording, &result) {
            (Some(_), _) if replaying => self.failures = 0,
            (None, Ok(_)) if self.warm => self.failures += 1,
            _ => {}
        }
        self.warm = true;
        if self.failures >= MOST_FAILURES {
            (self.cache, self.recording) = (None, None);
        }
        let value = result?;
        left?;
        Ok(value)
    }

    /// Times that a run's operations were launched as a graph.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }

    /// Starts a run; false where nothing is to be replayed.
    fn enter(&mut self, gpu: &'static Gpu) -> bool {
        let mut region = lock(&gpu.region);
        let apart = memory::guarded() || super::waits() || gpu.is_watched();
        if region.is_some() || self.failures >= MOST_FAILURES || apart {
            return false;
        }
        let cache = self.cache.get_or_insert_with(|| Private::new(gpu));
        cache.sort();
        let mode = match self.recording.take() {
            Some(recording) => Mode::Replay(recording, 0),
            None if self.warm => Mode::Record(Recording::new(gpu)),
            None => Mode::Eager,
        };
        let (thread, cache) = (thread::current().id(), cache.clone());
        *region = Some(Region { thread, cache, mode, ready: None, replayed: false });
        true
    }
}

impl Gpu {
    /// Ends this thread's run; a list that is not `whole` is of no use.
    fn leave(&self, whole: bool) -> (Option<Region>, Result<()>) {
        let entered = self.enter();
        let mut slot = lock(&self.region);
        let mut region = slot.take_if(|region| region.thread == thread::current().id());
        let left = match &mut region {
            Some(Region { mode: mode @ Mode::Record(_), .. }) if !whole => {
                *mode = Mode::Eager;
                Ok(())
            }
            Some(region) => region.settle(),
            None => Ok(()),
        };
        (region, entered.and(left))
    }

    /// The run of this thread. What another thread's holds back is launched: the stream gets everything in the order of the calls.
    fn mine<'a>(&self, region: &'a mut Option<Region>) -> Result<Option<&'a mut Region>> {
        let Some(region) = region else { return Ok(None) };
        if region.thread == thread::current().id() {
            return Ok(Some(region));
        }
        if let Mode::Replay(_, 1..) = region.mode {
            region.settle()?;
        }
        Ok(None)
    }

    /// The memory of this thread's run.
    pub(super) fn private_cache(&self) -> Option<Arc<Private>> {
        let region = lock(&self.region);
        region.as_ref().filter(|region| region.thread == thread::current().id()).map(|r| r.cache.clone())
    }

    /// Launches what is held back; from here on this thread's run is as without a replay.
    pub(super) fn settle(&self) -> Result<()> {
        match self.mine(&mut lock(&self.region))? {
            Some(region) => region.settle(),
            None => Ok(()),
        }
    }

    /// Does an operation, or holds it back.
    pub(super) fn submit(&self, mut op: Op) -> Result<()> {
        let mut slot = lock(&self.region);
        if let Some(region) = self.mine(&mut slot)? {
            match &mut region.mode {
                Mode::Eager => {}
                Mode::Record(recording) => return recording.run(op),
                Mode::Replay(recording, at) => match recording.takes(*at, op) {
                    Ok(()) => {
                        *at += 1;
                        return Ok(());
                    }
                    Err(other) => {
                        region.settle()?;
                        op = other;
                    }
                },
            }
        }
        drop(slot);
        op.run(self)
    }

    /// An upload by way of the recording's own memory; false where there is none.
    pub(super) fn submit_upload(&self, to: u64, data: &[u8]) -> Result<bool> {
        let mut slot = lock(&self.region);
        let Some(region) = self.mine(&mut slot)? else { return Ok(false) };
        match &mut region.mode {
            Mode::Eager => Ok(false),
            Mode::Record(recording) => {
                let op = Op::Upload { to, from: recording.pin(data)?, bytes: data.len() };
                recording.run(op)?;
                Ok(true)
            }
            Mode::Replay(recording, at) => {
                if recording.takes_upload(*at, to, data)? {
                    *at += 1;
                    return Ok(true);
                }
                region.settle()?;
                Ok(false)
            }
        }
    }
}

impl Region {
    /// Launches what is held back, or ends the list.
    fn settle(&mut self) -> Result<()> {
        match mem::replace(&mut self.mode, Mode::Eager) {
            Mode::Eager => {}
            // A list that no graph can be made of is dropped: all of it has been done.
            Mode::Record(mut recording) => {
                if recording.len() > 0 && recording.build().is_ok() {
                    self.ready = Some(recording);
                }
            }
            Mode::Replay(mut recording, at) => {
                if at == recording.len() && recording.launch()? {
                    (self.replayed, self.ready) = (true, Some(recording));
                } else {
                    recording.run_again(at)?;
                }
            }
        }
        Ok(())
    }
}
