//! With what a run was made: its plan, where it ran, how it was measured.

use std::collections::BTreeSet;

use configs::Plan;
use serde_json::{Value, json};

use super::Evaluations;
use super::table::Table;
use crate::history::{Happening, What};
use crate::text;

/// The plan by paths of keys.
pub fn plan_table(plan: &Plan) -> Table {
    let mut table = Table::new("plan", &["key", "value"]);
    if let Ok(value) = serde_json::to_value(plan) {
        flatten(String::new(), &value, &mut table);
    }
    table
}

fn flatten(path: String, value: &Value, table: &mut Table) {
    let below = |key: &str| {
        if path.is_empty() {
            key.to_owned()
        } else {
            format!("{path}.{key}")
        }
    };
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (key, value) in fields {
                flatten(below(key), value, table);
            }
        }
        Value::Array(items) if items.iter().any(|item| item.is_object()) => {
            for (at, item) in items.iter().enumerate() {
                flatten(below(&at.to_string()), item, table);
            }
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(words).collect();
            table.push(vec![json!(path), json!(items.join(", "))]);
        }
        Value::Null => {}
        other => table.push(vec![json!(path), json!(words(other))]),
    }
}

fn words(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Where it ran and how it was measured. What differed between attempts is listed once each.
pub fn environment(history: &[Happening], evaluations: &Evaluations) -> Table {
    let mut seen: Vec<(String, BTreeSet<String>)> = Vec::new();
    let mut say = |key: &str, value: String| {
        if value.is_empty() {
            return;
        }
        match seen.iter_mut().find(|(known, _)| known == key) {
            Some((_, values)) => drop(values.insert(value)),
            None => seen.push((key.to_owned(), BTreeSet::from([value]))),
        }
    };
    for line in history {
        let What::Began { environment: it, .. } = &line.what else {
            continue;
        };
        say("panglot", it.panglot.clone());
        say("first rank's host", it.host.clone());
        say("job", it.job.clone());
        say(
            "ranks",
            format!("{}, {} of them on the first host", it.ranks, it.ranks_on_this_host),
        );
        say("collectives", it.engine.clone());
        say("device", it.device.clone());
        say("processor", it.processor.clone());
        say("cores", it.cores.to_string());
        say("memory of the host", text::bytes(it.memory_bytes));
        say("kernel", it.kernel.clone());
        for (name, which) in &it.libraries {
            say(name, which.clone());
        }
    }
    for (which, evaluation) in [("before", evaluations.before), ("after", evaluations.after)] {
        let Some(evaluation) = evaluation else { continue };
        let mut say = |what: &str, value: &str| say(&format!("measured {which}: {what}"), value.to_owned());
        say("model", &evaluation.model);
        say("precision", &evaluation.precision);
        if let Some(made) = &evaluation.made_by {
            say("protocol", &made.protocol);
            say("model's digest", &made.model_digest);
            say("tokenizer's digest", &made.tokenizer_digest);
            say("data's digest", &made.data_digest);
            say("panglot", &made.panglot);
        }
    }
    let mut table = Table::new("environment", &["key", "value"]);
    for (key, values) in seen {
        let values: Vec<String> = values.into_iter().collect();
        table.push(vec![json!(key), json!(values.join("; "))]);
    }
    table
}
