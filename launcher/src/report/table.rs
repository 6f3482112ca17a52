//! What a report shows, as plain tables: the one form behind the page, `--csv` and `--json`, so that all three show the same.

use serde_json::{Map, Value, json};

/// Rows of one kind of thing. A missing value is null.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    pub name: &'static str,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Value>>,
}

impl Table {
    pub fn new(name: &'static str, columns: &[&str]) -> Table {
        Table {
            name,
            columns: columns.iter().map(|&column| column.to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row with a value for each column.
    pub fn push(&mut self, row: Vec<Value>) {
        debug_assert_eq!(row.len(), self.columns.len(), "{}", self.name);
        self.rows.push(row);
    }

    /// The values of a column; empty where there is none of this name.
    pub fn column(&self, name: &str) -> impl Iterator<Item = &Value> {
        let at = self.columns.iter().position(|column| column == name);
        self.rows.iter().filter_map(move |row| row.get(at?))
    }

    /// A list of objects.
    pub fn objects(&self) -> Value {
        let object = |row: &Vec<Value>| {
            let pairs = self.columns.iter().cloned().zip(row.iter().cloned());
            Value::Object(pairs.collect::<Map<_, _>>())
        };
        self.rows.iter().map(object).collect()
    }

    /// Columns once, then a list a row; numbers as precise as a plot or a cell shows them.
    pub fn compact(&self) -> Value {
        let rows: Value = self
            .rows
            .iter()
            .map(|row| row.iter().map(rounded).collect::<Value>())
            .collect();
        json!({ "columns": self.columns, "rows": rows })
    }
}

/// Six digits: more than a screen has pixels, and a third of the bytes.
fn rounded(value: &Value) -> Value {
    match value.as_f64() {
        Some(number) if value.is_f64() && number != 0.0 => {
            let digits = 5 - number.abs().log10().floor() as i32;
            if digits > 12 {
                // Too small for a fixed number of decimals.
                return format!("{number:.5e}").parse::<f64>().map_or(Value::Null, Value::from);
            }
            let scale = 10f64.powi(digits.clamp(0, 12));
            let near = (number * scale).round() / scale;
            // Whole numbers are written without ".0".
            if near.fract() == 0.0 && near.abs() < 9e15 {
                Value::from(near as i64)
            } else {
                Value::from(near)
            }
        }
        _ => value.clone(),
    }
}

/// One file of the same table of several runs, told apart by the first column.
pub fn csv<'a>(tables: impl IntoIterator<Item = (&'a str, &'a Table)>) -> String {
    let tables: Vec<_> = tables.into_iter().collect();
    // Runs may train other groups of parameters: a column that any of them has is in the file.
    let mut columns: Vec<&str> = Vec::new();
    for column in tables.iter().flat_map(|(_, table)| &table.columns) {
        if !columns.contains(&column.as_str()) {
            columns.push(column);
        }
    }
    let mut out = line(std::iter::once("run").chain(columns.iter().copied()).map(str::to_owned));
    for (run, table) in &tables {
        let places: Vec<_> = columns
            .iter()
            .map(|column| table.columns.iter().position(|known| known == column))
            .collect();
        for row in &table.rows {
            let cells = places
                .iter()
                .map(|place| place.map_or(String::new(), |at| cell(&row[at])));
            out += &line(std::iter::once((*run).to_owned()).chain(cells));
        }
    }
    out
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// RFC 4180: quoted where a comma, a quote or a line's end is in it.
fn line(cells: impl Iterator<Item = String>) -> String {
    let quoted = cells.map(|cell| {
        if cell.contains(['"', ',', '\n', '\r']) {
            format!("\"{}\"", cell.replace('"', "\"\""))
        } else {
            cell
        }
    });
    quoted.collect::<Vec<_>>().join(",") + "\r\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_several_runs_become_one_file() {
        let mut a = Table::new("t", &["step", "lr_lora"]);
        a.push(vec![json!(1), json!(0.5)]);
        let mut b = Table::new("t", &["step", "name"]);
        b.push(vec![json!(2), json!("a \"b\", c")]);
        b.push(vec![json!(3), Value::Null]);
        let expected = "run,step,lr_lora,name\r\nx,1,0.5,\r\n\"y,z\",2,,\"a \"\"b\"\", c\"\r\n\"y,z\",3,,\r\n";
        assert_eq!(csv([("x", &a), ("y,z", &b)]), expected);
        assert_eq!(
            b.objects(),
            json!([{ "step": 2, "name": "a \"b\", c" }, { "step": 3, "name": null }])
        );
    }

    #[test]
    fn numbers_keep_six_digits_and_no_more() {
        let shown = |number: f64| rounded(&Value::from(number)).to_string();
        assert_eq!(
            [
                shown(1.234_567_89),
                shown(123_456.789),
                shown(2e-5 / 3.0),
                shown(3.0),
                shown(0.0),
                shown(-1.0 / 3.0)
            ],
            ["1.23457", "123457", "6.66667e-6", "3", "0.0", "-0.333333"]
        );
        assert_eq!(shown(f64::NAN), "null", "JSON has no NaN");
        assert_eq!(shown(1.23e-9), "1.23e-9");
        assert_eq!(rounded(&json!(1_785_000_000_123_u64)), json!(1_785_000_000_123_u64));
    }
}
