//! Times of what is done on the stream: an event before and after each operation.

use super::{Event, Gpu, lock};
use crate::{
    Result,
    cuda::{Span, Watched},
};
use std::time::Duration;

/// What is seen while somebody watches.
#[derive(Default)]
pub(super) struct Watch {
    on: bool,
    spans: Vec<(String, [Event; 2])>,
    /// Events of the last time: to make one takes longer than to use it.
    spare: Vec<Event>,
    waited: Duration,
}

impl Watch {
    fn event(&mut self) -> Result<Event> {
        self.spare.pop().map_or_else(Event::new, Ok)
    }
    /// Forgets what was seen.
    fn clear(&mut self) {
        self.spare.extend(self.spans.drain(..).flat_map(|(_, events)| events));
        self.waited = Duration::ZERO;
    }
}

impl Gpu {
    /// From now on every operation is timed.
    pub fn watch(&self) {
        let mut watch = lock(&self.watch);
        watch.clear();
        watch.on = true;
    }

    /// Ends that: what was done since, which is waited for.
    pub fn watched(&self) -> Result<Watched> {
        self.enter()?;
        let mut watch = lock(&self.watch);
        watch.on = false;
        let mut spans = Vec::with_capacity(watch.spans.len());
        let mut before = None;
        for (name, [from, to]) in &watch.spans {
            let idle = before.map_or(Ok(0.0), |before| from.since(before))?;
            spans.push(Span { name: name.clone(), milliseconds: to.since(from)?, idle });
            before = Some(to);
        }
        let waited = watch.waited;
        watch.clear();
        Ok(Watched { spans, waited })
    }

    /// Does anybody watch?
    pub(super) fn is_watched(&self) -> bool {
        lock(&self.watch).on
    }

    /// Puts `work` on the stream, timed where somebody watches.
    pub(in crate::cuda) fn timed<T>(
        &self,
        name: impl FnOnce() -> String,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let mut watch = lock(&self.watch);
        if !watch.on {
            drop(watch);
            return work();
        }
        // Held all along, so that another thread's work is not counted as this.
        let events = [watch.event()?, watch.event()?];
        events[0].record(self.stream)?;
        let value = work()?;
        events[1].record(self.stream)?;
        watch.spans.push((name(), events));
        Ok(value)
    }

    /// The host has waited for the device for so long.
    pub(super) fn count_wait(&self, time: Duration) {
        lock(&self.watch).waited += time;
    }
}
