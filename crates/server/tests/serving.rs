//! A serving process whose engine can be made to die, over real sockets.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

mod support;

use std::time::Duration;

use lapidary_engine::ScriptedConfig;
use lapidary_server::config::HttpConfig;
use lapidary_server::load::LoadError;
use lapidary_server::serve::{Listener, ServeError, serve_on};
use support::{Setup, served, tokenizer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(60);

fn http() -> HttpConfig {
    HttpConfig {
        addresses: vec!["127.0.0.1:0".parse().unwrap()],
        max_connections: 16,
        header_read_timeout: DEADLINE,
        shutdown_timeout: DEADLINE,
        drain_grace: Duration::ZERO,
    }
}

#[tokio::test]
async fn a_dead_engine_ends_the_process_after_its_clients_were_told() {
    let scripted = ScriptedConfig {
        device_lost_at: Some(3),
        ..Setup::default().scripted
    };
    let server = Setup {
        scripted,
        is_loaded: false,
        ..Setup::default()
    }
    .start();
    let listener = Listener::bind(&http()).await.unwrap();
    let address = listener.local_address();
    let model = served(tokenizer().into(), server.engine.clone());
    let (state, http) = (server.state.clone(), http());
    let serving = tokio::spawn(async move { serve_on(listener, &http, state, |_| Ok(model)).await });

    let mut client = TcpStream::connect(address).await.unwrap();
    let body = r#"{"model":"tiny","prompt":"hello","stream":true,"ignore_eos":true,"max_tokens":100}"#;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    // Whoever comes before the model is loaded is told to come again.
    let answer = loop {
        client.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        let answer = read_answer(&mut client).await;
        if !answer.starts_with("HTTP/1.1 503") {
            break answer;
        }
    };
    assert!(answer.contains("data: {\"error\":{"), "{answer}");
    let ended = timeout(DEADLINE, serving).await.unwrap().unwrap();
    assert!(matches!(ended, Err(ServeError::EngineDied)), "{ended:?}");
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_ends_the_process() {
    let server = Setup {
        is_loaded: false,
        ..Setup::default()
    }
    .start();
    let listener = Listener::bind(&http()).await.unwrap();
    let http = http();
    let serving = serve_on(listener, &http, server.state.clone(), |_| Err(LoadError::NoTokenizer));
    let ended = timeout(DEADLINE, serving).await.unwrap();
    assert!(matches!(ended, Err(ServeError::Load(_))), "{ended:?}");
}

/// One answer: to the end of a stream, or to the end of a body of known length.
async fn read_answer(client: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes);
        let is_over = match text.split_once("\r\n\r\n") {
            Some((head, body)) => match head.to_ascii_lowercase().split_once("content-length: ") {
                Some((_, rest)) => body.len() >= rest.lines().next().unwrap().parse::<usize>().unwrap(),
                None => body.contains("\r\n0\r\n\r\n"),
            },
            None => false,
        };
        if is_over {
            return text.into_owned();
        }
        assert!(
            client.read_buf(&mut bytes).await.unwrap() > 0,
            "cut off: {}",
            String::from_utf8_lossy(&bytes)
        );
    }
}
