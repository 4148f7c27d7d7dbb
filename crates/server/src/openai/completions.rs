//! The prompts of a completion: texts or token ids, one or several.

use std::sync::Arc;

use lapidary_engine::TokenId;

use super::prompt::{Source, check_num_tokens, encode};
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
    let prompt = body.prompt.ok_or_else(|| ApiError::missing("prompt"))?;
    let num_prompts = match &prompt {
        Prompt::Texts(texts) => texts.len(),
        Prompt::Tokens(lists) => lists.len(),
    };
    check_count(num_prompts, params.n, state.limits.max_sequences_per_request)?;
    let mut prompts = Prompts {
        tokens: Vec::with_capacity(num_prompts),
        echoes: Vec::new(),
    };
    match prompt {
        Prompt::Texts(texts) => {
            let add_bos = model.tokenizer.adds_bos() && body.add_special_tokens.is_none_or(|Flag(add)| add);
            if params.echo && params.truncation.is_none() {
                prompts.echoes.clone_from(&texts);
            }
            let sources = texts.into_iter().map(|text| Source::Text { text, add_bos }).collect();
            prompts.tokens = encode(state, model, sources, params.truncation, "prompt").await?;
            if params.echo && params.truncation.is_some() {
                let left = |tokens: &Arc<[TokenId]>| model.tokenizer.decode(tokens, params.skip_special_tokens);
                prompts.echoes = prompts.tokens.iter().map(left).collect();
            }
        }
        Prompt::Tokens(lists) => {
            for (index, mut ids) in lists.into_iter().enumerate() {
                if let Some(truncation) = params.truncation {
                    truncation.cut(&mut ids, 0);
                }
                check_num_tokens(model, ids.len(), "prompt")?;
                let tokens = token_ids(index, &ids, model.vocab_size)?;
                if params.echo {
                    prompts
                        .echoes
                        .push(model.tokenizer.decode(&tokens, params.skip_special_tokens));
                }
                prompts.tokens.push(tokens);
            }
        }
    }
    match prompts.tokens.iter().position(|tokens| tokens.is_empty()) {
        Some(index) => Err(ApiError::invalid(
            format!("prompt[{index}]"),
            "The prompt has no tokens.",
        )),
        None => Ok(prompts),
    }
}

fn check_count(num_prompts: usize, n: u32, limit: u32) -> Result<(), ApiError> {
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

fn token_ids(index: usize, ids: &[Int], vocab_size: u32) -> Result<Arc<[TokenId]>, ApiError> {
    let checked = ids.iter().map(|&Int(id)| {
        TokenId::try_from(id).ok().filter(|id| *id < vocab_size).ok_or_else(|| {
            let message = format!("prompt names token {id}, but the vocabulary has {vocab_size} tokens.");
            ApiError::invalid(format!("prompt[{index}]"), message)
        })
    });
    checked.collect()
}
