//! Messages of a chat as the template takes them: text, and nothing but the roles it knows.

use std::collections::HashMap;

use lapidary_text::{Message, SystemRole, tool_calls};

use super::types::{Arguments, ChatMessage, Content, ContentPart, ToolCall};
use crate::error::{ApiError, shorten};
use crate::lenient::Object;

/// Turns parts into text, and calls and their results into the form that answers have. Results of calls are what the
/// user says next; several of them are said together.
pub(super) fn convert(messages: Vec<Object<ChatMessage>>) -> Result<Vec<Message>, ApiError> {
    let mut converted: Vec<Message> = Vec::with_capacity(messages.len());
    let mut names = HashMap::new();
    let mut was_result = false;
    for (index, Object(mut message)) in messages.into_iter().enumerate() {
        let is_result = matches!(message.role.as_deref(), Some("tool" | "function"));
        let calls = message.tool_calls.take().unwrap_or_default();
        let own_name = message.name.take();
        let called = message.tool_call_id.take().and_then(|id| names.get(&id).cloned());
        let mut message = content(index, message)?;
        if is_result {
            message.content = tool_calls::result(called.or(own_name).as_deref(), &message.content);
            "user".clone_into(&mut message.role);
        }
        message.index = Some(index);
        if message.role == "assistant" {
            add_calls(&mut message, calls, &mut names);
        }
        match converted.last_mut().filter(|_| is_result && was_result) {
            Some(last) => {
                last.content.push('\n');
                last.content.push_str(&message.content);
            }
            None => converted.push(message),
        }
        was_result = is_result;
    }
    Ok(converted)
}

/// Puts instructions in front of everything else: as a system message, or before the first thing the user says where
/// system messages are refused.
pub(super) fn instruct(messages: &mut Vec<Message>, instructions: String, policy: SystemRole) {
    match (policy, messages.first_mut()) {
        (SystemRole::Error, Some(first)) if first.role == "user" => {
            first.content = format!("{instructions}\n\n{}", first.content);
        }
        (SystemRole::Error, _) => messages.insert(0, Message::new("user", instructions)),
        (SystemRole::Merge, _) => messages.insert(0, Message::new("system", instructions)),
    }
}

/// Writes an assistant's calls below what it said.
fn add_calls(message: &mut Message, calls: Vec<Object<ToolCall>>, names: &mut HashMap<String, String>) {
    for Object(call) in calls {
        let Some(Object(function)) = call.function else {
            continue;
        };
        let name = function.name.unwrap_or_default();
        let arguments = function
            .arguments
            .map_or_else(|| "{}".to_owned(), |Arguments(text)| text);
        if !message.content.is_empty() {
            message.content.push('\n');
        }
        message.content.push_str(&tool_calls::call(&name, &arguments));
        if let Some(id) = call.id {
            names.insert(id, name);
        }
    }
}

/// Role and text of a message.
fn content(index: usize, message: ChatMessage) -> Result<Message, ApiError> {
    let missing = |field: &str| ApiError::InvalidRequest {
        message: format!("Missing required parameter: 'messages[{index}].{field}'."),
        param: Some(format!("messages[{index}].{field}").into()),
        code: Some("missing_required_parameter"),
    };
    let role = message.role.ok_or_else(|| missing("role"))?;
    match message.content {
        Some(Content::Text(text)) => Ok(Message::new(role, text)),
        Some(Content::Parts(parts)) => {
            let texts = parts.into_iter().enumerate().map(|(part_index, part)| {
                part_text(part).map_err(|(field, message)| {
                    let param = format!("messages[{index}].content[{part_index}].{field}");
                    ApiError::unsupported(param, message)
                })
            });
            Ok(Message::from_parts(role, &texts.collect::<Result<Vec<_>, _>>()?))
        }
        // An assistant message that only called tools has no content, and some tools return nothing.
        None if matches!(role.as_str(), "assistant" | "tool" | "function") => Ok(Message::new(role, String::new())),
        None => Err(missing("content")),
    }
}

/// The text of a part, or the field at fault and what is wrong with it.
fn part_text(part: ContentPart) -> Result<String, (&'static str, String)> {
    let text = match part.r#type.as_deref() {
        // Some clients leave the type out.
        Some("text" | "input_text" | "output_text") | None => part.text,
        Some("refusal") => part.refusal,
        Some(other) => {
            return Err((
                "type",
                format!(
                    "Content of type '{}' is not supported: this model reads text.",
                    shorten(other)
                ),
            ));
        }
    };
    text.ok_or_else(|| ("text", "A content part must have a text.".to_owned()))
}
