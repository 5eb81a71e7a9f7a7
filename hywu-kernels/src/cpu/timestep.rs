//! CPU code of the op `timestep`.
