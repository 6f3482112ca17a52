//! Whether all ranks run the same: what each reports of itself, and the table of where they differ, by host.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::text;

/// What a rank says it is and runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub host: String,
    pub process: u32,
    /// What must be alike on all ranks, as (what, which): build, config, each loaded library.
    pub runs: Vec<(String, String)>,
}

impl Report {
    /// "rank 3 on n4 (process 711)"
    pub fn name(&self, rank: usize) -> String {
        format!("rank {rank} on {} (process {})", printable(&self.host), self.process)
    }
}

/// What differs, as a sentence and a table; `None` where nothing does. `reports` by rank.
pub fn differences(reports: &[Report]) -> Option<String> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in reports.iter().flat_map(|report| &report.runs) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let mut rows = Vec::new();
    let mut accused: Vec<String> = Vec::new();
    for name in names {
        let mut kinds: Vec<(&str, Vec<usize>)> = Vec::new();
        for (rank, report) in reports.iter().enumerate() {
            let value = report
                .runs
                .iter()
                .find(|(known, _)| known == name)
                .map_or("none", |(_, value)| value);
            match kinds.iter_mut().find(|(known, _)| *known == value) {
                Some((_, ranks)) => ranks.push(rank),
                None => kinds.push((value, vec![rank])),
            }
        }
        if kinds.len() == 1 {
            continue;
        }
        // Most first; of two alike, rank 0's.
        kinds.sort_by_key(|(_, of)| std::cmp::Reverse(of.len()));
        for (index, (value, of)) in kinds.iter().enumerate() {
            let hosts = hosts(reports, of);
            if index > 0 {
                accused.push(format!("{} ({}) in {}", hosts, ranks(of), printable(name)));
            }
            rows.push(vec![printable(name), printable(value), ranks(of), hosts]);
        }
    }
    let (first, more) = accused.split_first()?;
    let more = match more.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Some(format!(
        "the ranks do not run alike: {first}{more} differs from the most; give every host the same build, config and \
         libraries (one container, one set of modules)\n{}",
        text::table(&["what", "which", "ranks", "hosts"], rows)
    ))
}

fn hosts(reports: &[Report], ranks: &[usize]) -> String {
    let mut hosts: Vec<String> = Vec::new();
    for rank in ranks {
        let host = printable(&reports[*rank].host);
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    match hosts.len() {
        0..=6 => hosts.join(", "),
        n => format!("{}, … ({n})", hosts[..5].join(", ")),
    }
}

/// "rank 3", "ranks 0 and 2", "ranks 0–5, 7 and 9"; ascending.
pub fn ranks(ranks: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == rank => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    let mut parts: Vec<String> = Vec::new();
    for (first, last) in runs {
        match last - first {
            0 => parts.push(first.to_string()),
            1 => parts.extend([first.to_string(), last.to_string()]),
            _ => parts.push(format!("{first}–{last}")),
        }
    }
    let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
    match parts.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{noun} {} and {last}", rest.join(", ")),
        Some((last, _)) => format!("{noun} {last}"),
        None => "no rank".into(),
    }
}

/// Which build the program that runs is. Two builds of the same source may differ, as they may in what they compute. It is the
/// linker's digest of all that it wrote, a few bytes of the file to read where a digest of our own takes all 200 MB of them on
/// every rank; a program without one is digested.
pub fn this_program() -> io::Result<String> {
    let program = File::open("/proc/self/exe")?;
    if let Some(id) = build_id(&program)? {
        return Ok(id);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(program)?;
    Ok(shortened(&hasher))
}

/// The GNU build id among an ELF file's notes, in hexadecimal digits; `None` where there is none, or no such file. The
/// layout is that of 64-bit little-endian files (System V ABI, chapter 5), the only ones that this program is built as.
fn build_id(file: &File) -> io::Result<Option<String>> {
    const NOTES: u32 = 4;
    const BUILD_ID: u32 = 3;
    // More than any linker leaves; what a damaged header claims is not allocated.
    const MOST_BYTES: u64 = 1 << 16;
    let u16_at = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |bytes: &[u8], at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    let u64_at = |bytes: &[u8], at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    let (mut head, mut segment) = ([0; 64], [0; 56]);
    if file.read_exact_at(&mut head, 0).is_err() || !head.starts_with(b"\x7fELF\x02\x01") {
        return Ok(None);
    }
    let (table, entry, entries) = (u64_at(&head, 32), u16_at(&head, 54), u16_at(&head, 56));
    for index in 0..entries {
        let place = table.saturating_add(u64::from(index) * u64::from(entry));
        file.read_exact_at(&mut segment, place)?;
        let (kind, offset, bytes) = (u32_at(&segment, 0), u64_at(&segment, 8), u64_at(&segment, 32));
        if kind != NOTES || bytes > MOST_BYTES {
            continue;
        }
        let mut notes = vec![0; bytes as usize];
        file.read_exact_at(&mut notes, offset)?;
        let align = u64_at(&segment, 48).clamp(4, 8) as usize;
        let mut rest = &notes[..];
        while rest.len() >= 12 {
            let (name, content) = (u32_at(rest, 0) as usize, u32_at(rest, 4) as usize);
            let kind = u32_at(rest, 8);
            let start = 12 + name.next_multiple_of(4);
            let (Some(named), Some(found)) = (rest.get(12..12 + name), rest.get(start..start + content)) else {
                break;
            };
            if kind == BUILD_ID && named == b"GNU\0" {
                return Ok(Some(found.iter().map(|byte| format!("{byte:02x}")).collect()));
            }
            rest = rest
                .get((start + content).next_multiple_of(align)..)
                .unwrap_or_default();
        }
    }
    Ok(None)
}

/// Of the libraries that this process has loaded, those whose file names begin so: file, length, and a digest of its first
/// mebibyte, which names functions and, where the linker left one, the build.
pub fn loaded(names: &[&str]) -> Vec<(String, String)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let files: Vec<&str> = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]))
        .collect();
    let find = |name: &&str| {
        let is = |file: &&&str| file.rsplit('/').next().is_some_and(|file| file.starts_with(name));
        let file = files.iter().find(is)?;
        Some((
            (*name).to_owned(),
            described(file).unwrap_or_else(|error| format!("{file} ({error})")),
        ))
    };
    names.iter().filter_map(find).collect()
}

fn described(file: &str) -> io::Result<String> {
    let opened = File::open(file)?;
    let bytes = opened.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(opened.take(1 << 20))?;
    Ok(format!("{file} ({bytes} bytes, {})", shortened(&hasher)))
}

fn shortened(hasher: &blake3::Hasher) -> String {
    hasher.finalize().to_hex()[..16].to_owned()
}

/// What another host told, fit for a terminal and one line: names are data, whatever is in them.
pub fn printable(text: &str) -> String {
    let fit: String = text
        .chars()
        .take(200)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect();
    if text.chars().nth(200).is_some() {
        fit + "…"
    } else {
        fit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(host: &str, build: &str, library: &str) -> Report {
        Report {
            host: host.into(),
            process: 1,
            runs: vec![
                ("build".into(), build.into()),
                ("libtorch_cpu.so".into(), library.into()),
            ],
        }
    }

    #[test]
    fn ranks_are_listed_shortly() {
        let cases = [
            (vec![3], "rank 3"),
            (vec![0, 2], "ranks 0 and 2"),
            (vec![0, 1, 2, 5, 6], "ranks 0–2, 5 and 6"),
        ];
        for (list, said) in cases {
            assert_eq!(ranks(&list), said);
        }
        assert_eq!(ranks(&(0..512).collect::<Vec<_>>()), "ranks 0–511");
    }

    #[test]
    fn alike_is_nothing_and_different_is_a_table_by_host() {
        let n = |host: &str| report(host, "b1", "2.11 /opt/torch");
        assert_eq!(differences(&[n("n1"), n("n2"), n("n3")]), None);
        let mixed = [
            n("n1"),
            n("n2"),
            report("n3", "b2", "2.11 /opt/torch"),
            report("n4", "b1", "2.10 /usr/lib"),
        ];
        let said = differences(&mixed).unwrap();
        assert!(
            said.starts_with("the ranks do not run alike: n3 (rank 2) in build and 1 more differs"),
            "{said}"
        );
        for piece in ["b2", "ranks 0, 1 and 3", "n1, n2, n4", "2.10 /usr/lib", "rank 3"] {
            assert!(said.contains(piece), "{piece} in {said}");
        }
        // A library that only some have loaded.
        let mut without = n("n2");
        without.runs.pop();
        assert!(differences(&[n("n1"), without]).unwrap().contains("none"));
    }

    #[test]
    fn a_build_is_told_by_what_its_linker_noted() {
        let note = |name: &[u8], kind: u32, content: &[u8]| {
            let lengths = [name.len() as u32, content.len() as u32, kind];
            let mut note: Vec<u8> = lengths.into_iter().flat_map(u32::to_le_bytes).collect();
            for part in [name, content] {
                note.extend(part);
                note.resize(note.len().next_multiple_of(4), 0);
            }
            note
        };
        // A header, one program header, and notes.
        let elf = |notes: &[u8], claimed: usize| {
            let mut bytes = b"\x7fELF\x02\x01".to_vec();
            bytes.resize(64 + 56, 0);
            bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
            bytes[54..58].copy_from_slice(&[56, 0, 1, 0]);
            bytes[64..68].copy_from_slice(&4u32.to_le_bytes());
            bytes[72..80].copy_from_slice(&120u64.to_le_bytes());
            bytes[96..104].copy_from_slice(&(claimed as u64).to_le_bytes());
            bytes[112..120].copy_from_slice(&4u64.to_le_bytes());
            bytes.extend(notes);
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), bytes).unwrap();
            file
        };
        let id = |file: tempfile::NamedTempFile| build_id(file.as_file());
        let other = note(b"GNU\0", 1, &[9; 16]);
        let ours = note(b"GNU\0", 3, &[0xab, 0xcd, 0x01]);
        let all = [&other[..], &ours].concat();
        assert_eq!(id(elf(&all, all.len())).unwrap().as_deref(), Some("abcd01"));
        assert_eq!(id(elf(&other, other.len())).unwrap(), None);
        assert_eq!(id(elf(b"", 0)).unwrap(), None);
        // Lengths that lead out of the file or the segment, and no such file at all.
        assert!(id(elf(&ours, 4000)).is_err());
        assert_eq!(id(elf(&ours, usize::MAX)).unwrap(), None);
        let endless = note(b"GNU\0", 3, &[1]);
        let cut = [&u32::MAX.to_le_bytes()[..], &endless[4..]].concat();
        assert_eq!(id(elf(&cut, cut.len())).unwrap(), None);
        let script = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(script.path(), "#!/bin/sh\n").unwrap();
        assert_eq!(build_id(script.as_file()).unwrap(), None);
    }

    #[test]
    fn a_program_and_its_libraries_are_told_by_their_content() {
        assert_eq!(this_program().unwrap(), this_program().unwrap());
        let libraries = loaded(&["libc.so", "libnothing.so"]);
        assert_eq!(libraries.len(), 1, "{libraries:?}");
        assert!(
            libraries[0].1.contains("/libc.so") && libraries[0].1.contains(" bytes, "),
            "{libraries:?}"
        );
    }

    #[test]
    fn a_hostile_host_name_is_shown_harmlessly() {
        let named = report("n1\u{1b}]0;owned\u{7}\n$(reboot)", "b", "l");
        assert_eq!(named.name(0), "rank 0 on n1?]0;owned??$(reboot) (process 1)");
        assert!(printable(&"x".repeat(5000)).chars().count() <= 201);
    }
}
