//! `/openapi.json`: what the server takes and gives, for those who make clients of it.
//!
//! The document is written by hand, in the files of `openapi/`: answers are written byte by byte, and requests are read
//! more leniently than their types say, so there are no types to derive it from. Tests hold it to the routes, to the fields
//! of the request types and to real answers.

use axum::routing::{MethodRouter, get};
use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::access::Access;
use crate::openai::json_response;
use crate::state::AppState;

const BASE: &str = include_str!("openapi/base.json");
const REQUESTS: &str = include_str!("openapi/requests.json");
const ANSWERS: &str = include_str!("openapi/answers.json");

/// `GET /openapi.json`.
pub(crate) fn route(access: &Access) -> MethodRouter<AppState> {
    let document = Bytes::from(document(access).to_string());
    get(move || {
        let document = document.clone();
        async { json_response(document) }
    })
}

/// The document of a server that lets in whom `access` says.
fn document(access: &Access) -> Value {
    let mut document = part(BASE);
    let schemas: Map<String, Value> = [REQUESTS, ANSWERS]
        .into_iter()
        .filter_map(|text| match part(text) {
            Value::Object(schemas) => Some(schemas),
            _ => None,
        })
        .flatten()
        .collect();
    document["components"]["schemas"] = Value::Object(schemas);
    document["info"]["version"] = json!(env!("CARGO_PKG_VERSION"));
    let url = match access.root_path.as_str() {
        "" => "/",
        prefix => prefix,
    };
    document["servers"] = json!([{ "url": url }]);
    if access.keys.is_some() {
        document["security"] = json!([{ "key": [] }]);
        if access.open_metrics {
            document["paths"]["/metrics"]["get"]["security"] = json!([]);
        }
    }
    document
}

fn part(text: &str) -> Value {
    serde_json::from_str(text).expect("tests read all parts of the document")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use axum::body::Body;
    use axum::http::{Method, Request, StatusCode};
    use tower::ServiceExt;

    use super::*;
    use crate::access::{ApiKeys, KeyLimits, is_probe_or_metrics};
    use crate::error::ApiError;
    use crate::lifecycle::Phase;
    use crate::metrics::Metrics;
    use crate::probes::STALLED;
    use crate::state::Limits;

    /// Without `options`, which browsers may ask of every path.
    const METHODS: [&str; 6] = ["get", "put", "post", "delete", "patch", "trace"];

    fn operations(document: &Value) -> Vec<(&str, &str, &Value)> {
        let paths = document["paths"].as_object().unwrap();
        let operations = paths.iter().flat_map(|(path, item)| {
            let methods = item.as_object().unwrap();
            methods
                .iter()
                .map(move |(method, operation)| (path.as_str(), method.as_str(), operation))
        });
        operations.collect()
    }

    #[tokio::test]
    async fn every_route_is_documented_and_no_other() {
        let state = AppState::new(Limits::default(), Metrics::new("m"));
        let document = document(&Access::default());
        let served: BTreeSet<String> = crate::table(&state)
            .into_iter()
            .map(|(path, _)| path.replace("{*", "{"))
            .collect();
        let documented: BTreeSet<String> = document["paths"].as_object().unwrap().keys().cloned().collect();
        assert_eq!(served, documented);
        let router = crate::router(state);
        for path in &served {
            for method in METHODS {
                let request = Request::builder().method(Method::from_bytes(method.to_uppercase().as_bytes()).unwrap());
                let request = request.uri(path.replace("{id}", "m")).body(Body::empty()).unwrap();
                let status = router.clone().oneshot(request).await.unwrap().status();
                let is_served = status != StatusCode::METHOD_NOT_ALLOWED;
                assert_eq!(
                    is_served,
                    document["paths"][path].get(method).is_some(),
                    "{method} {path}: {status}"
                );
            }
        }
    }

    #[test]
    fn what_needs_no_key_says_so() {
        for (path, method, operation) in operations(&document(&Access::default())) {
            let is_open = is_probe_or_metrics(path) && path != "/metrics";
            assert_eq!(
                operation.get("security"),
                is_open.then_some(&json!([])),
                "{method} {path}"
            );
            let says_unauthorized = operation["responses"].get("401").is_some();
            assert_eq!(says_unauthorized, !is_open, "{method} {path}");
        }
        let closed = Access {
            keys: Some(ApiKeys::new(Vec::new(), None, KeyLimits::default()).unwrap()),
            open_metrics: true,
            root_path: "/gem".to_owned(),
            ..Access::default()
        };
        let document = document(&closed);
        assert_eq!(document["security"], json!([{ "key": [] }]));
        assert_eq!(document["paths"]["/metrics"]["get"]["security"], json!([]));
        assert_eq!(document["servers"], json!([{ "url": "/gem" }]));
    }

    #[test]
    fn whatever_generates_may_answer_with_every_error() {
        let document = document(&Access::default());
        let ours: BTreeSet<String> = ApiError::samples()
            .iter()
            .filter(|error| !matches!(error, ApiError::UnknownUrl { .. } | ApiError::MethodNotAllowed { .. }))
            .map(|error| error.status().as_u16().to_string())
            .collect();
        for (path, method, operation) in operations(&document) {
            if operation.get("requestBody").is_some() {
                let statuses = operation["responses"].as_object().unwrap().keys().cloned();
                let errors: BTreeSet<String> = statuses.filter(|status| status != "200").collect();
                assert_eq!(errors, ours, "{method} {path}");
            }
        }
        let error = &document["components"]["schemas"]["Error"]["properties"]["error"]["properties"];
        let kinds = error["type"]["enum"].as_array().unwrap();
        for sample in ApiError::samples() {
            assert!(kinds.contains(&json!(sample.kind())), "{sample}");
        }
        let phases = Phase::ALL.iter().map(|phase| phase.as_str());
        let statuses: Vec<_> = phases.chain([STALLED]).collect();
        let status = &document["components"]["schemas"]["Readiness"]["properties"]["status"]["enum"];
        assert_eq!(*status, json!(statuses));
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_component_is_used() {
        fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
            match value {
                Value::Array(items) => items.iter().for_each(|item| references(item, found)),
                Value::Object(map) => {
                    found.extend(map.get("$ref").and_then(Value::as_str));
                    map.values().for_each(|item| references(item, found));
                }
                _ => {}
            }
        }
        let document = document(&Access::default());
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        for reference in &found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        for kind in ["schemas", "responses", "parameters"] {
            for name in document["components"][kind].as_object().unwrap().keys() {
                let reference = format!("#/components/{kind}/{name}");
                assert!(found.contains(reference.as_str()), "{reference} is not used");
            }
        }
    }
}
