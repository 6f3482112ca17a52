//! What `panglot model inspect` tells of a model folder: made by the worker, which knows the files, shown here.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{files, text};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    pub folder: PathBuf,
    /// Of all tensors, as they are stored.
    pub stored_bytes: u64,
    /// Sizes and constants, as read from `config.json`.
    pub config: serde_json::Value,
    pub kinds: Vec<TensorKind>,
}

/// The tensors of one name, over all layers, that are stored in one type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorKind {
    /// Hugging Face's, with * for the layer's number.
    pub name: String,
    /// Of each, as it is stored.
    pub shape: Vec<i64>,
    /// "BF16"
    pub stored: String,
    pub tensors: u64,
    /// Of all together.
    pub elements: u64,
    /// The parameter group, if they train.
    pub group: Option<String>,
    /// Elements of the LoRA pair beside each, if there is one.
    pub lora: Option<u64>,
}

impl Inspection {
    pub fn parameters(&self) -> u64 {
        self.kinds.iter().map(|kind| kind.elements).sum()
    }

    /// For people; `trains` where a config says what does.
    pub fn page(&self, trains: bool) -> String {
        let row = |kind: &TensorKind| {
            let shape: Vec<String> = kind.shape.iter().map(i64::to_string).collect();
            let mut row = vec![
                kind.name.clone(),
                shape.join(" × "),
                kind.stored.clone(),
                kind.tensors.to_string(),
                text::count(kind.elements),
            ];
            row.extend(trains.then(|| kind.training()));
            row
        };
        let mut header = vec!["tensors", ">shape", "stored", ">number", ">parameters"];
        header.extend(trains.then_some("trains"));
        let mut page = text::table(&header, self.kinds.iter().map(row));
        page.truncate(page.trim_end().len());
        page += &format!(
            "\n\n{} parameters, {} in {}: all there, and of their shapes",
            text::count(self.parameters()),
            text::bytes(self.stored_bytes),
            files::shown(&self.folder)
        );
        if trains {
            let full: u64 = self
                .kinds
                .iter()
                .filter(|kind| kind.group.is_some())
                .map(|kind| kind.elements)
                .sum();
            let lora: u64 = self
                .kinds
                .iter()
                .filter_map(|kind| Some(kind.lora? * kind.tensors))
                .sum();
            page += &format!(
                "\nof them {} train, and {} of LoRA beside them",
                text::count(full),
                text::count(lora)
            );
        }
        if self.config["family"]["model_type"] == "gpt2" {
            page += "\ndropout, if config.json names any, is not applied in training";
        }
        page
    }
}

impl TensorKind {
    fn training(&self) -> String {
        match (&self.group, self.lora) {
            (Some(group), _) => group.clone(),
            (None, Some(_)) => "LoRA".to_owned(),
            (None, None) => "no".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_a_line_a_kind_and_the_sums() {
        let kind = |name: &str, group: Option<&str>, lora| TensorKind {
            name: name.into(),
            shape: vec![3, 4],
            stored: "BF16".into(),
            tensors: 2,
            elements: 24,
            group: group.map(Into::into),
            lora,
        };
        let inspection = Inspection {
            folder: "base".into(),
            stored_bytes: 96,
            config: serde_json::json!({}),
            kinds: vec![
                kind("a.*.weight", Some("body"), None),
                kind("b.*.weight", None, Some(5)),
            ],
        };
        let page = inspection.page(true);
        assert!(
            page.contains("3 × 4") && page.contains("body") && page.contains("LoRA"),
            "{page}"
        );
        assert!(
            page.contains("\nof them 24 train, and 10 of LoRA beside them"),
            "{page}"
        );
        let page = inspection.page(false);
        assert!(page.contains("48 parameters") && !page.contains("train"), "{page}");
    }
}
