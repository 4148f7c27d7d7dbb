//! The response: events of a stream, or one body at the end.

use bytes::{Bytes, BytesMut};
use lapidary_text::CallEvent;
use serde_json::{Value, json};

use super::Settings;
use crate::error::ApiError;
use crate::generate::{Finish, Generation, Usage};
use crate::json;
use crate::openai::answer::{BodyWriter, StreamWriter, call_id};
use crate::openai::logprobs::{TokenDetail, TokenNames, push_element};

/// Writes a response.
#[derive(Debug)]
pub(in crate::openai) struct ResponsesWriter {
    id: String,
    created: u64,
    model: String,
    settings: Settings,
    /// Names tokens in log-probabilities, if those are wanted.
    names: Option<TokenNames>,
    /// Tokens of which no text was seen yet.
    pending: Scores,
    /// Items that are complete.
    output: Vec<Value>,
    open: Option<Item>,
    has_begun: bool,
    /// Of the next event.
    sequence_number: u64,
    was_cut_off: bool,
}

/// The item that is being written.
#[derive(Debug)]
struct Item {
    id: String,
    kind: Kind,
    /// Text, or arguments.
    content: String,
    /// Elements of the text's `logprobs`.
    logprobs: BytesMut,
}

/// Log-probabilities of some tokens, as elements of JSON arrays.
#[derive(Debug, Default)]
struct Scores {
    in_part: BytesMut,
    in_event: BytesMut,
}

#[derive(Debug)]
enum Kind {
    Message,
    Call { call_id: String, name: String },
}

impl Item {
    fn to_json(&self, status: &str) -> Value {
        match &self.kind {
            Kind::Message => json!({
                "id": self.id, "type": "message", "status": status, "role": "assistant", "content": [self.part()],
            }),
            Kind::Call { call_id, name } => json!({
                "id": self.id, "type": "function_call", "status": status, "arguments": self.content,
                "call_id": call_id, "name": name,
            }),
        }
    }

    fn part(&self) -> Value {
        json!({ "type": "output_text", "text": self.content, "annotations": [], "logprobs": array(&self.logprobs) })
    }
}

impl ResponsesWriter {
    /// Of an answer that begins now.
    pub(in crate::openai) fn new(request_id: &str, model: &str, settings: Settings, names: Option<TokenNames>) -> Self {
        Self {
            id: format!("resp_{request_id}"),
            created: crate::unix_time(),
            model: model.to_owned(),
            settings,
            names,
            pending: Scores::default(),
            output: Vec::new(),
            open: None,
            has_begun: false,
            sequence_number: 0,
            was_cut_off: false,
        }
    }

    fn response(&self, status: &str, usage: Option<Usage>, error: &Value) -> Value {
        let usage = usage.map(|usage| {
            json!({
                "input_tokens": usage.prompt_tokens,
                // Prefixes are kept for nothing.
                "input_tokens_details": { "cached_tokens": usage.cached_tokens, "cache_write_tokens": 0 },
                "output_tokens": usage.completion_tokens, "output_tokens_details": { "reasoning_tokens": 0 },
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            })
        });
        let cut_off = self.was_cut_off.then(|| json!({ "reason": "max_output_tokens" }));
        json!({
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": error,
            "incomplete_details": cut_off, "model": self.model, "output": self.output, "usage": usage,
        })
    }

    /// A response with the request's settings.
    fn push_response(&self, out: &mut BytesMut, response: &Value) {
        json::push_value(out, response);
        out.truncate(out.len() - 1);
        json::push(out, ",");
        out.extend_from_slice(&self.settings.0);
        json::push(out, "}");
    }

    /// An event with the response as it is now.
    fn emit_response(&mut self, out: &mut BytesMut, kind: &str, response: &Value) {
        json::push(out, "event: ");
        json::push(out, kind);
        json::push(out, "\ndata: {\"type\":\"");
        json::push(out, kind);
        json::push(out, "\",\"sequence_number\":");
        json::push_int(out, self.sequence_number);
        json::push(out, ",\"response\":");
        self.push_response(out, response);
        json::push(out, "}\n\n");
        self.sequence_number += 1;
    }

    fn final_response(&self, usage: Usage) -> Value {
        let status = if self.was_cut_off { "incomplete" } else { "completed" };
        self.response(status, Some(usage), &Value::Null)
    }

    /// Says that there is a response, which is what clients expect before anything else, a failure included.
    fn begin(&mut self, out: &mut BytesMut) {
        if !std::mem::replace(&mut self.has_begun, true) {
            let response = self.response("in_progress", None, &Value::Null);
            self.emit_response(out, "response.created", &response);
            self.emit_response(out, "response.in_progress", &response);
        }
    }

    /// Takes what the latest event added.
    fn take(&mut self, out: &mut BytesMut, generation: &Generation, index: usize) {
        self.begin(out);
        let delta = &generation.choice(index).delta;
        if let Some(names) = &self.names {
            for entry in &delta.logprobs {
                push_element(&mut self.pending.in_part, entry, names, TokenDetail::Part);
                push_element(&mut self.pending.in_event, entry, names, TokenDetail::Event);
            }
        }
        if !delta.text.is_empty() {
            self.add_text(out, &delta.text);
        }
        for event in &delta.calls {
            match event {
                CallEvent::Call(name) => {
                    self.close(out, "completed");
                    // Calls have no place for them.
                    self.pending = Scores::default();
                    let call_id = call_id();
                    self.open(
                        out,
                        "fc",
                        Kind::Call {
                            call_id,
                            name: name.clone(),
                        },
                    );
                }
                CallEvent::Arguments(more) | CallEvent::Text(more) => {
                    self.add(out, "response.function_call_arguments.delta", b"", more);
                }
            }
        }
        if let Some(finish) = delta.finish {
            self.was_cut_off = finish == Finish::Length;
            if self.open.is_none() && self.output.is_empty() {
                // An answer without words is an answer.
                self.open(out, "msg", Kind::Message);
            }
            if !self.pending.in_part.is_empty() {
                // The stop token has no text.
                self.add_text(out, "");
            }
            self.close(out, if self.was_cut_off { "incomplete" } else { "completed" });
        }
    }

    fn add_text(&mut self, out: &mut BytesMut, text: &str) {
        if self.open.is_none() {
            self.open(out, "msg", Kind::Message);
        }
        let Some(Item {
            kind: Kind::Message,
            logprobs,
            ..
        }) = &mut self.open
        else {
            return;
        };
        let Scores { in_part, in_event } = std::mem::take(&mut self.pending);
        if !logprobs.is_empty() && !in_part.is_empty() {
            json::push(logprobs, ",");
        }
        logprobs.extend_from_slice(&in_part);
        let mut fields = BytesMut::from(",\"content_index\":0,\"logprobs\":[");
        fields.extend_from_slice(&in_event);
        json::push(&mut fields, "]");
        self.add(out, "response.output_text.delta", &fields, text);
    }

    fn open(&mut self, out: &mut BytesMut, prefix: &str, kind: Kind) {
        let item = Item {
            id: format!("{prefix}_{:016x}", crate::request_id::random_u64()),
            kind,
            content: String::new(),
            logprobs: BytesMut::new(),
        };
        let mut added = item.to_json("in_progress");
        let is_message = matches!(item.kind, Kind::Message);
        if is_message {
            added["content"] = json!([]);
        }
        let place = json!({ "output_index": self.output.len() });
        self.emit(out, "response.output_item.added", with(&place, "item", added));
        if is_message {
            let place = json!({ "item_id": item.id, "output_index": self.output.len(), "content_index": 0 });
            self.emit(out, "response.content_part.added", with(&place, "part", item.part()));
        }
        self.open = Some(item);
    }

    /// More of the open item. By hand: it comes once a token.
    fn add(&mut self, out: &mut BytesMut, kind: &str, fields: &[u8], more: &str) {
        let Some(item) = &mut self.open else { return };
        item.content.push_str(more);
        json::push(out, "event: ");
        json::push(out, kind);
        json::push(out, "\ndata: {\"type\":\"");
        json::push(out, kind);
        json::push(out, "\",\"sequence_number\":");
        json::push_int(out, self.sequence_number);
        json::push(out, ",\"item_id\":");
        json::push_string(out, &item.id);
        json::push(out, ",\"output_index\":");
        json::push_int(out, self.output.len() as u64);
        out.extend_from_slice(fields);
        json::push(out, ",\"delta\":");
        json::push_string(out, more);
        json::push(out, "}\n\n");
        self.sequence_number += 1;
    }

    fn close(&mut self, out: &mut BytesMut, status: &str) {
        let Some(item) = self.open.take() else { return };
        let place = json!({ "item_id": item.id, "output_index": self.output.len() });
        match &item.kind {
            Kind::Message => {
                let place = with(&place, "content_index", json!(0));
                let done = with(&place, "text", json!(item.content));
                let logprobs = without_bytes(array(&item.logprobs));
                self.emit(out, "response.output_text.done", with(&done, "logprobs", logprobs));
                self.emit(out, "response.content_part.done", with(&place, "part", item.part()));
            }
            Kind::Call { name, .. } => {
                let done = with(&place, "arguments", json!(item.content));
                self.emit(
                    out,
                    "response.function_call_arguments.done",
                    with(&done, "name", json!(name)),
                );
            }
        }
        let item = item.to_json(status);
        let done = json!({ "output_index": self.output.len(), "item": item });
        self.emit(out, "response.output_item.done", done);
        self.output.push(item);
    }

    fn emit(&mut self, out: &mut BytesMut, kind: &str, fields: Value) {
        let mut event = json!({ "type": kind, "sequence_number": self.sequence_number });
        if let (Value::Object(event), Value::Object(fields)) = (&mut event, fields) {
            event.extend(fields);
        }
        self.sequence_number += 1;
        json::push(out, "event: ");
        json::push(out, kind);
        json::push(out, "\ndata: ");
        json::push_value(out, &event);
        json::push(out, "\n\n");
    }
}

fn with(fields: &Value, name: &str, value: Value) -> Value {
    let mut fields = fields.clone();
    fields[name] = value;
    fields
}

/// An array of these elements, written by this server.
fn array(elements: &[u8]) -> Value {
    let text = [b"[", elements, b"]"].concat();
    serde_json::from_slice(&text).expect("elements are JSON")
}

/// Log-probabilities as events have them.
fn without_bytes(mut logprobs: Value) -> Value {
    for element in logprobs
        .as_array_mut()
        .into_iter()
        .flatten()
        .filter_map(Value::as_object_mut)
    {
        element.remove("bytes");
        let top = element.get_mut("top_logprobs").and_then(Value::as_array_mut);
        for alternative in top.into_iter().flatten().filter_map(Value::as_object_mut) {
            alternative.remove("bytes");
        }
    }
    logprobs
}

impl StreamWriter for ResponsesWriter {
    fn write_delta(&mut self, out: &mut BytesMut, generation: &Generation, index: usize) {
        self.take(out, generation, index);
    }

    fn write_end(&mut self, out: &mut BytesMut, _: &Generation, usage: Usage) {
        let kind = if self.was_cut_off {
            "response.incomplete"
        } else {
            "response.completed"
        };
        let response = self.final_response(usage);
        self.emit_response(out, kind, &response);
    }

    fn write_error(&mut self, out: &mut BytesMut, error: &ApiError) {
        self.begin(out);
        self.close(out, "incomplete");
        let code = error.code().unwrap_or("server_error");
        let error = json!({ "code": code, "message": error.to_string() });
        let response = self.response("failed", None, &error);
        self.emit_response(out, "response.failed", &response);
    }
}

impl BodyWriter for ResponsesWriter {
    fn add_delta(&mut self, generation: &Generation, index: usize) {
        // Its events have no reader.
        self.take(&mut BytesMut::new(), generation, index);
    }

    fn finish(self: Box<Self>, _: &Generation, usage: Usage) -> Bytes {
        let mut out = BytesMut::new();
        self.push_response(&mut out, &self.final_response(usage));
        out.freeze()
    }
}
