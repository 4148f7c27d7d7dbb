//! Which tokens answers may use: vLLM's `allowed_token_ids` and `bad_words`.

use std::sync::Arc;

use lapidary_engine::TokenId;
use lapidary_text::{Tokenizer, TokenizerError};

use super::Params;
use super::prompt::MAX_INLINE_BYTES;
use super::types::GenerationBody;
use crate::constraint::TokenRules;
use crate::error::ApiError;
use crate::lenient::Int;
use crate::state::{AppState, ServedModel};

/// Bytes of the banned words of one request: each is tokenised twice.
const MAX_BAD_WORD_BYTES: usize = 32 << 10;

/// What a request says of the tokens that answers may use, checked.
#[derive(Debug, Default)]
pub(crate) struct Vocabulary {
    /// Only these. Stop tokens are no exception.
    pub(crate) allowed: Option<Vec<TokenId>>,
    /// None of these.
    pub(crate) bad_words: Arc<[String]>,
}

impl Vocabulary {
    /// Checks what `body` asks for.
    pub(super) fn new(body: &GenerationBody, vocab_size: u32) -> Result<Self, ApiError> {
        Ok(Self {
            allowed: allowed(body.allowed_token_ids.as_deref(), vocab_size)?,
            bad_words: bad_words(body.bad_words.as_deref().unwrap_or_default())?,
        })
    }

    /// The rules that come of it.
    pub(super) async fn rules(
        params: &Params,
        state: &AppState,
        model: &ServedModel,
    ) -> Result<Option<TokenRules>, ApiError> {
        let Self { allowed, bad_words } = &params.vocabulary;
        if allowed.is_none() && bad_words.is_empty() {
            return Ok(None);
        }
        let (tokenizer, words) = (Arc::clone(&model.tokenizer), Arc::clone(bad_words));
        let num_bytes: usize = words.iter().map(String::len).sum();
        let tokenise = move || {
            let spellings = words.iter().map(|word| spellings(&tokenizer, word));
            spellings.collect::<Result<Vec<_>, _>>()
        };
        let spellings = state.compute(num_bytes > MAX_INLINE_BYTES, tokenise).await?;
        let spellings = spellings.map_err(|error| {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "bad_words could not be tokenised"
            );
            ApiError::invalid("bad_words", "The words cannot be tokenised.")
        })?;
        Ok(Some(TokenRules::new(
            model.vocab_size,
            allowed.as_deref(),
            spellings.into_iter().flatten().collect(),
            Arc::clone(&model.stop_token_ids),
        )))
    }
}

fn allowed(ids: Option<&[Int]>, vocab_size: u32) -> Result<Option<Vec<TokenId>>, ApiError> {
    let Some(ids) = ids else { return Ok(None) };
    if ids.is_empty() {
        let message = "allowed_token_ids is not None and empty!";
        return Err(ApiError::invalid("allowed_token_ids", message));
    }
    let checked = ids.iter().enumerate().map(|(index, &Int(id))| {
        TokenId::try_from(id).ok().filter(|id| *id < vocab_size).ok_or_else(|| {
            let message = format!(
                "allowed_token_ids contains out-of-vocab token id! It names token {id}, but the vocabulary has \
                 {vocab_size} tokens."
            );
            ApiError::invalid(format!("allowed_token_ids[{index}]"), message)
        })
    });
    checked.collect::<Result<Vec<_>, _>>().map(Some)
}

fn bad_words(words: &[String]) -> Result<Arc<[String]>, ApiError> {
    if words.iter().any(String::is_empty) {
        let message = "bad_words cannot contain an empty string.";
        return Err(ApiError::invalid("bad_words", message));
    }
    let num_bytes: usize = words.iter().map(String::len).sum();
    if num_bytes > MAX_BAD_WORD_BYTES {
        let message = format!("bad_words has {num_bytes} bytes, the limit is {MAX_BAD_WORD_BYTES}.");
        return Err(ApiError::invalid("bad_words", message));
    }
    Ok(words.into())
}

/// The tokens of a word at the beginning of a text and after a space.
fn spellings(tokenizer: &Tokenizer, word: &str) -> Result<Vec<Vec<TokenId>>, TokenizerError> {
    let bare = match word.trim_start() {
        // White space is what is meant.
        "" => return Ok(vec![tokenizer.encode(word, false)?]),
        bare => bare,
    };
    let first = tokenizer.encode(bare, false)?;
    let mut spaced = tokenizer.encode(&format!(" {bare}"), false)?;
    // Where the space is a token of its own, the first spelling covers both.
    if spaced.ends_with(&first) {
        spaced.clear();
    }
    Ok([first, spaced]
        .into_iter()
        .filter(|tokens| !tokens.is_empty())
        .collect())
}
