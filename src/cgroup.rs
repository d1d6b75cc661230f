//! The control groups that this process is in, as Linux tells: who limits its memory and its CPU time.

use std::fs;
use std::path::{Path, PathBuf};

/// A control group that has a controller.
#[derive(Debug, PartialEq, Eq)]
pub struct Group {
    /// Where its files are.
    pub folder: PathBuf,
    /// Whether they have the names of version 2.
    pub unified: bool,
}

impl Group {
    /// What one of its files says.
    pub fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.folder.join(file)).ok()
    }
}

/// The groups with `controller` that this process is in, with those above them. `root`: of the file system.
///
/// `/proc/self/cgroup` has lines of `number:controllers:path`, where version 2 has no controllers. Inside a container the
/// path may be one that only its host knows; the group at the root is its own then.
pub fn groups(root: &Path, controller: &str) -> Vec<Group> {
    let lines = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let base = root.join("sys/fs/cgroup");
    let mut groups = Vec::new();
    for line in lines.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (base, unified) = match controllers {
            "" => (base.clone(), true),
            _ if controllers.split(',').any(|c| c == controller) => (base.join(controller), false),
            _ => continue,
        };
        let path = Path::new(path.trim_start_matches('/'));
        groups.extend(path.ancestors().map(|path| Group {
            folder: base.join(path),
            unified,
        }));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_versions() {
        let root = tempfile::tempdir().unwrap();
        let folders = |lines: &str, controller| -> Vec<String> {
            fs::create_dir_all(root.path().join("proc/self")).unwrap();
            fs::write(root.path().join("proc/self/cgroup"), lines).unwrap();
            let groups = groups(root.path(), controller).into_iter();
            let inside = |g: Group| g.folder.strip_prefix(root.path()).unwrap().to_path_buf();
            groups.map(|g| inside(g).display().to_string()).collect()
        };
        let old = "3:cpu:/x\n2:cpuset,memory:/a/b\n";
        assert_eq!(
            folders(old, "memory"),
            [
                "sys/fs/cgroup/memory/a/b",
                "sys/fs/cgroup/memory/a",
                "sys/fs/cgroup/memory"
            ]
        );
        assert_eq!(
            folders(old, "cpu"),
            ["sys/fs/cgroup/cpu/x", "sys/fs/cgroup/cpu"]
        );
        assert_eq!(folders("0::/\n", "cpu"), ["sys/fs/cgroup"]);
        assert!(folders("nonsense", "cpu").is_empty());
        assert!(groups(Path::new("/no/such/folder"), "cpu").is_empty());
    }
}
