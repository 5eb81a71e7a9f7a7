//! A device operation as a value: done at once, or made a node of a graph.

use super::{Gpu, check};
use crate::{Result, cuda::call::Arguments};
use cudarc::driver::{result, sys};
use std::{ffi::c_void, ptr};

/// Something to do on a device. Its memory is named by address: whoever makes one knows that it is allocated.
#[derive(PartialEq)]
pub(super) enum Op {
    Launch(Launch),
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    /// To zero.
    Clear {
        at: u64,
        bytes: usize,
    },
    /// From pinned memory that stays as it is until this is done.
    Upload {
        to: u64,
        from: *const u8,
        bytes: usize,
    },
}

/// A kernel with the arguments that it takes.
#[derive(PartialEq)]
pub(super) struct Launch {
    pub name: String,
    pub function: sys::CUfunction,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    pub arguments: Arguments,
}

impl Arguments {
    /// Are they of the same sizes?
    fn alike(&self, other: &Self) -> bool {
        self.starts == other.starts && self.slots.len() == other.slots.len()
    }
    /// Where each lies, for the driver, which reads them.
    fn pointers(&self) -> Vec<*mut c_void> {
        let base = self.slots.as_ptr().cast_mut();
        self.starts.iter().map(|&start| base.wrapping_add(start).cast()).collect()
    }
}

impl Launch {
    /// Calls `f` with this as a node's parameters; they hold while it runs.
    fn params<T>(&self, f: impl FnOnce(&sys::CUDA_KERNEL_NODE_PARAMS) -> T) -> T {
        let mut pointers = self.arguments.pointers();
        let ([gx, gy, gz], [bx, by, bz]) = (self.grid, self.block);
        f(&sys::CUDA_KERNEL_NODE_PARAMS {
            func: self.function,
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: self.shared,
            kernelParams: pointers.as_mut_ptr(),
            extra: ptr::null_mut(),
            kern: ptr::null_mut(),
            ctx: ptr::null_mut(),
        })
    }
}

impl Op {
    fn what(&self) -> String {
        match self {
            Self::Launch(Launch { name, grid, block, shared, .. }) => {
                format!("kernel {name}, grid {grid:?}, block {block:?}, {shared} bytes of shared memory")
            }
            Self::Copy { bytes, .. } => format!("copying {bytes} bytes on the device"),
            Self::Clear { bytes, .. } => format!("clearing {bytes} bytes"),
            Self::Upload { bytes, .. } => format!("copying {bytes} bytes to the device"),
        }
    }

    /// What it is counted as where operations are timed.
    fn kind(&self) -> String {
        match self {
            Self::Launch(Launch { name, grid, block, .. }) => format!("{name} {grid:?} x {}", block[0]),
            Self::Copy { .. } => "copy on the device".into(),
            Self::Clear { .. } => "clear".into(),
            Self::Upload { .. } => "copy to the device".into(),
        }
    }

    /// Puts it on the stream.
    pub fn run(&self, gpu: &Gpu) -> Result<()> {
        gpu.timed(|| self.kind(), || self.put(gpu))
    }

    fn put(&self, gpu: &Gpu) -> Result<()> {
        let stream = gpu.stream;
        // SAFETY: addresses and sizes are those of allocations (asserted where an `Op` is made), which are freed in the order of the
        // stream's work; `Call` builds the arguments that the kernel of this name takes.
        let done = unsafe {
            match *self {
                Self::Launch(ref l) => {
                    let ([gx, gy, gz], [bx, by, bz]) = (l.grid, l.block);
                    let mut pointers = l.arguments.pointers();
                    result::launch_kernel(
                        l.function,
                        (gx, gy, gz),
                        (bx, by, bz),
                        l.shared,
                        stream,
                        &mut pointers,
                    )
                }
                Self::Copy { to, from, bytes } => result::memcpy_dtod_async(to, from, bytes, stream),
                Self::Clear { at, bytes } => result::memset_d8_async(at, 0, bytes, stream),
                Self::Upload { to, from, bytes } => {
                    result::memcpy_htod_async(to, std::slice::from_raw_parts(from, bytes), stream)
                }
            }
        };
        check(|| self.what(), done)?;
        if matches!(self, Self::Launch(_)) && super::waits() {
            // SAFETY: the stream is valid.
            check(|| self.what(), unsafe { result::stream::synchronize(stream) })?;
        }
        Ok(())
    }

    /// Do they differ in nothing but addresses and the values of arguments?
    pub fn alike(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Launch(a), Self::Launch(b)) => {
                a.function == b.function
                    && (a.grid, a.block, a.shared) == (b.grid, b.block, b.shared)
                    && a.arguments.alike(&b.arguments)
            }
            (Self::Copy { bytes: a, .. }, Self::Copy { bytes: b, .. })
            | (Self::Clear { bytes: a, .. }, Self::Clear { bytes: b, .. })
            | (Self::Upload { bytes: a, .. }, Self::Upload { bytes: b, .. }) => a == b,
            _ => false,
        }
    }

    /// Adds it to a graph, after the node `before`.
    pub fn add(
        &self,
        gpu: &Gpu,
        graph: sys::CUgraph,
        before: Option<&sys::CUgraphNode>,
    ) -> Result<sys::CUgraphNode> {
        let (mut node, context) = (ptr::null_mut(), gpu.context);
        let (before, count) = before.map_or((ptr::null(), 0), |node| (ptr::from_ref(node), 1));
        // SAFETY: graph and node before are valid, the parameters are copied; the memory is as in `run`.
        let added = unsafe {
            match self.params() {
                Params::Launch(launch) => launch
                    .params(|params| sys::cuGraphAddKernelNode_v2(&mut node, graph, before, count, params)),
                Params::Copy(params) => {
                    sys::cuGraphAddMemcpyNode(&mut node, graph, before, count, &params, context)
                }
                Params::Clear(params) => {
                    sys::cuGraphAddMemsetNode(&mut node, graph, before, count, &params, context)
                }
            }
        };
        check(|| format!("a graph's node: {}", self.what()), added.result())?;
        Ok(node)
    }

    /// Puts it in the place of the operation, one that is `alike`, that a node was made of.
    pub fn replace(&self, gpu: &Gpu, graph: sys::CUgraphExec, node: sys::CUgraphNode) -> Result<()> {
        // SAFETY: the graph is valid and the node its own; as in `add`.
        let set = unsafe {
            match self.params() {
                Params::Launch(launch) => {
                    launch.params(|params| sys::cuGraphExecKernelNodeSetParams_v2(graph, node, params))
                }
                Params::Copy(params) => {
                    sys::cuGraphExecMemcpyNodeSetParams(graph, node, &params, gpu.context)
                }
                Params::Clear(params) => {
                    sys::cuGraphExecMemsetNodeSetParams(graph, node, &params, gpu.context)
                }
            }
        };
        check(|| format!("a graph's node: {}", self.what()), set.result())
    }

    fn params(&self) -> Params<'_> {
        use sys::CUmemorytype::{CU_MEMORYTYPE_DEVICE as DEVICE, CU_MEMORYTYPE_HOST as HOST};
        match *self {
            Self::Launch(ref launch) => Params::Launch(launch),
            Self::Copy { to, from, bytes } => {
                Params::Copy(copy_params(to, (DEVICE, ptr::null(), from), bytes))
            }
            Self::Upload { to, from, bytes } => Params::Copy(copy_params(to, (HOST, from.cast(), 0), bytes)),
            // One row has no pitch.
            Self::Clear { at, bytes } => Params::Clear(sys::CUDA_MEMSET_NODE_PARAMS {
                dst: at,
                pitch: 0,
                value: 0,
                elementSize: 1,
                width: bytes,
                height: 1,
            }),
        }
    }
}

/// What a graph's node is made of.
enum Params<'a> {
    Launch(&'a Launch),
    Copy(sys::CUDA_MEMCPY3D),
    Clear(sys::CUDA_MEMSET_NODE_PARAMS),
}

/// One row of bytes to device memory, from an address on the host or the device.
fn copy_params(
    to: u64,
    (from, host, device): (sys::CUmemorytype, *const c_void, u64),
    bytes: usize,
) -> sys::CUDA_MEMCPY3D {
    sys::CUDA_MEMCPY3D {
        srcXInBytes: 0,
        srcY: 0,
        srcZ: 0,
        srcLOD: 0,
        srcMemoryType: from,
        srcHost: host,
        srcDevice: device,
        srcArray: ptr::null_mut(),
        reserved0: ptr::null_mut(),
        srcPitch: 0,
        srcHeight: 0,
        dstXInBytes: 0,
        dstY: 0,
        dstZ: 0,
        dstLOD: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: ptr::null_mut(),
        dstDevice: to,
        dstArray: ptr::null_mut(),
        reserved1: ptr::null_mut(),
        dstPitch: 0,
        dstHeight: 0,
        WidthInBytes: bytes,
        Height: 1,
        Depth: 1,
    }
}
