//! Reads a request body and parses it as JSON: any content type, bounded in size, time and depth.

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use crate::error::{ApiError, shorten};
use crate::state::{AppState, Limits};

/// Bodies up to this size are parsed where they are: half a millisecond.
const MAX_INLINE_BYTES: usize = 128 << 10;

/// Reads a request's body and parses it.
///
/// # Errors
/// As [`read_body`] and [`parse_json`].
pub(crate) async fn read_json<T: DeserializeOwned + Send + 'static>(
    state: &AppState,
    headers: &HeaderMap,
    body: Body,
) -> Result<T, ApiError> {
    let bytes = read_body(headers, body, &state.limits).await?;
    state
        .compute(bytes.len() > MAX_INLINE_BYTES, move || parse_json(&bytes))
        .await?
}

/// Reads the whole body.
///
/// # Errors
/// It is larger than `limits.max_body_bytes`, slower than `limits.body_timeout`, or broke off.
pub(crate) async fn read_body(headers: &HeaderMap, body: Body, limits: &Limits) -> Result<Bytes, ApiError> {
    let too_large = ApiError::BodyTooLarge {
        limit_bytes: limits.max_body_bytes,
    };
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limits.max_body_bytes as u64) {
        return Err(too_large);
    }
    let read = read_frames(body, limits.max_body_bytes, too_large);
    match tokio::time::timeout(limits.body_timeout, read).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::BodyTimeout {
            limit: limits.body_timeout,
        }),
    }
}

async fn read_frames(mut body: Body, max_bytes: usize, too_large: ApiError) -> Result<Bytes, ApiError> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| bad_json("the body broke off"))?;
        let Ok(data) = frame.into_data() else { continue };
        if first.len().max(rest.len()) + data.len() > max_bytes {
            return Err(too_large);
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
    Ok(if rest.is_empty() { first } else { rest.freeze() })
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
        code: Some("invalid_type"),
    }
}

fn bad_json(reason: &str) -> ApiError {
    ApiError::InvalidRequest {
        message: format!("We could not parse the JSON body of your request: {}.", shorten(reason)),
        param: None,
        code: Some("invalid_json"),
    }
}
