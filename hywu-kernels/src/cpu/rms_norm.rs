//! CPU code of the op `rms_norm`.
