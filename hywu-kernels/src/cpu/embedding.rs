//! CPU code of the op `embedding`.
