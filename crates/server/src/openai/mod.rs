//! OpenAI's endpoints. Chat and completions differ in how a prompt is made and in the shape of the answer; all between
//! is here, once.

pub(crate) mod answer;
mod chat;
mod completions;
mod deadlines;
#[cfg(test)]
mod documented;
mod logprobs;
mod messages;
pub(crate) mod models;
mod params;
pub(crate) mod prompt;
pub(crate) mod render;
mod responses;
mod structured;
mod tools;
pub(crate) mod types;
mod vocabulary;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use lapidary_engine::{EngineError, TokenId};

pub(crate) use self::deadlines::Deadlines;
use self::deadlines::Patience;
pub(crate) use self::params::{Params, Streaming};

use self::answer::{BodyWriter, ChunkWriter, Head, StreamWriter, WholeWriter};
use self::logprobs::TokenNames;
use self::responses::{ResponsesBody, ResponsesWriter, Settings};
use self::tools::Held;
use self::types::GenerationBody;
use self::vocabulary::Vocabulary;
use crate::constraint::AnswerConstraint;
use crate::error::ApiError;
use crate::extract::{is_long, read_body, read_json};
use crate::generate::{Admission, Generation};
use crate::metrics::{Outcome, RequestOutcome};
use crate::request_id::RequestId;
use crate::sse;
use crate::state::{AppState, ServedModel};
use crate::traces::Asked;

/// The endpoints that generate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/v1/responses`.
    Responses,
}

impl Endpoint {
    /// The endpoint that would get such a request.
    pub(crate) fn of(method: &Method, path: &str) -> Option<Self> {
        match path {
            _ if method != Method::POST => None,
            "/v1/chat/completions" => Some(Self::Chat),
            "/v1/completions" => Some(Self::Completions),
            "/v1/responses" => Some(Self::Responses),
            // Either; as what it is counted when nobody has looked.
            "/invocations" => Some(Self::Chat),
            _ => None,
        }
    }

    /// Label value.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Responses => "responses",
        }
    }

    /// OpenTelemetry's `gen_ai.operation.name`.
    pub(crate) fn operation(self) -> &'static str {
        match self {
            Self::Chat | Self::Responses => "chat",
            Self::Completions => "text_completion",
        }
    }

    /// The field that a prompt comes from.
    fn prompt_param(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Completions => "prompt",
            Self::Responses => "input",
        }
    }

    fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl",
            Self::Completions => "cmpl",
            Self::Responses => "resp",
        }
    }

    fn object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion",
            Self::Completions => "text_completion",
            Self::Responses => "response",
        }
    }

    fn chunk_object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion.chunk",
            Self::Completions => "text_completion",
            Self::Responses => "response",
        }
    }
}

/// `POST /v1/chat/completions`.
pub(crate) async fn chat(State(state): State<AppState>, request: Request) -> Response {
    respond(Endpoint::Chat, state, request).await
}

/// `POST /v1/completions`.
pub(crate) async fn completions(State(state): State<AppState>, request: Request) -> Response {
    respond(Endpoint::Completions, state, request).await
}

/// `POST /v1/responses`.
pub(crate) async fn responses(State(state): State<AppState>, request: Request) -> Response {
    respond(Endpoint::Responses, state, request).await
}

/// A request that is on its way: what is left is to wait for tokens.
struct Started {
    generation: Generation,
    shape: Shape,
    stream: Option<Streaming>,
}

/// What an answer is written as.
enum Shape {
    Choices(Head),
    Response(Box<ResponsesWriter>),
}

impl Shape {
    fn stream_writer(self, streaming: Streaming, generation: &Generation) -> Box<dyn StreamWriter> {
        match self {
            Self::Choices(head) => Box::new(ChunkWriter::new(head, streaming, generation.num_choices())),
            Self::Response(writer) => writer,
        }
    }

    fn body_writer(self, generation: &Generation) -> Box<dyn BodyWriter + Send> {
        match self {
            Self::Choices(head) => Box::new(WholeWriter::new(head, generation)),
            Self::Response(writer) => writer,
        }
    }
}

/// The prompts of a request, and for each the text that `echo` repeats.
struct Prompts {
    tokens: Vec<Arc<[TokenId]>>,
    echoes: Vec<String>,
}

/// `POST /invocations`, `SageMaker`'s name for whichever of the two the body is meant for.
pub(crate) async fn invocations(State(state): State<AppState>, request: Request) -> Response {
    #[derive(serde::Deserialize)]
    struct Kind {
        prompt: Option<serde::de::IgnoredAny>,
    }
    let arrival = Instant::now();
    let request_id = request_id_of(&request);
    let outcome = RequestOutcome::of_undecided(&state, request_id.clone());
    let (mut parts, body) = request.into_parts();
    let (bytes, room) = match read_body(&state, &parts.headers, body).await {
        Ok(read) => read,
        Err(error) => return outcome.refuse(error),
    };
    // Kept for as long as the request.
    parts.extensions.insert(room.map(Arc::new));
    let looked_at = bytes.clone();
    // What is no JSON is refused, by name, as a chat.
    let find_endpoint = move || match serde_json::from_slice(&looked_at) {
        Ok(Kind { prompt: Some(_) }) => Endpoint::Completions,
        _ => Endpoint::Chat,
    };
    let found = state.compute(is_long(&bytes), find_endpoint).await;
    let endpoint = found.unwrap_or(Endpoint::Chat);
    let request = Request::from_parts(parts, bytes.into());
    answer(endpoint, state, request, &request_id, arrival, outcome).await
}

fn request_id_of(request: &Request) -> RequestId {
    let known = request.extensions().get::<RequestId>().cloned();
    known.unwrap_or_else(RequestId::random)
}

async fn respond(endpoint: Endpoint, state: AppState, request: Request) -> Response {
    let arrival = Instant::now();
    let request_id = request_id_of(&request);
    // Before anything can fail or be cancelled: from here on the request is counted, whatever happens.
    let outcome = RequestOutcome::new(&state, endpoint, request_id.clone());
    answer(endpoint, state, request, &request_id, arrival, outcome).await
}

async fn answer(
    endpoint: Endpoint,
    state: AppState,
    request: Request,
    request_id: &RequestId,
    arrival: Instant,
    mut outcome: RequestOutcome,
) -> Response {
    outcome.decide(endpoint);
    match start(endpoint, &state, request, request_id, arrival).await {
        Err(error) => outcome.refuse(error),
        Ok(started) => match started.stream {
            None => whole(started, outcome).await,
            Some(streaming) => {
                let writer = started.shape.stream_writer(streaming, &started.generation);
                sse::respond(started.generation, writer, state.limits.sse_keep_alive, outcome).await
            }
        },
    }
}

/// Everything up to the engine: JSON, model name, readiness, parameters, prompt, length, queue.
async fn start(
    endpoint: Endpoint,
    state: &AppState,
    request: Request,
    request_id: &RequestId,
    arrival: Instant,
) -> Result<Started, ApiError> {
    let (parts, body) = request.into_parts();
    let request = Arrived {
        endpoint,
        headers: parts.headers,
        request_id,
        arrival,
    };
    // The body's room is kept for as long as the body may wait.
    if endpoint != Endpoint::Responses {
        let (body, _room): (GenerationBody, _) = read_json(state, &request.headers, body).await?;
        return submit(state, request, body, None).await;
    }
    let (body, _room): (ResponsesBody, _) = read_json(state, &request.headers, body).await?;
    let (chat, settings, places) = state.compute(body.is_long(), move || responses::chat(body)).await??;
    let started = submit(state, request, chat, Some(settings)).await;
    started.map_err(|error| responses::rename(error, &places))
}

/// What is known of a request beside its body.
struct Arrived<'a> {
    endpoint: Endpoint,
    headers: HeaderMap,
    request_id: &'a RequestId,
    arrival: Instant,
}

/// Checks, tokenises and hands to the engine; with `settings` the answer is a response.
async fn submit(
    state: &AppState,
    request: Arrived<'_>,
    body: GenerationBody,
    settings: Option<Settings>,
) -> Result<Started, ApiError> {
    let Arrived {
        endpoint,
        headers,
        request_id,
        arrival,
    } = request;
    // Nobody's queue is as long as a client's upload.
    let read = Instant::now();
    let checked = check(endpoint, state, &headers, &body)?;
    // Before the dear part: refusing must stay cheap when most are refused.
    checked.patience.check_queue(checked.model, &state.limits)?;
    let deadlines = checked.patience.from(arrival, read);
    let engine = &checked.model.engine;
    let prepare = async {
        let mut prepared = checked.prepare(endpoint, state, body).await?;
        Generation::check(state, prepared.model, &prepared.prompts.tokens, &prepared.params)?;
        let constraints = prepared.take_constraints(state).await?;
        Ok((prepared, constraints))
    };
    let (prepared, constraints) = deadlines.bound(prepare, || engine.stats()).await?;
    let Prepared {
        model, params, prompts, ..
    } = prepared;
    let shape = match settings {
        None => Shape::Choices(Head::new(
            endpoint,
            request_id.as_str(),
            model,
            &params,
            &state.limits,
            prompts.echoes,
        )),
        Some(settings) => {
            let name = model.names.first().map_or("", String::as_str);
            let names = params.sampling.logprobs.map(|_| TokenNames {
                tokenizer: Arc::clone(&model.tokenizer),
                by_id: false,
            });
            let writer = ResponsesWriter::new(request_id.as_str(), name, settings, names);
            Shape::Response(Box::new(writer))
        }
    };
    let admission = Admission {
        deadlines,
        arrival,
        constraints,
    };
    request_id.record().ask(Asked::new(&params, prompts.tokens.len()));
    let mut generation = Generation::submit(state, model, prompts.tokens, &params, admission)?;
    generation.count_for(request_id.record());
    state.metrics.request_submitted(params.n);
    Ok(Started {
        generation,
        shape,
        stream: params.stream,
    })
}

/// What the engine would be asked for.
struct Prepared<'a> {
    model: &'a ServedModel,
    params: Params,
    prompts: Prompts,
    constraint: Option<AnswerConstraint>,
}

impl Prepared<'_> {
    /// What each answer is held to; none where they are free.
    async fn take_constraints(&mut self, state: &AppState) -> Result<Vec<AnswerConstraint>, ApiError> {
        let Some(constraint) = self.constraint.take() else {
            return Ok(Vec::new());
        };
        let num_answers = self.prompts.tokens.len() * self.params.n as usize;
        let is_long = constraint.is_long(num_answers);
        state.compute(is_long, move || constraint.copies(num_answers)).await
    }
}

/// What is cheap to check: a request that will be refused should not cost its tokenisation.
fn check<'a>(
    endpoint: Endpoint,
    state: &'a AppState,
    headers: &HeaderMap,
    body: &GenerationBody,
) -> Result<Checked<'a>, ApiError> {
    let model = state.served_model(body.model.as_deref())?;
    let params = Params::new(endpoint, body, model, &state.limits)?;
    if endpoint == Endpoint::Completions {
        completions::check_count(body.prompt.as_ref(), params.n, state.limits.max_sequences_per_request)?;
    }
    Ok(Checked {
        model,
        params,
        patience: Patience::new(headers, body, &state.limits)?,
    })
}

/// A request whose fields are in order.
struct Checked<'a> {
    model: &'a ServedModel,
    params: Params,
    patience: Patience,
}

impl<'a> Checked<'a> {
    /// Does the rest that needs no engine.
    async fn prepare(
        self,
        endpoint: Endpoint,
        state: &AppState,
        body: GenerationBody,
    ) -> Result<Prepared<'a>, ApiError> {
        let Self { model, params, .. } = self;
        let Held { grammar, instructions } = tools::compile(model, &params).await?;
        let rules = Vocabulary::rules(&params, state, model).await?;
        let prompts = match endpoint {
            Endpoint::Chat | Endpoint::Responses => chat::prompts(state, model, body, &params, instructions).await?,
            Endpoint::Completions => completions::prompts(state, model, body, &params).await?,
        };
        check_lengths(endpoint, &prompts.tokens, model, &params)?;
        Ok(Prepared {
            model,
            params,
            prompts,
            constraint: AnswerConstraint::new(grammar, rules),
        })
    }
}

fn check_lengths(
    endpoint: Endpoint,
    prompts: &[Arc<[TokenId]>],
    model: &ServedModel,
    params: &Params,
) -> Result<(), ApiError> {
    for prompt in prompts {
        let num_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        let room = model.max_model_len.saturating_sub(num_tokens);
        let asked = params.max_tokens.filter(|_| params.max_tokens_was_given);
        let fits = match asked {
            Some(max_tokens) => num_tokens <= model.max_model_len && max_tokens <= room,
            None => room > 0,
        };
        if !fits {
            return Err(ApiError::too_long(
                endpoint.prompt_param(),
                model.max_model_len,
                num_tokens,
                asked,
            ));
        }
    }
    Ok(())
}

/// Waits for all of the answer and sends it as one body. Dropped with the connection, which aborts the generation.
async fn whole(started: Started, mut outcome: RequestOutcome) -> Response {
    let Started {
        mut generation, shape, ..
    } = started;
    let mut writer = shape.body_writer(&generation);
    let collected = poll_fn(|context| {
        loop {
            match generation.poll_next(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(index))) => writer.add_delta(&generation, index),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
            }
        }
    });
    let collected: Result<(), EngineError> = collected.await;
    match collected {
        Ok(()) => {
            let usage = generation.usage();
            outcome.record(Outcome::of(&generation), usage);
            json_response(writer.finish(&generation, usage))
        }
        Err(error) => outcome.fail(&error),
    }
}

/// A finished JSON text as a response.
pub(crate) fn json_response(body: Bytes) -> Response {
    (
        [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))],
        body,
    )
        .into_response()
}
