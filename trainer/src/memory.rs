//! This process's memory, as the kernel counts it, and how much of the machine's it may have.

use std::fs;
use std::path::Path;

/// Resident bytes, now and at most.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resident {
    pub bytes: u64,
    /// Since the process began, or since [`Resident::forget_peak`].
    pub peak: u64,
}

impl Resident {
    pub fn now() -> Resident {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Resident {
            bytes: kib(&status, "VmRSS:"),
            peak: kib(&status, "VmHWM:"),
        }
    }

    /// The peak is what is resident now. Loading a model takes more than some steps do; a kernel that does not know how keeps
    /// the peak of the whole process.
    pub fn forget_peak() {
        let _ = fs::write("/proc/self/clear_refs", "5");
    }
}

/// Bytes of a line such as "VmRSS:   1234 kB".
fn kib(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    number.unwrap_or(0) << 10
}

/// Bytes that this process's machine, or its share of it (a cgroup of a batch system or container), has.
pub fn machine_bytes() -> u64 {
    let machine = kib(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemTotal:");
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = groups
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap_or_default();
    // A group's limit holds for all below it.
    let limits = Path::new(group).ancestors().filter_map(|group| {
        let limit = Path::new("/sys/fs/cgroup").join(group).join("memory.max");
        fs::read_to_string(limit).ok()?.trim().parse::<u64>().ok()
    });
    limits.fold(machine, u64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_its_memory() {
        let before = Resident::now();
        assert!(before.bytes > 1 << 20 && before.peak >= before.bytes, "{before:?}");
        let block = vec![1u8; 64 << 20];
        let with = Resident::now();
        assert!(
            with.bytes >= before.bytes + (60 << 20),
            "{before:?}, {with:?}, {}",
            block[9]
        );
        assert!(machine_bytes() > with.bytes);
    }
}
