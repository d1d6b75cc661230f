//! What the machine can do at most, measured once and remembered.

use super::folders::cache_folder;
use crate::moe::Machine;

/// Bytes per second that the machine's threads read from memory: measured once per machine and thread
/// count (about 0.2 s), then remembered in the user's cache folder. `seen`: what was just reached; more
/// than is remembered means that the machine was busy when it was measured, so it is measured again.
pub(super) fn bandwidth(machine: &Machine, seen: f64) -> f64 {
    let name = format!("bandwidth-{}", machine.pool.threads());
    remembered(&name, seen, || machine.read_bandwidth())
}

/// Products of int8 per second ([`Machine::int8_peak`]), remembered like [`bandwidth`].
pub(super) fn int8_peak(machine: &Machine, seen: f64) -> f64 {
    let (tier, threads) = (machine.kernels.tier().name(), machine.pool.batch_threads());
    let name = format!("int8-{tier}-{threads}");
    remembered(&name, seen, || machine.int8_peak())
}

/// What is known under `name`, measured anew if nothing is or if more than it was seen.
fn remembered(name: &str, seen: f64, measure: impl FnOnce() -> f64) -> f64 {
    let file = cache_folder().map(|dir| dir.join(name));
    let known = file
        .as_ref()
        .and_then(|f| std::fs::read_to_string(f).ok())
        .and_then(|text| text.trim().parse().ok())
        .filter(|b: &f64| b.is_finite() && *b > 0.0);
    if let Some(known) = known.filter(|known| *known >= seen) {
        return known;
    }
    let best = measure().max(known.unwrap_or(0.0));
    if let Some(file) = file {
        // Without a cache folder it is measured again next time; no reason to trouble the user.
        let _ = file.parent().map(std::fs::create_dir_all);
        let _ = std::fs::write(file, format!("{best}\n"));
    }
    best
}
