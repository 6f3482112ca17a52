//! The page: one HTML file with its style, its scripts and everything shown as JSON. What draws it lies in `page/`.

use serde_json::{Map, Value, json};

use super::{Run, outline};
use crate::checkpoint::commit::unix_time;

/// Steps that the page has of a run at most: more than a plot has pixels. `--csv` and `--json` have all.
pub const MOST_STEPS: usize = 1200;

const PAGE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/style.css");
/// In the order in which one needs the other.
const SCRIPTS: [&str; 7] = [
    include_str!("page/plots.js"),
    include_str!("page/runs.js"),
    include_str!("page/learning.js"),
    include_str!("page/languages.js"),
    include_str!("page/table.js"),
    include_str!("page/machine.js"),
    include_str!("page/page.js"),
];

/// The page of these runs, side by side if there are several.
pub fn page(runs: &[Run]) -> String {
    let labels: Vec<&str> = runs.iter().map(|run| run.label.as_str()).collect();
    let script = SCRIPTS.join("\n");
    let data = for_script(&json!({
        "panglot": env!("CARGO_PKG_VERSION"),
        "unix_time": unix_time(),
        "land": if runs.iter().any(has_places) { outline::land() } else { Vec::new() },
        "runs": runs.iter().map(compact).collect::<Value>(),
    }));
    // In one pass over the page: what is put in is not looked at again, whatever it holds.
    let mut out = String::with_capacity(PAGE.len() + STYLE.len() + script.len() + data.len());
    let mut rest = PAGE;
    while let Some((before, (name, behind))) = rest
        .split_once("{{")
        .and_then(|(before, at)| Some((before, at.split_once("}}")?)))
    {
        out += before;
        match name {
            "title" => out += &escape(&labels.join(" and ")),
            "style" => out += STYLE,
            "script" => out += &script,
            "data" => out += &data,
            other => unreachable!("page.html asks for {other}"),
        }
        rest = behind;
    }
    out + rest
}

fn compact(run: &Run) -> Value {
    let mut all = Map::new();
    all.insert("label".to_owned(), json!(run.label));
    all.insert("folder".to_owned(), json!(crate::files::shown(&run.folder)));
    for table in run.tables() {
        let table = if table.name == run.thinned.name {
            &run.thinned
        } else {
            table
        };
        // Groups' means are drawn from the languages.
        if table.name != "groups" {
            all.insert(table.name.to_owned(), table.compact());
        }
    }
    Value::Object(all)
}

fn has_places(run: &Run) -> bool {
    run.languages.column("latitude").any(|latitude| !latitude.is_null())
}

/// JSON that may stand inside a script element: no data ends it.
fn for_script(value: &Value) -> String {
    value
        .to_string()
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

/// Text that is safe inside an element.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
