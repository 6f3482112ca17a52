//! Records with named text columns, from JSONL, Parquet or Arrow alike; of each only the columns asked for are read.
//! What cannot be read goes to the sink with its line or row, and the reading goes on behind it.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::import::Sink;
use crate::import::lines::{Lines, Packing};
use crate::import::tables::{TableKind, read_table};
use crate::{Error, Result};

/// What kind of file it is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// `.txt`, `.txt.gz`, `.txt.zst`
    Text,
    /// `.jsonl`, `.jsonl.gz`, `.jsonl.zst`
    JsonLines,
    /// `.parquet`, `.arrow`
    Table(TableKind),
}

impl Format {
    pub const ENDINGS: &str = ".txt, .jsonl (also with .gz or .zst), .parquet or .arrow";

    pub fn of(path: &Path) -> Option<Format> {
        let (packing, name) = Packing::of(path);
        match (name.extension()?.to_str()?, packing) {
            ("txt", _) => Some(Format::Text),
            ("jsonl", _) => Some(Format::JsonLines),
            ("parquet", Packing::Plain) => Some(Format::Table(TableKind::Parquet)),
            ("arrow", Packing::Plain) => Some(Format::Table(TableKind::Arrow)),
            _ => None,
        }
    }

    /// For a file that the config names: JSONL also goes by the names `.json` and `.ndjson`.
    pub fn of_records(path: &Path) -> Result<Format> {
        let (_, name) = Packing::of(path);
        match (Format::of(path), name.extension().and_then(|ending| ending.to_str())) {
            (Some(format), _) if format != Format::Text => Ok(format),
            (None, Some("json" | "ndjson")) => Ok(Format::JsonLines),
            _ => Err(Error::NoRecords {
                path: path.to_path_buf(),
            }),
        }
    }
}

/// A column that is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column<'a> {
    pub name: &'a str,
    /// May be absent or null; any other column that is makes its record unreadable.
    pub optional: bool,
}

impl<'a> Column<'a> {
    pub fn required(name: &'a str) -> Column<'a> {
        Column { name, optional: false }
    }

    pub fn optional(name: &'a str) -> Column<'a> {
        Column { name, optional: true }
    }
}

/// One record: the values of the wanted columns, in the order they were asked for.
pub(crate) struct Record<'a> {
    pub place: &'a Place,
    pub values: &'a [Option<Cow<'a, str>>],
}

impl Record<'_> {
    /// The text of a column that is not optional.
    pub fn text(&self, column: usize) -> &str {
        self.values[column].as_deref().unwrap_or_default()
    }
}

/// Where a record stands.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub path: PathBuf,
    /// Line or row, from 1.
    pub number: usize,
    pub is_row: bool,
}

impl Place {
    /// The record cannot be used; `reason` says the rule and what to do.
    pub fn error(&self, reason: impl Into<String>) -> Error {
        let (path, number, reason) = (self.path.clone(), self.number, reason.into());
        if self.is_row {
            Error::BadRow {
                path,
                row: number,
                reason,
            }
        } else {
            Error::BadLine {
                path,
                line: number,
                reason,
            }
        }
    }
}

/// What is done with each record.
pub(crate) type Each<'a> = &'a mut dyn FnMut(Record, &mut dyn Sink) -> Result<()>;

/// Hands on the records of one file, in its order.
pub(crate) fn read_records(
    path: &Path,
    format: Format,
    columns: &[Column],
    sink: &mut dyn Sink,
    each: Each,
) -> Result<()> {
    match format {
        Format::Table(kind) => read_table(path, kind, columns, sink, each),
        Format::Text | Format::JsonLines => read_json_lines(path, Lines::open(path)?, columns, sink, each),
    }
}

/// JSONL: an object a line; empty lines are none.
pub(crate) fn read_json_lines(
    path: &Path,
    mut lines: Lines,
    columns: &[Column],
    sink: &mut dyn Sink,
    each: Each,
) -> Result<()> {
    let mut place = Place {
        path: path.to_path_buf(),
        number: 0,
        is_row: false,
    };
    while let Some(line) = lines.next_line()? {
        place.number = line.number;
        let text = match line.text {
            Ok(text) => text.trim(),
            Err(error) => {
                sink.unreadable(error)?;
                continue;
            }
        };
        if text.is_empty() {
            continue;
        }
        match fields_of(text, columns) {
            Ok(values) => {
                let place = &place;
                each(Record { place, values: &values }, sink)?;
            }
            Err(reason) => sink.unreadable(Error::BadJsonLine {
                path: place.path.clone(),
                line: place.number,
                reason,
                expected: expected(columns),
            })?,
        }
    }
    Ok(())
}

/// `a string field "text"`, `string fields "instruction" and "output"`.
fn expected(columns: &[Column]) -> String {
    let required = columns.iter().filter(|column| !column.optional);
    let names: Vec<_> = required.map(|column| format!("\"{}\"", column.name)).collect();
    let kind = if names.len() == 1 {
        "a string field"
    } else {
        "string fields"
    };
    format!("{kind} {}", names.join(" and "))
}

fn fields_of<'a>(line: &'a str, columns: &[Column]) -> Result<Vec<Option<Cow<'a, str>>>, String> {
    let mut json = serde_json::Deserializer::from_str(line);
    let values = Fields(columns).deserialize(&mut json).and_then(|values| {
        json.end()?;
        Ok(values)
    });
    let values = values.map_err(|e| {
        // The parser counts lines of its own, of which there is one.
        let (said, place) = (e.to_string(), format!(" at line {} column {}", e.line(), e.column()));
        said.replace(&place, &format!(" (column {})", e.column()))
    })?;
    for (column, value) in columns.iter().zip(&values) {
        match value {
            Field::Null if !column.optional => return Err(format!("`{}` is null", column.name)),
            Field::Absent if !column.optional => {
                let fields = names_of(line);
                return Err(format!("missing field `{}` among {fields}", column.name));
            }
            _ => {}
        }
    }
    Ok(values.into_iter().map(Field::text).collect())
}

fn names_of(line: &str) -> String {
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap_or_default();
    let names: Vec<_> = object.keys().map(|name| format!("`{name}`")).collect();
    if names.is_empty() {
        "no fields at all".to_owned()
    } else {
        names.join(", ")
    }
}

enum Field<'a> {
    Absent,
    Null,
    Text(Cow<'a, str>),
}

impl<'a> Field<'a> {
    fn text(self) -> Option<Cow<'a, str>> {
        match self {
            Field::Text(text) => Some(text),
            Field::Absent | Field::Null => None,
        }
    }
}

/// Takes the wanted fields out of an object and passes over the rest without keeping it.
struct Fields<'c>(&'c [Column<'c>]);

/// A string that is borrowed from the line wherever it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = Vec<Field<'de>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = Vec<Field<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values: Vec<_> = self.0.iter().map(|_| Field::Absent).collect();
        while let Some(Text(name)) = map.next_key()? {
            let Some(column) = self.0.iter().position(|column| column.name == name) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if !matches!(values[column], Field::Absent) {
                return Err(A::Error::custom(format!("field `{name}` stands there twice")));
            }
            values[column] = match map.next_value::<Option<Text>>()? {
                Some(Text(text)) => Field::Text(text),
                None => Field::Null,
            };
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: Result<&[Option<&str>], &str>) {
        let columns = [Column::required("text"), Column::optional("input")];
        match (fields_of(line, &columns), expected) {
            (Ok(values), Ok(expected)) => {
                let values: Vec<_> = values.iter().map(Option::as_deref).collect();
                assert_eq!(values, expected, "{line}");
            }
            (Err(said), Err(expected)) => assert!(said.contains(expected), "{said}"),
            (other, _) => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn wanted_fields_are_taken_and_the_rest_is_passed_over() {
        check(
            r#"{"text": "a\nb", "url": {"text": [1, {}]}}"#,
            Ok(&[Some("a\nb"), None]),
        );
        check(r#"{"input": null, "text": ""}"#, Ok(&[Some(""), None]));
        check(r#"{"te\u0078t": "x", "input": "i"}"#, Ok(&[Some("x"), Some("i")]));
        check(r#"{"text": null}"#, Err("`text` is null"));
        check(
            r#"{"words": "x", "n": 1}"#,
            Err("missing field `text` among `words`, `n`"),
        );
        check("{}", Err("missing field `text` among no fields at all"));
        check(r#"{"text": 1}"#, Err("invalid type: integer `1`, expected"));
        check(r#"{"text": "x", "text": "y"}"#, Err("field `text` stands there twice"));
        check(r#"{"text": "x"} {}"#, Err("trailing characters (column 15)"));
        check(r#"["text"]"#, Err("expected a JSON object"));
        check(r#"{"text": "\ud800"}"#, Err("column"));
    }
}
