//! Log-probabilities in the two shapes OpenAI has for them, and in vLLM's for those of the prompt.

use std::sync::Arc;

use bytes::BytesMut;
use lapidary_engine::{SampledToken, TokenId, TokenLogprobs};
use lapidary_text::{Detokenizer, Tokenizer};

use super::Endpoint;
use crate::generate::LogprobEntry;
use crate::json;

/// How tokens are named.
#[derive(Debug)]
pub(crate) struct TokenNames {
    /// Knows their text.
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// As `token_id:<id>`, which tells apart what decodes to the same text.
    pub(crate) by_id: bool,
}

impl TokenNames {
    fn name(&self, token: TokenId) -> String {
        if self.by_id {
            format!("token_id:{token}")
        } else {
            text_of(&self.tokenizer, token)
        }
    }
}

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

/// What is said of a token beside its name and log-probability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenDetail {
    /// In a chat: its bytes, `null` if it has none.
    Chat,
    /// In a part of a response: its bytes, an empty list if it has none.
    Part,
    /// In an event of a response: nothing.
    Event,
}

/// A token's log-probability, and those of its alternatives that are to be named.
type Score<'a> = (&'a TokenLogprobs, &'a [(TokenId, f32)]);

/// A prompt whose tokens were scored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScoredPrompt<'a> {
    /// All of its tokens.
    pub(crate) tokens: &'a [TokenId],
    /// Of all but the first.
    pub(crate) scores: &'a [SampledToken],
    /// Alternatives to name; the scores may have more.
    pub(crate) num_alternatives: u32,
}

impl<'a> ScoredPrompt<'a> {
    /// Each token with its score; the first has none.
    fn entries(self) -> impl Iterator<Item = (TokenId, Option<Score<'a>>)> {
        let scores = self.scores.iter().map(move |scored| {
            let logprobs = scored.logprobs.as_deref()?;
            let count = logprobs.top.len().min(self.num_alternatives as usize);
            Some((logprobs, &logprobs.top[..count]))
        });
        self.tokens.iter().copied().zip(std::iter::once(None).chain(scores))
    }

    /// Log-probabilities to write.
    pub(crate) fn num_scores(self) -> usize {
        self.scores.len() * (self.num_alternatives as usize + 1)
    }

    /// Appends the value of `prompt_logprobs`.
    pub(crate) fn write(self, out: &mut BytesMut, tokenizer: &Tokenizer) {
        json::push(out, "[");
        for (index, (token, score)) in self.entries().enumerate() {
            separate_if(out, index > 0);
            let Some((logprobs, top)) = score else {
                json::push(out, "null");
                continue;
            };
            json::push(out, "{");
            push_ranked(out, tokenizer, token, logprobs.logprob, logprobs.rank);
            for ((other, logprob), rank) in top.iter().zip(1..).filter(|((other, _), _)| *other != token) {
                json::push(out, ",");
                push_ranked(out, tokenizer, *other, *logprob, rank);
            }
            json::push(out, "}");
        }
        json::push(out, "]");
    }
}

fn push_ranked(out: &mut BytesMut, tokenizer: &Tokenizer, token: TokenId, logprob: f32, rank: u32) {
    json::push(out, "\"");
    json::push_int(out, u64::from(token));
    json::push(out, "\":{\"logprob\":");
    json::push_logprob(out, logprob);
    json::push(out, ",\"rank\":");
    json::push_int(out, u64::from(rank));
    json::push(out, ",\"decoded_token\":");
    json::push_string(out, &text_of(tokenizer, token));
    json::push(out, "}");
}

/// For each token, the characters of text before it, when `skip_special` leaves special tokens out of the text.
fn text_offsets(tokenizer: &Tokenizer, tokens: &[TokenId], skip_special: bool) -> Vec<usize> {
    let mut detokenizer = Detokenizer::new(tokenizer, skip_special);
    let mut offsets = Vec::with_capacity(tokens.len());
    let (mut text, mut num_chars) = (String::new(), 0);
    let mut settle = |num_settled: usize, text: &mut String| {
        let settled = &tokens[offsets.len()..][..num_settled];
        let mut num_bytes = 0;
        for token in settled {
            let before = text.floor_char_boundary(num_bytes.min(text.len()));
            offsets.push(num_chars + text[..before].chars().count());
            num_bytes += tokenizer.token_bytes(*token).map_or(0, |bytes| bytes.len());
        }
        num_chars += text.chars().count();
        text.clear();
    };
    for token in tokens {
        let num_settled = detokenizer.push(*token, &mut text);
        settle(num_settled, &mut text);
    }
    let num_settled = detokenizer.finish(&mut text);
    settle(num_settled, &mut text);
    offsets
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
    pub(crate) fn push(&mut self, entry: &LogprobEntry, names: &TokenNames, offset_shift: usize) {
        match self {
            Self::Chat(content) => push_element(content, entry, names, TokenDetail::Chat),
            Self::Completions(arrays) => {
                let score = (&*entry.logprobs, entry.logprobs.top.as_slice());
                arrays.push(names, entry.token, entry.text_offset + offset_shift, Some(score));
            }
        }
    }

    /// Adds the tokens of an echoed prompt, of which a chat has none.
    pub(crate) fn push_prompt(&mut self, prompt: ScoredPrompt<'_>, names: &TokenNames, skip_special: bool) {
        let Self::Completions(arrays) = self else { return };
        let offsets = text_offsets(&names.tokenizer, prompt.tokens, skip_special);
        for ((token, score), offset) in prompt.entries().zip(offsets) {
            arrays.push(names, token, offset, score);
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
    /// Adds a token that begins after so many characters; without a score if nothing predicted it.
    fn push(&mut self, names: &TokenNames, token: TokenId, text_offset: usize, score: Option<Score<'_>>) {
        for array in [
            &mut self.text_offset,
            &mut self.token_logprobs,
            &mut self.tokens,
            &mut self.top_logprobs,
        ] {
            separate(array);
        }
        json::push_int(&mut self.text_offset, text_offset as u64);
        json::push_string(&mut self.tokens, &names.name(token));
        let Some((logprobs, top)) = score else {
            json::push(&mut self.token_logprobs, "null");
            json::push(&mut self.top_logprobs, "null");
            return;
        };
        json::push_logprob(&mut self.token_logprobs, logprobs.logprob);
        // The token itself is always in. Several byte tokens may look alike: a key appears once, with its best value.
        let mut seen: Vec<String> = Vec::with_capacity(top.len() + 1);
        json::push(&mut self.top_logprobs, "{");
        for (token, logprob) in top.iter().copied().chain([(token, logprobs.logprob)]) {
            let name = names.name(token);
            if !seen.contains(&name) {
                separate_if(&mut self.top_logprobs, !seen.is_empty());
                json::push_string(&mut self.top_logprobs, &name);
                json::push(&mut self.top_logprobs, ":");
                json::push_logprob(&mut self.top_logprobs, logprob);
                seen.push(name);
            }
        }
        json::push(&mut self.top_logprobs, "}");
    }
}

/// Appends a token to the elements of an array.
pub(crate) fn push_element(content: &mut BytesMut, entry: &LogprobEntry, names: &TokenNames, detail: TokenDetail) {
    separate(content);
    push_token(content, names, (entry.token, entry.logprobs.logprob), detail);
    json::push(content, ",\"top_logprobs\":[");
    for (index, (token, logprob)) in entry.logprobs.top.iter().enumerate() {
        separate_if(content, index > 0);
        push_token(content, names, (*token, *logprob), detail);
        json::push(content, "}");
    }
    json::push(content, "]}");
}

/// Without the closing brace.
fn push_token(out: &mut BytesMut, names: &TokenNames, (token, logprob): (TokenId, f32), detail: TokenDetail) {
    json::push(out, "{\"token\":");
    json::push_string(out, &names.name(token));
    json::push(out, ",\"logprob\":");
    json::push_logprob(out, logprob);
    if detail == TokenDetail::Event {
        return;
    }
    match names.tokenizer.token_bytes(token) {
        None if detail == TokenDetail::Chat => json::push(out, ",\"bytes\":null"),
        bytes => {
            let bytes = bytes.unwrap_or_default();
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
