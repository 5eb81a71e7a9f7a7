//! A list of device operations, and the graph that does them all.

use super::{Event, Gpu, check, op::Op, transfer::Stage};
use crate::Result;
use cudarc::driver::sys;
use std::ptr;

/// Pinned memory for uploads is taken in pieces of at least so many bytes.
const PINNED: usize = 1 << 20;

/// Operations in their order, and the graph of them.
pub(super) struct Recording {
    gpu: &'static Gpu,
    ops: Vec<Op>,
    /// Operations that differ from their nodes.
    changed: Vec<usize>,
    graph: sys::CUgraph,
    instance: sys::CUgraphExec,
    nodes: Vec<sys::CUgraphNode>,
    /// What uploads are copied from, and the unused rest of the last one.
    pinned: Vec<Stage>,
    rest: (*mut u8, usize),
    /// After it the device has read what is pinned.
    read: Option<Event>,
}

// SAFETY: the driver's handles are valid in every thread and used by one at a time; the memory belongs to the recording.
unsafe impl Send for Recording {}

impl Recording {
    pub fn new(gpu: &'static Gpu) -> Self {
        Self {
            gpu,
            ops: Vec::new(),
            changed: Vec::new(),
            graph: ptr::null_mut(),
            instance: ptr::null_mut(),
            nodes: Vec::new(),
            pinned: Vec::new(),
            rest: (ptr::null_mut(), 0),
            read: None,
        }
    }

    /// Operations in the list.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Does an operation and writes it down.
    pub fn run(&mut self, op: Op) -> Result<()> {
        op.run(self.gpu)?;
        self.ops.push(op);
        Ok(())
    }

    /// Does the first `count` operations, with the arguments that they took over.
    pub fn run_again(&self, count: usize) -> Result<()> {
        self.ops[..count].iter().try_for_each(|op| op.run(self.gpu))
    }

    /// Is this the list's operation number `at`, addresses and arguments aside? Then it takes its place.
    pub fn takes(&mut self, at: usize, op: Op) -> Result<(), Op> {
        match self.ops.get_mut(at) {
            Some(known) if known.alike(&op) => {
                if *known != op {
                    *known = op;
                    self.changed.push(at);
                }
                Ok(())
            }
            _ => Err(op),
        }
    }

    /// The same for an upload.
    pub fn takes_upload(&mut self, at: usize, to: u64, data: &[u8]) -> Result<bool> {
        let Some(&Op::Upload { from, bytes, .. }) = self.ops.get(at) else { return Ok(false) };
        if bytes != data.len() {
            return Ok(false);
        }
        // The device may still be reading what the last run wrote there.
        if let Some(read) = self.read.take() {
            read.wait()?;
        }
        // SAFETY: so many bytes of the recording's own memory, which the device does not read now; `pin` gave each upload its own.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), from.cast_mut(), bytes) };
        Ok(self.takes(at, Op::Upload { to, from, bytes }).is_ok())
    }

    /// Copies to pinned memory of its own.
    pub fn pin(&mut self, data: &[u8]) -> Result<*const u8> {
        if self.rest.1 < data.len() {
            let stage = self.gpu.stage(data.len().max(PINNED))?;
            self.rest = (stage.host, stage.bytes);
            self.pinned.push(stage);
        }
        let (host, left) = self.rest;
        let taken = data.len().next_multiple_of(64).min(left);
        self.rest = (host.wrapping_add(taken), left - taken);
        // SAFETY: at least so many bytes are left, and nobody else's.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()) };
        Ok(host)
    }

    /// The graph: a chain, in the order of the list.
    pub fn build(&mut self) -> Result<()> {
        // SAFETY: the handle outlives the call.
        check(|| "cuGraphCreate".into(), unsafe { sys::cuGraphCreate(&mut self.graph, 0) }.result())?;
        for op in &self.ops {
            self.nodes.push(op.add(self.gpu, self.graph, self.nodes.last())?);
        }
        // SAFETY: the graph is valid.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut self.instance, self.graph, 0) };
        check(|| format!("a graph of {} operations", self.ops.len()), made.result())?;
        self.read = Some(self.gpu.mark()?);
        Ok(())
    }

    /// Launches the whole list; false, and nothing launched, when the graph does not take what has changed.
    pub fn launch(&mut self) -> Result<bool> {
        let replace = |&at: &usize| self.ops[at].replace(self.gpu, self.instance, self.nodes[at]);
        if self.changed.iter().try_for_each(replace).is_err() {
            return Ok(false);
        }
        self.changed.clear();
        // SAFETY: both are valid; the memory is as for `Op::run`.
        let launched = unsafe { sys::cuGraphLaunch(self.instance, self.gpu.stream) };
        check(|| format!("launching a graph of {} operations", self.ops.len()), launched.result())?;
        self.read = Some(self.gpu.mark()?);
        Ok(true)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // Failures mean that the context is gone, and everything with it.
        let _ = self.gpu.enter();
        // SAFETY: made by `build`, destroyed once; what is running is not disturbed.
        unsafe {
            if !self.instance.is_null() {
                let _ = sys::cuGraphExecDestroy(self.instance);
            }
            if !self.graph.is_null() {
                let _ = sys::cuGraphDestroy(self.graph);
            }
        }
        // Free for others as soon as the device has read it.
        for stage in self.pinned.drain(..) {
            let _ = self.gpu.keep(stage);
        }
    }
}
