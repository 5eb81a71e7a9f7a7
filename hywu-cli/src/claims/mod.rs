//! What the paper claims for instance-specific weights, measured anew: from one frozen backbone, on the same batches, every method is
//! trained on skills that contradict each other, and all of them edit photos that they never saw (`hywu eval claims`).

pub mod forgetting;
pub mod report;
pub mod settings;
