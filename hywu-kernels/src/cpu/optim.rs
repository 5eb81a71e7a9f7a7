//! CPU code of the op `optim`.
