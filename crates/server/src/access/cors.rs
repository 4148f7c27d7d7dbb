//! Which web pages may call from browsers.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method, header};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

use crate::request_id::X_REQUEST_ID;

/// How long browsers may remember a preflight's answer: Firefox's upper bound.
const PREFLIGHT_MAX_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// What pages may do; an absent list allows all.
#[derive(Debug, Clone, Default)]
pub struct Cors {
    /// Such as `https://chat.example`.
    pub origins: Option<Vec<HeaderValue>>,
    /// Of requests.
    pub methods: Option<Vec<Method>>,
    /// Beyond those that need no permission.
    pub headers: Option<Vec<HeaderName>>,
    /// Whether browsers send cookies along.
    pub allow_credentials: bool,
}

impl Cors {
    /// All is allowed by mirroring what was asked for: `*` would cover neither `Authorization` nor credentials.
    pub(crate) fn layer(&self) -> CorsLayer {
        let origins = match &self.origins {
            Some(origins) => AllowOrigin::list(origins.clone()),
            None if self.allow_credentials => AllowOrigin::mirror_request(),
            None => AllowOrigin::any(),
        };
        let methods = match &self.methods {
            Some(methods) => AllowMethods::list(methods.clone()),
            None => AllowMethods::mirror_request(),
        };
        let headers = match &self.headers {
            Some(headers) => AllowHeaders::list(headers.clone()),
            None => AllowHeaders::mirror_request(),
        };
        CorsLayer::new()
            .allow_origin(origins)
            .allow_methods(methods)
            .allow_headers(headers)
            .allow_credentials(self.allow_credentials)
            .expose_headers([
                X_REQUEST_ID,
                header::RETRY_AFTER,
                HeaderName::from_static("x-should-retry"),
            ])
            .max_age(PREFLIGHT_MAX_AGE)
    }
}
