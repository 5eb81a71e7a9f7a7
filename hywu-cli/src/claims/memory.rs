//! How much memory a piece of work takes.

use anyhow::Result;
use hywu_kernels::Device;
use std::fs;

const MB: f64 = 1e6;

/// The most memory that `work` held beyond what was held before it, in MB: of a CUDA device what its allocator took; of the CPU the
/// process's resident set, where the system (Linux) keeps its peak and lets it be reset, else nothing.
///
/// # Errors
/// Those of the work and of the device.
pub fn taken(device: Device, work: impl FnOnce() -> Result<()>) -> Result<Option<f64>> {
    device.trim()?;
    if let Some((free, _)) = device.memory()? {
        work()?;
        // Freed memory stays with the allocator until it is trimmed, so what is missing now is the peak.
        let left = device.memory()?.map_or(free, |(left, _)| left);
        return Ok(Some(free.saturating_sub(left) as f64 / MB));
    }
    give_back();
    let before = resident("VmRSS:");
    // Resets the peak (proc(5)).
    let reset = fs::write("/proc/self/clear_refs", "5").is_ok();
    work()?;
    let peak = resident("VmHWM:").filter(|_| reset);
    Ok(peak.zip(before).map(|(peak, before)| (peak - before).max(0.0)))
}

/// Lets the allocator give freed pages back to the system, which would otherwise hide what the work takes.
fn give_back() {
    // SAFETY: it may be called at any time, and touches freed memory alone.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// A size in `/proc/self/status`, in MB.
fn resident(key: &str) -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0 / MB)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_large_buffer_is_seen() {
        let mut sum = 0;
        let found = taken(Device::Cpu, || {
            let buffer = vec![1u8; 200_000_000];
            sum = std::hint::black_box(&buffer).iter().step_by(4096).map(|x| usize::from(*x)).sum();
            Ok(())
        });
        let found = found.expect("no device");
        assert!(sum > 40_000);
        // What was freed just before hides nothing.
        let pages: Vec<Vec<u8>> = (0..2000).map(|_| vec![1; 100_000]).collect();
        drop(std::hint::black_box(pages));
        let again = taken(Device::Cpu, || {
            drop(std::hint::black_box((0..2000).map(|_| vec![1u8; 100_000]).collect::<Vec<_>>()));
            Ok(())
        });
        assert!(again.expect("no device").is_none_or(|mb| mb > 150.0));
        // Where the system does not let the peak be reset there is no number.
        assert!(found.is_none_or(|mb| (190.0..400.0).contains(&mb)), "{found:?}");
    }
}
