//! The batches of a run, in the order of its steps.

use super::config::DataConfig;
use anyhow::{Context, Result, anyhow};
use hywu_diffusion::{EditBatch, EditData};
use rayon::ThreadPoolBuilder;
use std::{
    ops::Range,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

/// Batches that are prepared, several at once, before they are asked for: one alone would wait for its slowest instance while
/// other workers have nothing to do.
const AHEAD: usize = 3;

/// A batch that is ready or being made.
type Pending = mpsc::Receiver<hywu_diffusion::Result<EditBatch>>;

/// Hands out batches. Where a device does the arithmetic a thread prepares them ahead; on the CPU it would take from the steps what it
/// gives.
pub struct Batches {
    data: Arc<EditData>,
    config: DataConfig,
    ahead: Option<mpsc::Receiver<Pending>>,
    waited: Duration,
}

impl Batches {
    /// The batches of these steps.
    ///
    /// # Errors
    /// A system that starts no more threads.
    pub fn new(data: &Arc<EditData>, config: &DataConfig, steps: Range<u64>, ahead: bool) -> Result<Self> {
        let ahead = ahead.then(|| prepare(data.clone(), config.clone(), steps)).transpose()?;
        Ok(Self { data: data.clone(), config: config.clone(), ahead, waited: Duration::ZERO })
    }

    /// The batch of the next step, which is `step`.
    ///
    /// # Errors
    /// Those of [`EditData::batch`].
    pub fn next(&mut self, step: u64) -> Result<EditBatch> {
        let start = Instant::now();
        let batch = match &self.ahead {
            None => self.data.batch(step, self.config.shape(step))?,
            Some(ahead) => {
                let pending =
                    ahead.recv().map_err(|_| anyhow!("the thread that prepares batches has ended"))?;
                pending.recv().map_err(|_| anyhow!("the worker that prepared this batch has failed"))??
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

/// Starts a thread that makes the batches of these steps.
fn prepare(data: Arc<EditData>, config: DataConfig, steps: Range<u64>) -> Result<mpsc::Receiver<Pending>> {
    let (send, receive) = mpsc::sync_channel(AHEAD);
    // Workers of its own: the thread that waits for a batch may be the only one of the others, and a worker that waits here works for
    // nobody.
    // The panic of one has been told by then; it ends the run where its batch is asked for, not the process.
    let pool = ThreadPoolBuilder::new().panic_handler(|_| {}).build();
    let pool = pool.context("workers that prepare batches")?;
    let work = move || {
        for step in steps {
            let (ready, pending) = mpsc::sync_channel(1);
            let (data, shape) = (data.clone(), config.shape(step));
            pool.spawn_fifo(move || {
                // Where nobody listens any more, the run has ended.
                let _ = ready.send(data.batch(step, shape));
            });
            if send.send(pending).is_err() {
                break;
            }
        }
    };
    thread::Builder::new().spawn(work).context("a thread that prepares batches")?;
    Ok(receive)
}
