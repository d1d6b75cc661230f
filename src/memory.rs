//! How much memory there is for programs, and how much this one has, as Linux tells. Other systems tell nothing here.

use crate::cgroup::{Group, groups};
use std::fs;
use std::path::Path;

/// Bytes that this process may still take before the machine, or the control group that it runs in, has to swap or to
/// refuse. What is cached of files counts as free.
pub fn available() -> Option<u64> {
    let machine = field(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")? << 10;
    let groups = groups(Path::new("/"), "memory");
    Some(groups.iter().filter_map(room).fold(machine, u64::min))
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

/// What a control group may still take; nothing, if it has no limit.
fn room(group: &Group) -> Option<u64> {
    let [limit, usage, cached] = match group.unified {
        true => ["memory.max", "memory.current", "inactive_file"],
        false => [
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ],
    };
    let limit: u64 = group.read(limit)?.trim().parse().ok()?;
    let usage: u64 = group.read(usage)?.trim().parse().ok()?;
    let cached = field(&group.read("memory.stat")?, cached).unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(cached)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_groups() {
        assert_eq!(field("A:  1 kB\nRssAnon:\t  12 kB\n", "RssAnon:"), Some(12));
        assert_eq!(field("A: 1 kB\n", "B:"), None);
        let root = tempfile::tempdir().unwrap();
        let group = |unified| Group {
            folder: root.path().to_path_buf(),
            unified,
        };
        let write = |name: &str, text: &str| fs::write(root.path().join(name), text).unwrap();
        write("memory.max", "max\n");
        write("memory.current", "700\n");
        write("memory.stat", "anon 400\ninactive_file 300\n");
        assert_eq!(room(&group(true)), None);
        write("memory.max", "1000\n");
        assert_eq!(room(&group(true)), Some(600));
        assert_eq!(room(&group(false)), None);
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
