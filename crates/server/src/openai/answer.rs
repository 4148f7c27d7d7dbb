//! The bodies of answers: chunks of a stream, and the whole at once. Byte for byte what clients see.

use std::fmt::Write;

use bytes::{Bytes, BytesMut};
use std::sync::Arc;

use lapidary_text::{CallEvent, Tokenizer};

use super::Endpoint;
use super::logprobs::LogprobsJson;
use super::params::{Params, Streaming};
use super::tools::Tools;
use crate::error::ApiError;
use crate::generate::{Choice, Finish, Generation, LogprobEntry, Usage};
use crate::json;

/// What all chunks of an answer, or its one body, have in common.
#[derive(Debug)]
pub(crate) struct Head {
    /// Which shape.
    pub(crate) endpoint: Endpoint,
    /// `chatcmpl-…` or `cmpl-…`.
    pub(crate) id: String,
    /// Unix time.
    pub(crate) created: u64,
    /// The name the model is served by.
    pub(crate) model: String,
    /// Build, checkpoint and backend.
    pub(crate) system_fingerprint: String,
    /// What `stop_reason` may name.
    pub(crate) stop_strings: Arc<[String]>,
    /// Whether `logprobs` has values.
    pub(crate) has_logprobs: bool,
    /// For each prompt, the text before the answer; empty without `echo`.
    pub(crate) echoes: Vec<String>,
    /// Whether answers have to be calls of functions.
    pub(crate) is_call: bool,
    /// Names tokens in `logprobs`.
    pub(crate) tokenizer: Arc<Tokenizer>,
}

impl Head {
    /// Of an answer that begins now.
    pub(crate) fn new(
        endpoint: Endpoint,
        request_id: &str,
        model: &crate::state::ServedModel,
        params: &Params,
        echoes: Vec<String>,
    ) -> Self {
        Self {
            endpoint,
            id: format!("{}-{request_id}", endpoint.id_prefix()),
            created: crate::unix_time(),
            model: model.names.first().cloned().unwrap_or_default(),
            system_fingerprint: model.system_fingerprint.clone(),
            stop_strings: Arc::clone(&params.stop_strings),
            has_logprobs: params.sampling.logprobs.is_some(),
            echoes,
            is_call: params.tools.as_ref().is_some_and(Tools::is_forced),
            tokenizer: Arc::clone(&model.tokenizer),
        }
    }

    /// `{"id":…,` up to and without `"choices"`.
    fn write_start(&self, out: &mut BytesMut, object: &str) {
        json::push(out, "{\"id\":");
        json::push_string(out, &self.id);
        json::push(out, ",\"object\":\"");
        json::push(out, object);
        json::push(out, "\",\"created\":");
        json::push_int(out, self.created);
        json::push(out, ",\"model\":");
        json::push_string(out, &self.model);
        json::push(out, ",\"system_fingerprint\":");
        json::push_string(out, &self.system_fingerprint);
    }

    fn echo_of(&self, choice: &Choice) -> &str {
        self.echoes.get(choice.prompt_index()).map_or("", String::as_str)
    }

    fn logprobs_of(&self, entries: &[LogprobEntry], echo: &str) -> LogprobsJson {
        let mut logprobs = LogprobsJson::new(self.endpoint);
        let shift = echo.chars().count();
        for entry in entries {
            logprobs.push(entry, &self.tokenizer, shift);
        }
        logprobs
    }

    /// `"finish_reason":…,"stop_reason":…`
    fn write_finish(&self, out: &mut BytesMut, finish: Finish) {
        let reason = match finish {
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
            Finish::Eos | Finish::StopToken(_) | Finish::StopString(_) => "stop",
        };
        write!(out, "\"finish_reason\":\"{reason}\",\"stop_reason\":").expect("BytesMut grows");
        match finish {
            Finish::Eos | Finish::Length | Finish::ToolCalls => json::push(out, "null"),
            Finish::StopToken(token) => json::push_int(out, u64::from(token)),
            Finish::StopString(index) => json::push_string(out, &self.stop_strings[index]),
        }
    }
}

fn write_usage(out: &mut BytesMut, usage: Usage) {
    let Usage {
        prompt_tokens,
        completion_tokens,
        cached_tokens,
    } = usage;
    let total_tokens = u64::from(prompt_tokens) + u64::from(completion_tokens);
    write!(
        out,
        "{{\"prompt_tokens\":{prompt_tokens},\"total_tokens\":{total_tokens},\
         \"completion_tokens\":{completion_tokens},\"prompt_tokens_details\":{{\"cached_tokens\":{cached_tokens}}}}}"
    )
    .expect("BytesMut grows");
}

/// Writes an answer as server-sent events.
pub(crate) trait StreamWriter: std::fmt::Debug + Send {
    /// Writes what the latest event added to a choice; nothing if there is nothing to show.
    fn write_delta(&mut self, out: &mut BytesMut, generation: &Generation, index: usize);

    /// Writes what comes after all choices.
    fn write_end(&mut self, out: &mut BytesMut, usage: Usage);

    /// Writes an error that came too late for a status, and what comes after it.
    fn write_error(&mut self, out: &mut BytesMut, error: &ApiError);
}

/// Collects an answer that is sent in one piece.
pub(crate) trait BodyWriter {
    /// Takes what the latest event added to a choice.
    fn add_delta(&mut self, generation: &Generation, index: usize);

    /// The body.
    fn finish(self: Box<Self>, usage: Usage) -> Bytes;
}

/// Writes chunks of chats and completions.
#[derive(Debug)]
pub(crate) struct ChunkWriter {
    head: Head,
    streaming: Streaming,
    /// `data: {…,"choices":[{"index":`
    prefix: Bytes,
    /// `data: {…,"choices":[`
    prefix_without_choice: Bytes,
    /// For each choice, whether anything of it was sent.
    has_begun: Vec<bool>,
    /// For each choice, how many calls have begun.
    num_calls: Vec<usize>,
}

impl ChunkWriter {
    pub(crate) fn new(head: Head, streaming: Streaming, num_choices: usize) -> Self {
        let mut prefix = BytesMut::from("data: ");
        head.write_start(&mut prefix, head.endpoint.chunk_object());
        json::push(&mut prefix, ",\"choices\":[");
        let prefix_without_choice = Bytes::copy_from_slice(&prefix);
        json::push(&mut prefix, "{\"index\":");
        Self {
            head,
            streaming,
            prefix: prefix.freeze(),
            prefix_without_choice,
            has_begun: vec![false; num_choices],
            num_calls: vec![0; num_choices],
        }
    }

    /// Writes the beginning of a call, or more of its arguments.
    fn write_call(&mut self, out: &mut BytesMut, generation: &Generation, index: usize, event: &CallEvent) {
        let begun = &mut self.num_calls[index];
        if let CallEvent::Call(_) = event {
            *begun += 1;
        }
        let call_index = begun.saturating_sub(1) as u64;
        self.begin(out, index);
        json::push(out, ",\"delta\":{\"tool_calls\":[{\"index\":");
        json::push_int(out, call_index);
        match event {
            CallEvent::Call(name) => {
                json::push(out, ",\"id\":");
                json::push_string(out, &call_id());
                json::push(out, ",\"type\":\"function\",\"function\":{\"name\":");
                json::push_string(out, name);
                json::push(out, ",\"arguments\":\"\"}}]},");
            }
            CallEvent::Arguments(text) | CallEvent::Text(text) => {
                json::push(out, ",\"function\":{\"arguments\":");
                json::push_string(out, text);
                json::push(out, "}}]},");
            }
        }
        json::push(out, "\"logprobs\":null,\"finish_reason\":null}]");
        self.end(out, generation);
    }

    /// What comes before a choice's first text: the role, or the echoed prompt.
    fn write_opening(&self, out: &mut BytesMut, generation: &Generation, index: usize) {
        let echo = self.head.echo_of(generation.choice(index));
        match self.head.endpoint {
            Endpoint::Chat | Endpoint::Responses => {
                self.begin(out, index);
                json::push(out, ",\"delta\":{\"role\":\"assistant\",\"content\":");
                json::push(out, if self.head.is_call { "null}," } else { "\"\"}," });
            }
            Endpoint::Completions if echo.is_empty() => return,
            Endpoint::Completions => {
                self.begin(out, index);
                self.write_text(out, echo);
            }
        }
        json::push(out, "\"logprobs\":null,\"finish_reason\":null}]");
        self.end(out, generation);
    }

    fn begin(&self, out: &mut BytesMut, index: usize) {
        out.extend_from_slice(&self.prefix);
        json::push_int(out, index as u64);
    }

    fn write_text(&self, out: &mut BytesMut, text: &str) {
        match self.head.endpoint {
            Endpoint::Chat | Endpoint::Responses => {
                json::push(out, ",\"delta\":{\"content\":\"");
                json::push_escaped(out, text);
                json::push(out, "\"},");
            }
            Endpoint::Completions => {
                json::push(out, ",\"text\":\"");
                json::push_escaped(out, text);
                json::push(out, "\",");
            }
        }
    }

    fn end(&self, out: &mut BytesMut, generation: &Generation) {
        if self.streaming.continuous_usage {
            json::push(out, ",\"usage\":");
            write_usage(out, generation.usage());
        } else if self.streaming.include_usage {
            json::push(out, ",\"usage\":null");
        }
        json::push(out, "}\n\n");
    }
}

impl StreamWriter for ChunkWriter {
    fn write_delta(&mut self, out: &mut BytesMut, generation: &Generation, index: usize) {
        let choice = generation.choice(index);
        let delta = &choice.delta;
        if !std::mem::replace(&mut self.has_begun[index], true) {
            self.write_opening(out, generation, index);
        }
        if !delta.text.is_empty() || !delta.logprobs.is_empty() {
            self.begin(out, index);
            self.write_text(out, &delta.text);
            match self.head.has_logprobs {
                false => json::push(out, "\"logprobs\":null,"),
                true => {
                    json::push(out, "\"logprobs\":");
                    self.head
                        .logprobs_of(&delta.logprobs, self.head.echo_of(choice))
                        .write(out);
                    json::push(out, ",");
                }
            }
            json::push(out, "\"finish_reason\":null}]");
            self.end(out, generation);
        }
        for event in &delta.calls {
            self.write_call(out, generation, index, event);
        }
        if let Some(finish) = delta.finish {
            self.begin(out, index);
            json::push(
                out,
                match self.head.endpoint {
                    Endpoint::Chat | Endpoint::Responses => ",\"delta\":{},\"logprobs\":null,",
                    Endpoint::Completions => ",\"text\":\"\",\"logprobs\":null,",
                },
            );
            self.head.write_finish(out, finish);
            json::push(out, "}]");
            self.end(out, generation);
        }
    }

    /// Writes the usage chunk, if it was asked for, and the end mark.
    fn write_end(&mut self, out: &mut BytesMut, usage: Usage) {
        if self.streaming.include_usage {
            out.extend_from_slice(&self.prefix_without_choice);
            json::push(out, "],\"usage\":");
            write_usage(out, usage);
            json::push(out, "}\n\n");
        }
        json::push(out, "data: [DONE]\n\n");
    }

    fn write_error(&mut self, out: &mut BytesMut, error: &ApiError) {
        json::push(out, "data: ");
        json::push(out, &error.to_json());
        json::push(out, "\n\ndata: [DONE]\n\n");
    }
}

/// Collects chats and completions.
#[derive(Debug)]
pub(crate) struct WholeWriter {
    head: Head,
    choices: Vec<WholeChoice>,
}

#[derive(Debug)]
struct WholeChoice {
    text: String,
    /// Name and arguments of each call.
    calls: Vec<(String, String)>,
    logprobs: LogprobsJson,
    finish: Option<Finish>,
}

impl WholeWriter {
    pub(crate) fn new(head: Head, generation: &Generation) -> Self {
        let choice = |index| WholeChoice {
            text: head.echo_of(generation.choice(index)).to_owned(),
            calls: Vec::new(),
            logprobs: LogprobsJson::new(head.endpoint),
            finish: None,
        };
        let choices = (0..generation.num_choices()).map(choice).collect();
        Self { head, choices }
    }

    fn write_choice(&self, out: &mut BytesMut, choice: &WholeChoice) {
        match self.head.endpoint {
            Endpoint::Chat | Endpoint::Responses => {
                json::push(out, ",\"message\":{\"role\":\"assistant\",\"content\":");
                match choice.text.is_empty() && !choice.calls.is_empty() {
                    true => json::push(out, "null"),
                    false => json::push_string(out, &choice.text),
                }
                json::push(
                    out,
                    ",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,\"reasoning\":null",
                );
                write_calls(out, &choice.calls);
                json::push(out, "}");
            }
            Endpoint::Completions => {
                json::push(out, ",\"text\":");
                json::push_string(out, &choice.text);
            }
        }
        json::push(out, ",\"logprobs\":");
        match self.head.has_logprobs {
            true => choice.logprobs.write(out),
            false => json::push(out, "null"),
        }
        json::push(out, ",");
        self.head.write_finish(
            out,
            choice
                .finish
                .expect("a generation ends when all its choices are finished"),
        );
        json::push(out, "}");
    }
}

impl BodyWriter for WholeWriter {
    fn add_delta(&mut self, generation: &Generation, index: usize) {
        let choice = generation.choice(index);
        let whole = &mut self.choices[index];
        whole.text.push_str(&choice.delta.text);
        if !choice.delta.logprobs.is_empty() {
            let shift = self.head.echo_of(choice).chars().count();
            for entry in &choice.delta.logprobs {
                whole.logprobs.push(entry, &self.head.tokenizer, shift);
            }
        }
        for event in &choice.delta.calls {
            match (event, whole.calls.last_mut()) {
                (CallEvent::Call(name), _) => whole.calls.push((name.clone(), String::new())),
                (CallEvent::Arguments(more), Some((_, arguments))) => arguments.push_str(more),
                (CallEvent::Arguments(_) | CallEvent::Text(_), _) => {}
            }
        }
        whole.finish = choice.delta.finish;
    }

    fn finish(self: Box<Self>, usage: Usage) -> Bytes {
        let mut out = BytesMut::new();
        self.head.write_start(&mut out, self.head.endpoint.object());
        json::push(&mut out, ",\"choices\":[");
        for (index, choice) in self.choices.iter().enumerate() {
            json::push(&mut out, if index == 0 { "{\"index\":" } else { ",{\"index\":" });
            json::push_int(&mut out, index as u64);
            self.write_choice(&mut out, choice);
        }
        json::push(&mut out, "],\"usage\":");
        write_usage(&mut out, usage);
        if self.head.endpoint == Endpoint::Chat {
            json::push(&mut out, ",\"service_tier\":null");
        }
        json::push(&mut out, "}");
        out.freeze()
    }
}

/// `,"tool_calls":[…]`, or nothing if there are none.
fn write_calls(out: &mut BytesMut, calls: &[(String, String)]) {
    for (index, (name, arguments)) in calls.iter().enumerate() {
        json::push(
            out,
            if index == 0 {
                ",\"tool_calls\":[{\"id\":"
            } else {
                ",{\"id\":"
            },
        );
        json::push_string(out, &call_id());
        json::push(out, ",\"type\":\"function\",\"function\":{\"name\":");
        json::push_string(out, name);
        json::push(out, ",\"arguments\":");
        json::push_string(out, arguments);
        json::push(out, "}}");
    }
    if !calls.is_empty() {
        json::push(out, "]");
    }
}

/// What the client names a call by when it sends the result.
pub(crate) fn call_id() -> String {
    format!("call_{:016x}", crate::request_id::random_u64())
}
