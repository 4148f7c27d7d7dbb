//! Full queues, failed steps, deadlines, a dead engine: what clients are told, and that it is counted once.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use axum::response::Response;
use http_body_util::BodyExt;
use lapidary_engine::EngineConfig;
use lapidary_server::Limits;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tower::ServiceExt;

use crate::support::{Server, Setup, post_request, with_messages};

/// For the queue.
const PATIENCE: Duration = Duration::from_millis(50);
/// A machine with other things to do may hold the engine up for any while: what must happen in time is tried with more.
const PATIENCES: [Duration; 4] = [
    PATIENCE,
    Duration::from_millis(250),
    Duration::from_millis(1250),
    Duration::from_millis(6250),
];

/// Starts a request and waits until the engine has it.
async fn start_one(server: &Server) -> JoinHandle<Response> {
    submit(server, json!({ "max_tokens": 2 })).await
}

/// Waits until the engine has the request. Not by how many it says run and wait: who stops waiting to run counts as both for
/// a moment.
async fn submit(server: &Server, body: Value) -> JoinHandle<Response> {
    let num_submitted = async || server.metric("vllm:request_params_n_count", "").await;
    let before = num_submitted().await;
    let task = send(server, body);
    while num_submitted().await == before {
        tokio::task::yield_now().await;
    }
    task
}

type Pending = Pin<Box<dyn Future<Output = Result<Response, Infallible>>>>;

/// Sends requests until one is refused at once.
async fn first_refused(server: &Server) -> (Response, Vec<Pending>) {
    // One counts as queued until its first step passes the gate: the next one is already one too many, or the one after.
    let mut waiting: Vec<Pending> = Vec::new();
    loop {
        let router = server.router.clone();
        let body = with_messages(json!({ "max_tokens": 2 }));
        let mut answer: Pending = Box::pin(router.oneshot(post_request("/v1/chat/completions", body)));
        let polled = std::future::poll_fn(|context| std::task::Poll::Ready(answer.as_mut().poll(context))).await;
        match polled {
            std::task::Poll::Ready(response) => return (response.unwrap(), waiting),
            std::task::Poll::Pending => waiting.push(answer),
        }
        assert!(waiting.len() < 4, "the queue never fills");
    }
}

#[tokio::test]
async fn a_full_queue_is_429_with_retry_after() {
    let (mut setup, gate) = Setup::default().gated();
    setup.engine = EngineConfig {
        max_queued_requests: 1,
        max_num_seqs: 1,
        ..setup.engine
    };
    let server = setup.start();
    let first = start_one(&server).await;
    let (refused, waiting) = first_refused(&server).await;
    assert_eq!(refused.status(), 429);
    let seconds: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds));
    drop(gate);
    assert_eq!(first.await.unwrap().status(), 200);
    drop(waiting);
    let queue_full = server
        .outcomes()
        .await
        .into_iter()
        .find(|(outcome, _)| outcome == "queue_full");
    assert_eq!(queue_full, Some(("queue_full".to_owned(), 1)));
    server.assert_idle().await;
}

#[tokio::test]
async fn a_failed_step_before_the_first_token_is_a_plain_500() {
    let server = Setup::default().failing_at([0, 1]).start();
    for body in [json!({}), json!({ "stream": true })] {
        let answer = server.chat(body).await;
        assert_eq!(answer.status, 500);
        let error = &answer.json()["error"];
        assert_eq!(error["type"], "server_error");
        assert_eq!(error["code"], "internal_error");
    }
    assert_eq!(server.outcomes().await, [("engine_error".to_owned(), 2)]);
    assert_eq!(
        server
            .metric("vllm:request_success_total", "finished_reason=\"error\"")
            .await,
        2.0
    );
    assert_eq!(server.chat(json!({})).await.status, 200, "the engine goes on");
    server.assert_idle().await;
}

#[tokio::test]
async fn a_failed_step_in_a_stream_is_an_event_and_the_end() {
    let server = Setup::answering(&["a"; 9]).failing_at([3]).start();
    let answer = server.chat(json!({ "stream": true })).await;
    assert_eq!(answer.status, 200);
    let events = answer.events();
    assert_eq!(*events.last().unwrap(), "[DONE]");
    let error: Value = serde_json::from_str(events[events.len() - 2]).unwrap();
    assert_eq!(error["error"]["code"], "internal_error");
    assert_eq!(error["error"].as_object().unwrap().len(), 4);
    assert_eq!(server.outcomes().await, [("engine_error".to_owned(), 1)]);
    server.assert_idle().await;
}

#[tokio::test]
async fn a_deadline_ends_the_request_with_408() {
    let (setup, gate) = Setup::default().gated();
    let server = setup.start();
    let mut request = post_request("/v1/chat/completions", with_messages(json!({})));
    request
        .headers_mut()
        .insert("x-request-timeout", "0.001".parse().unwrap());
    let pending = tokio::spawn({
        let router = server.router.clone();
        async move { router.oneshot(request).await.unwrap() }
    });
    while server.metric("vllm:request_params_n_count", "").await == 0.0 {
        tokio::task::yield_now().await;
    }
    // Now it is submitted; the deadline passes while its first step waits at the gate, or before that.
    let deadline = Instant::now() + Duration::from_millis(5);
    while Instant::now() < deadline {
        tokio::task::yield_now().await;
    }
    drop(gate);
    assert_eq!(pending.await.unwrap().status(), 408);
    assert_eq!(server.outcomes().await, [("timeout".to_owned(), 1)]);
    server.assert_idle().await;
}

#[tokio::test]
async fn who_waits_in_the_queue_for_too_long_is_told_when_to_come_back() {
    for patience in PATIENCES {
        if tells_who_waits_for_longer_than(patience).await {
            return;
        }
    }
    panic!("none began to run before its patience ended");
}

/// False if the one that has the server to itself did not begin in time either.
async fn tells_who_waits_for_longer_than(patience: Duration) -> bool {
    let (mut setup, gate) = Setup::answering(&["a"; 200]).gated();
    setup.engine.max_num_seqs = 1;
    let limits = Limits {
        queue_timeout: Some(patience),
        ..Limits::default()
    };
    let server = Setup { limits, ..setup }.start();
    let send = |body: Value| send(&server, body);
    let running = send(json!({ "max_tokens": 100 }));
    // It has left the queue for its first step, which waits at the gate: nobody is sent away meanwhile.
    let stats = || server.engine.stats();
    while (stats().num_queued, stats().num_running) != (0, 1) {
        if running.is_finished() {
            assert_eq!(running.await.unwrap().status(), 429);
            return false;
        }
        tokio::task::yield_now().await;
    }
    // As long as the server lets it, or less; a client cannot have more.
    let waiting = [
        json!({}),
        json!({ "queue_timeout": 0.001 }),
        json!({ "queue_timeout": 3600 }),
    ]
    .map(send);
    // On a busy machine the least patient may have been sent away before the engine had it.
    let answered = || waiting.iter().filter(|answer| answer.is_finished()).count() as u64;
    while stats().num_queued + answered() < 3 {
        tokio::task::yield_now().await;
    }
    let last = Instant::now() + patience;
    while Instant::now() <= last {
        tokio::task::yield_now().await;
    }
    drop(gate);
    for refused in waiting {
        let refused = refused.await.unwrap();
        assert_eq!(refused.status(), 429);
        let wait: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=60).contains(&wait));
        let body = refused.into_body().collect().await.unwrap().to_bytes();
        assert!(String::from_utf8_lossy(&body).contains("queue_timeout"));
    }
    assert_eq!(running.await.unwrap().status(), 200);
    let mut outcomes = server.outcomes().await;
    outcomes.sort();
    assert_eq!(outcomes, [("length".to_owned(), 1), ("timeout".to_owned(), 3)]);
    server.assert_idle().await;
    true
}

/// A server of one sequence at a time, and as many requests that wait.
async fn busy(limits: Limits, num_queued: u64) -> (Server, Sender<()>, Vec<JoinHandle<Response>>) {
    let (mut setup, gate) = Setup::answering(&["a"; 200]).gated();
    setup.engine.max_num_seqs = 1;
    let server = Setup { limits, ..setup }.start();
    let mut asked = vec![send(&server, json!({ "max_tokens": 1 }))];
    gate.send(()).unwrap();
    while server.engine.stats().requests_finished == 0 {
        tokio::task::yield_now().await;
    }
    for _ in 0..=num_queued {
        asked.push(submit(&server, json!({ "max_tokens": 1 })).await);
    }
    (server, gate, asked)
}

fn send(server: &Server, body: Value) -> JoinHandle<Response> {
    let request = post_request("/v1/chat/completions", with_messages(body));
    let router = server.router.clone();
    tokio::spawn(async move { router.oneshot(request).await.unwrap() })
}

async fn assert_is_refused(server: &Server, body: Value) {
    let refused = server.chat(body).await;
    assert_eq!(refused.status, 429);
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait));
}

#[tokio::test]
async fn who_would_wait_for_too_long_is_refused_at_once() {
    let mut one_slot = Setup::default();
    one_slot.engine.max_num_seqs = 1;
    let mut blocks_for_one = Setup::default();
    blocks_for_one.scripted.kv_cache.num_blocks = 2;
    for setup in [one_slot, blocks_for_one] {
        refuses_who_would_wait_for_too_long(setup).await;
    }
}

/// Only one runs at a time.
async fn refuses_who_would_wait_for_too_long(setup: Setup) {
    let limits = Limits {
        max_queue_wait: Some(PATIENCE),
        ..Limits::default()
    };
    let (setup, gate) = setup.gated();
    let server = Setup { limits, ..setup }.start();
    let first = start_one(&server).await;
    let second = start_one(&server).await;
    // The first one's second step leaves the other waiting.
    gate.send(()).unwrap();
    while server.engine.stats().num_slots != 1 {
        tokio::task::yield_now().await;
    }
    // Nobody knows yet how fast the queue moves: it may be as long as the batch is wide.
    let (refused, waiting) = first_refused(&server).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    // What does not wait is answered all the same.
    let rendered = server
        .post("/v1/chat/completions/render", with_messages(json!({})))
        .await;
    assert_eq!(rendered.status, 200);
    drop(gate);
    for answered in [first, second] {
        assert_eq!(answered.await.unwrap().status(), 200);
    }
    drop(waiting);
    server.assert_idle().await;
}

#[tokio::test]
async fn who_would_wait_for_longer_than_it_can_is_refused_at_once() {
    let (server, gate, mut asked) = busy(Limits::default(), 9).await;
    while server.engine.stats().ends_per_second_when_full == 0.0 {
        // One step at a time: the queue must not be empty before the rate is known.
        let steps = server.engine.stats().steps;
        gate.send(()).unwrap();
        while server.engine.stats().steps == steps {
            tokio::task::yield_now().await;
        }
    }
    assert!(server.engine.stats().num_queued > 0);
    assert_is_refused(&server, json!({ "queue_timeout": 1e-9 })).await;
    asked.push(submit(&server, json!({ "max_tokens": 1, "queue_timeout": 3600 })).await);
    drop(gate);
    for answer in asked {
        assert_eq!(answer.await.unwrap().status(), 200);
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn a_dead_engine_fails_requests_and_health() {
    let mut setup = Setup::default();
    setup.scripted.device_lost_at = Some(0);
    let server = setup.start();
    for expected in ["the request that saw it die", "one after"] {
        let answer = server.chat(json!({})).await;
        assert_eq!(answer.status, 503, "{expected}");
        assert_eq!(answer.json()["error"]["code"], "engine_dead");
        assert!(answer.header("retry-after").is_some());
    }
    for probe in ["/health", "/live", "/ready"] {
        let answer = server.get(probe).await;
        let body = answer.json();
        assert_eq!(
            (answer.status.as_u16(), &body["status"]),
            (503, &json!("failed")),
            "{probe}"
        );
        let why = body["error"].as_str().unwrap();
        assert!(why.contains("device lost: "), "{probe}: {why}");
    }
    assert_eq!(server.outcomes().await, [("engine_error".to_owned(), 2)]);
}

#[tokio::test]
async fn a_step_that_does_not_end_fails_requests_and_health() {
    // The gate stays closed: the first step hangs.
    let (mut setup, _gate) = Setup::default().gated();
    setup.engine.step_timeout = Some(PATIENCE);
    let server = setup.start();
    for expected in ["a request of the step", "one after"] {
        let answer = server.chat(json!({})).await;
        assert_eq!(answer.status, 503, "{expected}");
        assert_eq!(answer.json()["error"]["code"], "engine_dead");
    }
    let health = server.get("/health").await;
    let why = health.json()["error"].as_str().unwrap().to_owned();
    assert!(
        health.status == 503 && why.contains("the step timeout of 50ms"),
        "{why}"
    );
    assert_eq!(server.outcomes().await, [("engine_error".to_owned(), 2)]);
}

#[tokio::test]
async fn a_step_whose_length_nobody_knows_is_not_stuck() {
    // As on a CPU.
    let (setup, gate) = Setup::default().gated();
    assert_eq!(setup.stall_limit, None);
    let server = setup.start();
    let request = start_one(&server).await;
    let heartbeat = || server.engine.heartbeat();
    while !heartbeat().busy || heartbeat().since_progress.is_zero() {
        tokio::task::yield_now().await;
    }
    for probe in ["/health", "/ready"] {
        assert_eq!(server.get(probe).await.status, 200, "{probe}");
    }
    assert!(
        server.metric("lapidary_engine_stalled_seconds", "").await > 0.0,
        "who wants to knows"
    );
    drop(gate);
    assert_eq!(request.await.unwrap().status(), 200);
}

#[tokio::test]
async fn health_says_that_the_engine_is_stuck_before_it_is_given_up() {
    let (mut setup, gate) = Setup::default().gated();
    setup.stall_limit = Some(PATIENCE);
    let server = setup.start();
    let request = start_one(&server).await;
    let stalled = loop {
        let health = server.get("/health").await;
        if health.status == 503 {
            break health.json();
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(stalled["status"], "stalled");
    assert_eq!(server.get("/live").await.status, 200, "it may go on");
    drop(gate);
    assert_eq!(request.await.unwrap().status(), 200);
    server.engine.idle().await;
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn a_shutdown_cuts_streams_off_with_an_error() {
    let (setup, gate) = Setup::answering(&["a"; 50]).gated();
    let server = setup.start();
    gate.send(()).unwrap();
    let body = with_messages(json!({ "stream": true }));
    let response = server
        .router
        .clone()
        .oneshot(post_request("/v1/chat/completions", body))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let engine = server.engine.clone();
    let shutdown = tokio::task::spawn_blocking(move || engine.shutdown());
    while !server.engine.is_draining() {
        tokio::task::yield_now().await;
    }
    drop(gate);
    let bytes = BodyExt::collect(response.into_body()).await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    assert!(
        text.contains("\"code\":\"shutting_down\"") && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    shutdown.await.unwrap();
    assert_eq!(server.outcomes().await, [("shutdown".to_owned(), 1)]);
}
