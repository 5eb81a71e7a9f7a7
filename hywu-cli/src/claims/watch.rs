//! Who looks on while a measurement runs.

use anyhow::Result;
use hywu_diffusion::Error;

/// Hears how far a measurement is, and may stop it.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Is it to stop? Asked at every step of a training and of an edit.
    pub stop: &'a dyn Fn() -> bool,
    /// (what is done, steps done, steps in all).
    pub tell: &'a dyn Fn(&str, u64, u64),
}

impl Watch<'_> {
    /// Tells, then asks.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when it is to stop.
    pub fn at(&self, what: &str, done: usize, total: usize) -> Result<()> {
        (self.tell)(what, done as u64, total as u64);
        if (self.stop)() { Err(Error::Interrupted.into()) } else { Ok(()) }
    }
}
