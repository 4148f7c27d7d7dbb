//! JSON written by hand: one token of a stream may not cost a tree of values.

use std::fmt::Write;

use bytes::BytesMut;

/// What log-probabilities of minus infinity are reported as: JSON has no infinities. vLLM's value.
const LOGPROB_FLOOR: f32 = -9999.0;

/// Appends `text` as it stands.
pub(crate) fn push(out: &mut BytesMut, text: &str) {
    out.extend_from_slice(text.as_bytes());
}

/// Appends a number.
pub(crate) fn push_int(out: &mut BytesMut, value: u64) {
    write!(out, "{value}").expect("BytesMut grows");
}

/// Appends a log-probability, the same digits for the same value wherever it appears.
pub(crate) fn push_logprob(out: &mut BytesMut, value: f32) {
    // NaN fails the comparison, too.
    let value = if value >= LOGPROB_FLOOR { value } else { LOGPROB_FLOOR };
    write!(out, "{value:?}").expect("BytesMut grows");
}

/// Appends `text` as a JSON string with its quotes.
pub(crate) fn push_string(out: &mut BytesMut, text: &str) {
    out.extend_from_slice(b"\"");
    push_escaped(out, text);
    out.extend_from_slice(b"\"");
}

/// Appends `text` escaped for the inside of a JSON string that goes into an SSE line.
///
/// Beyond what JSON demands this escapes U+0085, U+2028 and U+2029: some clients split lines there.
pub(crate) fn push_escaped(out: &mut BytesMut, text: &str) {
    let bytes = text.as_bytes();
    let mut written = 0;
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        let (length, code) = match byte {
            b'"' | b'\\' | 0..0x20 | 0x7f => (1, u32::from(byte)),
            0xc2 if bytes[at + 1] == 0x85 => (2, 0x85),
            0xe2 if bytes[at + 1] == 0x80 && matches!(bytes[at + 2], 0xa8 | 0xa9) => {
                (3, 0x2028 + u32::from(bytes[at + 2] - 0xa8))
            }
            _ => {
                at += 1;
                continue;
            }
        };
        out.extend_from_slice(&bytes[written..at]);
        push_escape(out, code);
        at += length;
        written = at;
    }
    out.extend_from_slice(&bytes[written..]);
}

/// Appends a value, escaped as [`push_escaped`] has it.
pub(crate) fn push_value(out: &mut BytesMut, value: &serde_json::Value) {
    push_json(out, &value.to_string());
}

/// Appends JSON that was written by somebody else, escaped as [`push_escaped`] has it.
pub(crate) fn push_json(out: &mut BytesMut, text: &str) {
    // Outside of strings none of these can occur.
    let mut written = 0;
    for (at, character) in text.char_indices() {
        if matches!(character, '\u{7f}' | '\u{85}' | '\u{2028}' | '\u{2029}') {
            push(out, &text[written..at]);
            push_escape(out, u32::from(character));
            written = at + character.len_utf8();
        }
    }
    push(out, &text[written..]);
}

fn push_escape(out: &mut BytesMut, code: u32) {
    match code {
        0x22 => out.extend_from_slice(b"\\\""),
        0x5c => out.extend_from_slice(b"\\\\"),
        0x0a => out.extend_from_slice(b"\\n"),
        0x0d => out.extend_from_slice(b"\\r"),
        0x09 => out.extend_from_slice(b"\\t"),
        _ => write!(out, "\\u{code:04x}").expect("BytesMut grows"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn escaped(text: &str) -> String {
        let mut out = BytesMut::new();
        push_string(&mut out, text);
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn every_character_survives_the_round_trip() {
        let all: String = (0..0x3000).chain(0x1f600..0x1f610).filter_map(char::from_u32).collect();
        assert_eq!(serde_json::from_str::<String>(&escaped(&all)).unwrap(), all);
    }

    #[test]
    fn nothing_in_a_string_can_end_an_sse_line() {
        assert_eq!(
            escaped("a\nb\r\u{85}\u{2028}\u{2029}\"\\\u{1}"),
            r#""a\nb\r\u0085\u2028\u2029\"\\\u0001""#
        );
    }

    #[test]
    fn values_are_escaped_like_strings() {
        let value = serde_json::json!({ "a\u{2028}": ["\u{85}\n", 1.5, null] });
        let mut out = BytesMut::new();
        push_value(&mut out, &value);
        let text = String::from_utf8(out.to_vec()).unwrap();
        assert_eq!(text, r#"{"a\u2028":["\u0085\n",1.5,null]}"#);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[test]
    fn infinite_and_undefined_logprobs_have_a_floor() {
        let print = |value| {
            let mut out = BytesMut::new();
            push_logprob(&mut out, value);
            String::from_utf8(out.to_vec()).unwrap()
        };
        assert_eq!(print(f32::NEG_INFINITY), "-9999.0");
        assert_eq!(print(f32::NAN), "-9999.0");
        assert_eq!(print(-0.1), "-0.1");
        assert_eq!(print(0.0), "0.0");
        assert_eq!(serde_json::from_str::<f32>(&print(-1e-9)).unwrap(), -1e-9);
    }
}
