//! How a test program starts itself as the ranks of an mpirun. What starts with `--rank-of` is a rank; it runs every case, and
//! one that fails ends all.

use std::path::Path;
use std::process::Command;

use sharding::Comm;

/// What every rank of a job runs. `shared` is a folder of the job's own.
pub type Case = (&'static str, fn(comm: &dyn Comm, shared: &Path));

/// Starts this program as so many ranks with the words `kind`, `ranks` and `shared`, and waits for them.
pub fn start(kind: &str, ranks: usize, shared: &Path) {
    let status = Command::new("mpirun")
        // Memory that is freed then leaves the process at once, and what is held can be measured.
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .args(["--quiet", "--bind-to", "none", "--oversubscribe"])
        .args(["-n", &ranks.to_string()])
        .arg(std::env::current_exe().expect("a test knows where it is"))
        .args([kind, &ranks.to_string()])
        .arg(shared)
        .status()
        .expect("mpirun starts; set-up installs it");
    assert!(status.success(), "{ranks} ranks under mpirun ended with {status}");
}

/// The cases one after the other, as a rank.
pub fn run(cases: &[Case], comm: &dyn Comm, engine: &str, shared: &Path) {
    for (name, case) in cases {
        case(comm, shared);
        comm.barrier().expect("all ranks finish a case");
        if comm.rank() == 0 {
            println!("test {name} ... ok ({engine}, {} ranks)", comm.world());
        }
    }
}

/// As libtest lists them.
pub fn list(cases: &[Case]) {
    cases.iter().for_each(|(name, _)| println!("{name}: test"));
}

/// A rank that fails a test must not leave its peers waiting in a collective: mpirun ends them all with it.
pub fn end_all_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
}

/// What was resident at most counts from now on.
pub fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").expect("Linux forgets it");
}

/// A line of /proc/self/status, bytes: `VmRSS:` is resident, and `VmHWM:` was at most.
pub fn memory(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux says it");
    let found = status
        .lines()
        .find_map(|text| text.strip_prefix(line))
        .expect("a line of it");
    let kib: u64 = found.trim().trim_end_matches(" kB").parse().expect("a number");
    kib * 1024
}
