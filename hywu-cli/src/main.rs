//! The `hywu` binary.
fn main() {}
