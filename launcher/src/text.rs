//! Numbers, times and tables as people read them.

use std::fmt::Display;
use std::io::Write;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};

/// Writes a line to standard error, at once: several processes write there, and what they write in pieces mixes.
pub fn say(line: impl Display) {
    let line = format!("{line}\n");
    // Nobody reads it any more where this fails; the work goes on.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// 1234567 → "1,234,567".
pub fn count(number: impl TryInto<u128>) -> String {
    let digits = number
        .try_into()
        .map_or_else(|_| "?".to_owned(), |number| number.to_string());
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// "1 language", "2 languages"; for nouns with a plain plural.
pub fn counted(number: usize, noun: &str) -> String {
    format!("{} {noun}{}", count(number), if number == 1 { "" } else { "s" })
}

pub fn bytes(number: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if number < 1024 {
        return format!("{number} B");
    }
    let power = (number.ilog2() / 10).min(UNITS.len() as u32);
    format!(
        "{:.1} {}",
        number as f64 / 1024f64.powi(power as i32),
        UNITS[power as usize - 1]
    )
}

/// "0.4 s", "12 s", "3 min 05 s", "2 h 07 min".
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let whole = seconds.round() as u64;
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// "-12.3 %": the change from `before` to `after`.
pub fn change(before: f64, after: f64) -> String {
    format!("{:+.1} %", 100.0 * (after - before) / before)
}

/// At most `length` characters, the last an ellipsis where some are left out.
pub fn shortened(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        text.to_owned()
    } else {
        text.chars().take(length - 1).chain(['…']).collect()
    }
}

/// Columns of a table: those whose header starts with `>` are aligned to the right, as numbers want.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header.iter().map(|title| title.trim_start_matches('>')));
    for row in rows {
        table.add_row(row);
    }
    for (column, title) in table.column_iter_mut().zip(header) {
        column.set_padding((2, 0));
        if title.starts_with('>') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// The first and last `n` of many rows, with a row between them that counts the rest.
pub fn ends(rows: Vec<Vec<String>>, n: usize) -> Vec<Vec<String>> {
    if rows.len() <= 2 * n + 1 {
        return rows;
    }
    let between = rows.len() - 2 * n;
    let mut gap = vec![String::new(); rows[0].len()];
    gap[0] = format!("… {} more …", count(between));
    let mut shown: Vec<_> = rows[..n].to_vec();
    shown.push(gap);
    shown.extend_from_slice(&rows[rows.len() - n..]);
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [count(0u32), count(999u32), count(1000u32), count(1_234_567u64)],
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!([counted(1, "rank"), counted(2000, "rank")], ["1 rank", "2,000 ranks"]);
        assert_eq!([bytes(17), bytes(1536), bytes(3 << 30)], ["17 B", "1.5 KiB", "3.0 GiB"]);
        let seconds = |s: f64| duration(Duration::from_secs_f64(s));
        assert_eq!(
            [seconds(0.42), seconds(12.4), seconds(185.0), seconds(7620.0)],
            ["0.4 s", "12 s", "3 min 05 s", "2 h 07 min"]
        );
        assert_eq!(
            [shortened("Quechua", 7), shortened("Quechua", 6)],
            ["Quechua", "Quech…"]
        );
        assert_eq!([change(4.0, 3.0), change(2.0, 2.5)], ["-25.0 %", "+25.0 %"]);
    }

    #[test]
    fn a_long_table_shows_its_ends() {
        let rows = (0..10).map(|i| vec![format!("row {i}"), i.to_string()]).collect();
        let text = table(&["name", ">value"], ends(rows, 2));
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        let expected = [
            "  name        value",
            "  row 0           0",
            "  row 1           1",
            "  … 6 more …",
            "  row 8           8",
            "  row 9           9",
        ];
        assert_eq!(lines, expected);
    }
}
