//! Which of the machine's CPUs the threads are for, as Linux tells. Other systems tell only how many there are.
//!
//! Two CPUs that share a core (SMT) share the units that multiply, and a small core of a hybrid CPU makes the large ones
//! wait at the end of every region; so one thread for each large core is what most machines are fastest with.

use crate::cgroup::groups;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Where threads that compute belong.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cores {
    /// One CPU of each core that is worth a thread, in ascending order.
    pub(super) cpus: Vec<usize>,
    /// As many threads as there are such cores, or fewer where a control group grants less CPU time.
    pub(super) threads: usize,
    /// Whether nobody keeps this process from any CPU or from any of its time.
    pub(super) free: bool,
}

impl Cores {
    /// This machine's.
    #[cfg(target_os = "linux")]
    pub(super) fn here() -> Option<Cores> {
        Cores::read(Path::new("/"), &allowed()?)
    }

    /// No other system tells.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn here() -> Option<Cores> {
        None
    }

    /// What the files below `root` say, for a process that may run on the CPUs `allowed`. `None`, if that is none.
    pub(super) fn read(root: &Path, allowed: &[usize]) -> Option<Cores> {
        let devices = root.join("sys/devices");
        let list = |path: &Path| fs::read_to_string(path).ok().map(|text| cpu_list(&text));
        let cpu = |n: usize| devices.join(format!("system/cpu/cpu{n}"));
        let allowed: BTreeSet<usize> = allowed.iter().copied().collect();

        // Intel's hybrid CPUs have a performance counter unit of their own for large cores.
        let large = list(&devices.join("cpu_core/cpus"));
        let is_large = |n: &usize| large.as_ref().is_none_or(|large| large.contains(n));
        // Elsewhere a CPU's capacity is told, 1024 for the largest: little cores have a third of it, small differences
        // are those of clocks. (Clocks alone do not tell: little cores often have the same.)
        let capacity = |n: &usize| -> Option<u64> {
            let text = fs::read_to_string(cpu(*n).join("cpu_capacity")).ok()?;
            text.trim().parse().ok()
        };
        let most = allowed.iter().filter_map(capacity).max().unwrap_or(0);
        let is_able = |n: &usize| capacity(n).is_none_or(|c| 2 * c >= most);
        let mut chosen: Vec<usize> = allowed.iter().copied().filter(is_large).collect();
        if chosen.is_empty() {
            chosen.extend(&allowed);
        }
        chosen.retain(is_able);

        let mut cpus: Vec<usize> = Vec::new();
        for n in chosen {
            let topology = cpu(n).join("topology");
            let siblings = list(&topology.join("core_cpus_list"))
                .or_else(|| list(&topology.join("thread_siblings_list")));
            if !siblings.is_some_and(|all| cpus.iter().any(|taken| all.contains(taken))) {
                cpus.push(n);
            }
        }
        let quota = quota(root);
        let threads = quota.map_or(cpus.len(), |q| cpus.len().min((q as usize).max(1)));
        let online = list(&devices.join("system/cpu/online")).unwrap_or_default();
        let free = quota.is_none_or(|q| q >= online.len() as f64) && online.is_subset(&allowed);
        (!cpus.is_empty()).then_some(Cores {
            cpus,
            threads,
            free,
        })
    }
}

/// `0-3,8,10-11`. What is no such list is an empty one.
fn cpu_list(text: &str) -> BTreeSet<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        // No machine has more; a damaged list shall not take long.
        (last < MAX_CPUS).then_some(first..=last)
    };
    let parts = text.trim().split(',');
    parts.filter_map(range).flatten().collect()
}

/// More than Linux can be built for.
const MAX_CPUS: usize = 1 << 14;

/// How many CPUs' time the control groups grant, if they limit it.
fn quota(root: &Path) -> Option<f64> {
    let granted = groups(root, "cpu").into_iter().filter_map(|group| {
        let (time, period) = match group.unified {
            true => {
                let text = group.read("cpu.max")?;
                let (time, period) = text.trim().split_once(' ')?;
                (time.to_string(), period.to_string())
            }
            false => (
                group.read("cpu.cfs_quota_us")?,
                group.read("cpu.cfs_period_us")?,
            ),
        };
        // `max` and -1 are no limit.
        let number = |text: &str| text.trim().parse().ok().filter(|n: &f64| *n > 0.0);
        Some(number(&time)? / number(&period)?)
    });
    granted.min_by(f64::total_cmp)
}

/// The CPUs that this thread may run on.
#[cfg(target_os = "linux")]
fn allowed() -> Option<Vec<usize>> {
    let mut set = CpuSet::default();
    // SAFETY: the kernel writes at most as many bytes as it is told the set has.
    let done =
        unsafe { libc::sched_getaffinity(0, size_of_val(&set.0), set.0.as_mut_ptr().cast()) };
    (done == 0).then(|| (0..MAX_CPUS).filter(|n| set.has(*n)).collect())
}

/// Keeps this thread on one CPU, if the system lets it.
#[cfg(target_os = "linux")]
pub(super) fn stay_on(cpu: usize) {
    let mut set = CpuSet::default();
    set.0[cpu / 64] |= 1 << (cpu % 64);
    // SAFETY: the kernel reads as many bytes as the set has. Where it refuses, the thread goes on as before.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set.0), set.0.as_ptr().cast()) };
}

/// Other systems decide by themselves.
#[cfg(not(target_os = "linux"))]
pub(super) fn stay_on(_cpu: usize) {}

/// One bit for each CPU (`libc::cpu_set_t` ends at 1024 of them).
#[cfg(target_os = "linux")]
struct CpuSet([u64; MAX_CPUS / 64]);

#[cfg(target_os = "linux")]
impl Default for CpuSet {
    fn default() -> CpuSet {
        CpuSet([0; MAX_CPUS / 64])
    }
}

#[cfg(target_os = "linux")]
impl CpuSet {
    fn has(&self, n: usize) -> bool {
        self.0[n / 64] >> (n % 64) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use tempfile::TempDir;

    /// The files of a machine that there is not.
    struct Made(TempDir);

    impl Made {
        /// `cores[i]`: the CPUs of a core and the capacity of each.
        fn machine(cores: &[(&[usize], Option<u32>)]) -> Made {
            let made = Made(tempfile::tempdir().unwrap());
            let n: usize = cores.iter().map(|(cpus, _)| cpus.len()).sum();
            made.write("sys/devices/system/cpu/online", &format!("0-{}\n", n - 1));
            for (cpus, capacity) in cores {
                let list: Vec<String> = cpus.iter().map(usize::to_string).collect();
                for cpu in *cpus {
                    let folder = format!("sys/devices/system/cpu/cpu{cpu}");
                    let siblings = format!("{folder}/topology/core_cpus_list");
                    made.write(&siblings, &format!("{}\n", list.join(",")));
                    if let Some(capacity) = capacity {
                        made.write(&format!("{folder}/cpu_capacity"), &format!("{capacity}\n"));
                    }
                }
            }
            made
        }

        fn write(&self, path: &str, text: &str) {
            let path: PathBuf = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn cores(&self, allowed: &[usize]) -> Cores {
            Cores::read(self.0.path(), allowed).unwrap()
        }
    }

    const ALL: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

    #[test]
    fn one_thread_for_each_core_of_two_cpus() {
        // Siblings lie side by side, or half the machine apart.
        for (pairs, want) in [
            ([[0, 1], [2, 3], [4, 5], [6, 7]], [0, 2, 4, 6]),
            ([[0, 4], [1, 5], [2, 6], [3, 7]], [0, 1, 2, 3]),
        ] {
            let cores = pairs.each_ref().map(|pair| (pair.as_slice(), None));
            let made = Made::machine(&cores);
            let all = made.cores(&ALL);
            assert_eq!((&all.cpus[..], all.threads, all.free), (&want[..], 4, true));
        }
        let made = Made::machine(&[
            (&[0, 4], None),
            (&[1, 5], None),
            (&[2, 6], None),
            (&[3, 7], None),
        ]);
        // Masks: both CPUs of one core and one of another; the second CPUs alone.
        let some = made.cores(&[1, 5, 6]);
        assert_eq!(
            (&some.cpus[..], some.threads, some.free),
            (&[1, 6][..], 2, false)
        );
        assert_eq!(made.cores(&[4, 5, 6, 7]).cpus, [4, 5, 6, 7]);
    }

    #[test]
    fn large_cores_of_an_intel_hybrid() {
        // Two cores of two CPUs, four small ones, as Alder Lake counts them; capacities as newer kernels tell them.
        for [large, small] in [[None, None], [Some(1024), Some(624)]] {
            let (two, one) = (|cpus| (cpus, large), |cpus| (cpus, small));
            let made = Made::machine(&[
                two(&[0, 1][..]),
                two(&[2, 3]),
                one(&[4][..]),
                one(&[5]),
                one(&[6]),
                one(&[7]),
            ]);
            made.write("sys/devices/cpu_core/cpus", "0-3\n");
            made.write("sys/devices/cpu_atom/cpus", "4-7\n");
            assert_eq!(made.cores(&ALL).cpus, [0, 2]);
            // A process that was given small cores takes those.
            assert_eq!(made.cores(&[5, 6]).cpus, [5, 6]);
            assert_eq!(made.cores(&[3, 5, 6]).cpus, [3]);
        }
    }

    #[test]
    fn large_cores_of_an_arm() {
        // Four little, three middle, one prime.
        let capacities = [250, 250, 250, 250, 870, 870, 870, 1024];
        let cpus = [[0], [1], [2], [3], [4], [5], [6], [7]];
        let cores: Vec<_> = (cpus.iter().zip(capacities))
            .map(|(cpu, capacity)| (cpu.as_slice(), Some(capacity)))
            .collect();
        let made = Made::machine(&cores);
        assert_eq!(made.cores(&ALL).cpus, [4, 5, 6, 7]);
        assert_eq!(made.cores(&[0, 1, 2, 3]).cpus, [0, 1, 2, 3]);
    }

    #[test]
    fn quotas_of_control_groups() {
        let cores = [(&[0][..], None), (&[1], None), (&[2], None), (&[3], None)];
        let four = [0, 1, 2, 3];
        let unified = |at: &str, text: &str| {
            let made = Made::machine(&cores);
            made.write("proc/self/cgroup", "0::/a/b\n");
            made.write(&format!("sys/fs/cgroup/{at}cpu.max"), text);
            let found = made.cores(&four);
            assert_eq!(found.cpus, four);
            (found.threads, found.free)
        };
        assert_eq!(unified("a/b/", "max 100000\n"), (4, true));
        assert_eq!(unified("a/b/", "250000 100000\n"), (2, false));
        assert_eq!(unified("a/", "50000 100000\n"), (1, false));
        assert_eq!(unified("", "900000 100000\n"), (4, true));
        assert_eq!(unified("", "nonsense\n"), (4, true));
        let made = Made::machine(&cores);
        made.write("proc/self/cgroup", "5:cpu,cpuacct:/x\n");
        made.write("sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1\n");
        made.write("sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n");
        assert_eq!(made.cores(&four).threads, 4);
        made.write("sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "300000\n");
        assert_eq!(
            (made.cores(&four).threads, made.cores(&four).free),
            (3, false)
        );
    }

    #[test]
    fn machines_that_tell_nothing() {
        let made = Made(tempfile::tempdir().unwrap());
        let found = made.cores(&[0, 1, 2]);
        assert_eq!((&found.cpus[..], found.threads), (&[0, 1, 2][..], 3));
        assert_eq!(Cores::read(made.0.path(), &[]), None);
        made.write("sys/devices/cpu_core/cpus", "0-99999999999,x,\n");
        assert_eq!(made.cores(&[0, 1, 2]).cpus, [0, 1, 2]);
        assert_eq!(cpu_list("0-2,5,7-8\n"), BTreeSet::from([0, 1, 2, 5, 7, 8]));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_has_cores() {
        let here = Cores::here().unwrap();
        let all = allowed().unwrap();
        assert!(here.cpus.iter().all(|cpu| all.contains(cpu)));
        assert!((1..=all.len()).contains(&here.threads));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                stay_on(here.cpus[0]);
                assert_eq!(allowed().unwrap(), [here.cpus[0]]);
            });
        });
        assert_eq!(allowed().unwrap(), all);
    }
}
