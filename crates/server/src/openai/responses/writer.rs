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
    /// Items that are complete, as JSON.
    output: Vec<Bytes>,
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
    scores: Scores,
}

/// Log-probabilities of some tokens, as elements of JSON arrays. They stay text: of a long answer they are megabytes, and
/// values would take twenty times as much.
#[derive(Debug, Default)]
struct Scores {
    in_part: BytesMut,
    in_event: BytesMut,
}

impl Scores {
    fn append(&mut self, more: &Self) {
        for (all, more) in [(&mut self.in_part, &more.in_part), (&mut self.in_event, &more.in_event)] {
            if !all.is_empty() && !more.is_empty() {
                json::push(all, ",");
            }
            all.extend_from_slice(more);
        }
    }
}

#[derive(Debug)]
enum Kind {
    Message,
    Call { call_id: String, name: String },
}

impl Item {
    fn push(&self, out: &mut BytesMut, status: &str, has_content: bool) {
        json::push(out, "{\"id\":");
        json::push_string(out, &self.id);
        match &self.kind {
            Kind::Message => {
                json::push(out, ",\"type\":\"message\",\"status\":");
                json::push_string(out, status);
                json::push(out, ",\"role\":\"assistant\",\"content\":[");
                if has_content {
                    self.push_part(out);
                }
                json::push(out, "]}");
            }
            Kind::Call { call_id, name } => {
                json::push(out, ",\"type\":\"function_call\",\"status\":");
                json::push_string(out, status);
                json::push(out, ",\"arguments\":");
                json::push_string(out, &self.content);
                json::push(out, ",\"call_id\":");
                json::push_string(out, call_id);
                json::push(out, ",\"name\":");
                json::push_string(out, name);
                json::push(out, "}");
            }
        }
    }

    fn push_part(&self, out: &mut BytesMut) {
        json::push(out, "{\"type\":\"output_text\",\"text\":");
        json::push_string(out, &self.content);
        json::push(out, ",\"annotations\":[],\"logprobs\":[");
        out.extend_from_slice(&self.scores.in_part);
        json::push(out, "]}");
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

    /// With the request's settings.
    fn push_response(&self, out: &mut BytesMut, status: &str, usage: Option<Usage>, error: &Value) {
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
        let head = json!({
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": error,
            "incomplete_details": cut_off, "model": self.model,
        });
        json::push_value(out, &head);
        out.truncate(out.len() - 1);
        json::push(out, ",\"output\":[");
        for (index, item) in self.output.iter().enumerate() {
            if index > 0 {
                json::push(out, ",");
            }
            out.extend_from_slice(item);
        }
        json::push(out, "],\"usage\":");
        json::push_value(out, &json!(usage));
        json::push(out, ",");
        out.extend_from_slice(&self.settings.0);
        json::push(out, "}");
    }

    /// An event with the response as it is now.
    fn emit_response(&mut self, out: &mut BytesMut, kind: &str, status: &str, usage: Option<Usage>, error: &Value) {
        self.begin_event(out, kind);
        json::push(out, ",\"response\":");
        self.push_response(out, status, usage, error);
        json::push(out, "}\n\n");
    }

    fn final_status(&self) -> &'static str {
        if self.was_cut_off { "incomplete" } else { "completed" }
    }

    /// Says that there is a response, which is what clients expect before anything else, a failure included.
    fn begin(&mut self, out: &mut BytesMut) {
        if !std::mem::replace(&mut self.has_begun, true) {
            for kind in ["response.created", "response.in_progress"] {
                self.emit_response(out, kind, "in_progress", None, &Value::Null);
            }
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
            self.close(out, self.final_status());
        }
    }

    fn add_text(&mut self, out: &mut BytesMut, text: &str) {
        if self.open.is_none() {
            self.open(out, "msg", Kind::Message);
        }
        let Some(Item {
            kind: Kind::Message,
            scores,
            ..
        }) = &mut self.open
        else {
            return;
        };
        let more = std::mem::take(&mut self.pending);
        scores.append(&more);
        let mut fields = BytesMut::from(",\"content_index\":0,\"logprobs\":[");
        fields.extend_from_slice(&more.in_event);
        json::push(&mut fields, "]");
        self.add(out, "response.output_text.delta", &fields, text);
    }

    fn open(&mut self, out: &mut BytesMut, prefix: &str, kind: Kind) {
        let item = Item {
            id: format!("{prefix}_{:016x}", crate::request_id::random_u64()),
            kind,
            content: String::new(),
            scores: Scores::default(),
        };
        self.begin_event(out, "response.output_item.added");
        self.push_output_index(out);
        json::push(out, ",\"item\":");
        item.push(out, "in_progress", false);
        json::push(out, "}\n\n");
        if matches!(item.kind, Kind::Message) {
            self.begin_item_event(out, "response.content_part.added", &item);
            json::push(out, ",\"content_index\":0,\"part\":");
            item.push_part(out);
            json::push(out, "}\n\n");
        }
        self.open = Some(item);
    }

    /// More of the open item.
    fn add(&mut self, out: &mut BytesMut, kind: &str, fields: &[u8], more: &str) {
        let Some(mut item) = self.open.take() else { return };
        item.content.push_str(more);
        self.begin_item_event(out, kind, &item);
        out.extend_from_slice(fields);
        json::push(out, ",\"delta\":");
        json::push_string(out, more);
        json::push(out, "}\n\n");
        self.open = Some(item);
    }

    fn close(&mut self, out: &mut BytesMut, status: &str) {
        let Some(item) = self.open.take() else { return };
        match &item.kind {
            Kind::Message => {
                self.begin_item_event(out, "response.output_text.done", &item);
                json::push(out, ",\"content_index\":0,\"text\":");
                json::push_string(out, &item.content);
                json::push(out, ",\"logprobs\":[");
                out.extend_from_slice(&item.scores.in_event);
                json::push(out, "]}\n\n");
                self.begin_item_event(out, "response.content_part.done", &item);
                json::push(out, ",\"content_index\":0,\"part\":");
                item.push_part(out);
                json::push(out, "}\n\n");
            }
            Kind::Call { name, .. } => {
                self.begin_item_event(out, "response.function_call_arguments.done", &item);
                json::push(out, ",\"arguments\":");
                json::push_string(out, &item.content);
                json::push(out, ",\"name\":");
                json::push_string(out, name);
                json::push(out, "}\n\n");
            }
        }
        let mut done = BytesMut::new();
        item.push(&mut done, status, true);
        self.begin_event(out, "response.output_item.done");
        self.push_output_index(out);
        json::push(out, ",\"item\":");
        out.extend_from_slice(&done);
        json::push(out, "}\n\n");
        self.output.push(done.freeze());
    }

    /// An event about an item, up to where its own fields follow.
    fn begin_item_event(&mut self, out: &mut BytesMut, kind: &str, item: &Item) {
        self.begin_event(out, kind);
        json::push(out, ",\"item_id\":");
        json::push_string(out, &item.id);
        self.push_output_index(out);
    }

    /// The index of the item that is open or would be opened next.
    fn push_output_index(&self, out: &mut BytesMut) {
        json::push(out, ",\"output_index\":");
        json::push_int(out, self.output.len() as u64);
    }

    /// An event, up to where its own fields follow.
    fn begin_event(&mut self, out: &mut BytesMut, kind: &str) {
        json::push(out, "event: ");
        json::push(out, kind);
        json::push(out, "\ndata: {\"type\":\"");
        json::push(out, kind);
        json::push(out, "\",\"sequence_number\":");
        json::push_int(out, self.sequence_number);
        self.sequence_number += 1;
    }
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
        self.emit_response(out, kind, self.final_status(), Some(usage), &Value::Null);
    }

    fn write_error(&mut self, out: &mut BytesMut, error: &ApiError) {
        self.begin(out);
        self.close(out, "incomplete");
        let code = error.code().unwrap_or("server_error");
        let error = json!({ "code": code, "message": error.to_string() });
        self.emit_response(out, "response.failed", "failed", None, &error);
    }
}

impl BodyWriter for ResponsesWriter {
    fn add_delta(&mut self, generation: &Generation, index: usize) {
        // Its events have no reader.
        self.take(&mut BytesMut::new(), generation, index);
    }

    fn finish(self: Box<Self>, _: &Generation, usage: Usage) -> Bytes {
        let mut out = BytesMut::new();
        self.push_response(&mut out, self.final_status(), Some(usage), &Value::Null);
        out.freeze()
    }
}
