//! A request as a span: vLLM's attributes, as OTLP's JSON has them.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::TraceContext;
use crate::generate::{Timings, Usage};
use crate::metrics::Outcome;
use crate::openai::{Endpoint, Params};

/// vLLM's name of a request's span.
const NAME: &str = "llm_request";
/// OTLP's `SPAN_KIND_SERVER`.
const SERVER: u32 = 2;
/// OTLP's `STATUS_CODE_ERROR`.
const ERROR: u32 = 2;
/// Flag of a trace that is recorded.
const SAMPLED: u32 = 1;

/// What a client wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    temperature: f32,
    top_p: f32,
    max_tokens: Option<u32>,
    n: u32,
    num_prompts: usize,
}

impl Asked {
    pub(crate) fn new(params: &Params, num_prompts: usize) -> Self {
        Self {
            temperature: params.sampling.temperature,
            top_p: params.sampling.top_p,
            max_tokens: params.max_tokens,
            n: params.n,
            num_prompts,
        }
    }
}

/// A request that is over.
#[derive(Debug)]
pub(crate) struct Span {
    pub(crate) context: TraceContext,
    pub(crate) request_id: String,
    pub(crate) model: String,
    pub(crate) endpoint: Endpoint,
    /// Of the answer.
    pub(crate) status: u16,
    pub(crate) outcome: Outcome,
    pub(crate) usage: Usage,
    pub(crate) timings: Timings,
    /// Absent where the request was refused before it was understood.
    pub(crate) asked: Option<Asked>,
    pub(crate) end: SystemTime,
    pub(crate) duration: Duration,
}

impl Span {
    /// As an element of OTLP's `spans`.
    pub(super) fn to_json(&self) -> Value {
        let context = &self.context;
        let mut span = json!({
            "traceId": context.trace_id_hex(),
            "spanId": format!("{:016x}", context.span_id),
            "flags": SAMPLED,
            "name": NAME,
            "kind": SERVER,
            "startTimeUnixNano": unix_nanos(self.end - self.duration),
            "endTimeUnixNano": unix_nanos(self.end),
            "attributes": self.attributes(),
        });
        if let Some(parent) = context.parent_id {
            span["parentSpanId"] = format!("{parent:016x}").into();
        }
        if !context.state.is_empty() {
            span["traceState"] = context.state.as_str().into();
        }
        // A server's span is in error where the server is at fault.
        if self.status >= 500 {
            span["status"] = json!({ "code": ERROR, "message": self.outcome.as_str() });
        }
        span
    }

    fn attributes(&self) -> Vec<Value> {
        let mut attributes = Attributes::default();
        attributes.text("gen_ai.request.id", &self.request_id);
        attributes.text("gen_ai.request.model", &self.model);
        attributes.text("gen_ai.operation.name", self.endpoint.operation());
        attributes.integer("http.response.status_code", self.status.into());
        attributes.text("lapidary.outcome", self.outcome.as_str());
        attributes.integer("gen_ai.usage.prompt_tokens", self.usage.prompt_tokens.into());
        attributes.integer("gen_ai.usage.completion_tokens", self.usage.completion_tokens.into());
        attributes.integer("lapidary.usage.cached_tokens", self.usage.cached_tokens.into());
        if let Some(asked) = &self.asked {
            attributes.float("gen_ai.request.temperature", asked.temperature.into());
            attributes.float("gen_ai.request.top_p", asked.top_p.into());
            if let Some(max_tokens) = asked.max_tokens {
                attributes.integer("gen_ai.request.max_tokens", max_tokens.into());
            }
            attributes.integer("gen_ai.request.n", asked.n.into());
            let num_sequences = asked.num_prompts as u64 * u64::from(asked.n);
            attributes.integer("gen_ai.usage.num_sequences", num_sequences);
        }
        attributes.seconds("gen_ai.latency.e2e", Some(self.duration));
        let timings = &self.timings;
        attributes.seconds("gen_ai.latency.time_in_queue", timings.queue);
        attributes.seconds("gen_ai.latency.time_to_first_token", timings.to_first_token);
        attributes.seconds("gen_ai.latency.time_in_model_prefill", timings.prefill());
        attributes.seconds("gen_ai.latency.time_in_model_decode", timings.decode());
        attributes.seconds("gen_ai.latency.time_in_model_inference", timings.generation);
        attributes.0
    }
}

/// OTLP's `KeyValue`s.
#[derive(Default)]
pub(super) struct Attributes(pub(super) Vec<Value>);

impl Attributes {
    pub(super) fn text(&mut self, key: &str, value: &str) {
        self.0.push(json!({ "key": key, "value": { "stringValue": value } }));
    }

    /// 64-bit integers are strings in JSON of protocol buffers.
    fn integer(&mut self, key: &str, value: u64) {
        self.0
            .push(json!({ "key": key, "value": { "intValue": value.to_string() } }));
    }

    fn float(&mut self, key: &str, value: f64) {
        self.0.push(json!({ "key": key, "value": { "doubleValue": value } }));
    }

    fn seconds(&mut self, key: &str, value: Option<Duration>) {
        if let Some(value) = value {
            self.float(key, value.as_secs_f64());
        }
    }
}

fn unix_nanos(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_nanos().to_string()
}
