//! Checkpoints cannot be lost: the functions that write them, in a process of their own under strace, which kills it, freezes it
//! or fails its calls at every write, fsync, rename, openat and mkdir; power cuts from the recorded trace; damaged bytes.
//!
//! `checkpoints` runs the short form, `checkpoints --soak` the whole; both print one line a count.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use launcher::checkpoint::identity::Identity;
use launcher::checkpoint::manifest::{CHUNK_BYTES, FORMAT, partial_name, step_name};
use launcher::checkpoint::read::list;
use launcher::checkpoint::{
    FOLDER, Fence, FileEntry, GuardState, Keep, Manifest, Nonce, Part, TensorEntry, commit, newest, verify,
    write_slices,
};
use launcher::supervise::process_state;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The calls by which a save reaches the disk, as this program's libc makes them.
const CALLS: [&str; 5] = ["openat", "write", "fsync", "rename", "mkdir"];
const KEEP: Keep = Keep { newest: 2, every: None };
/// Elements of the one bucket.
const ELEMENTS: u64 = 5000;
const N_SLICES: usize = 2;

/// Steps that are there before the step that is interrupted.
const BEFORE: [u64; 2] = [1, 2];
const STEP: u64 = 3;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let soak = arguments.iter().any(|it| it == "--soak");
    match &arguments[..] {
        [list, ..] if list == "--list" => CASES.iter().for_each(|(name, _)| println!("{name}: test")),
        [child, role, run, nonce] if child == "--child" => {
            let run = Path::new(run);
            let nonce = Nonce::from_text(nonce);
            let done = match &role[..] {
                "rank-0" => save(run, &nonce, STEP),
                _ => write_one(run, &nonce, STEP, 1).map(drop),
            };
            if let Err(error) = done {
                eprintln!("{error:#}");
                return ExitCode::from(74);
            }
        }
        _ => {
            let asked = arguments.iter().find(|it| !it.starts_with("--"));
            for (name, case) in CASES {
                if asked.is_none_or(|asked| name.contains(asked.as_str())) {
                    let started = Instant::now();
                    case(soak);
                    println!("test {name} ... ok ({:.1} s)", started.elapsed().as_secs_f64());
                }
            }
        }
    }
    ExitCode::SUCCESS
}

type Case = (&'static str, fn(bool));

const CASES: [Case; 6] = [
    ("killed_at_every_call_something_whole_is_left", kills),
    ("calls_that_fail_or_lie_leave_what_was_there", failures),
    ("a_frozen_writer_that_wakes_up_commits_nothing", frozen),
    ("a_power_cut_at_any_call_leaves_what_was_committed", power_cuts),
    ("damage_is_found_and_named", damage),
    ("another_number_of_files_holds_the_same_bytes", recut),
];

// ---- A run, without a model -------------------------------------------------------------------------------------------------

/// f32 bytes that depend on step, slot and element.
fn state(step: u64, slot: usize, range: (u64, u64)) -> Vec<u8> {
    let values = (range.0..range.1).map(|element| (element as f32).sin() + step as f32 + slot as f32);
    values.flat_map(f32::to_le_bytes).collect()
}

fn range(slice: usize) -> (u64, u64) {
    let length = configs::planner::memory::slice_len(ELEMENTS as usize, N_SLICES) as u64;
    let at = |slice: usize| (slice as u64 * length).min(ELEMENTS);
    (at(slice), at(slice + 1))
}

fn checkpoints(run: &Path) -> PathBuf {
    run.join(FOLDER)
}

fn write_one(run: &Path, nonce: &Nonce, step: u64, slice: usize) -> anyhow::Result<FileEntry> {
    let partial = checkpoints(run).join(partial_name(step, nonce.as_str(), 0));
    let range = range(slice);
    let values: Vec<Vec<u8>> = (0..3).map(|slot| state(step, slot, range)).collect();
    let parts: Vec<Part> = ["theta", "m", "v"]
        .iter()
        .zip(&values)
        .map(|(name, bytes)| Part {
            name: format!("head.{name}"),
            elements: range.1 - range.0,
            bytes,
        })
        .collect();
    Ok(write_slices(&partial, (slice, N_SLICES), vec![range], &parts)?.entry)
}

fn manifest(nonce: &Nonce, step: u64, files: Vec<FileEntry>) -> Manifest {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.yaml");
    let identity = Identity {
        plan: configs::load(&tiny, &[]).expect("a shipped config"),
        base_model: "base".into(),
        vocabulary: "vocabulary".into(),
        tokens: "tokens".into(),
    };
    Manifest {
        format: FORMAT,
        attempt: nonce.as_str().into(),
        step,
        next_row: 12 * step,
        updates: step,
        targets_so_far: 1000 * step,
        seed: 1,
        guard: GuardState::default(),
        best: None,
        world: N_SLICES,
        zero: 1,
        unix_time: 0.0,
        config_hash: identity.config_hash(),
        identity,
        layout: "head w [5000] 0\n".into(),
        tensors: vec![TensorEntry {
            name: "head".into(),
            elements: ELEMENTS,
        }],
        chunk_bytes: CHUNK_BYTES,
        files,
    }
}

/// All that happens to the disk from the start of an attempt to its first checkpoint.
fn save(run: &Path, nonce: &Nonce, step: u64) -> anyhow::Result<()> {
    let fence = Fence::take(run, &checkpoints(run), nonce)?;
    save_under(&fence, run, step)
}

fn save_under(fence: &Fence, run: &Path, step: u64) -> anyhow::Result<()> {
    let nonce = fence.nonce();
    let files = (0..N_SLICES)
        .map(|slice| write_one(run, nonce, step, slice))
        .collect::<Result<_, _>>()?;
    let partial = checkpoints(run).join(partial_name(step, nonce.as_str(), 0));
    commit(&partial, &manifest(nonce, step, files), fence)?;
    fence.check()?;
    KEEP.prune(&checkpoints(run), step)?;
    Ok(())
}

/// A run with checkpoints of [`BEFORE`], of attempt `first`.
fn run_before() -> tempfile::TempDir {
    let run = tempfile::tempdir().expect("a folder");
    for step in BEFORE {
        save(run.path(), &Nonce::from_text("first"), step).expect("saved");
    }
    run
}

/// What an attempt finds that begins now, having taken the run over.
fn begin(run: &Path, name: &str) -> (Fence, Manifest) {
    let fence = Fence::take(run, &checkpoints(run), &Nonce::from_text(name)).expect("the run is taken over");
    let found = newest(&checkpoints(run))
        .expect("a whole checkpoint")
        .expect("one is there");
    assert!(found.rejected.is_empty(), "{:?}", found.rejected);
    (fence, found.manifest)
}

/// Whether whoever comes after an interrupted save finds a whole checkpoint of one interval ago at most, and can go on.
fn is_usable(run: &Path) -> bool {
    let (fence, found) = begin(run, "after");
    if !(STEP - 1..=STEP).contains(&found.step) {
        return false;
    }
    (found.step + 1..=STEP + 1).all(|step| save_under(&fence, run, step).is_ok())
        && newest(&checkpoints(run)).is_ok_and(|found| found.is_some_and(|found| found.manifest.step == STEP + 1))
}

// ---- Under strace -----------------------------------------------------------------------------------------------------------

fn under_strace(options: &[String], role: &str, run: &Path) -> Child {
    let mut command = Command::new("strace");
    command
        .args(options)
        .arg("--")
        .arg(std::env::current_exe().expect("a test knows where it is"));
    // The loader would look into each of its folders, and each look is a call.
    command
        .env_remove("LD_LIBRARY_PATH")
        .args(["--child", role])
        .arg(run)
        .arg("second");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("strace starts; set-up installs it")
}

/// Every call of the role's in an undisturbed save that concerns the run's folder: its name, the how manyth it is, and whether
/// the role holds the run by then.
fn every_call(role: &str) -> Vec<(&'static str, usize, bool)> {
    let run = run_before();
    let trace = tempfile::NamedTempFile::new().expect("a file");
    let traced = format!("trace={}", CALLS.join(","));
    let options = ["-y", "-o", &trace.path().display().to_string(), "-e", &traced].map(str::to_owned);
    let status = under_strace(&options, role, run.path()).wait().expect("strace ends");
    assert!(status.success(), "the {role} saves under strace: {status}");
    let text = fs::read_to_string(trace.path()).expect("a trace");
    let folder = fs::canonicalize(run.path()).expect("a folder").display().to_string();
    let taken = text
        .lines()
        .position(|line| line.starts_with("rename(") && line.contains("/run.lock\")"));
    let mut calls = Vec::new();
    for call in CALLS {
        let of_call = |line: &str| line.starts_with(&format!("{call}("));
        let lines = text.lines().enumerate().filter(|(_, line)| of_call(line)).enumerate();
        let ours = lines.filter(|(_, (_, line))| line.contains(&folder));
        calls.extend(ours.map(|(index, (place, _))| (call, index + 1, taken.is_some_and(|taken| place > taken))));
    }
    let count = |call: &str| calls.iter().filter(|(known, ..)| *known == call).count();
    let least = if role == "rank-0" {
        [8, 8, 7, 3, 1]
    } else {
        [1, 2, 1, 0, 1]
    };
    for (call, least) in CALLS.into_iter().zip(least) {
        assert!(
            count(call) >= least,
            "{role} makes {} calls of {call}: {calls:?}",
            count(call)
        );
    }
    calls
}

fn inject(call: &str, what: &str, number: usize) -> Vec<String> {
    let traced = format!("trace={}", CALLS.join(","));
    let injected = format!("inject={call}:{what}:when={number}");
    ["-o", "/dev/null", "-e", &traced, "-e", &injected]
        .map(str::to_owned)
        .to_vec()
}

fn kills(_: bool) {
    let (mut tried, mut unusable) = (0, Vec::new());
    for role in ["rank-0", "rank-1"] {
        for (call, number, _) in every_call(role) {
            let run = run_before();
            let status = under_strace(&inject(call, "signal=SIGKILL", number), role, run.path()).wait();
            assert!(
                !status.expect("strace ends").success(),
                "{role} is killed at {call} {number}"
            );
            tried += 1;
            if !is_usable(run.path()) {
                unusable.push(format!("{role} {call} {number}"));
            }
        }
    }
    println!("syscall_kills {tried} unusable {}", unusable.len());
    assert!(unusable.is_empty(), "{unusable:?}");
}

/// The short form takes every third call.
fn failures(soak: bool) {
    let faults = [
        ("write", "error=ENOSPC"),
        ("write", "error=EIO"),
        // The kernel says that it has taken one byte and has taken none.
        ("write", "retval=1"),
        ("fsync", "error=EIO"),
        ("openat", "error=EROFS"),
        ("openat", "error=ENOENT"),
        ("mkdir", "error=EACCES"),
        ("rename", "error=EIO"),
    ];
    let mut tried = 0;
    for role in ["rank-0", "rank-1"] {
        let calls = every_call(role);
        for (call, fault) in faults {
            for number in calls
                .iter()
                .filter(|(known, ..)| *known == call)
                .map(|(_, number, _)| *number)
                .step_by(if soak { 1 } else { 3 })
            {
                let run = run_before();
                let status = under_strace(&inject(call, fault, number), role, run.path())
                    .wait()
                    .expect("strace ends");
                tried += 1;
                // A library that is not found where it was looked for first is looked for elsewhere, and so on: what
                // says that it has gone well must have gone well.
                if role == "rank-0" && status.success() {
                    let whole = verify(&checkpoints(run.path()).join(step_name(STEP)));
                    assert!(whole.is_ok(), "{call} {fault} {number}: {whole:?}");
                }
                assert!(is_usable(run.path()), "{role} after {call} {fault} {number}");
            }
        }
    }
    println!("failing_calls {tried} unusable 0");
}

/// The short form takes every third call.
fn frozen(soak: bool) {
    let (mut tried, mut accepted) = (0, Vec::new());
    // Who freezes before it has taken the run is the newer attempt when it wakes: it takes the run over and chooses anew.
    let after = every_call("rank-0").into_iter().filter(|(.., taken)| *taken);
    for (call, number, _) in after.step_by(if soak { 1 } else { 3 }) {
        let run = run_before();
        let mut strace = under_strace(&inject(call, "signal=SIGSTOP", number), "rank-0", run.path());
        let Some(writer) = stopped(&mut strace) else {
            panic!("the writer froze at {call} {number}")
        };
        // The new attempt chooses, and goes on from there while the old one sleeps.
        let (fence, found) = begin(run.path(), "new");
        save_under(&fence, run.path(), found.step + 1).expect("the new attempt saves");
        kill(writer, Signal::SIGCONT).expect("the writer is there");
        strace.wait().expect("strace ends");
        save_under(&fence, run.path(), found.step + 2).expect("the new attempt goes on");
        tried += 1;
        let theirs = list(&checkpoints(run.path()))
            .expect("a list")
            .into_iter()
            .map(|(step, folder)| {
                let manifest = verify(&folder).unwrap_or_else(|error| panic!("{call} {number}: {error:#}"));
                (step, manifest.attempt)
            });
        let theirs: Vec<_> = theirs.collect();
        let right = [(found.step + 1, "new".to_owned()), (found.step + 2, "new".to_owned())];
        if theirs != right {
            accepted.push(format!("{call} {number}: {theirs:?}"));
        }
    }
    println!("frozen_writers {tried} accepted {}", accepted.len());
    assert!(accepted.is_empty(), "{accepted:?}");
}

/// The traced process, once it has been stopped by a signal: for good, not for strace's look at a call.
fn stopped(strace: &mut Child) -> Option<Pid> {
    let list = format!("/proc/{0}/task/{0}/children", strace.id());
    let started = Instant::now();
    let mut seen = 0;
    while started.elapsed() < Duration::from_secs(20) && strace.try_wait().ok()?.is_none() {
        std::thread::sleep(Duration::from_millis(2));
        let children = fs::read_to_string(&list).unwrap_or_default();
        let Some(child) = children.split_whitespace().next() else {
            continue;
        };
        seen = if matches!(process_state(child), Some('T' | 't')) {
            seen + 1
        } else {
            0
        };
        // Ten looks in a row.
        if seen == 10 {
            return child.parse().ok().map(Pid::from_raw);
        }
    }
    None
}

// ---- Power cuts -------------------------------------------------------------------------------------------------------------

/// Files and folders by number, as a disk keeps them and as the kernel shows them.
#[derive(Default)]
struct Disk {
    /// Entries by folder: what the kernel shows, and what the last fsync of the folder has left on the disk.
    shown: BTreeMap<usize, BTreeMap<String, usize>>,
    synced: BTreeMap<usize, BTreeMap<String, usize>>,
    /// Bytes by file, shown and synced.
    files: BTreeMap<usize, (Vec<u8>, usize)>,
    next: usize,
}

/// What of the unsynced a power cut leaves.
#[derive(Clone, Copy, Debug)]
enum Left {
    /// Neither names nor bytes.
    Nothing,
    /// All names, no bytes.
    Names,
    /// All names, and as many bytes, which are zero.
    Lengths,
}

impl Disk {
    const ROOT: usize = 0;

    /// What lies in `folder` now, all of it synced.
    fn read(folder: &Path) -> Disk {
        let mut disk = Disk {
            next: 1,
            ..Disk::default()
        };
        disk.take_in(Disk::ROOT, folder);
        disk.synced = disk.shown.clone();
        disk
    }

    fn take_in(&mut self, number: usize, folder: &Path) {
        self.shown.insert(number, BTreeMap::new());
        for entry in fs::read_dir(folder).expect("a folder") {
            let entry = entry.expect("an entry");
            let child = self.new_entry(number, entry.file_name().to_str().expect("a name"));
            if entry.path().is_dir() {
                self.take_in(child, &entry.path());
            } else {
                let bytes = fs::read(entry.path()).expect("a file");
                let length = bytes.len();
                self.files.insert(child, (bytes, length));
            }
        }
    }

    fn new_entry(&mut self, folder: usize, name: &str) -> usize {
        let number = self.next;
        self.next += 1;
        self.shown
            .get_mut(&folder)
            .expect("a folder")
            .insert(name.to_owned(), number);
        number
    }

    /// The folder that a path's last name lies in, and that name.
    fn parent<'p>(&self, path: &'p str) -> Option<(usize, &'p str)> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        Some((self.find(folder)?, name))
    }

    fn find(&self, path: &str) -> Option<usize> {
        path.split('/')
            .filter(|name| !name.is_empty())
            .try_fold(Disk::ROOT, |folder, name| self.shown.get(&folder)?.get(name).copied())
    }

    /// What is on the disk after a power cut, written out as a folder.
    fn after_power_cut(&self, left: Left, to: &Path) {
        self.write_out(Disk::ROOT, left, to);
    }

    fn write_out(&self, folder: usize, left: Left, to: &Path) {
        fs::create_dir_all(to).expect("a folder");
        let entries = match left {
            Left::Nothing => self.synced.get(&folder),
            _ => self.shown.get(&folder),
        };
        for (name, number) in entries.into_iter().flatten() {
            let path = to.join(name);
            match self.files.get(number) {
                None => self.write_out(*number, left, &path),
                Some((bytes, synced)) => {
                    let mut there = bytes[..*synced].to_vec();
                    if matches!(left, Left::Lengths) {
                        there.resize(bytes.len(), 0);
                    }
                    fs::write(path, there).expect("a file");
                }
            }
        }
    }
}

fn power_cuts(_: bool) {
    let run = run_before();
    let mut disk = Disk::read(run.path());
    let trace = tempfile::NamedTempFile::new().expect("a file");
    let options = ["-y", "-xx", "-s", "10000000", "-o"].map(str::to_owned).into_iter();
    let options = options.chain([
        trace.path().display().to_string(),
        "-e".into(),
        format!("trace={}", CALLS.join(",")),
    ]);
    let options: Vec<_> = options.collect();
    let status = under_strace(&options, "rank-0", run.path())
        .wait()
        .expect("strace ends");
    assert!(status.success(), "{status}");
    let text = fs::read_to_string(trace.path()).expect("a trace");
    let root = format!("{}/", fs::canonicalize(run.path()).expect("a folder").display());
    let (mut tried, mut unusable, mut committed, mut applied) = (0, Vec::new(), false, BTreeSet::new());
    for line in text.lines() {
        let Some(call) = apply(line, &root, &mut disk) else {
            continue;
        };
        applied.insert(call);
        // The save is acknowledged when the folder that holds the checkpoint's name is synced.
        let folder = disk.find("checkpoints").expect("checkpoints");
        committed |= disk.synced[&folder].contains_key(&step_name(STEP));
        for left in [Left::Nothing, Left::Names, Left::Lengths] {
            let after = tempfile::tempdir().expect("a folder");
            disk.after_power_cut(left, after.path());
            let found = newest(&checkpoints(after.path()))
                .ok()
                .flatten()
                .map(|found| found.manifest.step);
            let right = if committed {
                found == Some(STEP)
            } else {
                found >= Some(STEP - 1)
            };
            tried += 1;
            if !right || !is_usable(after.path()) {
                unusable.push(format!("{left:?} after {}: {found:?}", &line[..line.len().min(120)]));
            }
        }
    }
    assert!(committed, "the trace holds the commit");
    assert_eq!(
        applied.into_iter().collect::<Vec<_>>(),
        ["fsync", "mkdir", "openat", "rename", "write"]
    );
    println!("power_cuts {tried} unusable {}", unusable.len());
    assert!(unusable.is_empty(), "{unusable:?}");
}

/// Does to `disk` what a line of strace's did below `root`; the call, if it is one of that kind.
fn apply<'l>(line: &'l str, root: &str, disk: &mut Disk) -> Option<&'l str> {
    let (call, rest) = line.split_once('(')?;
    let result = rest.rsplit_once(" = ")?.1;
    if result.starts_with('-') {
        return None;
    }
    let strings: Vec<Vec<u8>> = rest
        .split('"')
        .skip(1)
        .step_by(2)
        .map(|text| {
            let bytes = text.split("\\x").filter(|hex| !hex.is_empty());
            bytes
                .map(|hex| u8::from_str_radix(hex, 16).expect("strace -xx"))
                .collect()
        })
        .collect();
    // -y puts a descriptor's path behind it; -xx makes it hexadecimal too.
    let of_descriptor = || {
        let path = rest.split_once('<')?.1.split_once('>')?.0;
        let bytes: Vec<u8> = match path.split_once("\\x") {
            Some(_) => path
                .split("\\x")
                .filter(|hex| !hex.is_empty())
                .map(|hex| u8::from_str_radix(hex, 16).ok())
                .collect::<Option<_>>()?,
            None => path.as_bytes().to_vec(),
        };
        String::from_utf8(bytes).ok()
    };
    let below = |path: String| {
        let inside = format!("{path}/") == root;
        path.strip_prefix(root).map(str::to_owned).or(inside.then(String::new))
    };
    let named = |index: usize| below(String::from_utf8(strings.get(index)?.clone()).ok()?);
    match call {
        "mkdir" => {
            let path = named(0)?;
            let (folder, name) = disk.parent(&path)?;
            let number = disk.new_entry(folder, name);
            disk.shown.insert(number, BTreeMap::new());
            disk.synced.insert(number, BTreeMap::new());
        }
        "openat" if rest.contains("O_CREAT") => {
            let path = named(0)?;
            let (folder, name) = disk.parent(&path)?;
            let number = disk.new_entry(folder, name);
            disk.files.insert(number, (Vec::new(), 0));
        }
        "write" => {
            let number = disk.find(&below(of_descriptor()?)?)?;
            let taken: usize = result.split_whitespace().next()?.parse().ok()?;
            disk.files.get_mut(&number)?.0.extend(&strings[0][..taken]);
        }
        "fsync" => {
            let number = disk.find(&below(of_descriptor()?)?)?;
            match disk.files.get_mut(&number) {
                Some((bytes, synced)) => *synced = bytes.len(),
                None => drop(disk.synced.insert(number, disk.shown[&number].clone())),
            }
        }
        "rename" => {
            let (from, to) = (named(0)?, named(1)?);
            let (folder, name) = disk.parent(&from)?;
            let number = disk.shown.get_mut(&folder)?.remove(name)?;
            let (folder, name) = disk.parent(&to)?;
            disk.shown.get_mut(&folder)?.insert(name.to_owned(), number);
        }
        _ => return None,
    }
    Some(call)
}

// ---- Damage -----------------------------------------------------------------------------------------------------------------

/// A generator of its own: the same damage every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

fn damage(soak: bool) {
    let run = run_before();
    let folder = checkpoints(run.path());
    let (old, new) = (folder.join(step_name(1)), folder.join(step_name(2)));
    let names: Vec<String> = fs::read_dir(&new)
        .expect("a checkpoint")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    let mut dice = Dice(7);
    let tries = if soak { 10_000 } else { 600 };
    let mut undetected = Vec::new();
    for attempt in 0..tries {
        let name = &names[dice.below(names.len())];
        let path = new.join(name);
        let whole = fs::read(&path).expect("a file");
        let mut named = name.clone();
        match attempt % 6 {
            0..=2 => {
                let mut flipped = whole.clone();
                let at = dice.below(whole.len());
                flipped[at] ^= 1 << dice.below(8);
                fs::write(&path, flipped).expect("written");
            }
            3 => fs::write(&path, &whole[..dice.below(whole.len())]).expect("written"),
            4 => fs::write(&path, fs::read(old.join(name)).expect("the other step's")).expect("written"),
            _ if dice.below(2) == 0 => fs::remove_file(&path).expect("removed"),
            _ => {
                named = "slice-00007-of-00008.safetensors".into();
                fs::write(new.join(&named), &whole).expect("written");
            }
        }
        let found = newest(&folder).expect("the older is whole").expect("one is there");
        let said = found.rejected.first().map(|(_, why)| why.clone()).unwrap_or_default();
        if found.manifest.step != 1 || !said.contains(&named) {
            undetected.push(format!("{attempt} in {named}: {said:?}"));
        }
        if named != *name {
            fs::remove_file(new.join(&named)).expect("removed");
        }
        fs::write(&path, &whole).expect("restored");
    }
    println!("damages {tries} undetected {}", undetected.len());
    assert!(undetected.is_empty(), "{undetected:?}");

    // Folders that change places, and a link where a file was.
    let aside = folder.join("aside");
    fs::rename(&new, &aside).expect("renamed");
    fs::rename(&old, &new).expect("renamed");
    let why = verify(&new).expect_err("it says that it is of step 1").to_string();
    assert!(why.contains("the folder has been renamed"), "{why}");
    fs::rename(&new, &old).expect("renamed");
    fs::rename(&aside, &new).expect("renamed");
    let file = new.join(names.iter().find(|name| name.starts_with("slice")).expect("a slice"));
    fs::rename(&file, run.path().join("elsewhere")).expect("renamed");
    std::os::unix::fs::symlink(run.path().join("elsewhere"), &file).expect("linked");
    let why = verify(&new).expect_err("a link").to_string();
    assert!(why.contains("is not a plain file"), "{why}");
}

fn recut(_: bool) {
    let run = run_before();
    let from = checkpoints(run.path()).join(step_name(2));
    let out = tempfile::tempdir().expect("a folder");
    let digests = |folder: &Path| -> Vec<String> {
        let manifest = verify(folder).expect("whole");
        manifest.files.iter().map(|file| file.blake3.clone()).collect()
    };
    let original = digests(&from);
    let mut there = from;
    for (number, n_slices) in [1, 8, 3, N_SLICES].into_iter().enumerate() {
        let to = out.path().join(number.to_string());
        there = launcher::checkpoint::reshard::reshard(&there, n_slices, &to).expect("cut anew");
        assert_eq!(digests(&there).len(), n_slices);
    }
    assert_eq!(digests(&there), original, "over 1, 8 and 3 files and back");
}
