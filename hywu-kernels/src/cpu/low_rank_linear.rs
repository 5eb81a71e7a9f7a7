//! CPU code of the op `low_rank_linear`.
