//! What the document of `/openapi.json` says of request bodies, held against the types they are read into.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeOwned, Deserializer, Error, Visitor};
use serde_json::{Map, Value, json};

use super::responses::body::{FlatFormat, FlatTool, Item, ResponsesBody, TextOptions};
use super::types::{
    CalledFunction, ChatMessage, ContentPart, DetokenizeBody, GenerationBody, NamedSchema, ResponseFormat,
    StreamOptions, StructuredOutputs, TokenizeBody, Tool, ToolCall, ToolFunction,
};

/// Gives away the fields that a derived `Deserialize` asks for, and nothing else.
struct FieldsOf;

/// The fields, on their way out of a deserialisation that gives no value.
#[derive(Debug)]
struct Fields(Vec<&'static str>);

impl fmt::Display for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl std::error::Error for Fields {}

impl Error for Fields {
    fn custom<T: fmt::Display>(message: T) -> Self {
        panic!("not a struct: {message}")
    }
}

impl<'de> Deserializer<'de> for FieldsOf {
    type Error = Fields;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Fields> {
        Err(Fields::custom("any"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Fields> {
        Err(Fields(fields.to_vec()))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct seq
        tuple tuple_struct map enum identifier ignored_any
    }
}

/// A type that part of a request is read into.
struct RequestType {
    fields: BTreeSet<&'static str>,
    /// Whether a value can be read into it.
    read: fn(Value) -> Result<(), serde_json::Error>,
}

impl RequestType {
    fn of<T: DeserializeOwned>() -> Self {
        let Err(Fields(fields)) = T::deserialize(FieldsOf) else {
            panic!("there is nothing to read");
        };
        Self {
            fields: fields.into_iter().collect(),
            read: |value| serde_json::from_str::<T>(&value.to_string()).map(drop),
        }
    }
}

/// The types, and the schemas of what is read into each. Where there are several, each has the fields that make sense
/// together.
fn request_types() -> Vec<(Vec<&'static str>, RequestType)> {
    vec![
        (vec!["CalledFunction"], RequestType::of::<CalledFunction>()),
        (
            vec!["ChatCompletionRequest", "CompletionRequest"],
            RequestType::of::<GenerationBody>(),
        ),
        (
            vec!["SpokenMessage", "AssistantMessage", "ToolMessage"],
            RequestType::of::<ChatMessage>(),
        ),
        (vec!["TextPart", "RefusalPart"], RequestType::of::<ContentPart>()),
        (vec!["DetokenizeRequest"], RequestType::of::<DetokenizeBody>()),
        (vec!["FunctionTool"], RequestType::of::<FlatTool>()),
        (
            vec!["InputMessage", "InputCall", "InputCallOutput", "InputReasoning"],
            RequestType::of::<Item>(),
        ),
        (vec!["NamedSchema"], RequestType::of::<NamedSchema>()),
        (vec!["PlainFormat", "NestedFormat"], RequestType::of::<ResponseFormat>()),
        (vec!["PlainFormat", "SchemaFormat"], RequestType::of::<FlatFormat>()),
        (vec!["ResponsesRequest"], RequestType::of::<ResponsesBody>()),
        (vec!["StreamOptions"], RequestType::of::<StreamOptions>()),
        (vec!["StructuredOutputs"], RequestType::of::<StructuredOutputs>()),
        (vec!["TextOptions"], RequestType::of::<TextOptions>()),
        (
            vec!["TokenizeTextRequest", "TokenizeChatRequest"],
            RequestType::of::<TokenizeBody>(),
        ),
        (vec!["Tool"], RequestType::of::<Tool>()),
        (vec!["ToolCall"], RequestType::of::<ToolCall>()),
        (vec!["ToolFunction"], RequestType::of::<ToolFunction>()),
    ]
}

/// Schemas whose values are read by hand, as part of what they belong to.
const READ_BY_HAND: [&str; 2] = ["FunctionToolChoice", "ToolChoice"];

fn schemas() -> Map<String, Value> {
    serde_json::from_str(include_str!("../openapi/requests.json")).unwrap()
}

fn properties<'a>(schemas: &'a Map<String, Value>, name: &str) -> &'a Map<String, Value> {
    schemas[name]["properties"].as_object().unwrap()
}

/// Values that a schema allows: one of each kind.
fn samples(schemas: &Map<String, Value>, schema: &Value) -> Vec<Value> {
    if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
        return samples(schemas, &schemas[reference.rsplit('/').next().unwrap()]);
    }
    if let Some(alternatives) = schema.get("anyOf").and_then(Value::as_array) {
        return alternatives
            .iter()
            .flat_map(|schema| samples(schemas, schema))
            .collect();
    }
    if let Some(value) = schema.get("const") {
        return vec![value.clone()];
    }
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        return values.clone();
    }
    let kinds = match &schema["type"] {
        Value::Array(kinds) => kinds.clone(),
        kind => vec![kind.clone()],
    };
    let sample = |kind: &Value| match kind.as_str().unwrap() {
        "null" => vec![Value::Null],
        "boolean" => vec![json!(true), json!(false)],
        "integer" => vec![json!(1), json!(1.0)],
        "number" => vec![json!(1), json!(0.5)],
        "string" => vec![json!("x"), json!("")],
        "array" => {
            let items = samples(schemas, &schema["items"]);
            items.into_iter().map(|item| json!([item])).chain([json!([])]).collect()
        }
        "object" => {
            let mut filled = vec![json!({})];
            for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
                filled.extend(samples(schemas, schema).into_iter().map(|value| json!({ name: value })));
            }
            if let Some(values) = schema.get("additionalProperties") {
                filled.extend(samples(schemas, values).into_iter().map(|value| json!({ "1": value })));
            }
            filled
        }
        other => panic!("no sample of {other}"),
    };
    kinds.iter().flat_map(sample).collect()
}

#[test]
fn every_field_is_documented_and_no_other() {
    let (schemas, types) = (schemas(), request_types());
    for (names, request_type) in &types {
        let documented = names.iter().flat_map(|name| properties(&schemas, name).keys());
        let documented: BTreeSet<&str> = documented.map(String::as_str).collect();
        assert_eq!(documented, request_type.fields, "{names:?}");
    }
    let paired = types.iter().flat_map(|(names, _)| names).copied().chain(READ_BY_HAND);
    let paired: BTreeSet<&str> = paired.collect();
    let objects = schemas.iter().filter(|(_, schema)| schema.get("properties").is_some());
    assert_eq!(objects.map(|(name, _)| name.as_str()).collect::<BTreeSet<_>>(), paired);
}

#[test]
fn every_value_that_is_documented_can_be_read() {
    let schemas = schemas();
    for (names, request_type) in request_types() {
        for (field, schema) in names.iter().flat_map(|name| properties(&schemas, name)) {
            for sample in samples(&schemas, schema) {
                let read = (request_type.read)(json!({ field: sample }));
                assert!(read.is_ok(), "{names:?}.{field}: {sample}: {}", read.unwrap_err());
            }
        }
    }
}

#[test]
fn every_field_may_be_null_but_those_that_are_needed() {
    let schemas = schemas();
    for (name, schema) in schemas.iter().filter(|(_, schema)| schema.get("properties").is_some()) {
        let needed = schema["required"].as_array().cloned().unwrap_or_default();
        for (field, schema) in properties(&schemas, name) {
            let is_needed = needed.contains(&json!(field));
            let may_be_null = samples(&schemas, schema).contains(&Value::Null);
            assert_ne!(is_needed, may_be_null, "{name}.{field}");
        }
    }
}
