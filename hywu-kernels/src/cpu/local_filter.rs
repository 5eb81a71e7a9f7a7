//! CPU code of the op `local_filter`.
