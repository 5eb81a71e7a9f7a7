//! Benchmarks: criterion benches of single ops in `benches/`, the comparison with PyTorch in `peer/` and `src/bin/cpu_cases.rs`,
//! whole edits in `edit_time.py`, committed results in `runs/`. The README beside this crate lists the commands.
