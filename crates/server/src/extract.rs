//! Reads a request body and parses it as JSON: any content type, bounded in size, time and depth, and all bodies together
//! in memory.

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body::Body as _;
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use tokio::sync::OwnedSemaphorePermit;

use crate::bounded::code_of;
use crate::error::{ApiError, shorten};
use crate::state::{AppState, Limits};

/// Bodies up to this size are parsed where they are: half a millisecond.
const MAX_INLINE_BYTES: usize = 128 << 10;

/// Bytes of a body that are read whatever else is: with `max-connections` of them memory is bounded too. Almost all bodies
/// are smaller.
const SMALL_BODY_BYTES: usize = 64 << 10;

/// Room in memory for a body. What was parsed from it takes a small multiple of its bytes: whoever keeps that keeps this.
pub(crate) type Room = Option<OwnedSemaphorePermit>;

/// Reads a request's body and parses it. It has its room until that is dropped.
///
/// # Errors
/// As [`read_body`] and [`parse_json`].
pub(crate) async fn read_json<T: DeserializeOwned + Send + 'static>(
    state: &AppState,
    headers: &HeaderMap,
    body: Body,
) -> Result<(T, Room), ApiError> {
    let (bytes, room) = read_body(state, headers, body).await?;
    let is_long = is_long(&bytes);
    let parse = move || {
        // The room goes along: if the client leaves, what is parsed here is still there.
        let value = parse_json(&bytes)?;
        Ok((value, room))
    };
    state.compute(is_long, parse).await?
}

/// Whether a body is too long to be looked at where other requests wait for it.
pub(crate) fn is_long(body: &Bytes) -> bool {
    body.len() > MAX_INLINE_BYTES
}

/// Reads the whole body. A large one waits for room among the other large ones, which is to be kept for as long as it.
///
/// # Errors
/// It is larger than `limits.max_body_bytes`, slower than `limits.body_timeout`, or broke off.
pub(crate) async fn read_body(
    state: &AppState,
    headers: &HeaderMap,
    body: Body,
) -> Result<(Bytes, Option<OwnedSemaphorePermit>), ApiError> {
    let limits = &state.limits;
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limits.max_body_bytes) {
        return Err(too_large(limits));
    }
    // A body that does not say how long it is could become as long as any.
    let reader = BodyReader {
        state,
        max_bytes: announced.unwrap_or(limits.max_body_bytes),
        room: None,
    };
    match tokio::time::timeout(limits.body_timeout, reader.read(body)).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::BodyTimeout {
            limit: limits.body_timeout,
        }),
    }
}

fn too_large(limits: &Limits) -> ApiError {
    ApiError::BodyTooLarge {
        limit_bytes: limits.max_body_bytes,
    }
}

/// Gathers a body.
struct BodyReader<'a> {
    state: &'a AppState,
    /// The body will not be longer.
    max_bytes: usize,
    /// Taken all at once: bodies that each had a part of what they need could wait for each other.
    room: Option<OwnedSemaphorePermit>,
}

impl BodyReader<'_> {
    async fn read(mut self, mut body: Body) -> Result<(Bytes, Option<OwnedSemaphorePermit>), ApiError> {
        let mut first = Bytes::new();
        let mut rest = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| bad_json("the body broke off"))?;
            let Ok(data) = frame.into_data() else { continue };
            let num_bytes = first.len().max(rest.len()) + data.len();
            if num_bytes > self.max_bytes {
                return Err(too_large(&self.state.limits));
            }
            // One that is there as a whole was read before, and has its room.
            let is_whole = first.is_empty() && body.is_end_stream();
            if num_bytes > SMALL_BODY_BYTES && !is_whole && self.room.is_none() {
                self.room = Some(self.state.body_room(self.max_bytes).await);
                // Now, or growth would take up to twice as much. Pages are made as they are written.
                rest.reserve(self.max_bytes - rest.len());
            }
            if first.is_empty() {
                first = data;
            } else {
                if rest.is_empty() {
                    rest.extend_from_slice(&first);
                }
                rest.extend_from_slice(&data);
            }
        }
        // Most bodies arrive in one frame: they are never copied.
        let bytes = if rest.is_empty() { first } else { rest.freeze() };
        Ok((bytes, self.room))
    }
}

/// Parses a JSON object. Nesting is bounded by `serde_json`'s limit of 128.
///
/// # Errors
/// Not UTF-8, not JSON, not an object, or a field that `T` refuses; then the error's `param` is that field's path.
fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|_| bad_json("it is not valid UTF-8"))?;
    let text = text.trim_start_matches(['\u{feff}', ' ', '\t', '\r', '\n']);
    if text.is_empty() {
        return Err(bad_json("it is empty"));
    }
    match serde_json::from_str(text) {
        Ok(value) if text.starts_with('{') => Ok(value),
        Ok(_) => Err(bad_json("it is not a JSON object")),
        Err(error) if error.is_data() && text.starts_with('{') => Err(field_error::<T>(text)),
        Err(error) => Err(bad_json(&error.to_string())),
    }
}

/// Parses once more, for the path of the fault: good requests don't pay for tracking it.
fn field_error<T: DeserializeOwned>(text: &str) -> ApiError {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let Err(error) = serde_path_to_error::deserialize::<_, T>(&mut deserializer) else {
        return bad_json("it has an invalid field");
    };
    let path = error.path().to_string();
    let cause = error.into_inner().to_string();
    let reason = cause.split(" at line ").next().unwrap_or(&cause);
    // A fault of the object itself: a field that appears twice.
    if path == "." {
        return bad_json(reason);
    }
    ApiError::InvalidRequest {
        message: format!("Invalid value for '{}': {}.", shorten(&path), shorten(reason)),
        param: Some(shorten(&path).into_owned().into()),
        code: Some(code_of(reason)),
    }
}

fn bad_json(reason: &str) -> ApiError {
    ApiError::InvalidRequest {
        message: format!("We could not parse the JSON body of your request: {}.", shorten(reason)),
        param: None,
        code: Some("invalid_json"),
    }
}
