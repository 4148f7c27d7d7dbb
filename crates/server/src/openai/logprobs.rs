//! Log-probabilities in the two shapes OpenAI has for them.

use bytes::BytesMut;
use lapidary_engine::TokenId;
use lapidary_text::Tokenizer;

use super::Endpoint;
use crate::generate::LogprobEntry;
use crate::json;

/// The log-probabilities of one choice of a body or a chunk, written as they come.
#[derive(Debug)]
pub(crate) enum LogprobsJson {
    /// The elements of `content`.
    Chat(BytesMut),
    /// The elements of four parallel arrays.
    Completions(Arrays),
}

/// `logprobs` of a completion.
#[derive(Debug, Default)]
pub(crate) struct Arrays {
    text_offset: BytesMut,
    token_logprobs: BytesMut,
    tokens: BytesMut,
    top_logprobs: BytesMut,
}

impl LogprobsJson {
    /// Without entries.
    pub(crate) fn new(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Chat | Endpoint::Responses => Self::Chat(BytesMut::new()),
            Endpoint::Completions => Self::Completions(Arrays::default()),
        }
    }

    /// Adds a token. `offset_shift` is the number of characters of echoed prompt before the answer.
    pub(crate) fn push(&mut self, entry: &LogprobEntry, tokenizer: &Tokenizer, offset_shift: usize) {
        match self {
            Self::Chat(content) => push_chat(content, entry, tokenizer),
            Self::Completions(arrays) => arrays.push(entry, tokenizer, offset_shift),
        }
    }

    /// Appends the value of `logprobs`.
    pub(crate) fn write(&self, out: &mut BytesMut) {
        match self {
            Self::Chat(content) => {
                json::push(out, "{\"content\":[");
                out.extend_from_slice(content);
                json::push(out, "],\"refusal\":null}");
            }
            Self::Completions(arrays) => {
                json::push(out, "{\"text_offset\":[");
                out.extend_from_slice(&arrays.text_offset);
                json::push(out, "],\"token_logprobs\":[");
                out.extend_from_slice(&arrays.token_logprobs);
                json::push(out, "],\"tokens\":[");
                out.extend_from_slice(&arrays.tokens);
                json::push(out, "],\"top_logprobs\":[");
                out.extend_from_slice(&arrays.top_logprobs);
                json::push(out, "]}");
            }
        }
    }
}

impl Arrays {
    fn push(&mut self, entry: &LogprobEntry, tokenizer: &Tokenizer, offset_shift: usize) {
        for array in [
            &mut self.text_offset,
            &mut self.token_logprobs,
            &mut self.tokens,
            &mut self.top_logprobs,
        ] {
            separate(array);
        }
        json::push_int(&mut self.text_offset, (entry.text_offset + offset_shift) as u64);
        json::push_logprob(&mut self.token_logprobs, entry.logprobs.logprob);
        json::push_string(&mut self.tokens, &text_of(tokenizer, entry.token));
        // The sampled token is always in. Several byte tokens may look alike: a key appears once, with its best value.
        let mut seen: Vec<String> = Vec::with_capacity(entry.logprobs.top.len() + 1);
        let sampled = (entry.token, entry.logprobs.logprob);
        json::push(&mut self.top_logprobs, "{");
        for (token, logprob) in entry.logprobs.top.iter().copied().chain([sampled]) {
            let text = text_of(tokenizer, token);
            if !seen.contains(&text) {
                separate_if(&mut self.top_logprobs, !seen.is_empty());
                json::push_string(&mut self.top_logprobs, &text);
                json::push(&mut self.top_logprobs, ":");
                json::push_logprob(&mut self.top_logprobs, logprob);
                seen.push(text);
            }
        }
        json::push(&mut self.top_logprobs, "}");
    }
}

fn push_chat(content: &mut BytesMut, entry: &LogprobEntry, tokenizer: &Tokenizer) {
    separate(content);
    push_token(content, tokenizer, entry.token, entry.logprobs.logprob);
    json::push(content, ",\"top_logprobs\":[");
    for (index, (token, logprob)) in entry.logprobs.top.iter().enumerate() {
        separate_if(content, index > 0);
        push_token(content, tokenizer, *token, *logprob);
        json::push(content, "}");
    }
    json::push(content, "]}");
}

/// Without the closing brace.
fn push_token(out: &mut BytesMut, tokenizer: &Tokenizer, token: TokenId, logprob: f32) {
    json::push(out, "{\"token\":");
    json::push_string(out, &text_of(tokenizer, token));
    json::push(out, ",\"logprob\":");
    json::push_logprob(out, logprob);
    match tokenizer.token_bytes(token) {
        None => json::push(out, ",\"bytes\":null"),
        Some(bytes) => {
            json::push(out, ",\"bytes\":[");
            for (index, byte) in bytes.iter().enumerate() {
                separate_if(out, index > 0);
                json::push_int(out, u64::from(*byte));
            }
            json::push(out, "]");
        }
    }
}

fn text_of(tokenizer: &Tokenizer, token: TokenId) -> String {
    tokenizer.token_text(token).unwrap_or_default()
}

fn separate(array: &mut BytesMut) {
    let is_first = array.is_empty();
    separate_if(array, !is_first);
}

fn separate_if(out: &mut BytesMut, condition: bool) {
    if condition {
        json::push(out, ",");
    }
}
