//! CPU code of the op `tile_blend`.
