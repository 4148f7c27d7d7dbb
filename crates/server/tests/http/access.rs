//! Who may come in.

use std::time::Instant;

use axum::body::Body;
use axum::http::{HeaderValue, Method, Request};
use lapidary_server::access::{Access, ApiKeys, Cors, KeyLimits};
use lapidary_server::config::Token;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::support::{Answer, Server, Setup, with_messages};

const KEY: &str = "sk-right";
const OTHER_KEY: &str = "sk-other";
const CHAT: &str = "/v1/chat/completions";

fn with_keys(limits: KeyLimits) -> Access {
    let keys = [KEY, OTHER_KEY].map(Token::new).to_vec();
    Access {
        keys: Some(ApiKeys::new(keys, None, limits).unwrap()),
        ..Access::default()
    }
}

fn guarded(limits: KeyLimits) -> Setup {
    Setup {
        access: with_keys(limits),
        ..Setup::default()
    }
}

fn chat_request(authorization: Option<&str>, body: Value) -> Request<Body> {
    let mut request = Request::post(CHAT);
    if let Some(value) = authorization {
        request = request.header("authorization", value);
    }
    request.body(Body::from(with_messages(body).to_string())).unwrap()
}

async fn chat_as(server: &Server, key: &str, body: Value) -> Answer {
    server.send(chat_request(Some(&format!("Bearer {key}")), body)).await
}

async fn get_as(server: &Server, key: &str, path: &str) -> Answer {
    let request = Request::get(path).header("authorization", format!("Bearer {key}"));
    server.send(request.body(Body::empty()).unwrap()).await
}

#[tokio::test]
async fn everything_but_the_probes_needs_a_key() {
    let server = guarded(KeyLimits::default()).start();
    let closed = [
        (Method::POST, CHAT),
        (Method::POST, "/v1/completions"),
        (Method::GET, "/v1/models"),
        (Method::GET, "/v1/models/tiny"),
        (Method::POST, "/tokenize"),
        (Method::POST, "/detokenize"),
        (Method::POST, "/v1/chat/completions/render"),
        (Method::POST, "/invocations"),
        (Method::GET, "/tokenizer_info"),
        (Method::GET, "/load"),
        (Method::GET, "/version"),
        (Method::GET, "/metrics"),
        (Method::GET, "/metrics/"),
        (Method::GET, "//live"),
        (Method::GET, "/live/../v1/models"),
        (Method::GET, "/no/such/path"),
    ];
    for (method, path) in closed {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        let answer = server.send(request).await;
        assert_eq!(answer.status, 401, "{path}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"), "{path}");
        assert_eq!(answer.header("content-type"), Some("application/json"));
        assert!(answer.header("x-request-id").is_some());
        let error = answer.json()["error"].clone();
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["code"], "invalid_api_key");
        assert_eq!(error["param"], Value::Null);
        assert!(error["message"].as_str().unwrap().contains("Authorization: Bearer"));
    }
    let probes = [
        "/live",
        "/ready",
        "/health",
        "/ping",
        "/v1/health/live",
        "/v1/health/ready",
        "/v2/health/live",
        "/v2/health/ready",
    ];
    for path in probes {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let counted = get_as(&server, KEY, "/metrics").await.body;
    let refused = |endpoint: &str| {
        let is_it = |line: &&str| {
            ["requests_finished_total", "\"unauthorized\"", endpoint]
                .iter()
                .all(|part| line.contains(part))
        };
        counted.lines().find(is_it).and_then(|line| line.rsplit(' ').next())
    };
    assert_eq!(
        (refused("\"chat\""), refused("\"completions\"")),
        (Some("2"), Some("1"))
    );
}

#[tokio::test]
async fn a_key_opens_and_a_wrong_one_is_not_repeated() {
    let server = guarded(KeyLimits::default()).start();
    for right in ["Bearer sk-right", "bearer sk-other", "Bearer  sk-right"] {
        assert_eq!(
            server.send(chat_request(Some(right), json!({}))).await.status,
            200,
            "{right}"
        );
    }
    for wrong in [
        "Bearer sk-righ",
        "Bearer sk-right2",
        "Bearer ",
        "Bearer",
        "Basic sk-right",
        "sk-right",
        "Bearer secret",
    ] {
        let answer = server.send(chat_request(Some(wrong), json!({}))).await;
        assert_eq!(answer.status, 401, "{wrong}");
        assert!(!answer.body.contains("secret"), "{}", answer.body);
    }
    assert_eq!(get_as(&server, KEY, "/v1/models").await.status, 200);
}

#[tokio::test]
async fn metrics_can_be_left_open() {
    let access = Access {
        open_metrics: true,
        ..with_keys(KeyLimits::default())
    };
    let server = Setup {
        access,
        ..Setup::default()
    }
    .start();
    assert_eq!(server.get("/metrics").await.status, 200);
    assert_eq!(server.get("/v1/models").await.status, 401);
}

#[tokio::test]
async fn a_key_has_so_many_requests_at_the_same_time() {
    let limits = KeyLimits {
        max_concurrent_requests: Some(1),
        ..KeyLimits::default()
    };
    let (mut setup, gate) = guarded(limits).gated();
    setup.access.open_metrics = true;
    let server = setup.start();
    let first = chat_request(Some("Bearer sk-right"), json!({ "stream": true }));
    let first = tokio::spawn(server.router.clone().oneshot(first));
    while server.engine.stats().num_running + server.engine.stats().num_queued == 0 {
        tokio::task::yield_now().await;
    }
    let refused = chat_as(&server, KEY, json!({})).await;
    assert_eq!(refused.status, 429);
    assert_eq!(refused.header("retry-after"), Some("1"));
    let error = refused.json()["error"].clone();
    assert_eq!(
        (&error["type"], &error["code"]),
        (&json!("rate_limit_error"), &json!("rate_limit_exceeded"))
    );
    assert_eq!(get_as(&server, KEY, "/v1/models").await.status, 200, "it costs nothing");
    drop(gate);
    assert_eq!(chat_as(&server, OTHER_KEY, json!({})).await.status, 200, "another key");
    // The answer is complete, and not read yet.
    let first = first.await.unwrap().unwrap();
    assert_eq!(chat_as(&server, KEY, json!({})).await.status, 429);
    drop(first);
    assert_eq!(chat_as(&server, KEY, json!({})).await.status, 200);
    let counted = server.outcomes().await;
    assert!(counted.contains(&("rate_limited".to_owned(), 2)), "{counted:?}");
}

#[tokio::test]
async fn a_key_has_so_many_tokens_a_minute() {
    let limits = KeyLimits {
        tokens_per_minute: Some(60),
        ..KeyLimits::default()
    };
    let server = Setup {
        answer: vec!["a"; 200],
        ..guarded(limits)
    }
    .start();
    // Nobody knows before how many tokens it takes: more than the limit, this once.
    let since = Instant::now();
    let answer = chat_as(&server, KEY, json!({ "max_tokens": 80 })).await;
    let used = answer.json()["usage"]["total_tokens"].as_u64().unwrap();
    assert!(used > 80, "{}", answer.body);
    let refused = chat_as(&server, KEY, json!({})).await;
    assert_eq!(refused.status, 429);
    // One token is forgiven each second, while this took too.
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    let forgiven = since.elapsed().as_secs();
    let waits = (used - 61).saturating_sub(forgiven)..=used - 59;
    assert!(waits.contains(&wait), "{wait} s for {used} tokens");
    assert_eq!(
        chat_as(&server, OTHER_KEY, json!({ "max_tokens": 1 })).await.status,
        200
    );
}

#[tokio::test]
async fn an_answer_that_is_left_unread_is_charged() {
    let limits = KeyLimits {
        tokens_per_minute: Some(5),
        ..KeyLimits::default()
    };
    let server = Setup {
        answer: vec!["a"; 200],
        ..guarded(limits)
    }
    .start();
    let request = chat_request(Some("Bearer sk-right"), json!({ "stream": true, "max_tokens": 50 }));
    // Only the first event is waited for.
    drop(server.router.clone().oneshot(request).await.unwrap());
    assert_eq!(
        chat_as(&server, KEY, json!({})).await.status,
        429,
        "its prompt is longer than the limit"
    );
}

#[tokio::test]
async fn a_prompt_whose_answer_never_began_is_charged() {
    let limits = KeyLimits {
        tokens_per_minute: Some(5),
        ..KeyLimits::default()
    };
    let (setup, gate) = guarded(limits).gated();
    let server = setup.start();
    let leaving = tokio::spawn(
        server
            .router
            .clone()
            .oneshot(chat_request(Some("Bearer sk-right"), json!({}))),
    );
    while server.engine.stats().num_running + server.engine.stats().num_queued == 0 {
        tokio::task::yield_now().await;
    }
    leaving.abort();
    assert!(leaving.await.is_err_and(|error| error.is_cancelled()));
    drop(gate);
    assert_eq!(
        chat_as(&server, KEY, json!({})).await.status,
        429,
        "its prompt is longer than the limit"
    );
    assert_eq!(chat_as(&server, OTHER_KEY, json!({})).await.status, 200);
}

fn preflight(origin: &str) -> Request<Body> {
    Request::options(CHAT)
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,x-stainless-os")
        .body(Body::empty())
        .unwrap()
}

#[tokio::test]
async fn browsers_ask_without_a_key_and_only_listed_pages_may_call() {
    let access = Access {
        cors: Cors {
            origins: Some(vec![HeaderValue::from_static("https://chat.example")]),
            allow_credentials: true,
            ..Cors::default()
        },
        ..with_keys(KeyLimits::default())
    };
    let server = Setup {
        access,
        ..Setup::default()
    }
    .start();
    let allowed = server.send(preflight("https://chat.example")).await;
    assert_eq!(allowed.status, 200);
    assert_eq!(
        allowed.header("access-control-allow-origin"),
        Some("https://chat.example")
    );
    assert_eq!(allowed.header("access-control-allow-credentials"), Some("true"));
    assert_eq!(
        allowed.header("access-control-allow-headers"),
        Some("authorization,x-stainless-os")
    );
    let other = server.send(preflight("https://evil.example")).await;
    assert_eq!(other.header("access-control-allow-origin"), None);
}

#[tokio::test]
async fn any_page_may_send_cookies_where_that_is_wanted() {
    let access = Access {
        cors: Cors {
            allow_credentials: true,
            ..Cors::default()
        },
        ..Access::default()
    };
    let server = Setup {
        access,
        ..Setup::default()
    }
    .start();
    let allowed = server.send(preflight("https://chat.example")).await;
    assert_eq!(
        allowed.header("access-control-allow-origin"),
        Some("https://chat.example")
    );
}

#[tokio::test]
async fn paths_work_with_and_without_the_prefix_of_a_proxy() {
    let access = Access {
        root_path: "/gem".to_owned(),
        ..with_keys(KeyLimits::default())
    };
    let server = Setup {
        access,
        ..Setup::default()
    }
    .start();
    for path in ["/live", "/gem/live"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    for path in ["/v1/models", "/gem/v1/models", "/gem/metrics"] {
        assert_eq!(server.get(path).await.status, 401, "{path}");
        assert_eq!(get_as(&server, KEY, path).await.status, 200, "{path}");
    }
    let unknown = get_as(&server, KEY, "/gem/nothing").await;
    assert_eq!(
        (unknown.status.as_u16(), &unknown.json()["error"]["code"]),
        (404, &json!("unknown_url"))
    );
}
