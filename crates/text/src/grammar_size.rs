//! Refuses grammars that compile for long, by looking at what they say: the compiler has limits, but some it notices late,
//! and some costs it does not count.
//!
//! All of this errs on the side of those who mean well: each limit is far above what people write. What keeps to all of them
//! compiles within half a second, most of it in milliseconds; to find out takes microseconds, and less than a tenth of that at most.

use std::collections::HashMap;

use serde_json::{Map, Value};

use crate::grammar::GrammarError;
use crate::schema_growth::{Growth, check};

/// What is left of `multipleOf` without its trailing zeros, as an integer. The lexer has a state for each remainder:
/// 10,000 compile in 40 ms, 1,000,000 in 20 s.
const MAX_DIVISOR: u64 = 10_000;

/// Parts of a regular expression that may be left out or repeated: as many as may be passed over make states as many
/// times dearer. 1000 compile in 30 ms, 4000 in 0.3 s.
const MAX_OPTIONAL: usize = 1000;

/// Terminals that a terminal of a Lark grammar stands for, with all that those stand for: they are copied into it.
const MAX_TERMINALS: u64 = 1 << 18;

/// What a JSON schema follows in a Lark grammar.
const JSON_KEYWORD: &str = "%json";

/// Checks all JSON schemas of a grammar.
pub(crate) fn check_schemas<'a>(schemas: impl IntoIterator<Item = &'a Value>) -> Result<(), GrammarError> {
    let mut growth = Growth::default();
    for schema in schemas {
        let mut divisors = Vec::new();
        check_keywords(schema, &mut divisors)?;
        // A reference may bring any two together.
        let divisor = divisors.into_iter().fold(1, least_common_multiple);
        check("remainders of 'multipleOf'", divisor, MAX_DIVISOR)?;
        growth.add(schema)?;
    }
    Ok(())
}

/// Checks a regular expression.
pub(crate) fn check_regex(regex: &str) -> Result<(), GrammarError> {
    let what = "optional or repeated parts of a regular expression";
    check(what, num_optional(regex) as u64, MAX_OPTIONAL as u64)
}

/// Checks a Lark grammar.
pub(crate) fn check_lark(grammar: &str) -> Result<(), GrammarError> {
    check(
        "optional or repeated parts",
        num_optional(grammar) as u64,
        MAX_OPTIONAL as u64,
    )?;
    check("terminals within terminals", num_terminals(grammar), MAX_TERMINALS)?;
    check_schemas(&schemas_within(grammar))
}

/// The schemas that a Lark grammar names by `%json`. One in a string or a comment counts too.
fn schemas_within(grammar: &str) -> Vec<Value> {
    let after = grammar
        .match_indices(JSON_KEYWORD)
        .map(|(index, keyword)| &grammar[index + keyword.len()..]);
    let schema = |text| serde_json::Deserializer::from_str(text).into_iter().next();
    // What is no JSON is for the compiler to refuse.
    after.filter_map(|text| schema(text)?.ok()).collect()
}

/// Checks each keyword of a schema for itself; gathers divisors.
fn check_keywords(schema: &Value, divisors: &mut Vec<u64>) -> Result<(), GrammarError> {
    let keywords = match schema {
        Value::Array(items) => return items.iter().try_for_each(|item| check_keywords(item, divisors)),
        Value::Object(keywords) => keywords,
        _ => return Ok(()),
    };
    for (keyword, argument) in keywords {
        match (keyword.as_str(), argument) {
            // Those hold values, not schemas.
            ("enum" | "const" | "default" | "examples", _) => {}
            ("multipleOf", Value::Number(number)) => divisors.push(divisor(&number.to_string())),
            ("pattern", Value::String(regex)) => check_regex(regex)?,
            ("patternProperties", Value::Object(patterns)) => {
                patterns.keys().try_for_each(|regex| check_regex(regex))?;
                check_named(patterns, divisors)?;
            }
            ("properties" | "$defs" | "definitions", Value::Object(schemas)) => check_named(schemas, divisors)?,
            (_, part) => check_keywords(part, divisors)?,
        }
    }
    Ok(())
}

/// Schemas by names that are nobody's keywords.
fn check_named(schemas: &Map<String, Value>, divisors: &mut Vec<u64>) -> Result<(), GrammarError> {
    schemas.values().try_for_each(|schema| check_keywords(schema, divisors))
}

/// A number as people write it without its point, sign, exponent and zeros at either end.
fn divisor(number: &str) -> u64 {
    let mantissa = number.split(['e', 'E']).next().unwrap_or_default();
    let digits: String = mantissa.chars().filter(char::is_ascii_digit).collect();
    digits
        .trim_matches('0')
        .parse()
        .unwrap_or(match digits.trim_matches('0') {
            "" => 1,
            _ => u64::MAX,
        })
}

fn least_common_multiple(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x).saturating_mul(b)
}

/// Question marks, asterisks and repetitions from 0, without those that are escaped or begin a group's options. What
/// stands in brackets counts too.
fn num_optional(regex: &str) -> usize {
    let (mut count, mut last) = (0, 0);
    let mut bytes = regex.bytes();
    while let Some(byte) = bytes.next() {
        count += usize::from(match byte {
            b'?' => last != b'(',
            b'*' => true,
            b'0' => last == b'{',
            _ => false,
        });
        last = byte;
        if byte == b'\\' {
            bytes.next();
        }
    }
    count
}

/// The most terminals that one of a Lark grammar stands for. Rules are not copied, and not counted.
fn num_terminals(grammar: &str) -> u64 {
    let mut parts_of: HashMap<&str, Vec<&str>> = HashMap::new();
    let mut current = None;
    for line in grammar.lines() {
        let mut names = terminals(line).into_iter();
        // A definition may go on in lines after it.
        if line.split_once(':').is_some_and(|(name, _)| is_name(name)) {
            current = names.next();
        } else if line
            .split_once(':')
            .is_some_and(|(name, _)| !name.contains(['"', '/', '|']))
        {
            current = None;
        }
        if let Some(name) = current {
            parts_of.entry(name).or_default().extend(names);
        }
    }
    let mut sizes: HashMap<&str, u64> = HashMap::new();
    // Not by recursion: a chain of terminals may be long. Each is looked at before its parts, and again after them.
    let mut todo: Vec<(&str, bool)> = parts_of.keys().map(|name| (*name, false)).collect();
    while let Some((name, is_after)) = todo.pop() {
        let parts = parts_of.get(name).map_or(&[][..], Vec::as_slice);
        if is_after {
            let sizes_of_parts = parts.iter().map(|part| sizes.get(part).copied().unwrap_or(1));
            let size = sizes_of_parts.fold(1, u64::saturating_add);
            sizes.insert(name, size);
        } else if !sizes.contains_key(name) {
            sizes.insert(name, 1);
            todo.push((name, true));
            todo.extend(
                parts
                    .iter()
                    .filter(|part| !sizes.contains_key(*part))
                    .map(|part| (*part, false)),
            );
        }
    }
    sizes.into_values().max().unwrap_or(1)
}

/// Whether this is the name of a terminal, perhaps with a priority.
fn is_name(text: &str) -> bool {
    let name = text.split('.').next().unwrap_or_default().trim();
    name.starts_with(|first: char| first.is_ascii_uppercase() || first == '_') && terminals(name) == [name]
}

/// The names of terminals in a line, outside of strings and regular expressions.
fn terminals(line: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut rest = line;
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if first == '"' || first == '/' {
            rest = after_quoted(&rest[1..], first);
        } else if is_word(first) {
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            if !word.contains(|c: char| c.is_ascii_lowercase()) && word.contains(|c: char| c.is_ascii_uppercase()) {
                names.push(word);
            }
            rest = after;
        } else {
            rest = &rest[first.len_utf8()..];
        }
    }
    names
}

fn after_quoted(text: &str, quote: char) -> &str {
    let mut is_escaped = false;
    for (index, c) in text.char_indices() {
        if !is_escaped && c == quote {
            return &text[index + 1..];
        }
        is_escaped = !is_escaped && c == '\\';
    }
    ""
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check_schema(schema: &Value) -> Result<(), GrammarError> {
        check_schemas([schema])
    }

    #[test]
    fn divisors_count_without_zeros_and_together() {
        for honest in [
            json!(0.01),
            json!(1_000_000),
            json!(86_400),
            json!(2.5e-7),
            json!(4096),
            json!(0),
        ] {
            assert!(check_schema(&json!({ "multipleOf": honest })).is_ok(), "{honest}");
        }
        for hostile in [
            json!(999_999),
            json!(0.1234567),
            json!(982_451_653_u64),
            json!(1.234567e30),
        ] {
            assert!(
                check_schema(&json!({ "items": { "multipleOf": hostile } })).is_err(),
                "{hostile}"
            );
        }
        let two = |a, b| json!({ "allOf": [{ "multipleOf": a }, { "multipleOf": b }] });
        assert!(check_schema(&two(60, 3600)).is_ok());
        assert!(check_schema(&two(9973, 9967)).is_err());
    }

    #[test]
    fn optional_parts_of_regular_expressions_are_counted() {
        assert_eq!(num_optional(r"a?b*(?:c{0,3})d{1,0}\?\*\\?"), 4);
        let schema = |key: &str, regex: &str| match key {
            "pattern" => json!({ "pattern": regex }),
            _ => json!({ key: { regex: {} } }),
        };
        for key in ["pattern", "patternProperties"] {
            assert!(check_schema(&schema(key, &"a?".repeat(MAX_OPTIONAL))).is_ok());
            assert!(check_schema(&schema(key, &"a?".repeat(MAX_OPTIONAL + 1))).is_err());
        }
        assert!(check_regex(&"a?".repeat(MAX_OPTIONAL + 1)).is_err());
    }

    #[test]
    fn schemas_within_a_grammar_are_checked() {
        let lark = |schema: &str| format!("start: x | form\nform: \"a\" %json{schema} \"b\"\nx: %json {{}}\n");
        assert!(check_lark(&lark("{ \"multipleOf\": 60 }")).is_ok());
        assert!(check_lark(&lark("\n{ \"multipleOf\": 999999 }")).is_err());
        assert!(check_lark(&lark("{ \"multipleOf\": 999999 ")).is_ok(), "no JSON");
        assert!(check_lark("start: %json").is_ok());
    }

    #[test]
    fn terminals_count_with_all_that_they_are_made_of() {
        let doubling = |name: &str, num: usize| -> String {
            let line = |n| format!("{name}{n}: {name}{} {name}{}\n", n + 1, n + 1);
            (0..num).map(line).chain([format!("{name}{num}: \"x\"\n")]).collect()
        };
        assert_eq!(num_terminals(&doubling("T", 3)), 15);
        assert_eq!(num_terminals(&doubling("r", 60)), 1, "rules are not copied");
        assert!(check_lark(&doubling("T", 16)).is_ok());
        assert!(check_lark(&doubling("T", 60)).is_err());
        let spread = "start: A\nA.2: B\n  | \"B:\" B | /B B/\nB: C C\nC: \"c\"\n";
        assert_eq!(num_terminals(spread), 1 + 2 * 3);
        assert_eq!(
            num_terminals("A: B\nB: A\n"),
            3,
            "what goes round in circles is for the compiler to refuse"
        );
        let chain: String = (0..5000).map(|n| format!("T{n}: T{}\n", n + 1)).collect();
        assert_eq!(num_terminals(&chain), 5001);
    }
}
