//! An HTTP client that notes when each piece of a stream arrives.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::http::uri::{PathAndQuery, Scheme};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Of a refusal's body, this much is shown.
const SHOWN_BYTES: usize = 300;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Not an address this client can use.
    #[error("{0:?} is no address such as http://127.0.0.1:8000 (encrypted connections are not supported)")]
    Address(String),
    /// The server does not answer at all.
    #[error("cannot connect to {address}")]
    Connect {
        /// Host and port.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke, or what came over it is no HTTP.
    #[error("the connection failed")]
    Http(#[from] hyper::Error),
    /// The request cannot be written.
    #[error("the request cannot be made")]
    Request(#[from] hyper::http::Error),
    /// The server refused.
    #[error("{status}: {body}")]
    Refused {
        /// Of the response.
        status: StatusCode,
        /// The beginning of what it said.
        body: String,
    },
    /// The answer is no JSON.
    #[error("the answer is no JSON")]
    Json(#[from] serde_json::Error),
    /// The stream reported an error.
    #[error("the stream broke off: {0}")]
    Stream(String),
    /// The stream ended without its end mark, or without an answer.
    #[error("the stream ended before the answer did")]
    Incomplete,
}

/// When the pieces of one answer came.
#[derive(Debug, Clone, Default)]
pub(super) struct Timeline {
    /// From the request to the first text.
    pub(super) to_first_token: Duration,
    /// Between two pieces of text.
    pub(super) between: Vec<Duration>,
    /// From the request to the end.
    pub(super) total: Duration,
    /// As the server counts them; `None` if it does not say.
    pub(super) usage: Option<Usage>,
}

/// Tokens that the server counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
}

/// One server. Connections are kept for the next request.
#[derive(Debug)]
pub(super) struct Client {
    /// Host and port.
    authority: String,
    /// Before every path.
    prefix: String,
    authorization: Option<String>,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

impl Client {
    pub(super) fn new(base_url: &str, api_key: Option<&str>) -> Result<Self, ClientError> {
        let wrong = || ClientError::Address(base_url.to_owned());
        let uri: Uri = base_url.parse().map_err(|_| wrong())?;
        let host = uri
            .host()
            .filter(|_| uri.scheme() == Some(&Scheme::HTTP))
            .ok_or_else(wrong)?;
        Ok(Self {
            authority: format!("{host}:{}", uri.port_u16().unwrap_or(80)),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            authorization: api_key.map(|key| format!("Bearer {key}")),
            idle: Mutex::default(),
        })
    }

    /// A body of JSON.
    pub(super) async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.json(Method::GET, path, Bytes::new()).await
    }

    /// JSON for JSON.
    pub(super) async fn post(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        self.json(Method::POST, path, body.to_string().into()).await
    }

    async fn json(&self, method: Method, path: &str, body: Bytes) -> Result<Value, ClientError> {
        let mut connection = self.connection().await?;
        let response = self.send(&mut connection, method, path, body).await?;
        let body = response.into_body().collect().await?.to_bytes();
        self.keep(connection);
        Ok(serde_json::from_slice(&body)?)
    }

    /// Posts a request that is answered by a stream, and follows it to its end.
    pub(super) async fn stream(&self, path: &str, body: Bytes) -> Result<Timeline, ClientError> {
        let started = Instant::now();
        let mut connection = self.connection().await?;
        let response = self.send(&mut connection, Method::POST, path, body).await?;
        let mut events = Events::default();
        let mut stream = response.into_body();
        let mut timeline = Timeline::default();
        let mut last_text: Option<Instant> = None;
        while let Some(frame) = stream.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            let now = Instant::now();
            for event in events.push(&data)? {
                timeline.usage = event.usage.or(timeline.usage);
                // An answer may be nothing but its end.
                if event.has_text || (event.is_end && last_text.is_none()) {
                    match last_text.replace(now) {
                        None => timeline.to_first_token = now - started,
                        Some(last) => timeline.between.push(now - last),
                    }
                }
            }
        }
        if !events.is_done || last_text.is_none() {
            return Err(ClientError::Incomplete);
        }
        timeline.total = started.elapsed();
        self.keep(connection);
        Ok(timeline)
    }

    /// The head of a response that is no refusal.
    async fn send(
        &self,
        connection: &mut SendRequest<Full<Bytes>>,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let target: PathAndQuery = format!("{}{path}", self.prefix)
            .parse()
            .map_err(hyper::http::Error::from)?;
        let mut request = Request::builder()
            .method(method)
            .uri(Uri::from(target))
            .header(HOST, &self.authority)
            .header(CONTENT_TYPE, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let response = connection.send_request(request.body(Full::new(body))?).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.into_body().collect().await?.to_bytes();
        let shown = String::from_utf8_lossy(&body[..body.len().min(SHOWN_BYTES)]);
        Err(ClientError::Refused {
            status,
            body: shown.into_owned(),
        })
    }

    async fn connection(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut connection) = idle else { break };
            // The server may have closed it meanwhile.
            if connection.ready().await.is_ok() {
                return Ok(connection);
            }
        }
        let connected = TcpStream::connect(&self.authority).await;
        let stream = connected.map_err(|source| ClientError::Connect {
            address: self.authority.clone(),
            source,
        })?;
        // A request is one write; it should not wait for the next.
        stream.set_nodelay(true).map_err(|source| ClientError::Connect {
            address: self.authority.clone(),
            source,
        })?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            // Whoever waits for an answer on it learns of the error.
            let _ = connection.await;
        });
        Ok(sender)
    }

    fn keep(&self, connection: SendRequest<Full<Bytes>>) {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(connection);
    }
}

/// Takes server-sent events apart as their bytes come in.
#[derive(Debug, Default)]
pub(super) struct Events {
    /// The beginning of a line.
    partial: Vec<u8>,
    /// The end mark came.
    pub(super) is_done: bool,
}

/// What is of interest in a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) has_text: bool,
    /// Of one of the answers.
    pub(super) is_end: bool,
    pub(super) usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<ChunkChoice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct ChunkChoice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

impl Events {
    /// The events that end in `data`.
    pub(super) fn push(&mut self, data: &[u8]) -> Result<Vec<Event>, ClientError> {
        let mut events = Vec::new();
        let mut lines = data.split(|byte| *byte == b'\n');
        self.partial.extend_from_slice(lines.next().unwrap_or_default());
        for next in lines {
            let line = std::mem::replace(&mut self.partial, next.to_vec());
            let Some(data) = line.strip_prefix(b"data:") else {
                continue;
            };
            match data.trim_ascii() {
                b"[DONE]" => self.is_done = true,
                json => events.push(read_chunk(json)?),
            }
        }
        Ok(events)
    }
}

fn read_chunk(json: &[u8]) -> Result<Event, ClientError> {
    let chunk: Chunk = serde_json::from_slice(json)?;
    if let Some(error) = chunk.error {
        return Err(ClientError::Stream(error.to_string()));
    }
    let is_end = chunk.choices.iter().any(|choice| choice.finish_reason.is_some());
    let text_of = |choice: ChunkChoice| choice.text.or(choice.delta.and_then(|delta| delta.content));
    let mut texts = chunk.choices.into_iter().filter_map(text_of);
    Ok(Event {
        has_text: texts.any(|text| !text.is_empty()),
        is_end,
        usage: chunk.usage,
    })
}
