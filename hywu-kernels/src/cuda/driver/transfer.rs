//! Copies between host and device through pinned memory, in the order of the stream's work or beside it, and on the device.

use super::{Event, Gpu, Memory, check, lock, op::Op};
use crate::Result;
use cudarc::driver::{result, sys};

/// Largest part of a transfer: so much pinned memory is in use at a time.
const STAGE: usize = 16 << 20;
/// Stages that are kept for reuse.
const STAGES: usize = 8;

/// Pinned host memory, in use by the device until its event has passed.
pub(super) struct Stage {
    pub host: *mut u8,
    pub bytes: usize,
    done: Event,
}

// SAFETY: the memory belongs to whoever holds the stage.
unsafe impl Send for Stage {}

impl Stage {
    fn free(self) {
        // A failure here means that the context is gone, and the memory with it.
        // SAFETY: allocated by `malloc_host`, and its event has passed.
        let _ = unsafe { result::free_host(self.host.cast()) };
    }
}

impl Gpu {
    /// A pinned buffer of at least so many bytes that the device is done with.
    pub(super) fn stage(&self, bytes: usize) -> Result<Stage> {
        let mut stages = lock(&self.stages);
        let fits = |s: &Stage| s.bytes >= bytes;
        if let Some(i) = stages.iter().position(|s| fits(s) && s.done.passed()) {
            return Ok(stages.swap_remove(i));
        }
        if stages.len() >= STAGES {
            let stage = stages.swap_remove(0);
            stage.done.wait()?;
            if fits(&stage) {
                return Ok(stage);
            }
            stage.free();
        }
        drop(stages);
        let bytes = bytes.next_power_of_two().max(4096);
        let what = || format!("{bytes} bytes of pinned memory");
        // SAFETY: the result is checked; the memory is freed in `Stage::free` or lives as long as the process.
        let host = check(what, unsafe { result::malloc_host(bytes, 0) })?;
        Ok(Stage { host: host.cast(), bytes, done: self.mark()? })
    }

    /// Takes a buffer back, in use by the work so far.
    pub(super) fn keep(&self, stage: Stage) -> Result<()> {
        self.keep_after(self.stream, stage)
    }

    /// The same, in use by what is on a stream so far.
    fn keep_after(&self, stream: sys::CUstream, stage: Stage) -> Result<()> {
        stage.done.record(stream)?;
        lock(&self.stages).push(stage);
        Ok(())
    }

    /// Copies to the device, from byte `at` on; `data` may be changed as soon as this returns.
    pub fn upload(&self, to: &Memory, at: usize, data: &[u8]) -> Result<()> {
        assert!(at + data.len() <= to.bytes, "an upload leaves its allocation");
        self.enter()?;
        let target = to.address() + at as u64;
        if data.is_empty() || self.submit_upload(target, data)? {
            return Ok(());
        }
        for (i, part) in data.chunks(STAGE).enumerate() {
            let stage = self.stage(part.len())?;
            // SAFETY: the stage is at least that long and nobody else's.
            let host = unsafe { std::slice::from_raw_parts_mut(stage.host, part.len()) };
            host.copy_from_slice(part);
            // Within the allocation; the stage is not touched before its event has passed.
            Op::Upload { to: target + (i * STAGE) as u64, from: stage.host, bytes: part.len() }.run(self)?;
            self.keep(stage)?;
        }
        Ok(())
    }

    /// Copies to the device, from the start on, beside the stream's work: after `free`, from which on nothing else uses the memory. The
    /// work that reads it has to wait for the event that this returns, see [`Gpu::wait_for`].
    pub fn upload_beside(&self, to: &Memory, data: &[u8], free: &Event) -> Result<Event> {
        assert!(data.len() <= to.bytes, "an upload leaves its allocation");
        self.enter()?;
        free.hold(self.beside)?;
        for (i, part) in data.chunks(STAGE).enumerate() {
            let stage = self.stage(part.len())?;
            // SAFETY: the stage is at least that long and nobody else's.
            let host = unsafe { std::slice::from_raw_parts_mut(stage.host, part.len()) };
            host.copy_from_slice(part);
            let target = to.address() + (i * STAGE) as u64;
            // SAFETY: within the allocation; the stage is not touched before its event has passed.
            let copied = unsafe { result::memcpy_htod_async(target, host, self.beside) };
            check(|| format!("copying {} bytes to the device", part.len()), copied)?;
            self.keep_after(self.beside, stage)?;
        }
        let done = self.mark()?;
        done.record(self.beside)?;
        Ok(done)
    }

    /// The stream's work from now on comes after an event.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        self.enter()?;
        self.settle()?;
        event.hold(self.stream)
    }

    /// Copies to the host, from byte `at` on, and waits for it.
    pub fn download(&self, from: &Memory, at: usize, out: &mut [u8]) -> Result<()> {
        assert!(at + out.len() <= from.bytes, "a download leaves its allocation");
        self.enter()?;
        self.settle()?;
        for (i, part) in out.chunks_mut(STAGE).enumerate() {
            let stage = self.stage(part.len())?;
            // SAFETY: the stage is at least that long and nobody else's.
            let host = unsafe { std::slice::from_raw_parts_mut(stage.host, part.len()) };
            let source = from.address() + (at + i * STAGE) as u64;
            let what = || format!("copying {} bytes from the device", part.len());
            // SAFETY: within the allocation.
            let copy = || check(what, unsafe { result::memcpy_dtoh_async(host, source, self.stream) });
            self.timed(|| "copy from the device".into(), copy)?;
            self.synchronize()?;
            part.copy_from_slice(host);
            self.keep(stage)?;
        }
        Ok(())
    }

    /// Copies between allocations of this device, from byte offsets.
    pub fn copy(&self, to: (&Memory, usize), from: (&Memory, usize), bytes: usize) -> Result<()> {
        assert!(to.1 + bytes <= to.0.bytes && from.1 + bytes <= from.0.bytes, "a copy leaves its allocation");
        self.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        let (to, from) = (to.0.address() + to.1 as u64, from.0.address() + from.1 as u64);
        self.submit(Op::Copy { to, from, bytes })
    }

    /// Sets bytes to zero.
    pub fn zero(&self, memory: &Memory, at: usize, bytes: usize) -> Result<()> {
        assert!(at + bytes <= memory.bytes, "a fill leaves its allocation");
        self.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        self.submit(Op::Clear { at: memory.address() + at as u64, bytes })
    }
}
