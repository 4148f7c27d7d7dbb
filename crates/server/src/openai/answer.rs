//! The bodies of answers: chunks of a stream, and the whole at once. Byte for byte what clients see.

use std::fmt::Write;

use bytes::{Bytes, BytesMut};
use std::sync::Arc;
use std::time::Duration;

use lapidary_engine::TokenId;
use lapidary_text::CallEvent;
use tokio::runtime::{Handle, RuntimeFlavor};

use super::Endpoint;
use super::logprobs::{LogprobsJson, ScoredPrompt, TokenNames};
use super::params::{Params, Streaming};
use super::tools::Tools;
use crate::error::ApiError;
use crate::generate::{Choice, Finish, Generation, LogprobEntry, Usage};
use crate::json;
use crate::state::Limits;

/// As many log-probabilities are written where they are: about a millisecond.
const MAX_INLINE_SCORES: usize = 4096;

/// Writes what takes long. The connection's other work has to wait for that anyway; what other connections have to do goes
/// on elsewhere meanwhile.
fn write_aside<T>(is_long: bool, write: impl FnOnce() -> T) -> T {
    // A runtime of one thread has no elsewhere.
    let has_elsewhere =
        || Handle::try_current().is_ok_and(|handle| handle.runtime_flavor() == RuntimeFlavor::MultiThread);
    match is_long && has_elsewhere() {
        true => tokio::task::block_in_place(write),
        false => write(),
    }
}

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
    /// Alternatives of each prompt token at the beginning of `logprobs`, if they begin with those.
    pub(crate) echoed_logprobs: Option<u32>,
    /// Alternatives of each prompt token in `prompt_logprobs`, if there is such a field.
    pub(crate) prompt_logprobs: Option<u32>,
    /// Whether usage says how much of the prompt was cached.
    pub(crate) has_cached_tokens: bool,
    /// Whether the answer says how long it took.
    pub(crate) has_timings: bool,
    /// Whether token ids are shown.
    pub(crate) has_token_ids: bool,
    /// Whether special tokens are left out of texts.
    pub(crate) skip_special_tokens: bool,
    /// For each prompt, the text that comes before the answer; empty without `echo`.
    pub(crate) echoes: Vec<String>,
    /// Whether answers have to be calls of functions.
    pub(crate) is_call: bool,
    /// Names tokens in `logprobs`.
    pub(crate) names: TokenNames,
}

impl Head {
    /// Of an answer that begins now.
    pub(crate) fn new(
        endpoint: Endpoint,
        request_id: &str,
        model: &crate::state::ServedModel,
        params: &Params,
        limits: &Limits,
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
            echoed_logprobs: params.echoed_logprobs(),
            prompt_logprobs: params.prompt_logprobs,
            has_cached_tokens: limits.prompt_tokens_details,
            has_timings: limits.per_request_metrics,
            has_token_ids: params.returns_token_ids,
            skip_special_tokens: params.skip_special_tokens,
            echoes,
            is_call: params.tools.as_ref().is_some_and(Tools::is_forced),
            names: TokenNames {
                tokenizer: Arc::clone(&model.tokenizer),
                by_id: params.names_tokens_by_id,
            },
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
            logprobs.push(entry, &self.names, shift);
        }
        logprobs
    }

    /// Adds what `logprobs` says of an echoed prompt.
    fn push_echo(&self, logprobs: &mut LogprobsJson, generation: &Generation, index: usize) {
        let Some(num_alternatives) = self.echoed_logprobs else {
            return;
        };
        let prompt = ScoredPrompt {
            tokens: generation.prompt_of(index),
            scores: &generation.choice(index).prompt_scores,
            num_alternatives,
        };
        write_aside(prompt.num_scores() > MAX_INLINE_SCORES, || {
            logprobs.push_prompt(prompt, &self.names, self.skip_special_tokens);
        });
    }

    /// `,"prompt_logprobs":…,"prompt_token_ids":…`, as far as they were asked for.
    fn write_prompt(&self, out: &mut BytesMut, generation: &Generation, index: usize) {
        let tokens = generation.prompt_of(index);
        if let Some(num_alternatives) = self.prompt_logprobs {
            let prompt = ScoredPrompt {
                tokens,
                scores: &generation.choice(index).prompt_scores,
                num_alternatives,
            };
            json::push(out, ",\"prompt_logprobs\":");
            prompt.write(out, &self.names.tokenizer);
        }
        if self.has_token_ids {
            json::push(out, ",\"prompt_token_ids\":");
            write_ids(out, tokens);
        }
    }

    fn write_usage(&self, out: &mut BytesMut, usage: Usage) {
        let Usage {
            prompt_tokens,
            completion_tokens,
            cached_tokens,
        } = usage;
        let total_tokens = u64::from(prompt_tokens) + u64::from(completion_tokens);
        write!(
            out,
            "{{\"prompt_tokens\":{prompt_tokens},\"total_tokens\":{total_tokens},\
             \"completion_tokens\":{completion_tokens},\"prompt_tokens_details\":"
        )
        .expect("BytesMut grows");
        match self.has_cached_tokens {
            true => write!(out, "{{\"cached_tokens\":{cached_tokens}}}}}").expect("BytesMut grows"),
            false => json::push(out, "null}"),
        }
    }

    /// `,"metrics":{…}`, if answers have any.
    fn write_timings(&self, out: &mut BytesMut, generation: &Generation) {
        if !self.has_timings {
            return;
        }
        let timings = generation.timings();
        json::push(out, ",\"metrics\":{");
        write_ms(out, "time_to_first_token_ms", timings.to_first_token);
        json::push(out, ",");
        write_ms(out, "generation_time_ms", timings.generation);
        json::push(out, ",");
        write_ms(out, "queue_time_ms", timings.queue);
        json::push(out, ",");
        write_ms(out, "mean_itl_ms", timings.mean_inter_token);
        json::push(out, ",\"tokens_per_second\":");
        match timings.tokens_per_second {
            None => json::push(out, "null}"),
            Some(rate) => write!(out, "{rate:.3}}}").expect("BytesMut grows"),
        }
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

fn write_ids(out: &mut BytesMut, tokens: &[TokenId]) {
    json::push(out, "[");
    for (index, token) in tokens.iter().enumerate() {
        json::push(out, if index == 0 { "" } else { "," });
        json::push_int(out, u64::from(*token));
    }
    json::push(out, "]");
}

/// Milliseconds with three decimals; `null` if there were none.
fn write_ms(out: &mut BytesMut, name: &str, time: Option<Duration>) {
    write!(out, "\"{name}\":").expect("BytesMut grows");
    match time {
        None => json::push(out, "null"),
        Some(time) => write!(out, "{:.3}", time.as_secs_f64() * 1e3).expect("BytesMut grows"),
    }
}

/// Writes an answer as server-sent events.
pub(crate) trait StreamWriter: std::fmt::Debug + Send {
    /// Writes what the latest event added to a choice; nothing if there is nothing to show.
    fn write_delta(&mut self, out: &mut BytesMut, generation: &Generation, index: usize);

    /// Writes what comes after all choices.
    fn write_end(&mut self, out: &mut BytesMut, generation: &Generation, usage: Usage);

    /// Writes an error that came too late for a status, and what comes after it.
    fn write_error(&mut self, out: &mut BytesMut, error: &ApiError);
}

/// Collects an answer that is sent in one piece.
pub(crate) trait BodyWriter {
    /// Takes what the latest event added to a choice.
    fn add_delta(&mut self, generation: &Generation, index: usize);

    /// The body.
    fn finish(self: Box<Self>, generation: &Generation, usage: Usage) -> Bytes;
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
        let mut logprobs = None;
        match self.head.endpoint {
            Endpoint::Chat | Endpoint::Responses => {
                self.begin(out, index);
                json::push(out, ",\"delta\":{\"role\":\"assistant\",\"content\":");
                if self.head.is_call {
                    json::push(out, "null},");
                } else {
                    json::push(out, "\"");
                    json::push_escaped(out, echo);
                    json::push(out, "\"},");
                }
            }
            Endpoint::Completions => {
                if echo.is_empty() && self.head.echoed_logprobs.is_none() && !self.head.has_token_ids {
                    return;
                }
                self.begin(out, index);
                self.write_text(out, echo);
                if self.head.echoed_logprobs.is_some() {
                    let prompt = logprobs.insert(LogprobsJson::new(self.head.endpoint));
                    self.head.push_echo(prompt, generation, index);
                }
            }
        }
        self.write_logprobs(out, logprobs);
        json::push(out, "\"finish_reason\":null");
        // Of a completion in the choice, of a chat beside it.
        if self.head.endpoint == Endpoint::Completions {
            self.head.write_prompt(out, generation, index);
        }
        json::push(out, "}]");
        if self.head.endpoint == Endpoint::Chat {
            self.head.write_prompt(out, generation, index);
        }
        self.end(out, generation);
    }

    /// `"logprobs":…,`
    fn write_logprobs(&self, out: &mut BytesMut, logprobs: Option<LogprobsJson>) {
        json::push(out, "\"logprobs\":");
        match logprobs {
            None => json::push(out, "null"),
            Some(logprobs) => logprobs.write(out),
        }
        json::push(out, ",");
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
            self.head.write_usage(out, generation.usage());
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
        if !delta.text.is_empty() || !delta.logprobs.is_empty() || (self.head.has_token_ids && delta.token.is_some()) {
            self.begin(out, index);
            self.write_text(out, &delta.text);
            let echo = self.head.echo_of(choice);
            let logprobs = || self.head.logprobs_of(&delta.logprobs, echo);
            self.write_logprobs(out, self.head.has_logprobs.then(logprobs));
            json::push(out, "\"finish_reason\":null");
            if self.head.has_token_ids {
                json::push(out, ",\"token_ids\":");
                write_ids(out, delta.token.as_slice());
            }
            json::push(out, "}]");
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
    fn write_end(&mut self, out: &mut BytesMut, generation: &Generation, usage: Usage) {
        if self.streaming.include_usage {
            out.extend_from_slice(&self.prefix_without_choice);
            json::push(out, "],\"usage\":");
            self.head.write_usage(out, usage);
            self.head.write_timings(out, generation);
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
    token_ids: Vec<TokenId>,
    has_begun: bool,
    finish: Option<Finish>,
}

impl WholeWriter {
    pub(crate) fn new(head: Head, generation: &Generation) -> Self {
        let choice = |index| WholeChoice {
            text: head.echo_of(generation.choice(index)).to_owned(),
            calls: Vec::new(),
            logprobs: LogprobsJson::new(head.endpoint),
            token_ids: Vec::new(),
            has_begun: false,
            finish: None,
        };
        let choices = (0..generation.num_choices()).map(choice).collect();
        Self { head, choices }
    }

    /// All of a choice that was generated, without the closing brace.
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
        if self.head.has_token_ids {
            json::push(out, ",\"token_ids\":");
            write_ids(out, &choice.token_ids);
        }
    }
}

impl BodyWriter for WholeWriter {
    fn add_delta(&mut self, generation: &Generation, index: usize) {
        let choice = generation.choice(index);
        let whole = &mut self.choices[index];
        if !std::mem::replace(&mut whole.has_begun, true) {
            self.head.push_echo(&mut whole.logprobs, generation, index);
        }
        whole.text.push_str(&choice.delta.text);
        if self.head.has_token_ids {
            whole.token_ids.extend(choice.delta.token);
        }
        if !choice.delta.logprobs.is_empty() {
            let shift = self.head.echo_of(choice).chars().count();
            for entry in &choice.delta.logprobs {
                whole.logprobs.push(entry, &self.head.names, shift);
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

    fn finish(self: Box<Self>, generation: &Generation, usage: Usage) -> Bytes {
        let num_scores = |index| match self.head.prompt_logprobs {
            Some(count) => generation.choice(index).prompt_scores.len() * (count as usize + 1),
            None => 0,
        };
        let num_scores: usize = (0..self.choices.len()).map(num_scores).sum();
        write_aside(num_scores > MAX_INLINE_SCORES, || self.write(generation, usage))
    }
}

impl WholeWriter {
    fn write(&self, generation: &Generation, usage: Usage) -> Bytes {
        let mut out = BytesMut::new();
        self.head.write_start(&mut out, self.head.endpoint.object());
        json::push(&mut out, ",\"choices\":[");
        for (index, choice) in self.choices.iter().enumerate() {
            json::push(&mut out, if index == 0 { "{\"index\":" } else { ",{\"index\":" });
            json::push_int(&mut out, index as u64);
            self.write_choice(&mut out, choice);
            if self.head.endpoint == Endpoint::Completions {
                self.head.write_prompt(&mut out, generation, index);
            }
            json::push(&mut out, "}");
        }
        json::push(&mut out, "],\"usage\":");
        self.head.write_usage(&mut out, usage);
        if self.head.endpoint == Endpoint::Chat {
            json::push(&mut out, ",\"service_tier\":null");
            self.head.write_prompt(&mut out, generation, 0);
        }
        self.head.write_timings(&mut out, generation);
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::write_aside;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn others_go_on_while_a_long_answer_is_written() {
        let (done, is_done) = channel();
        let writing = tokio::spawn(async move {
            // Runs on the only worker, once that is free.
            tokio::spawn(async move { done.send(()) });
            write_aside(true, || is_done.recv())
        });
        writing.await.unwrap().unwrap();
    }
}
