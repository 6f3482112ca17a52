//! Slurm's short way to write host names, "gpu[001-003,010],rack[1-2]n[01-02]", into the names; as
//! `scontrol show hostnames` does it, without a process and without a shell.

/// As many as Slurm itself lets one list hold.
const MOST_HOSTS: usize = 1 << 16;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostlistError {
    #[error("the host list {list:?} has {found:?} at byte {at}, where {due} is due; compare `scontrol show hostnames`")]
    Unexpected {
        list: String,
        at: usize,
        found: String,
        due: &'static str,
    },
    #[error("the range {range:?} of the host list {list:?} runs backwards; write the lower number first")]
    Backwards { list: String, range: String },
    #[error("the host list {list:?} names more than {MOST_HOSTS} hosts; name fewer")]
    TooMany { list: String },
}

/// The names in order, doubles kept. Zero padding is the lower bound's; several brackets multiply: the last runs fastest,
/// and of those before it the first, which is Slurm's order.
/// A name may go on behind its bracket, which Slurm 22.05 itself refuses.
pub fn parse(list: &str) -> Result<Vec<String>, HostlistError> {
    let mut reader = Reader { list, at: 0 };
    let mut hosts = Vec::new();
    while reader.peek().is_some() {
        let more = reader.host(MOST_HOSTS - hosts.len())?;
        hosts.extend(more);
        match reader.peek() {
            None => break,
            Some(',') => reader.at += 1,
            Some(_) => return Err(reader.unexpected("a comma")),
        }
    }
    Ok(hosts)
}

struct Reader<'a> {
    list: &'a str,
    /// In bytes; always between characters.
    at: usize,
}

impl<'a> Reader<'a> {
    /// One entry between commas: plain parts and brackets in any order.
    fn host(&mut self, most: usize) -> Result<Vec<String>, HostlistError> {
        let began = self.at;
        let mut parts: Vec<Vec<String>> = Vec::new();
        let (mut count, mut last_bracket) = (1, 0);
        loop {
            match self.peek() {
                Some('[') => {
                    let numbers = self.bracket()?;
                    count *= numbers.len();
                    last_bracket = parts.len();
                    parts.push(numbers);
                }
                Some(c) if is_of_a_name(c) => parts.push(vec![self.take_while(is_of_a_name).to_owned()]),
                _ => break,
            }
            if count > most {
                return Err(self.too_many());
            }
        }
        if self.at == began {
            return Err(self.unexpected("a host's name"));
        }
        let mut names = vec![String::new()];
        for (index, part) in parts.iter().enumerate() {
            let join = |name: &String, end: &String| format!("{name}{end}");
            names = if index == last_bracket {
                names
                    .iter()
                    .flat_map(|name| part.iter().map(move |end| join(name, end)))
                    .collect()
            } else {
                part.iter()
                    .flat_map(|end| names.iter().map(move |name| join(name, end)))
                    .collect()
            };
        }
        Ok(names)
    }

    /// "[001-003,010]" → 001 002 003 010
    fn bracket(&mut self) -> Result<Vec<String>, HostlistError> {
        let mut numbers = Vec::new();
        self.at += 1;
        loop {
            let began = self.at;
            let low_digits = self.digits()?;
            let low = self.value(low_digits)?;
            let high = if self.peek() == Some('-') {
                self.at += 1;
                let digits = self.digits()?;
                self.value(digits)?
            } else {
                low
            };
            if high < low {
                let range = self.list[began..self.at].to_owned();
                let list = self.list.to_owned();
                return Err(HostlistError::Backwards { list, range });
            }
            if high - low >= (MOST_HOSTS - numbers.len()) as u64 {
                return Err(self.too_many());
            }
            let width = low_digits.len();
            numbers.extend((low..=high).map(|n| format!("{n:0width$}")));
            match self.peek() {
                Some(',') => self.at += 1,
                Some(']') => break,
                _ => return Err(self.unexpected("`,`, `-` or `]`")),
            }
        }
        self.at += 1;
        Ok(numbers)
    }

    fn digits(&mut self) -> Result<&'a str, HostlistError> {
        match self.take_while(|c| c.is_ascii_digit()) {
            "" => Err(self.unexpected("a number")),
            digits => Ok(digits),
        }
    }

    fn value(&self, digits: &str) -> Result<u64, HostlistError> {
        // More digits than a u64 holds is more hosts than there are.
        digits.parse().map_err(|_| self.too_many())
    }

    fn peek(&self) -> Option<char> {
        self.list[self.at..].chars().next()
    }

    fn take_while(&mut self, is_part: impl Fn(char) -> bool) -> &'a str {
        let rest = &self.list[self.at..];
        let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn unexpected(&self, due: &'static str) -> HostlistError {
        HostlistError::Unexpected {
            list: self.list.to_owned(),
            at: self.at,
            found: self.peek().map_or("the end".to_owned(), String::from),
            due,
        }
    }

    fn too_many(&self) -> HostlistError {
        let list = self.list.to_owned();
        HostlistError::TooMany { list }
    }
}

/// What a host may be called. Anything else in a list is a mistake, or meant for a shell.
fn is_of_a_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(list: &str, hosts: &str) {
        assert_eq!(parse(list).map(|found| found.join(" ")).as_deref(), Ok(hosts), "{list}");
    }

    #[test]
    fn lists_are_written_out() {
        check("", "");
        check("n1", "n1");
        check(
            "gpu[001-003,010],rack[1-2]n[01-02]",
            "gpu001 gpu002 gpu003 gpu010 rack1n01 rack1n02 rack2n01 rack2n02",
        );
        check("n[9-11]", "n9 n10 n11");
        check("n[098-101]-ib0", "n098-ib0 n099-ib0 n100-ib0 n101-ib0");
        check(
            "a[1-2]b[3-4]c[5-6]",
            "a1b3c5 a1b3c6 a2b3c5 a2b3c6 a1b4c5 a1b4c6 a2b4c5 a2b4c6",
        );
        check("b,a,b", "b a b");
        check("x[2,1]", "x2 x1");
        check("nid[000007]", "nid000007");
    }

    #[test]
    fn what_is_wrong_is_shown() {
        let refused = |list: &str| parse(list).unwrap_err().to_string();
        assert_eq!(
            refused("n[3-1]"),
            "the range \"3-1\" of the host list \"n[3-1]\" runs backwards; write the lower number first"
        );
        assert_eq!(
            refused("n1;reboot"),
            "the host list \"n1;reboot\" has \";\" at byte 2, where a comma is due; compare `scontrol show hostnames`"
        );
        assert!(refused("$(reboot)").contains("a host's name is due"));
        assert!(refused("n[1").contains("has \"the end\" at byte 3"));
        assert!(refused("n[]").contains("a number is due"));
        assert!(refused("n[0-99999999]").contains("more than 65536 hosts"));
        assert!(refused("n[1-999][1-999]").contains("more than 65536 hosts"));
        assert!(refused("n[1-99999999999999999999999]").contains("more than 65536 hosts"));
    }

    fn range() -> impl Strategy<Value = String> {
        (0..200u64, 0..12u64, 1..4usize, any::<bool>()).prop_map(|(low, more, width, alone)| match alone {
            true => format!("{low:0width$}"),
            false => format!("{low:0width$}-{}", low + more),
        })
    }

    fn list() -> impl Strategy<Value = String> {
        let bracket = prop::collection::vec(range(), 1..4).prop_map(|ranges| format!("[{}]", ranges.join(",")));
        let host = ("[a-z][a-z0-9-]{0,5}", prop::collection::vec(bracket, 0..3))
            .prop_map(|(name, brackets)| format!("{name}{}", brackets.concat()));
        prop::collection::vec(host, 1..4).prop_map(|hosts| hosts.join(","))
    }

    proptest! {
        #[test]
        fn a_list_is_as_long_as_its_ranges(list in list()) {
            let length = |bracket: &str| -> usize {
                bracket.split(',').map(|range| match range.split_once('-') {
                    Some((low, high)) => high.parse::<usize>().unwrap() - low.parse::<usize>().unwrap() + 1,
                    None => 1,
                }).sum()
            };
            let mut depth = 0;
            let entries: Vec<&str> = list.split(|c| {
                depth += i32::from(c == '[') - i32::from(c == ']');
                c == ',' && depth == 0
            }).collect();
            let brackets = |entry: &str| -> usize {
                entry.split('[').skip(1).map(|part| length(part.split(']').next().unwrap())).product()
            };
            let expected: usize = entries.iter().map(|entry| brackets(entry)).sum();
            let hosts = parse(&list).unwrap();
            prop_assert_eq!(hosts.len(), expected);
            // What is written out says itself.
            prop_assert_eq!(parse(&hosts.join(",")).unwrap(), hosts);
        }

        #[test]
        fn nothing_makes_it_panic(list in "[a-c0-9,\\[\\]\\-é ]{0,24}") {
            if let Ok(hosts) = parse(&list) {
                prop_assert!(hosts.iter().all(|host| host.chars().all(is_of_a_name)));
            }
        }
    }
}
