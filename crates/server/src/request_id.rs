//! Gives every response an `x-request-id`: the client's own if it is sane, else a new one.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;

use crate::record::RequestRecord;

/// The header's name.
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Bytes of a client's id that are taken over; longer ones are replaced.
const MAX_LEN: usize = 128;

/// Names one HTTP request; goes to the answer's `id`, the log and the response header. Leads to what is known of it.
#[derive(Debug, Clone)]
pub(crate) struct RequestId {
    text: Arc<str>,
    record: Arc<RequestRecord>,
}

impl RequestId {
    /// A new random id.
    #[must_use]
    pub(crate) fn random() -> Self {
        Self::new(&format!("{:016x}{:016x}", random_u64(), random_u64()))
    }

    fn new(text: &str) -> Self {
        Self {
            text: text.into(),
            record: Arc::default(),
        }
    }

    /// The id a client chose, unless it could not go into JSON, a log line and a header as it is.
    fn from_header(value: &HeaderValue) -> Option<Self> {
        let text = value.to_str().ok()?;
        let sane = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/+=@~|".contains(&byte);
        (!text.is_empty() && text.len() <= MAX_LEN && text.bytes().all(sane)).then(|| Self::new(text))
    }

    /// The text.
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    /// What is known of the request.
    pub(crate) fn record(&self) -> &Arc<RequestRecord> {
        &self.record
    }
}

/// Unpredictable enough for ids and seeds, not for secrets.
pub(crate) fn random_u64() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    RandomState::new().hash_one(COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Middleware: puts a [`RequestId`] into the request's extensions and the response's headers.
pub(crate) async fn assign(mut request: Request, next: Next) -> Response {
    let id = request
        .headers()
        .get(X_REQUEST_ID)
        .and_then(RequestId::from_header)
        .unwrap_or_else(RequestId::random);
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).await;
    let value = HeaderValue::from_str(id.as_str()).expect("an id is visible ASCII");
    response.headers_mut().insert(X_REQUEST_ID, value);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sane_id_is_kept_and_others_are_not() {
        let parse = |text: &'static str| {
            RequestId::from_header(&HeaderValue::from_static(text)).map(|id| id.as_str().to_owned())
        };
        assert_eq!(parse("req-1_a.b").as_deref(), Some("req-1_a.b"));
        assert_eq!(parse(""), None);
        assert_eq!(parse("a\"b"), None);
        assert_eq!(parse("a b"), None);
        let long = HeaderValue::from_str(&"x".repeat(MAX_LEN + 1)).expect("ascii");
        assert!(RequestId::from_header(&long).is_none());
    }

    #[test]
    fn random_ids_differ() {
        assert_ne!(RequestId::random().as_str(), RequestId::random().as_str());
    }
}
