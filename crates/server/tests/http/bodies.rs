//! Request bodies that come slowly, or are large.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::mpsc;
use std::task::Poll;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::Request;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::spawn_blocking;
use tower::ServiceExt;

use crate::sent_body::sent_body;
use crate::support::{Server, Setup, post_request};

/// Too large to be read whatever else is, small enough to be parsed at once.
const JUST_LARGE: usize = 100 << 10;

fn request(num_bytes: Option<usize>) -> (UnboundedSender<Bytes>, Request<Body>) {
    let (sender, body) = sent_body();
    let mut request = Request::post("/v1/completions");
    if let Some(num_bytes) = num_bytes {
        request = request.header("content-length", num_bytes);
    }
    (sender, request.body(body).unwrap())
}

/// A completion of exactly so many bytes.
fn completion(num_bytes: usize) -> Bytes {
    let body = r#"{"prompt":"a","max_tokens":2}"#;
    format!("{body}{}", " ".repeat(num_bytes - body.len())).into()
}

/// Sends a request and says when it has looked at its body.
fn send(server: &Server, request: Request<Body>) -> tokio::task::JoinHandle<u16> {
    let answer = server.router.clone().oneshot(request);
    tokio::spawn(async move { answer.await.unwrap().status().as_u16() })
}

#[tokio::test]
async fn a_body_that_does_not_arrive_in_time_is_408() {
    let mut setup = Setup::default();
    setup.limits.body_timeout = Duration::from_millis(20);
    let server = setup.start();
    let (sender, slow) = request(Some(100));
    sender.send(completion(50)).unwrap();
    assert_eq!(send(&server, slow).await.unwrap(), 408);
    assert_eq!(server.outcomes().await, [("timeout".to_owned(), 1)]);
    server.assert_idle().await;
}

#[tokio::test]
async fn a_large_body_that_is_looked_at_twice_needs_room_once() {
    const LARGE: usize = 600 << 10;
    let mut setup = Setup::default();
    setup.limits.max_bodies_bytes = LARGE;
    setup.limits.body_timeout = Duration::from_secs(60);
    let server = setup.start();
    let (sender, mut twice) = request(Some(LARGE));
    *twice.uri_mut() = "/invocations".parse().unwrap();
    sender.send(completion(LARGE)).unwrap();
    drop(sender);
    assert_eq!(send(&server, twice).await.unwrap(), 200);
    server.assert_idle().await;
}

#[tokio::test]
async fn whoever_leaves_in_the_midst_of_a_body_is_counted() {
    for path in ["/v1/completions", "/invocations"] {
        let server = Setup::default().start();
        let (_sender, mut leaving) = request(Some(100));
        *leaving.uri_mut() = path.parse().unwrap();
        let answer = server.router.clone().oneshot(leaving);
        // As far as it comes without the body.
        assert!(tokio::time::timeout(Duration::ZERO, answer).await.is_err(), "{path}");
        assert_eq!(server.outcomes().await, [("client_abort".to_owned(), 1)], "{path}");
        let received = server.metric("lapidary_requests_received_total", "").await;
        assert_eq!(received, 1.0, "{path}");
    }
}

#[tokio::test]
async fn large_bodies_follow_each_other_and_small_ones_do_not_wait() {
    const LARGE: usize = 600 << 10;
    let mut setup = Setup::default();
    setup.limits.max_bodies_bytes = 1 << 20;
    let server = setup.start();
    // Half of it comes, and all the room for it is taken.
    let (first_sender, first) = request(Some(LARGE));
    first_sender.send(completion(LARGE / 2)).unwrap();
    let first = send(&server, first);
    let (second_sender, second) = request(None);
    second_sender.send(completion(LARGE)).unwrap();
    drop(second_sender);
    let second = send(&server, second);
    let (small_sender, small) = request(Some(1000));
    small_sender.send(completion(1000)).unwrap();
    drop(small_sender);
    assert_eq!(send(&server, small).await.unwrap(), 200);
    first_sender.send(Bytes::from(vec![b' '; LARGE / 2])).unwrap();
    drop(first_sender);
    assert_eq!(first.await.unwrap(), 200);
    assert_eq!(second.await.unwrap(), 200);
    server.assert_idle().await;
}

/// One thread does all long work.
fn one_worker() -> Runtime {
    let mut runtime = Builder::new_current_thread();
    runtime.enable_all().max_blocking_threads(1).build().unwrap()
}

/// A large body of a request, filled up with spaces.
fn large(path: &str, body: &Value) -> Request<Body> {
    let (sender, mut request) = request(Some(JUST_LARGE));
    *request.uri_mut() = path.parse().unwrap();
    let body = body.to_string();
    sender
        .send(format!("{body}{}", " ".repeat(JUST_LARGE - body.len())).into())
        .unwrap();
    request
}

/// As far as it comes by itself.
async fn polled<F: Future + Unpin>(mut future: F) -> F {
    let polled = poll_fn(|context| Poll::Ready(Pin::new(&mut future).poll(context))).await;
    assert!(polled.is_pending());
    future
}

#[test]
fn a_request_keeps_the_room_of_its_body_until_its_prompt_is_made() {
    let text = "a".repeat(3000);
    let message = json!({ "role": "user", "content": text });
    for (path, body) in [
        ("/v1/completions", json!({ "prompt": text, "max_tokens": 1 })),
        ("/v1/completions/render", json!({ "prompt": text, "max_tokens": 1 })),
        (
            "/v1/chat/completions",
            json!({ "messages": [message], "max_tokens": 1 }),
        ),
        (
            "/v1/chat/completions/render",
            json!({ "messages": [message], "max_tokens": 1 }),
        ),
        ("/v1/responses", json!({ "input": text, "max_output_tokens": 16 })),
        ("/invocations", json!({ "prompt": text, "max_tokens": 1 })),
        ("/tokenize", json!({ "prompt": text })),
        ("/tokenize", json!({ "messages": [message] })),
    ] {
        one_worker().block_on(keeps_its_room(path, &body));
    }
}

async fn keeps_its_room(path: &str, body: &Value) {
    let (mut setup, gate) = Setup::default().gated();
    setup.engine.max_model_len = 4096;
    setup.limits.max_bodies_bytes = JUST_LARGE;
    let server = setup.start();
    let num_submitted = || {
        let stats = server.engine.stats();
        stats.num_queued + stats.num_running
    };
    let (go_on, goes_on) = mpsc::channel::<()>();
    let busy = spawn_blocking(move || goes_on.recv().is_err());
    // All of it was read; its text waits to be tokenised.
    let first = polled(server.router.clone().oneshot(large(path, body))).await;
    let short = json!({ "prompt": "a", "max_tokens": 1 });
    let second = polled(server.router.clone().oneshot(large("/v1/completions", &short))).await;
    assert_eq!(num_submitted(), 0, "{path}: there was room for both");
    // Room is all that is missing.
    let third = polled(server.router.clone().oneshot(post_request("/v1/completions", short))).await;
    assert!(num_submitted() > 0, "{path}");
    drop((go_on, gate));
    assert!(busy.await.unwrap(), "nobody told it to go on");
    for answer in [first, second, third] {
        assert_eq!(answer.await.unwrap().status(), 200, "{path}");
    }
    server.assert_idle().await;
}

/// A machine with other things to do may hold a request up for any while: what takes time is tried with more of it.
const PATIENCES: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(250),
    Duration::from_millis(1250),
    Duration::from_millis(6250),
];

/// Sends a completion whose body comes only when `patience`, in `header`, is over.
async fn send_late(path: &str, header: &'static str, patience: Duration) -> u16 {
    let server = Setup::default().start();
    let (sender, mut slow) = request(None);
    *slow.uri_mut() = path.parse().unwrap();
    let seconds = patience.as_secs_f64().to_string();
    slow.headers_mut().insert(header, seconds.parse().unwrap());
    // It waits for its body.
    let answer = polled(server.router.clone().oneshot(slow)).await;
    let arrived = Instant::now();
    while arrived.elapsed() <= patience {
        tokio::task::yield_now().await;
    }
    sender.send(completion(50)).unwrap();
    drop(sender);
    answer.await.unwrap().status().as_u16()
}

#[tokio::test]
async fn who_sends_slowly_waits_in_no_queue() {
    for path in ["/v1/completions", "/invocations"] {
        let mut statuses = Vec::new();
        for patience in PATIENCES {
            statuses.push(send_late(path, "x-queue-timeout", patience).await);
            if statuses.last() == Some(&200) {
                break;
            }
        }
        assert_eq!(statuses.last(), Some(&200), "{path}: {statuses:?}");
    }
}

#[tokio::test]
async fn a_request_has_its_time_from_when_it_arrives() {
    for path in ["/v1/completions", "/invocations"] {
        let status = send_late(path, "x-request-timeout", Duration::from_millis(250)).await;
        assert_eq!(status, 408, "{path}");
    }
}
