//! What a run must have in common with the one that wrote a checkpoint, and in what two of them differ.

use configs::Plan;
use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    pub plan: Plan,
    /// Digests of what the run reads and a checkpoint does not hold.
    pub base_model: String,
    pub vocabulary: String,
    pub tokens: String,
}

impl Identity {
    pub fn config_hash(&self) -> String {
        let text = serde_json::to_vec(&self.plan).expect("a plan is plain data");
        blake3::hash(&text).to_hex().to_string()
    }
}

/// One setting in which two plans differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// As `panglot plan --json` names it, such as `optimizer.groups.lora.lr`.
    pub key: String,
    pub theirs: String,
    pub ours: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}: {} → {}", self.key, self.theirs, self.ours)
    }
}

/// In what two runs differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// They change what a run computes, and nobody allowed them.
    pub refused: Vec<Difference>,
    /// They change what a run computes; `checkpoint.allow_changed` names them.
    pub allowed: Vec<Difference>,
    /// How a run is spread, watched and kept: no number changes beyond the rounding of sums.
    pub harmless: Vec<Difference>,
}

/// Keys of the plan that change no number beyond the rounding of sums. `folders` and the like are told apart by digests.
const HARMLESS: [&str; 8] = [
    "train.micro_rows",
    "train.recompute",
    "train.zero",
    "train.shard_frozen",
    "train.offload_optimizer",
    "train.check_ranks_every",
    "train.device",
    "launch",
];
/// As [`HARMLESS`], and not worth a word when a run is resumed.
const SILENT: [&str; 8] = [
    "name",
    "folders",
    "corpus",
    "model",
    "checkpoint",
    "evaluation",
    "debug",
    "hardware",
];
/// A checkpoint holds what was trained on top of these; without them it is nothing.
pub const NEVER_ALLOWED: [&str; 2] = ["base_model", "vocabulary"];

pub fn differences(theirs: &Identity, ours: &Identity) -> Differences {
    let value = |identity: &Identity| serde_json::to_value(identity).expect("an identity is plain data");
    let mut all = Vec::new();
    compare("", &value(theirs), &value(ours), &mut all);
    let allowed = &ours.plan.checkpoint.allow_changed;
    let mut found = Differences::default();
    for mut difference in all {
        let of_plan = difference.key.strip_prefix("plan.").map(str::to_owned);
        // The digests' names are keys of the identity, and `vocabulary` of the plan as well.
        let digest = of_plan.is_none();
        difference.key = of_plan.unwrap_or(difference.key);
        let under = |keys: &[&str]| keys.iter().any(|key| is_under(&difference.key, key));
        let named = allowed.iter().any(|key| is_under(&difference.key, key)) && !(digest && under(&NEVER_ALLOWED));
        let kind = match () {
            () if !digest && under(&SILENT) => continue,
            () if !digest && under(&HARMLESS) => &mut found.harmless,
            () if named => &mut found.allowed,
            () => &mut found.refused,
        };
        kind.push(difference);
    }
    found
}

/// What decides, with a checkpoint's own numbers, which model it is.
const MAKES_THE_MODEL: [&str; 4] = ["base_model", "vocabulary", "train.lora", "train.full"];

impl Differences {
    /// Those by which the checkpoint would be read as another model; how it came about is no matter.
    pub fn of_the_model(mut self) -> Differences {
        let makes = |it: &Difference| MAKES_THE_MODEL.iter().any(|key| is_under(&it.key, key));
        self.refused.retain(makes);
        self.allowed.retain(makes);
        self.harmless.clear();
        self
    }

    /// What to say where some are refused.
    pub fn refusal(&self, checkpoint: &std::path::Path) -> Option<String> {
        if self.refused.is_empty() {
            return None;
        }
        let lines: Vec<String> = self.refused.iter().map(Difference::to_string).collect();
        let keys: Vec<&str> = self.refused.iter().map(|it| it.key.as_str()).collect();
        let remedy = if keys.iter().any(|key| NEVER_ALLOWED.contains(key)) {
            "restore them, or set another folders.run for a new run".to_owned()
        } else {
            format!(
                "restore them, set another folders.run for a new run, or go on with what has changed: \
                 checkpoint.allow_changed: [{}]",
                keys.join(", ")
            )
        };
        Some(format!(
            "{} was written by a run with other settings:\n  {}\n{remedy}",
            checkpoint.display(),
            lines.join("\n  ")
        ))
    }
}

fn is_under(key: &str, section: &str) -> bool {
    key.strip_prefix(section)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn compare(path: &str, theirs: &Value, ours: &Value, found: &mut Vec<Difference>) {
    match (theirs.as_object(), ours.as_object()) {
        (Some(a), Some(b)) => {
            let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            for key in keys {
                let (a, b) = (a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null));
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                compare(&path, a, b, found);
            }
        }
        _ if theirs != ours => found.push(Difference {
            key: path.to_owned(),
            theirs: theirs.to_string(),
            ours: ours.to_string(),
        }),
        _ => {}
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn plan() -> Plan {
        let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.yaml");
        configs::load(&tiny, &[]).unwrap()
    }

    fn identity(overrides: &[&str]) -> Identity {
        let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.yaml");
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        Identity {
            plan: configs::load(&tiny, &overrides).unwrap(),
            base_model: "1".into(),
            vocabulary: "2".into(),
            tokens: "3".into(),
        }
    }

    fn keys(found: &[Difference]) -> Vec<&str> {
        found.iter().map(|it| it.key.as_str()).collect()
    }

    #[test]
    fn what_matters_is_refused_what_is_named_is_allowed_and_the_rest_is_told() {
        let theirs = identity(&[]);
        let change = [
            "optimizer.lr_lora=0.001",
            "train.zero=2",
            "name=other",
            "launch.ranks=2",
        ];
        let found = differences(&theirs, &identity(&change));
        assert_eq!(keys(&found.refused), ["optimizer.groups.lora.lr"]);
        assert_eq!(keys(&found.harmless), ["train.zero", "launch.ranks"]);
        assert_eq!(
            found.refusal(std::path::Path::new("step-00000020")).unwrap(),
            "step-00000020 was written by a run with other settings:\n  optimizer.groups.lora.lr: 0.005 → 0.001\n\
             restore them, set another folders.run for a new run, or go on with what has changed: \
             checkpoint.allow_changed: [optimizer.groups.lora.lr]"
        );
        for allow in ["[optimizer.groups.lora.lr]", "[optimizer]"] {
            let allow = format!("checkpoint.allow_changed={allow}");
            let found = differences(&theirs, &identity(&[change[0], &allow]));
            assert_eq!(keys(&found.allowed), ["optimizer.groups.lora.lr"]);
            assert_eq!(found.refusal(std::path::Path::new("x")), None);
        }
        // A part of a name is not the name.
        let found = differences(&theirs, &identity(&[change[0], "checkpoint.allow_changed=[optim]"]));
        assert_eq!(keys(&found.refused), ["optimizer.groups.lora.lr"]);
    }

    #[test]
    fn another_corpus_may_be_named_and_another_base_may_not() {
        let theirs = identity(&[]);
        let mut ours = identity(&["checkpoint.allow_changed=[tokens]"]);
        ours.tokens = "4".into();
        assert_eq!(keys(&differences(&theirs, &ours).allowed), ["tokens"]);
        ours.base_model = "4".into();
        // As a plan that was not checked might have it.
        ours.plan.checkpoint.allow_changed.push("base_model".into());
        let found = differences(&theirs, &ours);
        assert_eq!(keys(&found.refused), ["base_model"]);
        assert!(
            !found
                .refusal(std::path::Path::new("x"))
                .unwrap()
                .contains("allow_changed")
        );
    }
}
