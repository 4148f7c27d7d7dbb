//! `/tokenize` and `/detokenize`, as vLLM has them.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use lapidary_engine::TokenId;
use serde::Serialize;

use crate::error::ApiError;
use crate::extract::read_json;
use crate::lenient::{Flag, Int};
use crate::openai::prompt::{Source, check_num_tokens, encode, prompt_end, render};
use crate::openai::types::{DetokenizeBody, TokenizeBody};
use crate::state::AppState;

#[derive(Serialize)]
struct Tokenized<'a> {
    count: usize,
    max_model_len: u32,
    tokens: &'a [TokenId],
    token_strs: Option<Vec<&'a str>>,
}

#[derive(Serialize)]
struct Detokenized {
    prompt: String,
}

/// `POST /tokenize`: a prompt, or messages.
pub(crate) async fn tokenize(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let body: TokenizeBody = read_json(&state, &parts.headers, body).await?;
    let model = state.served_model(body.model.as_deref())?;
    if body.chat_template.is_used {
        return Err(ApiError::unsupported(
            "chat_template",
            "chat_template is not supported.",
        ));
    }
    let source = match (body.prompt, body.messages) {
        (Some(text), None) => Source::Text {
            text,
            add_bos: model.tokenizer.adds_bos() && body.add_special_tokens.is_none_or(|Flag(add)| add),
        },
        (None, Some(messages)) => {
            let end = prompt_end(body.add_generation_prompt, body.continue_final_message)?;
            Source::Chat(render(model, Some(messages), None, end)?)
        }
        (None, None) => return Err(ApiError::missing("prompt")),
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid(
                "messages",
                "Give either prompt or messages, not both.",
            ));
        }
    };
    let encoded = encode(&state, model, vec![source], "prompt").await?;
    let tokens = encoded.concat();
    let wants_strs = body.return_token_strs.is_some_and(|Flag(wanted)| wanted);
    let strs = || {
        tokens
            .iter()
            .map(|&id| model.tokenizer.token_str(id).unwrap_or_default())
            .collect()
    };
    let tokenized = Tokenized {
        count: tokens.len(),
        max_model_len: model.max_model_len,
        tokens: &tokens,
        token_strs: wants_strs.then(strs),
    };
    Ok(Json(tokenized).into_response())
}

/// `POST /detokenize`.
pub(crate) async fn detokenize(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let body: DetokenizeBody = read_json(&state, &parts.headers, body).await?;
    let model = state.served_model(body.model.as_deref())?;
    let tokens = body.tokens.ok_or_else(|| ApiError::missing("tokens"))?;
    check_num_tokens(model, tokens.len(), "tokens")?;
    let ids = tokens.iter().enumerate().map(|(index, &Int(id))| {
        TokenId::try_from(id)
            .ok()
            .filter(|id| *id < model.vocab_size)
            .ok_or_else(|| {
                let message = format!(
                    "tokens names token {id}, but the vocabulary has {} tokens.",
                    model.vocab_size
                );
                ApiError::invalid(format!("tokens[{index}]"), message)
            })
    });
    let ids = ids.collect::<Result<Vec<_>, _>>()?;
    Ok(Json(Detokenized {
        prompt: model.tokenizer.decode(&ids, false),
    })
    .into_response())
}
