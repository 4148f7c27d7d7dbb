//! What a client sends, and the chat it means.

use std::fmt;

use bytes::{Bytes, BytesMut};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, json};

use crate::bounded::{Element, ShortText, Worth, elements, list, too_many};
use crate::error::{ApiError, shorten};
use crate::json;
use crate::lenient::{Flag, Int, Number, Object};
use crate::openai::types::{
    Arguments, CalledFunction, ChatMessage, Choice, Content, Extension, GenerationBody, Logprobs, MAX_MESSAGES,
    MAX_NAMES, MAX_TOOLS, NamedSchema, ResponseFormat, SchemaText, Tool, ToolCall, ToolFunction, worth_of_message,
};

/// What `include` may name. All but the first belong to what this server's answers never have.
const INCLUDABLE: [&str; 8] = [
    "message.output_text.logprobs",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
];

/// Alternatives of a token at most: OpenAI's limit.
const MAX_TOP_LOGPROBS: i64 = 20;

/// Pairs of `metadata`, and characters of their keys and values: OpenAI's limits.
const MAX_METADATA: usize = 16;
type MetadataKey = ShortText<64>;
type MetadataValue = ShortText<512>;

/// As much to repeat, and as many items, are turned into a chat where they came in: a tenth of a millisecond.
const MAX_INLINE_BYTES: usize = 64 << 10;
const MAX_INLINE_ITEMS: usize = 1024;

/// A name that is only repeated.
type Name = ShortText<1024>;

/// Body of `/v1/responses`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(in crate::openai) struct ResponsesBody {
    pub(in crate::openai) model: Option<String>,
    input: Option<Input>,
    instructions: Option<String>,
    max_output_tokens: Option<Int>,
    temperature: Option<Number>,
    top_p: Option<Number>,
    top_logprobs: Option<Int>,
    #[serde(deserialize_with = "list::<MAX_NAMES, _, _>")]
    include: Option<Vec<String>>,
    stream: Option<Flag>,
    text: Option<Object<TextOptions>>,
    #[serde(deserialize_with = "list::<MAX_TOOLS, _, _>")]
    tools: Option<Vec<Object<FlatTool>>>,
    tool_choice: Option<FlatChoice>,
    parallel_tool_calls: Option<Flag>,
    metadata: Option<Metadata>,
    user: Option<Name>,
    previous_response_id: Extension,
    conversation: Extension,
    background: Extension,
    prompt: Extension,
}

/// `input`: a text, or items.
#[derive(Debug)]
enum Input {
    Text(String),
    Items(Vec<Item>),
}

/// A message, a call, or the result of one.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(in crate::openai) struct Item {
    r#type: Option<String>,
    role: Option<String>,
    content: Option<Content>,
    call_id: Option<String>,
    name: Option<String>,
    arguments: Option<Arguments>,
    output: Option<Content>,
}

impl Element for Item {
    fn worth(&self) -> Worth {
        match self.r#type.as_deref() {
            None | Some("message") => worth_of_message(self.role.as_deref(), self.content.as_ref()),
            Some("function_call" | "function_call_output" | "reasoning") => Worth::Kept,
            Some(_) => Worth::Last,
        }
    }
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(in crate::openai) struct TextOptions {
    format: Option<Object<FlatFormat>>,
}

/// A `response_format` without its inner object.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(in crate::openai) struct FlatFormat {
    r#type: Option<String>,
    name: Option<Name>,
    schema: Option<SchemaText>,
}

/// A tool without its inner object.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(in crate::openai) struct FlatTool {
    r#type: Option<String>,
    name: Option<String>,
    description: Option<String>,
    parameters: Option<SchemaText>,
    strict: Option<Flag>,
}

impl Element for FlatTool {}

impl FlatTool {
    fn num_bytes(&self) -> usize {
        let parameters = self.parameters.as_ref().map_or("", SchemaText::as_str);
        self.description.as_ref().map_or(0, String::len) + parameters.len()
    }
}

/// `metadata`: what its client wants to find again.
#[derive(Debug, Default)]
struct Metadata(Map<String, Value>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MetadataVisitor;
        impl<'de> Visitor<'de> for MetadataVisitor {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut metadata = Metadata::default();
                while let Some(ShortText(key)) = map.next_key::<MetadataKey>()? {
                    if metadata.0.len() == MAX_METADATA {
                        return Err(too_many(MAX_METADATA));
                    }
                    let ShortText(value) = map.next_value::<MetadataValue>()?;
                    metadata.0.insert(key, Value::String(value));
                }
                Ok(metadata)
            }
        }
        deserializer.deserialize_any(MetadataVisitor)
    }
}

/// `tool_choice`: a mode, or a tool by name.
#[derive(Debug, serde::Deserialize)]
#[serde(untagged)]
enum FlatChoice {
    Mode(String),
    Named {
        r#type: Option<String>,
        name: Option<String>,
    },
}

/// What a response repeats of its request: fields of JSON without the braces around them.
#[derive(Debug)]
pub(in crate::openai) struct Settings(pub(super) Bytes);

impl ResponsesBody {
    /// Whether turning it into a chat takes long.
    pub(in crate::openai) fn is_long(&self) -> bool {
        let instructions = self.instructions.as_ref().map_or(0, String::len);
        let num_items = match &self.input {
            Some(Input::Items(items)) => items.len(),
            Some(Input::Text(_)) | None => 0,
        };
        let tools = self.tools.iter().flatten();
        let tools: usize = tools.map(|Object(tool)| tool.num_bytes()).sum();
        instructions + tools > MAX_INLINE_BYTES || num_items > MAX_INLINE_ITEMS
    }
}

/// Where each message of the chat comes from.
pub(in crate::openai) type Places = Vec<Place>;

/// Where a message of the chat comes from.
#[derive(Debug, Clone, Copy)]
pub(in crate::openai) enum Place {
    /// `instructions`.
    Instructions,
    /// `input`, a text.
    Text,
    /// An item of `input`.
    Item(usize),
}

impl Place {
    /// The name of a field below a message; empty for the message itself.
    fn param(self, field: &str) -> String {
        match self {
            Self::Instructions => "instructions".to_owned(),
            Self::Text => "input".to_owned(),
            Self::Item(index) => format!("input[{index}]{field}"),
        }
    }
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InputVisitor;
        impl<'de> Visitor<'de> for InputVisitor {
            type Value = Input;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of items")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Input, E> {
                Ok(Input::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Input, A::Error> {
                let items = elements::<Object<Item>, _>(Vec::new(), seq, MAX_MESSAGES)?;
                Ok(Input::Items(items.into_iter().map(|Object(item)| item).collect()))
            }
        }
        deserializer.deserialize_any(InputVisitor)
    }
}

/// The chat that a request means, what its response repeats, and where the messages come from.
pub(in crate::openai) fn chat(body: ResponsesBody) -> Result<(GenerationBody, Settings, Places), ApiError> {
    let stateful = [
        ("previous_response_id", body.previous_response_id),
        ("conversation", body.conversation),
        ("background", body.background),
        ("prompt", body.prompt),
    ];
    if let Some((param, _)) = stateful.iter().find(|(_, extension)| extension.is_used) {
        let message = format!("{param} is not supported: this server keeps nothing between requests.");
        return Err(ApiError::unsupported(*param, message));
    }
    let has_logprobs = includes_logprobs(body.include.as_deref().unwrap_or_default())?;
    check_top_logprobs(body.top_logprobs)?;
    let settings = settings(&body);
    let mut messages: Vec<Object<ChatMessage>> = Vec::new();
    messages.extend(body.instructions.map(|text| message("system", Content::Text(text))));
    let mut places = vec![Place::Instructions; messages.len()];
    match body.input.ok_or_else(|| ApiError::missing("input"))? {
        Input::Text(text) => {
            messages.push(message("user", Content::Text(text)));
            places.push(Place::Text);
        }
        Input::Items(items) => {
            for (index, item) in items.into_iter().enumerate() {
                push_item(&mut messages, index, item)?;
                // Some items are no message.
                places.resize(messages.len(), Place::Item(index));
            }
        }
    }
    let format = body.text.and_then(|Object(text)| text.format);
    let chat = GenerationBody {
        model: body.model,
        messages: Some(messages),
        max_completion_tokens: body.max_output_tokens,
        temperature: body.temperature,
        top_p: body.top_p,
        logprobs: has_logprobs.then_some(Logprobs::Flag(true)),
        // Without log-probabilities there are no alternatives to name.
        top_logprobs: body.top_logprobs.filter(|_| has_logprobs),
        stream: body.stream,
        response_format: format.map(|Object(format)| Object(response_format(format))),
        tools: body
            .tools
            .filter(|tools| !tools.is_empty())
            .map(|tools| tools.into_iter().map(tool).collect()),
        tool_choice: body.tool_choice.map(choice),
        parallel_tool_calls: body.parallel_tool_calls,
        ..GenerationBody::default()
    };
    // Clients send the default with no tools at all.
    let tool_choice = chat
        .tool_choice
        .filter(|choice| chat.tools.is_some() || *choice != Choice::Mode("auto".to_owned()));
    Ok((GenerationBody { tool_choice, ..chat }, settings, places))
}

/// Whether the text's log-probabilities are part of what is to be included.
fn includes_logprobs(include: &[String]) -> Result<bool, ApiError> {
    match include.iter().position(|name| !INCLUDABLE.contains(&name.as_str())) {
        None => Ok(include.iter().any(|name| name == INCLUDABLE[0])),
        Some(index) => {
            let names = INCLUDABLE.map(|name| format!("'{name}'")).join(", ");
            let message = format!(
                "Invalid value: '{}'. Supported values are: {names}.",
                shorten(&include[index])
            );
            Err(ApiError::invalid(format!("include[{index}]"), message))
        }
    }
}

fn check_top_logprobs(count: Option<Int>) -> Result<(), ApiError> {
    match count {
        Some(Int(count)) if !(0..=MAX_TOP_LOGPROBS).contains(&count) => Err(ApiError::invalid(
            "top_logprobs",
            format!("top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}, got {count}."),
        )),
        _ => Ok(()),
    }
}

/// An error of the chat in the request's own words.
pub(in crate::openai) fn rename(error: ApiError, places: &[Place]) -> ApiError {
    let ApiError::InvalidRequest {
        message,
        param: Some(param),
        code,
    } = error
    else {
        return error;
    };
    let renamed = match param.as_ref() {
        "messages" => "input".to_owned(),
        "max_completion_tokens" | "max_tokens" => "max_output_tokens".to_owned(),
        "response_format.json_schema.schema" => "text.format.schema".to_owned(),
        "response_format" | "response_format.type" => "text.format.type".to_owned(),
        other => match other.strip_prefix("messages[").and_then(|rest| rest.split_once(']')) {
            Some((index, field)) => {
                let place = index.parse::<usize>().ok().and_then(|index| places.get(index));
                place.map_or_else(|| "input".to_owned(), |place| place.param(field))
            }
            None => other.replace(".function.", "."),
        },
    };
    let message = message.replace(param.as_ref(), &renamed);
    ApiError::InvalidRequest {
        message,
        param: Some(renamed.into()),
        code,
    }
}

fn message(role: &str, content: Content) -> Object<ChatMessage> {
    Object(ChatMessage {
        role: Some(role.to_owned()),
        content: Some(content),
        ..ChatMessage::default()
    })
}

fn push_item(messages: &mut Vec<Object<ChatMessage>>, index: usize, item: Item) -> Result<(), ApiError> {
    let message = match item.r#type.as_deref() {
        None | Some("message") => ChatMessage {
            role: item.role,
            content: item.content,
            ..ChatMessage::default()
        },
        Some("function_call") => ChatMessage {
            role: Some("assistant".to_owned()),
            tool_calls: Some(vec![Object(ToolCall {
                id: item.call_id,
                function: Some(Object(CalledFunction {
                    name: item.name,
                    arguments: item.arguments,
                })),
            })]),
            ..ChatMessage::default()
        },
        Some("function_call_output") => ChatMessage {
            role: Some("tool".to_owned()),
            tool_call_id: item.call_id,
            content: item.output,
            ..ChatMessage::default()
        },
        // What a model thought is nothing that this one could read.
        Some("reasoning") => return Ok(()),
        Some(other) => {
            let message = format!("Input items of type '{}' are not supported.", shorten(other));
            return Err(ApiError::unsupported(format!("input[{index}].type"), message));
        }
    };
    messages.push(Object(message));
    Ok(())
}

fn response_format(format: FlatFormat) -> ResponseFormat {
    ResponseFormat {
        r#type: format.r#type,
        json_schema: Some(Object(NamedSchema {
            name: format.name.map(|ShortText(name)| name),
            schema: format.schema,
        })),
    }
}

fn tool(Object(tool): Object<FlatTool>) -> Object<Tool> {
    Object(Tool {
        r#type: tool.r#type,
        function: Some(Object(ToolFunction {
            name: tool.name,
            description: tool.description,
            parameters: tool.parameters,
            strict: tool.strict,
        })),
    })
}

fn choice(choice: FlatChoice) -> Choice {
    match choice {
        FlatChoice::Mode(mode) => Choice::Mode(mode),
        FlatChoice::Named { r#type, name } => Choice::Named { kind: r#type, name },
    }
}

/// OpenAI's response has all of these, and typed clients want them.
fn settings(body: &ResponsesBody) -> Settings {
    let tool_choice = match &body.tool_choice {
        None => json!("auto"),
        Some(FlatChoice::Mode(mode)) => json!(mode),
        Some(FlatChoice::Named { name, .. }) => json!({ "type": "function", "name": name }),
    };
    let number = |number: Option<Number>| number.map_or(1.0, |Number(value)| value);
    let plain = json!({
        "background": false, "max_tool_calls": null,
        "max_output_tokens": body.max_output_tokens.map(|Int(count)| count),
        "metadata": body.metadata.as_ref().map_or_else(|| json!({}), |Metadata(metadata)| json!(metadata)),
        "parallel_tool_calls": body.parallel_tool_calls.is_none_or(|Flag(is_parallel)| is_parallel),
        "previous_response_id": null, "reasoning": { "effort": null, "summary": null }, "service_tier": null,
        "store": false, "temperature": number(body.temperature), "tool_choice": tool_choice,
        "top_logprobs": body.top_logprobs.map_or(0, |Int(count)| count), "top_p": number(body.top_p),
        "truncation": "disabled", "user": body.user.as_ref().map(|ShortText(user)| user),
    });
    let mut out = BytesMut::new();
    json::push_value(&mut out, &plain);
    // Of an object only what is between its braces is wanted.
    let mut out = out.split_off(1);
    out.truncate(out.len() - 1);
    // They may be as long as the body.
    json::push(&mut out, ",\"instructions\":");
    match &body.instructions {
        None => json::push(&mut out, "null"),
        Some(instructions) => json::push_string(&mut out, instructions),
    }
    let format = body.text.as_ref().and_then(|Object(text)| text.format.as_ref());
    push_format(&mut out, format.map(|Object(format)| format));
    push_tools(&mut out, body.tools.as_deref().unwrap_or_default());
    Settings(out.freeze())
}

/// `,"text":…`
fn push_format(out: &mut BytesMut, format: Option<&FlatFormat>) {
    let kind = format.map_or(Some("text"), |format| format.r#type.as_deref());
    json::push(out, ",\"text\":{\"format\":{\"type\":");
    json::push_value(out, &json!(kind));
    if let Some(format) = format.filter(|_| kind == Some("json_schema")) {
        json::push(out, ",\"name\":");
        json::push_value(out, &json!(format.name.as_ref().map(|ShortText(name)| name)));
        json::push(out, ",\"schema\":");
        push_schema(out, format.schema.as_ref());
        json::push(out, ",\"strict\":true,\"description\":null");
    }
    json::push(out, "}}");
}

/// `,"tools":…`
fn push_tools(out: &mut BytesMut, tools: &[Object<FlatTool>]) {
    json::push(out, ",\"tools\":[");
    for (index, Object(tool)) in tools.iter().enumerate() {
        json::push(out, if index == 0 { "" } else { "," });
        json::push(out, "{\"type\":\"function\",\"name\":");
        json::push_value(out, &json!(tool.name));
        json::push(out, ",\"description\":");
        json::push_value(out, &json!(tool.description));
        json::push(out, ",\"parameters\":");
        push_schema(out, tool.parameters.as_ref());
        json::push(out, ",\"strict\":");
        json::push_value(out, &json!(tool.strict.map(|Flag(strict)| strict)));
        json::push(out, "}");
    }
    json::push(out, "]");
}

fn push_schema(out: &mut BytesMut, schema: Option<&SchemaText>) {
    json::push_json(out, schema.map_or("null", SchemaText::as_str));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_takes_long_to_turn_into_a_chat_is_counted() {
        let is_long = |body: Value| {
            serde_json::from_str::<ResponsesBody>(&body.to_string())
                .unwrap()
                .is_long()
        };
        let text = "a".repeat(MAX_INLINE_BYTES + 1);
        assert!(!is_long(json!({ "input": text })), "it is moved");
        assert!(is_long(json!({ "instructions": text })));
        assert!(is_long(json!({ "tools": [{ "name": "f", "description": text }] })));
        assert!(is_long(
            json!({ "tools": [{ "name": "f", "parameters": { "x": text } }] })
        ));
        let item = json!({ "role": "user", "content": "a" });
        assert!(is_long(json!({ "input": vec![item; MAX_INLINE_ITEMS + 1] })));
    }
}
