//! Refuses grammars that compile for long, by looking at what they say: the compiler has limits, but some it notices late,
//! and some costs it does not count.
//!
//! All of this takes microseconds, and errs on the side of those who mean well: each limit is far above what people write,
//! and what keeps to all of them compiles within about 0.1 s.

use std::collections::HashMap;

use serde_json::Value;

use crate::grammar::GrammarError;

/// What is left of `multipleOf` without its trailing zeros, as an integer. The lexer has a state for each remainder:
/// 10,000 compile in 40 ms, 1,000,000 in 20 s.
const MAX_DIVISOR: u64 = 10_000;

/// Schemas that a schema stands for once its alternatives are multiplied out. 243 compile in 0.1 s, 729 in 0.7 s.
const MAX_ALTERNATIVES: u64 = 256;

/// Properties of one object. 1000 optional ones compile in 0.1 s, 3000 in 2 s.
const MAX_PROPERTIES: usize = 1000;

/// Parts of a regular expression that may be left out or repeated: as many as may be passed over make states as many
/// times dearer. 1000 compile in 30 ms, 4000 in 0.3 s.
const MAX_OPTIONAL: usize = 1000;

/// Terminals that a terminal of a Lark grammar stands for, with all that those stand for: they are copied into it.
const MAX_TERMINALS: u64 = 1 << 18;

/// Checks a JSON schema.
pub(crate) fn check_schema(schema: &Value) -> Result<(), GrammarError> {
    let mut divisors = Vec::new();
    let num_alternatives = check_parts(schema, &mut divisors)?;
    check("alternatives", num_alternatives, MAX_ALTERNATIVES)?;
    // A reference may bring any two together.
    let divisor = divisors.into_iter().fold(1, least_common_multiple);
    check("remainders of 'multipleOf'", divisor, MAX_DIVISOR)
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
    check("terminals within terminals", num_terminals(grammar), MAX_TERMINALS)
}

fn check(what: &'static str, count: u64, limit: u64) -> Result<(), GrammarError> {
    if count <= limit {
        return Ok(());
    }
    Err(GrammarError::TooMany { what, limit })
}

/// How many schemas this one stands for, references left out; gathers divisors.
fn check_parts(schema: &Value, divisors: &mut Vec<u64>) -> Result<u64, GrammarError> {
    let mut product = 1_u64;
    match schema {
        Value::Array(items) => {
            for item in items {
                product = product.max(check_parts(item, divisors)?);
            }
        }
        Value::Object(map) => {
            for (key, part) in map {
                let num_properties = part.as_object().map_or(0, serde_json::Map::len);
                match (key.as_str(), part) {
                    // Those hold values, not schemas.
                    ("enum" | "const" | "default" | "examples", _) => {}
                    ("multipleOf", Value::Number(number)) => divisors.push(divisor(&number.to_string())),
                    ("pattern", Value::String(regex)) => check_regex(regex)?,
                    ("anyOf" | "oneOf", Value::Array(branches)) => {
                        let mut sum = 0_u64;
                        for branch in branches {
                            sum = sum.saturating_add(check_parts(branch, divisors)?);
                        }
                        product = product.saturating_mul(sum.max(1));
                    }
                    ("allOf", Value::Array(parts)) => {
                        for part in parts {
                            product = product.saturating_mul(check_parts(part, divisors)?);
                        }
                    }
                    ("properties", _) => {
                        check("properties of an object", num_properties as u64, MAX_PROPERTIES as u64)?;
                        check_named(part, divisors)?;
                    }
                    ("patternProperties", Value::Object(patterns)) => {
                        patterns.keys().try_for_each(|regex| check_regex(regex))?;
                        check_named(part, divisors)?;
                    }
                    ("$defs" | "definitions", _) => check_named(part, divisors)?,
                    // Schemas of parts of the value: their alternatives are not multiplied with each other.
                    _ => check("alternatives", check_parts(part, divisors)?, MAX_ALTERNATIVES)?,
                }
            }
        }
        _ => {}
    }
    Ok(product)
}

/// Schemas by names that are nobody's keywords.
fn check_named(schemas: &Value, divisors: &mut Vec<u64>) -> Result<(), GrammarError> {
    let mut schemas = schemas.as_object().into_iter().flat_map(serde_json::Map::values);
    schemas.try_for_each(|schema| check("alternatives", check_parts(schema, divisors)?, MAX_ALTERNATIVES))
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

    fn any_of(num: usize) -> Value {
        let branch = |n| json!({ "properties": { format!("p{n}"): { "type": "string" } } });
        json!({ "anyOf": (0..num).map(branch).collect::<Vec<_>>() })
    }

    fn object(num_properties: usize) -> Value {
        let properties: serde_json::Map<_, _> = (0..num_properties).map(|n| (format!("p{n}"), json!({}))).collect();
        json!({ "items": { "properties": properties } })
    }

    #[test]
    fn alternatives_multiply_within_a_schema_and_not_across_properties() {
        let within = |num| json!({ "allOf": [any_of(16), any_of(num)] });
        assert!(check_schema(&within(16)).is_ok());
        let error = check_schema(&json!({ "items": within(17) })).unwrap_err();
        assert_eq!(error.to_string(), "too many alternatives: the limit is 256");
        let across = json!({ "properties": { "anyOf": any_of(200), "b": any_of(200) }, "anyOf": [{}, {}] });
        assert!(check_schema(&across).is_ok(), "a property may have a keyword's name");
        let nested = json!({ "anyOf": [any_of(200), { "oneOf": [any_of(56), {}] }] });
        assert!(check_schema(&nested).is_err());
    }

    #[test]
    fn objects_have_no_more_properties_than_compile_in_time() {
        assert!(check_schema(&object(MAX_PROPERTIES)).is_ok());
        assert!(check_schema(&object(MAX_PROPERTIES + 1)).is_err());
        assert!(
            check_schema(&json!({ "enum": [object(MAX_PROPERTIES + 1)] })).is_ok(),
            "a value"
        );
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
