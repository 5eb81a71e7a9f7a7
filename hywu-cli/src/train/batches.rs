//! The batches of a run, in the order of its steps.

use super::config::DataConfig;
use anyhow::{Result, anyhow};
use hywu_diffusion::{EditBatch, EditData};
use std::{
    ops::Range,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

/// Batches that are prepared before they are asked for.
const AHEAD: usize = 3;

/// Hands out batches. Where a device does the arithmetic a thread prepares them ahead; on the CPU it would take from the steps what it
/// gives.
pub struct Batches {
    data: Arc<EditData>,
    config: DataConfig,
    ahead: Option<mpsc::Receiver<hywu_diffusion::Result<EditBatch>>>,
    waited: Duration,
}

impl Batches {
    /// The batches of these steps.
    pub fn new(data: &Arc<EditData>, config: &DataConfig, steps: Range<u64>, ahead: bool) -> Self {
        let (data, config) = (data.clone(), config.clone());
        let ahead = ahead.then(|| {
            let (send, receive) = mpsc::sync_channel(AHEAD);
            let (data, config) = (data.clone(), config.clone());
            thread::spawn(move || {
                for step in steps {
                    // Nobody listens any more: the run has ended.
                    if send.send(data.batch(step, config.shape(step))).is_err() {
                        break;
                    }
                }
            });
            receive
        });
        Self { data, config, ahead, waited: Duration::ZERO }
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
