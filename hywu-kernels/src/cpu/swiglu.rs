//! CPU code of the op `swiglu`.
