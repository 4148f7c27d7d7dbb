//! Parts of a request that could take far more memory than their text: refused, or kept as text, while they are read.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error, IgnoredAny, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// How the reasons of refusals begin: what is said of a field comes from serde as text alone.
const TOO_MANY: &str = "too many elements";
const TOO_LONG: &str = "too long";

/// The code of a field that could not be read for this reason.
pub(crate) fn code_of(reason: &str) -> &'static str {
    if reason.starts_with(TOO_MANY) {
        "array_above_max_length"
    } else if reason.starts_with(TOO_LONG) {
        "string_above_max_length"
    } else {
        "invalid_type"
    }
}

/// That a list has more than `limit` elements.
pub(crate) fn too_many<E: Error>(limit: usize) -> E {
    E::custom(format_args!("{TOO_MANY}, the limit is {limit}"))
}

/// That a text has more than `limit` of a unit.
fn too_long<E: Error>(limit: usize, unit: &str) -> E {
    E::custom(format_args!("{TOO_LONG}, the limit is {limit} {unit}"))
}

/// What an element of a list is to the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Worth {
    /// It says something.
    Kept,
    /// It is the same without it.
    Dropped,
    /// The request will be refused for it: what follows makes no difference.
    Last,
}

/// An element of a list that may be long.
pub(crate) trait Element {
    /// Judged when it was read: elements of next to no text may not fill memory.
    fn worth(&self) -> Worth {
        Worth::Kept
    }
}

impl Element for String {}
impl Element for crate::lenient::Int {}
impl<T: Element> Element for crate::lenient::Object<T> {
    fn worth(&self) -> Worth {
        self.0.worth()
    }
}

/// For `deserialize_with`: a list of at most `MAX` elements, or `null`.
pub(crate) fn list<'de, const MAX: usize, T, D>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    T: Deserialize<'de> + Element,
    D: Deserializer<'de>,
{
    let list: Option<List<T, MAX>> = Option::deserialize(deserializer)?;
    Ok(list.map(|List(elements)| elements))
}

/// A list of at most `MAX` elements.
#[derive(Debug)]
struct List<T, const MAX: usize>(Vec<T>);

impl<'de, T: Deserialize<'de> + Element, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de> + Element, const MAX: usize> Visitor<'de> for ListVisitor<T, MAX> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a sequence")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Vec<T>, A::Error> {
                elements(Vec::new(), seq, MAX)
            }
        }
        deserializer
            .deserialize_seq(ListVisitor::<T, MAX>(PhantomData))
            .map(List)
    }
}

/// Adds the rest of a list to its beginning.
///
/// # Errors
/// It has more than `limit` elements, or one that cannot be read.
pub(crate) fn elements<'de, T, A>(mut elements: Vec<T>, mut seq: A, limit: usize) -> Result<Vec<T>, A::Error>
where
    T: Deserialize<'de> + Element,
    A: SeqAccess<'de>,
{
    let mut num_seen = elements.len();
    while let Some(element) = seq.next_element::<T>()? {
        num_seen += 1;
        if num_seen > limit {
            return Err(too_many(limit));
        }
        match element.worth() {
            Worth::Kept => elements.push(element),
            Worth::Dropped => {}
            Worth::Last => {
                elements.push(element);
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                break;
            }
        }
    }
    // Most are short; what a long one grew beyond its need would be kept for as long as it.
    elements.shrink_to_fit();
    Ok(elements)
}

/// A string of at most `MAX_CHARS` characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShortText<const MAX_CHARS: usize>(pub(crate) String);

impl<'de, const MAX_CHARS: usize> Deserialize<'de> for ShortText<MAX_CHARS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.chars().nth(MAX_CHARS) {
            None => Ok(Self(text)),
            Some(_) => Err(too_long(MAX_CHARS, "characters")),
        }
    }
}

/// Any JSON, as text without white space: values take up to eighty times as much. Cheap to clone.
///
/// The text is only known to be JSON on its surface: what it says may still be refused when it is parsed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct JsonText<const MAX_BYTES: usize>(Arc<str>);

impl<const MAX_BYTES: usize> JsonText<MAX_BYTES> {
    /// The text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is an object.
    pub(crate) fn is_object(&self) -> bool {
        self.0.starts_with('{')
    }

    /// Whether it is a string.
    pub(crate) fn is_string(&self) -> bool {
        self.0.starts_with('"')
    }

    /// The value.
    ///
    /// # Errors
    /// It is no `T`, or nested too deep.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(&self.0)
    }
}

impl<const MAX_BYTES: usize> fmt::Debug for JsonText<MAX_BYTES> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de, const MAX_BYTES: usize> Deserialize<'de> for JsonText<MAX_BYTES> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Borrowed: of one that is too long nothing is copied.
        let raw = <&RawValue>::deserialize(deserializer)?;
        match compact(raw.get(), MAX_BYTES) {
            Some(text) => Ok(Self(text.into())),
            None => Err(too_long(MAX_BYTES, "bytes")),
        }
    }
}

/// JSON without the white space between its tokens.
pub(crate) fn without_white_space(json: &str) -> String {
    compact(json, json.len()).unwrap_or_default()
}

/// JSON without the white space between its tokens; `None` if more than `max_bytes` are left.
fn compact(json: &str, max_bytes: usize) -> Option<String> {
    let mut left = String::with_capacity(json.len().min(max_bytes));
    let mut rest = json;
    while !rest.is_empty() {
        let (token, after) = rest.split_at(token_bytes(rest));
        if left.len() + token.len() > max_bytes {
            return None;
        }
        left.push_str(token);
        rest = after.trim_start_matches([' ', '\t', '\r', '\n']);
    }
    Some(left)
}

/// Bytes of the string that a text begins with, or of what comes before the next string or white space.
fn token_bytes(json: &str) -> usize {
    let bytes = json.as_bytes();
    if bytes[0] != b'"' {
        let is_end = |byte: &u8| matches!(byte, b'"' | b' ' | b'\t' | b'\r' | b'\n');
        return bytes.iter().position(is_end).unwrap_or(bytes.len());
    }
    let mut at = 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            // Whatever it escapes.
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lenient::Int;

    #[derive(serde::Deserialize, Debug, Default)]
    #[serde(default)]
    struct Body {
        #[serde(deserialize_with = "list::<3, _, _>")]
        ids: Option<Vec<Int>>,
        #[serde(deserialize_with = "list::<5, _, _>")]
        judged: Option<Vec<Judged>>,
        json: Option<JsonText<8>>,
        text: Option<ShortText<3>>,
    }

    #[derive(serde::Deserialize, Debug, PartialEq)]
    struct Judged(u8);

    impl Element for Judged {
        fn worth(&self) -> Worth {
            match self.0 {
                0 => Worth::Dropped,
                9 => Worth::Last,
                _ => Worth::Kept,
            }
        }
    }

    fn read(json: &str) -> Result<Body, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn a_list_is_read_up_to_its_limit() {
        assert_eq!(read(r#"{"ids":[1,2,3.0]}"#).unwrap().ids.unwrap().len(), 3);
        assert!(read(r#"{"ids":null}"#).unwrap().ids.is_none());
        assert!(read("{}").unwrap().ids.is_none());
        let refused = read(r#"{"ids":[1,2,3,4,"not even read"]}"#).unwrap_err();
        assert!(refused.starts_with("too many elements, the limit is 3"), "{refused}");
        assert_eq!(code_of(&refused), "array_above_max_length");
        assert_eq!(code_of(&read(r#"{"ids":5}"#).unwrap_err()), "invalid_type");
    }

    #[test]
    fn what_makes_no_difference_is_not_kept_but_counts() {
        let judged = |json: &str| read(json).map(|body| body.judged.unwrap());
        assert_eq!(judged(r#"{"judged":[0,1,0,2]}"#).unwrap(), [Judged(1), Judged(2)]);
        assert!(judged(r#"{"judged":[0,0,0,0,0,0]}"#).is_err());
        assert_eq!(
            judged(r#"{"judged":[1,9,2,"and more",{},[],0,0,0]}"#).unwrap(),
            [Judged(1), Judged(9)]
        );
    }

    #[test]
    fn a_short_text_is_measured_in_characters() {
        assert_eq!(read(r#"{"text":"ééé"}"#).unwrap().text.unwrap().0, "ééé");
        let refused = read(r#"{"text":"eeee"}"#).unwrap_err();
        assert_eq!(code_of(&refused), "string_above_max_length", "{refused}");
    }

    #[test]
    fn json_stays_text_without_its_white_space() {
        let json =
            |text: &str| read(&format!("{{\"json\":{text}}}")).map(|body| body.json.unwrap().as_str().to_owned());
        for (text, kept) in [
            ("{ \"a\" :\t1\n}", r#"{"a":1}"#),
            (r#""a \" b""#, r#""a \" b""#),
            (r#"["\\", 1]"#, r#"["\\",1]"#),
            (" 1.0 ", "1.0"),
            ("[ ]", "[]"),
            (r#""\\" "#, r#""\\""#),
            ("      [ 1 ,   2    ]", "[1,2]"),
        ] {
            assert_eq!(json(text).unwrap(), kept, "{text}");
        }
        let refused = json("[1,2,3,45]").unwrap_err();
        assert_eq!(code_of(&refused), "string_above_max_length", "{refused}");
        assert!(read(r#"{"json":null}"#).unwrap().json.is_none());
        assert!(json("[1,]").is_err());
    }
}
