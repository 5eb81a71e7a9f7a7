//! Ctrl-C in long work: the first one asks it to stop at its next step; it then ends with exit code 130.

use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Installs the handler. A second Ctrl-C ends the process at once, without the files that it has begun.
///
/// # Errors
/// When the system refuses the handler.
pub fn install() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            hywu_core::remove_temporaries();
            std::process::exit(130);
        }
    })?;
    Ok(())
}

/// Has the user asked to stop?
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
