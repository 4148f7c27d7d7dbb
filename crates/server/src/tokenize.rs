//! `/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use lapidary_engine::TokenId;
use serde::Serialize;

use crate::error::ApiError;
use crate::extract::read_json;
use crate::lenient::{Flag, Int};
use crate::openai::prompt::{Chat, Source, check_num_tokens, encode, encode_chat, prompt_end};
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
    let (body, _room): (TokenizeBody, _) = read_json(&state, &parts.headers, body).await?;
    let model = state.served_model(body.model.as_deref())?;
    let tokens = match (body.prompt, body.messages) {
        (Some(text), None) => {
            let add_bos = model.tokenizer.adds_bos() && body.add_special_tokens.is_none_or(|Flag(add)| add);
            encode(&state, model, vec![Source::Text { text, add_bos }], None, "prompt")
                .await?
                .concat()
        }
        (None, Some(messages)) => {
            let chat = Chat {
                messages: Some(messages),
                instructions: None,
                end: prompt_end(body.add_generation_prompt, body.continue_final_message)?,
                template: body.chat_template,
                variables: body.chat_template_kwargs,
                truncation: None,
            };
            encode_chat(&state, model, chat).await?.to_vec()
        }
        (None, None) => return Err(ApiError::missing("prompt")),
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid(
                "messages",
                "Give either prompt or messages, not both.",
            ));
        }
    };
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
    let (body, _room): (DetokenizeBody, _) = read_json(&state, &parts.headers, body).await?;
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

/// What a client needs to use the tokenizer from afar, by the names of `tokenizer_config.json`.
#[derive(Serialize)]
struct TokenizerInfo<'a> {
    bos_token: Option<&'a str>,
    eos_token: Option<&'a str>,
    pad_token: Option<&'a str>,
    add_bos_token: bool,
    model_max_length: u32,
    chat_template: Option<&'a str>,
}

/// `GET /tokenizer_info`: lm-eval needs no tokenizer of its own where it finds this.
pub(crate) async fn tokenizer_info(State(state): State<AppState>) -> Result<Response, ApiError> {
    let model = state.served_model(None)?;
    let tokenizer = &*model.tokenizer;
    let text = |id: Option<TokenId>| id.and_then(|id| tokenizer.token_str(id));
    let info = TokenizerInfo {
        bos_token: text(tokenizer.bos_id()),
        eos_token: text(tokenizer.eos_id()),
        pad_token: text(tokenizer.pad_id()),
        add_bos_token: tokenizer.adds_bos(),
        model_max_length: model.max_model_len,
        chat_template: model.chat_template.as_ref().map(|template| template.source()),
    };
    Ok(Json(info).into_response())
}
