//! CPU code of the op `parameter_tokens`.
