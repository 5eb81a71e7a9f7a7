//! The device layer over the CUDA driver: memory from the stream-ordered pool, pinned transfers, modules, launches, events, and the
//! one place where the driver's errors become ours. Everything of a device runs on one stream, in the order of the calls.

mod memory;
mod op;
mod recording;
mod replay;
mod tensor_map;
mod transfer;
mod watch;

pub(crate) use memory::{Memory, broken_guards, guard_allocations};
pub use replay::Replay;
pub(super) use replay::in_replay;

use super::{Properties, call::Arguments};
use crate::{Error, Result};
use cudarc::driver::{
    DriverError,
    result::{self, ctx, device, event, mem_pool, module, primary_ctx, stream},
    sys,
};
use memory::{Cache, Held, Private};
use op::{Launch, Op};
use replay::Region;
use std::{
    cell::Cell,
    collections::HashMap,
    ffi::CString,
    sync::{Mutex, MutexGuard, OnceLock, Weak},
    time::Instant,
};
use transfer::Stage;
use watch::Watch;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Oldest driver that runs these kernels, as `cuDriverGetVersion` counts: the compiler's own version.
const LEAST_DRIVER: i32 = 13_000;
/// Dynamic shared memory that a kernel gets without asking.
const FREE_SHARED: u32 = 48 << 10;

/// A CUDA device: its primary context, one stream for all work and one for transfers beside it, the loaded kernels.
pub(crate) struct Gpu {
    ordinal: usize,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Transfers that [`Gpu::upload_beside`] makes.
    beside: sys::CUstream,
    pool: sys::CUmemoryPool,
    properties: Properties,
    modules: Mutex<HashMap<&'static str, Module>>,
    /// By op and name.
    functions: Mutex<HashMap<&'static str, HashMap<String, Function>>>,
    stages: Mutex<Vec<Stage>>,
    cache: Mutex<Cache>,
    held: Held,
    /// The caches of replays.
    privates: Mutex<Vec<Weak<Private>>>,
    region: Mutex<Option<Region>>,
    watch: Mutex<Watch>,
}

struct Module(sys::CUmodule);

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory that it may have.
    shared: u32,
}

// SAFETY: the driver's handles may be used from any thread; the mutexes keep the maps consistent.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}
// SAFETY: a handle, valid in every thread.
unsafe impl Send for Module {}
// SAFETY: a handle, valid in every thread.
unsafe impl Send for Function {}

thread_local! {
    /// Ordinal + 1 of the device whose context is current in this thread.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

static GPUS: Mutex<Vec<(usize, &'static Gpu)>> = Mutex::new(Vec::new());

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The guarded maps and lists are never left half-changed.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// The one translation of the driver's errors; `call` says what was tried.
fn check<T>(call: impl FnOnce() -> String, result: Result<T, DriverError>) -> Result<T> {
    result.map_err(|e| {
        let text = |r: Result<&std::ffi::CStr, DriverError>| {
            r.map_or_else(|_| "unknown".to_owned(), |s| s.to_string_lossy().into_owned())
        };
        let sticky = matches!(
            e.0,
            sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
                | sys::CUresult::CUDA_ERROR_LAUNCH_FAILED
                | sys::CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
                | sys::CUresult::CUDA_ERROR_ASSERT
                | sys::CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
                | sys::CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
                | sys::CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
        );
        let remedy = if sticky {
            "this process can't use the device any more: start again, with HYWU_CUDA_SYNC=1 to name the kernel"
        } else {
            "the device `cpu` does the same without a GPU"
        };
        Error::Cuda {
            call: call(),
            code: e.0 as u32,
            name: text(e.error_name()),
            message: text(e.error_string()),
            remedy,
        }
    })
}

/// Is every launch waited for, so that an error names its kernel?
fn waits() -> bool {
    static SYNC: OnceLock<bool> = OnceLock::new();
    *SYNC.get_or_init(|| std::env::var_os("HYWU_CUDA_SYNC").is_some_and(|v| v != "0"))
}

fn version(v: i32) -> (u32, u32) {
    ((v / 1000) as u32, (v % 1000 / 10) as u32)
}

impl Gpu {
    /// The device of this number, opened at the first call.
    pub fn get(ordinal: usize) -> Result<&'static Self> {
        let mut gpus = lock(&GPUS);
        if let Some((_, gpu)) = gpus.iter().find(|(n, _)| *n == ordinal) {
            return Ok(gpu);
        }
        let gpu = Self::open(ordinal)?;
        // All images are for the same targets: where one can't be loaded the device is of no use, and `auto` must know.
        if let Some((op, _)) = FATBINS.iter().min_by_key(|(_, image)| image.len()) {
            gpu.module(op)?;
        }
        // Contexts live as long as the process: the driver takes them down with it.
        let gpu: &'static Self = Box::leak(Box::new(gpu));
        gpus.push((ordinal, gpu));
        Ok(gpu)
    }

    fn open(ordinal: usize) -> Result<Self> {
        if FATBINS.is_empty() {
            return Err(Error::NotBuiltWithCuda);
        }
        // Every other call of the bindings panics where there is no library.
        // SAFETY: it only opens and closes the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoCudaDriver);
        }
        let found = {
            let mut v = 0;
            // SAFETY: v outlives the call.
            check(|| "cuDriverGetVersion".into(), unsafe { sys::cuDriverGetVersion(&mut v) }.result())?;
            v
        };
        if found < LEAST_DRIVER {
            return Err(Error::CudaDriverTooOld { found: version(found), needed: version(LEAST_DRIVER) });
        }
        let count = match result::init().and_then(|()| device::get_count()) {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
            other => check(|| "cuInit".into(), other)? as usize,
        };
        if ordinal >= count {
            return Err(Error::NoCudaDevice { ordinal, count });
        }
        let what = || format!("opening cuda:{ordinal}");
        let handle = check(what, device::get(ordinal as i32))?;
        let attribute = |a| {
            // SAFETY: the device is valid.
            check(what, unsafe { device::get_attribute(handle, a) })
        };
        use sys::CUdevice_attribute as A;
        let properties = Properties {
            name: check(what, device::get_name(handle))?,
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
            ),
            multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            // SAFETY: the device is valid.
            memory: check(what, unsafe { device::total_mem(handle) })?,
            driver: version(found),
        };
        // SAFETY: the device is valid; the context is never released.
        let context = check(what, unsafe { primary_ctx::retain(handle) })?;
        // SAFETY: the context is valid.
        check(what, unsafe { ctx::set_current(context) })?;
        CURRENT.set(ordinal + 1);
        let stream = check(what, stream::create(stream::StreamKind::NonBlocking))?;
        let beside = check(what, stream::create(stream::StreamKind::NonBlocking))?;
        // SAFETY: the device is valid.
        let pool = check(what, unsafe { device::get_default_mem_pool(handle) })?;
        let mut keep = u64::MAX;
        // What is freed stays in the pool, so that a step after the first asks the system for nothing.
        // SAFETY: the attribute takes a u64.
        check(what, unsafe {
            mem_pool::set_attribute(
                pool,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                std::ptr::from_mut(&mut keep).cast(),
            )
        })?;
        let (modules, functions, stages) = Default::default();
        let (cache, held, privates, region, watch) = Default::default();
        Ok(Self {
            ordinal,
            context,
            stream,
            beside,
            pool,
            properties,
            modules,
            functions,
            stages,
            cache,
            held,
            privates,
            region,
            watch,
        })
    }

    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// The stream of all work, for work that comes next.
    pub(super) fn stream(&self) -> Result<sys::CUstream> {
        self.settle()?;
        Ok(self.stream)
    }

    /// Makes the context current in this thread.
    pub(super) fn enter(&self) -> Result<()> {
        if CURRENT.get() != self.ordinal + 1 {
            // SAFETY: the context is never released.
            check(|| "cuCtxSetCurrent".into(), unsafe { ctx::set_current(self.context) })?;
            CURRENT.set(self.ordinal + 1);
        }
        Ok(())
    }

    /// Launches a kernel (op, name).
    pub fn launch(
        &self,
        (op, name): (&'static str, String),
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: Arguments,
    ) -> Result<()> {
        self.enter()?;
        let function = self.function(op, &name, shared)?;
        self.submit(Op::Launch(Launch { name, function, grid, block, shared, arguments }))
    }

    fn load(&self, op: &'static str, name: &str) -> Result<Function> {
        let module = self.module(op)?;
        let what = || format!("the kernel {name} of {op}");
        let c_name = CString::new(name).map_err(|_| Error::invalid(op, "a kernel name with a NUL"))?;
        // SAFETY: the module stays loaded.
        let handle = check(what, unsafe { module::get_function(module, c_name) })?;
        Ok(Function { handle, shared: FREE_SHARED })
    }

    fn function(&self, op: &'static str, name: &str, shared: u32) -> Result<sys::CUfunction> {
        let mut functions = lock(&self.functions);
        let functions = functions.entry(op).or_default();
        let function = match functions.get_mut(name) {
            Some(function) => function,
            None => functions.entry(name.to_owned()).or_insert(self.load(op, name)?),
        };
        if shared > function.shared {
            use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as LIMIT;
            let what = || format!("{shared} bytes of shared memory for the kernel {name}");
            // SAFETY: the function is valid.
            check(what, unsafe {
                result::function::set_function_attribute(function.handle, LIMIT, shared as i32)
            })?;
            function.shared = shared;
        }
        Ok(function.handle)
    }

    fn module(&self, op: &'static str) -> Result<sys::CUmodule> {
        let mut modules = lock(&self.modules);
        if let Some(module) = modules.get(op) {
            return Ok(module.0);
        }
        let image = FATBINS.iter().find(|(name, _)| *name == op);
        let (_, image) = image.ok_or_else(|| Error::invalid(op, "no kernels of this name in the build"))?;
        // SAFETY: the image is a whole fatbin, made by nvcc.
        let loaded = unsafe { module::load_data(image.as_ptr().cast()) };
        if let Err(DriverError(
            sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
        )) = loaded
        {
            let Properties { name, capability, .. } = &self.properties;
            return Err(Error::NoKernelImage { device: name.clone(), capability: *capability });
        }
        let loaded = check(|| format!("loading the kernels of {op}"), loaded)?;
        modules.insert(op, Module(loaded));
        Ok(loaded)
    }

    /// Waits until all is done; an error of an earlier launch may come out here.
    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        self.settle()?;
        let start = Instant::now();
        // SAFETY: the stream is valid.
        check(|| "waiting for the device".into(), unsafe { stream::synchronize(self.stream) })?;
        self.count_wait(start.elapsed());
        Ok(())
    }

    /// A point in the device's work: everything up to now.
    pub fn event(&self) -> Result<Event> {
        self.enter()?;
        self.settle()?;
        self.mark()
    }

    /// A point in the stream's work.
    fn mark(&self) -> Result<Event> {
        let event = Event::new()?;
        event.record(self.stream)?;
        Ok(event)
    }
}

/// A point in a device's work.
pub struct Event(sys::CUevent);

// SAFETY: a handle, valid in every thread.
unsafe impl Send for Event {}

impl Event {
    /// Nowhere yet.
    fn new() -> Result<Self> {
        check(|| "an event".into(), event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)).map(Self)
    }
    fn record(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: both are valid.
        check(|| "cuEventRecord".into(), unsafe { event::record(self.0, stream) })
    }
    /// What is put on the stream from now on starts after it.
    fn hold(&self, stream: sys::CUstream) -> Result<()> {
        use sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT as FLAGS;
        // SAFETY: both are valid.
        check(|| "cuStreamWaitEvent".into(), unsafe { stream::wait_event(stream, self.0, FLAGS) })
    }
    fn passed(&self) -> bool {
        // SAFETY: the event is valid.
        unsafe { event::query(self.0) }.is_ok()
    }
    fn wait(&self) -> Result<()> {
        // SAFETY: the event is valid.
        check(|| "waiting for an event".into(), unsafe { event::synchronize(self.0) })
    }
    /// Milliseconds from `earlier` to this one; waits for both.
    ///
    /// # Errors
    /// Those of the device.
    pub fn since(&self, earlier: &Self) -> Result<f32> {
        earlier.wait()?;
        self.wait()?;
        // SAFETY: both have been recorded.
        check(|| "cuEventElapsedTime".into(), unsafe { event::elapsed(earlier.0, self.0) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created in `Event::new`, destroyed once.
        let _ = unsafe { event::destroy(self.0) };
    }
}
