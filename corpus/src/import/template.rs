//! Templates of the config that put texts together: `{name}` stands for a text, `{{` and `}}` for the braces themselves.
//! A line that holds nothing but names is left out where all of these are empty.

use crate::{Error, Result};

/// A checked template.
#[derive(Clone, Debug)]
pub(crate) struct Template {
    /// With their ends, if they have one.
    lines: Vec<Vec<Piece>>,
}

#[derive(Clone, Debug, PartialEq)]
enum Piece {
    Literal(String),
    /// Index into the names.
    Name(usize),
}

impl Template {
    /// Reads a template. `names` are those it may use; it must use the first `n_required`. `setting` is its key in the config.
    pub fn parse(setting: &'static str, template: &str, names: &[&str], n_required: usize) -> Result<Template> {
        let bad = |reason: String| Error::BadTemplate {
            setting,
            template: template.to_owned(),
            reason,
        };
        let lines = template.split_inclusive('\n').map(|line| pieces_of(line, names));
        let lines = lines.collect::<Result<Vec<_>, _>>().map_err(bad)?;
        let uses = |name: usize| lines.iter().flatten().any(|piece| *piece == Piece::Name(name));
        match (0..n_required).find(|name| !uses(*name)) {
            Some(name) => Err(bad(format!("{{{}}} must stand in it", names[name]))),
            None => Ok(Template { lines }),
        }
    }

    /// The template with the names' values put in, in the order of the names.
    pub fn fill(&self, values: &[&str]) -> String {
        let mut text = String::new();
        for line in &self.lines {
            let said = line.iter().map(|piece| match piece {
                Piece::Literal(literal) => literal.as_str(),
                Piece::Name(name) => values[*name],
            });
            let has_names = line.iter().any(|piece| matches!(piece, Piece::Name(_)));
            if has_names && said.clone().all(|said| said.is_empty() || said == "\n") {
                continue;
            }
            text.extend(said);
        }
        text
    }
}

fn pieces_of(line: &str, names: &[&str]) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut literal = String::new();
    let mut rest = line;
    while let Some(at) = rest.find(['{', '}']) {
        literal.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(behind) = rest.strip_prefix(brace) {
            literal.push_str(brace);
            rest = behind;
            continue;
        }
        let name = (brace == "{").then(|| rest.split_once('}')).flatten();
        let Some((name, behind)) = name else {
            return Err(format!(
                "a single '{brace}'; write '{brace}{brace}' for the character itself"
            ));
        };
        let Some(known) = names.iter().position(|known| *known == name) else {
            let names: Vec<_> = names.iter().map(|name| format!("{{{name}}}")).collect();
            return Err(format!("{{{name}}} is not known; there are {}", names.join(", ")));
        };
        push_literal(&mut pieces, &mut literal);
        pieces.push(Piece::Name(known));
        rest = behind;
    }
    // The line's end stays a piece of its own, so that an empty line is known by its pieces.
    literal.push_str(rest);
    if let Some(before) = literal.strip_suffix('\n') {
        literal = before.to_owned();
        push_literal(&mut pieces, &mut literal);
        literal.push('\n');
    }
    push_literal(&mut pieces, &mut literal);
    Ok(pieces)
}

fn push_literal(pieces: &mut Vec<Piece>, literal: &mut String) {
    if !literal.is_empty() {
        pieces.push(Piece::Literal(std::mem::take(literal)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(template: &str, values: &[&str]) -> String {
        match Template::parse("prompt", template, &["a", "b"], 1) {
            Ok(template) => template.fill(values),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn names_are_filled_and_lines_of_empty_names_left_out() {
        assert_eq!(fill("<{a}>\n{b}\nend", &["x", "y"]), "<x>\ny\nend");
        assert_eq!(fill("<{a}>\n{b}\nend", &["x", ""]), "<x>\nend");
        assert_eq!(fill("<{a}>\n{b}end\n", &["x", ""]), "<x>\nend\n");
        assert_eq!(fill("{a}\n\n{{{b}}}", &["x{b}", "y"]), "x{b}\n\n{y}");
        assert_eq!(fill("{a}{b}", &["", ""]), "");
    }

    #[test]
    fn a_wrong_template_is_told_what_it_may_say() {
        assert_eq!(
            fill("{a} {c}", &[]),
            r#"prompt = "{a} {c}": {c} is not known; there are {a}, {b}"#
        );
        assert!(fill("{b}", &[]).ends_with("{a} must stand in it"));
        assert!(fill("{a} }", &[]).contains("a single '}'"));
        assert!(fill("{a", &[]).contains("a single '{'"));
    }
}
