//! CPU code of the op `patchify`.
