//! Sizes and durations as people type them: `4GiB`, `90s`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, Error as _};
use serde::{Serialize, Serializer};

/// A number of bytes. Plain numbers are bytes; `K`, `M`, `G`, `T` with `B` or without are powers of 1000, with `iB`
/// powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A span of time. Plain numbers are seconds; `ms`, `s`, `m` and `h` are understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// Names: a JSON list, as vLLM takes them, or separated by commas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct NameList(pub Vec<String>);

impl FromStr for NameList {
    type Err = UnitError;

    fn from_str(typed: &str) -> Result<Self, UnitError> {
        if typed.trim_start().starts_with('[') {
            return serde_json::from_str(typed).map(Self).map_err(|_| UnitError::Syntax {
                typed: typed.to_owned(),
                wanted: "a JSON list of strings like [\"a\", \"b\"]",
            });
        }
        Ok(Self(typed.split(',').map(|name| name.trim().to_owned()).collect()))
    }
}

/// What was typed is no quantity of the kind wanted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UnitError {
    /// Not a number with a unit.
    #[error("{typed:?} is not {wanted}")]
    Syntax {
        /// What was typed.
        typed: String,
        /// What was expected, with an example.
        wanted: &'static str,
    },
    /// The number does not fit.
    #[error("{0:?} is too large")]
    TooLarge(String),
}

impl UnitError {
    fn of(self, typed: &str) -> Self {
        match self {
            Self::Syntax { wanted, .. } => Self::Syntax {
                typed: typed.to_owned(),
                wanted,
            },
            Self::TooLarge(_) => Self::TooLarge(typed.to_owned()),
        }
    }
}

/// Without the final `b`, which is optional.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("", 1),
    ("k", 1000),
    ("ki", 1 << 10),
    ("m", 1_000_000),
    ("mi", 1 << 20),
    ("g", 1_000_000_000),
    ("gi", 1 << 30),
    ("t", 1_000_000_000_000),
    ("ti", 1 << 40),
];

const SPAN_UNITS: [(&str, u64); 5] = [
    ("", 1_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(typed: &str) -> Result<Self, UnitError> {
        let unit = typed.trim_end();
        let unit = unit.strip_suffix(['b', 'B']).unwrap_or(unit);
        parse(unit, &SIZE_UNITS, "a size such as 4GiB or 500MB")
            .map(Self)
            .map_err(|error| error.of(typed))
    }
}

impl FromStr for Span {
    type Err = UnitError;

    fn from_str(typed: &str) -> Result<Self, UnitError> {
        parse(typed, &SPAN_UNITS, "a time such as 30, 30s, 500ms or 2m").map(|nanos| Self(Duration::from_nanos(nanos)))
    }
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "only fractions such as 1.5GiB go through f64, and the result is range-checked"
)]
fn parse(typed: &str, units: &[(&str, u64)], wanted: &'static str) -> Result<u64, UnitError> {
    let syntax = || UnitError::Syntax {
        typed: typed.to_owned(),
        wanted,
    };
    let too_large = || UnitError::TooLarge(typed.to_owned());
    let text = typed.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_')
        .unwrap_or(text.len());
    let number = text[..split].replace('_', "");
    let unit = text[split..].trim().to_ascii_lowercase();
    let (_, factor) = units.iter().find(|(name, _)| *name == unit).ok_or_else(syntax)?;
    if number.is_empty() {
        return Err(syntax());
    }
    if number.contains('.') {
        let value: f64 = number.parse().map_err(|_| syntax())?;
        let scaled = value * *factor as f64;
        return if scaled < 1e18 {
            Ok(scaled as u64)
        } else {
            Err(too_large())
        };
    }
    if number.len() > 20 {
        return Err(too_large());
    }
    number
        .parse::<u64>()
        .map_err(|_| too_large())?
        .checked_mul(*factor)
        .ok_or_else(too_large)
}

impl fmt::Display for ByteSize {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = match self.0 {
            bytes if bytes >= 1 << 30 => ("GiB", 1u64 << 30),
            bytes if bytes >= 1 << 20 => ("MiB", 1 << 20),
            bytes if bytes >= 1 << 10 => ("KiB", 1 << 10),
            bytes => return f.pad(&format!("{bytes} B")),
        };
        f.pad(&format!("{:.2} {unit}", self.0 as f64 / factor as f64))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}s", self.0.as_secs_f64()))
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.subsec_nanos() == 0 {
            return serializer.serialize_u64(self.0.as_secs());
        }
        serializer.serialize_str(&format!("{}ms", self.0.as_secs_f64() * 1e3))
    }
}

/// A TOML value that is a number or a string with a unit.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Integer(u64),
    Float(f64),
    Text(String),
}

impl NumberOrText {
    fn into_text(self) -> String {
        match self {
            Self::Integer(number) => number.to_string(),
            Self::Float(number) => number.to_string(),
            Self::Text(text) => text,
        }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        NumberOrText::deserialize(deserializer)?
            .into_text()
            .parse()
            .map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        NumberOrText::deserialize(deserializer)?
            .into_text()
            .parse()
            .map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_decimal_and_binary_units() {
        for (typed, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1000),
            ("1KiB", 1024),
            ("2 GB", 2_000_000_000),
            ("1.5GiB", 3 << 29),
        ] {
            assert_eq!(typed.parse(), Ok(ByteSize(bytes)), "{typed}");
        }
    }

    #[test]
    fn spans_are_seconds_unless_a_unit_says_otherwise() {
        for (typed, millis) in [
            ("30", 30_000),
            ("0.5", 500),
            ("250ms", 250),
            ("2m", 120_000),
            ("1h", 3_600_000),
        ] {
            assert_eq!(typed.parse(), Ok(Span(Duration::from_millis(millis))), "{typed}");
        }
    }

    #[test]
    fn lists_are_json_or_separated_by_commas() {
        let names = |typed: &str| typed.parse::<NameList>().map(|NameList(names)| names);
        assert_eq!(names(r#"["a", "b"]"#).unwrap(), ["a", "b"]);
        assert_eq!(names("a, b").unwrap(), ["a", "b"]);
        assert_eq!(names("*").unwrap(), ["*"]);
        assert!(matches!(names("[1]"), Err(UnitError::Syntax { .. })));
    }

    #[test]
    fn nonsense_is_named() {
        for typed in ["", "GiB", "4 apples", "-1", "1.2.3GB"] {
            assert!(
                matches!(typed.parse::<ByteSize>(), Err(UnitError::Syntax { .. })),
                "{typed}"
            );
        }
        assert_eq!(
            "99999999999T".parse::<ByteSize>(),
            Err(UnitError::TooLarge("99999999999T".to_owned()))
        );
        assert!(matches!(
            "999999999999999999999999999".parse::<Span>(),
            Err(UnitError::TooLarge(_))
        ));
    }
}
