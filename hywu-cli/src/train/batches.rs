//! The batches of a run, in the order of its steps.

use super::config::DataConfig;
use anyhow::{Context, Result, anyhow};
use hywu_diffusion::{EditBatch, EditData};
use hywu_kernels::Device;
use rayon::ThreadPoolBuilder;
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

/// Batches that are prepared, several at once, before they are asked for: one alone would wait for its slowest instance while
/// other workers have nothing to do.
const AHEAD: usize = 3;

/// Hands out batches. Where a device does the arithmetic a thread has them made ahead and brings them there; on the CPU it would take
/// from the steps what it gives.
pub struct Batches {
    data: Arc<EditData>,
    config: DataConfig,
    ahead: Option<mpsc::Receiver<Result<EditBatch>>>,
    waited: Duration,
}

impl Batches {
    /// The batches of these steps: made when they are asked for, or ahead and where `ahead` says.
    ///
    /// # Errors
    /// A system that starts no more threads.
    pub fn new(
        data: &Arc<EditData>,
        config: &DataConfig,
        steps: Range<u64>,
        ahead: Option<Device>,
    ) -> Result<Self> {
        let ahead = ahead.map(|device| prepare(data.clone(), config.clone(), steps, device)).transpose()?;
        Ok(Self { data: data.clone(), config: config.clone(), ahead, waited: Duration::ZERO })
    }

    /// The batch of the next step, which is `step`.
    ///
    /// # Errors
    /// Those of [`EditData::batch`] and of [`EditBatch::to`].
    pub fn next(&mut self, step: u64) -> Result<EditBatch> {
        let start = Instant::now();
        let batch = match &self.ahead {
            None => self.data.batch(step, self.config.shape(step))?,
            Some(ahead) => {
                ahead.recv().map_err(|_| anyhow!("the thread that prepares batches has ended"))??
            }
        };
        self.waited += start.elapsed();
        Ok(batch)
    }

    /// Time spent in [`Batches::next`]: what the steps waited for data.
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

/// Starts a thread that has the batches of these steps made and brings them, in their order, to a device.
fn prepare(
    data: Arc<EditData>,
    config: DataConfig,
    steps: Range<u64>,
    device: Device,
) -> Result<mpsc::Receiver<Result<EditBatch>>> {
    let (send, receive) = mpsc::sync_channel(AHEAD);
    // Workers of its own: the thread that waits for a batch may be the only one of the others, and a worker that waits here works for
    // nobody.
    // The panic of one has been told by then; it ends the run where its batch is asked for, not the process.
    let pool = ThreadPoolBuilder::new().panic_handler(|_| {}).build();
    let pool = pool.context("workers that prepare batches")?;
    let make = move |step| {
        let (ready, pending) = mpsc::sync_channel(1);
        let (data, shape) = (data.clone(), config.shape(step));
        pool.spawn_fifo(move || {
            // Where nobody listens any more, the run has ended.
            let _ = ready.send(data.batch(step, shape));
        });
        pending
    };
    let work = move || {
        let mut steps = steps.map(make);
        let mut being_made: VecDeque<_> = steps.by_ref().take(AHEAD).collect();
        while let Some(pending) = being_made.pop_front() {
            let made = pending.recv().map_err(|_| anyhow!("the worker that prepared this batch has failed"));
            let batch = made.and_then(|batch| Ok(batch?.to(device)?));
            being_made.extend(steps.next());
            // Nobody listens any more: the run has ended.
            if send.send(batch).is_err() {
                break;
            }
        }
    };
    thread::Builder::new().spawn(work).context("a thread that prepares batches")?;
    Ok(receive)
}
