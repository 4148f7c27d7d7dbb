//! What Hugging Face adds to Jinja for chat templates: `raise_exception`, `strftime_now`, its own `tojson`.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize as _;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use thiserror::Error;

/// The template called `raise_exception`: the message is meant for the client.
#[derive(Debug, Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

pub(crate) fn install(env: &mut Environment<'_>) {
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", tojson);
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception was called").with_source(Raised(message)))
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs());
    strftime(format, now)
}

/// The common conversions of `strftime`, in UTC.
fn strftime(format: &str, unix_seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let (days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days % 7) as usize];
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let written = match characters.next() {
            Some('Y') => write!(out, "{year}"),
            Some('m') => write!(out, "{month:02}"),
            Some('d') => write!(out, "{day:02}"),
            Some('H') => write!(out, "{hour:02}"),
            Some('M') => write!(out, "{minute:02}"),
            Some('S') => write!(out, "{second:02}"),
            Some('B') => write!(out, "{month_name}"),
            Some('b') => write!(out, "{}", &month_name[..3]),
            Some('A') => write!(out, "{day_name}"),
            Some('a') => write!(out, "{}", &day_name[..3]),
            Some('F') => write!(out, "{year}-{month:02}-{day:02}"),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            Some('%') => write!(out, "%"),
            other => {
                let detail = format!(
                    "strftime_now does not know the conversion %{}",
                    other.map_or(' ', |c| c)
                );
                return Err(Error::new(ErrorKind::InvalidOperation, detail));
            }
        };
        written.expect("writing to a string cannot fail");
    }
    Ok(out)
}

/// Year, month and day of a day number since 1970-01-01 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// Python's `json.dumps(value, ensure_ascii=False)`: minijinja's own filter escapes `<` and `>` for HTML.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands keyword arguments to filters by value"
)]
fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _is_ascii_escaping_asked: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = vec![b' '; width.min(MAX_INDENT)];
            value.serialize(&mut Serializer::with_formatter(
                &mut json,
                PrettyFormatter::with_indent(&indent),
            ))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut json, PythonFormatter)),
    };
    let failed = |error| Error::new(ErrorKind::BadSerialization, "cannot write JSON").with_source(error);
    written.map_err(failed)?;
    let json = String::from_utf8(json).expect("serde_json writes UTF-8");
    Ok(Value::from_safe_string(json))
}

/// Wider indentation than this serves nobody.
const MAX_INDENT: usize = 16;

/// JSON with a space after commas and colons.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, which mark text for training, by a block that does nothing.
pub(crate) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, from_tag)) = rest.split_once("{%") {
        let Some((tag, after)) = from_tag.split_once("%}") else {
            break;
        };
        out.push_str(before);
        // Only the name is replaced, so that the white space control around it stays.
        let tag = match tag.trim_matches(['-', '+']).trim() {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        };
        out.extend(["{%", &tag, "%}"]);
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let all = "%Y-%m-%d %H:%M:%S %A %a %B %b %F %T %%";
        let leap_day = "2024-02-29 23:59:59 Thursday Thu February Feb 2024-02-29 23:59:59 %";
        assert_eq!(strftime(all, 1_709_251_199).unwrap(), leap_day);
        assert_eq!(strftime("%d %b %Y", 0).unwrap(), "01 Jan 1970");
        assert_eq!(strftime("%F", 951_868_800).unwrap(), "2000-03-01");
        assert_eq!(strftime("%F", 4_107_542_400).unwrap(), "2100-03-01");
    }

    #[test]
    fn an_unknown_conversion_is_an_error_and_not_a_wrong_date() {
        assert!(strftime("%Q", 0).is_err());
        assert!(strftime("ends in %", 0).is_err());
    }

    #[test]
    fn generation_tags_keep_their_white_space_control() {
        let source = "a{%- generation -%} b {% endgeneration +%}{% set generation = 1 %}";
        let expected = "a{%- if true -%} b {% endif +%}{% set generation = 1 %}";
        assert_eq!(without_generation_tags(source), expected);
        assert_eq!(without_generation_tags("{% generation"), "{% generation");
    }
}
