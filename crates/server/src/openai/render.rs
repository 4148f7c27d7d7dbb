//! What a request would ask the engine for, without asking: routers place requests by the tokens of their prompts.

use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use lapidary_engine::TokenId;
use serde::Serialize;

use super::prompt::{MAX_INLINE_IDS, compute_with};
use super::types::GenerationBody;
use super::{Endpoint, Params, Prepared, Prompts, check, json_response};
use crate::error::ApiError;
use crate::extract::read_json;
use crate::request_id::RequestId;
use crate::state::{AppState, ServedModel};

/// A prompt in tokens, in the shape of vLLM's token-in requests.
#[derive(Serialize)]
struct RenderedRequest<'a> {
    request_id: &'a str,
    token_ids: &'a [TokenId],
    sampling_params: RenderedSampling<'a>,
    model: &'a str,
    stream: bool,
    priority: i32,
}

#[derive(Serialize)]
struct RenderedSampling<'a> {
    n: u32,
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    repetition_penalty: f32,
    max_tokens: u32,
    min_tokens: u32,
    stop: &'a [String],
    stop_token_ids: &'a [TokenId],
    allowed_token_ids: Option<&'a [TokenId]>,
    bad_words: &'a [String],
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    skip_special_tokens: bool,
}

/// `POST /v1/chat/completions/render`: one rendered request.
pub(crate) async fn chat(state: State<AppState>, request: Request) -> Result<Response, ApiError> {
    render(Endpoint::Chat, state, request).await
}

/// `POST /v1/completions/render`: a list of them, one for each prompt.
pub(crate) async fn completions(state: State<AppState>, request: Request) -> Result<Response, ApiError> {
    render(Endpoint::Completions, state, request).await
}

async fn render(endpoint: Endpoint, State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let (body, _room): (GenerationBody, _) = read_json(&state, &parts.headers, body).await?;
    let Prepared {
        model, params, prompts, ..
    } = check(endpoint, &state, &parts.headers, &body)?
        .prepare(endpoint, &state, body)
        .await?;
    let request_id = parts.extensions.get::<RequestId>().cloned();
    let request_id = request_id.unwrap_or_else(RequestId::random);
    let request_id = format!("{}-{}", endpoint.id_prefix(), request_id.as_str());
    let num_ids: usize = prompts.tokens.iter().map(|tokens| tokens.len()).sum();
    let write = move |model: &ServedModel| Ok(written(endpoint, model, &params, &prompts, &request_id));
    let body = compute_with(&state, model, num_ids > MAX_INLINE_IDS, write).await?;
    Ok(json_response(body))
}

fn written(endpoint: Endpoint, model: &ServedModel, params: &Params, prompts: &Prompts, request_id: &str) -> Bytes {
    let mut rendered = prompts.tokens.iter().map(|tokens| {
        let num_tokens = u32::try_from(tokens.len()).expect("the length was checked against the context");
        RenderedRequest {
            request_id,
            token_ids: tokens,
            sampling_params: RenderedSampling::new(params, model.max_model_len - num_tokens),
            model: model.names.first().map_or("", String::as_str),
            stream: params.stream.is_some(),
            priority: params.priority,
        }
    });
    let written = match endpoint {
        Endpoint::Chat | Endpoint::Responses => serde_json::to_vec(&rendered.next()),
        Endpoint::Completions => serde_json::to_vec(&rendered.collect::<Vec<_>>()),
    };
    written.expect("numbers and strings serialise").into()
}

impl<'a> RenderedSampling<'a> {
    fn new(params: &'a Params, room: u32) -> Self {
        let sampling = &params.sampling;
        Self {
            n: params.n,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            repetition_penalty: sampling.repetition_penalty,
            max_tokens: params.max_tokens.map_or(room, |max_tokens| max_tokens.min(room)),
            min_tokens: params.min_tokens,
            stop: &params.stop_strings,
            stop_token_ids: &params.stop_token_ids,
            allowed_token_ids: params.vocabulary.allowed.as_deref(),
            bad_words: &params.vocabulary.bad_words,
            logprobs: sampling.logprobs,
            prompt_logprobs: params.scores(),
            skip_special_tokens: params.skip_special_tokens,
        }
    }
}
