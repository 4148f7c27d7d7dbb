//! The real binary with the demo model, over real sockets, byte by byte.

mod accounting;
mod chat;
mod fuzz_seeds;
mod hostile;
mod overload;

use std::io;

use lapidary_tests::http::{Connection, Response};
use lapidary_tests::process::ServerProcess;
use serde_json::{Value, json};

/// POSTs JSON on a connection of its own.
async fn post(server: &ServerProcess, path: &str, body: &Value) -> io::Result<Response> {
    Connection::open(server.address)
        .await?
        .request("POST", path, &body.to_string())
        .await
}

/// Data of all events of a streamed answer, `[DONE]` included.
async fn stream(server: &ServerProcess, path: &str, body: &Value) -> io::Result<Vec<String>> {
    let mut connection = Connection::open(server.address).await?;
    let head = connection.send("POST", path, &body.to_string()).await?;
    assert_eq!(head.status, 200);
    assert_eq!(head.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(head.header("cache-control"), Some("no-cache"));
    let mut events = connection.events(&head)?;
    let mut all = Vec::new();
    while let Some(event) = events.next().await? {
        all.push(event);
    }
    Ok(all)
}

/// A one-turn chat body.
fn chat(content: &str) -> Value {
    json!({ "model": "demo", "messages": [{ "role": "user", "content": content }], "temperature": 0 })
}

/// `body` with one more field.
fn with(mut body: Value, key: &str, value: impl Into<Value>) -> Value {
    body[key] = value.into();
    body
}
