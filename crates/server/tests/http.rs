//! The router over a scripted engine: what clients see, byte by byte.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

#[path = "http/access.rs"]
mod access;
#[path = "http/accounting.rs"]
mod accounting;
#[path = "http/answers.rs"]
mod answers;
#[path = "http/bodies.rs"]
mod bodies;
#[path = "http/disconnects.rs"]
mod disconnects;
#[path = "http/engine_trouble.rs"]
mod engine_trouble;
#[path = "http/extras.rs"]
mod extras;
#[path = "../../text/tests/text/hostile.rs"]
mod hostile;
#[path = "http/large.rs"]
mod large;
#[path = "http/logprobs.rs"]
mod logprobs;
#[path = "http/openapi.rs"]
mod openapi;
#[path = "http/page.rs"]
mod page;
#[path = "http/probes.rs"]
mod probes;
#[path = "http/prompts.rs"]
mod prompts;
#[path = "http/protocol.rs"]
mod protocol;
#[path = "http/responses.rs"]
mod responses;
#[path = "http/scoring.rs"]
mod scoring;
#[path = "support/sent_body.rs"]
mod sent_body;
#[path = "http/streams.rs"]
mod streams;
#[path = "http/structured.rs"]
mod structured;
mod support;
#[path = "http/tokenize.rs"]
mod tokenize;
#[path = "http/tools.rs"]
mod tools;
#[path = "http/traces.rs"]
mod traces;
#[path = "http/vocabulary.rs"]
mod vocabulary;
