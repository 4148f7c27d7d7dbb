//! The prompts of a completion: texts or token ids, one or several.

use std::sync::Arc;

use lapidary_engine::TokenId;

use super::prompt::{MAX_INLINE_IDS, Source, Truncation, check_bytes, check_num_tokens, compute_with, encode};
use super::types::{GenerationBody, Prompt};
use super::{Params, Prompts};
use crate::error::ApiError;
use crate::lenient::{Flag, Int};
use crate::state::{AppState, ServedModel};

/// Tokenises texts, checks token ids.
pub(super) async fn prompts(
    state: &AppState,
    model: &ServedModel,
    body: GenerationBody,
    params: &Params,
) -> Result<Prompts, ApiError> {
    let prompts = match body.prompt.ok_or_else(|| ApiError::missing("prompt"))? {
        Prompt::Texts(texts) => {
            let add_bos = model.tokenizer.adds_bos() && body.add_special_tokens.is_none_or(|Flag(add)| add);
            for text in &texts {
                check_bytes(model, text.len(), params.truncation, "prompt")?;
            }
            let echoes = match params.echo && params.truncation.is_none() {
                true => texts.clone(),
                false => Vec::new(),
            };
            let sources = texts.into_iter().map(|text| Source::Text { text, add_bos }).collect();
            let tokens = encode(state, model, sources, params.truncation, "prompt").await?;
            match params.echo && params.truncation.is_some() {
                true => echoed(state, model, tokens, params.skip_special_tokens).await?,
                false => Prompts { tokens, echoes },
            }
        }
        Prompt::Tokens(lists) => {
            let (truncation, num_ids) = (params.truncation, lists.iter().map(Vec::len).sum::<usize>());
            let check = move |model: &ServedModel| {
                let lists = lists.into_iter().enumerate();
                let checked = lists.map(|(index, ids)| token_ids(model, index, ids, truncation));
                checked.collect::<Result<Vec<_>, _>>()
            };
            let tokens = compute_with(state, model, num_ids > MAX_INLINE_IDS, check).await?;
            match params.echo {
                true => echoed(state, model, tokens, params.skip_special_tokens).await?,
                false => Prompts {
                    tokens,
                    echoes: Vec::new(),
                },
            }
        }
    };
    match prompts.tokens.iter().position(|tokens| tokens.is_empty()) {
        Some(index) => Err(ApiError::invalid(
            format!("prompt[{index}]"),
            "The prompt has no tokens.",
        )),
        None => Ok(prompts),
    }
}

/// Prompts whose answers begin with them.
async fn echoed(
    state: &AppState,
    model: &ServedModel,
    tokens: Vec<Arc<[TokenId]>>,
    skip_special: bool,
) -> Result<Prompts, ApiError> {
    let num_ids: usize = tokens.iter().map(|tokens| tokens.len()).sum();
    let decode = move |model: &ServedModel| {
        let echoes = tokens.iter().map(|tokens| model.tokenizer.decode(tokens, skip_special));
        let echoes = echoes.collect();
        Ok(Prompts { tokens, echoes })
    };
    compute_with(state, model, num_ids > MAX_INLINE_IDS, decode).await
}

/// Refuses more prompts than may run, before anything is done for them.
pub(super) fn check_count(prompt: Option<&Prompt>, n: u32, limit: u32) -> Result<(), ApiError> {
    let num_prompts = match prompt {
        None => return Ok(()),
        Some(Prompt::Texts(texts)) => texts.len(),
        Some(Prompt::Tokens(lists)) => lists.len(),
    };
    if num_prompts == 0 {
        return Err(ApiError::invalid("prompt", "prompt must not be empty."));
    }
    if num_prompts as u64 * u64::from(n) > u64::from(limit) {
        return Err(ApiError::InvalidRequest {
            message: format!("{num_prompts} prompts with n={n} are more than the limit of {limit} answers a request."),
            param: Some("prompt".into()),
            code: Some("array_above_max_length"),
        });
    }
    Ok(())
}

fn token_ids(
    model: &ServedModel,
    index: usize,
    mut ids: Vec<Int>,
    truncation: Option<Truncation>,
) -> Result<Arc<[TokenId]>, ApiError> {
    if let Some(truncation) = truncation {
        truncation.cut(&mut ids, 0);
    }
    check_num_tokens(model, ids.len(), "prompt")?;
    let vocab_size = model.vocab_size;
    let checked = ids.iter().map(|&Int(id)| {
        TokenId::try_from(id).ok().filter(|id| *id < vocab_size).ok_or_else(|| {
            let message = format!("prompt names token {id}, but the vocabulary has {vocab_size} tokens.");
            ApiError::invalid(format!("prompt[{index}]"), message)
        })
    });
    checked.collect()
}
