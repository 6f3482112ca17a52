//! Text columns of Parquet and Arrow IPC files, through the formats' own crates. Only the wanted columns are decoded.
//! Memory is a batch of rows: 256 for Parquet, what the writer made one (1,000 in Hugging Face datasets) for Arrow.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{DataType, Schema};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::import::Sink;
use crate::import::records::{Column, Each, Place, Record};
use crate::{Error, Result};

/// Rows of Parquet decoded at a time: documents of a whole book each still fit into memory.
const BATCH_ROWS: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableKind {
    Parquet,
    /// Arrow IPC, in the file format or, as Hugging Face datasets are, in the stream format.
    Arrow,
}

/// Why a table cannot be read (on).
enum Failure {
    /// A column that is not there, or is no text.
    Column(Error),
    /// What the format's crate says of the file.
    Damaged(String),
}

impl Failure {
    fn at(self, last: Place) -> Error {
        match self {
            Failure::Column(error) => error,
            Failure::Damaged(reason) => Error::DamagedTable {
                path: last.path,
                last_row: last.number,
                reason,
            },
        }
    }
}

type Batches = Box<dyn Iterator<Item = Result<RecordBatch, Failure>>>;

/// Hands on the rows of a table. A damaged one ends at the damage.
pub(crate) fn read_table(
    path: &Path,
    kind: TableKind,
    columns: &[Column],
    sink: &mut dyn Sink,
    each: Each,
) -> Result<()> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut place = Place {
        path: path.to_path_buf(),
        number: 0,
        is_row: true,
    };
    let opened = guarded(|| match kind {
        TableKind::Parquet => parquet_batches(path, file, columns),
        TableKind::Arrow => arrow_batches(path, file, columns),
    });
    let mut batches = match opened {
        Ok(batches) => batches,
        Err(failure) => return sink.unreadable(failure.at(place)),
    };
    loop {
        match guarded(|| {
            batches
                .next()
                .transpose()
                .map(|batch| batch.map(|batch| wanted(&batch, columns)))
        }) {
            Ok(Some((n_rows, wanted))) => read_rows(n_rows, &wanted, columns, &mut place, sink, each)?,
            Ok(None) => return Ok(()),
            Err(failure) => return sink.unreadable(failure.at(place)),
        }
    }
}

/// The crates panic on some damaged files, where they should return an error. They are done with at that point.
fn guarded<T>(read: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Failure::Damaged(
            said.unwrap_or("it does not fit the format").to_owned(),
        ))
    })
}

fn parquet_batches(path: &Path, file: File, columns: &[Column]) -> Result<Batches, Failure> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(damaged)?;
    let wanted = positions(path, builder.schema(), columns)?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), wanted);
    let batches = builder.with_projection(mask).with_batch_size(BATCH_ROWS).build();
    Ok(Box::new(batches.map_err(damaged)?.map(|batch| batch.map_err(damaged))))
}

fn arrow_batches(path: &Path, mut file: File, columns: &[Column]) -> Result<Batches, Failure> {
    let mut magic = [0; 6];
    let is_file = file.read_exact(&mut magic).is_ok() && &magic == b"ARROW1";
    file.rewind().map_err(damaged)?;
    let file = BufReader::with_capacity(256 << 10, file);
    if is_file {
        let mut file = file;
        let schema = FileReader::try_new(&mut file, None).map_err(damaged)?.schema();
        let wanted = positions(path, &schema, columns)?;
        file.rewind().map_err(damaged)?;
        let batches = FileReader::try_new(file, Some(wanted)).map_err(damaged)?;
        Ok(Box::new(batches.map(|batch| batch.map_err(damaged))))
    } else {
        let mut file = file;
        let schema = StreamReader::try_new(&mut file, None).map_err(damaged)?.schema();
        let wanted = positions(path, &schema, columns)?;
        file.rewind().map_err(damaged)?;
        let batches = StreamReader::try_new(file, Some(wanted)).map_err(damaged)?;
        Ok(Box::new(batches.map(|batch| batch.map_err(damaged))))
    }
}

fn damaged(e: impl std::fmt::Display) -> Failure {
    Failure::Damaged(e.to_string())
}

/// The places of the wanted columns in the table's schema.
fn positions(path: &Path, schema: &Schema, columns: &[Column]) -> Result<Vec<usize>, Failure> {
    let mut found = Vec::new();
    for column in columns {
        let Some((position, field)) = schema.column_with_name(column.name) else {
            if column.optional {
                continue;
            }
            let names: Vec<_> = schema.fields().iter().map(|field| field.name().as_str()).collect();
            return Err(Failure::Column(Error::NoSuchColumn {
                path: path.to_path_buf(),
                column: column.name.to_owned(),
                columns: names.join(", "),
            }));
        };
        if !is_text(field.data_type()) {
            return Err(Failure::Column(Error::ColumnWithoutText {
                path: path.to_path_buf(),
                column: column.name.to_owned(),
                found: field.data_type().to_string(),
            }));
        }
        found.push(position);
    }
    found.sort_unstable();
    Ok(found)
}

/// Old Parquet writers leave out that a column of bytes is text, so bytes are taken where they are UTF-8.
fn is_text(kind: &DataType) -> bool {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => true,
        DataType::Dictionary(_, values) => is_text(values),
        // What a writer makes of a column in which every value is null.
        DataType::Null => true,
        _ => false,
    }
}

/// The number of rows, and of the wanted columns those that are there.
fn wanted(batch: &RecordBatch, columns: &[Column]) -> (usize, Vec<Option<ArrayRef>>) {
    let of = |column: &Column| batch.column_by_name(column.name).map(spelled_out);
    (batch.num_rows(), columns.iter().map(of).collect())
}

fn read_rows(
    n_rows: usize,
    arrays: &[Option<ArrayRef>],
    columns: &[Column],
    place: &mut Place,
    sink: &mut dyn Sink,
    each: Each,
) -> Result<()> {
    for row in 0..n_rows {
        place.number += 1;
        let values = columns.iter().zip(arrays).map(|(column, array)| {
            let bytes = array.as_deref().and_then(|array| cell(array, row));
            match bytes.map(std::str::from_utf8) {
                Some(Ok(text)) => Ok(Some(Cow::Borrowed(text))),
                Some(Err(e)) => Err(place.error(format!(
                    "column '{}' is not UTF-8 from its byte {} on; convert the text",
                    column.name,
                    e.valid_up_to() + 1
                ))),
                None if column.optional => Ok(None),
                None => Err(place.error(format!(
                    "column '{}' is null; give every row a text, or let such rows be skipped",
                    column.name
                ))),
            }
        });
        match values.collect::<Result<Vec<_>>>() {
            Ok(values) => each(Record { place, values: &values }, sink)?,
            Err(error) => sink.unreadable(error)?,
        }
    }
    Ok(())
}

/// A dictionary-encoded column row by row.
fn spelled_out(array: &ArrayRef) -> ArrayRef {
    let spelled = array
        .as_any_dictionary_opt()
        .and_then(|dictionary| arrow_select::take::take(dictionary.values(), dictionary.keys(), None).ok());
    spelled.unwrap_or_else(|| array.clone())
}

fn cell(array: &dyn Array, row: usize) -> Option<&[u8]> {
    if array.is_null(row) {
        return None;
    }
    match array.data_type() {
        DataType::Utf8 => Some(array.as_string::<i32>().value(row).as_bytes()),
        DataType::LargeUtf8 => Some(array.as_string::<i64>().value(row).as_bytes()),
        DataType::Utf8View => Some(array.as_string_view().value(row).as_bytes()),
        DataType::Binary => Some(array.as_binary::<i32>().value(row)),
        DataType::LargeBinary => Some(array.as_binary::<i64>().value(row)),
        DataType::BinaryView => Some(array.as_binary_view().value(row)),
        _ => None,
    }
}
