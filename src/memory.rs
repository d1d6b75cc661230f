//! How much memory there is for programs, and how much this one has, as Linux tells. Other systems tell nothing here.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that this process may still take before the machine, or the control group that it runs in, has to swap or to
/// refuse. What is cached of files counts as free.
pub fn available() -> Option<u64> {
    let machine = field(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")? << 10;
    let groups = groups(&fs::read_to_string("/proc/self/cgroup").unwrap_or_default());
    Some(
        groups
            .iter()
            .filter_map(|g| g.room())
            .fold(machine, u64::min),
    )
}

/// Bytes of memory that this process holds, without what it has mapped of files: those pages are the system's, which
/// takes them back when it likes.
pub fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    Some(field(&status, "RssAnon:")? << 10)
}

/// The number behind a name, on a line of its own.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A control group that limits memory, and what its files are called in this version of control groups.
struct Group {
    folder: PathBuf,
    limit: &'static str,
    usage: &'static str,
    cached: &'static str,
}

impl Group {
    /// What the group may still take; nothing, if it has no limit.
    fn room(&self) -> Option<u64> {
        let read = |name: &str| fs::read_to_string(self.folder.join(name)).ok();
        let limit: u64 = read(self.limit)?.trim().parse().ok()?;
        let usage: u64 = read(self.usage)?.trim().parse().ok()?;
        let cached = field(&read("memory.stat")?, self.cached).unwrap_or(0);
        Some(limit.saturating_sub(usage.saturating_sub(cached)))
    }
}

/// The groups that `/proc/self/cgroup` names, with those above them: lines of `number:controllers:path`, where version 2
/// has no controllers. Inside a container the path may be one that only its host knows; the group at the root is
/// its own then.
fn groups(lines: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    for line in lines.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (root, [limit, usage, cached]) = match controllers {
            "" => (
                "/sys/fs/cgroup",
                ["memory.max", "memory.current", "inactive_file"],
            ),
            _ if controllers.split(',').any(|c| c == "memory") => (
                "/sys/fs/cgroup/memory",
                [
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    "total_inactive_file",
                ],
            ),
            _ => continue,
        };
        let path = Path::new(path.trim_start_matches('/'));
        groups.extend(path.ancestors().map(|path| Group {
            folder: Path::new(root).join(path),
            limit,
            usage,
            cached,
        }));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_groups() {
        assert_eq!(field("A:  1 kB\nRssAnon:\t  12 kB\n", "RssAnon:"), Some(12));
        assert_eq!(field("A: 1 kB\n", "B:"), None);
        let folders = |lines: &str| -> Vec<String> {
            let folders = groups(lines).into_iter();
            folders.map(|g| g.folder.display().to_string()).collect()
        };
        assert_eq!(
            folders("3:cpu:/x\n2:cpuset,memory:/a/b\n"),
            [
                "/sys/fs/cgroup/memory/a/b",
                "/sys/fs/cgroup/memory/a",
                "/sys/fs/cgroup/memory/"
            ]
        );
        assert_eq!(folders("0::/\n"), ["/sys/fs/cgroup/"]);
        assert!(folders("nonsense").is_empty());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_buffer_is_seen() {
        const MIB: usize = 1 << 20;
        let before = resident().unwrap();
        let buffer = std::hint::black_box(vec![1u8; 64 * MIB]);
        let grown = resident().unwrap() - before;
        assert!(grown >= 60 * MIB as u64, "{grown}");
        drop(buffer);
        assert!(available().unwrap() > 0);
    }
}
