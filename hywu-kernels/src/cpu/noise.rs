//! CPU code of the op `noise`.
