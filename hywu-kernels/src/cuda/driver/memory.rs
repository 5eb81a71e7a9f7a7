//! Device memory: a cache of freed pieces over the driver's stream-ordered pool.
//!
//! All work of a device runs in one order, so a piece that is freed can be given out again at once: what uses it next is launched
//! after what used it before. A step after the first therefore asks the driver for nothing.

use super::{Gpu, check, lock};
use crate::{Error, Result, cuda::piece};
use cudarc::driver::{
    DriverError,
    result::{self, mem_pool},
    sys,
};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

/// Bytes before and after a guarded allocation.
const GUARD: usize = 256;
/// What the driver says when it has no more.
const FULL: DriverError = DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);

static GUARDED: AtomicBool = AtomicBool::new(false);
static BROKEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Freed pieces by size.
#[derive(Default)]
pub(super) struct Cache {
    free: HashMap<usize, Vec<u64>>,
}

/// What may be taken from the driver, and what has been.
pub(super) struct Held {
    most: AtomicUsize,
    now: AtomicUsize,
}

impl Default for Held {
    fn default() -> Self {
        Self { most: AtomicUsize::new(usize::MAX), now: AtomicUsize::new(0) }
    }
}

/// The cache of a replay: its runs get the same addresses again, so a graph's arguments seldom change. A piece comes back to the cache
/// that it was taken from, whenever it is freed; when all have, they are the device's.
pub(super) struct Private {
    gpu: &'static Gpu,
    cache: Mutex<Cache>,
}

impl Private {
    pub fn new(gpu: &'static Gpu) -> Arc<Self> {
        let made = Arc::new(Self { gpu, cache: Mutex::default() });
        let mut all = lock(&gpu.privates);
        all.retain(|other| other.strong_count() > 0);
        all.push(Arc::downgrade(&made));
        made
    }
    /// Makes what is given out depend on what is free only, not on the order in which it was freed.
    pub fn sort(&self) {
        lock(&self.cache).free.values_mut().for_each(|pieces| pieces.sort_unstable());
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let mine = std::mem::take(&mut lock(&self.cache).free);
        let mut cache = lock(&self.gpu.cache);
        for (size, pieces) in mine {
            cache.free.entry(size).or_default().extend(pieces);
        }
    }
}

impl Gpu {
    /// Memory with unspecified contents.
    pub fn allocate(&'static self, bytes: usize) -> Result<Memory> {
        self.enter()?;
        let guard = if guarded() { GUARD } else { 0 };
        // A guarded allocation is its own, so that a tool which watches allocations sees its ends.
        let whole = if guard > 0 { bytes.max(1) + 2 * guard } else { piece(bytes) };
        let home = if guard > 0 { None } else { self.private_cache() };
        let cache = home.as_ref().map_or(&self.cache, |home| &home.cache);
        let cached = lock(cache).free.get_mut(&whole).and_then(Vec::pop);
        let start = match cached {
            Some(start) => start,
            None => self.ask(whole, bytes)?,
        };
        let memory = Memory { gpu: self, home, start, bytes, whole, guard };
        if guard > 0 {
            self.settle()?;
            // NaN in every dtype: what a kernel leaves out shows.
            // SAFETY: the range was just allocated.
            check(|| "cuMemsetD8Async".into(), unsafe {
                result::memset_d8_async(start, 0xff, whole, self.stream)
            })?;
        }
        Ok(memory)
    }

    /// `whole` bytes from the driver; what it has not is an error that speaks of `bytes`.
    fn ask(&self, whole: usize, bytes: usize) -> Result<u64> {
        // SAFETY: the stream is valid; the memory is used on this stream only.
        let ask = || unsafe { result::malloc_async(self.stream, whole) };
        let is_full = |r: &Result<u64, DriverError>| {
            matches!(r, Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)))
        };
        let Held { most, now } = &self.held;
        let over = || now.load(Ordering::Relaxed).saturating_add(whole) > most.load(Ordering::Relaxed);
        let mut asked = if over() { Err(FULL) } else { ask() };
        if is_full(&asked) {
            // What lies unused, in pieces of other sizes, may be enough.
            self.trim()?;
            asked = if over() { Err(FULL) } else { ask() };
        }
        if is_full(&asked) {
            let (free, total) = self.memory_info()?;
            return Err(Error::OutOfMemory { ordinal: self.ordinal, requested: bytes, free, total });
        }
        let start = check(|| format!("allocating {bytes} bytes"), asked)?;
        now.fetch_add(whole, Ordering::Relaxed);
        Ok(start)
    }

    /// From now on no more than so many bytes are taken in all.
    pub fn limit(&self, bytes: usize) {
        self.held.most.store(bytes, Ordering::Relaxed);
    }

    /// Gives all unused memory back to the system.
    pub fn trim(&self) -> Result<()> {
        self.enter()?;
        let mut free = Vec::new();
        self.each_cache(|cache| {
            for (size, pieces) in std::mem::take(&mut cache.free) {
                free.extend(pieces.into_iter().map(|start| (size, start)));
            }
        });
        // What is held back may use memory that was freed since; nobody gets it any more.
        self.settle()?;
        for (size, start) in free {
            // SAFETY: allocated from this stream's pool, and in no one's hands.
            check(|| "cuMemFreeAsync".into(), unsafe { result::free_async(start, self.stream) })?;
            self.held.now.fetch_sub(size, Ordering::Relaxed);
        }
        self.synchronize()?;
        // SAFETY: the pool is the device's own.
        check(|| "cuMemPoolTrimTo".into(), unsafe { mem_pool::trim_to(self.pool, 0) })
    }

    /// Visits the device's cache and those of replays.
    fn each_cache(&self, mut visit: impl FnMut(&mut Cache)) {
        let privates: Vec<_> = lock(&self.privates).iter().filter_map(Weak::upgrade).collect();
        for cache in privates.iter().map(|private| &private.cache).chain([&self.cache]) {
            visit(&mut lock(cache));
        }
    }

    /// Bytes that new tensors can have: what the driver has left, and what lies unused in caches, within the limit.
    pub fn available(&self) -> Result<usize> {
        let (free, _) = self.memory_info()?;
        let mut unused = 0;
        self.each_cache(|cache| {
            unused += cache.free.iter().map(|(size, all)| size * all.len()).sum::<usize>()
        });
        let Held { most, now } = &self.held;
        let used = now.load(Ordering::Relaxed).saturating_sub(unused);
        Ok(free.saturating_add(unused).min(most.load(Ordering::Relaxed).saturating_sub(used)))
    }

    /// Bytes that the driver has left, and bytes in all.
    pub fn memory_info(&self) -> Result<(usize, usize)> {
        self.enter()?;
        check(|| "cuMemGetInfo".into(), result::mem_get_info())
    }
}

/// Device memory; freed in the order of the stream's work, so what was launched before may still use it.
pub(crate) struct Memory {
    gpu: &'static Gpu,
    /// The cache that it goes back to, unless that is the device's.
    home: Option<Arc<Private>>,
    start: u64,
    pub(super) bytes: usize,
    /// Bytes that the driver gave.
    whole: usize,
    guard: usize,
}

impl Memory {
    pub fn address(&self) -> u64 {
        self.start + self.guard as u64
    }
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }
    fn check_guards(&self) -> Result<()> {
        let mut found = [0u8; GUARD];
        for (side, at) in [("before", self.start), ("after", self.address() + self.bytes as u64)] {
            // SAFETY: the guards belong to the allocation.
            check(|| "reading a guard".into(), unsafe {
                result::memcpy_dtoh_async(&mut found, at, self.gpu.stream)
            })?;
            self.gpu.synchronize()?;
            if let Some(i) = found.iter().position(|b| *b != 0xff) {
                lock(&BROKEN)
                    .push(format!("byte {i} {side} an allocation of {} bytes was written", self.bytes));
            }
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.guard == 0 {
            let cache = self.home.as_ref().map_or(&self.gpu.cache, |home| &home.cache);
            return lock(cache).free.entry(self.whole).or_default().push(self.start);
        }
        // Errors can't leave a drop: after a failed launch the context is gone, and the memory with it.
        let _ = self.gpu.enter().and_then(|()| self.gpu.settle());
        if self.check_guards().is_err() {
            lock(&BROKEN).push("a guard could not be read".into());
        }
        self.gpu.held.now.fetch_sub(self.whole, Ordering::Relaxed);
        // SAFETY: allocated from this stream's pool, freed once.
        let _ = unsafe { result::free_async(self.start, self.gpu.stream) };
    }
}

/// From now on allocations start as NaN and have guards before and after, looked at when they are freed.
pub(crate) fn guard_allocations(on: bool) {
    GUARDED.store(on, Ordering::Relaxed);
}

/// Are allocations guarded?
pub(super) fn guarded() -> bool {
    GUARDED.load(Ordering::Relaxed)
}

/// What was written beside its allocation since the last call.
pub(crate) fn broken_guards() -> Vec<String> {
    std::mem::take(&mut lock(&BROKEN))
}
