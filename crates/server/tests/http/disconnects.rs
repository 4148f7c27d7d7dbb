//! Clients that leave: over real sockets, at every point. The blocks come back and one outcome is counted.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{Server, Setup, with_messages};

/// Serves on a port and sends one request.
async fn connect(server: &Server, path: &str, body: &Value) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = server.router.clone();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let mut socket = TcpStream::connect(address).await.unwrap();
    let body = body.to_string();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(request.as_bytes()).await.unwrap();
    socket
}

async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::task::yield_now().await;
    }
}

/// Waits until the request is counted as ended, and checks that it is counted once, as the client's doing.
async fn assert_aborted(server: &Server) {
    while server.outcomes().await.is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.outcomes().await, [("client_abort".to_owned(), 1)]);
    assert_eq!(server.metric("lapidary_requests_received_total", "").await, 1.0);
    server.assert_idle().await;
}

async fn leave_while_the_first_step_runs(path: &str, body: Value) {
    let (setup, gate) = Setup::answering(&["a"; 200]).gated();
    let server = setup.start();
    let socket = connect(&server, path, &body).await;
    until(|| server.engine.stats().num_running + server.engine.stats().num_waiting > 0).await;
    drop(socket);
    // Counted while the engine is still in its step: the front end does not wait for it.
    while server.outcomes().await.is_empty() {
        tokio::task::yield_now().await;
    }
    drop(gate);
    assert_aborted(&server).await;
}

#[tokio::test]
async fn before_the_first_token_of_a_body() {
    leave_while_the_first_step_runs("/v1/chat/completions", with_messages(json!({}))).await;
}

#[tokio::test]
async fn before_the_first_token_of_a_stream() {
    leave_while_the_first_step_runs("/v1/chat/completions", with_messages(json!({ "stream": true }))).await;
}

#[tokio::test]
async fn before_the_first_token_of_several_answers() {
    let body = json!({ "prompt": ["a", "b", "the"], "n": 3, "max_tokens": 100 });
    leave_while_the_first_step_runs("/v1/completions", body).await;
}

async fn leave_while_tokens_come(body: Value) {
    let (setup, gate) = Setup::answering(&["a"; 200]).gated();
    let server = setup.start();
    let streams = body["stream"] == true;
    let mut socket = connect(&server, "/v1/completions", &body).await;
    for _ in 0..5 {
        gate.send(()).unwrap();
    }
    until(|| server.engine.stats().steps >= 3).await;
    if streams {
        let mut read = [0; 64];
        assert!(socket.read(&mut read).await.unwrap() > 0);
    }
    drop(socket);
    while server.outcomes().await.is_empty() {
        tokio::task::yield_now().await;
    }
    drop(gate);
    assert_aborted(&server).await;
    let generated = server.engine.stats().generated_tokens;
    assert!(generated < 150, "generation went on: {generated}");
}

#[tokio::test]
async fn in_the_middle_of_a_body() {
    leave_while_tokens_come(json!({ "prompt": "a", "max_tokens": 150 })).await;
}

#[tokio::test]
async fn in_the_middle_of_a_stream() {
    leave_while_tokens_come(json!({ "prompt": "a", "max_tokens": 150, "stream": true })).await;
}

#[tokio::test]
async fn in_the_middle_of_several_streams() {
    leave_while_tokens_come(json!({ "prompt": ["a", "b"], "n": 2, "max_tokens": 35, "stream": true })).await;
}

#[tokio::test]
async fn while_the_request_waits_in_the_queue() {
    let (mut setup, gate) = Setup::answering(&["a"; 200]).gated();
    setup.engine.max_num_seqs = 1;
    let server = setup.start();
    let first = connect(&server, "/v1/completions", &json!({ "prompt": "a", "max_tokens": 3 })).await;
    until(|| server.engine.stats().num_running > 0).await;
    gate.send(()).unwrap();
    until(|| server.engine.stats().steps > 0).await;
    let second = connect(&server, "/v1/completions", &json!({ "prompt": "b", "max_tokens": 3 })).await;
    until(|| server.engine.stats().num_queued > 0).await;
    drop(second);
    while server.outcomes().await.is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.outcomes().await, [("client_abort".to_owned(), 1)]);
    drop(gate);
    let mut first = first;
    let mut read = [0; 64];
    assert!(
        first.read(&mut read).await.unwrap() > 0,
        "the one that runs is not disturbed"
    );
    server.assert_idle().await;
}

#[tokio::test]
async fn before_the_body_of_the_request_is_complete() {
    let server = Setup::default().start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = server.router.clone();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{\"pro")
        .await
        .unwrap();
    while server.metric("lapidary_requests_received_total", "").await == 0.0 {
        tokio::task::yield_now().await;
    }
    drop(socket);
    while server.outcomes().await.is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.outcomes().await.len(), 1);
}
