//! The memory of the machine, as Linux tells it (proc(5), and the kernel's cgroup-v1 and cgroup-v2 documents). Other systems: without end.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Bytes that this process can have without swapping, also within its control groups.
pub fn available_memory() -> u64 {
    let told = fs::read_to_string("/proc/meminfo").ok().and_then(|text| number(&text, "MemAvailable:"));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = groups.lines().filter_map(|line| Group::of(line, Path::new("/sys/fs/cgroup")));
    let room = groups.map(|group| group.room()).min().unwrap_or(u64::MAX);
    told.map_or(u64::MAX, |kilobytes| kilobytes.saturating_mul(1024)).min(room)
}

/// The number behind a name at the start of a line.
fn number(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(char::is_whitespace))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A control group that counts memory.
#[derive(Debug, PartialEq)]
struct Group {
    /// Where groups of its version are mounted.
    root: PathBuf,
    /// Its folder.
    folder: PathBuf,
    /// The file with the limit.
    limit: &'static str,
    /// Pages that make no room when others want them, in `memory.stat`.
    used: &'static str,
}

impl Group {
    /// Of a line `number:controllers:path` of /proc/self/cgroup.
    fn of(line: &str, mounted: &Path) -> Option<Self> {
        let mut parts = line.splitn(3, ':');
        let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let (root, limit, used) = match controllers {
            "" if number == "0" => (mounted.to_owned(), "memory.max", "anon"),
            _ if controllers.split(',').any(|c| c == "memory") => {
                (mounted.join("memory"), "memory.limit_in_bytes", "total_rss")
            }
            _ => return None,
        };
        Some(Self { folder: root.join(path.trim_start_matches('/')), root, limit, used })
    }
    /// Bytes up to its limit, or that of a group that it belongs to. A container may see only the last of them, at the root.
    fn room(&self) -> u64 {
        let folders = self.folder.ancestors().take_while(|folder| folder.starts_with(&self.root));
        let room = |folder: &Path| {
            // `max` is no limit.
            let limit: u64 = fs::read_to_string(folder.join(self.limit)).ok()?.trim().parse().ok()?;
            let used = number(&fs::read_to_string(folder.join("memory.stat")).ok()?, self.used)?;
            Some(limit.saturating_sub(used))
        };
        folders.filter_map(room).min().unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_room_of_all_groups_counts() {
        let mounted = tempfile::tempdir().expect("a folder");
        let write = |folder: &str, files: &[(&str, &str)]| {
            let folder = mounted.path().join(folder);
            fs::create_dir_all(&folder).expect("writable");
            files.iter().for_each(|(name, text)| fs::write(folder.join(name), text).expect("writable"));
        };
        write("a", &[("memory.max", "5000\n"), ("memory.stat", "anon_thp 4000\nanon 1500\nfile 3000\n")]);
        write("a/b", &[("memory.max", "max\n"), ("memory.stat", "anon 1000\n")]);
        write("a/c", &[("memory.max", "2000\n"), ("memory.stat", "anon 2100\n")]);
        write("memory", &[("memory.limit_in_bytes", "700\n"), ("memory.stat", "rss 10\ntotal_rss 100\n")]);
        let room = |line: &str| Group::of(line, mounted.path()).map(|group| group.room());
        assert_eq!(room("0::/a/b"), Some(3500));
        assert_eq!(room("0::/a/c"), Some(0));
        assert_eq!(room("0::/"), Some(u64::MAX));
        // A path of the host, of which the container sees the end only.
        assert_eq!(room("4:cpu,memory:/docker/123"), Some(600));
        for other in ["1:cpu:/a", "", "0:", "name=systemd:/"] {
            assert_eq!(room(other), None, "{other}");
        }
    }

    #[test]
    fn names_are_whole() {
        let text = "MemTotal:  9 kB\nMemAvailable:    20675392 kB\nMemAvailable2: 1\n";
        assert_eq!(number(text, "MemAvailable:"), Some(20_675_392));
        assert_eq!(number(text, "Mem"), None);
        assert_eq!(number("MemAvailable: x", "MemAvailable:"), None);
    }
}
