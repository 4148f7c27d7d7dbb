//! What all endpoints share: ids, errors of the router, CORS, models.

use axum::body::Body;
use axum::http::{Method, Request};
use serde_json::json;

use crate::support::{Setup, post_request, with_messages};

#[tokio::test]
async fn every_response_has_a_request_id_and_a_sane_one_is_kept() {
    let server = Setup::default().start();
    for path in ["/health", "/nowhere", "/v1/models", "/v1/completions"] {
        assert!(
            server
                .get(path)
                .await
                .header("x-request-id")
                .is_some_and(|id| !id.is_empty()),
            "{path}"
        );
    }
    let mut request = post_request("/v1/chat/completions", with_messages(json!({})));
    request.headers_mut().insert("x-request-id", "abc-123".parse().unwrap());
    let answer = server.send(request).await;
    assert_eq!(answer.header("x-request-id"), Some("abc-123"));
    assert_eq!(answer.json()["id"], "chatcmpl-abc-123");
    let mut request = Request::get("/health").body(Body::empty()).unwrap();
    request
        .headers_mut()
        .insert("x-request-id", "two words".parse().unwrap());
    assert_ne!(server.send(request).await.header("x-request-id"), Some("two words"));
}

#[tokio::test]
async fn unknown_paths_and_wrong_methods_get_openais_error() {
    let server = Setup::default().start();
    for (method, path, status, code) in [
        (Method::GET, "/v1/nothing", 404, "unknown_url"),
        (Method::POST, "/", 404, "unknown_url"),
        (Method::GET, "/v1/chat/completions", 405, "method_not_allowed"),
        (Method::DELETE, "/v1/models", 405, "method_not_allowed"),
        (Method::POST, "/metrics", 405, "method_not_allowed"),
    ] {
        let answer = server
            .send(Request::builder().method(method).uri(path).body(Body::empty()).unwrap())
            .await;
        assert_eq!(answer.status, status, "{path}");
        assert_eq!(answer.header("content-type"), Some("application/json"));
        let error = &answer.json()["error"];
        assert_eq!(error["code"], code, "{path}");
        assert_eq!(error.as_object().unwrap().len(), 4);
        if status == 405 {
            assert!(answer.header("allow").is_some(), "{path}");
        }
    }
}

#[tokio::test]
async fn models_are_listed_under_each_of_their_names() {
    let server = Setup::default().start();
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let ids: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|card| card["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["tiny", "org/tiny"]);
    assert_eq!(list["data"][0]["max_model_len"], 256);
    assert_eq!(list["data"][0]["owned_by"], "vllm");
    assert_eq!(list["data"][0]["root"], "/models/tiny");
    assert_eq!(server.get("/v1/models/org/tiny").await.json()["id"], "org/tiny");
    assert_eq!(server.get("/v1/models/org%2Ftiny").await.json()["id"], "org/tiny");
    for path in ["/v1/models/gpt-4", "/v1/models/%ff"] {
        let answer = server.get(path).await;
        assert!(answer.status.is_client_error(), "{path}");
        assert_eq!(answer.json()["error"]["param"], "model");
    }
    let answer = server.chat(json!({ "model": "org/tiny" })).await.json();
    assert_eq!(answer["model"], "tiny");
}

#[tokio::test]
async fn a_page_of_another_origin_may_call_with_any_header() {
    let server = Setup::default().start();
    let preflight = Request::builder()
        .method(Method::OPTIONS)
        .uri("/v1/chat/completions")
        .header("origin", "https://example.org")
        .header("access-control-request-method", "POST")
        .header(
            "access-control-request-headers",
            "authorization,content-type,x-stainless-os",
        )
        .body(Body::empty())
        .unwrap();
    let answer = server.send(preflight).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
    assert_eq!(answer.header("access-control-allow-methods"), Some("POST"));
    let headers = answer.header("access-control-allow-headers").unwrap();
    assert!(
        headers.contains("authorization") && headers.contains("x-stainless-os"),
        "{headers}"
    );
    for body in [json!({ "stream": true }), json!({ "n": 0 })] {
        let mut request = post_request("/v1/chat/completions", with_messages(body));
        request
            .headers_mut()
            .insert("origin", "https://example.org".parse().unwrap());
        assert_eq!(
            server.send(request).await.header("access-control-allow-origin"),
            Some("*")
        );
    }
}

#[tokio::test]
async fn any_content_type_will_do() {
    let server = Setup::default().start();
    for content_type in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-8",
    ] {
        let mut request = post_request("/v1/chat/completions", with_messages(json!({})));
        request
            .headers_mut()
            .insert("content-type", content_type.parse().unwrap());
        assert_eq!(server.send(request).await.status, 200, "{content_type}");
    }
}
